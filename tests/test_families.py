"""Property tests of every family that is not labelled untested, on tiny pipelines with random weights.

They need no reference implementation: a slice, a latent, a batch or an early exit that were wrong would show as a
difference between two runs that must be equal. Some families are also compared with a forward written by hand.
"""

import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_families import Builder, all_pipelines
from tiny_prefs import write_rankings

from probekit import dump_features, load_preferences
from probekit.backbones import Backbone, noise
from probekit.backbones.batching import Layout
from probekit.backbones.capture import POOLINGS, pooled_layers
from probekit.backbones.catalogue import FAMILIES
from probekit.backbones.conditioning import _one_step
from probekit.backbones.latents import mix

PIPELINES = all_pipelines()
PROMPTS = ["a red dog", "a red dog", "a blue cat, left of 2 birds", "tree", "tree", "tree"]
SIGMA = "0.05"

families = pytest.mark.parametrize("name", PIPELINES)
pytestmark = [  # diffusers' warnings of its own parts
    pytest.mark.filterwarnings("ignore:`LoraLoaderMixin` is deprecated:FutureWarning"),  # PRX's pipeline
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # Chroma's transformer
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # Ideogram4's pipeline
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: PIPELINES[name].build(root / name))


@pytest.fixture(scope="session")
def backbones(folders: Any) -> Any:
    return functools.cache(lambda name: Loaded(PIPELINES[name], folders(name)))


class Loaded:
    """A backbone on rows of six images of three prompts, and its features."""

    def __init__(self, builder: Builder, folder: Path) -> None:
        self.builder, self.folder = builder, folder
        self.height, self.width = builder.size
        self.backbone = Backbone.from_pretrained(folder, resolution=max(builder.size), max_tokens=builder.max_tokens)
        self.shape = self.backbone._latent_shape(self.height, self.width)
        generator = torch.Generator().manual_seed(3)
        self.latents = [torch.randn(*self.shape, generator=generator) for _ in PROMPTS]
        self.eps = [noise(0, prompt, 0, self.shape) for prompt in PROMPTS]
        poolings = [name for name in POOLINGS if name != "text_mean" or self.backbone._text_layers]
        self.all = self.backbone.wanted(poolings, [point.index for point in self.backbone.layers])
        self.all += self.backbone.wanted(["mean"], [self.backbone.output_point.index])
        self.features = self.run()

    def run(self, rows: list[int] | None = None, **options: Any) -> dict[tuple[str, int], np.ndarray]:
        rows = list(range(len(PROMPTS))) if rows is None else rows
        prompts = options.pop("prompts", [PROMPTS[row] for row in rows])
        backbone = options.pop("backbone", self.backbone)
        settings = {"sigma": SIGMA, "wanted": self.all, "batch_size": 4} | options
        return backbone.features(
            [self.latents[row] for row in rows], prompts, eps=[self.eps[row] for row in rows], **settings
        )

    def close(self, a: np.ndarray, b: np.ndarray, pooling: str = "mean") -> bool:
        # padding makes many text tokens alike, and so are their rounding errors: a mean over them keeps these
        tolerance = self.builder.tolerance * (5 if pooling == "text_mean" else 1)
        return bool(np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b))


@families
def test_blocks_do_something(name: str, backbones: Any) -> None:
    """Gates that a constructor zeroes would make blocks identities, and every other test vacuous."""
    loaded = backbones(name)
    layers = [loaded.features["mean", point.index] for point in loaded.backbone.layers]
    assert loaded.backbone.n_blocks >= 2
    for values, before in zip(layers[1:], layers[:-1], strict=True):
        assert np.isfinite(values).all()
        assert np.abs(values - before).max() > 1e-3
    assert layers[0].shape == (len(PROMPTS), loaded.backbone.width)
    assert loaded.features["grid4", 1].shape[1] == 16 * loaded.features["mean", 1].shape[1]


@families
def test_features_depend_on_image_text_and_noise_level(name: str, backbones: Any) -> None:
    loaded = backbones(name)
    last = loaded.backbone.n_blocks
    here = loaded.features["mean", last]
    assert not np.allclose(here[3], here[4], atol=1e-5), "two images of one prompt"
    other = loaded.run(prompts=["a blue cat", *PROMPTS[1:]])["mean", last]
    assert not np.allclose(other[0], here[0], atol=1e-5), "two prompts of one image"
    assert loaded.close(other[1:], here[1:])
    noisy = loaded.run(sigma="0.5", wanted=[("mean", last)])["mean", last]
    assert not np.allclose(noisy, here, atol=1e-5)


