"""Shape legend, array aliases and the small records that cross rooms.

Shape legend, used in all signatures and docstrings:

- m: rows, one for each distinct (prompt, image)
- n: pairs of rows
- d: channels of a feature vector
- L: layers; layer 0 = image tokens entering the first block, layer k = image tokens after block k, layer n_blocks + 1 =
  tokens entering the output projection (the output point: a function of the last layer, no layer of its own)
- b: images of a batch; t: image tokens of an image
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probekit.errors import ConfigError

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]
RESOLVED_RATIO = 3.0
"""A noise level is resolved where it changes features at least this many times as much as rounding to bfloat16 does."""

Progress = Callable[[int, int, str], None]
"""What long work calls to show where it is: ``progress(done, total, text)``."""


@dataclass(frozen=True)
class LayerPoint:
    """A place in a backbone where features are taken.

    Attributes
    ----------
    index
        Layer number: 0 = tokens entering the first block, k = tokens after the k-th block, n_blocks + 1 = tokens
        entering the output projection.
    name
        Module path of the block, such as ``transformer_blocks.11``, or ``input of proj_out``.
    stream
        Which tokens are pooled, unless the definition of a pooling names others: ``image``.
    """

    index: int
    name: str
    stream: str = "image"


def row_id(image_sha256: bytes, prompt: str) -> str:
    """Key of one row: hex SHA-256 of (SHA-256 of the image's bytes + SHA-256 of the UTF-8 prompt)."""
    return hashlib.sha256(image_sha256 + hashlib.sha256(prompt.encode()).digest()).hexdigest()


def canonical_sigma(text: str) -> str:
    """Write a noise level in its one form: plain decimal, ``0.005`` and never ``5e-3``.

    Raises
    ------
    ConfigError
        If the text is not a number in [0, 1].
    """
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal("NaN")
    if not (value.is_finite() and 0 <= value <= 1):
        message = f"sigma is {text!r}; allowed: a decimal number from 0 to 1, such as 0.005"
        raise ConfigError(message)
    return format(abs(value).normalize(), "f")


def scaled(value: int | None, unit: str) -> str:
    """Write a number with three digits and a decimal prefix up to T; one below a thousand as it is."""
    if value is None:
        return "unknown"
    if value < 1000:
        return f"{value} {unit}"
    rounded = float(f"{value:.3g}")  # first, since 999,999 is 1 M and not 1e+03 k
    factor, prefix = next((pair for pair in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if rounded >= pair[0]), (1e3, "k"))
    return f"{rounded / factor:.3g} {prefix}{unit}"


def duration(seconds: float) -> str:
    """Write a time for a person: seconds with two digits, minutes, or hours and minutes."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
