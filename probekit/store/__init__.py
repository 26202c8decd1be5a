"""Features on disk: a public format (``FORMAT.md``), written shard by shard and read layer by layer."""

from probekit.store.blocks import Block
from probekit.store.export import Export, export_store
from probekit.store.format import (
    FORMAT,
    FORMAT_VERSION,
    IMAGE_DIGESTS,
    STATUS_NON_FINITE,
    STATUS_OK,
    STATUS_UNREADABLE,
    canonical_json,
    fingerprint,
    rows_per_shard,
)
from probekit.store.opening import open_store
from probekit.store.pairs import BoundJudgements, Pairs
from probekit.store.reader import FeatureStore, Setting
from probekit.store.shards import stored_config
from probekit.store.verify import Problem, Verification, verify_store
from probekit.store.writer import StoreWriter

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "IMAGE_DIGESTS",
    "STATUS_NON_FINITE",
    "STATUS_OK",
    "STATUS_UNREADABLE",
    "Block",
    "BoundJudgements",
    "Export",
    "FeatureStore",
    "Pairs",
    "Problem",
    "Setting",
    "StoreWriter",
    "Verification",
    "canonical_json",
    "export_store",
    "fingerprint",
    "open_store",
    "rows_per_shard",
    "stored_config",
    "verify_store",
]
