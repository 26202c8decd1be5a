"""Features as fits take them: differences of pairs, read layer by layer, kept where they fit, else streamed from files.

m = rows of all stores of a selection, one store after the other; n = its pairs: training pairs, then validation pairs,
then those of each test set (`Material.parts`); d = channels.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Self

import numpy as np

from probekit._types import FloatArray, IntArray
from probekit.errors import HeadError
from probekit.heads import StreamedDifferences, concatenate, mean_features
from probekit.store import Setting
from probekit.store.files import check_space, dead_files, temporary
from probekit.sweep.material import Selection, material, open_cached

BLOCK = 2**24
"""Bytes of features that are scored at a time."""


@dataclass(frozen=True)
class Place:
    """One layer of the stores of a selection, at one noise draw; noise levels and poolings stand side by side."""

    selection: Selection
    sigmas: tuple[str, ...]
    draw: int
    poolings: tuple[str, ...]
    layer: int

    @property
    def setting(self) -> tuple[Selection, tuple[str, ...], int, tuple[str, ...]]:
        """All but the layer."""
        return self.selection, self.sigmas, self.draw, self.poolings

    @property
    def parts(self) -> list[Setting]:
        """Arguments of `FeatureStore.read` for each noise level and pooling, in the order of the channels."""
        places = product(self.sigmas, self.poolings)
        return [{"layer": self.layer, "sigma": sigma, "pooling": name, "draw": self.draw} for sigma, name in places]

    @cached_property
    def widths(self) -> list[int]:
        """Channels of each of `parts`."""
        store = open_cached(self.selection.stores[0])
        return [store.width(**part) for part in self.parts]

    @property
    def width(self) -> int:
        """Channels d."""
        return sum(self.widths)

    def rows(self) -> FloatArray:
        """Features (m, d)."""
        stores = [
            concatenate([open_cached(path).read(**part) for part in self.parts]) for path in self.selection.stores
        ]
        return stores[0] if len(stores) == 1 else np.concatenate(stores)

    def differences(self, pairs: IntArray) -> FloatArray:
        """Differences of rows (n, 2), first minus second: (n, d) float32."""
        out, first = np.empty((0, 0), np.float32), 0
        for path in self.selection.stores:
            store = open_cached(path)
            inside = (pairs[:, 0] >= first) & (pairs[:, 0] < first + len(store.rows))
            if inside.any():
                mine = pairs[inside] - first
                if inside.all() and len(self.parts) == 1:
                    return store.differences(pairs=mine, **self.parts[0])
                if not out.size:
                    out = np.empty((len(pairs), self.width), np.float32)
                for columns, part in zip(_columns(self.widths), self.parts, strict=True):
                    out[inside, columns] = store.differences(pairs=mine, **part)
            first += len(store.rows)
        return out

    def scores(self, coef: FloatArray) -> FloatArray:
        """Scores (m,) of all rows by coefficients (d,), in bounded memory; NaN where a row has no features."""
        stores = []
        for path in self.selection.stores:
            total = np.zeros(len(open_cached(path).rows))
            for columns, part in zip(_columns(self.widths), self.parts, strict=True):
                batches = open_cached(path).batches(
                    layers=[self.layer],
                    sigma=part["sigma"],
                    pooling=part["pooling"],
                    draw=self.draw,
                    batch_bytes=BLOCK,
                )
                with np.errstate(invalid="ignore"):
                    for place, features in batches:
                        total[place] += features[self.layer] @ coef[columns]
            stores.append(total)
        return np.concatenate(stores)

    def noise(self) -> FloatArray:
        """Root mean square (d,) of what rounding in the stores adds to a difference; stores count by their rows."""
        stores = [open_cached(path) for path in self.selection.stores]
        rows = np.array([len(store.rows) for store in stores])
        squares = [np.concatenate([store.quantisation(**part) ** 2 for part in self.parts]) for store in stores]
        return np.asarray(np.sqrt(rows @ np.stack(squares) / rows.sum()))


def _columns(widths: Sequence[int]) -> list[slice]:
    """Which channels each of some parts takes, side by side."""
    ends = np.cumsum([0, *widths]).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


class _Kept:
    """Differences (n, d) of layers that other fits of this process read too; the least recently used go first."""

    def __init__(self) -> None:
        self._held: OrderedDict[Place, FloatArray] = OrderedDict()
        self.reads = 0

    def differences(self, place: Place, *, keep: int) -> FloatArray:
        """Differences of all pairs of the selection, read where they are not held; `keep` bytes may stay."""
        found = self._held.pop(place, None)
        if found is None:
            self.trim(keep)
            self.reads += 1
            found = place.differences(material(place.selection).rows)
        if found.nbytes <= keep:
            self._held[place] = found
            self.trim(keep)
        return found

    def trim(self, keep: int) -> None:
        """Forget the least recently used until the others take at most `keep` bytes."""
        while self._held and sum(held.nbytes for held in self._held.values()) > keep:
            self._held.popitem(last=False)


KEPT = _Kept()


@dataclass(frozen=True)
class Features:
    """The layers of one fit, side by side or, as `averaged`, their mean.

    Attributes
    ----------
    places
        The layers, in the order of their channels.
    averaged
        Whether a head reads the mean of the layers.
    keep
        Bytes of layers that this process may keep for other fits.
    scratch
        Where differences lie that do not fit into memory; None where they do.
    """

    places: tuple[Place, ...]
    averaged: bool = False
    keep: int = 0
    scratch: "Scratch | None" = None

    @property
    def selection(self) -> Selection:
        """What the layers are of."""
        return self.places[0].selection

    @property
    def widths(self) -> list[int]:
        """Channels of each layer that a head tells apart."""
        return [place.width for place in (self.places[:1] if self.averaged else self.places)]

    @property
    def noise(self) -> FloatArray:
        """Root mean square (d,) of what rounding in the stores adds to a difference."""
        layers = [place.noise() for place in self.places]
        if self.averaged:
            return np.asarray(np.sqrt(np.square(layers).sum(axis=0)) / len(layers))  # errors of layers are independent
        return np.concatenate(layers)

    @cached_property
    def rows(self) -> FloatArray:
        """Features X (m, d)."""
        return (mean_features if self.averaged else concatenate)([place.rows() for place in self.places])

    @cached_property
    def of_all_pairs(self) -> FloatArray:
        """Differences (n, d) of all pairs, in memory."""
        KEPT.trim(self.keep)
        if len(self.places) == 1:
            return KEPT.differences(self.places[0], keep=self.keep)
        out = np.zeros((len(material(self.selection).rows), sum(self.widths)), np.float32)
        columns = [slice(None)] * len(self.places) if self.averaged else _columns(self.widths)
        for place, at in zip(self.places, columns, strict=True):
            part = KEPT.differences(place, keep=self.keep)
            if self.averaged and part.shape != out.shape:
                message = f"layers have widths {[one.width for one in self.places]}; a mean needs layers of one width"
                raise HeadError(message)
            out[:, at] += part
            del part  # before the next layer is read
        if self.averaged:
            out /= len(self.places)
        return out

    @property
    def differences(self) -> FloatArray | StreamedDifferences:
        """Differences of the training pairs (n, d), in memory or in files."""
        if self.scratch is not None:
            return self.scratch.differences(self.places)
        train: FloatArray = self.of_all_pairs[: len(material(self.selection).train.label)]
        return train

    @property
    def vary(self) -> bool:
        """Whether any training pair differs."""
        if self.scratch is not None:
            return self.scratch.vary(self.places)
        return any(block.any() for _, block in _blocks(self.of_all_pairs[: len(material(self.selection).train.label)]))

    def margins(self, coef: FloatArray) -> FloatArray:
        """Margins s(first) - s(second) (n,) of all pairs for s(x) = x.coef, coef (d,) float64."""
        if self.scratch is None:
            return np.concatenate([block @ coef for _, block in _blocks(self.of_all_pairs)])
        parts = zip(self.places, _columns(self.widths), strict=True)
        scores: FloatArray = np.sum([place.scores(coef[columns]) for place, columns in parts], axis=0)
        rows = material(self.selection).rows
        return scores[rows[:, 0]] - scores[rows[:, 1]]


class Scratch:
    """Differences of training pairs in files of a run, one for each layer, gone when the sweep ends.

    Files are locked while this process lives: `clear` removes those of a sweep that was killed.

    Parameters
    ----------
    run
        Folder of the run.
    chunk
        Bytes that are read from a store and written at a time; a layer is read once for each.
    """

    def __init__(self, run: Path, *, chunk: int) -> None:
        self._run, self._chunk = run, chunk
        self._files: dict[Place, tuple[Path, bool, ExitStack]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._forget(list(self._files))

    @staticmethod
    def clear(run: Path) -> None:
        """Remove the files of sweeps that were killed."""
        for path in list(dead_files(run, on_link=lambda _: None)):
            path.unlink(missing_ok=True)

    def differences(self, places: Sequence[Place]) -> StreamedDifferences:
        """Differences (n, d) of the training pairs at some layers, side by side."""
        files = self._made(places)
        train = material(places[0].selection).train
        widths = [place.width for place in places]
        return StreamedDifferences([path for path, _, _ in files], widths, len(train.label))

    def vary(self, places: Sequence[Place]) -> bool:
        """Whether any training pair differs at one of the layers."""
        return any(varies for _, varies, _ in self._made(places))

    def _made(self, places: Sequence[Place]) -> list[tuple[Path, bool, ExitStack]]:
        """Write what is missing; layers of other settings go, as fits come setting by setting."""
        self._forget([place for place in self._files if place.setting != places[0].setting])
        for place in places:
            if place not in self._files:
                self._files[place] = self._write(place)
        return [self._files[place] for place in places]

    def _write(self, place: Place) -> tuple[Path, bool, ExitStack]:
        pairs, varies, stack = material(place.selection).train.rows, False, ExitStack()
        target = self._run / f"differences-{place.layer}"
        check_space(target, 4 * len(pairs) * place.width)
        path, _ = stack.enter_context(temporary(target))
        step = max(1, self._chunk // (4 * place.width))
        with path.open("wb") as file:
            for start in range(0, len(pairs), step):
                part = place.differences(pairs[start : start + step])
                varies = varies or bool(part.any())
                part.tofile(file)
        return path, varies, stack

    def _forget(self, places: Sequence[Place]) -> None:
        for place in places:
            self._files.pop(place)[2].close()


def scratch_bytes(sets: Sequence[tuple[Place, ...]]) -> int:
    """Bytes that the files of some streamed fits take at most at a time."""
    sizes: Counter[object] = Counter()
    for place in dict.fromkeys(place for places in sets for place in places):
        sizes[place.setting] += 4 * len(material(place.selection).train.rows) * place.width
    return max(sizes.values(), default=0)


def _blocks(D: FloatArray) -> Iterator[tuple[slice, FloatArray]]:
    """Yield all rows of D (n, d) in blocks of about `BLOCK` bytes."""
    step = max(1, BLOCK // (4 * D.shape[1]))
    for start in range(0, len(D), step):
        part = slice(start, start + step)
        yield part, D[part]
