"""Tiny random Stable Diffusion 3 pipelines, built offline and saved as ordinary diffusers folders.

Their property: every weight is drawn anew after construction, so that no gate is zero and no block an identity, and the
latents have a shift and a scale. They have learned nothing.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_parts import (
    LATENT_CHANNELS,
    RESOLUTION,
    TEXT_WIDTH,
    clip_encoder,
    clip_tokenizer,
    kl_vae,
    redrawn,
    t5_encoder,
    t5_tokenizer,
)


def tiny_pipeline(
    folder: Path, *, seed: int = 0, n_blocks: int = 3, heads: int = 2, shift: float = 3.0, t5: bool = False
) -> Path:
    """Save a pipeline whose resolution is 16 pixels: 8 x 8 latents of 4 channels, 16 image tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(folder / "tokenizer")
        third = t5_tokenizer(folder / "tokenizer_3") if t5 else None
        pipe = StableDiffusion3Pipeline(
            transformer=_transformer(n_blocks, heads),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=kl_vae(),
            text_encoder=clip_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=clip_encoder(tokenizer),
            tokenizer_2=tokenizer,
            text_encoder_3=t5_encoder(third) if third else None,
            tokenizer_3=third,
        )
    pipe.save_pretrained(folder)
    return folder


def tiny_transformer(folder: Path, *, seed: int = 1, n_blocks: int = 3, heads: int = 2, **config: Any) -> Path:
    """Save a transformer alone, of the shape that `tiny_pipeline` has unless `config` says otherwise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _transformer(n_blocks, heads, **config).save_pretrained(folder)
    return folder


def _transformer(n_blocks: int, heads: int, **config: Any) -> SD3Transformer2DModel:
    settings: dict[str, Any] = {
        "sample_size": RESOLUTION // 2,
        "patch_size": 2,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_layers": n_blocks,
        "attention_head_dim": 16,
        "num_attention_heads": heads,
        "joint_attention_dim": 2 * TEXT_WIDTH,
        "caption_projection_dim": 16 * heads,
        "pooled_projection_dim": 2 * TEXT_WIDTH,
        "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
    }
    return redrawn(SD3Transformer2DModel(**(settings | config)))
