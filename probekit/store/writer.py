"""Write a feature store: plan blocks of rows, write each as a shard that is either absent or complete.

m = rows of a shard, d = channels of a feature vector.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit._types import RESOLVED_RATIO, canonical_sigma
from probekit.errors import FingerprintError, StoreError
from probekit.store import format as fmt
from probekit.store.files import (
    LOCK,
    TEMP,
    locked,
    publish,
    read_small,
    remove_dead_files,
    sync_folder,
    temporary,
    write_atomically,
)
from probekit.store.hdf5 import provenance, write_hdf5, writer_name
from probekit.store.pairs import read_judgements
from probekit.store.shards import Shard, check_shard, file_digests, read_store_file, scan, shard_path

logger = logging.getLogger(__name__)

MARGIN_BYTES = 16 * 2**20  # tables and metadata of a shard, sidecar, judgements


@dataclass(frozen=True)
class Block:
    """Rows that go into one shard, in this order.

    Attributes
    ----------
    name
        Digest of the row keys, and the file name of the shard.
    row_ids
        Row keys (hex), rows of one prompt adjacent.
    """

    name: str
    row_ids: tuple[str, ...]


def open_store(path: str | Path, *, config: dict[str, Any], describe: dict[str, Any]) -> "StoreWriter":
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

    Raises
    ------
    FingerprintError
        If the store was made with another configuration; names the first key that differs and both values.
    StoreError
        If the folder holds something else, or a store of another major version.
    """
    root, full = Path(path).absolute(), fmt.full_config(config)
    if root.exists() and not root.is_dir():
        msg = f"{root}: a file; allowed: a new folder or a feature store"
        raise StoreError(msg)
    names = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
    foreign = [name for name in names if not name.startswith((TEMP, LOCK))]
    if foreign and "store.json" not in foreign:
        msg = f"{root}: holds {foreign[0]!r} and no store.json; allowed: a new or empty folder, or a feature store"
        raise StoreError(msg)
    remove_dead_files(root)
    file = root / "store.json"
    with locked(file):
        if not file.exists():
            content = {
                "format": fmt.FORMAT,
                "format_version": fmt.FORMAT_VERSION,
                "fingerprint": fmt.fingerprint(full),
                "config": full,
                "describe": describe,
                "provenance": provenance(),
            }
            write_atomically(file, fmt.seal(content))
        stored = read_store_file(file)
        for key, old, new in fmt.differences(stored["config"], full):
            msg = (
                f"{file}: {key} is {_short(old)} in this store, {_short(new)} was asked for; "
                "use another --out, or the store's value"
            )
            raise FingerprintError(msg)
        recorded = {key: value for key, value in stored["describe"].items() if key == fmt.SIGMA_RESOLUTION}
        facts = json.loads(fmt.canonical_json(describe)) | recorded
        changes = list(fmt.differences(stored["describe"], facts))
        for key, old, new in changes:
            logger.warning("%s: %s was %s, is now %s", file, key, _short(old), _short(new))
        if changes:
            stored["describe"] = facts
            write_atomically(file, fmt.seal(stored))
    return StoreWriter(root, stored)


