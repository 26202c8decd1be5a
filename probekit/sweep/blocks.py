"""Blocks of similar layers that a sweep found, and how pairs of layers within one compare with pairs across two."""

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit.errors import StoreError
from probekit.heads import block_ranges, compare_pair_kinds, pair_kinds
from probekit.results import CHOICE_KEYS, as_they_are, load_margins, load_results
from probekit.stats import paired_difference
from probekit.store.files import read_small
from probekit.store.format import unseal
from probekit.sweep.layer_sets import ANSWERS
from probekit.sweep.material import joint_fingerprint

logger = logging.getLogger(__name__)


def compare_blocks(run: Path, numbers: Collection[int], *, resamples: int, level: float) -> pd.DataFrame:
    """Compare the test accuracy of pairs of layers within one block with that of pairs across two, as DiT-Reward does.

    Blocks are found on training pairs alone. The interval is that of the difference of the two means over pairs of
    layers, by the group bootstrap over the same pairs of pictures; the fitted heads are held fixed.

    Parameters
    ----------
    run
        The run.
    numbers
        Numbers of blocks that its configuration asks for.
    resamples, level
        Of the interval.

    Returns
    -------
    DataFrame
        ``BLOCK_COLUMNS`` of `probekit.results`: one row for each setting in which blocks were found.
    """
    frame = as_they_are(load_results(run))
    test = frame[(frame["split"] == "test") & (frame["slice_by"] == "all")]
    rows = [
        _row(run, part, blocks, resamples=resamples, level=level)
        for asked, blocks in _found(run)
        if asked["blocks"] in numbers
        for _, part in _of(test, asked).groupby([*CHOICE_KEYS, "trained_on"], sort=False)
    ]
    return pd.DataFrame(rows)


def _found(run: Path) -> Iterator[tuple[dict[str, Any], list[tuple[int, ...]]]]:
    for path in sorted((run / ANSWERS).glob("*.json")):
        try:
            content = unseal(read_small(path))
        except (StoreError, ValueError) as error:
            logger.warning("%s: is damaged (%s) and left out", path, error)
            continue
        if "blocks" in content["asked"]:
            yield content["asked"], [tuple(block) for block in content["found"]]


def _of(rows: pd.DataFrame, asked: Mapping[str, Any]) -> pd.DataFrame:
    """Keep the rows of the setting in which a question was asked."""
    same = (rows["store_fingerprint"] == joint_fingerprint(asked["fingerprints"])) & (
        rows["data_digest"] == asked["data_digest"]
    )
    for column in ("sigma", "draw", "pooling"):
        same &= rows[column] == asked[column]
    kept: pd.DataFrame = rows[same & rows["combination"].isin(("single", "concat"))]
    return kept


def _row(
    run: Path,
    rows: pd.DataFrame,
    blocks: list[tuple[int, ...]],
    *,
    resamples: int,
    level: float,
) -> dict[str, Any]:
    first, pairs = rows.to_dict("records")[0], rows[rows["n_layers"] == 2]
    layers = [tuple(map(int, name.split("+"))) for name in pairs["layer_set"]]
    found = compare_pair_kinds(dict(zip(layers, pairs["accuracy"], strict=True)), blocks)
    row: dict[str, Any] = {key: first[key] for key in [*CHOICE_KEYS, "trained_on"]} | {"blocks": block_ranges(blocks)}
    for kind in ("within", "across"):
        held = found.get(kind)
        row[f"n_{kind}"] = held.n_pairs if held else 0
        row[kind], row[f"best_{kind}"] = (held.mean, held.best) if held else (np.nan, np.nan)
    row |= dict.fromkeys(("difference", "low", "high"), np.nan)
    if len(found) == 2:
        kind_of = pair_kinds(blocks)
        kinds = np.array([kind_of.get((a, b), "") for a, b in layers])
        margins = load_margins(run, pairs["record_id"])
        margins = margins[(margins["split"] == "test") & (margins["dataset"] == first["dataset"])]
        right = margins.pivot(index="pair_id", columns="record_id", values="correct")[pairs["record_id"]].dropna()
        groups = margins.drop_duplicates("pair_id").set_index("pair_id")["group"].loc[right.index].to_numpy(object)
        within, across = (right.loc[:, kinds == kind].mean(axis=1).to_numpy() for kind in ("within", "across"))
        gain = paired_difference(across, within, groups, n_boot=resamples, level=level)
        row |= {"difference": gain.estimate, "low": gain.low, "high": gain.high}
    return row
