"""One shard on disk: found, checked against its sidecar and read by offset. HDF5 never parses a file here.

m = rows of the shard, k = its prompts, d = channels.
"""

import hashlib
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from probekit._types import canonical_sigma
from probekit.errors import ConfigError, NoStoreError, StoreError
from probekit.store import format as fmt
from probekit.store.files import open_regular, read_small
from probekit.store.half import convert
from probekit.store.mend import MEND_PLAN, MEND_SHARD, MEND_STORE_FILE
from probekit.store.records import Sidecar, parse_plan, parse_sidecar, parse_store_file

CHUNK_BYTES = 2**20  # read at once: few system calls, and still in the cache when it is converted
FIRST_BYTES = 2**18  # the first time, while the checksum is computed too: the disk reads ahead meanwhile
_DRAW = re.compile("[1-9][0-9]*")  # draw 0 lies one folder higher
_SHARD = re.compile(r"[0-9a-f]{32}\.(h5|json)")  # other names are not ours


def shard_path(root: Path, sigma: str, draw: int, block: str) -> Path:
    """Place of a shard: ``shards/<sigma>/<block>.h5``, further draws one folder deeper."""
    folder = root / "shards" / sigma
    return (folder / str(draw) if draw else folder) / f"{block}.h5"


def read_store_file(path: Path) -> dict[str, Any]:
    """Read and check ``store.json``.

    Raises
    ------
    StoreError
        If it is missing, damaged, of another format or of another major version.
    """
    try:
        content = fmt.unseal(read_small(path, limit=2**24))
    except ValueError as error:
        msg = f"{path}: {error}; {MEND_STORE_FILE}"
        raise StoreError(msg) from None
    fmt.check_version(str(path), content)
    try:
        parse_store_file(content)
    except ValueError as error:
        msg = f"{path}: {error}; {MEND_STORE_FILE}"
        raise StoreError(msg) from None
    return content


def refuse_other_folder(root: Path) -> None:
    """Refuse a path at which there is no store, not even one that lost its ``store.json``.

    Raises
    ------
    NoStoreError
        If there is neither ``store.json`` nor a folder of shards.
    """
    if not os.path.lexists(root / "store.json") and not (root / "shards").is_dir():
        msg = f"{root}: no store.json; allowed: the folder of a feature store"
        raise NoStoreError(msg)


def stored_config(root: Path) -> dict[str, Any] | None:
    """Return the configuration of a store; None where there is no store yet."""
    file = root / "store.json"
    return dict(read_store_file(file)["config"]) if file.exists() else None


def plan_files(root: Path) -> list[Path]:
    """All plans of a store."""
    return sorted((root / "plans").glob("[!.]*.json"))


def read_plan(path: Path) -> list[list[str]]:
    """Read the blocks of a plan: row keys in hex.

    Raises
    ------
    StoreError
        If it is missing, damaged or not named after its content.
    """
    try:
        return parse_plan(read_small(path, limit=2**30), name=path.stem)
    except ValueError as error:
        msg = f"{path}: {error}; {MEND_PLAN}"
        raise StoreError(msg) from None


def file_digests(descriptor: int, size: int, *, without: Iterable[tuple[int, int]]) -> tuple[str, str]:
    """SHA-256 of an open file as read back, and of what lies outside the given (offset, length) ranges."""
    whole, outside = hashlib.sha256(), hashlib.sha256()
    for start, end, inside in _stretches(size, without):
        for part in _parts(descriptor, start, end):
            whole.update(part)
            if not inside:
                outside.update(part)
    return whole.hexdigest(), outside.hexdigest()


def file_digest(descriptor: int, size: int) -> str:
    """SHA-256 of an open file as read back."""
    return file_digests(descriptor, size, without=[(0, size)])[0]


def _stretches(size: int, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, bool]]:
    """Cut a file into (start, end, inside) along (offset, length) ranges that do not overlap."""
    position = 0
    for offset, length in [*sorted(ranges), (size, 0)]:
        if offset > position:
            yield position, offset, False
        yield offset, offset + length, True
        position = offset + length


def _outside(descriptor: int, size: int, ranges: Iterable[tuple[int, int]]) -> bytes:
    """Read what lies outside of (offset, length) ranges, or what there is of it."""
    parts, position = [], 0
    for offset, length in [*sorted(ranges), (size, 0)]:
        while position < offset and (part := os.pread(descriptor, offset - position, position)):
            parts.append(part)
            position += len(part)
        position = offset + length
    return b"".join(parts)


def _parts(descriptor: int, position: int, end: int) -> Iterator[memoryview]:
    """Yield the bytes of a part of a file in small pieces; the buffer is used again for the next piece."""
    buffer = memoryview(bytearray(max(0, min(CHUNK_BYTES, end - position))))
    while position < end and (count := os.preadv(descriptor, [buffer[: end - position]], position)):
        yield buffer[:count]
        position += count


