"""Prompt embeddings: each distinct prompt is embedded once, in the stage of the text encoders, and kept."""

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils import _pytree as pytree

from probekit.backbones.base import Base
from probekit.backbones.cache import Item, content_key
from probekit.backbones.conditioning import Conditioner, Embeddings
from probekit.backbones.devices import enough_memory
from probekit.backbones.inputs import DEFINITIONS, text_summary
from probekit.backbones.stages import Stages

PROMPT_BYTES = 4 << 30
"""Prompt embeddings that are held in memory at once where there is no cache folder."""

_SUMMARY = "summary"  # beside the embeddings in the cache

logger = logging.getLogger(__name__)


class Prompts:
    """The embeddings of prompts.

    Parameters
    ----------
    conditioner, stages, base
        The pipeline, its models, and the cache.
    settings
        What an embedding depends on besides its prompt, as plain JSON values.
    latent_shape
        (c, h, w) of any latent that the pipeline takes.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        stages: Stages,
        base: Base,
        *,
        settings: dict[str, Any],
        latent_shape: tuple[int, int, int],
    ) -> None:
        self._conditioner = conditioner
        self._stages = stages
        self._base = base
        self._settings = {**settings, _SUMMARY: DEFINITIONS["text"]}
        self._keys: dict[str, str] = {}
        self._latent_shape = latent_shape

    def embed(
        self,
        prompts: Sequence[str],
        later: Iterable[str] = (),
        on_prompts: Callable[[int, int], None] | None = None,
    ) -> None:
        """Hold the prompt embeddings that the next features need; the stage of the text encoders.

        Parameters
        ----------
        prompts
            Those that are needed next.
        later
            Further ones, embedded in the same stage as far as memory allows (with a cache folder: all).
        on_prompts
            Called with the number of prompts that are embedded and of those that are to be.
        """
        if all(self._base.cache.has("prompts", self._key(prompt)) for prompt in prompts):
            return
        self._stages.release()
        self._base.cache.forget("prompts", but={self._key(prompt) for prompt in prompts})
        wanted = deque(
            prompt
            for prompt in dict.fromkeys([*prompts, *later])
            if not self._base.cache.has("prompts", self._key(prompt))
        )
        needed, total = set(prompts), len(wanted)
        size = self._conditioner.family.text_batch
        held = 0
        with (
            self._base.clock.part("text"),
            enough_memory("the text encoders", self._base.device, "--dtype bfloat16, --device cpu"),
            self._stages.text_encoders(),
        ):
            while wanted and (held < PROMPT_BYTES or wanted[0] in needed):
                batch = [wanted.popleft() for _ in range(min(size, len(wanted)))]
                # filled up, because the batch size moves the last bits of an embedding and its neighbours do not
                filled = batch + [""] * (size - len(batch))
                encoded = self._conditioner.encode(filled, self._latent_shape)
                for prompt, embeddings in zip(batch, encoded, strict=False):
                    item = _to_item(embeddings) | {_SUMMARY: text_summary(embeddings)}
                    self._base.cache.put("prompts", self._key(prompt), item)
                    if self._base.cache.folder is None:
                        held += sum(tensor.nbytes for tensor in item.values())
                if on_prompts is not None:
                    on_prompts(total - len(wanted), total)
        if wanted:
            logger.warning(
                "prompt embeddings take more than %d GB; %d prompts are embedded later: "
                "a cache folder holds them all at once",
                PROMPT_BYTES >> 30,
                len(wanted),
            )

    def get(self, prompt: str) -> Embeddings:
        """Return the embeddings of a prompt, on the device, in the dtype in which the transformer computes."""
        found = _from_item(self._base.cache.get("prompts", self._key(prompt)), self._base.device)
        if self._stages.cast is None:
            return found
        dtype = self._stages.cast
        return list(
            pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, found)
        )

    def summary(self, prompt: str) -> torch.Tensor:
        """Return the `text_summary` of a prompt's embeddings."""
        return self._base.cache.get("prompts", self._key(prompt))[_SUMMARY]

    def _key(self, prompt: str) -> str:
        if prompt not in self._keys:
            self._keys[prompt] = content_key({**self._settings, "prompt": prompt})
        return self._keys[prompt]


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
    others, structure = _structure(item["json"].numpy().tobytes())
    leaves = [item[str(i)].to(device) if str(i) in item else other for i, other in enumerate(others)]
    found: Embeddings = pytree.tree_unflatten(leaves, structure)
    return found


@lru_cache
def _structure(text: bytes) -> tuple[list[Any], pytree.TreeSpec]:
    """Return what stands beside the tensors of an item, the same for most prompts of a model."""
    content = json.loads(text)
    return content["others"], pytree.treespec_loads(content["structure"])
