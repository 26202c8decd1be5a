"""From a file of features to a feature store: every vector is checked before the store is made.

The file is read once, in its own order, into a temporary file without a name that holds the vectors in the order of the
preference file; shards are cut from that. So memory is bounded whatever the order of the file, and a kill leaves
nothing behind but whole shards. K = distinct keys that the preference file needs, d = channels of a layer.
"""

import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit._types import Progress, scaled
from probekit.config import SHARD_MIB, ImportConfig
from probekit.errors import FeatureFileError, StoreError
from probekit.imports.feature_files import CHUNK_BYTES, file_sha256, open_features
from probekit.imports.plan import POOLING, ImportPlan, number_layers
from probekit.preferences import PreferenceSet, load_preferences
from probekit.store import (
    IMAGE_DIGESTS,
    STATUS_OK,
    STATUS_UNREADABLE,
    FeatureStore,
    StoreWriter,
    open_store,
    rows_per_shard,
)

SIGMA = "0"  # no noise of ours, so one draw
_NAMED = 10

logger = logging.getLogger(__name__)

Spool = Mapping[str, NDArray[np.float32]]
"""Name of a layer -> its vectors (K, d) on disk."""


def import_features(
    file: Path | str,
    prefs: PreferenceSet,
    out: Path | str,
    *,
    definition: str,
    name: str | None = None,
    blocks: int | None = None,
    parameters: int | None = None,
    max_bad: float = 0.0,
    shard_size: int = SHARD_MIB,
    progress: Progress | None = None,
) -> FeatureStore:
    """Turn features computed elsewhere into a feature store.

    Parameters
    ----------
    file
        Vectors by image (as the preference file writes it), by prompt where they depend on it, and by layer.
        ``.parquet``: a long table with ``image``, ``vector`` and perhaps ``prompt`` and ``layer``. ``.npz``: an array
        (m, d) for each layer and texts ``image`` (m,), perhaps ``prompt`` (m,). ``.safetensors``: a tensor (m, d) for
        each layer, and the keys as JSON lists in the metadata. Numbers are read as float32: float16 and bfloat16
        exactly, float64 rounded.
    prefs
        Prompts, images and pairs. Without prompts in the file, a vector holds for every prompt of its image.
    out
        The store; made, or continued if it was made from the same file with the same definition. Another preference
        file adds its rows; another file is another store.
    definition
        What the features are, in words.
    name
        What tables and figures call them; default: the stem of the file.
    blocks
        Blocks of the network whose layers have numbers; default: the largest number. Layer 0 = before the first block,
        layer k = after the k-th. Layers with names count from 0 in the order of the file; one layer alone has no depth
        unless its name is a number and `blocks` is given.
    parameters
        Parameters of the network, where known.
    max_bad
        Largest share of rows without features, or with values that are not finite, that is accepted; their pairs are
        left out and counted.
    shard_size
        Largest shard in MiB.
    progress
        Called as ``progress(done, total, text)``, the text being ``vectors`` (read and checked) or ``rows`` (written).

    Raises
    ------
    ConfigError
        If an option, or a layer's number, is not allowed.
    FeatureFileError
        If the file is damaged, lacks a column, names a key twice, or leaves too many rows without features.
    FingerprintError
        If the store was made from another file or with another definition.
    ImageError
        If more image files than `max_bad` allows are missing; rows are keyed by what is in them.
    """
    options: dict[str, Any] = {"file": file, "prefs": prefs.path, "out": out, "definition": definition, "name": name}
    options |= {"blocks": blocks, "parameters": parameters, "max_bad": max_bad, "shard_size": shard_size}
    return _import(prefs, ImportConfig.checked(options, source="import_features"), progress)


def run_import(settings: ImportConfig, *, progress: Progress | None = None) -> FeatureStore:
    """Do what ``probekit import-features`` was asked; see `import_features`."""
    return _import(load_preferences(settings.prefs, **settings.loading()), settings, progress)


def plan_import(settings: ImportConfig, *, progress: Progress | None = None) -> ImportPlan:
    """Read and check a file of features as `import_features` does, and write nothing.

    Too many bad rows are counted and are no error here.
    """
    job = _Job(load_preferences(settings.prefs, **settings.loading()), settings)
    writer = job.open(dry_run=True)
    held = 0
    if job.out.exists():
        rows = job.prefs.rows(job.prefs.image_digests(max_bad=settings.max_bad))["row_id"].tolist()
        held = len(rows) - len(writer.missing(rows, sigma=SIGMA))
    return job.plan(_scan(job, None, progress), held=held)


def _import(prefs: PreferenceSet, settings: ImportConfig, progress: Progress | None) -> FeatureStore:
    prefs.unpack_images(progress)
    job = _Job(prefs, settings)
    if job.out.exists() and not job.writer.missing(job.rows["row_id"].tolist(), sigma=SIGMA):
        job.write_judgements()
        return FeatureStore(job.out)
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with _spool(job.out if job.out.is_dir() else job.out.parent, job.source.layers, len(job.keys)) as spool:
        found = _scan(job, spool, progress)
        job.check(found)
        _write(job, found, spool, progress)
    return FeatureStore(job.out)


