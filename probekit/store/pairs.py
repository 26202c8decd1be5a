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

from probekit.errors import StoreError
from probekit.store import format as fmt
from probekit.store.files import open_regular

logger = logging.getLogger(__name__)

JUDGEMENT_COLUMNS = ("pair_id", "row_a", "row_b", "label", "group", "split")
DEFAULTS: dict[str, Any] = {"source": "", "weight": 1.0}
REASONS = ("missing_rows", "bad_status", "no_label")


# What pyarrow and pandas raise on bytes that are not what they say.
_DAMAGE = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RuntimeError)


def read_judgements(path: Path) -> pd.DataFrame:
    """Read a set of judgements.

    Raises
    ------
    StoreError
        If it is missing, a link or not Parquet.
    """
    descriptor, _ = open_regular(path)
    try:
        with open(descriptor, "rb", closefd=False) as file:
            frame = pd.read_parquet(file, page_checksum_verification=True)
        if not frame.columns.is_unique:
            msg = "a column stands there twice"
            raise ValueError(msg)
        return frame
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        msg = f"{path}: cannot be read as Parquet ({reason}); delete it and run the same dump command again"
        raise StoreError(msg) from None
    finally:
        os.close(descriptor)


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
        The judgements of the same n pairs: ``pair_id``, ``group``, ``split``, ``source``, ``weight``, ...
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
        filled = {name: self.frame[name].fillna(value) for name, value in DEFAULTS.items() if name in self.frame}
        object.__setattr__(self, "frame", self.frame.assign(**(DEFAULTS | filled)))

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
            names = ", ".join(frame["pair_id"].astype(str).to_numpy()[missing][:3])
            logger.warning("%s: %d pairs have no rows in this store: %s, ...", self.path, missing.sum(), names)
        return Pairs(
            rows=rows[keep],
            label=frame["label"].to_numpy(np.float64)[keep],
            frame=frame[keep].reset_index(drop=True),
            excluded=frame[["pair_id", "source", "split"]].assign(reason=reason)[~keep].reset_index(drop=True),
        )
