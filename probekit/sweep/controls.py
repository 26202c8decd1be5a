"""What the refits of a run say, from its margins: one row for each fit as it is and each kind of what was altered."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit._types import FloatArray
from probekit.results import CONTROL_COLUMNS, load_margins, load_results
from probekit.stats import (
    PROTOCOLS,
    accuracy_interval,
    network_contrast,
    paired_difference,
    prompt_weights,
    with_training,
)

#: What a fit and its altered ones have in common.
FIT_KEYS = [
    *("backbone", "control", "dataset", "trained_on", "protocol", "sigma", "draw", "pooling"),
    *("head", "layer_set", "combination"),
]
_EMPTY = {column: np.nan for column, dtype in CONTROL_COLUMNS.items() if dtype == "float64"} | {
    "against": "",
    "selected": "",
}


class _Judged:
    """Right (1) or wrong (0) of records on the test pairs of a data set, one layer's records at a time."""

    def __init__(self, run: Path, dataset: str, protocol: str) -> None:
        self._run, self._dataset, self._by_prompt = run, dataset, "prompts" in PROTOCOLS[protocol].needs
        self._pairs = pd.DataFrame()

    def __call__(self, records: pd.Series) -> FloatArray:
        """Right or wrong (R, n), NaN where a pair is not scored."""
        return np.stack([self._correct(str(record)) for record in records])

    def _correct(self, record: str) -> FloatArray:
        margins = load_margins(self._run, [record])
        here = margins[(margins["split"] == "test") & (margins["dataset"] == self._dataset)]
        if self._pairs.empty:
            self._pairs = here.set_index("pair_id")
        return here.set_index("pair_id")["correct"].reindex(self._pairs.index).to_numpy(np.float64)

    def options(self, correct: FloatArray) -> dict[str, Any]:
        """Give groups and weights (n,) of the pairs, as intervals take them."""
        groups = self._pairs["group"].to_numpy()
        prompts = self._pairs["prompt_id"].to_numpy()
        return {"groups": groups, "weights": prompt_weights(correct, prompts) if self._by_prompt else None}


def compare_controls(run: Path, *, resamples: int, level: float) -> pd.DataFrame:
    """Sum up the refits of a run.

    Parameters
    ----------
    run
        A run whose results table is written.
    resamples, level
        Of the intervals.

    Returns
    -------
    DataFrame
        ``CONTROL_COLUMNS`` of `probekit.results`; empty where no head asked for controls.
    """
    frame = load_results(run)
    test = frame[(frame["split"] == "test") & (frame["slice_by"] == "all") & (frame["head_kind"] == "linear")]
    asked = test[test["altered"] != ""].drop_duplicates(FIT_KEYS)[FIT_KEYS]
    test = test.merge(asked, on=FIT_KEYS)
    rows: list[dict[str, Any]] = []
    outer = test["altered"].str.startswith("nested:")
    nested, test = test[outer & test["chosen"]], test[~outer]
    setting = [key for key in FIT_KEYS if key not in ("layer_set", "combination")]
    for _, same in test.groupby(setting, sort=False):
        judged = _Judged(run, str(same["dataset"].iloc[0]), str(same["protocol"].iloc[0]))
        chosen = same[same["chosen"] & (same["altered"] == "")]
        for _, fits in same.groupby(["layer_set", "combination"], sort=False):
            rows += _rows(fits, chosen, same, judged, resamples, level)
    for _, folds in nested.groupby([*setting, "altered"], sort=False):
        rows.append(_choice(run, folds, resamples, level))
    return pd.DataFrame(rows)


