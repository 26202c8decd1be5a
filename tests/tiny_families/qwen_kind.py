"""Pipelines whose text comes from a large language model: Qwen-Image, Z-Image, Lumina, Krea 2, Nucleus, ERNIE.

The hand-written forwards use what the pipelines say of templates and layouts, and the transformers' modules one by one.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    DiffusionPipeline,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_parts import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    flux2_vae,
    gemma_encoder,
    gemma_tokenizer,
    kl_vae,
    qwen3_config,
    qwen3_vl_config,
    qwen25_vl_encoder,
    qwen_image_vae,
    qwen_tokenizer,
    qwen_vl_processor,
    redrawn,
)
from transformers import (
    GemmaConfig,
    GemmaModel,
    Mistral3Config,
    Mistral3Model,
    Qwen3Model,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)

from tiny_families import Builder, qwen_by_hand

WIDTH, HEADS, AXES = 32, 2, (4, 6, 6)  # of the transformers; AXES = channels of a head that rotate along each axis
PACKED = 4 * LATENT_CHANNELS


def _saved(pipeline: type[DiffusionPipeline], folder: Path, **parts: Any) -> Path:
    pipe = pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    pipe.save_pretrained(folder)
    return folder


def qwen_image(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(qwen_by_hand.QWEN_TEMPLATE)
    transformer = QwenImageTransformer2DModel(
        in_channels=PACKED,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=AXES,
    )
    return _saved(
        QwenImagePipeline,
        folder,
        transformer=redrawn(transformer),
        vae=qwen_image_vae(),
        text_encoder=qwen25_vl_encoder(tokenizer),
        tokenizer=tokenizer,
    )


def qwen_image_21(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(qwen_by_hand.QWEN_21_SYSTEM)
    transformer = QwenImage21Transformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        context_in_dim=TEXT_WIDTH,
        axes_dims_rope=AXES,
    )
    vae = AutoencoderKLQwenImage21(  # the pipeline takes 16 pixels on a side of a latent, and 4 channels, for granted
        base_dim=4,
        decoder_base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, False, False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.05],
        latents_std=[0.7, 1.5, 0.9, 1.2],
    )
    return _saved(
        QwenImage21Pipeline,
        folder,
        transformer=redrawn(transformer),
        vae=redrawn(vae),
        text_encoder=redrawn(Qwen3VLForConditionalGeneration(qwen3_vl_config(tokenizer, n_layers=2))),
        processor=qwen_vl_processor(tokenizer),
    )


def z_image(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=WIDTH,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=list(AXES),
        axes_lens=[640, 32, 32],
    )
    return _saved(
        ZImagePipeline,
        folder,
        transformer=redrawn(transformer),
        vae=kl_vae(),
        text_encoder=redrawn(Qwen3Model(qwen3_config(tokenizer))),
        tokenizer=tokenizer,
    )


def lumina2(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        hidden_size=WIDTH,
        num_layers=3,
        num_refiner_layers=2,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=AXES,
        axes_lens=(300, 32, 32),
        cap_feat_dim=TEXT_WIDTH,
    )
    return _saved(
        Lumina2Pipeline,
        folder,
        transformer=redrawn(transformer),
        vae=kl_vae(levels=4),
        text_encoder=gemma_encoder(tokenizer),
        tokenizer=tokenizer,
    )


def lumina_next(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    encoder = GemmaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    transformer = LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        hidden_size=WIDTH,
        num_layers=3,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=TEXT_WIDTH,
    )
    torch.nn.init.zeros_(transformer.pad_token)  # its constructor leaves it undefined
    return _saved(
        LuminaPipeline,
        folder,
        transformer=redrawn(transformer),
        vae=kl_vae(levels=4),
        text_encoder=redrawn(GemmaModel(encoder)),
        tokenizer=tokenizer,
    )


def krea2(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(qwen_by_hand.QWEN_TEMPLATE)
    transformer = Krea2Transformer2DModel(
        in_channels=PACKED,
        num_layers=3,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        intermediate_size=2 * WIDTH,
        timestep_embed_dim=16,
        text_hidden_dim=TEXT_WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=2 * TEXT_WIDTH,
        axes_dims_rope=AXES,
    )
    return _saved(
        Krea2Pipeline,
        folder,
        transformer=redrawn(transformer),
        vae=qwen_image_vae(),
        text_encoder=redrawn(Qwen3VLModel(qwen3_vl_config(tokenizer, n_layers=3))),
        tokenizer=tokenizer,
        text_encoder_select_layers=(0, 1, 3),
    )


def nucleus(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=PACKED,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=AXES,
        mlp_ratio=6.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    return _saved(
        NucleusMoEImagePipeline,
        folder,
        transformer=redrawn(transformer),
        vae=qwen_image_vae(),
        text_encoder=redrawn(Qwen3VLForConditionalGeneration(qwen3_vl_config(tokenizer, n_layers=9))),
        processor=qwen_vl_processor(tokenizer),
    )


def ernie(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    text = {
        "model_type": "ministral3",
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    encoder = Mistral3Config(text_config=text, vision_config={**vision, "num_attention_heads": 2, "image_size": 32})
    transformer = ErnieImageTransformer2DModel(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_layers=3,
        ffn_hidden_size=2 * WIDTH,
        in_channels=PACKED,
        out_channels=PACKED,
        text_in_dim=TEXT_WIDTH,
        rope_axes_dim=AXES,
    )
    return _saved(
        ErnieImagePipeline,
        folder,
        transformer=redrawn(transformer),
        vae=flux2_vae(),
        text_encoder=redrawn(Mistral3Model(encoder)),
        tokenizer=tokenizer,
    )


PIPELINES = {
    "qwen_image": Builder(
        "QwenImageTransformer2DModel", "QwenImagePipeline", qwen_image, qwen_by_hand.qwen_image, size=(16, 24)
    ),
    "qwen_image_21": Builder(
        "QwenImage21Transformer2DModel",
        "QwenImage21Pipeline",
        qwen_image_21,
        qwen_by_hand.qwen_image_21,
        size=(64, 96),
        note="text never sees the image; a VAE of 4 channels",
    ),
    "z_image": Builder(
        "ZImageTransformer2DModel",
        "ZImagePipeline",
        z_image,
        qwen_by_hand.z_image,
        size=(16, 24),
        note="24 image tokens are padded to 32",
    ),
    "lumina2": Builder(
        "Lumina2Transformer2DModel",
        "Lumina2Pipeline",
        lumina2,
        qwen_by_hand.lumina2,
        size=(64, 96),
        note="prompts of unequal length are joined: the image begins at another place in each sample",
    ),
    "lumina_next": Builder(
        "LuminaNextDiT2DModel", "LuminaPipeline", lumina_next, qwen_by_hand.lumina_next, size=(64, 96)
    ),
    "krea2": Builder("Krea2Transformer2DModel", "Krea2Pipeline", krea2, qwen_by_hand.krea2, size=(16, 24)),
    "nucleus": Builder(
        "NucleusMoEImageTransformer2DModel",
        "NucleusMoEImagePipeline",
        nucleus,
        qwen_by_hand.nucleus,
        size=(16, 24),
        note="a dense block, then two of experts that choose their tokens; text is padded to a multiple of 8",
    ),
    "ernie_image": Builder(
        "ErnieImageTransformer2DModel",
        "ErnieImagePipeline",
        ernie,
        qwen_by_hand.ernie_image,
        size=(16, 24),
        note="tensors are (s, b, d)",
    ),
}
