"""What the transformers of one pipeline share: VAE, text encoders, their hashes, and the cache of what they gave.

Shapes: b images, (c, h, w) a latent.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakMethod

import torch

from probekit._clock import Clock
from probekit.backbones import latents as latent_rules
from probekit.backbones.cache import Cache, content_key
from probekit.backbones.decode_ahead import PixelStream
from probekit.backbones.devices import enough_memory
from probekit.backbones.families import Component, Family
from probekit.backbones.hub import Source
from probekit.backbones.images import IMAGE_RULE, RESIZE_RULES
from probekit.backbones.inputs import DEFINITIONS, picture_statistics
from probekit.backbones.loading import config_hash, files_hash, load_model
from probekit.backbones.sizes import ImageSize
from probekit.backbones.weights import stored_hash
from probekit.errors import ImageError

ImageFile = tuple[Path, bytes]
"""An image file and the SHA-256 of its bytes."""


@dataclass
class Base:
    """A base pipeline without its transformer; its models are loaded when a stage needs them.

    Attributes
    ----------
    source
        Where it came from.
    weights
        Hash of the stored weights of every model.
    files
        Hash of the config of every model, and of all files of every tokenizer.
    dtype, device
        Where and in which dtype its models compute.
    cache
        Latents and prompt embeddings.
    clock
        Seconds spent on ``read`` (decoding images), ``vae``, ``text`` and ``dit``.
    """

    source: Source
    dtype: torch.dtype
    device: torch.device
    cache: Cache
    weights: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    _vae: Component = None
    _leave: WeakMethod[Callable[[], None]] | None = None

    def hash_parts(self, models: Sequence[str], parts: Sequence[str]) -> None:
        """Hash the weights and configs of the models, and the files of the other parts, from disk."""
        if not self.weights:
            self.weights |= {name: stored_hash(self.source.folder / name) for name in models}
            self.files |= {name: config_hash(self.source.folder / name) for name in models}
            self.files |= {name: files_hash(self.source.folder / name) for name in parts}

    def load(self, name: str, like: Component) -> Component:
        """Load a model on the device; `like` is the same without weights."""
        return load_model(self.source, name, like, self.dtype).to(self.device)

    def occupy(self, leave: Callable[[], None]) -> None:
        """Have the models of one backbone in memory: that of the call before is told to leave; `leave` is a method."""
        before = None if self._leave is None else self._leave()
        if before is not None and before != leave:
            before()
        self._leave = WeakMethod(leave)

    def release_vae(self) -> None:
        """Free the VAE until images are encoded again."""
        self._vae = None

    def latents(
        self, groups: Sequence[Sequence[ImageFile]], family: Family, like: Component, size: ImageSize, workers: int
    ) -> Generator[list[latent_rules.EncodedImage | ImageError]]:
        """Yield group after group of image files, encoded, decoding ahead in `workers` processes.

        Parameters
        ----------
        groups
            The files.
        family
            The row, for its rule from posterior to latent.
        like
            The VAE without weights.
        size
            The images' size.
        workers
            0 = decode in this process.

        Yields
        ------
        list of EncodedImage or ImageError
            In place of an image that cannot be decoded, what is wrong with it.
        """
        settings = {
            "vae": [self.weights["vae"], self.files["vae"], str(like.dtype)],
            "rules": [IMAGE_RULE, RESIZE_RULES[size.resize], latent_rules.LATENT_RULES[family.latents].definition],
            "statistics": [DEFINITIONS["pixels"], DEFINITIONS["latents"]],
            "size": [size.resolution, size.step],
        }
        self.cache.forget("latents")
        keys = [[content_key({**settings, "image": digest.hex()}) for _, digest in group] for group in groups]
        missing = [[not self.cache.has("latents", key) for key in group] for group in keys]
        files = [
            file
            for group, absent in zip(groups, missing, strict=True)
            for file, gone in zip(group, absent, strict=True)
            if gone
        ]
        with PixelStream(
            [path for path, _ in files],
            [digest for _, digest in files],
            resolution=size.resolution,
            step=size.step,
            resize=size.resize,
            workers=min(workers, len(files)),
        ) as stream:
            for group, absent in zip(keys, missing, strict=True):
                waiting: dict[tuple[int, ...], list[tuple[str, torch.Tensor]]] = {}
                bad: dict[str, ImageError] = {}
                for key, gone in zip(group, absent, strict=True):
                    if gone:
                        try:
                            with self.clock.part("read"):
                                pixels = torch.from_numpy(next(stream))
                        except ImageError as error:
                            bad[key] = error
                            continue
                        batch = waiting.setdefault(tuple(pixels.shape), [])
                        batch.append((key, pixels))
                        if len(batch) == latent_rules.encode_batch(*pixels.shape[1:]):
                            self._encode(waiting.pop(tuple(pixels.shape)), family, like)
                for batch in waiting.values():
                    self._encode(batch, family, like)
                found = [bad.get(key) or latent_rules.EncodedImage(**self.cache.get("latents", key)) for key in group]
                self.cache.forget("latents")
                yield found

    def _encode(self, batch: list[tuple[str, torch.Tensor]], family: Family, like: Component) -> None:
        pixels = torch.stack([pixels for _, pixels in batch])
        height, width = pixels.shape[2:]
        size = latent_rules.encode_batch(height, width)
        what = f"the VAE and images of {width} x {height} pixels"
        with (
            enough_memory(what, self.device, "--dtype bfloat16, a smaller --resolution, --device cpu"),
            self.clock.part("vae"),
        ):
            if self._vae is None:
                self._vae = self.load("vae", like)
            latents = latent_rules.encode(self._vae, family.latents, pixels, size)
        of_pixels, of_latents = picture_statistics(pixels), picture_statistics(torch.stack(list(latents)))
        for (key, _), latent, pixel, own in zip(batch, latents, of_pixels, of_latents, strict=True):
            item = {"latents": latent.contiguous(), "pixel_statistics": pixel, "latent_statistics": own}
            self.cache.put("latents", key, item)
