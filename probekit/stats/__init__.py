"""What may be claimed: arrays of margins and labels in, numbers out. Nothing here fits or refits a head."""

from probekit.stats.comparisons import Difference, paired_difference, planned_difference
from probekit.stats.intervals import (
    Band,
    Interval,
    accuracy_interval,
    effective_groups,
    macro_interval,
    simultaneous_band,
)
from probekit.stats.protocols import PROTOCOLS, Outcome, strict

__all__ = [
    "PROTOCOLS",
    "Band",
    "Difference",
    "Interval",
    "Outcome",
    "accuracy_interval",
    "effective_groups",
    "macro_interval",
    "paired_difference",
    "planned_difference",
    "simultaneous_band",
    "strict",
]
