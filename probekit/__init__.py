"""Layer probing of diffusion transformers: dump features, sweep Bradley-Terry heads, report accuracy against depth.

Public names are imported on first use, so that ``import probekit`` loads neither torch nor diffusers.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probekit.backbones import Backbone, BlockList, Family, Output, register_family
    from probekit.dump import dump_features
    from probekit.heads import BradleyTerryClassifier, BradleyTerryClassifierCV, BradleyTerryMLP
    from probekit.imports import import_features
    from probekit.preferences import PreferenceSet, load_preferences
    from probekit.report import build_report
    from probekit.results import load_margins, load_results
    from probekit.store import FeatureStore
    from probekit.sweep import run_sweep

__version__ = version("dit-probekit")

_HOMES = {
    "Backbone": "backbones",
    "BlockList": "backbones",
    "BradleyTerryClassifier": "heads",
    "BradleyTerryClassifierCV": "heads",
    "BradleyTerryMLP": "heads",
    "Family": "backbones",
    "FeatureStore": "store",
    "Output": "backbones",
    "PreferenceSet": "preferences",
    "build_report": "report",
    "dump_features": "dump",
    "import_features": "imports",
    "load_margins": "results",
    "load_preferences": "preferences",
    "load_results": "results",
    "register_family": "backbones",
    "run_sweep": "sweep",
}

__all__ = [
    "Backbone",
    "BlockList",
    "BradleyTerryClassifier",
    "BradleyTerryClassifierCV",
    "BradleyTerryMLP",
    "Family",
    "FeatureStore",
    "Output",
    "PreferenceSet",
    "build_report",
    "dump_features",
    "import_features",
    "load_margins",
    "load_preferences",
    "load_results",
    "register_family",
    "run_sweep",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        message = f"module 'probekit' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(f"probekit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
