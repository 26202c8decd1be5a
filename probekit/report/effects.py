"""Effects as paired differences on the stored margins: both sides of a comparison judged the same pairs.

Every effect is a difference of accuracies averaged over the seeds of each side. Its interval covers the pairs that
might have been drawn and the seeds that might have been drawn, of every side that has several
(`probekit.stats.network_contrast`). Of a side with one seed the variance over seeds is unknown and in no interval.
Where the run holds refits of all heads on the same halves of the training groups, the interval covers other training
pairs as well; else the fitted heads are held fixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

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
from probekit.results import CONTROLS, FIT_KEYS, as_they_are, load_margins, load_results
from probekit.stats import PROTOCOLS, Contrast, network_contrast, prompt_weights

if TYPE_CHECKING:
    Share = pd.Series[float]
else:  # the subscript exists for type checkers only
    Share = pd.Series

SEEDS = 3
"""Of random weights, below which nothing is concluded against them."""


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
    contrast
        All that is known of it.
    random_seeds
        Fewest seeds of random weights that a side averages; None where no side has any.
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
    contrast: Contrast | None = None
    random_seeds: int | None = None

    @property
    def few_seeds(self) -> bool:
        """Whether it stands against too few seeds of random weights to conclude anything."""
        return self.random_seeds is not None and self.random_seeds < SEEDS

    @property
    def refitted(self) -> bool:
        """Whether other training pairs are in the interval."""
        return self.contrast is not None and not np.isnan(self.contrast.se_train)


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
        self._pairs = pd.DataFrame({"group": [], "prompt_id": []}, dtype="str")

    def compare(self, what: str, gains: Sequence[Side], losses: Sequence[Side], *, fixed: bool = False) -> Effect:
        """Accuracies of `gains` minus those of `losses`, as many of either: one for a difference, two for one of two.

        Networks of a side with several are a sample, and so are the pairs: limits and error are those of
        `probekit.stats.network_contrast`. Two sides that hold the same networks, each fitted in two ways, are one term,
        the differences within networks.

        Parameters
        ----------
        what
            The difference in words.
        gains, losses
            Sides; without losses, the accuracy of the gains, of the fitted heads as the accuracies of a sweep are.
        fixed
            Whether to hold the networks of all sides fixed, so that only the pairs are a sample.
        """
        sides = (*gains, *losses)
        judged = self._judged(sides)
        right = judged.dropna()
        if right.empty:
            msg = f"{what}: the sides have no test pair in common; sweep them with the same judgements"
            raise ResultsError(msg)
        values = [_networks(right, side) for side in sides]
        terms: list[tuple[float, FloatArray]]
        if [side.seeds for side in gains] == [side.seeds for side in losses]:
            above, below = values[: len(gains)], values[len(gains) :]
            terms = [(1.0, one - other) for one, other in zip(above, below, strict=True)]
        else:
            terms = [(1.0 if place < len(gains) else -1.0, value) for place, value in enumerate(values)]
        if fixed:
            terms = [(weight, value.mean(axis=0, keepdims=True)) for weight, value in terms]
        groups, weights_of_pairs = self.groups_and_weights(right)
        weighed = [(1.0 if place < len(gains) else -1.0, side) for place, side in enumerate(sides)]
        found = network_contrast(
            terms,
            groups,
            refits=self.refits(weighed, right.index) if losses else None,
            weights=weights_of_pairs,
            n_boot=self._resamples,
            level=self._level,
        )
        return Effect(
            what=what,
            converged=all(side.converged for side in sides),
            estimate=found.estimate,
            low=max(found.low, -float(len(losses))),
            high=min(found.high, float(len(gains))),
            detectable=found.detectable,
            n_pairs=found.n_pairs,
            seeds=tuple({side.name: len(set(side.seeds)) for side in sides}.items()),
            dropped=len(judged) - len(right),
            contrast=found,
            random_seeds=random_seeds(sides),
        )

    def right(self, keys: Sequence[str]) -> pd.DataFrame:
        """Right (1) or wrong (0) of records (columns) on the test pairs that all of them judged (rows)."""
        return self._judged([Side("", tuple(keys), tuple(keys))]).dropna()

    def groups_and_weights(self, right: pd.DataFrame) -> tuple[NDArray[Any], FloatArray | None]:
        """Group and, by protocols that are a mean over prompts, weight of each pair (row)."""
        groups = self._pairs["group"].loc[right.index].to_numpy(dtype=object)
        if not self._by_prompt:
            return groups, None
        prompts = self._pairs["prompt_id"].loc[right.index].to_numpy(dtype=object)
        return groups, prompt_weights(right.iloc[:, 0].to_numpy(), prompts)

    def refits(self, sides: Sequence[tuple[float, Side]], pairs: pd.Index) -> FloatArray | None:
        """Weighted sum (R, n) of sides refitted on halves of the training groups; None where not all of them are.

        Parameters
        ----------
        sides
            Weight and side, each the mean over its networks.
        pairs
            Test pairs (n,).
        """
        draws = [self._halves.get(key, ()) for _, side in sides for key in side.keys]
        n_draws = len(draws[0]) if draws else 0
        if n_draws < 2 or any(len(some) != n_draws for some in draws):
            return None
        right = self._judged([Side("", keys, keys) for keys in draws]).reindex(pairs)
        if right.isna().to_numpy().any():
            return None
        found = np.zeros((n_draws, len(pairs)))
        for weight, side in sides:
            for draw in range(n_draws):
                again = replace(side, keys=tuple(self._halves[key][draw] for key in side.keys))
                found[draw] += weight * _networks(right, again).mean(axis=0)
        return found

    @cached_property
    def _halves(self) -> dict[str, tuple[str, ...]]:
        """For each fit, its refits on halves of the training groups in the order of the draws."""
        frame = load_results(self._run).drop_duplicates("record_id")
        again = frame[frame["altered"] == "half"].sort_values("seed", kind="stable")
        drawn = again.groupby(FIT_KEYS, sort=False)["record_id"].agg(tuple)
        whole = as_they_are(frame).merge(drawn.rename("draws"), left_on=FIT_KEYS, right_index=True)
        return dict(zip(whole["record_id"], whole["draws"], strict=True))

    def _judged(self, sides: Sequence[Side]) -> pd.DataFrame:
        """Right (1) or wrong (0) of every record of the sides, for each decided test pair that one of them judged."""
        keys = list(dict.fromkeys(key for side in sides for key in side.keys))
        for key in keys:
            if key not in self._correct:
                margins = load_margins(self._run, [key])
                here = True if self._dataset is None else margins["dataset"] == self._dataset
                judged = margins[(margins["split"] == "test") & here].set_index("pair_id")
                self._correct[key] = judged["correct"].dropna()
                new = judged.index.difference(self._pairs.index, sort=False)
                if len(new):
                    self._pairs = pd.concat([self._pairs, judged.loc[new, ["group", "prompt_id"]]])
        return pd.concat([self._correct[key] for key in keys], axis=1, keys=keys)


def _networks(right: pd.DataFrame, side: Side) -> FloatArray:
    """Right or wrong (S, n) of the networks of a side, the mean over the records of each."""
    means = right[list(side.keys)].T.groupby(list(side.seeds), sort=False).mean()
    return means.to_numpy(dtype=np.float64)


def random_seeds(sides: Sequence[Side]) -> int | None:
    """Count the draws of random weights of the side that has fewest, those of every training seed; None without any."""
    return min((len(side.keys) for side in sides if side.name.partition(" ")[0] in RANDOM), default=None)


def trained_side(rows: pd.DataFrame, model: Model) -> Side:
    """Return the training seeds of a model, of which the rows hold one record each."""
    mine = trained_rows(rows, model)
    fine = bool(mine["converged"].all())
    return Side(f"trained {model.name}", tuple(mine["record_id"]), tuple(mine["backbone"]), fine)


def control_side(rows: pd.DataFrame, model: Model, kind: str) -> Side:
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
            trained, controls = trained_side(part, model), control_rows(part, model)
            for kind in control_kinds(controls) if trained.keys else []:
                seeds, side = of_kind(controls, kind), control_side(part, model, kind)
                # of training seeds, each with several controls, the training seeds are the sample
                by_network = seeds["accuracy"].groupby(list(side.seeds)).mean()
                sd = float(by_network.std(ddof=1)) if len(by_network) > 1 else float("nan")
                what = f"{model.label}: {'real prompts' if kind in PROMPTS else 'trained'} - {CONTROLS[kind]}"
                effect = verdicts.compare(what, [trained], [side])
                mean = float(by_network.mean())
                margins.append(Margin(model.label, kind, layers, len(by_network), mean, sd, effect, side.converged))
    return margins


def joining_effects(frame: pd.DataFrame, verdicts: Verdicts) -> dict[str, Effect]:
    """All layers together minus the validation-chosen single layer, for each model that has both."""
    rows = reported_rows(frame)
    effects = {}
    for model in trained_models(rows):
        joined, chosen = (trained_side(layer_rows(rows, layers), model) for layers in (ALL_LAYERS, CHOSEN))
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
        above, below = trained_side(part, large), trained_side(part, small)
        if not (above.keys and below.keys):
            continue
        found[layers] = [verdicts.compare(f"{title}, trained", [above], [below])]
        for kind in control_kinds(part, RANDOM):
            wide, narrow = control_side(part, large, kind), control_side(part, small, kind)
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
                ours, theirs = trained_side(part, large), trained_side(part, model)
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
            after, before = trained_side(part, long), trained_side(part, short)
            if after.keys and before.keys:
                what = f"{long.label}: {_images(long)} - {_images(short)} training images"
                found.setdefault(layers, []).append(verdicts.compare(what, [after], [before]))
    return found


def _images(model: Model) -> str:
    return f"{model.images or 0:,}"
