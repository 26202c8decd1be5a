"""Give features and pairs to other tools: Parquet with a column for each layer, or safetensors with a file for each.

::

    export.json                                        store, layers, what was selected
    features/sigma-0.005/draw-0/mean.parquet           rows, and layer_000, layer_001, ... as lists of d numbers
    features/sigma-0.005/draw-0/mean/layer_003.safetensors, rows.parquet     instead, for safetensors
    pairs/<judgements>.parquet                         pairs, index_a and index_b being places of rows

Row i is the same row in all files. m = rows of the store, d = channels of a feature vector.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from probekit._types import Progress, canonical_sigma
from probekit.errors import StoreError
from probekit.store import format as fmt
from probekit.store.files import (
    LOCK,
    TEMP,
    check_space,
    publish,
    read_small,
    remove_dead_files,
    temporary,
    write_atomically,
)
from probekit.store.reader import FeatureStore
from probekit.store.settings import refusal

FORMAT = "probekit-export/1"
To = Literal["parquet", "safetensors"]


@dataclass
class Export:
    """What `export_store` wrote.

    Attributes
    ----------
    path
        Folder of the export.
    written, kept
        Files, relative to the folder: those written now, and those of an earlier call that are still right.
    left_out
        Judgements -> pairs that are not exported, by reason; see `probekit.store.Pairs.excluded`.
    """

    path: Path
    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum((self.path / name).stat().st_size for name in self.written + self.kept)


class _Part(NamedTuple):
    """Features that belong together: one noise level, draw and pooling."""

    sigma: str
    draw: int
    pooling: str
    layers: list[int]

    @property
    def place(self) -> str:
        return f"features/sigma-{self.sigma}/draw-{self.draw}/{self.pooling}"


def export_store(
    store: FeatureStore,
    out: str | Path,
    *,
    to: To,
    layers: Sequence[int] | None = None,
    sigmas: Sequence[str] | None = None,
    poolings: Sequence[str] | None = None,
    draws: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write features, rows and pairs for tools that do not read feature stores.

    A folder holds one export of one store. Called again with the same selection it continues: files of the same rows
    and features are kept, the others are replaced.

    Parameters
    ----------
    out
        New or empty folder, or an export of the same store and selection.
    to
        ``parquet``: one file for each noise level, draw and pooling, with a column of lists for each layer; memory is
        bounded. ``safetensors``: one file for each layer, with one tensor (m, d); memory holds one layer.
    layers, sigmas, poolings, draws
        What is exported; all if left out.
    progress
        Called as ``progress(done, total, text)``.

    Raises
    ------
    StoreError
        If the store lacks what is selected, or some rows lack features there, a shard is damaged, or the folder holds
        something else or cannot be written.
    """
    path = Path(out).absolute()
    asked: dict[str, list[Any] | None] = {
        "layers": None if layers is None else sorted(set(layers)),
        "sigmas": None if sigmas is None else sorted({canonical_sigma(sigma) for sigma in sigmas}),
        "poolings": None if poolings is None else sorted(set(poolings)),
        "draws": None if draws is None else sorted(set(draws)),
    }
    parts = _parts(store, **asked)
    _claim(path, store, {"format": FORMAT, "to": to, "fingerprint": store.fingerprint, "selection": asked})
    made, rows = Export(path), store.rows
    table = pa.Table.from_pandas(rows, preserve_index=False).replace_schema_metadata(None)
    identity = hashlib.sha256(pd.util.hash_pandas_object(rows, index=False).to_numpy().tobytes()).hexdigest()
    done, total = 0, len(rows) * sum(1 if to == "parquet" else len(part.layers) for part in parts)
    for part in parts:
        for layers_together in [part.layers] if to == "parquet" else [[layer] for layer in part.layers]:
            name = f"{part.place}.parquet" if to == "parquet" else f"{part.place}/{_column(layers_together[0])}.{to}"
            facts = part._asdict() | {
                "layers": layers_together,
                "fingerprint": store.fingerprint,
                "source": _source(store, part, identity),
            }
            if _facts(path / name, to) == facts:
                made.kept.append(name)
                done += len(rows)
                continue
            batches = store.batches(layers=layers_together, sigma=part.sigma, pooling=part.pooling, draw=part.draw)
            write = _write_parquet if to == "parquet" else _write_safetensors
            for ready in write(path / name, table, batches, facts):
                if progress is not None:
                    progress(done + ready, total, f"rows {part.sigma} {part.pooling}")
            done += len(rows)
            made.written.append(name)
    if to == "safetensors":
        made.written.append(_write_table(path, "rows.parquet", table))
    for judgements in store.judgements:
        pairs = store.pairs(judgements=judgements)
        made.left_out[judgements] = pairs.left_out
        frame = pairs.frame.assign(index_a=pairs.rows[:, 0], index_b=pairs.rows[:, 1])
        pairs_table = pa.Table.from_pandas(frame, preserve_index=False)
        made.written.append(_write_table(path, f"pairs/{judgements}.parquet", pairs_table))
    return made


