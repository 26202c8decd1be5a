"""What votes say of how well anything can predict a vote."""

from dataclasses import dataclass

import numpy as np

from probekit._types import FloatArray, IntArray


@dataclass(frozen=True)
class VoteCeiling:
    """How well single votes can be predicted on pairs with several votes each.

    Attributes
    ----------
    agreement
        Probability that two annotators of a pair agree; unbiased. No best scorer predicts votes worse than this.
    ceiling
        Upper limit of what a scorer that knows every pair's true share of votes predicts.
    plug_in
        Mean of the observed share of the more frequent vote. It takes the chance of few votes for opinion, so that it
        lies too high: shown for comparison only.
    n_pairs, votes
        Pairs with at least two votes, and their mean number of votes.
    """

    agreement: float
    ceiling: float
    plug_in: float
    n_pairs: int
    votes: float


def vote_ceiling(labels: FloatArray, n_votes: IntArray) -> VoteCeiling:
    """Estimate between which values the share of single votes lies that the best possible scorer predicts.

    With p a pair's true share of votes for one side, two annotators agree with probability a = p^2 + (1 - p)^2, and the
    best prediction of a vote is right with m = max(p, 1 - p) = (1 + sqrt(2 a - 1)) / 2 >= a. From k of n votes,
    (k (k - 1) + (n - k) (n - k - 1)) / (n (n - 1)) estimates a without bias, while max(k, n - k) / n is too high for m,
    the more so the fewer votes there are. As m is concave in a, mean(a) <= mean(m) <= (1 + sqrt(2 mean(a) - 1)) / 2.

    This is about single votes: against majorities of many votes an accuracy may be higher.

    Parameters
    ----------
    labels
        (n,) share of votes for the first side.
    n_votes
        (n,) votes of each pair; pairs with fewer than two say nothing.

    Raises
    ------
    ValueError
        If no pair has two votes.

    Examples
    --------
    Coins, thrown twice each: the plug-in sees 75 % where there is nothing to predict.

    >>> found = vote_ceiling(np.array([1.0, 0.0, 0.5, 0.5]), np.array([2, 2, 2, 2]))
    >>> found.agreement, found.ceiling, found.plug_in
    (0.5, 0.5, 0.75)
    """
    several = np.asarray(n_votes) >= 2
    if not several.any():
        message = f"none of the {len(several)} pairs has two votes or more"
        raise ValueError(message)
    n = np.asarray(n_votes, dtype=np.float64)[several]
    k = np.asarray(labels)[several] * n
    agreement = float(np.mean((k * (k - 1) + (n - k) * (n - k - 1)) / (n * (n - 1))))
    return VoteCeiling(
        agreement=agreement,
        ceiling=float((1 + np.sqrt(max(2 * agreement - 1, 0.0))) / 2),
        plug_in=float(np.mean(np.maximum(k, n - k) / n)),
        n_pairs=int(several.sum()),
        votes=float(n.mean()),
    )
