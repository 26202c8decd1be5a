"""What a backbone is and costs, told from its configs alone."""

import functools
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from fake_hub import FakeHub, point_at, served
from huggingface_hub import constants
from published_configs import flux1_dev, qwen_image, sd35_large
from test_cli import probekit, refused
from tiny_families import all_pipelines
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from probekit.backbones import Backbone
from probekit.backbones.catalogue import FAMILIES
from probekit.backbones.counting import PROMPT
from probekit.backbones.plan import Plan, plan
from probekit.errors import ConfigError

PIPELINES = all_pipelines()
pytestmark = pytest.mark.filterwarnings("ignore:`LoraLoaderMixin` is deprecated:FutureWarning")  # by PRX's pipeline
RUN = ["sd3_t5", "flux", "qwen_image", "z_image", "sana", "hunyuan_dit", "aura_flow"]
BUILDERS = {"sd35-large": sd35_large, "flux1-dev": flux1_dev, "qwen-image": qwen_image}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Callable[[str, int], Plan]:
    folders = {name: build(tmp_path_factory.mktemp(name)) for name, build in BUILDERS.items()}
    return functools.cache(lambda name, resolution: plan(str(folders[name]), resolution=resolution))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("tiny")
    return functools.cache(lambda name: PIPELINES[name].build(root / name))


@pytest.mark.parametrize(
    ("name", "blocks", "width", "parameters", "gigabytes"),
    [
        ("sd35-large", {"transformer_blocks": 38}, 2432, 8.06e9, (11.2, 16.5)),
        ("flux1-dev", {"transformer_blocks": 19, "single_transformer_blocks": 38}, 3072, 11.9e9, (9.8, 24.0)),
        ("qwen-image", {"transformer_blocks": 60}, 3072, 20.4e9, (16.6, 41.1)),
    ],
)
def test_published_models(published, name, blocks, width, parameters, gigabytes):
    found = published(name, 512)
    assert found.blocks == blocks
    assert found.counts.width == width
    assert found.parts[0].parameters == pytest.approx(parameters, rel=0.005)
    assert [found.nbytes("text") / 1e9, found.nbytes("image") / 1e9] == pytest.approx(list(gigabytes), rel=0.01)
    assert found.facts()["weights_nbytes"]["peak"] == found.nbytes("image") < found.nbytes()
    assert len(found.layers) == sum(blocks.values()) + 1
    assert found.row_nbytes == len(found.layers) * width * 2


