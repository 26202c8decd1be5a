"""Layer sets: which layers go into one head, and how their features become one matrix."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from probekit._types import FloatArray
from probekit.errors import ConfigError, HeadError

LayerSetSpec = str | Sequence[int] | Mapping[Any, Sequence[float]]
"""``"singles"``, ``"all"``, layer numbers, or ``{"relative": depths}``."""


def concatenate(features: Sequence[FloatArray]) -> FloatArray:
    """Features of several layers side by side.

    Parameters
    ----------
    features
        Arrays (m, d_l) with the same rows in the same order.

    Returns
    -------
    FloatArray
        (m, sum of d_l). A single array is handed through, not copied.

    Raises
    ------
    HeadError
        If there is none, or the numbers of rows differ.
    """
    rows = sorted({len(block) for block in features})
    if len(rows) != 1:
        message = f"cannot concatenate features with rows {rows}; give at least one array, all with the same rows"
        raise HeadError(message)
    return features[0] if len(features) == 1 else np.concatenate(features, axis=1)


def resolve_layer_sets(
    specs: Sequence[LayerSetSpec], n_blocks: int, *, stored: Sequence[int] | None = None
) -> list[tuple[int, ...]]:
    """Layer sets that a list of specifications means for one backbone.

    Parameters
    ----------
    specs
        Each is ``"singles"`` (every layer alone), ``"all"`` (every layer together), a list of layer numbers, or
        ``{"relative": depths}`` with depths from 0 to 1, of which each becomes the layer nearest to depth times
        ``n_blocks`` (halves up). The output point ``n_blocks + 1`` is a function of the last layer and no layer of its
        own: it is among the singles and may be listed by number, but is not in ``"all"`` and at no relative depth.
    n_blocks
        Blocks of the backbone; layer 0 is before the first, layer ``n_blocks`` after the last.
    stored
        Layers that are at hand; by default all ``n_blocks + 1``.

    Returns
    -------
    list of tuple of int
        Each ascending; in the order of the specifications, repeats left out.

    Raises
    ------
    ConfigError
        If a specification is unknown, or names a layer that is not at hand.
    """
    layers = sorted(range(n_blocks + 1) if stored is None else stored)
    sets: list[tuple[int, ...]] = []
    for spec in specs:
        if spec == "singles":
            sets += [(layer,) for layer in layers]
        elif spec == "all":
            sets.append(_present({layer for layer in layers if layer <= n_blocks}, spec, layers))
        elif isinstance(spec, Mapping) and set(spec) == {"relative"}:
            outside = [depth for depth in spec["relative"] if not 0 <= depth <= 1]
            if outside:
                message = f"layer_sets: relative depth {outside[0]} is outside 0 to 1"
                raise ConfigError(message)
            sets.append(_present({int(depth * n_blocks + 0.5) for depth in spec["relative"]}, spec, layers))
        elif isinstance(spec, Sequence) and not isinstance(spec, str):
            sets.append(_present(set(spec), spec, layers))
        else:
            allowed = "'singles', 'all', a list of layer numbers, {'relative': depths}"
            message = f"layer_sets: {spec!r} is unknown; allowed: {allowed}"
            raise ConfigError(message)
    return list(dict.fromkeys(sets))


def _present(wanted: set[int], spec: LayerSetSpec, layers: Sequence[int]) -> tuple[int, ...]:
    absent = sorted(wanted.difference(layers))
    if absent or not wanted:
        what = f"layer {absent[0]} is not there" if absent else "it names no layer"
        message = f"layer_sets: {spec!r}: {what}; allowed: {', '.join(map(str, layers))}"
        raise ConfigError(message)
    return tuple(sorted(wanted))


def layer_set_name(layers: Sequence[int]) -> str:
    """Name of a layer set, such as ``0+1+2``."""
    return "+".join(map(str, layers))


def combination_name(layers: Sequence[int]) -> Literal["single", "concat"]:
    """How the layers of a set are combined."""
    return "single" if len(layers) == 1 else "concat"
