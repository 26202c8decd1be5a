"""Train one of the playground's diffusion transformers: SD3's architecture, rectified flow, in the latents of the VAE.

With clean latents z, noise e and t in (0, 1), the network sees (1 - t) z + t e at timestep 1000 t and predicts e - z;
the loss is the mean squared error. t = sigmoid(N(0.2, 1.2)). What is kept is the running average (EMA) of the weights.
"""

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from probekit.playground.architectures import new_transformer
from probekit.playground.checkpoint import load_training, save_training, write_tensors

logger = logging.getLogger(__name__)

HELD_OUT = 512
CAPTION_DROPOUT = 0.1
EMA = 0.999
CURVE_POINTS = 50
LEARNING_RATES = {48: 2.5e-3, 64: 2e-3, 96: 1.6e-3, 128: 1.2e-3}


@dataclass(frozen=True, kw_only=True)
class EncodedScenes:
    """What the transformers are trained on; every tensor is computed once by the frozen parts.

    Parameters
    ----------
    latents
        (N, 8, 8, 8), scaled to about unit variance.
    prompt
        (M, 16, 128), the token embeddings of each distinct caption; the last row is the empty caption.
    pooled
        (M, 128), its pooled embedding.
    caption_of
        (N,), the caption's row of each latent.
    """

    latents: torch.Tensor
    prompt: torch.Tensor
    pooled: torch.Tensor
    caption_of: torch.Tensor


@torch.no_grad()
def encode_captions(
    captions: list[str],
    tokenizer: Any,
    encoders: Iterable[Any],
    *,
    device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed captions as `StableDiffusion3Pipeline` does without a third encoder and with ``max_sequence_length=0``.

    Returns
    -------
    (N, 16, 128) penultimate hidden states and (N, 128) pooled embeddings of both encoders, side by side.
    """
    prompts, pooled = [], []
    for start in range(0, len(captions), 1024):
        part = captions[start : start + 1024]
        tokens = tokenizer(part, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
        prompts.append(torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).cpu())
        pooled.append(torch.cat([output.text_embeds for output in outputs], dim=-1).cpu())
    return torch.cat(prompts), torch.cat(pooled)


def flow_loss(
    model: torch.nn.Module,
    scenes: EncodedScenes,
    rows: torch.Tensor,
    *,
    draw: torch.Generator,
    dropout: float,
    device: str,
) -> torch.Tensor:
    """Compute the flow-matching loss of a batch; everything random comes from `draw`."""
    clean = scenes.latents[rows].float()
    noise = torch.randn(clean.shape, generator=draw)
    t = torch.sigmoid(0.2 + 1.2 * torch.randn(len(rows), generator=draw))
    captions = scenes.caption_of[rows]
    dropped = torch.rand(len(rows), generator=draw) < dropout
    captions = torch.where(dropped, len(scenes.prompt) - 1, captions)
    mix = t[:, None, None, None]
    predicted = model(
        hidden_states=((1 - mix) * clean + mix * noise).to(device),
        encoder_hidden_states=scenes.prompt[captions].float().to(device),
        pooled_projections=scenes.pooled[captions].float().to(device),
        timestep=(1000 * t).to(device),
        return_dict=False,
    )[0]
    return torch.nn.functional.mse_loss(predicted, (noise - clean).to(device))


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, scenes: EncodedScenes, *, device: str) -> float:
    """Compute the loss on the last scenes, which are never trained on, with the same noise every time."""
    draw = torch.Generator().manual_seed(0)
    starts = range(len(scenes.latents) - HELD_OUT, len(scenes.latents), 64)
    batches = [torch.arange(start, start + 64) for start in starts]
    losses = [flow_loss(model, scenes, rows, draw=draw, dropout=0.0, device=device) for rows in batches]
    return torch.stack(losses).mean().item()


def train_dit(
    scenes: EncodedScenes,
    *,
    out: Path,
    name: str,
    blocks: int,
    width: int,
    seed: int,
    images: int,
    batch: int,
    keep_at: tuple[float, ...],
    device: str,
    save_every: int,
    compiled: bool,
) -> None:
    """Train, or continue training, and write ``dit-NAME.safetensors`` with the averaged weights.

    Parameters
    ----------
    out, name
        The working folder and the name of the run in it; ``dit-NAME.state.safetensors`` is continued when it exists,
        and refused when its shape, seed, images, batch or `keep_at` differ.
    blocks, width, seed
        The shape, and the seed of initial weights, batches and noise.
    images, batch
        Length of the run in images seen, and batch size.
    keep_at
        Fractions of the run at which the averaged weights are also written, as ``dit-NAME-atPERCENT.safetensors``.
    device, save_every, compiled
        Where it runs, the number of steps between savings, and whether blocks go through `torch.compile`.
    """
    steps = math.ceil(images / batch)
    model = new_transformer(blocks=blocks, width=width, seed=seed).to(device)
    average = new_transformer(blocks=blocks, width=width, seed=seed).to(device).requires_grad_(requires_grad=False)
    parameters, averaged = list(model.parameters()), list(average.parameters())
    peak = LEARNING_RATES.get(width, 1.2e-3 * math.sqrt(128 / width))
    optimiser = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    state = out / f"dit-{name}.state.safetensors"
    settings = {
        "blocks": blocks,
        "width": width,
        "seed": seed,
        "images": images,
        "batch": batch,
        "keep_at": sorted(keep_at),
    }
    meta: dict[str, Any] = {"step": 0, "curve": [], "name": name} | settings
    if state.exists():
        modules = {"model": model, "average": average}
        meta = load_training(state, modules=modules, optimiser=optimiser, settings=settings)
    if compiled:
        for block in model.transformer_blocks:  # all blocks share one compilation
            block.compile()
    kept = {round(fraction * steps): fraction for fraction in keep_at}
    every = max(1, steps // CURVE_POINTS)
    start, first = time.perf_counter(), meta["step"]
    for step in range(meta["step"], steps):
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(scenes.latents) - HELD_OUT, (batch,), generator=draw)
        loss = flow_loss(model, scenes, rows, draw=draw, dropout=CAPTION_DROPOUT, device=device)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = _learning_rate(step, steps, peak)
        optimiser.step()
        with torch.no_grad():  # the average forgets its random start first, then moves slowly
            torch._foreach_lerp_(averaged, parameters, 1 - min(EMA, (1 + step) / (10 + step)))
        done = step + 1
        meta |= {"step": done, "images_seen": done * batch, "images_planned": steps * batch}
        meta["running"] = 0.98 * meta.get("running", loss.item()) + 0.02 * loss.item()
        if done % every == 0 or done == steps or done in kept:
            held_out = held_out_loss(average, scenes, device=device)
            meta["curve"].append([done * batch, round(meta["running"], 5), round(held_out, 5)])
            rate = (done - first) * batch / (time.perf_counter() - start)
            losses = f"loss {meta['running']:.4f}, held out {held_out:.4f}"
            logger.info(f"{name} {done * batch}/{steps * batch} images, {losses}, {rate:.0f}/s")
        if done in kept:
            part = f"dit-{name}-at{100 * kept[done]:.0f}.safetensors"
            write_tensors(out / part, average.state_dict(), meta | {"fraction": kept[done]})
        if done % save_every == 0 or done == steps:
            save_training(state, modules={"model": model, "average": average}, optimiser=optimiser, meta=meta)
    write_tensors(out / f"dit-{name}.safetensors", average.state_dict(), meta | {"fraction": 1.0})


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up for 100 steps, stay at the peak for 30 % of the run, then a cosine to zero."""
    progress = max(0.0, (step / steps - 0.3) / 0.7)
    return peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
