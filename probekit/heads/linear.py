"""Linear Bradley-Terry heads with scikit-learn's estimator contract.

A head is a score s(x) of one row; P(A > B) = sigmoid(s(A) - s(B)). There is no intercept and nothing is centred, so
swapping the sides of a pair swaps the two probabilities exactly.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from probekit._types import FloatArray, IntArray
from probekit.config import STRENGTHS
from probekit.errors import HeadError
from probekit.heads import solvers
from probekit.heads.base import (
    PairHead,
    checked_groups,
    checked_labels,
    checked_noise,
    checked_targets,
    differences,
    row_groups,
)
from probekit.heads.factorisation import Problem, factorise
from probekit.heads.streaming import StreamedDifferences

MEMORY = float(4 * 2**30)
"""Bytes that a factorisation may take by default: enough for 11,500 channels."""
_ROWS = 512  # that are scored at a time
INNER_TOL = 3e-7
"""Gap to the optimum of the fits inside a cross-validation; refits go down to the estimator's own ``tol``."""


class _LinearHead(PairHead):
    """Fitted state of the linear heads."""

    coef_: FloatArray
    n_iter_: int
    converged_: bool
    gradient_norm_: float
    standardize: bool
    quantisation: float | FloatArray
    memory: float
    device: str
    n_dropped_: int
    n_parameters_: int
    n_less_than_d_: bool
    matrix_free_: bool

    def _score(self, X: FloatArray) -> FloatArray:
        # float64 coefficients, so rows are not rounded to their own precision; a few at a time, as they are converted
        return np.concatenate([X[start : start + _ROWS] @ self.coef_ for start in range(0, max(len(X), 1), _ROWS)])

    def _prepare(
        self,
        D: FloatArray | StreamedDifferences,
        label: FloatArray,
        by_fold: FloatArray,
        weight: FloatArray,
        strengths: FloatArray,
    ) -> tuple[Problem, solvers.Columns]:
        """Factorise D (n, d), and one column for each fold (weights (folds, n)) and strength, in this order."""
        device = torch.device(self.device)
        noise = checked_noise(self.quantisation, D.shape[1])
        targets = torch.from_numpy(weight).to(device)
        problem = factorise(
            D if isinstance(D, StreamedDifferences) else torch.from_numpy(D).to(device),
            targets,
            standardize=self.standardize,
            noise=torch.tensor(noise, device=device),
            memory=self.memory,
            smallest_lam=float(1 / (strengths.max() * weight.sum())),
        )
        columns = solvers.Columns(
            torch.from_numpy(label).to(device),
            torch.from_numpy(by_fold).to(device),
            torch.arange(len(by_fold), device=device).repeat_interleave(len(strengths)),
            torch.from_numpy(strengths).to(device).repeat(len(by_fold)),
        )
        return problem, columns

    def _keep(self, problem: Problem, solution: solvers.Solution, column: int = 0) -> None:
        """Store a column of a solution in the units of X."""
        self.coef_ = problem.coefficients(solution.w[column]).cpu().numpy()
        self.n_iter_ = int(solution.n_iter[column])
        self.converged_ = bool(solution.converged[column])
        self.gradient_norm_ = float(solution.gradient_norm[column])
        self.n_features_in_ = len(self.coef_)
        self.n_dropped_ = int((problem.scale == 0).sum())
        self.n_parameters_ = self.n_features_in_ - self.n_dropped_
        self.n_less_than_d_ = solution.margins.shape[1] < self.n_parameters_
        self.matrix_free_ = problem.matrix_free


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
    quantisation
        Root mean square of what rounding in the store adds to a difference, in the units of X: a number or one for each
        channel (d,). With ``standardize``, channels below three times it are dropped.
    tol
        The fit has converged when its mean log-loss, penalty included, is estimated to lie at most this above the
        minimum, and its coefficients at most 2 sqrt(tol) from the optimal ones, relative to their length.
    max_iter
        Iterations after which an unconverged fit is kept, with ``converged_`` False.
    memory
        Bytes that the factorisation may take; where min(n, d) squared needs more, the fit is matrix-free: the same
        optimum, by many more iterations. Fits on `StreamedDifferences` keep their state in as much afterwards.
    device
        Where to fit, such as ``cpu`` or ``cuda``; the fitted head lives on the CPU.

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
    n_less_than_d_ : bool
        Whether there were fewer pairs than fitted channels: then next to no penalty separates the training pairs.
    matrix_free_ : bool

    References
    ----------
    R. A. Bradley and M. E. Terry, "Rank analysis of incomplete block designs", Biometrika 39 (1952).
    """

    def __init__(
        self,
        *,
        C: float = 1.0,
        standardize: bool = True,
        quantisation: float | FloatArray = 0.0,
        tol: float = 1e-8,
        max_iter: int = 500,
        memory: float = MEMORY,
        device: str = "cpu",
    ) -> None:
        self.C = C
        self.standardize = standardize
        self.quantisation = quantisation
        self.tol = tol
        self.max_iter = max_iter
        self.memory = memory
        self.device = device

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

    def fit_differences(
        self, D: FloatArray | StreamedDifferences, label: FloatArray, sample_weight: FloatArray | None = None
    ) -> Self:
        """Fit on differences D (n, d), first minus second, in memory or in files; see `fit`."""
        _positive("C", self.C)
        D, label, weight = _checked(D, label, sample_weight)
        strengths = np.array([self.C], dtype=np.float64)
        with solvers.one_thread():
            problem, columns = self._prepare(D, label, weight[None], weight, strengths)
            self._keep(problem, solvers.solve(problem, columns, tol=self.tol, max_iter=self.max_iter))
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
    n_repeats
        How many splits into folds are averaged; later ones deal groups of equal size in another, fixed order.
    standardize, quantisation, tol, max_iter, memory, device
        As in `BradleyTerryClassifier`. ``tol`` is for the refit; fits inside the folds stop at 3e-7 where that is
        larger.

    Attributes
    ----------
    C_ : float
        The chosen strength.
    edge_of_grid_ : bool
        Whether it is the smallest or largest of several candidates.
    cv_accuracy_, cv_log_loss_ : ndarray of shape (n_repeats * cv, Cs)
        Held-out accuracy (ties in the labels left out; NaN where a fold has nothing else) and log-loss, weighted by
        pair weights.
    cv_margins_ : ndarray of shape (n,)
        Margin of each pair at the chosen strength, by the fit of the first split into folds that held it out.
    refits_ : list of BradleyTerryClassifier
        Further fits at the chosen strength, where `fit_differences` was asked for them.
    coef_, n_iter_, converged_, gradient_norm_, n_dropped_, n_features_in_, n_parameters_, n_less_than_d_, matrix_free_
        Of the refit, as in `BradleyTerryClassifier`; ``converged_`` also needs every fit inside the folds to have
        converged.
    """

    C_: float
    edge_of_grid_: bool
    cv_accuracy_: FloatArray
    cv_log_loss_: FloatArray
    cv_margins_: FloatArray
    refits_: list[BradleyTerryClassifier]

    def __init__(
        self,
        *,
        Cs: Sequence[float] = STRENGTHS,
        cv: int = 5,
        n_repeats: int = 1,
        standardize: bool = True,
        quantisation: float | FloatArray = 0.0,
        tol: float = 1e-8,
        max_iter: int = 500,
        memory: float = MEMORY,
        device: str = "cpu",
    ) -> None:
        self.Cs = Cs
        self.cv = cv
        self.n_repeats = n_repeats
        self.standardize = standardize
        self.quantisation = quantisation
        self.tol = tol
        self.max_iter = max_iter
        self.memory = memory
        self.device = device

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
        D: FloatArray | StreamedDifferences,
        label: FloatArray,
        sample_weight: FloatArray | None = None,
        groups: NDArray[Any] | None = None,
        *,
        refits: tuple[FloatArray, FloatArray] | None = None,
    ) -> Self:
        """Fit on differences D (n, d), first minus second, in memory or in files.

        Without ``groups`` every pair is its own group. ``refits`` are labels and weights, (R, n) each, of further fits
        on the same pairs (a weight of 0 leaves a pair out) at the strength that is chosen for the labels given. They
        share the channel scale and the factorisation of the fit itself, so that R of them cost less than its folds.
        """
        strengths = np.asarray(self.Cs, dtype=np.float64)
        for strength in strengths:
            _positive("Cs", strength)
        D, label, weight = _checked(D, label, sample_weight)
        groups = np.arange(len(label)) if groups is None else checked_groups(groups, len(label))
        folds = np.stack([_folds(groups, self.cv, repeat) for repeat in range(self.n_repeats)])
        held_out = (folds[:, None] == np.arange(self.cv)[:, None]).reshape(-1, len(label))
        if not (held_out @ weight).all() or not (~held_out @ weight).all():
            message = "all pairs of a fold, or all outside it, have weight 0; give every group some weight"
            raise HeadError(message)
        with solvers.one_thread():
            problem, columns = self._prepare(D, label, np.where(held_out, 0.0, weight), weight, strengths)
            inner = solvers.solve(problem, columns, tol=max(self.tol, INNER_TOL), max_iter=self.max_iter)
            margins = inner.margins.cpu().numpy().reshape(len(held_out), len(strengths), -1)
            scores = [
                _held_out(margins[fold][:, out].astype(np.float64), label[out], weight[out])
                for fold, out in enumerate(held_out)
            ]
            self.cv_accuracy_ = np.stack([accuracy for accuracy, _ in scores])
            self.cv_log_loss_ = np.stack([loss for _, loss in scores])
            best = int(np.argmin(self.cv_log_loss_.mean(axis=0)))
            self.C_ = float(strengths[best])
            self.edge_of_grid_ = len(strengths) > 1 and self.C_ in (strengths.min(), strengths.max())
            everything = solvers.Columns(
                columns.label,
                torch.from_numpy(weight).to(columns.label)[None],
                columns.fold[:1],
                columns.strength[best : best + 1],
            )
            # nothing is held out of the refit, so it may start from the mean of the folds' solutions
            start = inner.w[best :: len(strengths)].mean(dim=0, keepdim=True)
            refit = solvers.solve(problem, everything, tol=self.tol, max_iter=self.max_iter, start=start)
            self._keep(problem, refit)
            out = held_out[: self.cv].argmax(axis=0)  # the fold that each pair is held out of
            self.cv_margins_ = margins[out, best, np.arange(len(label))].astype(np.float64)
            self.refits_ = [] if refits is None else self._refitted(problem, *refits)
        self.converged_ = self.converged_ and bool(inner.converged.all())
        return self

    def _refitted(self, problem: Problem, labels: FloatArray, weights: FloatArray) -> list[BradleyTerryClassifier]:
        n = problem.exact.rows.shape[0]
        checked = [checked_labels(n, label, weight) for label, weight in zip(labels, weights, strict=True)]
        device = torch.device(self.device)
        columns = solvers.Columns(
            torch.from_numpy(np.stack([label for label, _ in checked])).to(device),
            torch.from_numpy(np.stack([weight for _, weight in checked])).to(device),
            torch.arange(len(checked), device=device),
            torch.full((len(checked),), self.C_, dtype=torch.float64, device=device),
        )
        solution = solvers.solve(problem, columns, tol=self.tol, max_iter=self.max_iter)
        settings = {name: value for name, value in self.get_params().items() if name not in ("Cs", "cv", "n_repeats")}
        heads = [BradleyTerryClassifier(C=self.C_, **settings) for _ in checked]
        for column, head in enumerate(heads):
            head._keep(problem, solution, column)
        return heads


