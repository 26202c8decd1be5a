"""The class `Backbone`: any diffusers text-to-image DiT, frozen, as a function from (prompt, image) to features.

Models are in memory in two stages that never meet: the text encoders while prompts are embedded, the VAE and the
transformer while images are encoded and features computed.

Shapes: m rows, (c, h, w) a latent, d channels of a token, d' of a feature.
"""

import copy
import inspect
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.utils import _pytree as pytree

from probekit._types import FloatArray
from probekit.backbones import selftest
from probekit.backbones.base import Base, ImageFile, ImageSize
from probekit.backbones.batching import Layout, runs
from probekit.backbones.cache import Cache, Item, content_key
from probekit.backbones.capture import POOLINGS, check_layers, check_poolings, pooled_layers, refuse_hooks, text_layers
from probekit.backbones.conditioning import Conditioner, Embeddings, check_max_tokens, pixels_per_latent
from probekit.backbones.devices import enough_memory, resolve_device, resolve_dtype
from probekit.backbones.families import Call
from probekit.backbones.hub import in_short, locate
from probekit.backbones.images import IMAGE_RULE, RESIZE_RULES, Resize, bucket_sizes
from probekit.backbones.latents import CANVAS_RULE, LATENT_RULES, MIX_RULES, NOISE_RULE, latent_shape, mix
from probekit.backbones.loading import (
    Adapter,
    build_pipeline,
    config_hash,
    load_transformer,
    model_names,
    quiet,
    transformer_family,
    transformer_folder,
)
from probekit.backbones.weights import RandomWeights, stored_hash
from probekit.errors import BackboneError, ConfigError, DeviceMemoryError

EXTRACTOR_VERSION = "2"  # part of every fingerprint: raised when the same settings would give other features
PROMPT_BYTES = 4 << 30
"""Prompt embeddings that are held in memory at once where there is no cache folder."""
_DEFAULT_RESOLUTION = 1024
_WAITING = 16  # times the batch size: images whose calls are prepared and wait for others of their shape

logger = logging.getLogger(__name__)

Offload = Literal["none", "group"]


@dataclass(frozen=True)
class _Settings:
    """What was asked for besides the base and the transformer; None = the default of pipeline or transformer."""

    max_tokens: int | None
    resolution: int | None
    resize: Resize
    offload: Offload
    compile: bool

    def __post_init__(self) -> None:
        check_max_tokens(self.max_tokens)
        named = {"resize": (self.resize, tuple(RESIZE_RULES)), "offload": (self.offload, get_args(Offload))}
        for what, (value, allowed) in named.items():
            if value not in allowed:
                msg = f"{what} is {value!r}; allowed: {', '.join(allowed)}"
                raise ConfigError(msg)
        if self.resolution is not None and self.resolution < 1:
            msg = f"resolution is {self.resolution}; allowed: whole numbers of pixels from 1"
            raise ConfigError(msg)


