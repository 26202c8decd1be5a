"""Numerics of the heads: exact linear Bradley-Terry fits for many columns at once, and the training of MLP heads.

Linear heads
------------
Z (n, d) holds differences of feature vectors, first minus second, scaled per channel; y (n,) = P(first preferred).
A *column* j is one fit: a fold (pair weights w_j (n,), zero outside the fold, divided by their sum) with a strength. It
minimises

    f_j(a) = sum_i w_ij [softplus(z_i.a) - y_i z_i.a] + lam_j / 2 |a|^2,        lam_j = 1 / (C_j * summed weights),

which is scikit-learn's logistic regression without intercept, divided by C times the summed weights; a soft label
counts both ways round.

One symmetric eigendecomposition serves all columns. With r = min(n, d):

    n >= d:  Z'Z / n = V e V'    rotated data T = Z V               (n, d)    coefficients V a
    n <  d:  Z Z'/ n = U e U'    rotated data T = U sqrt(n e)       (n, r)    coefficients Z' U a / sqrt(n e)

The second is exact too: a ridge solution lies in the span of the rows it was fitted on. Both turn the problem by an
orthonormal basis, which leaves |a| as it is, and in that basis the Hessian T' diag(w sigmoid') T + lam is close to the
diagonal c e + lam, where c is the mean of sigmoid' over the column's margins. So 1 / (c e + lam) preconditions L-BFGS
whatever the condition number of Z was; errors of the small eigenvalues slow it down but do not change what it converges
to. (SVD of Z would give the same basis; eigh of the Gram matrix is faster.)

The start needs no pass per column: for Gaussian z, E[sigmoid(z.a) z] = c (Z'Z / n) a (Stein), so a = b / (c e + lam)
with b = sum_i w_i (y_i - 1/2) t_i. Every fold starts from its own pairs: a start from a fit on all pairs would leak
into held-out scores.

The margins T a_j (n,) of every column are kept: the line search needs no product with T, and held-out scores come for
free.

Sources: J. Nocedal and S. Wright, Numerical Optimization (2006), algorithm 7.4; the sharing of one factorisation among
ridge strengths as in google-research/big_vision, ``evaluators/fewshot_lsr.py``.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

HISTORY = 10
"""Pairs of steps and gradient changes that L-BFGS remembers."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one CPU thread: the same bits on every machine setting, and sweeps parallelise over processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Basis:
    """Scaled differences in the eigenbasis of their Gram matrix.

    Attributes
    ----------
    rotated
        T (n, r): the differences in the basis.
    eigenvalues
        e (r,): of Z'Z / n, not negative.
    vectors
        V (d, r) when n >= d; otherwise U / sqrt(n e) (n, r).
    differences
        Z (n, d) when n < d, needed to come back to channels; otherwise None.
    """

    rotated: Tensor
    eigenvalues: Tensor
    vectors: Tensor
    differences: Tensor | None

    def coefficients(self, a: Tensor) -> Tensor:
        """Coefficients (d,) in scaled channels for a solution a (r,) in the basis."""
        if self.differences is None:
            return self.vectors @ a
        return self.differences.T @ (self.vectors @ a)


def factorise(differences: Tensor) -> Basis:
    """Eigenbasis of the smaller of the two Gram matrices of Z.

    Parameters
    ----------
    differences
        Z (n, d) float64.
    """
    n, d = differences.shape
    if n >= d:
        eigenvalues, vectors = torch.linalg.eigh(differences.T @ differences / n)
        return Basis(differences @ vectors, eigenvalues.clamp(min=0), vectors, None)
    eigenvalues, vectors = torch.linalg.eigh(differences @ differences.T / n)
    # Directions below the rounding error of the kernel are noise of the factorisation, not of the data.
    kept = eigenvalues > eigenvalues[-1] * n * torch.finfo(eigenvalues.dtype).eps
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    singular = (n * eigenvalues).sqrt()
    return Basis(vectors * singular, eigenvalues, vectors / singular, differences)