def _choice(run: Path, folds: pd.DataFrame, resamples: int, level: float) -> dict[str, Any]:
    """Accuracy over the outer folds of what was chosen without each of them, the fits held fixed."""
    first = folds.iloc[0]
    pairs = load_margins(run, folds["record_id"])
    pairs = pairs[(pairs["split"] == "test") & (pairs["dataset"] == first["dataset"])]
    correct = pairs["correct"].to_numpy(np.float64)
    by_prompt = "prompts" in PROTOCOLS[first["protocol"]].needs
    weights = prompt_weights(correct, pairs["prompt_id"].to_numpy()) if by_prompt else None
    found = accuracy_interval(correct, pairs["group"].to_numpy(), weights=weights, n_boot=resamples, level=level)
    row = {key: first[key] for key in FIT_KEYS} | _EMPTY | {"record_id": "", "layer_set": "", "layer": None}
    row |= {"n_layers": 1, "chosen": True, "altered": first["altered"], "n_fits": len(folds)}
    row |= {"n_train": int(folds["n_train"].mean()), "converged": bool(folds["converged"].all())}
    row |= {"train_accuracy": folds["train_accuracy"].mean(), "accuracy": found.estimate, "low": found.low}
    row |= {"high": found.high, "se_test": found.se}
    times = folds["layer_set"].value_counts(sort=False)
    times = times.sort_values(ascending=False, kind="stable")
    return row | {"selected": ", ".join(f"{layer}: {count}" for layer, count in times.items())}


def _rows(
    fits: pd.DataFrame, chosen: pd.DataFrame, same: pd.DataFrame, judged: _Judged, resamples: int, level: float
) -> Iterator[dict[str, Any]]:
    """Rows of one fit; `chosen` is that of the chosen layer, among `same`."""
    whole = fits[fits["altered"] == ""].iloc[0]
    if np.isnan(whole["accuracy"]):  # no training pair differed, so there is no head
        return
    said = {key: whole[key] for key in [*FIT_KEYS, "record_id", "layer", "n_layers", "chosen"]} | _EMPTY
    for altered, some in fits[fits["altered"] != ""].groupby("altered", sort=False):
        row = said | {"altered": altered, "n_fits": len(some), "n_train": int(some["n_train"].mean())}
        row |= {"train_accuracy": some["train_accuracy"].mean(), "converged": bool(some["converged"].all())}
        bounds = ["accuracy", "low", "high"]
        row |= {name: float(some[name].iloc[0]) for name in bounds} | {"se_test": float(some["se"].iloc[0])}
        if altered == "permuted":
            correct = judged(some["record_id"])
            found = network_contrast([(1.0, correct)], n_boot=resamples, level=level, **judged.options(correct[0]))
            row |= {"accuracy": found.estimate, "low": found.low, "high": found.high, "se_test": found.se_pairs}
            row |= {"se": found.se}
        if altered == "half":
            row |= _with_training(whole, some, chosen, same, judged, resamples, level)
        yield row


def _with_training(
    whole: pd.Series,
    halves: pd.DataFrame,
    chosen: pd.DataFrame,
    same: pd.DataFrame,
    judged: _Judged,
    resamples: int,
    level: float,
) -> dict[str, Any]:
    """Limits of a fit for other training pairs too, and of what it has over the chosen layer on the same halves."""
    own, refits = judged(pd.Series([whole["record_id"]]))[0], judged(halves.sort_values("seed")["record_id"])
    options = judged.options(own)
    groups, weights = options["groups"], options["weights"]
    given: dict[str, Any] = {"weights": weights, "level": level}
    interval = accuracy_interval(own, groups, n_boot=resamples, **given)
    total = with_training(interval, refits, groups, **given)
    row = {"accuracy": total.estimate, "low": total.low, "high": total.high}
    row |= {"se_test": total.se_test, "se_train": total.se_train, "se": total.se}
    if chosen.empty or chosen["record_id"].iloc[0] == whole["record_id"]:
        return row
    layer = chosen["layer_set"].iloc[0]
    others = same[(same["layer_set"] == layer) & (same["combination"] == "single") & (same["altered"] == "half")]
    theirs, again = judged(chosen["record_id"])[0], judged(others.sort_values("seed")["record_id"])
    difference = paired_difference(own, theirs, groups, n_boot=resamples, **given)
    if not difference.high > difference.low or len(again) != len(refits):
        return row
    told = with_training(difference, refits - again, groups, **given)
    row |= {"difference": told.estimate, "difference_low": told.low, "difference_high": told.high}
    return row | {"against": f"chosen layer {layer}"}
