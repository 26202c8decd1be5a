"""Intervals of accuracies whose pairs come in groups: studentised group bootstrap on the logit scale.

G groups; group g holds (weighted) n_g pairs, of which y_g are right. The accuracy is the ratio a = sum y / sum n. To
first order

    a - (its expectation) = sum_g r_g / sum n,    r_g = y_g - a n_g,    se(a)^2 = G / (G - 1) sum_g r_g^2 / (sum n)^2

(cluster linearisation). On the logit scale theta = log(a / (1 - a)), se(theta) = se(a) / (a (1 - a)).

A resample draws G groups with replacement; k_g counts group g. Accuracy *and* standard error are computed anew in each,
and t = (theta_b - theta) / se_b collects how far off they are in units of what each resample believes of its own
accuracy. Its quantiles replace those of the normal distribution (bootstrap-t). All sums over a resample are linear in
k, so that a matrix product of the counts (resamples, G) with a few columns (G,) gives them all: with d = a_b - a =
(k.r) / (k.n),

    sum_g k_g (y_g - a_b n_g)^2 = k.r^2 - 2 d k.(r n) + d^2 k.n^2.

Where fewer than ten groups hold the rarer outcome (nearly everything right, or wrong) or there are fewer than ten
groups, resamples cannot show what was missed; there the interval is Korn and Graubard's: exact binomial limits
(Clopper-Pearson) at the effective number of pairs a (1 - a) / se(a)^2, reduced for the degrees of freedom of se(a).

Sources: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 12; E. Korn and B. Graubard,
"Confidence intervals for proportions with small expected number of positive counts estimated from survey data", Survey
Methodology 24 (1998).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, expit, logit, stdtrit

from probekit._types import FloatArray, IntArray

FEW = 10
"""Groups, or groups with the rarer outcome, below which resampling is not trusted."""
_CELLS = 500_000
"""Counts (resamples x groups) worked on at once: what a processor's cache holds."""


@dataclass(frozen=True)
class Interval:
    """An accuracy with its confidence interval.

    Attributes
    ----------
    estimate, low, high
        Accuracy and limits, as fractions.
    se
        Cluster-linearised standard error of the accuracy; NaN for a single group.
    n_pairs, n_groups
        Scored pairs, and groups that hold any.
    effective_groups
        (sum n)^2 / sum n^2 over the groups' (weighted) pairs: as many groups of equal size would weigh the same.
    method
        How the limits were made.
    """

    estimate: float
    low: float
    high: float
    se: float
    n_pairs: int
    n_groups: int
    effective_groups: float
    method: Literal["bootstrap-t", "korn-graubard"]


@dataclass(frozen=True)
class Band:
    """Accuracies of layers with limits that hold for all layers at once.

    Attributes
    ----------
    estimate, low, high, se
        (L,) each, as in `Interval`.
    quantile
        Of the largest |t| over the layers: limits are this many standard errors away on the logit scale.
    n_pairs, n_groups, effective_groups
        As in `Interval`.
    """

    estimate: FloatArray
    low: FloatArray
    high: FloatArray
    se: FloatArray
    quantile: float
    n_pairs: int
    n_groups: int
    effective_groups: float


