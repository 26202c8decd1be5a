"""SHA-256 and header of image files, remembered by path, size and time of change."""

import hashlib
import logging
import os
import stat
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from PIL import Image
from pyarrow.lib import ArrowException
from pyarrow.parquet import read_table

from probekit.errors import PreferenceError

logger = logging.getLogger(__name__)

CACHE_COLUMNS = ["path", "size", "mtime_ns", "sha256", "width", "height", "format"]
Key = tuple[str, int, int]  # path, size, time of change


class Stamp(NamedTuple):
    """SHA-256 of the bytes of an image file, and what its header says; 0 and empty where it says nothing."""

    sha256: bytes
    width: int
    height: int
    format: str


@dataclass(frozen=True)
class SideFacts:
    """Bytes, size in pixels and format of an image file; None where unknown."""

    bytes: int | None
    width: int | None
    height: int | None
    format: str


class ImageDigests(dict[str, bytes]):
    """SHA-256 of each image by path, and in ``facts`` what else is known of those that are there."""

    def __init__(self, digests: Mapping[str, bytes], facts: Mapping[str, SideFacts]) -> None:
        super().__init__(digests)
        self.facts = facts


def stamp_of(file: BufferedReader | BytesIO) -> Stamp:
    """Hash an open file and read the header of the picture in it."""
    digest = hashlib.file_digest(file, "sha256").digest()
    file.seek(0)
    try:
        with Image.open(file) as image:
            return Stamp(digest, *image.size, image.format or "")
    except Exception:  # noqa: BLE001 - decoders raise nearly anything on damaged bytes; the dump says what is wrong
        return Stamp(digest, 0, 0, "")


def stamp_bytes(data: bytes) -> Stamp:
    """Do the same for bytes."""
    return stamp_of(BytesIO(data))


def facts_of(size: int, stamp: Stamp) -> SideFacts:
    """Return what baselines know of an image."""
    return SideFacts(size, stamp.width or None, stamp.height or None, stamp.format)


def stamp_files(keys: Iterable[Key], cache: Path | None) -> dict[Key, Stamp]:
    """Hash the files that the cache does not know, and remember them; files that cannot be read are not here."""
    keys = list(keys)
    known = _read_cache(cache)
    new = [key for key in keys if key not in known]
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:  # hashing and reading leave the interpreter's lock
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # no pixel is decoded here
        hashed = zip(new, pool.map(_file_stamp, [key[0] for key in new]), strict=True)
        found = {key: stamp for key, stamp in hashed if stamp is not None}
    if cache is not None and found:
        # One entry per path: an old one of a changed file goes.
        entries = {key[0]: (key, value) for key, value in (known | found).items()}
        _write_cache(cache, dict(entries.values()))
    both = known | found
    return {key: both[key] for key in keys if key in both}


def file_status(path: str) -> tuple[int, int] | None:
    """Size and time of change of a regular file, None if there is none."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _file_stamp(path: str) -> Stamp | None:
    """Stamp of a file; None where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return stamp_of(file)
    except OSError:
        return None


def _read_cache(cache: Path | None) -> dict[Key, Stamp]:
    if cache is None or not cache.is_file():
        return {}
    try:
        table = read_table(cache, page_checksum_verification=True)
        rows = zip(*(table.column(name).to_pylist() for name in CACHE_COLUMNS), strict=True)
        return {
            (path, size, changed): Stamp(bytes.fromhex(digest), *header)
            for path, size, changed, digest, *header in rows
        }
    except (OSError, ValueError, TypeError, KeyError, ArrowException) as error:
        logger.warning("%s: not a cache of digests, made anew (%s)", cache, error)
        return {}


def _write_cache(cache: Path, digests: Mapping[Key, Stamp]) -> None:
    rows = [(*key, stamp.sha256.hex(), *stamp[1:]) for key, stamp in digests.items()]
    cache.parent.mkdir(parents=True, exist_ok=True)
    for left in cache.parent.glob(f"{cache.name}.*.tmp"):  # by a process that was killed here
        left.unlink(missing_ok=True)
    temp = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        # A flipped bit in a digest would make a row of its own: checksums of pages show it.
        pd.DataFrame(rows, columns=CACHE_COLUMNS).to_parquet(temp, index=False, write_page_checksum=True)
        temp.replace(cache)
    except OSError as error:
        temp.unlink(missing_ok=True)
        msg = f"{cache}: cannot be written ({error.strerror or error}); mend that and run the same command again"
        raise PreferenceError(msg) from error
