"""Which models of a pipeline are in memory: the text encoders, or the transformer, never both.

The pipeline holds every model without weights at first; a stage exchanges those that it needs for loaded ones and back.
"""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from probekit.backbones.base import Base
from probekit.backbones.devices import enough_memory
from probekit.backbones.families import Component, Family
from probekit.backbones.loading import Adapter, load_transformer, model_names, quiet
from probekit.backbones.weights import RandomWeights, convert
from probekit.errors import ConfigError

Offload = Literal["none", "group"]


class Stages:
    """The models of one pipeline.

    Parameters
    ----------
    family, pipe
        The row, and its pipeline with models that have no weights.
    base
        VAE and text encoders, shared with the pipelines of other transformers.
    folder
        Of the transformer.
    random, adapter
        What replaces its weights or is added to them.
    offload, compile
        How it runs.

    Attributes
    ----------
    without_weights
        The pipeline's components as they were given.
    cast
        Dtype in which the transformer computes at the moment, where it is not its own.
    """

    def __init__(
        self,
        family: Family,
        pipe: Component,
        base: Base,
        folder: Path,
        *,
        random: RandomWeights | None,
        adapter: Adapter | None,
        offload: Offload,
        compile: bool,
    ) -> None:
        self._family = family
        self._pipe = pipe
        self._base = base
        self._folder = folder
        self._random = random
        self._adapter = adapter
        self._offload = offload
        self._compile = compile
        self.without_weights = dict(pipe.components)
        self.cast: torch.dtype | None = None

    @property
    def transformer(self) -> Any:
        """The transformer, with weights in the image stage only."""
        return self._pipe.transformer

    @property
    def has_transformer(self) -> bool:
        """Whether the transformer is in memory."""
        return str(self.transformer.device) != "meta"

    @property
    def is_wrapped(self) -> bool:
        """Whether the transformer's weights or blocks are in other hands: offloaded or compiled."""
        return self._offload != "none" or self._compile

    @contextmanager
    def text_encoders(self) -> Iterator[None]:
        """Have the text encoders in memory."""
        names = [name for name in model_names(self._family, self._base.source) if name != "vae"]
        self._base.occupy(self.release_transformer)
        try:
            for name in names:
                self._exchange(name, self._base.load(name, self.without_weights[name]))
            yield
        finally:
            for name in names:
                self._exchange(name, self.without_weights[name])
            _empty_cache(self._base.device)

    def load_transformer(self) -> None:
        """Have the transformer in memory, on the device, ready to run."""
        self._base.occupy(self.release_transformer)
        model = load_transformer(self._folder, self.without_weights["transformer"], self._base.dtype, self._random)
        self._exchange("transformer", model)
        if self._adapter is not None:
            self._adapter.fuse(self._pipe)
        if self._offload == "group":
            if not getattr(model, "_supports_group_offloading", False):
                msg = f"offload is 'group'; allowed for {self._family.transformer}: none, diffusers cannot offload it"
                raise ConfigError(msg)
            model.enable_group_offload(
                onload_device=self._base.device,
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
                use_stream=self._base.device.type == "cuda",
            )
        else:
            with enough_memory("the transformer", self._base.device, "--offload group, --dtype bfloat16"):
                model.to(self._base.device)

    def compile_blocks(self) -> None:
        """Compile the forward of each block, if that is wanted."""
        if self._compile:
            for _, block, _ in self._family.modules(self.transformer):
                block.forward = torch.compile(block.forward)  # and not the block: the hooks stay outside the graph

    @contextmanager
    def in_dtype(self, dtype: torch.dtype) -> Iterator[None]:
        """Have the transformer compute in another dtype, and afterwards exactly as before."""
        before = self.transformer
        if dtype == self._base.dtype:
            yield
            return
        exact = dtype == torch.float32  # no weight is rounded, so the model itself can go there and back
        weights = [(parameter, parameter.dtype) for parameter in before.parameters()]
        buffers = [(module, *named) for module in before.modules() for named in module.named_buffers(recurse=False)]
        try:
            with quiet():
                model = convert(before if exact else copy.deepcopy(before), dtype)
            self._exchange("transformer", model)
            self.cast = dtype
            yield
        finally:
            self.cast = None
            self._exchange("transformer", before)
            if exact:
                for parameter, stored in weights:
                    parameter.data = parameter.data.to(stored)
                for module, name, buffer in buffers:
                    setattr(module, name, buffer)
            _empty_cache(self._base.device)

    def release(self) -> None:
        """Free VAE and transformer."""
        self._base.release_vae()
        self.release_transformer()

    def release_transformer(self) -> None:
        """Free the transformer."""
        self._exchange("transformer", self.without_weights["transformer"])
        if self.is_wrapped:
            gc.collect()  # offloaded and compiled models hold themselves in circles
        _empty_cache(self._base.device)

    def _exchange(self, name: str, model: torch.nn.Module) -> None:
        self._pipe.register_modules(**{name: model})


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
