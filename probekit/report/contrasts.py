"""The contrasts behind claims: which heads are set against which, on the same test pairs of one data set.

Layers are compared as they were chosen on validation pairs, never as they came out on the test pairs. A claim about
which layers are best needs more than the two layers that were compared: the plateau set (the layers that may be the
best, `probekit.stats.plateau_set`) must agree.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit._types import FloatArray
from probekit.report.claim import COMBINING, DECLINE, INPUTS, LARGER, MIDDLE, TRAINED, Claim, Verdict, because
from probekit.report.effects import SEEDS, Effect, Side, Verdicts, control_side, random_seeds, trained_side
from probekit.report.select import (
    RANDOM,
    Model,
    control_kinds,
    control_rows,
    dumped_models,
    layer_rows,
    of_kind,
    probed,
    reported_rows,
    single_layers,
    trained_rows,
)
from probekit.stats import Contrast, network_contrast, pairs_needed, plateau_set, size_slope, slope_weights

HALF = 0.5
"""Relative depth from which on layers are called middle to late."""
_FEW = 50


@dataclass(frozen=True)
class _Plateau:
    """Layers of a model that may be the best (of training seeds: their mean), and right or wrong (n,) at each.

    With refits (R, n) on halves of the training groups they are layers that may be best whatever pairs are trained on.
    """

    inside: list[int]
    depth: dict[int, float]
    right: dict[int, FloatArray]
    refits: dict[int, FloatArray]
    groups: NDArray[Any]
    options: dict[str, Any]

    def judged(self, claim: Claim, others: Sequence[int], which: str) -> Claim:
        """Say which layers may be the best; a claim that `others` of them speak against is undetermined."""
        told = f"may be the best: layer{'s' * (len(self.inside) > 1)} {_listed(self.inside)}"
        told += ", with other training pairs too" * bool(self.refits)
        if not others:
            return because(claim, told)
        needed = max(self._needed(layer) for layer in others)
        text = f"layer{'s' * (len(others) > 1)} {_listed(others)} {which} may be as good as the best"
        return because(replace(claim, verdict="undetermined", pairs_needed=needed), text, told)

    def _needed(self, layer: int) -> float:
        """Count the test pairs that would tell a layer from the one that is highest here."""
        best = max(self.right, key=lambda one: float(np.average(self.right[one], weights=self.options["weights"])))
        again = self.refits[best] - self.refits[layer] if self.refits else None
        terms = [(1.0, (self.right[best] - self.right[layer])[None])]
        found = network_contrast(terms, self.groups, refits=again, **self.options)
        return _needed(found, self.options["level"])


class Judge:
    """The contrasts behind the claims on one data set."""

    def __init__(
        self, rows: pd.DataFrame, dataset: str, verdicts: Verdicts, layers: str, level: float, resamples: int
    ) -> None:
        self._dataset, self._verdicts = dataset, verdicts
        self._test = reported_rows(probed(rows))
        self._inputs = reported_rows(rows[rows["head_kind"] == "inputs"])
        self._layers, self._level, self._resamples = layers, level, resamples
        whole = rows[(rows["split"] == "validation") & (rows["slice_by"] == "all")]
        self._validation = whole.set_index("record_id")["accuracy"]
        self._models = dumped_models(self._test)

    def depth(self) -> Iterator[Claim]:
        """Best layer of the second half against the best one of the first, each chosen on validation."""
        quantity = "second half minus first half"
        single = single_layers(self._test)
        early, late = single[single["relative_depth"] < HALF], single[single["relative_depth"] >= HALF]
        for claim, plateau in self._layer_claims(MIDDLE, quantity, "the first half", late, early):
            if plateau is None:
                yield claim
                continue
            halves = [layer for layer in plateau.inside if plateau.depth[layer] < HALF], plateau.inside
            others = {"supported": halves[0], "contradicted": [layer for layer in halves[1] if layer not in halves[0]]}
            yield plateau.judged(claim, others.get(claim.verdict, []), "of the other half")

    def decline(self) -> Iterator[Claim]:
        """Best layer before the last, chosen on validation, against the last one."""
        quantity = "before the last minus the last layer"
        single = single_layers(self._test)
        last = single["layer"] == single["n_blocks"]
        for claim, plateau in self._layer_claims(DECLINE, quantity, "the last layer", single[~last], single[last]):
            if plateau is None:
                yield claim
                continue
            last_layer = max(plateau.depth)
            end = [layer for layer in plateau.inside if layer == last_layer]
            earlier = [layer for layer in plateau.inside if layer != last_layer]
            if claim.verdict == "supported":
                yield plateau.judged(claim, end, "(the last)")
            else:
                yield plateau.judged(claim, earlier if claim.verdict == "contradicted" else [], "(before the last)")

    def _layer_claims(
        self, claim: str, quantity: str, against: str, above: pd.DataFrame, below: pd.DataFrame
    ) -> Iterator[tuple[Claim, "_Plateau | None"]]:
        """Contrast two layers of every model, with its plateau, and what is left of that beyond random weights."""
        for model in self._models:
            one, other = (self._best(trained_rows(some, model)) for some in (above, below))
            place = {"claim": claim, "subject": model.label}
            if one.empty or set(one["backbone"]) != set(other["backbone"]):
                reason = "no heads on single layers of both parts" if len(self._validation) else "no validation pairs"
                yield self._silent(place, quantity, against, reason), None
                continue
            effect = self._verdicts.compare(model.label, [trained_side(one, model)], [trained_side(other, model)])
            row = self._claim(place, quantity, against, effect)
            yield (
                because(row, f"{_layers(one)} against {_listed(dict.fromkeys(other['layer']))}"),
                self._plateau(model),
            )
            for kind in self._kinds(model):
                some = [self._best(of_kind(control_rows(part, model), kind)) for part in (above, below)]
                if some[0].empty or len(some[0]) != len(some[1]):
                    continue
                random = [control_side(part, model, kind) for part in some]
                trained = [trained_side(part, model) for part in (one, other)]
                left = self._verdicts.compare(model.label, [trained[0], random[1]], [trained[1], random[0]])
                beyond = f"{quantity}, beyond random weights ({kind})"
                yield self._claim(place, beyond, f"the same with random weights ({kind})", left), None

    def combining(self) -> Iterator[Claim]:
        """Head on several layers, its set chosen on validation, against the chosen single layer."""
        quantity = "several layers minus the chosen one"
        rows = self._test[self._test["layer_set"].str.contains("+", regex=False)]
        joined = rows[rows["layer_set"].str.split("+").str[-1].astype("int64") <= rows["n_blocks"]]
        chosen = self._test[self._test["chosen"]]
        for model in self._models:
            place = {"claim": COMBINING, "subject": model.label}
            several, single = self._best(trained_rows(joined, model)), trained_rows(chosen, model)
            if several.empty or set(several["backbone"]) != set(single["backbone"]):
                reason = "no head on several layers" if several.empty else "no single layer was chosen on validation"
                yield self._silent(place, quantity, "the chosen layer", reason)
                continue
            trained = [trained_side(part, model) for part in (several, single)]
            effect = self._verdicts.compare(model.label, trained[:1], trained[1:])
            told = f"{_sets(several, model)} against {_layers(single)}"
            yield because(self._claim(place, quantity, "the chosen layer", effect), told)
            for kind in self._kinds(model):
                of_controls = [of_kind(control_rows(part, model), kind) for part in (joined, chosen)]
                some = self._best(of_controls[0])
                if some.empty or len(some) != len(of_controls[1]):
                    continue
                random = [control_side(part, model, kind) for part in (some, of_controls[1])]
                left = self._verdicts.compare(model.label, [trained[0], random[1]], [trained[1], random[0]])
                beyond = f"{quantity}, beyond random weights ({kind})"
                yield self._claim(place, beyond, f"the same with random weights ({kind})", left)

    def trained(self) -> Iterator[Claim]:
        """Every trained model against its random weights, each with its own layer."""
        rows = layer_rows(self._test, self._layers)
        for model in self._models:
            place = {"claim": TRAINED, "subject": model.label}
            quantity = "trained minus random weights"
            mine, kinds = trained_rows(rows, model), control_kinds(control_rows(rows, model), RANDOM)
            if mine.empty or not kinds:
                reason = "no random weights of this shape in the run" if len(mine) else "no layer was chosen"
                yield self._silent(place, quantity, "random weights", reason)
                continue
            for kind in kinds:
                control = control_side(rows, model, kind)
                effect = self._verdicts.compare(model.label, [trained_side(rows, model)], [control])
                seeds = random_seeds([control])
                against = f"random weights ({kind}, {seeds} seed{'s' * (seeds != 1)})"
                yield self._claim(place, f"{quantity} ({kind})", against, effect)

    def inputs(self) -> Iterator[Claim]:
        """Every trained model against the best baseline, on validation, that sees only what enters it."""
        rows, quantity = layer_rows(self._test, self._layers), "trained minus what enters the backbone"
        seen = self._inputs.assign(control="")
        seen = self._best(seen.assign(backbone=""))
        for model in self._models:
            place, mine = {"claim": INPUTS, "subject": model.label}, trained_rows(rows, model)
            if mine.empty or seen.empty:
                reason = "no baseline of pixels, latents or prompts in the run" if len(mine) else "no layer was chosen"
                yield self._silent(place, quantity, "what enters the backbone", reason)
                continue
            name = str(self._inputs.loc[seen.index[0], "backbone"])
            side = Side(name, (seen["record_id"].iloc[0],), (name,), bool(seen["converged"].all()))
            effect = self._verdicts.compare(model.label, [trained_side(rows, model)], [side])
            against = f"{name} (best of {len(self._inputs)} baselines on validation)"
            yield self._claim(place, quantity, against, effect, about=_about(effect.seeds[:1]))

    def size(self) -> Iterator[Claim]:
        """Largest against smallest, for these checkpoints and for other networks, and the slope for new backbones."""
        rows = layer_rows(self._test, self._layers)
        models = [model for model in self._models if model.parameters is not None and len(trained_rows(rows, model))]
        sizes = {model.parameters for model in models}
        if len(sizes) < 2:
            reason = f"{len(models)} backbone{'s' * (len(models) != 1)} of one known size: no two sizes to compare"
            subject = ", ".join(model.label for model in models) or "none"
            yield self._silent({"claim": LARGER, "subject": subject}, "large minus small", "a smaller backbone", reason)
            return
        small, large = models[0], models[-1]
        place = {"claim": LARGER, "subject": f"{large.label} against {small.label}"}
        ends = [trained_side(rows, model) for model in (large, small)]
        kinds = [kind for kind in RANDOM if all(kind in self._kinds(model) for model in (large, small))]
        for kind in ("", *kinds):
            sides = ends[:1], ends[1:]
            quantity, against = "largest minus smallest", "the smaller backbone"
            if kind:
                random = [control_side(rows, model, kind) for model in (large, small)]
                sides = [ends[0], random[1]], [ends[1], random[0]]
                quantity = f"margin over random weights ({kind}): largest minus smallest"
                against = f"random weights ({kind}) of the same two shapes"
            about = "these checkpoints" + " and random networks" * bool(kind)
            fixed = self._verdicts.compare(place["subject"], *sides, fixed=True)
            yield self._claim(place, quantity, against, fixed, about=about)
            if any(len(set(side.seeds)) > 1 for some in sides for side in some):
                effect = self._verdicts.compare(place["subject"], *sides)
                yield self._claim(place, quantity, against, effect)
        if not kinds:
            reason = "no random weights of both shapes in the run: width alone may explain it"
            yield self._silent(place, "margin over random weights: largest minus smallest", "random weights", reason)
        for kind in ("", *kinds):
            yield self._slope(rows, models, kind)

    def _slope(self, rows: pd.DataFrame, models: Sequence[Model], kind: str) -> Claim:
        """Slope over the logarithm of the size, of the accuracy or of the margin over a kind of random weights."""
        known = [model for model in models if not kind or kind in self._kinds(model)]
        place = {"claim": LARGER, "subject": f"{len(known)} backbones"}
        of = f"margin over random weights ({kind})" if kind else "accuracy"
        quantity = f"slope of the {of} per doubling of the parameters"
        against = f"random weights ({kind}) of the same shapes" if kind else "backbones of other sizes"
        if len(known) < 3:
            reason = f"{len(known)} backbones: a slope for new ones needs three"
            return self._silent(place, quantity, against, reason, about="new backbones")
        sides = [(trained_side(rows, model), control_side(rows, model, kind) if kind else None) for model in known]
        right = self._verdicts.right([key for pair in sides for side in pair if side is not None for key in side.keys])
        values = [_mean(right, one) - (0.0 if other is None else _mean(right, other)) for one, other in sides]
        groups, weights = self._verdicts.groups_and_weights(right)
        log_size = np.log2([float(model.parameters or 1) for model in known])
        slopes = list(zip(sides, slope_weights(log_size), strict=True))
        weighed = [(c, one) for (one, _), c in slopes] + [(-c, other) for (_, other), c in slopes if other is not None]
        refits = self._verdicts.refits(weighed, right.index)
        found = size_slope(np.array(values), log_size, groups, refits=refits, weights=weights, level=self._level)
        every = [side for pair in sides for side in pair if side is not None]
        effect = Effect(
            quantity,
            found.estimate,
            found.low,
            found.high,
            found.detectable,
            found.n_pairs,
            seeds=tuple((side.name, len(set(side.seeds))) for side in every),
            converged=all(side.converged for side in every),
            contrast=found,
            random_seeds=random_seeds(every),
        )
        told = f"{len(known)} backbones are the sample: {len(known) - 2} degrees of freedom"
        return because(self._claim(place, quantity, against, effect, about="new backbones"), told)

    def _kinds(self, model: Model) -> list[str]:
        """Kinds of random weights that a model has where size and training are judged."""
        return control_kinds(control_rows(layer_rows(self._test, self._layers), model), RANDOM)

    def _best(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Row of each network that is best on validation, of equal ones the earlier; networks without are left out."""
        if rows.empty:
            return rows
        ranked = rows.assign(_validation=rows["record_id"].map(self._validation))
        ranked = ranked[ranked["_validation"].notna() & ranked["accuracy"].notna()]
        ranked = ranked.sort_values(["_validation", "layer"], ascending=[False, True], kind="stable")
        best = ranked.drop_duplicates(["backbone", "control"])
        return rows[rows["record_id"].isin(best["record_id"])]

    def _plateau(self, model: Model) -> "_Plateau":
        rows = single_layers(trained_rows(self._test, model))
        rows = rows[rows["accuracy"].notna()].sort_values("layer", kind="stable")
        depth = rows.drop_duplicates("layer").set_index("layer")["relative_depth"]
        right = self._verdicts.right(list(rows["record_id"]))
        groups, weights = self._verdicts.groups_and_weights(right)
        sides = {int(layer): trained_side(rows[rows["layer"] == layer], model) for layer in depth.index}
        right_at = {layer: _mean(right, side) for layer, side in sides.items()}
        drawn = {layer: self._verdicts.refits([(1.0, side)], right.index) for layer, side in sides.items()}
        refits = {layer: again for layer, again in drawn.items() if again is not None}
        if len(refits) < len(sides):
            refits = {}
        options: dict[str, Any] = {"weights": weights, "n_boot": self._resamples, "level": self._level}
        by_layer, again = np.array(list(right_at.values())), np.stack([*refits.values()], axis=1) if refits else None
        found = plateau_set(by_layer, groups, refits=again, **options)
        inside = [layer for layer, held in zip(sides, found.inside, strict=True) if held]
        depths = dict(zip(sides, depth.astype(float), strict=True))
        return _Plateau(inside, depths, right_at, refits, groups, options)

    def _silent(self, place: dict[str, str], quantity: str, against: str, reason: str, about: str = "") -> Claim:
        return Claim(place["claim"], self._dataset, place["subject"], quantity, against, about, reason=reason)

    def _claim(self, place: dict[str, str], quantity: str, against: str, effect: Effect, about: str = "") -> Claim:
        """Row of an effect, judged by itself; `about` says what it is about, else its networks do."""
        found = effect.contrast
        assert found is not None
        reasons = [f"fewer than {_FEW} effective groups"] * (found.effective_groups < _FEW)
        reasons += [f"{effect.dropped:,} pairs that not all sides judged are left out"] * bool(effect.dropped)
        if effect.few_seeds:
            seeds = effect.random_seeds
            reasons.append(f"{seeds} seed{'s' * (seeds != 1)} of random weights, where {SEEDS} are the least")
        # the scatter of refits less what test pairs make of it may come out negative
        reasons += ["refits scatter no more than their test pairs make them"] * (found.se_train == 0)
        return Claim(
            place["claim"],
            dataset=self._dataset,
            subject=place["subject"],
            quantity=quantity,
            against=against,
            about=", ".join(filter(None, (about or _about(effect.seeds), _of_heads(effect)))),
            estimate=effect.estimate,
            low=effect.low,
            high=effect.high,
            p=found.p,
            se_pairs=found.se_pairs,
            se_train=found.se_train,
            se_networks=found.se_networks,
            n_pairs=effect.n_pairs,
            pairs_needed=float("inf") if effect.few_seeds else _needed(found, self._level),
            random_seeds=effect.random_seeds,
            converged=effect.converged,
            reason="; ".join(reasons),
            verdict="undetermined" if effect.few_seeds else _verdict(effect.low, effect.high),
        )


