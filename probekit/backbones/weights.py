"""Weights as data: their hash for fingerprints, and random ones as controls.

Random weights replace those of the transformer only; the VAE and the text encoders stay trained.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from probekit.backbones.hub import in_short, read_json
from probekit.errors import BackboneError, ConfigError

_WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_ALLOWED = "allowed: init:SEED (untrained) or shuffled:SEED (entries permuted), with a whole number SEED from 0"


@dataclass(frozen=True)
class RandomWeights:
    """A parsed ``KIND:SEED``."""

    kind: Literal["init", "shuffled"]
    seed: int

    @classmethod
    def parse(cls, text: str) -> "RandomWeights":
        """Read ``init:SEED`` or ``shuffled:SEED``."""
        kind, _, seed = text.partition(":")
        if kind not in ("init", "shuffled") or not (seed.isascii() and seed.isdigit()) or int(seed) >= 2**63:
            msg = f"random weights {text!r}; {_ALLOWED}"
            raise ConfigError(msg)
        return cls("init" if kind == "init" else "shuffled", int(seed))

    def __str__(self) -> str:
        return f"{self.kind}:{self.seed}"


def initialised(build: Callable[[], torch.nn.Module], seed: int) -> torch.nn.Module:
    """Build an untrained model under a seed, in float32 on the CPU.

    Weight matrices that the constructor leaves constant zero are drawn from N(0, 0.02): a block behind a zero gate is
    an identity. Buffers, such as position embeddings, are the constructor's. The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build()
        for parameter in model.parameters():
            if parameter.ndim >= 2 and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def shuffle(model: torch.nn.Module, seed: int) -> None:
    """Permute the entries within every parameter tensor, in place: each keeps its distribution and loses its order."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            digest = hashlib.sha256(json.dumps([seed, name]).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


def convert(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Convert a model of diffusers in place as its ``from_pretrained`` would: some modules stay in float32."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return model


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files that diffusers and transformers load from a model's folder.

    Raises
    ------
    BackboneError
        If there are none.
    """
    for name in _WEIGHT_NAMES:
        index = folder / f"{name}.index.json"
        # where both are there, diffusers takes the shards and transformers the whole file
        whole_first = name == "model.safetensors"
        if (folder / name).is_file() and (whole_first or not index.is_file()):
            return [folder / name]
        if index.is_file():
            return [folder / file for file in sorted(set(read_json(index).get("weight_map", {}).values()))]
    msg = f"{folder}: has no weights ({' or '.join(_WEIGHT_NAMES)})"
    raise BackboneError(msg)


def stored_hash(folder: Path) -> str:
    """Return the SHA-256 over (name, dtype, shape, bytes) of a model's stored tensors, by name: shards do not matter.

    Raises
    ------
    BackboneError
        If a file is missing or damaged.
    """
    digest = hashlib.sha256()
    with ExitStack() as opened:
        at: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = opened.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                msg = f"{path}: cannot read the weights ({in_short(error)})"
                raise BackboneError(msg) from error
            at |= dict.fromkeys(file.keys(), file)
        for name in sorted(at):
            tensor = at[name].get_tensor(name)
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
