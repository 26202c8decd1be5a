"""Check a feature store: everything that is missing or damaged, with what mends it, one line each.

Nothing is changed unless asked: then bad shards are forgotten, and the dump command computes them again.
"""

import os
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit._types import Progress
from probekit.errors import StoreError, VersionError
from probekit.store import format as fmt
from probekit.store.deep import content_problems, hdf5_request, matches_digest
from probekit.store.files import LINK, dead_files, is_locked, locked, sync_folder
from probekit.store.hdf5_check import Hdf5Checker
from probekit.store.judgements import read_judgements
from probekit.store.mend import AGAIN, MEND_SHARD, command_again
from probekit.store.pairs import BoundJudgements
from probekit.store.shards import (
    Shard,
    check_shard,
    no_folder,
    plan_files,
    read_plan,
    read_store_file,
    refuse_other_folder,
    shard_files,
)

FOLDER = "put the folder in its place"


@dataclass
class Problem:
    """Something that is missing or damaged.

    Attributes
    ----------
    path
        File or folder.
    problem, mend
        What is wrong and what to do, one line each.
    repaired
        Whether the bad files are gone, so that only the dump command is left to be run.
    """

    path: str
    problem: str
    mend: str
    repaired: bool = False


@dataclass
class Verification:
    """What `verify_store` found.

    Attributes
    ----------
    path
        The store.
    deep
        Whether every byte was read.
    shards, rows, bytes
        What is committed and has no problem: shards, distinct rows, bytes of shards.
    problems
        In the order: ``store.json``, judgements, plans, shards, what is missing, left-over files.
    """

    path: str
    deep: bool
    shards: int = 0
    rows: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """JSON-plain form."""
        counts = {"problems": len(self.problems), "repaired": sum(problem.repaired for problem in self.problems)}
        return {
            "path": self.path,
            "deep": self.deep,
            "counts": counts | {"shards": self.shards, "rows": self.rows, "bytes": self.bytes},
            "problems": [vars(problem) for problem in self.problems],
        }


def verify_store(
    path: str | Path, *, deep: bool = False, repair: bool = False, progress: Progress | None = None
) -> Verification:
    """Find whatever is missing or damaged in a feature store.

    Parameters
    ----------
    path
        Folder of the store.
    deep
        Read every byte: SHA-256 of files, checksums of datasets, HDF5 structure, keys, status and recorded figures.
    repair
        Forget bad shards and remove left-over temporary files. Good shards, plans and judgements are never touched.
    progress
        Called as ``progress(done, total, text)`` after every shard.

    Raises
    ------
    NoStoreError
        If there is no store at the path. Whatever is wrong inside a store is a problem and no error.
    """
    root = Path(path).absolute()
    refuse_other_folder(root)
    check = _Check(root, deep=deep)
    try:
        check.run(progress)
    except OSError as error:  # a folder that may not be listed
        check.add(Path(error.filename or root), f"{error.strerror}; nothing after it was checked", "make it readable")
    except StoreError as error:  # a shard that was whole a moment ago
        check.add(root, f"{error}; nothing after it was checked", "check again when nothing writes into the store")
    if repair:
        check.repair()
    return check.found


