"""Read a feature store: rows, one layer at a time, and pairs of rows with their judgements.

m = rows of the store, n = pairs, d = channels of a feature vector.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit._types import LayerPoint, canonical_sigma
from probekit.errors import StoreError
from probekit.store import format as fmt
from probekit.store.ahead import ahead
from probekit.store.differences import Uses, row_pieces
from probekit.store.half import convert
from probekit.store.judgements import read_judgements
from probekit.store.mend import AGAIN
from probekit.store.pairs import BoundJudgements, Pairs
from probekit.store.row_index import RowIndex, index_rows
from probekit.store.shards import Shard, no_folder, read_store_file, refuse_other_folder, scan

_READERS = 2  # shards read side by side: one waits for the disk while the other is converted

T = TypeVar("T")


class _Layer(TypedDict):
    layer: int


class Setting(_Layer, total=False):
    """Arguments of `FeatureStore.read`; all but ``layer`` may be left out where the store holds one."""

    sigma: str
    pooling: str
    draw: int


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
    inputs
        Statistics of what enters the backbone (``pixels``, ``latents``, ``text``), read like poolings at one layer.
    coordinates
        (sigma, draw) for which at least one row has features, ascending.
    sigmas, draws
        The noise levels and the draws among them.
    sigma_resolution
        Noise level -> ``{"ratio", "resolved", "rows", "note"}``, where it was measured; see
        `StoreWriter.record_resolution`.

    Raises
    ------
    NoStoreError
        If there is no store.
    StoreError
        If it lacks its ``store.json``, is of a newer major version, or a shard is damaged; names the file and what
        mends it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        refuse_other_folder(self.path)
        if not os.path.lexists(self.path / "store.json"):
            msg = f"{self.path}: holds shards and no store.json; {AGAIN}: it writes it"
            raise StoreError(msg)
        content = read_store_file(self.path / "store.json")
        self.config: dict[str, Any] = content["config"]
        self.describe: dict[str, Any] = content["describe"]
        self.fingerprint: str = content["fingerprint"]
        self.format_version: str = content["format_version"]
        self.layers = _points(self.config["layers"])
        self.inputs: list[str] = self.config.get("inputs", [])
        self.poolings: list[str] = [name for name in self.config["poolings"] if name not in self.inputs]
        self.sigma_resolution: dict[str, dict[str, Any]] = self.describe.get(fmt.SIGMA_RESOLUTION, {})
        self._shards, problems = scan(self.path, fingerprint=self.fingerprint)
        if problem := no_folder(self.path / "judgements"):
            problems.append(problem)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            msg = f"{problems[0]}{more}"
            raise StoreError(msg)
        held = {(shard.sidecar.sigma, shard.sidecar.draw) for shard in self._shards}
        self.coordinates = sorted(held, key=lambda place: (float(place[0]), place[1]))
        self.sigmas = list(dict.fromkeys(sigma for sigma, _ in self.coordinates))
        self.draws = sorted({draw for _, draw in held})
        self._named = set[str]()  # pairs without rows that were logged: once is enough

    def layers_of(self, pooling: str) -> list[LayerPoint]:
        """Layers at which a pooling exists: all of ``layers`` for most.

        Raises
        ------
        StoreError
            If the store does not hold the pooling.
        """
        return _points(fmt.layers_of(self.config, self._pooling(pooling)))

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

    def shard_digests(self, *, sigma: str, draw: int) -> list[str]:
        """SHA-256 of each shard file of one noise level and draw, ordered by block."""
        return [shard.sidecar.sha256 for shard in self._at(sigma, draw)]

    def _at(self, sigma: str, draw: int) -> list[Shard]:
        return [shard for shard in self._shards if (shard.sidecar.sigma, shard.sidecar.draw) == (sigma, draw)]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.sidecar.bytes for shard in self._shards)

    @property
    def rows(self) -> pd.DataFrame:
        """The m rows: ``row_id``, ``prompt``, ``image_id``, ``status``, ``width``, ``height``, ``file_bytes``.

        ``status`` is the worst over noise levels and draws, so that all of them are compared on the same rows.
        """
        return self._index.rows

    def image_digests(self) -> NDArray[np.uint8]:
        """SHA-256 of the image file of each row (m, 32), in the order of ``rows``."""
        rows, places, _ = self._index
        out = np.empty((len(rows), 32), np.uint8)
        for shard in self._shards:
            out[places[shard.sidecar.block]] = shard.table("rows/image_sha256")
        return out

    def width(
        self, *, layer: int, sigma: str | None = None, pooling: str | None = None, draw: int | None = None
    ) -> int:
        """Return the channels of one layer; arguments and errors as of `read`."""
        (name,), shards, _ = self._select([layer], sigma, pooling, draw)
        return shards[0].width(name)

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
        (name,), shards, absent = self._select([layer], sigma, pooling, draw)
        out = np.empty((len(self.rows), shards[0].width(name)), "<f4")
        out[absent] = np.nan

        def fill(shard: Shard) -> None:
            place = self._index.places[shard.sidecar.block]
            if isinstance(place, slice):
                shard.read_features(name, out[place])
            else:
                values = np.empty((len(place), out.shape[1]), np.float32)
                shard.read_features(name, values)
                out[place] = values

        with ThreadPoolExecutor(_READERS) as threads:
            list(threads.map(fill, shards))
        return out

    def quantisation(
        self, *, layer: int, sigma: str | None = None, pooling: str | None = None, draw: int | None = None
    ) -> NDArray[np.float64]:
        """Root mean square (d,) of what rounding in the store adds to the difference of two rows.

        Parameters are those of `read`. The store knows that of the median channel, which stands for all; its shards
        count by their rows, and those in float32 add nothing.
        """
        (name,), shards, _ = self._select([layer], sigma, pooling, draw)
        rows = np.array([shard.sidecar.n_rows for shard in shards])
        noise = np.array([shard.sidecar.datasets[name].quantisation_noise or 0.0 for shard in shards])
        return np.full(shards[0].width(name), np.sqrt(rows @ noise**2 / rows.sum()))

    def differences(
        self,
        *,
        layer: int,
        pairs: Pairs | NDArray[np.integer[Any]],
        sigma: str | None = None,
        pooling: str | None = None,
        draw: int | None = None,
    ) -> NDArray[np.float32]:
        """Read one layer as the differences of pairs of rows, first minus second.

        Equal to ``X[a] - X[b]`` of ``X = read(...)``, but neither X nor its two sides are ever whole in memory: beside
        the result there are a few pieces of a shard.

        Parameters
        ----------
        layer, sigma, pooling, draw
            As of `read`.
        pairs
            What `pairs` returns, or positions (n, 2) in the order of ``rows``.

        Returns
        -------
        ndarray
            Differences (n, d), float32; NaN where the ``status`` of a row is not 0.

        Raises
        ------
        StoreError
            As of `read`, or if a position lies outside the rows.
        """
        (name,), shards, absent = self._select([layer], sigma, pooling, draw)
        rows, places, _ = self._index
        positions = pairs.rows if isinstance(pairs, Pairs) else pairs
        outside = (positions < 0) | (positions >= len(rows))
        if outside.any():
            msg = f"{self.path}: pairs name row {positions[outside][0]}; allowed: 0 to {len(rows) - 1}"
            raise StoreError(msg)
        sides = [Uses(positions[:, side]) for side in (0, 1)]
        out = np.zeros((len(positions), shards[0].width(name)), np.float32)
        for shard in shards:
            place = places[shard.sidecar.block]
            where = np.arange(place.start, place.stop) if isinstance(place, slice) else place
            for start, values in row_pieces(shard, name):
                held = where[start : start + len(values)]
                for uses, combine in zip(sides, (np.add, np.subtract), strict=True):
                    uses.apply(combine, held, values, out)
        if len(absent):
            out[np.isin(positions, absent).any(axis=1)] = np.nan
        return out

    def read_each(
        self, settings: Iterable[Setting], *, pairs: Pairs | NDArray[np.integer[Any]] | None = None
    ) -> Iterator[tuple[Setting, NDArray[np.float32]]]:
        """Read setting after setting, the next one by a thread while the caller works on one.

        At most three results are in memory: the caller's, one that is ready, and the one that is being read. The thread
        begins with the first step and ends with the last one, with an error, or when the iterator is closed or dropped;
        a process must not be forked in between.

        Parameters
        ----------
        settings
            Arguments of `read`, such as ``[{"layer": 3}, {"layer": 4}]`` or
            ``[{"layer": 3, "sigma": "0.005"}, {"layer": 3, "sigma": "0.1"}]``.
        pairs
            If given, `differences` of these pairs are read.

        Yields
        ------
        setting, ndarray
            Each setting, and its features (m, d) or differences (n, d).

        Raises
        ------
        StoreError
            As of `read`, at the step of the setting that it is about.
        """
        _ = self._index  # once, and by the caller's thread

        def load(setting: Setting) -> NDArray[np.float32]:
            return self.read(**setting) if pairs is None else self.differences(pairs=pairs, **setting)

        return ahead(load, settings)

    def batches(
        self,
        *,
        layers: Sequence[int],
        sigma: str | None = None,
        pooling: str | None = None,
        draw: int | None = None,
        batch_bytes: int = 2**26,
    ) -> Iterator[tuple[slice, dict[int, NDArray[np.floating[Any]]]]]:
        """Read several layers of all rows in turns, with bounded memory.

        Parameters
        ----------
        layers
            Layer numbers, some of ``layers_of(pooling)``.
        sigma, pooling, draw
            May be left out where the store holds one.
        batch_bytes
            About the bytes of a turn.

        Yields
        ------
        place : slice
            Which of ``rows`` these are, in order and without gaps.
        features : dict
            Layer -> (rows of the turn, d): float16 where all shards hold the layer in float16, else float32.

        Raises
        ------
        StoreError
            As `read` does.
        """
        names, shards, _ = self._select(layers, sigma, pooling, draw)
        rows, places, _ = self._index
        owner, at = np.full((2, len(rows)), -1, np.int64)  # -1: a row that is absent here
        for number, shard in enumerate(shards):
            owner[places[shard.sidecar.block]] = number
            at[places[shard.sidecar.block]] = np.arange(shard.sidecar.n_rows)
        dtypes = [np.result_type(*{shard.sidecar.datasets[name].dtype for shard in shards}) for name in names]
        row_bytes = sum(shards[0].width(name) * dtype.itemsize for name, dtype in zip(names, dtypes, strict=True))
        size = max(1, batch_bytes // row_bytes)
        # A run is a row range of one shard: all its rows, unless another noise level was cut into other blocks.
        starts = np.flatnonzero(np.diff(owner, prepend=-2) | (np.diff(at, prepend=-2) != 1))
        starts = np.union1d(starts, np.arange(0, len(rows), size))
        ends = np.append(starts[1:], len(rows))
        for first in range(0, len(rows), size):
            turn = slice(first, min(first + size, len(rows)))
            inside = (starts >= turn.start) & (starts < turn.stop)
            features: dict[int, NDArray[np.floating[Any]]] = {}
            for layer, name, dtype in zip(layers, names, dtypes, strict=True):
                out = features[layer] = np.empty((turn.stop - first, shards[0].width(name)), dtype)
                for start, end in zip(starts[inside].tolist(), ends[inside].tolist(), strict=True):
                    row, part = int(at[start]), out[start - first : end - first]
                    if row < 0:
                        part[:] = np.nan
                    else:
                        _copy(shards[owner[start]].read_rows(name, row, row + end - start), part)
            yield turn, features

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
        return BoundJudgements(self.path, self.rows, frame, self._named)

    def summary(self) -> dict[str, Any]:
        """Plain facts of the store for ``inspect``."""
        rows: Counter[tuple[str, int]] = Counter()
        for shard in self._shards:
            rows[shard.sidecar.sigma, shard.sidecar.draw] += shard.sidecar.n_rows
        dtypes = [
            {"<f2": "float16", "<f4": "float32"}[record.dtype]
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
            "inputs": self.inputs,
            "rows": len(self.rows),
            "prompts": int(self.rows["prompt"].nunique()),
            "bad_rows": int((self.rows["status"] != fmt.STATUS_OK).sum()),
            "coordinates": [
                {"sigma": sigma, "draw": draw, "rows": rows[sigma, draw]} for sigma, draw in self.coordinates
            ],
            "sigma_resolution": self.sigma_resolution,
            "shards": self.n_shards,
            "bytes": self.nbytes,
            "datasets": dict(Counter(dtypes)),
            "judgements": {
                name: {str(k): int(v) for k, v in self.pairs(judgements=name).frame["split"].value_counts().items()}
                for name in self.judgements
            },
        }

    def _select(
        self, layers: Sequence[int], sigma: str | None, pooling: str | None, draw: int | None
    ) -> tuple[list[str], list[Shard], NDArray[np.int64]]:
        """Names of the datasets of some layers, the shards that hold them, and the rows that need not be there."""
        layers = [self._choose("layer", layer, [point.index for point in self.layers]) for layer in layers]
        sigma = self._choose("sigma", None if sigma is None else canonical_sigma(sigma), self.sigmas)
        pooling = self._pooling(pooling)
        allowed = [point.index for point in self.layers_of(pooling)]
        for layer in layers:
            if layer not in allowed:
                msg = (
                    f"{self.path}: pooling {pooling!r} does not exist at layer {layer}; allowed: "
                    f"{', '.join(map(str, allowed))}"
                )
                raise StoreError(msg)
        draw = self._choose("draw", draw, [draw for at, draw in self.coordinates if at == sigma])
        names = [fmt.dataset_name(pooling, layer) for layer in layers]
        shards = self._at(sigma, draw)
        rows, places, needed = self._index
        held = np.zeros(len(rows), bool)
        for shard in shards:
            held[places[shard.sidecar.block]] = True
        lacking = needed & ~held
        if lacking.any():
            msg = (
                f"{self.path}: {lacking.sum()} of {len(rows)} rows have no features at sigma {sigma}, draw {draw}; "
                "run the dump command that added them with this sigma and draw too"
            )
            raise StoreError(msg)
        for name in names:
            if len({shard.width(name) for shard in shards}) != 1:
                msg = f"{self.path}: the shards of sigma {sigma} disagree about the width of {name}"
                raise StoreError(msg)
        return names, shards, np.flatnonzero(~held)

    def _pooling(self, asked: str | None) -> str:
        """Check a pooling or input; inputs are never meant where none is named."""
        return self._choose("pooling", asked, self.poolings if asked is None else [*self.poolings, *self.inputs])

    def _choose(self, what: str, value: T | None, held: list[T]) -> T:
        if value is None and len(held) == 1:
            return held[0]
        if value is None or value not in held:
            asked = "is not given" if value is None else f"{value!r} is not in the store"
            msg = f"{self.path}: {what} {asked}; allowed: {', '.join(str(v) for v in held) or 'none, it holds no such'}"
            raise StoreError(msg)
        return value

    @cached_property
    def _index(self) -> RowIndex:
        return index_rows(self._shards)


def _copy(values: NDArray[np.floating[Any]], out: NDArray[np.floating[Any]]) -> None:
    """Copy features (rows, d) as stored into a contiguous array of their dtype or of float32."""
    if values.dtype == out.dtype:
        out[:] = values
    else:
        convert(values.reshape(-1), out.reshape(-1))


def _points(layers: Sequence[Mapping[str, Any]]) -> list[LayerPoint]:
    return [LayerPoint(layer["index"], layer["name"], layer["stream"]) for layer in layers]
