"""Comparisons of two heads on the same pairs."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from probekit._types import FloatArray
from probekit.stats.intervals import FEW, Scored, effective_groups, redrawn, resamples, standard_error

POWER = 0.8
"""Chance to find the effect that `Difference.detectable` states."""


@dataclass(frozen=True)
class Difference:
    """Accuracy of one head minus another's on the same pairs.

    Attributes
    ----------
    estimate, low, high
        Difference and limits, as fractions.
    se
        Cluster-linearised standard error; NaN for a single group.
    detectable
        True difference that a two-sided test at 1 - level would find in 80 % of samples like this one.
    n_pairs, n_groups, effective_groups
        As in `Interval`.
    method
        How the limits were made: bootstrap-t over groups, or Bonett and Price's adjusted limits where fewer than ten
        groups tell the heads apart.
    """

    estimate: float
    low: float
    high: float
    se: float
    detectable: float
    n_pairs: int
    n_groups: int
    effective_groups: float
    method: Literal["bootstrap-t", "bonett-price"]


def planned_difference(groups: NDArray[Any], *, disagreement: float = 0.2, level: float = 0.95) -> tuple[float, float]:
    """Smallest true difference of two heads that so many pairs show in 80 % of samples, before any head is fitted.

    Parameters
    ----------
    groups
        Group of each pair (n,).
    disagreement
        Share of pairs that exactly one of the heads gets right; as the difference is small beside it, the standard
        error is its root over that of the number of independent pairs.
    level
        Of the test.

    Returns
    -------
    tuple
        The difference if all pairs are independent, and if the pairs of a group are all alike (then the effective
        number of groups is what counts): the truth lies in between.
    """
    z = float(ndtri((1 + level) / 2)) + float(ndtri(POWER))
    independent, alike = (z * float(np.sqrt(disagreement / n)) for n in (len(groups), effective_groups(groups)))
    return independent, alike


def say_planned(groups: NDArray[Any]) -> str:
    """Say in a sentence what `planned_difference` finds for the groups (n,) of decided test pairs."""
    if not len(groups):
        return "nothing: there are no decided test pairs"
    least, most = planned_difference(groups)
    return (
        f"{len(groups):,} decided test pairs in {len(set(groups)):,} groups show a difference of two heads from "
        f"{100 * least:.2g} points on (power 80 %, heads that disagree on a fifth of the pairs), or from "
        f"{100 * most:.2g} if pairs of a group are alike"
    )


def paired_difference(
    correct_a: FloatArray,
    correct_b: FloatArray,
    groups: NDArray[Any],
    *,
    weights: FloatArray | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Difference of the accuracies of heads a and b on the same pairs, with an interval over resampled groups.

    Parameters
    ----------
    correct_a, correct_b
        (n,) 1 right, 0 wrong; NaN entries, in the same places for both, are left out.
    groups, weights, n_boot, level, seed
        As in `accuracy_interval`.

    Raises
    ------
    ValueError
        If no pair is scored, lengths differ, or the heads leave out different pairs.

    References
    ----------
    D. Bonett and R. Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data", Journal of Educational and Behavioral Statistics 37 (2012).
    """
    correct_a, correct_b = np.asarray(correct_a), np.asarray(correct_b)
    if correct_a.shape != correct_b.shape:
        message = f"correct_a has shape {correct_a.shape}, correct_b {correct_b.shape}; compare heads on the same pairs"
        raise ValueError(message)
    if (np.isnan(correct_a) != np.isnan(correct_b)).any():
        message = "the heads leave out different pairs; compare them on the same pairs"
        raise ValueError(message)
    scored = Scored.of((correct_a - correct_b)[None], groups, weights)
    found = mean_gain(scored.right[:, 0], scored.size, n_boot=n_boot, level=level, seed=seed)
    return Difference(
        found.estimate,
        max(found.low, -1.0),
        min(found.high, 1.0),
        found.se,
        (float(ndtri((1 + level) / 2)) + float(ndtri(POWER))) * found.spread,
        scored.n_pairs,
        len(scored.size),
        scored.effective_groups,
        found.method,
    )


@dataclass(frozen=True)
class Gain:
    """A mean gain with limits: ``se`` is the cluster-linearised standard error, ``spread`` what the limits rest on."""

    estimate: float
    low: float
    high: float
    se: float
    spread: float
    p: float
    method: Literal["bootstrap-t", "bonett-price"]


