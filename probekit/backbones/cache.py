"""A cache of prompt embeddings and VAE latents, keyed by content: in memory, and on disk when a folder is given.

Keys are digests of everything that the value depends on (component weights, settings, rules, content), so one folder
may be shared by dumps of different backbones. An item is one safetensors file that appears complete or not at all.
"""

import hashlib
import json
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from probekit.errors import BackboneError, ConfigError

Item = dict[str, torch.Tensor]

MEMORY_BYTES = 1 << 30


def content_key(parts: dict[str, Any]) -> str:
    """Return the SHA-256 of `parts` as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """Named tensors by content key; the least recently used ones leave memory first.

    Parameters
    ----------
    folder
        Where items are kept between processes; None = in memory only.
    memory_bytes
        Bound on the tensors kept in memory.
    """

    def __init__(self, folder: Path | None, memory_bytes: int = MEMORY_BYTES) -> None:
        if folder is not None and folder.exists() and not folder.is_dir():
            msg = f"{folder}: is a file; allowed as a cache: a folder, made where there is none"
            raise ConfigError(msg)
        self.folder = folder
        self._memory_bytes = memory_bytes
        self._held = 0
        self._items: OrderedDict[str, Item] = OrderedDict()

    def through(
        self, kind: str, keys: Sequence[str], compute: Callable[[list[int]], list[Item]], batch: int
    ) -> list[Item]:
        """Return the items of `keys`, computing those that are missing.

        Parameters
        ----------
        kind
            Sub-folder of the cache.
        keys
            Content keys of the wanted items.
        compute
            Returns the items at the given positions.
        batch
            `compute` gets runs of this many consecutive positions, whole ones even if only one item of a run is
            missing: what is cached already must not decide with which neighbours an item is computed.

        Returns
        -------
        list
            One item for each key.
        """
        found = [self._get(kind, key) for key in keys]
        for start in range(0, len(keys), batch):
            positions = list(range(start, min(start + batch, len(keys))))
            if all(found[position] is not None for position in positions):
                continue
            for position, item in zip(positions, compute(positions), strict=True):
                if found[position] is None:
                    found[position] = item
                    self._put(kind, keys[position], item)
        return [item for item in found if item is not None]

    def _get(self, kind: str, key: str) -> Item | None:
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key]
        if self.folder is None:
            return None
        path = self._path(self.folder, kind, key)
        try:
            item = load(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            msg = f"{path}: damaged cache file ({_first_line(error)}); delete it or the whole cache, then go on"
            raise BackboneError(msg) from error
        self._remember(key, item)
        return item

    def _put(self, kind: str, key: str, item: Item) -> None:
        self._remember(key, item)
        if self.folder is None:
            return
        path = self._path(self.folder, kind, key)
        temporary = path.with_name(f".{key}-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(save(item))
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            msg = f"{path}: cannot write to the cache ({error.strerror}); choose another --cache or make space"
            raise BackboneError(msg) from error

    def _remember(self, key: str, item: Item) -> None:
        if key in self._items:
            return
        self._items[key] = item
        self._held += _bytes(item)
        while self._held > self._memory_bytes:
            self._held -= _bytes(self._items.popitem(last=False)[1])

    @staticmethod
    def _path(folder: Path, kind: str, key: str) -> Path:
        return folder / kind / key[:2] / f"{key}.safetensors"


def _bytes(item: Item) -> int:
    return sum(tensor.nbytes for tensor in item.values())


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
