"""Forwards of the families of `pixart_kind` written by hand: module after module, without pipeline or encode_prompt.

Each takes the parts of a pipeline, a prompt, noisy latents (k, c, h, w) as the pipeline takes them and a noise level,
and returns the image-token mean (k, d) of every layer from 0. A latent pixel is 2 pixels wide unless said otherwise.
"""

import inspect
import math
from typing import Any

import torch
from diffusers import SanaPipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.prx import pipeline_prx


def _tokens(parts: dict[str, Any], name: str, text: str, length: int, **options: Any) -> Any:
    return parts[name](text, padding="max_length", max_length=length, truncation=True, return_tensors="pt", **options)


def _bias(mask: torch.Tensor, k: int) -> torch.Tensor:
    return -10000.0 * (1.0 - mask[:, None].float()).expand(k, -1, -1)


def _nearest_timestep(scheduler: Any, sigma: float) -> int:
    clean = scheduler.alphas_cumprod
    return int((((1 - clean) / clean).sqrt() - sigma / (1 - sigma)).abs().argmin())


@torch.no_grad()
def pixart(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float, *, length: int) -> list[torch.Tensor]:
    model, k = parts["transformer"], len(noisy)
    words = _tokens(parts, "tokenizer", prompt.lower().strip(), length)
    text = parts["text_encoder"](words.input_ids, attention_mask=words.attention_mask)[0]
    text = model.caption_projection(text).expand(k, -1, -1)
    height, width = (2.0 * side for side in noisy.shape[-2:])
    size = {"resolution": torch.tensor([[height, width]] * k), "aspect_ratio": torch.tensor([[height / width]] * k)}
    time, _ = model.adaln_single(
        torch.full((k,), _nearest_timestep(parts["scheduler"], sigma)),
        size if model.config.sample_size == 128 else {"resolution": None, "aspect_ratio": None},
        batch_size=k,
        hidden_dtype=torch.float32,
    )
    image = model.pos_embed(noisy)
    layers = [image.mean(dim=1)]
    for block in model.transformer_blocks:
        bias = _bias(words.attention_mask, k)
        image = block(image, encoder_hidden_states=text, encoder_attention_mask=bias, timestep=time)
        layers.append(image.mean(dim=1))
    return layers


