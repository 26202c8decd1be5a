"""How long a dump takes beside the bare transformer, and where its time goes.

In every round the same rows are dumped twice: with all layers, and leaving the transformer at half depth. Beside each
of its batches a dump runs the bare transformer on the same prepared inputs, before and after the captured pass by
turns, so a machine that is slower for a while slows both sides of a ratio.
"""

import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import probekit.dump.run as dumping
from probekit._clock import Clock
from probekit._types import Progress
from probekit.backbones import Backbone, passes
from probekit.backbones import latents as latent_rules
from probekit.backbones.batching import Layout
from probekit.backbones.capture import POOLINGS, pooled_layers
from probekit.backbones.conditioning import Conditioner
from probekit.backbones.families import Family
from probekit.bench.ratios import in_words, spread
from probekit.config import DumpConfig
from probekit.dump.run import files_of
from probekit.errors import ConfigError
from probekit.preferences import PreferenceSet, load_preferences
from probekit.store import StoreWriter

PARTS = {
    "read": "preferences; hash, decode, resize the images",
    "vae": "latents",
    "text": "embeddings of the prompts",
    "noise": "draw the noise",
    "inputs": "mix in the noise, the pipeline prepares, batches",
    "dit": "the transformer, with hooks",
    "pool": "pool the tokens",
    "write": "the store",
    "other": "everything else",
}
GIVEN = ("read", "vae", "text", "noise")
"""Parts that the bare loop has not, because it is given latents, embeddings and noise."""
CAPTURED = ("inputs", "dit", "pool", "write")
"""Parts of a forward pass whose features are kept."""
RATIOS = {
    "captured_over_bare": "capture, pool, write / bare",
    "half_over_bare": "the same at half depth / bare",
    "half_over_captured": "half depth / whole depth",
    "dump_over_bare": "whole dump / bare",
}
"""Ratios of `DumpBench.facts`, and what the lines call them; a whole dump is one that is given `GIVEN`."""
_BARE = "bare"  # the bare forward passes within a dump, in the clock beside its parts
BUSY = ("vae", "text", "dit", "pool")
"""Parts in which the device computes; in all others it waits."""
_SIGMA = "0"  # the one noise level for which a dump does not measure rounding, which it does once and not for each row
_OF_THE_BACKBONE = {"transformer", "dtype", "device", "random_weights", "max_tokens", "resolution", "compile"}
_PRODUCT = {"cuda": 8192, "mps": 4096}  # side of the matrices that are multiplied; of the CPU 1024


