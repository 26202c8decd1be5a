"""Where the time of long work goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of each part of the work; a part that runs inside another is not counted to the other.

    Attributes
    ----------
    seconds
        Seconds of each part that was entered, without the parts inside it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a ``with`` block to a part."""
        self._turn()
        self._inside.append(name)
        try:
            yield
        finally:
            self._turn()
            self._inside.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._inside:
            part = self._inside[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now