@dataclass(frozen=True)
class _Found:
    """What one pass over a file saw: where each layer has a vector (L, K), which keys are finite (K), other keys."""

    covered: NDArray[np.bool_]
    finite: NDArray[np.bool_]
    unused: set[str | tuple[str, str]]

    @property
    def absent(self) -> NDArray[np.bool_]:
        return np.array(~self.covered.all(axis=0), bool)

    @property
    def bad(self) -> NDArray[np.bool_]:
        return self.absent | ~self.finite


class _Job:
    """One import: images there, file opened, layers numbered, keys in the order of the preference file."""

    def __init__(self, prefs: PreferenceSet, settings: ImportConfig) -> None:
        self.asked, self.prefs, self.out = settings, prefs, settings.out
        self.source = open_features(self.asked.file)
        self.points, self.n_blocks = number_layers(self.source, self.asked.blocks)
        keys = dict.fromkeys(self.key(item.image, item.prompt) for item in prefs.items.itertuples())
        self.keys = {key: place for place, key in enumerate(keys)}
        stamp = self.asked.file.stat()
        self._stamp = stamp.st_size, stamp.st_mtime_ns
        self._sha256 = file_sha256(self.asked.file)
        prefs.check_images(max_bad=settings.max_bad)

    def key(self, image: Any, prompt: Any) -> Any:
        """Return what the file calls a row."""
        return (image, prompt) if self.source.has_prompts else image

    @property
    def widths(self) -> list[int]:
        return list(self.source.layers.values())

    def open(self, *, dry_run: bool = False) -> StoreWriter:
        """Make the store, or open one that was made from the same file with the same definition."""
        config = {
            "features": "imported",
            "file_sha256": self._sha256,
            "keys": self._keys_in_words(),
            "layers": [asdict(point) for point in sorted(self.points.values(), key=lambda point: point.index)],
            "poolings": {POOLING: self.asked.definition},
        }
        describe = {
            "name": self.asked.name or self.asked.file.stem,
            "imported": True,
            "file": self.asked.file.name,
            "n_blocks": self.n_blocks,
            "width": max(self.widths),
            "n_parameters": self.asked.parameters,
            "random_weights": None,
            "training_images": None,
        }
        return open_store(self.out, config=config, describe=describe, dry_run=dry_run)

    @cached_property
    def writer(self) -> StoreWriter:
        """The store, made at first use."""
        return self.open()

    @cached_property
    def digests(self) -> dict[str, bytes]:
        cache = self.out / IMAGE_DIGESTS
        with self.writer.alone(cache.name):  # of several processes one hashes, the others read that
            return self.prefs.image_digests(cache, max_bad=self.asked.max_bad)

    @cached_property
    def rows(self) -> pd.DataFrame:
        return self.prefs.rows(self.digests)

    def write_judgements(self) -> None:
        self.writer.write_judgements(self.prefs.name, self.prefs.judgements(self.digests))

    def rows_per_shard(self) -> int:
        return rows_per_shard(values_per_row=sum(self.widths), shard_bytes=self.asked.shard_size * 2**20)

    def check(self, found: _Found) -> None:
        """Refuse a file that leaves too many rows without features, and say what was converted or left over."""
        stamp = self.asked.file.stat()
        if (stamp.st_size, stamp.st_mtime_ns) != self._stamp:
            msg = f"{self.asked.file}: changed while it was read; run the same command again"
            raise FeatureFileError(msg)
        plan = self.plan(found)
        if plan.absent + plan.not_finite > self.asked.max_bad * plan.rows:
            more = f" and {len(plan.bad) - _NAMED} more" if len(plan.bad) > _NAMED else ""
            msg = (
                f"{self.asked.file}: {plan.absent + plan.not_finite:,} of {plan.rows:,} rows of {self.prefs.path} "
                f"have no features ({plan.absent:,} absent, {plan.not_finite:,} not finite): "
                f"{', '.join(plan.bad[:_NAMED])}{more}; allowed: a share of {self.asked.max_bad:g} (--max-bad)"
            )
            if found.unused:
                msg += f"; the file has {plan.unused:,} other keys, such as {plan.other}"
            raise FeatureFileError(msg)
        if plan.bad:
            text = "%s: %d rows without features, %d not finite: %d of %d pairs are left out"
            logger.warning(
                text, self.asked.file, plan.absent, plan.not_finite, plan.pairs_left_out, len(self.prefs.pairs)
            )
        if plan.unused:
            text = "%s: %d keys are not in %s, such as %s"
            logger.info(text, self.asked.file, plan.unused, self.prefs.path, plan.other)
        if rounded := self.source.dtypes & {"float64", "double", "F64"}:
            logger.info("%s: %s is rounded to float32", self.asked.file, ", ".join(sorted(rounded)))

    def plan(self, found: _Found, *, held: int = 0) -> ImportPlan:
        """Count what a pass over the file saw."""
        of_item = np.array([self.keys[self.key(item.image, item.prompt)] for item in self.prefs.items.itertuples()])
        bad = found.bad[of_item]
        lost = bad[self.prefs.pairs["item_a"]] | bad[self.prefs.pairs["item_b"]]
        items = self.prefs.items[bad]
        return ImportPlan(
            rows=len(of_item),
            absent=int(found.absent[of_item].sum()),
            not_finite=int((bad & ~found.absent[of_item]).sum()),
            bad=tuple(dict.fromkeys(_in_words(self.key(item.image, item.prompt)) for item in items.itertuples())),
            pairs=len(lost),
            pairs_left_out=int(lost.sum()),
            unused=len(found.unused),
            other=_in_words(min(found.unused)) if found.unused else None,
            layers=tuple(
                (point.index, point.name, self.source.layers[name])
                for name, point in sorted(self.points.items(), key=lambda entry: entry[1].index)
            ),
            n_blocks=self.n_blocks,
            keys=self._keys_in_words(),
            dtypes=tuple(sorted(self.source.dtypes)),
            shards=math.ceil(len(of_item) / self.rows_per_shard()),
            nbytes=4 * len(of_item) * sum(self.widths),
            held=held,
        )

    def _keys_in_words(self) -> str:
        return "image and prompt" if self.source.has_prompts else "image"


