"""Effects as paired differences on the stored margins: both sides of a comparison judged the same pairs.

Every effect is a difference of accuracies averaged over the seeds of each side. Its interval covers the pairs that
might have been drawn, by the group bootstrap of `probekit.stats.paired_difference` with the fitted heads held fixed,
and the seeds that might have been drawn, of every side that has several. Of a side with one seed the variance over
seeds is unknown and in no interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit

from probekit._types import FloatArray
from probekit.errors import ResultsError
from probekit.report.select import (
    ALL_LAYERS,
    CHOSEN,
    PROMPTS,
    RANDOM,
    Model,
    control_kinds,
    control_rows,
    dumped_models,
    layer_rows,
    of_kind,
    reported_rows,
    trained_models,
    trained_rows,
    training_series,
)
from probekit.results import CONTROLS, load_margins
from probekit.stats import PROTOCOLS, paired_difference, prompt_weights
from probekit.stats.comparisons import POWER

if TYPE_CHECKING:
    Share = pd.Series[float]
else:  # the subscript exists for type checkers only
    Share = pd.Series


@dataclass(frozen=True)
class Side:
    """One averaged side of a difference.

    Attributes
    ----------
    name
        What its networks are.
    keys
        Records, one for each network.
    seeds
        For each record, the network that it counts as.
    converged
        Whether all fits did.
    """

    name: str
    keys: tuple[str, ...]
    seeds: tuple[str, ...]
    converged: bool = True


@dataclass(frozen=True)
class Effect:
    """A difference of accuracies (share of pairs) with its paired interval.

    Attributes
    ----------
    what
        The difference in words.
    estimate, low, high
        Difference and limits.
    detectable
        The smallest true difference that this many pairs and seeds would show with a power of 80 %.
    n_pairs
        Test pairs that every side judged.
    seeds
        Sides and how many seeds each averages: the interval covers those of sides with several.
    dropped
        Test pairs that some sides judged and others did not.
    converged
        Whether all fits on all sides did.
    """

    what: str
    estimate: float
    low: float
    high: float
    detectable: float
    n_pairs: int
    seeds: tuple[tuple[str, int], ...] = ()
    dropped: int = 0
    converged: bool = True


@dataclass(frozen=True)
class Margin:
    """What a trained model has over a kind of its controls, at the validation-chosen layer and with all layers."""

    model: str
    kind: str
    layers: str
    n_seeds: int
    control: float
    seed_sd: float
    effect: Effect
    converged: bool


class Verdicts:
    """Right or wrong for every test pair of the records asked for, read from the margins of a run when needed.

    `dataset` says of which data set; it may be left out where the run tests on one. A difference weighs pairs as the
    protocol does: alike, or prompts alike.
    """

    def __init__(
        self, run: Path, protocol: str, *, dataset: str | None = None, level: float = 0.95, resamples: int = 2000
    ) -> None:
        self._run, self._dataset, self._by_prompt = run, dataset, "prompts" in PROTOCOLS[protocol].needs
        self._level, self._resamples = level, resamples
        self._correct: dict[str, Share] = {}
        self._groups: dict[str, str] = {}
        self._prompts: dict[str, str] = {}

    def compare(self, what: str, gains: Sequence[Side], losses: Sequence[Side]) -> Effect:
        """Accuracies of `gains` minus those of `losses`, as many of either: one for a difference, two for one of two.

        With seeds on a side, the standard error is that over pairs (half the paired interval over its normal quantile)
        and that over seeds in one, ``SE^2 = SE_pairs^2 + sum SD_i^2 / k_i`` over the sides i with k_i > 1 seeds of
        standard deviation SD_i, and the interval is the estimate -+ t SE on Welch and Satterthwaite's degrees of
        freedom ``SE^4 / sum (SD_i^2 / k_i)^2 / (k_i - 1)``, to which the pairs' part adds nothing (infinite degrees).
        Two sides that hold the same seeds, each fitted in two ways, are one term, the differences within seeds. Heads
        of other seeds err on other pairs too, which SD_i contains and SE_pairs contains again, so that the interval is
        rather too wide than too narrow.

        References
        ----------
        F. Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics Bulletin 2
        (1946). B. Welch, "The generalization of Student's problem when several different population variances are
        involved", Biometrika 34 (1947). Infinite degrees of freedom of a part: JCGM 100:2008 (GUM), G.4.
        """
        sides = (*gains, *losses)
        judged = self._judged(sides)
        right = judged.dropna()
        if right.empty:
            msg = f"{what}: the sides have no test pair in common; sweep them with the same judgements"
            raise ResultsError(msg)
        # a - b - (c - d) = 2 ((a + d) / 2 - (b + c) / 2), whose two sides are shares of right answers again
        gain, loss = (
            np.mean([right[list(side.keys)].mean(axis=1) for side in some], axis=0) for some in (gains, losses)
        )
        groups = right.index.map(self._groups).to_numpy(dtype=object)
        weights = None
        if self._by_prompt:
            prompts = right.index.map(self._prompts).to_numpy(dtype=object)
            weights = prompt_weights(right.iloc[:, 0].to_numpy(), prompts)
        found = paired_difference(gain, loss, groups, weights=weights, n_boot=self._resamples, level=self._level)
        factor = float(len(gains))
        effect = Effect(
            what=what,
            converged=all(side.converged for side in sides),
            estimate=factor * found.estimate,
            low=factor * found.low,
            high=factor * found.high,
            detectable=factor * found.detectable,
            n_pairs=len(right),
            seeds=tuple({side.name: len(set(side.seeds)) for side in sides}.items()),
            dropped=len(judged) - len(right),
        )
        means = pd.Series(np.average(right, axis=0, weights=weights), index=right.columns)
        values = [means[list(side.keys)].groupby(list(side.seeds), sort=False).mean() for side in sides]
        if [side.seeds for side in gains] == [side.seeds for side in losses]:
            values = [above - below for above, below in zip(values[: len(gains)], values[len(gains) :], strict=True)]
        return self._with_seeds(effect, [value.to_numpy(dtype=np.float64) for value in values])

    def _with_seeds(self, effect: Effect, values: Sequence[FloatArray]) -> Effect:
        """Widen an interval over pairs by the variance of means over seeds; ``values`` holds those of every side."""
        several = [value for value in values if len(value) > 1]
        if not several:
            return effect
        parts = np.array([value.var(ddof=1) / len(value) for value in several])
        freedoms = np.array([len(value) - 1 for value in several])
        tail = (1 + self._level) / 2
        pairs = (effect.high - effect.low) / (2 * float(ndtri(tail)))
        variance = float(pairs**2 + parts.sum())
        among_seeds = float((parts**2 / freedoms).sum())
        freedom = variance**2 / among_seeds if among_seeds > 0 else np.inf
        se, t = float(np.sqrt(variance)), float(stdtrit(freedom, tail))
        return replace(
            effect,
            low=effect.estimate - t * se,
            high=effect.estimate + t * se,
            detectable=(t + float(stdtrit(freedom, POWER))) * se,
        )

    def _judged(self, sides: Sequence[Side]) -> pd.DataFrame:
        """Right (1) or wrong (0) of every record of the sides, for each decided test pair that one of them judged."""
        keys = list(dict.fromkeys(key for side in sides for key in side.keys))
        for key in keys:
            if key not in self._correct:
                margins = load_margins(self._run, [key])
                here = True if self._dataset is None else margins["dataset"] == self._dataset
                margins = margins[(margins["split"] == "test") & here]
                correct = margins["correct"].to_numpy(dtype=np.float64)
                self._correct[key] = pd.Series(correct, index=margins["pair_id"].to_numpy()).dropna()
                self._groups.update(zip(margins["pair_id"], margins["group"], strict=True))
                self._prompts.update(zip(margins["pair_id"], margins["prompt_id"], strict=True))
        return pd.concat([self._correct[key] for key in keys], axis=1, keys=keys)


def _trained(rows: pd.DataFrame, model: Model) -> Side:
    mine = trained_rows(rows, model)
    fine = bool(mine["converged"].all())
    return Side(f"trained {model.name}", tuple(mine["record_id"]), tuple(mine["backbone"]), fine)


def _control(rows: pd.DataFrame, model: Model, kind: str) -> Side:
    """Return a kind of controls of a model; those made of one training seed count as that training seed.

    A network with empty prompts is the trained network itself, told nothing.
    """
    mine = of_kind(control_rows(rows, model), kind)
    nested = kind == "empty-prompts" or (kind != "init" and mine["backbone"].nunique() > 1)
    seeds = mine["backbone"] if nested else f"{model.name} " + mine["control"]
    return Side(f"{kind} {model.name}", tuple(mine["record_id"]), tuple(seeds), bool(mine["converged"].all()))


def control_margins(frame: pd.DataFrame, verdicts: Verdicts) -> list[Margin]:
    """Trained with the real prompts minus control, for every model, layer choice and kind of control of the run."""
    rows = reported_rows(frame)
    margins = []
    for model in trained_models(rows):
        for layers in (CHOSEN, ALL_LAYERS):
            part = layer_rows(rows, layers)
            trained, controls = _trained(part, model), control_rows(part, model)
            for kind in control_kinds(controls) if trained.keys else []:
                seeds = of_kind(controls, kind)
                sd = float(seeds["accuracy"].std(ddof=1)) if len(seeds) > 1 else float("nan")
                what = f"{model.label}: {'real prompts' if kind in PROMPTS else 'trained'} - {CONTROLS[kind]}"
                effect = verdicts.compare(what, [trained], [_control(part, model, kind)])
                mean, fine = float(seeds["accuracy"].mean()), bool(seeds["converged"].all())
                margins.append(Margin(model.label, kind, layers, len(seeds), mean, sd, effect, fine))
    return margins


def joining_effects(frame: pd.DataFrame, verdicts: Verdicts) -> dict[str, Effect]:
    """All layers together minus the validation-chosen single layer, for each model that has both."""
    rows = reported_rows(frame)
    effects = {}
    for model in trained_models(rows):
        joined, chosen = (_trained(layer_rows(rows, layers), model) for layers in (ALL_LAYERS, CHOSEN))
        if joined.keys and chosen.keys and joined.keys != chosen.keys:  # one imported layer is both
            effects[model.label] = verdicts.compare(f"{model.label}: all layers - chosen layer", [joined], [chosen])
    return effects


def size_effects(frame: pd.DataFrame, verdicts: Verdicts) -> dict[str, list[Effect]]:
    """Largest minus smallest model: trained, random weights, and what the one leaves of the other.

    Imported features are no end of it: their networks differ from the backbones in more than size.
    """
    rows = reported_rows(frame)
    models = dumped_models(rows)
    if len(models) < 2 or models[0].parameters == models[-1].parameters:
        return {}
    small, large = models[0], models[-1]
    title = f"{large.label} - {small.label}"
    found: dict[str, list[Effect]] = {}
    for layers in (CHOSEN, ALL_LAYERS):
        part = layer_rows(rows, layers)
        above, below = _trained(part, large), _trained(part, small)
        if not (above.keys and below.keys):
            continue
        found[layers] = [verdicts.compare(f"{title}, trained", [above], [below])]
        for kind in control_kinds(part, RANDOM):
            wide, narrow = _control(part, large, kind), _control(part, small, kind)
            if wide.keys and narrow.keys:
                what = f"difference of the two: what random weights ({kind}) leave"
                found[layers].append(verdicts.compare(f"{title}, random weights ({kind})", [wide], [narrow]))
                found[layers].append(verdicts.compare(what, [above, narrow], [below, wide]))
    return found


def import_effects(frame: pd.DataFrame, verdicts: Verdicts) -> dict[str, list[Effect]]:
    """Largest backbone minus each model of imported features, by layer choice."""
    rows = reported_rows(frame)
    found: dict[str, list[Effect]] = {}
    for large in dumped_models(rows)[-1:]:
        for model in (model for model in trained_models(rows) if model.imported):
            for layers in (CHOSEN, ALL_LAYERS):
                part = layer_rows(rows, layers)
                ours, theirs = _trained(part, large), _trained(part, model)
                if ours.keys and theirs.keys:
                    what = f"{large.label} - {model.label} (imported)"
                    found.setdefault(layers, []).append(verdicts.compare(what, [ours], [theirs]))
    return found


def training_effects(frame: pd.DataFrame, verdicts: Verdicts) -> dict[str, list[Effect]]:
    """Longest minus shortest training at one shape, where the run has such a series."""
    rows = reported_rows(frame)
    found: dict[str, list[Effect]] = {}
    for series in training_series(rows):
        short, long = series[0], series[-1]
        for layers in (CHOSEN, ALL_LAYERS):
            part = layer_rows(rows, layers)
            after, before = _trained(part, long), _trained(part, short)
            if after.keys and before.keys:
                what = f"{long.label}: {_images(long)} - {_images(short)} training images"
                found.setdefault(layers, []).append(verdicts.compare(what, [after], [before]))
    return found


def _images(model: Model) -> str:
    return f"{model.images or 0:,}"