@pytest.mark.parametrize(
    ("name", "resolution", "tflop_of_a_pair"),
    [
        ("sd35-large", 512, 16.0),
        ("sd35-large", 1024, 62.0),
        ("flux1-dev", 512, 43.0),
        ("flux1-dev", 1024, 149.0),
        ("qwen-image", 512, 31.0),  # counted for a prompt of other length: its text is not padded
        ("qwen-image", 1024, 139.0),
    ],
)
def test_operations_of_published_models(published, name, resolution, tflop_of_a_pair):
    counts = published(name, resolution).counts
    assert counts.image_tokens == (resolution // 16) ** 2
    assert 2 * counts.flop_image / 1e12 == pytest.approx(tflop_of_a_pair, rel=0.025)
    if resolution == 512:
        assert 0.9e12 < counts.flop_text < 4.9e12
        assert 2.2e12 < 2 * counts.flop_vae < 3.6e12


def operations_with_weights(name: str, folder: Path) -> tuple[int, int, int]:
    """Count text encoders, transformer and VAE of a pipeline while it runs."""
    row = FAMILIES[PIPELINES[name].transformer, PIPELINES[name].pipeline]
    side = max(PIPELINES[name].size)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    marks = []

    class Done(BaseException):
        pass

    def after(*_: object) -> None:
        marks.append(counter.get_total_flops())
        raise Done

    pipe.transformer.register_forward_pre_hook(lambda *_: marks.append(counter.get_total_flops()))
    pipe.transformer.register_forward_hook(after)
    if row.sizes is not None:
        row.sizes(pipe, side, side)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, suppress(Done):
        pipe(prompt=PROMPT, height=side, width=side, num_inference_steps=2, output_type="latent", **row.call)
    frames = (1,) if "z_dim" in pipe.vae.config else ()
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as vae_counter:
        pipe.vae.encode(torch.zeros(1, 3, *frames, side, side))
    return marks[0], marks[1] - marks[0], vae_counter.get_total_flops()


@pytest.mark.parametrize("name", RUN)
def test_operations_are_those_of_the_running_pipeline(tiny, name):
    folder = tiny(name)
    counts = plan(str(folder), resolution=max(PIPELINES[name].size)).counts
    assert (counts.flop_text, counts.flop_image, counts.flop_vae) == operations_with_weights(name, folder)


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart_sigma", "prx", "lumina2"])
def test_the_plan_is_of_what_will_be_loaded(tiny, name):
    folder = tiny(name)
    found, backbone = plan(str(folder), dtype="float32"), Backbone.from_pretrained(folder)
    assert [found.layers, found.output_point] == [backbone.layers, backbone.output_point]
    assert found.resolution == backbone.size.resolution
    assert found.counts.width == backbone.width
    assert found.parts[0].parameters == backbone.n_parameters


@pytest.mark.parametrize("name", sorted(PIPELINES.keys() - {*RUN, "hidream"}))
def test_every_family_can_be_counted(tiny, name):
    counts = plan(str(tiny(name)), resolution=max(PIPELINES[name].size)).counts
    assert None not in astuple(counts)


def test_what_depends_on_weights_is_unknown(tiny):
    found = plan(str(tiny("hidream")))  # a mixture of experts: the router's values say which experts run
    assert found.counts.flop_image is None
    assert found.facts()["flop_image"] is None
    assert "transformer unknown" in dict(found.lines())["operations"]


def test_of_a_hub_id_configs_alone_are_fetched(tiny, tmp_path, monkeypatch):
    folder = tiny("flux")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    fake = FakeHub({40 * "a": files}, {"main": 40 * "a"})
    with served(fake) as endpoint:
        point_at(monkeypatch, endpoint)
        found = plan("owner/name")
    assert fake.fetched
    assert not [name for name in fake.fetched if name.endswith(".safetensors")]
    assert found.facts() == plan(str(folder)).facts() | {"model": "owner/name", "revision": 40 * "a"}


def test_refusals(tiny):
    folder = str(tiny("sd3"))
    with pytest.raises(ConfigError, match=r"resolution is 18; allowed for sd3: multiples of 4 up to 32"):
        plan(folder, resolution=18)
    with pytest.raises(ConfigError, match=r"dtype 'int8' is not known; allowed: float32"):
        plan(folder, dtype="int8")
    with pytest.raises(ConfigError, match="only hub ids have revisions"):
        plan(folder, revision="main")


def test_command_lists_families():
    done = probekit("backbones")
    assert done.returncode == 0
    for row in FAMILIES.values():
        mark = "" if row.tested else " (untested)"
        assert f"{row.transformer} in {row.pipeline}{mark}\n" in done.stdout
    rows = json.loads(probekit("backbones", "--json").stdout)
    assert {(row["transformer"], row["pipeline"]) for row in rows} == set(FAMILIES)


def test_command_describes_a_model(tiny):
    folder = tiny("flux")
    done = probekit("backbones", folder, "--resolution", 16)
    assert done.returncode == 0, done.stderr
    assert "FluxTransformer2DModel in FluxPipeline" in done.stdout
    assert "single_transformer_blocks" in done.stdout
    facts = json.loads(probekit("backbones", folder, "--resolution", 16, "--json").stdout)
    assert facts["n_blocks"] == 5
    assert facts["layers"][:2] == ["input of transformer_blocks.0", "transformer_blocks.0"]


def test_command_refuses_in_one_line(tiny, tmp_path):
    refused(probekit("backbones", tmp_path / "nowhere"), 1, "nowhere: no such folder, and not a hub id (owner/name)")
    refused(probekit("backbones", tmp_path), 1, "has no model_index.json")
    folder = shutil.copytree(tiny("sd3"), tmp_path / "unknown")
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace("SD3Transformer2DModel", "NoSuchModel"))
    refused(
        probekit("backbones", folder), 1, "transformer class 'NoSuchModel' is not known; known: ", "register_family"
    )
