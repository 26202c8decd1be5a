"""Run a dump: a frozen backbone over the rows of a preference set, into a feature store.

A row is a distinct (prompt, image), so the backbone runs at most once per pair and never twice for an image that a
ranking uses several times. Work goes block by block; a block is committed or it is not, and only missing ones are done.
Each image is decoded and encoded once for all its noise levels and draws.
"""

import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from probekit._types import RESOLVED_RATIO, FloatArray, Progress
from probekit.backbones import Backbone
from probekit.backbones import noise as draw_noise
from probekit.backbones.base import ImageFile
from probekit.backbones.capture import check_poolings
from probekit.backbones.images import header
from probekit.backbones.inputs import input_statistics, picture_statistics
from probekit.backbones.latents import EncodedImage
from probekit.backbones.resolution import noise_over_rounding
from probekit.config import SHARD_MIB, DumpConfig
from probekit.dump.bad_rows import BadRows
from probekit.dump.plan import Coordinates, DumpPlan, Work, work
from probekit.dump.tally import Tally
from probekit.dump.workers import local_device, worker_of
from probekit.errors import ImageError
from probekit.preferences import PreferenceSet, load_preferences
from probekit.store import IMAGE_DIGESTS, STATUS_OK, Block, FeatureStore, StoreWriter, open_store

RESOLUTION_ROWS = 8
"""Rows on which the effect of a noise level is compared with that of rounding."""

logger = logging.getLogger(__name__)

Noise = Literal["shared", "independent", "none"]


def run_dump(settings: DumpConfig, *, progress: Progress | None = None) -> str:
    """Do what ``probekit dump`` was asked: check the preference file, find the backbone, dump.

    Returns
    -------
    str
        What is stored now, for a person.

    Raises
    ------
    ProbekitError
        Whatever is wrong with options, files or models, as one line; nothing is written over.
    """
    worker = settings.worker or worker_of()
    prefs = read_preferences(settings)
    backbone = find_backbone(settings)
    blocks = _dump(backbone, prefs, settings, worker=worker, progress=progress)
    if worker == (0, 1):
        rows = {row for found in blocks.values() for block in found for row in block.row_ids}
        levels = f"sigma {', '.join(settings.sigma)}" + (f", {settings.draws} draws" if settings.draws > 1 else "")
        return f"{len(rows):,} rows are stored, {levels}"
    mine = sum(block.number % worker[1] == worker[0] for found in blocks.values() for block in found)
    shards = sum(map(len, blocks.values()))
    return f"worker {worker[0]} of {worker[1]}: its {mine:,} of {shards:,} shards are stored"


def read_preferences(settings: DumpConfig) -> PreferenceSet:
    """Read the preference file, and check what can be checked before a model is looked for."""
    prefs = load_preferences(settings.prefs, **settings.loading())
    if settings.limit is not None:
        prefs = prefs.limit(settings.limit)
    check_poolings(settings.pooling)
    prefs.check_images(max_bad=settings.max_bad)
    return prefs


def find_backbone(settings: DumpConfig, *, weights: bool = True) -> Backbone:
    """Find the backbone that the settings name; see `Backbone.from_pretrained` for `weights`."""
    device = settings.device
    if device is None and torch.cuda.is_available():
        device = local_device()
    return Backbone.from_pretrained(
        settings.backbone,
        transformer=settings.transformer,
        revision=settings.revision,
        dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
        device=device,
        random_weights=settings.random_weights,
        lora=settings.lora,
        max_tokens=settings.max_tokens,
        resolution=settings.resolution,
        resize=settings.resize,
        offload=settings.offload,
        compile=settings.compile,
        cache=settings.cache,
        name=settings.name,
        weights=weights,
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
    shard_size: int = SHARD_MIB,
    max_bad: float = 0.0,
    worker: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> FeatureStore:
    """Store pooled token features of every row of a preference set, and statistics of what enters the backbone.

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
    max_bad
        Largest share of rows that may be without features, because their image is missing or unreadable or the features
        are not finite. They get a status in the store, and their pairs are left out and counted.
    worker
        (rank, world): do every world-th shard from the rank-th on. The shards, and the bytes of their features, do not
        depend on it.
    progress
        Called as ``progress(done, total, text)``, the text beginning with ``prompts`` (embedded) or ``rows`` (of
        features), which is followed by the speed and by what the time was spent on.

    Raises
    ------
    ConfigError
        If a layer or pooling does not exist, or prompts cannot be shuffled.
    FingerprintError
        If the store was made with other settings.
    ImageError
        If more rows than `max_bad` allows are without features; what is committed stays.
    ImageChangedError
        If an image changed since the dump began.
    """
    settings = DumpConfig.checked(  # by the rules of the command line
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
            "output_tokens": output_tokens,
            "batch_size": batch_size,
            "decode_workers": decode_workers,
            "seed": seed,
            "training_images": training_images,
            "shard_size": shard_size,
            "max_bad": max_bad,
            "worker": worker,
        },
        source="dump_features",
    )
    _dump(backbone, prefs, settings, worker=worker, progress=progress)
    return FeatureStore(settings.out)


