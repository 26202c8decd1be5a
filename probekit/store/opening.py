"""Make the folder of a store, or open one for writing that was made with the same configuration."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probekit.errors import FingerprintError, StoreError
from probekit.store import format as fmt
from probekit.store.files import LOCK, TEMP, locked, remove_dead_files, write_atomically
from probekit.store.hdf5 import provenance
from probekit.store.settings import differing, refusal, short
from probekit.store.shards import read_store_file, scan
from probekit.store.writer import StoreWriter

logger = logging.getLogger(__name__)


def open_store(
    path: str | Path, *, config: dict[str, Any], describe: dict[str, Any], dry_run: bool = False
) -> "StoreWriter":
    """Create a store, or open one that was made with the same configuration.

    Parameters
    ----------
    path
        Folder of the store; new, empty or a store.
    config
        JSON-plain values of everything that changes the numbers; ``layers`` is a list of
        ``{"index", "name", "stream"}``, ``poolings`` maps names to definitions, ``pooling_layers`` maps the names of
        poolings that do not exist at all layers to the layers at which they do.
    describe
        JSON-plain facts of the backbone for readers; where they differ from those in the store, they replace them.
        What `StoreWriter.record_resolution` recorded stays.
    dry_run
        Write nothing, now or in `StoreWriter.plan`; nothing else can be done with the result.

    Raises
    ------
    FingerprintError
        If the store was made with another configuration; names the keys that differ and both values.
    StoreError
        If the folder holds something else, or a store of another major version.
    """
    root, full = Path(path).absolute(), fmt.full_config(config)
    if root.exists() and not root.is_dir():
        msg = f"{root}: a file; allowed: a new folder or a feature store"
        raise StoreError(msg)
    names = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
    foreign = [name for name in names if not name.startswith((TEMP, LOCK))]
    if foreign and "store.json" not in foreign and not _lacks_only_its_head(root, foreign, fmt.fingerprint(full)):
        msg = f"{root}: holds {foreign[0]!r} and no store.json; allowed: a new or empty folder, or a feature store"
        raise StoreError(msg)
    content = {
        "format": fmt.FORMAT,
        "format_version": fmt.FORMAT_VERSION,
        "fingerprint": fmt.fingerprint(full),
        "config": full,
        "describe": describe,
        "provenance": provenance(),
    }
    file = root / "store.json"
    if dry_run:
        if file.exists():
            _refuse_other_settings(file, full)
        elif foreign:
            logger.warning(
                "%s: is missing; without --dry-run it is written again, and what was recorded in it is lost", file
            )
        return StoreWriter(root, content, dry_run=True)
    remove_dead_files(root)
    with locked(file):
        if not os.path.lexists(file):  # a link is refused below
            if foreign:
                logger.warning("%s: is missing and is written again; what was recorded in it is lost", file)
            write_atomically(file, fmt.seal(content))
        stored = _refuse_other_settings(file, full)
        recorded = {key: value for key, value in stored["describe"].items() if key == fmt.SIGMA_RESOLUTION}
        facts = json.loads(fmt.canonical_json(describe)) | recorded
        changes = list(differing(stored["describe"], facts))
        for key, old, new in changes:
            logger.warning("%s: %s was %s, is now %s", file, key, short(old), short(new))
        if changes:
            stored["describe"] = facts
            write_atomically(file, fmt.seal(stored))
    return StoreWriter(root, stored)


def _refuse_other_settings(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``store.json`` if it was made with this configuration."""
    stored = read_store_file(file)
    if (wrong := refusal(stored["config"], config, of="store")) is not None:
        msg = f"{file}: {wrong}; use another --out, or the store's values"
        raise FingerprintError(msg)
    return stored


def _lacks_only_its_head(root: Path, names: list[str], fingerprint: str) -> bool:
    """Whether a folder is a store of this configuration, all of its shards done, without its ``store.json``.

    Raises
    ------
    StoreError
        If some shards are done and another is damaged.
    """
    if not {"shards", "judgements", "plans", fmt.IMAGE_DIGESTS}.issuperset(names):
        return False
    shards, problems = scan(root, fingerprint=fingerprint)
    if shards and problems:
        raise StoreError(problems[0])
    return bool(shards)
