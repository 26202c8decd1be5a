"""What a sweep will fit and cost, said before it runs."""

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from probekit import results
from probekit._types import duration, scaled
from probekit.config import LinearHead, PreferenceOptions, SweepConfig
from probekit.heads import BradleyTerryClassifierCV
from probekit.results import ALTERED
from probekit.stats import say_planned
from probekit.sweep.altered import SAME_STRENGTH
from probekit.sweep.evaluate import judged_rows, record_facts
from probekit.sweep.features import scratch_bytes
from probekit.sweep.folder import DIGESTS
from probekit.sweep.material import Selection, material, open_cached
from probekit.sweep.memory import Budget, Work, budget_of, bytes_of, groups_of, told
from probekit.sweep.plan import Record
from probekit.sweep.run import Prepared, prepare

_PASSES = 5  # over the pairs that a fit of all folds and strengths makes


def dry_run(
    config: SweepConfig | Path | str,
    *,
    stores: Sequence[Path | str] = (),
    out: Path | str,
    prefs: Path | str | None = None,
    reading: PreferenceOptions | None = None,
    ties: str | None = None,
    jobs: int = 1,
    memory: int | str | None = None,
) -> list[tuple[str, str]]:
    """Say what a sweep would do and cost; nothing is written, and no layer sets are searched.

    Parameters and errors are those of `probekit.run_sweep`. One small fit, the judging of one set of margins and the
    reading of a few rows are timed.

    Returns
    -------
    list
        Heading and text, for a person.
    """
    out, at_most = Path(out), list[int]()
    bound = bytes_of(memory) if isinstance(memory, str) else memory
    with tempfile.TemporaryDirectory(prefix="probekit-") as folder:
        if (out / DIGESTS).is_file():
            shutil.copyfile(out / DIGESTS, Path(folder) / DIGESTS)
        plan = prepare(
            config,
            stores=stores,
            out=out,
            prefs=prefs,
            reading=reading,
            ties=ties,
            memory=bound,
            bound=Path(folder),
            at_most=at_most,
        )
        done = results.done_records(out)
        budget = budget_of(bound)
        groups = groups_of([record for record in plan.records if record.record_id not in done], budget, jobs)
        return [
            *_fits(plan, done, sum(at_most)),
            *_pairs(plan),
            ("time", _time(groups)),
            *_memory(groups, budget, out),
            *(("jobs", text) for text in told(groups, budget, jobs)),
            *_resolves(plan.selections),
        ]


def _fits(plan: Prepared, done: set[str], at_most: int) -> Iterator[tuple[str, str]]:
    kinds = [ALTERED.get(record.kind, f"{record.head.kind} fits") for record in plan.records]
    heads = Counter((kind, record.record_id in done) for kind, record in zip(kinds, plan.records, strict=True))
    for kind in dict.fromkeys(kinds):
        yield kind, f"{heads[kind, False]:,} to do, {heads[kind, True]:,} already done"
    if at_most:
        yield "searched", f"at most {at_most:,} more layer sets, which are searched on training pairs first"


def _pairs(plan: Prepared) -> Iterator[tuple[str, str]]:
    for selection in plan.selections:
        data, stores = material(selection), [open_cached(path) for path in selection.stores]
        parts = {"training": [data.train], "validation": [data.validation], "test": [*data.tests.values()]}
        counts = ", ".join(f"{sum(len(one.label) for one in some):,} {name}" for name, some in parts.items())
        lost = ", ".join(f"{sum(len(one.excluded) for one in some):,} {name}" for name, some in parts.items())
        apart = f", {data.train_connected:,} connected to other sets" if data.train_connected else ""
        text = f"{sum(len(store.rows) for store in stores):,} rows; pairs: {counts}; left out: {lost}{apart}"
        yield f"{stores[0].path.name} ({selection.trained_on})", text


def _memory(groups: Sequence[tuple[int, Sequence[Work]]], budget: Budget, out: Path) -> Iterator[tuple[str, str]]:
    if not groups:
        return
    single = max(one.needed for _, members in groups for one in members) + budget.interpreter
    whole = max(budget.taken(count, max(one.needed for one in members)) for count, members in groups)
    yield (
        "memory",
        f"up to {scaled(single, 'B')} a process, of which {scaled(budget.interpreter, 'B')} without a fit; up to "
        f"{scaled(whole, 'B')} in all, layers that are kept for later fits aside; bound {scaled(budget.total, 'B')}",
    )
    if files := scratch_bytes([work.places for _, some in groups for work in some if work.streamed]):
        at = next(folder for folder in [out.absolute(), *out.absolute().parents] if folder.exists())
        yield (
            "disk",
            f"{scaled(files, 'B')} for a while in {at}, where {scaled(shutil.disk_usage(at).free, 'B')} are free",
        )