@torch.no_grad()
def sana(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    model, k = parts["transformer"], len(noisy)
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    before = "\n".join(instruction)
    length = len(parts["tokenizer"].encode(before)) + 300 - 2
    words = _tokens(parts, "tokenizer", before + prompt.lower().strip(), length, padding_side="right")
    text = parts["text_encoder"](words.input_ids, attention_mask=words.attention_mask)[0]
    text, mask = (torch.cat([tokens[:, :1], tokens[:, -299:]], dim=1) for tokens in (text, words.attention_mask))
    text = model.caption_norm(model.caption_projection(text)).expand(k, -1, -1)
    timestep = torch.full((k,), 1000 * sigma * model.config.timestep_scale)
    time, _ = model.time_embed(timestep, batch_size=k, hidden_dtype=torch.float32)
    image = model.patch_embed(noisy)
    layers = [image.mean(dim=1)]
    for block in model.transformer_blocks:
        image = block(image, None, text, _bias(mask, k), time, *noisy.shape[-2:])
        layers.append(image.mean(dim=1))
    return layers


@torch.no_grad()
def hunyuan_dit(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    model, k = parts["transformer"], len(noisy)
    words = _tokens(parts, "tokenizer", prompt, 77)
    words_2 = _tokens(parts, "tokenizer_2", prompt, 256)
    bert = parts["text_encoder"](words.input_ids, attention_mask=words.attention_mask)[0]
    t5 = parts["text_encoder_2"](words_2.input_ids, attention_mask=words_2.attention_mask)[0]
    mask = torch.cat([words.attention_mask, words_2.attention_mask], dim=1)[..., None].bool()
    text = torch.where(mask, torch.cat([bert, model.text_embedder(t5)], dim=1), model.text_embedding_padding)
    height, width = (side // 2 for side in noisy.shape[-2:])
    top = round((32 - 32 * height / width) / 2)  # the picture is wider than high, in a square of 32 tokens
    corners = (top, 0), (top + round(32 * height / width), 32)
    rope = get_2d_rotary_pos_embed(model.config.attention_head_dim, corners, (height, width), output_type="pt")
    time = model.time_extra_emb(
        torch.full((k,), float(_nearest_timestep(parts["scheduler"], sigma))),
        t5.expand(k, -1, -1),
        torch.tensor([[1024.0, 1024.0, 16.0 * height, 16.0 * width, 0.0, 0.0]] * k),
        torch.zeros(k, dtype=torch.long),
        hidden_dtype=torch.float32,
    )
    image = model.pos_embed(noisy)
    layers, returned = [image.mean(dim=1)], []
    for index, block in enumerate(model.blocks):
        skip = {"skip": returned[len(model.blocks) - 1 - index]} if index > len(model.blocks) // 2 else {}
        image = block(image, text.expand(k, -1, -1), time, rope, **skip)
        returned.append(image)
        layers.append(image.mean(dim=1))
    return layers


@torch.no_grad()
def aura_flow(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    model, k = parts["transformer"], len(noisy)
    words = _tokens(parts, "tokenizer", prompt, 256)
    text = parts["text_encoder"](words.input_ids, attention_mask=words.attention_mask)[0]
    text = model.context_embedder(text * words.attention_mask[..., None])
    text = torch.cat([model.register_tokens, text], dim=1).expand(k, -1, -1)
    time = model.time_step_proj(model.time_step_embed(torch.full((k,), sigma)))
    image = model.pos_embed(noisy)
    layers = [image.mean(dim=1)]
    for block in model.joint_transformer_blocks:
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time)
        layers.append(image.mean(dim=1))
    both = torch.cat([text, image], dim=1)
    for block in model.single_transformer_blocks:
        both = block(hidden_states=both, temb=time)
        layers.append(both[:, text.shape[1] :].mean(dim=1))
    return layers


@torch.no_grad()
def cogview4(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    model, tokenizer, k = parts["transformer"], parts["tokenizer"], len(noisy)
    ids = tokenizer(prompt).input_ids
    ids = [tokenizer.pad_token_id] * (-len(ids) % 16) + ids
    text = parts["text_encoder"](torch.tensor([ids]), output_hidden_states=True).hidden_states[-2]
    rope = model.rope(noisy)
    image, text = model.patch_embed(noisy, text.expand(k, -1, -1))
    time = torch.nn.functional.silu(_cogview_time(model, noisy, 1000 * sigma))
    layers = [image.mean(dim=1)]
    for block in model.transformer_blocks:
        image, text = block(image, text, time, rope)
        layers.append(image.mean(dim=1))
    return layers


@torch.no_grad()
def cogview3_plus(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    model, k = parts["transformer"], len(noisy)
    text = parts["text_encoder"](_tokens(parts, "tokenizer", prompt, 224).input_ids)[0]  # it sees the padding
    both = model.patch_embed(noisy, text.expand(k, -1, -1))
    text, image = both[:, : text.shape[1]], both[:, text.shape[1] :]
    time = _cogview_time(model, noisy, _nearest_timestep(parts["scheduler"], sigma))
    layers = [image.mean(dim=1)]
    for block in model.transformer_blocks:
        image, text = block(image, text, time)
        layers.append(image.mean(dim=1))
    return layers


def _cogview_time(model: Any, noisy: torch.Tensor, timestep: float) -> torch.Tensor:
    size = 2.0 * torch.tensor([noisy.shape[-2:]] * len(noisy))
    timesteps = torch.full((len(noisy),), float(timestep))
    return model.time_condition_embed(timesteps, size, size, torch.zeros_like(size), torch.float32)


@torch.no_grad()
def prx(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    model, k = parts["transformer"], len(noisy)
    words = _tokens(
        parts, "tokenizer", pipeline_prx.TextPreprocessor().clean_text(prompt), parts["tokenizer"].model_max_length
    )
    text = parts["text_encoder"](words.input_ids, attention_mask=words.attention_mask).last_hidden_state
    text, mask = model.txt_in(text).expand(k, -1, -1), words.attention_mask.bool().expand(k, -1)
    height, width = (side // 2 for side in noisy.shape[-2:])
    places = torch.cartesian_prod(torch.arange(float(height)), torch.arange(float(width))).expand(k, -1, -1)
    waves = 1000 * (torch.tensor(sigma) * torch.exp(-math.log(10000) * torch.arange(128) / 128))
    time = model.time_in(torch.cat([waves.cos(), waves.sin()])[None]).expand(k, -1)
    image = model.img_in(torch.nn.functional.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2))
    layers = [image.mean(dim=1)]
    for block in model.blocks:
        image = block(image, text, time, model.pe_embedder(places), mask)
        layers.append(image.mean(dim=1))
    return layers
