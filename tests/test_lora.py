"""LoRA adapters as diffusers and peft save them: what they do to features, fingerprints, and how they are refused."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_families.flux_kind import PIPELINES as FLUX
from tiny_families.pixart_kind import PIPELINES as PIXART
from tiny_families.sd3_kind import PIPELINES as SD3
from tiny_prefs import write_rankings

import probekit
from probekit.backbones import Backbone, noise
from probekit.errors import BackboneError, FingerprintError

ALPHA, RANK = 6, 2  # the scale is their quotient
LAYERS = ["transformer_blocks.0.norm1.linear", "transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_out.0"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: {**SD3, **FLUX}[name].build(root / name) for name in ("sd3", "flux")}


def write_adapter(base: Path, out: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Save a random adapter as a training script would, with its alpha, and return its matrices."""
    pipe = DiffusionPipeline.from_pretrained(
        base, **({"text_encoder_3": None, "tokenizer_3": None} if base.name == "sd3" else {})
    )
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe.transformer.add_adapter(config, "default")
    matrices = get_peft_model_state_dict(pipe.transformer)
    metadata = pipe.transformer.peft_config["default"].to_dict()
    pipe.save_lora_weights(out, transformer_lora_layers=matrices, transformer_lora_adapter_metadata=metadata)
    return matrices


@pytest.fixture(scope="module")
def adapter(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    write_adapter(folders["sd3"], out)
    return out


def features(base: Path, **options: Any) -> dict[tuple[str, int], np.ndarray]:
    backbone = Backbone.from_pretrained(base, max_tokens=32, **options)
    shape = backbone._latent_shape(16, 16)
    latents = list(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    wanted = backbone.wanted(["mean"], [point.index for point in backbone.layers])
    eps = [noise(0, "tree", 0, shape)] * 2
    return backbone.features(latents, ["tree", "red"], sigma="0.05", eps=eps, wanted=wanted, batch_size=2)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_an_adapter_adds_scale_b_a_to_the_weights(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    base = folders[name]
    matrices = write_adapter(base, tmp_path / "adapter")
    by_hand = Path(shutil.copytree(base / "transformer", tmp_path / "by hand"))
    weights = load_file(by_hand / WEIGHTS)
    for layer in LAYERS:
        weights[f"{layer}.weight"] += (
            ALPHA / RANK * matrices[f"{layer}.lora_B.weight"] @ matrices[f"{layer}.lora_A.weight"]
        )
    save_file(weights, by_hand / WEIGHTS)
    file = next((tmp_path / "adapter").iterdir())
    plain, expected = features(base, resolution=16), features(base, resolution=16, transformer=by_hand)
    for lora in (file, file.parent):
        for place, values in features(base, resolution=16, lora=lora).items():
            assert np.abs(values - expected[place]).max() <= 2e-6 * max(1, np.abs(values).max())
            assert place[1] == 0 or np.abs(values - plain[place]).max() > 1e-2


def test_another_adapter_is_another_store(folders: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    base, other = folders["sd3"], tmp_path / "other"
    write_adapter(base, other, seed=1)
    prefs = probekit.load_preferences(write_rankings(tmp_path / "prefs", {"tree": 2}))
    probekit.dump_features(Backbone.from_pretrained(base, lora=adapter), prefs, tmp_path / "store")
    probekit.dump_features(Backbone.from_pretrained(base, lora=adapter), prefs, tmp_path / "store")
    for lora in (other, None):
        with pytest.raises(FingerprintError, match="lora"):
            probekit.dump_features(Backbone.from_pretrained(base, lora=lora), prefs, tmp_path / "store")
    assert Backbone.from_pretrained(base, lora=adapter).with_transformer().fingerprint_config()["lora"] is None


def test_adapters_that_cannot_be_used_are_one_clear_line(
    folders: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, file = folders["sd3"], next(adapter.iterdir())

    def fails(pattern: str, lora: Path, model: Path = base, **options: Any) -> None:
        with pytest.raises(BackboneError, match=pattern) as caught:
            Backbone.from_pretrained(model, lora=lora, **options)
        assert "\n" not in str(caught.value)

    def changed(name: str, rename: Any) -> Path:
        save_file({rename(key): value for key, value in load_file(file).items()}, tmp_path / name)
        return tmp_path / name

    fails(r"nowhere: no LoRA adapters here; allowed: one \*\.safetensors file", tmp_path / "nowhere")
    two = Path(shutil.copytree(adapter, tmp_path / "two"))
    shutil.copy(file, two / "second.safetensors")
    fails("two: 2 LoRA adapters here", two)
    text = changed("text.safetensors", lambda key: key.replace("transformer.", "text_encoder.", 1))
    fails("text.safetensors: the adapter changes text_encoder; allowed: transformer only", text)
    fails("is not a LoRA adapter in a format that diffusers reads for Stable", base / "transformer" / WEIGHTS)
    (tmp_path / "noise.safetensors").write_bytes(b"this is no safetensors file")
    fails("noise.safetensors: cannot load the LoRA adapter", tmp_path / "noise.safetensors")
    elsewhere = changed("elsewhere.safetensors", lambda key: key.replace("blocks.1", "blocks.9"))
    fails(r"the transformer lacks 2 layers that it changes, such as transformer_blocks\.9\.attn", elsewhere)
    pixart = PIXART["pixart_sigma"].build(tmp_path / "pixart")
    fails("PixArtSigmaPipeline takes no LoRA adapters", file, pixart, resolution=16)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    fails(r"need peft, which is not installed; pip install 'dit-probekit\[lora\]'", file)


def test_an_adapter_of_another_width_is_refused_and_leaves_nothing_behind(
    folders: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    tensors = {
        key: value[:, :-1] if "lora_A" in key else value for key, value in load_file(next(adapter.iterdir())).items()
    }
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "thin.safetensors")
    backbone = Backbone.from_pretrained(folders["sd3"], lora=tmp_path / "thin.safetensors")
    for _ in range(2):  # the transformer without its adapter is not used either
        with pytest.raises(BackboneError, match=r"thin\.safetensors: cannot load the LoRA adapter \(.*size mismatch"):
            backbone._passes.load("tree", torch.Size((4, 8, 8)))
