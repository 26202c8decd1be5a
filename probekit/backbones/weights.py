"""Weights as data: their hash for fingerprints, and random ones as controls.

Random weights replace those of the transformer only; the VAE and the text encoders stay trained.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from probekit.errors import ConfigError

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


def state_hash(model: torch.nn.Module) -> str:
    """Return the SHA-256 over (name, dtype, shape, bytes) of the state dict, by sorted name, in the dtype it has."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