def _parts(
    store: FeatureStore,
    *,
    layers: list[int] | None,
    sigmas: list[str] | None,
    poolings: list[str] | None,
    draws: list[int] | None,
) -> list[_Part]:
    """Resolve a selection; an error if it names something that the store lacks."""
    held: dict[str, list[Any]] = {
        "layer": [point.index for point in store.layers],
        "sigma": store.sigmas,
        "pooling": [*store.poolings, *store.inputs],
        "draw": store.draws,
    }
    for (what, there), wanted in zip(held.items(), (layers, sigmas, poolings, draws), strict=True):
        unknown = [value for value in wanted or () if value not in there]
        if unknown or not there:
            msg = f"{store.path}: {what} {unknown or ''} is not in the store; allowed: {', '.join(map(str, there))}"
            raise StoreError(msg)
    parts = []
    for sigma, draw in store.coordinates:
        for pooling in poolings or store.poolings:
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", pooling):
                msg = f"{store.path}: pooling {pooling!r} cannot be a file name; choose others with --pooling"
                raise StoreError(msg)
            here = [point.index for point in store.layers_of(pooling) if layers is None or point.index in layers]
            if here and (sigmas is None or sigma in sigmas) and (draws is None or draw in draws):
                parts.append(_Part(sigma, draw, pooling, here))
    if not parts:
        msg = f"{store.path}: holds no features with the selected layers, sigmas, poolings and draws at once"
        raise StoreError(msg)
    return parts


def _claim(path: Path, store: FeatureStore, own: dict[str, Any]) -> None:
    """Take the folder for this export, or refuse what it holds."""
    file = path / "export.json"
    allowed = "allowed: a new or empty folder, or one that this export was written to before"
    if path.exists() and not path.is_dir():
        msg = f"{path}: a file; {allowed}"
        raise StoreError(msg)
    names = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    foreign = [name for name in names if not name.startswith((TEMP, LOCK))]
    if "export.json" in foreign:
        try:
            stored = json.loads(read_small(file, limit=2**24))
            stored = {key: stored.get(key) for key in own}
        except (ValueError, AttributeError, RecursionError):
            msg = f"{file}: damaged; delete the folder, or use another --out"
            raise StoreError(msg) from None
        if (wrong := refusal(stored, own, of="export")) is not None:
            msg = f"{file}: {wrong}; use another --out"
            raise StoreError(msg)
    elif foreign:
        msg = f"{path}: holds {foreign[0]!r} and no export.json; {allowed}"
        raise StoreError(msg)
    path.mkdir(parents=True, exist_ok=True)
    remove_dead_files(path)
    about = own | {"config": store.config, "describe": store.describe}
    write_atomically(file, (json.dumps(about, indent=2) + "\n").encode())


def _source(store: FeatureStore, part: _Part, rows: str) -> str:
    """Digest of the rows and shards that a file is made from."""
    shards = store.shard_digests(sigma=part.sigma, draw=part.draw)
    return hashlib.sha256(fmt.canonical_json([rows, shards]).encode()).hexdigest()


def _facts(path: Path, to: To) -> Any:
    """Read what a finished file says of itself; None if there is none."""
    try:
        if to == "parquet":
            return json.loads((pq.read_schema(path).metadata or {})[b"probekit"])
        with safe_open(path, "numpy") as file:
            return json.loads(file.metadata()["probekit"])
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException, SafetensorError):
        return None


def _column(layer: int) -> str:
    return f"layer_{layer:03d}"


Batches = Iterator[tuple[slice, dict[int, NDArray[np.floating[Any]]]]]


def _write_parquet(path: Path, rows: pa.Table, batches: Batches, facts: dict[str, Any]) -> Iterator[int]:
    """Write one row group for each batch; yield the rows that are done."""
    place, features = next(batches)
    part = _table(rows, place, features)
    check_space(path, part.nbytes * -(-len(rows) // len(part)))
    # Features do not compress (their entropy is nine tenths of their size); texts repeat.
    codecs = dict.fromkeys(rows.column_names, "zstd")
    codecs |= {f"{_column(layer)}.list.element": "none" for layer in features}
    schema = part.schema.with_metadata({"probekit": json.dumps(facts)})
    with temporary(path) as (temp, descriptor):
        with pq.ParquetWriter(
            temp, schema, compression=codecs, use_dictionary=["prompt"], write_statistics=rows.column_names
        ) as writer:
            writer.write_table(part, row_group_size=len(part))
            yield place.stop
            for place, features in batches:
                part = _table(rows, place, features)
                writer.write_table(part, row_group_size=len(part))
                yield place.stop
        publish(temp, descriptor, path)


def _table(rows: pa.Table, place: slice, features: dict[int, NDArray[np.floating[Any]]]) -> pa.Table:
    """Put features beside their rows; lists hold no nulls, and rows without features are NaN."""
    part = rows.slice(place.start, place.stop - place.start)
    for layer, values in features.items():
        element = pa.field("element", pa.from_numpy_dtype(values.dtype), nullable=False)
        kind = pa.list_(element, values.shape[1])
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind)
        part = part.append_column(pa.field(_column(layer), kind, nullable=False), column)
    return part


def _write_safetensors(path: Path, rows: pa.Table, batches: Batches, facts: dict[str, Any]) -> Iterator[int]:
    """Write the one layer of the batches as one tensor (m, d); yield the rows that are done."""
    (layer,) = facts["layers"]
    place, features = next(batches)
    out = np.empty((len(rows), features[layer].shape[1]), features[layer].dtype)
    check_space(path, out.nbytes)
    out[place] = features[layer]
    for place, features in batches:
        yield place.start
        out[place] = features[layer]
    with temporary(path) as (temp, descriptor):
        save_file({_column(layer): out}, temp, metadata={"probekit": json.dumps(facts)})
        publish(temp, descriptor, path)
    yield len(rows)


def _write_table(root: Path, name: str, table: pa.Table) -> str:
    path = root / name
    with temporary(path) as (temp, descriptor):
        pq.write_table(table.replace_schema_metadata(None), temp, compression="zstd")
        publish(temp, descriptor, path)
    return name
