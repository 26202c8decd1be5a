"""A tiny, randomly weighted pipeline of every family, built offline and saved as an ordinary diffusers folder."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GROUPS = ("sd3_kind", "flux_kind", "qwen_kind", "pixart_kind", "others")


@dataclass(frozen=True)
class Builder:
    """How a family's tiny pipeline is made and judged.

    Attributes
    ----------
    transformer, pipeline
        Key of the row in the table of families.
    build
        Saves the pipeline in a folder and returns that folder.
    by_hand
        Independent forward: (components, prompt, noisy latents (k, c, h, w), sigma) to the image-token mean (k, d) of
        every layer from 0.
    size
        Height and width in pixels that the tests use: not square where the family allows it.
    tolerance
        Largest change of a layer's features with batch size and order, as a share of their norm. At most half of the
        default was ever seen of image tokens.
    resize
        How the tests give pictures of several shapes their size; ``pad`` where a bucket does not fit the tiny model.
    max_tokens
        Places for text, where the pipeline's default takes long.
    note
        What is peculiar.
    """

    transformer: str
    pipeline: str
    build: Callable[[Path], Path]
    by_hand: Callable[..., Any] | None = None
    size: tuple[int, int] = (16, 16)
    tolerance: float = 2e-6
    resize: str = "bucket"
    max_tokens: int | None = None
    note: str = ""


def all_pipelines() -> dict[str, Builder]:
    """Return every builder by the family's name."""
    found: dict[str, Builder] = {}
    for group in GROUPS:
        if find_spec(f"{__name__}.{group}") is not None:
            found |= import_module(f"{__name__}.{group}").PIPELINES
    return found
