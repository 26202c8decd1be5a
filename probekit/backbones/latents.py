"""From pixels to near-clean latents: posterior mode of the VAE, noise keyed by content, mixing in float32.

Shapes: b images, (c, h, w) = latent channels, height and width.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

import torch

from probekit.backbones.families import Component
from probekit.errors import BackboneError

NOISE_RULE = "1: torch CPU generator seeded by SHA-256 of (seed, key, draw)"
CANVAS_RULE = "1: centre of one canvas as high and as wide as the longest bucket"
MIX_RULES = {
    "flow": "1: (1 - sigma) x0 + sigma eps",
    "vp": "1: ((1 - sigma) x0 + sigma eps) / sqrt((1 - sigma)^2 + sigma^2)",
}
_BATCH_PIXELS = 16 * 64 * 64


def encode_batch(height: int, width: int) -> int:
    """Return how many images of one size in pixels are encoded at once: 16 of up to 64 x 64, one from 256 x 256.

    It depends on nothing else, and smaller batches are filled up with grey, because the batch size moves the last bits
    of a result while the neighbours in a batch of fixed size do not.
    """
    return max(1, min(16, _BATCH_PIXELS // (height * width)))


@dataclass(frozen=True)
class EncodedImage:
    """An image as the backbone gets it.

    Attributes
    ----------
    latents
        float32 on the CPU, (c, h, w): the posterior mode, normalised as the pipeline's decoding undoes it.
    pixel_statistics, latent_statistics
        float32, (96,) and (32 c,): see `probekit.backbones.inputs.picture_statistics`.
    """

    latents: torch.Tensor
    pixel_statistics: torch.Tensor
    latent_statistics: torch.Tensor


@dataclass(frozen=True)
class LatentRule:
    """How the VAE's posterior mode becomes a latent; the definition is part of fingerprints and cache keys.

    Attributes
    ----------
    definition
        In words, with a version.
    normalise
        (VAE, mode (b, C, H', W')) to the latent (b, c, h, w), as the pipeline's own decoding undoes it.
    cells
        VAE cells on a side of one latent pixel.
    """

    definition: str
    normalise: Callable[[Component, torch.Tensor], torch.Tensor]
    cells: int = 1


def _shift_scale(vae: Component, mode: torch.Tensor) -> torch.Tensor:
    shift, scale = vae.config.get("shift_factor"), vae.config.get("scaling_factor")
    if scale is None:
        msg = f"{type(vae).__name__} has no scaling_factor; its family needs another rule for latents"
        raise BackboneError(msg)
    return (mode - (0.0 if shift is None else float(shift))) * float(scale)


def _scale(vae: Component, mode: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = mode * vae.config.scaling_factor
    return scaled


def _patchify_bn(vae: Component, mode: torch.Tensor, eps: float | None = None) -> torch.Tensor:
    return _normalised(vae, torch.pixel_unshuffle(mode, 2), eps or vae.config.batch_norm_eps)


def _normalised(vae: Component, patches: torch.Tensor, eps: float) -> torch.Tensor:
    statistics = vae.bn.running_mean.float(), vae.bn.running_var.float()
    mean, variance = (value.to(patches.device)[:, None, None] for value in statistics)
    normal: torch.Tensor = (patches - mean) / (variance + eps).sqrt()
    return normal


def _patchify_bn_pixels(vae: Component, mode: torch.Tensor) -> torch.Tensor:
    b, c, height, width = mode.shape
    patches = torch.pixel_unshuffle(mode, 2).reshape(b, c, 4, height // 2, width // 2).transpose(1, 2).flatten(1, 2)
    return _normalised(vae, patches, vae.config.batch_norm_eps)


def _mean_std(vae: Component, mode: torch.Tensor) -> torch.Tensor:
    mean, std = (
        torch.tensor(vae.config[name]).view(-1, 1, 1).to(mode.device) for name in ("latents_mean", "latents_std")
    )
    return (mode - mean) / std


LATENT_RULES = {
    "mean-std": LatentRule("1: posterior mode, (z - latents_mean) / latents_std of each channel", _mean_std),
    "patchify-bn": LatentRule("1: posterior mode in 2 x 2 patches, (z - mean) / deviation", _patchify_bn, cells=2),
    "patchify-bn-pixels": LatentRule(
        "1: as patchify-bn, the channels of one pixel of a patch side by side", _patchify_bn_pixels, cells=2
    ),
    "patchify-bn-1e-5": LatentRule(  # ERNIE-Image's pipeline does not ask the VAE's config for epsilon
        "1: as patchify-bn, with epsilon 1e-5", lambda vae, mode: _patchify_bn(vae, mode, 1e-5), cells=2
    ),
    "scale": LatentRule("1: posterior mode or, without a posterior, the latent, z * scaling_factor", _scale),
    "shift-scale": LatentRule("1: posterior mode, (z - shift_factor) * scaling_factor", _shift_scale),
}


def latent_shape(vae: Component, rule: str, height: int, width: int, factor: int) -> tuple[int, int, int]:
    """Return (c, h, w) of an image, `factor` being the VAE's pixels on a side of one of its cells."""
    cells = LATENT_RULES[rule].cells
    channels = vae.config.latent_channels if "latent_channels" in vae.config else vae.config.z_dim
    return int(channels) * cells**2, height // (factor * cells), width // (factor * cells)


@torch.inference_mode()
def encode(vae: Component, rule: str, pixels: torch.Tensor, batch: int) -> torch.Tensor:
    """Encode pixels to latents as the pipeline's own decoding undoes it.

    Parameters
    ----------
    vae
        The pipeline's VAE.
    rule
        Name of the family's rule in `LATENT_RULES`.
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
    filled = filled.to(vae.device, vae.dtype)
    if vae.config.get("in_channels") == 4:  # red, green, blue and opacity
        filled = torch.cat([filled, torch.ones_like(filled[:, :1])], dim=1)
    if "z_dim" in vae.config:  # a video VAE: one frame
        filled = filled.unsqueeze(2)
    found = vae.encode(filled)
    # an autoencoder without a posterior has its latent itself
    mode = found.latent_dist.mode() if "latent_dist" in found else found.latent
    mode = mode[: len(pixels)].float()
    return LATENT_RULES[rule].normalise(vae, mode.squeeze(2) if mode.ndim == 5 else mode).cpu()


def noise(
    seed: int, key: str, draw: int, shape: tuple[int, ...], canvas: tuple[int, int] | None = None
) -> torch.Tensor:
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
    canvas
        Latent height and width that hold every shape of a dump; `shape` is cut from their centre, so that images of
        different shapes share the noise where they overlap. None = the height and width of `shape`.

    Returns
    -------
    Tensor
        float32 on the CPU, `shape`.
    """
    digest = hashlib.sha256(json.dumps([seed, key, draw]).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    channels, h, w = shape
    high, wide = canvas or (h, w)
    drawn = torch.randn((channels, high, wide), generator=generator, dtype=torch.float32)
    top, left = (high - h) // 2, (wide - w) // 2
    return drawn[:, top : top + h, left : left + w].contiguous()


def mix(latents: torch.Tensor, eps: torch.Tensor, sigma: str, *, noise: str = "flow") -> torch.Tensor:
    """Return near-clean latents by a rule of `MIX_RULES`, mixed in float32; sigma is decimal text."""
    level = Decimal(sigma)
    clean, share = float(1 - level), float(level)
    norm = math.hypot(clean, share) if noise == "vp" else 1.0
    return (clean / norm) * latents.float() + (share / norm) * eps.float()
