"""Layer sets of a head on a selection; blocks of similar layers and the best subsets are found on training pairs alone.

They are found anew by every run of a sweep, which gives the same sets each time. m = rows, n = pairs.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from probekit._types import FloatArray
from probekit.config import LinearHead, MLPHead, SubsetSearch
from probekit.errors import ConfigError, HeadError
from probekit.heads import (
    best_subsets,
    block_ranges,
    find_blocks,
    resolve_layer_sets,
    screen_subsets,
    specs_with_features,
)
from probekit.heads.combine import depth_layers
from probekit.results import JOINED
from probekit.sweep.blocks import keep_answer
from probekit.sweep.material import Selection, material, open_cached, read_features

logger = logging.getLogger(__name__)


def layer_sets(
    head: LinearHead | MLPHead,
    selection: Selection,
    *,
    sigmas: Sequence[str],
    draw: int,
    poolings: Sequence[str],
    run: Path | None = None,
) -> list[tuple[int, ...]]:
    """Say which layer sets the configuration of a head means here; blocks that were found are kept in `run`.

    Raises
    ------
    ConfigError
        If a specification names layers that the store does not hold.
    """
    store = open_cached(selection.stores[0])
    n_blocks = int(store.describe["n_blocks"])
    held = [[layer.index for layer in store.layers_of(pooling)] for pooling in poolings]
    stored = [layer for layer in held[0] if all(layer in others for others in held)]
    train = material(selection).train
    where = JOINED.join(sigmas), JOINED.join(poolings)

    def features(layer: int) -> FloatArray:
        return read_features(selection, layer, sigmas=sigmas, poolings=poolings, draw=draw)

    def differences(layer: int) -> FloatArray:
        rows = features(layer)
        return rows[train.rows[:, 0]] - rows[train.rows[:, 1]]

    def blocks(number: int, layers: list[int]) -> list[tuple[int, ...]]:
        used = np.unique(train.rows)
        made = find_blocks(lambda layer: features(layer)[used], layers, number)
        logger.info("%s, sigma %s, %s: blocks %s", store.path, *where, block_ranges(made))
        if run is not None:
            asked = {
                "fingerprints": sorted({open_cached(path).fingerprint for path in selection.stores}),
                "data_digest": material(selection).digest,
                "sigma": where[0],
                "draw": draw,
                "pooling": where[1],
                "layers": layers,
                "blocks": number,
            }
            keep_answer(run, asked, made)
        return made

    def searched(search: SubsetSearch, layers: list[int]) -> list[tuple[int, ...]]:
        linear = head if isinstance(head, LinearHead) else LinearHead(kind="linear", layer_sets=["all"])
        screened = screen_subsets(
            differences,
            layers,
            train.label,
            train.frame["weight"].to_numpy(np.float64),
            train.frame["group"].to_numpy(),
            max_size=search.max_size,
            Cs=linear.strengths,
            cv=linear.folds,
        )
        return best_subsets(screened, search.refit_top)

    try:
        found: list[list[tuple[int, ...]]] = []
        for spec in specs_with_features(head.layer_sets):
            layers = depth_layers(stored, n_blocks)
            try:
                found.append(blocks(spec["blocks"], layers) if "blocks" in spec else searched(spec["search"], layers))
            except HeadError as error:  # a layer that is the same in all rows
                logger.warning("%s, %s, head %s: no layer sets of %s: %s", store.path, where[1], head.name, spec, error)
                found.append([])
        return resolve_layer_sets(head.layer_sets, n_blocks, stored=stored, found=found)
    except ConfigError as error:
        message = f"{store.path}, pooling {where[1]!r}, head {head.name!r}: {error}"
        raise ConfigError(message) from None