def _dump(
    backbone: Backbone,
    prefs: PreferenceSet,
    settings: DumpConfig,
    *,
    worker: tuple[int, int],
    progress: Progress | None,
) -> dict[Coordinates, list[Block]]:
    """Store what is missing of a worker's share; return the blocks of all workers."""
    plan = DumpPlan.of(backbone, prefs, settings)
    writer = open_store(settings.out, config=plan.config, describe=plan.describe)
    cache = settings.out / IMAGE_DIGESTS
    with backbone.clock.part("read"), writer.alone(cache.name):  # of several workers one hashes, the others read that
        prefs.unpack_images(progress)
        digests = prefs.image_digests(cache, max_bad=settings.max_bad)
    judgements = prefs.judgements(digests)
    writer.write_judgements(prefs.name, judgements)
    rows = prefs.rows(digests)
    blocks = plan.blocks(writer, rows)
    todo = work(blocks, worker)
    for block in (one.block for one in todo if one.block.state != "new"):
        logger.warning("done again: %s", block.state)
    mine = sum(
        len(block.row_ids) for found in blocks.values() for block in found if block.number % worker[1] == worker[0]
    )
    tally = Tally(backbone.clock, mine, sum(len(one.block.row_ids) * len(one.missing) for one in todo), progress)
    if worker != (0, 1):
        logger.info("worker %d of %d: %d shards to do", *worker, sum(len(one.missing) for one in todo))
    bad = BadRows(prefs.path, rows, writer.bad_rows(), share=settings.max_bad)
    levels = [sigma for sigma, _ in plan.coordinates if float(sigma) > 0]
    if not todo and worker[0] == 0 and not writer.sigma_resolution.keys() >= set(levels):
        # store.json was lost and written again: a few rows say anew what was recorded in it
        first = next(iter(blocks.values()))[0]
        todo = [Work(replace(first, row_ids=first.row_ids[:RESOLUTION_ROWS]))]
    if todo:
        _warn(backbone, list(plan.told.values()), [sigma for sigma, _ in plan.coordinates])
        try:
            _fill(backbone, writer, plan, settings, rows.set_index("row_id"), todo, tally, bad)
        except BaseException:
            logger.warning("%s: %s of %s rows are stored", settings.out, f"{tally.stored:,}", f"{tally.total:,}")
            raise
    bad.settle(writer.bad_rows())
    bad.report(judgements)
    return blocks


