"""Plan and run a dump: a frozen backbone over the rows of a preference set, into a feature store.

A row is a distinct (prompt, image), so the backbone runs at most once per pair and never twice for an image that a
ranking uses several times. Work goes block by block; a block is committed or it is not, and only missing ones are done.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from PIL import Image

from probekit._types import LayerPoint, Progress, canonical_sigma
from probekit.backbones import Backbone
from probekit.backbones import noise as draw_noise
from probekit.backbones.capture import POOLINGS, check_layers, check_poolings
from probekit.config import DumpConfig
from probekit.preferences import PreferenceSet, load_preferences
from probekit.store import Block, FeatureStore, open_store, rows_per_shard

logger = logging.getLogger(__name__)

Noise = Literal["shared", "independent", "none"]


def run_dump(settings: DumpConfig, *, progress: Progress | None = None) -> FeatureStore:
    """Do what ``probekit dump`` was asked: check the preference file, load the backbone, dump.

    Raises
    ------
    ProbekitError
        Whatever is wrong with options, files or models, as one line; nothing is written over.
    """
    prefs = load_preferences(settings.prefs)
    if settings.limit is not None:
        prefs = prefs.limit(settings.limit)
    # What needs no model is checked before one is loaded.
    check_poolings(settings.pooling)
    prefs.check_images()
    backbone = Backbone.from_pretrained(
        settings.backbone,
        transformer=settings.transformer,
        revision=settings.revision,
        dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
        device=settings.device,
        random_weights=settings.random_weights,
        max_tokens=settings.max_tokens,
        resolution=settings.resolution,
        cache=settings.cache,
        name=settings.name,
    )
    return dump_features(
        backbone,
        prefs,
        settings.out,
        sigmas=settings.sigma,
        noise=settings.noise,
        pooling=settings.pooling,
        layers=settings.layers,
        batch_size=settings.batch_size,
        seed=settings.seed,
        training_images=settings.training_images,
        shard_size=settings.shard_size,
        progress=progress,
    )


def dump_features(
    backbone: Backbone,
    prefs: PreferenceSet,
    out: Path | str,
    *,
    sigmas: Sequence[str] = ("0.005",),
    noise: Noise = "shared",
    pooling: Sequence[str] = ("mean",),
    layers: Literal["all"] | Sequence[int] = "all",
    batch_size: int = 8,
    seed: int = 0,
    training_images: int | None = None,
    shard_size: int = 512,
    progress: Progress | None = None,
) -> FeatureStore:
    """Store pooled image-token features of every row of a preference set.

    Parameters
    ----------
    backbone
        The frozen model.
    prefs
        Prompts, images and pairs. Pairs, labels and splits are kept beside the features, not in them.
    out
        The store; made, or continued if it was made with the same settings.
    sigmas
        Noise levels as decimal text; those that the store lacks are added.
    noise
        ``shared``: the images of a prompt see the same noise; ``independent``: each its own; ``none``: eps = 0,
        the mean of the noisy latent.
    pooling
        Names of `probekit.backbones.capture.POOLINGS`.
    layers
        ``all`` or layer numbers; 0 = tokens entering the first block, k = tokens after block k.
    batch_size
        Images per forward pass.
    seed
        Seed of the noise.
    training_images
        Images the transformer was trained on, where known; x-axis of the plot against training length.
    shard_size
        Largest shard in MiB; also the most memory for the latents of a block.
    progress
        Called as ``progress(done, total, text)`` with rows.

    Raises
    ------
    ConfigError
        If a layer or pooling does not exist.
    FingerprintError
        If the store was made with other settings.
    ImageError
        If an image is missing or cannot be decoded.
    """
    sigmas = [canonical_sigma(sigma) for sigma in sigmas]
    points = _points(backbone, layers)
    check_poolings(pooling)
    out = Path(out)
    config = backbone.fingerprint_config() | {
        "layers": [asdict(point) for point in points],
        "poolings": {name: POOLINGS[name].definition for name in pooling},
        "noise": {"scheme": noise, "seed": None if noise == "none" else seed},
    }
    describe = backbone.describe() | {"training_images": training_images}
    writer = open_store(out, config=config, describe=describe)
    digests = prefs.image_digests(out / "image_digests.parquet")
    writer.write_judgements(prefs.name, prefs.judgements(digests))
    rows = prefs.rows(digests)
    shard_bytes = shard_size * 2**20
    size = rows_per_shard(n_layers=len(points), n_poolings=len(pooling), width=backbone.width, shard_bytes=shard_bytes)
    # The latents of a block are held at once as well; of few layers they are the larger part.
    size = max(1, min(size, shard_bytes // (4 * math.prod(backbone.latent_shape))))
    # A block is encoded once for all the noise levels that still lack it.
    todo: dict[str, tuple[Block, list[str]]] = {}
    for sigma in sigmas:
        for block in writer.plan(rows[["row_id", "prompt"]], sigma=sigma, rows_per_shard=size):
            todo.setdefault(block.name, (block, []))[1].append(sigma)
    total = len(rows) * len(sigmas)
    done = total - sum(len(block.row_ids) * len(missing) for block, missing in todo.values())

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total, "")

    prompts = rows["prompt"].unique().tolist()
    if todo and (cut := backbone.n_cut(prompts)):
        logger.warning("%d of %d prompts are longer than a text encoder takes and are cut", cut, len(prompts))
    by_id = rows.set_index("row_id")
    for block, missing in todo.values():
        part = by_id.loc[list(block.row_ids)].reset_index()
        paths = [Path(path) for path in part["path"]]
        latents = backbone.encode_images(paths, list(part["image_sha256"]))
        sizes = np.array([_size(path) for path in paths])
        part = part.assign(width=sizes[:, 0], height=sizes[:, 1], file_bytes=sizes[:, 2], status=0)
        eps = _noise(part, latents.shape[1:], scheme=noise, seed=seed)
        for sigma in missing:
            with writer.claim(block, sigma=sigma) as mine:
                if not mine:  # another process finished it meanwhile
                    advance(len(part))
                    continue
                features = backbone.features(
                    latents,
                    list(part["prompt"]),
                    sigma=sigma,
                    eps=eps,
                    layers=[point.index for point in points],
                    poolings=list(pooling),
                    batch_size=batch_size,
                    on_batch=advance,
                )
                timestep = backbone.timestep(sigma)
                writer.write_shard(block, sigma=sigma, timestep=timestep, rows=part, features=features)
    return FeatureStore(out)


def _points(backbone: Backbone, layers: Literal["all"] | Sequence[int]) -> list[LayerPoint]:
    if layers == "all":
        return backbone.layers
    check_layers(layers, backbone.n_blocks)
    return [backbone.layers[layer] for layer in sorted(set(layers))]


def _noise(rows: pd.DataFrame, shape: tuple[int, ...], *, scheme: Noise, seed: int) -> torch.Tensor:
    """Return eps (m, c, h, w): a function of content alone, so batches, order and resuming cannot change it."""
    if scheme == "none":
        return torch.zeros(len(rows), *shape)
    keys = rows["prompt"] if scheme == "shared" else rows["image_sha256"].map(bytes.hex)
    return torch.stack([draw_noise(seed, key, 0, shape) for key in keys])


def _size(path: Path) -> tuple[int, int, int]:
    """Return the width and height of an image as its header states them, and the bytes of its file."""
    with Image.open(path) as image:
        return *image.size, path.stat().st_size
