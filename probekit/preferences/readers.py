"""Preference files as tables: the general form in JSON Lines, JSON, CSV or Parquet.

Only the columns that probekit knows are taken. Every error names the file, the place, the column, the value and what
is allowed; nothing is repaired silently.
"""

import csv
import json
import logging
import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from pyarrow.lib import ArrowException
from pyarrow.parquet import ParquetFile

from probekit.errors import PreferenceError
from probekit.preferences.groups import SPLITS

logger = logging.getLogger(__name__)

WINNER_COLUMNS = ("prompt", "chosen", "rejected")
LABEL_COLUMNS = ("prompt", "image_a", "image_b", "label")
TEXT_COLUMNS = ("group", "split", "source", "model_a", "model_b", "ranking_id")
NUMBER_COLUMNS = ("weight", "strength", "n_votes")
KNOWN = tuple(dict.fromkeys(WINNER_COLUMNS + LABEL_COLUMNS + TEXT_COLUMNS + NUMBER_COLUMNS))
SPLIT_ALIASES = {"val": "validation", "valid": "validation"} | {name: name for name in SPLITS}


class Table:
    """Known columns of a preference file, and where each record stands in it.

    Attributes
    ----------
    path
        The file.
    unit
        What ``places`` counts: ``line``, ``record`` or ``row``.
    places
        Number of each record (n).
    columns
        Column name -> n values as the file has them, None where a record lacks the column.
    """

    def __init__(self, path: Path, unit: str, records: Iterator[tuple[int, dict[str, Any]]]) -> None:
        self.path = path
        self.unit = unit
        self.places: list[int] = []
        self.columns: dict[str, list[Any]] = {}
        seen: dict[str, None] = {}
        for place, record in records:
            if record.keys() - seen.keys():
                seen |= dict.fromkeys(record)
                for name in KNOWN:
                    if name in record and name not in self.columns:
                        self.columns[name] = [None] * len(self.places)
            self.places.append(place)
            for name, values in self.columns.items():
                values.append(record.get(name))
        if not self.places:
            msg = f"{path}: holds no pairs; allowed: at least one"
            raise PreferenceError(msg)
        self.found = list(seen)

    def fail(self, index: int, what: str) -> NoReturn:
        """Raise an error about one record."""
        msg = f"{self.path}, {self.unit} {self.places[index]}: {what}"
        raise PreferenceError(msg)

    def texts(self, name: str, *, required: bool) -> pd.Series:
        """Take a column of texts (n); an absent optional value becomes an empty text."""
        values = self.columns.get(name, [None] * len(self.places))
        for i, value in enumerate(values):
            if required and (not isinstance(value, str) or not value):
                self.fail(i, f"{name} is {_show(value)}; allowed: a text that is not empty")
            if not isinstance(value, str) and value is not None and not _is_number(value):
                self.fail(i, f"{name} is {_show(value)}; allowed: a text")
        return pd.Series(["" if value is None or value != value else str(value) for value in values], dtype="str")

    def numbers(self, name: str, *, allowed: str, fits: Callable[[float], bool], default: float | None) -> pd.Series:
        """Take a column of numbers (n); an absent value becomes the default, and is an error if there is none."""
        out = []
        for i, value in enumerate(self.columns.get(name, [None] * len(self.places))):
            number = _number(value)
            if number is None and default is not None and (value is None or value == "" or value != value):
                number = default
            elif number is None or not fits(number):
                self.fail(i, f"{name} is {_show(value)}; allowed: {allowed}")
            out.append(number)
        return pd.Series(out, dtype="float64")


def read_general(path: Path) -> pd.DataFrame:
    """Read a file in the general form.

    Returns
    -------
    DataFrame
        One line per pair: ``prompt``, ``image_a``, ``image_b``, ``label``, the optional columns, ``split`` (empty
        where absent), ``winner_first`` (whether A stands for the chosen image and may still be turned round), and
        ``place`` for messages.

    Raises
    ------
    PreferenceError
        If the file cannot be read as a list of pairs, or any value is not allowed.
    """
    table = _read_table(path)
    by_winner, by_label = "chosen" in table.columns or "rejected" in table.columns, "image_a" in table.columns
    if by_winner and by_label:
        msg = f"{path}: has both 'chosen'/'rejected' and 'image_a'; allowed: one of the two forms"
        raise PreferenceError(msg)
    needed = WINNER_COLUMNS if by_winner else LABEL_COLUMNS
    for name in needed:
        if name not in table.columns:
            forms = " or ".join(", ".join(form) for form in (WINNER_COLUMNS, LABEL_COLUMNS))
            msg = f"{path}: no column {name!r} (found: {', '.join(table.found)}); needed: {forms}"
            raise PreferenceError(msg)
    unused = [name for name in table.found if name not in needed + TEXT_COLUMNS + NUMBER_COLUMNS]
    if unused:
        logger.info("%s: columns not used: %s", path, ", ".join(unused))
    image_a, image_b = ("chosen", "rejected") if by_winner else ("image_a", "image_b")
    frame = pd.DataFrame(
        {
            "prompt": table.texts("prompt", required=True),
            "image_a": table.texts(image_a, required=True),
            "image_b": table.texts(image_b, required=True),
        }
    )
    if by_winner:
        frame["label"] = 1.0
    else:
        allowed = "a number from 0 to 1, the share of votes for image_a"
        frame["label"] = table.numbers("label", allowed=allowed, fits=lambda x: 0 <= x <= 1, default=None)
    frame["weight"] = table.numbers("weight", allowed="a number > 0", fits=lambda x: 0 < x < math.inf, default=1.0)
    frame["strength"] = table.numbers("strength", allowed="a finite number", fits=math.isfinite, default=math.nan)
    votes = table.numbers("n_votes", allowed="a whole number >= 0", fits=_is_count, default=math.nan)
    frame["n_votes"] = votes.astype("Int64")
    for name in TEXT_COLUMNS:
        frame[name] = table.texts(name, required=False)
    _check_splits(table, frame)
    return frame.assign(winner_first=by_winner, place=[f"{table.unit} {place}" for place in table.places])


