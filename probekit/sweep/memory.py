"""What the fits of a sweep take in memory, and how many of them may run at once.

Estimates come from shapes: n training pairs of N pairs in all, m rows, d channels, k = folds x strengths columns that a
linear head fits together. They are upper limits of measured peaks (peak resident memory of single fits, n from 500 to
100,000, d from 16 to 20,000), interpreters left out: those are measured when the sweep starts.

    linear, factorised     4 N d + 36 d^2 + 12 * 8192 d + 44 n k      where n < d: 4 N d + 26 n d + 40 n^2 + 44 n k
    linear, matrix-free    4 N d + 80 n k + 320 d k
    linear, from files     buffers + 32 n k + the state of as many columns as fit
    scalar mix             4 N d + 28 n d + 36 w^2 + 44 n k            w = channels of one layer
    late fusion            4 N d + 12 n d + 36 w^2 + 12 * 8192 w + 44 n k
    MLP                    the larger of 8 m d (layers, and joined) and
                           4 m d + 24 u d + 24 d * (first hidden width) * (seeds fitted together), u = training rows
    its linear skip        4 m d + 12 u d + a linear fit, where that is more
    refits, besides        44 n for each of the same strength, 4 N d for others
    judging, besides       4 resamples (N - n), since redrawn groups are kept for the next fit

Of a mean of layers, d is the channels of one.
"""

import logging
import os
import re
import resource
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from probekit._types import scaled
from probekit.config import STRENGTHS, LinearHead, MLPHead
from probekit.errors import ConfigError
from probekit.heads import BradleyTerryMLP, layer_set_name
from probekit.heads.factorisation import SLAB, eigen_bytes, fit_bytes
from probekit.heads.linear import MEMORY
from probekit.heads.solvers import column_bytes
from probekit.heads.streaming import BLOCK_BYTES
from probekit.sweep.altered import SAME_STRENGTH, of_the_same_strength, sources
from probekit.sweep.features import Place
from probekit.sweep.input_baselines import SEEN, InputBaseline, place_of
from probekit.sweep.material import material, open_cached
from probekit.sweep.plan import Record, units

logger = logging.getLogger(__name__)

SHARE = 0.75
"""Of the machine's memory, what a sweep takes at most where nothing else is asked for."""
_FIXED = 2**26  # of every fit: blocks in other precisions, and what the allocator does not give back
_HELPER = 2**24  # the process that spawned processes share
_BUFFERS = 4 * BLOCK_BYTES  # of fits that read from files
_STATE = 0.6  # of what is left, what heads are told that fits from files may take: they count arrays, not what is freed


@dataclass(frozen=True)
class Work:
    """A unit of fits and how it stays within the memory of its process.

    Attributes
    ----------
    unit
        What is fitted: records that differ in their seed alone.
    places
        Its layers.
    needed
        Bytes beside the interpreter.
    head_memory
        Bytes that the head is told it may take beside its features.
    streamed
        Whether its differences are read from files.
    keep
        Bytes of layers that its process keeps for other fits.
    """

    unit: tuple[Record, ...]
    places: tuple[Place, ...]
    needed: int
    head_memory: float
    streamed: bool = False
    keep: int = 0

    @property
    def record(self) -> Record:
        """The first of the unit."""
        return self.unit[0]


@dataclass(frozen=True)
class Budget:
    """Memory of all processes of a sweep together.

    Attributes
    ----------
    total
        Bytes.
    interpreter
        Bytes of a process that has read the pairs and has not begun to fit.
    """

    total: int
    interpreter: int

    def share(self, jobs: int) -> int:
        """Bytes that each of some processes may take beside its interpreter; one fits in this process itself."""
        if jobs == 1:
            return self.total - self.interpreter
        return (self.total - self.interpreter - _HELPER) // jobs - self.interpreter

    def taken(self, jobs: int, needed: int) -> int:
        """Bytes of some processes of which each takes `needed` beside its interpreter."""
        return self.interpreter + (needed if jobs == 1 else _HELPER + jobs * (self.interpreter + needed))


