"""Layer sets: which layers go into one head, and how their features become one matrix."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice
from typing import Any, Literal

import numpy as np

from probekit._types import FloatArray
from probekit.config import Rule, SubsetSearch
from probekit.errors import ConfigError, HeadError

LayerSetSpec = str | Sequence[int] | Mapping[Any, Any]
"""``"singles"``, ``"pairs"``, ``"all"``, layer numbers, or one of ``relative``, ``windows``, ``strides``, ``blocks``,
``search`` with its value, as `probekit.config.LayerSet` checks them."""


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


def mean_features(features: Sequence[FloatArray]) -> FloatArray:
    """Mean of the features of several layers, as they are: layers of larger features weigh more.

    Parameters
    ----------
    features
        Arrays (m, d), all of one shape.

    Returns
    -------
    FloatArray
        (m, d). A single array is handed through, not copied.

    Raises
    ------
    HeadError
        If there is none, or the shapes differ.
    """
    shapes = sorted({block.shape for block in features})
    if len(shapes) != 1:
        message = f"cannot average features of shapes {shapes}; give at least one array, all of one width"
        raise HeadError(message)
    if len(features) == 1:
        return features[0]
    total = features[0].astype(np.float64)
    for block in features[1:]:
        total += block
    mean: FloatArray = (total / len(features)).astype(np.result_type(*features))
    return mean


def resolve_layer_sets(
    specs: Sequence[LayerSetSpec],
    n_blocks: int,
    *,
    stored: Sequence[int] | None = None,
    found: Sequence[Sequence[tuple[int, ...]]] = (),
) -> list[tuple[int, ...]]:
    """Layer sets that a list of specifications means for one backbone.

    Parameters
    ----------
    specs
        Each is one of

        - ``"singles"``: every layer alone; ``"pairs"``: all pairs; ``"all"``: every layer together;
        - a list of layer numbers;
        - ``{"relative": depths}`` with depths from 0 to 1, of which each becomes the layer nearest to depth times
          ``n_blocks`` (halves up);
        - ``{"windows": k}``: every k neighbouring layers;
        - ``{"strides": k}``: every k-th layer, beginning with each of the first k;
        - ``{"blocks": n}``: the layers of each of n contiguous blocks of layers that are alike;
        - ``{"search": SubsetSearch(...)}``: the best subsets.

        The last two need features: see ``found``. The output point ``n_blocks + 1`` is a function of the last layer and
        no layer of its own: it is among the singles and may be listed by number, but is in no other set.
    n_blocks
        Blocks of the backbone; layer 0 is before the first, layer ``n_blocks`` after the last.
    stored
        Layers that are at hand; by default all ``n_blocks + 1``. Neighbours are neighbours among them.
    found
        Layer sets of each specification that `specs_with_features` names, in its order: of
        `probekit.heads.find_blocks`, or of `probekit.heads.screen_subsets` and `probekit.heads.best_subsets`.

    Returns
    -------
    list of tuple of int
        Each ascending; in the order of the specifications, repeats left out.

    Raises
    ------
    ConfigError
        If a specification is unknown, names a layer that is not at hand, or asks for more layers than there are.
    """
    layers = sorted(range(n_blocks + 1) if stored is None else stored)
    inner = depth_layers(layers, n_blocks)
    answers: Iterator[Sequence[tuple[int, ...]]] = iter(found)
    sets: list[tuple[int, ...]] = []
    for spec in specs:
        match spec:
            case "singles":
                sets += [(layer,) for layer in layers]
            case "pairs":
                _enough(2, inner, spec)
                sets += combinations(inner, 2)
            case "all":
                sets.append(_present(set(inner), spec, layers))
            case {"relative": [*depths], **rest} if not rest:
                outside = [depth for depth in depths if not 0 <= depth <= 1]
                if outside:
                    message = f"layer_sets: relative depth {outside[0]} is outside 0 to 1"
                    raise ConfigError(message)
                sets.append(_present({int(depth * n_blocks + 0.5) for depth in depths}, spec, layers))
            case {"windows": int(size), **rest} if not rest:
                _enough(size, inner, spec)
                sets += [tuple(inner[start : start + size]) for start in range(len(inner) - size + 1)]
            case {"strides": int(step), **rest} if not rest:
                _enough(step, inner, spec)
                sets += [tuple(inner[start::step]) for start in range(step)]
            case {"blocks": int(least), **rest} | {"search": SubsetSearch(max_size=least), **rest} if not rest:
                _enough(least, inner, spec)
                answer = next(answers, None)
                if answer is None:
                    message = f"layer_sets: {_plain(spec)}: needs features; give its layer sets as found"
                    raise ConfigError(message)
                for one in answer:
                    sets.append(_present(set(one), spec, layers))
            case [*_] if not isinstance(spec, str):
                sets.append(_present(set(spec), spec, layers))
            case _:
                allowed = (
                    "'singles', 'all', 'pairs', a list of layer numbers, {'relative': depths}, {'windows': k}, "
                    "{'strides': k}, {'blocks': n}, {'search': SubsetSearch}"
                )
                message = f"layer_sets: {spec!r} is unknown; allowed: {allowed}"
                raise ConfigError(message)
    return list(dict.fromkeys(sets))


def specs_with_features(specs: Sequence[LayerSetSpec]) -> list[Mapping[Any, Any]]:
    """Pick the specifications whose layer sets only features tell, ``blocks`` and ``search``, in their order."""
    return [spec for spec in specs if isinstance(spec, Mapping) and set(spec) <= {"blocks", "search"}]


def stand_ins(spec: Mapping[Any, Any], layers: Sequence[int]) -> list[tuple[int, ...]]:
    """Give, before features are read, as many and as large layer sets as ``blocks`` or ``search`` will at most."""
    if "blocks" in spec:
        return [tuple(part.tolist()) for part in np.array_split(np.array(layers), int(spec["blocks"]))]
    search: SubsetSearch = spec["search"]
    sizes = range(2, search.max_size + 1)
    return [one for size in sizes for one in islice(combinations(layers, size), search.refit_top)]


def depth_layers(stored: Sequence[int], n_blocks: int) -> list[int]:
    """Layers among those at hand that combinations are made of: all but the output point, ascending."""
    return sorted(layer for layer in stored if layer <= n_blocks)


def _enough(needed: int, layers: Sequence[int], spec: LayerSetSpec) -> None:
    if not 1 <= needed <= len(layers):
        message = (
            f"layer_sets: {_plain(spec)}: needs {needed} layers; allowed: 1 to {len(layers)}, as many as there are"
        )
        raise ConfigError(message)


def _present(wanted: set[int], spec: LayerSetSpec, layers: Sequence[int]) -> tuple[int, ...]:
    absent = sorted(wanted.difference(layers))
    if absent or not wanted:
        what = f"layer {absent[0]} is not there" if absent else "it names no layer"
        message = f"layer_sets: {_plain(spec)}: {what}; allowed: {', '.join(map(str, layers))}"
        raise ConfigError(message)
    return tuple(sorted(wanted))


def _plain(spec: LayerSetSpec) -> str:
    """Write a specification as YAML has it."""
    if isinstance(spec, Mapping):
        return repr(
            {key: value.model_dump() if isinstance(value, SubsetSearch) else value for key, value in spec.items()}
        )
    return repr(spec)


def layer_set_name(layers: Sequence[int]) -> str:
    """Name of a layer set, such as ``0+1+2``."""
    return "+".join(map(str, layers))


def combination_name(layers: Sequence[int], rule: Rule = "concat") -> Literal["single"] | Rule:
    """How the layers of a set are combined."""
    return "single" if len(layers) == 1 else rule
