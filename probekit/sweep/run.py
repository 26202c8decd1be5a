"""Run a sweep: every head on every layer set of every store; records that differ in their seed alone go together.

A record's results are written as one part, atomically, by the process that computed them; the same command again
computes only the records that have no part.

Every refitting loop lives in this package. Nothing is chosen on what is reported: the strength of a linear head comes
from grouped cross-validation inside the training split, the layer from the validation split (marked by
`probekit.results.rebuild`).
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from probekit import results
from probekit._types import FloatArray, Progress
from probekit._workers import run_in_processes
from probekit.config import LinearHead, PreferenceOptions, SweepConfig, load_yaml
from probekit.diagnostics import fit_warnings
from probekit.errors import ConfigError, HeadError, StoreError
from probekit.heads import BradleyTerryClassifierCV, layer_set_name, specs_with_features
from probekit.heads.base import PairHead
from probekit.heads.solvers import one_thread
from probekit.store import FeatureStore
from probekit.store.files import check_space
from probekit.sweep.altered import altered, altered_records
from probekit.sweep.baselines import Baseline, plan_baselines, run_baseline
from probekit.sweep.beyond import beyond_generator
from probekit.sweep.blocks import compare_blocks
from probekit.sweep.controls import compare_controls
from probekit.sweep.evaluate import judged_rows, record_facts
from probekit.sweep.families import judge_families
from probekit.sweep.features import KEPT, Features, Scratch, scratch_bytes
from probekit.sweep.fitting import fit, margins
from probekit.sweep.folder import MADE_FROM, bind_file, check_folder, made_from
from probekit.sweep.input_baselines import InputBaseline, plan_input_baselines, run_input_baseline
from probekit.sweep.judging import check_protocol
from probekit.sweep.layer_sets import Search, layer_sets
from probekit.sweep.material import Selection, forget, material, open_cached
from probekit.sweep.memory import Budget, Work, affordable, budget_of, bytes_of, groups_of, told
from probekit.sweep.plan import (
    Record,
    check_distinct,
    check_primary,
    control_of,
    plan_records,
    select_mixtures,
    select_stores,
    store_facts,
    store_settings,
    told_of_sets,
)
from probekit.sweep.slices import Detail

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A sweep that was checked: what it reads and fits, from which stores the run was made, and how it will be done.

    ``done`` are the ids of records whose results the run holds, ``groups`` the others, by number of processes.
    """

    config: SweepConfig
    stores: list[FeatureStore]
    selections: list[Selection]
    records: list[Record]
    baselines: list[Baseline]
    inputs: list[InputBaseline]
    made_from: list[dict[str, Any]]
    done: set[str]
    budget: Budget
    groups: list[tuple[int, list[Work]]]

    @property
    def beside(self) -> list[str]:
        """Ids of the baselines."""
        return [one.record_id for one in self.baselines] + [one.record_id for one in self.inputs]


@dataclass(frozen=True)
class Fitted:
    """What the progress says of a fit: layer set, accuracy on validation and on each test set, whether it has none."""

    layer_set: str
    validation: float
    test: tuple[float, ...]
    blind: bool


