"""Tokens and operations of a pipeline whose models have no weights (on torch's meta device).

Tokenizers and scheduler are real, and the family's own pipeline prepares the transformer's inputs, so that the counted
operations are those of a dump. torch's FlopCounterMode counts 2 for each multiply-add of matrix products, convolutions
and attention, and nothing for the rest.

Shapes: t image tokens of an image, s all tokens that enter a block, d channels.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from probekit.backbones.capture import Reader
from probekit.backbones.conditioning import Conditioner
from probekit.backbones.families import BlockList, Component, Family
from probekit.backbones.hub import in_short
from probekit.backbones.latents import encode, latent_shape
from probekit.backbones.loading import quiet
from probekit.backbones.sizes import patch_of

PROMPT = "a photo of a small red dog that looks at a blue cat left of it, with two birds in the tree above them"

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """What one image and `PROMPT` cost; None where that depends on weights.

    Attributes
    ----------
    width
        d.
    image_tokens, text_tokens
        t, and the text tokens that enter the blocks, padding included.
    flop_image, flop_vae, flop_text
        Operations of one forward pass of the transformer, of encoding one image, and of encoding `PROMPT`.
    """

    image_tokens: int
    width: int | None = None
    text_tokens: int | None = None
    flop_image: int | None = None
    flop_vae: int | None = None
    flop_text: int | None = None


def count(family: Family, pipe: Component, side: int, encoders: list[Component]) -> Counts:
    """Run text encoders, transformer and VAE of a pipeline without weights, and count.

    Parameters
    ----------
    family, pipe
        The row and the pipeline, which belongs to this function afterwards.
    side
        Side of the image in pixels.
    encoders
        The text encoders.

    Returns
    -------
    Counts
        What could be counted.
    """
    vae, transformer, patch = pipe.vae, pipe.transformer, patch_of(pipe, family)
    shape = latent_shape(vae, family.latents, side, side, family.cell(pipe))
    counts = Counts(image_tokens=(shape[1] // patch) * (shape[2] // patch))
    _, counts.flop_vae = _counted("VAE", lambda: encode(vae, family.latents, torch.zeros(1, 3, side, side), 1))
    conditioner = Conditioner(family, pipe, torch.device("cpu"), None)
    with _standing_in(encoders):
        embeddings, counts.flop_text = _counted("text encoders", lambda: conditioner.encode([PROMPT], shape)[0])
    if embeddings is None:
        return counts
    latents = torch.zeros(1, *shape)
    call, _ = _counted("transformer's inputs", lambda: conditioner.prepare(PROMPT, embeddings, latents, "0.05"))
    if call is None:
        return counts
    with _seeing(counts, family, transformer, Reader(family, call, counts.image_tokens)):
        _, counts.flop_image = _counted("transformer", lambda: transformer(**call))
    text = call.get("encoder_hidden_states")
    if counts.text_tokens is None and isinstance(text, torch.Tensor):  # blocks attend to text that they do not change
        counts.text_tokens = text.shape[1]
    return counts


def _counted(what: str, run: Callable[[], Any]) -> tuple[Any, int | None]:
    """Return what `run` returns and its operations; (None, None) where it needs values that there are not."""
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            quiet(),
            torch.inference_mode(),
            FlopCounterMode(display=False) as counter,
            _Mixed(),  # type: ignore[no-untyped-call]
        ):
            return run(), counter.get_total_flops()
    except Exception as error:  # noqa: BLE001 - any operation of any model may need values
        logger.info("operations of the %s cannot be counted without weights: %s", what, in_short(error))
        return None, None


# What these return has a shape that depends on the values of their arguments after the first: masks and counts.
_SHAPED_BY_VALUES = (torch.ops.aten.index.Tensor, torch.ops.aten.repeat_interleave.self_Tensor)


class _Mixed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets tensors with values meet tensors without; what never meets one keeps its values, such as masks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        metas = [leaf.is_meta for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if any(metas) and func in _SHAPED_BY_VALUES and not _any_meta((args[1:], kwargs)):
            return func(_zeros(args[0]), *args[1:], **kwargs).to("meta")
        if any(metas) and not all(metas):
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        if any(isinstance(leaf, torch.device) for leaf in leaves):  # a model that is asked for its device says meta
            device = torch.device("meta" if any(metas) else "cpu")
            args, kwargs = pytree.tree_map_only(torch.device, lambda _: device, (args, kwargs))
        return func(*args, **kwargs)


def _any_meta(tree: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in pytree.tree_leaves(tree))


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    """Return zeros of a tensor's shape and dtype that have values; one number is stored."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


@contextmanager
def _standing_in(encoders: list[Component]) -> Iterator[None]:
    """Have encoders return zeros that have values, because pipelines pick from them by masks."""
    hooks = [
        encoder.register_forward_hook(lambda _module, _args, output: pytree.tree_map_only(torch.Tensor, _zeros, output))
        for encoder in encoders
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _seeing(counts: Counts, family: Family, transformer: torch.nn.Module, reader: Reader) -> Iterator[None]:
    """Note the shapes of what enters the first block of every list."""

    def see(convention: BlockList) -> Callable[..., None]:
        whole = replace(convention, tokens="all")

        def look(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, s, counts.width = reader.entering(block, whole, args, kwargs, "image").shape
            if counts.text_tokens is None and convention.text == "rest":
                counts.text_tokens = s - counts.image_tokens
            elif counts.text_tokens is None and convention.text is not None:
                counts.text_tokens = reader.entering(block, convention, args, kwargs, "text").shape[1]

        return look

    firsts = {blocks.path: (block, blocks) for _, block, blocks in reversed(family.modules(transformer))}
    hooks = [block.register_forward_pre_hook(see(blocks), with_kwargs=True) for block, blocks in firsts.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
