"""The playground's networks before training: VAE, tokenizer, text encoders, transformers.

Shapes: pictures (B, 3, 32, 32) <-> latents (B, 8, 8, 8) -> 16 image tokens; captions -> 16 text tokens, 2 x 64 wide.
"""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

TEXT_WIDTH = 64
MAX_TOKENS = 16  # the longest caption has 14 words, and a start and an end token
LATENT_CHANNELS = 8
HEAD_WIDTH = 16

# These libraries hand out classes that type checkers cannot follow.
AutoencoderKL: Any = diffusers.AutoencoderKL
SD3Transformer2DModel: Any = diffusers.SD3Transformer2DModel
StableDiffusion3Pipeline: Any = diffusers.StableDiffusion3Pipeline
FlowMatchEulerDiscreteScheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler
CLIPTextConfig: Any = transformers.CLIPTextConfig
CLIPTextModelWithProjection: Any = transformers.CLIPTextModelWithProjection
CLIPTokenizer: Any = transformers.CLIPTokenizer


def new_vae() -> Any:
    """Build an untrained VAE: a factor of 4, 8 latent channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def build_tokenizer(captions: list[str], folder: Path) -> Any:
    """Write a CLIP tokenizer whose byte-pair merges join every word of the captions into one token, and load it."""
    words = sorted({word for caption in captions for word in caption.split()})
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    tokens = {piece for word in pieces for piece in word}
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        tokens.add("".join(merges[-1]))
        pieces = [_merge(word, merges[-1]) for word in pieces]
    vocabulary = {token: index for index, token in enumerate([*sorted(tokens), "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def _merge(word: list[str], merge: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in word:
        if joined and (joined[-1], piece) == merge:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def new_text_encoder(tokenizer: Any, *, seed: int) -> Any:
    """Build an untrained text encoder: two layers, 64 wide."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    with torch.no_grad():  # CLIP's 0.02 is meant for far longer training
        for name, parameter in encoder.named_parameters():
            if "embedding" in name:
                parameter.mul_(20)
    return encoder


def new_transformer(*, blocks: int, width: int, seed: int) -> Any:
    """Build an untrained transformer: adaLN projections start at zero, with open gates (bias 0.3)."""
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=blocks,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=width // HEAD_WIDTH,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")):
                module.weight.zero_()
                module.bias.zero_()
                if module.out_features == 6 * width:  # shift, scale, gate of attention; shift, scale, gate of the MLP
                    gates = module.bias.view(6, width)
                    gates[2] = gates[5] = 0.3
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
    return model
