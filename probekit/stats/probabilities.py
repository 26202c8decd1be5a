"""Are a head's probabilities right? Brier score, log-loss and calibration error where labels are shares of votes.

A margin m says P(first preferred) = p = 1 / (1 + exp(-m)); the label y is the share of votes for the first. Over pairs

    Brier = mean (p - y)^2,    log-loss = -mean(y log p + (1 - y) log(1 - p)).

Which side stands first means nothing: every pair is turned so that p >= 1/2 (y becomes 1 - y with it; at p = 1/2 it is
1/2). The pairs are cut into bins of equal numbers by p (equal p stay in one bin), bin k holds n_k of n pairs, and

    ECE = sum_k n_k / n |mean_k p - mean_k y| = sum_k |D_k|,    D_k = sum_{i in k} (p_i - y_i) / n.

Chance alone makes |D_k| > 0. With D*_k from resampled groups, e* = sum_k |D*_k - D_k| is what chance makes of a head
that is perfectly calibrated: its 95 % quantile is printed beside the ECE, and as | |D_k| - |true D_k| | <= |D_k - true
D_k|, the ECE -+ that quantile covers the true one of these bins (more often than 95 %, on the safe side).

Sources: G. Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78 (1950); M.
Naeini, G. Cooper and M. Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015; equal
mass and chance level: R. Roelofs et al., "Mitigating bias in calibration error estimation", AISTATS 2022.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, stdtrit

from probekit._types import FloatArray
from probekit.stats.intervals import FEW, effective_groups, redrawn, resamples, standard_error


@dataclass(frozen=True)
class Score:
    """A mean over pairs with limits over resampled groups; ``se`` is its cluster-linearised standard error."""

    estimate: float
    low: float
    high: float
    se: float


@dataclass(frozen=True)
class Calibration:
    """How far a head's probabilities can be trusted.

    Attributes
    ----------
    brier, log_loss
        Smaller is better; always saying 1/2 has log-loss 0.693, and Brier score 0.25 where labels are 0 and 1.
    ece, ece_low, ece_high
        Calibration error with limits.
    ece_by_chance
        What a perfectly calibrated head stays below in 95 % of samples.
    said, voted, share
        (bins,) mean probability, mean label and share of the pairs in each bin, pairs turned so that p >= 1/2.
    n_pairs, n_groups, effective_groups
        As in `Interval`.
    """

    brier: Score
    log_loss: Score
    ece: float
    ece_low: float
    ece_high: float
    ece_by_chance: float
    said: FloatArray
    voted: FloatArray
    share: FloatArray
    n_pairs: int
    n_groups: int
    effective_groups: float


def calibration(
    margins: FloatArray,
    labels: FloatArray,
    groups: NDArray[Any],
    *,
    n_bins: int = 10,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Calibration:
    """Brier score, log-loss and calibration error of a head, with limits over resampled groups.

    Pairs with label 0.5 count: half of the votes is what the head should say. With fewer than ten groups, limits of
    scores are by t on G - 1 degrees of freedom.

    Parameters
    ----------
    margins
        (n,) score of the first minus score of the second image, a logit.
    labels
        (n,) share of votes for the first.
    groups
        (n,) labels of what is resampled.
    n_bins
        Bins of equal mass.
    n_boot, level, seed
        As in `accuracy_interval`.

    Raises
    ------
    ValueError
        If lengths differ, there is no pair, a margin is not finite, or a label lies outside 0 to 1.
    """
    margins, labels = np.asarray(margins, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    groups = np.asarray(groups)
    if not (margins.shape == labels.shape == groups.shape and margins.ndim == 1 and len(margins)):
        message = f"margins have shape {margins.shape}, labels {labels.shape}, groups {groups.shape}; allowed: (pairs,)"
        raise ValueError(message)
    if not (np.isfinite(margins).all() and ((labels >= 0) & (labels <= 1)).all()):
        message = "margins must be finite and labels lie in 0 to 1"
        raise ValueError(message)
    said = expit(np.abs(margins))
    voted = np.where(margins > 0, labels, np.where(margins < 0, 1 - labels, 0.5))
    bin_of = np.unique(np.searchsorted(np.quantile(said, np.arange(1, n_bins) / n_bins), said), return_inverse=True)[1]
    count = np.bincount(bin_of)
    # log p = -log(1 + exp(-m)): never the logarithm of a rounded zero
    losses = labels * np.logaddexp(0, -margins) + (1 - labels) * np.logaddexp(0, margins)
    brier = np.square(expit(margins) - labels)
    member = np.unique(groups, return_inverse=True)[1]
    size = np.bincount(member).astype(np.float64)
    gaps = np.zeros((len(size), len(count)))
    np.add.at(gaps, (member, bin_of), said - voted)
    gap = gaps.sum(axis=0) / len(margins)
    residual = gaps - gap * size[:, None]
    shifts = [np.abs(counts @ residual).sum(axis=1) / (counts @ size) for counts in resamples(len(size), n_boot, seed)]
    chance = float(np.quantile(np.concatenate(shifts), level)) if len(size) > 1 else float("nan")
    ece = float(np.abs(gap).sum())

    def score(values: FloatArray) -> Score:
        return _mean(np.bincount(member, values).astype(np.float64), size, n_boot=n_boot, level=level, seed=seed)

    return Calibration(
        brier=score(brier),
        log_loss=score(losses),
        ece=ece,
        ece_low=max(ece - chance, 0.0),
        ece_high=min(ece + chance, 1.0),
        ece_by_chance=chance,
        said=np.bincount(bin_of, said) / count,
        voted=np.bincount(bin_of, voted) / count,
        share=count / len(margins),
        n_pairs=len(margins),
        n_groups=len(size),
        effective_groups=effective_groups(groups),
    )


def _mean(value: FloatArray, size: FloatArray, *, n_boot: int, level: float, seed: int) -> Score:
    """Mean of values summed by group (G,), by bootstrap-t on its own scale."""
    estimate = float(value.sum() / size.sum())
    residual = value - estimate * size
    se = float(standard_error(residual / size.sum()))
    if len(size) < FEW or not se > 1e-12:
        reach = float(stdtrit(len(size) - 1, (1 + level) / 2)) * se if len(size) > 1 else float("nan")
        return Score(estimate, max(estimate - reach, 0.0), estimate + reach, se)
    ts = []
    for counts in resamples(len(size), n_boot, seed):
        shift, variance = redrawn(counts, residual[:, None], size)
        ts.append(np.divide(shift, np.sqrt(variance), out=np.zeros_like(shift), where=variance > 0))
    low, high = np.quantile(np.concatenate(ts), [(1 - level) / 2, (1 + level) / 2])
    return Score(estimate, max(estimate - float(high) * se, 0.0), estimate - float(low) * se, se)
