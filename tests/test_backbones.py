"""Tests of probekit.backbones on tiny random pipelines (see tiny_models), against forwards written by hand."""

import dataclasses
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
from tiny_families.pixart_kind import PIPELINES as PIXART
from tiny_families.qwen_kind import PIPELINES as QWEN
from tiny_models import tiny_pipeline, tiny_transformer
from tiny_parts import RESOLUTION

from probekit._types import scaled
from probekit.backbones import Backbone, noise
from probekit.backbones.catalogue import FAMILIES, family_of
from probekit.backbones.latents import mix
from probekit.errors import BackboneError, ConfigError

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


def _latents(backbone: Backbone, paths: list[Path], digests: list[bytes]) -> torch.Tensor:
    return torch.stack([image.latents for image in next(backbone.latents([list(zip(paths, digests, strict=True))]))])


def _loaded(backbone: Backbone) -> Any:
    """Return the transformer, which the first features bring into memory."""
    _features(backbone, ["tree"])
    return backbone.stages.transformer


def _hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _inputs(prompts: list[str], draw: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(len(prompts), *SHAPE, generator=generator)
    return {"latents": list(latents), "prompts": prompts, "eps": [noise(0, p, draw, SHAPE) for p in prompts]}


def _features(backbone: Backbone, prompts: list[str], **changes: Any) -> dict[tuple[str, int], np.ndarray]:
    options = {"sigma": "0.005", "layers": list(range(backbone.n_blocks + 1)), "poolings": ["mean"], "batch_size": 4}
    settings = _inputs(prompts) | options | changes
    wanted = backbone.wanted(settings.pop("poolings"), settings.pop("layers"))
    return backbone.features(**settings, wanted=wanted)


@pytest.mark.parametrize("sigma", ["0", "0.005", "0.07", "0.3", "1"])
def test_timestep_is_exactly_a_thousand_sigma(backbone: Backbone, sigma: str) -> None:
    conditioner = backbone._conditioner
    latents = torch.randn(3, *SHAPE)
    with backbone.stages.text_encoders():
        embeddings = conditioner.encode(["a red dog"], SHAPE)[0]
    kwargs = conditioner.prepare("a red dog", embeddings, latents, sigma)
    assert kwargs["timestep"].tolist() == [float(Decimal(sigma) * 1000)] * 3
    assert backbone.timestep(sigma) == float(Decimal(sigma) * 1000)
    assert torch.equal(kwargs["hidden_states"], latents)
    assert {len(value) for value in kwargs.values() if isinstance(value, torch.Tensor)} == {3}


def test_scheduler_settings_do_not_move_the_timestep(tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "base", shift=6.0)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"use_dynamic_shifting": True}))
    backbone = Backbone.from_pretrained(folder)
    with backbone.stages.text_encoders():
        embeddings = backbone._conditioner.encode(["tree"], SHAPE)[0]
    kwargs = backbone._conditioner.prepare("tree", embeddings, torch.zeros(1, *SHAPE), "0.005")
    assert kwargs["timestep"].tolist() == [5.0]


def test_encoding_does_not_depend_on_order_or_cache(base: Path, pictures: Any) -> None:
    paths, digests = pictures
    together = _latents(Backbone.from_pretrained(base), paths, digests)
    other = Backbone.from_pretrained(base)
    alone = torch.cat([_latents(other, [path], [digest]) for path, digest in zip(paths, digests, strict=True)])
    assert torch.equal(together, alone)
    assert torch.equal(_latents(other, paths[::-1], digests[::-1]), together.flip(0))


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


def test_same_rows_in_another_order_give_the_same_features(backbone: Backbone) -> None:
    inputs, order = _inputs(PROMPTS), [3, 4, 5, 0, 1, 2]
    here = _features(backbone, PROMPTS, batch_size=3)
    moved = _features(
        backbone,
        [PROMPTS[i] for i in order],
        latents=[inputs["latents"][i] for i in order],
        eps=[inputs["eps"][i] for i in order],
        batch_size=3,
    )
    for place, values in here.items():
        assert np.array_equal(values[order], moved[place])


