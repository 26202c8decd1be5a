"""The axes of a dump: noise levels, draws, poolings, points, prompt conditions and image sizes, all from one pass."""

import itertools
import logging
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny_families import all_pipelines
from tiny_prefs import write_rankings

import probekit
from probekit.backbones import Backbone, decode_ahead, noise
from probekit.dump.plan import conditions
from probekit.errors import ConfigError, FingerprintError

PIPELINES = all_pipelines()
RANKINGS = {"a red dog": 3, "tree": 2, "9 blue birds": 2}
PORTRAIT, LANDSCAPE = (20, 34), (41, 22)  # width, height
NEAR = 2e-3  # features are stored as float16 where differences within pairs allow it


@pytest.fixture(scope="module")
def prefs(tmp_path_factory: pytest.TempPathFactory) -> probekit.PreferenceSet:
    sizes = (PORTRAIT, LANDSCAPE, (16, 16))
    return probekit.load_preferences(write_rankings(tmp_path_factory.mktemp("prefs") / "set", RANKINGS, sizes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: PIPELINES[name].build(root / name) for name in ("sd3", "flux", "pixart_sigma")}


@pytest.fixture(scope="module")
def flux(folders: dict[str, Path]) -> Backbone:
    return Backbone.from_pretrained(folders["flux"], resolution=16, resize="bucket")


def feature_bytes(store: Path) -> dict[tuple[str, str], bytes]:
    """Every feature dataset, by the shard's place in the store and its own."""
    found: dict[tuple[str, str], bytes] = {}
    for path in sorted(store.rglob("*.h5")):
        with h5py.File(path) as file:
            place = path.relative_to(store).as_posix()
            file["features"].visititems(
                lambda name, item, place=place: (
                    found.update({(place, name): item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
                )
            )
    return found


def rows_of(store: probekit.FeatureStore, prefs: probekit.PreferenceSet) -> tuple[list[str], list[tuple[Path, bytes]]]:
    """Prompt and image file of every row of a store, in its order."""
    rows = prefs.rows(prefs.image_digests()).set_index("row_id").loc[store.rows["row_id"]]
    return list(rows["prompt"]), list(zip(map(Path, rows["path"]), rows["image_sha256"], strict=True))


def close(stored: np.ndarray, expected: Any) -> bool:
    expected = np.asarray(expected)
    return bool(np.abs(stored - expected).max() <= NEAR * max(1, np.abs(expected).max()))


# --- noise levels and draws


def test_sigmas_and_draws_come_from_one_pass_over_the_images(
    flux: Backbone, prefs: probekit.PreferenceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, read_image = [], decode_ahead.read_image
    monkeypatch.setattr(
        decode_ahead, "read_image", lambda path, *args, **kw: (read.append(path), read_image(path, *args, **kw))[1]
    )
    store = probekit.dump_features(flux, prefs, tmp_path / "all", sigmas=["0", "0.1", "0.3"], draws=2)
    assert sorted(read) == sorted({Path(path) for path in prefs.items["path"]})
    assert store.coordinates == [("0", 0), ("0.1", 0), ("0.1", 1), ("0.3", 0), ("0.3", 1)]
    last = flux.n_blocks
    draws = [store.read(layer=last, sigma="0.3", draw=draw) for draw in (0, 1)]
    assert not np.allclose(draws[0], draws[1], atol=1e-2)

    some = {"sigmas": ["0.1"], "draws": 1}
    for more in (some, some | {"draws": 2}, {"sigmas": ["0", "0.1", "0.3"], "draws": 2}):
        grown = probekit.dump_features(flux, prefs, tmp_path / "grown", **more)
    assert grown.coordinates == store.coordinates
    assert feature_bytes(tmp_path / "grown") == feature_bytes(tmp_path / "all")


def test_each_draw_has_its_noise(flux: Backbone, prefs: probekit.PreferenceSet, tmp_path: Path) -> None:
    store = probekit.dump_features(flux, prefs, tmp_path / "store", sigmas=["0.3"], draws=2, seed=7)
    prompts, files = rows_of(store, prefs)
    latents = [image.latents for image in next(flux.latents([files]))]
    for draw in (0, 1):
        eps = [noise(7, prompt, draw, tuple(x.shape), flux.canvas) for prompt, x in zip(prompts, latents, strict=True)]
        wanted = flux.wanted(["mean"], [0, flux.n_blocks])
        found = flux.features(latents, prompts, sigma="0.3", eps=eps, wanted=wanted, batch_size=1)
        for layer in (0, flux.n_blocks):
            assert close(store.read(layer=layer, draw=draw), found["mean", layer])


def test_a_sigma_that_rounding_drowns_is_marked(
    folders: dict[str, Path], prefs: probekit.PreferenceSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = Backbone.from_pretrained(folders["sd3"])
    store = probekit.dump_features(backbone, prefs, tmp_path / "store", sigmas=["0", "0.000001", "0.3"])
    assert set(store.sigma_resolution) == {"0.000001", "0.3"}
    ratios = {sigma: found["ratio"] for sigma, found in store.sigma_resolution.items()}
    assert ratios["0.000001"] < 3 < ratios["0.3"]
    assert "sd3: sigma 0.000001 changes features 0.0" in caplog.text
    assert "it is not resolved" in caplog.text
    assert store.summary()["sigma_resolution"] == store.sigma_resolution
    before = feature_bytes(tmp_path / "store")
    store = probekit.dump_features(backbone, prefs, tmp_path / "store", sigmas=["0.1"])
    assert set(store.sigma_resolution) == {"0.000001", "0.1", "0.3"}
    assert before.items() < feature_bytes(tmp_path / "store").items()


def test_sigmas_below_what_a_vp_model_was_trained_on_are_warned_of(
    folders: dict[str, Path], prefs: probekit.PreferenceSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = Backbone.from_pretrained(folders["pixart_sigma"], resolution=16)
    probekit.dump_features(backbone, prefs, tmp_path / "store", sigmas=["0.001", "0.1"])
    assert "sigma 0.001 lies below 0.00" in caplog.text or "sigma 0.001 lies below 0.01" in caplog.text
    assert "sigma 0.001, 0.1" not in caplog.text


# --- poolings and points


def tokens_by_hand(
    backbone: Backbone, latents: list[torch.Tensor], prompts: list[str], eps: list[torch.Tensor]
) -> list[dict[str, Any]]:
    """For each image, image and text tokens after each block, and what enters the output projection, as float64."""
    model, images = backbone.stages.transformer, []
    single = model.single_transformer_blocks if hasattr(model, "single_transformer_blocks") else []
    for latent, prompt, each in zip(latents, prompts, eps, strict=True):
        seen: dict[str, Any] = {"image": {}, "text": {}}

        def leaves(layer: int, seen: dict[str, Any] = seen) -> Any:
            def see(_: Any, __: Any, output: Any) -> None:
                text, image = output
                seen["image"][layer] = image[0].double()
                if text is not None:
                    seen["text"][layer] = text[0].double()

            return see

        def enters(_: Any, args: Any, seen: dict[str, Any] = seen) -> None:
            seen["output"] = args[0][0].double()

        blocks = [*model.transformer_blocks, *single]
        handles = [block.register_forward_hook(leaves(k)) for k, block in enumerate(blocks, start=1)]
        handles.append(model.proj_out.register_forward_pre_hook(enters))
        wanted = [("mean", backbone.output_point.index)]
        backbone.features([latent], [prompt], sigma="0.1", eps=[each], wanted=wanted, batch_size=1)
        for handle in handles:
            handle.remove()
        images.append(seen)
    return images


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_poolings_equal_their_definitions_on_the_full_tokens(
    folders: dict[str, Path], prefs: probekit.PreferenceSet, tmp_path: Path, name: str
) -> None:
    resize = "bucket" if name == "flux" else "crop"
    backbone = Backbone.from_pretrained(folders[name], resolution=16, resize=resize)
    poolings = ["mean", "max", "mean_std", "grid4", "text_mean"]
    store = probekit.dump_features(
        backbone, prefs, tmp_path / "store", sigmas=["0.1"], pooling=poolings, output_tokens=True
    )
    prompts, files = rows_of(store, prefs)
    latents = [image.latents for image in next(backbone.latents([files]))]
    eps = [noise(0, p, 0, tuple(x.shape), backbone.canvas) for p, x in zip(prompts, latents, strict=True)]
    images = tokens_by_hand(backbone, latents, prompts, eps)
    depth = backbone.n_blocks
    # SD3's last block passes no text on; the output projection takes the image alone
    assert [point.index for point in store.layers_of("text_mean")] == list(range(depth + (name == "flux")))
    for layer in range(1, depth + 2):
        tokens = [seen["output"] if layer > depth else seen["image"][layer] for seen in images]
        for pooling, by_hand in {
            "mean": lambda t, _: t.mean(dim=0),
            "max": lambda t, _: t.max(dim=0).values,
            "mean_std": lambda t, _: torch.cat([t.mean(dim=0), ((t - t.mean(dim=0)) ** 2).mean(dim=0).sqrt()]),
            "grid4": grid4,
        }.items():
            expected = [by_hand(t, (x.shape[1] // 2, x.shape[2] // 2)) for t, x in zip(tokens, latents, strict=True)]
            assert close(store.read(layer=layer, pooling=pooling), torch.stack(expected)), (layer, pooling)
        if layer < depth + (name == "flux"):
            expected = [seen["text"][layer].mean(dim=0) for seen in images]
            assert close(store.read(layer=layer, pooling="text_mean"), torch.stack(expected)), layer
    assert store.layers[-1].name == "input of proj_out"


def grid4(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Means of 4 x 4 parts, which overlap by a token where 4 does not divide the grid."""
    height, width = grid
    picture = tokens.reshape(height, width, -1)
    parts = [
        picture[i * height // 4 : -(-(i + 1) * height // 4), j * width // 4 : -(-(j + 1) * width // 4)].mean(dim=(0, 1))
        for i, j in itertools.product(range(4), repeat=2)
    ]
    return torch.cat(parts)


# --- prompt conditions


def test_empty_prompts_are_the_empty_prompt_with_the_real_ones_noise(
    flux: Backbone, prefs: probekit.PreferenceSet, tmp_path: Path
) -> None:
    store = probekit.dump_features(flux, prefs, tmp_path / "store", sigmas=["0.3"], prompts="empty")
    prompts, files = rows_of(store, prefs)
    latents = [image.latents for image in next(flux.latents([files]))]
    eps = [noise(0, prompt, 0, tuple(x.shape), flux.canvas) for prompt, x in zip(prompts, latents, strict=True)]
    wanted, last = flux.wanted(["mean"], [flux.n_blocks]), flux.n_blocks
    empty = flux.features(latents, [""] * len(prompts), sigma="0.3", eps=eps, wanted=wanted, batch_size=4)
    real = flux.features(latents, prompts, sigma="0.3", eps=eps, wanted=wanted, batch_size=4)
    assert close(store.read(layer=last), empty["mean", last])
    assert not np.allclose(store.read(layer=last), real["mean", last], atol=1e-2)
    assert set(store.rows["prompt"]) == set(RANKINGS)  # what was judged, not what the model was told
    with pytest.raises(FingerprintError, match="prompts"):
        probekit.dump_features(flux, prefs, tmp_path / "store", sigmas=["0.3"])


def test_shuffled_prompts_are_a_derangement_that_the_seed_fixes(
    flux: Backbone, prefs: probekit.PreferenceSet, tmp_path: Path
) -> None:
    many = [f"prompt {number}" for number in range(50)]
    said = conditions(many, "shuffled:3")
    assert sorted(said.values()) == sorted(many)
    assert all(prompt != told for prompt, told in said.items())
    assert said == conditions(many[::-1], "shuffled:3") != conditions(many, "shuffled:4")

    stores = {
        seed: probekit.dump_features(flux, prefs, tmp_path / str(seed), sigmas=["0.3"], prompts=f"shuffled:{seed}")
        for seed in (1, 2, 3, 4)
    }
    assert len({store.fingerprint for store in stores.values()}) == 4
    prompts, files = rows_of(stores[1], prefs)
    said = conditions(list(RANKINGS), "shuffled:1")
    latents = [image.latents for image in next(flux.latents([files]))]
    eps = [noise(0, prompt, 0, tuple(x.shape), flux.canvas) for prompt, x in zip(prompts, latents, strict=True)]
    wanted, last = flux.wanted(["mean"], [flux.n_blocks]), flux.n_blocks
    told = [said[prompt] for prompt in prompts]
    expected = flux.features(latents, told, sigma="0.3", eps=eps, wanted=wanted, batch_size=4)
    assert close(stores[1].read(layer=last), expected["mean", last])

    alone = probekit.load_preferences(write_rankings(tmp_path / "alone", {"tree": 3}))
    with pytest.raises(ConfigError, match="prompts is 'shuffled:1' with 1 distinct prompt; allowed from two"):
        probekit.dump_features(flux, alone, tmp_path / "one", prompts="shuffled:1")


# --- image sizes


def test_pictures_of_every_aspect_go_through_pad_and_bucket(
    folders: dict[str, Path], prefs: probekit.PreferenceSet, tmp_path: Path
) -> None:
    shapes, features = {}, {}
    for resize in ("crop", "pad", "bucket"):
        backbone = Backbone.from_pretrained(folders["flux"], resolution=16, resize=resize)
        store = probekit.dump_features(backbone, prefs, tmp_path / resize, sigmas=["0.1"], batch_size=3)
        _, files = rows_of(store, prefs)
        shapes[resize] = {tuple(image.latents.shape) for image in next(backbone.latents([files]))}
        features[resize] = store.read(layer=backbone.n_blocks)
        assert (store.rows["status"] == 0).all()
        assert set(zip(store.rows["width"], store.rows["height"], strict=True)) == {PORTRAIT, LANDSCAPE, (16, 16)}
    assert shapes["crop"] == shapes["pad"] == {(4, 8, 8)}
    assert len(shapes["bucket"]) == 3
    assert all(h * w <= 64 for _, h, w in shapes["bucket"])
    assert not np.allclose(features["crop"], features["pad"], atol=1e-2)
    with pytest.raises(FingerprintError, match="_rule is"):
        probekit.dump_features(backbone, prefs, tmp_path / "pad", sigmas=["0.1"])


def test_pictures_of_a_prompt_share_their_noise_where_they_overlap(flux: Backbone) -> None:
    assert flux.canvas is not None
    tall, wide = (noise(0, "tree", 0, shape, flux.canvas) for shape in ((4, 12, 4), (4, 4, 12)))
    assert torch.equal(tall[:, 4:8], wide[:, :, 4:8])


def test_decoding_processes_change_no_byte(flux: Backbone, prefs: probekit.PreferenceSet, tmp_path: Path) -> None:
    for workers in (0, 2):
        probekit.dump_features(flux, prefs, tmp_path / str(workers), sigmas=["0.1"], decode_workers=workers)
    assert feature_bytes(tmp_path / "0") == feature_bytes(tmp_path / "2")


# --- dtypes


def test_half_precision_on_the_cpu(folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="dtype 'float16' is not allowed on cpu; allowed: float32, bfloat16"):
        Backbone.from_pretrained(folders["flux"], dtype="float16")
    half = tmp_path / "half"
    flux = Backbone.from_pretrained(folders["flux"], resolution=16)
    FluxTransformer2DModel.from_pretrained(folders["flux"] / "transformer").half().save_pretrained(half)
    with caplog.at_level(logging.INFO):
        loaded = flux.with_transformer(half)
        Backbone.from_pretrained(folders["flux"], transformer=half)
    assert "is stored as F16 and computes in float32 on the CPU" in caplog.text
    assert loaded.fingerprint_config()["dtype"] == "float32"
