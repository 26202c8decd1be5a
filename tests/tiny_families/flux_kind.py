"""Tiny pipelines of Flux and its relatives: text and image streams that merge, 2 x 2 latent pixels in a token."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_parts import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    clip_tokenizer,
    flux2_vae,
    kl_vae,
    qwen3_config,
    qwen25_vl_encoder,
    qwen_tokenizer,
    redrawn,
    t5_encoder,
    t5_tokenizer,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tiny_families import Builder
from tiny_families import flux_by_hand as by_hand

FIBO_EMPTY_TOKEN = 128_000  # what the pipeline takes for an empty prompt, whatever the tokenizer

_SHAPE: dict[str, Any] = {
    "in_channels": 4 * LATENT_CHANNELS,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
}


def flux(folder: Path) -> Path:
    tokenizer, second = clip_tokenizer(folder / "tokenizer"), t5_tokenizer(folder / "tokenizer_2")
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _saved(
        folder,
        "FluxPipeline",
        transformer=diffusers.FluxTransformer2DModel(
            **_SHAPE, joint_attention_dim=2 * TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH, guidance_embeds=True
        ),
        vae=kl_vae(),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(second),
        tokenizer_2=second,
    )


def chroma(folder: Path) -> Path:
    tokenizer = t5_tokenizer(folder / "tokenizer")
    return _saved(
        folder,
        "ChromaPipeline",
        transformer=diffusers.ChromaTransformer2DModel(
            **_SHAPE,
            joint_attention_dim=2 * TEXT_WIDTH,
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=2,
        ),
        vae=kl_vae(),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
    )


def bria(folder: Path) -> Path:
    tokenizer = t5_tokenizer(folder / "tokenizer")
    return _saved(
        folder,
        "BriaPipeline",
        transformer=diffusers.BriaTransformer2DModel(**_SHAPE, joint_attention_dim=2 * TEXT_WIDTH),
        vae=kl_vae(),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
    )


def ovis_image(folder: Path) -> Path:
    tokenizer = qwen_tokenizer(by_hand.OVIS_SYSTEM)
    return _saved(
        folder,
        "OvisImagePipeline",
        transformer=diffusers.OvisImageTransformer2DModel(
            **_SHAPE, out_channels=4 * LATENT_CHANNELS, joint_attention_dim=TEXT_WIDTH
        ),
        vae=kl_vae(),
        text_encoder=Qwen3Model(qwen3_config(tokenizer)),
        tokenizer=tokenizer,
    )


def longcat_image(folder: Path) -> Path:
    """Leave out the processor that would rewrite prompts: it needs torchvision, and prompts are not rewritten."""
    tokenizer = qwen_tokenizer(by_hand.LONGCAT_PREFIX)
    return _saved(
        folder,
        "LongCatImagePipeline",
        transformer=diffusers.LongCatImageTransformer2DModel(**_SHAPE, joint_attention_dim=TEXT_WIDTH),
        vae=kl_vae(),
        text_encoder=qwen25_vl_encoder(tokenizer),
        tokenizer=tokenizer,
        text_processor=None,
    )


def flux2(folder: Path) -> Path:
    """Use a tokenizer where published repositories have a PixtralProcessor around one, which needs torchvision."""
    tokenizer = qwen_tokenizer(by_hand.FLUX2_SYSTEM)
    text = {"model_type": "mistral", "num_hidden_layers": 30, **_decoder(tokenizer)}  # layers 10, 20 and 30 are read
    return _saved(
        folder,
        "Flux2Pipeline",
        transformer=_flux2_transformer(guidance_embeds=True),
        vae=flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(
            Mistral3Config(
                text_config=text,
                vision_config={
                    "model_type": "pixtral",
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                },
            )
        ),
        tokenizer=tokenizer,
    )


def flux2_klein(folder: Path) -> Path:
    tokenizer = qwen_tokenizer()
    return _saved(
        folder,
        "Flux2KleinPipeline",
        transformer=_flux2_transformer(guidance_embeds=False),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(qwen3_config(tokenizer, n_layers=27)),  # layers 9, 18 and 27 are read
        tokenizer=tokenizer,
    )


def _flux2_transformer(*, guidance_embeds: bool) -> Any:
    return diffusers.Flux2Transformer2DModel(
        **_SHAPE | {"axes_dims_rope": (4, 4, 4, 4)},
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=32,
        guidance_embeds=guidance_embeds,
    )


def bria_fibo(folder: Path) -> Path:
    """Take latents of 16 pixels on a side, one of which is one token."""
    words = qwen_tokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, pad_token=words.pad_token)
    text = SmolLM3Config(
        **_decoder(tokenizer) | {"vocab_size": FIBO_EMPTY_TOKEN + 1}, num_hidden_layers=3, eos_token_id=0
    )
    return _saved(
        folder,
        "BriaFiboPipeline",
        transformer=diffusers.BriaFiboTransformer2DModel(
            **_SHAPE | {"in_channels": LATENT_CHANNELS},
            joint_attention_dim=2 * TEXT_WIDTH,
            text_encoder_dim=TEXT_WIDTH,
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.3, -0.2, 0.1, -0.4],
            latents_std=[1.5, 0.7, 1.2, 0.9],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        ),
        text_encoder=SmolLM3ForCausalLM(text),
        tokenizer=tokenizer,
    )


def bria_fibo2(folder: Path) -> Path:
    """Use a tokenizer where published repositories have a Qwen3VLProcessor around one, which needs torchvision."""
    tokenizer = qwen_tokenizer(by_hand.FIBO2_TEMPLATE)
    text = {"head_dim": 8, "num_hidden_layers": 35, **_decoder(tokenizer)}  # six bundles of layers up to 35 are read
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return _saved(
        folder,
        "BriaFibo2Pipeline",
        transformer=diffusers.BriaFibo2Transformer2DModel(
            in_channels=LATENT_CHANNELS,
            dim=32,
            n_layers=4,
            n_refiner_layers=2,
            n_heads=2,
            cap_feat_dim=3 * TEXT_WIDTH,
            injection_layer_ids=(1, 2),
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=2,
            gist_min_text_len=4,
            gist_max_text_len=64,
            axes_dims=(4, 6, 6),
            axes_lens=(32, 32, 32),
        ),
        vae=flux2_vae(),
        text_encoder=Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                text_config=text,
                vision_config=vision | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            )
        ),
        processor=tokenizer,
    )


def _decoder(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id,
    }


def _saved(folder: Path, pipeline: str, **parts: Any) -> Path:
    """Draw the weights of transformer and text encoders anew and save the pipeline."""
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            redrawn(part)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    getattr(diffusers, pipeline)(scheduler=scheduler, **parts).save_pretrained(folder)
    return folder


def _seeded(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def built(folder: Path) -> Path:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)  # diffusers' own Chroma
            torch.manual_seed(0)
            return build(folder)

    return built


def _builder(model: str, build: Callable[[Path], Path], forward: Callable[..., Any], **rest: Any) -> Builder:
    pipeline = f"{rest.pop('pipeline', model)}Pipeline"
    return Builder(f"{model}Transformer2DModel", pipeline, _seeded(build), forward, **{"size": (16, 24), **rest})


PIPELINES = {
    "flux": _builder("Flux", flux, by_hand.flux),
    "flux2": _builder("Flux2", flux2, by_hand.flux2),
    "flux2_klein": _builder("Flux2", flux2_klein, by_hand.flux2_klein, pipeline="Flux2Klein"),
    "chroma": _builder("Chroma", chroma, by_hand.chroma),
    "bria": _builder(
        "Bria",
        bria,
        by_hand.bria,
        note="most text tokens are one and the same padding, so rounding does not average out of their mean",
    ),
    "bria_fibo": _builder("BriaFibo", bria_fibo, by_hand.bria_fibo, size=(48, 64)),
    "bria_fibo2": _builder("BriaFibo2", bria_fibo2, by_hand.bria_fibo2),
    "longcat_image": _builder("LongCatImage", longcat_image, by_hand.longcat_image),
    "ovis_image": _builder("OvisImage", ovis_image, by_hand.ovis_image),
}
