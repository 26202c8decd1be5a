"""Pipelines that share little with each other: a guider, a mixture of experts, sizes of their own."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    JoyImageEditPipeline,
    JoyImageEditTransformer3DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
)
from tiny_parts import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    clip_encoder,
    clip_tokenizer,
    flux2_vae,
    kl_vae,
    llama_encoder,
    llama_tokenizer,
    qwen3_vl_config,
    qwen25_vl_encoder,
    qwen_tokenizer,
    qwen_vl_processor,
    redrawn,
    t5_encoder,
    t5_tokenizer,
)
from transformers import ByT5Tokenizer, CLIPTextModel, Qwen3VLForConditionalGeneration, Qwen3VLModel

from tiny_families import Builder, others_by_hand

_HEADS, _HEAD = 2, 16
_WIDTH = _HEADS * _HEAD


def _saved(pipe: Any, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder


def hunyuan_image(folder: Path) -> Path:
    guiders = {"guider": AdaptiveProjectedMixGuidance(), "ocr_guider": AdaptiveProjectedMixGuidance()}
    return _hunyuan_image(folder, guiders)


def hunyuan_image_distilled(folder: Path) -> Path:
    return _hunyuan_image(folder, {}, guidance_embeds=True, use_meanflow=True)


def _hunyuan_image(folder: Path, guiders: dict[str, Any], **config: Any) -> Path:
    torch.manual_seed(0)
    tokenizer, glyphs = qwen_tokenizer(f"Describe the image by detailing {others_by_hand.DESCRIBE}"), ByT5Tokenizer()
    transformer = HunyuanImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        text_embed_2_dim=2 * TEXT_WIDTH,
        rope_axes_dim=(8, 8),
        **config,
    )
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.75,
    )
    pipe = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=redrawn(vae),
        text_encoder=qwen25_vl_encoder(tokenizer, n_layers=4),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(glyphs),
        tokenizer_2=glyphs,
        transformer=redrawn(transformer),
        **guiders,
    )
    return _saved(pipe, folder)


def hidream(folder: Path) -> Path:
    """Save one whose every block reads a layer of Llama, and whose pictures that are no squares are padded."""
    torch.manual_seed(0)
    clip, t5, llama = clip_tokenizer(folder / "tokenizer", 128), t5_tokenizer(folder / "tokenizer_3"), llama_tokenizer()
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=_HEAD,
        num_attention_heads=_HEADS,
        caption_channels=[2 * TEXT_WIDTH, TEXT_WIDTH],
        text_emb_dim=2 * TEXT_WIDTH,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(16, 16),
        llama_layers=[0, 1, 1, 2],
    )
    pipe = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(),
        text_encoder=clip_encoder(clip),
        tokenizer=clip,
        text_encoder_2=clip_encoder(clip),
        tokenizer_2=clip,
        text_encoder_3=t5_encoder(t5),
        tokenizer_3=t5,
        text_encoder_4=llama_encoder(llama),
        tokenizer_4=llama,
        transformer=redrawn(transformer),
    )
    return _saved(pipe, folder)


def kandinsky5(folder: Path) -> Path:
    """Save one with 8 pixels on a side of a latent pixel, which its pipeline takes for granted."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(f"You are a prompt engineer. Describe the image by detailing {others_by_hand.DESCRIBE}")
    clip = clip_tokenizer(folder / "tokenizer_2", 77)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=LATENT_CHANNELS,
        out_visual_dim=LATENT_CHANNELS,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=TEXT_WIDTH,
        time_dim=24,
        model_dim=_WIDTH,
        ff_dim=2 * _WIDTH,
        num_text_blocks=1,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
    )
    redrawn(transformer)
    for name, module in transformer.named_modules():  # these were drawn as if they were tables
        if "_embeddings." in name and isinstance(module, torch.nn.Linear):
            module.weight.data.mul_(module.in_features**-0.5)
        if name.endswith(("query_norm", "key_norm")):  # its pipeline rounds turned queries to bfloat16: soft attention
            module.weight.data.mul_(0.3)
    pipe = Kandinsky5T2IPipeline(
        transformer=transformer,
        vae=kl_vae(levels=4),
        text_encoder=qwen25_vl_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=redrawn(CLIPTextModel(clip_encoder(clip).config)),
        tokenizer_2=clip,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return _saved(pipe, folder)


def ideogram4(folder: Path) -> Path:
    """Save one whose text encoder has the 36 layers that its pipeline reads, and which holds a second transformer."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    config = {
        "in_channels": 4 * LATENT_CHANNELS,
        "num_layers": 3,
        "attention_head_dim": _HEAD,
        "num_attention_heads": _HEADS,
        "intermediate_size": 2 * _WIDTH,
        "adaln_dim": 24,
        "llm_features_dim": 13 * TEXT_WIDTH,
        "mrope_section": (4, 2, 2),
    }
    pipe = Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flux2_vae(),
        text_encoder=redrawn(Qwen3VLModel(qwen3_vl_config(tokenizer, 36))),
        tokenizer=tokenizer,
        transformer=redrawn(Ideogram4Transformer2DModel(**config)),
        unconditional_transformer=redrawn(Ideogram4Transformer2DModel(**config)),
    )
    return _saved(pipe, folder)


def joyimage(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(f"Describe the image by detailing {others_by_hand.DESCRIBE}")
    transformer = JoyImageEditTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        hidden_size=_WIDTH,
        num_attention_heads=_HEADS,
        text_dim=TEXT_WIDTH,
        num_layers=3,
        rope_dim_list=[4, 6, 6],
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.05],
        latents_std=[0.7, 1.5, 0.9, 1.2],
        scale_factor_spatial=2,
    )
    pipe = JoyImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=redrawn(vae),
        text_encoder=redrawn(Qwen3VLForConditionalGeneration(qwen3_vl_config(tokenizer, 2))),
        tokenizer=tokenizer,
        transformer=redrawn(transformer),
        processor=qwen_vl_processor(tokenizer),
    )
    return _saved(pipe, folder)


PIPELINES = {
    "hunyuan-image": Builder(
        "HunyuanImageTransformer2DModel",
        "HunyuanImagePipeline",
        hunyuan_image,
        others_by_hand.hunyuan_image,
        (16, 24),
        note="a guider; 1000 places for text, 128 for words in quotes",
    ),
    "hunyuan-image-distilled": Builder(
        "HunyuanImageTransformer2DModel",
        "HunyuanImagePipeline",
        hunyuan_image_distilled,
        others_by_hand.hunyuan_image,
        (16, 24),
        note="no guider; guidance and the next timestep are embedded",
    ),
    "hidream": Builder(
        "HiDreamImageTransformer2DModel",
        "HiDreamImagePipeline",
        hidream,
        others_by_hand.hidream,
        (16, 24),
        note="a layer of Llama for every block; experts; padding of pictures that are no squares",
    ),
    "ideogram4": Builder(
        "Ideogram4Transformer2DModel",
        "Ideogram4Pipeline",
        ideogram4,
        others_by_hand.ideogram4,
        (16, 24),
        tolerance=1e-5,
        max_tokens=256,
        note="attention over all places for text (2048 by default), whose order of summation depends on the batch",
    ),
    "joyimage": Builder(
        "JoyImageEditTransformer3DModel", "JoyImageEditPipeline", joyimage, others_by_hand.joyimage, (16, 24)
    ),
    "kandinsky5": Builder(
        "Kandinsky5Transformer3DModel",
        "Kandinsky5T2IPipeline",
        kandinsky5,
        others_by_hand.kandinsky5,
        (64, 96),
        tolerance=1e-5,
        note="queries and keys are rounded to bfloat16 when they are turned",
    ),
}
