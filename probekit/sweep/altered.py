"""Refits and controls of linear heads: which there are, on which pairs each is fitted and judged, and what it reads.

A record says in one field what is altered (`probekit.results.ALTERED`); ``seed`` counts the draws. Draws depend on the
names of groups alone, so that all layers, stores and heads see the same ones.

    permuted      the labels of the training pairs, as `probekit.stats.permuted_labels` draws them
    half          another half of the training groups for each seed
    share:0.2     that share of the training groups, part of every larger share
    source:blur   the training pairs of that source alone
    nested:5      training and validation pairs outside of an outer fold, whose number is the seed; "validation" rows
                  are of these pairs, each judged by the inner fit that held it out, "test" rows of the fold
    beside:init:0     a layer beside the same layer of a random-weights store of the backbone
    padded:3:init:0   layer 3 of a set, the others from such a store
    projected:16      that many random directions in the scaled channels

The layer that is best on "validation" within a fold is thus chosen without the fold (`probekit.results.mark_chosen`),
which makes the accuracy over all folds that of the choice. The test split plays no part in it. With ``ties: drop`` tied
training pairs are in no fold.

The first two keep the strength of the fit that they repeat: a permuted fit would choose the strongest penalty, which
memorises least, and with the strength of a half more than the pairs would change. So they share its factorisation. The
others are fits of their own.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit._types import IntArray
from probekit.config import LinearHead, Ties
from probekit.errors import ConfigError
from probekit.heads.linear import _folds
from probekit.preferences.groups import PLACEHOLDER_PROMPTS
from probekit.results import JOINED
from probekit.stats import permuted_labels
from probekit.sweep.material import (
    Material,
    Selection,
    joined,
    joint_fingerprint,
    kept,
    material,
    open_cached,
    with_ties,
)
from probekit.sweep.plan import Record

logger = logging.getLogger(__name__)

RANDOM = ("init", "shuffled")
PROJECTIONS = 10
"""Draws of random directions for each number of them."""
SAME_STRENGTH = ("permuted", "half")
"""Kinds that are fitted at the strength, and with the factorisation, of the fit that they repeat."""


@dataclass(frozen=True)
class Altered:
    """The pairs that a record is fitted and judged on.

    Attributes
    ----------
    data
        Those pairs.
    places
        Place (n,) of each of them among the pairs of the selection, both in the order of `Material.parts`.
    """

    data: Material
    places: IntArray

    @property
    def train(self) -> IntArray:
        """Places of the training pairs."""
        return self.places[: len(self.data.train.label)]


def altered_records(records: Sequence[Record]) -> Iterator[Record]:
    """Refits and altered features that the heads of some records ask for.

    Raises
    ------
    ConfigError
        If a part of the training groups is too small for the folds in which a strength is chosen.
    """
    warn = _warn_once()
    for record in records:
        if not isinstance(record.head, LinearHead):
            continue
        controls = record.head.controls
        yield from of_the_same_strength(record)
        for share in sorted(set(controls.shares)):
            _check_groups(record, share, record.head.folds)
            yield replace(record, altered=f"share:{share:g}")
        if controls.sources:
            names = _sources(record.selection, record.data_digest, record.head.folds)
            yield from (replace(record, altered=f"source:{name}") for name in names)
        if controls.nested and record.combination == "single":
            _check_folds(record, controls.nested)
            yield from (
                replace(record, altered=f"nested:{controls.nested}", seed=fold) for fold in range(controls.nested)
            )
        width = _width(record) if controls.projected else 0
        for k in sorted(set(controls.projected)):
            if k < width:
                yield from (replace(record, altered=f"projected:{k}", seed=seed) for seed in range(PROJECTIONS))
            else:
                warn("%s: projected: %d is left out where there are %d channels", record.label, k, width)
    yield from _beside_random(records, warn)


def _warn_once() -> Callable[..., None]:
    """Warn of the same only once, however many layers and noise levels it holds for."""
    before: set[tuple[object, ...]] = set()

    def warn(*words: object) -> None:
        if words not in before:
            before.add(words)
            logger.warning(*words)

    return warn


def _beside_random(records: Sequence[Record], warn: Callable[..., None]) -> Iterator[Record]:
    """Trained layers beside those of random weights, where a store of the same backbone has the same pairs."""
    random: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        if record.control.partition(":")[0] in RANDOM and JOINED not in record.control:
            random.setdefault(_alike(record), []).append(record)
    for record in records:
        if record.control != "trained" or not isinstance(record.head, LinearHead):
            continue
        controls, single = record.head.controls, record.combination == "single"
        wanted = controls.conditional if single else controls.padded and record.combination == "concat"
        if not wanted:
            continue
        found = [other for other in random.get(_alike(record), []) if other.data_digest == record.data_digest]
        if not found:
            text = "%s: no random weights of this backbone with the same pairs are in the sweep to go beside"
            warn(text, record.label)
        for other in found:
            joint = replace(
                record,
                other=other.selection,
                fingerprint=joint_fingerprint([record.fingerprint, other.fingerprint]),
            )
            kinds = ["beside"] if single else [f"padded:{layer}" for layer in record.layers]
            yield from (replace(joint, altered=f"{kind}:{other.control}") for kind in kinds)


def _alike(record: Record) -> tuple[object, ...]:
    place = (record.sigmas, record.draw, record.poolings, record.layers, record.combination)
    return (record.backbone, record.trained_on, record.datasets, *place, record.head.name)


def _width(record: Record) -> int:
    store = open_cached(record.store)
    parts = [(sigma, pooling) for sigma in record.sigmas for pooling in record.poolings]
    layers = record.layers[:1] if record.combination == "mean" else record.layers
    return sum(
        store.width(layer=layer, sigma=sigma, pooling=pooling, draw=record.draw)
        for layer in layers
        for sigma, pooling in parts
    )


def sources(record: Record) -> list[tuple[Selection, int]]:
    """Whose layers a record reads, side by side: selection and layer of each."""
    own = [(record.selection, layer) for layer in record.layers]
    if record.other is None:
        return own
    random = [(record.other, layer) for layer in record.layers]
    if record.kind == "beside":
        return random + own
    trained = int(record.altered.split(":")[1])
    return [mine if mine[1] == trained else theirs for mine, theirs in zip(own, random, strict=True)]


def of_the_same_strength(record: Record) -> list[Record]:
    """Refits of a record that are fitted together, also where some are done: rounding depends on how many there are."""
    assert isinstance(record.head, LinearHead)
    counts = (record.head.controls.permuted or 0, record.head.controls.halves or 0)
    return [
        replace(record, altered=kind, seed=seed)
        for kind, count in zip(SAME_STRENGTH, counts, strict=True)
        for seed in range(count)
    ]


def altered(record: Record) -> Altered:
    """Say on which pairs a record is fitted and judged."""
    data = material(record.selection)
    everything = np.arange(len(data.rows))
    if record.kind == "permuted":
        label = _permuted(record.selection, data.digest, record.seed)
        return Altered(replace(data, train=replace(data.train, label=label)), everything)
    if record.kind in ("half", "share", "source"):
        groups = data.train.frame["group"].to_numpy()
        if record.kind == "source":
            inside = (data.train.frame["source"] == record.altered.partition(":")[2]).to_numpy()
        elif record.kind == "half":
            inside = _rank(groups, 1, record.seed) < len(np.unique(groups)) // 2
        else:
            inside = _rank(groups, 0) < _groups_of(groups, float(record.altered.partition(":")[2]))
        others = everything[len(inside) :]
        return Altered(replace(data, train=kept(data.train, inside)), np.concatenate([np.flatnonzero(inside), others]))
    if record.kind == "nested":
        return _outer_fold(data, record.selection.ties, int(record.altered.partition(":")[2]), record.seed)
    return Altered(data, everything)


def _outer_fold(data: Material, ties: Ties, folds: int, fold: int) -> Altered:
    pool = joined([data.train, data.validation])
    if "judged" in pool.frame:
        pool = replace(pool, label=pool.frame["judged"].fillna(pd.Series(pool.label)).to_numpy(np.float64))
    outside = _folds(pool.frame["group"].to_numpy(), folds) != fold
    fitted = outside & (pool.label != 0.5) if ties == "drop" else outside
    train = with_ties(kept(pool, fitted), ties)
    dataset = pool.frame["dataset"].to_numpy()
    tested = {name: ~outside & (dataset == name) for name in pool.frame.loc[~outside, "dataset"].unique()}
    tests = {name: replace(kept(pool, inside), excluded=pool.excluded.iloc[:0]) for name, inside in tested.items()}
    weight = None if data.validation_weight is None else train.frame["portion_weight"].to_numpy(np.float64)
    places = [np.flatnonzero(inside) for inside in (fitted, fitted, *tested.values())]
    within = replace(data, train=train, validation=replace(train), tests=tests, validation_weight=weight)
    return Altered(within, np.concatenate(places))


def _rank(groups: NDArray[np.object_], *seed: int) -> IntArray:
    """Place (n,) of the group of each pair in a random order of their names."""
    names, member = np.unique(groups, return_inverse=True)
    return np.random.default_rng(seed).permutation(len(names))[member]


def _groups_of(groups: NDArray[np.object_], share: float) -> int:
    return int(np.ceil(share * len(np.unique(groups))))


def _check_groups(record: Record, share: float, folds: int) -> None:
    groups = material(record.selection).train.frame["group"].to_numpy()
    held = _groups_of(groups, share)
    if held < folds:
        message = (
            f"head {record.head.name!r}: controls: shares: {share:g} of the training groups of {record.trained_on} are "
            f"{held}; allowed: as many as folds ({folds}), so {folds / len(np.unique(groups)):.2g} or more"
        )
        raise ConfigError(message)


def _check_folds(record: Record, folds: int) -> None:
    data = material(record.selection)
    groups = joined([data.train, data.validation]).frame["group"].nunique()
    least = max(folds, -(-record.head.folds * folds // (folds - 1))) if isinstance(record.head, LinearHead) else folds
    if groups < least:
        message = (
            f"head {record.head.name!r}: controls: nested: {folds} outer folds of {groups} groups of training and "
            f"validation pairs of {record.trained_on}; allowed: with {least} groups or more"
        )
        raise ConfigError(message)


@lru_cache(maxsize=64)
def _sources(selection: Selection, digest: str, folds: int) -> list[str]:
    """List the sources of training pairs that a head can be fitted on; `digest` is that of the pairs."""
    train = material(selection).train
    held = pd.DataFrame({"source": train.frame["source"], "group": train.frame["group"], "tied": train.label == 0.5})
    groups = held[~held["tied"]].groupby("source")["group"].nunique()
    every = sorted(held["source"].unique())
    if len(every) < 2:
        logger.warning("%s: its training pairs name one source, so there are no heads by source", selection.trained_on)
        return []
    few = [name for name in every if groups.get(name, 0) < folds]
    if few:
        text = "%s: no heads on %s alone: fewer groups of decided training pairs than folds (%d)"
        logger.warning(text, selection.trained_on, ", ".join(few), folds)
    return [name for name in every if name not in few]


@lru_cache(maxsize=64)
def _permuted(selection: Selection, digest: str, seed: int) -> NDArray[np.float64]:
    """Labels (n,) of the training pairs, drawn anew; an image under several prompts is one, placeholders aside.

    `digest` is that of the pairs: judgements may have changed since an earlier sweep.
    """
    train = material(selection).train
    digests = np.concatenate([open_cached(path).image_digests() for path in selection.stores])
    images = np.unique(digests.view(f"V{digests.shape[1]}")[:, 0], return_inverse=True)[1]
    prompts = train.frame["prompt_id"].to_numpy()
    sides = images[train.rows]
    seen = pd.DataFrame({"image": sides.ravel(), "prompt": np.repeat(prompts, 2)}).drop_duplicates()["image"]
    everywhere = np.isin(sides, seen.value_counts().loc[lambda times: times > PLACEHOLDER_PROMPTS].index)
    sides[everywhere] = images.max() + 1 + np.arange(everywhere.sum())
    first, second = sides.T
    return permuted_labels(train.label, first, second, prompts, seed=seed)
