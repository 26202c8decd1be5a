"""Run a sweep: every head on every layer set of every store, one record at a time.

A record's results are written as one part, atomically, by the process that computed them; the same command again
computes only the records that have no part.

Every refitting loop lives in this package. Nothing is chosen on what is reported: the strength of a linear head comes
from grouped cross-validation inside the training split, the layer from the validation split (marked by
`probekit.results.rebuild`).
"""

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from probekit import results
from probekit._types import Progress
from probekit._workers import run_in_processes
from probekit.config import LinearHead, PreferenceOptions, SweepConfig, load_yaml
from probekit.diagnostics import fit_warnings
from probekit.errors import ConfigError
from probekit.preferences import load_preferences
from probekit.store import IMAGE_DIGESTS
from probekit.sweep.baselines import plan_baselines, run_baseline
from probekit.sweep.beyond import beyond_generator
from probekit.sweep.blocks import ANSWERS, compare_blocks
from probekit.sweep.evaluate import judged_rows, record_facts
from probekit.sweep.fitting import features_of, fit, margins
from probekit.sweep.input_baselines import plan_input_baselines, run_input_baseline
from probekit.sweep.judging import check_protocol
from probekit.sweep.material import forget, material, open_cached
from probekit.sweep.plan import (
    Record,
    check_distinct,
    plan_records,
    select_mixtures,
    select_stores,
    store_facts,
    store_settings,
    told_of_sets,
    units,
)

logger = logging.getLogger(__name__)

_JUDGEMENTS, _DIGESTS = "judgements", IMAGE_DIGESTS  # what `prefs` leaves in a run


def run_sweep(
    config: SweepConfig | Path | str,
    *,
    stores: Sequence[Path | str] = (),
    out: Path | str,
    prefs: Path | str | None = None,
    reading: PreferenceOptions | None = None,
    ties: str | None = None,
    jobs: int = 1,
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
        Processes, each with one BLAS thread.
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
        it is said how a preference file is read and none is given.
    StoreError
        If a store is damaged, or has no training, validation or test pairs.
    """
    if not isinstance(config, SweepConfig):
        config = SweepConfig.checked(load_yaml(Path(config)), source=str(config))
    reading = reading or PreferenceOptions()
    if prefs is None and reading != PreferenceOptions():
        told = ", ".join(f"--{name.replace('_', '-')}" for name in reading.model_dump(exclude_defaults=True))
        message = f"{told}: says how a preference file is read, and none is given; allowed: with --prefs"
        raise ConfigError(message)
    if ties is not None:
        config = SweepConfig.checked(config.model_dump() | {"ties": ties}, source="options")
    mixed = config.train is not None
    if mixed == bool(stores) or (mixed and prefs is not None):
        given = "train and test are given" if mixed else "no store is given"
        message = f"{given}; allowed: stores (--store, perhaps --prefs), or train and test in the configuration"
        raise ConfigError(message)
    out = Path(out)
    check_folder(out)
    forget()
    opened = [open_cached(Path(path).absolute()) for path in stores]
    judged = None if prefs is None else _bind_file(prefs, reading, out=out)
    selections = [*(select_mixtures(config) if mixed else select_stores(opened, judged=judged, ties=config.ties))]
    opened = [open_cached(path) for path in dict.fromkeys(path for chosen in selections for path in chosen.stores)]
    records = [record for selection in selections for record in plan_records(config, selection, run=out)]
    check_distinct(records)
    for selection in selections:
        data = material(selection)
        for pairs in (data.train, data.validation, *data.tests.values()):
            check_protocol(config.protocol, pairs.frame, where=selection.stores[0])
    baselines = plan_baselines(records)
    inputs = plan_input_baselines(records)
    scorers = {key: value for key, value in results.load_config(out).items() if key == "scorers"}
    resolved = scorers | {"sweep": config.model_dump(mode="json")} | told_of_sets(selections)
    results.write_config(out, resolved | {"stores": [store_settings(store) for store in opened]})
    done = results.done_records(out)
    todo = [record for record in records if record.record_id not in done]
    count = len(records) - len(todo)
    for unit, texts in run_in_processes(partial(_run, out=out), units(todo), jobs=jobs):
        for record, text in zip(unit, texts, strict=True):
            count += 1
            if progress is not None:
                progress(count, len(records), f"{record.label} {text}")
    for baseline in baselines:
        if baseline.record_id not in done:
            run_baseline(baseline, out=out)
    for seen in inputs:
        if seen.record_id not in done:
            run_input_baseline(seen, out=out)
    fitted = [record.record_id for record in records]
    beside = [one.record_id for one in baselines] + [one.record_id for one in inputs]
    facts = store_facts(records, opened, baselines=beside)
    others = results.rebuild(out, fitted + beside, facts=facts)
    results.write_blocks(out, compare_blocks(out, resamples=config.resamples, level=config.level))
    results.write_beyond(out, beyond_generator(out, resamples=config.resamples, level=config.level))
    fitted_heads = results.load_results(out).query("head_kind != 'external'").drop_duplicates("record_id")
    grids = {head.name: head.strengths for head in config.heads if isinstance(head, LinearHead)}
    for warning in fit_warnings(fitted_heads, grids):
        logger.warning("%s", warning)
    if others:
        logger.info("%s: %d fits of earlier configurations are kept in parts/, not in results.parquet", out, others)
    return out


def check_folder(out: Path) -> None:
    """Refuse to mix a run with other files; one that was stopped early may hold bound judgements and no plan yet."""
    if not out.exists() or (out / "config.json").is_file():
        return
    if not out.is_dir() or any(not path.name.startswith((_JUDGEMENTS, _DIGESTS, ANSWERS)) for path in out.iterdir()):
        message = f"{out}: is no run; allowed: a new or empty folder, or the folder of an earlier sweep"
        raise ConfigError(message)


def _bind_file(prefs: Path | str, reading: PreferenceOptions, *, out: Path) -> Path:
    """Judgements of another preference file, keyed by row, kept in the run so that every process reads the same."""
    loaded = load_preferences(prefs, **reading.loading())
    loaded.unpack_images()
    # A missing file costs its pairs here, as a row that the store lacks does.
    frame = loaded.judgements(loaded.image_digests(out / _DIGESTS, max_bad=1.0))
    path = out / _JUDGEMENTS / f"{loaded.name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    frame.to_parquet(temporary, index=False)
    temporary.replace(path)
    return path


def _run(unit: list[Record], *, out: Path) -> list[str]:
    """Fit the records of a unit, write their parts, and say their test accuracies."""
    data, features = material(unit[0].selection), features_of(unit[0])
    texts = []
    for record, head, fitted in fit(unit, features, data.train):
        facts = record_facts(record, open_cached(record.store)) | fitted
        rows, kept = judged_rows(record, data, partial(margins, head, features), facts, blind=head is None)
        results.write_part(out, record.record_id, rows, kept)
        test = rows[(rows["split"] == "test") & (rows["slice_by"] == "all")]
        shown = ", ".join(f"{100 * accuracy:.1f} %" for accuracy in test["accuracy"])
        texts.append(f"{record.head.name} {results.set_label(facts['layer_set'], record.combination)}: {shown}")
    return texts
