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

from probekit._types import FloatArray, IntArray
from probekit.config import STRENGTHS
from probekit.errors import HeadError
from probekit.heads import solvers
from probekit.heads.base import PairHead, checked_groups, checked_targets, differences, row_groups

_CV_GAP = 1e-7
"""Gap to the optimum of the fits inside a cross-validation; refits go down to the estimator's own ``tol``."""


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
        Cs: Sequence[float] = STRENGTHS,
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


def _positive(name: str, value: float) -> None:
    if not (np.isfinite(value) and value > 0):
        message = f"{name} is {value}; a strength must be a positive number"
        raise HeadError(message)
