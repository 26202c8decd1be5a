"""Both sides of `probekit bench sweep`, and the references that say how right ours is.

D (n, d) differences, Z scaled by their root mean squares, y (n,) labels in {0, 1}, X (2 n, d) rows.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV

from probekit._types import FloatArray, IntArray
from probekit.bench.sweep_cases import Case
from probekit.bench.sweep_search import run_search
from probekit.config import STRENGTHS
from probekit.heads import BradleyTerryClassifierCV, BradleyTerryMLP, solvers
from probekit.heads.linear import INNER_TOL, _folds
from probekit.heads.mlp import fit_together

FOLDS = 5
EPOCHS = 6  # of the MLP cases that compare throughput
LONG_EPOCHS = 20
_RAW_ITERATIONS = 1000


@dataclass(frozen=True)
class Run:
    """One round of a case.

    Attributes
    ----------
    ours, theirs
        CPU seconds: of the mean of two runs before and after theirs, and of theirs; for the same work.
    loss_gap, accuracy_gap, coefficient_error
        Of linear heads: largest excess of our mean penalised log-loss over the optimum, among fold fits and refit;
        difference of mean cross-validated accuracies at our C; relative distance of our refit from the optimum.
        ``accuracy_gap`` of MLP heads: test accuracy of theirs minus ours. None where it does not apply.
    rank_correlation, regret
        Of a search, see `probekit.bench.sweep_search.run_search`.
    """

    ours: float
    theirs: float
    loss_gap: float | None = None
    accuracy_gap: float | None = None
    coefficient_error: float | None = None
    rank_correlation: float | None = None
    regret: float | None = None


def synthetic_differences(n: int, d: int, *, seed: int) -> tuple[FloatArray, FloatArray]:
    """Differences (n, d) float32 and labels (n,) like those of a layer.

    The spectrum is a power law of condition 1e3 after standardising, channels have scales over decades and one of a
    hundred is massive, which makes 1e9 to 1e10 before.
    """
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((n, d), dtype=np.float32)
    z = latent @ rng.standard_normal(d, dtype=np.float32)
    label = (rng.random(n) < expit(1.3 * z / z.std())).astype(np.float64)
    spectrum = np.arange(1, d + 1) ** (-0.5 * np.log(1e3) / np.log(d))
    rotation, _ = np.linalg.qr(rng.standard_normal((d, d)))
    scale = np.exp(rng.standard_normal(d))
    scale[: max(1, d // 100)] *= 100
    D: FloatArray = latent @ (spectrum[:, None] * rotation * scale).astype(np.float32)
    return D, label


def run_case(case: Case, *, seed: int) -> Run:
    """Time both sides of a case on the features of one seed."""
    if case.rival == "set-loop":
        ours, theirs, rank, regret = run_search(case, seed=seed)
        return Run(ours, theirs, rank_correlation=rank, regret=regret)
    if case.rival == "loop":
        return _mlp_throughput(case, seed=seed)
    if case.rival == "loop-20-epochs":
        return _mlp_with_skip(case, seed=seed)
    return _linear(case, seed=seed)


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def _between(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float, Any, Any]:
    """Seconds of ours (mean of a run before and one after) and theirs, and the results."""
    before, result = _seconds(ours)
    other, rival = _seconds(theirs)
    after, _ = _seconds(ours)
    return (before + after) / 2, other, result, rival


def _linear(case: Case, *, seed: int) -> Run:
    D, label = synthetic_differences(case.n, case.d, seed=seed)
    groups = np.arange(case.n) // 2
    standardize = case.rival != "lbfgs-raw"
    head = BradleyTerryClassifierCV(Cs=STRENGTHS, cv=FOLDS, n_repeats=case.repeats, standardize=standardize)
    folds = np.stack([_folds(groups, FOLDS, repeat) for repeat in range(case.repeats)])
    held_out = (folds[:, None] == np.arange(FOLDS)[:, None]).reshape(-1, case.n)
    flip = np.random.default_rng(seed).choice([-1.0, 1.0], case.n)
    sides = np.where(flip > 0, label, 1 - label)  # without intercept, a pair turned round is the same pair

    def turned() -> FloatArray:
        Z: FloatArray = D * flip[:, None]
        if standardize:
            Z /= np.sqrt(np.mean(Z**2, axis=0))
        return Z

    def cross_validated() -> LogisticRegressionCV:
        splits = [(np.flatnonzero(~out), np.flatnonzero(out)) for out in held_out]
        options = {"fit_intercept": False, "scoring": "neg_log_loss", "max_iter": 1000}
        return LogisticRegressionCV(Cs=STRENGTHS, cv=splits, **options).fit(turned(), sides)

    def alone() -> None:
        Z, train = turned(), ~held_out[0]
        for C in STRENGTHS if standardize else (1.0,):
            options = {"solver": "newton-cholesky"} if standardize else {"max_iter": _RAW_ITERATIONS}
            LogisticRegression(C=C, fit_intercept=False, **options).fit(Z[train], sides[train])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns where it stops before it has converged
        ours, theirs, fitted, rival = _between(
            lambda: head.fit_differences(D, label, groups=groups),
            cross_validated if case.rival == "logistic-cv" else alone,
        )
    accuracy_gap = None
    if rival is None:  # they made fewer fits than the folds and the refit
        ours *= (len(STRENGTHS) if standardize else 1) / (len(STRENGTHS) * len(held_out) + 1)
    else:
        at = STRENGTHS.index(fitted.C_)
        paths = np.stack([*rival.coefs_paths_.values()] if isinstance(rival.coefs_paths_, dict) else rival.coefs_paths_)
        paths = paths.reshape(len(held_out), len(STRENGTHS), case.d)[:, at]
        Z = turned()
        right = [np.mean((Z[out] @ w > 0) == sides[out]) for out, w in zip(held_out, paths, strict=True)]
        accuracy_gap = float(abs(fitted.cv_accuracy_[:, at].mean() - np.mean(right)))
    loss_gap, error = _errors(fitted, D, label, ~held_out[0])
    return Run(ours, theirs, loss_gap, accuracy_gap, error)


def _errors(
    fitted: BradleyTerryClassifierCV, D: FloatArray, label: FloatArray, train: NDArray[np.bool_]
) -> tuple[float, float]:
    """Largest excess of our losses, of the refit and of the fits of one fold, and the refit's coefficient error."""
    Z = D.astype(np.float64)
    rms = np.sqrt(np.mean(Z**2, axis=0)) if fitted.standardize else np.ones(len(Z.T))
    Z /= rms
    weight = train.astype(np.float64)
    strengths = np.array([STRENGTHS[0], fitted.C_, STRENGTHS[-1]])
    with solvers.one_thread():
        problem, columns = fitted._prepare(D, label, weight[None], np.ones_like(weight), strengths)
        inner = solvers.solve(problem, columns, tol=INNER_TOL, max_iter=fitted.max_iter)
    found = [(train, C, problem.coefficients(w).numpy() * rms) for C, w in zip(strengths, inner.w, strict=True)]
    found.append((np.ones_like(train), fitted.C_, fitted.coef_ * rms))
    gaps, w = [], fitted.coef_
    for pairs, C, ours in found:
        w = optimum(Z[pairs], label[pairs], C, start=ours)
        gaps.append(_objective(Z[pairs], label[pairs], C, ours) - _objective(Z[pairs], label[pairs], C, w))
    return max(gaps), float(np.linalg.norm(found[-1][2] - w) / np.linalg.norm(w))


