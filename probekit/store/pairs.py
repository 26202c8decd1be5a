"""Pairs of rows: judgements joined to the rows of a store.

n = pairs, m = rows of the store.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit.errors import StoreError
from probekit.store import format as fmt

logger = logging.getLogger(__name__)

JUDGEMENT_COLUMNS = ("pair_id", "row_a", "row_b", "label", "split")


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
        The judgements of the same n pairs: ``pair_id``, ``group``, ``split``, ``source``, ...
    left_out
        Pairs that are not here: ``missing_rows`` (a row is not in the store), ``bad_status`` (an image was unreadable
        or its features were not finite), ``no_label``.
    """

    rows: NDArray[np.int64]
    label: NDArray[np.float64]
    frame: pd.DataFrame
    left_out: dict[str, int]


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
        Judgements with ``pair_id``, ``row_a``, ``row_b``, ``label``, ``split`` and whatever else they carry.
    """

    path: Path
    store_rows: pd.DataFrame
    frame: pd.DataFrame

    def __post_init__(self) -> None:
        absent = [column for column in JUDGEMENT_COLUMNS if column not in self.frame]
        if absent:
            msg = f"{self.path}: the judgements have no column {absent[0]!r}; needed: {', '.join(JUDGEMENT_COLUMNS)}"
            raise StoreError(msg)

    def pairs(self, *, split: str | None = None) -> Pairs:
        """Pairs with features; the others are counted in ``left_out``.

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
        bad = (self.store_rows["status"].to_numpy()[rows] != fmt.STATUS_OK).any(axis=1) & ~missing
        no_label = frame["label"].isna().to_numpy() & ~missing & ~bad
        keep = ~(missing | bad | no_label)
        if missing.any():
            names = ", ".join(frame["pair_id"].astype(str).to_numpy()[missing][:3])
            logger.warning("%s: %d pairs have no rows in this store: %s, ...", self.path, missing.sum(), names)
        return Pairs(
            rows=rows[keep],
            label=frame["label"].to_numpy(np.float64)[keep],
            frame=frame[keep].reset_index(drop=True),
            left_out={
                "missing_rows": int(missing.sum()),
                "bad_status": int(bad.sum()),
                "no_label": int(no_label.sum()),
            },
        )
