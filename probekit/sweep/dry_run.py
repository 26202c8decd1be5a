"""What a sweep will fit and cost, said before it runs."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from probekit._types import scaled
from probekit.config import PreferenceOptions, SweepConfig
from probekit.results import ALTERED
from probekit.stats import say_planned
from probekit.sweep.cost import said_time
from probekit.sweep.features import scratch_bytes
from probekit.sweep.folder import DIGESTS
from probekit.sweep.layer_sets import Search
from probekit.sweep.material import Selection, material, open_cached
from probekit.sweep.memory import told
from probekit.sweep.run import Prepared, prepare


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

    Parameters and errors are those of `probekit.run_sweep`. A few small fits, the judging of one set of margins, one
    written part and the reading of a few rows are timed: see `probekit.sweep.cost`.

    Returns
    -------
    list
        Heading and text, for a person.
    """
    out, searches = Path(out), list[Search]()
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
            jobs=jobs,
            memory=memory,
            judged_in=Path(folder),
            searches=searches,
        )
        return [
            *_fits(plan, searches),
            *_pairs(plan),
            ("time", said_time(plan, searches, Path(folder), jobs)),
            *_memory(plan, searches, out),
            *(("jobs", text) for text in told(plan.groups, plan.budget, jobs)),
            *_resolves(plan.selections),
        ]


def _fits(plan: Prepared, searches: Sequence[Search]) -> Iterator[tuple[str, str]]:
    kinds = [ALTERED.get(record.kind, f"{record.head.kind} fits") for record in plan.records]
    heads = Counter((kind, record.record_id in plan.done) for kind, record in zip(kinds, plan.records, strict=True))
    for kind in dict.fromkeys(kinds):
        yield kind, f"{heads[kind, False]:,} to do, {heads[kind, True]:,} already done"
    baselines = [key in plan.done for key in plan.beside]
    yield "baselines", f"{baselines.count(False):,} to do, {baselines.count(True):,} already done"
    if searches:
        sets = sum(one.sets for one in searches)
        number = "1 search comes" if len(searches) == 1 else f"{len(searches):,} searches come"
        yield "searched", f"{number} first, on training pairs; fits on at most {sets:,} layer sets are counted for them"


def _pairs(plan: Prepared) -> Iterator[tuple[str, str]]:
    for selection in plan.selections:
        data, stores = material(selection), [open_cached(path) for path in selection.stores]
        parts = {"training": [data.train], "validation": [data.validation], "test": [*data.tests.values()]}
        counts = ", ".join(f"{sum(len(one.label) for one in some):,} {name}" for name, some in parts.items())
        lost = ", ".join(f"{sum(len(one.excluded) for one in some):,} {name}" for name, some in parts.items())
        apart = f", {data.train_connected:,} connected to other sets" if data.train_connected else ""
        text = f"{sum(len(store.rows) for store in stores):,} rows; pairs: {counts}; left out: {lost}{apart}"
        yield f"{stores[0].path.name} ({selection.trained_on})", text


def _memory(plan: Prepared, searches: Sequence[Search], out: Path) -> Iterator[tuple[str, str]]:
    groups, budget = plan.groups, plan.budget
    if not groups:
        return
    alone = max((one.needed for one in searches), default=0)  # searches run before all fits, in one process
    single = max(alone, *(one.needed for _, members in groups for one in members)) + budget.interpreter
    taken = (budget.taken(count, max(one.needed for one in members)) for count, members in groups)
    whole = max(budget.taken(1, alone), *taken)
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


def _resolves(selections: Sequence[Selection]) -> Iterator[tuple[str, str]]:
    for name, pairs in {name: pairs for one in selections for name, pairs in material(one).tests.items()}.items():
        yield "resolves", f"{name}: {say_planned(pairs.frame.loc[pairs.label != 0.5, 'group'].to_numpy())}"
