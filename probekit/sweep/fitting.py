"""The fit of one record: which head with which settings, and what is kept of it beside its margins."""

from typing import Any

import numpy as np

from probekit._types import FloatArray, IntArray
from probekit.config import LinearHead
from probekit.heads import BradleyTerryClassifierCV, BradleyTerryMLP
from probekit.heads.base import PairHead
from probekit.store import Pairs
from probekit.sweep.plan import Record


def fit(record: Record, features: FloatArray, train: Pairs) -> tuple[PairHead | None, dict[str, Any]]:
    """Fit a head, or none where no training pair differs: text that has not met the image is that of its prompt."""
    if not any((features[a] != features[b]).any() for a, b in train.rows):
        return None, {"strength": np.nan, "edge_of_grid": False, "converged": True, "head_parameters": 0}
    groups = train.frame["group"].to_numpy()
    weight = train.frame["weight"].to_numpy()
    if isinstance(record.head, LinearHead):
        linear = BradleyTerryClassifierCV(Cs=record.head.strengths, cv=record.head.folds)
        linear.fit(features, train.rows, train.label, sample_weight=weight, groups=groups)
        return linear, {
            "strength": linear.C_,
            "edge_of_grid": linear.edge_of_grid_,
            "converged": linear.converged_,
            "head_parameters": linear.n_parameters_,
        }
    settings = record.head.model_dump(exclude={"kind", "name", "layer_sets", "seeds"})
    mlp = BradleyTerryMLP(**settings, seed=record.seed)
    mlp.fit(features, train.rows, train.label, sample_weight=weight, groups=groups)
    return mlp, {
        "strength": np.nan,
        "edge_of_grid": False,
        "converged": mlp.converged_,
        "head_parameters": mlp.n_parameters_,
    }


def facts_of(head: PairHead) -> dict[str, Any]:
    """Columns of the results about a fit."""
    return {
        "strength": getattr(head, "C_", np.nan),
        "edge_of_grid": getattr(head, "edge_of_grid_", False),
        "converged": head.converged_,
        "head_parameters": head.n_parameters_,
    }


def margins(head: PairHead | None, features: FloatArray, rows: IntArray) -> FloatArray:
    """Score the rows of pairs (n, 2) only: other rows of the store may have no features."""
    if head is None:
        return np.zeros(len(rows))
    used, place = np.unique(rows, return_inverse=True)
    return head.decision_function(features[used], place.reshape(rows.shape))
