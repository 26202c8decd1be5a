"""Heads on several layers with fewer weights than their concatenation: a learned scalar mix, and late fusion of scores.

X (m, sum of widths) holds the layers side by side, as `probekit.heads.concatenate` makes it; ``widths`` says where one
ends. Both heads are linear in X, so ``coef_`` is that of a linear head on the concatenation.

Scalar mix
----------
s(x) = sum_l g_l x_l.w with one direction w (d,) for all layers and one weight g_l for each: a head on the concatenation
whose coefficients, as a matrix W (L, d) in scaled channels, have rank one, W = g w'. It minimises the concatenation's
own objective, C * sum_i weight_i * logloss_i + |W|^2 / 2, over such W. With |g| = 1 the problem in w is a ridge head on
the differences sum_l g_l D_l, with |w| = 1 that in g is one on the L columns D_l w: both are solved exactly, in turn,
and the objective never rises. One layer alone gives `BradleyTerryClassifierCV`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from probekit._types import FloatArray, IntArray
from probekit.config import STRENGTHS
from probekit.errors import HeadError
from probekit.heads import solvers
from probekit.heads.base import PairHead, checked_groups, checked_noise, checked_targets, differences, row_groups
from probekit.heads.cross_fit import cross_fit
from probekit.heads.factorisation import channel_scale
from probekit.heads.linear import BradleyTerryClassifier, BradleyTerryClassifierCV, _folds


class _SeveralLayers(PairHead):
    """What both heads share: fits on rows or differences, and a linear score."""

    coef_: FloatArray
    converged_: bool
    gradient_norm_: float
    matrix_free_: bool
    n_dropped_: int
    n_iter_: int
    n_less_than_d_: bool
    n_parameters_: int

    def __init__(
        self, *, widths: Sequence[int] | None, Cs: Sequence[float], cv: int, quantisation: float | FloatArray
    ) -> None:
        self.widths = widths
        self.Cs = Cs
        self.cv = cv
        self.quantisation = quantisation

    def fit(
        self,
        X: FloatArray,
        pairs: IntArray,
        label: FloatArray,
        sample_weight: FloatArray | None = None,
        groups: NDArray[Any] | None = None,
    ) -> Self:
        """Fit on pairs of rows; parameters as in `BradleyTerryClassifierCV.fit`.

        Raises
        ------
        HeadError
            Also if ``widths`` do not add up to the channels of X.
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
        """Fit on differences D (n, sum of widths), first minus second; without ``groups`` every pair is its own."""
        D, label, weight = checked_targets(D, label, sample_weight)
        groups = np.arange(len(D)) if groups is None else checked_groups(groups, len(D))
        widths = [D.shape[1]] if self.widths is None else list(self.widths)
        if sum(widths) != D.shape[1] or min(widths) < 1:
            message = f"widths are {widths}, in sum {sum(widths)}; they must add up to the {D.shape[1]} channels of X"
            raise HeadError(message)
        if not D.any():
            message = f"none of the {D.shape[1]} channels differs within any of the {len(D)} pairs"
            raise HeadError(message)
        noise = checked_noise(self.quantisation, D.shape[1])
        self._fit(D, widths, np.broadcast_to(noise, D.shape[1:]), label, weight, groups)
        self.n_features_in_ = D.shape[1]
        return self

    @abstractmethod
    def _fit(
        self,
        D: FloatArray,
        widths: list[int],
        noise: FloatArray,
        label: FloatArray,
        weight: FloatArray,
        groups: NDArray[Any],
    ) -> None:
        """Fit checked differences D (n, sum of widths) with rounding noise (sum of widths,)."""

    def _score(self, X: FloatArray) -> FloatArray:
        return np.asarray(X @ self.coef_)


