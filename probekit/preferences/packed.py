"""Images that stand as bytes inside Parquet files or Arrow data sets: found by name, read a few rows at a time.

Nothing here holds more than a few dozen images at once.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.parquet import ParquetFile

from probekit._types import Progress
from probekit.errors import ImageError

_ROWS = 32  # rows whose bytes are held at once


class ParquetRows:
    """Rows of a Parquet file with a schema; the parts are its row groups."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with ParquetFile(path) as file:
            self.schema = file.schema_arrow
            self.parts = range(file.num_row_groups)

    def batches(self, columns: Sequence[str], *, size: int, part: int | None = None) -> Iterator[Any]:
        """Yield batches of at most so many rows of the columns, of one part or of all."""
        groups = list(self.parts) if part is None else [part]
        # Without these two the whole row group is in memory, pictures and all.
        with ParquetFile(self._path, pre_buffer=False, buffer_size=2**20) as file:
            yield from file.iter_batches(batch_size=size, columns=list(columns), row_groups=groups, use_threads=False)

    def part_rows(self, part: int) -> int:
        """Rows of a part."""
        with ParquetFile(self._path) as file:
            return int(file.metadata.row_group(part).num_rows)

    def part_bytes(self, part: int, column: str) -> int:
        """Bytes of a column of a part, before compression."""
        with ParquetFile(self._path) as file:
            group = file.metadata.row_group(part)
            chunks = [group.column(i) for i in range(group.num_columns)]
            return sum(
                chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column
            )


class DatasetRows:
    """Rows of a data set of the library ``datasets``, memory-mapped by it; a part is a thousand rows."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset.with_format("arrow")
        self.schema = dataset.features.arrow_schema
        self.parts = range(-(-len(dataset) // 1000))

    def batches(self, columns: Sequence[str], *, size: int, part: int | None = None) -> Iterator[Any]:
        """See `ParquetRows`."""
        rows = self._dataset
        if part is not None:
            rows = rows.select(range(1000 * part, min(1000 * (part + 1), len(rows))))
        yield from rows.select_columns(list(columns)).iter(batch_size=size)

    def part_rows(self, part: int) -> int:
        """See `ParquetRows`."""
        return min(1000, len(self._dataset) - 1000 * part)

    def part_bytes(self, part: int, column: str) -> int:
        """See `ParquetRows`."""
        return sum(batch.column(column).nbytes for batch in self.batches([column], size=_ROWS, part=part))


ArrowRows = ParquetRows | DatasetRows


def holds_bytes(kind: pa.DataType) -> bool:
    """Say whether a column holds images as bytes, alone or with a path, as ``datasets`` writes its feature Image."""
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


@dataclass(frozen=True)
class PackedColumn:
    """A column of bytes and how its images are named: by another column, or by the file's stem and the row's number."""

    rows: ArrowRows
    column: str
    folder: Path
    stem: str
    uid: str | None = None

    def names(self, part: int, start: int) -> list[str | None]:
        """Paths of the images of a part of which the first row has the given number."""
        if self.uid is None:
            rows = range(start, start + self.rows.part_rows(part))
            return [str(self.folder / row_name(self.stem, row, self.column)) for row in rows]
        batches = self.rows.batches([self.uid], size=16384, part=part)
        uids = [uid for batch in batches for uid in batch.column(0).to_pylist()]
        return [None if uid is None else str(self.folder / uid_name(uid)) for uid in uids]


def uid_name(uid: Any) -> Any:
    """File name of an image that has an identifier, a text or texts; the pictures of Pick-a-Pic are JPEG files."""
    return uid + ".jpg"


def row_name(stem: str, row: int, column: str) -> str:
    """File name of an image that is named by nothing but its place; readers go by content, not by ending."""
    return f"{stem}-{row:07d}-{column}.png"


class Packed:
    """Images inside the data files of a preference set, and the files that they become beside it.

    Parameters
    ----------
    columns
        Where the bytes are.
    """

    def __init__(self, columns: Sequence[PackedColumn]) -> None:
        self._columns = tuple(columns)
        self.folders = {str(column.folder) for column in self._columns}

    def _plan(self, paths: set[str]) -> Iterator[tuple[PackedColumn, int, list[str | None]]]:
        """Parts that hold any of the images, and the names of all images of each."""
        for column in self._columns:
            start = 0
            for part in column.rows.parts:
                names = column.names(part, start)
                start += len(names)
                if not paths.isdisjoint(names):
                    yield column, part, names

    def size(self, paths: set[str]) -> int:
        """Give about how many bytes the images take, from what the files say of their columns."""
        total = 0.0
        for column, part, names in self._plan(paths):
            total += column.rows.part_bytes(part, column.column) * sum(name in paths for name in names) / len(names)
        return round(total)

    def read(self, paths: set[str], *, beside: set[str] | None = None) -> Iterator[tuple[str, bytes]]:
        """Yield path and bytes of images wherever they stand: one that stands twice comes twice.

        Parameters
        ----------
        paths
            The images.
        beside
            Read only parts of the files that hold any of these (default: any of the images).
        """
        for column, part, names in self._plan(paths if beside is None else beside):
            at = 0
            for batch in column.rows.batches([column.column], size=_ROWS, part=part):
                values = batch.column(column.column)
                for i in range(batch.num_rows):
                    name, value = names[at], values[i].as_py() if names[at] in paths else None
                    data = value.get("bytes") if isinstance(value, dict) else value
                    if name is not None and data is not None:
                        yield name, data
                    at += 1

    def unpack(self, paths: set[str], progress: Progress | None = None) -> int:
        """Write the images that are not there yet, each whole or not at all.

        Returns
        -------
        int
            How many pictures have other bytes than the first of the same name, which is kept.

        Raises
        ------
        ImageError
            If the folder cannot be written.
        """
        absent = {path for path in paths if not Path(path).exists()}
        done, differ = 0, 0
        # All images of these parts, not only the absent: of two with one name the second would go unseen.
        for path, data in self.read(paths, beside=absent):
            file = Path(path)
            try:
                if file.exists():
                    differ += file.read_bytes() != data
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                temp = file.with_name(f".tmp-{os.getpid()}-{file.name}")
                try:
                    temp.write_bytes(data)
                    temp.replace(file)
                finally:
                    temp.unlink(missing_ok=True)
            except OSError as error:
                msg = f"{path}: cannot be written ({error.strerror or error}); mend that and run the same command again"
                raise ImageError(msg) from error
            done += 1
            if progress is not None:
                progress(done, len(absent), "images unpacked")
        return differ
