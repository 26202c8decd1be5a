"""Plan and run a sweep: every head on every layer set of every store, one record at a time.

The plan is a list of typed records hashed from plain values. A record's results are written as one part, atomically,
by the process that computed them; the same command again computes only the records that have no part.

Every refitting loop lives here. Nothing is chosen on what is reported: the strength of a linear head comes from grouped
cross-validation inside the training split, the layer from the validation split (marked by `probekit.results.rebuild`).
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from probekit import results
from probekit._types import FloatArray, IntArray, Progress
from probekit._workers import run_in_processes
from probekit.config import LinearHead, MLPHead, SweepConfig, load_yaml
from probekit.errors import ConfigError, StoreError
from probekit.heads import (
    BradleyTerryClassifierCV,
    BradleyTerryMLP,
    combination_name,
    concatenate,
    layer_set_name,
    resolve_layer_sets,
)
from probekit.heads.base import PairHead
from probekit.preferences import load_preferences
from probekit.stats import PROTOCOLS, accuracy_interval, macro_interval
from probekit.store import FeatureStore, Pairs, canonical_json

logger = logging.getLogger(__name__)

FIT_VERSION = "1"  # part of every record's identity: raised when the same settings would give other numbers
_SPLITS = ("train", "validation", "test")
_JUDGEMENTS, _DIGESTS = "judgements", "image_digests.parquet"  # what `prefs` leaves in a run
_T = TypeVar("_T", str, int)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One fit: everything that determines its numbers, and where its features are.

    `store` is a path and no part of the identity; `fingerprint` and `data_digest` say what is in it.
    """

    store: Path
    backbone: str
    control: str
    training_images: int | None
    fingerprint: str
    dataset: str
    data_digest: str
    protocol: str
    sigma: str
    draw: int
    pooling: str
    layers: tuple[int, ...]
    head: LinearHead | MLPHead
    seed: int
    resamples: int
    level: float

    @property
    def record_id(self) -> str:
        """SHA-256 over the plain values, full precision, without the store's path."""
        plain = {key: value for key, value in vars(self).items() if key not in ("store", "head")}
        plain |= {"head": self.head.model_dump(exclude={"layer_sets", "seeds"}), "fit_version": FIT_VERSION}
        return hashlib.sha256(canonical_json(plain).encode()).hexdigest()[:32]


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
    _check_folder(out)
    _store.cache_clear()  # judgements may have changed since an earlier call in this process
    _pairs.cache_clear()
    opened = [FeatureStore(Path(path)) for path in stores]
    judged = None if prefs is None else _bind_file(Path(prefs), out=out)
    records = [record for store in opened for record in _plan(config, store, judged=judged)]
    _check_distinct(records)
    ids = [record.record_id for record in records]
    results.write_config(
        out, {"sweep": config.model_dump(mode="json"), "stores": [_settings(store) for store in opened]}
    )
    done = results.done_records(out)
    todo = [record for record in records if record.record_id not in done]
    fits = run_in_processes(partial(_run, out=out, judged=judged), todo, jobs=jobs)
    for count, (record, text) in enumerate(fits, start=1):
        if progress is not None:
            progress(len(records) - len(todo) + count, len(records), f"{record.store.name} {text}")
    others = results.rebuild(out, ids, facts=_store_facts(records, opened))
    if others:
        logger.info("%s: %d fits of earlier configurations are kept in parts/, not in results.parquet", out, others)
    return out


def _check_folder(out: Path) -> None:
    """Refuse to mix a run with other files; one that was stopped early may hold bound judgements and no plan yet."""
    if not out.exists() or (out / "config.json").is_file():
        return
    if not out.is_dir() or any(not path.name.startswith((_JUDGEMENTS, _DIGESTS)) for path in out.iterdir()):
        message = f"{out}: is no run; allowed: a new or empty folder, or the folder of an earlier sweep"
        raise ConfigError(message)


