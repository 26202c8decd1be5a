"""From a frozen backbone and a preference set to a feature store."""

from probekit.dump.dry_run import dry_run
from probekit.dump.run import dump_features, run_dump

__all__ = ["dry_run", "dump_features", "run_dump"]
