"""Train the playground's VAE: 32 x 32 pictures to 8 x 8 latents of 8 channels.

Random 16 x 16 crops first (four times cheaper), then full pictures. The loss is L1 on pixels and on their finite
differences, which keeps edges and with them shapes, plus a very small KL term.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch

from probekit.playground.architectures import new_vae
from probekit.playground.checkpoint import load_training, save_training, write_tensors

logger = logging.getLogger(__name__)

HELD_OUT = 512
CROP = 16
CROP_SHARE = 0.5
KL_WEIGHT = 1e-5
LOG_EVERY = 200


def to_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """Convert uint8 pictures (B, H, W, 3) to floats in [-1, 1], (B, 3, H, W)."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(
    pictures: torch.Tensor, *, out: Path, steps: int, batch: int, seed: int, device: str, save_every: int
) -> None:
    """Train, or continue training, and write ``vae.safetensors`` with the measured latent statistics.

    Parameters
    ----------
    pictures
        uint8, (N, 32, 32, 3); the last `HELD_OUT` are held out for the reported PSNR.
    out
        The working folder; ``vae.state.safetensors`` there is continued when it has the same steps, batch and seed.
    steps, batch, seed, device, save_every
        The length of the run, its batch size and seed, where it runs, and the number of steps between savings.
    """
    torch.manual_seed(seed)
    vae = new_vae().to(device)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    state = out / "vae.state.safetensors"
    settings = {"steps": steps, "batch": batch, "seed": seed}
    meta: dict[str, Any] = {"step": 0, "curve": []} | settings
    if state.exists():
        meta = load_training(state, modules={"vae": vae}, optimiser=optimiser, settings=settings)
    training = pictures[:-HELD_OUT]
    start, first = time.perf_counter(), meta["step"]
    for step in range(meta["step"], steps):
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(training), (batch * (4 if step < CROP_SHARE * steps else 1),), generator=draw)
        pixels = to_pixels(training[chosen].to(device))
        if step < CROP_SHARE * steps:
            top, left = torch.randint(pixels.shape[-1] - CROP + 1, (2,), generator=draw).tolist()
            pixels = pixels[:, :, top : top + CROP, left : left + CROP]
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draw).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        loss: torch.Tensor = _reconstruction_loss(decoded, pixels) + KL_WEIGHT * posterior.kl().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = _learning_rate(step, steps)
        optimiser.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            meta["curve"].append([step + 1, round(loss.item(), 5)])
            rate = (step + 1 - first) / (time.perf_counter() - start)
            logger.info(f"vae step {step + 1}/{steps} loss {loss.item():.4f} {rate:.2f} steps/s")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            meta["step"] = step + 1
            save_training(state, modules={"vae": vae}, optimiser=optimiser, meta=meta)
    _finish(vae, pictures, out=out, meta=meta, device=device)


def _finish(vae: Any, pictures: torch.Tensor, *, out: Path, meta: dict[str, Any], device: str) -> None:
    """Measure latent statistics and held-out PSNR, set the scaling factors, and write the weights."""
    latents = encode_pictures(vae, pictures[:4096], device=device, scaled=False)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    held_out = pictures[-HELD_OUT:]
    with torch.no_grad():
        modes = encode_pictures(vae, held_out, device=device, scaled=False).to(device)
        decoded = vae.decode(modes).sample.clamp(-1, 1).cpu()
    error = (decoded - to_pixels(held_out)).square().mean(dim=(1, 2, 3)) / 4  # pixels span [-1, 1]
    psnr = (-10 * error.log10()).mean().item()
    logger.info(f"vae psnr {psnr:.2f} dB, shift {shift:.4f}, scale {scale:.4f}")
    record = meta | {"psnr": psnr, "shift_factor": shift, "scaling_factor": scale}
    write_tensors(out / "vae.safetensors", dict(vae.state_dict()), record)


@torch.no_grad()
def encode_pictures(
    vae: Any, pictures: torch.Tensor, *, device: str, scaled: bool = True, batch: int = 512
) -> torch.Tensor:
    """Encode to posterior modes, (N, 8, 8, 8); `scaled` applies the pipeline's (z - shift) * scale."""
    parts = [pictures[start : start + batch].to(device) for start in range(0, len(pictures), batch)]
    modes = torch.cat([vae.encode(to_pixels(part)).latent_dist.mode().cpu() for part in parts])
    return (modes - vae.config.shift_factor) * vae.config.scaling_factor if scaled else modes


def _reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    error = decoded - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges + error.square().mean()


def _learning_rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 100)
    return 2e-3 * warm * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))
