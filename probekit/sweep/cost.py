"""How long a sweep will take: small fits, the judging of margins, writing and reading are timed here and scaled.

n = training pairs, d = channels that are fitted together.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probekit import results
from probekit._types import duration
from probekit.config import LinearHead
from probekit.heads import BradleyTerryClassifierCV, BradleyTerryMLP
from probekit.heads.solvers import one_thread
from probekit.sweep.altered import SAME_STRENGTH
from probekit.sweep.evaluate import judged_rows, record_facts
from probekit.sweep.layer_sets import Search
from probekit.sweep.material import material, open_cached
from probekit.sweep.memory import Work, places_of
from probekit.sweep.plan import Record
from probekit.sweep.run import Prepared

_FEWEST, _MOST = 500, 4000  # pairs of a small fit; weak penalties take longer the fewer there are for each channel
_PASSES = 5  # over the pairs that a fit of all folds and strengths makes
_STEPS, _EPOCHS = 400, 10  # of an MLP that early stopping ends: about so many steps, and so many epochs at least
_MIX_FITS = 120  # of one layer at one strength: about what a scalar mix makes
_SEARCH = 2.5  # a search takes so many times the fits of its layers one by one, for what they have in common


@dataclass(frozen=True)
class Costs:
    """Seconds of what a sweep does, measured here: a = of each time, b = of each multiplication or number.

    Attributes
    ----------
    linear
        (a, b) of a linear head.
    step
        (a, b) of a step of an MLP.
    judge, judge_whole, write, join
        Of a record: its margins judged, with slices or without, its part written, its part joined into the results.
    read
        Of a number in a store.
    """

    linear: tuple[float, float]
    step: tuple[float, float]
    judge: float
    judge_whole: float
    write: float
    join: float
    read: float

    def linear_seconds(self, n: int, d: int, columns: int) -> float:
        """Time of a linear head of some folds x strengths."""
        return self.linear[0] + self.linear[1] * _linear_cost(n, d, columns)

    def mlp_seconds(self, n: int, d: int, hidden: Sequence[int], *, seeds: int, batch: int, max_epochs: int) -> float:
        """Time of heads that are trained together, as if early stopping ended them."""
        a_pass = math.ceil(n / batch)
        steps = a_pass * min(max_epochs, max(_EPOCHS, math.ceil(_STEPS / a_pass)))
        return steps * (self.step[0] + self.step[1] * seeds * batch * _weights(d, hidden))

    def judge_seconds(self, record: Record) -> float:
        """Time to judge the margins of a record: those of refits have no slices."""
        return self.judge_whole if record.altered else self.judge

    def record_seconds(self, record: Record) -> float:
        """Time of what is done with a fit: judged, written, joined."""
        return self.judge_seconds(record) + self.write + self.join

    def work_seconds(self, work: Work) -> float:
        """Time of a unit of fits with all that is done of each."""
        record, widths = work.record, [place.width for place in work.places]
        n, head = len(material(record.selection).train.label), record.head
        rows = sum(len(open_cached(path).rows) for path in record.selection.stores)
        after = sum(self.record_seconds(one) for one in work.unit) + self.read * rows * sum(widths)
        d = widths[0] if record.combination == "mean" else sum(widths)
        if isinstance(head, LinearHead):
            columns = head.folds * len(head.strengths)
            fits = max(
                1, sum(one.kind not in SAME_STRENGTH for one in work.unit)
            )  # those come with the one they repeat
            if record.combination not in ("scalar-mix", "late-fusion"):
                return after + fits * self.linear_seconds(n, d, columns)
            if record.combination == "scalar-mix":
                return after + fits * _MIX_FITS * self.linear_seconds(n, widths[0], 1)
            return after + fits * sum(self.linear_seconds(n, width, columns) for width in widths)
        skip = self.linear_seconds(n, d, 40) if head.linear_skip else 0.0
        given = {"seeds": len(work.unit), "batch": head.batch_size, "max_epochs": head.max_epochs}
        return after + skip + self.mlp_seconds(n, d, head.hidden, **given)

    def search_seconds(self, search: Search) -> float:
        """Time of a search, or of a comparison of layers, which fits nothing."""
        if not search.columns:
            return search.n_layers * self.linear[1] * search.n * search.d * min(search.n, search.d)
        return _SEARCH * search.n_layers * self.linear_seconds(search.n, search.d, search.columns)


def said_time(plan: Prepared, searches: Sequence[Search], folder: Path, jobs: int) -> str:
    """Say how long a sweep will take, and of what; `folder` is one to write into."""
    work = [one for _, members in plan.groups for one in members]
    beside = sum(key not in plan.done for key in plan.beside)
    if not work and not beside and not searches:
        return "none: nothing is to be done"
    record = work[0].record if work else plan.records[0]
    costs = _measured(record, folder)
    fits = sum(costs.work_seconds(one) / count for count, members in plan.groups for one in members)
    judged = sum(
        costs.judge_seconds(record) / count for count, members in plan.groups for one in members for record in one.unit
    )
    searched = sum(costs.search_seconds(one) for one in searches)
    n = len(material(record.selection).train.label)
    each = costs.judge + costs.write + costs.join + costs.linear_seconds(n, 64, 40)
    slow = any(one.streamed or not one.head_memory for one in work)
    mlps = any(not isinstance(one.record.head, LinearHead) for one in work)
    parts = {"fits": fits - judged, "intervals": judged, "searches": searched, "baselines": beside * each}
    told = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds)
    return (
        f"about {duration(sum(parts.values()))} ({told}), from small fits timed here"
        + ("; MLPs as if early stopping ended them" if mlps else "")
        + ("; fits from files, and those without a factorisation, take longer" if slow else "")
    )


def _linear_cost(n: int, d: int, columns: int) -> float:
    """Multiplications of a fit, N d^2 + 9 d^3 + 4 passes N d columns."""
    size = min(n, d)
    return float(n * d * size + 9 * size**3 + 4 * _PASSES * n * size * columns)


def _weights(d: int, hidden: Sequence[int]) -> int:
    return sum(a * b for a, b in zip([d, *hidden], [*hidden, 1], strict=True))


@one_thread()
def _measured(record: Record, folder: Path) -> Costs:
    """Time everything by the mean of two calls, after one that is not counted: the first of a process takes longer."""
    rng = np.random.default_rng(0)

    def linear(n: int, d: int) -> tuple[float, float]:
        D, label = rng.normal(size=(n, d)).astype(np.float32), rng.integers(0, 2, n).astype(np.float64)
        head = BradleyTerryClassifierCV()
        columns = head.cv * len(head.Cs)
        return _linear_cost(n, d, columns), _seconds(lambda: head.fit_differences(D, label))

    def step(d: int, hidden: int) -> tuple[float, float]:
        X, label = rng.normal(size=(2048, d)).astype(np.float32), rng.integers(0, 2, 1024).astype(np.float64)
        head = BradleyTerryMLP(hidden=(hidden,), max_epochs=2)
        seconds = _seconds(lambda: head.fit(X, np.arange(2048).reshape(-1, 2), label))
        return float(head.batch_size * _weights(d, [hidden])), seconds / (2 * math.ceil(1024 / head.batch_size))

    data = material(record.selection)
    n = min(max(len(data.train.label), _FEWEST), _MOST)
    margins = data.by_part(rng.normal(size=len(data.rows)))
    facts = record_facts(record, open_cached(record.store)) | results.NO_FIT
    rows, kept = judged_rows(record, data, margins, facts)
    name = record.record_id
    return Costs(
        linear=_line(linear(n, max(4, n // 64)), linear(n, max(16, n // 6))),
        step=_line(step(16, 8), step(512, 256)),
        judge=_seconds(lambda: judged_rows(record, data, margins, facts)),
        judge_whole=_seconds(lambda: judged_rows(record, data, margins, facts, detail="whole")),
        write=_seconds(lambda: results.write_part(folder, name, rows, kept)),
        join=_seconds(lambda: results.rebuild(folder, [name])),
        read=_reading(record),
    )


def _seconds(do: Callable[[], object]) -> float:
    do()
    began = time.perf_counter()
    do()
    do()
    return (time.perf_counter() - began) / 2


def _line(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """Give a and b of seconds = a + b cost through two points; none is negative."""
    b = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
    return max(0.0, small[1] - b * small[0]), b


def _reading(record: Record) -> float:
    """Seconds that a number takes to be read from a store."""
    at = places_of(record)[0]
    batches = open_cached(record.store).batches(
        layers=[at.layer], sigma=at.sigmas[0], pooling=at.poolings[0], draw=at.draw
    )
    began = time.perf_counter()
    _, features = next(batches)
    return (time.perf_counter() - began) / features[at.layer].size