@dataclass(frozen=True)
class Solution:
    """Fitted columns.

    Attributes
    ----------
    a
        (columns, r): solutions in the basis.
    margins
        (columns, n): margins of all pairs, held-out ones included.
    n_iter
        (columns,) iterations of L-BFGS.
    gap
        (columns,) estimate of f(a) - min f: half the Newton decrement, with the preconditioner for the inverse Hessian.
    gradient_norm
        (columns,) Euclidean norm of the gradient of f.
    converged
        (columns,) whether gap and relative distance came down to their tolerances.
    """

    a: Tensor
    margins: Tensor
    n_iter: Tensor
    gap: Tensor
    gradient_norm: Tensor
    converged: Tensor


def solve(basis: Basis, label: Tensor, weight: Tensor, strength: Tensor, *, tol: float, max_iter: int) -> Solution:
    """Fit all columns together by preconditioned L-BFGS; a column leaves when it has converged.

    Parameters
    ----------
    basis
        Of the differences of all pairs.
    label
        y (n,) in [0, 1].
    weight
        (columns, n): weight of each pair in each column, zero outside its fold.
    strength
        C (columns,): as in scikit-learn, larger is weaker.
    tol
        A column has converged when its estimated gap to the optimum (a mean log-loss) is at most this, and its
        estimated distance from it at most sqrt(tol) of its length. The second matters on separable data, where the loss
        is flat.
    max_iter
        Iterations after which a column is returned as it is.
    """
    rows, e = basis.rotated, basis.eigenvalues
    total = weight.sum(1, keepdim=True)
    weight = weight / total
    lam = 1 / (strength[:, None] * total)
    a = _start(basis, label, weight, lam)
    margins = a @ rows.T
    chance = margins.sigmoid()

    columns = len(a)
    result = Solution(
        a=torch.empty_like(a),
        margins=torch.empty_like(margins),
        n_iter=torch.zeros(columns, dtype=torch.int64, device=a.device),
        gap=torch.empty_like(a[:, 0]),
        gradient_norm=torch.empty_like(a[:, 0]),
        converged=torch.zeros(columns, dtype=torch.bool, device=a.device),
    )
    active = torch.arange(columns, device=a.device)
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    step = previous = torch.empty(0)
    for iteration in range(max_iter + 1):
        gradient = (weight * (chance - label)) @ rows + lam * a
        if iteration:
            history.append(_curvature_pair(step, gradient - previous))
            history = history[-HISTORY:]
        c = (weight * chance * (1 - chance)).sum(1, keepdim=True)
        inverse = 1 / (c * e + lam)
        newton = gradient * inverse
        gap = (gradient * newton).sum(1) / 2
        done = (gap <= tol) & (newton.norm(dim=1) <= math.sqrt(tol) * a.norm(dim=1))
        leaves = done | (iteration == max_iter)
        if leaves.any():
            at = active[leaves]
            result.a[at], result.margins[at] = a[leaves], margins[leaves]
            result.n_iter[at], result.gap[at] = iteration, gap[leaves]
            result.gradient_norm[at] = gradient[leaves].norm(dim=1)
            result.converged[at] = done[leaves]
            stays = ~leaves
            if not stays.any():
                break
            active, a, margins, chance = active[stays], a[stays], margins[stays], chance[stays]
            weight, lam, gradient, inverse, newton = (x[stays] for x in (weight, lam, gradient, inverse, newton))
            history = [(s[stays], y[stays], rho[stays]) for s, y, rho in history]
        direction = -_two_loop(gradient, inverse, history)
        uphill = (direction * gradient).sum(1) >= 0
        direction[uphill] = -newton[uphill]
        ahead = direction @ rows.T
        t, chance = _line_search(a, direction, margins, ahead, (direction * gradient).sum(1), label, weight, lam)
        step, previous = t * direction, gradient
        a = a + step
        margins = margins + t * ahead
    return result


