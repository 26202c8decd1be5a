"""Work spread over processes of one thread each, ended together."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
from typing import TypeVar

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from probekit.errors import ProbekitError

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], *, jobs: int
) -> Iterator[tuple[Item, Result]]:
    """Call a picklable function on every item, in order, and yield (item, result) as they finish.

    Whatever ends the iteration early (an error in one item, a signal) ends the other processes at once: all work that
    is worth keeping is committed by the function itself.
    """
    if jobs == 1:
        for item in items:
            yield item, function(item)
        return
    # spawn: a fork would copy the parent's thread pools in an undefined state
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start) as pool:
        futures = {pool.submit(function, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            message = "a process was killed, perhaps for want of memory; the same command resumes (or try fewer --jobs)"
            raise ProbekitError(message) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise


def _start() -> None:
    """Set up a process: one thread for libraries that it has imported, and for those that it will."""
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ[f"{library}_NUM_THREADS"] = "1"
    threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the parent was killed: its queue would keep it waiting, and in memory, for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
