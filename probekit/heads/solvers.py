"""Linear Bradley-Terry fits of many columns at once.

Z (n, d) holds scaled differences, y (n,) = P(first preferred). A *column* j is one fit: a fold (pair weights v_j (n,),
zero outside the fold, divided by their sum) with a strength. It minimises

    f_j(w) = sum_i v_ij [softplus(z_i.w) - y_i z_i.w] + lam_j / 2 |w|^2,        lam_j = 1 / (C_j * summed weights),

which is scikit-learn's logistic regression without intercept, divided by C times the summed weights; a soft label
counts both ways round.

All columns go through L-BFGS together, preconditioned by the inverse of the Hessian that Gaussian z would have. With
S = Z'Z / n = V T V' (`probekit.heads.factorisation`) and Stein's lemma it is

    E[sigmoid'(z.w) z z'] + lam = V (c T + lam) V' + k S w w' S,

where c is the mean of sigmoid' over the column's margins, and k is such that the curvature along w is that of the
margins. The line search needs no product with Z, since margins Z w_j (n,) are kept; held-out scores come for free.
Where only the diagonal of S is known, that is the Hessian, scaled to the curvature of the last step.

Where Z is streamed from files, an iteration reads it once: margins and gradient of the full step, block by block. The
step is kept where it satisfies the approximate Wolfe conditions, as nearly all do; where not, the line search on
margins finds its length, and the column goes there in the next pass, while the others go on. Columns whose state would
not fit into the memory given take turns.

The start needs no pass per column: for Gaussian z, E[sigmoid(z.w) z] = c (Z'Z / n) w (Stein), so
w = (c Z'Z / n + lam)^-1 b with b = sum_i v_i (y_i - 1/2) z_i. Every fold starts from its own pairs: a start from a fit
on all pairs would leak into held-out scores.

Precision: iterations run in float32, which resolves the gap of well-conditioned columns to about 1e-9. A column that
is not finished after 40 of them, or 250 without a factorisation, goes on in float64. Columns that have to come below
1e-7 are also judged in float64, and go on there if that finds them too far away.

Sources: J. Nocedal and S. Wright, Numerical Optimization (2006), algorithm 7.4; W. Hager and H. Zhang, "A new conjugate
gradient method with guaranteed descent and an efficient line search", SIAM J. Optim. 16 (2005), for the conditions.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]
from torch import Tensor

from probekit.heads.curvature import curvature_pair, hessian_of, stein_start, two_loop
from probekit.heads.factorisation import Differences, Problem, Spectrum

HISTORY = 10
"""Pairs of steps and gradient changes that L-BFGS remembers."""
_POOLS = ThreadpoolController()
_SINGLE_ITERATIONS, _SINGLE_ROUGH = 40, 250  # in float32; the second without a factorisation
_SINGLE_TOL = 1e-7  # from here on, float64 has the last word
_SINGLE_LEAST = 1e-9
_PER_PAIR, _PER_CHANNEL = 5, 8  # numbers that a column on streamed rows holds at once, besides its history
_ROUGH = 16  # a scaled diagonal puts gaps about ten times too low
_CACHE = 2**18  # bytes
_UNDERSHOOT, _OVERSHOOT = 0.9, 0.8  # largest slopes after a full step, as shares of the one before: Hager and Zhang's


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
        y (n,) float64 in [0, 1], or (folds, n) where the fits differ in them.
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
    together = _columns_at_a_time(problem, columns)
    if together < len(columns.fold):
        lots = torch.split(torch.arange(len(columns.fold), device=columns.fold.device), together)
        parts = [
            solve(
                problem,
                Columns(columns.label, columns.weight, columns.fold[lot], columns.strength[lot]),
                tol=tol,
                max_iter=max_iter,
                start=None if start is None else start[lot],
            )
            for lot in lots
        ]
        return Solution(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Solution)))
    if problem.fast is None:
        return _descend(problem.exact, problem.spectrum.to(torch.float64), columns, start, tol, max_iter)
    spectrum = problem.spectrum.to(torch.float32)
    judged = tol < _SINGLE_TOL
    near = max(tol / 2, _SINGLE_LEAST) if judged else tol
    most = _SINGLE_ROUGH if spectrum.rough else _SINGLE_ITERATIONS
    rough = _descend(problem.fast, spectrum, columns, start, near, min(max_iter, most))
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


def column_bytes(n: int, d: int, single: int = 8) -> int:
    """Bytes of the state of a column on n streamed rows of d channels, in numbers of `single` bytes."""
    return single * (_PER_PAIR * n + (2 * HISTORY + _PER_CHANNEL) * d)


def _columns_at_a_time(problem: Problem, columns: Columns) -> int:
    """How many columns' state fits into the memory that streamed rows leave; one at least."""
    if not problem.exact.streamed:
        return len(columns.fold)
    n, r = problem.exact.rows.shape
    single = 4 if problem.fast is not None else 8
    state = column_bytes(n, r, single)
    kept = 2 * single * n * len(columns.fold)  # margins of all columns, twice while those of turns are put together
    return max(1, int(min((problem.memory - kept) / state, len(columns.fold))))


