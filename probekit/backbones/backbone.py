"""The class `Backbone`: any diffusers text-to-image DiT, frozen, as a function from (prompt, image) to features.

Models are in memory in two stages that never meet: the text encoders while prompts are embedded, the VAE and the
transformer while images are encoded and features computed.

Shapes: m rows, (c, h, w) a latent, d channels of a token, d' of a feature.
"""

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from probekit._clock import Clock
from probekit._types import FloatArray
from probekit.backbones.base import Base, ImageFile
from probekit.backbones.cache import Cache
from probekit.backbones.capture import POOLINGS, check_layers, check_poolings, text_layers
from probekit.backbones.conditioning import Conditioner, check_max_tokens
from probekit.backbones.devices import resolve_device, resolve_dtype
from probekit.backbones.hub import locate
from probekit.backbones.images import IMAGE_RULE, RESIZE_RULES, Resize, bucket_sizes
from probekit.backbones.latents import CANVAS_RULE, LATENT_RULES, MIX_RULES, NOISE_RULE, EncodedImage, latent_shape
from probekit.backbones.loading import (
    Adapter,
    build_pipeline,
    config_hash,
    model_names,
    quiet,
    source_hash,
    transformer_family,
    transformer_folder,
)
from probekit.backbones.passes import Passes
from probekit.backbones.prompts import Prompts
from probekit.backbones.sizes import image_size
from probekit.backbones.stages import Offload, Stages
from probekit.backbones.weights import RandomWeights, stored_hash, weight_files
from probekit.errors import BackboneError, ConfigError, ImageError

EXTRACTOR_VERSION = "2"  # part of every fingerprint: raised when the same settings would give other features

