"""Differences of rows, added up from pieces of shards.

n = pairs, d = channels of a feature vector.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probekit.store.half import convert
from probekit.store.shards import Shard

_PIECE_BYTES = 2**21  # rows of a shard, as float32, that are looked at together


class Uses:
    """Which pairs have which row on one side.

    Parameters
    ----------
    rows
        Position (n,) of each pair's row on that side.
    """

    def __init__(self, rows: NDArray[np.integer[Any]]) -> None:
        self._pairs = np.argsort(rows, kind="stable")
        self._rows = rows[self._pairs]

    def apply(
        self,
        combine: Callable[..., Any],
        held: NDArray[np.int64],
        values: NDArray[np.float32],
        out: NDArray[np.float32],
    ) -> None:
        """Set ``out[i] = combine(out[i], values[k])`` for every pair i whose row is ``held[k]``.

        Parameters
        ----------
        combine
            A ufunc of two arguments.
        held
            Positions (k,) of rows, each at most once.
        values
            Their features (k, d).
        out
            One vector a pair (n, d).
        """
        begin, end = (np.searchsorted(self._rows, held, side=side) for side in ("left", "right"))
        counts = end - begin
        which = np.repeat(np.arange(len(held)), counts)
        # 0, 1, ... within the pairs of each row, counted on from where they begin
        within = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        pairs = self._pairs[np.repeat(begin, counts) + within]
        for start in range(0, len(pairs), len(held)):  # a row of many pairs is not copied for all of them at once
            some, taken = pairs[start : start + len(held)], which[start : start + len(held)]
            out[some] = combine(out[some], values[taken])


def row_pieces(shard: Shard, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (first row, features (k, d)) of a feature dataset; the buffer is used again for the next piece."""
    record = shard.sidecar.datasets[name]
    width = record.shape[1]
    size = np.dtype(record.dtype).itemsize * width
    values = np.empty((min(record.shape[0], max(1, _PIECE_BYTES // (4 * width))), width), np.float32)
    for start, part in shard.chunks(name, size=len(values) * size):
        rows = values[: len(part) // size]
        into = rows.reshape(-1)
        if record.dtype == "<f2":
            convert(part.view("<f2"), into)
        else:
            into[:] = part.view("<f4")
        yield start // size, rows
