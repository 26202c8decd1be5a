"""What all heads share: scores of rows in, probabilities of pairs out, and the checks of the arrays that come in."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from probekit._types import FloatArray, IntArray
from probekit.errors import HeadError

BLOCK = 4096  # rows that are checked at a time


class PairHead(BaseEstimator, ABC):  # type: ignore[misc]
    """What all heads share: scores of rows in, probabilities of pairs out."""

    n_features_in_: int

    def score_items(self, X: FloatArray) -> FloatArray:
        """Scores of rows; only their differences mean anything.

        Parameters
        ----------
        X
            (m, d) features.

        Returns
        -------
        FloatArray
            (m,) float64.

        Raises
        ------
        NotFittedError
            If the head has not been fitted.
        HeadError
            If X does not have the d of the fit, or holds NaN or infinity.
        """
        if not hasattr(self, "n_features_in_"):
            message = f"this {type(self).__name__} is not fitted; call fit first"
            raise NotFittedError(message)
        X = checked_rows(X)
        if X.shape[1] != self.n_features_in_:
            message = f"X has {X.shape[1]} channels; the head was fitted on {self.n_features_in_}"
            raise HeadError(message)
        finite = np.isfinite(X).all(axis=1)
        if not finite.all():
            message = f"row {int(np.argmin(finite))} of X holds NaN or infinity; features must be finite"
            raise HeadError(message)
        return self._score(X)

    @abstractmethod
    def _score(self, X: FloatArray) -> FloatArray:
        """Scores (m,) of checked rows X (m, d)."""

    def decision_function(self, X: FloatArray, pairs: IntArray) -> FloatArray:
        """Margins s(first) - s(second) (n,) of pairs (n, 2) of rows of X (m, d)."""
        scores = self.score_items(X)
        pairs = checked_pairs(pairs, len(scores))
        return scores[pairs[:, 0]] - scores[pairs[:, 1]]

    def predict_proba(self, X: FloatArray, pairs: IntArray) -> FloatArray:
        """Probabilities (n, 2) that the second and that the first of each pair is preferred, in this order.

        Parameters
        ----------
        X
            (m, d) features.
        pairs
            (n, 2) row numbers of the first and the second.
        """
        margins = self.decision_function(X, pairs)
        return np.stack([expit(-margins), expit(margins)], axis=1)


def differences(X: FloatArray, pairs: IntArray) -> FloatArray:
    """D (n, d), first minus second: float32 of float32 or narrower rows (one rounding of each entry), else float64."""
    X = checked_rows(X)
    pairs = checked_pairs(pairs, len(X))
    first: FloatArray = X[pairs[:, 0]].astype(np.result_type(X.dtype, np.float32), copy=False)
    first -= X[pairs[:, 1]]
    return first


def row_groups(pairs: IntArray) -> IntArray:
    """Group number (n,) of pairs (n, 2): connected components over shared rows."""
    n_rows = int(pairs.max(initial=0)) + 1
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n_rows, n_rows))
    component: IntArray = connected_components(graph, directed=False)[1]
    return component[pairs[:, 0]]


def checked_rows(X: FloatArray) -> FloatArray:
    """Check that X is numbers of shape (m, d), or raise HeadError."""
    X = np.asarray(X)
    if X.ndim != 2 or not np.issubdtype(X.dtype, np.number):
        message = f"X has shape {X.shape} and type {X.dtype}; it must be numbers of shape (rows, channels)"
        raise HeadError(message)
    return X


def checked_pairs(pairs: IntArray, n_rows: int) -> IntArray:
    """Check that pairs are integers of shape (n, 2) within the rows, or raise HeadError."""
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        message = f"pairs has shape {pairs.shape} and type {pairs.dtype}; it must be integers of shape (pairs, 2)"
        raise HeadError(message)
    outside = (pairs < 0) | (pairs >= n_rows)
    if outside.any():
        message = f"pairs names row {pairs[outside][0]}; X has rows 0 to {n_rows - 1}"
        raise HeadError(message)
    return pairs


def checked_groups(groups: NDArray[Any], n: int) -> NDArray[Any]:
    """Check that groups are of shape (n,), or raise HeadError."""
    groups = np.asarray(groups)
    if groups.shape != (n,):
        message = f"groups has shape {groups.shape}; it must be ({n},), one per pair"
        raise HeadError(message)
    return groups


def checked_targets(
    D: FloatArray, label: FloatArray, sample_weight: FloatArray | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return differences (n, d) float32 or float64, labels (n,) and weights (n,) float64, or raise HeadError."""
    D = np.asarray(D)
    # "W": pandas hands out read-only arrays, which torch does not take
    D = np.require(D, np.float32 if D.dtype in (np.float16, np.float32) else np.float64, "W")
    if D.ndim != 2:
        message = f"differences have shape {D.shape}; they must be (pairs, channels)"
        raise HeadError(message)
    label, weight = checked_labels(len(D), label, sample_weight)
    blocks = np.array_split(D, len(D) // BLOCK + 1)  # D may be as large as memory allows
    finite = np.concatenate([np.isfinite(block).all(axis=1) for block in blocks])
    if not finite.all():
        message = f"the features of pair {int(np.argmin(finite))} hold NaN or infinity; they must be finite"
        raise HeadError(message)
    return D, label, weight


def checked_labels(n: int, label: FloatArray, sample_weight: FloatArray | None) -> tuple[FloatArray, FloatArray]:
    """Return labels and weights (n,) float64 of n pairs, or raise HeadError."""
    label = np.require(label, dtype=np.float64, requirements="W")
    weight = np.ones(len(label)) if sample_weight is None else np.require(sample_weight, np.float64, "W")
    for name, values in (("label", label), ("sample_weight", weight)):
        if values.shape != (n,):
            message = f"{name} has shape {values.shape}; it must be ({n},), one per pair"
            raise HeadError(message)
    if not n:
        message = "there are 0 pairs; a head needs at least one"
        raise HeadError(message)
    valid = (label >= 0) & (label <= 1)
    if not valid.all():
        message = f"label of pair {int(np.argmin(valid))} is {label[~valid][0]}; it must lie in 0 to 1"
        raise HeadError(message)
    valid = (weight >= 0) & np.isfinite(weight)
    if not valid.all():
        message = (
            f"sample_weight of pair {int(np.argmin(valid))} is {weight[~valid][0]}; it must be finite and not negative"
        )
        raise HeadError(message)
    if not weight.any():
        message = "all sample weights are 0; at least one pair must count"
        raise HeadError(message)
    if (label[weight > 0] == 0.5).all():
        message = f"all {len(label)} pairs are tied (label 0.5); at least one must have a preferred side"
        raise HeadError(message)
    return label, weight


def checked_noise(quantisation: float | FloatArray, d: int) -> FloatArray:
    """Return the rounding noise (1,) or (d,) float64 of differences, or raise HeadError."""
    noise = np.atleast_1d(np.asarray(quantisation, dtype=np.float64))
    if noise.shape not in ((1,), (d,)) or not (noise >= 0).all():
        message = (
            f"quantisation has shape {noise.shape} and minimum {noise.min():g}; it must be a number from 0, or {d} of "
            "them, one per channel"
        )
        raise HeadError(message)
    return noise