def _check_distinct(records: list[Record]) -> None:
    """Refuse two fits that the results could not tell apart, such as two backbones of one name."""
    seen: dict[tuple[object, ...], Record] = {}
    for record in records:
        source = (record.backbone, record.control, record.dataset, record.sigma, record.draw, record.pooling)
        first = seen.setdefault((*source, record.layers, record.head.name, record.seed), record)
        if first is not record:
            message = (
                f"{first.store} and {record.store}: both are {record.backbone!r} ({record.control}); allowed: each "
                "backbone once; give the second another name (dump it again with --name, which computes nothing)"
            )
            raise ConfigError(message)


def _settings(store: FeatureStore) -> dict[str, Any]:
    """Give the settings of a store that a report shows; hashes stay in the store, its fingerprint stands for them."""
    plain = {key: value for key, value in store.config.items() if not isinstance(value, dict | list)}
    facts = {"store": store.path.name, "fingerprint": store.fingerprint, "rows": len(store.rows)}
    if store.describe.get("imported"):  # numbers alone would not say which of the layers given is which
        plain["layer_names"] = ", ".join(f"{layer.index} = {layer.name}" for layer in store.layers)
    shown = {"pooling": store.config["poolings"], "sigma_resolution": store.sigma_resolution}
    return facts | plain | dict(store.config.get("noise", {})) | shown


def _store_facts(records: list[Record], stores: list[FeatureStore]) -> pd.DataFrame:
    """Give what results say of a record's store and what is no part of the fit, by record."""
    by_path = {store.path: store for store in stores}
    facts: dict[str, list[Any]] = {"family_tested": [], "sigma_ratio": [], "pooling_layers": [], "imported": []}
    for record in records:
        store = by_path[record.store]
        facts["family_tested"].append(store.describe.get("family_tested", True))
        facts["sigma_ratio"].append(store.sigma_resolution.get(record.sigma, {}).get("ratio"))
        held = {layer.index for layer in store.layers_of(record.pooling)}
        last = store.describe["n_blocks"]  # the output point is no layer
        imported = bool(store.describe.get("imported"))
        absent = [layer for layer in store.layers if layer.index <= last and layer.index not in held]
        # Of a backbone all layers are known; imported features have those that were given.
        given = len([layer for layer in held if layer <= last])
        facts["pooling_layers"].append(given if imported else last + 1 - len(absent))
        facts["imported"].append(imported)
    return pd.DataFrame(facts, index=[record.record_id for record in records]).astype({"sigma_ratio": "float64"})


def _control(store: FeatureStore) -> str:
    """Say of what a store is a control: ``trained`` if of nothing, else what was replaced, such as ``init:0``."""
    prompts = store.describe.get("prompts", "real")
    kind, _, seed = prompts.partition(":")
    told = "" if prompts == "real" else f"{kind}-prompts:{seed}".removesuffix(":")
    return "+".join(part for part in (store.describe["random_weights"], told) if part) or "trained"


def _plan(config: SweepConfig, store: FeatureStore, *, judged: Path | None) -> Iterator[Record]:
    """All records of one store, in the order of the configuration."""
    if store.describe.get("imported"):  # without noise or pooling of ours, so there is nothing to choose among
        config = config.model_copy(update={"sigmas": "all", "draws": "all", "poolings": "all"})
    coordinates = _coordinates(config, store)
    poolings = _chosen(config.poolings, store.poolings, what="pooling", store=store)
    for dataset in [judged.stem] if judged else store.judgements:
        held = set(_pairs(store.path, dataset, judged, None).frame["split"])
        for split in _SPLITS:
            if split not in held:
                message = (
                    f"{store.path}: data set {dataset!r} has no {split} pairs with features, only "
                    f"{', '.join(sorted(held)) or 'none at all'}; a sweep needs train, validation and test pairs"
                )
                raise StoreError(message)
        digest = _data_digest(store, dataset, judged)
        for (sigma, draw), pooling, head in product(coordinates, poolings, config.heads):
            seeds = head.seeds if isinstance(head, MLPHead) else [0]
            for layers, seed in product(_layer_sets(head, store, pooling), seeds):
                yield Record(
                    store=store.path,
                    backbone=store.describe["name"],
                    control=_control(store),
                    training_images=store.describe["training_images"],
                    fingerprint=store.fingerprint,
                    dataset=dataset,
                    data_digest=digest,
                    protocol=config.protocol,
                    sigma=sigma,
                    draw=draw,
                    pooling=pooling,
                    layers=layers,
                    head=head,
                    seed=seed,
                    resamples=config.resamples,
                    level=config.level,
                )