class StoreWriter:
    """A store that rows are added to; made by ``open_store``. It holds no open file between calls.

    Attributes
    ----------
    path, fingerprint, config, describe
        Folder, and the content of ``store.json``.
    """

    def __init__(self, path: Path, stored: Mapping[str, Any]) -> None:
        self.path = path
        self.fingerprint: str = stored["fingerprint"]
        self.config: dict[str, Any] = stored["config"]
        self.describe: dict[str, Any] = stored["describe"]

    @property
    def sigma_resolution(self) -> dict[str, dict[str, Any]]:
        """What `record_resolution` recorded, by noise level."""
        found: dict[str, dict[str, Any]] = self.describe.get(fmt.SIGMA_RESOLUTION, {})
        return found

    def missing(self, row_ids: Sequence[str], *, sigma: str, draw: int = 0) -> list[str]:
        """Row keys without a committed shard at this noise level and draw, in the given order."""
        return self._missing(row_ids, scan(self.path, fingerprint=self.fingerprint)[0], sigma, draw)

    def _missing(self, row_ids: Sequence[str], shards: Sequence[Shard], sigma: str, draw: int) -> list[str]:
        coordinates = (canonical_sigma(sigma), draw)
        done: set[bytes] = set()
        for shard in shards:
            if (shard.sidecar.sigma, shard.sidecar.draw) == coordinates:
                done.update(shard.row_keys())
        return [row for row, key in zip(row_ids, map(bytes.fromhex, row_ids), strict=True) if key not in done]

    def plan(self, rows: pd.DataFrame, *, sigma: str, draw: int = 0, rows_per_shard: int) -> list[Block]:
        """Cut the rows that are missing into blocks.

        Blocks of committed shards and of earlier plans are taken again where all their rows are missing here, so a
        killed dump goes on with the same blocks and a further noise level gets the blocks of the first. The rest is
        cut anew, whole prompts together, and written once under ``plans/``.

        Parameters
        ----------
        rows
            Columns ``row_id`` and ``prompt``; order decides the order of new blocks.
        rows_per_shard
            Largest block.

        Returns
        -------
        list of Block
            In the order of their first rows.
        """
        # Rows of one prompt come together, prompts in the order of their first row.
        ordered = rows.assign(_prompt=pd.factorize(rows["prompt"])[0]).sort_values("_prompt", kind="stable")
        blocks = []
        with locked(self.path / "plans" / "all"):  # so that two commands do not cut the same rows in two ways
            shards, _ = scan(self.path, fingerprint=self.fingerprint)
            missing = dict.fromkeys(self._missing(ordered["row_id"].tolist(), shards, sigma, draw), True)
            position = {row: i for i, row in enumerate(missing)}
            for row_ids in self._known_blocks(shards) if missing else ():
                if len(row_ids) <= rows_per_shard and all(row in missing for row in row_ids):
                    blocks.append(Block(fmt.block_name(row_ids), tuple(row_ids)))
                    for row in row_ids:
                        del missing[row]
            prompts: dict[int, list[str]] = {}
            for row, prompt in zip(ordered["row_id"], ordered["_prompt"], strict=True):
                if missing.pop(row, False):  # a row that is given twice is stored once
                    prompts.setdefault(prompt, []).append(row)
            new = [Block(fmt.block_name(ids), tuple(ids)) for ids in _pack(list(prompts.values()), rows_per_shard)]
            if new:
                self._write_plan(new)
        return sorted(blocks + new, key=lambda block: position[block.row_ids[0]])

    @contextmanager
    def claim(self, block: Block, *, sigma: str, draw: int = 0) -> Iterator[bool]:
        """Hold the lock of one shard; yield False if somebody else finished it meanwhile.

        Waits while another process holds it, so two identical commands do each shard once.
        """
        sigma = canonical_sigma(sigma)
        path = shard_path(self.path, sigma, draw, block.name)
        with locked(path):
            yield not isinstance(check_shard(path, fingerprint=self.fingerprint, sigma=sigma, draw=draw), Shard)

    def write_shard(
        self,
        block: Block,
        *,
        sigma: str,
        draw: int = 0,
        timestep: float,
        rows: pd.DataFrame,
        features: Mapping[tuple[str, int], NDArray[np.float32]],
    ) -> Path:
        """Write one shard, inside ``claim``.

        Parameters
        ----------
        block
            One of ``plan``.
        timestep
            Conditioning timestep that belongs to sigma, recorded as an attribute.
        rows
            The m rows in the order of the block: ``row_id``, ``prompt``, ``image_id``, ``image_sha256`` (bytes),
            ``width``, ``height``, ``file_bytes``, ``status`` (0 ok, 1 unreadable).
        features
            (pooling, layer) -> (m, d) for every pooling and each layer at which it exists; d may differ between
            poolings. Rows with a non-finite value anywhere get status 2; rows with a status other than 0 are stored as
            NaN.

        Raises
        ------
        StoreError
            If the disk is full or cannot be written; nothing is lost and the same command continues later.
        ValueError
            If rows or features are not those of the block and the store.
        """
        if rows["row_id"].tolist() != list(block.row_ids):
            msg = f"block {block.name} needs its {len(block.row_ids)} rows in their order"
            raise ValueError(msg)
        wanted = fmt.feature_keys(self.config)
        if features.keys() != wanted:
            lacking, extra = sorted(wanted - features.keys()), sorted(features.keys() - wanted)
            msg = f"block {block.name} lacks features for {lacking} and has {extra}, which the store's config does not"
            raise ValueError(msg)
        sigma = canonical_sigma(sigma)
        path = shard_path(self.path, sigma, draw, block.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        planned = sum(values.size for values in features.values()) * 4 + MARGIN_BYTES
        free = shutil.disk_usage(path.parent).free
        if free < planned:
            msg = f"{path}: needs up to {planned} bytes, {free} are free; make space and run the same command again"
            raise StoreError(msg)
        identity = {
            "format": fmt.FORMAT,
            "format_version": fmt.FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "block": block.name,
            "sigma": sigma,
            "draw": draw,
        }
        attributes = {"timestep": timestep, "config_json": fmt.canonical_json(self.config), "writer": writer_name()}
        with temporary(path) as (temp, descriptor):
            datasets = write_hdf5(
                temp, rows=rows, features=features, config=self.config, attributes=identity | attributes
            )
            os.fsync(descriptor)
            size = os.fstat(descriptor).st_size
            ranges = [(r["offset"], r["nbytes"]) for r in datasets.values() if r["offset"] is not None]
            whole, outside = file_digests(descriptor, size, without=ranges)
            sidecar = {
                "n_rows": len(rows),
                "n_prompts": datasets["prompts/sha256"]["shape"][0],
                "rows_sha256": hashlib.sha256(bytes.fromhex("".join(block.row_ids))).hexdigest(),
                "bytes": size,
                "sha256": whole,
                "meta_sha256": outside,
                "datasets": datasets,
            }
            # An old sidecar must never vouch for the new file, so it goes first.
            path.with_suffix(".json").unlink(missing_ok=True)
            sync_folder(path.parent)
            publish(temp, descriptor, path)
        write_atomically(path.with_suffix(".json"), fmt.seal(identity | sidecar))
        return path

    def record_resolution(self, sigma: str, *, ratio: float | None, rows: int, note: str = "") -> None:
        """Record in ``store.json`` how far a noise level stands out from the rounding of the compute dtype.

        Parameters
        ----------
        sigma
            Noise level above 0.
        ratio
            Feature change from sigma 0 to this sigma over the change from bfloat16 to float32; below `RESOLVED_RATIO`
            the noise level is unresolved. None if it was not measured.
        rows
            Rows that it was measured on.
        note
            What a reader should know of the measurement, such as why there is none.
        """
        known = self.sigma_resolution.get(canonical_sigma(sigma), {})
        if ratio is None and known.get("ratio") is not None:
            return  # what was measured stays
        resolved = None if ratio is None else ratio >= RESOLVED_RATIO
        entry = {"ratio": ratio, "resolved": resolved, "rows": rows, "note": note}
        file = self.path / "store.json"
        with locked(file):
            stored = read_store_file(file)  # another process may have recorded its noise level meanwhile
            stored["describe"].setdefault(fmt.SIGMA_RESOLUTION, {})[canonical_sigma(sigma)] = entry
            write_atomically(file, fmt.seal(stored))
        self.describe = stored["describe"]

    def write_judgements(self, name: str, frame: pd.DataFrame) -> Path:
        """Write a set of pairs beside the shards, in place of an older one of the same name with no other pairs.

        Labels, splits and the like may differ from the older set, and there may be more pairs.

        Raises
        ------
        StoreError
            If the name cannot be a file name everywhere, or pairs of the older set would be lost.
        """
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", name):
            msg = f"judgements are named {name!r}; allowed: letters, digits, '.', '_' and '-'"
            raise StoreError(msg)
        path = self.path / "judgements" / f"{name}.parquet"
        with locked(path):
            if path.exists():
                old = read_judgements(path).reindex(columns=["pair_id"])
                lost = int((~old["pair_id"].isin(frame["pair_id"])).sum())
                if lost:
                    msg = (
                        f"{path}: {lost} of its {len(old)} pairs are not in the new set of this name; "
                        f"use a preference file of another name, or delete {path} to replace it"
                    )
                    raise StoreError(msg)
            with temporary(path) as (temp, descriptor):
                frame.to_parquet(temp, index=False)
                publish(temp, descriptor, path)
        return path

    def _known_blocks(self, shards: Sequence[Shard]) -> Iterator[list[str]]:
        """Row keys of the blocks of committed shards, then of the plans."""
        for block in {shard.sidecar.block: shard for shard in shards}.values():
            yield block.row_ids()
        for path in sorted((self.path / "plans").glob("[!.]*.json")):
            try:
                yield from fmt.unseal(read_small(path, limit=2**32))["blocks"]
            except (ValueError, KeyError):
                msg = f"{path}: damaged; delete it and run the same dump command again"
                raise StoreError(msg) from None

    def _write_plan(self, blocks: list[Block]) -> None:
        content = [list(block.row_ids) for block in blocks]
        digest = hashlib.sha256(fmt.canonical_json(content).encode()).hexdigest()[:32]
        path = self.path / "plans" / f"{digest}.json"
        head = {"format": fmt.FORMAT, "format_version": fmt.FORMAT_VERSION}
        if not path.exists():  # named by its content: whoever is first writes the same bytes
            write_atomically(path, fmt.seal(head | {"blocks": content}))


def _pack(prompts: list[list[str]], size: int) -> list[list[str]]:
    """Fill blocks with whole prompts in order; a prompt larger than a block spills over several."""
    blocks: list[list[str]] = []
    for row_ids in prompts:
        if blocks and len(blocks[-1]) + len(row_ids) <= size:
            blocks[-1] += row_ids
        else:
            blocks += [row_ids[i : i + size] for i in range(0, len(row_ids), size)]
    return blocks


def _short(value: object) -> str:
    text = "absent" if value is None else fmt.canonical_json(value)
    return text if len(text) <= 80 else text[:77] + "..."
