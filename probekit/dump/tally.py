"""How far a dump is, how fast it goes, and what its time is spent on."""

import time

from probekit._clock import Clock
from probekit._types import Progress

PARTS = {"read": "read", "vae": "VAE", "text": "text", "dit": "DiT", "write": "write"}


class Tally:
    """Counts the rows of one worker, over all noise levels and draws.

    Parameters
    ----------
    clock
        Where the parts of the work are timed; see `PARTS`.
    total, todo
        Rows of this worker, and those of them that the store lacks.
    progress
        Who is told.

    Attributes
    ----------
    total, skipped
        All rows, and those that were stored before.
    stored
        Rows in committed shards.
    """

    def __init__(self, clock: Clock, total: int, todo: int, progress: Progress | None) -> None:
        self.total = total
        self.skipped = total - todo
        self.stored = self.skipped
        self._clock = clock
        self._progress = progress
        self._done = self.skipped
        self._began = time.perf_counter()
        self._before = dict(clock.seconds)
        self.advance(0)

    def advance(self, rows: int) -> None:
        """Count rows that are computed; they are stored with their whole shard."""
        self._done += rows
        if self._progress is not None:
            self._progress(self._done, self.total, f"rows {self._text()}")

    def keep(self, rows: int, *, computed: int) -> None:
        """Count the rows of a committed shard, of which so many were counted when they were computed."""
        self.stored += rows
        self.advance(rows - computed)

    def embedded(self, count: int, of: int) -> None:
        """Pass on how many prompts are embedded."""
        if self._progress is not None:
            self._progress(count, of, "prompts")

    def _text(self) -> str:
        seconds = time.perf_counter() - self._began
        rate = (self._done - self.skipped) / seconds
        said = [f"{rate:,.0f} rows/s" if rate >= 10 else f"{rate:.2g} rows/s"] if rate else []
        shares = {
            name: (self._clock.seconds.get(part, 0.0) - self._before.get(part, 0.0)) / seconds
            for part, name in PARTS.items()
        }
        said += [", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)]
        said += [f"{self.skipped:,} skipped"] if self.skipped else []
        return "; ".join(text for text in said if text)
