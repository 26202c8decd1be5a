"""Forward passes: calls of the pipeline prepared prompt by prompt, joined, run, and halved where memory is short.

Shapes: m rows, (c, h, w) a latent.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from probekit.backbones import selftest
from probekit.backbones.batching import Layout, runs
from probekit.backbones.capture import pooled_layers, refuse_hooks
from probekit.backbones.conditioning import Conditioner, pixels_per_latent
from probekit.backbones.families import Call
from probekit.backbones.hub import in_short
from probekit.backbones.latents import mix
from probekit.backbones.prompts import Prompts
from probekit.backbones.sizes import patch_of
from probekit.backbones.stages import Stages
from probekit.errors import BackboneError, DeviceMemoryError

_WAITING = 16  # times the batch size: images whose calls are prepared and wait for others of their shape

logger = logging.getLogger(__name__)


class Passes:
    """Runs the transformer of a pipeline.

    Parameters
    ----------
    conditioner, stages, prompts
        The pipeline, its models and its prompt embeddings.
    name
        What errors call the model.
    """

    def __init__(self, conditioner: Conditioner, stages: Stages, prompts: Prompts, *, name: str) -> None:
        self._conditioner = conditioner
        self._family = conditioner.family
        self._stages = stages
        self._prompts = prompts
        self._name = name
        self._patch = patch_of(conditioner.pipe, conditioner.family)
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        self._tested = False
        self._most: int | None = None  # images that the device was found to hold

    def load(self, prompt: str, shape: torch.Size) -> None:
        """Have the transformer in memory; the first time, learn how its inputs grow and test the row of the table."""
        try:
            fresh = not self._stages.has_transformer
            if fresh:
                self._stages.load_transformer()
            refuse_hooks(self._stages.transformer)
            if not self._tested:
                self._test(prompt, shape)
                self._tested = True
            if fresh:
                self._stages.compile_blocks()  # not before: the self-test asks for gradients, all would compile anew
        except BaseException:  # nothing half made or wrong stays for the next call
            self._stages.release_transformer()
            raise

    def run(
        self,
        latents: Sequence[torch.Tensor],
        prompts: Sequence[str],
        sigma: str,
        eps: Sequence[torch.Tensor],
        wanted: Sequence[tuple[str, int]],
        batch_size: int,
    ) -> Iterator[tuple[list[int], dict[tuple[str, int], torch.Tensor]]]:
        """Yield (rows, features) of forward pass after forward pass; the arguments are those of `Backbone.features`."""
        batch_size = min(batch_size, self._most or batch_size)
        todo = deque(runs(prompts, [tuple(latent.shape) for latent in latents], batch_size))
        waiting: dict[tuple[Any, ...], list[tuple[list[int], Call]]] = {}
        layouts: dict[tuple[Any, ...], Layout] = {}
        while todo or waiting:
            batch: list[tuple[list[int], Call]] = []
            if todo and sum(len(rows) for group in waiting.values() for rows, _ in group) < _WAITING * batch_size:
                rows = todo.popleft()
                if len(rows) > batch_size:  # since memory was short
                    todo.extendleft([rows[batch_size:], rows[:batch_size]])
                    continue
                mixed = torch.stack([mix(latents[row], eps[row], sigma, noise=self._family.noise) for row in rows])
                call, layout = self.prepare(prompts[rows[0]], mixed, sigma)
                # by size too: 3 x 5 and 5 x 3 tokens look alike in a packed call
                key = (tuple(mixed.shape[1:]), *layout.signature(call))
                layouts[key] = layout
                if sum(len(others) for others, _ in waiting.get(key, [])) + len(rows) > batch_size:
                    full, batch = key, waiting.pop(key)
                waiting.setdefault(key, []).append((rows, call))
            else:
                full = next(iter(waiting))
                batch = waiting.pop(full)
            if not batch:
                continue
            joined = [row for rows, _ in batch for row in rows]
            shape = latents[joined[0]].shape
            pooled = None
            try:
                pooled = pooled_layers(
                    self._stages.transformer,
                    self._family,
                    layouts[full].join([call for _, call in batch]),
                    wanted=wanted,
                    grid=self.grid(shape),
                )
            except torch.OutOfMemoryError as error:
                if len(joined) == 1:
                    raise self._too_large(shape) from error
            if pooled is None:  # not in the handler: the exception holds what the pass had on the device
                batch_size = len(joined) // 2
                if self._stages.cast is None:  # in another dtype it may hold less
                    self._most = batch_size
                logger.warning("out of memory with %d images a forward pass; going on with %d", len(joined), batch_size)
                again = [*batch, *chain.from_iterable(waiting.values())]  # what waits may be too large as well
                todo.extendleft(rows for rows, _ in reversed(again))
                waiting.clear()
                torch.cuda.empty_cache()
                continue
            yield joined, pooled

    def prepare(self, prompt: str, images: torch.Tensor, sigma: str) -> tuple[Call, Layout]:
        """Return the pipeline's call for noisy images of a prompt, and how it holds them."""
        embeddings = self._prompts.get(prompt)
        call = self._conditioner.prepare(prompt, embeddings, images, sigma)
        # a mask may be left out for some prompts; every such form is learned by itself
        form = tuple((name, type(value).__name__, getattr(value, "ndim", None)) for name, value in call.items())
        if form not in self._layouts:
            pair = images[:1].repeat(2, 1, 1, 1)
            one, two = (self._conditioner.prepare(prompt, embeddings, pair[:k], sigma) for k in (1, 2))
            self._layouts[form] = Layout.learn(one, two)
        layout = self._layouts[form]
        if layout.n_images(call) != len(images):
            msg = f"{self._family.pipeline} prepared {layout.n_images(call)} images where {len(images)} were given"
            raise BackboneError(msg)
        return call, layout

    def grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the image tokens (h, w) of a latent."""
        return shape[-2] // self._patch, shape[-1] // self._patch

    def _test(self, prompt: str, shape: torch.Size) -> None:
        """Check on three images of a prompt that the row of the table fits the model."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(3, *shape, generator=generator)
        images[2] = images[0]
        patch = self._patch
        images[2, :, :patch, -patch:] = images[1, :, :patch, -patch:]
        call, _ = self.prepare(prompt, images, "0.5")
        try:
            selftest.check_slices(self._stages.transformer, self._family, call, grid=self.grid(shape))
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise self._too_large(shape, len(images)) from error
            found = f"what {self._family.pipeline} prepares for it ({in_short(error)})"
            msg = f"{self._name}: the transformer does not run on {found}"
            raise BackboneError(msg) from error

    def _too_large(self, shape: torch.Size, n_images: int = 1) -> DeviceMemoryError:
        factor = pixels_per_latent(self._conditioner.pipe, self._family)
        with_what = f"{n_images} images (the self-test's)" if n_images > 1 else "one image"
        return DeviceMemoryError(
            f"{self._name}: out of memory on {self._conditioner.device} with {with_what} of {shape[2] * factor} x "
            f"{shape[1] * factor} pixels; try --offload group, --dtype bfloat16 or a smaller --resolution"
        )
