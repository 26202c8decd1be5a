"""Linear Bradley-Terry heads with scikit-learn's estimator contract.

A head is a score s(x) of one row; P(A > B) = sigmoid(s(A) - s(B)). There is no intercept and nothing is centred, so
swapping the sides of a pair swaps the two probabilities exactly.
"""

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from probekit._types import FloatArray, IntArray
from probekit.errors import HeadError
from probekit.heads import solvers

_CS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
_CV_GAP = 1e-7
"""Gap to the optimum of the fits inside a cross-validation; refits go down to the estimator's own ``tol``."""


class PairHead(BaseEstimator):  # type: ignore[misc]
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

    def _score(self, X: FloatArray) -> FloatArray:
        raise NotImplementedError

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


class _LinearHead(PairHead):
    """Fitted state of the linear heads."""

    coef_: FloatArray
    n_iter_: int
    converged_: bool
    gradient_norm_: float
    n_dropped_: int
    n_parameters_: int

    def _score(self, X: FloatArray) -> FloatArray:
        return np.asarray(X @ self.coef_)  # float64 coefficients: rows are not rounded to their own precision

    def _keep(self, solution: solvers.Solution, basis: solvers.Basis, scale: FloatArray) -> None:
        """Store a one-column solution in the units of X."""
        kept = scale > 0
        self.coef_ = np.zeros(len(scale))
        self.coef_[kept] = basis.coefficients(solution.a[0]).numpy() / scale[kept]
        self.n_iter_ = int(solution.n_iter[0])
        self.converged_ = bool(solution.converged[0])
        self.gradient_norm_ = float(solution.gradient_norm[0])
        self.n_dropped_ = int((~kept).sum())
        self.n_features_in_ = len(scale)
        self.n_parameters_ = int(kept.sum())


class BradleyTerryClassifier(_LinearHead):
    """Exact linear Bradley-Terry head: logistic regression on differences, without intercept.

    Parameters
    ----------
    C
        Inverse strength of the ridge penalty as in scikit-learn's ``LogisticRegression``: the objective is
        ``C * sum_i weight_i * logloss_i + |w|^2 / 2``.
    standardize
        Divide each channel by the root mean square of its training differences first (the penalty is then the same for
        every channel). Channels below 1e-6 of the median channel are dropped.
    tol
        The fit has converged when its mean log-loss, penalty included, is estimated to lie at most this above the
        minimum, and its coefficients at most sqrt(tol) from the optimal ones, relative to their length.
    max_iter
        Iterations after which an unconverged fit is kept, with ``converged_`` False.

    Attributes
    ----------
    coef_ : ndarray of shape (d,)
        In the units of X; zero for dropped channels.
    n_iter_ : int
    converged_ : bool
    gradient_norm_ : float
        Of the objective divided by C and the summed weights, in scaled channels.
    n_dropped_ : int
        Channels without enough variation.
    n_features_in_ : int
    n_parameters_ : int
        Channels that were fitted.

    References
    ----------
    R. A. Bradley and M. E. Terry, "Rank analysis of incomplete block designs", Biometrika 39 (1952).
    """

    def __init__(self, *, C: float = 1.0, standardize: bool = True, tol: float = 1e-8, max_iter: int = 500) -> None:
        self.C = C
        self.standardize = standardize
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: FloatArray, pairs: IntArray, label: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        """Fit on pairs of rows.

        Parameters
        ----------
        X
            (m, d) features.
        pairs
            (n, 2) row numbers of the first and the second.
        label
            (n,) probability that the first is preferred: 1, 0, or a vote share; 0.5 is a tie.
        sample_weight
            (n,) weights of pairs; a weight of 2 equals having the pair twice.

        Raises
        ------
        HeadError
            If shapes do not agree, a value is out of range or not finite, no channel varies, or all pairs are tied.
        """
        return self.fit_differences(differences(X, pairs), label, sample_weight)

    def fit_differences(self, D: FloatArray, label: FloatArray, sample_weight: FloatArray | None = None) -> Self:
        """Fit on differences D (n, d), first minus second; see `fit`."""
        _positive("C", self.C)
        D, label, weight = checked_targets(D, label, sample_weight)
        with solvers.one_thread():
            scale, basis = _scaled_basis(D, weight, standardize=self.standardize)
            solution = solvers.solve(
                basis,
                torch.from_numpy(label),
                torch.from_numpy(weight)[None],
                torch.tensor([float(self.C)], dtype=torch.float64),
                tol=self.tol,
                max_iter=self.max_iter,
            )
            self._keep(solution, basis, scale)
        return self


