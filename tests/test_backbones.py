"""Tests of probekit.backbones on tiny random pipelines (see tiny_models), against forwards written by hand."""

import functools
import hashlib
import json
import logging
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import RESOLUTION, tiny_pipeline, tiny_transformer

from probekit.backbones import Backbone, noise
from probekit.backbones.conditioning import collate, plan_batches
from probekit.backbones.families import FAMILIES, family_of
from probekit.backbones.images import read_pixels
from probekit.backbones.latents import encode_batch, mix
from probekit.backbones.weights import state_hash
from probekit.errors import BackboneError, ConfigError, ImageError

PROMPTS = ["a red dog", "a red dog", "a blue cat, left of 2 birds", "tree", "tree", "tree"]
SHAPE = (4, 8, 8)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def backbone(base: Path) -> Backbone:
    return Backbone.from_pretrained(base, max_tokens=0)


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    """A copy of the base folder that a test may damage."""
    return Path(shutil.copytree(base, tmp_path / "base"))


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[list[Path], list[bytes]]:
    rng = np.random.default_rng(0)
    paths = []
    for index, size in enumerate([(16, 16), (16, 16), (40, 23), (16, 16), (9, 30)]):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(paths[-1])
    return paths, [_digest(path) for path in paths]


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def _inputs(prompts: list[str], draw: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(len(prompts), *SHAPE, generator=generator)
    return {"latents": latents, "prompts": prompts, "eps": torch.stack([noise(0, p, draw, SHAPE) for p in prompts])}


def _features(backbone: Backbone, prompts: list[str], **changes: Any) -> dict[tuple[str, int], np.ndarray]:
    options = {"sigma": "0.005", "layers": list(range(backbone.n_blocks + 1)), "poolings": ["mean"], "batch_size": 4}
    return backbone.features(**(_inputs(prompts) | options | changes))


@torch.no_grad()
def _by_hand(backbone: Backbone, latents: torch.Tensor, prompts: list[str], eps: torch.Tensor, sigma: float) -> list:
    """Compute the features of every layer with the modules of SD3 called one after the other."""
    model, parts = backbone._transformer, backbone._base.components
    texts, pooled = [], []
    for prompt in prompts:
        clip = []
        for place in ("", "_2"):
            ids = parts[f"tokenizer{place}"](
                prompt, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            clip.append(parts[f"text_encoder{place}"](ids, output_hidden_states=True))
        texts.append(torch.cat([entry.hidden_states[-2] for entry in clip], dim=-1))
        pooled.append(torch.cat([entry.text_embeds for entry in clip], dim=-1))
    if parts["text_encoder_3"] is not None:
        length = backbone.fingerprint_config()["max_tokens"]
        for row, prompt in enumerate(prompts):
            options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
            third = parts["text_encoder_3"](parts["tokenizer_3"](prompt, **options).input_ids)[0]
            wide = torch.nn.functional.pad(texts[row], (0, third.shape[-1] - texts[row].shape[-1]))
            texts[row] = torch.cat([wide, third], dim=-2)
    image = model.pos_embed((1 - sigma) * latents + sigma * eps)
    text = model.context_embedder(torch.cat(texts))
    time = model.time_text_embed(torch.full((len(prompts),), 1000 * sigma), torch.cat(pooled))
    layers = [image.mean(dim=1)]
    for block in model.transformer_blocks:
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time)
        layers.append(image.mean(dim=1))
    return [layer.numpy() for layer in layers]


def test_features_equal_a_forward_written_by_hand(backbone: Backbone) -> None:
    inputs = _inputs(PROMPTS)
    done: list[int] = []
    features = _features(backbone, PROMPTS, batch_size=len(PROMPTS), on_batch=done.append)
    assert done == [len(PROMPTS)]
    expected = _by_hand(backbone, inputs["latents"], PROMPTS, inputs["eps"], 0.005)
    assert len(expected) == backbone.n_blocks + 1 == 4
    for layer, values in enumerate(expected):
        assert features["mean", layer].dtype == np.float32
        assert features["mean", layer].shape == (len(PROMPTS), backbone.width)
        assert np.abs(features["mean", layer] - values).max() <= 1e-6
    changes = [np.abs(a - b).max() for a, b in zip(expected[1:], expected[:-1], strict=True)]
    assert min(changes) > 1e-2, "blocks that change nothing would prove nothing"


@pytest.mark.parametrize("max_tokens", [None, 16])
def test_a_third_text_encoder_is_used_as_in_sd3(max_tokens: int | None, tmp_path: Path) -> None:
    full = Backbone.from_pretrained(tiny_pipeline(tmp_path / "base", t5=True), max_tokens=max_tokens)
    assert full.fingerprint_config()["max_tokens"] == (256 if max_tokens is None else max_tokens)
    inputs = _inputs(PROMPTS)
    expected = _by_hand(full, inputs["latents"], PROMPTS, inputs["eps"], 0.005)
    features = _features(full, PROMPTS, batch_size=len(PROMPTS))
    for layer, values in enumerate(expected):
        assert np.abs(features["mean", layer] - values).max() <= 2e-6 * max(1, np.abs(values).max())
    assert full.n_cut(["a red dog", "tree, house and the sea " * 20]) == 1


@pytest.mark.parametrize("sigma", ["0", "0.005", "0.07", "0.3", "1"])
def test_timestep_is_exactly_a_thousand_sigma(backbone: Backbone, sigma: str) -> None:
    conditioner = backbone._conditioner
    embeddings = conditioner.encode(["a red dog"])[0]
    latents = torch.randn(3, *SHAPE)
    _, kwargs = conditioner.prepare("a red dog", embeddings, latents, sigma)
    assert kwargs["timestep"].tolist() == [float(Decimal(sigma) * 1000)] * 3
    assert backbone.timestep(sigma) == float(Decimal(sigma) * 1000)
    assert torch.equal(kwargs["hidden_states"], latents)
    assert {len(value) for value in kwargs.values() if isinstance(value, torch.Tensor)} == {3}


def test_scheduler_settings_do_not_move_the_timestep(tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "base", shift=6.0)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"use_dynamic_shifting": True}))
    conditioner = Backbone.from_pretrained(folder)._conditioner
    _, kwargs = conditioner.prepare("tree", conditioner.encode(["tree"])[0], torch.zeros(1, *SHAPE), "0.005")
    assert kwargs["timestep"].tolist() == [5.0]