FORMATS: dict[str, Callable[[Path], pd.DataFrame]] = {"general": read_general}


def _check_splits(table: Table, frame: pd.DataFrame) -> None:
    """Put the file's names of splits into ours; all pairs have one, or none has."""
    given = frame["split"]
    if (given == "").all():
        return
    unknown = np.flatnonzero(~given.isin(SPLIT_ALIASES))
    wrong = sorted(unknown, key=lambda i: given[i] == "")  # a wrong name says more than a missing one
    if wrong:
        allowed = ", ".join(SPLITS)
        table.fail(int(wrong[0]), f"split is {given[wrong[0]]!r}; allowed: {allowed}, in every record or in none")
    frame["split"] = given.map(SPLIT_ALIASES)


def _read_table(path: Path) -> Table:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        msg = f"{path}: ends in {suffix!r}; allowed: {', '.join(_READERS)}"
        raise PreferenceError(msg)
    unit, reader = _READERS[suffix]
    try:
        return Table(path, unit, reader(path))
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8 text ({error})"
    except ArrowException as error:
        msg = f"{path}: not a Parquet file ({str(error).splitlines()[0]})"
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror or error})"
    raise PreferenceError(msg)


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_record(path, f"line {number}", _parse(path, f"line {number}", line))


def _json_array(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8-sig")
    content = _parse(path, "whole file", text) if text.strip() else []
    if not isinstance(content, list):
        msg = f"{path}: holds {_show(content)}; allowed: a list of records"
        raise PreferenceError(msg)
    for number, record in enumerate(content, 1):
        yield number, _json_record(path, f"record {number}", record)


def _parse(path: Path, place: str, text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_keys_once)
    except (ValueError, RecursionError) as error:
        msg = f"{path}, {place}: not JSON ({error}); allowed: a list of records in .json, a record a line in .jsonl"
        raise PreferenceError(msg) from None


def _keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):  # the last one would win silently
        names = [name for name, _ in pairs]
        msg = f"key {next(name for name in names if names.count(name) > 1)!r} stands twice"
        raise ValueError(msg)
    return record


def _json_record(path: Path, place: str, record: object) -> dict[str, Any]:
    if not isinstance(record, dict):
        msg = f"{path}, {place}: is {_show(record)}; allowed: a record with {', '.join(WINNER_COLUMNS)} or alike"
        raise PreferenceError(msg)
    return record


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, [])
            for name in header:
                if header.count(name) > 1:
                    msg = f"{path}: column {name!r} stands twice in the header; allowed: each column once"
                    raise PreferenceError(msg)
            for row in rows:
                if len(row) != len(header) and row:
                    msg = f"{path}, line {rows.line_num}: {len(row)} fields; allowed: {len(header)}, as in the header"
                    raise PreferenceError(msg)
                if row:
                    yield rows.line_num, dict(zip(header, row, strict=True))
        except csv.Error as error:
            msg = f"{path}, line {rows.line_num}: not CSV ({error})"
            raise PreferenceError(msg) from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with ParquetFile(path) as file:
        names = file.schema_arrow.names
        present = [name for name in KNOWN if name in names]
        batches = file.iter_batches(batch_size=16384, columns=present or names[:1])
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        # A first record with every name, so that messages can list the columns found.
        for number, row in enumerate(rows, 1):
            yield number, dict.fromkeys(names) | row if number == 1 else row


_READERS: dict[str, tuple[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]]] = {
    ".jsonl": ("line", _json_lines),
    ".json": ("record", _json_array),
    ".csv": ("line", _csv_rows),
    ".parquet": ("row", _parquet_rows),
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: object) -> float | None:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def _is_count(number: float) -> bool:
    return 0 <= number < 2**53 and number == int(number)


def _show(value: object) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