class BradleyTerryScalarMix(_SeveralLayers):
    """Linear Bradley-Terry head on a learned weighted sum of layers of equal width.

    Channels are scaled by the root mean square of their training differences, layer by layer, so no layer weighs more
    for its size. The strength is chosen by grouped cross-validation of the head on the unweighted sum.

    Parameters
    ----------
    widths
        Channels of each layer, all equal; by default X is one layer.
    Cs, cv, quantisation
        As in `BradleyTerryClassifierCV`.
    tol
        The fit has converged when an alternation lowers the mean log-loss, penalty included, by at most this.
    max_iter
        Alternations after which an unconverged fit is kept, with ``converged_`` False.

    Attributes
    ----------
    mix_ : ndarray of shape (L,)
        g, of length 1 and positive sum, for scaled channels.
    coef_ : ndarray of shape (L d,)
        In the units of X.
    C_ : float
    edge_of_grid_ : bool
    n_iter_ : int
        Alternations.
    objective_ : list of float
        Mean log-loss, penalty included, after each alternation.
    converged_ : bool
        Whether the alternation and all fits in it did.
    gradient_norm_ : float
        Of the last fit.
    n_dropped_, n_features_in_, n_parameters_ : int
    n_less_than_d_, matrix_free_ : bool
        As in `BradleyTerryClassifier`, for the channels of one layer.
    """

    mix_: FloatArray
    C_: float
    edge_of_grid_: bool
    objective_: list[float]

    def __init__(
        self,
        *,
        widths: Sequence[int] | None = None,
        Cs: Sequence[float] = STRENGTHS,
        cv: int = 5,
        quantisation: float | FloatArray = 0.0,
        tol: float = 1e-6,
        max_iter: int = 200,
    ) -> None:
        super().__init__(widths=widths, Cs=Cs, cv=cv, quantisation=quantisation)
        self.tol = tol
        self.max_iter = max_iter

    def _fit(
        self,
        D: FloatArray,
        widths: list[int],
        noise: FloatArray,
        label: FloatArray,
        weight: FloatArray,
        groups: NDArray[Any],
    ) -> None:
        layers = len(widths)
        if len(set(widths)) > 1:
            message = f"layers have widths {widths}; a scalar mix needs layers of one width"
            raise HeadError(message)
        moments = torch.from_numpy(weight @ np.square(D) / weight.sum())
        scale = channel_scale(moments, torch.from_numpy(noise.copy()), standardize=True).numpy()
        gain = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        Z = (D * gain).reshape(len(D), layers, -1)
        g: FloatArray = np.full(layers, layers**-0.5)
        if len(self.Cs) > 1:
            chosen = BradleyTerryClassifierCV(Cs=self.Cs, cv=self.cv, standardize=False)
            chosen.fit_differences(np.tensordot(Z, g, axes=(1, 0)), label, weight, groups)
            self.C_, self.edge_of_grid_, steps_converged = chosen.C_, chosen.edge_of_grid_, chosen.converged_
        else:
            self.C_, self.edge_of_grid_, steps_converged = float(self.Cs[0]), False, True
        exact = BradleyTerryClassifier(C=self.C_, standardize=False)
        self.objective_, self.converged_, self.matrix_free_ = [], False, False
        w: FloatArray = np.zeros(Z.shape[2])
        while len(self.objective_) < self.max_iter and not self.converged_:
            g /= np.linalg.norm(g)
            w = exact.fit_differences(np.tensordot(Z, g, axes=(1, 0)), label, weight).coef_
            steps_converged = steps_converged and exact.converged_
            self.matrix_free_, self.gradient_norm_ = exact.matrix_free_, exact.gradient_norm_
            length = np.linalg.norm(w)
            if length == 0:  # the best head is none: there is no direction to weigh layers along
                self.objective_.append(float(np.log(2)))
                break
            margins = Z @ (w / length)
            g = exact.fit_differences(margins, label, weight).coef_
            steps_converged, self.gradient_norm_ = steps_converged and exact.converged_, exact.gradient_norm_
            w /= length
            z = margins @ g
            loss = weight @ (np.logaddexp(0, z) - label * z) + g @ g / (2 * self.C_)
            self.objective_.append(float(loss / weight.sum()))
            self.converged_ = len(self.objective_) > 1 and self.objective_[-2] - self.objective_[-1] <= self.tol
        self.converged_ = self.converged_ and steps_converged
        self.n_iter_ = len(self.objective_)
        self.coef_ = np.outer(g, w).ravel() * gain
        self.mix_ = g / np.linalg.norm(g) * (1.0 if g.sum() >= 0 else -1.0)
        self.n_dropped_ = int((scale == 0).sum())
        self.n_parameters_ = layers + Z.shape[2]
        self.n_less_than_d_ = len(D) < int((scale.reshape(layers, -1) > 0).any(axis=0).sum())


