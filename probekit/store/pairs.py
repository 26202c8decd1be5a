"""Pairs of rows: judgements joined to the rows of a store.

n = pairs, m = rows of the store.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit.errors import StoreError
from probekit.store import format as fmt

logger = logging.getLogger(__name__)

JUDGEMENT_COLUMNS = ("pair_id", "row_a", "row_b", "label", "group", "split")
SPLITS = ("train", "validation", "test")
DEFAULTS: dict[str, Any] = {"source": "", "weight": 1.0}
REASONS = ("missing_rows", "bad_status", "no_label")


@dataclass(frozen=True, eq=False)  # arrays have no one equality; what is made of pairs is kept by their identity
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
    named
        ``pair_id`` of the pairs without rows that were logged already.
    """

    path: Path
    store_rows: pd.DataFrame
    frame: pd.DataFrame
    named: set[str] = field(default_factory=set, repr=False)

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
        self._name(frame[missing & ~frame["pair_id"].isin(self.named).to_numpy()], split or "judged")
        prompts = self.store_rows["prompt"].to_numpy(object)
        return Pairs(
            rows=rows[keep],
            label=frame["label"].to_numpy(np.float64)[keep],
            frame=frame[keep].assign(prompt=prompts[rows[keep, 0]]).reset_index(drop=True),
            excluded=frame[["pair_id", "source", "split"]].assign(reason=reason)[~keep].reset_index(drop=True),
        )

    def _name(self, lost: pd.DataFrame, kind: str) -> None:
        """Log pairs that have no rows in the store, by their pictures where these are known."""
        if lost.empty:
            return
        self.named.update(lost["pair_id"])
        if "image_a" in lost and "image_b" in lost:
            names = lost["image_a"].astype(str) + " and " + lost["image_b"].astype(str)
        else:
            names = lost["pair_id"]
        more = ", ..." if len(lost) > 3 else ""
        have = "pair has" if len(lost) == 1 else "pairs have"
        text = "%s: %d %s %s no rows in this store: %s%s"
        logger.warning(text, self.path, len(lost), kind, have, ", ".join(names.head(3)), more)
