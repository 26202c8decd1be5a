"""Dumps that run the bare transformer beside each of their batches, and the seconds of their parts."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import probekit.dump.run as dumping
from probekit._clock import Clock
from probekit.backbones import Backbone, passes
from probekit.backbones import latents as latent_rules
from probekit.backbones.batching import Layout
from probekit.backbones.capture import POOLINGS, pooled_layers
from probekit.backbones.conditioning import Conditioner
from probekit.backbones.families import Family
from probekit.config import DumpConfig
from probekit.dump.run import files_of
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
"""Parts that the bare loop has not: it is given latents, embeddings and noise, and knows nothing of pairs."""
CAPTURED = ("inputs", "dit", "pool", "write")
"""Parts of a forward pass whose features are kept."""
BARE = "bare"
"""The bare forward passes within a dump, in the clock beside its parts."""
BUSY = ("vae", "text", "dit", "pool")
"""Parts in which the device computes; in all others it waits."""
_SIGMA = "0"  # the one noise level for which a dump does not measure rounding, which it does once and not for each row


class Dumps:
    """A backbone with its models loaded, and the rows whose dumps are timed.

    Attributes
    ----------
    images
        How many there are, one row each.
    flop
        Operations of one image in the transformer, 2 for each multiply-add.
    text_seconds
        Of embedding the prompts, which happens once.
    """

    def __init__(self, settings: DumpConfig, backbone: Backbone) -> None:
        self.settings = settings
        self.backbone = backbone
        self.prefs = load_preferences(settings.prefs)
        rows = self.prefs.rows(self.prefs.image_digests())
        self.images = len(rows)
        prompts = rows["prompt"].tolist()
        self.clock = PartsClock(backbone.device)
        # the text stage: a first prompt warms the encoders up, and loading them is not timed
        backbone.prompts.embed(["warm-up"])
        with self._timed():
            self.clock.start()
            backbone.prompts.embed(prompts)
            self.text_seconds = self.clock.stop()["text"]
        few = prompts[: settings.batch_size]
        (encoded,) = backbone.latents([files_of(rows)[: len(few)]])
        latents = [image.latents for image in encoded if isinstance(image, latent_rules.EncodedImage)]
        forward = partial(
            backbone.features,
            latents,
            few,
            sigma=_SIGMA,
            eps=[latent_rules.noise(0, prompt, 0, tuple(x.shape)) for prompt, x in zip(few, latents, strict=True)],
            wanted=[("mean", backbone.n_blocks)],
            batch_size=len(few),
        )
        forward()  # loads and tests the transformer
        with FlopCounterMode(display=False) as counter:
            forward()
        self.flop = counter.get_total_flops() // len(few)

    def timed(self, layers: Any) -> dict[str, float]:
        """Dump once; seconds of `PARTS` and `BARE`."""
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
            bare = self.clock.timed(partial(transformer, **call), BARE)
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


class PartsClock(Clock):
    """Seconds of each of `PARTS` and of `BARE`; what a part has started on the device counts to it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._cuda = device if device.type == "cuda" else None
        self._events: list[tuple[str, str, torch.cuda.Event, torch.cuda.Event]] = []
        self.start()

    def start(self) -> None:
        """Begin anew."""
        self._synchronise()
        self.seconds = dict.fromkeys((*PARTS, BARE), 0.0)
        self._events = []
        self._inside = ["other"]
        self._since = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """Seconds of all parts since the start."""
        self._synchronise()
        self._turn()
        for outer, part, begin, end in self._events:
            seconds = begin.elapsed_time(end) / 1000
            self.seconds[outer] -= seconds
            self.seconds[part] += seconds
        return self.seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a ``with`` block to a part, and what it started on the device."""
        with super().part(name):
            try:
                yield
            finally:
                if name in {*BUSY, BARE}:
                    self._synchronise()

    def timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Return a function whose calls count to a part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return call(*args, **kwargs)

        return timed

    def timed_steps(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Return a generator function whose steps count to a part."""

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
