"""The heads of one layer in every fold: what searches over subsets and late fusion of scores start from."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probekit._types import FloatArray, IntArray
from probekit.heads import solvers
from probekit.heads.factorisation import factorise
from probekit.heads.linear import _held_out

_GAP = 1e-6
"""Gap to the optimum of a fit inside a fold; its margins are averaged over, so the last digits do not matter."""
NEIGHBOURS = 4
"""Own heads of a layer that are kept: at the chosen strength and around it."""


@dataclass(frozen=True)
class LayerFit:
    """A layer's linear heads in every fold, and the axes in which its ridge problems are diagonal.

    Attributes
    ----------
    scale
        (d,): root mean square of the channels; 0 where a channel was dropped.
    log_loss, accuracy
        (folds, Cs): on held-out pairs, as `probekit.heads.BradleyTerryClassifierCV` has them.
    best
        Place of the strength with the lowest mean log-loss.
    margins
        (folds, n) float32: of all pairs, from the head of each fold at that strength.
    slope
        Mean of sigmoid' over these margins.
    heads
        (folds, r, NEIGHBOURS or fewer): heads in the axes, at neighbouring strengths.
    eigenvalues
        (r,): of Z'Z / n, Z being the scaled differences.
    vectors
        (d, d) where n >= d, else (n, r) with Z in the axes = vectors * n * eigenvalues; float32.
    converged
        Whether every fit did.
    """

    scale: FloatArray
    log_loss: FloatArray
    accuracy: FloatArray
    best: int
    margins: Tensor
    slope: float
    heads: Tensor
    eigenvalues: Tensor
    vectors: Tensor
    primal: bool
    converged: bool

    def rotated(self, D: FloatArray) -> Tensor:
        """Scaled differences (n, d) float32 where n >= d, else their form in the axes (n, r)."""
        if self.primal:
            gain = np.divide(1, self.scale, out=np.zeros_like(self.scale), where=self.scale > 0)
            return torch.from_numpy(np.asarray(D * gain, dtype=np.float32))
        return self.vectors * (len(self.vectors) * self.eigenvalues).float()


def cross_fit(
    D: FloatArray,
    label: FloatArray,
    weight: FloatArray,
    folds: IntArray,
    strengths: FloatArray,
    *,
    noise: FloatArray | None = None,
) -> LayerFit | None:
    """Fit one layer in every fold at every strength; None where no pair differs.

    Parameters
    ----------
    D
        (n, d) differences, float32 or float64, first minus second.
    label, weight, folds
        (n,).
    strengths
        C (Cs,), ascending.
    noise
        (d,): see `probekit.heads.factorisation.channel_scale`; by default none.
    """
    if not D.any():
        return None
    n_folds, grid = int(folds.max()) + 1, strengths.astype(np.float64)
    problem = factorise(
        torch.from_numpy(D),
        torch.from_numpy(weight),
        standardize=True,
        noise=torch.zeros(1) if noise is None else torch.tensor(noise),
        memory=float("inf"),  # subsets are screened by submatrices of a Gram matrix, so there must be one
        smallest_lam=1 / float(grid.max() * weight.sum()),
        axes=True,
    )
    inside = np.where(folds == np.arange(n_folds)[:, None], 0.0, weight)
    columns = solvers.Columns(
        torch.from_numpy(label),
        torch.from_numpy(inside),
        torch.arange(n_folds).repeat_interleave(len(grid)),
        torch.from_numpy(np.tile(grid, n_folds)),
    )
    solution = solvers.solve(problem, columns, tol=_GAP, max_iter=500)
    margins = solution.margins.double().numpy().reshape(n_folds, len(grid), -1)
    log_loss, accuracy = np.empty((2, n_folds, len(grid)))
    for fold in range(n_folds):
        out = folds == fold
        accuracy[fold], log_loss[fold] = _held_out(margins[fold][:, out], label[out], weight[out])
    best = int(np.argmin(log_loss.mean(axis=0)))
    first = min(max(best - 1, 0), max(len(grid) - NEIGHBOURS, 0))
    heads = (
        problem.spectrum.rotate(solution.w.to(problem.spectrum.diagonal.dtype))
        .reshape(n_folds, len(grid), -1)[:, first : first + NEIGHBOURS]
        .transpose(1, 2)
    )
    chosen = solution.margins.reshape(n_folds, len(grid), -1)[:, best]
    slope = float((chosen.sigmoid() * (-chosen).sigmoid()).mean())
    e, vectors = problem.spectrum.diagonal.double(), problem.spectrum.vectors
    rows = problem.exact.rows
    assert isinstance(rows, torch.Tensor)  # nothing is streamed here
    return LayerFit(
        problem.scale.numpy(),
        log_loss,
        accuracy,
        best,
        chosen.float(),
        slope,
        heads.double(),
        e,
        (rows / (len(D) * e) if vectors is None else vectors).float(),
        problem.lift is None,
        bool(solution.converged.all()),
    )