@dataclass(frozen=True)
class DumpBench:
    """What `bench_dump` measured.

    Attributes
    ----------
    backbone
        Facts of the backbone, see `Backbone.describe`.
    images, batch_size, threads
        What ran: images, of a forward pass at most, and threads of the CPU.
    bare, captured, dump
        Seconds of each round: the bare loop (inputs and forward passes) beside the dump; the same with capture, pooling
        and writing; and the whole dump without `GIVEN`.
    bare_beside_half, half
        The first two of them in the dump that leaves at half depth.
    parts, bare_parts
        Seconds of each of `PARTS` in the dump and in the bare loop beside it: medians over the rounds.
    flop
        Operations of one image in the transformer, 2 for each multiply-add.
    product_rate
        Operations per second of a large matrix product in the same dtype.
    """

    backbone: dict[str, Any]
    images: int
    batch_size: int
    threads: int
    bare: list[float]
    captured: list[float]
    dump: list[float]
    bare_beside_half: list[float]
    half: list[float]
    parts: dict[str, float]
    bare_parts: dict[str, float]
    flop: int
    product_rate: float

    def facts(self) -> dict[str, Any]:
        """Return all figures as plain JSON values; ratios as median, smallest and largest of the rounds."""
        total = sum(self.parts.values())
        rate = self.flop * self.images / (self.parts["dit"] + self.parts["pool"])
        return {
            "backbone": self.backbone,
            "images": self.images,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "rounds": len(self.bare),
            "captured_over_bare": spread(self.captured, self.bare),
            "dump_over_bare": spread(self.dump, self.bare),
            "half_over_bare": spread(self.half, self.bare_beside_half),
            "half_over_captured": spread(  # each in units of the bare loop that ran beside it
                np.divide(self.half, self.bare_beside_half).tolist(), np.divide(self.captured, self.bare).tolist()
            ),
            "seconds": {
                "bare": self.bare,
                "captured": self.captured,
                "dump": self.dump,
                "bare_beside_half": self.bare_beside_half,
                "half": self.half,
            },
            "images_per_second": {"bare": self.images / float(np.median(self.bare)), "dump": self.images / total},
            "parts": {
                name: {"seconds": seconds, "share": seconds / total, "bare_seconds": self.bare_parts[name]}
                for name, seconds in self.parts.items()
            },
            "idle_share": 1 - sum(self.parts[name] for name in BUSY) / total,
            "tflop_per_image": self.flop / 1e12,
            "tflop_per_second": rate / 1e12,
            "matrix_product_tflop_per_second": self.product_rate / 1e12,
            "share_of_matrix_product": rate / self.product_rate,
        }

    def lines(self) -> list[tuple[str, str]]:
        """Return the figures as (heading, text)."""
        facts = self.facts()
        about, speed = self.backbone, facts["images_per_second"]
        ratios = {name: in_words(facts[name]) for name in RATIOS}
        on = f"{about['device']}, {self.threads} threads" if about["device"] == "cpu" else about["device"]
        return [
            (
                "backbone",
                f"{about['name']}: {about['n_blocks']} blocks of width {about['width']}, {about['dtype']}, {on}",
            ),
            (
                "rows",
                f"{self.images} images of {about['resolution']} px, two to a prompt, {self.batch_size} a forward pass",
            ),
            *((RATIOS[name], ratio) for name, ratio in ratios.items()),
            ("", f"median, smallest and largest of {len(self.bare)} rounds"),
            ("images/s", f"bare {speed['bare']:.4g}, whole dump {speed['dump']:.4g}"),
            ("parts", "    dump and share       bare"),
            *(
                (
                    f"  {name}",
                    f"{part['seconds']:8.3f} s {part['share']:6.1%} {part['bare_seconds']:8.3f} s   {PARTS[name]}",
                )
                for name, part in facts["parts"].items()
            ),
            ("idle", f"{facts['idle_share']:.1%} of the dump is outside {', '.join(BUSY)}: the device waits"),
            (
                "transformer",
                f"{facts['tflop_per_second']:.4g} TFLOP/s, {facts['share_of_matrix_product']:.1%} of the "
                f"{facts['matrix_product_tflop_per_second']:.4g} of a large matrix product",
            ),
        ]


def bench_dump(
    options: dict[str, Any], *, images: int = 1024, rounds: int = 5, progress: Progress | None = None
) -> DumpBench:
    """Time dumps of synthetic images against the bare transformer.

    Parameters
    ----------
    options
        Fields of `DumpConfig` besides ``prefs`` and ``out``.
    images
        Number of images; even, since there are two to a prompt.
    rounds
        How often everything is run.
    progress
        Called as ``progress(done, total, text)`` with rounds.

    Raises
    ------
    ProbekitError
        Whatever is wrong with options or models, as one line; no file is left behind.
    """
    if images < 2 or images % 2:
        msg = f"images is {images}; allowed: even numbers from 2, since there are two to a prompt"
        raise ConfigError(msg)
    if rounds < 1:
        msg = f"rounds is {rounds}; allowed: whole numbers from 1"
        raise ConfigError(msg)
    with tempfile.TemporaryDirectory(prefix="probekit-bench-") as folder:
        places = {"prefs": Path(folder) / "prefs.jsonl", "out": Path(folder) / "store"}
        settings = DumpConfig.checked(options | places, source="options")
        backbone = Backbone.from_pretrained(settings.backbone, **settings.model_dump(include=_OF_THE_BACKBONE))
        _write_images(settings.prefs, images, backbone.size.resolution)
        return _Bench(settings, backbone).run(rounds, progress)


