"""Write a feature store: plan blocks of rows, write each as a shard that is either absent or complete.

m = rows of a shard, d = channels of a feature vector.
"""

import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
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
    is_locked,
    locked,
    publish,
    remove_dead_files,
    sync_folder,
    temporary,
    write_atomically,
)
from probekit.store.hdf5 import provenance, write_hdf5, writer_name
from probekit.store.pairs import read_judgements
from probekit.store.shards import (
    Shard,
    check_shard,
    file_digest,
    file_digests,
    plan_files,
    read_plan,
    read_store_file,
    scan,
    shard_path,
)

logger = logging.getLogger(__name__)

DIGESTS = "image_digests.parquet"  # a dump's cache beside the shards, no part of the format
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
    number
        Its place among all blocks of the rows that were asked for, whether they are done or not; so several workers
        share the blocks without talking to each other.
    state
        ``done``, ``new``, or what is wrong with the shard that is there.
    """

    name: str
    row_ids: tuple[str, ...]
    number: int = 0
    state: str = "new"


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
            logger.warning("%s: is missing; a dump writes it again, and what was recorded in it is lost", file)
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
        changes = list(fmt.differences(stored["describe"], facts))
        for key, old, new in changes:
            logger.warning("%s: %s was %s, is now %s", file, key, _short(old), _short(new))
        if changes:
            stored["describe"] = facts
            write_atomically(file, fmt.seal(stored))
    return StoreWriter(root, stored)


def _refuse_other_settings(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``store.json`` if it was made with this configuration."""
    stored = read_store_file(file)
    for key, old, new in fmt.differences(stored["config"], config):
        msg = (
            f"{file}: {key} is {_short(old)} in this store, {_short(new)} was asked for; "
            "use another --out, or the store's value"
        )
        raise FingerprintError(msg)
    return stored


def _lacks_only_its_head(root: Path, names: list[str], fingerprint: str) -> bool:
    """Whether a folder is a store of this configuration, all of its shards done, without its ``store.json``.

    Raises
    ------
    StoreError
        If some shards are done and another is damaged.
    """
    if not {"shards", "judgements", "plans", DIGESTS}.issuperset(names):
        return False
    shards, problems = scan(root, fingerprint=fingerprint)
    if shards and problems:
        raise StoreError(problems[0])
    return bool(shards)


