"""Images that look the same under other bytes: perceptual hashes that differ in few bits, found without all pairs.

Two hashes of 64 bits that differ in at most 4 agree in at least one of 5 bands of 12 or 13 bits: only hashes that
share a band are compared.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit._types import IntArray

NEAR_BITS = 4
"""Largest number of differing bits of 64 at which two pictures count as near duplicates (imagehash's ``phash``): the
same picture saved again as JPEG, or scaled, differs in 0 to 4 bits, unrelated photographs in about 32."""

_CANDIDATES = 2**22  # comparisons at a time; 32 MB each for places and for bits


def near_hashes(left: NDArray[np.uint64], right: NDArray[np.uint64], *, bits: int = NEAR_BITS) -> IntArray:
    """Find the hashes on the left and on the right that differ in at most so many bits.

    Parameters
    ----------
    left, right
        Distinct hashes, (p,) and (q,).
    bits
        Largest number of differing bits.

    Returns
    -------
    array
        Places (left, right) of each two such hashes, each two once, in order, (k, 2).
    """
    edges = np.linspace(0, 64, bits + 2).round().astype(np.uint64)
    found = [np.empty(0, np.int64)]
    for low, high in pairwise(edges):
        mask = np.uint64((1 << int(high - low)) - 1)
        keys, wanted = (right >> low) & mask, (left >> low) & mask
        order = np.argsort(keys, kind="stable")
        start = np.searchsorted(keys[order], wanted, side="left")
        count = np.searchsorted(keys[order], wanted, side="right") - start
        for part in _parts(count):
            # The candidates of each left hash lie side by side in the order of the band.
            own = np.repeat(part, count[part])
            within = np.arange(len(own)) - np.repeat(np.cumsum(count[part]) - count[part], count[part])
            other = order[np.repeat(start[part], count[part]) + within]
            near = np.bitwise_count(left[own] ^ right[other]) <= bits
            found.append(own[near] * np.int64(len(right)) + other[near])
    pairs = np.unique(np.concatenate(found))
    return np.stack(np.divmod(pairs, max(1, len(right))), axis=1)


def _parts(count: IntArray) -> Iterator[IntArray]:
    """Cut places into runs of at most so many candidates, or of one place."""
    ends = np.cumsum(count)
    start = 0
    while start < len(count):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _CANDIDATES, side="right")))
        yield np.arange(start, stop)
        start = stop


def near_duplicates(left: pd.DataFrame, right: pd.DataFrame) -> tuple[set[str], set[str], list[tuple[str, str]]]:
    """Find the images on each side that look like an image of other bytes on the other side.

    Parameters
    ----------
    left, right
        Images (columns of `probekit.preferences.pictures.look_at`, indexed by path); those without a perceptual hash
        are not compared.

    Returns
    -------
    left, right
        Paths of such images.
    examples
        The first ten (left path, right path).
    """
    left, right = (side[side["hashed"]] for side in (left, right))
    # One line a hash: how many contents have it, and one of them.
    contents = [side.groupby("phash")["digest"].agg(["nunique", "first"]) for side in (left, right)]
    hashes = [content.index.to_numpy(np.uint64) for content in contents]
    pairs = near_hashes(*hashes)
    # Equal hashes are near only where the bytes differ: equal bytes are found by their SHA-256.
    ours, theirs = (content.iloc[pairs[:, i]].reset_index(drop=True) for i, content in enumerate(contents))
    pairs = pairs[~((ours["nunique"] == 1) & (theirs["nunique"] == 1) & (ours["first"] == theirs["first"]))]
    found = []
    for own, side in ((0, left), (1, right)):
        matches = pd.DataFrame({"own": hashes[own][pairs[:, own]], "other": hashes[1 - own][pairs[:, 1 - own]]})
        further = set(matches["own"][matches["own"] != matches["other"]])
        same = contents[1 - own].reindex(side["phash"].to_numpy())
        differs = (same["nunique"] > 1).to_numpy() | (
            same["first"].notna().to_numpy() & (same["first"].to_numpy() != side["digest"].to_numpy())
        )
        found.append(set(side.index[side["phash"].isin(further) | differs]))
    return found[0], found[1], list(_examples(left, right, [hashes[i][pairs[:, i]] for i in (0, 1)]))


def _examples(left: pd.DataFrame, right: pd.DataFrame, near: list[NDArray[np.uint64]]) -> Iterator[tuple[str, str]]:
    shown = 0
    for own, other in zip(*near, strict=True):
        ours, theirs = left[left["phash"] == own], right[right["phash"] == other]
        for path, digest in ours["digest"].items():
            differing = theirs.index[theirs["digest"] != digest]
            if len(differing):
                yield str(path), str(differing[0])
                shown += 1
            if shown == 10:
                return