class _Bench:
    """A backbone with its models loaded and the rows it is timed on."""

    def __init__(self, settings: DumpConfig, backbone: Backbone) -> None:
        self.settings = settings
        self.backbone = backbone
        self.prefs = load_preferences(settings.prefs)
        rows = self.prefs.rows(self.prefs.image_digests())
        self.prompts = rows["prompt"].tolist()
        self.clock = _Clock(backbone.device)
        # the text stage: a first prompt warms the encoders up, and loading them is not timed
        backbone.prompts.embed(["warm-up"])
        with self._timed():
            self.clock.start()
            backbone.prompts.embed(self.prompts)
            self.text_seconds = self.clock.stop()["text"]
        (encoded,) = backbone.latents([files_of(rows)])
        self.latents = [image.latents for image in encoded if isinstance(image, latent_rules.EncodedImage)]
        self.eps = [
            latent_rules.noise(0, prompt, 0, tuple(x.shape))
            for prompt, x in zip(self.prompts, self.latents, strict=True)
        ]
        few = slice(0, settings.batch_size)
        forward = partial(
            backbone.features,
            self.latents[few],
            self.prompts[few],
            sigma=_SIGMA,
            eps=self.eps[few],
            wanted=[("mean", backbone.n_blocks)],
            batch_size=few.stop,
        )
        forward()  # loads and tests the transformer
        with FlopCounterMode(display=False) as counter:
            forward()
        self.flop = counter.get_total_flops() // len(self.latents[few])

    def run(self, rounds: int, progress: Progress | None) -> DumpBench:
        layers = {"dump": "all", "half": list(range(self.backbone.n_blocks // 2 + 1))}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in layers}
        for number in range(rounds):
            for name in layers:
                found[name].append(self._dump(layers[name]))
            if progress is not None:
                progress(number + 1, rounds, "")

        def seconds(name: str, parts: Collection[str]) -> list[float]:
            return [sum(timed[part] for part in parts) for timed in found[name]]

        own, bare = set(PARTS) - set(GIVEN), {"inputs": "inputs", "dit": _BARE}
        parts = {part: float(np.median(seconds("dump", [part]))) for part in PARTS}
        parts["text"] += self.text_seconds
        return DumpBench(
            backbone=self.backbone.describe(),
            images=len(self.latents),
            batch_size=self.settings.batch_size,
            threads=torch.get_num_threads(),
            captured=seconds("dump", CAPTURED),
            dump=seconds("dump", own),
            bare=seconds("dump", bare.values()),
            half=seconds("half", CAPTURED),
            bare_beside_half=seconds("half", bare.values()),
            parts=parts,
            bare_parts={
                part: float(np.median(seconds("dump", [bare[part]]))) if part in bare else 0.0 for part in PARTS
            },
            flop=self.flop,
            product_rate=_product_rate(self.backbone.dtype, self.backbone.device),
        )

    def _dump(self, layers: Any) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=self.settings.prefs.parent) as out, self._timed():
            self.clock.start()
            dumping.dump_features(
                self.backbone,
                self.prefs,
                Path(out) / "store",
                sigmas=[_SIGMA],
                layers=layers,
                batch_size=self.settings.batch_size,
                decode_workers=self.settings.decode_workers,
            )
            return self.clock.stop()

    def _beside_bare(self, captured: Callable[..., Any]) -> Callable[..., Any]:
        """Time the bare transformer and the captured pass on the same inputs; either comes first by turns."""
        captured = self.clock.timed(captured, "dit")
        bare_first = cycle((True, False))

        @torch.inference_mode()
        def both(transformer: torch.nn.Module, family: Family, call: dict[str, Any], **kwargs: Any) -> Any:
            bare = self.clock.timed(partial(transformer, **call), _BARE)
            first = next(bare_first)
            if first:
                bare()
            pooled = captured(transformer, family, call, **kwargs)
            if not first:
                bare()
            return pooled

        return both

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Time what a dump calls."""
        calls: list[tuple[Any, str, str]] = [
            (PreferenceSet, "image_digests", "read"),
            (PreferenceSet, "judgements", "read"),
            (PreferenceSet, "rows", "read"),
            (dumping, "_size", "read"),
            (latent_rules, "encode", "vae"),
            (dumping, "_warn", "text"),  # it counts the tokens of the prompts
            (Conditioner, "encode", "text"),
            (dumping, "noise_of", "noise"),
            (passes, "mix", "inputs"),
            (passes.Passes, "prepare", "inputs"),
            (Layout, "join", "inputs"),
            (dumping, "open_store", "write"),
            (StoreWriter, "write_judgements", "write"),
            (StoreWriter, "blocks", "write"),
            (StoreWriter, "write_shard", "write"),
        ]
        pool = POOLINGS["mean"]
        with ExitStack() as stack:
            stack.enter_context(_replaced(dumping.logger, "disabled", value=True))  # else it says the same each round
            for owner, name, part in calls:
                stack.enter_context(_replaced(owner, name, self.clock.timed(getattr(owner, name), part)))
            stack.enter_context(_replaced(passes, "pooled_layers", self._beside_bare(pooled_layers)))
            stack.enter_context(_replaced(Backbone, "latents", self.clock.timed_steps(Backbone.latents, "read")))
            POOLINGS["mean"] = replace(pool, pool=self.clock.timed_on_device(pool.pool, "dit", "pool"))
            stack.callback(POOLINGS.__setitem__, "mean", pool)
            yield


class _Clock(Clock):
    """Seconds of each of `PARTS`; what a part has started on the device counts to it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._cuda = device if device.type == "cuda" else None
        self._events: list[tuple[str, str, torch.cuda.Event, torch.cuda.Event]] = []
        self.start()

    def start(self) -> None:
        self._synchronise()
        self.seconds = dict.fromkeys((*PARTS, _BARE), 0.0)
        self._events = []
        self._inside = ["other"]
        self._since = time.perf_counter()

    def stop(self) -> dict[str, float]:
        self._synchronise()
        self._turn()
        for outer, part, begin, end in self._events:
            seconds = begin.elapsed_time(end) / 1000
            self.seconds[outer] -= seconds
            self.seconds[part] += seconds
        return self.seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        with super().part(name):
            try:
                yield
            finally:
                if name in {*BUSY, _BARE}:
                    self._synchronise()

    def timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return call(*args, **kwargs)

        return timed

    def timed_steps(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with closing(call(*args, **kwargs)) as steps:
                advance = self.timed(partial(next, steps, None), part)
                while (step := advance()) is not None:
                    yield step

        return timed

    def timed_on_device(self, call: Callable[..., Any], outer: str, part: str) -> Callable[..., Any]:
        """Time a call inside `outer` for which the device must not be waited for."""
        if self._cuda is None:
            return self.timed(call, part)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            result = call(*args, **kwargs)
            end.record()
            self._events.append((outer, part, begin, end))
            return result

        return timed

    def _synchronise(self) -> None:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    plain = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def _write_images(prefs: Path, images: int, side: int) -> None:
    """Write a preference file of pairs, and smooth random JPEG pictures of 3 : 2 as high as the backbone's images."""
    generator = np.random.default_rng(0)
    for number in range(images):
        small = generator.integers(0, 256, (16, 24, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((side * 3 // 2, side), Image.Resampling.BICUBIC)
        picture.save(prefs.parent / f"{number}.jpg", quality=90)
    lines = [
        {
            "prompt": f"photo {pair}",
            "image_a": f"{2 * pair}.jpg",
            "image_b": f"{2 * pair + 1}.jpg",
            "label": 1,
        }
        for pair in range(images // 2)
    ]
    prefs.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the operations per second of a large matrix product: the best of several, so as to be a bound."""
    n = _PRODUCT.get(device.type, 1024)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    clock, best = _Clock(device), np.inf
    for _ in range(10):
        clock.start()
        a @ b
        best = min(best, clock.stop()["other"])
    return 2 * n**3 / best
