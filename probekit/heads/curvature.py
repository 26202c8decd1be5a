"""What fits know of the curvature of their loss: the Hessian of Gaussian differences, and the steps made so far.

Shapes and symbols are those of `probekit.heads.solvers`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probekit.heads.factorisation import Spectrum

Steps = Sequence[tuple[Tensor, Tensor, Tensor]]
"""Of L-BFGS, the last one last: see `curvature_pair`."""


@dataclass(frozen=True)
class Hessian:
    """Hessian c T + lam + k u u' of every column in the basis of the spectrum, with u = T V'w.

    Attributes
    ----------
    spectrum
        T and V.
    c, lam
        (columns, 1).
    turned
        u divided by c T + lam (columns, r).
    share
        k / (1 + k u.turned) (columns, 1), by Sherman and Morrison.
    """

    spectrum: Spectrum
    c: Tensor
    lam: Tensor
    turned: Tensor
    share: Tensor

    def solve(self, q: Tensor) -> Tensor:
        """Divide q (columns, r)."""
        divided = self.spectrum.divide(q, self.c, self.lam)
        return divided - self.share * (self.turned * q).sum(1, keepdim=True) * self.turned

    def of(self, chosen: Tensor) -> "Hessian":
        """Return that of some columns."""
        return Hessian(self.spectrum, self.c[chosen], self.lam[chosen], self.turned[chosen], self.share[chosen])


def stein_start(b: Tensor, spectrum: Spectrum, fold: Tensor, lam: Tensor) -> Tensor:
    """Solutions (columns, r) for Gaussian differences from b (folds, r); c by three rounds of its fixed point."""
    rotated = spectrum.rotate(b)[fold]
    c = torch.full_like(lam, 0.25)
    for _ in range(3):
        a = spectrum.divide(rotated, c, lam)
        variance = (a * spectrum.times(a)).sum(1, keepdim=True)
        # Mean of sigmoid' over N(0, variance) by the probit approximation: good enough for a start.
        c = 0.25 / (1 + math.pi / 8 * variance).sqrt()
    return spectrum.back(spectrum.divide(rotated, c, lam))


def hessian_of(spectrum: Spectrum, w: Tensor, moments: Tensor, lam: Tensor, steps: Steps) -> Hessian:
    """Hessians at w (columns, r), from the sums (columns, 3) of v sigmoid'(z), v sigmoid'(z) z^2 and v z^2."""
    c, along, squares = torch.split(moments, 1, dim=1)
    if spectrum.rough:
        if steps:  # along the last step it is given the curvature met there: then full steps are about right
            _, y, rho = steps[-1]
            met = rho * (y * spectrum.divide(y, c, lam)).sum(1, keepdim=True)
            factor = torch.where(rho > 0, met, 1.0)
            c, lam = c * factor, lam * factor
        return Hessian(spectrum, c, lam, torch.zeros_like(w), torch.zeros_like(lam))
    a = spectrum.rotate(w)
    u = spectrum.times(a)
    variance = (u * a).sum(1, keepdim=True)
    # sigmoid' where margins are large: k is at least -c / variance, which keeps the Hessian positive
    k = torch.where(variance > 0, (along / squares - c) / variance, 0.0)
    turned = spectrum.divide(u, c, lam)
    return Hessian(spectrum, c, lam, turned, k / (1 + k * (u * turned).sum(1, keepdim=True)))


def curvature_pair(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step, change of gradient and 1 / s.y (columns, 1); 0 switches a pair off where rounding ate its curvature."""
    product = (s * y).sum(1, keepdim=True)
    safe = product > torch.finfo(s.dtype).eps * s.norm(dim=1, keepdim=True) * y.norm(dim=1, keepdim=True)
    return s, y, torch.where(safe, 1 / product, torch.zeros_like(product))


def two_loop(gradient: Tensor, hessian: Hessian, steps: Steps) -> Tensor:
    """Inverse Hessian estimate times the gradient (columns, r)."""
    q = gradient
    alphas = []
    for s, y, rho in reversed(steps):
        alpha = rho * (s * q).sum(1, keepdim=True)
        q = q - alpha * y
        alphas.append(alpha)
    spectrum = hessian.spectrum
    q = spectrum.back(hessian.solve(spectrum.rotate(q)))
    for (s, y, rho), alpha in zip(steps, reversed(alphas), strict=True):
        q = q + (alpha - rho * (y * q).sum(1, keepdim=True)) * s
    return q