class StoreWriter:
    """A store that rows are added to; made by ``open_store``. It holds no open file between calls.

    Attributes
    ----------
    path, fingerprint, config, describe
        Folder, and the content of ``store.json``.
    """

    def __init__(self, path: Path, stored: Mapping[str, Any], *, dry_run: bool = False) -> None:
        self.path = path
        self._dry_run = dry_run
        self.fingerprint: str = stored["fingerprint"]
        self.config: dict[str, Any] = stored["config"]
        self.describe: dict[str, Any] = stored["describe"]
        self._keys: dict[str, frozenset[str]] = {}  # rows of committed shards by block, which is named after them

    @property
    def sigma_resolution(self) -> dict[str, dict[str, Any]]:
        """What `record_resolution` recorded, by noise level."""
        found: dict[str, dict[str, Any]] = self.describe.get(fmt.SIGMA_RESOLUTION, {})
        return found

    def missing(self, row_ids: Sequence[str], *, sigma: str, draw: int = 0) -> list[str]:
        """Row keys without a committed shard at this noise level and draw, in the given order."""
        place = (canonical_sigma(sigma), draw)
        done: set[bytes] = set()
        for shard in scan(self.path, fingerprint=self.fingerprint)[0]:
            if (shard.sidecar.sigma, shard.sidecar.draw) == place:
                done.update(shard.row_keys())
        return [row for row in row_ids if bytes.fromhex(row) not in done]

    def plan(self, rows: pd.DataFrame, *, sigma: str, draw: int = 0, rows_per_shard: int) -> list[Block]:
        """Cut the rows that are missing into blocks: those of `blocks` that are not done."""
        found = self.blocks(rows, sigma=sigma, draw=draw, rows_per_shard=rows_per_shard)
        return [block for block in found if block.state != "done"]

    def blocks(self, rows: pd.DataFrame, *, sigma: str, draw: int = 0, rows_per_shard: int) -> list[Block]:
        """List the blocks that hold the rows at one noise level and draw, done or to be done.

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
            In the order of their first rows; the same for every worker that asks for the same rows.

        Raises
        ------
        StoreError
            If a shard is damaged whose block is not one of them, so that it would not be written again.
        """
        sigma = canonical_sigma(sigma)
        # Rows of one prompt come together, prompts in the order of their first row.
        ordered = rows.assign(_prompt=pd.factorize(rows["prompt"])[0]).sort_values("_prompt", kind="stable")
        position = {row: i for i, row in reversed(list(enumerate(ordered["row_id"])))}
        missing, states = dict.fromkeys(position), {}
        with nullcontext() if self._dry_run else locked(self.path / "plans" / "all"):  # else rows are cut in two ways
            shards = scan(self.path, fingerprint=self.fingerprint)[0]
            here = [shard for shard in shards if (shard.sidecar.sigma, shard.sidecar.draw) == (sigma, draw)]
            for shard in here:
                row_ids = tuple(shard.row_ids())
                self._keys[shard.sidecar.block] = frozenset(row_ids)
                if any(row in position for row in row_ids):
                    states[row_ids] = "done"
                    for row in row_ids:
                        missing.pop(row, None)
            others = {shard.sidecar.block: shard for shard in shards}.values() if missing else ()
            for row_ids in chain((tuple(shard.row_ids()) for shard in others), self._planned() if missing else ()):
                if len(row_ids) <= rows_per_shard and all(row in missing for row in row_ids):
                    states[row_ids] = "new"
                    for row in row_ids:
                        del missing[row]
            prompts: dict[int, list[str]] = {}
            for row, prompt in zip(ordered["row_id"], ordered["_prompt"], strict=True):
                if row in missing:  # a row that is given twice is stored once
                    del missing[row]
                    prompts.setdefault(prompt, []).append(row)
            new = [tuple(ids) for ids in _pack(list(prompts.values()), rows_per_shard)]
            if new and not self._dry_run:
                self._write_plan(new)
            states |= dict.fromkeys(new, "new")
        first = {ids: min(position.get(row, len(position)) for row in ids) for ids in states}
        found = [
            Block(name := fmt.block_name(ids), ids, number, self._state(name, states[ids], sigma, draw))
            for number, ids in enumerate(sorted(states, key=lambda ids: first[ids]))
        ]
        known = {block.name for block in found} | {shard.sidecar.block for shard in here}
        self._refuse_damaged(known, sigma, draw)
        return found

    def _refuse_damaged(self, known: set[str], sigma: str, draw: int) -> None:
        """Refuse a damaged shard, at one noise level and draw, of a block that is not known."""
        for sidecar in sorted(shard_path(self.path, sigma, draw, "").parent.glob("[!.]*.json")):
            path = sidecar.with_suffix(".h5")
            if sidecar.stem not in known and not is_locked(path):
                found = check_shard(path, fingerprint=self.fingerprint, sigma=sigma, draw=draw)
                if isinstance(found, str):
                    msg = (
                        f"{found}; its rows are not asked for, or cut into other blocks, so it would not be done "
                        f"again: run probekit verify {shlex.quote(str(self.path))} --repair first"
                    )
                    raise StoreError(msg)

    def _state(self, block: str, state: str, sigma: str, draw: int) -> str:
        if state == "done":
            return state
        path = shard_path(self.path, sigma, draw, block)
        found = check_shard(path, fingerprint=self.fingerprint, sigma=sigma, draw=draw)
        return found if isinstance(found, str) else state

    @contextmanager
    def claim(self, block: Block, *, sigma: str, draw: int = 0) -> Iterator[bool]:
        """Hold the lock of one shard; yield False if somebody else finished it meanwhile.

        Waits while another process holds it, so two identical commands do each shard once.

        Raises
        ------
        StoreError
            If another command, which cut its rows otherwise, stored some of the rows meanwhile.
        """
        sigma = canonical_sigma(sigma)
        path = shard_path(self.path, sigma, draw, block.name)
        with locked(path):
            if isinstance(check_shard(path, fingerprint=self.fingerprint, sigma=sigma, draw=draw), Shard):
                yield False
                return
            others = self._held_by_others(path, block, sigma, draw)
            if len(others) < len(block.row_ids):
                _refuse_rows_of_others(path, others)
            yield not others

    def _held_by_others(self, path: Path, block: Block, sigma: str, draw: int) -> set[str]:
        """Rows of a block that committed shards of other blocks hold at this noise level and draw."""
        found: set[str] = set()
        for sidecar in path.parent.glob("[!.]*.json"):
            if sidecar.stem != block.name and sidecar.stem not in self._keys:
                shard = check_shard(sidecar.with_suffix(".h5"), fingerprint=self.fingerprint, sigma=sigma, draw=draw)
                if not isinstance(shard, Shard):
                    continue
                self._keys[sidecar.stem] = frozenset(shard.row_ids())
            if sidecar.stem != block.name:
                found |= self._keys[sidecar.stem].intersection(block.row_ids)
        return found

    def write_shard(
        self,
        block: Block,
        *,
        sigma: str,
        draw: int = 0,
        timestep: float,
        rows: pd.DataFrame,
        features: Mapping[tuple[str, int], NDArray[np.float32]],
        accept: Callable[[NDArray[np.uint8]], None] | None = None,
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
        accept
            Called with the status (m,) that the rows get, before any is written; what it raises leaves the store as it
            was.

        Raises
        ------
        StoreError
            If the disk is full or cannot be written, or another command stored some of the rows in other blocks;
            nothing is lost and the same command continues later.
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
        planned = sum(values.size for values in features.values()) * 4
        free = shutil.disk_usage(path.parent).free
        if free < planned + MARGIN_BYTES:
            msg = (
                f"{path}: needs up to {planned:,} bytes and {MARGIN_BYTES:,} to spare, {free:,} are free; make space "
                "and run the same command again"
            )
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
            sidecar = write_hdf5(
                temp,
                descriptor,
                rows=rows,
                features=features,
                config=self.config,
                identity=identity,
                attributes=attributes,
                accept=accept,
            )
            os.fsync(descriptor)
            size = os.fstat(descriptor).st_size
            ranges = [(r["offset"], r["nbytes"]) for r in sidecar["datasets"].values() if r["offset"] is not None]
            whole, outside = file_digests(descriptor, size, without=ranges)
            sidecar |= {
                "bytes": size,
                "sha256": whole,
                "meta_sha256": outside,
            }
            # Blocks that share rows have locks of their own, so the last look at others and the commit are one step.
            with locked(path.parent / "commit"):
                _refuse_rows_of_others(path, self._held_by_others(path, block, sigma, draw))
                # An old sidecar must never vouch for the new file, so it goes first.
                path.with_suffix(".json").unlink(missing_ok=True)
                sync_folder(path.parent)
                publish(temp, descriptor, path)
                write_atomically(path.with_suffix(".json"), fmt.seal(sidecar))
        return path

    def bad_rows(self) -> dict[str, int]:
        """Row keys of all committed rows without features, and the largest status of each."""
        found: dict[str, int] = {}
        for shard in scan(self.path, fingerprint=self.fingerprint)[0]:
            status = shard.table("rows/status")
            if status.any():
                ids = shard.row_ids()
                found |= {ids[i]: max(int(status[i]), found.get(ids[i], 0)) for i in np.flatnonzero(status)}
        return found

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Hold the lock of a file that several workers would make at the same time, such as a cache."""
        with locked(self.path / name):
            yield

    def record_resolution(self, sigma: str, *, ratio: float | None, rows: int, note: str = "") -> None:
        """Record in ``store.json`` how far a noise level stands out from the rounding of the compute dtype.

        Of several measurements, as workers make them, the first one stays.

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
        resolved = None if ratio is None else ratio >= RESOLVED_RATIO
        entry = {"ratio": ratio, "resolved": resolved, "rows": rows, "note": note}
        file = self.path / "store.json"
        with locked(file):
            stored = read_store_file(file)  # another process may have recorded its noise level meanwhile
            known = stored["describe"].setdefault(fmt.SIGMA_RESOLUTION, {})
            if known.get(canonical_sigma(sigma), {}).get("ratio") is None:
                known[canonical_sigma(sigma)] = entry
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
        path = self.path / "judgements" / f"{name}.parquet"
        with locked(path):
            self.check_judgements(name, frame)
            with temporary(path) as (temp, descriptor):
                frame.to_parquet(temp, index=False, write_page_checksum=True)
                os.fsync(descriptor)
                size = os.fstat(descriptor).st_size
                sidecar = {
                    "format": fmt.FORMAT,
                    "format_version": fmt.FORMAT_VERSION,
                    "name": name,
                    "bytes": size,
                    "sha256": file_digest(descriptor, size),
                }
                # As with shards: an old sidecar must never vouch for the new file.
                path.with_suffix(".json").unlink(missing_ok=True)
                sync_folder(path.parent)
                publish(temp, descriptor, path)
            write_atomically(path.with_suffix(".json"), fmt.seal(sidecar))
        return path

    def check_judgements(self, name: str, frame: pd.DataFrame) -> None:
        """Refuse a set of pairs that `write_judgements` would refuse; the store stays as it is.

        Raises
        ------
        StoreError
            If the name cannot be a file name everywhere, or pairs of the older set would be lost.
        """
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", name):
            msg = f"judgements are named {name!r}; allowed: letters, digits, '.', '_' and '-'"
            raise StoreError(msg)
        path = self.path / "judgements" / f"{name}.parquet"
        if os.path.lexists(path):
            old = read_judgements(path).reindex(columns=["pair_id"])
            lost = int((~old["pair_id"].isin(frame["pair_id"])).sum())
            if lost:
                msg = (
                    f"{path}: {lost} of its {len(old)} pairs are not in the new set of this name; "
                    f"use a preference file of another name, or delete {path} to replace it"
                )
                raise StoreError(msg)

    def _planned(self) -> Iterator[tuple[str, ...]]:
        """Row keys of the blocks of earlier plans."""
        for path in plan_files(self.path):
            yield from map(tuple, read_plan(path))

    def _write_plan(self, blocks: list[tuple[str, ...]]) -> None:
        content = [list(row_ids) for row_ids in blocks]
        path = self.path / "plans" / f"{fmt.plan_name(content)}.json"
        head = {"format": fmt.FORMAT, "format_version": fmt.FORMAT_VERSION}
        if not path.exists():  # named by its content: whoever is first writes the same bytes
            write_atomically(path, fmt.seal(head | {"blocks": content}))


def _refuse_rows_of_others(path: Path, rows: set[str]) -> None:
    if rows:
        msg = (
            f"{path}: another command stored {len(rows)} of its rows meanwhile, cut into other blocks; "
            "run the same command again, which goes on with the rest"
        )
        raise StoreError(msg)


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