def test_cache_gives_the_same_bits_without_the_encoders(
    base: Path, pictures: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    paths, digests = pictures
    prompts = PROMPTS[: len(paths)]
    eps = [noise(0, prompt, 0, SHAPE) for prompt in prompts]

    def run(**options: Any) -> dict[tuple[str, int], np.ndarray]:
        backbone = Backbone.from_pretrained(base, max_tokens=0, **options)
        return _features(backbone, prompts, latents=list(_latents(backbone, paths, digests)), eps=eps)

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
    assert torch.equal(_latents(deeper, *pictures), _latents(backbone, *pictures))
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


def test_weights_are_here_if_all_files_of_all_models_are(own_base: Path) -> None:
    def here(random_weights: str | None = None) -> bool:
        return Backbone.from_pretrained(own_base, random_weights=random_weights, weights=False).has_weights

    assert here()
    whole = own_base / "transformer" / "diffusion_pytorch_model.safetensors"
    shards = [whole.with_name(f"diffusion_pytorch_model-{part}-of-00002.safetensors") for part in ("00001", "00002")]
    index = {"weight_map": {f"part {path.name}": path.name for path in shards}}
    whole.with_name(f"{whole.name}.index.json").write_text(json.dumps(index))
    shutil.copy(whole, shards[0])
    whole.rename(shards[1])
    assert here()
    shards[1].unlink()
    assert not here()
    assert not here("shuffled:0")
    assert here("init:0")
    for path in (shards[0], whole.with_name(f"{whole.name}.index.json")):
        path.unlink()
    assert not here()
    assert here("init:0")
    (own_base / "vae" / whole.name).unlink()
    assert not here("init:0")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "unknown"),
        (0, "0 B"),
        (12, "12 B"),
        (999_499, "999 kB"),
        (999_999, "1 MB"),
        (1_234_567, "1.23 MB"),
        (20_000_000_000, "20 GB"),
        (7_770_000_000_000, "7.77 TB"),
    ],
)
def test_sizes_are_written_with_three_digits(value: int | None, text: str) -> None:
    assert scaled(value, "B") == text


def test_untrained_weights_are_seeded(backbone: Backbone) -> None:
    state = torch.get_rng_state()
    controls = [backbone.with_transformer(random_weights=text) for text in ("init:0", "init:0", "init:1")]
    assert torch.equal(state, torch.get_rng_state())
    hashes = [_hash(_loaded(control)) for control in controls]
    assert hashes[0] == hashes[1] != hashes[2]
    assert _hash(_loaded(backbone)) not in hashes
    assert controls[0].fingerprint_config()["random_weights"] == f"init:0, torch {torch.__version__.split('+')[0]}"
    trained, control = _loaded(backbone).state_dict(), _loaded(controls[0]).state_dict()
    assert torch.equal(trained["pos_embed.pos_embed"], control["pos_embed.pos_embed"])
    assert not controls[0].stages.transformer.training


def test_untrained_matrices_are_never_constant_zero(monkeypatch: Any, backbone: Backbone) -> None:
    from diffusers import SD3Transformer2DModel

    built = SD3Transformer2DModel.__init__

    @functools.wraps(built)  # from_config reads the signature
    def zero_gates(self: Any, *args: Any, **kwargs: Any) -> None:
        built(self, *args, **kwargs)
        torch.nn.init.zeros_(self.transformer_blocks[0].norm1.linear.weight)

    monkeypatch.setattr(SD3Transformer2DModel, "__init__", zero_gates)
    gate = _loaded(backbone.with_transformer(random_weights="init:0")).transformer_blocks[0].norm1.linear
    assert gate.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_shuffled_weights_keep_each_tensors_values(backbone: Backbone) -> None:
    state = torch.get_rng_state()
    one, again, other = (
        backbone.with_transformer(random_weights=text) for text in ("shuffled:1", "shuffled:1", "shuffled:2")
    )
    assert torch.equal(state, torch.get_rng_state())
    assert _hash(_loaded(one)) == _hash(_loaded(again)) != _hash(_loaded(other))
    model = _loaded(backbone)  # one transformer is in memory at a time; this keeps it
    trained, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    shuffled = _loaded(one)
    for name, parameter in shuffled.named_parameters():
        assert torch.equal(parameter.flatten().sort().values, trained[name].flatten().sort().values)
        if parameter.numel() > 64:
            assert not torch.equal(parameter, trained[name])
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in shuffled.named_buffers())


