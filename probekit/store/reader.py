"""Read a feature store: rows, one layer at a time, and pairs of rows with their judgements.

m = rows of the store, n = pairs, d = channels of a feature vector.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit._types import LayerPoint, canonical_sigma
from probekit.errors import StoreError
from probekit.store import format as fmt
from probekit.store.files import refuse_link
from probekit.store.pairs import BoundJudgements, Pairs, read_judgements
from probekit.store.shards import MEND, Shard, read_store_file, scan

ROW_COLUMNS = ("row_id", "prompt", "image_id", "status", "width", "height", "file_bytes")
T = TypeVar("T")


class FeatureStore:
    """A store of features, opened for reading.

    **Row order.** Blocks sorted by name, rows in the order of their block, each row once. It depends only on which
    blocks the store holds: reading needs no state, but adding rows changes positions, so keep ``row_id``, not
    positions. No file stays open between calls, so a store may be used in forked and spawned workers.

    Parameters
    ----------
    path
        Folder of the store.

    Attributes
    ----------
    path
        Folder of the store.
    config, describe, fingerprint
        Configuration behind the numbers, facts of the backbone, SHA-256 of the configuration.
    layers, poolings
        What every row has features for; `layers_of` says at which layers a pooling exists.
    coordinates
        (sigma, draw) for which at least one row has features, ascending.
    sigmas, draws
        The noise levels and the draws among them.
    sigma_resolution
        Noise level -> ``{"ratio", "resolved", "rows", "note"}``, where it was measured; see
        `StoreWriter.record_resolution`.

    Raises
    ------
    StoreError
        If it is no store, is of a newer major version, or a shard is damaged; names the file and what mends it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        if not (self.path / "store.json").exists():
            msg = f"{self.path}: no store.json; allowed: the folder of a feature store"
            raise StoreError(msg)
        content = read_store_file(self.path / "store.json")
        self.config: dict[str, Any] = content["config"]
        self.describe: dict[str, Any] = content["describe"]
        self.fingerprint: str = content["fingerprint"]
        self.format_version: str = content["format_version"]
        self.layers = _points(self.config["layers"])
        self.poolings: list[str] = list(self.config["poolings"])
        self.sigma_resolution: dict[str, dict[str, Any]] = self.describe.get(fmt.SIGMA_RESOLUTION, {})
        refuse_link(self.path / "judgements")
        self._shards, problems = scan(self.path, fingerprint=self.fingerprint)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            msg = f"{problems[0]}{more}; {MEND}"
            raise StoreError(msg)
        held = {(shard.sidecar.sigma, shard.sidecar.draw) for shard in self._shards}
        self.coordinates = sorted(held, key=lambda place: (float(place[0]), place[1]))
        self.sigmas = list(dict.fromkeys(sigma for sigma, _ in self.coordinates))
        self.draws = sorted({draw for _, draw in held})

    def layers_of(self, pooling: str) -> list[LayerPoint]:
        """Layers at which a pooling exists: all of ``layers`` for most.

        Raises
        ------
        StoreError
            If the store does not hold the pooling.
        """
        return _points(fmt.layers_of(self.config, self._choose("pooling", pooling, self.poolings)))

    @property
    def judgements(self) -> list[str]:
        """Names of the sets of pairs that lie beside the shards."""
        folder = self.path / "judgements"
        # A set whose sidecar alone is there is missing, not absent.
        return sorted({path.stem for ending in ("parquet", "json") for path in folder.glob(f"[!.]*.{ending}")})

    @property
    def n_shards(self) -> int:
        """Number of shards over all noise levels and draws."""
        return len(self._shards)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.sidecar.bytes for shard in self._shards)

    @property
    def rows(self) -> pd.DataFrame:
        """The m rows: ``row_id``, ``prompt``, ``image_id``, ``status``, ``width``, ``height``, ``file_bytes``.

        ``status`` is the worst over noise levels and draws, so that all of them are compared on the same rows.
        """
        return self._index[0]

    def read(
        self, *, layer: int, sigma: str | None = None, pooling: str | None = None, draw: int | None = None
    ) -> NDArray[np.float32]:
        """Read one layer of all rows.

        Parameters
        ----------
        layer
            Layer number, one of ``layers_of(pooling)``.
        sigma, pooling, draw
            May be left out where the store holds one.

        Returns
        -------
        ndarray
            Features (m, d) in the order of ``rows``; NaN where ``status`` is not 0.

        Raises
        ------
        StoreError
            If the store lacks the coordinates or some rows lack features there, or a shard is damaged.
        """
        layer = self._choose("layer", layer, [point.index for point in self.layers])
        sigma = self._choose("sigma", None if sigma is None else canonical_sigma(sigma), self.sigmas)
        pooling = self._choose("pooling", pooling, self.poolings)
        allowed = [point.index for point in self.layers_of(pooling)]
        if layer not in allowed:
            msg = (
                f"{self.path}: pooling {pooling!r} does not exist at layer {layer}; allowed: "
                f"{', '.join(map(str, allowed))}"
            )
            raise StoreError(msg)
        draw = self._choose("draw", draw, [draw for at, draw in self.coordinates if at == sigma])
        name = fmt.dataset_name(pooling, layer)
        shards = [shard for shard in self._shards if (shard.sidecar.sigma, shard.sidecar.draw) == (sigma, draw)]
        rows, places = self._index
        held = np.zeros(len(rows), bool)
        for shard in shards:
            held[places[shard.sidecar.block]] = True
        if not held.all():
            msg = (
                f"{self.path}: {(~held).sum()} of {len(rows)} rows have no features at sigma {sigma}, draw {draw}; "
                "run the dump command that added them with this sigma and draw too"
            )
            raise StoreError(msg)
        widths = {tuple(_feature(shard, name)[1:]) for shard in shards}
        if len(widths) != 1 or len(width := widths.pop()) != 1:
            msg = f"{self.path}: the shards of sigma {sigma} disagree about the width of {name}"
            raise StoreError(msg)
        out = np.empty((len(rows), *width), "<f4")
        for shard in shards:
            _read_features(shard, name, out, places[shard.sidecar.block])
        return out

    def pairs(self, *, split: str | None = None, judgements: str | None = None) -> Pairs:
        """Pairs of a set of judgements that lies beside the shards.

        Parameters
        ----------
        split
            ``train``, ``validation`` or ``test``; all if left out.
        judgements
            Name of the set; may be left out where the store holds one.

        Raises
        ------
        StoreError
            If there is no such set or split.
        """
        name = self._choose("judgements", judgements, self.judgements)
        return self.bind(read_judgements(self.path / "judgements" / f"{name}.parquet")).pairs(split=split)

    def bind(self, frame: pd.DataFrame) -> BoundJudgements:
        """Join judgements made elsewhere to the rows of this store, by ``row_a`` and ``row_b``.

        Raises
        ------
        StoreError
            If a column or a value that pairs need is missing; names it.
        """
        return BoundJudgements(self.path, self.rows, frame)

    def summary(self) -> dict[str, Any]:
        """Plain facts of the store for ``inspect``."""
        rows: Counter[tuple[str, int]] = Counter()
        for shard in self._shards:
            rows[shard.sidecar.sigma, shard.sidecar.draw] += shard.sidecar.n_rows
        features = [
            (record.dtype, record.noise_ratio)
            for shard in self._shards
            for name, record in shard.sidecar.datasets.items()
            if name.startswith("features/")
        ]
        return {
            "path": str(self.path),
            "format_version": self.format_version,
            "fingerprint": self.fingerprint,
            "backbone": {key: value for key, value in self.describe.items() if key != fmt.SIGMA_RESOLUTION},
            "layers": len(self.layers),
            "poolings": {pooling: f"{len(self.layers_of(pooling))} layers" for pooling in self.poolings},
            "rows": len(self.rows),
            "prompts": int(self.rows["prompt"].nunique()),
            "bad_rows": int((self.rows["status"] != fmt.STATUS_OK).sum()),
            "coordinates": [
                {"sigma": sigma, "draw": draw, "rows": rows[sigma, draw]} for sigma, draw in self.coordinates
            ],
            "sigma_resolution": self.sigma_resolution,
            "shards": self.n_shards,
            "bytes": self.nbytes,
            "datasets": dict(Counter({"<f2": "float16", "<f4": "float32"}[dtype] for dtype, _ in features)),
            "judgements": {
                name: {str(k): int(v) for k, v in self.pairs(judgements=name).frame["split"].value_counts().items()}
                for name in self.judgements
            },
        }

    def _choose(self, what: str, value: T | None, held: list[T]) -> T:
        if value is None and len(held) == 1:
            return held[0]
        if value is None or value not in held:
            asked = "is not given" if value is None else f"{value!r} is not in the store"
            msg = f"{self.path}: {what} {asked}; allowed: {', '.join(str(v) for v in held) or 'none, it holds no such'}"
            raise StoreError(msg)
        return value

    @cached_property
    def _index(self) -> tuple[pd.DataFrame, dict[str, slice | NDArray[np.int64]]]:
        """The rows, and for each block where its rows stand among them."""
        position: dict[str, int] = {}
        places: dict[str, slice | NDArray[np.int64]] = {}
        tables = []
        for shard in sorted(self._shards, key=lambda shard: shard.sidecar.block):
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
        status = np.zeros(len(frame), np.uint8)
        held = {coordinates: np.zeros(len(frame), bool) for coordinates in self.coordinates}
        for shard in self._shards:
            place, seen = places[shard.sidecar.block], held[shard.sidecar.sigma, shard.sidecar.draw]
            if seen[place].any():
                msg = f"{shard.path}: holds rows of another shard of its noise level and draw; {MEND}"
                raise StoreError(msg)
            seen[place] = True
            status[place] = np.maximum(status[place], shard.table("rows/status"))
        return frame.assign(status=status), places


