"""Differences that stay in files, for fits that do not fit into memory.

One thread reads into three buffers of 16 MiB, which are used again and again, while the caller works on what was read
before. Files are read, not mapped: pages of a mapping would count as memory of the process. A pass over more data than
the machine can cache costs what the disk takes, so callers do as much as they can in one.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from probekit._types import FloatArray
from probekit.errors import HeadError

BLOCK_BYTES = 2**24
"""Bytes of a block, of which three are in memory; one row where that is longer."""
_SCRATCH_BYTES = 2**18  # read at a time, and copied or checked while it is in the cache
_FLOAT = np.dtype("<f4")

Where = TypeVar("Where")


@dataclass(frozen=True)
class StreamedDifferences:
    """Differences D (n, d) that lie side by side in files, d = sum of widths.

    The heads' ``fit_differences`` takes them in place of an array; files are opened and checked there.

    Attributes
    ----------
    files
        Each holds nothing but (n, width) little-endian float32 in C order: for a layer, first minus second.
    widths
        Channels in each file.
    n
        Pairs.

    Raises
    ------
    HeadError
        If there is no file, or not one positive width for each. While they are read: if a file is missing, cannot be
        read, or has another size, or a value is NaN or infinite.
    """

    files: Sequence[Path]
    widths: Sequence[int]
    n: int

    def __post_init__(self) -> None:
        if not self.files or len(self.files) != len(self.widths) or min(self.widths) < 1:
            message = f"{len(self.files)} files have widths {list(self.widths)}; give one positive width for each file"
            raise HeadError(message)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d), as of an array."""
        return self.n, sum(self.widths)

    def blocks(self, *, check: bool = False) -> Iterator[tuple[slice, FloatArray]]:
        """Yield all rows in order, as slices of pairs and (rows, d) float32; with ``check`` they must be finite.

        A block is overwritten when the next one is asked for.
        """
        n, d = self.shape
        rows = min(n, max(1, BLOCK_BYTES // (_FLOAT.itemsize * d)))

        with self._opened() as opened:
            scratch = np.empty(max(_SCRATCH_BYTES // _FLOAT.itemsize, max(self.widths)), _FLOAT)

            def read(part: slice, buffer: FloatArray) -> FloatArray:
                block = buffer[: (part.stop - part.start) * d].reshape(-1, d)
                first = 0
                for file, path, width in zip(opened, self.files, self.widths, strict=True):
                    together = len(scratch) // width
                    for start in range(0, len(block), together):
                        target = block[start : start + together, first : first + width]
                        whole = target if width == d else scratch[: target.size].reshape(target.shape)
                        _read_into(whole, file, path, (part.start + start) * width)
                        if check:
                            _check_finite(whole, path, part.start + start)
                        if whole is not target:
                            target[:] = whole
                    first += width
                return block

            starts = range(0, n, rows)
            yield from _ahead(read, [slice(start, min(start + rows, n)) for start in starts], rows * d)

    def column_parts(self) -> Iterator[tuple[slice, FloatArray]]:
        """Yield all channels in order, as slices of channels and (n, channels) float32, which are overwritten."""
        together = max(1, BLOCK_BYTES // (_FLOAT.itemsize * self.n))
        with self._opened() as opened:

            def read(part: tuple[int, int, slice], buffer: FloatArray) -> FloatArray:
                number, start, columns = part
                width, file, path = self.widths[number], opened[number], self.files[number]
                block = buffer[: self.n * (columns.stop - columns.start)].reshape(self.n, -1)
                if block.shape[1] == width:
                    _read_into(block, file, path, 0)
                else:
                    for row, target in enumerate(block):
                        _read_into(target, file, path, row * width + start)
                return block

            parts, first = [], 0
            for number, width in enumerate(self.widths):
                for start in range(0, width, together):
                    stop = min(start + together, width)
                    parts.append((number, start, slice(first + start, first + stop)))
                first += width
            for (_, _, columns), block in _ahead(read, parts, self.n * min(together, max(self.widths))):
                yield columns, block

    @contextmanager
    def _opened(self) -> Iterator[list[int]]:
        """Open all files, whose sizes must be right."""
        with ExitStack() as stack:
            opened = []
            for path, width in zip(self.files, self.widths, strict=True):
                try:
                    file = os.open(path, os.O_RDONLY)
                except OSError as error:
                    message = f"{path} cannot be read ({error.strerror}); differences of {self.n} pairs should be there"
                    raise HeadError(message) from error
                stack.callback(os.close, file)
                size, expected = os.fstat(file).st_size, self.n * width * _FLOAT.itemsize
                if size != expected:
                    message = f"{path} has {size} bytes; ({self.n}, {width}) float32 take {expected}"
                    raise HeadError(message)
                if sys.platform == "linux":
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                opened.append(file)
            yield opened


def _ahead(
    read: Callable[[Where, FloatArray], FloatArray], parts: Iterable[Where], size: int
) -> Iterator[tuple[Where, FloatArray]]:
    """Yield (part, ``read(part, buffer)``) in order, while one thread reads the next two."""
    buffers: list[NDArray[np.float32]] = [np.empty(size, _FLOAT) for _ in range(3)]
    with ThreadPoolExecutor(1, thread_name_prefix="probekit-stream") as thread:
        jobs = ((part, thread.submit(read, part, buffers[i % 3])) for i, part in enumerate(parts))
        waiting = deque(islice(jobs, 2))
        while waiting:
            part, job = waiting.popleft()
            block = job.result()
            waiting.extend(islice(jobs, 1))  # into the buffer of the block before, which the caller has done with
            yield part, block


def _read_into(target: FloatArray, file: int, path: Path, place: int) -> None:
    """Fill a contiguous target with the values from ``place`` on."""
    left, offset = target.data.cast("B"), place * _FLOAT.itemsize
    while left:
        try:
            count = os.preadv(file, [left], offset)
        except OSError as error:
            message = f"{path} cannot be read ({error.strerror}) at byte {offset}"
            raise HeadError(message) from error
        if not count:
            message = f"{path} ended at byte {offset} while it was read; it must not change during a fit"
            raise HeadError(message)
        left, offset = left[count:], offset + count


def _check_finite(rows: FloatArray, path: Path, first: int) -> None:
    if np.isfinite(np.vdot(rows, rows)):  # five times as fast, and misleads only by overflow
        return
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        row = first + int(np.argmin(finite))
        message = f"the differences of pair {row} in {path} hold NaN or infinity; they must be finite"
        raise HeadError(message)
