"""The typed contents of the YAML files and of the command line: one model per command, unknown keys refused.

The same models check options and files, so a setting has one name, one type and one default. YAML is read strictly:
no aliases (they can expand without bound), no duplicate keys (the last one would win silently).
"""

from probekit.config.features import (
    SHARD_MIB,
    DumpConfig,
    ImportConfig,
    PreferenceOptions,
)
from probekit.config.heads import (
    OF_THE_PLAN,
    PRESETS,
    STRENGTHS,
    LayerSet,
    LinearHead,
    MLPHead,
    Rule,
    SubsetSearch,
)
from probekit.config.strict import (
    load_yaml,
)
from probekit.config.sweep import (
    Primary,
    ScoreTableConfig,
    SweepConfig,
    Ties,
)

__all__ = [
    "OF_THE_PLAN",
    "PRESETS",
    "SHARD_MIB",
    "STRENGTHS",
    "DumpConfig",
    "ImportConfig",
    "LayerSet",
    "LinearHead",
    "MLPHead",
    "PreferenceOptions",
    "Primary",
    "Rule",
    "ScoreTableConfig",
    "SubsetSearch",
    "SweepConfig",
    "Ties",
    "load_yaml",
]
