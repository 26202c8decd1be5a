"""The plan of a sweep: a list of typed records hashed from plain values, each one fit of one head."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd

from probekit.config import OF_THE_PLAN, LinearHead, MLPHead, Rule, SweepConfig, Ties
from probekit.errors import ConfigError
from probekit.heads import combination_name
from probekit.results import JOINED, SPLITS
from probekit.store import FeatureStore, canonical_json
from probekit.store.settings import differing
from probekit.sweep.material import Portion, Selection, joint_fingerprint, material, open_cached

logger = logging.getLogger(__name__)

FIT_VERSION = "5"  # part of every record's identity: raised when the same settings would give other numbers
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

    `selection` holds paths and is no part of the identity; `fingerprint` and `data_digest` say what is there. `altered`
    says what of the training pairs or features is not as it is (see `probekit.results.ALTERED`), `seed` which draw.
    `other` is where features of random weights are, if altered features take some of them; `fingerprint` covers it.
    """

    selection: Selection
    backbone: str
    control: str
    training_images: int | None
    fingerprint: str
    trained_on: str
    datasets: tuple[str, ...]
    data_digest: str
    ties: Ties
    sigmas: tuple[str, ...]  # side by side; so are the poolings
    draw: int
    poolings: tuple[str, ...]
    layers: tuple[int, ...]
    combination: Rule | Literal["single"]
    head: LinearHead | MLPHead
    seed: int
    altered: str = ""
    other: Selection | None = None

    @property
    def record_id(self) -> str:
        """SHA-256 over the plain values, full precision, without the store's path."""
        plain = {key: value for key, value in vars(self).items() if key not in ("selection", "other", "head")}
        plain |= {"head": self.head.model_dump(exclude=OF_THE_PLAN), "fit_version": FIT_VERSION}
        return hashlib.sha256(canonical_json(plain).encode()).hexdigest()[:32]

    @property
    def sigma(self) -> str:
        """What results call the noise levels, such as ``0.005+0.1``."""
        return JOINED.join(self.sigmas)

    @property
    def pooling(self) -> str:
        """What results call the poolings, such as ``mean+max``."""
        return JOINED.join(self.poolings)

    @property
    def kind(self) -> str:
        """What is altered, without its parameter."""
        return self.altered.partition(":")[0]

    @property
    def label(self) -> str:
        """What the progress calls it."""
        return self.store.name if len(self.selection.stores) == 1 else f"{self.backbone} ({self.trained_on})"

    @property
    def store(self) -> Path:
        """The first store: of a mixture all stores hold the same layers of the same backbone."""
        return self.selection.stores[0]


def select_stores(stores: Sequence[FeatureStore], *, judged: Path | None, ties: Ties) -> Iterator[Selection]:
    """Each data set of each store on its own: fitted, chosen and tested on its three splits."""
    for store in stores:
        for dataset in [judged.stem] if judged else store.judgements:
            train, validation, test = ((Portion(store.path, dataset, split),) for split in SPLITS)
            yield Selection(train, validation, test, ties, judged)


def select_mixtures(config: SweepConfig) -> Iterator[Selection]:
    """One mixture for each backbone (and control) that the entries of `train` and `test` name.

    The layer is chosen on the validation pairs of the data sets that are fitted on, with the same weights.

    Raises
    ------
    ConfigError
        If an entry leaves open which data set it means, a backbone is only fitted or only tested on, stores of a
        backbone were made with different settings, or entries repeat each other.
    """
    entries: dict[tuple[str, str], dict[str, list[Portion]]] = {}
    for role, sets in (("train", config.train or []), ("test", config.test or [])):
        for entry in sets:
            store = open_cached(Path(entry.store).absolute())
            dataset = _dataset(store, entry.dataset, role=role)
            weight = getattr(entry, "weight", 1.0)
            backbone = entries.setdefault((store.describe["name"], control_of(store)), {"train": [], "test": []})
            backbone[role].append(Portion(store.path, dataset, entry.split, weight, entry.name or ""))
    for (name, control), found in entries.items():
        for role, portions in found.items():
            if not portions:
                other = "test" if role == "train" else "train"
                message = f"{role}: no store is of {name!r} ({control}), which {other} names; allowed: one at least"
                raise ConfigError(message)
        _check_portions(found["train"], found["test"])
        validation = {
            (at.store, at.dataset): Portion(at.store, at.dataset, "validation", at.weight, at.name)
            for at in found["train"]
        }
        selection = Selection(tuple(found["train"]), tuple(validation.values()), tuple(found["test"]), config.ties)
        _check_alike([open_cached(path) for path in selection.stores])
        yield selection


