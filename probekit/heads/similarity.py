"""How alike the layers of a backbone are, and the contiguous blocks that they form.

Linear CKA of centred features X_i (m, d_i) and X_j (m, d_j) of the same rows:

    CKA = |X_i' X_j|^2 / (|X_i' X_i| |X_j' X_j|) = <K_i, K_j> / (|K_i| |K_j|),   K = X X' (m, m),

with Frobenius norms: 1 for the same features up to rotation, shift and scale. It reads high for unrelated features when
there are fewer rows than channels; give several times as many.

References
----------
S. Kornblith et al., "Similarity of neural network representations revisited", ICML 2019.
S. Arlot, A. Celisse, Z. Harchaoui, "A kernel multiple change-point algorithm via model selection", JMLR 20 (2019).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal

import numpy as np

from probekit._types import FloatArray
from probekit.errors import HeadError
from probekit.heads.base import BLOCK, checked_rows


def layer_similarity(
    features: Callable[[int], FloatArray], layers: Sequence[int], *, memory: int = 2**30
) -> FloatArray:
    """Linear CKA between all layers.

    Parameters
    ----------
    features
        Called with a layer number, gives its features (m, d_l), the same rows for each. If there are fewer rows than
        channels it is called once a layer, and L matrices (m, m) are kept.
    layers
        Layer numbers.
    memory
        Otherwise, bytes of centred float32 features kept at a time; with less than all layers take, the other layers
        are asked for once for every part that fits.

    Returns
    -------
    FloatArray
        (L, L) in [0, 1], symmetric, 1 on the diagonal.

    Raises
    ------
    HeadError
        If features are not (m, d), differ in their rows, hold NaN or infinity, or are the same in all rows.
    """
    first = _centred(features(layers[0]), layers[0], None)
    m, d = first.shape
    L = len(layers)
    products = np.empty((L, L))
    if m < d:
        kernels = [first @ first.T]
        kernels += [x @ x.T for x in (_centred(features(layer), layer, m) for layer in layers[1:])]
        for i, j in _upper(L):
            products[i, j] = products[j, i] = np.vdot(kernels[i], kernels[j])
    else:
        together = max(1, memory // first.nbytes)
        del first
        for start in range(0, L, together):
            part = range(start, min(start + together, L))
            held = {i: _centred(features(layers[i]), layers[i], m) for i in part}
            for j in range(start, L):
                other = held[j] if j in held else _centred(features(layers[j]), layers[j], m)
                for i in range(start, min(j + 1, part.stop)):
                    products[i, j] = products[j, i] = np.square(held[i].T @ other, dtype=np.float64).sum()
                del other  # before the next layer is read
    norms = np.sqrt(np.diag(products))
    cka: FloatArray = np.clip(products / np.outer(norms, norms), 0.0, 1.0)
    return cka


def _upper(L: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(L) for j in range(i, L)]


def _centred(X: FloatArray, layer: int, m: int | None) -> FloatArray:
    """Centred rows (m, d) float32 of mean square 1; means in float64, as channels may have large offsets."""
    X = checked_rows(X)
    if m is not None and len(X) != m:
        message = f"layer {layer} has {len(X)} rows, layers before it {m}; similarity needs the same rows of each"
        raise HeadError(message)
    mean, centred, squares = X.mean(axis=0, dtype=np.float64), np.empty(X.shape, np.float32), 0.0
    for start in range(0, len(X), BLOCK):  # X may be as large as memory allows
        rows = slice(start, start + BLOCK)
        centred[rows] = X[rows] - mean
        squares += float(np.square(centred[rows], dtype=np.float64).sum())
    size = np.sqrt(squares / X.size)
    if not (np.isfinite(size) and size > 0):
        wrong = "hold NaN or infinity" if not np.isfinite(size) else f"are the same in all {len(X)} rows"
        message = f"the features of layer {layer} {wrong}; similarity needs finite features that vary"
        raise HeadError(message)
    centred /= np.float32(size)
    return centred


def contiguous_blocks(similarity: FloatArray, n_blocks: int) -> list[tuple[int, int]]:
    """Cut layers into contiguous blocks that are alike within.

    The cut maximises the sum over blocks of (1 / layers in the block) * sum of the similarities of all its pairs, a
    layer with itself included: k-means with contiguous clusters where similarities are products of unit vectors, as CKA
    is. Exact, by dynamic programming; of several best cuts the one with the earliest limits is taken.

    Parameters
    ----------
    similarity
        (L, L), symmetric.
    n_blocks
        Number of blocks.

    Returns
    -------
    list of (int, int)
        First and last place of each block, both included.

    Raises
    ------
    HeadError
        If there are fewer layers than blocks, or no block is asked for.
    """
    L = len(similarity)
    if not 1 <= n_blocks <= L:
        message = f"{L} layers cannot form {n_blocks} blocks; allowed: 1 to {L}"
        raise HeadError(message)
    sums = np.zeros((L + 1, L + 1))
    sums[1:, 1:] = np.cumsum(np.cumsum(similarity, axis=0), axis=1)
    start, stop = np.ogrid[: L + 1, : L + 1]
    within = sums[stop, stop] - sums[start, stop] - sums[stop, start] + sums[start, start]
    # gain[start, stop] of a block of the layers start to stop - 1
    gain = np.where(start < stop, within / np.maximum(stop - start, 1), -np.inf)
    best = gain[0]
    cuts = []
    for _ in range(n_blocks - 1):
        total = np.round(best[:, None] + gain, 12)  # equal cuts stay equal in spite of rounding
        cuts.append(np.argmax(total, axis=0))
        best = np.max(total, axis=0)
    limits = [L]
    for cut in reversed(cuts):
        limits.append(int(cut[limits[-1]]))
    limits.append(0)
    return [(first, after - 1) for after, first in pairwise(limits)][::-1]


def find_blocks(
    features: Callable[[int], FloatArray], layers: Sequence[int], n_blocks: int, *, memory: int = 2**30
) -> list[tuple[int, ...]]:
    """Layer numbers of the contiguous blocks of a backbone: `layer_similarity`, then `contiguous_blocks`.

    Parameters and errors are theirs; ``layers`` are ordered first.
    """
    layers = sorted(layers)
    ranges = contiguous_blocks(layer_similarity(features, layers, memory=memory), n_blocks)
    return [tuple(layers[first : last + 1]) for first, last in ranges]


def block_ranges(blocks: Sequence[Sequence[int]]) -> str:
    """Blocks as text, such as ``0-6, 7-15, 16``."""
    return ", ".join(f"{block[0]}-{block[-1]}" if len(block) > 1 else str(block[0]) for block in blocks)


PairKind = Literal["within", "across"]


@dataclass(frozen=True)
class PairKindSummary:
    """Values of the pairs of layers of one kind: how many, their mean and the largest."""

    n_pairs: int
    mean: float
    best: float


def pair_kinds(blocks: Sequence[Sequence[int]]) -> dict[tuple[int, int], PairKind]:
    """Tell for every pair of layers (smaller number first) whether both lie within one block or in two."""
    block_of = {layer: number for number, block in enumerate(blocks) for layer in block}
    return {(a, b): "within" if block_of[a] == block_of[b] else "across" for a, b in combinations(sorted(block_of), 2)}


def compare_pair_kinds(
    values: Mapping[tuple[int, ...], float], blocks: Sequence[Sequence[int]]
) -> dict[PairKind, PairKindSummary]:
    """Compare pairs of layers within one block with pairs across two, as DiT-Reward does.

    Parameters
    ----------
    values
        Accuracy, or another value, by pair of layers (smaller number first); keys that are no pair of layers of the
        blocks are not looked at.
    blocks
        Layer numbers of each block.

    Returns
    -------
    dict
        For ``within`` and ``across``; a kind without values is left out. Pairs share layers, so these are no
        independent values: an interval needs the margins of the pairs.
    """
    found: dict[PairKind, PairKindSummary] = {}
    kinds = pair_kinds(blocks)
    names: tuple[PairKind, ...] = ("within", "across")
    for kind in names:
        those = [value for pair, value in values.items() if len(pair) == 2 and kinds.get((pair[0], pair[1])) == kind]
        if those:
            found[kind] = PairKindSummary(len(those), float(np.mean(those)), max(those))
    return found