def _start(basis: Basis, label: Tensor, weight: Tensor, lam: Tensor) -> Tensor:
    """Solutions b / (c e + lam) (columns, r) for Gaussian differences, c found by three rounds of its fixed point."""
    e = basis.eigenvalues
    b = (weight * (label - 0.5)) @ basis.rotated
    c = torch.full_like(lam, 0.25)
    for _ in range(3):
        a = b / (c * e + lam)
        variance = (a.square() * e).sum(1, keepdim=True)
        # Mean of sigmoid' over N(0, variance) by the probit approximation: good enough for a start.
        c = 0.25 / (1 + math.pi / 8 * variance).sqrt()
    return b / (c * e + lam)


def _curvature_pair(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step, change of gradient and 1 / s.y (columns, 1); 0 switches a pair off where rounding ate its curvature."""
    product = (s * y).sum(1, keepdim=True)
    safe = product > torch.finfo(s.dtype).eps * s.norm(dim=1, keepdim=True) * y.norm(dim=1, keepdim=True)
    return s, y, torch.where(safe, 1 / product, torch.zeros_like(product))


def _two_loop(gradient: Tensor, inverse: Tensor, history: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Inverse Hessian estimate times the gradient (columns, r); ``inverse`` is the diagonal to start from."""
    q = gradient
    alphas = []
    for s, y, rho in reversed(history):
        alpha = rho * (s * q).sum(1, keepdim=True)
        q = q - alpha * y
        alphas.append(alpha)
    q = inverse * q
    for (s, y, rho), alpha in zip(history, reversed(alphas), strict=True):
        q = q + (alpha - rho * (y * q).sum(1, keepdim=True)) * s
    return q


def _line_search(
    a: Tensor,
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
    ridge_slope = lam[:, 0] * (a * direction).sum(1)
    ridge_curvature = lam[:, 0] * direction.square().sum(1)
    t, low, high = torch.ones_like(slope), torch.zeros_like(slope), torch.full_like(slope, torch.inf)
    for _ in range(30):
        chance = (margins + t[:, None] * ahead).sigmoid()
        now = (weight * (chance - label) * ahead).sum(1) + ridge_slope + t * ridge_curvature
        done = now.abs() <= 0.1 * slope.abs()
        if done.all():
            break
        curvature = (weight * chance * (1 - chance) * ahead.square()).sum(1) + ridge_curvature
        low, high = torch.where(now < 0, t, low), torch.where(now < 0, high, t)
        newton = t - now / curvature
        # Far out the loss is flat and Newton's step huge: grow at most fourfold; outside the bracket, halve it.
        newton = torch.where(high.isinf(), newton.clamp(max=4 * t), newton)
        inside = (newton > low) & (newton < high)
        t = torch.where(done, t, torch.where(inside, newton, (low + high) / 2))
    else:
        chance = (margins + t[:, None] * ahead).sigmoid()
    return t[:, None], chance


Layers = list[tuple[Tensor, Tensor]]
"""Weight (out, in) and bias (out,) of each layer; the last bias is empty, as it would cancel in every margin."""


def bradley_terry_loss(margins: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Weighted log-loss (n,) of margins (n,): -log P of the preferred side, a soft label counting both ways round."""
    return weight * (torch.nn.functional.softplus(margins) - label * margins)


@dataclass(frozen=True)
class PairBatch:
    """Pairs to train or validate on.

    Attributes
    ----------
    pairs
        (n, 2) row numbers of the first and the second.
    label
        (n,) P(first preferred).
    weight
        (n,) of mean 1.
    """

    pairs: Tensor
    label: Tensor
    weight: Tensor


@dataclass(frozen=True, kw_only=True)
class MLPSettings:
    """How an MLP head is built and trained; the fields are `probekit.heads.BradleyTerryMLP`'s."""

    hidden: Sequence[int]
    dropout: float
    learning_rate: float
    weight_decay: float
    max_epochs: int
    batch_size: int
    patience: int
    seed: int


@dataclass(frozen=True)
class MLPFit:
    """A trained head: the parameters of the best epoch, and how the training went."""

    layers: Layers
    epochs: int
    best_epoch: int
    best_validation_loss: float
    stopped: bool


def mlp_scores(
    layers: Layers, rows: Tensor, *, dropout: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Scores (m,) of rows (m, d): linear layers with ReLU between them, and dropout after each ReLU when training."""
    h = rows
    for weight, bias in layers[:-1]:
        h = torch.nn.functional.linear(h, weight, bias).relu()
        if dropout:
            kept = torch.empty_like(h).bernoulli_(1 - dropout, generator=generator)
            h = h * kept / (1 - dropout)
    return (h @ layers[-1][0].T)[:, 0]


def train_mlp(
    rows: Tensor, skip: Tensor | None, train: PairBatch, validation: PairBatch, settings: MLPSettings
) -> MLPFit:
    """Train one head with AdamW until the validation loss has not improved for ``patience`` epochs.

    Parameters
    ----------
    rows
        (m, d) float32, standardised.
    skip
        (m,) scores of a linear head that are added to the MLP's, whose last layer then starts at zero; or None.
    train, validation
        Pairs of the rows; no group lies in both.
    settings
        Widths, optimiser and seed. All randomness comes from generators of this seed.
    """
    # Initial values and the order of pairs come from the CPU, so they are the same on every device.
    order = torch.Generator().manual_seed(settings.seed)
    noise = torch.Generator(rows.device).manual_seed(settings.seed)
    layers = _initial_layers(rows.shape[1], settings.hidden, order, zero_last=skip is not None)
    layers = [(w.to(rows.device).requires_grad_(), b.to(rows.device).requires_grad_()) for w, b in layers]
    parameters = [parameter for layer in layers for parameter in layer if parameter.numel()]
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best_loss, best_epoch, best = _mean_loss(layers, rows, skip, validation), 0, _copy(layers)
    epoch = 0
    for epoch in range(1, settings.max_epochs + 1):
        for chosen in torch.split(torch.randperm(len(train.label), generator=order), settings.batch_size):
            at = chosen.to(rows.device)
            pairs = train.pairs[at]
            scores = mlp_scores(layers, rows[pairs.reshape(-1)], dropout=settings.dropout, generator=noise)
            margins = _margins(scores.reshape(-1, 2), pairs, skip)
            loss = bradley_terry_loss(margins, train.label[at], train.weight[at]).mean()
            optimiser.zero_grad()
            torch.autograd.backward([loss])
            optimiser.step()
        loss_now = _mean_loss(layers, rows, skip, validation)
        if loss_now < best_loss:
            best_loss, best_epoch, best = loss_now, epoch, _copy(layers)
        elif epoch - best_epoch >= settings.patience:
            break
    return MLPFit(best, epoch, best_epoch, best_loss, epoch - best_epoch >= settings.patience)


def _initial_layers(d: int, hidden: Sequence[int], generator: torch.Generator, *, zero_last: bool) -> Layers:
    """PyTorch's default for linear layers, uniform within 1 / sqrt(inputs), drawn from the generator."""
    widths = [d, *hidden]
    layers = []
    for inputs, outputs in zip(widths, [*hidden, 1], strict=True):
        bound = inputs**-0.5
        weight = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
        layers.append((weight, torch.empty(outputs).uniform_(-bound, bound, generator=generator)))
    last = layers[-1][0]
    layers[-1] = (torch.zeros_like(last) if zero_last else last, torch.empty(0))
    return layers


def _margins(scores: Tensor, pairs: Tensor, skip: Tensor | None) -> Tensor:
    """Margins (n,) from the two scores (n, 2) of each pair."""
    if skip is not None:
        scores = scores + skip[pairs]
    return scores[:, 0] - scores[:, 1]


@torch.no_grad()
def _mean_loss(layers: Layers, rows: Tensor, skip: Tensor | None, batch: PairBatch) -> float:
    total = 0.0
    for at in torch.split(torch.arange(len(batch.label), device=rows.device), 4096):
        pairs = batch.pairs[at]
        margins = _margins(mlp_scores(layers, rows[pairs.reshape(-1)]).reshape(-1, 2), pairs, skip)
        total += float(bradley_terry_loss(margins, batch.label[at], batch.weight[at]).double().sum())
    return total / len(batch.label)


def _copy(layers: Layers) -> Layers:
    return [(weight.detach().clone(), bias.detach().clone()) for weight, bias in layers]
