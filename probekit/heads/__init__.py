"""What is fitted: Bradley-Terry heads on frozen features, and the layer sets they are fitted on."""

from probekit.heads.combine import (
    combination_name,
    concatenate,
    depth_layers,
    layer_set_name,
    mean_features,
    resolve_layer_sets,
    specs_with_features,
    stand_ins,
)
from probekit.heads.linear import BradleyTerryClassifier, BradleyTerryClassifierCV
from probekit.heads.mix import BradleyTerryLateFusion, BradleyTerryScalarMix
from probekit.heads.mlp import BradleyTerryMLP, fit_together
from probekit.heads.search import best_subsets, refit_subsets, screen_subsets
from probekit.heads.similarity import (
    PairKindSummary,
    block_ranges,
    compare_pair_kinds,
    contiguous_blocks,
    find_blocks,
    layer_similarity,
    pair_kinds,
)
from probekit.heads.streaming import StreamedDifferences

__all__ = [
    "BradleyTerryClassifier",
    "BradleyTerryClassifierCV",
    "BradleyTerryLateFusion",
    "BradleyTerryMLP",
    "BradleyTerryScalarMix",
    "PairKindSummary",
    "StreamedDifferences",
    "best_subsets",
    "block_ranges",
    "combination_name",
    "compare_pair_kinds",
    "concatenate",
    "contiguous_blocks",
    "depth_layers",
    "find_blocks",
    "fit_together",
    "layer_set_name",
    "layer_similarity",
    "mean_features",
    "pair_kinds",
    "refit_subsets",
    "resolve_layer_sets",
    "screen_subsets",
    "specs_with_features",
    "stand_ins",
]
