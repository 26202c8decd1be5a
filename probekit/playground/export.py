"""Write what was trained as ordinary diffusers folders, with pictures to look at.

``WEIGHTS/base`` is a `StableDiffusion3Pipeline` without its transformer, ``WEIGHTS/transformers/NAME`` one transformer
each, all in fp16 safetensors; ``WEIGHTS/training.json`` records how each of them was trained.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from probekit.playground.architectures import (
    AutoencoderKL,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    new_text_encoder,
    new_transformer,
    new_vae,
)
from probekit.playground.checkpoint import read_tensors
from probekit.playground.scenes import Picture, SceneKind, caption, draw, sample_scene
from probekit.playground.train_vae import to_pixels

logger = logging.getLogger(__name__)

SAMPLE_SEED = 7_000_001


def export_base(out: Path, weights: Path) -> None:
    """Write the base pipeline folder from the trained VAE and text encoders in the working folder."""
    base = weights / "base"
    tensors, vae_record = read_tensors(out / "vae.safetensors")
    vae = new_vae()
    vae.load_state_dict(tensors)
    vae.register_to_config(
        shift_factor=vae_record["shift_factor"], scaling_factor=vae_record["scaling_factor"], force_upcast=False
    )
    vae.half().save_pretrained(base / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    tensors, text_record = read_tensors(out / "text.safetensors")
    for name in ("text_encoder", "text_encoder_2"):
        encoder = new_text_encoder(tokenizer, seed=0)
        encoder.load_state_dict({k.removeprefix(f"{name}/"): t for k, t in tensors.items() if k.startswith(f"{name}/")})
        encoder.half().save_pretrained(base / name)
        shutil.copytree(out / "tokenizer", base / name.replace("text_encoder", "tokenizer"), dirs_exist_ok=True)
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(base / "scheduler")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (base / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _record(weights, "vae", vae_record)
    _record(weights, "text", text_record)
    logger.info(f"exported {base}")


def export_transformers(out: Path, weights: Path) -> None:
    """Write a folder for every finished transformer, and every kept checkpoint, in the working folder."""
    for path in sorted(out.glob("dit-*.safetensors")):
        if path.name.endswith(".state.safetensors"):
            continue
        name = path.stem.removeprefix("dit-")
        tensors, record = read_tensors(path)
        model = new_transformer(blocks=record["blocks"], width=record["width"], seed=0)
        model.load_state_dict(tensors)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        model.half().save_pretrained(weights / "transformers" / name)
        _record(weights, name, record | {"name": name, "parameters": parameters})
        logger.info(f"exported {name}")


def load_pipeline(weights: Path, name: str) -> Any:
    """Load a shipped model the way any user would."""
    transformer = SD3Transformer2DModel.from_pretrained(weights / "transformers" / name, low_cpu_mem_usage=False)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        weights / "base", transformer=transformer, text_encoder_3=None, tokenizer_3=None, low_cpu_mem_usage=False
    ).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_grid(weights: Path, names: list[str], path: Path, *, guidance: float = 4.0, steps: int = 28) -> list[str]:
    """Generate the same ten captions with each model, a row each below the drawn scenes; return the captions."""
    rng = np.random.default_rng(SAMPLE_SEED)
    kinds: tuple[SceneKind, ...] = (
        "single",
        "single",
        "count",
        "count",
        "count",
        "pair",
        "pair",
        "pair",
        "pair",
        "pair",
    )
    scenes = [sample_scene(rng, kind) for kind in kinds]
    captions = [caption(scene) for scene in scenes]
    rows = [np.concatenate([draw(scene) for scene in scenes], axis=1)]
    for name in names:
        pipeline = load_pipeline(weights, name)
        images = pipeline(
            prompt=captions,
            height=32,
            width=32,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=0,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        rows.append(np.concatenate(list((255 * images).round().astype(np.uint8)), axis=1))
    _save_enlarged(np.concatenate(rows, axis=0), path)
    return captions


@torch.no_grad()
def reconstruction_grid(weights: Path, path: Path) -> None:
    """Draw fresh scenes above their VAE reconstructions."""
    rng = np.random.default_rng(SAMPLE_SEED + 1)
    pictures = np.stack([draw(sample_scene(rng)) for _ in range(30)])
    vae = AutoencoderKL.from_pretrained(weights / "base" / "vae", low_cpu_mem_usage=False).float()
    decoded = vae.decode(vae.encode(to_pixels(torch.from_numpy(pictures))).latent_dist.mode()).sample.clamp(-1, 1)
    decoded_pictures = ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    rows = []
    for start in range(0, 30, 10):
        rows += [np.concatenate(part[start : start + 10], axis=1) for part in (pictures, decoded_pictures)]
    _save_enlarged(np.concatenate(rows, axis=0), path)


def load_base(weights: Path, device: str) -> tuple[Any, Any, list[Any]]:
    """Load the frozen parts in fp32 as they are shipped, so that transformers are trained on exactly these."""
    base = weights / "base"
    vae = AutoencoderKL.from_pretrained(base / "vae", low_cpu_mem_usage=False).float().to(device)
    encoders = [
        CLIPTextModelWithProjection.from_pretrained(base / name).float().to(device)
        for name in ("text_encoder", "text_encoder_2")
    ]
    return vae, CLIPTokenizer.from_pretrained(base / "tokenizer"), encoders


def _save_enlarged(pixels: Picture, path: Path) -> None:
    image = Image.fromarray(pixels)
    image.resize((3 * image.width, 3 * image.height), Image.Resampling.NEAREST).save(path, optimize=True)


def _record(weights: Path, name: str, record: dict[str, Any]) -> None:
    path = weights / "training.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    records[name] = record
    path.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n", encoding="utf-8")
