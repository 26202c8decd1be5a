"""Ratios of times that were taken within the same rounds, so that a machine that slows down slows both sides."""

from collections.abc import Sequence

import numpy as np


def spread(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return median, smallest and largest of the ratios ``above / below`` of the rounds."""
    ratios = np.array(above) / np.array(below)
    return [float(np.median(ratios)), float(ratios.min()), float(ratios.max())]


def in_words(ratios: Sequence[float]) -> str:
    """Write what `spread` returns."""
    return "{:.3f} ({:.3f} to {:.3f})".format(*ratios)
