"""Write a feature store: plan blocks of rows, write each as a shard that is either absent or complete.

m = rows of a shard, d = channels of a feature vector.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit._types import RESOLVED_RATIO, canonical_sigma
from probekit.errors import StoreError
from probekit.store import format as fmt
from probekit.store.blocks import Block, Place, find_blocks
from probekit.store.files import check_space, locked, publish, sync_folder, temporary, write_atomically
from probekit.store.hdf5 import write_hdf5, writer_name
from probekit.store.judgements import check_judgements, write_judgements
from probekit.store.shards import Shard, check_shard, file_digests, read_store_file, scan, shard_path

MARGIN_BYTES = 16 * 2**20  # tables and metadata of a shard, sidecar, judgements


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
        place = (canonical_sigma(sigma), draw)
        found = self.blocks(rows, places=[place], rows_per_shard=rows_per_shard)[place]
        return [block for block in found if block.state != "done"]

    def blocks(self, rows: pd.DataFrame, *, places: Sequence[Place], rows_per_shard: int) -> dict[Place, list[Block]]:
        """List the blocks that hold the rows at some noise levels and draws, done or to be done.

        Blocks of committed shards and of earlier plans are taken again where all their rows are missing here, so a
        killed dump goes on with the same blocks and a further noise level gets the blocks of the first. The rest is
        cut anew, whole prompts together, and written once under ``plans/``. Damaged shards at other noise levels and
        draws are logged: nothing mends them here.

        Parameters
        ----------
        rows
            Columns ``row_id`` and ``prompt``; order decides the order of new blocks.
        places
            Noise levels and draws.
        rows_per_shard
            Largest block.

        Returns
        -------
        dict
            Place -> its blocks in the order of their first rows; the same for every worker that asks for the same rows.

        Raises
        ------
        StoreError
            If a shard is damaged whose block is not one of them, so that it would not be written again.
        """
        found = find_blocks(
            self.path,
            rows,
            places,
            fingerprint=self.fingerprint,
            rows_per_shard=rows_per_shard,
            dry_run=self._dry_run,
        )
        self._keys |= found.keys
        return found.blocks

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
        check_space(path, sum(values.size for values in features.values()) * 4 + MARGIN_BYTES)
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
            size = os.fstat(descriptor).st_size
            ranges = [(r["offset"], r["nbytes"]) for r in sidecar["datasets"].values() if r["offset"] is not None]
            with ThreadPoolExecutor(1) as thread:  # syncing waits for the disk, digests for the processor
                synced = thread.submit(os.fsync, descriptor)
                whole, outside = file_digests(descriptor, size, without=ranges)
                synced.result()
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
        """Write a set of pairs beside the shards; see `probekit.store.judgements.write_judgements`."""
        return write_judgements(self.path, name, frame)

    def check_judgements(self, name: str, frame: pd.DataFrame) -> None:
        """Refuse a set of pairs that `write_judgements` would refuse; the store stays as it is."""
        check_judgements(self.path, name, frame)


def _refuse_rows_of_others(path: Path, rows: set[str]) -> None:
    if rows:
        msg = (
            f"{path}: another command stored {len(rows)} of its rows meanwhile, cut into other blocks; "
            "run the same command again, which goes on with the rest"
        )
        raise StoreError(msg)
