"""Stable Diffusion 3, without and with its third text encoder."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_pipeline

from tiny_families import Builder


@torch.no_grad()
def _by_hand(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    model, k = parts["transformer"], len(noisy)
    clip = []
    for place in ("", "_2"):
        ids = parts[f"tokenizer{place}"](prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        clip.append(parts[f"text_encoder{place}"](ids, output_hidden_states=True))
    tokens = torch.cat([entry.hidden_states[-2] for entry in clip], dim=-1)
    pooled = torch.cat([entry.text_embeds for entry in clip], dim=-1)
    tokens = torch.nn.functional.pad(tokens, (0, model.config.joint_attention_dim - tokens.shape[-1]))
    if parts["text_encoder_3"] is None:
        third = torch.zeros(1, 256, tokens.shape[-1])
    else:
        options = {"padding": "max_length", "max_length": 256, "truncation": True, "return_tensors": "pt"}
        third = parts["text_encoder_3"](parts["tokenizer_3"](prompt, **options).input_ids)[0]
    tokens = torch.cat([tokens, third], dim=1)
    image = model.pos_embed(noisy)
    text = model.context_embedder(tokens).repeat(k, 1, 1)
    time = model.time_text_embed(torch.full((k,), 1000 * sigma), pooled.repeat(k, 1))
    layers = [image.mean(dim=1)]
    for block in model.transformer_blocks:
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time)
        layers.append(image.mean(dim=1))
    return layers


def sd3(folder: Path) -> Path:
    return tiny_pipeline(folder)


def sd3_with_t5(folder: Path) -> Path:
    return tiny_pipeline(folder, t5=True)


_KEY = {"transformer": "SD3Transformer2DModel", "pipeline": "StableDiffusion3Pipeline", "by_hand": _by_hand}
PIPELINES = {
    "sd3": Builder(
        **_KEY,
        build=sd3,
        size=(16, 24),
        note="256 equal tokens stand for the missing T5, and the image attends to their equal rounding errors",
    ),
    "sd3_t5": Builder(**_KEY, build=sd3_with_t5, size=(16, 24), note="tokens of CLIP, then those of T5"),
}
