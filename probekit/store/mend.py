"""What mends a store, in words: readers, writers and `verify_store` say the same."""

from collections.abc import Mapping
from typing import Any

AGAIN = "run the same probekit command again that made the store"
MEND_SHARD = f"delete it and its .json or .h5 companion, and {AGAIN}"
MEND_JUDGEMENTS = f"delete it and its .json companion, and {AGAIN}"
MEND_PLAN = f"delete it, and {AGAIN}"
MEND_STORE_FILE = f"delete it, and {AGAIN}: it writes it"


def command_again(describe: Mapping[str, Any]) -> str:
    """Name the command that made a store, where what the store says of itself could be read."""
    return f"run the same probekit {'import-features' if describe.get('imported') else 'dump'} command again"
