"""Cut rows into blocks: those of earlier shards and plans again where all their rows are missing, the rest anew."""

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from probekit._types import canonical_sigma
from probekit.errors import StoreError
from probekit.store import format as fmt
from probekit.store.files import is_locked, locked, write_atomically
from probekit.store.mend import MEND_SHARD
from probekit.store.shards import Shard, check_shard, plan_files, read_plan, scan, shard_files, shard_path

Place = tuple[str, int]
"""Noise level and draw."""

RowIds = tuple[str, ...]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Block:
    """Rows that go into one shard, in this order.

    Attributes
    ----------
    name
        Digest of the row keys, and the file name of the shard.
    row_ids
        Row keys (hex), rows of one prompt adjacent.
    number
        Its place among all blocks of the rows that were asked for, whether they are done or not; so several workers
        share the blocks without talking to each other.
    state
        ``done``, ``new``, or what is wrong with the shard that is there.
    """

    name: str
    row_ids: tuple[str, ...]
    number: int = 0
    state: str = "new"


@dataclass(frozen=True)
class FoundBlocks:
    """Blocks by place, done or to be done, and the rows of the committed shards there by block."""

    blocks: dict[Place, list[Block]]
    keys: dict[str, frozenset[str]]


def find_blocks(
    root: Path,
    rows: pd.DataFrame,
    places: Sequence[Place],
    *,
    fingerprint: str,
    rows_per_shard: int,
    dry_run: bool,
) -> FoundBlocks:
    """List the blocks of rows at some places; see `StoreWriter.blocks`."""
    places = list(dict.fromkeys((canonical_sigma(sigma), draw) for sigma, draw in places))
    # Rows of one prompt come together, prompts in the order of their first row.
    ordered = rows.assign(_prompt=pd.factorize(rows["prompt"])[0]).sort_values("_prompt", kind="stable")
    position = {row: i for i, row in reversed(list(enumerate(ordered["row_id"])))}
    keys: dict[str, frozenset[str]] = {}
    states: dict[Place, dict[RowIds, str]] = {}
    with nullcontext() if dry_run else locked(root / "plans" / "all"):  # else rows are cut in two ways
        shards, _ = scan(root, fingerprint=fingerprint)
        earlier = _Earlier(root, shards)
        for place in places:
            missing, found = dict.fromkeys(position), states.setdefault(place, {})
            for shard in shards:
                if _place(shard) == place:
                    row_ids = tuple(shard.row_ids())
                    keys[shard.sidecar.block] = frozenset(row_ids)
                    if any(row in position for row in row_ids):
                        found[row_ids] = "done"
                        for row in row_ids:
                            missing.pop(row, None)
            for row_ids in earlier.blocks() if missing else ():
                if len(row_ids) <= rows_per_shard and all(row in missing for row in row_ids):
                    found[row_ids] = "new"
                    for row in row_ids:
                        del missing[row]
            prompts: dict[int, list[str]] = {}
            for row, prompt in zip(ordered["row_id"], ordered["_prompt"], strict=True):
                if row in missing:  # a row that is given twice is stored once
                    del missing[row]
                    prompts.setdefault(prompt, []).append(row)
            new = [tuple(ids) for ids in _pack(list(prompts.values()), rows_per_shard)]
            if new:
                earlier.add(new, write=not dry_run)
            found |= dict.fromkeys(new, "new")
    first = {ids: min(position.get(row, len(position)) for row in ids) for found in states.values() for ids in found}
    blocks = {
        (sigma, draw): [
            Block(name := fmt.block_name(ids), ids, number, _state(root, fingerprint, name, state, sigma, draw))
            for number, (ids, state) in enumerate(sorted(found.items(), key=lambda item: first[item[0]]))
        ]
        for (sigma, draw), found in states.items()
    }
    _refuse_damaged(root, shards, blocks, fingerprint)
    return FoundBlocks(blocks, keys)


class _Earlier:
    """Blocks that were cut before: those of committed shards at any place, and those of plans."""

    def __init__(self, root: Path, shards: list[Shard]) -> None:
        self._root = root
        self._shards = {shard.sidecar.block: shard for shard in shards}
        self._stored: list[RowIds] | None = None  # read when they are first needed
        self._plans: dict[str, list[RowIds]] = {}

    def blocks(self) -> Iterator[RowIds]:
        """Yield the rows of each, in an order that a later command finds again."""
        if self._stored is None:
            self._stored = [tuple(shard.row_ids()) for shard in self._shards.values()]
            self._plans |= {path.stem: list(map(tuple, read_plan(path))) for path in plan_files(self._root)}
        yield from self._stored
        for name in sorted(self._plans):
            yield from self._plans[name]

    def add(self, blocks: list[RowIds], *, write: bool) -> None:
        """Keep blocks that are cut anew, also for further places."""
        content = [list(row_ids) for row_ids in blocks]
        self._plans[fmt.plan_name(content)] = blocks
        path = self._root / "plans" / f"{fmt.plan_name(content)}.json"
        head = {"format": fmt.FORMAT, "format_version": fmt.FORMAT_VERSION}
        if write and not path.exists():  # named by its content: whoever is first writes the same bytes
            write_atomically(path, fmt.seal(head | {"blocks": content}))


def _refuse_damaged(root: Path, shards: list[Shard], blocks: Mapping[Place, Sequence[Block]], fingerprint: str) -> None:
    """Refuse a damaged shard of another block at one of the places; warn of those at other places."""
    known = {shard.path for shard in shards}
    known |= {shard_path(root, *place, block.name) for place, found in blocks.items() for block in found}
    elsewhere = []
    for path, sigma, draw in shard_files(root, []):
        if path in known or is_locked(path):
            continue
        found = check_shard(path, fingerprint=fingerprint, sigma=sigma, draw=draw)
        if isinstance(found, str):
            if (sigma, draw) in blocks:
                msg = (
                    f"{found}; its rows are not asked for, or cut into other blocks, so it would not be done "
                    f"again: run probekit verify {shlex.quote(str(root))} --repair first"
                )
                raise StoreError(msg)
            elsewhere.append(found)
    if elsewhere:
        more = f" (and {len(elsewhere) - 1} more)" if len(elsewhere) > 1 else ""
        text = "%s%s; this command does not ask for its noise level and draw, and leaves it so: %s"
        logger.warning(text, elsewhere[0], more, MEND_SHARD)


def _state(root: Path, fingerprint: str, block: str, state: str, sigma: str, draw: int) -> str:
    if state == "done":
        return state
    found = check_shard(shard_path(root, sigma, draw, block), fingerprint=fingerprint, sigma=sigma, draw=draw)
    return found if isinstance(found, str) else state


def _place(shard: Shard) -> Place:
    return shard.sidecar.sigma, shard.sidecar.draw


def _pack(prompts: list[list[str]], size: int) -> list[list[str]]:
    """Fill blocks with whole prompts in order; a prompt larger than a block spills over several."""
    blocks: list[list[str]] = []
    for row_ids in prompts:
        if blocks and len(blocks[-1]) + len(row_ids) <= size:
            blocks[-1] += row_ids
        else:
            blocks += [row_ids[i : i + size] for i in range(0, len(row_ids), size)]
    return blocks
