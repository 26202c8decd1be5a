"""What may be claimed: arrays of margins and labels in, numbers out. Nothing here fits or refits a head."""

from probekit.stats.comparisons import Difference, paired_difference, planned_difference, say_planned
from probekit.stats.intervals import (
    Band,
    Interval,
    accuracy_interval,
    effective_groups,
    macro_interval,
    simultaneous_band,
)
from probekit.stats.protocols import (
    PROTOCOLS,
    Expectations,
    Outcome,
    Protocol,
    expectations,
    prompt_weights,
    strict,
    tune_threshold,
)
from probekit.stats.votes import VoteCeiling, vote_ceiling

__all__ = [
    "PROTOCOLS",
    "Band",
    "Difference",
    "Expectations",
    "Interval",
    "Outcome",
    "Protocol",
    "VoteCeiling",
    "accuracy_interval",
    "effective_groups",
    "expectations",
    "macro_interval",
    "paired_difference",
    "planned_difference",
    "prompt_weights",
    "say_planned",
    "simultaneous_band",
    "strict",
    "tune_threshold",
    "vote_ceiling",
]
