"""Linear Bradley-Terry fits of many columns at once.

Z (n, d) holds scaled differences, y (n,) = P(first preferred). A *column* j is one fit: a fold (pair weights v_j (n,),
zero outside the fold, divided by their sum) with a strength. It minimises

    f_j(w) = sum_i v_ij [softplus(z_i.w) - y_i z_i.w] + lam_j / 2 |w|^2,        lam_j = 1 / (C_j * summed weights),

which is scikit-learn's logistic regression without intercept, divided by C times the summed weights; a soft label
counts both ways round.

All columns go through L-BFGS together, preconditioned by the inverse of the Hessian that Gaussian z would have. With
S = Z'Z / n = V e V' (`probekit.heads.factorisation`) and Stein's lemma it is

    E[sigmoid'(z.w) z z'] + lam = V (c e + lam) V' + k S w w' S,

where c is the mean of sigmoid' over the column's margins, and k is such that the curvature along w is that of the
margins. The line search needs no product with Z, since margins Z w_j (n,) are kept; held-out scores come for free.

The start needs no pass per column: for Gaussian z, E[sigmoid(z.w) z] = c (Z'Z / n) w (Stein), so
w = (c Z'Z / n + lam)^-1 b with b = sum_i v_i (y_i - 1/2) z_i. Every fold starts from its own pairs: a start from a fit
on all pairs would leak into held-out scores.

Precision: iterations run in float32, which resolves the gap of well-conditioned columns to about 1e-9. A column that
is not finished after 40 of them goes on in float64. Columns that have to come below 1e-7 are also judged in float64,
and go on there if that finds them too far away.

Source: J. Nocedal and S. Wright, Numerical Optimization (2006), algorithm 7.4.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]
from torch import Tensor

from probekit.heads.factorisation import Differences, Problem, Spectrum

HISTORY = 10
"""Pairs of steps and gradient changes that L-BFGS remembers."""
_POOLS = ThreadpoolController()
_SINGLE_ITERATIONS = 40
_SINGLE_TOL = 1e-7  # from here on, float64 has the last word
_SINGLE_LEAST = 1e-9


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch and numpy on one thread: the same bits on every machine setting; sweeps parallelise over processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _POOLS.limit(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Columns:
    """Fits that run together.

    Attributes
    ----------
    label
        y (n,) float64 in [0, 1].
    weight
        (folds, n) float64: weight of each pair in each fold's fits, zero outside it.
    fold
        (columns,) which row of ``weight`` a column is fitted with.
    strength
        C (columns,) float64: as in scikit-learn, larger is weaker.
    """

    label: Tensor
    weight: Tensor
    fold: Tensor
    strength: Tensor


@dataclass(frozen=True)
class _Hessian:
    """Hessian c e + lam + k u u' of every column in the eigenbasis, with u = e V'w.

    Attributes
    ----------
    inverse
        1 / (c e + lam) (columns, r).
    turned
        u times ``inverse`` (columns, r).
    share
        k / (1 + k u.turned) (columns, 1), by Sherman and Morrison.
    """

    inverse: Tensor
    turned: Tensor
    share: Tensor

    def solve(self, q: Tensor) -> Tensor:
        """Divide q (columns, r)."""
        return q * self.inverse - self.share * (self.turned * q).sum(1, keepdim=True) * self.turned

    def of(self, chosen: Tensor) -> "_Hessian":
        """Return that of some columns."""
        return _Hessian(self.inverse[chosen], self.turned[chosen], self.share[chosen])


@dataclass(frozen=True)
class Solution:
    """Fitted columns.

    Attributes
    ----------
    w
        (columns, r) float64.
    margins
        (columns, n): margins of all pairs, held-out ones included.
    n_iter
        (columns,) iterations of L-BFGS.
    gap
        (columns,) estimate of f(w) - min f: half the decrement, with the estimate of L-BFGS for the inverse Hessian.
    gradient_norm
        (columns,) Euclidean norm of the gradient of f.
    converged
        (columns,) whether gap and relative distance came down to their tolerances.
    """

    w: Tensor
    margins: Tensor
    n_iter: Tensor
    gap: Tensor
    gradient_norm: Tensor
    converged: Tensor


def solve(problem: Problem, columns: Columns, *, tol: float, max_iter: int, start: Tensor | None = None) -> Solution:
    """Fit all columns.

    Parameters
    ----------
    problem
        Differences of all pairs, and their preconditioner.
    columns
        What to fit.
    tol
        A column has converged when its estimated gap to the optimum (a mean log-loss) is at most this, and its
        estimated distance from it at most 2 sqrt(tol) of its length. The second matters on separable data, where the
        loss is flat.
    max_iter
        Iterations after which a column is returned as it is.
    start
        (columns, r) to start from; by default the Stein estimate of each column's own pairs.
    """
    if problem.fast is None:
        return _descend(problem.exact, problem.spectrum.to(torch.float64), columns, start, tol, max_iter)
    spectrum = problem.spectrum.to(torch.float32)
    judged = tol < _SINGLE_TOL
    near = max(tol / 2, _SINGLE_LEAST) if judged else tol
    rough = _descend(problem.fast, spectrum, columns, start, near, min(max_iter, _SINGLE_ITERATIONS))
    open_ = torch.nonzero(~rough.converged | judged)[:, 0]
    if not len(open_):
        return rough
    rest = Columns(columns.label, columns.weight, columns.fold[open_], columns.strength[open_])
    used = int(rough.n_iter[open_].max())
    spectrum = problem.spectrum.to(torch.float64)
    fine = _descend(problem.exact, spectrum, rest, rough.w[open_], tol, max_iter - used)
    rough.w[open_], rough.margins[open_] = fine.w, fine.margins.to(rough.margins.dtype)
    rough.n_iter[open_] += fine.n_iter
    rough.gap[open_], rough.gradient_norm[open_], rough.converged[open_] = fine.gap, fine.gradient_norm, fine.converged
    return rough


def _descend(
    data: Differences, spectrum: Spectrum, columns: Columns, start: Tensor | None, tol: float, max_iter: int
) -> Solution:
    """Preconditioned L-BFGS in the precision of the spectrum; a column leaves when it has converged."""
    dtype = spectrum.eigenvalues.dtype
    total = columns.weight.sum(1, keepdim=True)
    by_fold = (columns.weight / total).to(dtype)
    label = columns.label.to(dtype)
    lam = (1 / (columns.strength[:, None] * total[columns.fold])).to(dtype)
    if start is None:
        w = _stein(data.gradient(by_fold * (label - 0.5)), spectrum, columns.fold, lam)
    else:
        w = start.to(dtype)
    margins = data.margins(w)
    weight = by_fold[columns.fold]
    chance = margins.sigmoid()

    count = len(w)
    result = Solution(
        w=torch.empty_like(w, dtype=torch.float64),
        margins=torch.empty_like(margins),
        n_iter=torch.zeros(count, dtype=torch.int64, device=w.device),
        gap=torch.empty_like(w[:, 0], dtype=torch.float64),
        gradient_norm=torch.empty_like(w[:, 0], dtype=torch.float64),
        converged=torch.zeros(count, dtype=torch.bool, device=w.device),
    )
    active = torch.arange(count, device=w.device)
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    step = previous = torch.empty(0)
    for iteration in range(max_iter + 1):
        gradient = data.gradient((chance - label).mul_(weight)) + lam * w
        if iteration:
            history.append(_curvature_pair(step, gradient - previous))
            history = history[-HISTORY:]
        hessian = _hessian(spectrum, w, margins, chance, weight, lam)
        direction = -_two_loop(gradient, spectrum, hessian, history)
        slope = (direction * gradient).sum(1)
        done = (slope.abs() / 2 <= tol) & (direction.norm(dim=1) <= 2 * math.sqrt(tol) * w.norm(dim=1))
        leaves = done | (iteration == max_iter)
        if leaves.any():
            at = active[leaves]
            result.w[at], result.margins[at] = w[leaves].double(), margins[leaves]
            result.n_iter[at], result.gap[at] = iteration, slope[leaves].abs().double() / 2
            result.gradient_norm[at] = gradient[leaves].double().norm(dim=1)
            result.converged[at] = done[leaves]
            stays = ~leaves
            if not stays.any():
                break
            active, w, margins, weight, lam = active[stays], w[stays], margins[stays], weight[stays], lam[stays]
            gradient, hessian, direction, slope = gradient[stays], hessian.of(stays), direction[stays], slope[stays]
            history = [(s[stays], y[stays], rho[stays]) for s, y, rho in history]
        uphill = slope >= 0
        if uphill.any():
            direction[uphill] = -_two_loop(gradient[uphill], spectrum, hessian.of(uphill), [])
            slope = (direction * gradient).sum(1)
        ahead = data.margins(direction)
        t, chance = _line_search(w, direction, margins, ahead, slope, label, weight, lam)
        step, previous = t * direction, gradient
        w = w + step
        margins = torch.addcmul(margins, t, ahead)
    return result


def _stein(b: Tensor, spectrum: Spectrum, fold: Tensor, lam: Tensor) -> Tensor:
    """Solutions (columns, r) for Gaussian differences from b (folds, r); c by three rounds of its fixed point."""
    e = spectrum.eigenvalues
    rotated = spectrum.rotate(b)[fold]
    c = torch.full_like(lam, 0.25)
    for _ in range(3):
        a = rotated / (c * e + lam)
        variance = (a.square() * e).sum(1, keepdim=True)
        # Mean of sigmoid' over N(0, variance) by the probit approximation: good enough for a start.
        c = 0.25 / (1 + math.pi / 8 * variance).sqrt()
    return spectrum.back(rotated / (c * e + lam))


def _hessian(spectrum: Spectrum, w: Tensor, margins: Tensor, chance: Tensor, weight: Tensor, lam: Tensor) -> _Hessian:
    curvature = (1 - chance).mul_(chance).mul_(weight)
    c = curvature.sum(1, keepdim=True)
    inverse = 1 / (c * spectrum.eigenvalues + lam)
    a = spectrum.rotate(w)
    u = spectrum.eigenvalues * a
    variance = (u * a).sum(1, keepdim=True)
    squares = margins.square()
    # sigmoid' where margins are large: k is at least -c / variance, which keeps the Hessian positive
    along = torch.linalg.vecdot(curvature, squares) / torch.linalg.vecdot(weight, squares)
    k = torch.where(variance > 0, (along[:, None] - c) / variance, 0.0)
    turned = inverse * u
    return _Hessian(inverse, turned, k / (1 + k * (u * turned).sum(1, keepdim=True)))


def _curvature_pair(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step, change of gradient and 1 / s.y (columns, 1); 0 switches a pair off where rounding ate its curvature."""
    product = (s * y).sum(1, keepdim=True)
    safe = product > torch.finfo(s.dtype).eps * s.norm(dim=1, keepdim=True) * y.norm(dim=1, keepdim=True)
    return s, y, torch.where(safe, 1 / product, torch.zeros_like(product))


