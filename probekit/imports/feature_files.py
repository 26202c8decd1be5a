"""Readers of feature files: npz, safetensors and Parquet, never pickle, a bounded part at a time.

m = vectors of a layer, d = channels of a layer, b = vectors of a part.
"""

import hashlib
import json
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow.parquet import ParquetFile
from safetensors import SafetensorError, safe_open

from probekit.errors import FeatureFileError

CHUNK_BYTES = 16 * 2**20
KEYS = ("image", "prompt")
ONLY_LAYER = "features"  # what the layer of a Parquet file without a layer column is called
_SAFETENSORS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
_DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, SafetensorError, pa.ArrowException)


@dataclass(frozen=True)
class Part:
    """Vectors of one layer.

    Attributes
    ----------
    layer
        Its name.
    images, prompts
        Key of each vector (b); no prompts where the features hold for every prompt of an image.
    values
        Features (b, d).
    """

    layer: str
    images: Sequence[str]
    prompts: Sequence[str] | None
    values: NDArray[np.float32]


class FeatureFile(ABC):
    """A file of features, opened for reading.

    Attributes
    ----------
    path
        The file.
    layers
        Name of each layer -> its channels, in the order of the file.
    dtypes
        Types of the stored numbers.
    n_vectors
        Vectors of all layers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.layers: dict[str, int] = {}
        self.dtypes: set[str] = set()
        self.n_vectors = 0

    @property
    @abstractmethod
    def has_prompts(self) -> bool:
        """Whether the key of a vector names a prompt."""

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """Yield all vectors in the order of the file."""


def open_features(path: Path) -> FeatureFile:
    """Look into a feature file: keys and layers, no vectors yet.

    Raises
    ------
    FeatureFileError
        If it cannot be read as what its name says, or lacks what the form needs.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        msg = f"{path}: ends in {suffix!r}; allowed: {', '.join(_READERS)}"
        raise FeatureFileError(msg)
    with _readable(path):
        return _READERS[suffix](path)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of the bytes of a file."""
    with _readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        msg = f"{path}: cannot be read ({reason}); allowed: a file as numpy, safetensors or pyarrow write it"
        raise FeatureFileError(msg) from None


def _fail(path: Path, what: str) -> NoReturn:
    msg = f"{path}: {what}"
    raise FeatureFileError(msg)


def _as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is counted as not finite
        return values.astype(np.float32)


class _Arrays(FeatureFile):
    """What npz and safetensors share: an array (m, d) for each layer, and texts (m) that are the keys of its rows."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.images: list[str] = []
        self.prompts: list[str] | None = None

    @property
    def has_prompts(self) -> bool:
        return self.prompts is not None

    def _set_keys(self, keys: dict[str, list[str]], *, form: str) -> None:
        if "image" not in keys:
            _fail(self.path, f"names no images; needed: {form}")
        self.images, self.prompts = keys["image"], keys.get("prompt")
        if self.prompts is not None and len(self.prompts) != len(self.images):
            _fail(self.path, f"has {len(self.prompts)} prompts for {len(self.images)} images; allowed: as many")

    def _add_layer(self, name: str, shape: tuple[int, ...], dtype: str, *, allowed: Sequence[str]) -> None:
        if dtype not in allowed:
            _fail(self.path, f"layer {name!r} is of type {dtype}; allowed: {', '.join(allowed)}")
        if len(shape) != 2 or shape[0] != len(self.images) or not shape[1]:
            _fail(self.path, f"layer {name!r} has shape {shape}; allowed: ({len(self.images)}, channels)")
        self.layers[name] = shape[1]
        self.dtypes.add(dtype)
        self.n_vectors += shape[0]

    def _part(self, layer: str, start: int, values: NDArray[np.float32]) -> Part:
        rows = slice(start, start + len(values))
        return Part(layer, self.images[rows], None if self.prompts is None else self.prompts[rows], values)