def _time(groups: Sequence[tuple[int, Sequence[Work]]]) -> str:
    """Say how long the fits will take, by the cost of a fit, N d^2 + 9 d^3 + 4 passes N d columns."""
    if not groups:
        return "none: nothing is to be done"
    first = groups[0][1][0]
    unit, read = _unit(), _reading(first)
    judge = {whole: _judging(first.record, whole=whole) for whole in (False, True)}
    fits = judges = reads = 0.0
    for count, members in groups:
        for work in members:
            n, widths = len(material(work.record.selection).train.label), [place.width for place in work.places]
            d = sum(widths)
            fits += unit * sum(_cost(record, n, widths) for record in work.unit) / count
            judges += sum(judge[bool(record.altered)] for record in work.unit) / count
            reads += read * d * sum(len(open_cached(path).rows) for path in work.record.selection.stores) / count
    slow = any(one.streamed or not one.head_memory for _, members in groups for one in members)
    mlps = any(not isinstance(one.record.head, LinearHead) for _, members in groups for one in members)
    return (
        f"about {duration(fits + judges + reads)} (fits {duration(fits)}, intervals {duration(judges)}, reading "
        f"{duration(reads)}), from one small fit timed here; searches, baselines and starting not counted"
        + ("; MLPs as if none stopped early" if mlps else "")
        + ("; fits from files, and those without a factorisation, take longer" if slow else "")
    )


def _cost(record: Record, n: int, widths: list[int]) -> float:
    """Multiplications of a fit of n pairs on layers of some widths; of a refit, beside the fit that it repeats."""
    one_width = record.combination in ("mean", "scalar-mix")
    fitted = widths if record.combination == "late-fusion" else [widths[0] if one_width else sum(widths)]
    if record.kind in SAME_STRENGTH:
        return sum(4.0 * _PASSES * n * min(n, d) for d in fitted)
    if isinstance(record.head, LinearHead):
        return sum(_linear_cost(n, d, record.head.folds * len(record.head.strengths)) for d in fitted)
    (d,) = fitted
    weights = sum(a * b for a, b in zip([d, *record.head.hidden], [*record.head.hidden, 1], strict=True))
    return 6.0 * n * weights * record.head.max_epochs  # two rows to a pair; forward, and twice that backward


def _linear_cost(n: int, d: int, columns: int) -> float:
    size = min(n, d)
    return float(n * d * size + 9 * size**3 + 4 * _PASSES * n * size * columns)


def _unit() -> float:
    """Seconds of a multiplication in a small fit."""
    rng = np.random.default_rng(0)
    D, label = rng.normal(size=(4000, 128)).astype(np.float32), rng.integers(0, 2, 4000).astype(np.float64)
    head = BradleyTerryClassifierCV()
    began = time.perf_counter()
    head.fit_differences(D, label)
    return (time.perf_counter() - began) / _linear_cost(len(D), D.shape[1], head.cv * len(head.Cs))


def _judging(record: Record, *, whole: bool) -> float:
    """Seconds that margins of one record take to be judged."""
    data = material(record.selection)
    margins = data.by_part(np.random.default_rng(0).normal(size=len(data.rows)))
    facts = record_facts(record, open_cached(record.store)) | results.NO_FIT
    began = time.perf_counter()
    judged_rows(record, data, margins, facts, whole=whole)
    return time.perf_counter() - began


def _reading(work: Work) -> float:
    """Seconds that a number takes to be read from a store."""
    at = work.places[0]
    batches = open_cached(work.record.store).batches(
        layers=[at.layer], sigma=at.sigmas[0], pooling=at.poolings[0], draw=at.draw
    )
    began = time.perf_counter()
    _, features = next(batches)
    return (time.perf_counter() - began) / features[at.layer].size


def _resolves(selections: Sequence[Selection]) -> Iterator[tuple[str, str]]:
    for name, pairs in {name: pairs for one in selections for name, pairs in material(one).tests.items()}.items():
        yield "resolves", f"{name}: {say_planned(pairs.frame.loc[pairs.label != 0.5, 'group'].to_numpy())}"
