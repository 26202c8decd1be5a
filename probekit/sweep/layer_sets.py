"""Layer sets of a head on a selection; similar layers and the best subsets are found on training pairs alone.

What was found lies in the run (``layer_sets/``) under a digest of all that determines it, so that the same or an
amended sweep does not search again. m = rows, n = training pairs, d = channels of a layer, L = layers.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probekit._types import scaled
from probekit.config import LinearHead, MLPHead, SubsetSearch
from probekit.errors import ConfigError, HeadError, StoreError
from probekit.heads import (
    best_subsets,
    block_ranges,
    find_blocks,
    resolve_layer_sets,
    screen_subsets,
    specs_with_features,
    stand_ins,
)
from probekit.heads.combine import depth_layers
from probekit.heads.factorisation import fit_bytes
from probekit.heads.screening import basis_width
from probekit.results import JOINED
from probekit.store import canonical_json
from probekit.store.files import read_small, write_atomically
from probekit.store.format import seal, unseal
from probekit.sweep.features import Place
from probekit.sweep.material import Selection, material, open_cached

logger = logging.getLogger(__name__)

ANSWERS = "layer_sets"
"""Folder of a run that holds what was found."""
_VERSION = "2"  # raised when the same question would be answered otherwise
_USUAL = 2**30  # bytes that searches use where they may have more
_FIXED = 2**26
_READ = 2**25  # of the layer that is read while a search keeps what it made of others
LayerSets = list[tuple[int, ...]]


@dataclass(frozen=True)
class Search:
    """A search that a dry run leaves out: of how many layers, pairs, channels and columns, and what it takes.

    Attributes
    ----------
    asked
        What determines its answer.
    n_layers, n, d, columns
        Layers, training pairs, channels of the widest layer; folds x strengths, or 0 where layers are only compared.
    needed
        Bytes.
    sets
        Most layer sets that it finds.
    """

    asked: dict[str, Any]
    n_layers: int
    n: int
    d: int
    columns: int
    needed: int
    sets: int


def layer_sets(
    head: LinearHead | MLPHead,
    selection: Selection,
    *,
    sigmas: Sequence[str],
    draw: int,
    poolings: Sequence[str],
    run: Path,
    allowed: int,
    searches: list[Search] | None = None,
) -> LayerSets:
    """Say which layer sets the configuration of a head means here.

    Parameters
    ----------
    head, selection, sigmas, draw, poolings
        What the sets are for.
    run
        Folder in which answers are looked up and kept.
    allowed
        Bytes that a search may take.
    searches
        If given, nothing is searched or written: a search whose answer the run does not hold is appended, and others
        stand in for its layer sets, as many and as large as there may be.

    Raises
    ------
    ConfigError
        If a specification names layers that the store does not hold, or a search needs more memory than allowed.
    """
    store = open_cached(selection.stores[0])
    n_blocks = int(store.describe["n_blocks"])
    held = [[layer.index for layer in store.layers_of(pooling)] for pooling in poolings]
    stored = [layer for layer in held[0] if all(layer in others for others in held)]
    sigma, pooling = JOINED.join(sigmas), JOINED.join(poolings)
    layers = depth_layers(stored, n_blocks)
    linear = head if isinstance(head, LinearHead) else LinearHead(kind="linear", layer_sets=["all"])
    try:
        found: list[LayerSets] = []
        for spec in specs_with_features(head.layer_sets):
            asked: dict[str, Any] = {
                "version": _VERSION,
                "fingerprints": sorted({open_cached(path).fingerprint for path in selection.stores}),
                "data_digest": material(selection).digest,
                "sigma": sigma,
                "draw": draw,
                "pooling": pooling,
                "layers": layers,
            }
            if "blocks" in spec:
                asked |= {"blocks": spec["blocks"]}
            else:
                asked |= {"search": spec["search"].max_size, "strengths": linear.strengths, "folds": linear.folds}
            known = _known(run, asked)
            if known is None:
                places = {layer: Place(selection, tuple(sigmas), draw, tuple(poolings), layer) for layer in layers}
                needed, first = _of_blocks(places) if "blocks" in spec else _of_search(places, linear)
                left = _left(spec, needed, allowed)
                if searches is not None:
                    known = stand_ins(spec, layers)
                    n, columns = len(material(selection).train.label), linear.folds * len(linear.strengths)
                    d = max(place.width for place in places.values())
                    if all(other.asked != asked for other in searches):  # heads may share a question
                        columns *= "search" in spec
                        searches.append(Search(asked, len(layers), n, d, columns, needed, len(known)))
                else:
                    memory = min(_USUAL, first + left)
                    text = "%s, sigma %s, %s: %s among %d layers are searched"
                    what = "blocks" if "blocks" in spec else f"sets of up to {spec['search'].max_size}"
                    logger.info(text, store.path, sigma, pooling, what, len(layers))
                    try:
                        if "blocks" in spec:
                            known = _blocks(places, spec["blocks"], memory)
                        else:
                            known = _searched(places, spec["search"], linear, memory)
                    except HeadError as error:  # a layer that is the same in all rows
                        text = "%s, %s, head %s: no layer sets of %s: %s"
                        logger.warning(text, store.path, pooling, head.name, spec, error)
                        known = []
                    else:
                        _keep(run, asked, known)
            if "blocks" in spec and known and searches is None:
                logger.info("%s, sigma %s, %s: blocks %s", store.path, sigma, pooling, block_ranges(known))
            found.append(known if "blocks" in spec else _first(known, spec["search"].refit_top))
        return resolve_layer_sets(head.layer_sets, n_blocks, stored=stored, found=found)
    except ConfigError as error:
        message = f"{store.path}, pooling {pooling!r}, head {head.name!r}: {error}"
        raise ConfigError(message) from None


def _of_blocks(places: Mapping[int, Place]) -> tuple[int, int]:
    """Bytes that finding blocks needs at least, and those of them that it may be told to use."""
    first = next(iter(places.values()))
    m, d = len(np.unique(material(first.selection).train.rows)), first.width
    every = sum(len(open_cached(path).rows) for path in first.selection.stores)
    products = 4 * m * m * len(places) if m < d else 4 * m * d + 12 * d * d
    return 4 * every * d + 12 * m * d + products + _FIXED, 4 * m * d


def _blocks(places: Mapping[int, Place], number: int, memory: int) -> LayerSets:
    first = next(iter(places.values()))
    used = np.unique(material(first.selection).train.rows)
    return find_blocks(lambda layer: places[layer].rows()[used], list(places), number, memory=memory)


def _of_search(places: Mapping[int, Place], linear: LinearHead) -> tuple[int, int]:
    """Bytes that a search needs at least, and those of them that it may be told to use."""
    first = next(iter(places.values()))
    n, d, layers = len(material(first.selection).train.label), max(one.width for one in places.values()), len(places)
    width = basis_width(layers, len(linear.strengths))
    kept = layers * (4 * min(n, d) ** 2 + 4 * n * linear.folds) + 32 * linear.folds * (width * layers) ** 2
    fit = 4 * n * d + fit_bytes(n, d, linear.folds * len(linear.strengths))
    one_fold = 4 * n * width * layers
    join = 16 * n * d + 8 * n * layers * linear.folds + one_fold
    return kept + max(fit, join) + _FIXED + _READ, one_fold


def _searched(places: Mapping[int, Place], search: SubsetSearch, linear: LinearHead, memory: int) -> LayerSets:
    """Subsets of each size from 2 on, the most promising of each size first."""
    train = material(next(iter(places.values())).selection).train
    screened = screen_subsets(
        lambda layer: places[layer].differences(train.rows),
        list(places),
        train.label,
        train.frame["weight"].to_numpy(np.float64),
        train.frame["group"].to_numpy(),
        max_size=search.max_size,
        Cs=linear.strengths,
        cv=linear.folds,
        quantisation=lambda layer: places[layer].noise(),
        memory=memory,
    )
    return best_subsets(screened, len(screened))


def _left(spec: Mapping[Any, Any], needed: int, allowed: int) -> int:
    """Bytes that a search may take beyond what it needs at least."""
    if needed > allowed:
        plain = {key: value if isinstance(value, int) else value.model_dump() for key, value in spec.items()}
        message = (
            f"layer_sets: {plain!r}: needs about {scaled(needed, 'B')} of memory; allowed: "
            f"{scaled(max(0, allowed), 'B')}; give more --memory, or list layer numbers"
        )
        raise ConfigError(message)
    return min(allowed - needed, _USUAL)


def _first(ranked: LayerSets, top: int) -> LayerSets:
    """Keep the first sets of each size."""
    seen: Counter[int] = Counter()
    kept = []
    for one in ranked:
        seen[len(one)] += 1
        if seen[len(one)] <= top:
            kept.append(one)
    return kept


def _path(run: Path, asked: Mapping[str, Any]) -> Path:
    return run / ANSWERS / f"{hashlib.sha256(canonical_json(asked).encode()).hexdigest()[:32]}.json"


def _keep(run: Path, asked: Mapping[str, Any], found: LayerSets) -> None:
    write_atomically(_path(run, asked), seal({"asked": asked, "found": found}))


def _known(run: Path, asked: Mapping[str, Any]) -> LayerSets | None:
    """Look an answer up; a file that is damaged or answers another question is said and not used."""
    path = _path(run, asked)
    if not path.exists():
        return None
    try:
        content = unseal(read_small(path))
    except (StoreError, ValueError) as error:
        logger.warning("%s: is damaged (%s); layer sets are searched again", path, error)
        return None
    if content.get("asked") != json.loads(canonical_json(asked)):
        logger.warning("%s: answers another question than its name says; layer sets are searched again", path)
        return None
    return [tuple(one) for one in content["found"]]