def _points(layers: Sequence[Mapping[str, Any]]) -> list[LayerPoint]:
    return [LayerPoint(layer["index"], layer["name"], layer["stream"]) for layer in layers]


def _feature(shard: Shard, name: str) -> list[int]:
    """Shape of a feature dataset; an error if the shard lacks it."""
    record = shard.sidecar.datasets.get(name)
    if record is None or not record.nbytes:
        msg = f"{shard.path}: no dataset {name} of {shard.sidecar.n_rows} rows; {MEND}"
        raise StoreError(msg)
    return record.shape


def _read_features(shard: Shard, name: str, out: NDArray[np.float32], place: slice | NDArray[np.int64]) -> None:
    """Read one dataset into its rows of ``out`` (m, d)."""
    record = shard.sidecar.datasets[name]
    if record.dtype == "<f4" and isinstance(place, slice):
        shard.read_into(name, out[place].reshape(-1).view(np.uint8))
        return
    values = out[place].reshape(-1) if isinstance(place, slice) else np.empty(record.shape, np.float32).reshape(-1)
    size = np.dtype(record.dtype).itemsize
    for start, part in shard.chunks(name):
        values[start // size : (start + len(part)) // size] = part.view(record.dtype)
    if not isinstance(place, slice):
        out[place] = values.reshape(record.shape)


def _row_table(shard: Shard, ids: list[str]) -> pd.DataFrame:
    prompts = np.array([*shard.texts("prompts/text_utf8", "prompts/text_offsets"), None], object)
    index = shard.table("rows/prompt_index")
    if len(index) and not 0 <= index.min() <= index.max() < len(prompts) - 1:
        msg = f"{shard.path}: rows/prompt_index points outside the prompts; {MEND}"
        raise StoreError(msg)
    numbers = {column: shard.table(f"rows/{column}") for column in ("width", "height", "file_bytes")}
    images = shard.texts("rows/image_id_utf8", "rows/image_id_offsets")
    columns = {"row_id": ids, "prompt": prompts[index].tolist(), "image_id": images, "status": np.uint8(0), **numbers}
    return pd.DataFrame(columns)
