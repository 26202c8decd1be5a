"""What a backbone is and what it costs, from its configs alone: no weights are loaded, and none are fetched."""

from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from probekit._types import LayerPoint, scaled
from probekit.backbones.catalogue import FAMILIES
from probekit.backbones.counting import Counts, count
from probekit.backbones.devices import DTYPES
from probekit.backbones.families import Component
from probekit.backbones.hub import locate
from probekit.backbones.loading import build_pipeline, model_names, transformer_family, transformer_folder
from probekit.backbones.sizes import image_size
from probekit.errors import ConfigError

_TIMESTEPS = {"flow": "sigma * N", "vp": "nearest integer"}


@dataclass(frozen=True)
class Part:
    """A model of the pipeline: its class, parameters, bytes in the compute dtype, and the stage that loads it."""

    name: str
    class_name: str
    parameters: int
    nbytes: int
    stage: str


@dataclass(frozen=True)
class Plan:
    """What a backbone is and costs.

    Attributes
    ----------
    model, revision, transformer, pipeline, tested
        Where it comes from, and its row of the table of families.
    resolution, dtype
        Side of the images in pixels, and the compute dtype.
    blocks
        Number of blocks of each list.
    parts
        Transformer, VAE and text encoders. The text encoders are in memory while prompts are encoded (stage ``text``),
        the others afterwards (stage ``image``).
    counts
        Tokens and operations.
    layers, output_point
        The places where features are taken, and the further one that can be asked for.
    """

    model: str
    revision: str | None
    transformer: str
    pipeline: str
    tested: bool
    resolution: int
    dtype: str
    blocks: dict[str, int]
    parts: list[Part]
    counts: Counts
    layers: list[LayerPoint]
    output_point: LayerPoint

    def nbytes(self, stage: str | None = None) -> int:
        """Return the bytes of the weights of a stage, or of all parts."""
        return sum(part.nbytes for part in self.parts if stage in (None, part.stage))

    @property
    def row_nbytes(self) -> int | None:
        """Bytes of a row's features: all layers, one pooling of d channels, one noise level, float16."""
        return None if self.counts.width is None else len(self.layers) * self.counts.width * 2

    def facts(self) -> dict[str, Any]:
        """Return everything as plain JSON values, sizes in bytes."""
        peak = max(self.nbytes("text"), self.nbytes("image"))
        return {
            **{key: value for key, value in asdict(self).items() if key not in ("counts", "layers", "output_point")},
            **asdict(self.counts),
            "n_blocks": sum(self.blocks.values()),
            "weights_nbytes": {
                "text_stage": self.nbytes("text"),
                "image_stage": self.nbytes("image"),
                "peak": peak,
                "all_at_once": self.nbytes(),
            },
            "features_nbytes_of_1000_rows": None if self.row_nbytes is None else 1000 * self.row_nbytes,
            "layers": [point.name for point in self.layers],
            "output_point": self.output_point.name,
        }

    def lines(self) -> list[tuple[str, str]]:
        """Return what a person reads: (heading, text)."""
        counts, of_text, of_image = self.counts, self.nbytes("text"), self.nbytes("image")
        lists = " + ".join(f"{number} {path}" for path, number in self.blocks.items())
        rows = None if self.row_nbytes is None else 1000 * self.row_nbytes
        return [
            ("model", self.model if self.revision is None else f"{self.model} at {self.revision}"),
            ("family", f"{self.transformer} in {self.pipeline}" + ("" if self.tested else " (untested)")),
            ("blocks", f"{sum(self.blocks.values())} ({lists}), width {counts.width or 'unknown'}"),
            *((part.name, f"{part.class_name}, {part.parameters:,} parameters") for part in self.parts),
            ("tokens", f"{counts.image_tokens} image at {self.resolution} px, {counts.text_tokens or 'unknown'} text"),
            (
                "operations",
                f"an image: transformer {scaled(counts.flop_image, 'FLOP')}, VAE {scaled(counts.flop_vae, 'FLOP')}; "
                f"a prompt: text encoders {scaled(counts.flop_text, 'FLOP')}",
            ),
            (
                "memory",
                f"weights in {self.dtype}: text stage {scaled(of_text, 'B')} ({self._sizes('text')}), "
                f"then image stage {scaled(of_image, 'B')} ({self._sizes('image')}); "
                f"peak {scaled(max(of_text, of_image), 'B')}, all at once would be {scaled(of_text + of_image, 'B')}",
            ),
            (
                "features",
                f"{scaled(rows, 'B')} for 1000 rows of all layers, one pooling and one noise level in float16",
            ),
            ("layers", f"{_ranges(self.layers)}; with --output-tokens {_ranges([self.output_point])}"),
        ]

    def _sizes(self, stage: str) -> str:
        return ", ".join(f"{part.name} {scaled(part.nbytes, 'B')}" for part in self.parts if part.stage == stage)


