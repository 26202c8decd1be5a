"""Effects as paired differences on the stored margins: both sides of a comparison judged the same pairs.

Every effect is a difference of accuracies averaged over the seeds of each side, with the group bootstrap of
`probekit.stats.paired_difference`. The intervals cover the pairs that might have been drawn, with the fitted heads held
fixed; the spread over seeds is printed beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from probekit.report.select import (
    ALL_LAYERS,
    CHOSEN,
    Model,
    control_kinds,
    control_rows,
    layer_rows,
    of_kind,
    reported_rows,
    trained_models,
    trained_rows,
    training_series,
)
from probekit.results import load_margins
from probekit.stats import PROTOCOLS, paired_difference

if TYPE_CHECKING:
    Share = pd.Series[float]
else:  # the subscript exists for type checkers only
    Share = pd.Series


@dataclass(frozen=True)
class Effect:
    """A difference of accuracies (share of pairs) with its paired interval.

    ``detectable`` is the smallest true difference that this many pairs would show with a power of 80 %.
    """

    what: str
    estimate: float
    low: float
    high: float
    detectable: float
    n_pairs: int


@dataclass(frozen=True)
class Margin:
    """What a trained model has over its random weights, at the validation-chosen layer and with all layers."""

    model: str
    kind: str
    layers: str
    n_seeds: int
    random: float
    seed_sd: float
    effect: Effect


class Verdicts:
    """Right or wrong for every test pair of the records asked for, read from the margins of a run when needed."""

    def __init__(self, run: Path, protocol: str, *, level: float = 0.95) -> None:
        self._run, self._score, self._level = run, PROTOCOLS[protocol], level
        self._correct: dict[str, pd.Series[float]] = {}
        self._groups: dict[str, str] = {}

    def mean(self, record_ids: Sequence[str]) -> Share:
        """Share of the records that are right, for each decided test pair that all of them judged."""
        for record_id in [key for key in record_ids if key not in self._correct]:
            margins = load_margins(self._run, [record_id])
            margins = margins[margins["split"] == "test"]
            outcome = self._score(
                margins["margin"].to_numpy(dtype=np.float64), margins["label"].to_numpy(dtype=np.float64)
            )
            self._correct[record_id] = pd.Series(outcome.correct, index=margins["pair_id"].to_numpy()).dropna()
            self._groups.update(zip(margins["pair_id"], margins["group"], strict=True))
        return pd.concat([self._correct[key] for key in record_ids], axis=1, join="inner").mean(axis=1)

    def compare(self, what: str, left: Sequence[str], right: Sequence[str]) -> Effect:
        """Accuracy of `left` minus accuracy of `right`, each a mean over records."""
        both = pd.concat([self.mean(left), self.mean(right)], axis=1, join="inner")
        return self._difference(what, both.iloc[:, 0], both.iloc[:, 1])

    def compare_differences(
        self, what: str, left: tuple[Sequence[str], Sequence[str]], right: tuple[Sequence[str], Sequence[str]]
    ) -> Effect:
        """(left[0] - left[1]) - (right[0] - right[1])."""
        sides = [self.mean(keys) for keys in (left[0], right[1], left[1], right[0])]
        both = pd.concat(sides, axis=1, join="inner")
        # a - b - (c - d) = 2 ((a + d) / 2 - (b + c) / 2), whose two sides are shares of right answers again
        gain, loss = both.iloc[:, :2].mean(axis=1), both.iloc[:, 2:].mean(axis=1)
        return self._difference(what, gain, loss, factor=2.0)

    def _difference(self, what: str, left: Share, right: Share, *, factor: float = 1.0) -> Effect:
        groups = left.index.map(self._groups).to_numpy(dtype=object)
        sides = left.to_numpy(dtype=np.float64), right.to_numpy(dtype=np.float64)
        found = paired_difference(*sides, groups, level=self._level)
        return Effect(
            what=what,
            estimate=factor * found.estimate,
            low=factor * found.low,
            high=factor * found.high,
            detectable=factor * found.detectable,
            n_pairs=len(left),
        )


def _keys(rows: pd.DataFrame) -> list[str]:
    return [str(key) for key in rows["record_id"]]


def random_margins(frame: pd.DataFrame, verdicts: Verdicts) -> list[Margin]:
    """Trained minus random weights, for every model, layer choice and kind of control that the run has."""
    rows = reported_rows(frame)
    margins = []
    for model in trained_models(rows):
        for layers in (CHOSEN, ALL_LAYERS):
            part = layer_rows(rows, layers)
            trained, controls = trained_rows(part, model), control_rows(part, model)
            for kind in control_kinds(controls) if len(trained) else []:
                seeds = of_kind(controls, kind)
                sd = float(seeds["accuracy"].std(ddof=1)) if len(seeds) > 1 else float("nan")
                effect = verdicts.compare(
                    f"{model.label}: trained - random weights ({kind})", _keys(trained), _keys(seeds)
                )
                margins.append(
                    Margin(model.label, kind, layers, len(seeds), float(seeds["accuracy"].mean()), sd, effect)
                )
    return margins


def joining_effects(frame: pd.DataFrame, verdicts: Verdicts) -> dict[str, Effect]:
    """All layers together minus the validation-chosen single layer, for each model that has both."""
    rows = reported_rows(frame)
    effects = {}
    for model in trained_models(rows):
        both = [_keys(trained_rows(layer_rows(rows, layers), model)) for layers in (ALL_LAYERS, CHOSEN)]
        if all(both):
            effects[model.label] = verdicts.compare(f"{model.label}: all layers - chosen layer", *both)
    return effects


def size_effects(frame: pd.DataFrame, verdicts: Verdicts) -> dict[str, list[Effect]]:
    """Largest minus smallest model: trained, random weights, and what the one leaves of the other."""
    rows = reported_rows(frame)
    models = trained_models(rows)
    if len(models) < 2 or models[0].parameters == models[-1].parameters:
        return {}
    small, large = models[0], models[-1]
    title = f"{large.label} - {small.label}"
    found: dict[str, list[Effect]] = {}
    for layers in (CHOSEN, ALL_LAYERS):
        part = layer_rows(rows, layers)
        trained = [_keys(trained_rows(part, model)) for model in (large, small)]
        if not all(trained):
            continue
        found[layers] = [verdicts.compare(f"{title}, trained", *trained)]
        for kind in control_kinds(part):
            random = [_keys(of_kind(control_rows(part, model), kind)) for model in (large, small)]
            if all(random):
                found[layers].append(verdicts.compare(f"{title}, random weights ({kind})", *random))
                what = f"difference of the two: what random weights ({kind}) leave"
                found[layers].append(
                    verdicts.compare_differences(what, (trained[0], trained[1]), (random[0], random[1]))
                )
    return found


def training_effects(frame: pd.DataFrame, verdicts: Verdicts) -> dict[str, list[Effect]]:
    """Longest minus shortest training at one shape, where the run has such a series."""
    rows = reported_rows(frame)
    found: dict[str, list[Effect]] = {}
    for series in training_series(rows):
        short, long = series[0], series[-1]
        for layers in (CHOSEN, ALL_LAYERS):
            part = layer_rows(rows, layers)
            both = [_keys(trained_rows(part, model)) for model in (long, short)]
            if all(both):
                what = f"{long.label}: {_images(long)} - {_images(short)} training images"
                found.setdefault(layers, []).append(verdicts.compare(what, *both))
    return found


def _images(model: Model) -> str:
    return f"{model.images or 0:,}"
