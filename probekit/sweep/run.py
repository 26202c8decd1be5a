"""Run a sweep: every head on every layer set of every store, one record at a time.

A record's results are written as one part, atomically, by the process that computed them; the same command again
computes only the records that have no part.

Every refitting loop lives here. Nothing is chosen on what is reported: the strength of a linear head comes from grouped
cross-validation inside the training split, the layer from the validation split (marked by `probekit.results.rebuild`).
"""

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit import results
from probekit._types import FloatArray, IntArray, Progress
from probekit._workers import run_in_processes
from probekit.config import LinearHead, SweepConfig, load_yaml
from probekit.errors import ConfigError
from probekit.heads import BradleyTerryClassifierCV, BradleyTerryMLP, concatenate
from probekit.heads.base import PairHead
from probekit.preferences import load_preferences
from probekit.results import SPLITS
from probekit.store import FeatureStore, Pairs
from probekit.sweep.evaluate import accuracies, record_facts
from probekit.sweep.judging import check_protocol, judge, prompt_ids, tuned_threshold
from probekit.sweep.plan import (
    Record,
    cached_pairs,
    check_distinct,
    open_cached,
    plan_records,
    store_facts,
    store_settings,
)

logger = logging.getLogger(__name__)

_JUDGEMENTS, _DIGESTS = "judgements", "image_digests.parquet"  # what `prefs` leaves in a run


