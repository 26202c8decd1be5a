"""Preference files as tables: JSON Lines, JSON, CSV, Parquet and Arrow, record by record, known columns only.

Texts are kept as Arrow arrays: a million records fit in memory with their prompts and paths. Bytes of images are never
read here; ``probekit.preferences.packed`` gets at them. n = records.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.lib import ArrowException

from probekit._types import IntArray
from probekit.errors import PreferenceError
from probekit.preferences.packed import ArrowRows, ParquetRows, holds_bytes
from probekit.preferences.records import READERS, Records, show

logger = logging.getLogger(__name__)

_CHUNK = 50_000  # records between two conversions to Arrow
Content = tuple[IntArray, list[str], dict[str, pa.ChunkedArray | list[Any]]]  # places, names found, columns


@dataclass(frozen=True)
class Root:
    """Where the images of a file are.

    Attributes
    ----------
    base
        The folder to which names of images are relative.
    inside
        The folder that images must not leave.
    packed
        The folder of images that stand as bytes in the file.
    stem
        What images begin with that are named by nothing but their row.
    prefix
        What a path in the file begins with, seen from ``base``.
    """

    base: Path
    inside: Path
    packed: Path
    stem: str
    prefix: str = ""

    @classmethod
    def beside(cls, file: Path) -> Self:
        """Images by paths relative to the file; those inside it are named in a folder beside it."""
        return cls(file.parent, file.parent, file.parent / f"{file.stem}.images", file.stem)


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
    found
        Names of all columns of the file.
    packed
        Columns that hold images as bytes; they are not read.
    rows
        Where these bytes are; None for files that hold none.
    root
        Where the images are.
    notes
        What a reader found that may surprise, with how many of it; see `note`.
    """

    def __init__(
        self, opened: "Opened", unit: str, *, content: Content, wanted: Sequence[str], rows: ArrowRows | None
    ) -> None:
        self.path, self.unit, self.rows, self.root = opened.path, unit, rows, opened.root
        self.notes: Counter[str] = Counter()
        self.places, found, columns = content
        if not len(self.places):
            msg = f"{self.path}: holds no pairs; allowed: at least one"
            raise PreferenceError(msg)
        self.found = list(dict.fromkeys([*opened.found, *found]))
        self._columns = {name: columns[name] for name in wanted if name in columns}
        self.packed = [] if rows is None else [name for name in found if holds_bytes(rows.schema.field(name).type)]

    def __len__(self) -> int:
        return len(self.places)

    def has(self, name: str) -> bool:
        """Say whether any record has the column; columns of bytes count."""
        return name in self._columns or name in self.packed

    def fail(self, index: int, what: str) -> NoReturn:
        """Raise an error about one record."""
        msg = f"{self.path}, {self.unit} {self.places[index]}: {what}"
        raise PreferenceError(msg)

    def note(self, count: int, what: str) -> None:
        """Warn of something that is no error, where there is any; a set of preferences keeps what was said."""
        if count:
            logger.warning("%s: %d %s", self.path, count, what)
            self.notes[what] += count

    def refuse_half_characters(self) -> NoReturn:
        """Raise an error about the first record that holds half of a surrogate pair, which JSON can say."""
        columns = {name: self.values(name) for name in self._columns}
        for index in range(len(self)):
            for name, values in columns.items():
                try:
                    json.dumps(values[index], ensure_ascii=False, default=str).encode()
                except UnicodeEncodeError:
                    self.fail(index, f"{name} is {show(values[index])}, which holds half a character; allowed: Unicode")
        msg = f"{self.path}: holds half a character; allowed: Unicode"
        raise PreferenceError(msg)

    def values(self, name: str) -> list[Any]:
        """Take a column as it stands in the file (n); None where a record lacks it."""
        values = self._columns.get(name)
        if values is None:
            return [None] * len(self)
        return values if isinstance(values, list) else values.to_pylist()

    def texts(self, name: str, *, required: bool, numbered: bool = False) -> pd.Series:
        """Take a column of texts (n); an absent optional value becomes an empty text.

        Where things may be `numbered`, as published files number their rankings, a whole number stands for its digits;
        a number in place of any other text is refused.
        """
        allowed = ("a text" if not numbered else "a text or a whole number") + " that is not empty" * required
        values = self._columns.get(name, [None] * len(self))
        if isinstance(values, pa.ChunkedArray):
            wrong = pc.or_(pc.is_null(values), pc.equal(pc.fill_null(values, ""), ""))
            if required and pc.any(wrong).as_py():
                index = pc.index(wrong, True).as_py()
                self.fail(index, f"{name} is {show(values[index].as_py())}; allowed: {allowed}")
            filled: pd.Series = (pc.fill_null(values, "") if values.null_count else values).to_pandas()
            return filled.astype("str")
        texts: list[str] = []
        for i, value in enumerate(values):
            absent = value is None or value == "" or value != value  # pandas writes gaps in numbers as NaN
            number = numbered and _is_whole(value)
            if absent and not required:
                texts.append("")
            elif not absent and (isinstance(value, str) or number):
                texts.append(value if isinstance(value, str) else str(int(value)))
            else:
                self.fail(i, f"{name} is {show(value)}; allowed: {allowed}")
        return pd.Series(texts, dtype="str")

    def numbers(self, name: str, *, allowed: str, fits: Callable[[float], bool], default: float | None) -> pd.Series:
        """Take a column of numbers (n); an absent value becomes the default, and is an error if there is none."""
        if not self.has(name) and default is not None:
            return pd.Series(np.full(len(self), default))
        out = np.empty(len(self))
        typed = self.path.suffix.lower() != ".csv"  # where numbers are numbers, a text is no number
        for i, value in enumerate(self.values(name)):
            number = None if typed and isinstance(value, str) else _number(value)
            if number is None and default is not None and (value is None or value == "" or value != value):
                number = default
            elif number is None or not fits(number):
                self.fail(i, f"{name} is {show(value)}; allowed: {allowed}")
            out[i] = number
        return pd.Series(out)


