"""What a dump will cost, said before it runs."""

import shutil
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from probekit._types import duration, scaled
from probekit.backbones import Backbone
from probekit.backbones.capture import POOLINGS
from probekit.backbones.inputs import widths
from probekit.backbones.latents import EncodedImage
from probekit.config import DumpConfig
from probekit.dump.bad_rows import BadRows
from probekit.dump.plan import DumpPlan, Work, work
from probekit.dump.run import decode_workers, files_of, find_backbone, noise_of, read_preferences
from probekit.dump.workers import worker_of
from probekit.errors import ImageError
from probekit.preferences import PreferenceSet
from probekit.stats import say_planned
from probekit.store import IMAGE_DIGESTS, STATUS_OK, open_store, stored_config

_NAMED = 10


@dataclass(frozen=True)
class Timing:
    """Seconds of a dump's parts, measured on two batches: the first loads everything, the second is timed.

    Attributes
    ----------
    start
        Until everything is loaded and tested.
    prompt, image, row
        Of a distinct prompt (text encoders), of a distinct image (decoding, VAE), and of a row at one noise level and
        draw (transformer); writing is not timed.
    """

    start: float
    prompt: float
    image: float
    row: float


def dry_run(settings: DumpConfig) -> list[tuple[str, str]]:
    """Say what a dump would do and cost; nothing is written, and no weights are fetched.

    Images are hashed and, where the weights are on this machine, two batches run through the models for the time.

    Returns
    -------
    list
        Heading and text, for a person.

    Raises
    ------
    ProbekitError
        Whatever the dump itself would refuse before it computes.
    """
    worker = settings.worker or worker_of()
    prefs = read_preferences(settings)
    apart = settings.model_copy(update={"cache": None})  # what is cached costs nothing, and would be timed as that
    model = find_backbone(apart, weights=False)
    known = model.has_weights
    if known:
        model = find_backbone(apart)
    plan = DumpPlan.of(model, prefs, settings)
    config = plan.config
    if not known and (stored := stored_config(settings.out)) is not None:  # all other settings are compared
        config = config | {key: stored[key] for key in ("weights", "files") if key in stored}
    writer = open_store(settings.out, config=config, describe=plan.describe, dry_run=True)
    digests = _digests(prefs, settings)
    rows, judgements = prefs.rows(digests), prefs.judgements(digests)
    writer.check_judgements(prefs.name, judgements)
    BadRows(prefs.path, rows, writer.bad_rows(), share=settings.max_bad)
    blocks = plan.blocks(writer, rows)
    todo = work(blocks, worker)
    shards = [(place, block) for place, found in blocks.items() for block in found]
    states = pd.Series([block.state for _, block in shards])
    again = [state for state in states if state not in ("done", "new")]
    n_todo = sum(len(one.block.row_ids) * len(one.missing) for one in todo)
    by_key = rows.set_index("row_id")
    mine = by_key.loc[[row for one in todo for row in one.block.row_ids]]
    layers = {
        pooling: (sum(of == pooling for of, _ in plan.wanted), model.width * POOLINGS[pooling].factor)
        for pooling in settings.pooling
    } | {name: (1, width) for name, width in widths(model.latent_shape[0]).items()}
    needed = 4 * n_todo * sum(number * width for number, width in layers.values())
    at = next(folder for folder in [settings.out.absolute(), *settings.out.absolute().parents] if folder.exists())
    free = shutil.disk_usage(at).free
    passes = len(rows) * len(plan.coordinates)
    sides = 2 * len(judgements) * len(plan.coordinates)
    packed, packed_bytes = prefs.images_to_unpack()
    absent = int((rows["status"] != STATUS_OK).sum())
    return [
        (
            "rows",
            f"{len(rows):,} of {rows['image_sha256'].nunique():,} distinct images and {rows['prompt'].nunique():,} "
            f"prompts, for {len(judgements):,} pairs",
        ),
        *(
            [("to unpack", f"{packed:,} images, about {scaled(packed_bytes, 'B')}, from {prefs.path.name} to files")]
            if packed
            else []
        ),
        *([("missing", f"{absent:,} rows whose image file is missing (--max-bad)")] if absent else []),
        (
            "forward passes",
            f"{n_todo:,} images to go through the transformer, of {passes:,} ({len(rows):,} rows x "
            f"{len(plan.coordinates)} noise levels and draws); {sides - passes:,} saved, since pairs share rows",
        ),
        (
            "shards",
            f"{len(shards):,} of up to {plan.rows_per_shard:,} rows: {(states == 'done').sum():,} done and skipped, "
            f"{len(again):,} done again, {(states == 'new').sum():,} new",
        ),
        *(("done again", reason) for reason in again[:_NAMED]),
        *([("done again", f"and {len(again) - _NAMED} more")] if len(again) > _NAMED else []),
        *(
            [
                (
                    "worker",
                    f"{worker[0]} of {worker[1]}: {sum(len(one.missing) for one in todo):,} shards, {n_todo:,} rows",
                )
            ]
            if worker != (0, 1)
            else []
        ),
        (
            "bytes",
            "; ".join(
                f"{pooling}: at most {scaled(4 * n_todo * width, 'B')} a layer, {number} layers"
                for pooling, (number, width) in layers.items()
            )
            + f"; in all at most {scaled(needed, 'B')} (float32), half of it where float16 is safe",
        ),
        ("free", f"{scaled(free, 'B')} in {at}" + ("" if free > needed else ": less than may be needed")),
        ("time", _time(model, plan, settings, mine, todo, n_todo) if known else "unknown: the weights are not here"),
        ("resolves", _resolves(judgements)),
    ]