def _layer_sets(head: LinearHead | MLPHead, store: FeatureStore, pooling: str) -> list[tuple[int, ...]]:
    stored = [layer.index for layer in store.layers_of(pooling)]
    try:
        return resolve_layer_sets(head.layer_sets, int(store.describe["n_blocks"]), stored=stored)
    except ConfigError as error:
        message = f"{store.path}, pooling {pooling!r}, head {head.name!r}: {error}"
        raise ConfigError(message) from None


def _coordinates(config: SweepConfig, store: FeatureStore) -> list[tuple[str, int]]:
    """Noise levels and draws, which need not be the same at every level; both named means each combination."""
    sigmas = _chosen(config.sigmas, store.sigmas, what="sigma", store=store)
    draws = _chosen(config.draws, store.draws, what="draw", store=store)
    asked = list(product(sigmas, draws))
    held = [place for place in asked if place in store.coordinates]
    if len(held) < len(asked) and "all" not in (config.sigmas, config.draws):
        sigma, draw = next(place for place in asked if place not in held)
        at = ", ".join(str(draw) for place, draw in store.coordinates if place == sigma)
        message = f"{store.path}: holds no draw {draw} at sigma {sigma}; it holds {at} there"
        raise ConfigError(message)
    return held


def _chosen(asked: str | list[_T], held: list[_T], *, what: str, store: FeatureStore) -> list[_T]:
    if isinstance(asked, str):
        return held
    missing = [value for value in asked if value not in held]
    if missing:
        message = f"{store.path}: holds no {what} {missing[0]!r}; it holds {', '.join(map(str, held))}"
        raise ConfigError(message)
    return list(asked)


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


@lru_cache(maxsize=2)
def _store(path: Path) -> FeatureStore:
    return FeatureStore(path)


@lru_cache(maxsize=8)
def _pairs(path: Path, dataset: str, judged: Path | None, split: str | None) -> Pairs:
    store = _store(path)
    if judged is None:
        return store.pairs(split=split, judgements=dataset)
    return store.bind(pd.read_parquet(judged)).pairs(split=split)


def _data_digest(store: FeatureStore, dataset: str, judged: Path | None) -> str:
    """Digest of the rows and of all judgements that a fit sees; it changes when rows or labels are added or changed."""
    digest = hashlib.sha256()
    row_ids = store.rows["row_id"].to_numpy()
    for split in _SPLITS:
        pairs = _pairs(store.path, dataset, judged, split)
        frame = pairs.frame[["pair_id", "group", "split", "source", "weight"]].assign(
            label=pairs.label, row_a=row_ids[pairs.rows[:, 0]], row_b=row_ids[pairs.rows[:, 1]]
        )
        for table in (frame, pairs.excluded[["pair_id", "source", "reason"]]):
            digest.update(pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes())
    return digest.hexdigest()


def _run(record: Record, *, out: Path, judged: Path | None) -> str:
    """Fit one record, write its part, and say its test accuracy."""
    store = _store(record.store)
    features = concatenate(
        [
            store.read(layer=layer, sigma=record.sigma, pooling=record.pooling, draw=record.draw)
            for layer in record.layers
        ]
    )
    pairs = {split: _pairs(record.store, record.dataset, judged, split) for split in _SPLITS}
    head, fitted = _fit(record, features, pairs["train"])
    margins = {split: _margins(head, features, pairs[split].rows) for split in _SPLITS}
    trained = PROTOCOLS[record.protocol](margins["train"], pairs["train"].label)
    fitted["train_left_out"] = len(pairs["train"].excluded)
    fitted["train_accuracy"] = np.nan if head is None else float(np.nanmean(trained.correct))
    rows = [
        _facts(record, store) | fitted | row
        for split in ("validation", "test")
        for row in _accuracies(record, pairs[split], margins[split], split=split, blind=head is None)
    ]
    kept = pd.concat(
        pairs[split]
        .frame[["pair_id", "group", "split", "source"]]
        .assign(label=pairs[split].label, margin=margins[split])
        for split in ("validation", "test")
    )
    results.write_part(out, record.record_id, pd.DataFrame(rows), kept)
    test = next(row for row in rows if row["split"] == "test" and row["source"] == results.ALL_SOURCES)
    return f"{record.head.name} {_facts(record, store)['layer_set']}: {100 * test['accuracy']:.1f} %"


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


