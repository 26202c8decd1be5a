"""Read tokens inside a running transformer: forward hooks, pooling on the device, early exit.

Shapes: b images of a batch, t image tokens of an image (a grid of h x w), s all tokens of a tensor, d channels. No hook
keeps the tokens (b, t, d); the pooled (b, d') are all that stays. The forward pass is left by an exception as soon as
the last wanted layer was read: a model cut short instead would be silently wrong for families whose later blocks depend
on the number of blocks.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from probekit.backbones.families import BlockList, Call, Family, Tokens
from probekit.errors import BackboneError, ConfigError

Grid = tuple[int, int]
Pooled = dict[tuple[str, int], torch.Tensor]


class _Done(BaseException):
    """Leaves the forward pass after the last wanted layer."""


@dataclass(frozen=True)
class Pooling:
    """How the tokens of a layer (b, t, d) become one vector an image.

    Attributes
    ----------
    definition
        In words, with a version; part of a store's fingerprint.
    pool
        (tokens (b, t, d), (h, w) of the image tokens) to float32 (b, d').
    stream
        Which tokens are pooled.
    factor
        d' / d.
    """

    definition: str
    pool: Callable[[torch.Tensor, Grid], torch.Tensor]
    stream: Literal["image", "text"] = "image"
    factor: int = 1


def _mean(tokens: torch.Tensor, _: Grid) -> torch.Tensor:
    return tokens.mean(dim=1, dtype=torch.float32)


def _mean_std(tokens: torch.Tensor, _: Grid) -> torch.Tensor:
    std, mean = torch.std_mean(tokens.float(), dim=1, correction=0)
    return torch.cat([mean, std], dim=1)


def _grid4(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    image = tokens.float().transpose(1, 2).reshape(len(tokens), -1, *grid)  # (b, d, h, w)
    return torch.nn.functional.adaptive_avg_pool2d(image, 4).flatten(2).transpose(1, 2).flatten(1)


POOLINGS = {
    "mean": Pooling("1: mean over the image tokens, accumulated in float32", _mean),
    "max": Pooling("1: maximum over the image tokens of each channel", lambda tokens, _: tokens.amax(dim=1).float()),
    "mean_std": Pooling(
        "1: mean over the image tokens, then their standard deviation (divided by t), in float32", _mean_std, factor=2
    ),
    "grid4": Pooling(
        "1: means over the 4 x 4 parts of the picture, row by row, d channels each, in float32", _grid4, factor=16
    ),
    "text_mean": Pooling(
        "1: mean over all tokens of the text stream, padding included, accumulated in float32", _mean, stream="text"
    ),
}


def check_poolings(poolings: Sequence[str]) -> None:
    """Refuse names that are not in `POOLINGS`."""
    for name in poolings:
        if name not in POOLINGS:
            msg = f"pooling {name!r} is not known; allowed: {', '.join(POOLINGS)}"
            raise ConfigError(msg)


def check_layers(layers: Sequence[int], last: int) -> None:
    """Refuse layers that the transformer does not have; `last` is the output point, one more than its blocks."""
    if not layers:
        msg = f"no layer is asked for; allowed: 0 to {last}"
        raise ConfigError(msg)
    for layer in layers:
        if not 0 <= layer <= last:
            msg = f"layer {layer} does not exist; allowed: 0 to {last - 1}, and {last} = entering the output"
            raise ConfigError(msg)


def text_layers(family: Family, transformer: torch.nn.Module) -> list[int]:
    """List the layers at which there are text tokens beside those of the image, layer 0 first."""
    blocks = family.modules(transformer)
    # a block gets text where the one before it passes some on; the output point has none
    passes = [
        convention.text is not None and (convention.last_text or module is not _last(family, transformer, convention))
        for _, module, convention in blocks
    ]
    return [layer for layer, text in enumerate([blocks[0][2].text is not None, *passes]) if text]


def _last(family: Family, transformer: torch.nn.Module, convention: BlockList) -> torch.nn.Module:
    return [module for _, module, blocks in family.modules(transformer) if blocks is convention][-1]


class Reader:
    """Finds the tokens of each stream in what goes into and comes out of a block.

    Parameters
    ----------
    family
        The row.
    call
        The transformer's arguments, from which some families tell where an image begins.
    n_tokens
        t.
    """

    def __init__(self, family: Family, call: Call, n_tokens: int) -> None:
        self._family = family
        self._call = call
        self._n_tokens = n_tokens

    def entering(
        self, block: torch.nn.Module, convention: BlockList, args: tuple[Any, ...], kwargs: dict[str, Any], stream: str
    ) -> torch.Tensor:
        """Return a block's image or text tokens (b, t, d) as they enter it."""
        kind: Any = type(block)
        given = _arguments(kind).bind(*args, **kwargs).arguments
        named = convention.text_argument if stream == "text" and convention.text != "rest" else convention.argument
        if not isinstance(given.get(named), torch.Tensor):
            found = f"a block of {convention.path} gets no tensor {named!r}, only {', '.join(given)}"
            msg = f"{self._family.transformer}: {found}"
            raise BackboneError(msg)
        if stream == "text" and convention.text != "rest":
            return batch_first(given[convention.text_argument], convention)
        return self._cut(batch_first(given[convention.argument], convention), convention.tokens, stream)

    def leaving(self, convention: BlockList, output: Any, stream: str) -> torch.Tensor:
        """Return a block's image or text tokens (b, t, d) as they leave it."""
        if stream == "text" and convention.text != "rest":
            return batch_first(self.entry(convention, output, str(convention.text)), convention)
        tokens = self.entry(convention, output, convention.returns)
        return self._cut(batch_first(tokens, convention), convention.tokens, stream)

    def entry(self, convention: BlockList, output: Any, place: str) -> torch.Tensor:
        """Return the entry of a block's return value: ``first``, ``last`` or, where it is one tensor, ``only``."""
        entries = (output,) if isinstance(output, torch.Tensor) else output
        alone = isinstance(output, torch.Tensor) == (place == "only")
        entry = entries[-1 if place == "last" else 0] if alone else None
        if not isinstance(entry, torch.Tensor):
            found = ", ".join(str(tuple(e.shape)) if isinstance(e, torch.Tensor) else repr(e) for e in entries)
            msg = f"{self._family.transformer}: a block of {convention.path} returns ({found}), no tensor {place}"
            raise BackboneError(msg)
        return entry

    def projected(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the image tokens (b, t, d) that enter the output projection."""
        tokens = batch_first(entering(args, kwargs), self._family.blocks[-1])
        return self._cut(tokens, self._family.output.tokens, "image")

    def returned(self, output: torch.Tensor) -> torch.Tensor:
        """Leave out the text that some transformers return beside the image."""
        wider = output.ndim == 3 and output.shape[1] > self._n_tokens
        return self._cut(output, self._family.output.tokens, "image") if wider else output

    def places(self, shape: torch.Size, tokens: Tokens) -> torch.Tensor:
        """Return which of the s tokens of a tensor (b, s, d) are the image's, bool (b, s)."""
        places = torch.arange(shape[1]).expand(shape[0], -1)
        if tokens == "all":
            return places >= 0
        if tokens == "first":
            return places < self._n_tokens
        if tokens == "last":
            return places >= shape[1] - self._n_tokens
        begin = tokens(self._call).cpu().unsqueeze(1)
        return (places >= begin) & (places < begin + self._n_tokens)

    def _cut(self, tensor: torch.Tensor, tokens: Tokens, stream: str) -> torch.Tensor:
        if tokens == "all":
            return tensor
        if tokens in ("first", "last") and stream == "image":
            return tensor[:, : self._n_tokens] if tokens == "first" else tensor[:, tensor.shape[1] - self._n_tokens :]
        if stream == "text" and callable(tokens):
            # as many as the image begins at, in every sample another number: their mean stands for them
            begin = tokens(self._call).tolist()
            return torch.stack(
                [
                    sample[:end].mean(dim=0, keepdim=True, dtype=torch.float32)
                    for sample, end in zip(tensor, begin, strict=True)
                ]
            )
        image = self.places(tensor.shape, tokens).to(tensor.device)
        wanted = image if stream == "image" else ~image
        return tensor[wanted].view(len(tensor), -1, tensor.shape[-1])


def entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the first argument of a module."""
    found: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def batch_first(tensor: torch.Tensor, convention: BlockList) -> torch.Tensor:
    """Return tokens as (b, s, d); they may come as (s, b, d), a picture (b, h, w, d) or a video (b, 1, h, w, d)."""
    tensor = tensor.transpose(0, 1) if convention.sequence_first else tensor
    return tensor.flatten(1, -2) if tensor.ndim > 3 else tensor


@torch.inference_mode()
def pooled_layers(
    transformer: torch.nn.Module,
    family: Family,
    call: Call,
    *,
    wanted: Sequence[tuple[str, int]],
    grid: Grid,
) -> Pooled:
    """Run the transformer up to the last wanted layer and pool the tokens of every wanted one.

    Parameters
    ----------
    transformer, family
        The model and its row of the table.
    call
        Arguments of its forward.
    wanted
        (name of `POOLINGS`, layer): layer 0 = tokens entering the first block, k = tokens after the k-th block, one
        more than the number of blocks = tokens entering the output projection.
    grid
        Image tokens of an image, (h, w).

    Returns
    -------
    dict
        (pooling, layer) to float32 (b, d') on the transformer's device.
    """
    n_tokens = grid[0] * grid[1]
    reader = Reader(family, call, n_tokens)
    pooled: Pooled = {}
    last = max(layer for _, layer in wanted)

    def pool(layer: int, tokens_of: Callable[[str], torch.Tensor]) -> None:
        names = [name for name, at in wanted if at == layer]
        for stream in dict.fromkeys(POOLINGS[name].stream for name in names):
            tokens = tokens_of(stream)
            if tokens.ndim != 3 or (stream == "image" and tokens.shape[1] != n_tokens):
                msg = f"layer {layer} of {family.transformer} gives {tuple(tokens.shape)}, not {n_tokens} image tokens"
                raise BackboneError(msg)
            for name in names:
                if POOLINGS[name].stream == stream:
                    pooled[name, layer] = POOLINGS[name].pool(tokens, grid)
        if layer == last:
            raise _Done

    with hooked(transformer, family, {layer for _, layer in wanted}, reader, pool):
        try:
            transformer(**call)
        except _Done:
            return pooled
    msg = f"{family.transformer} ended before layer {last} was reached"
    raise BackboneError(msg)


@cache
def _arguments(block: Any) -> inspect.Signature:
    """Return the signature of a block class's forward, without self."""
    whole = inspect.signature(block.forward)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


@contextmanager
def hooked(
    transformer: torch.nn.Module,
    family: Family,
    layers: set[int],
    reader: Reader,
    see: Callable[[int, Callable[[str], torch.Tensor]], None],
) -> Iterator[None]:
    """Call ``see(layer, tokens_of)`` at each layer of `layers`; ``tokens_of(stream)`` gives its tokens."""
    blocks = family.modules(transformer)
    output = len(blocks) + 1

    def enters(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(0, lambda stream: reader.entering(block, blocks[0][2], args, kwargs, stream))

    def leaves(layer: int, convention: BlockList) -> Callable[..., None]:
        return lambda _module, _args, result: see(layer, lambda stream: reader.leaving(convention, result, stream))

    def projects(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(output, lambda _: reader.projected(args, kwargs))

    with ExitStack() as hooks:
        if 0 in layers:
            hooks.callback(blocks[0][1].register_forward_pre_hook(enters, with_kwargs=True).remove)
        for layer, (_, block, convention) in enumerate(blocks, start=1):
            if layer in layers:
                hooks.callback(block.register_forward_hook(leaves(layer, convention)).remove)
        if output in layers:
            module = family.projection(transformer)
            hooks.callback(module.register_forward_pre_hook(projects, with_kwargs=True).remove)
        yield


def refuse_hooks(transformer: torch.nn.Module) -> None:
    """Refuse step caches (FirstBlockCache, TaylorSeer, ...) and other hooks of diffusers that skip or change blocks."""
    for path, module in transformer.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in () if registry is None else registry.hooks:
            if not name.endswith(("group_offloading", "layer_execution_tracker")):
                msg = (
                    f"{type(transformer).__name__} has the hook {name!r} on {path or 'itself'}; a step cache skips "
                    "blocks, so it is not allowed: remove it (transformer.disable_cache()) first"
                )
                raise BackboneError(msg)