def _objective(Z: FloatArray, label: FloatArray, C: float, w: FloatArray) -> float:
    margins = Z @ w
    return float(np.mean(np.logaddexp(0, margins) - label * margins) + w @ w / (2 * C * len(Z)))


def optimum(Z: FloatArray, label: FloatArray, C: float, *, start: FloatArray) -> FloatArray:
    """Minimum (d,) of the penalised mean log-loss by Newton's method in float64, down to rounding.

    The Hessian is renewed in every eighth step only: near the optimum it hardly changes.
    """
    w, n = start, len(Z)
    for iteration in range(200):
        chance = expit(Z @ w)
        if iteration % 8 == 0:
            curved = Z * np.sqrt(chance * (1 - chance))[:, None]
            factor = cho_factor(curved.T @ curved / n + np.eye(len(w)) / (C * n))
        step = cho_solve(factor, Z.T @ (chance - label) / n + w / (C * n))
        w = w - step
        if np.linalg.norm(step) <= 1e-11 * np.linalg.norm(w):
            break
    return w


def _rows(case: Case, *, seed: int) -> tuple[FloatArray, IntArray, FloatArray, IntArray]:
    """Rows X (2 n, d), pairs (n, 2), labels (n,) and groups (n,)."""
    D, label = synthetic_differences(case.n, case.d, seed=seed)
    second = np.random.default_rng(seed + 1).standard_normal(D.shape, dtype=np.float32) * D.std(axis=0) / 2
    pairs = np.arange(2 * case.n).reshape(2, case.n).T
    return np.concatenate([second + D, second]), pairs, label, np.arange(case.n) // 2