def _facts(record: Record, store: FeatureStore) -> dict[str, Any]:
    """Give the columns that say what was fitted on what."""
    facts = store.describe
    single = len(record.layers) == 1
    # the output point (layer n_blocks + 1) is no deeper than the last layer; one imported layer alone has no depth
    has_depth = single and facts["n_blocks"] > 0
    depth = min(record.layers[0], facts["n_blocks"]) / facts["n_blocks"] if has_depth else np.nan
    return {
        "record_id": record.record_id,
        "backbone": record.backbone,
        "control": record.control,
        "dataset": record.dataset,
        "protocol": record.protocol,
        "sigma": record.sigma,
        "draw": record.draw,
        "pooling": record.pooling,
        "layer_set": layer_set_name(record.layers),
        "layer": record.layers[0] if single else None,
        "n_layers": len(record.layers),
        "combination": combination_name(record.layers),
        "head": record.head.name,
        "head_kind": record.head.kind,
        "seed": record.seed,
        "backbone_parameters": facts["n_parameters"],
        "width": facts["width"],
        "n_blocks": facts["n_blocks"],
        "relative_depth": depth,
        "training_images": record.training_images,
        "store_fingerprint": record.fingerprint,
        "data_digest": record.data_digest,
        "probekit_version": version("dit-probekit"),
    }


def _accuracies(
    record: Record, pairs: Pairs, margins: FloatArray, *, split: str, blind: bool
) -> Iterator[dict[str, Any]]:
    """Accuracy over all pairs of a split, then per source; intervals by the group bootstrap; none without a head."""
    sources = pairs.frame["source"].to_numpy()
    groups = pairs.frame["group"].to_numpy()
    excluded = pairs.excluded
    kinds = sorted({*sources, *excluded["source"]})
    for source in [results.ALL_SOURCES, *(kinds if len(kinds) > 1 else [])]:
        inside = np.ones(len(sources), dtype=bool) if source == results.ALL_SOURCES else sources == source
        outcome = PROTOCOLS[record.protocol](margins[inside], pairs.label[inside])
        decided = ~np.isnan(outcome.correct) & (not blind)
        row: dict[str, Any] = {
            "split": split,
            "source": source,
            "n_pairs": outcome.n_pairs,
            "true_ties": outcome.true_ties,
            "predicted_ties": outcome.predicted_ties,
            "left_out": len(excluded) if source == results.ALL_SOURCES else int((excluded["source"] == source).sum()),
        }
        row |= dict.fromkeys(("accuracy", "low", "high", "se", "effective_groups"), np.nan) | {"n_groups": 0}
        row |= dict.fromkeys(("macro_accuracy", "macro_low", "macro_high"), np.nan)
        if decided.any():
            options: dict[str, Any] = {"n_boot": record.resamples, "level": record.level}
            correct, clusters = outcome.correct[decided], groups[inside][decided]
            interval = accuracy_interval(correct, clusters, **options)
            row |= {
                "accuracy": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "se": interval.se,
                "n_groups": interval.n_groups,
                "effective_groups": interval.effective_groups,
            }
            if source == results.ALL_SOURCES:
                macro = macro_interval(correct, clusters, sources[decided], **options)
                row |= {"macro_accuracy": macro.estimate, "macro_low": macro.low, "macro_high": macro.high}
        yield row
