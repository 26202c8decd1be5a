"""Slices of the pairs of a split, by the kinds that the file names and by what else tells pairs apart.

Every pair is in exactly one slice of each kind of slicing; n = pairs of the split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit._types import FloatArray, IntArray
from probekit.results import ALL_SOURCES
from probekit.stats import Expectations
from probekit.store import Pairs
from probekit.sweep.judging import Asked, asked_of, kept_with_pairs, knowing_nothing

MOST_GENERATORS, FEWEST_PAIRS = 10, 50
SAME, DIFFERENT, UNKNOWN, OTHER = "same", "different", "unknown", "other"
_SHARES = {"under 60 %": 0.6, "60 to 75 %": 0.75, "75 to 90 %": 0.9, "90 % and more": np.inf}  # of the preferred side
_IMAGES = {"2": 3, "3": 4, "4": 5, "5 to 9": 10, "10 and more": np.inf}

NO_VOTES = "no votes"
Detail = Literal["whole", "sources", "slices"]


@dataclass(frozen=True)
class Slice:
    """Some pairs of a split, with all that a row says of them whoever judges them; m = pairs of the slice.

    Attributes
    ----------
    slicing, source
        Kind of slicing and its value.
    inside
        (n,) which pairs these are.
    asked, labels, groups, sources
        (m,) each; groups and sources are numbers, in the order of their names.
    left_out
        Pairs that belong here and have no features.
    nothing
        What scorers that know nothing get here.
    """

    slicing: str
    source: str
    inside: NDArray[np.bool_]
    asked: Asked
    labels: FloatArray
    groups: IntArray
    sources: IntArray
    left_out: int
    nothing: Expectations


@kept_with_pairs
def slices_of(pairs: Pairs, protocol: str, *, detail: Detail) -> list[Slice]:
    """Give the whole, kinds of the file unless only the whole is asked for, and further slices if they are."""
    sources, excluded = pairs.frame["source"].to_numpy(), pairs.excluded["source"].to_numpy()
    told = [("all", ALL_SOURCES, np.ones(len(sources), dtype=bool), len(excluded))]
    kinds = sorted({*sources, *excluded})
    if detail != "whole" and len(kinds) > 1:
        told += [("source", kind, sources == kind, int((excluded == kind).sum())) for kind in kinds]
    if detail == "slices":
        told += [(*further, 0) for further in further_slices(pairs)]
    asked = asked_of(pairs)
    group, source = (pd.factorize(pairs.frame[name], sort=True)[0] for name in ("group", "source"))
    found = []
    for slicing, value, inside, left_out in told:
        here, labels = asked[inside], pairs.label[inside]
        nothing = knowing_nothing(protocol, labels, here)
        found.append(Slice(slicing, value, inside, here, labels, group[inside], source[inside], left_out, nothing))
    return found


def further_slices(pairs: Pairs) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """Slicing, value and pairs (n,) of every slice beside the kinds of the file.

    Slicings in which all pairs are alike are left out.

    Parameters
    ----------
    pairs
        Test pairs. Slicings whose columns the judgements lack are left out.
    """
    frame = pairs.frame
    found: dict[str, pd.Series[Any] | NDArray[Any]] = {}
    if {"model_a", "model_b"} <= set(frame) and (
        (frame["model_a"].fillna("") + frame["model_b"].fillna("")) != ""
    ).any():
        found |= _by_generator(frame)
    votes = frame["n_votes"] if "n_votes" in frame else pd.Series(pd.NA, frame.index)
    found["vote_share"] = _by_vote_share(pairs.label, votes.isna().to_numpy())
    found["images"] = _by_images(frame)
    for slicing, value in found.items():
        names = np.asarray(value, dtype=object)
        kinds = pd.unique(names)
        order = {
            name: place for place, name in enumerate([*_SHARES, *_IMAGES])
        }  # those that have an order of their own
        for name in sorted(kinds, key=lambda name: (order.get(name, -1), name)) if len(kinds) > 1 else []:
            yield slicing, str(name), names == name


def _by_generator(frame: pd.DataFrame) -> dict[str, Any]:
    """Slices by the two generators and by whether they are one; rare combinations are taken together."""
    a, b = (frame[side].fillna("").to_numpy(object) for side in ("model_a", "model_b"))
    known = (a != "") & (b != "")
    both = pd.Series([" / ".join(sorted([str(x), str(y)])) for x, y in zip(a, b, strict=True)]).where(known, UNKNOWN)
    counts = both[known].value_counts()
    counts = counts[counts >= FEWEST_PAIRS].sort_index().sort_values(ascending=False, kind="stable")
    named = both.where(both.isin(counts.index[:MOST_GENERATORS]) | ~known, OTHER)
    return {"generators": named, "same_generator": np.where(known, np.where(a == b, SAME, DIFFERENT), UNKNOWN)}


def _by_vote_share(label: NDArray[np.float64], uncounted: NDArray[np.bool_]) -> NDArray[Any]:
    """Slices by the share of votes of the preferred side, ties and pairs without a share or number of votes apart."""
    share = np.maximum(label, 1 - label)
    if set(np.unique(share)) <= {0.5, 1.0}:  # winners alone
        return np.full(len(label), "", dtype=object)
    names = np.array(list(_SHARES), object)[np.searchsorted(list(_SHARES.values()), share, side="right")]
    return np.select([share == 0.5, uncounted & (share == 1)], ["tie", NO_VOTES], names)


def _by_images(frame: pd.DataFrame) -> NDArray[Any]:
    """Slices by how many images were compared with each other: those of the ranking, or of the prompt."""
    ranking = frame["ranking_id"].fillna("") if "ranking_id" in frame else ""
    unit = pd.DataFrame({"prompt": frame["prompt"], "ranking": ranking}, index=frame.index)
    number = unit.groupby(["prompt", "ranking"], sort=False).ngroup()
    sides = [pd.DataFrame({"unit": number, "row": frame[side]}) for side in ("row_a", "row_b")]
    images = pd.concat(sides).drop_duplicates()["unit"].value_counts()
    place = np.searchsorted(list(_IMAGES.values()), number.map(images), side="right")
    return np.array(list(_IMAGES), object)[place]