def _two_loop(
    gradient: Tensor, spectrum: Spectrum, hessian: _Hessian, history: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """Inverse Hessian estimate times the gradient (columns, r)."""
    q = gradient
    alphas = []
    for s, y, rho in reversed(history):
        alpha = rho * (s * q).sum(1, keepdim=True)
        q = q - alpha * y
        alphas.append(alpha)
    q = spectrum.back(hessian.solve(spectrum.rotate(q)))
    for (s, y, rho), alpha in zip(history, reversed(alphas), strict=True):
        q = q + (alpha - rho * (y * q).sum(1, keepdim=True)) * s
    return q


def _line_search(
    w: Tensor,
    direction: Tensor,
    margins: Tensor,
    ahead: Tensor,
    slope: Tensor,
    label: Tensor,
    weight: Tensor,
    lam: Tensor,
) -> tuple[Tensor, Tensor]:
    """Step lengths (columns, 1) at which the slope of f is a tenth of what it was, and sigmoid of the margins there.

    Along a line f is convex, and its derivatives need the margins only; Newton's method in one dimension, kept inside
    the bracket of the root.
    """
    ridge_slope = lam[:, 0] * (w * direction).sum(1)
    ridge_curvature = lam[:, 0] * direction.square().sum(1)
    t, low, high = torch.ones_like(slope), torch.zeros_like(slope), torch.full_like(slope, torch.inf)
    for _ in range(30):
        chance = torch.addcmul(margins, t[:, None], ahead).sigmoid_()
        now = torch.linalg.vecdot((chance - label).mul_(weight), ahead) + ridge_slope + t * ridge_curvature
        done = now.abs() <= 0.1 * slope.abs()
        if done.all():
            break
        curvature = torch.linalg.vecdot((1 - chance).mul_(chance).mul_(weight).mul_(ahead), ahead) + ridge_curvature
        low, high = torch.where(now < 0, t, low), torch.where(now < 0, high, t)
        newton = t - now / curvature
        # Far out the loss is flat and Newton's step huge: grow at most fourfold; outside the bracket, halve it.
        newton = torch.where(high.isinf(), newton.clamp(max=4 * t), newton)
        inside = (newton > low) & (newton < high)
        t = torch.where(done, t, torch.where(inside, newton, (low + high) / 2))
    else:
        chance = torch.addcmul(margins, t[:, None], ahead).sigmoid_()
    return t[:, None], chance
