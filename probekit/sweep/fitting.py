"""The fit of one record: which head with which settings, and what is kept of it beside its margins."""

from typing import Any

import numpy as np

from probekit._types import FloatArray
from probekit.config import LinearHead
from probekit.heads import BradleyTerryClassifierCV, BradleyTerryMLP
from probekit.heads.base import PairHead
from probekit.heads.linear import MEMORY
from probekit.store import Pairs
from probekit.sweep.features import Features
from probekit.sweep.material import material
from probekit.sweep.plan import Record


def fit(
    record: Record, features: Features, train: Pairs, *, memory: float = MEMORY
) -> tuple[PairHead | None, dict[str, Any]]:
    """Fit a head, or none where no training pair differs: text that has not met the image is that of its prompt.

    ``memory`` is what a linear fit may take beside the features: see `probekit.heads.BradleyTerryClassifierCV`.
    """
    linear_head = isinstance(record.head, LinearHead)
    if not (
        features.vary if linear_head else any((X[a] != X[b]).any() for X in [features.rows] for a, b in train.rows)
    ):
        return None, {"strength": np.nan, "edge_of_grid": False, "converged": True, "head_parameters": 0}
    groups = train.frame["group"].to_numpy()
    weight = train.frame["weight"].to_numpy()
    if isinstance(record.head, LinearHead):
        linear = BradleyTerryClassifierCV(Cs=record.head.strengths, cv=record.head.folds, memory=memory)
        linear.fit_differences(features.differences, train.label, sample_weight=weight, groups=groups)
        return linear, {
            "strength": linear.C_,
            "edge_of_grid": linear.edge_of_grid_,
            "converged": linear.converged_,
            "head_parameters": linear.n_parameters_,
        }
    settings = record.head.model_dump(exclude={"kind", "name", "layer_sets", "seeds"})
    mlp = BradleyTerryMLP(**settings, seed=record.seed)
    mlp.fit(features.rows, train.rows, train.label, sample_weight=weight, groups=groups)
    return mlp, {
        "strength": np.nan,
        "edge_of_grid": False,
        "converged": mlp.converged_,
        "head_parameters": mlp.n_parameters_,
    }


def margins(head: PairHead | None, features: Features) -> FloatArray:
    """Margins (n,) of all pairs of the selection."""
    rows = material(features.selection).rows
    if head is None:
        return np.zeros(len(rows))
    if isinstance(head, BradleyTerryClassifierCV):
        return features.margins(head.coef_)
    used, place = np.unique(rows, return_inverse=True)  # other rows of the store may have no features
    return head.decision_function(features.rows[used], place.reshape(rows.shape))
