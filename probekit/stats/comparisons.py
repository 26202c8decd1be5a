"""Comparisons of two heads on the same pairs."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

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
    gain, size = scored.right[:, 0], scored.size
    total = size.sum()
    estimate = float(gain.sum() / total)
    residual = gain - estimate * size
    se = float(standard_error(residual / total))
    z = float(ndtri((1 + level) / 2))
    told_apart = int((np.abs(gain) > 1e-12 * size).sum())
    if told_apart < FEW or not se > 1e-9:
        # Each group counts as one trial, and one more trial for either head is added.
        trials = scored.effective_groups
        a_better = (trials * gain[gain > 0].sum() / total + 1) / (trials + 2)
        b_better = (-trials * gain[gain < 0].sum() / total + 1) / (trials + 2)
        centre = float(a_better - b_better)
        spread = float(np.sqrt((a_better + b_better - centre**2) / (trials + 2)))
        low, high = max(centre - z * spread, -1.0), min(centre + z * spread, 1.0)
        detectable = (z + float(ndtri(POWER))) * spread
        method: Literal["bootstrap-t", "bonett-price"] = "bonett-price"
    else:
        ts = []
        for counts in resamples(len(size), n_boot, seed):
            shift, variance = redrawn(counts, residual[:, None], size)
            ts.append(np.divide(shift, np.sqrt(variance), out=np.zeros_like(shift), where=variance > 1e-18))
        t_low, t_high = np.quantile(np.concatenate(ts), [(1 - level) / 2, (1 + level) / 2])
        low, high = max(estimate - float(t_high) * se, -1.0), min(estimate - float(t_low) * se, 1.0)
        detectable = (z + float(ndtri(POWER))) * se
        method = "bootstrap-t"
    return Difference(estimate, low, high, se, detectable, scored.n_pairs, len(size), scored.effective_groups, method)
