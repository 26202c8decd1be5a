"""Hand-written forwards of Flux and its relatives, from prompt and near-clean latents to the image-token means.

Each takes (components, prompt, noisy latents (k, c, h, w), sigma) and returns (k, d) for every layer from 0. Shapes: k
images of one prompt, t image tokens, s text tokens, d channels.
"""

import math
from typing import Any

import torch
from diffusers.pipelines.bria_fibo2.pipeline_bria_fibo2 import PROMPT_TEMPLATE as FIBO2_TEMPLATE
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE as FLUX2_SYSTEM

OVIS_SYSTEM = (
    "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of the "
    "objects and background: "
)
LONGCAT_PREFIX = (
    "<|im_start|>system\nAs an image captioning expert, generate a descriptive text prompt based on an image content, "
    "suitable for input to a text-to-image model.<|im_end|>\n<|im_start|>user\n"
)
LONGCAT_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"


def flux(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    model = parts["transformer"]
    first, second = parts["tokenizer"], parts["tokenizer_2"]
    words = first(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
    pooled = parts["text_encoder"](words).pooler_output
    words = second(prompt, padding="max_length", max_length=512, truncation=True, return_tensors="pt").input_ids
    text = parts["text_encoder_2"](words)[0]
    k, guidance = len(noisy), 3.5  # the pipeline's default
    time = torch.full((k,), 1000 * sigma)
    temb = model.time_text_embed(time, torch.full((k,), 1000 * guidance), pooled.expand(k, -1))
    ids = torch.cat([torch.zeros(text.shape[1], 3), _grid(noisy, plane=0)])
    return _two_streams(model, _patches(noisy), text, temb, ids)


def chroma(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    model, k = parts["transformer"], len(noisy)
    words = parts["tokenizer"](prompt, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    text = parts["text_encoder"](words.input_ids, attention_mask=words.attention_mask)[0]
    n_text, n_image = text.shape[1], noisy[0, 0].numel() // 4
    kept = torch.arange(n_text) <= words.attention_mask.sum()  # the words and one token of padding
    mask = torch.cat([kept, torch.ones(n_image, dtype=torch.bool)]).float().expand(k, -1)
    rope = model.pos_embed(torch.cat([torch.zeros(n_text, 3), _grid(noisy, plane=0)]))
    modulation = model.distilled_guidance_layer(model.time_text_embed(torch.full((k,), 1000 * sigma)))
    doubles, singles = len(model.transformer_blocks), len(model.single_transformer_blocks)

    image = model.x_embedder(_patches(noisy))
    text = model.context_embedder(text).expand(k, -1, -1)
    layers = [image]
    for index, block in enumerate(model.transformer_blocks):
        at = 3 * singles + 6 * index
        of_image, of_text = modulation[:, at : at + 6], modulation[:, at + 6 * doubles : at + 6 * doubles + 6]
        text, image = block(image, text, torch.cat([of_image, of_text], dim=1), rope, mask)
        layers.append(image)
    both = torch.cat([text, image], dim=1)
    for index, block in enumerate(model.single_transformer_blocks):
        both = block(both, modulation[:, 3 * index : 3 * index + 3], rope, mask)
        layers.append(both[:, n_text:])
    return [layer.mean(dim=1) for layer in layers]


def bria(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    model = parts["transformer"]
    words = parts["tokenizer"](prompt, max_length=128, truncation=True, return_tensors="pt").input_ids
    text = parts["text_encoder"](words)[0]
    text = torch.cat([text, torch.zeros(1, 128 - text.shape[1], text.shape[2])], dim=1)
    temb = model.time_embed(torch.full((len(noisy),), 1000 * sigma), torch.float32)
    ids = torch.cat([torch.zeros(128, 3), _grid(noisy, plane=0)])
    return _two_streams(model, _patches(noisy), text, temb, ids)


def ovis_image(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    model, tokenizer = parts["transformer"], parts["tokenizer"]
    message = f"<|im_start|>user\n{OVIS_SYSTEM}{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    words = tokenizer(message, padding="max_length", max_length=284, truncation=True, return_tensors="pt")
    text = parts["text_encoder"](**words).last_hidden_state * words.attention_mask[..., None]
    text = model.context_embedder_norm(text[:, 28:])
    temb = model.timestep_embedder(model.time_proj(torch.full((len(noisy),), 1000 * sigma)))
    place = torch.arange(256.0)
    ids = torch.cat([torch.stack([0 * place, place, place], dim=1), _grid(noisy, plane=0)])
    return _two_streams(model, _patches(noisy), text, temb, ids)


def longcat_image(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    """Take a prompt without quotation marks."""
    model, tokenizer = parts["transformer"], parts["tokenizer"]
    prefix, words, suffix = (tokenizer(text).input_ids for text in (LONGCAT_PREFIX, prompt, LONGCAT_SUFFIX))
    padding = 512 - len(words)
    ids = torch.tensor([[*prefix, *words, *[tokenizer.pad_token_id] * padding, *suffix]])
    mask = torch.tensor([[1] * len(prefix + words) + [0] * padding + [1] * len(suffix)])
    text = parts["text_encoder"](ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    text = text[:, len(prefix) : len(prefix) + 512]
    temb = model.time_embed(torch.full((len(noisy),), 1000 * sigma), torch.float32)
    place = torch.arange(512.0)
    ids = torch.cat([torch.stack([0 * place, place, place], dim=1), _grid(noisy, plane=1, start=512)])
    return _two_streams(model, _patches(noisy), text, temb, ids)


def flux2(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    message = f"<|im_start|>system\n{FLUX2_SYSTEM}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"
    text = _three_layers(parts, message, (10, 20, 30))
    return _flux2_layers(parts["transformer"], noisy, text, sigma, guidance=torch.full((len(noisy),), 4000.0))


def flux2_klein(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    message = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    text = _three_layers(parts, message, (9, 18, 27))
    return _flux2_layers(parts["transformer"], noisy, text, sigma, guidance=None)


def bria_fibo(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    model, k = parts["transformer"], len(noisy)
    words = parts["tokenizer"](prompt, return_tensors="pt").input_ids
    states = parts["text_encoder"](words, output_hidden_states=True).hidden_states
    text = torch.cat([states[-1], states[-2]], dim=-1)
    n_text, blocks = text.shape[1], [*model.transformer_blocks, *model.single_transformer_blocks]
    states = (*states, *[states[-1]] * len(blocks))[: len(blocks)]  # one state a block, the last one again and again
    captions = [
        project(state).expand(k, -1, -1) for project, state in zip(model.caption_projection, states, strict=True)
    ]
    temb = model.time_embed(torch.full((k,), 1000 * sigma), torch.float32)
    rope = model.pos_embed(torch.cat([torch.zeros(n_text, 3), _grid(noisy, plane=0, side=1)]))

    image = model.x_embedder(noisy.flatten(2).transpose(1, 2))
    text = model.context_embedder(text).expand(k, -1, -1)
    layers = [image]
    for index, (block, caption) in enumerate(zip(blocks, captions, strict=True)):
        text = torch.cat([text[..., : text.shape[2] // 2], caption], dim=2)  # half of each text token is given anew
        if index < len(model.transformer_blocks):
            text, image = block(image, text, temb, rope)
        else:
            text, image = block(torch.cat([text, image], dim=1), temb, rope).split([n_text, image.shape[1]], dim=1)
        layers.append(image)
    return [layer.mean(dim=1) for layer in layers]


def bria_fibo2(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    """Take latents that the VAE's rule has cut into 2 x 2 patches: one latent pixel is one token."""
    model, k = parts["transformer"], len(noisy)
    words = parts["processor"](FIBO2_TEMPLATE.format(prompt), return_tensors="pt")
    states = parts["text_encoder"](**words, output_hidden_states=True).hidden_states
    states = [state * torch.rsqrt(state.square().mean(dim=-1, keepdim=True) + 1e-6) for state in states]
    first, second, third = (
        torch.cat([states[i] for i in at], dim=-1) for at in ((9, 20, 31), (5, 16, 27), (7, 18, 29))
    )
    first, second, third = (bundle.expand(k, -1, -1) for bundle in (first, second, third))
    n_gist = math.ceil((4 + 4 * (words.input_ids.shape[1] - 4) / 60) / 2) * 2  # 4 to 8 for 4 to 64 words, in twos
    time, clean = model.t_embedder(torch.full((k,), 1000 * sigma)), model.t_embedder(torch.zeros(k))

    image = model.x_embedder(noisy.flatten(2).transpose(1, 2))
    rope = model.rope_embedder(_grid(noisy, plane=9, side=1).int())[None]
    layers = [image]
    for block in model.noise_refiner:
        image = block(image, None, rope, adaln_input=time)
        layers.append(image)
    gist = model.perceiver(first, n_gist)
    places = torch.stack([torch.arange(1, n_gist + 1), *[torch.zeros(n_gist)] * 2], dim=1).int()
    rope = torch.cat([model.rope_embedder(places)[None], rope], dim=1)
    both = torch.cat([gist, image], dim=1)
    noised = torch.cat([torch.zeros(k, n_gist), torch.ones(k, image.shape[1])], dim=1).long()
    for block, text in zip(model.layers, (None, second, third, None), strict=True):
        both = block(
            both, None, rope, noise_mask=noised, adaln_noisy=time, adaln_clean=clean, encoder_hidden_states=text
        )
        layers.append(both[:, n_gist:])
    return [layer.mean(dim=1) for layer in layers]


def _three_layers(parts: dict[str, Any], message: str, layers: tuple[int, ...]) -> torch.Tensor:
    words = parts["tokenizer"](message, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    states = parts["text_encoder"](**words, output_hidden_states=True).hidden_states
    return torch.cat([states[layer] for layer in layers], dim=-1)


def _patches(latents: torch.Tensor) -> torch.Tensor:
    """Turn (k, c, h, w) into (k, t, 4 c): 2 x 2 latent pixels are one token, row by row."""
    k, c, h, w = latents.shape
    cut = latents.reshape(k, c, h // 2, 2, w // 2, 2)
    return torch.stack([cut[:, :, y, :, x].reshape(k, 4 * c) for y in range(h // 2) for x in range(w // 2)], dim=1)


def _grid(latents: torch.Tensor, *, plane: int, start: int = 0, side: int = 2) -> torch.Tensor:
    """Return (plane, row, column) of every token, (t, 3)."""
    h, w = (length // side for length in latents.shape[-2:])
    return torch.tensor([[plane, start + y, start + x] for y in range(h) for x in range(w)]).float()


def _two_streams(
    model: Any, image: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, ids: torch.Tensor
) -> list[torch.Tensor]:
    rope = model.pos_embed(ids)
    image = model.x_embedder(image)
    text = model.context_embedder(text).expand(len(image), -1, -1)
    layers = [image]
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        text, image = block(image, text, temb, rope)
        layers.append(image)
    return [layer.mean(dim=1) for layer in layers]


def _flux2_layers(
    model: Any, noisy: torch.Tensor, text: torch.Tensor, sigma: float, guidance: torch.Tensor | None
) -> list[torch.Tensor]:
    """Take latents that the VAE's rule has cut into 2 x 2 patches: one latent pixel is one token."""
    k, n_text = len(noisy), text.shape[1]
    temb = model.time_guidance_embed(torch.full((k,), 1000 * sigma), guidance)
    grid = _grid(noisy, plane=0, side=1)
    of_text = torch.cat([torch.zeros(n_text, 3), torch.arange(n_text).float()[:, None]], dim=1)
    of_image = torch.cat([grid, torch.zeros(len(grid), 1)], dim=1)
    rope = model.pos_embed(torch.cat([of_text, of_image]))
    for_image, for_text = model.double_stream_modulation_img(temb), model.double_stream_modulation_txt(temb)

    image = model.x_embedder(noisy.flatten(2).transpose(1, 2))
    text = model.context_embedder(text).expand(k, -1, -1)
    layers = [image]
    for block in model.transformer_blocks:
        text, image = block(image, text, for_image, for_text, rope)
        layers.append(image)
    both = torch.cat([text, image], dim=1)
    for block in model.single_transformer_blocks:
        both = block(both, None, model.single_stream_modulation(temb), rope)
        layers.append(both[:, n_text:])
    return [layer.mean(dim=1) for layer in layers]