def accuracy_interval(
    correct: FloatArray,
    groups: NDArray[Any],
    *,
    weights: FloatArray | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Accuracy with an interval over resampled groups.

    Parameters
    ----------
    correct
        (n,) 1 right, 0 wrong, or between; NaN entries are left out.
    groups
        (n,) labels of what is resampled.
    weights
        (n,) weights of pairs, not negative: the accuracy is sum of weight x correct over sum of weight. Weights of one
        over the pairs of a prompt (`probekit.stats.prompt_weights`) make it a mean over prompts.
    n_boot, level, seed
        Resamples, coverage, and seed of the resamples. Data with equally many groups share their resamples.

    Raises
    ------
    ValueError
        If no pair is scored, lengths differ, or a value is out of range.
    """
    scored = Scored.of(np.asarray(correct)[None], groups, weights)
    right, size = scored.right[:, 0], scored.size
    estimate = float(right.sum() / size.sum())
    residual = right - estimate * size
    se = float(standard_error(residual / size.sum()))
    if not _resampling_is_sound(right, size, se):
        low, high = _korn_graubard(estimate, se, scored, level=level)
        return scored.interval(estimate, low, high, se, "korn-graubard")
    t = [_studentised(counts, residual[:, None], size, estimate) for counts in resamples(len(size), n_boot, seed)]
    low, high = _bootstrap_t(estimate, se, np.concatenate(t), level=level)
    return scored.interval(estimate, low, high, se, "bootstrap-t")


def simultaneous_band(
    correct_by_layer: FloatArray,
    groups: NDArray[Any],
    *,
    weights: FloatArray | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Band:
    """Accuracies of several heads on the same pairs, with limits that cover all of them together.

    The limits are theta +- q se on the logit scale, q the ``level`` quantile of the largest |t| over the layers in a
    resample. Layers with fewer than ten groups of the rarer outcome (or no variance) leave the maximum; they get
    Korn-Graubard limits at Bonferroni's level, and the maximum over the others may miss only in their share of all
    layers. (Without that, 24 layers near the limit of ten were covered 83 % of the time instead of 95.)

    Parameters
    ----------
    correct_by_layer
        (L, n) 1 right, 0 wrong; NaN, in the same places for every layer, is left out.
    groups, weights, n_boot, level, seed
        As in `accuracy_interval`.

    Raises
    ------
    ValueError
        As in `accuracy_interval`, and if layers leave out different pairs.
    """
    scored = Scored.of(np.asarray(correct_by_layer), groups, weights)
    size = scored.size
    total = size.sum()
    estimate = scored.right.sum(axis=0) / total
    residual = scored.right - estimate * size[:, None]
    se = standard_error(residual / total)
    usable = np.array([_resampling_is_sound(r, size, s) for r, s in zip(scored.right.T, se, strict=True)])
    low, high = np.empty(len(estimate)), np.empty(len(estimate))
    quantile = float("nan")
    if usable.any():
        t = np.concatenate(
            [
                _studentised(counts, residual[:, usable], size, estimate[usable])
                for counts in resamples(len(size), n_boot, seed)
            ]
        )
        # The layers in the maximum may miss no more often than their share of all layers, as the others miss as well.
        quantile = float(np.quantile(np.abs(t).max(axis=1), 1 - (1 - level) * usable.mean()))
        a = estimate[usable]
        reach = quantile * se[usable] / (a * (1 - a))
        low[usable], high[usable] = expit(logit(a) - reach), expit(logit(a) + reach)
    for layer in np.flatnonzero(~usable):
        low[layer], high[layer] = _korn_graubard(
            estimate[layer], se[layer], scored, level=1 - (1 - level) / len(estimate)
        )
    return Band(estimate, low, high, se, quantile, scored.n_pairs, len(size), scored.effective_groups)


def macro_interval(
    correct: FloatArray,
    groups: NDArray[Any],
    kinds: NDArray[Any],
    *,
    weights: FloatArray | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of the accuracies of the kinds of pairs, with an interval over resampled groups.

    Each kind's accuracy is a ratio of its own; weights of one over the kind's size in `accuracy_interval` would give
    the same estimate, but would count it as error that kinds differ in accuracy.

    Parameters
    ----------
    correct, groups, weights, n_boot, level, seed
        As in `accuracy_interval`; pairs of a kind count by their weights, kinds alike.
    kinds
        (n,) kind of each pair. A resample without a kind takes that kind's accuracy from the data.

    Raises
    ------
    ValueError
        As in `accuracy_interval`.
    """
    correct, groups, kinds = np.asarray(correct), np.asarray(groups), np.asarray(kinds)
    if kinds.shape != correct.shape:
        message = f"kinds have shape {kinds.shape} and correct {correct.shape}; both must be (pairs,)"
        raise ValueError(message)
    given = np.ones(len(correct)) if weights is None else np.asarray(weights, dtype=np.float64)
    scored = ~np.isnan(correct) & (given > 0)
    names, kind = np.unique(kinds[scored], return_inverse=True)
    counted = given[scored]
    sizes = np.bincount(kind, counted, len(names))
    share_of_all = np.zeros(len(correct))
    share_of_all[scored] = counted / (len(names) * sizes[kind])
    whole = Scored.of(correct[None], groups, share_of_all)
    # y, n (G, K): right and all pairs by group and kind
    member = np.unique(groups[scored], return_inverse=True)[1]
    shape = (len(whole.size), len(names))
    n = np.bincount(member * shape[1] + kind, counted, shape[0] * shape[1]).reshape(shape)
    y = np.bincount(member * shape[1] + kind, counted * correct[scored], shape[0] * shape[1]).reshape(shape)
    by_kind = y.sum(axis=0) / sizes
    estimate = float(by_kind.mean())
    share = len(names) * sizes
    se = float(standard_error(((y - by_kind * n) / share).sum(axis=1)))
    if not _resampling_is_sound(whole.right[:, 0], whole.size, se):
        low, high = _korn_graubard(estimate, se, whole, level=level)
        return whole.interval(estimate, low, high, se, "korn-graubard")
    ts = []
    for counts in resamples(shape[0], n_boot, seed):
        right, pairs = counts @ y, counts @ n
        held = np.where(pairs > 0, pairs, 1)
        drawn = np.where(pairs > 0, right / held, by_kind)
        share = len(names) * held
        influence = np.hstack([1 / share, -drawn / share]) @ np.hstack([y, n]).T
        variance = shape[0] / (shape[0] - 1) * np.vecdot(counts, np.square(influence, out=influence))
        ts.append(_t(drawn.mean(axis=1), variance, estimate, shape[0]))
    low, high = _bootstrap_t(estimate, se, np.concatenate(ts), level=level)
    return whole.interval(estimate, low, high, se, "bootstrap-t")


def effective_groups(groups: NDArray[Any], weights: FloatArray | None = None) -> float:
    """Return (sum n)^2 / sum n^2 over the (weighted) numbers of pairs in the groups; 0 without pairs."""
    groups = np.asarray(groups)
    size = np.bincount(np.unique(groups, return_inverse=True)[1], weights).astype(np.float64)
    return float(size.sum() ** 2 / np.square(size).sum()) if size.any() else 0.0


@dataclass(frozen=True)
class Scored:
    """Scored pairs, summed by group: ``right`` (G, L) and ``size`` (G,), both weighted."""

    right: FloatArray
    size: FloatArray
    n_pairs: int

    @classmethod
    def of(cls, values: FloatArray, groups: NDArray[Any], weights: FloatArray | None) -> Self:
        """Sum values (L, n) by group, leaving out pairs that are NaN; values may be accuracies or their differences."""
        groups = np.asarray(groups)
        weights = np.ones(values.shape[-1]) if weights is None else np.asarray(weights, dtype=np.float64)
        if values.ndim != 2 or groups.shape != values.shape[1:] or weights.shape != values.shape[1:]:
            message = (
                f"correct has shape {values.shape[-1:] if len(values) == 1 else values.shape}, groups {groups.shape}, "
                f"weights {weights.shape}; they must agree in the number of pairs"
            )
            raise ValueError(message)
        if not (np.isfinite(weights) & (weights >= 0)).all():
            message = "weights of pairs must be finite and not negative"
            raise ValueError(message)
        absent = np.isnan(values)
        if (absent != absent[:1]).any():
            message = "layers or heads leave out different pairs; compare them on the same pairs"
            raise ValueError(message)
        kept = ~absent[0] & (weights > 0)
        if not kept.any():
            message = f"none of the {values.shape[1]} pairs is scored; an accuracy needs at least one untied pair"
            raise ValueError(message)
        values, weights = values[:, kept], weights[kept]
        if np.abs(values).max() > 1:
            message = f"correct holds {values[np.abs(values) > 1][0]}; it must be 0, 1 or NaN"
            raise ValueError(message)
        member = np.unique(groups[kept], return_inverse=True)[1]
        right = np.stack([np.bincount(member, weights * row) for row in values], axis=1).astype(np.float64)
        return cls(right, np.bincount(member, weights).astype(np.float64), int(kept.sum()))

    @property
    def effective_groups(self) -> float:
        """As the function of this name."""
        return float(self.size.sum() ** 2 / np.square(self.size).sum())

    def interval(
        self, estimate: float, low: float, high: float, se: float, method: Literal["bootstrap-t", "korn-graubard"]
    ) -> Interval:
        """Limits together with the sizes of what they rest on."""
        return Interval(estimate, low, high, se, self.n_pairs, len(self.size), self.effective_groups, method)


def standard_error(influence: FloatArray) -> FloatArray:
    """Return the standard error from the groups' influences (G, ...), which sum to zero; NaN for one group."""
    n_groups = len(influence)
    if n_groups == 1:
        return np.full(influence.shape[1:], np.nan)
    return np.asarray(np.sqrt(n_groups / (n_groups - 1) * np.square(influence).sum(axis=0)))


def _resampling_is_sound(right: FloatArray, size: FloatArray, se: float) -> bool:
    """Whether enough groups hold each outcome, and the groups differ."""
    rounding = 1e-12 * size
    return bool(min((right > rounding).sum(), (right < size - rounding).sum()) >= FEW and se > 1e-9)


def redrawn(counts: FloatArray, residual: FloatArray, size: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Shift a_b - a and squared standard error (B, L) of ratios in resamples (B, G), from residuals y - a n (G, L)."""
    n_groups, columns = residual.shape
    n = size[:, None]
    sums = counts @ np.hstack([residual, residual**2, residual * n, n, n**2])
    first, second, mixed = (sums[:, i * columns : (i + 1) * columns] for i in range(3))
    total, squares = sums[:, -2:-1], sums[:, -1:]
    shift = first / total
    spread = second - 2 * shift * mixed + shift**2 * squares
    return shift, n_groups / (n_groups - 1) * np.maximum(spread, 0) / total**2


def _studentised(
    counts: FloatArray, residual: FloatArray, size: FloatArray, estimate: FloatArray | float
) -> FloatArray:
    """T (B, L) on the logit scale for resamples (B, G), residuals y - a n (G, L) and accuracies (L,)."""
    shift, variance = redrawn(counts, residual, size)
    return _t(estimate + shift, variance, estimate, len(size))


def _t(drawn: FloatArray, variance: FloatArray, estimate: FloatArray | float, n_groups: int) -> FloatArray:
    """Studentised distance on the logit scale of accuracies in resamples, from their squared standard errors."""
    # A resample in which everything is right (or wrong) counts as if half a group were not.
    bounded = np.clip(drawn, 0.5 / n_groups, 1 - 0.5 / n_groups)
    slope = bounded * (1 - bounded)
    variance = np.where(bounded == drawn, variance, slope / n_groups)
    distance = (logit(bounded) - logit(estimate)) * slope
    # A resample whose groups all agree has no standard error; it says nothing about the tails.
    return np.divide(distance, np.sqrt(variance), out=np.zeros_like(distance), where=variance > 1e-18)


def _bootstrap_t(estimate: float, se: float, t: FloatArray, *, level: float) -> tuple[float, float]:
    """Limits from the quantiles of t (B,): the upper quantile makes the lower limit."""
    low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    scale = se / (estimate * (1 - estimate))
    return float(expit(logit(estimate) - high * scale)), float(expit(logit(estimate) - low * scale))


def _korn_graubard(estimate: float, se: float, scored: Scored, *, level: float) -> tuple[float, float]:
    """Clopper-Pearson limits at the effective number of pairs."""
    n_groups = len(scored.size)
    variance = estimate * (1 - estimate)
    alpha = (1 - level) / 2
    if n_groups == 1:
        pairs = 1.0  # one group says as much as one pair, whatever its size
    elif variance > 0 and se > 0:
        freedom = stdtrit(scored.n_pairs - 1, alpha) / stdtrit(n_groups - 1, alpha)
        pairs = float(min(variance / se**2 * freedom**2, scored.n_pairs))
    else:
        pairs = scored.effective_groups  # all groups alike: no sign of how pairs of a group hang together
    right, wrong = pairs * estimate, pairs * (1 - estimate)
    low = 0.0 if estimate == 0 else float(betaincinv(right, wrong + 1, alpha))
    high = 1.0 if estimate == 1 else float(betaincinv(right + 1, wrong, 1 - alpha))
    return low, high


def resamples(n_groups: int, n_boot: int, seed: int) -> Iterator[FloatArray]:
    """Yield counts (B, G) of each group in resamples of the groups, in chunks of bounded size."""
    rows = max(1, _CELLS // n_groups)
    for start in range(0, n_boot, rows):
        yield _counts(n_groups, start, min(rows, n_boot - start), seed).astype(np.float64)


@lru_cache(maxsize=128)
def _counts(n_groups: int, start: int, rows: int, seed: int) -> IntArray:
    """Draw the counts of one chunk; kept, as every layer and head on the same pairs asks for the same ones."""
    drawn = np.random.default_rng([seed, n_groups, start]).integers(n_groups, size=(rows, n_groups))
    drawn += n_groups * np.arange(rows)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=rows * n_groups).reshape(rows, n_groups)
    return counts.astype(np.uint8 if n_groups <= 255 else np.uint16)
