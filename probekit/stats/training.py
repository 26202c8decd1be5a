"""How much an accuracy would differ with other training pairs: half-samples of the training groups.

An interval over test groups holds the fitted heads fixed. A claim about a *layer* is about heads that might have been
fitted on other training pairs as well:

    SE_total^2 = SE_test^2 + SE_train^2.

R refits see a random half of the training groups each (drawn without replacement, independently; the strength C as
chosen) and judge the same test pairs; a_r are their accuracies. Given all N groups, a mean over m of them varies with
(1 / m - 1 / N) v, and the full fit over training samples with v / N: the ratio is f / (1 - f) with f = m / N, which is
**1 for halves**. Some of the refits' scatter is that they err on other pairs of *this* test set, which SE_test has
counted already: with P the covariance of the a_r over resampled test groups (cluster linearisation) and M = I - 11'/R,

    SE_train^2 = sum_r (a_r - mean a)^2 / (R - 1) - tr(MP) / (R - 1),    0 if negative.

Why halves: an accuracy on given pairs counts those that change sides. It is a rough function of the coefficients, and
changes by random steps whose variance grows with the *distance* between two fits and not its square. Only at a half are
refits as far from each other as fits on different samples are, so that no assumption about smoothness enters. With
logistic heads (200 to 2,000 pairs, 8 to 40 channels) the refits' standard deviation was 0.95 to 1.2 times that of
fresh training samples on fixed test pairs; leaving out a fifth, with factor 4, made it 1.3 to 1.5 times. Near its
maximum the accuracy is curved, which halves exaggerate: SE_train was 1.4 times the true one at 400 training pairs, and
the limits of `with_training` covered 96 %, on the safe side; those over test pairs alone 93 %.

Limits: SE_test is the mean half-width over its normal quantile z, so that limits that are not symmetric stay so: each
side grows by ``t SE_total / (z SE_test)``, t on Welch and Satterthwaite's degrees of freedom ``SE_total^4 (R - 1) /
s^4``, s^2 the variance of the refits' accuracies; never fewer than the R - 1 of that variance alone.

Sources: P. McCarthy, "Pseudo-replication: half samples", Review of the International Statistical Institute 37 (1969);
J. Shao and C. Wu, "A general theory for jackknife variance estimation", Annals of Statistics 17 (1989); D. Politis, J.
Romano and M. Wolf, Subsampling (1999).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtr, stdtrit

from probekit._types import FloatArray
from probekit.stats.comparisons import POWER, Difference
from probekit.stats.intervals import Interval, Scored


@dataclass(frozen=True)
class TotalError:
    """An accuracy or a difference with limits for other test pairs *and* other training pairs.

    Attributes
    ----------
    estimate, low, high
        As fractions.
    se_test, se_train, se
        Standard errors over test groups, over training samples, and of both.
    detectable
        True difference (from zero, or from a given accuracy) that would be found in 80 % of samples.
    freedom
        Degrees of freedom of the limits.
    p
        Two-sided p of zero: that of the level at which a limit touches it.
    n_refits
        Refits on half of the training groups.
    """

    estimate: float
    low: float
    high: float
    se_test: float
    se_train: float
    se: float
    detectable: float
    freedom: float
    p: float
    n_refits: int


def training_covariance(
    refits: FloatArray, groups: NDArray[Any], *, weights: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Estimate how accuracies vary and hang together over training samples, from refits on halves of the groups.

    Parameters
    ----------
    refits
        (R, L, n) right or wrong of L heads (or their differences) refitted R times, the same half for all heads; NaN,
        in the same places for all, is left out.
    groups, weights
        (n,) of the test pairs, as in `accuracy_interval`.

    Returns
    -------
    covariance, scatter
        (L, L) without negative eigenvalues, and (L,) variance of the refits' accuracies before the share of test pairs
        is taken off.

    Raises
    ------
    ValueError
        As in `accuracy_interval`, and if there are no two refits.
    """
    refits = np.asarray(refits)
    if refits.ndim != 3 or len(refits) < 2:
        message = f"refits have shape {refits.shape}; allowed: (refits, heads, pairs) with at least two refits"
        raise ValueError(message)
    n_refits, n_heads, n_pairs = refits.shape
    scored = Scored.of(refits.reshape(-1, n_pairs), groups, weights)
    n_groups, size = len(scored.size), scored.size
    right = scored.right.reshape(n_groups, n_refits, n_heads)
    deviation = right - right.mean(axis=1, keepdims=True)
    shift = deviation.sum(axis=0) / size.sum()  # (R, L)
    influence = ((deviation - shift * size[:, None, None]) / size.sum()).reshape(-1, n_heads)
    by_pairs = n_groups / max(n_groups - 1, 1) * influence.T @ influence
    scatter = shift.T @ shift
    values, vectors = np.linalg.eigh((scatter - by_pairs) / (n_refits - 1))
    return (vectors * np.maximum(values, 0)) @ vectors.T, np.diag(scatter) / (n_refits - 1)


