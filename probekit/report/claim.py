"""One row of the table of claims."""

from dataclasses import dataclass, replace
from typing import Literal

MIDDLE, COMBINING, LARGER, TRAINED, INPUTS, DECLINE = CLAIMS = (
    "Middle-to-late layers are best",
    "Combining layers helps",
    "Larger is better",
    "Trained beats random weights",
    "Trained beats what enters it",
    "Accuracy declines in late layers",
)

Verdict = Literal["supported", "contradicted", "undetermined"]


@dataclass(frozen=True)
class Claim:
    """One row of the table of claims.

    Attributes
    ----------
    claim
        One of `CLAIMS`.
    dataset
        Of the test pairs.
    subject
        Backbone, or backbones.
    quantity
        What the estimate is, in words: rows of one quantity are corrected for each other.
    against
        The control that it stands against.
    about
        What else than the test pairs is a sample: whether a finding is about these checkpoints, other trainings or
        random networks, or new backbones, and about the fitted heads or other training pairs.
    verdict
        Supported, contradicted or undetermined.
    estimate, low, high
        In shares of pairs, of a slope per doubling of the parameters; NaN where there is no contrast.
    p, p_adjusted
        Two-sided p of no effect, alone and corrected.
    se_pairs, se_train, se_networks
        Standard errors over test pairs, training pairs (NaN where the heads are held fixed) and networks (0 where none
        is a sample).
    n_pairs, pairs_needed
        Test pairs, and how many would decide in 80 % of samples if the truth were the estimate (infinite where more
        networks, training pairs or seeds of random weights are needed instead).
    random_seeds
        Fewest seeds of random weights that it stands against; None without any.
    converged
        Whether all fits did.
    reason
        Why it is undetermined, or what else to know.
    """

    claim: str
    dataset: str
    subject: str
    quantity: str
    against: str
    about: str
    verdict: Verdict = "undetermined"
    estimate: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    p: float = float("nan")
    p_adjusted: float = float("nan")
    se_pairs: float = float("nan")
    se_train: float = float("nan")
    se_networks: float = float("nan")
    n_pairs: int = 0
    pairs_needed: float = float("nan")
    random_seeds: int | None = None
    converged: bool = True
    reason: str = ""


def because(claim: Claim, *reasons: str) -> Claim:
    """Add reasons to a row."""
    return replace(claim, reason="; ".join(text for text in (claim.reason, *reasons) if text))
