"""Single layers judged together on the margins of a run: what holds for all of them at once, and the path of each pair.

A family is the single layers of one backbone, head and setting, without the output point, on one set of test pairs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit._types import FloatArray
from probekit.results import (
    CHOICE_KEYS,
    FAMILY_COLUMNS,
    TRAJECTORY_COLUMNS,
    UNPROBED,
    as_they_are,
    load_margins,
    load_results,
)
from probekit.stats import (
    PROTOCOLS,
    best_of_many,
    calibration,
    paired_family,
    permutation_test,
    plateau_set,
    prompt_weights,
    simultaneous_band,
)

_CALIBRATION = ("brier", "log_loss", "ece", "ece_low", "ece_high", "ece_by_chance")


def judge_families(run: Path, *, resamples: int, level: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Judge the layers of every family together, all on the same resamples of the groups.

    Parameters
    ----------
    run
        A run whose results table is written.
    resamples, level
        Of bands, sets and p; permutations are drawn as often.

    Returns
    -------
    families, trajectories
        `FAMILY_COLUMNS` and `TRAJECTORY_COLUMNS` of `probekit.results`. Layers without a head, and families of fewer
        than two layers or groups, are left out.
    """
    frame = load_results(run)
    frame = frame[(frame["split"] == "test") & (frame["slice_by"] == "all") & ~frame["head_kind"].isin(UNPROBED)]
    frame = frame[
        (frame["combination"] == "single") & (frame["layer"] <= frame["n_blocks"]) & frame["accuracy"].notna()
    ]
    rows, halves = as_they_are(frame), frame[frame["altered"] == "half"]
    families, trajectories = [], []
    for _, family in rows.groupby([*CHOICE_KEYS, "trained_on"], sort=False):
        layers = family.sort_values("layer", kind="stable")
        if len(layers) < 2:
            continue
        same = [*(key for key in CHOICE_KEYS if key != "seed"), "trained_on"]  # of halves the seed counts the draws
        judged = _Family(run, layers, halves[(halves[same] == layers[same].iloc[0]).all(axis=1)])
        if len(set(judged.groups)) > 1:
            families.append(judged.table(resamples, level))
            trajectories.append(judged.paths())
    return _joined(families, FAMILY_COLUMNS), _joined(trajectories, TRAJECTORY_COLUMNS)


def _joined(parts: list[pd.DataFrame], columns: dict[str, str]) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True)[list(columns)] if parts else pd.DataFrame(columns=list(columns))