def bytes_of(text: str) -> int:
    """Read an amount of memory: bytes, or a number with K, M, G or T (powers of 1024).

    Raises
    ------
    ConfigError
        If it is something else, or nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if not size:
        message = f"memory is {text!r}; allowed: bytes, or a number with K, M, G or T (powers of 1024), such as 4G"
        raise ConfigError(message)
    return size


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container it shows."""
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return held if text == "max" else min(held, int(text))


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def budget_of(memory: int | None) -> Budget:
    """Measure this process, and refuse a bound that it exceeds already.

    Raises
    ------
    ConfigError
        If nothing is left for fits.
    """
    budget = Budget(int(SHARE * machine_memory()) if memory is None else memory, resident())
    if budget.share(1) < _FIXED:
        message = (
            f"memory is {scaled(budget.total, 'B')}, of which this process takes {scaled(budget.interpreter, 'B')} "
            f"before it fits anything; allowed: {scaled(budget.interpreter + 2 * _FIXED, 'B')} or more"
        )
        raise ConfigError(message)
    return budget


def places_of(record: Record) -> tuple[Place, ...]:
    """Layers of a record."""
    return tuple(
        Place(selection, record.sigmas, record.draw, record.poolings, layer) for selection, layer in sources(record)
    )


def work_of(unit: Sequence[Record], budget: Budget) -> Work:
    """Decide how a unit of records is fitted: as it is fastest in one process that has all the memory.

    So results do not depend on the number of processes.

    Raises
    ------
    ConfigError
        If it does not fit in any way.
    """
    record, unit = unit[0], tuple(unit)
    data, places = material(record.selection), places_of(record)
    n, every = len(data.train.label), len(data.rows)
    widths = [place.width for place in places]
    d, allowed = max(widths) if record.combination == "mean" else sum(widths), budget.share(1)
    fixed = _FIXED + 4 * record.resamples * (every - n)
    held = 4 * every * (d if len(places) == 1 else d + max(widths)) + fixed
    if isinstance(record.head, MLPHead):
        rows = sum(len(open_cached(path).rows) for path in record.selection.stores)
        hidden = record.head.hidden[0] * len(unit)
        used = len(np.unique(data.train.rows))
        stages = [4 * rows * (d if len(places) == 1 else d + sum(widths))]  # layers and what they are joined to
        stages.append(4 * rows * d + 24 * used * d + 24 * d * hidden)
        if record.head.linear_skip:
            k = len(STRENGTHS) * 5
            fit = fit_bytes(n, d, k) if eigen_bytes(min(n, d)) <= MEMORY else _free(n, d, k)
            stages.append(4 * rows * d + 12 * used * d + 4 * n * d + fit)
        needed = max(stages) + fixed
        if needed > allowed:
            raise _refused(record, needed, allowed, budget)
        return Work(unit, places, needed, MEMORY)
    k = record.head.folds * len(record.head.strengths)
    if any(one.kind in SAME_STRENGTH for one in unit):
        k += len(of_the_same_strength(record))
    apart = [one for one in unit if one.altered and one.kind not in SAME_STRENGTH]
    held += 4 * every * d if apart else 0
    if record.combination in ("scalar-mix", "late-fusion"):
        copies = 28 * n * d if record.combination == "scalar-mix" else 12 * n * d + 12 * SLAB * max(widths)
        needed = held + copies + 36 * max(widths) ** 2 + 44 * n * k
        if needed > allowed:
            raise _refused(record, needed, allowed, budget)
        return Work(unit, places, needed, MEMORY)
    factorised = held + fit_bytes(n, d, k)
    if eigen_bytes(min(n, d)) <= MEMORY and factorised <= allowed:
        return Work(unit, places, factorised, MEMORY)
    free = held + _free(n, d, k)
    if free <= allowed:
        return Work(unit, places, free, 0.0)
    least = fixed + _BUFFERS + 32 * n * k + column_bytes(n, d) + 320 * d
    if least > allowed or record.combination == "mean" or apart:  # files hold layers apart, of all pairs
        raise _refused(record, least if least > allowed else free, allowed, budget)
    # what is left bounds the factorisation and, after it, the state of the columns that are fitted together
    return Work(unit, places, allowed, _STATE * (allowed - fixed - _BUFFERS - 16 * n * k), streamed=True)