class Backbone:
    """A frozen text-to-image diffusion transformer; made by `from_pretrained` or `with_transformer`.

    Attributes
    ----------
    name
        Name of the transformer's folder, or last part of the base's id.
    model_id, revision
        The base pipeline and its commit (None for a folder).
    dtype, device
        Where and in which dtype the transformer computes.
    size
        How images get their size: resolution in pixels, step, rule.
    n_blocks, width, n_parameters
        Blocks, channels of a token, and parameters of the transformer.
    layers
        The n_blocks + 1 places where features are taken.
    output_point
        A further place: the tokens that enter the output projection, with index n_blocks + 1.
    """

    def __init__(
        self,
        base: Base,
        folder: Path,
        random: RandomWeights | None,
        adapter: Adapter | None,
        settings: _Settings,
        name: str,
    ) -> None:
        self._base = base
        self._folder = folder
        self._random = random
        self._adapter = adapter
        self._settings = settings
        self._family = transformer_family(base.source, folder)
        pipe = build_pipeline(self._family, base.source, folder, base.dtype)
        self._conditioner = Conditioner(self._family, pipe, base.device, settings.max_tokens)
        if adapter is not None:
            adapter.check(pipe)
        self._without_weights = dict(pipe.components)
        self._stored = None if random is not None and random.kind == "init" else stored_hash(folder)
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        parts = [part for part in pipe.components if part.startswith(("tokenizer", "processor"))]
        base.hash_parts(
            model_names(self._family, base.source), [part for part in parts if pipe.components[part] is not None]
        )
        self.name = name
        self.model_id = base.source.model_id
        self.revision = base.source.revision
        self.dtype = base.dtype
        self.device = base.device
        *self.layers, self.output_point = self._family.points(pipe.transformer)
        self.n_blocks = len(self.layers) - 1
        self.width = int(pipe.transformer.get_submodule(self._family.output.path).weight.shape[-1])
        self.n_parameters = sum(parameter.numel() for parameter in pipe.transformer.parameters())
        self._text_layers = text_layers(self._family, pipe.transformer)
        self._tested = False
        self._cast: torch.dtype | None = None
        self.size = self._checked_size()

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        *,
        transformer: str | Path | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        random_weights: str | None = None,
        lora: str | Path | None = None,
        max_tokens: int | None = None,
        resolution: int | None = None,
        resize: Resize = "crop",
        offload: Offload = "none",
        compile: bool = False,
        cache: str | Path | None = None,
        name: str | None = None,
    ) -> "Backbone":
        """Find a backbone, check that its parts fit and hash its weights; each model is loaded when it is needed.

        Parameters
        ----------
        model_id
            Folder or hub id of an ordinary diffusers pipeline.
        transformer
            Folder of a transformer that replaces the pipeline's own.
        revision
            Branch, tag or commit of a hub id.
        dtype
            float32, bfloat16 or float16; default: float32 on the CPU, bfloat16 elsewhere.
        device
            Default: CUDA where there is one, else the CPU.
        random_weights
            ``init:SEED`` (untrained) or ``shuffled:SEED`` (entries permuted within each tensor), transformer only.
        lora
            Safetensors file, or folder with one, of a LoRA adapter of the transformer, in a format that diffusers
            reads for the pipeline; it is fused into the weights.
        max_tokens
            Token limit of the prompt, as the pipeline's ``max_sequence_length``; default: the pipeline's.
        resolution
            Side of the images in pixels; default: the transformer's sample size times the VAE's factor.
        resize
            ``crop`` (largest centre square), ``pad`` (whole image in the square) or ``bucket`` (nearest of several
            aspects).
        offload
            ``group``: the transformer's weights stay in main memory and visit the device block by block.
        compile
            Compile the forward of each block with `torch.compile`.
        cache
            Folder that keeps VAE latents and prompt embeddings, keyed by content.
        name
            Name in results; default: the transformer's folder, else the last part of `model_id`.

        Returns
        -------
        Backbone
            Frozen.

        Raises
        ------
        BackboneError
            If it cannot be had, or its parts do not fit.
        """
        random = None if random_weights is None else RandomWeights.parse(random_weights)
        settings = _Settings(max_tokens, resolution, resize, offload, compile)
        found_device = resolve_device(device)
        source = locate(str(model_id), revision=revision, without_transformer=transformer is not None)
        folder = transformer_folder(source, None if transformer is None else Path(transformer))
        found_dtype = resolve_dtype(dtype, found_device, folder)
        base = Base(source, found_dtype, found_device, Cache(None if cache is None else Path(cache)))
        adapter = None if lora is None else Adapter.at(Path(lora))
        own = source.name if transformer is None else _name(folder)
        return cls(base, folder, random, adapter, settings, name or own)

    def with_transformer(
        self, transformer: str | Path | None = None, *, random_weights: str | None = None, name: str | None = None
    ) -> "Backbone":
        """Probe another transformer on this backbone's VAE, text encoders and cache.

        Parameters
        ----------
        transformer
            Folder of the transformer; None = this backbone's own.
        random_weights, name
            As in `from_pretrained`.

        Returns
        -------
        Backbone
            With every other setting of this one, but without its LoRA adapter.
        """
        random = None if random_weights is None else RandomWeights.parse(random_weights)
        if transformer is None:
            return Backbone(self._base, self._folder, random, None, self._settings, name or self.name)
        folder = transformer_folder(self._base.source, Path(transformer))
        return Backbone(self._base, folder, random, None, self._settings, name or _name(folder))

    def latents(self, groups: Sequence[Sequence[ImageFile]], *, workers: int = 0) -> Iterator[list[torch.Tensor]]:
        """Yield the latents of group after group of images.

        Parameters
        ----------
        groups
            Image files, each with the SHA-256 of its bytes.
        workers
            Processes that decode and resize ahead of the VAE; the latents do not depend on it.

        Yields
        ------
        list of Tensor
            float32 on the CPU, (c, h, w) each: posterior modes, normalised as the pipeline's decoding undoes it.

        Raises
        ------
        ImageError
            If an image cannot be decoded, or changed since it was hashed.
        """
        return self._base.latents(groups, self._family, self._without_weights["vae"], self.size, workers)

    def embed(self, prompts: Sequence[str], later: Iterable[str] = ()) -> None:
        """Hold the prompt embeddings that `features` needs; the stage of the text encoders.

        Parameters
        ----------
        prompts
            Those that are needed next.
        later
            Further ones, embedded in the same stage as far as memory allows (with a cache folder: all).
        """
        if all(self._base.cache.has("prompts", self._prompt_key(prompt)) for prompt in prompts):
            return
        self._release_image_stage()
        self._base.cache.forget("prompts", but={self._prompt_key(prompt) for prompt in prompts})
        wanted = deque(
            prompt
            for prompt in dict.fromkeys([*prompts, *later])
            if not self._base.cache.has("prompts", self._prompt_key(prompt))
        )
        needed = set(prompts)
        size, side = self._family.text_batch, self.size.resolution
        held = 0
        with enough_memory("the text encoders", self.device, "--dtype bfloat16, --device cpu"), self._text_encoders():
            while wanted and (held < PROMPT_BYTES or wanted[0] in needed):
                batch = [wanted.popleft() for _ in range(min(size, len(wanted)))]
                # filled up, because the batch size moves the last bits of an embedding and its neighbours do not
                filled = batch + [""] * (size - len(batch))
                encoded = self._conditioner.encode(filled, self._latent_shape(side, side))
                for prompt, embeddings in zip(batch, encoded, strict=False):
                    item = _to_item(embeddings)
                    self._base.cache.put("prompts", self._prompt_key(prompt), item)
                    if self._base.cache.folder is None:
                        held += sum(tensor.nbytes for tensor in item.values())
        if wanted:
            logger.warning(
                "prompt embeddings take more than %d GB; %d prompts are embedded later: "
                "a cache folder holds them all at once",
                PROMPT_BYTES >> 30,
                len(wanted),
            )

    def features(
        self,
        latents: Sequence[torch.Tensor],
        prompts: Sequence[str],
        *,
        sigma: str,
        eps: Sequence[torch.Tensor],
        wanted: Sequence[tuple[str, int]],
        batch_size: int,
        on_batch: Callable[[int], None] | None = None,
    ) -> dict[tuple[str, int], FloatArray]:
        """Run the transformer on near-clean images and pool the wanted layers.

        Parameters
        ----------
        latents
            Clean latents x0, m times (c, h, w); sizes may differ.
        prompts
            m prompts.
        sigma
            Noise level as decimal text; the input is (1 - sigma) x0 + sigma eps (see `latents.MIX_RULES`).
        eps
            Noise, m times the shape of the latent.
        wanted
            (pooling, layer), as `wanted` lists them.
        batch_size
            Largest number of images of a forward pass; halved where the device's memory does not hold it.
        on_batch
            Called with the number of rows of each finished forward pass.

        Returns
        -------
        dict
            (pooling, layer) to float32 (m, d'). Values that are not finite are returned as they are.

        Raises
        ------
        BackboneError
            If the row of the table does not fit the model (found by a self-test on its first use), or if the device
            does not even hold one image.
        """
        check_poolings([pooling for pooling, _ in wanted])
        check_layers([layer for _, layer in wanted], self.output_point.index)
        self.embed(list(dict.fromkeys(prompts)))
        self._load_image_stage(prompts[0], latents[0].shape)
        out: dict[tuple[str, int], FloatArray] = {}
        for rows, pooled in self._passes(latents, prompts, sigma, eps, wanted, batch_size):
            for pooling in dict.fromkeys(name for name, _ in wanted):
                places = [place for place in pooled if place[0] == pooling]
                # one copy from the device for all layers
                values = torch.stack([pooled[place] for place in places]).cpu().numpy()
                for place, value in zip(places, values, strict=True):
                    if place not in out:
                        out[place] = np.empty((len(prompts), value.shape[1]), dtype=np.float32)
                    out[place][rows] = value
            if on_batch is not None:
                on_batch(len(rows))
        return out

    def resolve(
        self,
        latents: Sequence[torch.Tensor],
        prompts: Sequence[str],
        *,
        eps: Sequence[torch.Tensor],
        sigmas: Sequence[str],
        batch_size: int,
    ) -> tuple[dict[str, float], str]:
        """Compare what a noise level changes with what rounding to bfloat16 does.

        The ratio is the median over layers from 1 of |f32(sigma) - f32(0)| / |bf16(sigma) - f32(sigma)|: root mean
        squares over rows and channels of the mean-pooled features, with the transformer in float32 and in bfloat16.

        Parameters
        ----------
        latents, prompts, eps, batch_size
            As in `features`.
        sigmas
            Noise levels above 0.

        Returns
        -------
        dict
            Ratio of each noise level; empty where it could not be measured.
        str
            Why it could not be measured; empty where it was.
        """
        if self._settings.offload != "none" or self._settings.compile:
            return {}, "not measured with group offloading or compiled blocks"
        wanted = [("mean", point.index) for point in self.layers[1:]]

        def run(sigma: str, dtype: torch.dtype) -> FloatArray:
            with self._in_dtype(dtype):
                found = self.features(latents, prompts, sigma=sigma, eps=eps, wanted=wanted, batch_size=batch_size)
            return np.stack([found[place] for place in wanted]).astype(np.float64)

        try:
            self.features(latents, prompts, sigma="0", eps=eps, wanted=wanted[:1], batch_size=batch_size)
            clean = run("0", torch.float32)
            ratios = {}
            for sigma in sigmas:
                noisy, rounded = run(sigma, torch.float32), run(sigma, torch.bfloat16)
                change, rounding = (np.sqrt(((a - noisy) ** 2).mean(axis=(1, 2))) for a in (clean, rounded))
                ratios[sigma] = float(np.median(change / np.maximum(rounding, np.finfo(np.float64).tiny)))
        except (torch.OutOfMemoryError, DeviceMemoryError):
            return {}, "not measured: the transformer does not fit on the device in float32"
        return ratios, ""

    def wanted(self, poolings: Sequence[str], layers: Sequence[int]) -> list[tuple[str, int]]:
        """List the (pooling, layer) that exist: poolings of the text have no layer where a block passes no text on."""
        check_poolings(poolings)
        check_layers(layers, self.output_point.index)
        return [
            (pooling, layer)
            for pooling in poolings
            for layer in layers
            if POOLINGS[pooling].stream == "image" or layer in self._text_layers
        ]

    def n_cut(self, prompts: Sequence[str]) -> int:
        """Count the prompts that at least one text encoder sees only the beginning of."""
        return self._conditioner.n_cut(prompts)

    def timestep(self, sigma: str) -> float:
        """Return the conditioning timestep that the pipeline gives the transformer at a noise level."""
        return self._conditioner.timestep(sigma)

    @property
    def sigma_floor(self) -> float:
        """Smallest noise level that the model was trained on; 0 for flow models."""
        return self._conditioner.sigma_floor()

    @property
    def canvas(self) -> tuple[int, int] | None:
        """Latent height and width that hold the latents of all image sizes; None where there is only one."""
        if self.size.resize != "bucket":
            return None
        shapes = [self._latent_shape(*size) for size in bucket_sizes(self.size.resolution, self.size.step)]
        return max(h for _, h, _ in shapes), max(w for _, _, w in shapes)

    @property
    def latent_bytes(self) -> int:
        """Bytes of the largest latent in float32."""
        return 4 * int(np.prod(self._latent_shape(self.size.resolution, self.size.resolution)))

    def fingerprint_config(self) -> dict[str, Any]:
        """Return every setting of the backbone that changes features, as plain JSON values."""
        family = self._family
        # what a seed draws is torch's and the constructor's choice
        drawn = None if self._random is None else f"{self._random}, torch {torch.__version__.split('+')[0]}"
        return {
            "extractor": EXTRACTOR_VERSION,
            "model": self.model_id if self.revision is not None else None,  # folders are told apart by their weights
            "revision": self.revision,
            "class": family.transformer,
            "pipeline": family.pipeline,
            "random_weights": drawn,
            "lora": None if self._adapter is None else self._adapter.sha256,
            "weights": {"transformer": self._stored, **self._base.weights},
            "files": {"transformer": config_hash(self._folder), **self._base.files},
            "dtype": _text(self.dtype),
            "vae_dtype": _text(self._without_weights["vae"].dtype),
            "resolution": self.size.resolution,
            "resize_rule": f"{self.size.resize} {RESIZE_RULES[self.size.resize]}",
            "image_rule": IMAGE_RULE,
            "latent_rule": LATENT_RULES[family.latents].definition,
            "mix_rule": MIX_RULES[family.noise],
            "noise_rule": NOISE_RULE if self.canvas is None else f"{NOISE_RULE}; {CANVAS_RULE}",
            "prompt_template": "the pipeline's",
            "max_tokens": self._conditioner.max_tokens,
            "pipeline_arguments": self._pipeline_settings,
            "timestep_rule": f"{family.noise}, N = {self._conditioner.n_train_timesteps}",
        }

    def describe(self) -> dict[str, Any]:
        """Return the facts of the backbone that reports show, as plain JSON values."""
        return {
            "name": self.name,
            "model_id": self.model_id if self.revision is not None else self._base.source.name,
            "revision": self.revision,
            "class": self._family.transformer,
            "family_tested": self._family.tested,
            "n_blocks": self.n_blocks,
            "width": self.width,
            "n_parameters": self.n_parameters,
            "resolution": self.size.resolution,
            "dtype": _text(self.dtype),
            "device": str(self.device),
            "random_weights": None if self._random is None else str(self._random),
        }

    # --- stages

    @contextmanager
    def _text_encoders(self) -> Iterator[None]:
        """Have the text encoders in memory."""
        names = [name for name in model_names(self._family, self._base.source) if name != "vae"]
        self._base.occupy(self._release_transformer)
        try:
            for name in names:
                self._exchange(name, self._base.load(name, self._without_weights[name]))
            yield
        finally:
            for name in names:
                self._exchange(name, self._without_weights[name])
            _empty_cache(self.device)

    def _load_image_stage(self, prompt: str, shape: torch.Size) -> None:
        """Have the transformer in memory; the first time, learn how its inputs grow and test the row of the table."""
        try:
            if self._transformer.device.type == "meta":
                self._load_transformer()
            refuse_hooks(self._transformer)
            if not self._tested:
                self._test(prompt, shape)
                self._tested = True
        except BaseException:  # nothing half made or wrong stays for the next call
            self._release_transformer()
            raise

    def _load_transformer(self) -> None:
        self._base.occupy(self._release_transformer)
        model = load_transformer(self._folder, self._without_weights["transformer"], self.dtype, self._random)
        self._exchange("transformer", model)
        if self._adapter is not None:
            self._adapter.fuse(self._conditioner.pipe)
        if self._settings.offload == "group":
            if not getattr(model, "_supports_group_offloading", False):
                msg = f"offload is 'group'; allowed for {self._family.transformer}: none, diffusers cannot offload it"
                raise ConfigError(msg)
            model.enable_group_offload(
                onload_device=self.device,
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
                use_stream=self.device.type == "cuda",
            )
        else:
            with enough_memory("the transformer", self.device, "--offload group, --dtype bfloat16"):
                model.to(self.device)
        if self._settings.compile:
            for _, block, _ in self._family.modules(model):
                block.forward = torch.compile(block.forward)  # and not the block: the hooks stay outside the graph

    def _test(self, prompt: str, shape: torch.Size) -> None:
        """Check on three images of a prompt that the row of the table fits the model."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(3, *shape, generator=generator)
        images[2] = images[0]
        patch = self._patch
        images[2, :, :patch, -patch:] = images[1, :, :patch, -patch:]
        call, _ = self._prepare(prompt, images, "0.5")
        try:
            selftest.check_slices(self._transformer, self._family, call, grid=self._grid(shape))
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise self._too_large(shape, len(images)) from error
            found = f"what {self._family.pipeline} prepares for it ({in_short(error)})"
            msg = f"{self._folder}: the transformer does not run on {found}"
            raise BackboneError(msg) from error

    def _prepare(self, prompt: str, images: torch.Tensor, sigma: str) -> tuple[Call, Layout]:
        """Return the pipeline's call for noisy images of a prompt, and how it holds them."""
        embeddings = self._embeddings(prompt)
        call = self._conditioner.prepare(prompt, embeddings, images, sigma)
        # a mask may be left out for some prompts; every such form is learned by itself
        form = tuple((name, type(value).__name__, getattr(value, "ndim", None)) for name, value in call.items())
        if form not in self._layouts:
            pair = images[:1].repeat(2, 1, 1, 1)
            one, two = (self._conditioner.prepare(prompt, embeddings, pair[:k], sigma) for k in (1, 2))
            self._layouts[form] = Layout.learn(one, two, self._family.joins)
        layout = self._layouts[form]
        if layout.n_images(call) != len(images):
            msg = f"{self._family.pipeline} prepared {layout.n_images(call)} images where {len(images)} were given"
            raise BackboneError(msg)
        return call, layout

    @contextmanager
    def _in_dtype(self, dtype: torch.dtype) -> Iterator[None]:
        """Have the transformer compute in another dtype, and afterwards exactly as before."""
        before = self._transformer
        if dtype == self.dtype:
            yield
            return
        exact = dtype == torch.float32  # no weight is rounded, so the model itself can go there and back
        weights = [(parameter, parameter.dtype) for parameter in before.parameters()]
        buffers = [(module, *named) for module in before.modules() for named in module.named_buffers(recurse=False)]
        try:
            with quiet():
                model = (before if exact else copy.deepcopy(before)).to(dtype)
            self._exchange("transformer", model)
            self._cast = dtype
            yield
        finally:
            self._cast = None
            self._exchange("transformer", before)
            if exact:
                for parameter, stored in weights:
                    parameter.data = parameter.data.to(stored)
                for module, name, buffer in buffers:
                    setattr(module, name, buffer)
            _empty_cache(self.device)

    def _release_image_stage(self) -> None:
        self._base.release_vae()
        self._release_transformer()

    def _release_transformer(self) -> None:
        self._exchange("transformer", self._without_weights["transformer"])
        _empty_cache(self.device)

    def _exchange(self, name: str, model: torch.nn.Module) -> None:
        self._conditioner.pipe.register_modules(**{name: model})

    @property
    def _transformer(self) -> Any:
        return self._conditioner.pipe.transformer

    # --- passes

    def _passes(
        self,
        latents: Sequence[torch.Tensor],
        prompts: Sequence[str],
        sigma: str,
        eps: Sequence[torch.Tensor],
        wanted: Sequence[tuple[str, int]],
        batch_size: int,
    ) -> Iterator[tuple[list[int], dict[tuple[str, int], torch.Tensor]]]:
        """Yield (rows, features) of forward pass after forward pass."""
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
                call, layout = self._prepare(prompts[rows[0]], mixed, sigma)
                key = layout.signature(call)
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
                    self._transformer,
                    self._family,
                    layouts[full].join([call for _, call in batch]),
                    wanted=wanted,
                    grid=self._grid(shape),
                )
            except torch.OutOfMemoryError as error:
                if len(joined) == 1:
                    raise self._too_large(shape) from error
            if pooled is None:  # not in the handler: the exception holds what the pass had on the device
                batch_size = len(joined) // 2
                logger.warning("out of memory with %d images a forward pass; going on with %d", len(joined), batch_size)
                again = [*batch, *chain.from_iterable(waiting.values())]  # what waits may be too large as well
                todo.extendleft(rows for rows, _ in reversed(again))
                waiting.clear()
                _empty_cache(self.device)
                continue
            yield joined, pooled

    def _too_large(self, shape: torch.Size, n_images: int = 1) -> DeviceMemoryError:
        factor = pixels_per_latent(self._conditioner.pipe, self._family)
        with_what = f"{n_images} images (the self-test's)" if n_images > 1 else "one image"
        return DeviceMemoryError(
            f"{self.name}: out of memory on {self.device} with {with_what} of {shape[2] * factor} x "
            f"{shape[1] * factor} pixels; try --offload group, --dtype bfloat16 or a smaller --resolution"
        )

    # --- embeddings

    def _prompt_key(self, prompt: str) -> str:
        return content_key({**self._text_settings, "prompt": prompt})

    def _embeddings(self, prompt: str) -> Embeddings:
        found = _from_item(self._base.cache.get("prompts", self._prompt_key(prompt)), self.device)
        if self._cast is None:
            return found
        dtype = self._cast
        return list(
            pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, found)
        )

    @property
    def _pipeline_settings(self) -> dict[str, str]:
        """What the row gives the pipeline's call, and ``model_index.json`` its constructor, besides components."""
        pipe = self._conditioner.pipe
        own = {name: value for name, value in pipe.config.items() if name[0] != "_" and name not in pipe.components}
        return {name: repr(value) for name, value in sorted({**own, **self._family.call}.items())}

    @property
    def _text_settings(self) -> dict[str, Any]:
        """What prompt embeddings depend on besides the prompt."""
        weights = {name: value for name, value in self._base.weights.items() if name != "vae"}
        files = {name: value for name, value in self._base.files.items() if name != "vae"}
        config = self._without_weights["transformer"].config
        return {
            "pipeline": self._family.pipeline,
            "arguments": self._pipeline_settings,
            "max_tokens": self._conditioner.max_tokens,
            "transformer": {name: config[name] for name in self._family.text_settings},
            "weights": weights,
            "files": files,
            "dtype": _text(self.dtype),
        }

    # --- sizes

    @property
    def _patch(self) -> int:
        patch = self._family.patch
        return patch if isinstance(patch, int) else int(self._without_weights["transformer"].config[patch])

    def _grid(self, shape: Sequence[int]) -> tuple[int, int]:
        return shape[-2] // self._patch, shape[-1] // self._patch

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        pipe = self._conditioner.pipe
        return latent_shape(self._without_weights["vae"], self._family.latents, height, width, self._family.cell(pipe))

    def _checked_size(self) -> ImageSize:
        pipe, config = self._conditioner.pipe, self._without_weights["transformer"].config
        step = pixels_per_latent(pipe, self._family) * self._patch
        side = config.get("sample_size") or getattr(pipe, "default_sample_size", None)
        default = inspect.signature(type(pipe).__call__).parameters["height"].default or _DEFAULT_RESOLUTION
        own = side * int(pipe.vae_scale_factor) if isinstance(side, int) else default
        if hasattr(pipe, "get_default_resolution"):  # PRX's sample size is in pixels
            own = pipe.get_default_resolution()
        resolution = self._settings.resolution or own
        largest = step * int(config.get("pos_embed_max_size") or 10**6)
        if self._settings.resize == "bucket":
            largest //= 2  # a side of a bucket may be twice the resolution
        if resolution % step or resolution > largest:
            most = f" up to {largest}" if config.get("pos_embed_max_size") else ""
            msg = f"resolution is {resolution}; allowed for {self.name}: multiples of {step}{most}"
            raise ConfigError(msg)
        return ImageSize(resolution, step, self._settings.resize)


def _to_item(embeddings: Embeddings) -> Item:
    """Turn what ``encode_prompt`` returned into named tensors; everything else becomes JSON beside them."""
    leaves, structure = pytree.tree_flatten(embeddings)
    tensors = {
        str(i): leaf.cpu().contiguous().clone() for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)
    }
    others = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    text = json.dumps({"structure": pytree.treespec_dumps(structure), "others": others})
    return {"json": torch.tensor(list(text.encode()), dtype=torch.uint8), **tensors}


def _from_item(item: Item, device: torch.device) -> Embeddings:
    content = json.loads(bytes(item["json"].tolist()))
    leaves = [item[str(i)].to(device) if str(i) in item else other for i, other in enumerate(content["others"])]
    found: Embeddings = pytree.tree_unflatten(leaves, pytree.treespec_loads(content["structure"]))
    return found


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(folder: Path) -> str:
    """Name a transformer after its folder, or after the checkpoint that a folder called ``transformer`` lies in."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "transformer" else folder.name