def _descend(
    data: Differences, spectrum: Spectrum, columns: Columns, start: Tensor | None, tol: float, max_iter: int
) -> Solution:
    """Preconditioned L-BFGS in the precision of the spectrum; a column leaves when it has converged."""
    dtype = spectrum.diagonal.dtype
    if spectrum.rough:
        tol = max(tol / _ROUGH, _SINGLE_LEAST if dtype == torch.float32 else 0.0)
    total = columns.weight.sum(1, keepdim=True)
    by_fold = (columns.weight / total).to(dtype)
    label = columns.label.to(dtype)
    apart = label.dim() == 2
    lam = (1 / (columns.strength[:, None] * total[columns.fold])).to(dtype)
    if start is None:
        w = stein_start(data.gradient(by_fold * (label - 0.5)), spectrum, columns.fold, lam)
    else:
        w = start.to(dtype)
    weight = by_fold[columns.fold]
    label = label[columns.fold] if apart else label[None]
    at = _evaluate(data, w, label, weight, lam)

    count = len(w)
    result = Solution(
        w=torch.empty_like(w, dtype=torch.float64),
        margins=torch.empty_like(at.margins),
        n_iter=torch.zeros(count, dtype=torch.int64, device=w.device),
        gap=torch.empty_like(w[:, 0], dtype=torch.float64),
        gradient_norm=torch.empty_like(w[:, 0], dtype=torch.float64),
        converged=torch.zeros(count, dtype=torch.bool, device=w.device),
    )
    active = torch.arange(count, device=w.device)
    again = torch.zeros_like(lam)  # lengths of steps that were too long; 0 elsewhere
    direction = torch.zeros_like(w)
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    for iteration in range(max_iter + 1):
        hessian = hessian_of(spectrum, w, at.moments, lam, history)
        direction = torch.where(again > 0, again * direction, -two_loop(at.gradient, hessian, history))
        slope = (direction * at.gradient).sum(1)
        done = (slope.abs() / 2 <= tol) & (direction.norm(dim=1) <= 2 * math.sqrt(tol) * w.norm(dim=1))
        done &= again[:, 0] == 0
        leaves = done | (iteration == max_iter)
        if leaves.any():
            places = active[leaves]
            result.w[places], result.margins[places] = w[leaves].double(), at.margins[leaves]
            result.n_iter[places], result.gap[places] = iteration, slope[leaves].abs().double() / 2
            result.gradient_norm[places] = at.gradient[leaves].double().norm(dim=1)
            result.converged[places] = done[leaves]
            stays = ~leaves
            if not stays.any():
                break
            at = _Point(at.margins[stays], at.gradient[stays], at.moments[stays])
            active, w, weight, lam = active[stays], w[stays], weight[stays], lam[stays]
            label = label[stays] if apart else label
            hessian, direction, slope = hessian.of(stays), direction[stays], slope[stays]
            history = [(s[stays], y[stays], rho[stays]) for s, y, rho in history]
            again = again[stays]
        uphill = slope >= 0
        if uphill.any():
            direction[uphill] = -two_loop(at.gradient[uphill], hessian.of(uphill), [])
            slope = (direction * at.gradient).sum(1)
        if data.streamed:
            again, after = _one_pass_step(data, w, direction, at, slope, label, weight, lam)
            step = torch.where(again > 0, 0.0, direction)
        else:
            step, after = _exact_step(data, w, direction, at, slope, label, weight, lam)
        history.append(curvature_pair(step, after.gradient - at.gradient))
        history = history[-HISTORY:]
        w, at = w + step, after
    return result


