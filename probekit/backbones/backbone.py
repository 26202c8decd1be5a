"""The class `Backbone`: any diffusers text-to-image DiT, frozen, as a function from (prompt, image) to features.

Shapes: m rows, (c, h, w) a latent, d channels of a feature.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probekit._types import FloatArray, LayerPoint
from probekit.backbones.base import Base
from probekit.backbones.cache import Cache
from probekit.backbones.capture import check_layers, check_poolings, pooled_layers
from probekit.backbones.conditioning import (
    GUIDANCE_RULE,
    Conditioner,
    check_max_tokens,
    collate,
    plan_batches,
    timestep_of,
)
from probekit.backbones.devices import resolve_device, resolve_dtype
from probekit.backbones.images import IMAGE_RULE, RESIZE_RULE
from probekit.backbones.latents import LATENT_RULE, NOISE_RULE, mix
from probekit.backbones.loading import (
    build_pipeline,
    config_hash,
    load_transformer,
    locate,
    transformer_family,
    transformer_folder,
)
from probekit.backbones.weights import RandomWeights, state_hash
from probekit.errors import ConfigError

EXTRACTOR_VERSION = "1"  # part of every fingerprint: raised when the same settings would give other features


@dataclass(frozen=True)
class _Settings:
    """What was asked for besides the base and the transformer; None = the default of pipeline or transformer."""

    max_tokens: int | None
    resolution: int | None

    def __post_init__(self) -> None:
        check_max_tokens(self.max_tokens)
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
    resolution
        Side of the images in pixels.
    n_blocks, width, n_parameters
        Blocks, channels of a token, and parameters of the transformer.
    layers
        The n_blocks + 1 places where features are taken.
    latent_shape
        (c, h, w) of one image.
    """

    def __init__(self, base: Base, folder: Path, random: RandomWeights | None, settings: _Settings, name: str) -> None:
        self._base = base
        self._folder = folder
        self._random = random
        self._settings = settings
        self._family = transformer_family(folder)
        transformer = load_transformer(folder, self._family, base.dtype, random)
        self._weights = {"transformer": state_hash(transformer), **base.weights}
        components = {**base.components, "transformer": transformer.to(base.device)}
        pipe = build_pipeline(self._family, components, str(folder))
        self._transformer = transformer
        self._conditioner = Conditioner(pipe, base.device, settings.max_tokens)
        self.name = name
        self.model_id = base.source.model_id
        self.revision = base.source.revision
        self.dtype = base.dtype
        self.device = base.device
        self.layers: list[LayerPoint] = self._family.points(transformer)
        self.n_blocks = len(self.layers) - 1
        self.width = int(transformer.inner_dim)
        self.n_parameters = sum(parameter.numel() for parameter in transformer.parameters())
        self.resolution = settings.resolution or int(transformer.config.sample_size) * int(pipe.vae_scale_factor)
        self.latent_shape = self._checked_latent_shape(int(pipe.vae_scale_factor))

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
        max_tokens: int | None = None,
        resolution: int | None = None,
        cache: str | Path | None = None,
        name: str | None = None,
    ) -> "Backbone":
        """Load a backbone.

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
        max_tokens
            Token limit of the prompt, as the pipeline's ``max_sequence_length``; default: the pipeline's.
        resolution
            Side of the images in pixels; default: the transformer's sample size times the VAE's factor.
        cache
            Folder that keeps VAE latents and prompt embeddings, keyed by content.
        name
            Name in results; default: the transformer's folder, else the last part of `model_id`.

        Returns
        -------
        Backbone
            Frozen, on `device`.
        """
        random = None if random_weights is None else RandomWeights.parse(random_weights)
        settings = _Settings(max_tokens, resolution)
        found_device = resolve_device(device)
        source = locate(str(model_id), revision=revision, without_transformer=transformer is not None)
        folder = transformer_folder(source, None if transformer is None else Path(transformer))
        family = transformer_family(folder)
        found_dtype = resolve_dtype(dtype, found_device, folder)
        kept = Cache(None if cache is None else Path(cache))
        base = Base.load(source, family, found_dtype, found_device, kept)
        return cls(base, folder, random, settings, name or (source.name if transformer is None else _name(folder)))

    def with_transformer(
        self, transformer: str | Path | None = None, *, random_weights: str | None = None, name: str | None = None
    ) -> "Backbone":
        """Probe another transformer on this backbone's VAE, text encoders and cache, which stay loaded.

        Parameters
        ----------
        transformer
            Folder of the transformer; None = this backbone's own, read again.
        random_weights, name
            As in `from_pretrained`.

        Returns
        -------
        Backbone
            With the dtype, device, token limit and asked resolution of this one.
        """
        random = None if random_weights is None else RandomWeights.parse(random_weights)
        if transformer is None:
            return Backbone(self._base, self._folder, random, self._settings, name or self.name)
        folder = transformer_folder(self._base.source, Path(transformer))
        return Backbone(self._base, folder, random, self._settings, name or _name(folder))

    def encode_images(self, paths: Sequence[Path], digests: Sequence[bytes]) -> torch.Tensor:
        """Return the latents of image files.

        Parameters
        ----------
        paths, digests
            The files, and the SHA-256 of the bytes of each.

        Returns
        -------
        Tensor
            float32 on the CPU, (b, c, h, w): posterior modes, normalised as the pipeline's decoding undoes it.
        """
        return self._base.encode_images(paths, digests, self.resolution)

    def features(
        self,
        latents: torch.Tensor,
        prompts: Sequence[str],
        *,
        sigma: str,
        eps: torch.Tensor,
        layers: Sequence[int],
        poolings: Sequence[str],
        batch_size: int,
        on_batch: Callable[[int], None] | None = None,
    ) -> dict[tuple[str, int], FloatArray]:
        """Run the transformer on near-clean images and pool the wanted layers.

        Parameters
        ----------
        latents
            Clean latents x0, (m, c, h, w).
        prompts
            m prompts, equal ones adjacent.
        sigma
            Noise level as decimal text; the input is (1 - sigma) x0 + sigma eps.
        eps
            Noise, (m, c, h, w).
        layers
            0 = image tokens entering the first block, k = those after the k-th.
        poolings
            Names of `probekit.backbones.capture.POOLINGS`.
        batch_size
            Largest number of images of a forward pass. A prompt is cut only if it has more images than that.
        on_batch
            Called with the number of rows of each finished forward pass.

        Returns
        -------
        dict
            (pooling, layer) to float32 (m, d). Values that are not finite are returned as they are.
        """
        check_layers(layers, self.n_blocks)
        check_poolings(poolings)
        mixed = mix(latents, eps, sigma).to(self.device)
        embeddings = self._base.encode_prompts(
            list(dict.fromkeys(prompts)), self._text_settings, self._conditioner.encode
        )
        places = [(pooling, layer) for pooling in poolings for layer in layers]
        out = np.empty((len(places), len(prompts), self.width), dtype=np.float32)
        for batch in plan_batches(prompts, batch_size):
            calls = [
                self._conditioner.prepare(prompts[run.start], embeddings[prompts[run.start]], mixed[run], sigma)
                for run in batch
            ]
            pooled = pooled_layers(
                self._transformer,
                self._family,
                collate(calls, [run.stop - run.start for run in batch]),
                layers=layers,
                poolings=poolings,
                n_tokens=self._n_tokens,
            )
            stacked = torch.stack([pooled[place] for place in places])
            out[:, batch[0].start : batch[-1].stop] = stacked.cpu().numpy()
            if on_batch is not None:
                on_batch(batch[-1].stop - batch[0].start)
        return dict(zip(places, out, strict=True))

    def n_cut(self, prompts: Sequence[str]) -> int:
        """Count the prompts that at least one text encoder sees only the beginning of."""
        return self._conditioner.n_cut(prompts)

    def timestep(self, sigma: str) -> float:
        """Return the conditioning timestep that the pipeline gives the transformer at a noise level."""
        return timestep_of(sigma, self._conditioner.n_train_timesteps)

    def fingerprint_config(self) -> dict[str, Any]:
        """Return every setting of the backbone that changes features, as plain JSON values."""
        vae = self._base.components["vae"]
        return {
            "extractor": EXTRACTOR_VERSION,
            "model": self.model_id if self.revision is not None else None,  # folders are told apart by their weights
            "revision": self.revision,
            "class": self._family.transformer,
            "pipeline": self._family.pipeline,
            "random_weights": None if self._random is None else str(self._random),
            "weights": self._weights,
            "files": {"transformer": config_hash(self._folder), **self._base.files},
            "dtype": str(self.dtype).removeprefix("torch."),
            "vae_dtype": str(vae.dtype).removeprefix("torch."),
            "resolution": self.resolution,
            "resize_rule": RESIZE_RULE,
            "image_rule": IMAGE_RULE,
            "latent_rule": LATENT_RULE,
            "noise_rule": NOISE_RULE,
            "prompt_template": "the pipeline's",
            "max_tokens": self._conditioner.max_tokens,
            "guidance": GUIDANCE_RULE,
            "timestep_rule": f"{self._family.timestep}, N = {self._conditioner.n_train_timesteps}",
        }

    def describe(self) -> dict[str, Any]:
        """Return the facts of the backbone that reports show, as plain JSON values."""
        return {
            "name": self.name,
            "model_id": self.model_id if self.revision is not None else self._base.source.name,
            "revision": self.revision,
            "class": self._family.transformer,
            "n_blocks": self.n_blocks,
            "width": self.width,
            "n_parameters": self.n_parameters,
            "resolution": self.resolution,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "random_weights": None if self._random is None else str(self._random),
        }

    @property
    def _n_tokens(self) -> int:
        patch = int(self._transformer.config.patch_size)
        return (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch)

    def _checked_latent_shape(self, factor: int) -> tuple[int, int, int]:
        config = self._transformer.config
        step = factor * int(config.patch_size)
        largest = step * int(config.pos_embed_max_size)
        if self.resolution % step or self.resolution > largest:
            msg = f"resolution is {self.resolution}; allowed for {self.name}: multiples of {step} up to {largest}"
            raise ConfigError(msg)
        return int(config.in_channels), self.resolution // factor, self.resolution // factor

    @property
    def _text_settings(self) -> dict[str, Any]:
        return {
            "pipeline": self._family.pipeline,
            "max_tokens": self._conditioner.max_tokens,
            **{name: self._transformer.config[name] for name in self._family.text_settings},
        }


def _name(folder: Path) -> str:
    """Name a transformer after its folder, or after the checkpoint that a folder called ``transformer`` lies in."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "transformer" else folder.name
