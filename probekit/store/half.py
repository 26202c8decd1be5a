"""Conversion between float16 and float32 by torch, which does it ten times as fast as numpy; the bits are the same.

torch is loaded by the first conversion and not before: most commands need none. It is given pieces so small that it
starts no threads of its own, so converting is safe in forked processes and beside other threads.
"""

from typing import Any

from numpy.typing import NDArray

PIECE = 2**15 - 64
"""Values that torch converts on the calling thread alone: whole cache lines, fewer than at::internal::GRAIN_SIZE."""


def convert(values: NDArray[Any], out: NDArray[Any]) -> None:
    """Copy float16 values into float32 ones, or round float32 ones to the nearest float16, ties to even.

    Parameters
    ----------
    values, out
        One-dimensional and of the same length.
    """
    import torch

    if not values.flags.writeable:  # torch has no read-only tensors and warns
        values = values.copy()
    source, target = torch.from_numpy(values), torch.from_numpy(out)
    for piece, into in zip(torch.split(source, PIECE), torch.split(target, PIECE), strict=True):
        into.copy_(piece)
