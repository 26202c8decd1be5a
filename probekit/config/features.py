"""Settings of what makes a feature store: dumps and imported features."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
)

from probekit.config.heads import LayerNumbers
from probekit.config.strict import Sigma, Strict

SHARD_MIB = 512  # default of the largest shard


def _allowed_prompts(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"real|empty|shuffled:\d+", value):
        return value
    message = f"allowed: real, empty or shuffled:SEED with a whole number SEED, not {value!r}"
    raise ValueError(message)


def _allowed_layers(value: object) -> object:
    if value == "all":
        return value
    try:
        numbers = [int(str(layer)) for layer in value] if isinstance(value, list) else []
    except ValueError:
        numbers = []
    if numbers and min(numbers) >= 0:
        return numbers
    message = f"allowed: 'all' or layer numbers such as 0,12,24, not {value!r}"
    raise ValueError(message)


def _allowed_worker(value: object) -> object:
    if isinstance(value, str):
        rank, _, world = value.partition("/")
        value = (int(rank), int(world)) if rank.isdecimal() and world.isdecimal() else value
    match value:
        case [int() as number, int() as of] if 0 <= number < of:
            return number, of
    message = f"allowed: RANK/WORLD with RANK from 0 to WORLD - 1, such as 0/4, not {value!r}"
    raise ValueError(message)


BadShare = Annotated[float, Field(ge=0, lt=1)]  # with all rows bad there is nothing to probe
ShardSize = Annotated[int, Field(ge=1, description="largest shard in MiB: what a kill can cost")]


class PreferenceOptions(Strict):
    """How a preference file is read; no part of a feature store's fingerprint, as judgements lie outside it."""

    format: str = Field("auto", description="format of PREFS (default: recognised by its fields)")
    columns: str | dict[str, str] | None = Field(
        None, description="columns of PREFS by our names: prompt=caption,image_a=image0,..., or mj-bench, rapidata"
    )
    min_confidence: float | None = Field(
        None, ge=0, le=1, description="leave out pairs of a lower confidence; those without one stay"
    )

    split_file: Path | None = Field(
        None, description="file of `probekit split` that says which pair is in which split (default: by hash)"
    )

    def loading(self) -> dict[str, Any]:
        """Options of `probekit.load_preferences`."""
        return {name: getattr(self, name) for name in PreferenceOptions.model_fields}


class DumpConfig(PreferenceOptions):
    """Settings of ``probekit dump``: which backbone is run on which images, and what is kept of it."""

    backbone: str = Field(description="diffusers pipeline: a folder or a Hugging Face id")
    prefs: Path = Field(description="preference file as published or in the general form, or a data set of datasets")
    out: Path = Field(description="the feature store: a folder, made or continued")
    transformer: Path | None = Field(None, description="folder of a transformer that replaces the pipeline's own")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    name: str | None = Field(None, description="what to call the backbone in tables and figures")
    sigma: list[Sigma] = Field(
        ["0.005"], min_length=1, description="noise level from 0 (clean latents) to 1; repeatable"
    )
    noise: Literal["shared", "independent", "none"] = Field(
        "shared", description="the images of a prompt share their noise, each image has its own, or none is added"
    )
    pooling: list[str] = Field(["mean"], min_length=1, description="how image tokens become one vector; repeatable")
    layers: Annotated[Literal["all"] | LayerNumbers, BeforeValidator(_allowed_layers)] = Field(
        "all", description="'all' or layer numbers such as 0,12,24"
    )
    output_tokens: bool = Field(
        default=False,
        description="also the tokens that enter the output projection, as one more layer than there are blocks",
    )
    prompts: Annotated[str, BeforeValidator(_allowed_prompts)] = Field(
        "real",
        description="control: 'empty' prompts, or 'shuffled:SEED' (each image gets another row's prompt)",
    )
    draws: int = Field(1, ge=1, description="noise draws of every image")
    resolution: int | None = Field(
        None, ge=16, description="side of the square images in pixels (default: the model's)"
    )
    resize: Literal["crop", "pad", "bucket"] = Field(
        "crop", description="how images get that size: largest centre square, whole image on grey, or nearest aspect"
    )
    decode_workers: int | None = Field(
        None, ge=0, description="processes that decode images ahead of the model (default: 0 on the CPU, else up to 8)"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="compute type (default: float32 on the CPU, bfloat16 on CUDA)"
    )
    device: str | None = Field(None, description="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    batch_size: int = Field(8, ge=1, description="images per forward pass")
    seed: int = Field(0, ge=0, description="seed of the noise")
    limit: int | None = Field(None, ge=1, description="use at most this many pairs, in whole groups, nested")
    max_tokens: int | None = Field(None, ge=0, description="longest prompt in tokens (default: the pipeline's)")
    random_weights: str | None = Field(
        None, description="control: 'init:SEED' (untrained) or 'shuffled:SEED' (trained entries permuted)"
    )
    lora: Path | None = Field(None, description="LoRA adapter of the transformer: a safetensors file or its folder")
    offload: Literal["none", "group"] = Field(
        "none", description="'group': weights stay in main memory and visit the device a group at a time"
    )
    compile: bool = Field(default=False, description="compile the forward of each block with torch.compile")
    cache: Path | None = Field(None, description="folder of VAE latents and prompt embeddings shared between dumps")
    training_images: int | None = Field(
        None, ge=0, description="images the transformer was trained on, for the plot against training length"
    )
    shard_size: ShardSize = SHARD_MIB
    max_bad: BadShare = Field(
        0.0,
        description="largest share of rows that may have no features, since their image is missing or unreadable or "
        "the features are not finite; their pairs are left out and counted",
    )
    worker: Annotated[tuple[int, int] | None, BeforeValidator(_allowed_worker)] = Field(
        None,
        description="RANK/WORLD: do every WORLD-th shard from the RANK-th on (default: what torchrun or Slurm say)",
    )


class ImportConfig(PreferenceOptions):
    """Settings of ``probekit import-features``: which file of features becomes a store, and what is said of it."""

    file: Path = Field(description="features of the images: .npz, .safetensors or .parquet")
    prefs: Path = Field(description="preference file as published or in the general form, or a data set of datasets")
    out: Path = Field(description="the feature store: a folder, made or continued")
    definition: str = Field(min_length=1, description="what the features are, in words; part of the store's identity")
    name: str | None = Field(None, min_length=1, description="what tables and figures call them (default: FILE's stem)")
    blocks: int | None = Field(
        None, ge=1, description="blocks of the network, where layers are numbers (default: the largest)"
    )
    parameters: int | None = Field(None, ge=1, description="parameters of the network, for the plot against size")
    max_bad: BadShare = Field(0.0, description="largest share of rows without features that is accepted")
    shard_size: ShardSize = SHARD_MIB
