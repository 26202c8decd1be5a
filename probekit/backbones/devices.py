"""Where and in which dtype a backbone computes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from probekit.errors import ConfigError, DeviceMemoryError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger(__name__)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device to compute on: CUDA where there is one, unless another is asked for."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        msg = f"device {device!r} is not known; allowed: cpu, cuda, cuda:INDEX, mps"
        raise ConfigError(msg) from error
    count = torch.cuda.device_count()
    usable = {"cpu": True, "cuda": (found.index or 0) < count, "mps": torch.backends.mps.is_available()}
    if not usable.get(found.type, False):
        msg = (
            f"device {str(device)!r} is not available here ({count} CUDA devices); allowed: cpu or an available device"
        )
        raise ConfigError(msg)
    return found


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, weights: Path | None) -> torch.dtype:
    """Return the dtype to compute in: float32 on the CPU and bfloat16 elsewhere, unless another is asked for."""
    allowed = [name for name in DTYPES if name != "float16" or device.type != "cpu"]
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        if name not in allowed:
            msg = f"dtype {name!r} is not allowed on {device.type}; allowed: {', '.join(allowed)}"
            raise ConfigError(msg)
        return DTYPES[name]
    if device.type != "cpu":
        return torch.bfloat16
    stored = None if weights is None else _stored_dtype(weights)
    if stored not in (None, "F32"):
        logger.info("%s is stored as %s and computes in float32 on the CPU", weights, stored)
    return torch.float32


@contextmanager
def enough_memory(what: str, device: torch.device, remedies: str) -> Iterator[None]:
    """Say in one line that `what` does not fit on the device, and what to try."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        msg = f"out of memory on {device} with {what}; try {remedies}"
        raise DeviceMemoryError(msg) from error


def _stored_dtype(folder: Path) -> str | None:
    """Return the dtype of the first stored weight; None where none can be read, which loading will then explain."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                return str(file.get_slice(next(iter(file.keys()))).get_dtype())
        except SafetensorError:
            return None
    return None
