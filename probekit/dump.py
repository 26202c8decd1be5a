"""Plan and run a dump: a frozen backbone over the rows of a preference set, into a feature store.

A row is a distinct (prompt, image), so the backbone runs at most once per pair and never twice for an image that a
ranking uses several times. Work goes block by block; a block is committed or it is not, and only missing ones are done.
Each image is decoded and encoded once for all its noise levels and draws.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import chain, product
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from PIL import Image

from probekit._types import RESOLVED_RATIO, LayerPoint, Progress
from probekit.backbones import Backbone
from probekit.backbones import noise as draw_noise
from probekit.backbones.capture import POOLINGS, check_layers, check_poolings
from probekit.backbones.resolution import noise_over_rounding
from probekit.config import DumpConfig
from probekit.errors import ConfigError
from probekit.preferences import PreferenceSet, load_preferences
from probekit.store import Block, FeatureStore, StoreWriter, open_store, rows_per_shard

RESOLUTION_ROWS = 8
"""Rows on which the effect of a noise level is compared with that of rounding."""

logger = logging.getLogger(__name__)

Noise = Literal["shared", "independent", "none"]
Coordinates = tuple[str, int]
"""Noise level and number of the draw."""


def run_dump(settings: DumpConfig, *, progress: Progress | None = None) -> FeatureStore:
    """Do what ``probekit dump`` was asked: check the preference file, find the backbone, dump.

    Raises
    ------
    ProbekitError
        Whatever is wrong with options, files or models, as one line; nothing is written over.
    """
    prefs = load_preferences(settings.prefs)
    if settings.limit is not None:
        prefs = prefs.limit(settings.limit)
    # What needs no model is checked before one is looked for.
    check_poolings(settings.pooling)
    prefs.check_images()
    backbone = Backbone.from_pretrained(
        settings.backbone,
        transformer=settings.transformer,
        revision=settings.revision,
        dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
        device=settings.device,
        random_weights=settings.random_weights,
        lora=settings.lora,
        max_tokens=settings.max_tokens,
        resolution=settings.resolution,
        resize=settings.resize,
        offload=settings.offload,
        compile=settings.compile,
        cache=settings.cache,
        name=settings.name,
    )
    return dump_features(
        backbone,
        prefs,
        settings.out,
        sigmas=settings.sigma,
        draws=settings.draws,
        noise=settings.noise,
        prompts=settings.prompts,
        pooling=settings.pooling,
        layers=settings.layers,
        output_tokens=settings.output_tokens,
        batch_size=settings.batch_size,
        decode_workers=settings.decode_workers,
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
    draws: int = 1,
    noise: Noise = "shared",
    prompts: str = "real",
    pooling: Sequence[str] = ("mean",),
    layers: Literal["all"] | Sequence[int] = "all",
    output_tokens: bool = False,
    batch_size: int = 8,
    decode_workers: int | None = None,
    seed: int = 0,
    training_images: int | None = None,
    shard_size: int = 512,
    progress: Progress | None = None,
) -> FeatureStore:
    """Store pooled token features of every row of a preference set.

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
    draws
        Number of noise draws of every image; those that the store lacks are added.
    noise
        ``shared``: the images of a prompt see the same noise; ``independent``: each its own; ``none``: eps = 0,
        the mean of the noisy latent.
    prompts
        What the model is told: ``real`` prompts, or as a control ``empty`` ones or ``shuffled:SEED``, a permutation of
        the set's prompts that leaves none in its place. Rows and noise keep the real prompt as their key.
    pooling
        Names of `probekit.backbones.capture.POOLINGS`.
    layers
        ``all`` or layer numbers; 0 = tokens entering the first block, k = tokens after block k.
    output_tokens
        Also store the tokens that enter the output projection, as layer n_blocks + 1.
    batch_size
        Images per forward pass.
    decode_workers
        Processes that decode and resize images ahead of the model; default: none on the CPU, else one a core, up to 8.
    seed
        Seed of the noise.
    training_images
        Images the transformer was trained on, where known; x-axis of the plot against training length.
    shard_size
        Largest shard in MiB; also the most memory for the latents of a block.
    progress
        Called as ``progress(done, total, text)``, the text being ``prompts`` (embedded) or ``rows`` (of features).

    Raises
    ------
    ConfigError
        If a layer or pooling does not exist, or prompts cannot be shuffled.
    FingerprintError
        If the store was made with other settings.
    ImageError
        If an image is missing or cannot be decoded.
    """
    asked = DumpConfig.checked(  # by the rules of the command line
        {
            "backbone": backbone.name,
            "prefs": prefs.path,
            "out": out,
            "sigma": list(sigmas),
            "draws": draws,
            "noise": noise,
            "prompts": prompts,
            "pooling": list(pooling),
            "layers": layers if isinstance(layers, str) else list(layers),
            "batch_size": batch_size,
            "decode_workers": decode_workers,
            "seed": seed,
            "training_images": training_images,
            "shard_size": shard_size,
        },
        source="dump_features",
    )
    if noise == "none" and draws > 1:
        msg = f"draws is {draws} with noise 'none'; allowed: 1, since all draws would be equal"
        raise ConfigError(msg)
    # without noise all draws would be equal
    coordinates = [(sigma, draw) for sigma, draw in product(asked.sigma, range(draws)) if sigma != "0" or draw == 0]
    points = _points(backbone, layers, output_tokens=output_tokens)
    wanted = backbone.wanted(pooling, [point.index for point in points])
    out = Path(out)
    said = _conditions(prefs.items["prompt"].unique().tolist(), prompts)
    config = backbone.fingerprint_config() | {
        "layers": [asdict(point) for point in points],
        "poolings": {name: POOLINGS[name].definition for name in pooling},
        "noise": {"scheme": noise, "seed": None if noise == "none" else seed},
        "prompts": prompts if not prompts.startswith("shuffled") else f"{prompts} of {_digest(sorted(said))}",
    }
    partial = {name: [at for of, at in wanted if of == name] for name in pooling}
    partial = {name: at for name, at in partial.items() if len(at) < len(points)}
    if partial:
        config["pooling_layers"] = partial
    describe = backbone.describe() | {"training_images": training_images, "prompts": prompts}
    writer = open_store(out, config=config, describe=describe)
    digests = prefs.image_digests(out / "image_digests.parquet")
    writer.write_judgements(prefs.name, prefs.judgements(digests))
    rows = prefs.rows(digests)
    shard_bytes = shard_size * 2**20
    size = rows_per_shard(
        values_per_row=backbone.width * sum(POOLINGS[name].factor for name, _ in wanted), shard_bytes=shard_bytes
    )
    # The latents of a block are held at once as well; of few layers they are the larger part.
    size = max(1, min(size, shard_bytes // backbone.latent_bytes))
    # A block is encoded once for all the noise levels and draws that still lack it.
    todo: dict[str, tuple[Block, list[Coordinates]]] = {}
    for sigma, draw in coordinates:
        for block in writer.plan(rows[["row_id", "prompt"]], sigma=sigma, draw=draw, rows_per_shard=size):
            todo.setdefault(block.name, (block, []))[1].append((sigma, draw))
    total = len(rows) * len(coordinates)
    done = total - sum(len(block.row_ids) * len(missing) for block, missing in todo.values())

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total, "rows")

    def embedded(count: int, of: int) -> None:
        if progress is not None:
            progress(count, of, "prompts")

    if decode_workers is None:
        decode_workers = 0 if backbone.device.type == "cpu" else min(8, os.cpu_count() or 1)
    if not todo:
        return FeatureStore(out)
    _warn(backbone, list(said.values()), [sigma for sigma, _ in coordinates])
    by_id = rows.set_index("row_id")
    parts = [by_id.loc[list(block.row_ids)].reset_index() for block, _ in todo.values()]
    told = [[said[prompt] for prompt in part["prompt"]] for part in parts]
    files = [list(zip(map(Path, part["path"]), part["image_sha256"], strict=True)) for part in parts]
    with closing(backbone.latents(files, workers=decode_workers)) as encoded:
        for number, ((block, missing), part, latents) in enumerate(zip(todo.values(), parts, encoded, strict=True)):
            sizes = np.array([_size(Path(path)) for path in part["path"]])
            part = part.assign(width=sizes[:, 0], height=sizes[:, 1], file_bytes=sizes[:, 2], status=0)
            if number == 0:  # a row that does not fit is refused before all prompts are embedded
                backbone.load(told[0][0], tuple(latents[0].shape))
            backbone.prompts.embed(told[number], later=chain.from_iterable(told[number + 1 :]), on_prompts=embedded)
            eps = {
                draw: _noise(part, latents, scheme=noise, seed=seed, draw=draw, canvas=backbone.canvas)
                for draw in dict.fromkeys(draw for _, draw in missing)
            }
            if number == 0:
                _record_resolution(writer, backbone, latents, told[0], eps[missing[0][1]], missing, batch_size)
            for sigma, draw in missing:
                with writer.claim(block, sigma=sigma, draw=draw) as mine:
                    if not mine:  # another process finished it meanwhile
                        advance(len(part))
                        continue
                    features = backbone.features(
                        latents,
                        told[number],
                        sigma=sigma,
                        eps=eps[draw],
                        wanted=wanted,
                        batch_size=batch_size,
                        on_batch=advance,
                    )
                    timestep = backbone.timestep(sigma)
                    writer.write_shard(block, sigma=sigma, draw=draw, timestep=timestep, rows=part, features=features)
    return FeatureStore(out)


def _points(backbone: Backbone, layers: Literal["all"] | Sequence[int], *, output_tokens: bool) -> list[LayerPoint]:
    if layers == "all":
        layers = [point.index for point in backbone.layers]
    check_layers(layers, backbone.output_point.index)
    further = {backbone.output_point.index} if output_tokens else set()
    points = [*backbone.layers, backbone.output_point]
    return [points[layer] for layer in sorted({*layers, *further})]


def _conditions(prompts: list[str], condition: str) -> dict[str, str]:
    """Return what the model is told in place of each prompt."""
    kind, _, seed = condition.partition(":")
    if kind == "real":
        return dict(zip(prompts, prompts, strict=True))
    if kind == "empty":
        return dict.fromkeys(prompts, "")
    if len(prompts) < 2:
        msg = f"prompts is {condition!r} with {len(prompts)} distinct prompt; allowed from two prompts on"
        raise ConfigError(msg)
    # one cycle through all prompts, in an order that only the seed and the prompts decide
    order = sorted(prompts, key=lambda prompt: hashlib.sha256(json.dumps([int(seed), prompt]).encode()).digest())
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def _digest(prompts: Sequence[str]) -> str:
    return f"{len(prompts)} prompts, SHA-256 {hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}"


def _warn(backbone: Backbone, told: list[str], sigmas: Sequence[str]) -> None:
    facts = backbone.describe()
    if not facts["family_tested"]:
        logger.warning("%s is untested: probekit's own tests do not run this family", facts["class"])
    prompts = list(dict.fromkeys(told))
    if cut := backbone.n_cut(prompts):
        logger.warning("%d of %d prompts are longer than a text encoder takes and are cut", cut, len(prompts))
    below = sorted({sigma for sigma in sigmas if float(sigma) < backbone.sigma_floor}, key=float)
    if below:
        logger.warning(
            "sigma %s lies below %.3g, the least noise that %s was trained on; it gets the timestep of that",
            ", ".join(below),
            backbone.sigma_floor,
            backbone.name,
        )


def _noise(
    rows: pd.DataFrame,
    latents: Sequence[torch.Tensor],
    *,
    scheme: Noise,
    seed: int,
    draw: int,
    canvas: tuple[int, int] | None,
) -> list[torch.Tensor]:
    """Return eps for every latent: a function of content alone, so batches, order and resuming cannot change it."""
    if scheme == "none":
        return [torch.zeros_like(latent) for latent in latents]
    keys = rows["prompt"] if scheme == "shared" else rows["image_sha256"].map(bytes.hex)
    return [draw_noise(seed, key, draw, tuple(latent.shape), canvas) for key, latent in zip(keys, latents, strict=True)]


def _record_resolution(
    writer: StoreWriter,
    backbone: Backbone,
    latents: list[torch.Tensor],
    prompts: list[str],
    eps: list[torch.Tensor],
    missing: Sequence[Coordinates],
    batch_size: int,
) -> None:
    """Compare, on a few rows, what each new noise level changes with what rounding does; see `noise_over_rounding`."""
    known = {sigma for sigma, entry in writer.sigma_resolution.items() if entry["ratio"] is not None}
    sigmas = [
        sigma for sigma in dict.fromkeys(sigma for sigma, _ in missing) if float(sigma) > 0 and sigma not in known
    ]
    if not sigmas:
        return
    few = slice(0, RESOLUTION_ROWS)
    ratios, note = noise_over_rounding(
        backbone, latents[few], prompts[few], eps=eps[few], sigmas=sigmas, batch_size=batch_size
    )
    for sigma in sigmas:
        ratio = ratios.get(sigma)
        writer.record_resolution(sigma, ratio=ratio, rows=len(latents[few]), note=note)
        if ratio is not None:
            name = backbone.name if backbone.random_weights is None else f"{backbone.name} ({backbone.random_weights})"
            resolved = ratio >= RESOLVED_RATIO
            logger.log(
                logging.INFO if resolved else logging.WARNING,
                "%s: sigma %s changes features %.2g times as much as rounding to bfloat16 does: it is %sresolved",
                name,
                sigma,
                ratio,
                "" if resolved else "not ",
            )


def _size(path: Path) -> tuple[int, int, int]:
    """Return the width and height of an image as its header states them, and the bytes of its file."""
    with Image.open(path) as image:
        return *image.size, path.stat().st_size
