"""What `probekit.bench.store` times: the same bytes through the feature store and through plain system calls."""

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit.bench.synthetic import POOLING, synthetic_config, synthetic_features, synthetic_rows
from probekit.store import Block, FeatureStore, open_store, rows_per_shard
from probekit.store.files import sync_folder
from probekit.store.shards import scan

SIGMA = "0.005"
READ_LAYERS = 8
"""At most so many layers are read in a round, evenly spaced; each is read over all shards."""
SCANNED_SHARDS = 64
"""Shards of a narrow store that is scanned as a dump that resumes does."""
_NEW_MEMORY = 2**26  # malloc maps so much anew, whatever was freed before


class StoreRuns:
    """A store of synthetic features and the seconds that its runs took.

    Attributes
    ----------
    root
        The store.
    blocks
        Its blocks; `write` makes their shards.
    seconds
        (``write``, ``cold`` or ``warm``; ``store`` or ``raw``) and (``resume`` a shard or ``plan`` a row; ``store``) ->
        seconds of each round.
    read_bytes
        Bytes that one `read` reads.
    """

    def __init__(self, folder: Path, *, rows: int, layers: int, width: int, shard_bytes: int) -> None:
        self.root = folder / "store"
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.read_bytes = 0
        self._folder = folder
        self._rows = synthetic_rows(rows)
        self._layers, self._width = layers, width
        self._held = range(0, layers, -(-layers // READ_LAYERS))
        self._block_rows = rows_per_shard(values_per_row=layers * width, shard_bytes=shard_bytes)
        writer = open_store(self.root, config=synthetic_config(layers), describe={})
        self.blocks = writer.plan(self._rows, sigma=SIGMA, rows_per_shard=self._block_rows)

    def write(self, block: Block, *, rounds: int) -> None:
        """Write a shard and a plain file of the same bytes, `rounds` times in alternating order."""
        rows = self._rows.set_index("row_id").loc[list(block.row_ids)].reset_index()
        features = synthetic_features(n_rows=len(rows), n_layers=self._layers, width=self._width, seed=0)
        plain = self._folder / "plain"
        shard = _write_shard(self.root, block, rows, features)  # warms up, and says what the plain file holds
        data = shard.read_bytes()
        for number in range(rounds):
            shard.unlink()
            shard.with_suffix(".json").unlink()
            plain.unlink(missing_ok=True)
            sync_folder(self._folder)  # else the one that comes first pays for freeing the space
            runs: dict[str, Callable[[], Any]] = {
                "store": lambda: _write_shard(self.root, block, rows, features),
                "raw": lambda: _write_plain(plain, data),
            }
            for side in runs if number % 2 == 0 else reversed(runs):
                seconds, _ = _timed(runs[side])
                rounds_of = self.seconds["write", side]
                rounds_of += [0.0] * (number + 1 - len(rounds_of))
                rounds_of[number] += seconds  # of all shards
        plain.unlink()

    def read(self, *, raw_first: bool) -> None:
        """Read some layers over all shards, first from the disk and then from memory, by the store and plainly."""
        ranges = _ranges(self.root, [f"features/{POOLING}/{layer:03d}" for layer in self._held])
        self.read_bytes = sum(length for parts in ranges for _, _, length in parts)
        store = FeatureStore(self.root)
        _ = store.rows  # once for a store, not for each layer
        runs: dict[str, Callable[[int], Any]] = {
            "store": lambda number: store.read(layer=self._held[number]),
            "raw": lambda number: _read_plain(ranges[number]),
        }
        sides = list(reversed(runs)) if raw_first else list(runs)
        total = {(kind, side): 0.0 for kind in ("cold", "warm") for side in sides}
        for number, parts in enumerate(ranges):
            # The first read of a layer by a store checks its checksum, and is the cold one.
            for kind, side in total:
                if kind == "cold":
                    _drop_pages({path for path, _, _ in parts})
                total[kind, side] += _timed(partial(runs[side], number))[0]
        for key, seconds in total.items():
            self.seconds[key].append(seconds)

    def scan(self) -> None:
        """Scan and plan, as a dump that resumes does, a store of many shards with as many rows and layers each."""
        root = self._folder / "narrow"
        rows = min(self._block_rows, len(self._rows))
        if not root.exists():
            self._narrow = synthetic_rows(SCANNED_SHARDS * rows)
            writer = open_store(root, config=synthetic_config(self._layers), describe={})
            by_id = self._narrow.set_index("row_id")
            features = synthetic_features(n_rows=rows, n_layers=self._layers, width=1, seed=0)
            for block in writer.plan(self._narrow, sigma=SIGMA, rows_per_shard=rows):
                part = by_id.loc[list(block.row_ids)].reset_index()
                _write_shard(root, block, part, {key: values[: len(part)] for key, values in features.items()})
        writer = open_store(root, config=synthetic_config(self._layers), describe={})
        seconds, (_, problems) = _timed(lambda: scan(root, fingerprint=writer.fingerprint))
        self.seconds["resume", "store"].append(seconds / SCANNED_SHARDS)
        seconds, blocks = _timed(lambda: writer.plan(self._narrow, sigma=SIGMA, rows_per_shard=rows))
        self.seconds["plan", "store"].append(seconds / len(self._narrow))
        assert not problems
        assert not blocks

    def memory(self) -> dict[str, int]:
        """Return the peak of a process that writes the largest shard, its planned bytes, and a reader's peak."""
        most = max(len(block.row_ids) for block in self.blocks)
        sizes = {"n_rows": most, "n_layers": self._layers, "width": self._width, "seed": 0}
        # Fresh processes, so that nothing that this one did counts.
        writer, reader = (ProcessPoolExecutor(1, mp_context=get_context("spawn")) for _ in range(2))
        with writer, reader:
            written = writer.submit(_writer_peak, self._folder / "peak", sizes)
            read = reader.submit(_reader_peak, self.root, list(self._held))
            planned = 4 * most * self._layers * self._width
            return {"writer_memory": written.result(), "planned": planned, "reader_memory": read.result()}


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    since = time.perf_counter()
    result = call()
    return time.perf_counter() - since, result


def _write_shard(
    root: Path, block: Block, rows: pd.DataFrame, features: Mapping[tuple[str, int], NDArray[np.float32]]
) -> Path:
    writer = open_store(root, config=synthetic_config(len(features)), describe={})
    with writer.claim(block, sigma=SIGMA):
        return writer.write_shard(block, sigma=SIGMA, timestep=5.0, rows=rows, features=features)


def _write_plain(path: Path, data: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def _read_plain(parts: list[tuple[Path, int, int]]) -> NDArray[np.uint8]:
    """Read ranges of files one behind the other into new memory."""
    size = sum(length for _, _, length in parts)
    out = np.empty(max(size, _NEW_MEMORY), np.uint8)[:size]
    position = 0
    for path, offset, length in parts:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            end = position + length
            while position < end:
                position += file.readinto(out[position:end].data)
    return out


def _ranges(root: Path, names: list[str]) -> list[list[tuple[Path, int, int]]]:
    """Return for each dataset the (file, offset, bytes) of its parts, from the sidecars."""
    sidecars = {path: json.loads(path.read_bytes())["datasets"] for path in sorted(root.glob("shards/*/*.json"))}
    return [
        [(path.with_suffix(".h5"), found[name]["offset"], found[name]["nbytes"]) for path, found in sidecars.items()]
        for name in names
    ]


def _drop_pages(paths: set[Path]) -> None:
    """Make the next read come from the disk; written pages were synced when the file was."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _writer_peak(root: Path, sizes: dict[str, int]) -> int:
    """Return the bytes that a fresh process takes for features and the writing of their shard, beyond its libraries."""
    _write_new(root / "first", {**sizes, "n_rows": 2, "width": 1})
    held = _status("VmRSS")
    _write_new(root / "second", sizes)
    return _status("VmHWM") - held


def _write_new(root: Path, sizes: dict[str, int]) -> None:
    rows, features = synthetic_rows(sizes["n_rows"]), synthetic_features(**sizes)
    writer = open_store(root, config=synthetic_config(sizes["n_layers"]), describe={})
    (block,) = writer.plan(rows, sigma=SIGMA, rows_per_shard=len(rows))
    part = rows.set_index("row_id").loc[list(block.row_ids)].reset_index()
    _write_shard(root, block, part, features)


def _reader_peak(root: Path, layers: list[int]) -> int:
    """Return the bytes that a fresh process takes to open a store and read layers, beyond libraries and one layer."""
    import torch  # noqa: F401 - a library that reading loads

    held = _status("VmRSS")
    store = FeatureStore(root)
    for layer in layers:
        result = store.read(layer=layer).nbytes
    return _status("VmHWM") - held - result


def _status(name: str) -> int:
    """Return a figure of this process in bytes: VmRSS = memory now, VmHWM = most so far."""
    with Path("/proc/self/status").open() as file:
        (kilobytes,) = (line.split()[1] for line in file if line.startswith(f"{name}:"))
    return 1024 * int(kilobytes)
