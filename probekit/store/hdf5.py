"""Write one HDF5 file of a shard: contiguous, unfiltered, little-endian datasets, and where each of them lies.

m = rows of the shard, d = channels of a feature vector.
"""

import hashlib
import importlib.metadata
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit.store import format as fmt
from probekit.store.files import reserve
from probekit.store.half import convert

_OVERHEAD_BYTES = 2**13  # of a dataset: its header, attributes and links
_PIECE_BYTES = 2**21  # converted and written at once


def write_hdf5(
    path: Path,
    descriptor: int,
    *,
    rows: pd.DataFrame,
    features: Mapping[tuple[str, int], NDArray[np.float32]],
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
    attributes: Mapping[str, Any],
    accept: Callable[[NDArray[np.uint8]], None] | None = None,
) -> dict[str, Any]:
    """Fill an HDF5 file with the rows and features (m, d) of a shard; d may differ between poolings.

    Parameters
    ----------
    path, descriptor
        The file, open.
    identity
        Members of the sidecar that say which shard it is; attributes of the file as well.
    attributes
        Further attributes of the file.
    accept
        Called with the status (m,) of the rows first; what it raises is passed on.

    Returns
    -------
    dict
        The sidecar, but for the size and digests of the file.

    Raises
    ------
    OSError
        If the file cannot be written, as on a full disk.
    """
    prompt_index, prompts = pd.factorize(rows["prompt"])
    given = rows["status"].to_numpy(np.uint8)
    readable = given == fmt.STATUS_OK
    records: dict[str, dict[str, Any]] = {}
    writeback = ThreadPoolExecutor(1)  # sends to the disk what is written, so that little is left for the last sync
    try:
        finite = {key: _finite_rows(values) for key, values in features.items()}
        ok = readable & np.logical_and.reduce(list(finite.values()))
        status = np.where(readable & ~ok, np.uint8(fmt.STATUS_NON_FINITE), given)
        if accept is not None:
            accept(status)
        tables = _tables(rows, status, prompt_index, prompts.tolist())
        needed = sum(array.nbytes + _OVERHEAD_BYTES for array in chain(tables.values(), features.values()))
        needed += len(fmt.canonical_json(dict(attributes)).encode()) + _OVERHEAD_BYTES
        reserve(descriptor, needed)
        synced = writeback.submit(os.fdatasync, descriptor)
        # Locking is ours: the temporary file is held under flock, and network file systems refuse HDF5's.
        with h5py.File(path, "w", libver=("v110", "v110"), locking=False) as file:
            reserve(descriptor, needed)  # again: HDF5 began by emptying the file
            _set_attributes(file, {**identity, **attributes})
            for name, table in tables.items():
                dtype, all_rows = fmt.TABLES[name][0], np.ones(len(table), bool)
                records[name] = _write_dataset(file, name, table, all_rows, dtype)
            for key, layer in _ordered(config).items():
                name = fmt.dataset_name(*key)
                dtype, figures = fmt.choose_dtype(features[key], ok, prompt_index)
                written = _write_dataset(file, name, features[key], ok, dtype)
                recorded = figures._asdict() | {"nonfinite_rows": int((readable & ~finite[key]).sum())}
                described = {
                    "layer_index": layer["index"],
                    "layer_name": layer["name"],
                    "stream": layer["stream"],
                    "pooling": key[0],
                    "pooling_definition": config["poolings"][key[0]],
                    "units": "as the backbone computes them",
                } | {figure: value for figure, value in recorded.items() if value is not None}
                _set_attributes(file[name], described)
                records[name] = recorded | written
                if synced.done():
                    synced.result()
                    synced = writeback.submit(os.fdatasync, descriptor)
            sidecar = {
                **identity,
                "n_rows": len(rows),
                "n_prompts": len(prompts),
                "rows_sha256": hashlib.sha256(bytes.fromhex("".join(rows["row_id"]))).hexdigest(),
                "datasets": records,
            }
            _set_attributes(file, {fmt.RECORD: fmt.record_digest(sidecar)})
            file.flush()
            size = file.id.get_filesize()
            synced.result()
        os.ftruncate(descriptor, size)  # what was reserved and not used
    finally:
        writeback.shutdown(cancel_futures=True)
    return sidecar


