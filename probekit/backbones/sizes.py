"""Which sizes of images a pipeline takes."""

import inspect

from probekit.backbones.conditioning import pixels_per_latent
from probekit.backbones.families import Component, Family
from probekit.errors import ConfigError

_DEFAULT_RESOLUTION = 1024  # where neither transformer nor pipeline names one


def patch_of(pipe: Component, family: Family) -> int:
    """Return the latent pixels on a side of one token."""
    return family.patch if isinstance(family.patch, int) else int(pipe.transformer.config[family.patch])


def resolution_of(pipe: Component, family: Family, asked: int | None, name: str) -> tuple[int, int]:
    """Return the side of the images in pixels, and the number that sides must be multiples of.

    Parameters
    ----------
    pipe, family
        A pipeline, with or without weights, and its row.
    asked
        What the user wants; None = the pipeline's own.
    name
        What an error calls the model.

    Raises
    ------
    ConfigError
        If the pipeline does not take that size.
    """
    config = pipe.transformer.config
    step = pixels_per_latent(pipe, family) * patch_of(pipe, family)
    side = config.get("sample_size") or getattr(pipe, "default_sample_size", None)
    default = inspect.signature(type(pipe).__call__).parameters["height"].default or _DEFAULT_RESOLUTION
    resolution = asked or (side * int(pipe.vae_scale_factor) if isinstance(side, int) else default)
    largest = step * int(config.get("pos_embed_max_size") or 10**6)
    if resolution % step or not 0 < resolution <= largest:
        most = f" up to {largest}" if config.get("pos_embed_max_size") else ""
        msg = f"resolution is {resolution}; allowed for {name}: multiples of {step}{most}"
        raise ConfigError(msg)
    return resolution, step
