"""What is fitted: Bradley-Terry heads on frozen features, and the layer sets they are fitted on."""

from probekit.heads.combine import combination_name, concatenate, layer_set_name, resolve_layer_sets
from probekit.heads.linear import BradleyTerryClassifier, BradleyTerryClassifierCV
from probekit.heads.mlp import BradleyTerryMLP
from probekit.heads.search import best_subsets, refit_subsets, screen_subsets

__all__ = [
    "BradleyTerryClassifier",
    "BradleyTerryClassifierCV",
    "BradleyTerryMLP",
    "best_subsets",
    "combination_name",
    "concatenate",
    "layer_set_name",
    "refit_subsets",
    "resolve_layer_sets",
    "screen_subsets",
]
