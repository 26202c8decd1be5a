"""Pipelines whose latents are four-dimensional and whose text is a cross-attention, or a stream beside the image."""

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from diffusers.pipelines.prx import pipeline_prx
from tiny_parts import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    bert_encoder,
    bert_tokenizer,
    dc_vae,
    gemma_encoder,
    gemma_tokenizer,
    glm_encoder,
    glm_tokenizer,
    kl_vae,
    redrawn,
    t5_encoder,
    t5_tokenizer,
    t5gemma_encoder,
    umt5_encoder,
)

from tiny_families import Builder
from tiny_families import pixart_by_hand as by_hand

_HEADS, _HEAD = 2, 16
_WIDTH = _HEADS * _HEAD


def _seeded(build: Callable[..., Path]) -> Callable[..., Path]:
    """Let a builder draw the same weights each time, and leave torch's generator as it was."""

    @wraps(build)
    def seeded(folder: Path, **options: Any) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(folder, **options)

    return seeded


def _saved(pipe: Any, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder


@_seeded
def pixart(folder: Path, *, pipeline: Any, old_name: bool = False) -> Path:
    """Save one of the two; at alpha's sample size, 128, its pipeline passes the picture's size and shape too.

    Published repositories call the transformer by its old name.
    """
    tokenizer = t5_tokenizer(folder / "tokenizer")
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=_HEAD,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=3,
        cross_attention_dim=3 * _HEAD,
        caption_channels=2 * TEXT_WIDTH,
        sample_size=128 if pipeline is PixArtAlphaPipeline else 8,
    )
    scheduler = DDPMScheduler(beta_schedule="linear")
    vae, encoder = kl_vae(), t5_encoder(tokenizer)
    _saved(pipeline(tokenizer, encoder, vae, redrawn(transformer), scheduler), folder)
    if old_name:
        for path in (folder / "model_index.json", folder / "transformer" / "config.json"):
            path.write_text(path.read_text().replace('"PixArtTransformer2DModel"', '"Transformer2DModel"'))
    return folder


@_seeded
def sana(folder: Path) -> Path:
    tokenizer = gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD,
        num_layers=3,
        num_cross_attention_heads=_HEADS,
        cross_attention_head_dim=_HEAD,
        cross_attention_dim=_WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=8,
        timestep_scale=0.5,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = SanaPipeline(tokenizer, gemma_encoder(tokenizer), dc_vae(), redrawn(transformer), scheduler)
    return _saved(pipe, folder)


@_seeded
def hunyuan_dit(folder: Path) -> Path:
    """Save the one whose pipeline takes it that a latent pixel has 8 pixels, and gives 77 and 256 tokens."""
    tokenizer, tokenizer_2 = bert_tokenizer(), t5_tokenizer(folder / "tokenizer_2")
    transformer = HunyuanDiT2DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD,
        in_channels=LATENT_CHANNELS,
        patch_size=2,
        sample_size=8,
        hidden_size=_WIDTH,
        num_layers=4,
        cross_attention_dim=TEXT_WIDTH,
        cross_attention_dim_t5=2 * TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
    )
    pipe = HunyuanDiTPipeline(
        kl_vae(levels=4),
        bert_encoder(tokenizer),
        tokenizer,
        redrawn(transformer),
        DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.03, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
    )
    return _saved(pipe, folder)


@_seeded
def aura_flow(folder: Path) -> Path:
    tokenizer = t5_tokenizer(folder / "tokenizer")
    transformer = redrawn(
        AuraFlowTransformer2DModel(
            sample_size=8,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            num_attention_heads=_HEADS,
            attention_head_dim=_HEAD,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=_WIDTH,
            pos_embed_max_size=64,
        )
    )
    for table in (transformer.register_tokens, transformer.pos_embed.pos_embed):
        torch.nn.init.normal_(table)  # `redrawn` takes their rows for inputs of one sum
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return _saved(AuraFlowPipeline(tokenizer, umt5_encoder(tokenizer), kl_vae(), transformer, scheduler), folder)


