"""Forwards of the families in `others`, written by hand: what the features of probekit must equal.

Nothing of a pipeline's ``__call__`` or ``encode_prompt`` is used.

Shapes: k images of one prompt, (k, c, h, w) latents, t image tokens, d channels.
"""

import re
from typing import Any

import torch

Means = list[torch.Tensor]
DESCRIBE = "the color, shape, size, texture, quantity, text, spatial relationships of the objects and background:"


def hunyuan_image(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> Means:
    transformer, tokenizer, k = parts["transformer"], parts["tokenizer"], len(noisy)
    before = f"<|im_start|>system\nDescribe the image by detailing {DESCRIBE}<|im_end|>\n<|im_start|>user\n"
    ids = tokenizer(
        [f"{before}{prompt}<|im_end|>"], padding="max_length", max_length=1034, truncation=True, return_tensors="pt"
    )
    states = parts["text_encoder"](**ids, output_hidden_states=True).hidden_states[-3][:, 34:]
    mask = ids.attention_mask[:, 34:].bool()
    quoted = re.findall("'(.*?)'", prompt)
    glyphs, glyph_mask = torch.zeros(1, 128, parts["text_encoder_2"].config.d_model), torch.zeros(1, 128).bool()
    if quoted:
        text = ". ".join(f'Text "{words}"' for words in quoted) + ". "
        ids = parts["tokenizer_2"](text, padding="max_length", max_length=128, truncation=True, return_tensors="pt")
        glyphs = parts["text_encoder_2"](ids.input_ids, attention_mask=ids.attention_mask.float())[0]
        glyph_mask = ids.attention_mask.bool()

    timestep = torch.full((k,), 1000 * sigma)
    distilled = transformer.config.guidance_embeds
    options = {"guidance": torch.full((k,), 3250.0), "timestep_r": torch.zeros(k)} if distilled else {}
    temb = transformer.time_guidance_embed(timestep, **options)
    states = transformer.context_embedder(states.expand(k, -1, -1), timestep, mask.expand(k, -1))
    glyphs = transformer.context_embedder_2(glyphs).expand(k, -1, -1)
    mask, glyph_mask = mask[0], glyph_mask[0]
    text = torch.cat([glyphs[:, glyph_mask], states[:, mask], glyphs[:, ~glyph_mask], states[:, ~mask]], dim=1)
    image = transformer.x_embedder(noisy)
    seen = torch.arange(image.shape[1] + text.shape[1]) < image.shape[1] + mask.sum() + glyph_mask.sum()
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in noisy.shape[-2:]), indexing="ij")
    angles = [_angles(rows.flatten(), 8, 256.0), _angles(columns.flatten(), 8, 256.0)]
    angles = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    rope = angles.cos(), angles.sin()
    means = [image.mean(dim=1)]
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        image, text = block(image, text, temb, attention_mask=seen[None, None, None], image_rotary_emb=rope)
        means.append(image.mean(dim=1))
    return means


