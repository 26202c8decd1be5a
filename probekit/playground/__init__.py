"""The playground: tiny text-to-image transformers that were really trained, and pictures to judge them on.

Real curves from tiny trained models, not a reproduction of any published one. Importing this package loads neither
torch nor diffusers.
"""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from probekit.errors import BackboneError

__all__ = ["PlaygroundModel", "base_folder", "models"]


@dataclass(frozen=True, kw_only=True)
class PlaygroundModel:
    """A shipped transformer.

    Parameters
    ----------
    name
        Its folder's name: blocks x width, then the training seed or the checkpoint's percentage of the run.
    folder
        An ordinary diffusers folder of an `SD3Transformer2DModel`.
    blocks, width, parameters
        The shape.
    training_seed
        The seed of its initial weights and of its batches.
    images_seen
        Training pictures seen, repetitions counted.
    fraction
        Share of its training run; 1 unless it is a checkpoint kept on the way.
    """

    name: str
    folder: Path
    blocks: int
    width: int
    parameters: int
    training_seed: int
    images_seen: int
    fraction: float


def base_folder() -> Path:
    """Return the pipeline folder that all transformers share: VAE, text encoders, tokenizers and scheduler."""
    return _weights() / "base"


def models() -> list[PlaygroundModel]:
    """List the shipped transformers, smallest first and checkpoints in the order of training."""
    records = json.loads((_weights() / "training.json").read_text(encoding="utf-8"))
    shipped = [
        PlaygroundModel(
            name=name,
            folder=_weights() / "transformers" / name,
            blocks=record["blocks"],
            width=record["width"],
            parameters=record["parameters"],
            training_seed=record["seed"],
            images_seen=record["images_seen"],
            fraction=record["fraction"],
        )
        for name, record in records.items()
        if "blocks" in record
    ]
    return sorted(shipped, key=lambda model: (model.parameters, model.fraction, model.training_seed))


def _weights() -> Path:
    folder = Path(str(resources.files(__name__))) / "weights"
    if not (folder / "training.json").is_file():
        message = f"the playground's weights are missing: no training.json in {folder}"
        raise BackboneError(message)
    return folder
