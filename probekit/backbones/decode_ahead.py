"""Pixels of many image files in order, decoded in other processes ahead of whoever uses them.

An executor and not a torch DataLoader: its workers need no torch (they start in a fraction of the time), errors arrive
as what they are, and a worker's death is an exception at the next image instead of anywhere in the program.
"""

import os
import signal
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Self

import numpy as np
from numpy.typing import NDArray

from probekit.backbones.images import Resize, read_image, to_pixels
from probekit.errors import ProbekitError

_AHEAD = 8
"""Images of a worker that are decoded or about to be; as bytes, 25 MB at 1024 pixels."""


class PixelStream:
    """An iterator over the pixels of image files; use it in a ``with`` statement, which ends the workers.

    Parameters
    ----------
    paths, digests
        The files and the SHA-256 of their bytes.
    resolution, step, resize
        See `probekit.backbones.images.target_size`.
    workers
        Processes that decode ahead; 0 = decode here, when asked. Order and values do not depend on it.

    Yields
    ------
    array
        float32 in [-1, 1], (3, H, W).

    Raises
    ------
    ImageError
        When the turn of a bad image comes; the stream can be continued after it.
    ImageChangedError
        When the turn of an image comes that has other bytes than it was listed with.
    ProbekitError
        If a worker ended unexpectedly, such as killed for want of memory.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        digests: Sequence[bytes],
        *,
        resolution: int,
        step: int,
        resize: Resize,
        workers: int,
    ) -> None:
        self._read = partial(read_image, resolution=resolution, step=step, resize=resize)
        self._files = zip(paths, digests, strict=True)
        self._ahead: deque[Future[NDArray[np.uint8]]] = deque()
        self._limit = _AHEAD * workers
        # spawn: a fork would copy the parent's thread pools in an undefined state
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _start) if workers else None

    def __enter__(self) -> Self:
        """Start the workers."""
        if self._pool is not None:
            self._fill(self._pool)
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers: each finishes the image it is at, at most."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> NDArray[np.float32]:
        if self._pool is None:
            return to_pixels(self._read(*next(self._files)))
        try:
            self._fill(self._pool)
            if not self._ahead:
                raise StopIteration
            return to_pixels(self._ahead.popleft().result())
        except BrokenProcessPool:
            msg = (
                "a process that decodes images ended unexpectedly, perhaps killed for want of memory; "
                "the same command resumes (or try fewer --decode-workers; "
                "a script of your own needs an 'if __name__ == \"__main__\":' guard)"
            )
            raise ProbekitError(msg) from None

    def _fill(self, pool: ProcessPoolExecutor) -> None:
        # A worker that starts here inherits that Ctrl-C does not reach it: the parent decides.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            while len(self._ahead) < self._limit and (file := next(self._files, None)) is not None:
                self._ahead.append(pool.submit(self._read, *file))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start() -> None:
    Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End this process with its parent, even one that was killed and could not say so."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
