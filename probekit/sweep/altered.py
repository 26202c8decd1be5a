"""Refits of linear heads on altered training pairs: which there are, and on which pairs each is fitted and judged.

A record says in one field what is altered (`probekit.results.ALTERED`); ``seed`` counts the draws. Draws depend on the
names of groups alone, so that all layers, stores and heads see the same ones.

    permuted      the labels of the training pairs, as `probekit.stats.permuted_labels` draws them
    half          another half of the training groups for each seed
    share:0.2     that share of the training groups, part of every larger share

The first two keep the strength of the fit that they repeat: a permuted fit would choose the strongest penalty, which
memorises least, and with the strength of a half more than the pairs would change. So they share its factorisation. The
others are fits of their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from probekit._types import IntArray
from probekit.config import LinearHead
from probekit.errors import ConfigError
from probekit.stats import permuted_labels
from probekit.sweep.material import Material, Selection, kept, material, open_cached
from probekit.sweep.plan import Record

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
    """Refits that the heads of some records ask for.

    Raises
    ------
    ConfigError
        If a part of the training groups is too small for the folds in which a strength is chosen.
    """
    for record in records:
        if not isinstance(record.head, LinearHead):
            continue
        controls = record.head.controls
        yield from of_the_same_strength(record)
        for share in sorted(set(controls.shares)):
            _check_groups(record, share, record.head.folds)
            yield replace(record, altered=f"share:{share:g}")


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
        label = _permuted(record.selection, record.seed)
        return Altered(replace(data, train=replace(data.train, label=label)), everything)
    if record.kind in ("half", "share"):
        groups = data.train.frame["group"].to_numpy()
        if record.kind == "half":
            inside = _rank(groups, 1, record.seed) < len(np.unique(groups)) // 2
        else:
            inside = _rank(groups, 0) < _groups_of(groups, float(record.altered.partition(":")[2]))
        others = everything[len(inside) :]
        return Altered(replace(data, train=kept(data.train, inside)), np.concatenate([np.flatnonzero(inside), others]))
    return Altered(data, everything)


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


@lru_cache(maxsize=64)
def _permuted(selection: Selection, seed: int) -> NDArray[np.float64]:
    """Labels (n,) of the training pairs, drawn anew; an image under several prompts is one."""
    train = material(selection).train
    digests = np.concatenate([open_cached(path).image_digests() for path in selection.stores])
    images = np.unique(digests.view(f"V{digests.shape[1]}")[:, 0], return_inverse=True)[1]
    prompts = train.frame["prompt_id"].to_numpy()
    first, second = images[train.rows].T
    return permuted_labels(train.label, first, second, prompts, seed=seed)