@dataclass(frozen=True)
class _Point:
    """Margins z (columns, n), gradient of f (columns, r) and `_moments` (columns, 3) at some w."""

    margins: Tensor
    gradient: Tensor
    moments: Tensor


def _evaluate(data: Differences, w: Tensor, label: Tensor, weight: Tensor, lam: Tensor) -> _Point:
    moments = lam.new_zeros(len(lam), 3)

    def residual(margins: Tensor, pairs: slice) -> Tensor:
        found = torch.empty_like(margins)
        for some in _in_cache(margins):
            z, v = margins[some], weight[some, pairs]
            chance = z.sigmoid()
            moments[some] += _moments(z, chance, v)
            torch.sub(chance, _of(label, some)[:, pairs], out=found[some]).mul_(v)
        return found

    margins, gradient = data.margins_and_gradient(w, residual)
    return _Point(margins, gradient + lam * w, moments)


def _in_cache(margins: Tensor) -> Iterator[slice]:
    """Yield columns of margins (columns, n) so few that several arrays of their size stay in the processor's cache."""
    count, n = margins.shape
    together = max(1, _CACHE // (n * margins.element_size())) if margins.device.type == "cpu" else count
    for start in range(0, count, together):
        yield slice(start, start + together)


def _of(label: Tensor, some: slice) -> Tensor:
    """Labels (columns, n) of some columns; (1, n) where all have the same."""
    return label[some] if len(label) > 1 else label


def _moments(margins: Tensor, chance: Tensor, weight: Tensor) -> Tensor:
    """Sum v sigmoid'(z), v sigmoid'(z) z^2 and v z^2 over pairs: (columns, 3)."""
    curvature, squares = (1 - chance).mul_(chance).mul_(weight), margins.square()
    sums = curvature.sum(1), torch.linalg.vecdot(curvature, squares), torch.linalg.vecdot(weight, squares)
    return torch.stack(sums, dim=1)


def _exact_step(
    data: Differences,
    w: Tensor,
    direction: Tensor,
    at: _Point,
    slope: Tensor,
    label: Tensor,
    weight: Tensor,
    lam: Tensor,
) -> tuple[Tensor, _Point]:
    """Go to the minimum along the directions: steps (columns, r), and what is there."""
    margins = data.margins(direction)
    residual, t, moments = torch.empty_like(margins), torch.empty_like(lam), lam.new_empty(len(lam), 3)
    for some in _in_cache(margins):
        before, ahead, wanted, v = at.margins[some], margins[some], _of(label, some), weight[some]
        t[some], chance = _line_search(w[some], direction[some], before, ahead, slope[some], wanted, v, lam[some])
        torch.addcmul(before, t[some], ahead, out=ahead)
        moments[some] = _moments(ahead, chance, v)
        torch.sub(chance, wanted, out=residual[some]).mul_(v)
    step = t * direction
    return step, _Point(margins, data.gradient(residual) + lam * (w + step), moments)


def _one_pass_step(
    data: Differences,
    w: Tensor,
    direction: Tensor,
    at: _Point,
    slope: Tensor,
    label: Tensor,
    weight: Tensor,
    lam: Tensor,
) -> tuple[Tensor, _Point]:
    """Take the whole directions where the slope there allows it; elsewhere stay, and say how far to go (columns, 1)."""
    after = _evaluate(data, w + direction, label, weight, lam)
    slope_after = (direction * after.gradient).sum(1)
    t = torch.zeros_like(lam)
    wrong = torch.nonzero((slope_after < _UNDERSHOOT * slope) | (slope_after > -_OVERSHOOT * slope))[:, 0]
    for column in wrong.tolist():  # one at a time, to save memory
        one = slice(column, column + 1)
        ahead = after.margins[one] - at.margins[one]
        found = _line_search(
            w[one], direction[one], at.margins[one], ahead, slope[one], _of(label, one), weight[one], lam[one]
        )
        t[one] = found[0]
    after.margins[wrong], after.gradient[wrong] = at.margins[wrong], at.gradient[wrong]
    after.moments[wrong] = at.moments[wrong]
    return t, after


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
