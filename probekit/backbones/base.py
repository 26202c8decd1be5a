"""What the transformers of one pipeline share: VAE, text encoders, their hashes, and the cache of what they gave.

Shapes: b images, (c, h, w) a latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from probekit.backbones import latents as latent_rules
from probekit.backbones.cache import Cache, Item, content_key
from probekit.backbones.conditioning import Embeddings
from probekit.backbones.families import Component, Family
from probekit.backbones.images import IMAGE_RULE, RESIZE_RULE, read_pixels
from probekit.backbones.loading import Source, config_hash, files_hash, load_base
from probekit.backbones.weights import state_hash

PROMPT_BATCH = 16


@dataclass(frozen=True)
class Base:
    """A base pipeline without its transformer.

    Attributes
    ----------
    source
        Where it came from.
    components
        Its parts by name, on `device`.
    weights
        Hash of the state dict of every model.
    files
        Hash of the config of every model, and of all files of every tokenizer.
    dtype, device
        Where and in which dtype its models compute.
    cache
        Latents and prompt embeddings.
    """

    source: Source
    components: dict[str, Component]
    weights: dict[str, str]
    files: dict[str, str]
    dtype: torch.dtype
    device: torch.device
    cache: Cache

    @classmethod
    def load(cls, source: Source, family: Family, dtype: torch.dtype, device: torch.device, cache: Cache) -> "Base":
        """Load and hash every component, and move the models to `device`."""
        components = load_base(source, family, dtype)
        models = {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}
        weights = {name: state_hash(model) for name, model in models.items()}
        files = {name: config_hash(source.folder / name) for name in models}
        tokenizers = [name for name, part in components.items() if name.startswith("tokenizer") and part is not None]
        files |= {name: files_hash(source.folder / name) for name in tokenizers}
        for model in models.values():
            model.to(device)
        return cls(source, components, weights, files, dtype, device, cache)

    def encode_images(self, paths: Sequence[Path], digests: Sequence[bytes], resolution: int) -> torch.Tensor:
        """Return the latents of image files, float32 on the CPU, (b, c, h, w); see `Backbone.encode_images`."""
        vae, batch = self.components["vae"], latent_rules.encode_batch(resolution)
        settings = {
            "vae": [self.weights["vae"], self.files["vae"], str(vae.dtype)],
            "rules": [IMAGE_RULE, RESIZE_RULE, latent_rules.LATENT_RULE],
            "resolution": resolution,
        }
        keys = [content_key({**settings, "image": digest.hex()}) for digest in digests]

        def compute(positions: list[int]) -> list[Item]:
            pixels = torch.stack([read_pixels(paths[i], digests[i], resolution) for i in positions])
            return [{"latents": latent.contiguous()} for latent in latent_rules.encode(vae, pixels, batch)]

        return torch.stack([item["latents"] for item in self.cache.through("latents", keys, compute, batch)])

    def encode_prompts(
        self, prompts: list[str], settings: dict[str, Any], encode: Callable[[list[str]], list[Embeddings]]
    ) -> dict[str, Embeddings]:
        """Return the embeddings of distinct prompts.

        Parameters
        ----------
        prompts
            Distinct prompts.
        settings
            What the embeddings depend on besides the base and the prompt.
        encode
            Computes the embeddings of `PROMPT_BATCH` prompts.

        Returns
        -------
        dict
            Prompt to embeddings on `device`.
        """
        text = ("text_encoder", "tokenizer")
        shared = {
            **settings,
            "weights": {name: value for name, value in self.weights.items() if name.startswith(text)},
            "files": {name: value for name, value in self.files.items() if name.startswith(text)},
            "dtype": str(self.dtype),
        }
        keys = [content_key({**shared, "prompt": prompt}) for prompt in prompts]

        def compute(positions: list[int]) -> list[Item]:
            texts = [prompts[i] for i in positions]
            filled = texts + [""] * (PROMPT_BATCH - len(texts))  # of fixed size, for the reason given in `encode_batch`
            return [_to_item(embeddings) for embeddings in encode(filled)[: len(texts)]]

        items = self.cache.through("prompts", keys, compute, PROMPT_BATCH)
        return {prompt: self._from_item(item) for prompt, item in zip(prompts, items, strict=True)}

    def _from_item(self, item: Item) -> Embeddings:
        found = (item.get(str(place)) for place in range(int(item["places"])))
        return tuple(None if tensor is None else tensor.to(self.device) for tensor in found)


def _to_item(embeddings: Embeddings) -> Item:
    """Name the tensors by their place in the pipeline's tuple, whose other places are None."""
    tensors = {str(place): tensor.cpu().clone() for place, tensor in enumerate(embeddings) if tensor is not None}
    return {"places": torch.tensor(len(embeddings)), **tensors}
