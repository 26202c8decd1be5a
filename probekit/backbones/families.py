"""What a row of the table of families says.

Everything that a row does not say (ids, masks, guidance embeddings, prompt templates) is left to the family's own
pipeline, see `conditioning`. The table is in `catalogue`.

Shapes: k images of one prompt, (c, h, w) a latent, t image tokens of an image, s all tokens of a tensor, d channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from probekit._types import LayerPoint
from probekit.errors import BackboneError

Component = Any  # a pipeline or a part of one: the classes of diffusers and transformers are not typed
Call = dict[str, Any]
"""Arguments of the transformer's forward, by name."""
Place = Literal["first", "last", "only"]
Offsets = Callable[[Call], torch.Tensor]
"""Where the image tokens of each sample begin, int (b,), from the arguments of the transformer."""
Tokens = Literal["all", "first", "last"] | Offsets


UNUSED = frozenset({"image_encoder", "feature_extractor", "safety_checker"})
"""Components of text-to-image pipelines that only further inputs or outputs need."""


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """A list of blocks that share one convention.

    Attributes
    ----------
    path
        Attribute of the transformer that holds the blocks.
    returns
        Which entry of a block's return value holds the image tokens: ``first`` or ``last`` of a tuple, or ``only``
        where it returns one tensor.
    tokens
        Where the image tokens sit along that tensor's tokens: ``all``, the ``first`` or ``last`` t, or a function of
        the transformer's arguments that gives the place of the first one in each sample.
    argument
        Argument of a block that holds the image tokens, laid out as in what it returns.
    text
        The text tokens: ``first`` or ``last`` entry of the tuple, the ``rest`` of a tensor that holds both (where
        images begin at different places: what comes before), or None where a block passes no text on.
    text_argument
        Argument of a block that holds the text tokens, where they are a stream of their own.
    last_text
        Whether the last block of the list passes text on as the others do.
    sequence_first
        The tensors are (s, b, d) and not (b, s, d).
    """

    path: str
    returns: Place = "only"
    tokens: Tokens = "all"
    argument: str = "hidden_states"
    text: Literal["first", "last", "rest"] | None = None
    text_argument: str = "encoder_hidden_states"
    last_text: bool = True
    sequence_first: bool = False


@dataclass(frozen=True)
class Output:
    """The output projection: path of the module, and where the image tokens sit in what enters it.

    That is laid out, batch or sequence first, as in the last list of blocks.
    """

    path: str
    tokens: Tokens = "all"


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
        Class names, of diffusers unless `library` says otherwise.
    blocks
        The block lists in the order in which they run; layer k is the k-th block of all of them.
    output
        The output projection.
    latents
        Name of the rule in `latents.LATENT_RULES` by which the VAE's posterior mode becomes a latent.
    noise
        ``flow``: the input is (1 - sigma) x0 + sigma eps at timestep sigma * N; ``vp``: the same divided by its norm
        sqrt((1 - sigma)^2 + sigma^2), at the integer timestep whose noise deviation sqrt(1 - alpha) is nearest (N =
        the scheduler's number of training timesteps).
    patch
        Latent pixels on a side of one token: a number, or the name of a value of the transformer's config.
    multiple
        What the sides of an image in tokens must be multiples of.
    pack
        Turns latents (k, c, h, w) into what the pipeline takes as ``latents``; None = as they are.
    call
        Further arguments of the pipeline: guidance off, prompt rewriting off, and the like.
    vae_factor
        Pixels on a side of one cell of the VAE: an attribute of the pipeline, or a function of it.
    sizes
        Makes the pipeline take a height and width in pixels, where it would choose its own.
    optional
        Components of the pipeline that may be missing.
    unused
        Components that the transformer's inputs do not need; they are never loaded.
    text_settings
        Values of the transformer's config on which the pipeline's prompt embeddings depend.
    text_batch
        How many prompts the pipeline's ``encode_prompt`` takes at once without one changing the embeddings of another.
    widths
        Lists the widths on which a pipeline and its transformer must agree; what it does not list shows itself as an
        error of the self-test.
    library
        Module from which the two classes are imported.
    tested
        Whether probekit's own tests run the family on a tiny pipeline.
    """

    transformer: str
    pipeline: str
    blocks: tuple[BlockList, ...]
    output: Output
    latents: str = "shift-scale"
    noise: Literal["flow", "vp"] = "flow"
    patch: int | str = "patch_size"
    multiple: int = 1
    pack: Callable[[Component, torch.Tensor], torch.Tensor] | None = None
    call: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    vae_factor: str | Callable[[Component], int] = "vae_scale_factor"
    sizes: Callable[[Component, int, int], None] | None = None
    optional: frozenset[str] = frozenset()
    unused: frozenset[str] = UNUSED
    text_settings: tuple[str, ...] = ()
    text_batch: int = 1
    widths: Callable[[Component], list[Width]] = field(default=lambda pipe: [])
    library: str = "diffusers"
    tested: bool = False

    def cell(self, pipe: Component) -> int:
        """Return the pixels on a side of one cell of the pipeline's VAE."""
        return int(getattr(pipe, self.vae_factor) if isinstance(self.vae_factor, str) else self.vae_factor(pipe))

    def modules(self, transformer: torch.nn.Module) -> list[tuple[str, torch.nn.Module, BlockList]]:
        """List name, module and convention of every block, in the order in which they run."""
        found: list[tuple[str, torch.nn.Module, BlockList]] = []
        for blocks in self.blocks:
            modules = self._module(transformer, blocks.path)
            if not isinstance(modules, torch.nn.ModuleList | torch.nn.Sequential):
                msg = f"{self.transformer}: {blocks.path} is a {type(modules).__name__}; allowed: a list of blocks"
                raise BackboneError(msg)
            found += [(f"{blocks.path}.{index}", block, blocks) for index, block in enumerate(modules)]
        return found

    def projection(self, transformer: torch.nn.Module) -> torch.nn.Module:
        """Return the output projection."""
        return self._module(transformer, self.output.path)

    def _module(self, transformer: torch.nn.Module, path: str) -> torch.nn.Module:
        try:
            return transformer.get_submodule(path)
        except AttributeError:
            names = ", ".join(name for name, _ in transformer.named_children())
            msg = f"{self.transformer} has no module {path!r}, which its row of the table names; it has {names}"
            raise BackboneError(msg) from None

    def points(self, transformer: torch.nn.Module) -> list[LayerPoint]:
        """List the places of `transformer` at which features can be taken, layer 0 first, the output point last."""
        names = [name for name, _, _ in self.modules(transformer)]
        return [
            LayerPoint(0, f"input of {names[0]}"),
            *(LayerPoint(k, name) for k, name in enumerate(names, start=1)),
            LayerPoint(len(names) + 1, f"input of {self.output.path}"),
        ]
