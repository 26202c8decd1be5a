"""Scores computed elsewhere: a CSV or Parquet file in, a score for each item of a preference set out.

m = items, distinct (prompt, image).
"""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv
from pyarrow.parquet import ParquetFile

from probekit._types import FloatArray
from probekit.errors import ScoreFileError

logger = logging.getLogger(__name__)

_TYPES = {"image": pa.string(), "prompt": pa.string(), "score": pa.float64()}
_SHOWN = 3


def read_scores(path: Path) -> pd.DataFrame:
    """Read a file of scores.

    Returns
    -------
    DataFrame
        ``image`` as the preference file writes it, ``score``, and ``prompt`` where the file has it.

    Raises
    ------
    ScoreFileError
        If it cannot be read, lacks a column, or holds a score that is no finite number or two scores for one image.
    """
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        message = f"{path}: ends in {path.suffix!r}; allowed: {', '.join(readers)}"
        raise ScoreFileError(message)
    try:
        frame: pd.DataFrame = readers[path.suffix](path).to_pandas()
    except FileNotFoundError:
        message = f"{path}: no such file; allowed: a CSV or Parquet file of scores"
        raise ScoreFileError(message) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        message = f"{path}: cannot be read as a table of scores ({' '.join(str(error).split())})"
        raise ScoreFileError(message) from None
    if frame.empty:
        message = f"{path}: holds no scores; allowed: at least one"
        raise ScoreFileError(message)
    for column in frame.columns.drop("score"):
        for row in np.flatnonzero(frame[column].isna())[:1]:
            message = f"{path}, row {row + 1}: {column} is missing; allowed: a text"
            raise ScoreFileError(message)
    for row in np.flatnonzero(~np.isfinite(frame["score"]))[:1]:
        message = (
            f"{path}, row {row + 1}: score is {frame['score'].iloc[row]}; allowed: a finite number (leave the row out "
            "where there is none: its pairs are then left out and counted)"
        )
        raise ScoreFileError(message)
    keys = [column for column in ("prompt", "image") if column in frame]
    first = frame.groupby(keys, sort=False)["score"].transform("first")
    for row in np.flatnonzero(first != frame["score"])[:1]:
        here = " and ".join(f"{key} {frame[key].iloc[row]!r}" for key in keys)
        message = f"{path}, row {row + 1}: scores {here} {frame['score'].iloc[row]:g}, an earlier row {first[row]:g}"
        raise ScoreFileError(f"{message}; allowed: one score" + ("" if "prompt" in keys else ", or a column prompt"))
    return frame.drop_duplicates(keys, ignore_index=True)


def match_scores(path: Path, scores: pd.DataFrame, items: pd.DataFrame) -> tuple[FloatArray, int]:
    """Give each item (m,) its score, NaN where it has none, and count scores of nothing in the preference file.

    Raises
    ------
    ScoreFileError
        If no item has a score.
    """
    keys = [column for column in ("prompt", "image") if column in scores]
    found = items[keys].merge(scores, on=keys, how="left")["score"].to_numpy(np.float64)
    known = scores.merge(items[keys].drop_duplicates(), on=keys, how="left", indicator=True)["_merge"] == "both"
    strange = scores[~known]
    shown = ", ".join(repr(image) for image in strange["image"].head(_SHOWN))
    if np.isnan(found).all():
        by = " and prompts" if "prompt" in keys else ""
        message = (
            f"{path}: none of its images{by} is in the preference file, such as {shown}; allowed: images as that file "
            f"writes them, such as {items['image'].iloc[0]!r}"
        )
        raise ScoreFileError(message)
    if len(strange):
        more = ", ..." if len(strange) > _SHOWN else ""
        logger.warning("%s: %d scores are of nothing in the preference file: %s%s", path, len(strange), shown, more)
    return found, len(strange)


def _read_csv(path: Path) -> pa.Table:
    convert = csv.ConvertOptions(column_types=_TYPES)
    table = csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=convert)
    return table.select(_wanted(path, table.column_names))


def _read_parquet(path: Path) -> pa.Table:
    with ParquetFile(path) as file:
        wanted = _wanted(path, file.schema_arrow.names)
        table = file.read(columns=wanted)
    return table.cast(pa.schema([(name, _TYPES[name]) for name in table.column_names]))


def _wanted(path: Path, held: list[str]) -> list[str]:
    for name in ("image", "score"):
        if held.count(name) != 1:
            problem = "no column" if name not in held else "more than one column"
            message = f"{path}: {problem} {name!r} (found: {', '.join(held)}); needed: image, score, perhaps prompt"
            raise ScoreFileError(message)
    return [name for name in held if name in _TYPES]