@pytest.mark.parametrize("text", ["init", "init:", "init:-1", "init:x", "zero:0", "", "shuffled:1.5", "init:0:1"])
def test_random_weights_are_named_exactly(base: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed: init:SEED .* or shuffled:SEED"):
        Backbone.from_pretrained(base, random_weights=text)


def test_half_precision_weights_compute_in_float32_on_the_cpu(
    own_base: Path, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    _loaded(backbone.with_transformer()).half().save_pretrained(own_base / "transformer")
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
        == sum(parameter.numel() for parameter in _loaded(backbone).parameters())
    )
    assert str(base.parent) not in json.dumps(config)


def test_longer_token_limit_changes_features(base: Path, backbone: Backbone) -> None:
    padded = Backbone.from_pretrained(base)
    assert not np.allclose(_features(padded, ["tree"])["mean", 3], _features(backbone, ["tree"])["mean", 3], atol=1e-4)


def test_values_that_are_not_finite_are_returned(backbone: Backbone) -> None:
    inputs = _inputs(PROMPTS)
    inputs["latents"][1] = torch.full(SHAPE, torch.inf)
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
    fails("is not in the cache", "nobody/nothing")
    fails("only hub ids have revisions", revision="main", error=ConfigError)
    fails("no such transformer folder", transformer=tmp_path / "nowhere")
    fails(r"empty: has no config\.json", transformer=tmp_path / "empty")
    fails("dtype 'int8' is not allowed on cpu; allowed: float32, bfloat16", dtype="int8", error=ConfigError)
    fails("dtype 'float16' is not allowed on cpu", dtype=torch.float16, error=ConfigError)
    fails("device 'gpu' is not known; allowed: cpu, cuda", device="gpu", error=ConfigError)
    if not torch.cuda.is_available():
        fails("device 'cuda' is not available", device="cuda", error=ConfigError)
    fails("resolution is 10; allowed for base: multiples of 4 up to 32", resolution=10, error=ConfigError)
    fails("resolution is 64; allowed", resolution=64, error=ConfigError)
    fails("resolution is 0; allowed", resolution=0, error=ConfigError)
    fails("max_tokens is 2049; allowed: 0 to 2048", max_tokens=2049, error=ConfigError)
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
    fails("diffusion_pytorch_model.safetensors: cannot read the weights", own_base)
    weights.unlink()
    fails(r"transformer: has no weights \(diffusion_pytorch_model\.safetensors or", own_base)
    config = own_base / "transformer" / "config.json"
    config.write_text(json.dumps({"_class_name": "UNet2DModel"}))
    fails(r"config\.json: transformer class 'UNet2DModel' is not known; known: .*SD3Transformer2DModel", own_base)
    config.write_text("{")
    fails(r"config\.json: cannot be read", own_base)


def test_weights_that_do_not_fill_the_model_are_an_error(tmp_path: Path, base: Path) -> None:
    folder = tiny_transformer(tmp_path / "short")
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["proj_out.bias"]
    save_file(tensors, path)
    with pytest.raises(BackboneError, match=r"short: the weights lack 1 tensors .* such as proj_out\.bias"):
        _loaded(Backbone.from_pretrained(base, transformer=folder))


def test_foreign_libraries_are_never_imported(own_base: Path) -> None:
    index = json.loads((own_base / "model_index.json").read_text())
    (own_base / "model_index.json").write_text(json.dumps(index | {"vae": ["antigravity", "AutoencoderKL"]}))
    with pytest.raises(BackboneError, match=r"vae is antigravity\.AutoencoderKL; allowed: a class of diffusers or"):
        Backbone.from_pretrained(own_base)


def test_layers_and_poolings_are_checked(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="layer 5 does not exist; allowed: 0 to 3, and 4 ="):
        _features(backbone, ["tree"], layers=[5])
    with pytest.raises(ConfigError, match="no layer is asked for"):
        _features(backbone, ["tree"], layers=[])
    with pytest.raises(ConfigError, match="pooling 'median' is not known; allowed: mean, max"):
        _features(backbone, ["tree"], poolings=["median"])


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"resize": "pad"}, {"resize_rule"}),
        ({"resize": "bucket"}, {"resize_rule", "noise_rule"}),
        ({"resolution": 8}, {"resolution"}),
        ({"max_tokens": 7}, {"max_tokens"}),
        ({"dtype": "bfloat16"}, {"dtype", "vae_dtype"}),
        ({"random_weights": "init:3"}, {"random_weights", "weights"}),
        ({"random_weights": "shuffled:3"}, {"random_weights"}),
        ({"offload": "group"}, set()),
        ({"compile": True}, set()),
        ({"name": "another"}, set()),
    ],
)
def test_a_setting_shows_in_the_fingerprint_if_it_changes_features(
    base: Path, options: dict[str, Any], keys: set[str]
) -> None:
    plain = Backbone.from_pretrained(base, resolution=16).fingerprint_config()
    other = Backbone.from_pretrained(base, **({"resolution": 16} | options)).fingerprint_config()
    assert {key for key in plain if plain[key] != other[key]} == keys


