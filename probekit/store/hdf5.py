"""Write one HDF5 file of a shard: contiguous, unfiltered, little-endian datasets, and where each of them lies.

m = rows of the shard, d = channels of a feature vector.
"""

import hashlib
import importlib.metadata
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit.store import format as fmt


def write_hdf5(
    path: Path,
    *,
    rows: pd.DataFrame,
    features: Mapping[tuple[str, int], NDArray[np.float32]],
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> dict[str, Any]:
    """Fill an HDF5 file with the rows and features (m, d) of a shard; d may differ between poolings.

    Parameters
    ----------
    identity
        Members of the sidecar that say which shard it is; attributes of the file as well.
    attributes
        Further attributes of the file.

    Returns
    -------
    dict
        The sidecar, but for the size and digests of the file.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    prompt_index, prompts = pd.factorize(rows["prompt"])
    finite = {key: np.isfinite(values).all(axis=1) for key, values in features.items()}
    given = rows["status"].to_numpy(np.uint8)
    readable = given == fmt.STATUS_OK
    ok = readable & np.logical_and.reduce(list(finite.values()))
    status = np.where(readable & ~ok, fmt.STATUS_NON_FINITE, given)
    records: dict[str, dict[str, Any]] = {}
    # Locking is ours: the temporary file is held under flock, and network file systems refuse HDF5's.
    with h5py.File(path, "w", libver=("v110", "v110"), locking=False) as file:
        _set_attributes(file, {**identity, **attributes})
        for name, table in _tables(rows, status, prompt_index, prompts.tolist()).items():
            records[name] = _write_dataset(file, name, table, fmt.TABLES[name][0], {})
        kept = fmt.feature_keys(config)
        for layer in config["layers"]:
            for pooling, definition in config["poolings"].items():
                key, name = (pooling, layer["index"]), fmt.dataset_name(pooling, layer["index"])
                if key not in kept:
                    continue
                values = features[key]
                if not ok.all():
                    values = np.where(ok[:, None], values, np.float32(np.nan))
                dtype, figures = fmt.choose_dtype(values, ok, prompt_index)
                recorded = figures._asdict() | {"nonfinite_rows": int((readable & ~finite[key]).sum())}
                described = {
                    "layer_index": layer["index"],
                    "layer_name": layer["name"],
                    "stream": layer["stream"],
                    "pooling": pooling,
                    "pooling_definition": definition,
                    "units": "as the backbone computes them",
                } | {key: value for key, value in recorded.items() if value is not None}
                records[name] = recorded | _write_dataset(file, name, values, dtype, described)
        sidecar = {
            **identity,
            "n_rows": len(rows),
            "n_prompts": len(prompts),
            "rows_sha256": hashlib.sha256(bytes.fromhex("".join(rows["row_id"]))).hexdigest(),
            "datasets": records,
        }
        _set_attributes(file, {fmt.RECORD: fmt.record_digest(sidecar)})
    return sidecar


def provenance() -> dict[str, str]:
    """Versions of the programs that make a store."""
    found = {"writer": writer_name(), "hdf5": h5py.version.hdf5_version}
    for name in ("numpy", "h5py", "torch", "diffusers", "transformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


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
    for key, value in attributes.items():
        if isinstance(value, str):  # fixed length: h5py would make it a variable-length string
            data = value.encode()
            node.attrs.create(key, np.bytes_(data), dtype=h5py.string_dtype("utf-8", max(1, len(data))))
        else:
            node.attrs[key] = value


def _write_dataset(
    file: h5py.File, name: str, values: NDArray[Any], dtype: str, attributes: Mapping[str, Any]
) -> dict[str, Any]:
    """Write one contiguous dataset; return dtype, shape, offset, bytes and checksum for the sidecar."""
    data = np.ascontiguousarray(values, dtype=dtype)
    dataset = file.create_dataset(name, data=data)
    _set_attributes(dataset, attributes)
    return {
        "dtype": dtype,
        "shape": list(data.shape),
        "offset": dataset.id.get_offset(),
        "nbytes": data.nbytes,
        "crc32": zlib.crc32(data.reshape(-1).view(np.uint8).data),
    }
