"""What enters a backbone, as a few numbers for each row: a control for what can be read without the backbone.

Shapes: (c, h, w) a latent, (3, H, W) pixels, d channels of an embedding.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.utils import _pytree as pytree

from probekit._types import FloatArray
from probekit.backbones.conditioning import Embeddings
from probekit.backbones.latents import EncodedImage

PARTS = 4
TEXT_WIDTH = 256
DEFINITIONS = {
    "pixels": "1: mean and standard deviation (divided by n) of the pixels in [-1, 1] over the 4 x 4 parts of the "
    "picture, each as (channel, row, column)",
    "latents": "1: as pixels, of the clean VAE latent",
    "text": "1: mean over the tokens of each prompt embedding, padding included, times fixed random numbers "
    "N(0, 1 / 256) of 256 columns, summed over embeddings",
}
"""Name of each group of numbers and what it is, with a version; part of a store's fingerprint."""


def widths(latent_channels: int) -> dict[str, int]:
    """Numbers a row of each group."""
    return {"pixels": 2 * 3 * PARTS**2, "latents": 2 * latent_channels * PARTS**2, "text": TEXT_WIDTH}


def input_statistics(images: Sequence[EncodedImage], summaries: Sequence[torch.Tensor]) -> dict[str, FloatArray]:
    """All groups of `DEFINITIONS`, (m, numbers) float32 each, from m images and the `text_summary` of each prompt."""
    rows = {
        "pixels": [image.pixel_statistics for image in images],
        "latents": [image.latent_statistics for image in images],
        "text": list(summaries),
    }
    return {name: torch.stack(values).numpy() for name, values in rows.items()}


def picture_statistics(pictures: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of pictures or latents (m, c, h, w) over their 4 x 4 parts: float32 (m, 32 c)."""
    values = pictures.double()
    mean, square = (torch.nn.functional.adaptive_avg_pool2d(x, PARTS) for x in (values, values.square()))
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return torch.cat([mean.flatten(1), deviation.flatten(1)], dim=1).float()


def text_summary(embeddings: Embeddings) -> torch.Tensor:
    """Prompt embeddings as float32 (256,), whatever their number, lengths and widths.

    Distances between prompts are kept to about 5 % (Johnson and Lindenstrauss, 1984).
    """
    leaves = [leaf for leaf in pytree.tree_leaves(embeddings) if isinstance(leaf, torch.Tensor)]
    total = torch.zeros(TEXT_WIDTH, dtype=torch.float64)
    for number, leaf in enumerate(leaf for leaf in leaves if leaf.is_floating_point() and leaf.ndim > 1):
        mean = leaf.double().cpu().flatten(0, -2).mean(0)
        total += mean @ _directions(number, len(mean))
    return total.float()


@lru_cache(maxsize=16)
def _directions(number: int, width: int) -> torch.Tensor:
    """Random numbers (d, 256) for one of the embeddings of a prompt; torch's CPU generator, as for noise."""
    generator = torch.Generator().manual_seed(number)
    directions: torch.Tensor = (torch.randn((width, TEXT_WIDTH), generator=generator) / TEXT_WIDTH**0.5).double()
    return directions
