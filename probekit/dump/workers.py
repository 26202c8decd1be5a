"""Which share of a dump this process has."""

import os
from collections.abc import Mapping

from probekit.errors import ConfigError


def worker_of(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return (rank, number of workers) as torchrun or a Slurm array says it; (0, 1) without either.

    Parameters
    ----------
    environment
        Environment variables: ``RANK`` and ``WORLD_SIZE`` of torchrun, else ``SLURM_ARRAY_TASK_ID``, ``_MIN``,
        ``_STEP`` and ``_COUNT`` of an array of jobs.

    Raises
    ------
    ConfigError
        If the variables contradict each other.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ["RANK", "WORLD_SIZE"]
        rank, world = (_whole(environment, name) for name in names)
    elif "SLURM_ARRAY_TASK_ID" in environment:
        names = [f"SLURM_ARRAY_TASK_{part}" for part in ("ID", "MIN", "STEP", "COUNT")]
        task, first, step, world = (_whole(environment, name) for name in names)
        rank = (task - first) // max(1, step)  # an array with gaps has ranks above its number of tasks
    else:
        return 0, 1
    if not 0 <= rank < world:
        given = ", ".join(f"{name}={environment.get(name)}" for name in names)
        msg = f"{given}: rank {rank} of {world} workers; allowed: 0 to {world - 1} (or give --worker RANK/WORLD)"
        raise ConfigError(msg)
    return rank, world


def local_device(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the CUDA device that torchrun means for this process; None where it says nothing."""
    return f"cuda:{_whole(environment, 'LOCAL_RANK')}" if "LOCAL_RANK" in environment else None


def _whole(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        found = repr(text) if name in environment else "missing"
        msg = f"{name} is {found}; allowed: a whole number (or give --worker RANK/WORLD)"
        raise ConfigError(msg)
    return int(text)