@dataclass(frozen=True)
class Shard:
    """A committed shard whose sidecar is intact and whose file has the right size and metadata.

    Attributes
    ----------
    path
        The ``.h5`` file.
    sidecar
        Its commit record.
    """

    path: Path
    sidecar: Sidecar
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    def _refuse(self, what: str) -> NoReturn:
        msg = f"{self.path}: {what}; {MEND_SHARD}"
        raise StoreError(msg)

    def chunks(self, name: str, *, size: int = CHUNK_BYTES) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield a dataset's bytes as (position, buffer (at most `size`)); the buffer is used again for the next chunk.

        Raises
        ------
        StoreError
            If the file changed, or at the end of the first complete read if the checksum does not fit.
        """
        record = self.sidecar.datasets[name]
        scratch = np.empty(min(record.nbytes, size), np.uint8)
        yield from self._read(name, scratch, whole=False, step=size)

    def read_into(self, name: str, out: NDArray[np.uint8]) -> None:
        """Read a whole dataset straight into a buffer of its size.

        Raises
        ------
        StoreError
            If the file changed or its checksum does not fit.
        """
        for _ in self._read(name, out, whole=True, step=CHUNK_BYTES):
            pass

    def _read(
        self, name: str, buffer: NDArray[np.uint8], *, whole: bool, step: int
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        record, crc = self.sidecar.datasets[name], 0
        descriptor, size = open_regular(self.path)
        try:
            if size != self.sidecar.bytes:
                self._refuse(f"{size} bytes instead of {self.sidecar.bytes}")
            for start in range(0, record.nbytes, step):
                length = min(step, record.nbytes - start)
                part = buffer[start : start + length] if whole else buffer[:length]
                if os.preadv(descriptor, [part.data], (record.offset or 0) + start) != length:
                    self._refuse(f"dataset {name} ends early")
                if name not in self._checked:
                    crc = zlib.crc32(part.data, crc)
                yield start, part
        finally:
            os.close(descriptor)
        if name not in self._checked and crc != record.crc32:
            self._refuse(f"dataset {name} does not have the checksum of its sidecar")
        self._checked.add(name)

    def table(self, name: str) -> NDArray[np.uint8] | NDArray[np.int64]:
        """Read one dataset of the rows or prompts table in its own dtype and shape."""
        record = self.sidecar.datasets[name]
        out = np.empty(record.nbytes, np.uint8)
        self.read_into(name, out)
        return out.view(record.dtype).reshape(record.shape)

    def texts(self, name: str, offsets: str) -> list[str]:
        """Read a table of UTF-8 texts."""
        data, ends = self.table(name).tobytes(), self.table(offsets).tolist()
        if ends[0] != 0 or ends[-1] != len(data) or any(a > b for a, b in pairwise(ends)):
            self._refuse(f"dataset {offsets} does not cut {name} into texts")
        try:
            return [data[a:b].decode() for a, b in pairwise(ends)]
        except UnicodeDecodeError:
            self._refuse(f"dataset {name} is not UTF-8")

    def row_keys(self) -> tuple[bytes, ...]:
        """Keys of the m rows in the order of the shard."""
        joined = self.table("rows/row_id").tobytes()
        digest = hashlib.sha256(joined).hexdigest()
        if digest != self.sidecar.rows_sha256 or not digest.startswith(self.sidecar.block):
            self._refuse("the rows are not those of the block it is named after")
        keys = struct.unpack("32s" * self.sidecar.n_rows, joined)
        if len(set(keys)) != len(keys):
            self._refuse("holds a row twice")
        return keys

    def row_ids(self) -> list[str]:
        """Keys of the m rows, hex, in the order of the shard."""
        return list(map(bytes.hex, self.row_keys()))

    def row_prompts(self) -> list[str]:
        """Prompt of each of the m rows."""
        prompts = np.array([*self.texts("prompts/text_utf8", "prompts/text_offsets"), None], object)
        index = self.table("rows/prompt_index")
        if len(index) and not 0 <= index.min() <= index.max() < len(prompts) - 1:
            self._refuse("rows/prompt_index points outside the prompts")
        found: list[str] = prompts[index].tolist()
        return found

    def width(self, name: str) -> int:
        """Channels d of a feature dataset (m, d)."""
        record = self.sidecar.datasets.get(name)
        if record is None or record.shape[:1] != [self.sidecar.n_rows] or not record.nbytes:
            self._refuse(f"no dataset {name} of {self.sidecar.n_rows} rows")
        if len(record.shape) != 2 or record.dtype not in ("<f2", "<f4"):
            self._refuse(
                f"dataset {name} is {record.dtype} of shape {record.shape}; allowed: features (rows, channels)"
            )
        return record.shape[1]

    def read_features(self, name: str, out: NDArray[np.float32]) -> None:
        """Read a whole feature dataset into ``out`` (m, d), which is contiguous."""
        record, flat = self.sidecar.datasets[name], out.reshape(-1)
        if record.dtype == "<f4":
            self.read_into(name, flat.view(np.uint8))
            return
        for start, part in self.chunks(name, size=CHUNK_BYTES if name in self._checked else FIRST_BYTES):
            convert(part.view("<f2"), flat[start // 2 : (start + len(part)) // 2])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.floating[Any]]:
        """Read rows of a feature dataset as stored, (stop - start, d); the first time, the whole is checked."""
        record, width = self.sidecar.datasets[name], self.width(name)
        if name not in self._checked:
            for _ in self.chunks(name):
                pass
        size = width * np.dtype(record.dtype).itemsize
        out = np.empty((stop - start) * size, np.uint8)
        descriptor, _ = open_regular(self.path)
        try:
            if os.preadv(descriptor, [out.data], (record.offset or 0) + start * size) != len(out):
                self._refuse(f"dataset {name} ends early")
        finally:
            os.close(descriptor)
        return out.view(record.dtype).reshape(-1, width)


def check_shard(path: Path, *, fingerprint: str, sigma: str, draw: int) -> Shard | str | None:
    """Look at one shard without reading its features.

    Returns
    -------
    Shard, str or None
        The shard if it is done; what is wrong if it is damaged; None if it was never committed.
    """
    sidecar_path = path.with_suffix(".json")
    if not sidecar_path.exists() and not sidecar_path.is_symlink():
        return None
    try:
        sidecar = parse_sidecar(read_small(sidecar_path, limit=2**24))
        descriptor, size = open_regular(path)
    except ValueError as error:
        return f"{sidecar_path}: {error}"
    except StoreError as error:
        return str(error)
    try:
        stored = (sidecar.format, sidecar.format_version.split(".")[0], sidecar.fingerprint)
        if stored != (fmt.FORMAT, str(fmt.FORMAT_MAJOR), fingerprint):
            return f"{sidecar_path}: belongs to another store or format"
        if (sidecar.block, sidecar.sigma, sidecar.draw) != (path.stem, sigma, draw):
            return f"{sidecar_path}: belongs to another shard"
        if sidecar.bytes != size:
            return f"{path}: {size} bytes instead of {sidecar.bytes}"
        ranges = [(r.offset, r.nbytes) for r in sidecar.datasets.values() if r.offset is not None]
        metadata = _outside(descriptor, size, ranges)
        if hashlib.sha256(metadata).hexdigest() != sidecar.meta_sha256:
            return f"{path}: its HDF5 metadata is not what was written"
        # A sidecar can be edited and sealed again; the file still holds the digest of what was written beside it.
        bound = sidecar.format_version not in fmt.UNBOUND or fmt.RECORD.encode() in metadata
        if bound and sidecar.record_sha256.encode() not in metadata:
            return f"{sidecar_path}: is not the record that was written with its .h5 file"
    finally:
        os.close(descriptor)
    return Shard(path, sidecar)


def scan(root: Path, *, fingerprint: str) -> tuple[list[Shard], list[str]]:
    """Find all shards of a store.

    Returns
    -------
    shards
        Those that are done, sorted by (sigma, draw, block).
    problems
        One line for each damaged one, with what mends it.
    """
    shards: list[Shard] = []
    problems: list[str] = []
    for path, sigma, draw in shard_files(root, problems):
        found = check_shard(path, fingerprint=fingerprint, sigma=sigma, draw=draw)
        if isinstance(found, Shard):
            shards.append(found)
        elif found:
            problems.append(f"{found}; {MEND_SHARD}")
    return shards, problems


def shard_files(root: Path, problems: list[str]) -> Iterator[tuple[Path, str, int]]:
    """Yield (path of the ``.h5`` file, sigma, draw) wherever it or its sidecar is there, sorted in each folder."""
    for folder, sigma, draw in _shard_folders(root / "shards", problems):
        names = {entry.name.partition(".")[0] for entry in os.scandir(folder) if _SHARD.fullmatch(entry.name)}
        for name in sorted(names):
            yield folder / f"{name}.h5", sigma, draw


def _shard_folders(root: Path, problems: list[str]) -> Iterator[tuple[Path, str, int]]:
    """Yield (folder, sigma, draw); a link in place of a folder is a problem, other names are not ours."""
    if problem := no_folder(root):
        problems.append(problem)
        return
    for folder in sorted(root.iterdir()) if root.exists() else []:
        ours, problem = _is_sigma(folder.name), no_folder(folder)
        if problem and (ours or folder.is_symlink()):
            problems.append(problem)
        elif ours:
            yield folder, folder.name, 0
            for inner in sorted(folder.iterdir()):
                if _DRAW.fullmatch(inner.name):
                    if problem := no_folder(inner):
                        problems.append(problem)
                    else:
                        yield inner, folder.name, int(inner.name)


def no_folder(path: Path) -> str | None:
    """Say what stands in the place of a folder, if it is something else; there may be nothing."""
    if path.is_symlink():
        return f"{path}: is a symbolic link; allowed: a folder"
    return f"{path}: not a folder; allowed: a folder" if path.exists() and not path.is_dir() else None


def _is_sigma(name: str) -> bool:
    try:
        return canonical_sigma(name) == name
    except ConfigError:
        return False
