"""Read image tokens inside a running transformer: forward hooks, pooling on the device, early exit.

Shapes: b images of a batch, t image tokens of an image, d channels. No hook keeps the tokens (b, t, d); the pooled
(b, d) are all that stays. The forward pass is left by an exception as soon as the last wanted layer was read: a model
cut short instead would be silently wrong for families whose later blocks depend on the number of blocks.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from probekit.backbones.conditioning import Call
from probekit.backbones.families import Family, Place
from probekit.errors import BackboneError, ConfigError

Pooled = dict[tuple[str, int], torch.Tensor]


class _Done(BaseException):
    """Leaves the forward pass after the last wanted layer."""


@dataclass(frozen=True)
class Pooling:
    """How image tokens (b, t, d) become one vector (b, d'); the definition is part of a store's fingerprint."""

    definition: str
    pool: Callable[[torch.Tensor], torch.Tensor]


POOLINGS = {
    "mean": Pooling(
        definition="1: mean over the image tokens, accumulated in float32",
        pool=lambda tokens: tokens.mean(dim=1, dtype=torch.float32),
    ),
    "max": Pooling(
        definition="1: maximum over the image tokens of each channel",
        pool=lambda tokens: tokens.amax(dim=1).float(),
    ),
}


def check_poolings(poolings: Sequence[str]) -> None:
    """Refuse names that are not in `POOLINGS`."""
    for name in poolings:
        if name not in POOLINGS:
            msg = f"pooling {name!r} is not known; allowed: {', '.join(POOLINGS)}"
            raise ConfigError(msg)


def check_layers(layers: Sequence[int], n_blocks: int) -> None:
    """Refuse layers that the transformer does not have."""
    if not layers:
        msg = f"no layer is asked for; allowed: 0 to {n_blocks}"
        raise ConfigError(msg)
    for layer in layers:
        if not 0 <= layer <= n_blocks:
            msg = f"layer {layer} does not exist; allowed: 0 to {n_blocks}"
            raise ConfigError(msg)


@torch.inference_mode()
def pooled_layers(
    transformer: torch.nn.Module,
    family: Family,
    call: Call,
    *,
    layers: Sequence[int],
    poolings: Sequence[str],
    n_tokens: int,
) -> Pooled:
    """Run the transformer up to the last wanted layer and pool the image tokens of every wanted one.

    Parameters
    ----------
    transformer, family
        The model and its row of the table.
    call
        Positional and keyword arguments of its forward.
    layers
        Wanted layers: 0 = tokens entering the first block, k = tokens after the k-th block.
    poolings
        Names of `POOLINGS`.
    n_tokens
        Number of image tokens that every layer must have.

    Returns
    -------
    dict
        (pooling, layer) to float32 (b, d) on the transformer's device.
    """
    pooled: Pooled = {}
    last = max(layers)

    def pool(layer: int, tokens: torch.Tensor) -> None:
        if tokens.ndim != 3 or tokens.shape[1] != n_tokens:
            msg = f"layer {layer} of {family.transformer} gives {tuple(tokens.shape)}, not {n_tokens} image tokens"
            raise BackboneError(msg)
        for name in poolings:
            pooled[name, layer] = POOLINGS[name].pool(tokens)
        if layer == last:
            raise _Done

    def enters(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pool(0, kwargs[family.image_argument])

    def leaves(layer: int, returns: Place) -> Callable[..., None]:
        return lambda _module, _args, output: pool(layer, _image_tokens(output, returns))

    args, kwargs = call
    blocks = family.modules(transformer)
    with ExitStack() as hooks:
        if 0 in layers:
            hooks.callback(blocks[0][1].register_forward_pre_hook(enters, with_kwargs=True).remove)
        for layer, (_, block, returns) in enumerate(blocks, start=1):
            if layer in layers:
                hooks.callback(block.register_forward_hook(leaves(layer, returns)).remove)
        try:
            transformer(*args, **kwargs)
        except _Done:
            return pooled
    msg = f"{family.transformer} ended before layer {last} was reached"
    raise BackboneError(msg)


def _image_tokens(output: torch.Tensor | tuple[torch.Tensor | None, ...], returns: Place) -> torch.Tensor:
    tokens = output if isinstance(output, torch.Tensor) else output[0 if returns == "first" else -1]
    assert tokens is not None  # only text is ever left out
    return tokens