@families
def test_layer_0_sees_the_image_and_not_the_text(name: str, backbones: Any) -> None:
    loaded = backbones(name)
    other = loaded.run([0], prompts=["a blue cat"])
    assert loaded.close(other["mean", 0], loaded.features["mean", 0][:1])


@families
def test_collated_prompts_equal_single_ones_in_any_order_and_batch_size(name: str, backbones: Any) -> None:
    loaded = backbones(name)
    order = [3, 4, 5, 0, 1, 2]
    runs = [loaded.run(batch_size=size) for size in (1, 2, 8)]
    moved = loaded.run(order)
    single = [loaded.run([row]) for row in range(len(PROMPTS))]
    for place, values in loaded.features.items():
        assert all(loaded.close(run[place], values, place[0]) for run in runs), place
        assert loaded.close(moved[place], values[order], place[0]), place
        assert loaded.close(np.stack([alone[place][0] for alone in single]), values, place[0]), place


@families
def test_early_exit_equals_the_full_run(name: str, backbones: Any) -> None:
    loaded = backbones(name)
    backbone, half = loaded.backbone, loaded.backbone.n_blocks // 2
    ran = []
    handles = [
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, (_, block, _) in enumerate(backbone._family.modules(backbone.stages.transformer), start=1)
    ]
    part = loaded.run(wanted=[("mean", half)])
    for handle in handles:
        handle.remove()
    assert np.array_equal(part["mean", half], loaded.features["mean", half])
    assert max(ran) == half
    assert not any(block._forward_hooks for _, block, _ in backbone._family.modules(backbone.stages.transformer))


@families
def test_replay_without_encoders_equals_the_plain_pipeline(name: str, backbones: Any) -> None:
    """The pipeline with its encoders prepares the same inputs for k images as the one that replays embeddings."""
    loaded = backbones(name)
    backbone, k = loaded.backbone, 3
    images = torch.stack(loaded.latents[:k])
    replayed, layout = backbone._passes.prepare("tree", images, SIGMA)
    assert isinstance(layout, Layout)
    assert layout.n_images(replayed) == k
    encoders = [part for part in backbone._conditioner.pipe.components if part.startswith("text_encoder")]
    assert all(
        next(getattr(backbone._conditioner.pipe, part).parameters()).is_meta
        for part in encoders
        if getattr(backbone._conditioner.pipe, part) is not None
    )
    with backbone.stages.text_encoders():
        plain = backbone._conditioner._caught(backbone._conditioner._encode_prompt, "tree", images, SIGMA)
    grid = backbone._passes.grid(loaded.shape)
    features = [
        pooled_layers(backbone.stages.transformer, backbone._family, call, wanted=loaded.all, grid=grid)
        for call in (replayed, plain)
    ]
    for place, values in features[0].items():
        if backbone._family.text_batch == 1:
            assert torch.equal(values, features[1][place]), place
        else:  # the encoders saw the prompt among others
            assert loaded.close(values.numpy(), features[1][place].numpy(), place[0]), place


@families
def test_a_dump_of_pictures_of_several_shapes_equals_one_image_at_a_time(
    name: str, backbones: Any, tmp_path: Path
) -> None:
    """The whole line from files to a store: values, and not only that it runs."""
    loaded = backbones(name)
    side = loaded.builder.size[0]
    sizes = ((2 * side, side), (side, 2 * side))
    prefs = load_preferences(write_rankings(tmp_path / "pairs", {"a red dog": 2, "tree": 2}, sizes))
    options = {"resize": loaded.builder.resize, "max_tokens": loaded.builder.max_tokens}
    backbone = Backbone.from_pretrained(loaded.folder, resolution=side, **options)
    stores = [
        dump_features(backbone, prefs, tmp_path / str(batch_size), sigmas=[SIGMA], batch_size=batch_size)
        for batch_size in (1, 4)
    ]
    assert stores[0].rows["status"].eq(0).all()
    assert stores[0].describe["family_tested"]
    assert stores[0].sigma_resolution[SIGMA]["ratio"] > 0
    for point in loaded.backbone.layers:
        one, four = (store.read(layer=point.index) for store in stores)
        assert len(one) == 4
        # stored in float16, so a last bit of rounding may fall to the other side
        assert np.linalg.norm(one - four) <= 2e-4 * np.linalg.norm(one)


