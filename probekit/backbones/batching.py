"""Calls of several prompts joined into forward passes.

Which arguments grow with the number of images, and along which axis, is not guessed: the pipeline prepares one image
and two of the same prompt, and the two calls are compared (`Layout.learn`). Only calls that are alike in everything
else are joined, so prompts of unequal length are never padded to one another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from probekit.backbones.families import Call
from probekit.errors import BackboneError, ConfigError

SHARED, LISTED = "shared", "list"  # the same for all images; a list with one entry an image


class Along(NamedTuple):
    """A tensor that holds several images along an axis, `unit` entries each."""

    axis: int
    unit: int


@dataclass(frozen=True)
class Layout:
    """What `learn` found: for every argument its structure with `Along`, ``shared`` or ``list`` at each leaf."""

    kinds: dict[str, Any]

    @classmethod
    def learn(cls, one: Call, two: Call) -> "Layout":
        """Compare the calls of one and of two images of a prompt.

        Parameters
        ----------
        one, two
            What the pipeline prepares for the same prompt and size.

        Raises
        ------
        BackboneError
            If an argument grows in a way that cannot be joined.
        """
        if list(one) != list(two):
            msg = f"the pipeline passes {', '.join(two)} for two images and {', '.join(one)} for one"
            raise BackboneError(msg)
        return cls({name: _kind(name, one[name], two[name]) for name in one})

    def signature(self, call: Call) -> tuple[Any, ...]:
        """Return what must be equal in calls that are joined: everything but the values that belong to an image."""
        return tuple(part for name, value in call.items() for part in (name, *_signature(self.kinds[name], value)))

    def n_images(self, call: Call) -> int:
        """Count the images of a prepared call."""
        sizes = {size for name, value in call.items() for size in _sizes(self.kinds[name], value)}
        if len(sizes) != 1:
            msg = f"the pipeline prepared tensors of batch sizes {sorted(sizes)} in one call"
            raise BackboneError(msg)
        return sizes.pop()

    def join(self, calls: Sequence[Call]) -> Call:
        """Join calls of equal `signature`, in order."""
        if len(calls) == 1:
            return calls[0]
        return {name: _join(name, kind, [call[name] for call in calls]) for name, kind in self.kinds.items()}


def runs(prompts: Sequence[str], shapes: Sequence[tuple[int, ...]], batch_size: int) -> list[list[int]]:
    """Divide rows into runs that one pipeline call can prepare: same prompt, same shape, at most `batch_size` rows."""
    if batch_size < 1:
        msg = f"batch size is {batch_size}; allowed: whole numbers from 1"
        raise ConfigError(msg)
    together: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for row, key in enumerate(zip(prompts, shapes, strict=True)):
        together.setdefault(key, []).append(row)
    return [rows[start : start + batch_size] for rows in together.values() for start in range(0, len(rows), batch_size)]


def _kind(name: str, one: Any, two: Any) -> Any:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) and one.ndim == two.ndim:
        grown = [axis for axis, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
        if not grown:
            return SHARED
        if len(grown) == 1 and two.shape[grown[0]] == 2 * one.shape[grown[0]]:
            return Along(grown[0], one.shape[grown[0]])
    elif isinstance(one, list) and isinstance(two, list) and (len(one), len(two)) == (1, 2):
        return LISTED
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        return [_kind(name, a, b) for a, b in zip(one, two, strict=True)]
    elif isinstance(one, dict) and isinstance(two, dict) and list(one) == list(two):
        return {key: _kind(name, one[key], two[key]) for key in one}
    elif not isinstance(one, torch.Tensor) and one == two:
        return SHARED
    msg = (
        f"argument {name!r} is {_in_short(one)} for one image and {_in_short(two)} for two; its row needs a join for it"
    )
    raise BackboneError(msg)


def _signature(kind: Any, value: Any) -> list[Any]:
    if isinstance(kind, list):
        return [part for k, v in zip(kind, value, strict=True) for part in _signature(k, v)]
    if isinstance(kind, dict):
        return [part for key, k in kind.items() for part in _signature(k, value[key])]
    if kind == LISTED:
        # of each entry only its shape; a list may hold one structure an image
        first = value[0]
        return [repr(pytree.tree_map_only(torch.Tensor, lambda tensor: (tuple(tensor.shape), tensor.dtype), first))]
    if isinstance(value, torch.Tensor):
        shape = tuple(size for axis, size in enumerate(value.shape) if kind == SHARED or axis != kind.axis)
        return [(shape, value.dtype)]
    return [repr(value)]


def _sizes(kind: Any, value: Any) -> list[int]:
    if isinstance(kind, list):
        return [size for k, v in zip(kind, value, strict=True) for size in _sizes(k, v)]
    if isinstance(kind, dict):
        return [size for key, k in kind.items() for size in _sizes(k, value[key])]
    if kind == LISTED:
        return [len(value)]
    return [value.shape[kind.axis] // kind.unit] if isinstance(kind, Along) else []


def _join(name: str, kind: Any, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(kind, list):
        return type(first)(_join(name, k, [value[i] for value in values]) for i, k in enumerate(kind))
    if isinstance(kind, dict):
        return {key: _join(name, k, [value[key] for value in values]) for key, k in kind.items()}
    if kind == LISTED:
        return [entry for value in values for entry in value]
    if isinstance(kind, Along):
        return torch.cat(values, dim=kind.axis)
    same = torch.equal if isinstance(first, torch.Tensor) else lambda a, b: a == b
    if not all(same(value, first) for value in values[1:]):
        msg = (
            f"argument {name!r} does not grow with the images but differs between prompts; its row needs a join for it"
        )
        raise BackboneError(msg)
    return first


def _in_short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]
