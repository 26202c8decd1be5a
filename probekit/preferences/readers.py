"""The general form of a preference file, and the mapping of other columns to it.

Every error names the file, the place, the column, the value and what is allowed; nothing is repaired silently.
n = pairs.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit.errors import ConfigError, PreferenceError
from probekit.preferences.groups import SPLITS
from probekit.preferences.packed import row_name
from probekit.preferences.tables import Table, is_count

logger = logging.getLogger(__name__)

WINNER_COLUMNS = ("prompt", "chosen", "rejected")
LABEL_COLUMNS = ("prompt", "image_a", "image_b", "label")
LABELS = (("label",), ("label_b",), ("votes_a", "votes_b"))  # ways to say who won; one of them is needed
TEXT_COLUMNS = ("group", "split", "source", "model_a", "model_b", "ranking_id")
NUMBERED = ("group", "ranking_id")  # identifiers, which may be whole numbers; names are texts
NUMBER_COLUMNS = ("weight", "strength", "n_votes", "confidence")
KNOWN = tuple(dict.fromkeys(WINNER_COLUMNS + LABEL_COLUMNS + sum(LABELS, ()) + TEXT_COLUMNS + NUMBER_COLUMNS))
SPLIT_ALIASES = {"val": "validation", "valid": "validation"} | {name: name for name in SPLITS}
SHARE = "a number from 0 to 1"
PRESETS = {
    "mj-bench": "prompt=caption,image_a=image0,image_b=image1,label_b=label",
    "rapidata": "prompt=prompt,image_a=image1,image_b=image2,votes_a=votes_image1,votes_b=votes_image2,model_a=model1,"
    "model_b=model2",
}
"""Column mappings of published files; the label of MJ-Bench is the number of the better image, 0 or 1."""


def parse_columns(columns: str | Mapping[str, str]) -> dict[str, str]:
    """Read a mapping such as ``prompt=caption,image_a=image0``, or the name of one of `PRESETS`.

    Raises
    ------
    ConfigError
        If it is no such mapping, or names a column that the general form does not have.
    """
    if isinstance(columns, str):
        parts = [part.partition("=") for part in PRESETS.get(columns, columns).split(",")]
        pairs = [(ours.strip(), theirs.strip()) for ours, _, theirs in parts]
    else:
        pairs = list(columns.items())
    mapping = dict(pairs)
    for ours, theirs in pairs:
        if ours not in KNOWN or not theirs:
            text = f"{ours}={theirs}" if theirs else ours
            msg = f"columns has {text!r}; allowed: {', '.join(PRESETS)}, or OURS=THEIRS,... with {', '.join(KNOWN)}"
            raise ConfigError(msg)
    if len(mapping) < len(pairs) or len(set(mapping.values())) < len(pairs):
        msg = f"columns is {columns!r}; allowed: each column once on either side"
        raise ConfigError(msg)
    return mapping


class General:
    """Reads the general form, of which columns may have other names in the file.

    Parameters
    ----------
    table
        The file.
    mapping
        Our name of a column -> its name in the file, where they differ.
    """

    def __init__(self, table: Table, mapping: Mapping[str, str]) -> None:
        self._table = table
        taken = set(mapping.values())
        self._name = {ours: mapping.get(ours, "" if ours in taken else ours) for ours in KNOWN}
        for ours in mapping:
            if not self._has(ours):
                msg = f"{table.path}: no column {mapping[ours]!r} for {ours} (found: {', '.join(table.found)})"
                raise PreferenceError(msg)

    def _has(self, ours: str) -> bool:
        return self._table.has(self._name[ours])

    def read(self) -> pd.DataFrame:
        """Return one line per pair; see `finish`."""
        table, name = self._table, self._name
        sides, label = self._form()
        used = {*sides, *label, "prompt", *TEXT_COLUMNS, *NUMBER_COLUMNS}
        unused = [column for column in table.found if column not in {name[ours] for ours in used}]
        if unused:
            logger.info("%s: columns not used: %s", table.path, ", ".join(unused))
        frame = pd.DataFrame({"prompt": table.texts(name["prompt"], required=True)})
        for side, ours in zip(("image_a", "image_b"), sides, strict=True):
            frame[side] = image_names(table, name[ours])
        votes = self._numbers("n_votes", "a whole number >= 0", is_count, math.nan)
        if label == ("label",):
            frame["label"] = self._numbers("label", f"{SHARE}, the share of votes for image_a", _is_share, None)
        elif label == ("label_b",):
            allowed = f"{SHARE}, the share of votes for image_b"
            frame["label"] = 1 - self._numbers("label_b", allowed, _is_share, None)
        elif label:
            a, b = (self._numbers(ours, "a number >= 0", _is_amount, None) for ours in label)
            frame["label"] = a / (a + b).where(a + b > 0)  # without votes there is no label
            whole = (a + b) % 1 == 0
            votes = votes.where(votes.notna(), (a + b).where(whole))
        else:
            frame["label"] = 1.0
        frame["weight"] = self._numbers("weight", "a number > 0", lambda x: 0 < x < math.inf, 1.0)
        frame["strength"] = self._numbers("strength", "a finite number", math.isfinite, math.nan)
        frame["n_votes"] = votes
        frame["confidence"] = self._numbers("confidence", SHARE, _is_share, math.nan)
        for ours in TEXT_COLUMNS:
            frame[ours] = table.texts(name[ours], required=False, numbered=ours in NUMBERED)
        _check_splits(table, frame)
        frame["drop"] = np.where(frame["label"].isna(), "no_votes", "")
        return finish(table, frame)

    def _numbers(self, ours: str, allowed: str, fits: Any, default: float | None) -> pd.Series:
        return self._table.numbers(self._name[ours], allowed=allowed, fits=fits, default=default)

    def _form(self) -> tuple[tuple[str, str], tuple[str, ...]]:
        """Which columns name the two images, and which say who won; winner forms say it by their names."""
        path = self._table.path
        by_winner = self._has("chosen") or self._has("rejected")
        if by_winner and self._has("image_a"):
            msg = f"{path}: has both 'chosen'/'rejected' and 'image_a'; allowed: one of the two forms"
            raise PreferenceError(msg)
        given = [way for way in LABELS if any(map(self._has, way))]
        label = () if by_winner else given[0] if given else LABELS[0]
        if not by_winner and len(given) > 1:
            msg = f"{path}: has both {self._name[given[0][0]]!r} and {self._name[given[1][0]]!r}; allowed: one label"
            raise PreferenceError(msg)
        sides = ("chosen", "rejected") if by_winner else ("image_a", "image_b")
        for ours in ("prompt", *sides, *label):
            if not self._has(ours):
                forms = " or ".join(", ".join(form) for form in (WINNER_COLUMNS, LABEL_COLUMNS))
                found = ", ".join(self._table.found)
                msg = f"{path}: no column {self._name[ours] or ours!r} (found: {found}); needed: {forms}"
                raise PreferenceError(msg)
        return sides, label


def image_names(table: Table, column: str) -> pd.Series:
    """Take the names of images (n) as they stand in the file, or those that images given as bytes get."""
    if column in table.packed:
        folder, stem = table.root.packed.name, table.root.stem
        return pd.Series([f"{folder}/{row_name(stem, row, column)}" for row in range(len(table))], dtype="str")
    names = table.texts(column, required=True)
    return names.where(names.str.startswith("/"), table.root.prefix + names) if table.root.prefix else names


def finish(table: Table, frame: pd.DataFrame) -> pd.DataFrame:
    """Complete what a reader says of pairs.

    Returns
    -------
    DataFrame
        ``prompt``, ``image_a``, ``image_b``, ``label`` (of A, as the file has the sides), ``weight``, ``strength``,
        ``n_votes``, ``confidence``, ``group``, ``split``, ``source``, ``model_a``, ``model_b``, ``ranking_id`` (texts,
        empty where absent), ``drop`` (why the pair is left out; empty for those that stay) and ``record`` (its record
        in the table, for messages).
    """
    numbers = {"weight": 1.0, "strength": math.nan, "n_votes": math.nan, "confidence": math.nan}
    texts = dict.fromkeys((*TEXT_COLUMNS, "drop"), "")
    for name, value in (numbers | texts).items():
        if name not in frame:
            frame[name] = pd.Series(value, frame.index, dtype="str" if value == "" else "float64")
    if "record" not in frame:
        frame["record"] = np.arange(len(table))
    return frame.assign(n_votes=frame["n_votes"].astype("Int64"), drop=frame["drop"].astype("str"))


def split_of(name: str) -> str:
    """Return the split that a name such as ``train-00000-of-00004`` or ``validation_unique`` starts with, or none."""
    head = Path(name).stem.replace("_", "-").replace(".", "-").split("-")[0].lower()
    return SPLIT_ALIASES.get(head, "")


def _is_share(number: float) -> bool:
    return 0 <= number <= 1


def _is_amount(number: float) -> bool:
    return 0 <= number < math.inf


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
