"""How fast the feature store writes and reads beside the bare disk, and how much memory it takes.

In every round the same bytes go through the store and through plain system calls, in alternating order; ratios are
taken within a round. Reading compares the same ranges of the same files. Memory is that of a process of its own.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from probekit._types import Progress
from probekit.bench.ratios import in_words, spread
from probekit.bench.store_runs import StoreRuns
from probekit.config import SHARD_MIB
from probekit.errors import ConfigError
from probekit.store import FeatureStore


@dataclass(frozen=True)
class Target:
    """A figure of the design page that a store must reach.

    Attributes
    ----------
    text
        What is measured.
    rule, bound
        The design's figure.
    unit
        Of figure and bound; empty for a ratio.
    """

    text: str
    rule: Literal["at least", "at most"]
    bound: float
    unit: str = ""

    def reached(self, value: float) -> bool:
        """Whether a measured value keeps to the bound."""
        return value >= self.bound if self.rule == "at least" else value <= self.bound


TARGETS = {
    "write": Target("write / raw write, fsync", "at least", 0.35),
    "cold": Target("one layer, cold / raw", "at least", 0.85),
    "warm": Target("one layer, warm / raw", "at least", 0.45),
    "writer_memory": Target("writer's peak / planned shard", "at most", 1.2),
    "reader_memory": Target("reader beyond its result", "at most", 64.0, "MB"),
    "resume": Target("resume scan, a shard", "at most", 1.0, "ms"),
}
_SPEEDS = ("write", "cold", "warm")  # of the store over raw


@dataclass(frozen=True)
class StoreBench:
    """What `bench_store` measured.

    Attributes
    ----------
    folder
        Where the files were.
    rows, layers, width
        Size of the store.
    shards, nbytes
        Number of shards and their bytes.
    datasets
        Number of feature datasets of each dtype.
    seconds
        (figure, ``store`` or ``raw``) -> seconds of each round; ``resume`` a shard and ``plan`` a row, of the
        store only.
    read_bytes
        Bytes that a round reads.
    writer_memory, planned, reader_memory
        Bytes: peak of a process that writes a shard, what the plan reckons for it, peak of a reader beyond its result.
    """

    folder: Path
    rows: int
    layers: int
    width: int
    shards: int
    nbytes: int
    datasets: dict[str, int]
    seconds: dict[tuple[str, str], list[float]]
    read_bytes: int
    writer_memory: int
    planned: int
    reader_memory: int

    def facts(self) -> dict[str, Any]:
        """Return all figures as plain JSON values: median, smallest and largest of the rounds."""
        scans = [1000 * seconds for seconds in self.seconds["resume", "store"]]
        measured = {
            # speeds, so the raw seconds are above
            **{name: spread(self.seconds[name, "raw"], self.seconds[name, "store"]) for name in _SPEEDS},
            "writer_memory": [self.writer_memory / self.planned] * 3,
            "reader_memory": [self.reader_memory / 1e6] * 3,
            "resume": spread(scans, [1.0] * len(scans)),
        }
        return {
            "folder": str(self.folder),
            "rows": self.rows,
            "layers": self.layers,
            "width": self.width,
            "shards": self.shards,
            "bytes": self.nbytes,
            "datasets": self.datasets,
            "rounds": len(scans),
            "figures": {
                name: {
                    "median": measured[name][0],
                    "smallest": measured[name][1],
                    "largest": measured[name][2],
                    "design": {target.rule: target.bound},
                    "unit": target.unit,
                    "reached": target.reached(measured[name][0]),
                }
                for name, target in TARGETS.items()
            },
            "plan_microseconds_a_row": 1e6 * float(np.median(self.seconds["plan", "store"])),
            "megabytes_per_second": {
                name: {
                    side: (self.nbytes if name == "write" else self.read_bytes)
                    / 1e6
                    / float(np.median(self.seconds[name, side]))
                    for side in ("store", "raw")
                }
                for name in _SPEEDS
            },
            "seconds": {name: {side: self.seconds[name, side] for side in ("store", "raw")} for name in _SPEEDS},
        }

    def lines(self) -> list[tuple[str, str]]:
        """Return the figures as (heading, text)."""
        facts = self.facts()
        shape = f"{self.rows} rows, {self.layers} layers of width {self.width}"
        dtypes = ", ".join(f"{number} {dtype}" for dtype, number in self.datasets.items())
        lines = [
            ("store", shape),
            ("", f"{self.shards} shards, {self.nbytes / 1e6:.0f} MB; datasets: {dtypes}"),
            ("folder", str(self.folder)),
            ("figure", f"design          median (smallest to largest) of {facts['rounds']} rounds"),
        ]
        for name, target in TARGETS.items():
            figure = facts["figures"][name]
            design = f"{target.rule} {target.bound:g} {target.unit}"
            ratios = [figure["median"], figure["smallest"], figure["largest"]]
            found = f"{ratios[0]:.3f}" if "memory" in name else in_words(ratios)
            lines.append((f"  {target.text}", f"{design:<16}{found:<23}{'' if figure['reached'] else 'missed'}"))
        speeds = {name: "{store:.0f} of {raw:.0f}".format(**facts["megabytes_per_second"][name]) for name in _SPEEDS}
        lines.append(("MB/s", ", ".join(f"{name} {text}" for name, text in speeds.items())))
        lines.append(("resume plan", f"{facts['plan_microseconds_a_row']:.2f} us a row besides"))
        return lines


def bench_store(
    *,
    rows: int = 8192,
    layers: int = 25,
    width: int = 1536,
    shard_size: int = SHARD_MIB,
    rounds: int = 5,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> StoreBench:
    """Time a store of synthetic features against plain writes and reads.

    Parameters
    ----------
    rows, layers, width
        Size of the store; rows are even, since there are two to a prompt.
    shard_size
        Largest shard in MiB, as of a dump.
    rounds
        How often everything is run.
    folder
        Where the files are made and removed; the temporary folder if left out.
    progress
        Called as ``progress(done, total, text)`` with shards and rounds.

    Raises
    ------
    ConfigError
        If a size does not fit, the folder is none, or the system is not Linux.
    StoreError
        If the disk is full; no file is left behind.
    """
    if rows < 2 or rows % 2:
        msg = f"rows is {rows}; allowed: even numbers from 2, since there are two to a prompt"
        raise ConfigError(msg)
    for name, value in {"layers": layers, "width": width, "shard_size": shard_size, "rounds": rounds}.items():
        if value < 1:
            msg = f"{name} is {value}; allowed: whole numbers from 1"
            raise ConfigError(msg)
    if folder is not None and not folder.is_dir():
        msg = f"folder is {str(folder)!r}, which is no folder; allowed: a folder on the disk to measure"
        raise ConfigError(msg)
    if sys.platform != "linux":
        msg = (
            f"the system is {sys.platform!r}; allowed: linux, which says what a process holds and lets pages be dropped"
        )
        raise ConfigError(msg)
    with tempfile.TemporaryDirectory(prefix="probekit-bench-", dir=folder) as made:
        bench = StoreRuns(Path(made), rows=rows, layers=layers, width=width, shard_bytes=shard_size * 2**20)
        steps = len(bench.blocks) + rounds
        report = progress or (lambda done, total, text: None)
        for number, block in enumerate(bench.blocks, start=1):
            bench.write(block, rounds=rounds)
            report(number, steps, "shards written")
        for number in range(rounds):
            bench.read(raw_first=number % 2 == 1)
            bench.scan()
            report(len(bench.blocks) + number + 1, steps, "rounds of reading")
        store = FeatureStore(bench.root)
        return StoreBench(
            folder=Path(made).parent,
            rows=rows,
            layers=layers,
            width=width,
            shards=store.n_shards,
            nbytes=store.nbytes,
            datasets=store.summary()["datasets"],
            seconds=bench.seconds,
            read_bytes=bench.read_bytes,
            **bench.memory(),
        )
