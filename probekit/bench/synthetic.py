"""Rows and features that cost a store what real ones do.

Two images of a prompt share most of their features, as under shared noise. Of every four layers one has massive
activations that overflow float16, and one has channels whose mean is so far from zero that float16 would round away the
differences within pairs; the other two fit into float16.

m = rows, d = channels.
"""

import hashlib
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit._types import row_id

POOLING = "mean"
_ROWS_AT_ONCE = 256
_MASSIVE, _OFFSET = 40_000.0, 500.0


def synthetic_config(n_layers: int) -> dict[str, Any]:
    """Return the configuration of a store of synthetic features."""
    layers = [{"index": layer, "name": f"blocks.{layer}", "stream": "image"} for layer in range(n_layers)]
    return {"layers": layers, "poolings": {POOLING: "synthetic"}}


def synthetic_rows(n_rows: int) -> pd.DataFrame:
    """Return m rows, two to a prompt, in the columns that `StoreWriter.write_shard` takes."""
    prompts = [f"photo {row // 2} of the benchmark, in the words of a prompt of usual length" for row in range(n_rows)]
    digests = [hashlib.sha256(f"image {row}".encode()).digest() for row in range(n_rows)]
    return pd.DataFrame(
        {
            "row_id": [row_id(digest, prompt) for digest, prompt in zip(digests, prompts, strict=True)],
            "prompt": prompts,
            "image_id": [f"images/{row:08d}.jpg" for row in range(n_rows)],
            "image_sha256": digests,
            "width": 1024,
            "height": 768,
            "file_bytes": 200_000,
            "status": 0,
        }
    )


def synthetic_features(
    *, n_rows: int, n_layers: int, width: int, seed: int
) -> dict[tuple[str, int], NDArray[np.float32]]:
    """Return (pooling, layer) -> features (m, d); little memory is taken beside them."""
    generator = np.random.default_rng(seed)
    features = {(POOLING, layer): np.empty((n_rows, width), np.float32) for layer in range(n_layers)}
    for (_, layer), values in features.items():
        for start in range(0, n_rows, _ROWS_AT_ONCE):
            part = values[start : start + _ROWS_AT_ONCE]
            generator.standard_normal(dtype=np.float32, out=part)
            seconds = part[1::2]
            seconds *= np.float32(0.2)
            seconds += part[: 2 * len(seconds) : 2]
        few = max(1, width // 100)
        if layer % 4 == 3:
            values[:, :few] += np.float32(_MASSIVE)
        elif layer % 4 == 1:
            values[:, : 2 * few] += np.float32(_OFFSET)
    return features
