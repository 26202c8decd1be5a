"""The plan of a sweep: a list of typed records hashed from plain values, each one fit of one head."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from probekit.config import LinearHead, MLPHead, SweepConfig
from probekit.errors import ConfigError, StoreError
from probekit.heads import resolve_layer_sets
from probekit.results import SPLITS
from probekit.store import FeatureStore, Pairs, canonical_json

FIT_VERSION = "1"  # part of every record's identity: raised when the same settings would give other numbers
_T = TypeVar("_T", str, int)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """How margins are judged: by which protocol, with what intervals."""

    protocol: str
    resamples: int
    level: float


@dataclass(frozen=True, kw_only=True)
class Record(Judged):
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
    sigma: str
    draw: int
    pooling: str
    layers: tuple[int, ...]
    head: LinearHead | MLPHead
    seed: int

    @property
    def record_id(self) -> str:
        """SHA-256 over the plain values, full precision, without the store's path."""
        plain = {key: value for key, value in vars(self).items() if key not in ("store", "head")}
        plain |= {"head": self.head.model_dump(exclude={"layer_sets", "seeds"}), "fit_version": FIT_VERSION}
        return hashlib.sha256(canonical_json(plain).encode()).hexdigest()[:32]


def plan_records(config: SweepConfig, store: FeatureStore, *, judged: Path | None) -> Iterator[Record]:
    """All records of one store, in the order of the configuration."""
    if store.describe.get("imported"):  # without noise or pooling of ours, so there is nothing to choose among
        config = config.model_copy(update={"sigmas": "all", "draws": "all", "poolings": "all"})
    coordinates = _coordinates(config, store)
    poolings = _chosen(config.poolings, store.poolings, what="pooling", store=store)
    for dataset in [judged.stem] if judged else store.judgements:
        held = set(cached_pairs(store.path, dataset, judged, None).frame["split"])
        for split in SPLITS:
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


def _control(store: FeatureStore) -> str:
    """Say of what a store is a control: ``trained`` if of nothing, else what was replaced, such as ``init:0``."""
    prompts = store.describe.get("prompts", "real")
    kind, _, seed = prompts.partition(":")
    told = "" if prompts == "real" else f"{kind}-prompts:{seed}".removesuffix(":")
    return "+".join(part for part in (store.describe["random_weights"], told) if part) or "trained"


def _data_digest(store: FeatureStore, dataset: str, judged: Path | None) -> str:
    """Digest of the rows and of all judgements that a fit sees; it changes when rows or labels are added or changed."""
    digest = hashlib.sha256()
    row_ids = store.rows["row_id"].to_numpy()
    for split in SPLITS:
        pairs = cached_pairs(store.path, dataset, judged, split)
        frame = pairs.frame[["pair_id", "group", "split", "source", "weight"]].assign(
            label=pairs.label, row_a=row_ids[pairs.rows[:, 0]], row_b=row_ids[pairs.rows[:, 1]]
        )
        for table in (frame, pairs.excluded[["pair_id", "source", "reason"]]):
            digest.update(pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes())
    return digest.hexdigest()


def check_distinct(records: list[Record]) -> None:
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


def store_settings(store: FeatureStore) -> dict[str, Any]:
    """Give the settings of a store that a report shows; hashes stay in the store, its fingerprint stands for them."""
    plain = {key: value for key, value in store.config.items() if not isinstance(value, dict | list)}
    facts = {"store": store.path.name, "fingerprint": store.fingerprint, "rows": len(store.rows)}
    if store.describe.get("imported"):  # numbers alone would not say which of the layers given is which
        plain["layer_names"] = ", ".join(f"{layer.index} = {layer.name}" for layer in store.layers)
    shown = {"pooling": store.config["poolings"], "sigma_resolution": store.sigma_resolution}
    return facts | plain | dict(store.config.get("noise", {})) | shown


def store_facts(records: list[Record], stores: list[FeatureStore]) -> pd.DataFrame:
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


@lru_cache(maxsize=2)
def open_cached(path: Path) -> FeatureStore:
    """Open a store once per process."""
    return FeatureStore(path)


@lru_cache(maxsize=8)
def cached_pairs(path: Path, dataset: str, judged: Path | None, split: str | None) -> Pairs:
    """Join the judgements of a data set, or those bound in their place, to the rows of a store once per process."""
    store = open_cached(path)
    if judged is None:
        return store.pairs(split=split, judgements=dataset)
    return store.bind(pd.read_parquet(judged)).pairs(split=split)