class _Check:
    """One run over a store."""

    def __init__(self, root: Path, *, deep: bool) -> None:
        self.root = root
        self.found = Verification(_line(str(root)), deep)
        self._states: dict[Path, object] = {}  # of all shards, by .h5 file, before they were read
        self._said: set[Path] = set()  # shards with a problem
        self._bad: dict[Path, list[Problem]] = {}  # those that can be forgotten
        self._dead: list[tuple[Path, Problem]] = []
        self._dump = AGAIN
        self._unfinished = "a dump is not finished, or did not name this sigma and draw"

    @property
    def _again(self) -> str:
        deep = " --deep" * self.found.deep
        return f"run probekit verify {shlex.quote(str(self.root))}{deep} --repair, then {self._dump}"

    def add(self, path: Path, problem: str, mend: str) -> Problem:
        entry = Problem(_line(str(path)), _line(problem), _line(mend))
        self.found.problems.append(entry)
        return entry

    def run(self, progress: Progress | None) -> None:
        file = self.root / "store.json"
        try:
            stored = read_store_file(file)
        except VersionError as error:
            self.add(file, _without_path(str(error), file), "use a probekit of that version; no shard was checked")
            return
        except StoreError as error:
            delete = "delete it and " if os.path.lexists(file) else ""
            mend = f"{delete}{AGAIN}: it writes it; no shard was checked, and none is lost"
            self.add(file, _without_path(str(error), file).partition("; delete")[0], mend)
            return
        self._dump = command_again(stored["describe"])
        if stored["describe"].get("imported"):
            self._unfinished = "an import is not finished"
        if self._is_folder("judgements"):
            self._judgements(sidecars=stored["format_version"] not in fmt.UNBOUND)
        plans = self._plans() if self._is_folder("plans") else []
        self._missing(self._shards(stored, progress), plans)
        for path in dead_files(self.root, on_link=self._link):
            entry = self.add(path, "was left by a process that is gone", f"{self._dump}: it removes it")
            self._dead.append((path, entry))

    def _is_folder(self, name: str) -> bool:
        """Whether a folder may be looked into: what stands in its place is a problem and never followed."""
        path = self.root / name
        problem = no_folder(path)
        if problem is not None:
            self.add(path, _without_path(problem, path), FOLDER)
        return problem is None

    def _link(self, path: Path) -> None:
        if _line(str(path)) not in {problem.path for problem in self.found.problems}:
            self.add(path, LINK, "delete it, or put in its place what it points to")

    def _judgements(self, *, sidecars: bool) -> None:
        """Check every set of judgements; `sidecars`: whether each must have one."""
        folder = self.root / "judgements"
        files = [path for ending in ("parquet", "json") for path in folder.glob(f"[!.]*.{ending}")]
        for path in sorted({path.with_suffix(".parquet") for path in files}):
            sidecar = path.with_suffix(".json")
            if not os.path.lexists(path):
                self.add(sidecar, f"its set {path.name} is not there", f"{self._dump}, or delete it")
                continue
            try:
                bound = BoundJudgements(path, pd.DataFrame(), read_judgements(path))
                bound.frame["label"].to_numpy(np.float64)
            except (StoreError, TypeError, ValueError) as error:
                mend = (
                    f"delete it and {sidecar.name}, and {self._dump}"
                    if os.path.lexists(sidecar)
                    else f"delete it and {self._dump}"
                )
                self.add(path, _without_path(str(error), path).partition("; delete")[0], mend)
                continue
            if sidecars and not os.path.lexists(sidecar):
                self.add(path, f"has no sidecar {sidecar.name} that vouches for it", f"{self._dump}: it writes it")

    def _plans(self) -> list[list[str]]:
        blocks = []
        for path in plan_files(self.root):
            try:
                blocks += read_plan(path)
            except StoreError as error:
                self.add(path, _without_path(str(error), path).partition("; delete")[0], f"delete it and {self._dump}")
        return blocks

    def _shards(self, stored: dict[str, Any], progress: Progress | None) -> list[Shard]:
        """Check all shards on their own and against each other; return the good ones."""
        links: list[str] = []
        files = list(shard_files(self.root, links))
        for link in links:
            path = Path(link.rsplit(": ", 2)[0])  # before the reason and what is allowed
            self.add(path, _without_path(link, path), FOLDER)
        good: list[Shard] = []
        with Hdf5Checker() as checker:
            for done, (path, sigma, draw) in enumerate(files, start=1):
                shard = self._shard(path, sigma, draw, stored, checker)
                if shard is not None:
                    good.append(shard)
                if progress is not None:
                    progress(done, len(files), f"shards {sigma}")
        good = self._agreeing(good)
        self.found.shards = len(good)
        self.found.bytes = sum(shard.sidecar.bytes for shard in good)
        return good

    def _shard(self, path: Path, sigma: str, draw: int, stored: dict[str, Any], checker: Hdf5Checker) -> Shard | None:
        self._states[path], mend = _state(path), self._dump
        found: Shard | str | None = None
        try:
            found = check_shard(path, fingerprint=stored["fingerprint"], sigma=sigma, draw=draw)
            if isinstance(found, Shard):
                mend = self._again  # a dump does not see what is found from here on
                problems = list(self._within(found, stored["config"], checker))
            elif found:
                problems = [found]
            else:  # where somebody holds the lock, a dump is between the two files
                problems = [] if is_locked(path) else ["was never committed: it has no sidecar"]
        except StoreError as error:
            problems = [str(error)]
        except (OSError, MemoryError) as error:  # a bad disk, or a file of somebody else: no reason to forget it
            self._said.add(path)
            reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
            self.add(path, reason, f"make it readable, or delete it and its .json and {self._dump}")
            return None
        for problem in problems:
            self._forget_later(path, problem, mend)
        return found if isinstance(found, Shard) and not problems else None

    def _within(self, shard: Shard, config: dict[str, Any], checker: Hdf5Checker) -> Iterator[str]:
        """Name what is wrong inside a shard that looks whole from outside; stop where the next check needs the last."""
        wanted = {fmt.dataset_name(*key) for key in fmt.feature_keys(config)}
        stored = {name for name in shard.sidecar.datasets if name.startswith("features/")}
        for name in sorted(wanted - stored):
            yield f"lacks dataset {name}, which the store's config names"
        for name in sorted(stored - wanted):
            yield f"has dataset {name}, which the store's config does not name"
        for name in wanted & stored:
            shard.width(name)
        shard.row_keys()
        shard.table("rows/status")
        if not self.found.deep or wanted != stored:
            return
        if not matches_digest(shard):
            yield "its SHA-256 is not that of its sidecar"
            return
        problem = checker.check(shard.path, **hdf5_request(shard, fmt.canonical_json(config)))
        if problem is not None:
            yield problem
        else:
            yield from content_problems(shard)

    def _agreeing(self, shards: list[Shard]) -> list[Shard]:
        """Shards whose widths are those of most shards, and whose rows no other shard of their place has."""
        good = []
        names = sorted({name for shard in shards for name in shard.sidecar.datasets if name.startswith("features/")})
        usual = {}
        for name in names:
            ranked = Counter(shard.width(name) for shard in shards).most_common(2)
            usual[name] = ranked[0][0]
            if len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
                widths = " and ".join(str(width) for width, _ in ranked)
                self.add(
                    self.root / "shards",
                    f"{name} is {widths} wide in equally many shards",
                    f"delete those that are wrong, with their .json, and {self._dump}",
                )
                return shards
        folder, holders = None, dict[str, str]()
        for shard in shards:
            if shard.path.parent != folder:
                folder, holders = shard.path.parent, {}
            wrong = [name for name in names if shard.width(name) != usual[name]]
            if wrong:
                text = f"{wrong[0]} is {shard.width(wrong[0])} wide, in other shards {usual[wrong[0]]}"
                self._forget_later(shard.path, text, self._again)
                continue
            rows = shard.row_ids()
            twice = [row for row in rows if row in holders]
            if twice:
                self._forget_later(shard.path, f"{len(twice)} of its rows are in {holders[twice[0]]} too", self._again)
                continue
            holders.update(dict.fromkeys(rows, shard.path.name))
            good.append(shard)
        return good

    def _missing(self, shards: list[Shard], planned: list[list[str]]) -> None:
        """Rows that are planned, or there at one noise level and draw, and lacking at another.

        Those that are missing or unreadable wherever they are stored need not be anywhere else.
        """
        blocks = {fmt.block_name(rows): rows for rows in planned}
        for shard in shards:
            if shard.sidecar.block not in blocks:
                blocks[shard.sidecar.block] = shard.row_ids()
        wanted = {row for rows in blocks.values() for row in rows}
        held: dict[Path, set[str]] = {}
        needed: set[str] = set()
        for shard in shards:
            rows = blocks[shard.sidecar.block]
            held.setdefault(shard.path.parent, set()).update(rows)
            needed.update(rows[i] for i in np.flatnonzero(shard.table("rows/status") != fmt.STATUS_UNREADABLE))
        unreadable = set().union(*held.values()) - needed
        self.found.rows = len(set().union(*held.values()))
        if not held and wanted and not self._said:
            self.add(self.root / "shards", f"{len(wanted)} rows are planned and none is there: no shard", self._dump)
        for path in self._said:
            held.setdefault(path.parent, set()).update(blocks.get(path.stem, ()))
        for folder, there in held.items():
            lacking = wanted - there - unreadable
            if lacking:
                count = sum(not lacking.isdisjoint(block) for block in blocks.values())
                text = f"{len(lacking)} of {len(wanted)} rows have no features here ({count} of {len(blocks)} blocks)"
                self.add(folder, f"{text}: {self._unfinished}", self._dump)

    def _forget_later(self, path: Path, problem: str, mend: str) -> None:
        """Note a problem of a shard that is mended by forgetting it."""
        sidecar = path.with_suffix(".json")
        about = sidecar if problem.startswith(f"{sidecar}: ") else path
        self._said.add(path)
        entry = self.add(about, _without_path(problem, about).removesuffix(f"; {MEND_SHARD}"), mend)
        self._bad.setdefault(path, []).append(entry)

    def repair(self) -> None:
        """Forget the bad shards, each under its lock, and remove files whose writers are gone."""
        for path, problems in self._bad.items():
            kept = _forget(path, self._states[path])
            for problem in problems:
                problem.repaired = not kept
                problem.mend = (
                    f"{_line(kept)}; {problem.mend}" if kept else f"forgotten, file and sidecar; {self._dump}"
                )
        for path in dead_files(self.root, on_link=lambda _: None):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for path, problem in self._dead:
            if not path.exists():
                problem.repaired, problem.mend = True, "removed"


def _forget(path: Path, state: object) -> str:
    """Remove a shard, sidecar first; say why not, if it is left."""
    sidecar = path.with_suffix(".json")
    try:
        with locked(path):
            if _state(path) != state:
                return "not removed: it changed meanwhile; check again"
            if not all(
                os.access(file, os.R_OK) for file in (sidecar, path) if file.is_file() and not file.is_symlink()
            ):
                return "not removed: it may not be read"
            for file in (sidecar, path):
                file.unlink(missing_ok=True)
                sync_folder(path.parent)
    except (OSError, StoreError) as error:
        return f"not removed: {error}"
    return ""


def _state(path: Path) -> object:
    """Note what changes when somebody writes a shard anew."""
    found: list[tuple[int, int, int] | None] = []
    for file in (path, path.with_suffix(".json")):
        try:
            status = file.lstat()
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def _without_path(text: str, path: Path) -> str:
    return text.removeprefix(f"{path}: ")


def _line(text: str) -> str:
    """One printable line, whatever names a hostile file has."""
    encodable = text.encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in encodable)
