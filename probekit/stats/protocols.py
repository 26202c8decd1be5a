"""The named definitions of accuracy: from margins and labels to right and wrong."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from probekit._types import FloatArray


@dataclass(frozen=True)
class Outcome:
    """Which pairs a head got right under a protocol.

    Attributes
    ----------
    correct
        (n,) 1 right, 0 wrong, NaN not scored.
    n_pairs
        Pairs that were scored.
    true_ties
        Pairs whose label prefers neither side.
    predicted_ties
        Scored pairs to which the head gave the same score twice.
    """

    correct: FloatArray
    n_pairs: int
    true_ties: int
    predicted_ties: int

    @property
    def accuracy(self) -> float:
        """Share of scored pairs that are right; NaN if none was scored."""
        return float(np.nansum(self.correct)) / self.n_pairs if self.n_pairs else float("nan")


def strict(margins: FloatArray, labels: FloatArray) -> Outcome:
    """Score a pair as right when its margin has the sign of the preference; a margin of zero is wrong.

    Pairs with label 0.5 are not scored. Always answering "equal" thus scores 0, and a fair coin 50 %.

    Parameters
    ----------
    margins
        (n,) score of the first minus score of the second.
    labels
        (n,) probability that the first is preferred.

    Raises
    ------
    ValueError
        If lengths differ, a margin is not finite, or a label lies outside 0 to 1.
    """
    margins, labels = np.asarray(margins), np.asarray(labels)
    if margins.shape != labels.shape or margins.ndim != 1:
        message = f"margins have shape {margins.shape} and labels {labels.shape}; both must be (pairs,)"
        raise ValueError(message)
    if not np.isfinite(margins).all():
        message = f"margin of pair {int(np.argmin(np.isfinite(margins)))} is not finite; a head must score every pair"
        raise ValueError(message)
    valid = (labels >= 0) & (labels <= 1)
    if not valid.all():
        message = f"label of pair {int(np.argmin(valid))} is {labels[~valid][0]}; it must lie in 0 to 1"
        raise ValueError(message)
    tied = labels == 0.5
    right = np.sign(margins) == np.sign(labels - 0.5)
    return Outcome(
        correct=np.where(tied, np.nan, right.astype(np.float64)),
        n_pairs=int((~tied).sum()),
        true_ties=int(tied.sum()),
        predicted_ties=int((margins[~tied] == 0).sum()),
    )


PROTOCOLS: dict[str, Callable[[FloatArray, FloatArray], Outcome]] = {"strict": strict}