def hidream(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> Means:
    transformer, k = parts["transformer"], len(noisy)
    limits = {"padding": "max_length", "max_length": 128, "truncation": True, "return_tensors": "pt"}
    clip = parts["tokenizer"]([prompt], **limits).input_ids
    pooled = torch.cat([parts[name](clip).text_embeds for name in ("text_encoder", "text_encoder_2")], dim=1)
    ids = parts["tokenizer_3"]([prompt], **limits)
    t5 = parts["text_encoder_3"](ids.input_ids, attention_mask=ids.attention_mask)[0]
    parts["tokenizer_4"].pad_token = parts["tokenizer_4"].eos_token
    llama = parts["text_encoder_4"](**parts["tokenizer_4"]([prompt], **limits), output_hidden_states=True)
    layers = [llama.hidden_states[1:][layer] for layer in transformer.config.llama_layers]

    temb = transformer.t_embedder(torch.full((k,), 1000 * sigma), torch.float32) + transformer.p_embedder(pooled)
    project = transformer.caption_projection
    streams = [project[index](layer).expand(k, -1, -1) for index, layer in enumerate(layers)]
    kept = torch.cat([project[-1](t5).expand(k, -1, -1), streams[-1]], dim=1)
    height, width = (side // 2 for side in noisy.shape[-2:])
    tokens = noisy.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 3, 5, 1)  # (k, h, w, 2, 2, c)
    if height == width:
        places, mask = height * width, None
        image = tokens.flatten(3).flatten(1, 2)
    else:  # padding behind
        places = transformer.max_seq
        image = torch.zeros(k, places, 4 * noisy.shape[1])
        image[:, : height * width] = tokens.flatten(3).flatten(1, 2)
        mask = (torch.arange(places) < height * width).float().expand(k, -1)
    image = transformer.x_embedder(image)
    ids = torch.zeros(k, places + kept.shape[1] + 128, 3)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids[:, : height * width, 1], ids[:, : height * width, 2] = rows.flatten(), columns.flatten()
    rope = transformer.pe_embedder(ids)

    means = [image[:, : height * width].mean(dim=1)]
    for block, stream in zip(transformer.double_stream_blocks, streams, strict=False):
        text = torch.cat([kept, stream], dim=1)
        image, text = block(image, mask, text, temb, rope)
        kept = text[:, : kept.shape[1]]
        means.append(image[:, : height * width].mean(dim=1))
    tokens = torch.cat([image, kept], dim=1)
    if mask is not None:
        mask = torch.cat([mask, torch.ones(k, kept.shape[1] + 128)], dim=1)
    for block, stream in zip(transformer.single_stream_blocks, streams[2:], strict=True):
        tokens = block(torch.cat([tokens, stream], dim=1), mask, None, temb, rope)[:, : tokens.shape[1]]
        means.append(tokens[:, : height * width].mean(dim=1))
    return means


def kandinsky5(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> Means:
    transformer, k = parts["transformer"], len(noisy)
    role = "You are a prompt engineer. Describe the image by detailing"
    before = f"<|im_start|>system\n{role} {DESCRIBE}<|im_end|>\n<|im_start|>user\n"
    ids = parts["tokenizer"]([f"{before}{prompt}<|im_end|>"], return_tensors="pt").input_ids
    text = parts["text_encoder"](ids, output_hidden_states=True).hidden_states[-1][:, 40:].expand(k, -1, -1)
    ids = parts["tokenizer_2"]([prompt], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    pooled = parts["text_encoder_2"](**ids).pooler_output

    temb = transformer.time_embeddings(torch.full((k,), 1000 * sigma)) + transformer.pooled_text_embeddings(pooled)
    text = transformer.text_embeddings(text)
    rope = transformer.text_rope_embeddings(torch.arange(text.shape[1]))[None]
    for block in transformer.text_transformer_blocks:
        text = block(text, temb, rope)
    height, width = (side // 2 for side in noisy.shape[-2:])
    tokens = noisy.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 3, 5, 1)  # (k, h, w, 2, 2, c)
    image = transformer.visual_embeddings.in_layer(tokens.flatten(3).flatten(1, 2))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.zeros(height * width), rows.flatten(), columns.flatten()
    angles = [
        place[:, None] * 10000.0 ** -(torch.arange(size // 2) / (size // 2))
        for place, size in zip(places, transformer.config.axes_dims, strict=True)
    ]
    angles = torch.cat(angles, dim=1)
    turn = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1).unflatten(-1, (2, 2))
    means = [image.mean(dim=1)]
    for block in transformer.visual_transformer_blocks:
        image = block(image, text, temb, turn[None, :, None], None)
        means.append(image.mean(dim=1))
    return means


def ideogram4(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> Means:
    transformer, k, places = parts["transformer"], len(noisy), 256
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = parts["tokenizer"]([text], return_tensors="pt").input_ids
    states: list[torch.Tensor] = []
    layers = parts["text_encoder"].language_model.layers
    hooks = [layers[i].register_forward_hook(lambda *call: states.append(call[2])) for i in (*range(0, 34, 3), 35)]
    parts["text_encoder"](ids)
    for hook in hooks:
        hook.remove()
    states = torch.stack(states, dim=-1).flatten(2).expand(k, -1, -1)  # (k, words, d * 13), layers side by side

    # padding is seen by padding alone, so that the words and the image need none
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in noisy.shape[-2:]), indexing="ij")
    t, words = rows.numel(), ids.shape[1]
    assert words < places
    place = torch.arange(words).expand(3, -1)
    cells = torch.stack([torch.zeros(t), rows.flatten(), columns.flatten()]) + 65536
    rope = transformer.rotary_emb(torch.cat([place, cells], dim=1).T.expand(k, -1, -1))
    text = transformer.llm_cond_proj(transformer.llm_cond_norm(states)) + transformer.embed_image_indicator.weight[0]
    image = transformer.input_proj(noisy.flatten(2).transpose(1, 2)) + transformer.embed_image_indicator.weight[1]
    temb = transformer.t_embedding(torch.full((k, 1), 1 - sigma))
    temb = torch.nn.functional.silu(transformer.adaln_proj(temb))
    tokens = torch.cat([text, image], dim=1)
    means = [image.mean(dim=1)]
    for block in transformer.layers:
        tokens = block(tokens, None, rope, temb)
        means.append(tokens[:, -t:].mean(dim=1))
    return means


def joyimage(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> Means:
    transformer, k = parts["transformer"], len(noisy)
    before = f"<|im_start|>system\n \\nDescribe the image by detailing {DESCRIBE}<|im_end|>\n<|im_start|>user\n"
    text = f"{before}{prompt}<|im_end|>\n<|im_start|>assistant\n"
    states: list[torch.Tensor] = []
    layer = parts["text_encoder"].model.language_model.layers[-1]
    hook = layer.register_forward_hook(lambda *call: states.append(call[2]))  # before the norm
    parts["text_encoder"](**parts["tokenizer"]([text], return_tensors="pt"))
    hook.remove()

    embedder = transformer.condition_embedder
    temb = embedder.time_embedder(embedder.timesteps_proj(torch.full((k,), 1000 * sigma)))
    temb = embedder.time_proj(torch.nn.functional.silu(temb)).unflatten(1, (6, -1))
    text = embedder.text_embedder(states[0][:, 34:]).expand(k, -1, -1)
    image = transformer.img_in(noisy[:, :, None]).flatten(2).transpose(1, 2)
    rows, columns = torch.meshgrid(*(torch.arange(side // 2) for side in noisy.shape[-2:]), indexing="ij")
    places = torch.zeros(rows.numel()), rows.flatten(), columns.flatten()
    sizes = transformer.config.rope_dim_list
    angles = torch.cat([_angles(place, size, 256.0) for place, size in zip(places, sizes, strict=True)], dim=1)
    angles = angles.repeat_interleave(2, dim=1)
    means = [image.mean(dim=1)]
    for block in transformer.double_blocks:
        image, text = block(image, text, temb, ((angles.cos(), angles.sin()), None))
        means.append(image.mean(dim=1))
    return means


def _angles(places: torch.Tensor, size: int, theta: float) -> torch.Tensor:
    return places[:, None] / theta ** (torch.arange(0, size, 2) / size)