def _verdict(low: float, high: float) -> Verdict:
    return "supported" if low > 0 else "contradicted" if high < 0 else "undetermined"


def _needed(found: Contrast, level: float) -> float:
    """Test pairs that would decide if the truth were the estimate; networks and training pairs stay as they are."""
    return pairs_needed(found.estimate, found.se_pairs, found.n_pairs, fixed_se=found.se_lasting, level=level)


def _of_heads(effect: Effect) -> str:
    """Say whether a contrast is about the fitted heads or about any that other training pairs give."""
    return "other training pairs" if effect.refitted else "the fitted heads"


def _about(seeds: Sequence[tuple[str, int]]) -> str:
    """Say which networks of a contrast are a sample beside the pairs."""
    trained = [(name.removeprefix("trained "), n) for name, n in seeds if name.startswith("trained ")]
    random = [n for name, n in seeds if not name.startswith("trained ")]
    lone, several = ([name for name, n in trained if (n > 1) == many] for many in (False, True))
    parts = [f"other trainings of {' and '.join(several)}"] * bool(several)
    parts += [f"this {' and this '.join(lone)}"] * bool(lone)
    parts += [("other" if min(random) > 1 else "these") + " random networks"] if random else []
    return ", ".join(parts)


def _layers(rows: pd.DataFrame) -> str:
    return f"layer{'s' * (rows['layer'].nunique() > 1)} {_listed(dict.fromkeys(rows['layer']))}"


def _sets(rows: pd.DataFrame, model: Model) -> str:
    """Name the layer sets of the training seeds of a model."""
    names = dict.fromkeys(
        ("all layers" if n == model.n_blocks + 1 else name) + (f" by {rule}" if rule != "concat" else "")
        for name, n, rule in rows[["layer_set", "n_layers", "combination"]].to_numpy(object)
    )
    return " or ".join(names)


def _listed(layers: Iterable[Any]) -> str:
    return ", ".join(map(str, layers))


def _mean(right: pd.DataFrame, side: Side) -> FloatArray:
    """Mean (n,) over the networks of a side, each the mean over its records."""
    by_record = right[list(side.keys)].T
    return by_record.groupby(list(side.seeds), sort=False).mean().mean(axis=0).to_numpy(dtype=np.float64)
