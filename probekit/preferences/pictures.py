"""One look at each image file of a preference set: is it there, can it be read, and what does it look like.

Everything is taken from the bytes at once: their hash, and a perceptual hash of what is decoded.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import imagehash
import numpy as np
import pandas as pd

from probekit._pictures import opened, to_rgb
from probekit._types import Progress
from probekit._workers import run_in_processes
from probekit.errors import ImageError

FLAT = 2.0  # standard deviation of values from 0 to 255, below which there is nothing to see
_CHUNK = 64
_PARALLEL = 500  # images that are looked at sooner than further processes have started


@dataclass(frozen=True)
class Look:
    """What one image file is.

    Attributes
    ----------
    path
        The file.
    problem
        ``missing``, ``zero_bytes``, ``unreadable``, or empty.
    digest
        SHA-256 of its bytes, hex; empty where there are none.
    phash
        Perceptual hash of the picture in grey, 64 bits; 0 where there is none.
    hashed
        Whether there is one: a picture that is flat in grey would have that of its rounding errors.
    one_colour
        Whether the picture is one colour.
    """

    path: str
    problem: str = ""
    digest: str = ""
    phash: int = 0
    hashed: bool = False
    one_colour: bool = False


def look_at(paths: Sequence[str], *, jobs: int | None = None, progress: Progress | None = None) -> pd.DataFrame:
    """Look at every image file once.

    Parameters
    ----------
    paths
        Absolute paths, each once.
    jobs
        Processes; default: one for few images, else one a core, up to 8.
    progress
        Called as ``progress(done, total, "images")``.

    Returns
    -------
    DataFrame
        Fields of `Look`, indexed by path, in the order of the paths.
    """
    if jobs is None:
        jobs = min(8, os.cpu_count() or 1) if len(paths) >= _PARALLEL else 1
    chunks = [tuple(paths[start : start + _CHUNK]) for start in range(0, len(paths), _CHUNK)]
    looks: dict[str, Look] = {}
    for _, found in run_in_processes(_look_at_all, chunks, jobs=jobs):
        looks |= {look.path: look for look in found}
        if progress is not None:
            progress(len(looks), len(paths), "images")
    frame = pd.DataFrame([vars(looks[path]) for path in paths], columns=list(Look.__dataclass_fields__))
    return frame.astype({"phash": "uint64", "hashed": "bool", "one_colour": "bool"}).set_index("path")


def _look_at_all(paths: Sequence[str]) -> list[Look]:
    return [_look(path) for path in paths]


def _look(path: str) -> Look:
    file = Path(path)
    if not file.is_file():  # a pipe would never end
        return Look(path, "missing")
    try:
        data = file.read_bytes()
    except OSError:
        return Look(path, "unreadable")
    if not data:
        return Look(path, "zero_bytes")
    known = partial(Look, path, digest=sha256(data).hexdigest())
    try:
        with opened(file, io.BytesIO(data)) as image:
            image.load()
            picture = to_rgb(image)
    except ImageError:
        return known("unreadable")
    small = picture.resize((32, 32))  # the size at which the hash looks: noise is averaged away
    if np.asarray(small.convert("L")).std() < FLAT:
        return known(one_colour=bool(np.asarray(small).std(axis=(0, 1)).max() < FLAT))
    bits = imagehash.phash(picture).hash
    return known(phash=int.from_bytes(np.packbits(bits.ravel()).tobytes(), "big"), hashed=True)
