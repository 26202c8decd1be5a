"""Pairs of rows: judgements joined to the rows of a store.

n = pairs, m = rows of the store.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow.parquet import ParquetFile

from probekit.errors import StoreError
from probekit.store import format as fmt
from probekit.store.files import open_regular, read_small
from probekit.store.records import parse_judgements_sidecar
from probekit.store.shards import file_digest

logger = logging.getLogger(__name__)

JUDGEMENT_COLUMNS = ("pair_id", "row_a", "row_b", "label", "group", "split")
SPLITS = ("train", "validation", "test")
DEFAULTS: dict[str, Any] = {"source": "", "weight": 1.0}
REASONS = ("missing_rows", "bad_status", "no_label")
_BATCH = 4096  # pairs that are unpacked before their size is looked at
_UNPACKED = 256  # bytes of a table for each byte of its file; real ones take up to 10
_PLAIN = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_null,
)
MEND = "delete it and its .json companion, and run the same dump command again"


# What pyarrow and pandas raise on bytes that are not what they say.
_DAMAGE = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RuntimeError)


def read_judgements(path: Path) -> pd.DataFrame:
    """Read a set of judgements.

    Raises
    ------
    StoreError
        If it is missing, a link, not what its sidecar says or not Parquet.
    """
    descriptor, size = open_regular(path)
    try:
        sidecar = path.with_suffix(".json")
        if os.path.lexists(sidecar):  # formats 1.0 and 1.1 have none
            said = parse_judgements_sidecar(read_small(sidecar, limit=2**16))
            if (said.name, said.bytes, said.sha256) != (path.stem, size, file_digest(descriptor, size)):
                msg = f"not the file of {sidecar}"
                raise ValueError(msg)
        with (
            open(descriptor, "rb", closefd=False) as file,
            ParquetFile(file, page_checksum_verification=True) as parquet,
        ):
            frame: pd.DataFrame = _plain_table(parquet, size).to_pandas()
        if not frame.columns.is_unique:
            msg = "a column stands there twice"
            raise ValueError(msg)
        return frame
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        msg = f"{path}: cannot be read as judgements ({reason}); {MEND}"
        raise StoreError(msg) from None
    finally:
        os.close(descriptor)


def _plain_table(parquet: ParquetFile, size: int) -> pa.Table:
    """Read a Parquet file of ``size`` bytes that holds texts and numbers only and does not unpack without bound."""
    for column in parquet.schema_arrow:
        if not any(fits(column.type) for fits in _PLAIN):
            msg = f"column {column.name!r} is {column.type}; allowed: texts and numbers"
            raise ValueError(msg)
    if parquet.metadata.num_rows > size:  # each has a name of its own, which takes a byte at least
        msg = f"says that its {size} bytes hold {parquet.metadata.num_rows} pairs"
        raise ValueError(msg)
    batches, unpacked = [], 0
    for batch in parquet.iter_batches(_BATCH):
        batches.append(batch)
        unpacked += batch.nbytes
        if unpacked > _UNPACKED * size:
            msg = f"unpacks to more than {_UNPACKED} times its {size} bytes"
            raise ValueError(msg)
    count = sum(batch.num_rows for batch in batches)
    if count != parquet.metadata.num_rows:  # at some damage pyarrow ends without an error
        msg = f"{count} of its {parquet.metadata.num_rows} pairs can be read"
        raise ValueError(msg)
    # The metadata of the schema is advice of whoever wrote it on which Python types to make: it is not followed.
    schema = parquet.schema_arrow.remove_metadata()
    return pa.Table.from_batches([batch.cast(schema) for batch in batches], schema)


@dataclass(frozen=True)
class Pairs:
    """Pairs whose two rows are in the store and have features.

    Attributes
    ----------
    rows
        Positions of the two rows (n, 2) in the order of ``FeatureStore.rows``.
    label
        Probability (n,) that the first row is preferred; 0.5 = tie.
    frame
        The judgements of the same n pairs: ``pair_id``, ``group``, ``split``, ``source``, ``weight``, ..., and the
        ``prompt`` of their first rows.
    excluded
        Pairs that are not here, in the order of the judgements: ``pair_id``, ``source``, ``split``, ``reason``. A
        reason is ``missing_rows`` (a row is not in the store), ``bad_status`` (an image was unreadable or its features
        were not finite) or ``no_label``.
    """

    rows: NDArray[np.int64]
    label: NDArray[np.float64]
    frame: pd.DataFrame
    excluded: pd.DataFrame

    @property
    def left_out(self) -> dict[str, int]:
        """How many pairs are not here, by reason."""
        return {reason: int((self.excluded["reason"] == reason).sum()) for reason in REASONS}


@dataclass(frozen=True)
class BoundJudgements:
    """Judgements joined to the rows of a store.

    Attributes
    ----------
    path
        Folder of the store, for messages.
    store_rows
        ``FeatureStore.rows`` (m).
    frame
        Judgements with ``pair_id``, ``row_a``, ``row_b``, ``label``, ``group``, ``split`` and whatever else they carry.
        Where they give no ``source`` it is empty, where they give no ``weight`` it is 1.
    """

    path: Path
    store_rows: pd.DataFrame
    frame: pd.DataFrame

    def __post_init__(self) -> None:
        absent = [column for column in JUDGEMENT_COLUMNS if column not in self.frame]
        if absent:
            msg = f"{self.path}: the judgements have no column {absent[0]!r}; needed: {', '.join(JUDGEMENT_COLUMNS)}"
            raise StoreError(msg)
        for column in JUDGEMENT_COLUMNS:
            empty = int(self.frame[column].isna().sum())
            if empty and column != "label":
                msg = f"{self.path}: {empty} judgements have no {column!r}; allowed: a value in each"
                raise StoreError(msg)
            if column != "label" and pd.api.types.infer_dtype(self.frame[column]) not in ("string", "empty"):
                msg = f"{self.path}: not all judgements have a text as {column!r}; allowed: texts"
                raise StoreError(msg)
        label = pd.to_numeric(self.frame["label"], errors="coerce")
        wrong = self.frame["label"][~label.between(0, 1) & self.frame["label"].notna()]
        if len(wrong):
            msg = (
                f"{self.path}: a judgement has the label {wrong.tolist()[0]!r}; allowed: a number from 0 to 1, or none"
            )
            raise StoreError(msg)
        other = sorted(set(self.frame["split"]) - set(SPLITS))
        if other:
            msg = f"{self.path}: a judgement has the split {other[0]!r}; allowed: {', '.join(SPLITS)}"
            raise StoreError(msg)
        splits = self.frame.groupby("group")["split"].nunique()
        if (splits > 1).any():
            msg = f"{self.path}: group {splits.idxmax()!r} is in {splits.max()} splits; allowed: one, else a test leaks"
            raise StoreError(msg)
        filled = {name: self.frame[name].fillna(value) for name, value in DEFAULTS.items() if name in self.frame}
        frame = self.frame.assign(**(DEFAULTS | filled))
        light = frame["weight"][~(pd.to_numeric(frame["weight"], errors="coerce") > 0)]
        if len(light):
            msg = f"{self.path}: a judgement has the weight {light.tolist()[0]!r}; allowed: a number above 0"
            raise StoreError(msg)
        object.__setattr__(self, "frame", frame)

    def pairs(self, *, split: str | None = None) -> Pairs:
        """Pairs with features; the others are named in ``excluded``.

        Raises
        ------
        StoreError
            If the judgements have no such split.
        """
        frame = self.frame
        if split is not None:
            if split not in set(frame["split"]):
                known = ", ".join(sorted(set(frame["split"])))
                msg = f"{self.path}: the judgements have no split {split!r}; allowed: {known}"
                raise StoreError(msg)
            frame = frame[frame["split"] == split]
        index = pd.Index(self.store_rows["row_id"])
        rows = np.stack([index.get_indexer(frame["row_a"]), index.get_indexer(frame["row_b"])], axis=1).astype(np.int64)
        missing = (rows < 0).any(axis=1)
        status = np.append(self.store_rows["status"].to_numpy(), fmt.STATUS_OK)  # that of the rows that are missing, -1
        bad = (status[rows] != fmt.STATUS_OK).any(axis=1) & ~missing
        no_label = frame["label"].isna().to_numpy() & ~missing & ~bad
        reason = np.select([missing, bad, no_label], REASONS, "")
        keep = reason == ""
        if missing.any():
            lost = frame[missing]
            named = "image_a" in lost and "image_b" in lost
            names = (
                lost["image_a"].astype(str) + " and " + lost["image_b"].astype(str) if named else lost["pair_id"]
            ).head(3)
            more = ", ..." if len(lost) > len(names) else ""
            logger.warning(
                "%s: %d %s pairs have no rows in this store: %s%s",
                self.path,
                len(lost),
                split or "judged",
                ", ".join(names),
                more,
            )
        prompts = self.store_rows["prompt"].to_numpy(object)
        return Pairs(
            rows=rows[keep],
            label=frame["label"].to_numpy(np.float64)[keep],
            frame=frame[keep].assign(prompt=prompts[rows[keep, 0]]).reset_index(drop=True),
            excluded=frame[["pair_id", "source", "split"]].assign(reason=reason)[~keep].reset_index(drop=True),
        )
