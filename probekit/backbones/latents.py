"""From pixels to near-clean latents: posterior mode of the VAE, noise keyed by content, mixing in float32.

Shapes: b images, (c, h, w) = latent channels, height and width.
"""

import hashlib
import json
from decimal import Decimal

import torch

from probekit.backbones.families import Component

LATENT_RULE = "1: posterior mode, (z - shift) * scale"
NOISE_RULE = "1: torch CPU generator seeded by SHA-256 of (seed, key, draw)"
_BATCH_PIXELS = 16 * 64 * 64


def encode_batch(resolution: int) -> int:
    """Return how many images of a resolution are encoded at once: 16 of up to 64 pixels, one from 256 pixels.

    It depends on nothing else, and smaller batches are filled up with grey, because the batch size moves the last bits
    of a result while the neighbours in a batch of fixed size do not.
    """
    return max(1, min(16, _BATCH_PIXELS // resolution**2))


@torch.inference_mode()
def encode(vae: Component, pixels: torch.Tensor, batch: int) -> torch.Tensor:
    """Encode pixels to latents as the pipeline's own decoding undoes it.

    Parameters
    ----------
    vae
        The pipeline's VAE.
    pixels
        float32 in [-1, 1], (b, 3, H, W) with b at most `batch`.
    batch
        Number of images in every call of the VAE.

    Returns
    -------
    Tensor
        float32 on the CPU, (b, c, h, w).
    """
    filled = torch.cat([pixels, pixels.new_zeros(batch - len(pixels), *pixels.shape[1:])])
    mode: torch.Tensor = vae.encode(filled.to(vae.device, vae.dtype)).latent_dist.mode()[: len(pixels)].float().cpu()
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    return (mode - (0.0 if shift is None else shift)) * (1.0 if scale is None else scale)


def noise(seed: int, key: str, draw: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw standard normal noise that depends on its arguments only.

    Parameters
    ----------
    seed
        Seed of the dump.
    key
        The prompt, for noise that all images of a prompt share; or the image's digest.
    draw
        Number of the draw.
    shape
        Latent shape, (c, h, w).

    Returns
    -------
    Tensor
        float32 on the CPU, `shape`.
    """
    digest = hashlib.sha256(json.dumps([seed, key, draw]).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def mix(latents: torch.Tensor, eps: torch.Tensor, sigma: str) -> torch.Tensor:
    """Return the near-clean latents (1 - sigma) x0 + sigma eps, mixed in float32; sigma is decimal text."""
    level = Decimal(sigma)
    return float(1 - level) * latents.float() + float(level) * eps.float()
