"""What the best of many layers says: which layers may be the best, and how good the choice of the best is.

L heads on the same pairs have accuracies a_l; r_gl = y_gl - a_l n_g are their groups' residuals (see
`probekit.stats.intervals`). The lead of head k over head l and its standard error are

    d_kl = a_k - a_l,    se_kl^2 = G / (G - 1) sum_g (r_gk - r_gl)^2 / (sum n)^2.

**Plateau.** If head l is truly one of the best, every true lead over it is at most zero, so that T_l = max_k d_kl /
se_kl is at most as large as the largest of the centred t*_kl = (d*_kl - d_kl) / se*_kl, whose 95 % quantile comes from
the resamples (lead and standard error computed anew in each). Head l is in the set if T_l is no larger, which is to say
if p_l = (1 + #{resamples with max_k t*_kl >= T_l}) / (B + 1) > 0.05: a truly best head is missed in at most 5 % of
samples. This holds for each of them: where many heads are equally good, all of them together are in the set less often
(in simulation with 24 equal heads each is in it in 95 %, all at once in 45 %; of three best ones all in 98 %).
A head that is in the set is *not shown to be worse*; it is not shown to be equal.

**At most so far behind the best.** For each k, d_kl + q_kl se_kl (q_kl the 95 % quantile of -t*_kl) is an upper limit
of the true lead of k over l. The largest of them over k is one of the distance of l to the best head, whichever that
is: the head that is truly best is among the k, and its limit alone fails in 5 % of samples (intersection-union test; no
correction is due). Head l is *proven within one point* if that limit is at most 0.01: a one-sided equivalence test, as
nothing is better than the best.

Where fewer than ten groups tell two heads apart, se_kl is Bonett and Price's, in the resamples as well, and q_kl the
normal quantile.

With refits on parts of the training groups (see `probekit.stats.training`) the same is said of layers instead of fitted
heads: each resample shifts all accuracies together by a normal draw with the refits' covariance, and the variance of
d_kl from training samples is added to se_kl^2 and se*_kl^2.

**Best of many.** The best of L accuracies on the pairs that chose it is too high. In each resample the best head is
chosen on the resampled groups and judged on the groups that were not drawn; the mean over the resamples estimates the
accuracy of *choosing the best of these heads*. It is slightly too low rather than too high, as a resample holds about
63 % of the groups to choose by (24 equal heads at 200 groups: 3.3 points too high before, 0.0 after).

Sources: J. Hsu, Multiple Comparisons (1996), chapter 4; P. Hansen, A. Lunde and J. Nason, "The model confidence set",
Econometrica 79 (2011); R. Berger, "Multiparameter hypothesis testing and acceptance sampling", Technometrics 24 (1982);
I. Tsamardinos, E. Greasidou and G. Borboudakis, "Bootstrapping the out-of-sample predictions for efficient and accurate
cross-validation", Machine Learning 107 (2018).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, ndtri

from probekit._types import FloatArray
from probekit.stats.comparisons import bonett_price
from probekit.stats.intervals import FEW, Scored, accuracy_interval, resamples
from probekit.stats.training import training_covariance

POINT = 0.01
"""One point of accuracy: heads proven to be closer count as equally good."""


@dataclass(frozen=True)
class Plateau:
    """Heads, or layers, that may be the best, and how far behind the best each can be.

    Attributes
    ----------
    estimate
        (L,) accuracies.
    best
        Index of the largest.
    inside
        (L,) whether a head is in the set: not shown to be worse than any other.
    p
        (L,) p of "this head is one of the best": it is in the 95 % set where p > 0.05.
    behind
        (L,) upper limit of the distance to the truly best head.
    within_point
        (L,) whether that limit is at most one point: proven equally good, for practical purposes.
    n_pairs, n_groups, effective_groups
        As in `Interval`.
    """

    estimate: FloatArray
    best: int
    inside: NDArray[np.bool_]
    p: FloatArray
    behind: FloatArray
    within_point: NDArray[np.bool_]
    n_pairs: int
    n_groups: int
    effective_groups: float


@dataclass(frozen=True)
class BestOf:
    """Accuracy of choosing the best of many heads.

    Attributes
    ----------
    best
        Index of the best on all pairs.
    naive
        Its accuracy on the pairs that chose it.
    corrected, low, high
        Accuracy of the choice on other pairs, with limits.
    frequency
        (L,) share of the resamples that choose each head.
    tried
        Heads that there were to choose from.
    n_pairs, n_groups, effective_groups
        As in `Interval`.
    """

    best: int
    naive: float
    corrected: float
    low: float
    high: float
    frequency: FloatArray
    tried: int
    n_pairs: int
    n_groups: int
    effective_groups: float


def plateau_set(
    correct_by_layer: FloatArray,
    groups: NDArray[Any],
    *,
    refits: FloatArray | None = None,
    weights: FloatArray | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Plateau:
    """Find the heads that may be the best, and how far behind the best each can be.

    Parameters
    ----------
    correct_by_layer
        (L, n) 1 right, 0 wrong; NaN, in the same places for every head, is left out.
    refits
        (R, L, n) right or wrong on these pairs of heads refitted on random halves of the training groups, as in
        `training_covariance`. With them the statement is about layers, without them about these fitted heads.
    groups, weights, n_boot, level, seed
        As in `accuracy_interval`.

    Raises
    ------
    ValueError
        As in `accuracy_interval`, if heads leave out different pairs, or if there are no two refits.
    """
    scored = Scored.of(np.asarray(correct_by_layer), groups, weights)
    size, total, n_layers = scored.size, scored.size.sum(), scored.right.shape[1]
    estimate = scored.right.sum(axis=0) / total
    residual = scored.right - estimate * size[:, None]
    training: FloatArray = np.zeros((n_layers, n_layers))
    if refits is not None:
        if np.shape(refits)[1:] != np.shape(correct_by_layer):
            message = f"refits have shape {np.shape(refits)}; allowed: (refits, *{np.shape(correct_by_layer)})"
            raise ValueError(message)
        training = training_covariance(refits, groups, weights=weights)[0]
    values, vectors = np.linalg.eigh(training)
    draws = np.random.default_rng([seed, len(size), 1]).normal(size=(n_boot, n_layers))
    shocks = draws @ (vectors * np.sqrt(np.maximum(values, 0))).T
    above, below = np.triu_indices(n_layers, 1)  # pairs of heads k < l
    gain = estimate[above] - estimate[below]
    t, se, few = _centred_leads(scored, residual, training, shocks, n_boot=n_boot, seed=seed)
    observed, largest = np.zeros(n_layers), np.zeros((n_boot, n_layers))
    behind = np.zeros(n_layers)
    low, high = np.quantile(t, [1 - level, level], axis=0) if len(se) else (se, se)
    low[few], high[few] = -ndtri(level), ndtri(level)  # resamples cannot show what few groups missed
    lead = np.divide(gain, se, out=np.zeros_like(gain), where=se > 0)
    for head in range(n_layers):
        under, over = below == head, above == head  # where others lead it, and where it leads others
        if n_layers > 1:
            largest[:, head] = np.maximum(
                t[:, under].max(axis=1, initial=-np.inf), (-t[:, over]).max(axis=1, initial=-np.inf)
            )
        observed[head] = max(lead[under].max(initial=0), (-lead[over]).max(initial=0))
        reach = (gain - low * se)[under].max(initial=0), (high * se - gain)[over].max(initial=0)
        behind[head] = max(reach)
    p = (1 + (largest >= observed).sum(axis=0)) / (n_boot + 1)
    return Plateau(
        estimate,
        int(estimate.argmax()),
        p > 1 - level,
        p,
        behind,
        behind <= POINT,
        scored.n_pairs,
        len(size),
        scored.effective_groups,
    )


def _centred_leads(
    scored: Scored, residual: FloatArray, training: FloatArray, shocks: FloatArray, *, n_boot: int, seed: int
) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """T* (B, P) of the leads of head k over head l for the P pairs k < l, their standard errors, and which few tell."""
    right, size = scored.right, scored.size
    n_groups, n_layers = residual.shape
    scale = n_groups / max(n_groups - 1, 1)
    n = size[:, None]
    # Sums over a resample that heads have alone; those that pairs of heads have are the squares below.
    alone = np.hstack([residual, residual * n, n, n**2])
    drawn, errors, scarce, start = [], [], [], 0
    for counts in _blocks(resamples(n_groups, n_boot, seed)):
        sums = counts @ alone
        first, mixed, total, large = np.split(sums, [n_layers, 2 * n_layers, 2 * n_layers + 1], axis=1)
        shift = first / total
        shock = shocks[start : start + len(counts)]
        start += len(counts)
        block = []
        for k in range(n_layers - 1):
            rest = slice(k + 1, n_layers)
            refitted = training[k, k] + np.diag(training)[rest] - 2 * training[k, rest]
            squares = np.square(residual[:, [k]] - residual[:, rest])
            apart = shift[:, [k]] - shift[:, rest]
            spread = counts @ squares - 2 * apart * (mixed[:, [k]] - mixed[:, rest]) + apart**2 * large
            spread = scale * np.maximum(spread, 0) / total**2
            gain = right[:, [k]] - right[:, rest]
            variance = scale * squares.sum(axis=0) / size.sum() ** 2
            few = (np.abs(gain) > 1e-12 * n).sum(axis=0) < FEW
            for column in np.flatnonzero(few):
                variance[column] = spread[:, column] = bonett_price(gain[:, column], size)[1] ** 2
            spread += refitted
            apart += shock[:, [k]] - shock[:, rest]
            block.append(np.divide(apart, np.sqrt(spread), out=np.zeros_like(apart), where=spread > 1e-18))
            if start == len(counts):
                errors.append(np.sqrt(variance + refitted))
                scarce.append(few)
        drawn.append(np.hstack(block) if block else np.zeros((len(counts), 0)))
    none = [np.zeros(0)]
    return np.concatenate(drawn), np.concatenate(errors or none), np.concatenate(scarce or none).astype(bool)


def _blocks(chunks: Iterator[FloatArray], cells: int = 5_000_000) -> Iterator[FloatArray]:
    """Join chunks of counts, as the squares of pairs of heads are made anew for each."""
    held: list[FloatArray] = []
    for chunk in chunks:
        held.append(chunk)
        if sum(part.size for part in held) >= cells:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)


def best_of_many(
    correct_by_layer: FloatArray,
    groups: NDArray[Any],
    *,
    weights: FloatArray | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> BestOf:
    """Accuracy of choosing the best of L heads on these pairs, without what the choice itself adds.

    The limits are those of the chosen head, moved on the logit scale by as much as the estimate.

    Parameters
    ----------
    correct_by_layer
        (L, n) 1 right, 0 wrong; NaN, in the same places for every head, is left out.
    groups, weights, n_boot, level, seed
        As in `accuracy_interval`.

    Raises
    ------
    ValueError
        As in `accuracy_interval`, if heads leave out different pairs, or if all pairs are of one group.
    """
    correct_by_layer = np.asarray(correct_by_layer)
    scored = Scored.of(correct_by_layer, groups, weights)
    right, size = scored.right, scored.size
    if len(size) < 2:
        message = "all pairs are of one group; choosing on some groups and judging on others needs at least two"
        raise ValueError(message)
    estimate = right.sum(axis=0) / size.sum()
    best = int(estimate.argmax())
    chosen, judged = [], []
    for counts in resamples(len(size), n_boot, seed):
        left = (counts == 0).astype(np.float64)
        some = left.any(axis=1)
        choice = (counts[some] @ right).argmax(axis=1)  # all heads share the resample's number of pairs
        held = left[some]
        judged.append((held @ right)[np.arange(len(choice)), choice] / (held @ size))
        chosen.append(choice)
    choices = np.concatenate(chosen)
    corrected = float(np.concatenate(judged).mean())
    naive = accuracy_interval(correct_by_layer[best], groups, weights=weights, n_boot=n_boot, level=level, seed=seed)
    # Where everything is right or wrong there is nothing to move.
    moved = 0.0 if not 0 < naive.estimate < 1 or not 0 < corrected < 1 else logit(corrected) - logit(naive.estimate)
    return BestOf(
        best,
        naive.estimate,
        corrected,
        float(expit(logit(naive.low) + moved)),
        float(expit(logit(naive.high) + moved)),
        np.bincount(choices, minlength=len(estimate)) / len(choices),
        len(estimate),
        scored.n_pairs,
        len(size),
        scored.effective_groups,
    )
