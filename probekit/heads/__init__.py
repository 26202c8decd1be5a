"""What is fitted: Bradley-Terry heads on frozen features, and the layer sets they are fitted on."""

from probekit.heads.combine import combination_name, concatenate, layer_set_name, resolve_layer_sets
from probekit.heads.linear import BradleyTerryClassifier, BradleyTerryClassifierCV
from probekit.heads.mlp import BradleyTerryMLP

__all__ = [
    "BradleyTerryClassifier",
    "BradleyTerryClassifierCV",
    "BradleyTerryMLP",
    "combination_name",
    "concatenate",
    "layer_set_name",
    "resolve_layer_sets",
]