def test_what_the_pipeline_does_is_in_the_fingerprint(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another template, argument or rule makes other features of the same weights."""
    plain = Backbone.from_pretrained(base).fingerprint_config()
    monkeypatch.setattr("probekit.backbones.backbone.source_hash", lambda _: "another release of the pipeline")
    row = family_of("SD3Transformer2DModel", "StableDiffusion3Pipeline")
    key = (row.transformer, row.pipeline)
    monkeypatch.setitem(FAMILIES, key, dataclasses.replace(row, call={"guidance_scale": 0.5}))
    monkeypatch.setattr("probekit.backbones.backbone.MIX_RULES", {"flow": "2: another mixture"})
    other = Backbone.from_pretrained(base).fingerprint_config()
    assert {name for name in plain if plain[name] != other[name]} == {
        "prompt_template",
        "pipeline_arguments",
        "mix_rule",
    }


def test_the_noise_schedule_of_a_diffusion_model_is_in_the_fingerprint(tmp_path: Path) -> None:
    folder = PIXART["pixart_sigma"].build(tmp_path / "pixart")
    plain = Backbone.from_pretrained(folder, resolution=16)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"beta_end": 0.005}))
    other = Backbone.from_pretrained(folder, resolution=16)
    assert other.timestep("0.1") != plain.timestep("0.1")
    configs = plain.fingerprint_config(), other.fingerprint_config()
    assert {name for name in configs[0] if configs[0][name] != configs[1][name]} == {"timestep_rule"}


def test_a_row_that_mistakes_the_kind_of_noise_or_latents_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for group, name, change, pattern in (
        (PIXART, "pixart_sigma", {"noise": "flow"}, r"prediction_type 'epsilon', but its row says noise 'flow'"),
        (QWEN, "qwen_image", {"latents": "shift-scale"}, "AutoencoderKLQwenImage has no scaling_factor"),
    ):
        builder = group[name]
        key = (builder.transformer, builder.pipeline)
        monkeypatch.setitem(FAMILIES, key, dataclasses.replace(FAMILIES[key], **change))
        folder = builder.build(tmp_path / name)
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (16, 16), "red").save(path)
        with pytest.raises(BackboneError, match=pattern):
            _latents(Backbone.from_pretrained(folder, resolution=16), [path], [_digest(path)])


def test_one_cache_folder_keeps_the_settings_apart(base: Path, pictures: Any, tmp_path: Path) -> None:
    """Whatever changes a latent or an embedding is in its key."""
    wide = [paths[2:3] for paths in pictures]
    plain: list[torch.Tensor] = []
    for options in ({}, {"resize": "pad"}, {"resolution": 8}, {"dtype": "bfloat16"}):
        settings = {"resolution": 16, **options}
        cached = _latents(Backbone.from_pretrained(base, cache=tmp_path / "cache", **settings), *wide)
        assert torch.equal(cached, _latents(Backbone.from_pretrained(base, **settings), *wide))
        assert all(cached.shape != other.shape or not torch.equal(cached, other) for other in plain)
        plain.append(cached)
    for options in ({"max_tokens": 0}, {"max_tokens": 5}, {"max_tokens": 0, "dtype": "bfloat16"}):
        Backbone.from_pretrained(base, cache=tmp_path / "cache", **options).prompts.embed(["tree"])
    assert len(list((tmp_path / "cache" / "prompts").rglob("*.safetensors"))) == 3
    assert len(list((tmp_path / "cache" / "latents").rglob("*.safetensors"))) == len(plain)