def _scan(job: _Job, spool: Spool | None, progress: Progress | None) -> _Found:
    """Read all vectors once, check them, and put those that are needed into the spool."""
    source, done = job.source, 0
    found = _Found(np.zeros((len(source.layers), len(job.keys)), bool), np.ones(len(job.keys), bool), set())
    covered = dict(zip(source.layers, found.covered, strict=True))
    for part in source.parts():
        named: list[Any] = list(part.images if part.prompts is None else zip(part.images, part.prompts, strict=True))
        places = np.array([job.keys.get(key, -1) for key in named], np.int64)
        used = places >= 0
        found.unused.update(named[i] for i in np.flatnonzero(~used))
        at, values, seen = places[used], part.values[used], covered[part.layer]
        again = pd.Series(at).duplicated().to_numpy() | seen[at]
        if again.any():
            key = named[np.flatnonzero(used)[again.argmax()]]
            msg = f"{source.path}: layer {part.layer!r} has two vectors for {_in_words(key)}; allowed: one"
            raise FeatureFileError(msg)
        seen[at] = True
        found.finite[at] &= np.isfinite(values).all(axis=1)
        if spool is not None:
            spool[part.layer][at] = values
        done += len(named)
        if progress is not None:
            progress(done, source.n_vectors, "vectors")
    return found


def _write(job: _Job, found: _Found, spool: Spool, progress: Progress | None) -> None:
    """Cut the spool into shards."""
    writer, rows = job.writer, job.rows
    job.write_judgements()
    keys = np.array([job.keys[job.key(row.image_id, row.prompt)] for row in rows.itertuples()], np.int64)
    sizes = [path.stat().st_size if path.exists() else 0 for path in map(Path, rows["path"])]
    rows = rows.assign(key=keys, width=0, height=0, file_bytes=sizes)
    # What the file has features for needs no picture.
    rows["status"] = np.where(found.absent[rows["key"]], STATUS_UNREADABLE, STATUS_OK)
    by_id = rows.set_index("row_id")
    blocks = writer.plan(rows[["row_id", "prompt"]], sigma=SIGMA, rows_per_shard=job.rows_per_shard())
    done = len(rows) - sum(len(block.row_ids) for block in blocks)
    for block in blocks:
        with writer.claim(block, sigma=SIGMA) as mine:
            if mine:
                part = by_id.loc[list(block.row_ids)].reset_index()
                at = part["key"].to_numpy()
                features = {(POOLING, point.index): spool[name][at] for name, point in job.points.items()}
                writer.write_shard(block, sigma=SIGMA, timestep=0.0, rows=part, features=features)
        done += len(block.row_ids)
        if progress is not None:
            progress(done, len(rows), "rows")


@contextmanager
def _spool(folder: Path, layers: Mapping[str, int], keys: int) -> Iterator[Spool]:
    """Vectors of all layers in a file that has no name, so that nothing is left of it whenever the process dies."""
    with tempfile.TemporaryFile(dir=folder) as file:
        total = 4 * keys * sum(layers.values())
        try:
            # written out, since a full disk under a memory map is a crash
            for start in range(0, total, CHUNK_BYTES):
                file.write(bytes(min(CHUNK_BYTES, total - start)))
            file.flush()
        except OSError as error:
            msg = (
                f"{folder}: no room for a temporary copy of the vectors, {scaled(total, 'B')} ({error.strerror}); make "
                "space for it and for the store, and run the same command again"
            )
            raise StoreError(msg) from None
        spool, offset = {}, 0
        for name, width in layers.items():
            spool[name] = np.memmap(file, np.float32, "r+", offset, (keys, width))
            offset += 4 * keys * width
        yield spool


def _in_words(key: str | tuple[str, str]) -> str:
    return repr(key) if isinstance(key, str) else f"{key[0]!r} under {key[1]!r}"