class _Npz(_Arrays):
    """Arrays of ``np.savez``: ``image`` (m,), perhaps ``prompt`` (m,), and (m, d) for each layer."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with zipfile.ZipFile(path) as members:
            held = [name.removesuffix(".npy") for name in members.namelist() if name.endswith(".npy")]
            names = [name for name in held if name not in KEYS]
            texts = {}
            for name in [name for name in KEYS if name in held]:
                with members.open(f"{name}.npy") as stream:
                    array = texts[name] = np.lib.format.read_array(stream, allow_pickle=False)
                if array.dtype.kind != "U" or array.ndim != 1:
                    _fail(path, f"array {name!r} is {array.ndim}-d of type {array.dtype}; allowed: 1-d texts (<U...)")
            self._set_keys({name: array.tolist() for name, array in texts.items()}, form="an array 'image' of texts")
            for name in names:
                with members.open(f"{name}.npy") as stream:
                    shape, fortran, dtype = _npy_header(stream)
                self._add_layer(name, shape, dtype.name, allowed=("float16", "float32", "float64"))
                if fortran and 1 not in shape:
                    _fail(path, f"layer {name!r} is stored column by column; allowed: np.ascontiguousarray of it")

    def parts(self) -> Iterator[Part]:
        with _readable(self.path), zipfile.ZipFile(self.path) as members:
            for name, width in self.layers.items():
                with members.open(f"{name}.npy") as stream:
                    dtype = _npy_header(stream)[2]
                    rows = max(1, CHUNK_BYTES // (width * dtype.itemsize))
                    for start in range(0, len(self.images), rows):
                        count = min(rows, len(self.images) - start)
                        data = stream.read(count * width * dtype.itemsize)
                        yield self._part(name, start, _as_float32(np.frombuffer(data, dtype).reshape(count, width)))


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


class _Safetensors(_Arrays):
    """A tensor (m, d) for each layer; ``image`` and perhaps ``prompt`` are JSON lists (m) in the metadata."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            keys = {name: self._texts(name, metadata[name]) for name in KEYS if name in metadata}
            self._set_keys(keys, form="metadata 'image', a JSON list of texts")
            for name in file.offset_keys():  # in the order of the file
                tensor = file.get_slice(name)
                self._add_layer(name, tuple(tensor.get_shape()), tensor.get_dtype(), allowed=tuple(_SAFETENSORS))

    def _texts(self, name: str, text: str) -> list[str]:
        try:
            texts = json.loads(text)
        except (ValueError, RecursionError):
            texts = None
        if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            _fail(self.path, f"metadata {name!r} is {text[:40]!r}; allowed: a JSON list of texts")
        return texts

    def parts(self) -> Iterator[Part]:
        # safetensors checked the header; numpy has no bfloat16, so the numbers are read here.
        with _readable(self.path), self.path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
            for name, width in self.layers.items():
                kind = header[name]["dtype"]
                dtype = np.dtype(_SAFETENSORS[kind])
                stream.seek(8 + length + header[name]["data_offsets"][0])
                rows = max(1, CHUNK_BYTES // (width * dtype.itemsize))
                for start in range(0, len(self.images), rows):
                    count = min(rows, len(self.images) - start)
                    raw = np.frombuffer(stream.read(count * width * dtype.itemsize), dtype).reshape(count, width)
                    # bfloat16 is the upper half of float32
                    exact = (raw.astype("<u4") << 16).view("<f4") if kind == "BF16" else raw
                    yield self._part(name, start, _as_float32(exact))


class _Parquet(FeatureFile):
    """A long table: ``image``, perhaps ``prompt`` and ``layer``, and ``vector``, a list of numbers."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._open() as file:
            schema, self.n_vectors = file.schema_arrow, file.metadata.num_rows
            names = schema.names
            for name in ("image", "vector"):
                if name not in names:
                    found = ", ".join(names)
                    _fail(
                        path, f"no column {name!r} (found: {found}); needed: image, vector, and perhaps prompt, layer"
                    )
            self._has_prompts, self._has_layers = "prompt" in names, "layer" in names
            for name in [name for name in (*KEYS, "layer") if name in names]:
                kind = schema.field(name).type
                plain = kind.value_type if pa.types.is_dictionary(kind) else kind
                if not (_is_text(plain) or (name == "layer" and pa.types.is_integer(plain))):
                    _fail(path, f"column {name!r} is of type {kind}; allowed: texts")
            kind = schema.field("vector").type
            if not _is_list(kind) or not pa.types.is_floating(kind.value_type):
                _fail(path, f"column 'vector' is of type {kind}; allowed: lists of float16, float32 or float64")
            self.dtypes = {str(np.dtype(kind.value_type.to_pandas_dtype()))}
            self._find_layers(file)

    @property
    def has_prompts(self) -> bool:
        return self._has_prompts

    def _open(self) -> ParquetFile:
        # pyarrow's default fetches all row groups beforehand, and keeps them
        return ParquetFile(self.path, buffer_size=CHUNK_BYTES, pre_buffer=False)

    def _find_layers(self, file: ParquetFile) -> None:
        """Names and channels of the layers, from the first vector of each; other vectors are not read."""
        for group in range(file.num_row_groups):
            if self._has_layers:
                new = set(self._texts(file.read_row_group(group, columns=["layer"])["layer"], "layer", 0))
            else:
                new = {ONLY_LAYER}
            new -= self.layers.keys()
            columns = ["layer"] * self._has_layers + ["vector"]
            batches = file.iter_batches(batch_size=256, row_groups=[group], columns=columns)
            while new:
                batch = next(batches)
                names = self._texts(batch["layer"], "layer", 0) if self._has_layers else [ONLY_LAYER] * len(batch)
                lengths = pc.list_value_length(batch["vector"]).to_pylist()
                for name, length in zip(names, lengths, strict=True):
                    if name in new:
                        if not length:
                            _fail(self.path, f"layer {name!r} begins with a vector without numbers")
                        self.layers[name] = length
                        new.remove(name)

    def _texts(self, column: Any, name: str, before: int) -> list[str]:
        texts: list[str] = column.cast(pa.string()).to_pylist()
        if column.null_count:
            _fail(self.path, f"row {before + texts.index(None) + 1}: {name} is missing")  # type: ignore[arg-type]
        return texts

    def parts(self) -> Iterator[Part]:
        columns = [*KEYS[: 1 + self.has_prompts], *["layer"] * self._has_layers, "vector"]
        size = min(16384, max(1, CHUNK_BYTES // (4 * max(self.layers.values(), default=1))))
        before = 0
        with _readable(self.path), self._open() as file:
            for batch in file.iter_batches(batch_size=size, columns=columns):
                yield from self._split(batch, before)
                before += len(batch)

    def _split(self, batch: Any, before: int) -> Iterator[Part]:
        """Cut one batch by layer."""
        images = np.array(self._texts(batch["image"], "image", before), object)
        prompts = np.array(self._texts(batch["prompt"], "prompt", before), object) if self.has_prompts else None
        names = self._texts(batch["layer"], "layer", before) if self._has_layers else [ONLY_LAYER] * len(batch)
        if batch["vector"].null_count:
            first = batch["vector"].is_null().to_pylist().index(True)
            _fail(self.path, f"row {before + first + 1}: vector is missing")
        lengths = pc.list_value_length(batch["vector"]).to_numpy()
        starts = np.cumsum(lengths) - lengths
        numbers = batch["vector"].flatten().to_numpy(zero_copy_only=False)
        of = np.array(names, object)
        for name in dict.fromkeys(names):
            rows = np.flatnonzero(of == name)
            width = self.layers[name]
            for row in rows[lengths[rows] != width][:1]:
                what = f"the vector of {images[row]!r} has {lengths[row]} numbers; the first of layer {name!r} {width}"
                _fail(self.path, f"row {before + row + 1}: {what}")
            values = numbers[starts[rows][:, None] + np.arange(width)]
            told = None if prompts is None else prompts[rows].tolist()
            yield Part(name, images[rows].tolist(), told, _as_float32(values))


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


_READERS: dict[str, Callable[[Path], FeatureFile]] = {
    ".npz": _Npz,
    ".safetensors": _Safetensors,
    ".parquet": _Parquet,
}