def _free(n: int, d: int, k: int) -> int:
    """Bytes of a fit without a factorisation, differences aside."""
    return 80 * n * k + 320 * d * k


def affordable(baselines: Sequence[InputBaseline], budget: Budget, done: Collection[str]) -> list[InputBaseline]:
    """Leave out the baselines of inputs that are not done and that one process has not the memory for, and say so."""
    found = []
    for baseline in baselines:
        if baseline.record_id in done:
            found.append(baseline)
            continue
        data, place, (_, head) = material(baseline.selection), place_of(baseline), SEEN[baseline.seen]
        n, every, d = len(data.train.label), len(data.rows), place.width
        fixed = _FIXED + 4 * baseline.resamples * (every - n)
        if isinstance(head, BradleyTerryMLP):
            rows = sum(len(open_cached(path).rows) for path in baseline.selection.stores)
            needed = 28 * rows * d + 24 * d * head.hidden[0] + fixed
        else:
            needed = 4 * every * d + fit_bytes(n, d, head.cv * len(head.Cs)) + fixed
        if needed <= budget.share(1):
            found.append(baseline)
        else:
            text = "baseline %r is left out: it needs about %s; allowed: %s; give more --memory"
            logger.warning(text, baseline.name, scaled(needed, "B"), scaled(budget.share(1), "B"))
    return found


def groups_of(records: Sequence[Record], budget: Budget, jobs: int) -> list[tuple[int, list[Work]]]:
    """Give numbers of processes and the fits that they do, in the order in which these groups run.

    Fits that need more memory than `jobs` processes leave each other run in fewer. Streamed fits run first, in one:
    they share their files, and other fits leave freed memory behind that does not go back to the system.

    Raises
    ------
    ConfigError
        As `work_of`.
    """
    work = [work_of(unit, budget) for unit in units(records)]
    again = Counter(place for one in work for place in one.places if isinstance(one.record.head, LinearHead))
    groups: dict[int, list[Work]] = {}
    for one in work:
        fitting = (count for count in range(jobs, 1, -1) if one.needed <= budget.share(count))
        groups.setdefault(0 if one.streamed else next(fitting, 1), []).append(one)
    found = []
    for count, members in sorted(groups.items(), key=lambda group: (group[0] > 0, -group[0])):
        used = max(1, min(count, len(members)))
        left = budget.share(used) - max(one.needed for one in members)
        kept = [replace(one, keep=left) if any(again[at] > 1 for at in one.places) else one for one in members]
        found.append((used, kept))
    return found


def told(groups: Sequence[tuple[int, Sequence[Work]]], budget: Budget, jobs: int) -> Iterator[str]:
    """Say what the memory costs: fits in fewer processes than asked for, and fits that read from files."""
    bound = scaled(budget.total, "B")
    for count, members in groups:
        some = f"{_count(members):,} of {sum(_count(others) for _, others in groups):,} fits"
        if members[0].streamed:
            yield f"{some} do not fit into {bound}: their differences are read from files again and again, one by one"
        elif count < min(jobs, len(members)):
            yield f"{some} run in {count} of {jobs} processes, so that all together stay within {bound}"


def _count(members: Sequence[Work]) -> int:
    return sum(len(one.unit) for one in members)


def _refused(record: Record, needed: int, allowed: int, budget: Budget) -> ConfigError:
    message = (
        f"{record.label}: head {record.head.name!r} ({record.combination}) on layers "
        f"{layer_set_name(record.layers)} needs about {scaled(needed, 'B')}; allowed: {scaled(allowed, 'B')}, the "
        f"memory of {scaled(budget.total, 'B')} less {scaled(budget.interpreter, 'B')} of this process; give more "
        "--memory or fewer layers"
    )
    return ConfigError(message)