def _dataset(store: FeatureStore, asked: str | None, *, role: str) -> str:
    if asked is None and len(store.judgements) == 1:
        return store.judgements[0]
    if asked not in store.judgements:
        what = "dataset is not given" if asked is None else f"dataset {asked!r} is not in the store"
        message = f"{role}: {store.path}: {what}; allowed: {', '.join(store.judgements) or 'none, it holds no such'}"
        raise ConfigError(message)
    return asked


def _check_portions(train: list[Portion], test: list[Portion]) -> None:
    """Refuse pairs that are fitted on twice, and test sets of one name, which the results could not tell apart."""
    seen: set[tuple[Path, str, str]] = set()
    for portion in train:
        if (portion.store, portion.dataset, portion.split) in seen:
            message = (
                f"train: {portion.store}: the {portion.split} pairs of {portion.dataset!r} are there twice; allowed: "
                "once, with a weight"
            )
            raise ConfigError(message)
        seen.add((portion.store, portion.dataset, portion.split))
    weights: dict[tuple[Path, str], float] = {}
    for portion in train:
        if weights.setdefault((portion.store, portion.dataset), portion.weight) != portion.weight:
            message = (
                f"train: {portion.store}: two weights for {portion.dataset!r}; allowed: one, which its validation "
                "pairs have too"
            )
            raise ConfigError(message)
    names = [portion.title for portion in test]
    for portion in test:
        if names.count(portion.title) > 1:
            message = (
                f"test: {portion.store}: two test sets of a backbone are named {portion.title!r}; allowed: one; give "
                "the others a name of their own (name: ...)"
            )
            raise ConfigError(message)


def _check_alike(stores: list[FeatureStore]) -> None:
    """Refuse to mix features that differ in more than the rows they are of."""
    first = _comparable(stores[0])
    for store in stores[1:]:
        for key, held, other in differing(first, _comparable(store)):
            message = (
                f"{stores[0].path} and {store.path} are both of {store.describe['name']!r}, but {key} is {held!r} and "
                f"{other!r}; allowed: stores of a backbone that were made with the same settings, or names (--name)"
            )
            raise ConfigError(message)


def _comparable(store: FeatureStore) -> dict[str, Any]:
    """Give what the stores of a backbone share: all settings but those that follow from which pictures they are of."""
    config = {key: value for key, value in store.config.items() if key != "file_sha256"}
    if "prompts" in config:  # "shuffled:0 of 400 prompts, SHA-256 ..."
        config["prompts"] = str(config["prompts"]).partition(" ")[0]
    held = [f"sigma {sigma}, draw {draw}" for sigma, draw in store.coordinates]
    return config | {"width": store.describe["width"], "n_blocks": store.describe["n_blocks"], "coordinates": held}


def plan_records(
    config: SweepConfig, selection: Selection, *, sets: Callable[..., list[tuple[int, ...]]]
) -> Iterator[Record]:
    """All records of one selection, in the order of the configuration.

    ``sets`` gives the layer sets of a head: `probekit.sweep.layer_sets.layer_sets` but for what a sweep tells it.
    """
    store = open_cached(selection.stores[0])
    if store.describe.get("imported"):  # without noise or pooling of ours, so there is nothing to choose among
        config = config.model_copy(update={"sigmas": "all", "draws": "all", "poolings": "all"})
    data = material(selection)
    data_digest = data.digest
    fingerprints = sorted({open_cached(path).fingerprint for path in selection.stores})
    for sigmas, draw, poolings, head in _settings(config, store):
        seeds = head.seeds if isinstance(head, MLPHead) else [0]
        found = sets(head, selection, sigmas=sigmas, draw=draw, poolings=poolings)
        combined = dict.fromkeys((layers, combination_name(layers, rule)) for layers in found for rule in head.combine)
        for (layers, combination), seed in product(combined, seeds):
            yield Record(
                selection=selection,
                backbone=store.describe["name"],
                control=control_of(store),
                training_images=store.describe["training_images"],
                fingerprint=joint_fingerprint(fingerprints),
                trained_on=selection.trained_on,
                datasets=tuple(data.tests),
                data_digest=data_digest,
                ties=selection.ties,
                protocol=config.protocol,
                sigmas=sigmas,
                draw=draw,
                poolings=poolings,
                layers=layers,
                combination=combination,
                head=head,
                seed=seed,
                resamples=config.resamples,
                level=config.level,
            )