def _mlp_throughput(case: Case, *, seed: int) -> Run:
    X, pairs, label, groups = _rows(case, seed=seed)
    heads = [
        BradleyTerryMLP(hidden=(case.hidden,), seed=k, max_epochs=EPOCHS, patience=EPOCHS) for k in range(case.heads)
    ]
    held_out = heads[0]._held_out(groups)

    def loop() -> None:
        for head in heads:
            _plain_loop(head, X, pairs, label, held_out)

    ours, theirs, *_ = _between(lambda: fit_together(heads, X, pairs, label, groups=groups), loop)
    return Run(ours, theirs)


def _mlp_with_skip(case: Case, *, seed: int) -> Run:
    X, pairs, label, groups = _rows(case, seed=seed)
    few = case.n // 5
    train, test = slice(few, None), slice(few)
    skipped = BradleyTerryMLP(hidden=(case.hidden,), linear_skip=True, max_epochs=2)
    plain = BradleyTerryMLP(hidden=(case.hidden,), max_epochs=LONG_EPOCHS)
    held_out = plain._held_out(groups[train])
    ours, theirs, head, network = _between(
        lambda: skipped.fit(X, pairs[train], label[train], groups=groups[train]),
        lambda: _plain_loop(plain, X, pairs[train], label[train], held_out),
    )
    mine = np.mean((head.decision_function(X, pairs[test]) > 0) == label[test])
    scores = network(X)
    other = np.mean((scores[pairs[test, 0]] > scores[pairs[test, 1]]) == label[test])
    return Run(ours, theirs, accuracy_gap=float(other - mine))


def _plain_loop(
    head: BradleyTerryMLP, X: FloatArray, pairs: IntArray, label: FloatArray, held_out: NDArray[np.bool_]
) -> Callable[[FloatArray], FloatArray]:
    """Train one head as one would write it down: a module, an optimiser, batches of pairs, the best epoch kept."""
    torch.manual_seed(head.seed)
    fitted = X[np.unique(pairs[~held_out])]
    mean, spread = fitted.mean(axis=0), fitted.std(axis=0)
    rows = torch.from_numpy((X - mean) / spread)
    targets = torch.from_numpy(label).float()
    sides = torch.from_numpy(pairs)
    train, validation = (torch.from_numpy(np.flatnonzero(chosen)) for chosen in (~held_out, held_out))
    model = torch.nn.Sequential(
        torch.nn.Linear(X.shape[1], head.hidden[0]),
        torch.nn.ReLU(),
        torch.nn.Dropout(head.dropout),
        torch.nn.Linear(head.hidden[0], 1),
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=head.learning_rate, weight_decay=head.weight_decay)

    def loss(at: torch.Tensor) -> torch.Tensor:
        margins = (model(rows[sides[at, 0]]) - model(rows[sides[at, 1]]))[:, 0]
        return torch.nn.functional.binary_cross_entropy_with_logits(margins, targets[at])

    best, kept = np.inf, model.state_dict()
    for _ in range(head.max_epochs):
        model.train()
        for at in torch.split(train[torch.randperm(len(train))], head.batch_size):
            optimiser.zero_grad()
            torch.autograd.backward([loss(at)])
            optimiser.step()
        model.eval()
        with torch.no_grad():
            now = float(loss(validation))
        if now < best:
            best, kept = now, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)

    @torch.no_grad()
    def scores(X: FloatArray) -> FloatArray:
        return np.asarray(model(torch.from_numpy((X - mean) / spread))[:, 0])

    return scores
