"""What heads are fitted and judged on: pairs of one or several data sets of one backbone, joined to stored rows.

m = rows of all stores of a selection, one store after the other; n = pairs.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from probekit._types import FloatArray, IntArray
from probekit.config import Ties
from probekit.errors import StoreError
from probekit.preferences.groups import assign_groups, drop_connected, placeholder_images
from probekit.results import SPLITS
from probekit.store import FeatureStore, Pairs
from probekit.sweep.judging import prompt_ids

_DIGESTED = ("pair_id", "group", "split", "source", "weight", "model_a", "model_b", "ranking_id", "a_listed_first")


@dataclass(frozen=True)
class Portion:
    """The pairs of one split of one data set in one store, and what each of them weighs beside its own weight.

    `name` is what results call the data set; empty, it has the name that the store gives it.
    """

    store: Path
    dataset: str
    split: str
    weight: float = 1.0
    name: str = ""

    @property
    def title(self) -> str:
        """What results call the data set."""
        return self.name or self.dataset


@dataclass(frozen=True)
class Selection:
    """What the heads of one backbone are fitted on, chosen on and tested on.

    `judged` is a file of judgements that stands in place of those in the store.
    """

    train: tuple[Portion, ...]
    validation: tuple[Portion, ...]
    test: tuple[Portion, ...]
    ties: Ties
    judged: Path | None = None

    @property
    def stores(self) -> tuple[Path, ...]:
        """The stores, each once; their rows are counted one after the other."""
        return tuple(dict.fromkeys(portion.store for portion in (*self.train, *self.validation, *self.test)))

    @property
    def trained_on(self) -> str:
        """Name of what is fitted on: the data sets, with their weights where these are not 1."""
        names = [f"{portion.weight:g}*".removeprefix("1*") + portion.title for portion in self.train]
        return "+".join(dict.fromkeys(names))


@dataclass(frozen=True)
class Material:
    """The pairs of a selection.

    Attributes
    ----------
    train, validation
        Of all data sets together; ``rows`` are places among the rows of all stores, ``frame`` has a ``dataset``.
        Training labels follow the rule for ties. ``weight`` of a pair includes that of its portion.
    tests
        The same for each data set that is tested on, in the order of the selection.
    validation_weight
        Weight (n,) of validation pairs; None where all data sets weigh the same.
    train_ties
        Training pairs that are true ties, whether or not they are trained on.
    train_connected
        Training pairs left out since their group reaches into the validation or test pairs of another data set.
    """

    train: Pairs
    validation: Pairs
    tests: dict[str, Pairs]
    validation_weight: FloatArray | None
    train_ties: int
    train_connected: int

    @property
    def parts(self) -> tuple[Pairs, ...]:
        """Training pairs, validation pairs, and those of each test set."""
        return self.train, self.validation, *self.tests.values()

    @cached_property
    def rows(self) -> IntArray:
        """Places of the two rows (n, 2) of all pairs, in the order of `parts`."""
        return np.concatenate([pairs.rows for pairs in self.parts])

    def by_part(self, values: FloatArray) -> Callable[[Pairs], FloatArray]:
        """Tell for each of `parts` which of the values (n,) of all pairs are its own."""
        limits = np.cumsum([len(pairs.label) for pairs in self.parts])[:-1]
        return dict(zip(self.parts, np.split(values, limits), strict=True)).__getitem__

    @cached_property
    def digest(self) -> str:
        """Digest of the rows and of all judgements that fits see; it changes when rows or labels do."""
        digest = hashlib.sha256()
        for pairs in self.parts:
            held = pairs.frame[[column for column in _DIGESTED if column in pairs.frame]].fillna("")
            frame = held.assign(label=pairs.label, row_a=pairs.frame["row_a"], row_b=pairs.frame["row_b"])
            for table in (frame, pairs.excluded[["pair_id", "source", "reason"]]):
                digest.update(pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes())
        return digest.hexdigest()


def joint_fingerprint(fingerprints: Sequence[str]) -> str:
    """Name the stores of a selection together: the fingerprint of one, a digest of several."""
    several = "\n".join(sorted(fingerprints)).encode()
    return fingerprints[0] if len(fingerprints) == 1 else hashlib.sha256(several).hexdigest()


@lru_cache(maxsize=8)
def open_cached(path: Path) -> FeatureStore:
    """Open a store once per process."""
    return FeatureStore(path)


@lru_cache(maxsize=4)
def material(selection: Selection) -> Material:
    """Join the judgements of a selection to the rows of its stores, once per process.

    Where several data sets come together, a group of pairs counts as one over all of them: pairs connected by a prompt
    or an image (placeholders aside) to a later split of another data set are left out, as inside a single file; so are
    those that are themselves tested on.

    Raises
    ------
    StoreError
        If no training pair, no validation pair or no test pair of a data set is left, or all training pairs are tied.
    """
    places = np.cumsum([0, *(len(open_cached(path).rows) for path in selection.stores)])
    offsets = dict(zip(selection.stores, places.tolist(), strict=False))
    portions = {"train": selection.train, "validation": selection.validation, "test": selection.test}
    parts = [
        (role, portion, _shifted(_pairs(portion, selection.judged), offsets[portion.store], portion))
        for role in SPLITS
        for portion in portions[role]
    ]
    connected = 0
    mixed = len({(portion.store, portion.dataset) for _, portion, _ in parts}) > 1
    if mixed or any(role != portion.split for role, portion, _ in parts):
        parts, connected = _apart(parts, selection.stores)
    for role, portion, pairs in parts:
        if role == "test" and not len(pairs.label):
            message = f"{portion.store}: data set {portion.dataset!r} has no {portion.split} pairs with features"
            raise StoreError(message)
    by_role = {role: [pairs for part, _, pairs in parts if part == role] for role in SPLITS}
    train, validation = (joined(by_role[role]) for role in ("train", "validation"))
    for role, pairs in (("train", train), ("validation", validation)):
        if not len(pairs.label):
            message = (
                f"{selection.trained_on}: no {role} pairs are left; pairs whose group reaches into the validation or "
                "test pairs of another data set are left out"
            )
            raise StoreError(message)
    tied = train.label == 0.5
    if tied.all():
        message = f"{selection.trained_on}: all {len(tied)} training pairs are tied (label 0.5); nothing to fit on"
        raise StoreError(message)
    weights = {portion.weight for portion in selection.train}
    return Material(
        train=with_ties(train, selection.ties),
        validation=validation,
        tests=dict(zip((portion.title for portion in selection.test), by_role["test"], strict=True)),
        validation_weight=validation.frame["portion_weight"].to_numpy(np.float64) if len(weights) > 1 else None,
        train_ties=int(tied.sum()),
        train_connected=connected,
    )


@lru_cache(maxsize=4)
def _judged_pairs(path: Path, dataset: str, judged: Path | None) -> Pairs:
    store = open_cached(path)
    return store.pairs(judgements=dataset) if judged is None else store.bind(pd.read_parquet(judged)).pairs()


def forget() -> None:
    """Forget opened stores and pairs: judgements may have changed since an earlier sweep of this process."""
    for cached in (open_cached, _judged_pairs, material):
        cached.cache_clear()


def _pairs(portion: Portion, judged: Path | None) -> Pairs:
    pairs = _judged_pairs(portion.store, portion.dataset, judged)
    held = set(pairs.frame["split"])
    if not held:
        message = (
            f"{portion.store}: none of the {len(pairs.excluded):,} pairs of data set {portion.dataset!r} has features "
            "here; allowed: judgements of pictures and prompts that the store has rows of"
        )
        raise StoreError(message)
    if portion.split not in held:
        message = (
            f"{portion.store}: data set {portion.dataset!r} has no {portion.split} pairs with features, only "
            f"{', '.join(sorted(held))}; a sweep needs train, validation and test pairs"
        )
        raise StoreError(message)
    inside = (pairs.frame["split"] == portion.split).to_numpy()
    excluded = pairs.excluded[pairs.excluded["split"] == portion.split]
    return kept(replace(pairs, excluded=excluded), inside)


def _shifted(pairs: Pairs, offset: int, portion: Portion) -> Pairs:
    """Count rows from the first of all stores, and name what the pairs come from."""
    weight = pairs.frame["weight"] * portion.weight
    frame = pairs.frame.assign(dataset=portion.title, weight=weight, portion_weight=portion.weight)
    frame["prompt_id"] = prompt_ids(frame)
    return replace(pairs, rows=pairs.rows + offset, frame=frame)


def _apart(
    parts: list[tuple[str, Portion, Pairs]], stores: tuple[Path, ...]
) -> tuple[list[tuple[str, Portion, Pairs]], int]:
    """Leave out what is connected to a later split of another data set; training folds follow the joined groups."""
    digests = np.concatenate([open_cached(path).image_digests() for path in stores])
    images = np.array([digest.tobytes().hex() for digest in digests], object)
    joint = pd.concat(
        [
            pd.DataFrame(
                {
                    "prompt": pairs.frame["prompt"],
                    "path_a": images[pairs.rows[:, 0]],
                    "path_b": images[pairs.rows[:, 1]],
                    "group": f"{portion.store}\0{portion.dataset}\0" + pairs.frame["group"],
                    "role": role,
                    "part": number,
                }
            )
            for number, (role, portion, pairs) in enumerate(parts)
        ],
        ignore_index=True,
    )
    group = assign_groups(joint, placeholder_images(joint))
    keep = drop_connected(group, joint["role"])[0].notna().to_numpy()
    apart, connected = [], 0
    for number, (role, portion, pairs) in enumerate(parts):
        mine = (joint["part"] == number).to_numpy()
        lost = pairs.frame.loc[~keep[mine], ["pair_id", "source", "split"]].assign(reason="connected")
        if role != "test":  # the test pairs of a data set are grouped as in every other sweep of it
            pairs = replace(pairs, frame=pairs.frame.assign(group=group[mine].to_numpy()))
        if role == "train":
            connected += len(lost)
        if role == "validation":
            pairs = replace(pairs, excluded=pd.concat([pairs.excluded, lost], ignore_index=True))
        apart.append((role, portion, kept(pairs, keep[mine])))
    return apart, connected


def kept(pairs: Pairs, keep: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Pairs:
    """Keep some of n pairs."""
    frame = pairs.frame[keep].reset_index(drop=True)
    return replace(pairs, rows=pairs.rows[keep], label=pairs.label[keep], frame=frame)


def joined(parts: list[Pairs]) -> Pairs:
    """Put pairs of several data sets or splits behind each other."""
    if len(parts) == 1:
        return parts[0]
    return Pairs(
        rows=np.concatenate([pairs.rows for pairs in parts]),
        label=np.concatenate([pairs.label for pairs in parts]),
        frame=pd.concat([pairs.frame for pairs in parts], ignore_index=True),
        excluded=pd.concat([pairs.excluded for pairs in parts], ignore_index=True),
    )


def with_ties(train: Pairs, ties: Ties) -> Pairs:
    """Apply the rule for tied training pairs (see ``TIES_HELP``); the frame keeps labels that change, as ``judged``."""
    if ties == "drop":
        return kept(train, train.label != 0.5)
    if ties == "soft":
        return train
    return replace(train, label=(np.sign(train.label - 0.5) + 1) / 2, frame=train.frame.assign(judged=train.label))