def _settings(
    config: SweepConfig, store: FeatureStore
) -> Iterator[tuple[tuple[str, ...], int, tuple[str, ...], LinearHead | MLPHead]]:
    """Noise levels, draw, poolings and head of each setting, in which a head reads one or, side by side, all."""
    coordinates = _coordinates(config, store)
    poolings = _chosen(config.poolings, store.poolings, what="pooling", store=store)
    apart = [((sigma,), draw) for sigma, draw in coordinates]
    together = _together(coordinates)
    if not together and any("sigma" in head.across for head in config.heads):
        held = ", ".join(f"{draw} at {sigma}" for sigma, draw in coordinates)
        message = (
            f"{store.path}: across: sigma: no noise draw is there at all noise levels, but {held}; allowed: one that is"
        )
        raise ConfigError(message)
    for what, values in (("sigma", {sigma for sigma, _ in coordinates}), ("pooling", poolings)):
        names = ", ".join(head.name for head in config.heads if what in head.across)
        if names and len(values) == 1:
            text = "%s, head %s: across: %s joins nothing, since %s is the only one; its fits are those on it alone"
            logger.warning(text, store.path, names, what, *values)
    places = list(dict.fromkeys([*apart, *together]))
    chosen = list(dict.fromkeys([*((pooling,) for pooling in poolings), tuple(poolings)]))
    for place, joined, head in product(places, chosen, config.heads):
        # what is one alone is also all of them where there is one only
        sigma_wanted = place in (together if "sigma" in head.across else apart)
        pooling_wanted = joined == tuple(poolings) if "pooling" in head.across else len(joined) == 1
        if sigma_wanted and pooling_wanted:
            yield *place, joined, head


def _together(coordinates: list[tuple[str, int]]) -> list[tuple[tuple[str, ...], int]]:
    """All noise levels with each draw that is there at every one of them."""
    sigmas = tuple(dict.fromkeys(sigma for sigma, _ in coordinates))
    draws = dict.fromkeys(draw for _, draw in coordinates)
    return [(sigmas, draw) for draw in draws if all((sigma, draw) in coordinates for sigma in sigmas)]


def units(records: Sequence[Record]) -> list[list[Record]]:
    """Group the records that are fitted together, on the same features; in the order of the plan.

    They differ in their seed and in what is altered of the training pairs or made of the features.
    """
    found: dict[str, list[Record]] = {}
    for record in records:
        alike = record if record.other else replace(record, seed=0, altered="")
        found.setdefault(alike.record_id, []).append(record)
    return list(found.values())


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


def control_of(store: FeatureStore) -> str:
    """Say of what a store is a control: ``trained`` if of nothing, else what was replaced, such as ``init:0``."""
    prompts = store.describe.get("prompts", "real")
    kind, _, seed = prompts.partition(":")
    told = "" if prompts == "real" else f"{kind}-prompts:{seed}".removesuffix(":")
    return "+".join(part for part in (store.describe["random_weights"], told) if part) or "trained"


def check_distinct(records: list[Record]) -> None:
    """Refuse two fits that the results could not tell apart, such as two backbones of one name."""
    seen: dict[tuple[object, ...], Record] = {}
    for record in records:
        source = (record.backbone, record.control, record.trained_on, record.sigma, record.draw, record.pooling)
        key = (*source, record.layers, record.combination, record.head.name, record.seed, record.altered)
        first = seen.setdefault(key, record)
        if first is not record:
            message = (
                f"{first.store} and {record.store}: both are {record.backbone!r} ({record.control}); allowed: each "
                "backbone once; give the second another name (dump it again with --name, which computes nothing)"
            )
            raise ConfigError(message)


