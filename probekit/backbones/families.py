"""What probekit must know about a transformer class: one row of `FAMILIES` each.

Everything else (ids, masks, guidance embeddings, prompt templates) is left to the family's own pipeline, see
`conditioning`. A new family is a new row, found by the class name in the transformer's ``config.json``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from probekit._types import LayerPoint
from probekit.errors import BackboneError

Component = Any  # a pipeline or a part of one: the classes of diffusers and transformers are not typed
Place = Literal["first", "last", "only"]


@dataclass(frozen=True)
class BlockList:
    """A list of blocks that share one convention.

    Attributes
    ----------
    path
        Attribute of the transformer that holds the blocks.
    returns
        Where a block's return value holds the image tokens: ``first`` or ``last`` of a tuple, or ``only``.
    """

    path: str
    returns: Place


@dataclass(frozen=True)
class Width:
    """One width on which transformer and base pipeline must agree.

    Attributes
    ----------
    name
        What is compared, in words.
    transformer, base
        The two values.
    at_least
        The transformer's value may be larger, because the pipeline pads with zeros.
    """

    name: str
    transformer: int
    base: int
    at_least: bool = False

    @property
    def agrees(self) -> bool:
        """Whether the two parts fit together."""
        return self.transformer >= self.base if self.at_least else self.transformer == self.base


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table.

    Attributes
    ----------
    transformer, pipeline
        Class names in diffusers.
    blocks
        The block lists in the order in which they run; layer k is the k-th block of all of them.
    image_argument
        Argument of the first block that holds the image tokens: layer 0.
    latents
        Layout of the transformer's input: ``spatial`` is (b, c, h, w), cut into patches by the transformer.
    timestep
        Rule from sigma to the pipeline's timestep; N = the scheduler's number of training timesteps.
    text_settings
        Values of the transformer's config on which the pipeline's prompt embeddings depend.
    optional
        Components of the pipeline that may be None.
    widths
        Lists the widths on which a pipeline and its transformer must agree.
    """

    transformer: str
    pipeline: str
    blocks: tuple[BlockList, ...]
    image_argument: str
    latents: Literal["spatial"]
    timestep: Literal["sigma * N"]
    text_settings: tuple[str, ...]
    optional: frozenset[str]
    widths: Callable[[Component], list[Width]]

    def points(self, transformer: torch.nn.Module) -> list[LayerPoint]:
        """List the places of `transformer` at which features can be taken, layer 0 first."""
        names = [name for name, _, _ in self.modules(transformer)]
        return [LayerPoint(0, f"input of {names[0]}"), *(LayerPoint(k, name) for k, name in enumerate(names, start=1))]

    def modules(self, transformer: torch.nn.Module) -> list[tuple[str, torch.nn.Module, Place]]:
        """List name, module and return convention of every block, in the order in which they run."""
        return [
            (f"{blocks.path}.{index}", block, blocks.returns)
            for blocks in self.blocks
            for index, block in enumerate(getattr(transformer, blocks.path))
        ]


def _sd3_widths(pipe: Component) -> list[Width]:
    config = pipe.transformer.config
    encoders = [encoder for encoder in (pipe.text_encoder, pipe.text_encoder_2) if encoder is not None]
    pooled = sum(encoder.config.projection_dim for encoder in encoders)
    clip = sum(encoder.config.hidden_size for encoder in encoders)
    widths = [
        Width("latent channels", config.in_channels, pipe.vae.config.latent_channels),
        Width("pooled text width", config.pooled_projection_dim, pooled),
        Width("text token width", config.joint_attention_dim, clip, at_least=True),
    ]
    if pipe.text_encoder_3 is not None:
        widths.append(Width("T5 token width", config.joint_attention_dim, pipe.text_encoder_3.config.d_model))
    return widths


FAMILIES = {
    row.transformer: row
    for row in (
        Family(
            transformer="SD3Transformer2DModel",
            pipeline="StableDiffusion3Pipeline",
            blocks=(BlockList("transformer_blocks", returns="last"),),  # (text, image); the last block (None, image)
            image_argument="hidden_states",
            latents="spatial",
            timestep="sigma * N",
            text_settings=("joint_attention_dim",),  # to which CLIP's tokens are padded
            optional=frozenset({"text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"}),
            widths=_sd3_widths,
        ),
    )
}


def family_of(class_name: str) -> Family:
    """Return the row of a transformer class, or say which classes are known."""
    if class_name not in FAMILIES:
        msg = f"transformer class {class_name!r} is not known; known: {', '.join(sorted(FAMILIES))}"
        raise BackboneError(msg)
    return FAMILIES[class_name]