def mean_gain(
    gain: FloatArray, size: FloatArray, *, n_boot: int, level: float, seed: int, largest: float = 1.0
) -> Gain:
    """Mean of gains (G,) over groups of ``size`` (G,), by bootstrap-t or, where few groups gain or lose, Bonett-Price.

    ``largest`` is the largest possible gain of a pair: 1 for the difference of two accuracies. The two-sided p is
    (1 + resamples whose |t| is at least the observed one) / (resamples + 1), or the normal one of Bonett and Price.
    """
    total = size.sum()
    estimate = float(gain.sum() / total)
    residual = gain - estimate * size
    se = float(standard_error(residual / total))
    z = float(ndtri((1 + level) / 2))
    if told_apart(gain, size) < FEW or not se > 1e-9:
        centre, spread = (largest * value for value in bonett_price(gain / largest, size))
        p = 2 * float(ndtr(-abs(centre) / spread))
        return Gain(estimate, centre - z * spread, centre + z * spread, se, spread, p, "bonett-price")
    ts = []
    for counts in resamples(len(size), n_boot, seed):
        shift, variance = redrawn(counts, residual[:, None], size)
        ts.append(np.divide(shift, np.sqrt(variance), out=np.zeros_like(shift), where=variance > 1e-18))
    t = np.concatenate(ts)
    t_low, t_high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    p = float((1 + (np.abs(t) >= abs(estimate) / se).sum()) / (n_boot + 1))
    return Gain(estimate, estimate - float(t_high) * se, estimate - float(t_low) * se, se, se, p, "bootstrap-t")


def told_apart(gain: FloatArray, size: FloatArray) -> int:
    """Count the groups (G,) in which one head gains on the other."""
    return int((np.abs(gain) > 1e-12 * size).sum())


def bonett_price(gain: FloatArray, size: FloatArray) -> tuple[float, float]:
    """Adjust a difference and its standard error: a group is one trial, and one more trial is added for either head."""
    total = size.sum()
    trials = total**2 / np.square(size).sum()
    a_better = (trials * gain[gain > 0].sum() / total + 1) / (trials + 2)
    b_better = (-trials * gain[gain < 0].sum() / total + 1) / (trials + 2)
    centre = float(a_better - b_better)
    return centre, float(np.sqrt((a_better + b_better - centre**2) / (trials + 2)))


def pairs_needed(effect: float, se: float, n_pairs: int, *, fixed_se: float = 0.0, level: float = 0.95) -> float:
    """Count the test pairs that would tell a true difference from zero in 80 % of samples.

    The part of the error that pairs make falls with their number, se(n)^2 = se^2 n_pairs / n at the same sizes of
    groups; what training samples, networks or seeds make (``fixed_se``) stays. From
    ``|effect| = (z_level + z_power) sqrt(se(n)^2 + fixed_se^2)``:

        n = n_pairs se^2 / ((effect / (z_level + z_power))^2 - fixed_se^2)

    Parameters
    ----------
    effect
        Difference to be found, as a fraction. To prove that a difference lies within a bound: the distance to it.
    se, n_pairs
        Standard error over pairs, and the number of pairs that it was found with.
    fixed_se
        Standard error that more pairs do not lower.
    level
        Of the two-sided test.

    Returns
    -------
    float
        Whole pairs; infinite where no number of pairs is enough.

    Examples
    --------
    Four times as many pairs find half the difference:

    >>> pairs_needed(0.02, 0.01, 1000), pairs_needed(0.01, 0.01, 1000)
    (1963.0, 7849.0)
    >>> pairs_needed(0.02, 0.01, 1000, fixed_se=0.01)
    inf
    """
    reach = (effect / (float(ndtri((1 + level) / 2)) + float(ndtri(POWER)))) ** 2 - fixed_se**2
    return float(np.ceil(n_pairs * se**2 / reach)) if reach > 0 else float("inf")


def right_with_a_coin(margins: FloatArray, labels: FloatArray) -> FloatArray:
    """Share (n,) of each decided pair that is right if a coin decides where a score says nothing: 1, 0 or a half."""
    return np.asarray((1 + np.sign(margins) * np.sign(np.asarray(labels) - 0.5)) / 2)