def check_primary(config: SweepConfig, records: Sequence[Record]) -> None:
    """Refuse a primary endpoint that no fit of the sweep will be."""
    trained = dict.fromkeys(record.backbone for record in records if record.control == "trained")
    datasets = dict.fromkeys(name for record in records for name in record.datasets)
    for key, known in (("backbone", trained), ("dataset", datasets)):
        named = getattr(config.primary, key)
        if named is not None and named not in known:
            message = f"primary: {key} is {named!r}; allowed: {', '.join(known) or 'none, as no backbone is trained'}"
            raise ConfigError(message)


def told_of_sets(selections: Sequence[Selection]) -> dict[str, dict[str, str]]:
    """Say of each data set how it was split (``splits``) and which pairs of its file are not in it (``left_out``).

    A split is named by the SHA-256 of its split file, or else the preference file itself or a hash decided.
    """
    found: dict[str, dict[str, set[str]]] = {"split_file": {}, "left_out_of_set": {}}
    for data in map(material, selections):
        for pairs in (data.train, data.validation, *data.tests.values()):
            for column, texts in found.items():
                # Older judgements have no such columns.
                values = pairs.frame.get(column, pd.Series("", pairs.frame.index)).fillna("")
                for dataset, names in values.groupby(pairs.frame["dataset"]):
                    texts.setdefault(str(dataset), set()).update(names)
    by_hash = "by the preference file or by hash"
    return {
        "splits": {
            dataset: ", ".join(f"split file {name}" if name else by_hash for name in sorted(hashes))
            for dataset, hashes in found["split_file"].items()
        },
        "left_out": {
            dataset: " / ".join(sorted(texts - {""}))
            for dataset, texts in found["left_out_of_set"].items()
            if any(texts)
        },
    }


def store_settings(store: FeatureStore) -> dict[str, Any]:
    """Give the settings of a store that a report shows; hashes stay in the store, its fingerprint stands for them."""
    plain = {key: value for key, value in store.config.items() if not isinstance(value, dict | list)}
    facts = {"store": store.path.name, "fingerprint": store.fingerprint, "rows": len(store.rows)}
    if store.describe.get("imported"):  # numbers alone would not say which of the layers given is which
        plain["layer_names"] = ", ".join(f"{layer.index} = {layer.name}" for layer in store.layers)
    poolings = {name: store.config["poolings"][name] for name in store.poolings}
    shown = {"pooling": poolings, "inputs": ", ".join(store.inputs), "sigma_resolution": store.sigma_resolution}
    return facts | plain | dict(store.config.get("noise", {})) | shown


def store_facts(records: list[Record], stores: list[FeatureStore], *, baselines: Sequence[str]) -> pd.DataFrame:
    """Give what results say of a record's store and what is no part of the fit, by record; baselines have none."""
    by_path = {store.path: store for store in stores}
    facts: dict[str, list[Any]] = {"family_tested": [], "sigma_ratio": [], "pooling_layers": [], "imported": []}
    for record in records:
        store = by_path[record.store]
        facts["family_tested"].append(store.describe.get("family_tested", True))
        ratios = [store.sigma_resolution.get(sigma, {}).get("ratio") for sigma in record.sigmas]
        # side by side, levels are as well resolved as the best of them
        facts["sigma_ratio"].append(max((ratio for ratio in ratios if ratio is not None), default=None))
        held = set.intersection(*({layer.index for layer in store.layers_of(name)} for name in record.poolings))
        last = store.describe["n_blocks"]  # the output point is no layer
        imported = bool(store.describe.get("imported"))
        absent = [layer for layer in store.layers if layer.index <= last and layer.index not in held]
        # Of a backbone all layers are known; imported features have those that were given.
        given = len([layer for layer in held if layer <= last])
        facts["pooling_layers"].append(given if imported else last + 1 - len(absent))
        facts["imported"].append(imported)
    table = pd.DataFrame(facts, index=[record.record_id for record in records])
    none = {"family_tested": True, "sigma_ratio": None, "pooling_layers": 0, "imported": False}
    return pd.concat([table, pd.DataFrame(none, index=list(baselines))]).astype({"sigma_ratio": "float64"})
