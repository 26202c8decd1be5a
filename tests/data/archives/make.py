"""Write the archive of the present format version beside this file: ``python tests/data/archives/make.py``.

Run it once for each version, before anything of that version is published; what is written is never written again.
Every value is a function of its place, so tests need no second copy of the numbers.
"""

import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd

from probekit._types import row_id
from probekit.store import FORMAT_VERSION, open_store

IMAGES = ["a cat-0.png", "a cat-1.png", "zwei Hunde, ü-0.png", "zwei Hunde, ü-1.png"]
WIDTHS = {"mean": 3, "grid4": 12, "text_mean": 2, "latents": 4}
LAYERS = {"mean": [0, 1, 2], "grid4": [0, 1, 2], "text_mean": [0], "latents": [0]}
CONFIG = {
    "layers": [
        {"index": 0, "name": "input of blocks.0", "stream": "image"},
        {"index": 1, "name": "blocks.0", "stream": "image"},
        {"index": 2, "name": "input of proj_out", "stream": "image"},
    ],
    "poolings": {
        "mean": "mean over image tokens",
        "grid4": "means of a 4 x 4 grid",
        "text_mean": "mean over text",
        "latents": "means of the VAE latent",
    },
    "pooling_layers": {"text_mean": [0], "latents": [0]},
    "inputs": ["latents"],
    "noise": {"scheme": "shared", "seed": 0},
    "prompts": "empty",
}
DESCRIBE = {
    "name": "golden",
    "n_blocks": 1,
    "width": 3,
    "n_parameters": 10,
    "random_weights": None,
    "training_images": None,
    "prompts": "empty",
}


def features(place: np.ndarray, *, layer: int, width: int, sigma: str, draw: int) -> np.ndarray:
    """Features (m, width) of the images at these places of ``IMAGES``: float16 holds those of layer 0 only."""
    values = np.arange(width)[None] + 10.0 * place[:, None] + 100 * draw + 1000 * float(sigma)
    return (values + 50000.1 * (layer > 0)).astype(np.float32)


def rows() -> pd.DataFrame:
    """Two prompts with two images each."""
    digests = [sha256(image.encode()).digest() for image in IMAGES]
    prompts = [image.rpartition("-")[0] for image in IMAGES]
    return pd.DataFrame(
        {
            "row_id": [row_id(digest, prompt) for digest, prompt in zip(digests, prompts, strict=True)],
            "prompt": prompts,
            "image_id": IMAGES,
            "image_sha256": digests,
            "width": 64,
            "height": 48,
            "file_bytes": 1000,
            "status": 0,
        }
    )


def make(path: Path) -> None:
    """Write a store with two noise levels, two draws at one of them, two shards each, and two pairs."""
    writer, table = open_store(path, config=CONFIG, describe=DESCRIBE), rows()
    for sigma, draw in (("0.005", 0), ("0.1", 0), ("0.1", 1)):
        for block in writer.plan(table, sigma=sigma, draw=draw, rows_per_shard=2):
            part = table.set_index("row_id").loc[list(block.row_ids)].reset_index()
            place = np.array([IMAGES.index(image) for image in part["image_id"]])
            wanted = {
                (pooling, layer): features(place, layer=layer, width=WIDTHS[pooling], sigma=sigma, draw=draw)
                for pooling, layers in LAYERS.items()
                for layer in layers
            }
            writer.write_shard(block, sigma=sigma, draw=draw, timestep=5.0, rows=part, features=wanted)
    writer.record_resolution("0.005", ratio=2.5, rows=4)
    writer.record_resolution("0.1", ratio=30.0, rows=4)
    ids = table["row_id"]
    pairs = pd.DataFrame({"pair_id": ["cats", "dogs"], "row_a": ids[0::2].tolist(), "row_b": ids[1::2].tolist()})
    pairs = pairs.assign(label=[1.0, 0.0], group=["g0", "g1"], split=["train", "test"])
    writer.write_judgements("votes", pairs)


if __name__ == "__main__":
    folder = Path(__file__).parent / FORMAT_VERSION
    if folder.exists():
        sys.exit(f"{folder} exists; an archive is written once")
    make(folder)
