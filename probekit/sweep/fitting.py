"""The fits of records: which head with which settings on which features, and what is kept of it beside its margins."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import clone

from probekit._types import FloatArray
from probekit.config import OF_THE_PLAN, LinearHead
from probekit.heads import (
    BradleyTerryClassifierCV,
    BradleyTerryLateFusion,
    BradleyTerryMLP,
    BradleyTerryScalarMix,
    fit_together,
)
from probekit.heads.base import PairHead
from probekit.heads.factorisation import _squares, channel_scale
from probekit.heads.linear import MEMORY
from probekit.results import NO_FIT
from probekit.store import Pairs
from probekit.sweep.altered import SAME_STRENGTH, altered, of_the_same_strength
from probekit.sweep.features import Features
from probekit.sweep.material import material
from probekit.sweep.plan import Record

_COLUMNS = {  # of the results, by attribute of a head
    "C_": "strength",
    "edge_of_grid_": "edge_of_grid",
    "converged_": "converged",
    "n_iter_": "n_iter",
    "epochs_": "n_iter",
    "gradient_norm_": "gradient_norm",
    "n_dropped_": "n_dropped",
    "n_less_than_d_": "n_less_than_d",
    "matrix_free_": "matrix_free",
    "n_parameters_": "head_parameters",
}
Fit = tuple[Record, PairHead | None, dict[str, Any]]
"""A record, its head (none if there was nothing to fit), and the columns of the results that say how it was fitted."""


def fit(unit: Sequence[Record], features: Features, train: Pairs, *, memory: float = MEMORY) -> Iterator[Fit]:
    """Fit the heads of a unit one after the other: records that differ in their seed, or in altered training pairs.

    No head is fitted where no training pair differs: text that has not met the image is that of its prompt.
    ``memory`` is what a factorisation may take: see `probekit.heads.BradleyTerryClassifierCV`.

    Raises
    ------
    HeadError
        If a head refuses its features.
    """
    first = unit[0]
    given: dict[str, Any] = {
        "label": train.label,
        "sample_weight": train.frame["weight"].to_numpy(),
        "groups": train.frame["group"].to_numpy(),
    }
    if isinstance(first.head, LinearHead):
        if not features.vary:
            yield from ((record, None, NO_FIT) for record in unit)
            return
        linear = _linear(first.head, first.combination, features, memory)
        if isinstance(linear, BradleyTerryClassifierCV):
            yield from _with_refits(unit, linear, features, given)
            return
        D = features.differences
        assert isinstance(D, np.ndarray)  # these heads are never fitted from files
        linear.fit_differences(D, **given)
        yield from ((record, linear, fit_facts(linear)) for record in unit)
        return
    if not any((features.rows[a] != features.rows[b]).any() for a, b in train.rows):
        yield from ((record, None, NO_FIT) for record in unit)
        return
    settings = first.head.model_dump(exclude={"kind", "name", *OF_THE_PLAN})
    mlps = [BradleyTerryMLP(**settings, quantisation=features.noise, seed=record.seed) for record in unit]
    fit_together(mlps, features.rows, train.rows, **given)
    yield from ((record, mlp, fit_facts(mlp)) for record, mlp in zip(unit, mlps, strict=True))


def _with_refits(
    unit: Sequence[Record], head: BradleyTerryClassifierCV, features: Features, given: dict[str, Any]
) -> Iterator[Fit]:
    """Fit a head on pairs as they are with its refits of the same strength, then each of the others by itself."""
    asked = {record.record_id for record in unit}
    wanted = any(record.kind in SAME_STRENGTH for record in unit)
    same = of_the_same_strength(unit[0]) if wanted else []
    if wanted or not unit[0].altered:
        weights, labels = np.zeros((len(same), len(given["label"]))), np.tile(given["label"], (len(same), 1))
        for weight, label, record in zip(weights, labels, same, strict=True):
            on = altered(record)
            weight[on.train] = given["sample_weight"][on.train]
            label[on.train] = on.data.train.label
        head.fit_differences(features.differences, **given, refits=(labels, weights) if same else None)
        yield from ((record, head, fit_facts(head)) for record in unit if not record.altered)
        for record, refit in zip(same, head.refits_, strict=True):
            if record.record_id in asked:
                yield record, refit, fit_facts(refit) | {"strength": head.C_}
    for record in (record for record in unit if record.kind not in ("", *SAME_STRENGTH)):
        on = altered(record)
        pairs = on.data.train
        D, own = features.of_all_pairs[on.train], clone(head)
        directions = None
        if record.kind == "projected":
            weight = pairs.frame["weight"].to_numpy(np.float64)
            directions = _directions(D, weight, features.noise, int(record.altered.partition(":")[2]), record.seed)
            D, own = D @ directions.astype(np.float32), own.set_params(quantisation=0.0)
        own.fit_differences(D, pairs.label, pairs.frame["weight"].to_numpy(), pairs.frame["group"].to_numpy())
        if directions is not None:
            own.coef_ = directions @ own.coef_
        yield record, own, fit_facts(own)


def _directions(D: FloatArray, weight: FloatArray, noise: FloatArray, k: int, seed: int) -> FloatArray:
    """Random Gaussian directions (d, k) in the channels of D (n, d), scaled as heads scale them."""
    moments = _squares(torch.from_numpy(D), torch.from_numpy(weight / weight.sum()))
    scale = channel_scale(moments, torch.from_numpy(noise), standardize=True).numpy()
    gain = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    return np.asarray(gain[:, None] * np.random.default_rng([k, seed]).normal(size=(len(gain), k)) / np.sqrt(k))


def _linear(
    head: LinearHead, combination: str, features: Features, memory: float
) -> BradleyTerryClassifierCV | BradleyTerryScalarMix | BradleyTerryLateFusion:
    settings: dict[str, Any] = {"Cs": head.strengths, "cv": head.folds, "quantisation": features.noise}
    match combination:
        case "scalar-mix":
            return BradleyTerryScalarMix(widths=features.widths, **settings)
        case "late-fusion":
            return BradleyTerryLateFusion(widths=features.widths, **settings)
        case _:
            return BradleyTerryClassifierCV(memory=memory, **settings)


def fit_facts(head: PairHead) -> dict[str, Any]:
    """Columns of the results about a fit, as far as this kind of head knows them."""
    return NO_FIT | {column: getattr(head, name) for name, column in _COLUMNS.items() if hasattr(head, name)}


def margins(head: PairHead | None, features: Features) -> FloatArray:
    """Margins (n,) of all pairs of the selection."""
    rows = material(features.selection).rows
    if head is None:
        return np.zeros(len(rows))
    if isinstance(head, BradleyTerryMLP):
        used, place = np.unique(rows, return_inverse=True)  # other rows of the store may have no features
        return head.decision_function(features.rows[used], place.reshape(rows.shape))
    return features.margins(head.coef_)
