"""What refits and altered features of a run say, from their margins: a row for each fit and kind of what is altered.

An effect of several draws (permuted labels, projections, seeds of random weights) is averaged over them, and its limits
cover other draws as well as other test pairs (`probekit.stats.network_contrast`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probekit._types import FloatArray
from probekit.results import CONTROL_COLUMNS, load_margins, load_results
from probekit.stats import (
    PROTOCOLS,
    Contrast,
    accuracy_interval,
    network_contrast,
    paired_difference,
    prompt_weights,
    with_training,
)

if TYPE_CHECKING:
    Row = pd.Series[Any]
else:  # the subscript exists for type checkers only
    Row = pd.Series

_SETTING = ["backbone", "control", "dataset", "trained_on", "protocol", "sigma", "draw", "pooling", "head"]
_FIT = [*_SETTING, "layer_set", "combination"]  # what a fit and its altered ones have in common
_EMPTY: dict[str, Any] = {column: np.nan for column, dtype in CONTROL_COLUMNS.items() if dtype == "float64"}
_EMPTY |= {"against": "", "selected": ""}


def compare_controls(run: Path, *, resamples: int, level: float) -> pd.DataFrame:
    """Sum up the refits and altered features of a run.

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
    linear = frame[(frame["slice_by"] == "all") & (frame["head_kind"] == "linear")]
    everything = linear[linear["split"] == "test"]
    if (everything["altered"] == "").all():
        return pd.DataFrame()
    asked = everything[everything["altered"] != ""].drop_duplicates(_FIT)[_FIT]
    test = everything.merge(asked, on=_FIT)
    outer = test["altered"].str.startswith("nested:")
    rows: list[dict[str, Any]] = []
    for _, same in test[~outer].groupby(_SETTING, sort=False):
        found = _Fits(run, same, everything, linear[linear["split"] == "validation"], resamples, level)
        for _, fits in same.groupby(["layer_set", "combination"], sort=False):
            rows += found.rows(fits)
    for _, folds in test[outer & test["chosen"]].groupby([*_SETTING, "altered"], sort=False):
        rows.append(_choice(run, folds, resamples, level))
    return pd.DataFrame(rows)


