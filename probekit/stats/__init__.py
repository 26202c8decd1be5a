"""What may be claimed: arrays of margins and labels in, numbers out. Nothing here fits or refits a head."""

from probekit.stats.comparisons import (
    Difference,
    paired_difference,
    pairs_needed,
    planned_difference,
    right_with_a_coin,
    say_planned,
)
from probekit.stats.families import Family, holm, paired_family
from probekit.stats.intervals import (
    Band,
    Interval,
    accuracy_interval,
    effective_groups,
    macro_interval,
    simultaneous_band,
)
from probekit.stats.permutation import PermutationTest, permutation_test, permuted_labels
from probekit.stats.probabilities import Calibration, Score, calibration
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
from probekit.stats.selection import BestOf, Plateau, best_of_many, plateau_set
from probekit.stats.size import Contrast, network_contrast, size_slope, slope_weights
from probekit.stats.training import TotalError, training_covariance, with_training
from probekit.stats.votes import VoteCeiling, vote_ceiling

__all__ = [
    "PROTOCOLS",
    "Band",
    "BestOf",
    "Calibration",
    "Contrast",
    "Difference",
    "Expectations",
    "Family",
    "Interval",
    "Outcome",
    "PermutationTest",
    "Plateau",
    "Protocol",
    "Score",
    "TotalError",
    "VoteCeiling",
    "accuracy_interval",
    "best_of_many",
    "calibration",
    "effective_groups",
    "expectations",
    "holm",
    "macro_interval",
    "network_contrast",
    "paired_difference",
    "paired_family",
    "pairs_needed",
    "permutation_test",
    "permuted_labels",
    "planned_difference",
    "plateau_set",
    "prompt_weights",
    "right_with_a_coin",
    "say_planned",
    "simultaneous_band",
    "size_slope",
    "slope_weights",
    "strict",
    "training_covariance",
    "tune_threshold",
    "vote_ceiling",
    "with_training",
]
