"""Would a head that knows nothing do as well? Judgements are drawn anew as if they had nothing to do with the margins.

Pairs of a prompt often come from a ranking: k images give k (k - 1) / 2 pairs whose labels hang together. Flipping each
of them independently would make far too little of chance: it rejects a true null hypothesis in 12-23 % of samples
instead of 5. What is exchangeable under the null hypothesis are the *images* of a prompt:

- pairs of one prompt that hold each two of their images exactly once, and share no image with other prompts, are a
  ranking: images trade ranks at random, and the labels of all its pairs follow (ties and shares of votes move along);
- a lone pair is a ranking of two: a fair flip of its sign;
- pairs that share images in any other way (some pairs of a ranking are missing, an image stands under several prompts)
  flip all together or not at all: the reverse of a ranking is as likely as the ranking.

The margins stay as they are, no head is fitted again: B draws give p = (1 + #{draws at least as accurate}) / (B + 1),
one-sided. Heads (layers) share the draws, so that the largest accuracy over them has a p as well.

Sources: E. Pitman, "Significance tests which may be applied to samples from any populations", JRSS Supplement 4 (1937);
B. Phipson and G. Smyth, "Permutation p-values should never be zero", Statistical Applications in Genetics and Molecular
Biology 9 (2010); P. Westfall and S. Young, Resampling-Based Multiple Testing (1993).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from probekit._types import FloatArray, IntArray

_CELLS = 1_000_000
"""Labels (draws x pairs) worked on at once."""


@dataclass(frozen=True)
class PermutationTest:
    """Accuracies against judgements that have nothing to do with the margins.

    Attributes
    ----------
    accuracy
        (L,) strict accuracies: pairs with label 0.5 are not scored, margins of zero are wrong.
    p
        (L,) one-sided p of each head alone.
    adjusted
        (L,) p of each head where the best of all L was looked for.
    lone, rankings, joint
        Number of lone pairs, of rankings of three images or more, and of components that flip as one.
    n_pairs
        Scored pairs.
    n_draws
        Draws; no p is below 1 / (n_draws + 1).
    """

    accuracy: FloatArray
    p: FloatArray
    adjusted: FloatArray
    lone: int
    rankings: int
    joint: int
    n_pairs: int
    n_draws: int


def permutation_test(
    margins_by_layer: FloatArray,
    labels: FloatArray,
    images_a: NDArray[Any],
    images_b: NDArray[Any],
    prompts: NDArray[Any],
    *,
    by_prompt: bool = False,
    n_draws: int = 2000,
    seed: int = 0,
) -> PermutationTest:
    """Test whether heads are more accurate than they would be by chance.

    Parameters
    ----------
    margins_by_layer
        (L, n) score of the first minus score of the second image.
    labels
        (n,) probability that the first is preferred.
    images_a, images_b
        (n,) first and second image of each pair, as ids of one kind.
    prompts
        (n,) prompt of each pair.
    by_prompt
        Whether prompts weigh alike, instead of pairs.
    n_draws, seed
        Draws, and their seed.

    Raises
    ------
    ValueError
        If lengths differ, a margin is not finite, a label lies outside 0 to 1, a pair holds one image twice, or no pair
        is scored.
    """
    margins = np.asarray(margins_by_layer, dtype=np.float64)
    labels = np.asarray(labels, dtype=np.float64)
    images_a, images_b, prompts = np.asarray(images_a), np.asarray(images_b), np.asarray(prompts)
    _check(margins, labels, images_a, images_b, prompts)
    wanted = np.sign(labels - 0.5)
    scored = wanted != 0
    prompt = np.unique(prompts, return_inverse=True)[1]
    # Draws move ties within a prompt's ranking: its number of scored pairs, and so the weight of each, stays.
    per_prompt = np.maximum(np.bincount(prompt, scored), 1)[prompt]
    weight = 1 / per_prompt if by_prompt else np.ones(len(labels))
    total = weight[scored].sum()
    # right = (1 + sign of margin x sign of preference) / 2 where both are not zero, else 0
    said = np.sign(margins).T * weight[:, None]
    both, one_side = np.hstack([said, np.abs(said)]), np.abs(wanted)
    pool = _Pool(images_a, images_b, prompts, wanted)
    untied = bool(scored.all())

    def accuracy(signs: FloatArray) -> FloatArray:
        agreeing = signs @ both[:, : len(margins)]
        decided = one_side @ both[:, len(margins) :] if untied else np.abs(signs) @ both[:, len(margins) :]
        return np.asarray((agreeing + decided) / (2 * total))

    observed = accuracy(wanted[None])[0]
    drawn = np.concatenate([accuracy(signs) for signs in pool.draws(n_draws, seed)])
    # Chance levels differ between heads only by predicted ties; sums of weights may differ in rounding.
    reached = observed - 1e-12
    return PermutationTest(
        observed,
        (1 + (drawn >= reached).sum(axis=0)) / (n_draws + 1),
        (1 + (drawn.max(axis=1)[:, None] >= reached).sum(axis=0)) / (n_draws + 1),
        pool.lone,
        pool.rankings,
        pool.joint,
        int(scored.sum()),
        n_draws,
    )


def permuted_labels(
    labels: FloatArray, images_a: NDArray[Any], images_b: NDArray[Any], prompts: NDArray[Any], *, seed: int
) -> NDArray[np.float64]:
    """Draw labels (n,) anew as if they had nothing to do with the pictures: to fit on, where a test asks margins.

    Ranks move within a prompt, and ties and shares of votes with them; parameters as in `permutation_test`.
    """
    wanted = np.asarray(labels, dtype=np.float64) - 0.5
    pool = _Pool(np.asarray(images_a), np.asarray(images_b), np.asarray(prompts), wanted)
    return np.asarray(next(pool.draws(1, seed))[0] + 0.5)


class _Pool:
    """Pairs sorted by how their labels may be drawn anew."""

    def __init__(
        self, images_a: NDArray[Any], images_b: NDArray[Any], prompts: NDArray[Any], wanted: FloatArray
    ) -> None:
        names, ends = np.unique(np.concatenate([images_a, images_b]), return_inverse=True)
        first, second = ends[: len(wanted)], ends[len(wanted) :]
        graph = coo_array((np.ones(len(wanted)), (first, second)), shape=(len(names), len(names)))
        component = connected_components(graph, directed=False)[1]
        block = component[first]
        n_images = np.bincount(component)
        n_pairs = np.bincount(block, minlength=len(n_images))
        low, high = np.minimum(first, second), np.maximum(first, second)
        distinct = np.bincount(component[np.unique(low.astype(np.int64) * len(names) + high) // len(names)])
        prompt = np.unique(prompts, return_inverse=True)[1]
        alone = np.full(len(n_images), -1)
        alone[block] = prompt
        mixed = np.zeros(len(n_images), dtype=bool)
        mixed[block[alone[block] != prompt]] = True
        whole = n_images * (n_images - 1) // 2
        complete = ~mixed & (n_pairs == whole) & (distinct == whole)
        self.lone = int((complete & (n_images == 2)).sum())
        self.rankings = int((complete & (n_images > 2)).sum())
        self.joint = int((~complete).sum())
        self._wanted = wanted
        flips = ~complete | (n_images == 2)
        self._flipping = np.flatnonzero(flips[block])
        self._flip_of = np.unique(block[self._flipping], return_inverse=True)[1]
        # place of an image in its component
        order = np.argsort(component, kind="stable")
        place = np.empty(len(names), dtype=np.int64)
        place[order] = np.arange(len(names)) - np.repeat(np.cumsum(n_images) - n_images, n_images)
        # rankings of k images: their pairs (C, k(k-1)/2), the two places (same shape), signs as a matrix (C, k, k)
        self._ranked: list[tuple[IntArray, IntArray, IntArray, FloatArray]] = []
        for k in np.unique(n_images[complete & (n_images > 2)]):
            members = np.flatnonzero((complete & (n_images == k))[block])
            pairs = members[np.argsort(block[members], kind="stable")].reshape(-1, k * (k - 1) // 2)
            i, j = place[first[pairs]], place[second[pairs]]
            signs = np.zeros((len(pairs), k, k))
            row = np.arange(len(pairs))[:, None]
            signs[row, i, j], signs[row, j, i] = wanted[pairs], -wanted[pairs]
            self._ranked.append((pairs, i, j, signs))

    def draws(self, n_draws: int, seed: int) -> Iterator[FloatArray]:
        """Yield signs of preferences (B, n) in chunks of bounded size."""
        rng = np.random.default_rng(seed)
        n_flips = int(self._flip_of.max()) + 1 if len(self._flip_of) else 0
        rows = max(1, _CELLS // len(self._wanted))
        for start in range(0, n_draws, rows):
            b = min(rows, n_draws - start)
            signs = np.empty((b, len(self._wanted)))
            flips = rng.integers(2, size=(b, n_flips)) * 2.0 - 1
            signs[:, self._flipping] = flips[:, self._flip_of] * self._wanted[self._flipping]
            for pairs, i, j, matrix in self._ranked:
                c, k = matrix.shape[:2]
                trade = rng.random((b, c, k)).argsort(axis=2)
                row = np.arange(c)[:, None]
                signs[:, pairs] = matrix[row, trade[:, row, i], trade[:, row, j]]
            yield signs


def _check(
    margins: FloatArray,
    labels: FloatArray,
    images_a: NDArray[Any],
    images_b: NDArray[Any],
    prompts: NDArray[Any],
) -> None:
    shapes = [array.shape for array in (labels, images_a, images_b, prompts)]
    if margins.ndim != 2 or any(shape != margins.shape[1:] for shape in shapes):
        message = (
            f"margins have shape {margins.shape}, labels {shapes[0]}, images {shapes[1]} and {shapes[2]}, prompts "
            f"{shapes[3]}; allowed: (layers, pairs) and (pairs,)"
        )
        raise ValueError(message)
    if not np.isfinite(margins).all():
        pair = int(np.argmin(np.isfinite(margins).all(axis=0)))
        message = f"margin of pair {pair} is not finite; a head must score every pair"
        raise ValueError(message)
    valid = (labels >= 0) & (labels <= 1)
    if not valid.all():
        message = f"label of pair {int(np.argmin(valid))} is {labels[~valid][0]}; it must lie in 0 to 1"
        raise ValueError(message)
    if (images_a == images_b).any():
        message = f"pair {int(np.argmax(images_a == images_b))} holds one image twice"
        raise ValueError(message)
    if not (labels != 0.5).any():
        message = f"none of the {len(labels)} pairs is scored; a test needs at least one untied pair"
        raise ValueError(message)