class BradleyTerryLateFusion(_SeveralLayers):
    """Weighted sum of the scores of one linear Bradley-Terry head per layer.

    Each layer's head has its own strength. The weights of the scores are fitted to held-out margins, those of heads of
    the folds in which a pair was left out, so a layer that fits its training pairs closely gains nothing by it.

    Parameters
    ----------
    widths
        Channels of each layer; they may differ. By default X is one layer.
    weights
        ``learned``: a weight for each layer, of either sign, by a `BradleyTerryClassifierCV` on held-out margins.
        ``equal``: the sum of all scores; one common factor, fitted in the same way, sets the size of its margins.
    Cs, cv, quantisation
        As in `BradleyTerryClassifierCV`; the first two for the weights as well.

    Attributes
    ----------
    layer_weights_ : ndarray of shape (L,)
        Of the layers' scores; 0 for a layer in which no pair differs.
    layer_strengths_ : ndarray of shape (L,)
        C of each layer's head; NaN for a layer in which no pair differs.
    coef_ : ndarray of shape (sum of widths,)
        In the units of X.
    edge_of_grid_ : bool
        Whether a layer's strength is the smallest or largest of several candidates.
    converged_ : bool
        Whether all fits did.
    n_iter_ : int
        Most of any layer's head on all pairs.
    gradient_norm_ : float
        Largest of any layer's head on all pairs.
    n_dropped_, n_features_in_, n_parameters_ : int
    n_less_than_d_, matrix_free_ : bool
        Whether it holds for any layer's head, as in `BradleyTerryClassifier`.
    """

    layer_weights_: FloatArray
    layer_strengths_: FloatArray
    edge_of_grid_: bool

    def __init__(
        self,
        *,
        widths: Sequence[int] | None = None,
        weights: str = "learned",
        Cs: Sequence[float] = STRENGTHS,
        cv: int = 5,
        quantisation: float | FloatArray = 0.0,
    ) -> None:
        super().__init__(widths=widths, Cs=Cs, cv=cv, quantisation=quantisation)
        self.weights = weights

    def _fit(
        self,
        D: FloatArray,
        widths: list[int],
        noise: FloatArray,
        label: FloatArray,
        weight: FloatArray,
        groups: NDArray[Any],
    ) -> None:
        if self.weights not in ("learned", "equal"):
            message = f"weights is {self.weights!r}; allowed: 'learned', 'equal'"
            raise HeadError(message)
        strengths = np.sort(np.asarray(self.Cs, dtype=np.float64))
        fold_of = _folds(groups, self.cv)
        held_out = np.zeros((len(D), len(widths)))
        self.layer_strengths_ = np.full(len(widths), np.nan)
        ends = np.cumsum(widths)[:-1]
        parts, noises = np.split(D, ends, axis=1), np.split(noise, ends)
        coefs: list[FloatArray] = [np.zeros(width) for width in widths]
        heads: list[BradleyTerryClassifier] = []
        self.converged_ = True
        for layer, part in enumerate(parts):
            with solvers.one_thread():
                fit = cross_fit(part, label, weight, fold_of, strengths, noise=noises[layer])
            if fit is None:
                continue
            held_out[:, layer] = fit.margins.numpy()[fold_of, np.arange(len(D))]
            self.layer_strengths_[layer] = strengths[fit.best]
            head = BradleyTerryClassifier(C=strengths[fit.best], quantisation=noises[layer])
            heads.append(head.fit_differences(part, label, weight))
            coefs[layer] = head.coef_
            self.converged_ &= fit.converged and head.converged_
        # Margins are in one unit, and how large those of a layer are says how sure its head is: they are not rescaled.
        columns = held_out if self.weights == "learned" else held_out.sum(axis=1, keepdims=True)
        fusion = BradleyTerryClassifierCV(Cs=self.Cs, cv=self.cv, standardize=False)
        fusion.fit_differences(columns, label, weight, groups)
        self.converged_ &= fusion.converged_
        self.layer_weights_ = np.broadcast_to(fusion.coef_, (len(widths),)) * ~np.isnan(self.layer_strengths_)
        self.coef_ = np.concatenate([w * coef for w, coef in zip(self.layer_weights_, coefs, strict=True)])
        self.edge_of_grid_ = len(strengths) > 1 and bool(np.isin(self.layer_strengths_, strengths[[0, -1]]).any())
        self.n_iter_ = max(head.n_iter_ for head in heads)
        self.gradient_norm_ = max(head.gradient_norm_ for head in heads)
        self.n_less_than_d_ = any(head.n_less_than_d_ for head in heads)
        self.matrix_free_ = any(head.matrix_free_ for head in heads)
        self.n_dropped_ = int(sum((coef == 0).sum() for coef in coefs))
        self.n_parameters_ = len(self.coef_) - self.n_dropped_ + len(fusion.coef_)
