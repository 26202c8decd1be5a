"""Forwards of the families in `qwen_kind`, written by hand: what the features of probekit must equal.

Nothing of a pipeline's ``__call__`` or ``encode_prompt`` is used. Texts are never padded here, where the pipelines pad
them and mask the padding, and positions are written as (text, row, column) rather than built as each model does.

Shapes: k images of one prompt, (k, c, h, w) latents, t = rows x columns image tokens, n text tokens, d channels.
"""

from typing import Any

import torch
from torch.nn.functional import gelu

Means = list[torch.Tensor]
QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_PREFIX = 34  # tokens of the template before the prompt
QWEN_21_SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
NUCLEUS_SYSTEM = (
    "You are an image generation assistant. Follow the user's prompt literally. Pay careful attention to spatial "
    "layout: objects described as on the left must appear on the left, on the right on the right. Match exact object "
    "counts and assign colors to the correct objects."
)
LUMINA2_SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts."
)


def _hidden_states(encoder: Any, tokenizer: Any, text: str) -> tuple[torch.Tensor, ...]:
    return encoder(**tokenizer([text], return_tensors="pt"), output_hidden_states=True).hidden_states


def _patches(latents: torch.Tensor, *, channels_last: bool) -> torch.Tensor:
    """Cut latents into 2 x 2 patches, (k, t, 4 c)."""
    k, c, h, w = latents.shape
    cut = latents.reshape(k, c, h // 2, 2, w // 2, 2)
    return cut.permute(0, 2, 4, *((3, 5, 1) if channels_last else (1, 3, 5))).reshape(k, -1, 4 * c)


def _places(first: int, rows: int, columns: int, *, centred: bool = False) -> torch.Tensor:
    """Return (t, 3): `first`, then row and column of every image token, counted from the corner or the centre."""
    y, x = torch.arange(rows), torch.arange(columns)
    if centred:
        y, x = y - (rows - rows // 2), x - (columns - columns // 2)
    return torch.cartesian_prod(torch.tensor([first]), y, x)


def _line(start: int, n: int, *, diagonal: bool = False) -> torch.Tensor:
    """Return (n, 3): text tokens along the first axis, or along all three."""
    line = torch.arange(start, start + n)
    return torch.stack([line] * 3 if diagonal else [line, 0 * line, 0 * line], dim=1)


def _angles(places: torch.Tensor, axes: Any, theta: float) -> torch.Tensor:
    """Return the angle of each pair of channels, (n, sum(axes) / 2)."""
    steps = [theta ** -(torch.arange(0, channels, 2).double() / channels) for channels in axes]
    return torch.cat([torch.outer(places[:, axis].double(), step) for axis, step in enumerate(steps)], dim=1).float()


def _turns(places: torch.Tensor, axes: Any, theta: float) -> torch.Tensor:
    angles = _angles(places, axes, theta)
    return torch.polar(torch.ones_like(angles), angles)


@torch.no_grad()
def qwen_image(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> Means:
    model, k, rows, columns = parts["transformer"], len(noisy), noisy.shape[2] // 2, noisy.shape[3] // 2
    states = _hidden_states(parts["text_encoder"], parts["tokenizer"], QWEN_TEMPLATE.format(prompt))
    text = model.txt_in(model.txt_norm(states[-1][:, QWEN_PREFIX:])).repeat(k, 1, 1)
    image = model.img_in(_patches(noisy, channels_last=False))
    time = model.time_text_embed(torch.full((k,), sigma), image)
    axes = model.config.axes_dims_rope
    of_text = _line(max(rows // 2, columns // 2), text.shape[1], diagonal=True)
    turns = (_turns(_places(0, rows, columns, centred=True), axes, 1e4), _turns(of_text, axes, 1e4))
    layers = [image.mean(dim=1)]
    for block in model.transformer_blocks:
        text, image = block(image, text, None, time, turns)
        layers.append(image.mean(dim=1))
    return layers


@torch.no_grad()
def qwen_image_21(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> Means:
    model, k, rows, columns = parts["transformer"], len(noisy), *noisy.shape[2:]
    language, tokenizer = parts["text_encoder"].model.language_model, parts["processor"].tokenizer
    text = QWEN_21_SYSTEM + f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    before_norm: list[torch.Tensor] = []
    hook = language.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    _hidden_states(parts["text_encoder"], tokenizer, text)
    hook.remove()
    n_system = len(tokenizer(QWEN_21_SYSTEM).input_ids)
    tokens = model.txt_in(before_norm[0][:, n_system:]).repeat(k, 1, 1)
    n = tokens.shape[1]
    tokens = torch.cat([tokens, model.img_in(noisy.flatten(2).transpose(1, 2))], dim=1)
    places = torch.cat([_line(0, n, diagonal=True), _places(n, rows, columns, centred=True)])
    turns = _turns(places, model.config.axes_dims_rope, 1e4)
    # text is modulated as at time 0 and sees only the text before it; the image sees everything
    modulation = model.modulation(model.time_text_embed(torch.tensor([sigma] * k + [0.0]), tokens))
    is_image = torch.arange(tokens.shape[1]) >= n
    layers = [tokens[:, n:].mean(dim=1)]
    for block in model.transformer_blocks:
        tokens = block(tokens, modulation, turns, target_token_mask=is_image, segments=[(0, n, True)])
        layers.append(tokens[:, n:].mean(dim=1))
    return layers


@torch.no_grad()
def z_image(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> Means:
    model, k, rows, columns = parts["transformer"], len(noisy), noisy.shape[2] // 2, noisy.shape[3] // 2
    asked = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    text = model.cap_embedder(_hidden_states(parts["text_encoder"], parts["tokenizer"], asked)[-2])
    text = torch.cat([text, model.cap_pad_token.repeat(1, -text.shape[1] % 32, 1)], dim=1).repeat(k, 1, 1)
    image = model.all_x_embedder["2-1"](_patches(noisy, channels_last=True))
    t, n = image.shape[1], text.shape[1]
    image = torch.cat([image, model.x_pad_token.repeat(k, -t % 32, 1)], dim=1)
    time = model.t_embedder(torch.full((k,), 1 - sigma) * model.t_scale)
    places = torch.cat([_places(n + 1, rows, columns), torch.zeros(image.shape[1] - t, 3)])
    axes, theta = model.axes_dims, model.rope_theta
    of_image, of_text = (_turns(at, axes, theta).repeat(k, 1, 1) for at in (places, _line(1, n)))
    layers = [image[:, :t].mean(dim=1)]
    for block in model.noise_refiner:
        image = block(image, None, of_image, time)
        layers.append(image[:, :t].mean(dim=1))
    for block in model.context_refiner:
        text = block(text, None, of_text)
    tokens = torch.cat([image, text], dim=1)
    for block in model.layers:
        tokens = block(tokens, None, torch.cat([of_image, of_text], dim=1), time)
        layers.append(tokens[:, :t].mean(dim=1))
    return layers


@torch.no_grad()
def lumina2(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> Means:
    model, k, rows, columns = parts["transformer"], len(noisy), noisy.shape[2] // 2, noisy.shape[3] // 2
    asked = f"{LUMINA2_SYSTEM} <Prompt Start> {prompt}"
    text = _hidden_states(parts["text_encoder"], parts["tokenizer"], asked)[-2].repeat(k, 1, 1)
    time, text = model.time_caption_embed(noisy, torch.full((k,), 1 - sigma), text)
    image, n = model.x_embedder(_patches(noisy, channels_last=True)), text.shape[1]
    axes = model.config.axes_dim_rope
    of_image, of_text = (_turns(at, axes, 1e4).repeat(k, 1, 1) for at in (_places(n, rows, columns), _line(0, n)))
    layers = [image.mean(dim=1)]
    for block in model.noise_refiner:
        image = block(image, None, of_image, time)
        layers.append(image.mean(dim=1))
    for block in model.context_refiner:
        text = block(text, None, of_text)
    tokens = torch.cat([text, image], dim=1)
    for block in model.layers:
        tokens = block(tokens, None, torch.cat([of_text, of_image], dim=1), time)
        layers.append(tokens[:, n:].mean(dim=1))
    return layers


@torch.no_grad()
def lumina_next(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> Means:
    model, k, rows, columns = parts["transformer"], len(noisy), noisy.shape[2] // 2, noisy.shape[3] // 2
    text = _hidden_states(parts["text_encoder"], parts["tokenizer"], prompt.lower())[-2].repeat(k, 1, 1)
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    time = model.time_caption_embed(torch.full((k,), 1 - sigma), text, mask)
    image = model.patch_embedder.proj(noisy.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3))
    image = image.flatten(1, 2)
    # positions are stretched to the trained size: linearly, or at sigma 0 by a larger base
    side = model.config.sample_size // 2
    stretch = (rows * columns / side**2) ** 0.5
    theta, shrink = (1e4, stretch) if sigma > 0 else (1e4 * stretch, 1.0)
    half, places = model.head_dim // 2, _places(0, rows, columns)[:, 1:] / shrink
    by_row, by_column = (_turns(places[:, [axis]], [half], theta) for axis in (0, 1))
    turns = torch.stack([by_row, by_column], dim=2).flatten(1)[None]
    ones, attention = torch.ones(k, rows * columns), {"base_sequence_length": side**2}
    layers = [image.mean(dim=1)]
    for block in model.layers:
        image = block(image, ones, turns, text, mask, time, cross_attention_kwargs=attention)
        layers.append(image.mean(dim=1))
    return layers


@torch.no_grad()
def krea2(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> Means:
    model, k, rows, columns = parts["transformer"], len(noisy), noisy.shape[2] // 2, noisy.shape[3] // 2
    states = _hidden_states(parts["text_encoder"], parts["tokenizer"], QWEN_TEMPLATE.format(prompt))
    tapped = torch.stack([states[0], states[1], states[3]], dim=2)[:, QWEN_PREFIX:]
    text = model.txt_in(model.text_fusion(tapped)).repeat(k, 1, 1)
    n = text.shape[1]
    tokens = torch.cat([text, model.img_in(_patches(noisy, channels_last=False))], dim=1)
    time = model.time_mod_proj(gelu(model.time_embed(torch.full((k,), sigma), dtype=tokens.dtype), approximate="tanh"))
    places = torch.cat([torch.zeros(n, 3), _places(0, rows, columns)])
    angles = _angles(places, model.config.axes_dims_rope, model.config.rope_theta).repeat_interleave(2, dim=1)
    layers = [tokens[:, n:].mean(dim=1)]
    for block in model.transformer_blocks:
        tokens = block(tokens, time, (angles.cos(), angles.sin()))
        layers.append(tokens[:, n:].mean(dim=1))
    return layers


@torch.no_grad()
def nucleus(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> Means:
    model, k, rows, columns = parts["transformer"], len(noisy), noisy.shape[2] // 2, noisy.shape[3] // 2
    asked = f"<|im_start|>system\n{NUCLEUS_SYSTEM}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"
    asked += "<|im_start|>assistant\n"
    text = _hidden_states(parts["text_encoder"], parts["processor"].tokenizer, asked)[-8]
    text = model.txt_norm(text).repeat(k, 1, 1)
    image = model.img_in(_patches(noisy, channels_last=False))
    time = model.time_text_embed(torch.full((k,), sigma), image)
    axes = model.config.axes_dims_rope
    of_text = _line(max(rows // 2, columns // 2), text.shape[1], diagonal=True)
    turns = (_turns(_places(0, rows, columns, centred=True), axes, 1e4), _turns(of_text, axes, 1e4))
    layers = [image.mean(dim=1)]
    for block in model.transformer_blocks:
        image = block(image, text, time, turns)
        layers.append(image.mean(dim=1))
    return layers


@torch.no_grad()
def ernie_image(parts: dict[str, Any], prompt: str, noisy: torch.Tensor, sigma: float) -> Means:
    model, k, rows, columns = parts["transformer"], len(noisy), *noisy.shape[2:]
    text = model.text_proj(_hidden_states(parts["text_encoder"], parts["tokenizer"], prompt)[-2]).repeat(k, 1, 1)
    image = model.x_embedder.proj(noisy).flatten(2).transpose(1, 2)
    n, t = text.shape[1], image.shape[1]
    tokens = torch.cat([image, text], dim=1).transpose(0, 1)
    places = torch.cat([_places(n, rows, columns), _line(0, n)])
    angles = _angles(places, model.config.rope_axes_dim, model.config.rope_theta).repeat_interleave(2, dim=1)
    time = model.time_embedding(model.time_proj(torch.full((k,), 1000 * sigma)))
    modulation = model.adaLN_modulation(time).chunk(6, dim=-1)
    layers = [image.mean(dim=1)]
    for block in model.layers:
        tokens = block(tokens, angles[None, :, None].expand(k, -1, -1, -1), modulation)
        layers.append(tokens[:t].mean(dim=0))
    return layers
