"""What a linear head on any subset of layers would lose on held-out pairs, from one Gram matrix and no pass over pairs.

Shapes: n pairs, L layers, k basis columns a layer (L + 4 for 17 layers and more), p = L k, q = k times the layers of a
subset.

Per fold and layer l, the *basis* spans the directions in which a head on several layers can want to use layer l: its
own heads at neighbouring strengths, and for every layer j, (S_l + mu)^-1 D_l' m_j, the answer of layer l's ridge
problem to the margins m_j of layer j's head: what block elimination takes from w_l when layer j joins. Few layers give
few columns, so they answer at several mu. Channels enter scaled, and columns are orthonormal, so the ridge penalty on
weights is the ridge penalty on coordinates. The basis has seen the labels of its fold's training pairs, and only these.

With P (n, p) the differences in all bases, G = P'P and b = P'(y - 1/2), as weighted means over the training pairs and
over the held-out pairs of the fold, a subset is a submatrix. For elliptical differences (Stein's lemma) the head is
a = t (G + mu)^-1 b with one scalar t, and with z the held-out margins

    log-loss = E[log(2 cosh(z / 2))] - E[(y - 1/2) z].

The second mean is b_held'a exactly. The first is even in z and needs the distribution of |z|: its scale is that of
a' G_held a, its shape that of the margins of single layers, whose tails tell easy pairs from hard ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probekit._types import FloatArray, IntArray
from probekit.heads.cross_fit import NEIGHBOURS, LayerFit

_ROWS = 8192  # of a float32 Gram matrix before it is added up in float64
_SUBMATRICES = 32 * 2**20  # numbers in the submatrices that are solved together
_NODES = 32  # that stand for the distribution of margins


@dataclass(frozen=True)
class JointGram:
    """Second moments of the differences in the bases of all layers, by fold.

    Attributes
    ----------
    train, held_out
        G (folds, p, p).
    pull, held_out_pull
        b (folds, p).
    total
        (folds,): summed weights of the training pairs.
    slope
        Of the layers on average: relates a strength to mu.
    shape
        (nodes,): sizes of margins, of mean square 1.
    columns
        k: of each layer.
    """

    train: Tensor
    held_out: Tensor
    pull: Tensor
    held_out_pull: Tensor
    total: Tensor
    slope: float
    shape: Tensor
    columns: int


def supervised_basis(fit: LayerFit, folds: range, scaled: Tensor, answers: Tensor, ridge: Tensor) -> Tensor:
    """Orthonormal columns (folds, r, k) in the axes of one layer.

    Parameters
    ----------
    fit
        Of the layer.
    folds
        Numbers of the folds.
    scaled
        Its differences as `LayerFit.rotated` gives them.
    answers
        (folds, n, L) float32: margins of all layers, weighted, zero outside the fold's training pairs.
    ridge
        mu (folds,).
    """
    _, n, layers = answers.shape
    product = scaled.T @ answers.transpose(0, 1).reshape(n, -1)
    product = (
        (fit.vectors.T @ product if fit.primal else product).reshape(-1, len(folds), layers).transpose(0, 1).double()
    )
    answered = [product / (fit.eigenvalues + factor * ridge[:, None])[:, :, None] for factor in ridge_factors(layers)]
    columns = torch.cat([fit.heads[folds.start : folds.stop], *answered], dim=2)
    # Columns of one length, or those of weak layers would be lost in rounding; a zero column stays what it is.
    columns = columns / columns.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def project(fit: LayerFit, scaled: Tensor, basis: Tensor) -> Tensor:
    """Differences in the basis of each fold (folds, n, k) float32."""
    folds, _, columns = basis.shape
    flat = basis.float().transpose(0, 1).reshape(len(fit.eigenvalues), -1)
    found = scaled @ (fit.vectors @ flat if fit.primal else flat)
    return found.reshape(len(scaled), folds, columns).transpose(0, 1)


def margin_shape(fits: Sequence[LayerFit]) -> Tensor:
    """Sizes of margins (nodes,) of mean square 1: quantiles over all pairs, layers and folds."""
    margins = torch.cat([fit.margins.reshape(-1) / fit.margins.square().mean().sqrt() for fit in fits]).abs()
    places = (torch.arange(_NODES) + 0.5) / _NODES * (len(margins) - 1)
    nodes = margins.sort().values[places.long()].double()
    return nodes / nodes.square().mean().sqrt()


def joint_gram(
    projected: Tensor,
    folds: Sequence[int],
    fold_of: IntArray,
    label: FloatArray,
    weight: FloatArray,
    *,
    slope: float,
    shape: Tensor,
) -> JointGram:
    """Second moments of training and held-out pairs.

    Parameters
    ----------
    projected
        P (folds, L, n, k) float32.
    folds
        Numbers of its folds.
    fold_of, label, weight
        (n,): the fold in which a pair is held out, P(first preferred), pair weight.
    """
    layers, columns = projected.shape[1], projected.shape[3]
    size = (len(folds), layers * columns, layers * columns)
    gram, pull = torch.zeros(2, *size, dtype=torch.float64), torch.zeros(2, *size[:2], dtype=torch.float64)
    totals = torch.zeros(2, len(folds), dtype=torch.float64)
    for at, fold in enumerate(folds):
        for side, inside in enumerate((fold_of != fold, fold_of == fold)):
            total = weight[inside].sum()
            totals[side, at] = total
            for some in np.array_split(np.flatnonzero(inside), -(-int(inside.sum()) // _ROWS)):
                share = torch.from_numpy(weight[some] / total).float()
                # a gather of (L, rows, k), so that a layer's rows are read in order
                block = projected[at][:, torch.from_numpy(some)].transpose(0, 1).reshape(len(some), -1)
                pull[side, at] += (share * torch.from_numpy(label[some] - 0.5).float()) @ block
                block *= share.sqrt()[:, None]
                gram[side, at] += block.T @ block
    return JointGram(gram[0], gram[1], pull[0], pull[1], totals[0], slope, shape, columns)


def expected_losses(gram: JointGram, subsets: IntArray, strengths: FloatArray) -> FloatArray:
    """Score subsets of one size by the held-out log-loss that a head on them is expected to have, a mean over folds.

    Parameters
    ----------
    gram
        Of all layers.
    subsets
        (m, s) places of layers.
    strengths
        C (m, candidates).

    Returns
    -------
    FloatArray
        (m, candidates).
    """
    k = gram.columns
    q = k * subsets.shape[1]
    places = torch.from_numpy((subsets[:, :, None] * k + np.arange(k)).reshape(len(subsets), q))
    losses = torch.zeros(strengths.shape, dtype=torch.float64)
    candidates = torch.from_numpy(strengths)
    for some in torch.split(torch.arange(len(subsets)), max(1, _SUBMATRICES // q**2)):
        rows, columns = places[some][:, :, None], places[some][:, None, :]
        for fold in range(len(gram.total)):
            train, held_out = gram.train[fold][rows, columns], gram.held_out[fold][rows, columns]
            pull, outer_pull = gram.pull[fold][places[some]], gram.held_out_pull[fold][places[some]]
            # float32 sums: below this the matrix may have eigenvalues that are not positive
            floor = 1e-6 * train.diagonal(dim1=1, dim2=2).amax(1)
            for candidate in range(strengths.shape[1]):
                ridge = 1 / (candidates[some, candidate] * gram.total[fold] * gram.slope)
                losses[some, candidate] += _loss(train, held_out, pull, outer_pull, torch.maximum(ridge, floor), gram)
    return (losses / len(gram.total)).numpy()


def _loss(train: Tensor, held_out: Tensor, pull: Tensor, outer_pull: Tensor, ridge: Tensor, gram: JointGram) -> Tensor:
    """Give the expected held-out log-loss (m,) of the heads t (G + mu)^-1 b."""
    shifted = train.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    u = torch.cholesky_solve(pull[:, :, None], torch.linalg.cholesky(shifted))[:, :, 0]
    penalty = ridge * u.square().sum(1)
    variance = (u * pull).sum(1) - penalty  # u'Gu
    t = torch.ones_like(variance)
    for _ in range(12):  # where the derivative of the training loss along u is 0; it converges from below
        t = (variance + penalty) / (_slope(t.square() * variance, gram.shape) * variance + gram.slope * penalty)
    outer = (torch.bmm(held_out, u[:, :, None])[:, :, 0] * u).sum(1)
    return _softplus(t.square() * outer, gram.shape) - t * (u * outer_pull).sum(1)


def _slope(variance: Tensor, shape: Tensor) -> Tensor:
    """E[z (sigmoid(z) - 1/2)] / E[z^2] (m,): the mean of sigmoid' where z is Gaussian."""
    z = variance.clamp(min=1e-12).sqrt()[:, None] * shape
    return (z * (z.sigmoid() - 0.5)).mean(1) / variance.clamp(min=1e-12)


def _softplus(variance: Tensor, shape: Tensor) -> Tensor:
    """E[log(2 cosh(z / 2))] (m,): the even part of softplus."""
    z = variance.clamp(min=0).sqrt()[:, None] * shape
    return (torch.nn.functional.softplus(z) - z / 2).mean(1)


def ridge_factors(n_layers: int) -> tuple[float, ...]:
    """Multiples of mu at which layers answer: enough for a basis of about 32 columns."""
    return (1.0, 10.0, 0.1, 100.0)[: max(1, min(4, 32 // n_layers))]


def basis_width(n_layers: int, n_strengths: int) -> int:
    """Basis columns k of one layer."""
    return n_layers * len(ridge_factors(n_layers)) + min(NEIGHBOURS, n_strengths)
