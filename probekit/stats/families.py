"""Families of paired comparisons: Romano and Wolf's step-down on one bootstrap, Holm where there is none.

m comparisons on the same pairs: comparison j is the accuracy of one head minus another's, with estimate d_j, standard
error se_j over groups and t_j = d_j / se_j. In each resample of the groups, t*_j = (d*_j - d_j) / se*_j is centred, so
that it looks as t_j does where there is no difference, with the dependence between the comparisons as it is.

Step-down: sort by |t|, largest first. The largest is judged against the largest |t*| of all m; the next one against the
largest |t*| of the m - 1 that are left, and so on:

    p_(i) = (1 + #{resamples with max_{j >= i} |t*_(j)| >= |t_(i)|}) / (B + 1),    made non-decreasing in i.

The chance of any false discovery is then at most the level, whatever the dependence, and no less is found than by one
threshold for all.

Sources: J. Romano and M. Wolf, "Stepwise multiple testing as formalized data snooping", Econometrica 73 (2005), and
"Efficient computation of adjusted p-values for resampling-based stepdown multiple testing", Statistics & Probability
Letters 113 (2016); S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
Statistics 6 (1979).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from probekit._types import FloatArray
from probekit.stats.comparisons import POWER, bonett_price, told_apart
from probekit.stats.intervals import FEW, Scored, redrawn, resamples, standard_error


@dataclass(frozen=True)
class Family:
    """Differences of accuracies that are judged together.

    Attributes
    ----------
    estimate, se
        (m,) differences, as fractions, and their standard errors: cluster-linearised, or Bonett and Price's where fewer
        than ten groups tell the heads apart.
    low, high
        (m,) limits that hold for all differences together.
    p, adjusted
        (m,) two-sided p of each comparison alone, and corrected for all of them.
    detectable
        (m,) true differences that would be found in 80 % of samples, at the correction's first and strictest threshold.
    quantile
        That threshold: standard errors that a difference must be away from zero.
    tried
        Comparisons that the correction is for, m.
    n_pairs, n_groups, effective_groups
        As in `Interval`.
    """

    estimate: FloatArray
    se: FloatArray
    low: FloatArray
    high: FloatArray
    p: FloatArray
    adjusted: FloatArray
    detectable: FloatArray
    quantile: float
    tried: int
    n_pairs: int
    n_groups: int
    effective_groups: float


def paired_family(
    correct_a: FloatArray,
    correct_b: FloatArray,
    groups: NDArray[Any],
    *,
    weights: FloatArray | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Family:
    """Compare heads pairwise on the same pairs and correct for the number of comparisons.

    Comparisons in which fewer than ten groups tell the heads apart leave the step-down: their p is Bonett and Price's
    times m (Bonferroni), and the others' is times m over their number, so that all of them together keep the level.

    Parameters
    ----------
    correct_a, correct_b
        (m, n) 1 right, 0 wrong, or between, row j of one against row j of the other; ``correct_b`` may be (n,), one
        head for all. NaN, in the same places for every head, is left out.
    groups, weights, n_boot, level, seed
        As in `accuracy_interval`.

    Raises
    ------
    ValueError
        As in `accuracy_interval`, and if heads leave out different pairs.
    """
    correct_a, correct_b = np.asarray(correct_a), np.asarray(correct_b)
    if correct_a.ndim != 2 or correct_b.shape not in (correct_a.shape, correct_a.shape[1:]):
        message = (
            f"correct_a has shape {correct_a.shape}, correct_b {correct_b.shape}; allowed: (m, n) and (m, n) or (n,)"
        )
        raise ValueError(message)
    if (np.isnan(correct_a) != np.isnan(correct_b)).any():
        message = "the heads leave out different pairs; compare them on the same pairs"
        raise ValueError(message)
    scored = Scored.of(correct_a - correct_b, groups, weights)
    gain, size = scored.right, scored.size
    estimate = gain.sum(axis=0) / size.sum()
    residual = gain - estimate * size[:, None]
    se = standard_error(residual / size.sum())
    centre = estimate.copy()
    sound = np.array([told_apart(g, size) >= FEW and s > 1e-9 for g, s in zip(gain.T, se, strict=True)])
    for j in np.flatnonzero(~sound):
        centre[j], se[j] = bonett_price(gain[:, j], size)
    t, m = np.abs(centre) / se, len(se)
    p = np.where(sound, 1.0, 2 * ndtr(-t))
    adjusted = np.minimum(m * p, 1.0)
    quantile = float(ndtri(1 - (1 - level) / (2 * m)))
    reach = np.full(m, quantile)
    if sound.any():
        share = sound.mean()
        drawn = np.concatenate([_t(counts, residual[:, sound], size) for counts in resamples(len(size), n_boot, seed)])
        reach[sound] = quantile = float(np.quantile(drawn.max(axis=1), 1 - (1 - level) * share))
        p[sound] = (1 + (drawn >= t[sound]).sum(axis=0)) / (n_boot + 1)
        adjusted[sound] = np.minimum(step_down(t[sound], drawn) / share, 1.0)
    return Family(
        estimate,
        se,
        np.maximum(centre - reach * se, -1.0),
        np.minimum(centre + reach * se, 1.0),
        p,
        adjusted,
        (reach + float(ndtri(POWER))) * se,
        quantile,
        m,
        scored.n_pairs,
        len(size),
        scored.effective_groups,
    )


def step_down(t: FloatArray, drawn: FloatArray) -> FloatArray:
    """Adjust the p of statistics t (m,) by their draws (B, m) under the null hypothesis, the largest t first."""
    order = np.argsort(-t, kind="stable")
    largest = np.maximum.accumulate(drawn[:, order[::-1]], axis=1)[:, ::-1]
    p = (1 + (largest >= t[order]).sum(axis=0)) / (len(drawn) + 1)
    adjusted = np.empty(len(t))
    adjusted[order] = np.maximum.accumulate(p)
    return adjusted


def holm(p: FloatArray) -> FloatArray:
    """Adjust p (m,) of a few tests without common resamples: the i-th smallest times m - i + 1, made non-decreasing.

    Examples
    --------
    >>> holm(np.array([0.01, 0.04, 0.03]))
    array([0.03, 0.06, 0.06])
    """
    p = np.asarray(p, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        message = f"p is {p}; it must be a list of numbers from 0 to 1"
        raise ValueError(message)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def _t(counts: FloatArray, residual: FloatArray, size: FloatArray) -> FloatArray:
    """|t*| (B, m) of centred differences in resamples."""
    shift, variance = redrawn(counts, residual, size)
    return np.abs(np.divide(shift, np.sqrt(variance), out=np.zeros_like(shift), where=variance > 1e-18))