class BradleyTerryClassifierCV(_LinearHead):
    """`BradleyTerryClassifier` that chooses C by grouped cross-validation, then refits on all pairs.

    All folds and strengths share one factorisation and one channel scale, that of all pairs given to `fit`; C is the
    one with the lowest mean held-out log-loss.

    Parameters
    ----------
    Cs
        Candidates for C.
    cv
        Number of folds. Groups are dealt to folds by size, largest first, so a split depends on the groups alone.
    standardize, tol, max_iter
        As in `BradleyTerryClassifier`. ``tol`` is for the refit; fits inside the folds stop at 1e-7 where that is
        larger.

    Attributes
    ----------
    C_ : float
        The chosen strength.
    edge_of_grid_ : bool
        Whether it is the smallest or largest of several candidates.
    cv_accuracy_, cv_log_loss_ : ndarray of shape (folds, Cs)
        Held-out accuracy (ties in the labels left out; NaN where a fold has nothing else) and log-loss, weighted by
        pair weights.
    coef_, n_iter_, converged_, gradient_norm_, n_dropped_, n_features_in_, n_parameters_
        Of the refit, as in `BradleyTerryClassifier`; ``converged_`` also needs every fit inside the folds to have
        converged.
    """

    C_: float
    edge_of_grid_: bool
    cv_accuracy_: FloatArray
    cv_log_loss_: FloatArray

    def __init__(
        self,
        *,
        Cs: Sequence[float] = _CS,
        cv: int = 5,
        standardize: bool = True,
        tol: float = 1e-8,
        max_iter: int = 500,
    ) -> None:
        self.Cs = Cs
        self.cv = cv
        self.standardize = standardize
        self.tol = tol
        self.max_iter = max_iter

    def fit(
        self,
        X: FloatArray,
        pairs: IntArray,
        label: FloatArray,
        sample_weight: FloatArray | None = None,
        groups: NDArray[Any] | None = None,
    ) -> Self:
        """Fit on pairs of rows; parameters and errors as in `BradleyTerryClassifier.fit`.

        Parameters
        ----------
        X, pairs, label, sample_weight
            As in `BradleyTerryClassifier.fit`.
        groups
            (n,) labels; pairs of one group never lie on both sides of a fold. Without them, pairs that are linked
            through shared rows form a group.

        Raises
        ------
        HeadError
            Also if there are fewer groups than folds.
        """
        D = differences(X, pairs)
        return self.fit_differences(D, label, sample_weight, row_groups(pairs) if groups is None else groups)

    def fit_differences(
        self,
        D: FloatArray,
        label: FloatArray,
        sample_weight: FloatArray | None = None,
        groups: NDArray[Any] | None = None,
    ) -> Self:
        """Fit on differences D (n, d), first minus second; without ``groups`` every pair is its own group."""
        strengths = np.asarray(self.Cs, dtype=np.float64)
        for strength in strengths:
            _positive("Cs", strength)
        D, label, weight = checked_targets(D, label, sample_weight)
        folds = _folds(np.arange(len(label)) if groups is None else checked_groups(groups, len(label)), self.cv)
        with solvers.one_thread():
            scale, basis = _scaled_basis(D, weight, standardize=self.standardize)
            targets = torch.from_numpy(label)
            held_out = folds == np.arange(self.cv)[:, None]
            if not (held_out @ weight).all() or not (~held_out @ weight).all():
                message = "all pairs of a fold, or all outside it, have weight 0; give every group some weight"
                raise HeadError(message)
            columns = np.repeat(np.where(held_out, 0.0, weight), len(strengths), axis=0)
            inner = solvers.solve(
                basis,
                targets,
                torch.from_numpy(columns),
                torch.from_numpy(np.tile(strengths, self.cv)),
                tol=max(self.tol, _CV_GAP),
                max_iter=self.max_iter,
            )
            margins = inner.margins.numpy().reshape(self.cv, len(strengths), -1)
            scores = [
                _held_out(margins[fold][:, held_out[fold]], label[held_out[fold]], weight[held_out[fold]])
                for fold in range(self.cv)
            ]
            self.cv_accuracy_ = np.stack([accuracy for accuracy, _ in scores])
            self.cv_log_loss_ = np.stack([loss for _, loss in scores])
            self.C_ = float(strengths[np.argmin(self.cv_log_loss_.mean(axis=0))])
            self.edge_of_grid_ = len(strengths) > 1 and self.C_ in (strengths.min(), strengths.max())
            refit = solvers.solve(
                basis,
                targets,
                torch.from_numpy(weight)[None],
                torch.tensor([self.C_], dtype=torch.float64),
                tol=self.tol,
                max_iter=self.max_iter,
            )
            self._keep(refit, basis, scale)
        self.converged_ = self.converged_ and bool(inner.converged.all())
        return self


