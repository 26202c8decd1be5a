"""Records of JSON Lines, JSON and CSV files, one by one, each with its place for messages."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from probekit.errors import PreferenceError

_READ = 4 * 2**20  # characters of a JSON file that are held at once
_SPACE = re.compile(r"[ \t\n\r]*")
Records = Iterator[tuple[int, dict[str, Any]]]


def _opened(path: Path) -> TextIO:
    """Open a text file; bytes that are not UTF-8 become halves of characters, which `_whole` finds in their record."""
    return path.open(
        encoding="utf-8-sig", errors="surrogateescape", newline="" if path.suffix.lower() == ".csv" else None
    )


def _whole(path: Path, place: str, text: str) -> None:
    """Refuse a piece of a file that has bytes which are not UTF-8."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        msg = f"{path}, {place}: not UTF-8 text (byte 0x{byte:02x} at character {error.start + 1}); allowed: UTF-8"
        raise PreferenceError(msg) from None


def _json_lines(path: Path) -> Records:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                _whole(path, f"line {number}", line)
                yield number, _json_record(path, f"line {number}", _parse(path, f"line {number}", line))


def _json_array(path: Path) -> Records:
    """Take the records of a list one by one; the file is never in memory as a whole."""
    decoder = json.JSONDecoder(object_pairs_hook=_keys_once)
    with _opened(path) as file:
        text, at, ended, number = "", 0, False, 0

        def more(least: int) -> None:
            nonlocal text, at, ended
            new = file.read(max(_READ, least))
            text, at, ended = text[at:] + new, 0, not new

        def skip() -> str:
            nonlocal at
            while True:
                match = _SPACE.match(text, at)
                at = match.end() if match else at
                if at < len(text) or ended:
                    return text[at : at + 1]
                more(0)

        if not (first := skip()):
            return
        if first != "[":
            text += file.read()
            _whole(path, "whole file", text)
            msg = f"{path}: holds {show(_parse(path, 'whole file', text))}; allowed: a list of records"
            raise PreferenceError(msg)
        at += 1
        if skip() == "]":
            at += 1
        else:
            while True:
                skip()
                number += 1
                place = f"record {number}"
                while True:
                    try:
                        value, end = decoder.raw_decode(text, at)
                        if end < len(text) or ended:
                            break
                        more(len(text))
                    except json.JSONDecodeError as error:
                        if ended:
                            _not_json(path, place, error.msg)
                        more(len(text))
                    except (ValueError, RecursionError) as error:
                        _not_json(path, place, error)
                _whole(path, place, text[at:end])
                yield number, _json_record(path, place, value)
                at = end
                mark = skip()
                at += 1
                if mark == "]":
                    break
                if mark != ",":
                    _not_json(path, f"after {place}", f"{mark!r} in place of ',' or ']'" if mark else "the file ends")
        if rest := skip():
            _not_json(path, "after the list", f"{rest!r} follows")


def _parse(path: Path, place: str, text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_keys_once)
    except (ValueError, RecursionError) as error:
        _not_json(path, place, error)


def _not_json(path: Path, place: str, why: object) -> NoReturn:
    msg = f"{path}, {place}: not JSON ({why}); allowed: a list of records in .json, a record a line in .jsonl"
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
        msg = f"{path}, {place}: is {show(record)}; allowed: a record with prompt, chosen, rejected or alike"
        raise PreferenceError(msg)
    return record


def _csv_rows(path: Path) -> Records:
    with _opened(path) as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, [])
            _whole(path, "line 1", "".join(header))
            for name in header:
                if header.count(name) > 1:
                    msg = f"{path}: column {name!r} stands twice in the header; allowed: each column once"
                    raise PreferenceError(msg)
            for row in rows:
                if len(row) != len(header) and row:
                    msg = f"{path}, line {rows.line_num}: {len(row)} fields; allowed: {len(header)}, as in the header"
                    raise PreferenceError(msg)
                if row:
                    _whole(path, f"line {rows.line_num}", "".join(row))
                    yield rows.line_num, dict(zip(header, row, strict=True))
        except csv.Error as error:
            msg = f"{path}, line {rows.line_num}: not CSV ({error})"
            raise PreferenceError(msg) from None


READERS: dict[str, tuple[str, Callable[[Path], Records]]] = {
    ".jsonl": ("line", _json_lines),
    ".json": ("record", _json_array),
    ".csv": ("line", _csv_rows),
    ".parquet": ("row", lambda _: iter(())),  # read by columns
}


def show(value: object) -> str:
    """Write a value into a message."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
