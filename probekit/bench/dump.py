"""How long a dump takes beside the bare transformer, and where its time goes.

In every round the same rows are dumped twice: with all layers, and leaving the transformer at half depth. Beside each
of its batches a dump runs the bare transformer on the same prepared inputs, before and after the captured pass by
turns, so a machine that is slower for a while slows both sides of a ratio.
"""

import json
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from probekit._types import Progress
from probekit.backbones import Backbone
from probekit.bench.dump_runs import BARE, BUSY, CAPTURED, GIVEN, PARTS, Dumps, PartsClock
from probekit.bench.ratios import in_words, spread
from probekit.config import DumpConfig
from probekit.errors import ConfigError

RATIOS = {
    "captured_over_bare": "capture, pool, write / bare",
    "half_over_bare": "the same at half depth / bare",
    "half_over_captured": "half depth / whole depth",
    "dump_over_bare": "whole dump / bare",
}
"""Ratios of `DumpBench.facts`, and what the lines call them; a whole dump is one that is given `GIVEN`."""
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
        return _bench(Dumps(settings, backbone), rounds, progress)


def _bench(dumps: Dumps, rounds: int, progress: Progress | None) -> DumpBench:
    backbone = dumps.backbone
    layers = {"dump": "all", "half": list(range(backbone.n_blocks // 2 + 1))}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in layers}
    for number in range(rounds):
        for name in layers:
            found[name].append(dumps.timed(layers[name]))
        if progress is not None:
            progress(number + 1, rounds, "")

    def seconds(name: str, parts: Collection[str]) -> list[float]:
        return [sum(timed[part] for part in parts) for timed in found[name]]

    own, bare = set(PARTS) - set(GIVEN), {"inputs": "inputs", "dit": BARE}
    parts = {part: float(np.median(seconds("dump", [part]))) for part in PARTS}
    parts["text"] += dumps.text_seconds
    return DumpBench(
        backbone=backbone.describe(),
        images=dumps.images,
        batch_size=dumps.settings.batch_size,
        threads=torch.get_num_threads(),
        captured=seconds("dump", CAPTURED),
        dump=seconds("dump", own),
        bare=seconds("dump", bare.values()),
        half=seconds("half", CAPTURED),
        bare_beside_half=seconds("half", bare.values()),
        parts=parts,
        bare_parts={part: float(np.median(seconds("dump", [bare[part]]))) if part in bare else 0.0 for part in PARTS},
        flop=dumps.flop,
        product_rate=_product_rate(backbone.dtype, backbone.device),
    )


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
    clock, best = PartsClock(device), np.inf
    for _ in range(10):
        clock.start()
        a @ b
        best = min(best, clock.stop()["other"])
    return 2 * n**3 / best
