"""Does size help? For these networks, for other trainings of them, or for new backbones: three different questions.

**These checkpoints.** Two networks on the same pairs: `paired_difference`. Only the pairs are a sample.

**Other trainings, or other random weights, of these shapes.** Side i of a contrast sum_i c_i A_i is a shape with S_i
networks (training seeds, control seeds); A_i is their mean accuracy. Networks are a random effect, pairs another:

    SE^2 = sum_i c_i^2 SD_i^2 / S_i + (what pairs alone make)

SD_i^2, the variance of the S_i accuracies on the same pairs, also contains what pairs do to each network by itself.
With P the covariance of all accuracies over resampled pairs (cluster linearisation) and w the weight of each network
(c_i / S_i), pairs make w'Pw, of which sum_i c_i^2 tr(M_i P_i) / ((S_i - 1) S_i) is already in the first term (M_i takes
off the mean of side i, P_i is its part of P): only the rest is added, and nothing if it is negative. No more is taken
off than the first term holds: networks that agree by chance never make the error smaller than that over pairs. (2,000
runs, 200 effective groups, networks of one accuracy: with ten a side limits cover 97.1 %, without this floor 95.7 %;
with three 99.4 and 96.8 %.) Of a side with one network the variance over networks is unknown and in no interval.

Networks are few and their variance is known badly, that of pairs is known well. Limits add their reaches in squares,

    reach^2 = t_f^2 SE_networks^2 + z^2 SE_rest^2,    f = SE_networks^4 / sum_i (c_i^2 SD_i^2 / S_i)^2 / (S_i - 1)

with Welch and Satterthwaite's degrees of freedom for the networks alone. (One t for both parts, on degrees of freedom
from their estimated shares, covered 93 % where three degrees were left: a variance that is too small by chance also
makes its own degrees of freedom look plentiful.)

**Other training pairs of the heads.** With refits of all heads on halves of the training groups (the same half for
all, see `probekit.stats.training`) the contrast of each refit is at hand, and with it SE_train. It is added to what
pairs make, on the degrees of freedom of both together; where networks scatter because of their training pairs it is
counted twice, on the safe side (2,000 runs, three networks a side: limits cover 97.0 %, those without refits 96.2 %;
of single networks see `probekit.stats.training`). More test pairs lower neither SE_networks nor SE_train.

The margin over random weights is such a contrast (1 for trained, -1 for the random networks), that of a large and a
small model the difference of two of them: 1, -1, -1, 1. The seeds' variance is in it. A slope over these shapes is one
with the weights of `slope_weights`.

**New backbones.** The k backbones themselves are the sample, each with one value: its accuracy, the mean over its
trainings, or its margin over its random networks. Least squares on x = log size, residual variance s^2 on k - 2 degrees
of freedom:

    b = sum_i c_i A_i,    c_i = (x_i - mean x) / Sxx,    SE^2 = s^2 / Sxx + (c'Pc - tr(MP) / ((k - 2) Sxx)),

M = I - 11'/k - (x - mean x)(x - mean x)' / Sxx; the bracket is what the choice of pairs does to the *slope* and no
residual shows (if positive); f = k - 2 belongs to the first part. Residuals of margins contain the control seeds'
variance already. Two backbones have no residuals: there is no slope for new ones, only the difference of these two.

Sources: F. Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics Bulletin 2
(1946); B. Welch, "The generalization of Student's problem when several different population variances are involved",
Biometrika 34 (1947); E. Miller, "Adding error bars to evals", arXiv 2411.00640 (2024), for paired and clustered errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from probekit._types import FloatArray
from probekit.stats.comparisons import POWER, Gain, mean_gain
from probekit.stats.intervals import Scored
from probekit.stats.training import TrainingPart, widened


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of accuracies with limits.

    Attributes
    ----------
    estimate, low, high
        In units of accuracy (a slope: accuracy per unit of log size).
    se
        Standard error that the limits rest on.
    se_networks
        Its part that the scatter of networks shows; 0 where no side has several.
    se_pairs
        What test pairs alone make: with these networks held fixed. With refits and without networks that are a sample,
        half the width of the limits over pairs by its normal quantile, so that its square is what `se` adds to.
    se_train
        What other training pairs of the heads make; NaN without refits, where the limits hold the fitted heads fixed.
    se_lasting
        What more test pairs do not lower, networks and training pairs, each times its quantile over the normal one.
    freedom
        Degrees of freedom of the networks' part, without networks of that of training pairs; infinite for limits by the
        bootstrap over pairs alone.
    p
        Two-sided p of no effect.
    detectable
        True effect that would be found in 80 % of samples.
    networks
        Networks of each side.
    sd
        Their standard deviation on each side; NaN for one network. For a slope over backbones: that of the residuals.
    n_pairs, n_groups, effective_groups
        As in `Interval`.
    about
        What is a sample: the pairs, also the networks of each side, or also the backbones.
    """

    estimate: float
    low: float
    high: float
    se: float
    se_networks: float
    se_pairs: float
    se_train: float
    se_lasting: float
    freedom: float
    p: float
    detectable: float
    networks: tuple[int, ...]
    sd: tuple[float, ...]
    n_pairs: int
    n_groups: int
    effective_groups: float
    about: Literal["these checkpoints", "other trainings", "new backbones"]