def _held_out(margins: FloatArray, label: FloatArray, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Accuracy and mean log-loss (Cs,) of margins (Cs, n) on held-out pairs."""
    decided = label != 0.5
    right = (margins > 0) == (label > 0.5)
    right &= margins != 0
    untied = weight * decided
    accuracy = right @ untied / untied.sum() if untied.any() else np.full(len(margins), np.nan)
    return accuracy, (np.logaddexp(0, margins) - label * margins) @ weight / weight.sum()


def _scaled_basis(D: FloatArray, weight: FloatArray, *, standardize: bool) -> tuple[FloatArray, solvers.Basis]:
    """Channel scale (d,), zero where a channel is dropped, and the factorised D / scale."""
    if not D.any():
        message = f"none of the {D.shape[1]} channels differs within any of the {len(D)} pairs; there is nothing to fit"
        raise HeadError(message)
    if not standardize:
        return np.ones(D.shape[1]), solvers.factorise(torch.from_numpy(D))
    scale = with_floor(np.sqrt(weight @ np.square(D) / weight.sum()))
    kept = scale > 0
    return scale, solvers.factorise(torch.from_numpy(D[:, kept] / scale[kept]))


def with_floor(scale: FloatArray) -> FloatArray:
    """Set scales (d,) below 1e-6 of the median varying channel to 0, which drops them: they hold rounding noise."""
    varying = scale[scale > 0]
    return np.where(scale > 1e-6 * np.median(varying), scale, 0.0)


def _folds(groups: NDArray[Any], cv: int) -> IntArray:
    """Fold number (n,) of each pair: groups are dealt whole, the largest first, to the fold with the fewest pairs."""
    names, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < cv:
        message = f"{len(names)} groups of pairs cannot fill cv={cv} folds; give at least {cv} groups, or fewer folds"
        raise HeadError(message)
    fold_of = np.empty(len(names), dtype=np.int64)
    filled = [(0, fold) for fold in range(cv)]
    for group in np.argsort(-sizes, kind="stable"):
        pairs, fold = heappop(filled)
        fold_of[group] = fold
        heappush(filled, (pairs + int(sizes[group]), fold))
    return fold_of[members]


def row_groups(pairs: IntArray) -> IntArray:
    """Group number (n,) of pairs (n, 2): connected components over shared rows."""
    n_rows = int(pairs.max(initial=0)) + 1
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n_rows, n_rows))
    component: IntArray = connected_components(graph, directed=False)[1]
    return component[pairs[:, 0]]


def differences(X: FloatArray, pairs: IntArray) -> FloatArray:
    """D (n, d) float64, first minus second; subtracted in float64, as rows may share large offsets."""
    X = checked_rows(X)
    pairs = checked_pairs(pairs, len(X))
    return X[pairs[:, 0]].astype(np.float64) - X[pairs[:, 1]]


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
    """Return float64 differences (n, d), labels (n,) and weights (n,), or raise HeadError if no head can be fitted."""
    # "W": pandas hands out read-only arrays, which torch does not take
    D = np.require(D, dtype=np.float64, requirements="W")
    label = np.require(label, dtype=np.float64, requirements="W")
    weight = np.ones(len(label)) if sample_weight is None else np.require(sample_weight, np.float64, "W")
    if D.ndim != 2:
        message = f"differences have shape {D.shape}; they must be (pairs, channels)"
        raise HeadError(message)
    for name, values in (("label", label), ("sample_weight", weight)):
        if values.shape != (len(D),):
            message = f"{name} has shape {values.shape}; it must be ({len(D)},), one per pair"
            raise HeadError(message)
    if not len(D):
        message = "there are 0 pairs; a head needs at least one"
        raise HeadError(message)
    finite = np.isfinite(D).all(axis=1)
    if not finite.all():
        message = f"the features of pair {int(np.argmin(finite))} hold NaN or infinity; they must be finite"
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
    return D, label, weight


def _positive(name: str, value: float) -> None:
    if not (np.isfinite(value) and value > 0):
        message = f"{name} is {value}; a strength must be a positive number"
        raise HeadError(message)
