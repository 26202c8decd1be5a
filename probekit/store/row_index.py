"""The rows of a store over all its shards, each once, and where those of each block stand among them.

m = rows of the store.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit.errors import StoreError
from probekit.store import format as fmt
from probekit.store.mend import MEND_SHARD
from probekit.store.shards import Shard

ROW_COLUMNS = ("row_id", "prompt", "image_id", "status", "width", "height", "file_bytes")


class RowIndex(NamedTuple):
    """The rows of a store, where those of each block stand among them, and which of them need features (m,).

    A row that is missing or unreadable wherever it is stored needs none at other noise levels and draws.
    """

    rows: pd.DataFrame
    places: dict[str, slice | NDArray[np.int64]]
    needed: NDArray[np.bool_]


def index_rows(shards: Sequence[Shard]) -> RowIndex:
    """Put the rows of all shards together: blocks sorted by name, rows in the order of their block.

    Raises
    ------
    StoreError
        If a table is damaged, or two shards of one noise level and draw hold a row.
    """
    position: dict[str, int] = {}
    places: dict[str, slice | NDArray[np.int64]] = {}
    tables = []
    for shard in sorted(shards, key=lambda shard: shard.sidecar.block):
        if shard.sidecar.block not in places:
            ids, first = shard.row_ids(), len(position)
            fresh = np.array([row not in position for row in ids], bool)
            for row in ids:
                position.setdefault(row, len(position))
            if fresh.all():
                places[shard.sidecar.block] = slice(first, len(position))
            else:  # other blocks at another noise level, where rows were added in between
                places[shard.sidecar.block] = np.array([position[row] for row in ids], np.int64)
            tables.append(_row_table(shard, ids)[fresh])
    frame = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(ROW_COLUMNS))
    status, needed = np.zeros(len(frame), np.uint8), np.zeros(len(frame), bool)
    held = {(shard.sidecar.sigma, shard.sidecar.draw): np.zeros(len(frame), bool) for shard in shards}
    for shard in shards:
        place, seen = places[shard.sidecar.block], held[shard.sidecar.sigma, shard.sidecar.draw]
        if seen[place].any():
            msg = f"{shard.path}: holds rows of another shard of its noise level and draw; {MEND_SHARD}"
            raise StoreError(msg)
        seen[place] = True
        here = shard.table("rows/status")
        status[place] = np.maximum(status[place], here)
        needed[place] |= here != fmt.STATUS_UNREADABLE
    return RowIndex(frame.assign(status=status), places, needed)


def _row_table(shard: Shard, ids: list[str]) -> pd.DataFrame:
    numbers = {column: shard.table(f"rows/{column}") for column in ("width", "height", "file_bytes")}
    images = shard.texts("rows/image_id_utf8", "rows/image_id_offsets")
    columns = {"row_id": ids, "prompt": shard.row_prompts(), "image_id": images, "status": np.uint8(0), **numbers}
    return pd.DataFrame(columns)