@dataclass(frozen=True)
class TrainingPart:
    """What training samples make of an accuracy or a contrast: ``variance``, and ``scatter`` of its ``n_refits``."""

    variance: float
    scatter: float
    n_refits: int

    @classmethod
    def of(cls, refits: FloatArray, groups: NDArray[Any], weights: FloatArray | None = None) -> "TrainingPart":
        """Estimate it from refits (R, n) as in `with_training`."""
        scale = max(float(np.nanmax(np.abs(refits))), 1.0)  # a difference of differences of a pair may be 2
        covariance, scatter = training_covariance(np.asarray(refits)[:, None] / scale, groups, weights=weights)
        return cls(scale**2 * float(covariance[0, 0]), scale**2 * float(scatter[0]), len(refits))

    def freedom(self, rest: float) -> float:
        """Degrees of freedom of this variance and that of the rest together, at least those of the refits' scatter."""
        if not self.variance > 0:
            return float("inf")
        return (self.n_refits - 1) * max((rest + self.variance) / self.scatter, 1.0) ** 2


def with_training(
    found: Interval | Difference,
    refits: FloatArray,
    groups: NDArray[Any],
    *,
    weights: FloatArray | None = None,
    level: float = 0.95,
) -> TotalError:
    """Widen limits over test groups by the variance over training samples.

    Parameters
    ----------
    found
        Of `accuracy_interval` or `paired_difference`, at this level.
    refits
        (R, n) right or wrong on the same test pairs of refits on random halves of the training groups; for a
        difference: the differences, refit by refit on the same halves.
    groups, weights
        As for ``found``.
    level
        Coverage.

    Raises
    ------
    ValueError
        As in `training_covariance`.
    """
    part = TrainingPart.of(refits, groups, weights)
    grown = widened(found.estimate, found.low, found.high, part, level=level)
    floor = 0.0 if isinstance(found, Interval) else -1.0
    return replace(grown, low=max(grown.low, floor), high=min(grown.high, 1.0))


def widened(estimate: float, low: float, high: float, part: TrainingPart, *, level: float) -> TotalError:
    """Widen limits over test groups by what training samples make; see `with_training`."""
    z = float(ndtri((1 + level) / 2))
    test = (high - low) / (2 * z)
    total = float(np.hypot(test, np.sqrt(part.variance)))
    freedom = part.freedom(test**2)
    t = float(stdtrit(freedom, (1 + level) / 2))
    below, above = (t * total / (z * test) * side for side in (estimate - low, high - estimate))
    reach = below if estimate > 0 else above  # of the side on which zero lies
    return TotalError(
        estimate,
        estimate - below,
        estimate + above,
        test,
        float(np.sqrt(part.variance)),
        total,
        (t + float(stdtrit(freedom, POWER))) * total,
        freedom,
        2 * float(stdtr(freedom, -t * abs(estimate) / reach)),
        part.n_refits,
    )
