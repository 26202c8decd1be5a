"""Results computed one step ahead of their consumer, by one thread that ends with the iteration."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(load: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yield (item, ``load(item)``) in order; while the caller works on one, a thread loads the next.

    At most three results are in memory: the caller's last, the one it is given and the one being loaded. An error of
    `load` is raised at its item. The thread ends when the iterator ends, is closed or is dropped.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="probekit-read") as thread:
        waiting = None
        for item in items:
            following = item, thread.submit(load, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()
