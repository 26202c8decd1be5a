"""Training state in one safetensors file: weights, averaged weights and AdamW moments, written atomically.

Batches, noise and learning rates of the training loops are pure functions of (seed, step), so these tensors and the
step are all that a resumed run needs to continue exactly where the killed one stopped.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from probekit.errors import ConfigError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able record to `path`; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(contiguous, partial, metadata={"record": json.dumps(meta)})
    partial.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a safetensors file is no dict
        record = json.loads(file.metadata()["record"])
    return tensors, record


def save_training(
    path: Path,
    *,
    modules: Mapping[str, torch.nn.Module],
    optimiser: torch.optim.Optimizer,
    meta: Mapping[str, Any],
) -> None:
    """Save modules and optimiser; `meta` holds the step and whatever else the loop wants back."""
    tensors = {f"{name}/{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for index, state in enumerate(optimiser.state_dict()["state"].values()):
        tensors |= {f"optimiser/{index}/{moment}": state[moment] for moment in _MOMENTS}
    write_tensors(path, tensors, meta)


def load_training(
    path: Path,
    *,
    modules: Mapping[str, torch.nn.Module],
    optimiser: torch.optim.Optimizer,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Restore what `save_training` saved, in place, and return its `meta`.

    Raises
    ------
    ConfigError
        If `meta` does not hold these settings: batches and learning rates follow from them, the length included.
    """
    tensors, meta = read_tensors(path)
    for key, asked in settings.items():
        if meta.get(key) != asked:
            message = (
                f"{path}: was trained with {key} {meta.get(key)}, not {asked}; ask for the same or delete the file"
            )
            raise ConfigError(message)
    for name, module in modules.items():
        prefix = f"{name}/"
        module.load_state_dict({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
    state = optimiser.state_dict()
    count = sum(len(group["params"]) for group in state["param_groups"])
    state["state"] = {
        index: {moment: tensors[f"optimiser/{index}/{moment}"] for moment in _MOMENTS} for index in range(count)
    }
    optimiser.load_state_dict(state)
    return meta