logger = logging.getLogger(__name__)


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
    random_weights
        ``init:SEED`` or ``shuffled:SEED``, or None.
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
    prompts, stages
        Prompt embeddings, and which models are in memory.
    """

    def __init__(
        self,
        base: Base,
        folder: Path,
        random: RandomWeights | None,
        adapter: Adapter | None,
        settings: _Settings,
        name: str,
        *,
        weights: bool = True,
    ) -> None:
        self._base = base
        self._folder = folder
        self._adapter = adapter
        self._settings = settings
        self._family = transformer_family(base.source, folder)
        pipe = build_pipeline(self._family, base.source, folder, base.dtype)
        self._conditioner = Conditioner(self._family, pipe, base.device, settings.max_tokens)
        if adapter is not None:
            adapter.check(pipe)
        self.stages = Stages(
            self._family,
            pipe,
            base,
            folder,
            random=random,
            adapter=adapter,
            offload=settings.offload,
            compile=settings.compile,
        )
        untrained = random is not None and random.kind == "init"
        self._stored = None if untrained or not weights else stored_hash(folder)
        parts = [part for part in pipe.components if part.startswith(("tokenizer", "processor"))]
        if weights:
            base.hash_parts(
                model_names(self._family, base.source), [part for part in parts if pipe.components[part] is not None]
            )
        self.name = name
        self.random_weights = None if random is None else str(random)
        self.model_id = base.source.model_id
        self.revision = base.source.revision
        self.dtype = base.dtype
        self.device = base.device
        *self.layers, self.output_point = self._family.points(pipe.transformer)
        self.n_blocks = len(self.layers) - 1
        self.width = int(self._family.projection(pipe.transformer).get_parameter("weight").shape[-1])
        self.n_parameters = sum(parameter.numel() for parameter in pipe.transformer.parameters())
        self._text_layers = text_layers(self._family, pipe.transformer)
        self.size = image_size(pipe, self._family, settings.resolution, name, resize=settings.resize)
        self.prompts = Prompts(
            self._conditioner,
            self.stages,
            base,
            settings=self._text_settings,
            latent_shape=self.latent_shape,
        )
        self._passes = Passes(self._conditioner, self.stages, self.prompts, name=name)

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
        weights: bool = True,
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
        weights
            False: neither look for weights nor fetch any. Such a backbone can be described, but computes nothing and
            its fingerprint lacks them.

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
        source = locate(str(model_id), revision=revision, without_transformer=transformer is not None, weights=weights)
        folder = transformer_folder(source, None if transformer is None else Path(transformer))
        found_dtype = resolve_dtype(dtype, found_device, folder if weights else None)
        base = Base(source, found_dtype, found_device, Cache(None if cache is None else Path(cache)))
        adapter = None if lora is None else Adapter.at(Path(lora))
        own = source.name if transformer is None else _name(folder)
        return cls(base, folder, random, adapter, settings, name or own, weights=weights)

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

    def latents(
        self, groups: Sequence[Sequence[ImageFile]], *, workers: int = 0
    ) -> Generator[list[EncodedImage | ImageError]]:
        """Yield group after group of images, encoded.

        Parameters
        ----------
        groups
            Image files, each with the SHA-256 of its bytes.
        workers
            Processes that decode and resize ahead of the VAE; the latents do not depend on it.

        Yields
        ------
        list of EncodedImage or ImageError
            In place of an image that cannot be decoded stands what is wrong with it.

        Raises
        ------
        ImageChangedError
            If an image changed since it was hashed.
        """
        return self._base.latents(groups, self._family, self.stages.without_weights["vae"], self.size, workers)

    def load(self, prompt: str, shape: tuple[int, ...]) -> None:
        """Bring the transformer into memory and test the row of the table on it, as `features` does of itself.

        Parameters
        ----------
        prompt
            Any prompt; it is embedded.
        shape
            Of a latent, (c, h, w).

        Raises
        ------
        BackboneError
            If the row does not fit the model.
        """
        self.prompts.embed([prompt])
        self._passes.load(prompt, torch.Size(shape))

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
        self.prompts.embed(list(dict.fromkeys(prompts)))
        self._passes.load(prompts[0], latents[0].shape)
        out: dict[tuple[str, int], FloatArray] = {}
        with self.clock.part("dit"), quiet():  # here for all the pipeline's calls at once
            for rows, pooled in self._passes.run(latents, prompts, sigma, eps, wanted, batch_size):
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

    def wanted(self, poolings: Sequence[str], layers: Sequence[int]) -> list[tuple[str, int]]:
        """List the (pooling, layer) that exist: poolings of the text have no layer where a block passes no text on."""
        check_poolings(poolings)
        check_layers(layers, self.output_point.index)
        found = [
            (pooling, layer)
            for pooling in poolings
            for layer in layers
            if POOLINGS[pooling].stream == "image" or layer in self._text_layers
        ]
        for pooling in set(poolings) - {pooling for pooling, _ in found}:
            msg = f"pooling {pooling!r}: none of the layers asked for has text tokens; {self.name} has them at: "
            raise ConfigError(msg + (", ".join(map(str, self._text_layers)) or "no layer"))
        return found

    def n_cut(self, prompts: Sequence[str]) -> int:
        """Count the prompts that at least one text encoder sees only the beginning of."""
        return self._conditioner.n_cut(prompts)

    def timestep(self, sigma: str) -> float:
        """Return the conditioning timestep that the pipeline gives the transformer at a noise level."""
        return self._conditioner.timestep(sigma)

    @property
    def text_batch(self) -> int:
        """Number of prompts that are embedded at once."""
        return self._conditioner.family.text_batch

    @property
    def has_weights(self) -> bool:
        """Whether the weights of all its models are on this machine."""
        names = model_names(self._family, self._base.source)
        try:
            files = [file for name in names for file in weight_files(self._base.source.folder / name)]
            files += [] if (self.random_weights or "").startswith("init") else weight_files(self._folder)
        except BackboneError:
            return False
        return all(file.is_file() for file in files)

    @property
    def clock(self) -> Clock:
        """Seconds spent on ``read`` (decoding images), ``vae``, ``text`` and ``dit`` by all backbones of this base."""
        return self._base.clock

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
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of the latent of a square image; no other takes more bytes."""
        return self._latent_shape(self.size.resolution, self.size.resolution)

    @property
    def latent_bytes(self) -> int:
        """Bytes of the largest latent in float32."""
        return 4 * int(np.prod(self.latent_shape))

    def fingerprint_config(self) -> dict[str, Any]:
        """Return every setting of the backbone that changes features, as plain JSON values."""
        family = self._family
        # what a seed draws is torch's and the constructor's choice
        drawn = (
            None if self.random_weights is None else f"{self.random_weights}, torch {torch.__version__.split('+')[0]}"
        )
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
            "vae_dtype": _text(self.stages.without_weights["vae"].dtype),
            "resolution": self.size.resolution,
            "resize_rule": f"{self.size.resize} {RESIZE_RULES[self.size.resize]}",
            "image_rule": IMAGE_RULE,
            "latent_rule": LATENT_RULES[family.latents].definition,
            "mix_rule": MIX_RULES[family.noise],
            "noise_rule": NOISE_RULE if self.canvas is None else f"{NOISE_RULE}; {CANVAS_RULE}",
            "prompt_template": self._pipeline_source,
            "max_tokens": self._conditioner.max_tokens,
            "pipeline_arguments": self._pipeline_settings,
            "timestep_rule": self._conditioner.timestep_rule(),
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
            "device": self.device.type,
            "random_weights": self.random_weights,
        }

    @cached_property
    def _pipeline_source(self) -> str:
        """What the pipeline does with a prompt is its code."""
        return f"SHA-256 of the pipeline's code: {source_hash(self._family)}"

    @cached_property
    def _pipeline_settings(self) -> dict[str, str]:
        """What the row gives the pipeline's call, and ``model_index.json`` its constructor, besides components."""
        pipe = self._conditioner.pipe
        own = {name: value for name, value in pipe.config.items() if name[0] != "_" and name not in pipe.components}
        return {name: repr(value) for name, value in sorted({**own, **self._family.call}.items())}

    @cached_property
    def _text_settings(self) -> dict[str, Any]:
        """What prompt embeddings depend on besides the prompt."""
        weights = {name: value for name, value in self._base.weights.items() if name != "vae"}
        files = {name: value for name, value in self._base.files.items() if name != "vae"}
        config = self.stages.without_weights["transformer"].config
        return {
            "pipeline": self._family.pipeline,
            "template": self._pipeline_source,
            "arguments": self._pipeline_settings,
            "max_tokens": self._conditioner.max_tokens,
            "transformer": {name: config[name] for name in self._family.text_settings},
            "weights": weights,
            "files": files,
            "dtype": _text(self.dtype),
        }

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        pipe = self._conditioner.pipe
        return latent_shape(
            self.stages.without_weights["vae"], self._family.latents, height, width, self._family.cell(pipe)
        )


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(folder: Path) -> str:
    """Name a transformer after its folder, or after the checkpoint that a folder called ``transformer`` lies in."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "transformer" else folder.name