def _checked(
    D: FloatArray | StreamedDifferences, label: FloatArray, sample_weight: FloatArray | None
) -> tuple[FloatArray | StreamedDifferences, FloatArray, FloatArray]:
    if isinstance(D, StreamedDifferences):  # their values are checked when they are first read
        return D, *checked_labels(D.n, label, sample_weight)
    return checked_targets(D, label, sample_weight)


def _held_out(margins: FloatArray, label: FloatArray, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Accuracy and mean log-loss (Cs,) of margins (Cs, n) on held-out pairs."""
    decided = label != 0.5
    right = (margins > 0) == (label > 0.5)
    right &= margins != 0
    untied = weight * decided
    accuracy = right @ untied / untied.sum() if untied.any() else np.full(len(margins), np.nan)
    return accuracy, (np.logaddexp(0, margins) - label * margins) @ weight / weight.sum()


def _folds(groups: NDArray[Any], cv: int, repeat: int = 0) -> IntArray:
    """Fold number (n,) of each pair: groups are dealt whole, the largest first, to the fold with the fewest pairs.

    Groups of one size are dealt in the order of their names, and in a random one from the second ``repeat`` on.
    """
    names, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < cv:
        message = f"{len(names)} groups of pairs cannot fill cv={cv} folds; give at least {cv} groups, or fewer folds"
        raise HeadError(message)
    order = np.random.default_rng(repeat).permutation(len(names)) if repeat else np.arange(len(names))
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold_of, filled = np.empty(len(names), dtype=np.int64), np.zeros(cv, dtype=np.int64)
    for alike in np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1):
        size = int(sizes[alike[0]])
        # what a fold holds before its first, second, ... of these groups; they go where this is least
        most = len(alike) // cv + int(np.ptp(filled)) // size + 2
        before = filled[:, None] + size * np.arange(most)
        place = np.lexsort((np.repeat(np.arange(cv), most), before.ravel()))[: len(alike)]
        fold_of[alike] = place // most
        filled += size * np.bincount(place // most, minlength=cv)
    return fold_of[members]


def _positive(name: str, value: float) -> None:
    if not (np.isfinite(value) and value > 0):
        message = f"{name} is {value}; a strength must be a positive number"
        raise HeadError(message)
