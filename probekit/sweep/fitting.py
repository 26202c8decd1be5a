"""The fits of records: which head with which settings on which features, and what is kept of it beside its margins."""

from collections.abc import Sequence
from typing import Any

import numpy as np

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
from probekit.heads.linear import MEMORY
from probekit.results import NO_FIT
from probekit.store import Pairs
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


def fit(unit: Sequence[Record], features: Features, train: Pairs, *, memory: float = MEMORY) -> list[Fit]:
    """Fit the heads of a unit, records that differ in their seed alone.

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
            return [(record, None, NO_FIT) for record in unit]
        linear = _linear(first.head, first.combination, features, memory)
        D = features.differences
        if isinstance(linear, BradleyTerryClassifierCV):
            linear.fit_differences(D, **given)
        else:
            assert isinstance(D, np.ndarray)  # these heads are never fitted from files
            linear.fit_differences(D, **given)
        return [(record, linear, fit_facts(linear)) for record in unit]
    if not any((features.rows[a] != features.rows[b]).any() for a, b in train.rows):
        return [(record, None, NO_FIT) for record in unit]
    settings = first.head.model_dump(exclude={"kind", "name", *OF_THE_PLAN})
    mlps = [BradleyTerryMLP(**settings, quantisation=features.noise, seed=record.seed) for record in unit]
    fit_together(mlps, features.rows, train.rows, **given)
    return [(record, mlp, fit_facts(mlp)) for record, mlp in zip(unit, mlps, strict=True)]


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
