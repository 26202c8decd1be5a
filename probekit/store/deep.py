"""Read a whole shard and hold everything it says of itself against its bytes.

m = rows of the shard, d = channels.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probekit._types import row_id
from probekit.store import format as fmt
from probekit.store.files import open_regular
from probekit.store.shards import Shard, file_digest

CLOSE = 1e-3
"""Relative difference that other releases of numpy may make in a noise ratio."""


def matches_digest(shard: Shard) -> bool:
    """Whether the file has the SHA-256 of its sidecar; HDF5 may see no other."""
    descriptor, size = open_regular(shard.path)
    try:
        return file_digest(descriptor, size) == shard.sidecar.sha256
    finally:
        os.close(descriptor)


def content_problems(shard: Shard) -> Iterator[str]:
    """Recompute checksums, keys, status and figures of every dataset.

    Yields
    ------
    str
        What is wrong.

    Raises
    ------
    StoreError
        If a checksum does not fit, or a table cannot be read; nothing after it is looked at.
    """
    for name in shard.sidecar.datasets:
        if not name.startswith("features/"):
            for _ in shard.chunks(name):
                pass
    prompts, index = shard.row_prompts(), shard.table("rows/prompt_index").astype(np.int64)
    texts = shard.texts("prompts/text_utf8", "prompts/text_offsets")
    shard.texts("rows/image_id_utf8", "rows/image_id_offsets")
    if shard.table("prompts/sha256").tobytes() != b"".join(hashlib.sha256(text.encode()).digest() for text in texts):
        yield "prompts/sha256 is not that of the prompts"
    images = shard.table("rows/image_sha256")
    keys = [row_id(image.tobytes(), prompt) for image, prompt in zip(images, prompts, strict=True)]
    if keys != shard.row_ids():
        yield "rows/row_id is not that of images and prompts"
    if np.count_nonzero(np.diff(index, prepend=-1)) != len(set(index.tolist())):
        yield "rows of one prompt are not adjacent"
    status = shard.table("rows/status")
    if not np.isin(status, (fmt.STATUS_OK, fmt.STATUS_UNREADABLE, fmt.STATUS_NON_FINITE)).all():
        yield "rows/status holds other values than 0, 1 and 2"
    bad_rows = []
    for name, record in shard.sidecar.datasets.items():
        if name.startswith("features/"):
            yield from (f"{name}: {problem}" for problem in _feature_problems(shard, name, status == 0, index))
            bad_rows.append(record.nonfinite_rows or 0)
    non_finite = int((status == fmt.STATUS_NON_FINITE).sum())
    if not max(bad_rows) <= non_finite <= sum(bad_rows):
        yield f"{non_finite} rows are marked as not finite, nonfinite_rows of the layers are {sorted(set(bad_rows))}"


def _feature_problems(shard: Shard, name: str, ok: NDArray[np.bool_], index: NDArray[np.int64]) -> Iterator[str]:
    """Hold the features of one layer (m, d) against status and record."""
    record = shard.sidecar.datasets[name]
    values = np.empty((len(ok), shard.width(name)), np.float32)
    shard.read_features(name, values)
    counted = values if ok.all() else values[ok]
    low, high = (float(counted.min()), float(counted.max())) if counted.size else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        yield "a row of status 0 is not finite"
        return
    if not np.isnan(values[~ok]).all():
        yield "a row of a status other than 0 is not NaN"
        return
    recorded = (record.absmax, record.quantisation_noise, record.nonfinite_rows)
    if any(figure is None or not 0 <= figure < math.inf for figure in recorded):
        yield f"absmax, quantisation_noise and nonfinite_rows are {recorded}; allowed: numbers from 0"
        return
    absmax, noise, ratio = record.absmax or 0.0, record.quantisation_noise or 0.0, record.noise_ratio
    seen = max(high, -low)
    if record.dtype == "<f2":
        # What the values were before they were rounded is gone, and the ratio with it.
        fits = absmax < fmt.FP16_LIMIT and ratio is not None and 0 <= ratio <= fmt.FP16_NOISE_RATIO
        if not fits or not len(fmt.first_of_pairs(ok, index)):
            yield f"is float16 with absmax {absmax} and noise_ratio {ratio}, against the rule"
        elif float(np.float16(absmax)) != seen:
            yield f"absmax is {absmax}, that of the values is {seen}"
        return
    dtype, figures = fmt.choose_dtype(values, ok, index)
    if absmax != seen:
        yield f"absmax is {absmax}, that of the values is {seen}"
    if not _close(ratio, figures.noise_ratio):
        yield f"noise_ratio is {ratio}, that of the values is {figures.noise_ratio}"
    elif dtype != "<f4" and not _close(figures.noise_ratio, fmt.FP16_NOISE_RATIO):
        yield f"is float32 with absmax {absmax} and noise_ratio {ratio}, against the rule"
    if noise != 0:
        yield f"quantisation_noise is {noise}; allowed for float32: 0"


def _close(a: float | None, b: float | None) -> bool:
    return a == b if a is None or b is None else math.isclose(a, b, rel_tol=CLOSE, abs_tol=1e-30)


def hdf5_request(shard: Shard, config_json: str) -> dict[str, Any]:
    """Collect what `Hdf5Checker.check` needs to know of a shard."""
    identity = ("format", "format_version", "fingerprint", "block", "sigma", "draw")
    attributes = {key: getattr(shard.sidecar, key) for key in identity} | {"config_json": config_json}
    if shard.sidecar.format_version not in fmt.UNBOUND:
        attributes[fmt.RECORD] = shard.sidecar.record_sha256
    return {
        "datasets": {name: record.model_dump() for name, record in shard.sidecar.datasets.items()},
        "attributes": attributes,
    }