@dataclass
class _Fits:
    """Test rows of one setting, and what they are compared with: all test rows and all validation rows of the run."""

    run: Path
    same: pd.DataFrame
    everything: pd.DataFrame
    validation: pd.DataFrame
    resamples: int
    level: float

    def __post_init__(self) -> None:
        first = self.same.iloc[0]
        self._by_prompt = "prompts" in PROTOCOLS[first["protocol"]].needs
        self._dataset = first["dataset"]
        self._pairs = self._test_pairs(first["record_id"])
        self._chosen = self.same[self.same["chosen"] & (self.same["altered"] == "")]

    def rows(self, fits: pd.DataFrame) -> Iterator[dict[str, Any]]:
        """Rows of one fit and its altered ones."""
        whole = fits[fits["altered"] == ""].iloc[0]
        if np.isnan(whole["accuracy"]):  # no training pair differed, so there is no head
            return
        said = {key: whole[key] for key in [*_FIT, "record_id", "layer", "n_layers", "chosen"]} | _EMPTY
        kinds = fits["altered"].str.replace(r"^(beside|padded)(:\d+)?:(\w+):.*", r"\1:\3", regex=True)
        for kind, some in fits[kinds != ""].groupby(kinds[kinds != ""], sort=False):
            row = said | {"altered": kind, "n_fits": len(some), "n_train": int(some["n_train"].mean())}
            row |= {
                "train_accuracy": some["train_accuracy"].mean(),
                "converged": bool(some["converged"].all() and whole["converged"]),
            }
            first = some.iloc[0]
            match str(kind).partition(":")[0]:
                case "half":
                    row |= self._with_training(whole, some)
                case "beside":
                    row |= self._mean(some) | self._beside(some)
                case "padded":
                    row |= self._padded(whole, some)
                case "permuted" | "projected":
                    row |= self._mean(some)
                case _:
                    row |= {name: first[name] for name in ("accuracy", "low", "high")} | {"se_test": first["se"]}
            yield row

    def _mean(self, some: pd.DataFrame) -> dict[str, Any]:
        found = self._contrast(self._judged(some))
        said = {"accuracy": found.estimate, "low": found.low, "high": found.high}
        return said | {"se_test": found.se_pairs, "se": found.se}

    def _beside(self, some: pd.DataFrame) -> dict[str, Any]:
        """Random and trained layer minus the random layer alone, seed by seed."""
        first = some.iloc[0]
        alone = self.everything[self.everything["altered"] == ""]
        for key in (key for key in _FIT if key != "control"):
            alone = alone[alone[key] == first[key]]
        alone = alone.set_index("control").loc[[str(name).removeprefix("beside:") for name in some["altered"]]]
        gain = self._judged(some) - self._judged(alone)
        return _difference(self._contrast(gain), "random layer alone")

    def _padded(self, whole: Row, some: pd.DataFrame) -> dict[str, Any]:
        """All layers trained minus one, of those with one the best on validation for each seed of random weights."""
        parts = some["altered"].str.extract(r"^padded:(?P<trained>\d+):(?P<random>.*)$")
        accuracy = self.validation.drop_duplicates("record_id").set_index("record_id")["accuracy"]
        told = some.assign(**parts, validated=some["record_id"].map(accuracy))
        best = told.sort_values("validated", ascending=False, kind="stable").drop_duplicates("random")
        best = best.sort_values("random", kind="stable")
        gain = self._judged(whole.to_frame().T) - self._judged(best)
        row = self._mean(best) | _difference(self._contrast(gain), "one trained layer")
        return row | {"selected": _counts(best["trained"]), "train_accuracy": best["train_accuracy"].mean()}

    def _with_training(self, whole: Row, halves: pd.DataFrame) -> dict[str, Any]:
        """Limits of a fit for other training pairs too, and of what it has over the chosen layer on the same halves."""
        own, refits = self._judged(whole.to_frame().T)[0], self._judged(halves.sort_values("seed"))
        given = self._options(own)
        total = with_training(accuracy_interval(own, n_boot=self.resamples, **given), refits, **given)
        row: dict[str, Any] = {"accuracy": total.estimate, "low": total.low, "high": total.high}
        row |= {"se_test": total.se_test, "se_train": total.se_train, "se": total.se}
        if self._chosen.empty or self._chosen["record_id"].iloc[0] == whole["record_id"]:
            return row
        layer = self._chosen["layer_set"].iloc[0]
        theirs = self.same[(self.same["layer_set"] == layer) & (self.same["combination"] == "single")]
        again = self._judged(theirs[theirs["altered"] == "half"].sort_values("seed"))
        difference = paired_difference(own, self._judged(self._chosen)[0], n_boot=self.resamples, **given)
        if not difference.high > difference.low:  # the same answers
            return row
        told = with_training(difference, refits - again, **given)
        row |= {"difference": told.estimate, "difference_low": told.low, "difference_high": told.high}
        return row | {"against": f"chosen layer {layer}"}

    def _contrast(self, correct: FloatArray) -> Contrast:
        return network_contrast([(1.0, correct)], n_boot=self.resamples, **self._options(correct[0]))

    def _judged(self, records: pd.DataFrame) -> FloatArray:
        """Right or wrong (R, n) of some records, NaN where a pair is not scored."""
        found = [self._test_pairs(record)["correct"].reindex(self._pairs.index) for record in records["record_id"]]
        return np.stack([correct.to_numpy(np.float64) for correct in found])

    def _test_pairs(self, record: str) -> pd.DataFrame:
        margins = load_margins(self.run, [record])
        here = (margins["split"] == "test") & (margins["dataset"] == self._dataset)
        return pd.DataFrame(margins[here]).set_index("pair_id")

    def _options(self, correct: FloatArray) -> dict[str, Any]:
        prompts = self._pairs["prompt_id"].to_numpy()
        weights = prompt_weights(correct, prompts) if self._by_prompt else None
        return {"groups": self._pairs["group"].to_numpy(), "weights": weights, "level": self.level}


def _choice(run: Path, folds: pd.DataFrame, resamples: int, level: float) -> dict[str, Any]:
    """Accuracy over the outer folds of what was chosen without each of them, the fits held fixed."""
    first = folds.iloc[0]
    pairs = load_margins(run, folds["record_id"])
    pairs = pairs[(pairs["split"] == "test") & (pairs["dataset"] == first["dataset"])]
    correct = pairs["correct"].to_numpy(np.float64)
    by_prompt = "prompts" in PROTOCOLS[first["protocol"]].needs
    weights = prompt_weights(correct, pairs["prompt_id"].to_numpy()) if by_prompt else None
    found = accuracy_interval(correct, pairs["group"].to_numpy(), weights=weights, n_boot=resamples, level=level)
    row = {key: first[key] for key in _FIT} | _EMPTY | {"record_id": "", "layer_set": "", "layer": None}
    row |= {"n_layers": 1, "chosen": True, "altered": first["altered"], "n_fits": len(folds)}
    row |= {"n_train": int(folds["n_train"].mean()), "converged": bool(folds["converged"].all())}
    row |= {"train_accuracy": folds["train_accuracy"].mean(), "accuracy": found.estimate, "low": found.low}
    return row | {"high": found.high, "se_test": found.se, "selected": _counts(folds["layer_set"])}


def _difference(found: Contrast, against: str) -> dict[str, Any]:
    limits = {"difference_low": found.low, "difference_high": found.high}
    return {"difference": found.estimate, "against": against} | limits


def _counts(layers: Row) -> str:
    """Say how often each layer stands there, the most frequent first."""
    times = layers.value_counts(sort=False).sort_values(ascending=False, kind="stable")
    return ", ".join(f"{layer}: {count}" for layer, count in times.items())