def _fill(
    backbone: Backbone,
    writer: StoreWriter,
    plan: DumpPlan,
    settings: DumpConfig,
    rows: pd.DataFrame,
    todo: list[Work],
    tally: Tally,
    bad: BadRows,
) -> None:
    """Compute and write the blocks of one worker; `rows` is indexed by row key."""
    parts = [rows.loc[list(one.block.row_ids)].reset_index() for one in todo]
    told = [[plan.told[prompt] for prompt in part["prompt"]] for part in parts]
    files = [files_of(part) for part in parts]
    measured = False
    with closing(backbone.latents(files, workers=decode_workers(backbone, settings))) as encoded:
        for number, (one, part, found) in enumerate(zip(todo, parts, encoded, strict=True)):
            present = part.index[part["status"] == STATUS_OK]
            errors = {at: item for at, item in zip(present, found, strict=True) if isinstance(item, ImageError)}
            bad.unreadable(part, errors)
            with backbone.clock.part("read"):
                part[["width", "height", "file_bytes"]] = [_size(row) for row in part.to_dict("records")]
            good = part[part["status"] == STATUS_OK]
            images = [item for item in found if isinstance(item, EncodedImage)]
            prompts = [told[number][at] for at in good.index]
            real = bool(images)
            if not real:  # one grey picture says how wide the features are
                good, prompts = part[:1], told[number][:1]
                grey = torch.zeros(backbone.latent_shape)
                images = [
                    EncodedImage(grey, *picture_statistics(torch.zeros(1, 3, 1, 1)), *picture_statistics(grey[None]))
                ]
            latents = [image.latents for image in images]
            if number == 0:  # a row of the table that does not fit is refused before all prompts are embedded
                backbone.load(prompts[0], tuple(latents[0].shape))
            backbone.prompts.embed(prompts, later=chain.from_iterable(told[number + 1 :]), on_prompts=tally.embedded)
            eps = {
                draw: noise_of(good, latents, settings, draw=draw, canvas=backbone.canvas)
                for draw in dict.fromkeys([0, *(draw for _, draw in one.missing)])
            }
            inputs = input_statistics(images, [backbone.prompts.summary(prompt) for prompt in prompts])
            entering = {(name, plan.points[0].index): values for name, values in inputs.items()}
            if real and not measured:
                levels = [sigma for sigma, _ in plan.coordinates]
                _record_resolution(writer, backbone, latents, prompts, eps[0], levels, settings.batch_size)
                measured = True
            for sigma, draw in one.missing:
                with writer.claim(one.block, sigma=sigma, draw=draw) as mine:
                    if not mine:  # another process finished it meanwhile
                        tally.keep(len(part), computed=0)
                        continue
                    features = backbone.features(
                        latents,
                        prompts,
                        sigma=sigma,
                        eps=eps[draw],
                        wanted=plan.wanted,
                        batch_size=settings.batch_size,
                        on_batch=tally.advance,
                    )
                    with backbone.clock.part("write"):
                        writer.write_shard(
                            one.block,
                            sigma=sigma,
                            draw=draw,
                            timestep=backbone.timestep(sigma),
                            rows=part,
                            features=_at_rows(features | entering, part),
                            accept=partial(bad.not_finite, part, f"sigma {sigma}, {plan.describe['dtype']}"),
                        )
                    tally.keep(len(part), computed=len(prompts))


def decode_workers(backbone: Backbone, settings: DumpConfig) -> int:
    """Return the number of processes that decode images."""
    if settings.decode_workers is not None:
        return settings.decode_workers
    return 0 if backbone.device.type == "cpu" else min(8, os.cpu_count() or 1)


def files_of(part: pd.DataFrame) -> list[ImageFile]:
    """List the image files of the rows that have one."""
    present = part[part["status"] == STATUS_OK]
    return list(zip(map(Path, present["path"]), present["image_sha256"], strict=True))


def _size(row: Mapping[Hashable, Any]) -> tuple[int, int, int]:
    """Return the width and height of an image as its header states them, 0 if unknown, and the bytes of its file."""
    path = Path(row["path"])
    try:
        size = path.stat().st_size
        width, height = header(path) if row["status"] == STATUS_OK else (0, 0)
    except OSError:
        return 0, 0, 0
    return width, height, size


def _at_rows(
    features: Mapping[tuple[str, int], FloatArray], part: pd.DataFrame
) -> Mapping[tuple[str, int], FloatArray]:
    """Put features of the good rows where they belong among all rows (m) of a block; NaN elsewhere."""
    good = part["status"].to_numpy() == STATUS_OK
    if good.all():
        return features
    spread = {}
    for place, values in features.items():
        spread[place] = np.full((len(part), values.shape[1]), np.nan, np.float32)
        spread[place][good] = values[: good.sum()]
    return spread


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


def noise_of(
    rows: pd.DataFrame,
    latents: Sequence[torch.Tensor],
    settings: DumpConfig,
    *,
    draw: int,
    canvas: tuple[int, int] | None,
) -> list[torch.Tensor]:
    """Return eps for every latent: a function of content alone, so batches, order and resuming cannot change it."""
    if settings.noise == "none":
        return [torch.zeros_like(latent) for latent in latents]
    keys = rows["prompt"] if settings.noise == "shared" else rows["image_sha256"].map(bytes.hex)
    return [
        draw_noise(settings.seed, key, draw, tuple(latent.shape), canvas)
        for key, latent in zip(keys, latents, strict=True)
    ]


def _record_resolution(
    writer: StoreWriter,
    backbone: Backbone,
    latents: list[torch.Tensor],
    prompts: list[str],
    eps: list[torch.Tensor],
    levels: Sequence[str],
    batch_size: int,
) -> None:
    """Compare, on a few rows, what each new noise level changes with what rounding does; see `noise_over_rounding`."""
    known = {sigma for sigma, entry in writer.sigma_resolution.items() if entry["ratio"] is not None}
    sigmas = [sigma for sigma in dict.fromkeys(levels) if float(sigma) > 0 and sigma not in known]
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