def network_contrast(
    sides: Sequence[tuple[float, FloatArray]],
    groups: NDArray[Any],
    *,
    refits: FloatArray | None = None,
    weights: FloatArray | None = None,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Contrast:
    """Weighted sum of the mean accuracies of sides, where the networks of a side may be a sample as well.

    Parameters
    ----------
    sides
        Weight and right or wrong (S, n) of the networks of each side. Two ways of fitting the same networks are one
        side: the differences of right and wrong, network by network.
    refits
        (R, n) the same weighted sum of heads refitted on random halves of the training groups. With them training
        pairs are a sample too; without them the heads are held fixed.
    groups, weights, n_boot, level, seed
        As in `accuracy_interval`. The bootstrap serves where every side has one network.

    Raises
    ------
    ValueError
        As in `accuracy_interval`, and if networks leave out different pairs.
    """
    networks = tuple(len(correct) for _, correct in sides)
    scored = Scored.of(np.concatenate([np.asarray(correct) for _, correct in sides]), groups, weights)
    right, size = scored.right, scored.size
    weight = np.concatenate([np.full(len(correct), c / len(correct)) for c, correct in sides])
    largest = max(float(weight[weight > 0].sum()), float(-weight[weight < 0].sum()))
    pairs = mean_gain(right @ weight, size, n_boot=n_boot, level=level, seed=seed, largest=largest)
    accuracy = right.sum(axis=0) / size.sum()
    covariance = _covariance(scored, accuracy)
    parts, seen, freedoms, deviations, start = [], 0.0, [], [], 0
    for (c, _), s in zip(sides, networks, strict=True):
        own = slice(start, start + s)
        start += s
        deviations.append(float(accuracy[own].std(ddof=1)) if s > 1 else float("nan"))
        if s > 1:
            parts.append(c**2 * deviations[-1] ** 2 / s)
            freedoms.append(s - 1)
            block = covariance[own, own]
            seen += c**2 * float(np.trace(block) - block.sum() / s) / ((s - 1) * s)
    part = None if refits is None else TrainingPart.of(refits, groups, weights)
    among = np.array(parts)
    about: dict[str, Any] = {
        "networks": networks,
        "sd": tuple(deviations),
        "n_pairs": scored.n_pairs,
        "n_groups": len(size),
        "effective_groups": scored.effective_groups,
        "about": "other trainings" if parts else "these checkpoints",
    }
    if not parts:
        return Contrast(**_of_pairs(pairs, part, level=level), **about)
    uncertain = float((among**2 / np.array(freedoms)).sum())
    freedom = float(among.sum()) ** 2 / uncertain if uncertain > 0 else float("inf")
    rest = max(pairs.spread**2 - min(seen, float(among.sum())), 0.0)
    found = _limits(pairs.estimate, float(among.sum()), freedom, rest, part, level=level)
    return Contrast(**found, se_pairs=pairs.spread, **about)


def size_slope(
    correct_by_backbone: FloatArray,
    log_size: FloatArray,
    groups: NDArray[Any],
    *,
    refits: FloatArray | None = None,
    weights: FloatArray | None = None,
    level: float = 0.95,
) -> Contrast:
    """Slope of accuracy over log size for new backbones, by t on about k - 2 degrees of freedom.

    Parameters
    ----------
    correct_by_backbone
        (k, n) right or wrong of each backbone; of several trainings their mean; for margins over random weights, right
        or wrong less the mean of the random networks.
    log_size
        (k,) logarithm of the size. Its base is the unit of the slope: with base 2, accuracy per doubling.
    refits
        (R, n) sums over backbones with the weights of `slope_weights`, as in `network_contrast`.
    groups, weights, level
        As in `accuracy_interval`.

    Raises
    ------
    ValueError
        As in `accuracy_interval`, and if there are fewer than three backbones or they are all of one size.
    """
    correct, log_size = np.asarray(correct_by_backbone), np.asarray(log_size, dtype=np.float64)
    k = len(log_size)
    if correct.ndim != 2 or len(correct) != k:
        message = f"correct has shape {correct.shape} and log_size {log_size.shape}; allowed: (k, n) and (k,)"
        raise ValueError(message)
    if k < 3:
        message = f"there are {k} backbones; a slope for new ones needs three, two have a paired difference only"
        raise ValueError(message)
    c = slope_weights(log_size)
    scored = Scored.of(correct, groups, weights)
    accuracy = scored.right.sum(axis=0) / scored.size.sum()
    covariance = _covariance(scored, accuracy)
    centred = log_size - log_size.mean()
    spread = float(np.square(centred).sum())
    off_line = np.eye(k) - 1 / k - np.outer(centred, centred) / spread
    residual = off_line @ accuracy
    s_squared = float(residual @ residual) / (k - 2)
    backbones = s_squared / spread
    by_pairs = float(c @ covariance @ c)
    seen = float(np.trace(off_line @ covariance)) / ((k - 2) * spread)
    hidden = max(by_pairs - min(seen, backbones), 0.0)
    part = None if refits is None else TrainingPart.of(refits, groups, weights)
    return Contrast(
        **_limits(float(c @ accuracy), backbones, float(k - 2), hidden, part, level=level),
        se_pairs=float(np.sqrt(by_pairs)),
        networks=(1,) * k,
        sd=(float(np.sqrt(s_squared)),),
        n_pairs=scored.n_pairs,
        n_groups=len(scored.size),
        effective_groups=scored.effective_groups,
        about="new backbones",
    )


def slope_weights(log_size: FloatArray) -> FloatArray:
    """Weights (k,) of values in the least-squares slope over log sizes (k,).

    Examples
    --------
    >>> slope_weights(np.array([0.0, 1.0, 2.0]))
    array([-0.5,  0. ,  0.5])
    """
    centred = np.asarray(log_size, dtype=np.float64) - np.mean(log_size)
    spread = float(np.square(centred).sum())
    if not spread > 0:
        message = f"log sizes are {log_size}; a slope needs finite sizes that differ"
        raise ValueError(message)
    return np.asarray(centred / spread)


def _covariance(scored: Scored, accuracy: FloatArray) -> FloatArray:
    """Cluster-linearised covariance (R, R) of accuracies over resampled groups."""
    n_groups = len(scored.size)
    influence = (scored.right - accuracy * scored.size[:, None]) / scored.size.sum()
    return np.asarray(n_groups / max(n_groups - 1, 1) * influence.T @ influence)


def _of_pairs(pairs: Gain, part: TrainingPart | None, *, level: float) -> dict[str, Any]:
    """Limits by the bootstrap over pairs, wider where training pairs are a sample too."""
    z = float(ndtri((1 + level) / 2))
    found: dict[str, Any] = {"estimate": pairs.estimate, "se_networks": 0.0, "se_pairs": pairs.spread}
    if part is None:
        found |= {"low": pairs.low, "high": pairs.high, "se": pairs.spread, "p": pairs.p, "freedom": float("inf")}
        return found | {
            "se_train": float("nan"),
            "se_lasting": 0.0,
            "detectable": (z + float(ndtri(POWER))) * pairs.spread,
        }
    total = widened(pairs.estimate, pairs.low, pairs.high, part, level=level)
    found |= {name: getattr(total, name) for name in ("low", "high", "se", "se_train", "freedom", "detectable")}
    lasting = total.se_train * float(stdtrit(total.freedom, (1 + level) / 2)) / z
    return found | {"se_pairs": total.se_test, "se_lasting": lasting, "p": max(total.p, pairs.p)}


def _limits(
    estimate: float, networks: float, freedom: float, rest: float, part: TrainingPart | None, *, level: float
) -> dict[str, Any]:
    """Limits, errors, p and detectable effect from the variances of networks, pairs and training samples."""
    train = 0.0 if part is None else part.variance
    of_rest = float("inf") if part is None else part.freedom(rest)
    rest += train

    def reach(quantile: float) -> float:
        parts = stdtrit(freedom, quantile) * np.sqrt(networks), stdtrit(of_rest, quantile) * np.sqrt(rest)
        return float(np.hypot(*parts))

    outer, z = reach((1 + level) / 2), float(ndtri((1 + level) / 2))
    inside, outside = -30.0, 0.0  # logarithm of the p at which a limit touches zero, by halving
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if reach(1 - np.exp(middle) / 2) < abs(estimate) else (middle, outside)
    wider = [float(stdtrit(f, (1 + level) / 2)) / z for f in (freedom, of_rest)]
    return {
        "estimate": estimate,
        "low": estimate - outer,
        "high": estimate + outer,
        "se": float(np.sqrt(networks + rest)),
        "se_networks": float(np.sqrt(networks)),
        "se_train": float("nan") if part is None else float(np.sqrt(train)),
        "se_lasting": float(np.hypot(wider[0] * np.sqrt(networks), wider[1] * np.sqrt(train))),
        "freedom": freedom,
        "p": float(np.exp(outside)),
        "detectable": outer + reach(POWER),
    }
