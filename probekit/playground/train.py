"""Train the playground family: ``python -m probekit.playground.train STAGE --out DIR``.

Stages, in order: ``scenes`` draws the training pictures, ``vae`` and ``text`` train the frozen parts, ``export`` writes
them as diffusers folders, ``encode`` computes latents and prompt embeddings with the exported parts, ``dit`` trains one
transformer, and ``export`` again writes all transformers there are. The same command again continues an interrupted
stage.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.logging import RichHandler

from probekit.errors import ProbekitError
from probekit.playground.checkpoint import read_tensors, write_tensors
from probekit.playground.scenes import caption, draw, sample_scene

logger = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train the playground's VAE, text encoders and DiTs.",
)

Out = Annotated[Path, typer.Option(help="Working folder: pictures, training state, trained parts.")]
Seed = Annotated[int, typer.Option(help="Seed of initial weights, batches and noise.")]
Device = Annotated[str, typer.Option(help="Any torch device, for instance cpu or cuda.")]
Weights = Annotated[Path, typer.Option(help="Folder of the exported models: base/ and transformers/.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between two savings of the training state.")]


def draw_scenes(*, out: Path, count: int, seed: int) -> None:
    """Draw the training scenes: ``scenes.safetensors`` (pictures) and ``captions.json``."""
    rng = np.random.default_rng([seed, 0])
    scenes = [sample_scene(rng) for _ in range(count)]
    pictures = np.stack([draw(scene) for scene in scenes])
    out.mkdir(parents=True, exist_ok=True)
    (out / "captions.json").write_text(json.dumps([caption(scene) for scene in scenes]), encoding="utf-8")
    write_tensors(out / "scenes.safetensors", {"pictures": torch.from_numpy(pictures)}, {"count": count, "seed": seed})


def load_scenes(out: Path) -> tuple[torch.Tensor, list[str]]:
    """Read what `draw_scenes` wrote: pictures (N, 32, 32, 3) and N captions."""
    pictures = read_tensors(out / "scenes.safetensors")[0]["pictures"]
    return pictures, json.loads((out / "captions.json").read_text(encoding="utf-8"))


@app.command()
def scenes(out: Out, count: int = 80_000, seed: Seed = 0) -> None:
    """Draw the training pictures and write their captions."""
    draw_scenes(out=out, count=count, seed=seed)
    logger.info(f"{count} scenes in {out}")


@app.command()
def vae(
    out: Out, steps: int = 6000, batch: int = 32, seed: Seed = 0, device: Device = "cpu", save_every: SaveEvery = 500
) -> None:
    """Train the VAE."""
    from probekit.playground.train_vae import train_vae

    train_vae(load_scenes(out)[0], out=out, steps=steps, batch=batch, seed=seed, device=device, save_every=save_every)


@app.command()
def text(
    out: Out, steps: int = 6000, batch: int = 64, seed: Seed = 0, device: Device = "cpu", save_every: SaveEvery = 500
) -> None:
    """Train the text encoders."""
    from probekit.playground.train_text import train_text

    pictures, captions = load_scenes(out)
    train_text(pictures, captions, out=out, steps=steps, batch=batch, seed=seed, device=device, save_every=save_every)


@app.command()
def encode(out: Out, weights: Weights, device: Device = "cpu") -> None:
    """Write latents and prompt embeddings of the training scenes, from the exported base folder."""
    from probekit.playground.export import load_base
    from probekit.playground.train_dit import encode_captions
    from probekit.playground.train_vae import encode_pictures

    pictures, captions = load_scenes(out)
    vae, tokenizer, encoders = load_base(weights, device)
    distinct = {text: row for row, text in enumerate(dict.fromkeys(captions))}
    prompt, pooled = encode_captions([*distinct, ""], tokenizer, encoders, device=device)
    tensors = {
        "latents": encode_pictures(vae, pictures, device=device).half(),
        "prompt": prompt.half(),
        "pooled": pooled.half(),
        "caption_of": torch.tensor([distinct[text] for text in captions]),
    }
    spread = {key: round(value.float().std().item(), 3) for key, value in tensors.items() if key != "caption_of"}
    write_tensors(out / "encoded.safetensors", tensors, spread)
    logger.info(f"encoded {len(captions)} scenes, {len(distinct)} captions, standard deviations {spread}")


@app.command()
def dit(
    out: Out,
    blocks: int = 3,
    width: int = 48,
    images: Annotated[int, typer.Option(help="Length of the run in images seen.")] = 320_000,
    batch: int = 64,
    name: Annotated[str, typer.Option(help="Name of the run; by default BLOCKSxWIDTH-seedSEED.")] = "",
    keep_at: Annotated[list[float] | None, typer.Option(help="Also keep the weights at these fractions.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    save_every: SaveEvery = 500,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = False,  # noqa: FBT002
) -> None:
    """Train one transformer."""
    from probekit.playground.train_dit import EncodedScenes, train_dit

    train_dit(
        EncodedScenes(**read_tensors(out / "encoded.safetensors")[0]),
        out=out,
        name=name or f"{blocks}x{width}-seed{seed}",
        blocks=blocks,
        width=width,
        seed=seed,
        images=images,
        batch=batch,
        keep_at=tuple(keep_at or ()),
        device=device,
        save_every=save_every,
        compiled=compiled,
    )


@app.command()
def export(out: Out, weights: Weights) -> None:
    """Write everything trained so far as diffusers folders."""
    from probekit.playground.export import export_base, export_transformers

    if (out / "vae.safetensors").exists() and (out / "text.safetensors").exists():
        export_base(out, weights)
    export_transformers(out, weights)


@app.command()
def pictures(weights: Weights) -> None:
    """Write what there is to look at: samples of every exported transformer, reconstructions of the VAE."""
    from probekit.playground.export import reconstruction_grid, sample_grid

    reconstruction_grid(weights, weights / "reconstructions.png")
    records = json.loads((weights / "training.json").read_text(encoding="utf-8"))
    shapes = {
        name: (record["parameters"], record["fraction"]) for name, record in records.items() if "blocks" in record
    }
    names = sorted(shapes, key=lambda name: (*shapes[name], name))
    captions = sample_grid(weights, names, weights / "samples.png")
    logger.info("\n".join(["samples.png: drawn, then " + ", ".join(names), *captions]))


@app.callback()
def configure() -> None:
    """Send progress to stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])


if __name__ == "__main__":
    try:
        app()
    except ProbekitError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
