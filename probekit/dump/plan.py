"""What a dump is made of: the rows, where their features are taken, the settings that the store records, the blocks."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Literal

import pandas as pd

from probekit._types import LayerPoint
from probekit.backbones import Backbone
from probekit.backbones.capture import POOLINGS, check_layers
from probekit.backbones.inputs import DEFINITIONS, widths
from probekit.config import DumpConfig
from probekit.errors import ConfigError
from probekit.preferences import PreferenceSet
from probekit.store import Block, StoreWriter, rows_per_shard

Coordinates = tuple[str, int]
"""Noise level and number of the draw."""


@dataclass(frozen=True)
class Work:
    """A block and the noise levels and draws that it lacks, so that its images are encoded once for all of them."""

    block: Block
    missing: list[Coordinates] = field(default_factory=list)


@dataclass(frozen=True)
class DumpPlan:
    """Everything about a dump that is known before a model is loaded.

    Attributes
    ----------
    points, wanted
        Where features are taken, and the (pooling, layer) that exist there.
    coordinates
        Noise levels and draws that were asked for.
    told
        What the model is told in place of each prompt.
    config, describe
        As `probekit.store.open_store` takes them.
    rows_per_shard
        Largest block.
    """

    points: list[LayerPoint]
    wanted: list[tuple[str, int]]
    coordinates: list[Coordinates]
    told: dict[str, str]
    config: dict[str, Any]
    describe: dict[str, Any]
    rows_per_shard: int

    @classmethod
    def of(cls, backbone: Backbone, prefs: PreferenceSet, settings: DumpConfig) -> "DumpPlan":
        """Work out what the settings mean for a backbone and a preference set.

        Raises
        ------
        ConfigError
            If a layer or pooling does not exist, draws would be equal, or prompts cannot be shuffled.
        """
        if settings.noise == "none" and settings.draws > 1:
            msg = f"draws is {settings.draws} with noise 'none'; allowed: 1, since all draws would be equal"
            raise ConfigError(msg)
        # without noise all draws would be equal
        coordinates = [
            (sigma, draw) for sigma, draw in product(settings.sigma, range(settings.draws)) if sigma != "0" or draw == 0
        ]
        points = _points(backbone, settings.layers, output_tokens=settings.output_tokens)
        wanted = backbone.wanted(settings.pooling, [point.index for point in points])
        told = conditions(prefs.items["prompt"].unique().tolist(), settings.prompts)
        config = backbone.fingerprint_config() | {
            "layers": [asdict(point) for point in points],
            "poolings": {name: POOLINGS[name].definition for name in settings.pooling} | DEFINITIONS,
            "inputs": list(DEFINITIONS),
            "noise": {"scheme": settings.noise, "seed": None if settings.noise == "none" else settings.seed},
            "prompts": f"{settings.prompts} of {_digest(sorted(told))}"
            if settings.prompts.startswith("shuffled")
            else settings.prompts,
        }
        partial = {name: [at for of, at in wanted if of == name] for name in settings.pooling}
        partial |= {name: [points[0].index] for name in DEFINITIONS}
        partial = {name: at for name, at in partial.items() if len(at) < len(points)}
        if partial:
            config["pooling_layers"] = partial
        describe = backbone.describe() | {"training_images": settings.training_images, "prompts": settings.prompts}
        shard_bytes = settings.shard_size * 2**20
        values = backbone.width * sum(POOLINGS[name].factor for name, _ in wanted)
        values += sum(widths(backbone.latent_shape[0]).values())
        # The latents of a block are held at once as well; of few layers they are the larger part.
        size = min(rows_per_shard(values_per_row=values, shard_bytes=shard_bytes), shard_bytes // backbone.latent_bytes)
        return cls(points, wanted, coordinates, told, config, describe, max(1, size))

    def blocks(self, writer: StoreWriter, rows: pd.DataFrame) -> dict[Coordinates, list[Block]]:
        """List the blocks of all noise levels and draws, done or to be done."""
        keys = rows[["row_id", "prompt"]]
        return writer.blocks(keys, places=self.coordinates, rows_per_shard=self.rows_per_shard)


def work(blocks: Mapping[Coordinates, Sequence[Block]], worker: tuple[int, int]) -> list[Work]:
    """Collect what one worker has to do: every block of its own that lacks a noise level or draw, once."""
    rank, world = worker
    todo: dict[str, Work] = {}
    for place, found in blocks.items():
        for block in found:
            if block.number % world == rank and block.state != "done":
                todo.setdefault(block.name, Work(block)).missing.append(place)
    return list(todo.values())


def conditions(prompts: list[str], condition: str) -> dict[str, str]:
    """Return what the model is told in place of each prompt.

    Raises
    ------
    ConfigError
        If a single prompt is to be shuffled.
    """
    kind, _, seed = condition.partition(":")
    if kind == "real":
        return dict(zip(prompts, prompts, strict=True))
    if kind == "empty":
        return dict.fromkeys(prompts, "")
    if len(prompts) < 2:
        msg = f"prompts is {condition!r} with {len(prompts)} distinct prompt; allowed from two prompts on"
        raise ConfigError(msg)
    # one cycle through all prompts, in an order that only the seed and the prompts decide
    order = sorted(prompts, key=lambda prompt: hashlib.sha256(json.dumps([int(seed), prompt]).encode()).digest())
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def _points(backbone: Backbone, layers: Literal["all"] | Sequence[int], *, output_tokens: bool) -> list[LayerPoint]:
    if layers == "all":
        layers = [point.index for point in backbone.layers]
    check_layers(layers, backbone.output_point.index)
    further = {backbone.output_point.index} if output_tokens else set()
    points = [*backbone.layers, backbone.output_point]
    return [points[layer] for layer in sorted({*layers, *further})]


def _digest(prompts: Sequence[str]) -> str:
    return f"{len(prompts)} prompts, SHA-256 {hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}"