def run_sweep(
    config: SweepConfig | Path | str,
    *,
    stores: Sequence[Path | str],
    out: Path | str,
    prefs: Path | str | None = None,
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
        prompts are not the real ones.
    out
        Folder of the run. Records that it already holds are not computed again.
    prefs
        Preference file that replaces the judgements kept in the stores; it must lie where its images are.
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
        If the configuration asks for layers, noise levels, draws or poolings that a store does not hold.
    StoreError
        If a store is damaged, or has no training, validation or test pairs.
    """
    if not isinstance(config, SweepConfig):
        config = SweepConfig.checked(load_yaml(Path(config)), source=str(config))
    out = Path(out)
    check_folder(out)
    open_cached.cache_clear()  # judgements may have changed since an earlier call in this process
    cached_pairs.cache_clear()
    opened = [FeatureStore(Path(path)) for path in stores]
    judged = None if prefs is None else _bind_file(Path(prefs), out=out)
    records = [record for store in opened for record in plan_records(config, store, judged=judged)]
    check_distinct(records)
    for record in {(record.store, record.dataset): record for record in records}.values():
        held = cached_pairs(record.store, record.dataset, judged, None)
        check_protocol(config.protocol, held.frame, where=record.store)
    ids = [record.record_id for record in records]
    scorers = {key: value for key, value in results.load_config(out).items() if key == "scorers"}
    results.write_config(
        out, scorers | {"sweep": config.model_dump(mode="json"), "stores": [store_settings(store) for store in opened]}
    )
    done = results.done_records(out)
    todo = [record for record in records if record.record_id not in done]
    fits = run_in_processes(partial(_run, out=out, judged=judged), todo, jobs=jobs)
    for count, (record, text) in enumerate(fits, start=1):
        if progress is not None:
            progress(len(records) - len(todo) + count, len(records), f"{record.store.name} {text}")
    others = results.rebuild(out, ids, facts=store_facts(records, opened))
    if others:
        logger.info("%s: %d fits of earlier configurations are kept in parts/, not in results.parquet", out, others)
    return out


def check_folder(out: Path) -> None:
    """Refuse to mix a run with other files; one that was stopped early may hold bound judgements and no plan yet."""
    if not out.exists() or (out / "config.json").is_file():
        return
    if not out.is_dir() or any(not path.name.startswith((_JUDGEMENTS, _DIGESTS)) for path in out.iterdir()):
        message = f"{out}: is no run; allowed: a new or empty folder, or the folder of an earlier sweep"
        raise ConfigError(message)


def _bind_file(prefs: Path, *, out: Path) -> Path:
    """Judgements of another preference file, keyed by row, kept in the run so that every process reads the same."""
    loaded = load_preferences(prefs)
    # A missing file costs its pairs here, as a row that the store lacks does.
    frame = loaded.judgements(loaded.image_digests(out / _DIGESTS, max_bad=1.0))
    path = out / _JUDGEMENTS / f"{loaded.name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    frame.to_parquet(temporary, index=False)
    temporary.replace(path)
    return path


def _run(record: Record, *, out: Path, judged: Path | None) -> str:
    """Fit one record, write its part, and say its test accuracy."""
    store = open_cached(record.store)
    features = concatenate(
        [
            store.read(layer=layer, sigma=record.sigma, pooling=record.pooling, draw=record.draw)
            for layer in record.layers
        ]
    )
    pairs = {split: cached_pairs(record.store, record.dataset, judged, split) for split in SPLITS}
    head, fitted = _fit(record, features, pairs["train"])
    margins = {split: _margins(head, features, pairs[split].rows) for split in SPLITS}
    threshold = tuned_threshold(record.protocol, margins["validation"], pairs["validation"].label)
    outcomes = {
        split: judge(record.protocol, margins[split], pairs[split].label, pairs[split].frame, threshold=threshold)
        for split in SPLITS
    }
    fitted["train_left_out"] = len(pairs["train"].excluded)
    fitted["train_accuracy"] = np.nan if head is None else outcomes["train"].accuracy
    rows = [
        record_facts(record, store) | fitted | row
        for split in ("validation", "test")
        for row in accuracies(
            record, pairs[split], margins[split], split=split, blind=head is None, threshold=threshold
        )
    ]
    kept = pd.concat(
        pairs[split]
        .frame[["pair_id", "group", "split", "source"]]
        .assign(
            prompt_id=prompt_ids(pairs[split].frame),
            label=pairs[split].label,
            margin=margins[split],
            correct=outcomes[split].correct,
        )
        for split in ("validation", "test")
    )
    results.write_part(out, record.record_id, pd.DataFrame(rows), kept)
    test = next(row for row in rows if row["split"] == "test" and row["source"] == results.ALL_SOURCES)
    return f"{record.head.name} {record_facts(record, store)['layer_set']}: {100 * test['accuracy']:.1f} %"


def _fit(record: Record, features: FloatArray, train: Pairs) -> tuple[PairHead | None, dict[str, Any]]:
    """Fit a head, or none where no training pair differs: text that has not met the image is that of its prompt."""
    if not any((features[a] != features[b]).any() for a, b in train.rows):
        return None, {"strength": np.nan, "edge_of_grid": False, "converged": True, "head_parameters": 0}
    groups = train.frame["group"].to_numpy()
    weight = train.frame["weight"].to_numpy()
    if isinstance(record.head, LinearHead):
        linear = BradleyTerryClassifierCV(Cs=record.head.strengths, cv=record.head.folds)
        linear.fit(features, train.rows, train.label, sample_weight=weight, groups=groups)
        return linear, {
            "strength": linear.C_,
            "edge_of_grid": linear.edge_of_grid_,
            "converged": linear.converged_,
            "head_parameters": linear.n_parameters_,
        }
    settings = record.head.model_dump(exclude={"kind", "name", "layer_sets", "seeds"})
    mlp = BradleyTerryMLP(**settings, seed=record.seed)
    mlp.fit(features, train.rows, train.label, sample_weight=weight, groups=groups)
    return mlp, {
        "strength": np.nan,
        "edge_of_grid": False,
        "converged": mlp.converged_,
        "head_parameters": mlp.n_parameters_,
    }


def _margins(head: PairHead | None, features: FloatArray, rows: IntArray) -> FloatArray:
    """Score the rows of pairs (n, 2) only: other rows of the store may have no features."""
    if head is None:
        return np.zeros(len(rows))
    used, place = np.unique(rows, return_inverse=True)
    return head.decision_function(features[used], place.reshape(rows.shape))