def test_collated_prompts_equal_single_ones(backbone: Backbone) -> None:
    together = _features(backbone, PROMPTS, batch_size=len(PROMPTS))
    inputs = _inputs(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        one = {"latents": inputs["latents"][row : row + 1], "eps": inputs["eps"][row : row + 1]}
        alone = _features(backbone, [prompt], **one)
        for place, values in alone.items():
            assert np.abs(values[0] - together[place][row]).max() <= 2e-6


def test_collate_refuses_values_that_differ() -> None:
    calls = [((), {"a": torch.zeros(2, 3), "b": None}), ((), {"a": torch.ones(1, 3), "b": None})]
    joined = collate(calls, [2, 1])[1]
    assert joined["a"].shape == (3, 3)
    assert joined["b"] is None
    with pytest.raises(BackboneError, match="another value"):
        collate([((), {"b": 1}), ((), {"b": 2})], [2, 1])
    with pytest.raises(BackboneError, match="different arguments"):
        collate([((), {"b": 1}), ((), {})], [2, 1])


def test_early_exit_equals_the_full_run(backbone: Backbone) -> None:
    ran = []
    handles = [
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, block in enumerate(backbone._transformer.transformer_blocks)
    ]
    full = _features(backbone, PROMPTS)
    ran.clear()
    part = _features(backbone, PROMPTS, layers=[1])
    for handle in handles:
        handle.remove()
    assert set(ran) == {0}
    assert np.array_equal(part["mean", 1], full["mean", 1])
    assert list(_features(backbone, PROMPTS, layers=[0])) == [("mean", 0)]
    assert not any(block._forward_hooks for block in backbone._transformer.transformer_blocks)


def test_slice_is_exactly_the_image_tokens(backbone: Backbone) -> None:
    """d(output) / d(return of the last block) is non-zero on every image token and reaches nothing else."""
    conditioner, model = backbone._conditioner, backbone._transformer
    _, kwargs = conditioner.prepare("tree", conditioner.encode(["tree"])[0], torch.randn(1, *SHAPE), "0.1")
    returned = []

    def keep(_module: torch.nn.Module, _args: Any, output: tuple[Any, Any]) -> tuple[Any, Any]:
        returned.append((output[0], output[1].detach().clone().requires_grad_()))
        return returned[-1]

    inputs = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    handle = model.transformer_blocks[-1].register_forward_hook(keep)
    model(**inputs)[0].square().sum().backward()
    handle.remove()
    text, image = returned[0]
    assert text is None, "the last block returns no text that a slice could take by mistake"
    assert image.shape[1] == (SHAPE[1] // 2) * (SHAPE[2] // 2)
    assert image.grad.abs().amax(dim=-1).gt(0).all()


def test_first_layer_sees_the_image_and_not_the_text(backbone: Backbone) -> None:
    inputs = _inputs(["tree"])
    layers = [0, 1, 3]
    here = _features(backbone, ["tree"], layers=layers)
    text = _features(backbone, ["dog"], layers=layers, eps=inputs["eps"])
    image = _features(backbone, ["tree"], layers=layers, latents=-inputs["latents"])
    assert np.array_equal(here["mean", 0], text["mean", 0])
    assert all(not np.array_equal(here["mean", layer], text["mean", layer]) for layer in (1, 3))
    assert all(not np.array_equal(here["mean", layer], image["mean", layer]) for layer in layers)


def test_latents_are_what_the_pipelines_decoding_undoes(backbone: Backbone, pictures: Any) -> None:
    paths, digests = pictures
    vae = backbone._base.components["vae"]
    latents = backbone.encode_images(paths, digests)
    assert latents.shape == (len(paths), *backbone.latent_shape)
    with torch.no_grad():
        for path, digest, latent in zip(paths, digests, latents, strict=True):
            mode = vae.encode(read_pixels(path, digest, RESOLUTION)[None]).latent_dist.mode()
            assert torch.allclose((latent / vae.config.scaling_factor) + vae.config.shift_factor, mode[0], atol=2e-6)
    assert vae.config.scaling_factor == 1.5


def test_round_trip_through_the_pipelines_own_decoding(base: Path, pictures: Any, monkeypatch: Any) -> None:
    backbone = Backbone.from_pretrained(base, max_tokens=0)
    paths, digests = pictures
    latents = backbone.encode_images(paths[:1], digests[:1])
    pipe, vae = backbone._conditioner.pipe, backbone._base.components["vae"]
    backbone._conditioner._embeddings = backbone._conditioner.encode(["tree"])[0]
    backbone._conditioner._scheduler.only_timestep = 0.0
    monkeypatch.setattr(pipe.scheduler, "step", lambda _, _t, sample, **_k: (sample,), raising=False)
    image = pipe(prompt="tree", num_inference_steps=1, guidance_scale=1.0, latents=latents, output_type="pt").images
    with torch.no_grad():
        mode = vae.encode(read_pixels(paths[0], digests[0], RESOLUTION)[None]).latent_dist.mode()
        expected = pipe.image_processor.postprocess(vae.decode(mode).sample, output_type="pt")
    assert torch.allclose(image, expected, atol=1e-5)


def test_encoding_does_not_depend_on_order_or_cache(base: Path, pictures: Any) -> None:
    paths, digests = pictures
    together = Backbone.from_pretrained(base).encode_images(paths, digests)
    other = Backbone.from_pretrained(base)
    alone = torch.cat([other.encode_images([path], [digest]) for path, digest in zip(paths, digests, strict=True)])
    assert torch.equal(together, alone)
    assert torch.equal(other.encode_images(paths[::-1], digests[::-1]), together.flip(0))
    assert [encode_batch(side) for side in (16, 64, 128, 256, 1024)] == [16, 16, 4, 1, 1]


def test_noise_is_a_function_of_its_key() -> None:
    assert torch.equal(noise(0, "tree", 0, SHAPE), noise(0, "tree", 0, SHAPE))
    others = [noise(1, "tree", 0, SHAPE), noise(0, "trees", 0, SHAPE), noise(0, "tree", 1, SHAPE)]
    assert all(not torch.equal(noise(0, "tree", 0, SHAPE), other) for other in others)
    drawn = noise(0, "tree", 0, (16, 64, 64))
    assert abs(drawn.mean().item()) < 0.02
    assert abs(drawn.std().item() - 1) < 0.02
    latents, eps = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    assert torch.equal(mix(latents, eps, "0"), latents)
    assert torch.equal(mix(latents, eps, "1"), eps)
    assert torch.allclose(mix(latents, eps, "0.005"), 0.995 * latents + 0.005 * eps)


def test_rows_are_batched_by_prompt() -> None:
    def sizes(prompts: str, batch_size: int) -> list[list[int]]:
        return [[run.stop - run.start for run in batch] for batch in plan_batches(list(prompts), batch_size)]

    assert sizes("aabccc", 4) == [[2, 1], [3]]
    assert sizes("aabccc", 6) == [[2, 1, 3]]
    assert sizes("aaaaab", 2) == [[2], [2], [1, 1]]
    assert sizes("", 2) == []
    with pytest.raises(ConfigError, match="batch size is 0"):
        plan_batches(["a"], 0)


def test_same_rows_in_another_order_give_the_same_features(backbone: Backbone) -> None:
    inputs, order = _inputs(PROMPTS), [3, 4, 5, 0, 1, 2]
    here = _features(backbone, PROMPTS, batch_size=3)
    moved = _features(
        backbone,
        [PROMPTS[i] for i in order],
        latents=inputs["latents"][order],
        eps=inputs["eps"][order],
        batch_size=3,
    )
    for place, values in here.items():
        assert np.array_equal(values[order], moved[place])


def test_cache_gives_the_same_bits_without_the_encoders(
    base: Path, pictures: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    paths, digests = pictures
    prompts = PROMPTS[: len(paths)]
    eps = torch.stack([noise(0, prompt, 0, SHAPE) for prompt in prompts])

    def run(**options: Any) -> dict[tuple[str, int], np.ndarray]:
        backbone = Backbone.from_pretrained(base, max_tokens=0, **options)
        return _features(backbone, prompts, latents=backbone.encode_images(paths, digests), eps=eps)

    plain = run()
    first = run(cache=tmp_path / "cache")
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == len(paths) + len(set(prompts))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path not in files]

    def never(*_: Any, **__: Any) -> None:
        pytest.fail("an encoder ran although everything is cached")

    for name in ("diffusers.AutoencoderKL", "transformers.CLIPTextModelWithProjection"):
        monkeypatch.setattr(f"{name}.{'encode' if 'Auto' in name else 'forward'}", never)
    second = run(cache=tmp_path / "cache")
    for place, values in plain.items():
        assert values.tobytes() == first[place].tobytes() == second[place].tobytes()

    files[0].write_bytes(files[0].read_bytes()[:-7])
    with pytest.raises(BackboneError, match=rf"{files[0].name}: damaged cache file .*; delete it"):
        run(cache=tmp_path / "cache")


def test_another_transformer_shares_what_was_encoded(
    base: Path, backbone: Backbone, pictures: Any, tmp_path: Path
) -> None:
    folder = tiny_transformer(tmp_path / "deeper", n_blocks=5, heads=3)
    deeper = backbone.with_transformer(folder)
    assert (deeper.name, deeper.n_blocks, deeper.width, len(deeper.layers)) == ("deeper", 5, 48, 6)
    assert deeper.layers[5].name == "transformer_blocks.4"
    alone = Backbone.from_pretrained(base, transformer=folder, max_tokens=0)
    assert alone.fingerprint_config() == deeper.fingerprint_config()
    for place, values in _features(deeper, PROMPTS).items():
        assert np.array_equal(values, _features(alone, PROMPTS, layers=[place[1]])[place])
    assert torch.equal(deeper.encode_images(*pictures), backbone.encode_images(*pictures))
    before = backbone.fingerprint_config()
    assert before["weights"]["vae"] == deeper.fingerprint_config()["weights"]["vae"]
    assert before["weights"]["transformer"] != deeper.fingerprint_config()["weights"]["transformer"]
    assert backbone.with_transformer(name="again").describe()["name"] == "again"


def test_base_without_a_transformer(own_base: Path, tmp_path: Path) -> None:
    shutil.rmtree(own_base / "transformer")
    index = json.loads((own_base / "model_index.json").read_text())
    (own_base / "model_index.json").write_text(json.dumps(index | {"transformer": [None, None]}))
    folder = tiny_transformer(tmp_path / "own")
    assert Backbone.from_pretrained(own_base, transformer=folder).name == "own"
    with pytest.raises(BackboneError, match="the backbone has no transformer"):
        Backbone.from_pretrained(own_base)


def test_untrained_weights_are_seeded(backbone: Backbone) -> None:
    state = torch.get_rng_state()
    controls = [backbone.with_transformer(random_weights=text) for text in ("init:0", "init:0", "init:1")]
    assert torch.equal(state, torch.get_rng_state())
    hashes = [state_hash(control._transformer) for control in controls]
    assert hashes[0] == hashes[1] != hashes[2]
    assert state_hash(backbone._transformer) not in hashes
    assert controls[0].fingerprint_config()["random_weights"] == "init:0"
    trained, control = backbone._transformer.state_dict(), controls[0]._transformer.state_dict()
    assert torch.equal(trained["pos_embed.pos_embed"], control["pos_embed.pos_embed"])
    assert not controls[0]._transformer.training


def test_untrained_matrices_are_never_constant_zero(monkeypatch: Any, backbone: Backbone) -> None:
    from diffusers import SD3Transformer2DModel

    built = SD3Transformer2DModel.__init__

    @functools.wraps(built)  # from_config reads the signature
    def zero_gates(self: Any, *args: Any, **kwargs: Any) -> None:
        built(self, *args, **kwargs)
        torch.nn.init.zeros_(self.transformer_blocks[0].norm1.linear.weight)

    monkeypatch.setattr(SD3Transformer2DModel, "__init__", zero_gates)
    gate = backbone.with_transformer(random_weights="init:0")._transformer.transformer_blocks[0].norm1.linear
    assert gate.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_shuffled_weights_keep_each_tensors_values(backbone: Backbone) -> None:
    state = torch.get_rng_state()
    one, again, other = (
        backbone.with_transformer(random_weights=text) for text in ("shuffled:1", "shuffled:1", "shuffled:2")
    )
    assert torch.equal(state, torch.get_rng_state())
    assert state_hash(one._transformer) == state_hash(again._transformer) != state_hash(other._transformer)
    trained = dict(backbone._transformer.named_parameters())
    for name, parameter in one._transformer.named_parameters():
        assert torch.equal(parameter.flatten().sort().values, trained[name].flatten().sort().values)
        if parameter.numel() > 64:
            assert not torch.equal(parameter, trained[name])
    buffers = dict(backbone._transformer.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in one._transformer.named_buffers())


@pytest.mark.parametrize("text", ["init", "init:", "init:-1", "init:x", "zero:0", "", "shuffled:1.5", "init:0:1"])
def test_random_weights_are_named_exactly(base: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed: init:SEED .* or shuffled:SEED"):
        Backbone.from_pretrained(base, random_weights=text)


def test_half_precision_weights_compute_in_float32_on_the_cpu(
    own_base: Path, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    backbone.with_transformer()._transformer.half().save_pretrained(own_base / "transformer")
    with caplog.at_level(logging.INFO, logger="probekit.backbones"):
        half = Backbone.from_pretrained(own_base, max_tokens=0)
    assert half.dtype == torch.float32
    assert "stored as F16 and computes in float32" in caplog.text
    assert half.fingerprint_config()["dtype"] == "float32"
    features, expected = _features(half, PROMPTS), _features(backbone, PROMPTS)
    assert np.allclose(features["mean", 3], expected["mean", 3], atol=0.05)
    brain = Backbone.from_pretrained(own_base, max_tokens=0, dtype=torch.bfloat16)
    assert brain.fingerprint_config()["dtype"] == "bfloat16"
    assert np.allclose(_features(brain, PROMPTS)["mean", 3], expected["mean", 3], atol=0.5)


def test_fingerprint_names_what_changes_the_numbers(base: Path, backbone: Backbone) -> None:
    config = backbone.fingerprint_config()
    assert json.loads(json.dumps(config)) == config
    assert set(config["weights"]) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert {"tokenizer", "tokenizer_2", "vae", "transformer"} < set(config["files"])
    assert (config["model"], config["max_tokens"], config["resolution"]) == (None, 0, RESOLUTION)
    default = Backbone.from_pretrained(base, resolution=8).fingerprint_config()
    assert (default["max_tokens"], default["resolution"]) == (256, 8)
    assert (
        backbone.describe()["n_parameters"]
        == backbone.n_parameters
        == sum(parameter.numel() for parameter in backbone._transformer.parameters())
    )
    assert str(base.parent) not in json.dumps(config)


def test_longer_token_limit_changes_features(base: Path, backbone: Backbone) -> None:
    padded = Backbone.from_pretrained(base)
    assert not np.allclose(_features(padded, ["tree"])["mean", 3], _features(backbone, ["tree"])["mean", 3], atol=1e-4)


def test_values_that_are_not_finite_are_returned(backbone: Backbone) -> None:
    inputs = _inputs(PROMPTS)
    inputs["latents"][1] = torch.inf
    features = _features(backbone, PROMPTS, latents=inputs["latents"])
    finite = np.isfinite(features["mean", 3]).all(axis=1)
    assert finite.tolist() == [True, False, True, True, True, True]


def test_errors_name_what_is_wrong(base: Path, own_base: Path, tmp_path: Path) -> None:
    def fails(pattern: str, model: Path | str = base, error: type[Exception] = BackboneError, **options: Any) -> None:
        with pytest.raises(error, match=pattern) as caught:
            Backbone.from_pretrained(model, **options)
        assert "\n" not in str(caught.value)

    (tmp_path / "empty").mkdir()
    fails(r"empty: has no model_index\.json", tmp_path / "empty")
    fails("no such folder, and not a hub id", tmp_path / "nowhere")
    fails("cannot be had from the hub or its cache", "nobody/nothing")
    fails("only hub ids have revisions", revision="main")
    fails("no such transformer folder", transformer=tmp_path / "nowhere")
    fails(r"empty: has no config\.json", transformer=tmp_path / "empty")
    fails("dtype 'int8' is not allowed on cpu; allowed: float32, bfloat16", dtype="int8")
    fails("dtype 'float16' is not allowed on cpu", dtype=torch.float16)
    fails("device 'gpu' is not known; allowed: cpu, cuda", device="gpu")
    if not torch.cuda.is_available():
        fails("device 'cuda' is not available", device="cuda")
    fails("resolution is 10; allowed for base: multiples of 4 up to 32", resolution=10, error=ConfigError)
    fails("resolution is 64; allowed", resolution=64, error=ConfigError)
    fails("resolution is 0; allowed", resolution=0, error=ConfigError)
    fails("max_tokens is 513; allowed: 0 to 512", max_tokens=513, error=ConfigError)
    fails(
        r"wide: latent channels of the transformer is 6, the base has 4",
        transformer=tiny_transformer(tmp_path / "wide", in_channels=6),
    )
    fails(
        r"text token width of the transformer is 16, the base needs at least 32",
        transformer=tiny_transformer(tmp_path / "thin", joint_attention_dim=16),
    )
    weights = own_base / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    fails("transformer: cannot load the SD3Transformer2DModel", own_base)
    weights.unlink()
    fails(r"transformer: has no weights \(\*\.safetensors\)", own_base)
    config = own_base / "transformer" / "config.json"
    config.write_text(json.dumps({"_class_name": "UNet2DModel"}))
    fails(r"config\.json: transformer class 'UNet2DModel' is not known; known: SD3Transformer2DModel", own_base)
    config.write_text("{")
    fails(r"config\.json: cannot be read", own_base)


def test_weights_that_do_not_fill_the_model_are_an_error(tmp_path: Path, base: Path) -> None:
    folder = tiny_transformer(tmp_path / "short")
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["proj_out.bias"]
    save_file(tensors, path)
    with pytest.raises(BackboneError, match=r"short: the weights lack 1 tensors .* such as proj_out\.bias"):
        Backbone.from_pretrained(base, transformer=folder)


def test_foreign_libraries_are_never_imported(own_base: Path) -> None:
    index = json.loads((own_base / "model_index.json").read_text())
    (own_base / "model_index.json").write_text(json.dumps(index | {"vae": ["antigravity", "AutoencoderKL"]}))
    with pytest.raises(BackboneError, match=r"vae is antigravity\.AutoencoderKL; allowed: a class of diffusers or"):
        Backbone.from_pretrained(own_base)


def test_layers_and_poolings_are_checked(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="layer 4 does not exist; allowed: 0 to 3"):
        _features(backbone, ["tree"], layers=[4])
    with pytest.raises(ConfigError, match="no layer is asked for"):
        _features(backbone, ["tree"], layers=[])
    with pytest.raises(ConfigError, match="pooling 'median' is not known; allowed: mean, max"):
        _features(backbone, ["tree"], poolings=["median"])
    with pytest.raises(BackboneError, match="known: SD3Transformer2DModel"):
        family_of("Nothing")
    assert all(name == row.transformer for name, row in FAMILIES.items())


def test_images_follow_the_rule(tmp_path: Path) -> None:
    def read(image: Image.Image, name: str, **options: Any) -> np.ndarray:
        image.save(tmp_path / name, **options)
        pixels = read_pixels(tmp_path / name, _digest(tmp_path / name), image.height)
        return ((pixels + 1) * 127.5).round().permute(1, 2, 0).to(torch.uint8).numpy()

    rng = np.random.default_rng(1)
    plain = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    assert np.array_equal(read(Image.fromarray(plain), "plain.png"), plain)
    assert np.array_equal(read(Image.fromarray(plain), "plain.webp", lossless=True), plain)
    deep = rng.integers(0, 65535, (6, 6), dtype=np.uint16)
    assert np.array_equal(read(Image.fromarray(deep), "deep.png")[..., 0], (deep >> 8).astype(np.uint8))
    clear = np.dstack([plain, np.zeros((6, 6), np.uint8)])
    assert (read(Image.fromarray(clear), "clear.png") == 255).all()
    turned = Image.Exif()
    turned[0x0112] = 3  # half a turn
    assert np.array_equal(read(Image.fromarray(plain), "turned.png", exif=turned), plain[::-1, ::-1])
    wide = np.zeros((6, 30, 3), dtype=np.uint8)
    wide[:, 12:18] = plain
    assert np.array_equal(read(Image.fromarray(wide), "wide.png"), plain)


def test_bad_images_are_one_clear_line(tmp_path: Path, monkeypatch: Any) -> None:
    def fails(name: str, pattern: str, digest: bytes | None = None) -> None:
        path = tmp_path / name
        with pytest.raises(ImageError, match=pattern) as caught:
            read_pixels(path, digest or _digest(path), 16)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noisy.save(tmp_path / "whole.png")
    noisy.save(tmp_path / "whole.jpg")
    for name in ("whole.png", "whole.jpg"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"half-{name}").write_bytes(data[: len(data) // 2])
        fails(f"half-{name}", "cannot decode the image")
    (tmp_path / "text.png").write_text("not a picture")
    fails("text.png", "not an image of an allowed format, or damaged.*allowed: PNG, JPEG or WebP")
    noisy.save(tmp_path / "other.bmp")
    fails("other.bmp", "not an image of an allowed format")
    noisy.save(tmp_path / "moving.webp", save_all=True, append_images=[noisy.rotate(90)])
    fails("moving.webp", "the image has 2 frames")
    fails("whole.png", "the image changed since it was listed", digest=b"x" * 32)
    fails("missing.png", "cannot read the image", digest=b"x" * 32)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    fails("whole.png", "cannot decode the image .*decompression bomb")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr("probekit.backbones.images.MAX_PIXELS", 1000)
    fails("whole.png", "the image has 64 x 64 pixels")