@families
def test_latents_are_what_the_pipelines_own_decoding_undoes(name: str, backbones: Any, tmp_path: Path) -> None:
    """With a scheduler that changes nothing and a transformer that is not asked, the pipeline decodes the image."""
    loaded = backbones(name)
    backbone, side = loaded.backbone, loaded.backbone.size.resolution
    picture = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    (image,) = next(backbone.latents([[(path, hashlib.sha256(path.read_bytes()).digest())]]))
    latent = image.latents
    assert tuple(latent.shape) == backbone._latent_shape(side, side)
    decoded = decode_as_the_pipeline(loaded, latent)
    vae = backbone._base.load("vae", backbone.stages.without_weights["vae"])
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    expected = reconstruct(vae, pixels)
    assert decoded.shape == expected.shape
    assert np.abs(decoded - expected).max() <= 2e-4


def reconstruct(vae: Any, pixels: torch.Tensor) -> np.ndarray:
    """Decode the posterior mode of an image, as (1, H, W, 3) in [0, 1]."""
    if vae.config.get("in_channels", 3) == 4:
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
    with torch.no_grad():
        found = vae.encode(pixels.unsqueeze(2) if "z_dim" in vae.config else pixels)
        mode = found.latent_dist.mode() if "latent_dist" in found else found.latent
        image = vae.decode(mode).sample
    image = image[:, :, 0] if image.ndim == 5 else image
    return (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)[..., :3].numpy()


class Step(NamedTuple):
    """What a scheduler's step returns, by place or by name."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


def decode_as_the_pipeline(loaded: Loaded, latent: torch.Tensor) -> np.ndarray:
    """Run an ordinary pipeline whose scheduler returns the latents that it was given, to (1, H, W, 3) in [0, 1]."""
    pipe = DiffusionPipeline.from_pretrained(loaded.folder, **missing_parts(loaded.folder))
    family, side = loaded.backbone._family, loaded.backbone.size.resolution
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = _one_step(pipe.scheduler)
    pipe.scheduler.only_timestep = 0.0
    pipe.scheduler.step = lambda _output, _t, sample, **_: Step(sample, sample)
    if family.sizes is not None:
        family.sizes(pipe, side, side)
    latents = latent[None] if family.pack is None else family.pack(pipe, latent[None])
    result = pipe(
        prompt="tree",
        height=side,
        width=side,
        num_inference_steps=1,
        latents=latents,
        output_type="np",
        **family.call,
    )
    image = result[0] if isinstance(result, tuple) else result.images if "images" in result else result.image
    return np.asarray(image)[..., :3]


def missing_parts(folder: Path) -> dict[str, None]:
    """Name the components that were saved as null; diffusers wants them passed."""
    index = json.loads((folder / "model_index.json").read_text())
    return {name: None for name, entry in index.items() if entry == [None, None]}


@pytest.mark.parametrize("name", [name for name, builder in PIPELINES.items() if builder.by_hand is not None])
def test_features_equal_a_forward_written_by_hand(name: str, backbones: Any) -> None:
    loaded = backbones(name)
    parts = DiffusionPipeline.from_pretrained(loaded.folder, **missing_parts(loaded.folder)).components
    rows = [3, 4]
    noisy = torch.stack(
        [mix(loaded.latents[r], loaded.eps[r], SIGMA, noise=loaded.backbone._family.noise) for r in rows]
    )
    with torch.no_grad():
        expected = loaded.builder.by_hand(parts, "tree", noisy, float(SIGMA))
    assert len(expected) == loaded.backbone.n_blocks + 1
    for layer, values in enumerate(expected):
        assert loaded.close(loaded.features["mean", layer][rows], values.numpy()), layer


def test_every_row_is_tested_or_says_that_it_is_not() -> None:
    tested = {(builder.transformer, builder.pipeline) for builder in PIPELINES.values()}
    assert {key for key, row in FAMILIES.items() if row.tested} == tested
    assert sum(builder.by_hand is not None for builder in PIPELINES.values()) >= 10


def test_a_class_that_only_its_pipeline_knows_is_found_in_a_fresh_process(folders: Any) -> None:
    """Here other tests have imported the text encoder of PRX; transformers does not export it."""
    command = [sys.executable, "-m", "probekit", "backbones", str(folders("prx")), "--resolution", "16", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pipeline"] == "PRXPipeline"