def _ordered(config: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return (pooling, layer) -> layer of the configuration in the order of the file: by layer, then by pooling."""
    kept = fmt.feature_keys(config)
    keys = [((pooling, layer["index"]), layer) for layer in config["layers"] for pooling in config["poolings"]]
    return {key: layer for key, layer in keys if key in kept}


def _finite_rows(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which rows hold no NaN or infinity, bool (m,)."""
    if np.isfinite(values.max(initial=0)) and np.isfinite(values.min(initial=0)):
        return np.ones(len(values), bool)
    rows: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(values), axis=1)
    return rows


def provenance() -> dict[str, str]:
    """Versions of the programs that make a store."""
    found = {"writer": writer_name(), "hdf5": h5py.version.hdf5_version}
    for name in ("numpy", "h5py", "torch", "diffusers", "transformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@cache
def writer_name() -> str:
    """Name and version of this program, for the provenance of files."""
    try:
        return f"probekit {importlib.metadata.version('dit-probekit')}"
    except importlib.metadata.PackageNotFoundError:
        return "probekit (not installed)"


def _tables(
    rows: pd.DataFrame, status: NDArray[np.uint8], prompt_index: NDArray[np.int64], prompts: list[str]
) -> dict[str, NDArray[Any]]:
    """Build the rows and prompts tables; texts are bytes and offsets, so no variable-length type is needed."""
    image_ids, image_offsets = _texts(rows["image_id"].tolist())
    texts, text_offsets = _texts(prompts)
    return {
        "rows/row_id": _digests(bytes.fromhex("".join(rows["row_id"]))),
        "rows/image_sha256": _digests(b"".join(rows["image_sha256"])),
        "rows/prompt_index": prompt_index,
        "rows/image_id_utf8": image_ids,
        "rows/image_id_offsets": image_offsets,
        "rows/width": rows["width"].to_numpy(),
        "rows/height": rows["height"].to_numpy(),
        "rows/file_bytes": rows["file_bytes"].to_numpy(),
        "rows/status": status,
        "prompts/text_utf8": texts,
        "prompts/text_offsets": text_offsets,
        "prompts/sha256": _digests(b"".join(hashlib.sha256(text.encode()).digest() for text in prompts)),
    }


def _digests(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).reshape(-1, 32)


def _texts(texts: list[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *(len(text) for text in encoded)], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def _set_attributes(node: h5py.Group | h5py.Dataset, attributes: Mapping[str, Any]) -> None:
    """Set attributes that are not there yet, by h5py's low level: a shard has hundreds, and `node.attrs` takes longer.

    Texts have a fixed length; `node.attrs` would make them variable-length strings.
    """
    space = h5py.h5s.create(h5py.h5s.SCALAR)
    for key, value in attributes.items():
        if isinstance(value, str):
            text = value.encode()
            data = np.array(text, f"S{max(1, len(text))}")
            kind = h5py.h5t.py_create(h5py.string_dtype("utf-8", data.dtype.itemsize), logical=True)
        else:
            data = np.array(value)
            kind = h5py.h5t.py_create(data.dtype, logical=True)
        h5py.h5a.create(node.id, key.encode(), kind, space).write(data, kind)


def _write_dataset(
    file: h5py.File, name: str, values: NDArray[Any], ok: NDArray[np.bool_], dtype: str
) -> dict[str, Any]:
    """Write one contiguous dataset, NaN where a row is not ok; return what the sidecar says of its bytes."""
    dataset = file.create_dataset(name, values.shape, dtype)
    crc32 = 0
    for start, piece in _pieces(values, ok, dtype):
        dataset[start : start + len(piece)] = piece
        crc32 = zlib.crc32(piece.reshape(-1).view(np.uint8).data, crc32)
    return {
        "dtype": dtype,
        "shape": list(values.shape),
        "offset": dataset.id.get_offset(),
        "nbytes": math.prod(values.shape) * np.dtype(dtype).itemsize,
        "crc32": crc32,
    }


def _pieces(values: NDArray[Any], ok: NDArray[np.bool_], dtype: str) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (first row, rows as they are stored): a few at a time, so that no second copy of a dataset is made."""
    step = max(1, _PIECE_BYTES // (8 * max(1, math.prod(values.shape[1:]))))
    for start in range(0, len(values), step):
        piece, counts = values[start : start + step], ok[start : start + step]
        if not counts.all():
            piece = np.where(counts[:, None], piece, np.float32(np.nan))
        piece = np.ascontiguousarray(piece, None if dtype == "<f2" else dtype)
        if dtype == "<f2":
            half = np.empty(piece.shape, dtype)
            convert(piece.reshape(-1), half.reshape(-1))
            piece = half
        yield start, piece