def families() -> list[dict[str, Any]]:
    """Return the table of families as plain JSON values, sorted by class."""
    return [
        {
            "transformer": row.transformer,
            "pipeline": row.pipeline,
            "blocks": [blocks.path for blocks in row.blocks],
            "latents": row.latents,
            "timestep": _TIMESTEPS[row.noise],
            "tested": row.tested,
        }
        for _, row in sorted(FAMILIES.items())
    ]


def plan(
    model_id: str,
    *,
    transformer: Path | None = None,
    revision: str | None = None,
    resolution: int | None = None,
    dtype: str = "bfloat16",
) -> Plan:
    """Describe a backbone without its weights; of a hub id, only configs and tokenizers are fetched.

    Parameters
    ----------
    model_id, transformer, revision, resolution
        As in `Backbone.from_pretrained`.
    dtype
        Compute dtype.

    Returns
    -------
    Plan
        Parameters, tokens, operations and bytes.

    Raises
    ------
    BackboneError
        If the model cannot be found, is of an unknown class, or its parts do not fit together.
    ConfigError
        If it does not take the resolution, or the dtype is not known.
    """
    if dtype not in DTYPES:
        msg = f"dtype {dtype!r} is not known; allowed: {', '.join(DTYPES)}"
        raise ConfigError(msg)
    source = locate(model_id, revision=revision, without_transformer=transformer is not None, weights=False)
    folder = transformer_folder(source, transformer)
    family = transformer_family(source, folder)
    pipe = build_pipeline(family, source, folder, DTYPES[dtype])
    side = image_size(pipe, family, resolution, source.name).resolution
    models = {name: getattr(pipe, name) for name in ("transformer", *model_names(family, source))}
    parts = [_part(name, model) for name, model in models.items()]
    *layers, output_point = family.points(models["transformer"])
    return Plan(
        model=source.model_id,
        revision=source.revision,
        transformer=family.transformer,
        pipeline=family.pipeline,
        tested=family.tested,
        resolution=side,
        dtype=dtype,
        blocks={blocks.path: len(models["transformer"].get_submodule(blocks.path)) for blocks in family.blocks},
        parts=parts,
        counts=count(family, pipe, side, [models[part.name] for part in parts if part.stage == "text"]),
        layers=layers,
        output_point=output_point,
    )


def _part(name: str, model: Component) -> Part:
    tensors = [*model.parameters(), *model.buffers()]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Part(name, type(model).__name__, parameters, nbytes, "image" if name in ("transformer", "vae") else "text")


def _ranges(points: list[LayerPoint]) -> str:
    """Write the layers' numbers and names, blocks of one list together."""
    found = []
    for _, group in groupby(points, lambda point: (point.name.startswith("input"), point.name.rpartition(".")[0])):
        first, *_, last = [*group] * 2
        single = first.index == last.index
        found.append(
            f"{first.index} {first.name}" if single else f"{first.index}-{last.index} {first.name} to {last.name}"
        )
    return "; ".join(found)
