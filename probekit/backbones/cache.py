"""A cache of prompt embeddings and VAE latents, keyed by content: in memory, and on disk when a folder is given.

Keys are digests of everything that the value depends on (component weights, settings, rules, content), so one folder
may be shared by dumps of different backbones. An item is one safetensors file that appears complete or not at all.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from probekit.errors import BackboneError, ConfigError

Item = dict[str, torch.Tensor]


def content_key(parts: dict[str, Any]) -> str:
    """Return the SHA-256 of `parts` as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """Named tensors by content key: in files where there is a folder, else in memory until `forget`.

    Parameters
    ----------
    folder
        Where items are kept between processes; None = in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is not None and folder.exists() and not folder.is_dir():
            msg = f"{folder}: is a file; allowed as a cache: a folder, made where there is none"
            raise ConfigError(msg)
        self.folder = folder
        self._items: dict[tuple[str, str], Item] = {}

    def has(self, kind: str, key: str) -> bool:
        """Whether an item is held; `kind` is the sub-folder."""
        if self.folder is None:
            return (kind, key) in self._items
        return self._path(self.folder, kind, key).is_file()

    def get(self, kind: str, key: str) -> Item:
        """Return an item that is held."""
        if self.folder is None:
            return self._items[kind, key]
        path = self._path(self.folder, kind, key)
        try:
            return load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            msg = f"{path}: damaged cache file ({_first_line(error)}); delete it or the whole cache, then go on"
            raise BackboneError(msg) from error

    def put(self, kind: str, key: str, item: Item) -> None:
        """Keep an item."""
        if self.folder is None:
            self._items[kind, key] = item
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

    def forget(self, kind: str, but: Collection[str] = ()) -> None:
        """Drop the items of a kind from memory, except those of some keys; files stay."""
        self._items = {name: item for name, item in self._items.items() if name[0] != kind or name[1] in but}

    def bytes_held(self, kind: str) -> int:
        """Return the bytes of the items of a kind in memory."""
        return sum(tensor.nbytes for (of, _), item in self._items.items() if of == kind for tensor in item.values())

    @staticmethod
    def _path(folder: Path, kind: str, key: str) -> Path:
        return folder / kind / key[:2] / f"{key}.safetensors"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