class _Family:
    """Margins and right or wrong (L, n) of L layers on the n test pairs that all of them judged.

    `halves` are their refits on halves of the training groups, if there are any.
    """

    def __init__(self, run: Path, rows: pd.DataFrame, halves: pd.DataFrame) -> None:
        self.rows, keys = rows, list(rows["record_id"])
        margins = load_margins(run, keys)
        margins = margins[(margins["split"] == "test") & (margins["dataset"] == rows["dataset"].iloc[0])]
        by_layer = margins.pivot(index="pair_id", columns="record_id", values=["margin", "correct"])
        held = by_layer["margin"][keys].dropna()
        self._pairs = margins.drop_duplicates("pair_id").set_index("pair_id").loc[held.index]
        self._margins = held.to_numpy(np.float64).T
        self._correct = by_layer.loc[held.index, "correct"][keys].to_numpy(np.float64).T
        self._scored = ~np.isnan(self._correct).any(axis=0)
        self.groups = self._pairs["group"].to_numpy(object)[self._scored]
        self._by_prompt = "prompts" in PROTOCOLS[rows["protocol"].iloc[0]].needs
        self._chosen = np.flatnonzero(rows["chosen"])
        self._refits = self._refitted(run, halves)

    def _refitted(self, run: Path, halves: pd.DataFrame) -> FloatArray | None:
        """Right or wrong (R, L, n scored) of the refits; None where not every layer has the same two or more."""
        keys = halves.pivot(index="seed", columns="layer", values="record_id").reindex(columns=self.rows["layer"])
        if len(keys) < 2 or keys.isna().to_numpy().any():
            return None
        margins = load_margins(run, keys.to_numpy().ravel())
        margins = margins[(margins["split"] == "test") & (margins["dataset"] == self.rows["dataset"].iloc[0])]
        correct = margins.pivot(index="record_id", columns="pair_id", values="correct")[self._pairs.index[self._scored]]
        refits: FloatArray = correct.loc[keys.to_numpy().ravel()].to_numpy(np.float64).reshape(*keys.shape, -1)
        return refits

    def table(self, resamples: int, level: float) -> pd.DataFrame:
        """Everything that holds for the layers together."""
        correct = self._correct[:, self._scored]
        options: dict[str, Any] = {"n_boot": resamples, "level": level}
        if self._by_prompt:
            options["weights"] = prompt_weights(correct[0], self._pairs["prompt_id"].to_numpy(object)[self._scored])
        band = simultaneous_band(correct, self.groups, **options)
        plateau = plateau_set(correct, self.groups, refits=self._refits, **options)
        best = best_of_many(correct, self.groups, **options)
        columns = {
            "tried": len(correct),
            "n_pairs": band.n_pairs,
            "n_groups": band.n_groups,
            "effective_groups": band.effective_groups,
            "band_low": band.low,
            "band_high": band.high,
            "accuracy": band.estimate,
            "in_plateau": plateau.inside,
            "plateau_p": plateau.p,
            "behind": plateau.behind,
            "within_point": plateau.within_point,
            "n_refits": 0 if self._refits is None else len(self._refits),
            "best": np.arange(len(correct)) == best.best,
            "frequency": best.frequency,
            "best_naive": best.naive,
            "best_corrected": best.corrected,
            "best_low": best.low,
            "best_high": best.high,
        }
        facts = self.rows[[*CHOICE_KEYS, "trained_on", "record_id", "layer", "relative_depth", "chosen", "converged"]]
        found = facts.assign(**columns, **self._comparisons(correct, options), **self._null(resamples))
        return found.assign(**self._calibration(options)).astype({"layer": "int64"})

    def _comparisons(self, correct: FloatArray, options: dict[str, Any]) -> dict[str, FloatArray]:
        """Every layer against the chosen one."""
        names = ("difference", "difference_low", "difference_high", "p", "p_adjusted", "detectable")
        found = {name: np.full(len(correct), np.nan) for name in names}
        for chosen in self._chosen:
            others = np.arange(len(correct)) != chosen
            family = paired_family(correct[others], correct[chosen], self.groups, **options)
            values = (family.estimate, family.low, family.high, family.p, family.adjusted, family.detectable)
            for name, value in zip(names, values, strict=True):
                found[name][others] = value
        return found

    def _null(self, draws: int) -> dict[str, FloatArray]:
        """P of judgements that have nothing to do with the margins."""
        sides = _images(self._pairs)
        prompts = self._pairs["prompt_id"].to_numpy(object)
        null = permutation_test(
            self._margins,
            self._pairs["label"].to_numpy(np.float64),
            *sides,
            prompts,
            by_prompt=self._by_prompt,
            n_draws=draws,
        )
        return {"permutation_p": null.p, "permutation_adjusted": null.adjusted}

    def _calibration(self, options: dict[str, Any]) -> dict[str, FloatArray]:
        """Scores of probabilities, where some labels are shares of votes."""
        labels = self._pairs["label"].to_numpy(np.float64)
        if np.isin(labels, (0, 0.5, 1)).all():
            return {name: np.full(len(self._margins), np.nan) for name in _CALIBRATION}
        groups = self._pairs["group"].to_numpy(object)
        plain = {key: value for key, value in options.items() if key != "weights"}
        found = [calibration(margins, labels, groups, **plain) for margins in self._margins]
        values = [
            (one.brier.estimate, one.log_loss.estimate, one.ece, one.ece_low, one.ece_high, one.ece_by_chance)
            for one in found
        ]
        return dict(zip(_CALIBRATION, np.array(values).T, strict=True))

    def paths(self) -> pd.DataFrame:
        """One row for each decided pair: right or wrong at each layer, and where that changes."""
        correct, layers = self._correct[:, self._scored], self.rows["layer"].to_numpy(np.int64)
        pairs = self._pairs[self._scored]
        change = np.diff(correct, axis=0) != 0
        ever = change.any(axis=0)
        last = len(layers) - 1 - np.argmax(change[::-1], axis=0)  # place of the layer behind the last change
        digit = np.where(correct == 1, "1", np.where(correct == 0, "0", "h"))
        first = self.rows.iloc[0]
        chosen = correct[self._chosen[0]] if len(self._chosen) else np.full(correct.shape[1], np.nan)
        table = pd.DataFrame(
            {
                "pair_id": pairs.index,
                "source": pairs["source"].to_numpy(object),
                "label": pairs["label"].to_numpy(np.float64),
                "layers": "+".join(map(str, layers)),
                "path": ["".join(column) for column in digit.T],
                "flips": change.sum(axis=0),
                "last_flip": pd.array(np.where(ever, layers[last], -1), dtype="Int64"),
                "right_share": correct.mean(axis=0),
                "right_at_chosen": chosen,
                "right_at_last": correct[-1],
            }
        )
        table["last_flip"] = table["last_flip"].mask(~ever)
        return table.assign(**{key: first[key] for key in CHOICE_KEYS})


def _images(pairs: pd.DataFrame) -> tuple[NDArray[np.object_], NDArray[np.object_]]:
    """Name the two images of each pair (n,) so that pairs which hang together in a null hypothesis share a name.

    Where a group holds one prompt, its images are the rows. Where it holds several, an image stands under more than one
    of them (or the file joins them), and a row does not tell which: all pairs of the group get one image in common, so
    that they flip as one.
    """
    several = pairs.groupby("group")["prompt_id"].transform("nunique").to_numpy() > 1
    number = np.arange(len(pairs)).astype(str).astype(object)
    sides = [pairs[f"row_{side}"].astype(str).to_numpy(object) for side in "ab"]
    group = pairs["group"].to_numpy(object)
    return np.where(several, "group " + group, "row " + sides[0]), np.where(
        several, "pair " + number, "row " + sides[1]
    )
