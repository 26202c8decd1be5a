"""Features computed elsewhere, from a file into a feature store: probed by the same heads, data and statistics."""

from probekit.imports.importing import import_features, plan_import, run_import
from probekit.imports.plan import ImportPlan

__all__ = ["ImportPlan", "import_features", "plan_import", "run_import"]