class Opened:
    """A preference file of which the first record is known, and no more is read yet.

    Attributes
    ----------
    path
        The file.
    found
        Names of the columns of its first record, or of its schema.
    root
        Where its images are.
    """

    def __init__(self, path: Path, root: Root | None = None, rows: ArrowRows | None = None) -> None:
        suffix = path.suffix.lower()
        self.path, self.root, self._rows = path, root or Root.beside(path), rows
        self._unit = "row"
        if rows is None and suffix not in READERS:
            msg = f"{path}: ends in {suffix!r}; allowed: {', '.join(READERS)}"
            raise PreferenceError(msg)
        with _Refusals(path):
            if rows is None and suffix == ".parquet":
                self._rows = ParquetRows(path)
            if self._rows is not None:
                self.found = list(self._rows.schema.names)
                return
            self._unit, reader = READERS[suffix]
            records = reader(path)
            first = next(records, None)
            self.found = [] if first is None else list(first[1])
            self._records = records if first is None else chain([first], records)

    def read(self, wanted: Sequence[str]) -> Table:
        """Read the wanted columns of all records."""
        with _Refusals(self.path):
            content = (
                _of_records(self._records, wanted) if self._rows is None else _of_arrow(self.path, self._rows, wanted)
            )
            return Table(self, self._unit, content=content, wanted=wanted, rows=self._rows)


class _Refusals:
    """Turns what goes wrong in reading into one line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        match error:
            case ArrowException():
                what = (
                    f"not a Parquet file ({str(error).splitlines()[0]}); allowed: Parquet, or another ending for text"
                )
            case OSError():
                what = f"cannot be read ({error.strerror or error})"
            case _:
                return
        msg = f"{self._path}: {what}"
        raise PreferenceError(msg) from None


def _of_records(records: Records, wanted: Sequence[str]) -> Content:
    """Take the wanted columns out of records; those without a column have None there."""
    parts: dict[str, list[pa.Array | list[Any]]] = {}
    columns: dict[str, list[Any]] = {}
    seen: dict[str, None] = {}
    places: list[IntArray] = []
    chunk: list[int] = []

    def flush() -> None:
        for name, values in columns.items():
            parts[name].append(_compact(values))
            values.clear()
        places.append(np.array(chunk, np.int64))
        chunk.clear()

    for place, record in records:
        if record.keys() - seen.keys():
            seen |= dict.fromkeys(record)
            for name in wanted:
                if name in record and name not in parts:
                    done = sum(map(len, places))
                    parts[name] = [pa.nulls(done, pa.large_string())] if done else []
                    columns[name] = [None] * len(chunk)
        chunk.append(place)
        for name, values in columns.items():
            values.append(record.get(name))
        if len(chunk) == _CHUNK:
            flush()
    flush()
    return np.concatenate(places), list(seen), {name: _joined(values) for name, values in parts.items()}


def _of_arrow(path: Path, rows: ArrowRows, wanted: Sequence[str]) -> Content:
    """Take the wanted columns as they are, but for images as bytes."""
    kinds = {field.name: field.type for field in rows.schema}
    present = [name for name in wanted if name in kinds and not holds_bytes(kinds[name])]
    parts: dict[str, list[pa.Array | list[Any]]] = {name: [] for name in present}
    count = sum(map(rows.part_rows, rows.parts))
    read = 0
    for batch in rows.batches(present, size=_CHUNK) if present else ():
        for name in present:
            column = batch.column(name)
            text = pa.types.is_string(kinds[name]) or pa.types.is_large_string(kinds[name])
            column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            _refuse_bytes(path, name, column, read)
            parts[name].append(column.cast(pa.large_string()) if text else column.to_pylist())
        read += batch.num_rows
    return np.arange(1, count + 1), list(kinds), {name: _joined(values) for name, values in parts.items()}


def _refuse_bytes(path: Path, name: str, column: pa.Array, before: int) -> None:
    """Refuse texts that are not UTF-8, which Arrow does not look at when it reads them."""
    try:
        column.validate(full=True)
    except ArrowException:
        for row, value in enumerate(column, before + 1):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                msg = f"{path}, row {row}: {name} is not UTF-8 text ({show(error.object)}); allowed: UTF-8"
                raise PreferenceError(msg) from None
        raise


def _compact(values: list[Any]) -> pa.Array | list[Any]:
    """Texts as Arrow, which takes a third of the memory; anything else stays as it is, for messages."""
    if set(map(type, values)) <= {str, type(None)}:
        try:
            return pa.array(values, pa.large_string())
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can say
            pass
    return list(values)


def _joined(parts: list[pa.Array | list[Any]]) -> pa.ChunkedArray | list[Any]:
    if all(isinstance(part, pa.Array) for part in parts):
        return pa.chunked_array(parts, pa.large_string())
    return list(chain.from_iterable(part.to_pylist() if isinstance(part, pa.Array) else part for part in parts))


def _is_whole(value: object) -> bool:
    return value.is_integer() if isinstance(value, float) else isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> float | None:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def is_count(number: float) -> bool:
    """Say whether a number is whole and not negative."""
    return 0 <= number < 2**53 and number == int(number)
