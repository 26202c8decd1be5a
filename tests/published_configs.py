"""Folders of three published pipelines as far as their configs go: no weights, and tiny tokenizers.

Their property: every ``config.json`` has the values of the published one (Stable Diffusion 3.5 Large, FLUX.1-dev,
Qwen-Image), so blocks, widths, parameters and operations are the real ones. The tokenizers are not: they know a few
words, one token each, and the lengths that the real ones pad to.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_parts import clip_tokenizer, t5_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from probekit.backbones.counting import PROMPT

_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
_DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 256, "base_shift": 0.5}
_CLIP = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_CLIP_L = _CLIP | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_CLIP_G = _CLIP | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_T5_XXL = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_QWEN_VL_7B = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
_KL = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
_SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 2432,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 38,
    "num_layers": 38,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}
_FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
_QWEN = {
    "_class_name": "QwenImageTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}


def sd35_large(folder: Path) -> Path:
    _write(
        folder,
        "StableDiffusion3Pipeline",
        scheduler=_FLOW | {"shift": 3.0},
        text_encoder=_encoder("CLIPTextModelWithProjection", _CLIP_L),
        text_encoder_2=_encoder("CLIPTextModelWithProjection", _CLIP_G),
        text_encoder_3=_encoder("T5EncoderModel", _T5_XXL),
        tokenizer=_clip,
        tokenizer_2=_clip,
        tokenizer_3=_t5,
        transformer=_SD3,
        vae=_KL | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    )
    return folder


def flux1_dev(folder: Path) -> Path:
    _write(
        folder,
        "FluxPipeline",
        scheduler=_FLOW | _DYNAMIC | {"shift": 3.0, "max_image_seq_len": 4096, "max_shift": 1.15},
        text_encoder=_encoder("CLIPTextModel", _CLIP_L),
        text_encoder_2=_encoder("T5EncoderModel", _T5_XXL),
        tokenizer=_clip,
        tokenizer_2=_t5,
        transformer=_FLUX,
        vae=_KL | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    )
    return folder


def qwen_image(folder: Path) -> Path:
    _write(
        folder,
        "QwenImagePipeline",
        scheduler=_FLOW
        | _DYNAMIC
        | {"shift": 1.0, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02},
        text_encoder=_encoder("Qwen2_5_VLForConditionalGeneration", _QWEN_VL_7B),
        tokenizer=_qwen,
        transformer=_QWEN,
        vae={"_class_name": "AutoencoderKLQwenImage", "z_dim": 16},
    )
    return folder


def _encoder(class_name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"architectures": [class_name], **config}


def _write(folder: Path, pipeline: str, **parts: dict[str, Any] | Callable[[Path], str]) -> None:
    index: dict[str, Any] = {"_class_name": pipeline}
    for name, part in parts.items():
        if callable(part):
            index[name] = ["transformers", part(folder / name)]
            continue
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(part))
        is_diffusers = "_class_name" in part
        index[name] = ["diffusers", part["_class_name"]] if is_diffusers else ["transformers", part["architectures"][0]]
    (folder / "model_index.json").write_text(json.dumps(index))


def _clip(folder: Path) -> str:
    clip_tokenizer(folder)
    CLIPTokenizer.from_pretrained(folder, model_max_length=77).save_pretrained(folder)
    return "CLIPTokenizer"


def _t5(folder: Path) -> str:
    t5_tokenizer(folder)
    return "T5TokenizerFast"


_QWEN_WORDS = (
    "system\nuser\nassistant\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:"
)


def _qwen(folder: Path) -> str:
    """Write a byte-level tokenizer in which every word of the pipeline's template and of the prompt is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROMPT, _QWEN_WORDS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return "PreTrainedTokenizerFast"