def run_sweep(
    config: SweepConfig | Path | str,
    *,
    stores: Sequence[Path | str] = (),
    out: Path | str,
    prefs: Path | str | None = None,
    reading: PreferenceOptions | None = None,
    ties: str | None = None,
    jobs: int = 1,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Fit the heads of a configuration on feature stores; continue where an earlier call stopped.

    Parameters
    ----------
    config
        The settings, or the YAML file that holds them.
    stores
        Feature stores; each becomes a backbone in the results, or a control of one if its weights are random or its
        prompts are not the real ones. None where the configuration names what to fit and to test on (``train``,
        ``test``).
    out
        Folder of the run. Records that it already holds are not computed again.
    prefs
        Preference file that replaces the judgements kept in the stores; it must lie where its images are.
    reading
        How that file is read (default: by its fields).
    ties
        What becomes of tied training pairs, in place of the configuration's rule: ``drop``, ``half`` or ``soft``.
    jobs
        Processes, each with one BLAS thread; fewer where they would not fit into `memory`.
    memory
        What all processes together may take, interpreters included: bytes, or text such as ``4G``. By default three
        quarters of the machine's memory. Layers that do not fit are streamed from files in the run.
    progress
        Called as ``progress(done, total, text)`` after every record.

    Returns
    -------
    Path
        The run folder; read it with `probekit.load_results`.

    Raises
    ------
    ConfigError
        If the configuration asks for layers, noise levels, draws or poolings that a store does not hold, stores are
        given beside its ``train`` and ``test`` or neither is, the stores of a mixture do not fit together, or
        it is said how a preference file is read and none is given, or a fit cannot stay within `memory`.
    FingerprintError
        If a store was made anew since an earlier sweep into this run.
    HeadError
        If features are not finite.
    StoreError
        If a store is damaged, has no training, validation or test pairs, or its features never differ within a pair.
    """
    out = Path(out)
    plan = prepare(config, stores=stores, out=out, prefs=prefs, reading=reading, ties=ties, jobs=jobs, memory=memory)
    records, config, done, budget, groups = plan.records, plan.config, plan.done, plan.budget, plan.groups
    check_space(
        out / "differences", scratch_bytes([work.places for _, some in groups for work in some if work.streamed])
    )
    for line in told(groups, budget, jobs):
        logger.info("%s", line)
    scorers = {key: value for key, value in results.load_config(out).items() if key == "scorers"}
    resolved = scorers | {"sweep": config.model_dump(mode="json")} | told_of_sets(plan.selections)
    resolved |= {"stores": [store_settings(store) for store in plan.stores], MADE_FROM: plan.made_from}
    fitted_ids = [record.record_id for record in records]
    resolved |= {results.PLAN: fitted_ids + plan.beside}
    results.write_config(out, resolved)
    Scratch.clear(out)
    best: dict[str, Fitted] = {}
    blind = 0
    with Scratch(out, chunk=max(2**26, budget.share(1) // 4)) as scratch:
        before = sum(record.record_id in done for record in records)
        for count, (record, fitted) in enumerate(_fits(groups, out, scratch), start=before + 1):
            blind += fitted.blind
            if progress is not None:
                progress(count, len(records), _text(record, fitted, best))
    KEPT.trim(0)
    if blind and blind == len(records):
        message = (
            f"{', '.join(str(store.path) for store in plan.stores)}: the two rows of every training pair have the same "
            "features at all layers that heads are fitted on; allowed: features that differ"
        )
        raise StoreError(message)
    with one_thread():
        for baseline in plan.baselines:
            if baseline.record_id not in done:
                run_baseline(baseline, out=out)
        for seen in plan.inputs:
            if seen.record_id not in done:
                run_input_baseline(seen, out=out)
    facts = store_facts(records, plan.stores, baselines=plan.beside)
    others = results.rebuild(out, fitted_ids + plan.beside, facts=facts)
    numbers = {
        spec["blocks"] for head in config.heads for spec in specs_with_features(head.layer_sets) if "blocks" in spec
    }
    results.write_blocks(out, compare_blocks(out, numbers, resamples=config.resamples, level=config.level))
    results.write_controls(out, compare_controls(out, resamples=config.resamples, level=config.level))
    results.write_beyond(out, beyond_generator(out, resamples=config.resamples, level=config.level))
    results.write_families(out, *judge_families(out, resamples=config.resamples, level=config.level))
    results.write_config(out, resolved | {results.JUDGED: True})
    fitted_heads = results.as_they_are(results.load_results(out)).query("head_kind in ('linear', 'mlp')")
    grids = {head.name: head.strengths for head in config.heads if isinstance(head, LinearHead)}
    for warning in fit_warnings(fitted_heads.drop_duplicates("record_id"), grids):
        logger.warning("%s", warning)
    if others:
        logger.info("%s: %d fits of other configurations or stores stay in parts/, not in results.parquet", out, others)
    return out


def _fits(groups: Sequence[tuple[int, Sequence[Work]]], out: Path, scratch: Scratch) -> Iterator[tuple[Record, Fitted]]:
    for jobs, members in groups:
        function = partial(_run, out=out, scratch=scratch) if members[0].streamed else partial(_run, out=out)
        for work, fitted in run_in_processes(function, members, jobs=jobs):
            yield from zip(work.unit, fitted, strict=True)


def _checked(config: SweepConfig | Path | str, ties: str | None) -> SweepConfig:
    if not isinstance(config, SweepConfig):
        config = SweepConfig.checked(load_yaml(Path(config)), source=str(config))
    return config if ties is None else SweepConfig.checked(config.model_dump() | {"ties": ties}, source="options")


def prepare(
    config: SweepConfig | Path | str,
    *,
    stores: Sequence[Path | str],
    out: Path,
    prefs: Path | str | None,
    reading: PreferenceOptions | None,
    ties: str | None,
    jobs: int,
    memory: int | str | None,
    judged_in: Path | None = None,
    searches: list[Search] | None = None,
) -> Prepared:
    """Check everything and list all fits; parameters as of `run_sweep`.

    Parameters
    ----------
    judged_in
        Where judgements of `prefs` are kept (default: in the run).
    searches
        If given, nothing is written and no layer sets are searched: see `probekit.sweep.layer_sets.layer_sets`.
    """
    if jobs < 1:
        message = f"jobs is {jobs}; allowed: 1 or more processes"
        raise ConfigError(message)
    memory = bytes_of(memory) if isinstance(memory, str) else memory
    config = _checked(config, ties)
    reading = reading or PreferenceOptions()
    if prefs is None and reading != PreferenceOptions():
        told = ", ".join(f"--{name.replace('_', '-')}" for name in reading.model_dump(exclude_defaults=True))
        message = f"{told}: says how a preference file is read, and none is given; allowed: with --prefs"
        raise ConfigError(message)
    mixed = config.train is not None
    if mixed == bool(stores) or (mixed and prefs is not None):
        given = (
            "--store or --prefs is given beside train and test of the configuration" if mixed else "no store is given"
        )
        message = f"{given}; allowed: stores (--store, perhaps --prefs), or train and test in the configuration"
        raise ConfigError(message)
    check_folder(out)
    forget()
    KEPT.trim(0)
    opened = [open_cached(Path(path).absolute()) for path in stores]
    made_from(out, ((store, control_of(store)) for store in opened))  # before files are read
    judged = None if prefs is None else bind_file(prefs, reading, out=judged_in or out)
    selections = [*(select_mixtures(config) if mixed else select_stores(opened, judged=judged, ties=config.ties))]
    opened = [open_cached(path) for path in dict.fromkeys(path for chosen in selections for path in chosen.stores)]
    known = made_from(out, ((store, control_of(store)) for store in opened))
    for selection in selections:
        for pairs in material(selection).parts:
            check_protocol(config.protocol, pairs.frame, where=selection.stores[0])
    sets = partial(layer_sets, run=out, allowed=budget_of(memory).share(1), searches=searches)
    planned = [record for selection in selections for record in plan_records(config, selection, sets=sets)]
    records = [*planned, *altered_records(planned)]
    check_distinct(records)
    check_primary(config, records)
    baselines, done, budget = plan_baselines(planned), results.done_records(out), budget_of(memory)
    inputs = affordable(plan_input_baselines(planned), budget, done)
    groups = groups_of([record for record in records if record.record_id not in done], budget, jobs)
    return Prepared(config, opened, selections, records, baselines, inputs, known, done, budget, groups)


@one_thread()
def _run(work: Work, *, out: Path, scratch: Scratch | None = None) -> list[Fitted]:
    """Fit the records of a unit and write their parts."""
    KEPT.trim(work.keep)  # also where this fit reads no layer through them
    first, data = work.record, material(work.record.selection)
    features = Features(work.places, averaged=first.combination == "mean", keep=work.keep, scratch=scratch)
    said: dict[str, Fitted] = {}
    try:
        for record, head, facts in fit(work.unit, features, data.train, memory=work.head_memory):
            said[record.record_id] = _judged(record, head, facts, margins(head, features), out)
    except HeadError as error:
        at = f"sigma {first.sigma}, pooling {first.pooling}, layers {layer_set_name(first.layers)}"
        message = f"{first.store}, head {first.head.name!r} ({first.combination}), {at}: {error}"
        raise HeadError(message) from None
    return [said[record.record_id] for record in work.unit]


def _judged(record: Record, head: PairHead | None, facts: dict[str, Any], values: FloatArray, out: Path) -> Fitted:
    """Judge a head by its margins (n,) of all pairs of the selection, and write its part."""
    on = altered(record)
    values = values[on.places]
    if record.kind == "nested" and isinstance(head, BradleyTerryClassifierCV):
        n = len(on.data.train.label)
        values[n : 2 * n] = head.cv_margins_
    facts = record_facts(record, open_cached(record.store)) | facts
    details: dict[str, Detail] = {"": "slices", "source": "sources"}  # heads by source are for the matrix of sources
    detail = details.get(record.kind, "whole")
    rows, kept = judged_rows(record, on.data, on.data.by_part(values), facts, blind=head is None, detail=detail)
    results.write_part(out, record.record_id, rows, kept)
    told = rows[rows["slice_by"] == "all"]
    validation, test = (told.loc[told["split"] == split, "accuracy"] for split in ("validation", "test"))
    name = results.set_label(facts["layer_set"], record.combination)
    return Fitted(name, float(validation.iloc[0]), tuple(test), head is None)


def _text(record: Record, fitted: Fitted, best: dict[str, Fitted]) -> str:
    """Say the test accuracy of a fit and of the one that is best on validation so far, of one store, level and head."""
    of = f"{record.label} {record.head.name}" + f" ({record.altered}, seed {record.seed})" * bool(record.altered)
    at = f" at {record.sigma}" * bool(record.sigma)
    top = best.setdefault(of + at, fitted)
    if fitted.validation > top.validation:
        top = best[of + at] = fitted
    shown, most = (", ".join(f"{100 * value:.1f} %" for value in one.test) for one in (fitted, top))
    return f"{of} {fitted.layer_set}{at}: test {shown} (best on validation so far: {top.layer_set}, test {most})"
