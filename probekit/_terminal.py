"""What the command does at the terminal: tables, progress, and what a signal means."""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Timer, main_thread
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

SECONDS_A_LINE = 30  # of progress that goes to a file

out_console = Console(soft_wrap=True)
err_console = Console(stderr=True, soft_wrap=True)


def show(facts: dict[str, Any], lines: Iterable[tuple[str, str]], *, as_json: bool) -> None:
    """Print facts as JSON, or their lines of (heading, text) as a table."""
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        print_lines(lines)


def print_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Print lines of (heading, text) as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path is shown whole
    for heading, text in lines:
        table.add_row(heading, text)
    out_console.print(table)


@contextmanager
def progress_bars(unit: str = "") -> Iterator[Callable[[int, int, str], None]]:
    """Progress bars on stderr, one for each first word of the reported text where no unit is named.

    Where stderr is no terminal: a line now and then.
    """
    if not err_console.is_terminal:
        last = time.monotonic()

        def tell(done: int, total: int, text: str) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= SECONDS_A_LINE:
                last = now
                err_console.print(f"{done:,}/{total:,} {unit} {text}".replace("  ", " "), markup=False, highlight=False)

        yield tell
        return
    whole: dict[str, Any] = {"no_wrap": True}  # on a narrow terminal only the text gives way
    columns = (
        TextColumn("{task.description}", table_column=Column(**whole)),
        BarColumn(bar_width=16, table_column=Column(**whole)),
        MofNCompleteColumn(table_column=Column(**whole)),
        TimeElapsedColumn(table_column=Column(**whole)),
        TimeRemainingColumn(table_column=Column(**whole)),
        TextColumn("{task.fields[text]}"),
    )
    bars, tasks = Progress(*columns, console=err_console), dict[str, Any]()

    def update(done: int, total: int, text: str) -> None:
        bars.start()  # not before: an error of wrong options is one line, without bars above it
        label, _, rest = (unit, "", text) if unit else text.partition(" ")
        if label not in tasks:
            tasks[label] = bars.add_task(label, total=total, text="")
        bars.update(tasks[label], completed=done, total=total, text=rest)

    try:
        yield update
    finally:
        if tasks:
            bars.stop()


class Stopped(BaseException):
    """SIGINT or SIGTERM, as an exception that typer lets through: temporary files are removed on the way out."""


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signum)


def _stop_again(ignored: Any) -> None:
    """Send a signal again whose exception Python dropped, as it does in a ``__del__``."""
    if isinstance(ignored.exc_value, Stopped):
        Timer(0.01, signal.pthread_kill, (main_thread().ident, *ignored.exc_value.args)).start()
    else:
        sys.__unraisablehook__(ignored)


def stop_on_signals() -> None:
    """Have SIGINT and SIGTERM raise `Stopped`."""
    sys.unraisablehook = _stop_again
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
