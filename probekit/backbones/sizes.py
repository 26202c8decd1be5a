"""Which sizes of images a pipeline takes."""

import inspect
from dataclasses import dataclass

from probekit.backbones.conditioning import pixels_per_latent
from probekit.backbones.families import Component, Family
from probekit.backbones.images import Resize
from probekit.errors import ConfigError

_DEFAULT_RESOLUTION = 1024  # where neither transformer nor pipeline names one


@dataclass(frozen=True)
class ImageSize:
    """How images get their size.

    Attributes
    ----------
    resolution
        Side of the square in pixels; of other aspects, about the root of the number of pixels.
    step
        What both sides are multiples of: pixels on a side of a token.
    resize
        Name of a rule of `images.RESIZE_RULES`.
    """

    resolution: int
    step: int
    resize: Resize


def patch_of(pipe: Component, family: Family) -> int:
    """Return the latent pixels on a side of one token."""
    return family.patch if isinstance(family.patch, int) else int(pipe.transformer.config[family.patch])


def image_size(pipe: Component, family: Family, asked: int | None, name: str, *, resize: Resize = "crop") -> ImageSize:
    """Return the size of the images that a pipeline gets.

    Parameters
    ----------
    pipe, family
        A pipeline, with or without weights, and its row.
    asked
        The resolution that the user wants; None = the pipeline's own.
    name
        What an error calls the model.
    resize
        How images get their size; of a ``bucket``, one side may be twice the resolution.

    Raises
    ------
    ConfigError
        If the pipeline does not take that size.
    """
    config = pipe.transformer.config
    step = pixels_per_latent(pipe, family) * patch_of(pipe, family) * family.multiple
    resolution = _own_resolution(pipe) if asked is None else asked
    largest = step * int(config.get("pos_embed_max_size") or 10**6) // (2 if resize == "bucket" else 1)
    if resolution % step or not 0 < resolution <= largest:
        most = f" up to {largest}" if config.get("pos_embed_max_size") else ""
        most += ", since a side of a bucket may be twice as long" if most and resize == "bucket" else ""
        msg = f"resolution is {resolution}; allowed for {name}: multiples of {step}{most}"
        raise ConfigError(msg)
    return ImageSize(resolution, step, resize)


def _own_resolution(pipe: Component) -> int:
    if hasattr(pipe, "get_default_resolution"):  # PRX's sample size is in pixels
        return int(pipe.get_default_resolution())
    side = pipe.transformer.config.get("sample_size") or getattr(pipe, "default_sample_size", None)
    if isinstance(side, int):
        return side * int(pipe.vae_scale_factor)
    return int(inspect.signature(type(pipe).__call__).parameters["height"].default or _DEFAULT_RESOLUTION)