@_seeded
def cogview4(folder: Path) -> Path:
    tokenizer = glm_tokenizer()
    transformer = CogView4Transformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        attention_head_dim=_HEAD,
        num_attention_heads=_HEADS,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=24,
        condition_dim=8,
        sample_size=8,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75)
    return _saved(
        CogView4Pipeline(tokenizer, glm_encoder(tokenizer), kl_vae(), redrawn(transformer), scheduler), folder
    )


@_seeded
def cogview3_plus(folder: Path) -> Path:
    tokenizer = t5_tokenizer(folder / "tokenizer")
    transformer = CogView3PlusTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        attention_head_dim=_HEAD,
        num_attention_heads=_HEADS,
        text_embed_dim=2 * TEXT_WIDTH,
        time_embed_dim=24,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=8,
    )
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0)
    return _saved(
        CogView3PlusPipeline(tokenizer, t5_encoder(tokenizer), kl_vae(), redrawn(transformer), scheduler), folder
    )


@_seeded
def prx(folder: Path) -> Path:
    """Save the one whose text encoder is half of a T5Gemma; its pipeline needs ftfy, of which a stand-in does here."""
    if not hasattr(pipeline_prx, "ftfy"):
        pipeline_prx.ftfy = SimpleNamespace(fix_text=str)
    tokenizer = gemma_tokenizer()
    transformer = PRXTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        context_in_dim=TEXT_WIDTH,
        hidden_size=_WIDTH,
        num_heads=_HEADS,
        depth=3,
        axes_dim=[_HEAD // 2, _HEAD // 2],
    )
    parts = redrawn(transformer), FlowMatchEulerDiscreteScheduler(shift=3.0), t5gemma_encoder(tokenizer), tokenizer
    return _saved(PRXPipeline(*parts, kl_vae(), default_sample_size=16), folder)


def _pixart_builder(pipeline: Any, *, old_name: bool, length: int) -> Builder:
    return Builder(
        "Transformer2DModel" if old_name else "PixArtTransformer2DModel",
        pipeline.__name__,
        partial(pixart, pipeline=pipeline, old_name=old_name),
        by_hand=partial(by_hand.pixart, length=length),
        size=(16, 24),
        resize="pad",
    )


PIPELINES = {
    "pixart_alpha": _pixart_builder(PixArtAlphaPipeline, old_name=False, length=120),
    "pixart_alpha_old": _pixart_builder(PixArtAlphaPipeline, old_name=True, length=120),
    "pixart_sigma": _pixart_builder(PixArtSigmaPipeline, old_name=False, length=300),
    "pixart_sigma_old": _pixart_builder(PixArtSigmaPipeline, old_name=True, length=300),
    "sana": Builder("SanaTransformer2DModel", "SanaPipeline", sana, by_hand=by_hand.sana, size=(32, 64), resize="pad"),
    "hunyuan_dit": Builder(
        "HunyuanDiT2DModel", "HunyuanDiTPipeline", hunyuan_dit, by_hand=by_hand.hunyuan_dit, size=(48, 80)
    ),
    "aura_flow": Builder(
        "AuraFlowTransformer2DModel",
        "AuraFlowPipeline",
        aura_flow,
        by_hand=by_hand.aura_flow,
        size=(16, 24),
        note="most text tokens are zeros before the first block",
    ),
    "cogview4": Builder(
        "CogView4Transformer2DModel",
        "CogView4Pipeline",
        cogview4,
        by_hand=by_hand.cogview4,
        size=(16, 32),
        resize="pad",
    ),  # its pipeline takes multiples of 16 pixels only, which are a token of the real model and four of the tiny one
    "cogview3_plus": Builder(
        "CogView3PlusTransformer2DModel",
        "CogView3PlusPipeline",
        cogview3_plus,
        by_hand=by_hand.cogview3_plus,
        size=(16, 24),
        resize="pad",
    ),
    "prx": Builder(
        "PRXTransformer2DModel",
        "PRXPipeline",
        prx,
        by_hand=by_hand.prx,
        size=(16, 24),
        note="ftfy has a stand-in where it is not installed",
    ),
}