def _digests(prefs: PreferenceSet, settings: DumpConfig) -> dict[str, bytes]:
    """Hash the images, with what the store remembers of them."""
    cache = settings.out / IMAGE_DIGESTS
    with tempfile.TemporaryDirectory(prefix="probekit-") as folder:
        copy = Path(folder) / cache.name
        if cache.is_file():
            shutil.copyfile(cache, copy)
        return prefs.image_digests(copy, max_bad=settings.max_bad)


def _time(
    model: Backbone, plan: DumpPlan, settings: DumpConfig, rows: pd.DataFrame, todo: list[Work], n_todo: int
) -> str:
    """Say how long the rows that are to be done will take."""
    found = _calibrate(model, plan, settings, rows)
    if found is None:
        return "none: nothing is to be done" if not todo else "unknown: the first images cannot be read"
    prompts = len({plan.told[prompt] for prompt in rows["prompt"]})
    images = rows["image_sha256"].nunique()
    parts = {"start": found.start, "text": prompts * found.prompt, "images": images * found.image}
    parts["DiT"] = n_todo * found.row
    shares = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
    return (
        f"about {duration(sum(parts.values()))} on {model.device} ({shares}), from two batches of "
        f"{settings.batch_size}; writing and --cache not counted"
    )


def _calibrate(model: Backbone, plan: DumpPlan, settings: DumpConfig, rows: pd.DataFrame) -> Timing | None:
    """Run two batches of rows, of which the second is timed; None if their images cannot be read."""
    size, clock, began = settings.batch_size, model.clock, time.perf_counter()
    present = rows[rows["status"] == STATUS_OK].drop_duplicates("image_sha256")
    second = present[size : 2 * size] if len(present) > size else present[:size]
    spent: list[dict[str, float]] = []
    latents: list[EncodedImage | ImageError] = []
    with closing(model.latents([files_of(present[:size]), files_of(second)])) as groups:
        for group in groups:
            spent.append(dict(clock.seconds))
            latents = group
    good = [at for at, item in enumerate(latents) if isinstance(item, EncodedImage)]
    if not good:
        return None
    second, clean = second.iloc[good], [item.latents for item in latents if isinstance(item, EncodedImage)]
    workers = max(1, decode_workers(model, settings))
    image = (_spent(spent, "read") / workers + _spent(spent, "vae")) / len(good)
    told = [plan.told[prompt] for prompt in second["prompt"]]
    seen: list[tuple[float, int]] = []
    prompts = list(dict.fromkeys([*told, *(plan.told[prompt] for prompt in rows["prompt"])]))[: 3 * model.text_batch]
    model.prompts.embed(prompts, on_prompts=lambda count, _: seen.append((time.perf_counter(), count)))
    (first, one), (last, all_) = seen[0], seen[-1]
    prompt = (last - first) / (all_ - one) if all_ > one else 0.0  # of few prompts, what loading takes is all
    model.load(told[0], tuple(clean[0].shape))
    eps = noise_of(second, clean, settings, draw=0, canvas=model.canvas)
    spent = []
    for _ in range(2):
        model.features(
            clean, told, sigma=plan.coordinates[0][0], eps=eps, wanted=plan.wanted, batch_size=settings.batch_size
        )
        spent.append(dict(clock.seconds))
    row = _spent(spent, "dit") / len(good)
    timed = len(good) * (image + row)
    return Timing(time.perf_counter() - began - timed, prompt, image, row)


def _spent(moments: list[dict[str, float]], part: str) -> float:
    """Seconds of a part between the last two moments."""
    return moments[-1].get(part, 0.0) - moments[-2].get(part, 0.0)


def _resolves(judgements: pd.DataFrame) -> str:
    """Say which accuracy difference the test pairs can show."""
    decided = (judgements["split"] == "test") & (judgements["label"] != 0.5)
    return say_planned(judgements.loc[decided, "group"].to_numpy())
