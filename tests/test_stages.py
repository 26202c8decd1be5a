"""What is in memory when, what runs how often, and what happens when memory does not suffice.

Text encoders, then VAE and transformer: peak memory is that of the larger stage. Each prompt is embedded once, each
image encoded once.
"""

import functools
import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FirstBlockCacheConfig, SD3Transformer2DModel, apply_first_block_cache
from tiny_families.flux_kind import PIPELINES as FLUX
from tiny_families.pixart_kind import PIPELINES as PIXART
from tiny_models import tiny_pipeline
from tiny_prefs import write_rankings
from transformers import CLIPTextModelWithProjection, T5EncoderModel

import probekit
from probekit.backbones import Backbone, latents, loading, noise, prompts
from probekit.errors import BackboneError, ConfigError, DeviceMemoryError

PROMPTS = ["a red dog", "tree", "a blue cat", "tree", "tree"]
SHAPE = (4, 8, 8)
IMAGE_STAGE = ("vae", "transformer")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def prefs(tmp_path_factory: pytest.TempPathFactory) -> probekit.PreferenceSet:
    rankings = {"a red dog": 4, "tree": 3, "a blue cat": 2, "9 birds": 2}
    return probekit.load_preferences(write_rankings(tmp_path_factory.mktemp("prefs") / "set", rankings))


def features(of: Backbone, **options: Any) -> dict[tuple[str, int], np.ndarray]:
    clean = list(torch.randn(len(PROMPTS), *SHAPE, generator=torch.Generator().manual_seed(0)))
    eps = [noise(0, prompt, 0, SHAPE) for prompt in PROMPTS]
    wanted = of.wanted(["mean", "text_mean"], [point.index for point in of.layers])
    return of.features(clean, PROMPTS, **{"sigma": "0.05", "eps": eps, "wanted": wanted, "batch_size": 4} | options)


class Memory:
    """Bytes of all parameters that are alive, after each model is loaded; nothing is collected in between."""

    def __init__(self) -> None:
        self.after: list[tuple[str, int]] = []
        self.size: dict[str, int] = {}

    def see(self, name: str, model: Any) -> None:
        self.size[name] = sum(parameter.nbytes for parameter in model.parameters())
        self.after.append((name, self.allocated()))

    @staticmethod
    def allocated() -> int:
        modules = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Module)]
        weights = [weight for module in modules for weight in module.parameters(recurse=False) if not weight.is_meta]
        return sum({weight.untyped_storage().data_ptr(): weight.nbytes for weight in weights}.values())

    @property
    def stages(self) -> tuple[int, int]:
        """Bytes of the text encoders, and of VAE and transformer."""
        image = [size for name, size in self.size.items() if name in IMAGE_STAGE]
        return sum(self.size.values()) - sum(image), sum(image)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    found, load = Memory(), loading._load_model

    def seen(cls: type, folder: Path, dtype: torch.dtype) -> Any:
        model = load(cls, folder, dtype)
        found.see(folder.name, model)
        return model

    monkeypatch.setattr(loading, "_load_model", seen)
    gc.collect()
    before = found.allocated()
    monkeypatch.setattr(found, "allocated", lambda: Memory.allocated() - before)
    gc.disable()  # what is freed late, by the collector, is not freed
    try:
        yield found
    finally:
        gc.enable()


@pytest.mark.parametrize("text_stages", ["one", "several"])
def test_peak_memory_of_a_dump_is_that_of_the_larger_stage(
    base: Path,
    prefs: probekit.PreferenceSet,
    memory: Memory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text_stages: str,
) -> None:
    monkeypatch.setattr("probekit.dump.plan.rows_per_shard", lambda **_: 4)
    if text_stages == "several":
        monkeypatch.setattr(prompts, "PROMPT_BYTES", 1)
        base = PIXART["pixart_sigma"].build(tmp_path / "base")  # embeds one prompt at a time
    loaded = Backbone.from_pretrained(base, resolution=16)
    probekit.dump_features(loaded, prefs, tmp_path / "store", sigmas=["0.005", "0.1"])
    text, image = memory.stages
    assert text > 0
    peaks = {kind: max(allocated for of, allocated in memory.after if (of in IMAGE_STAGE) == kind) for kind in (0, 1)}
    assert peaks == {0: text, 1: image}
    assert [name for name, _ in memory.after].count("text_encoder") == (
        2 if text_stages == "one" else 3
    )  # first one prompt, for the self-test


def test_two_transformers_of_one_base_are_never_in_memory_at_once(base: Path, memory: Memory) -> None:
    first = Backbone.from_pretrained(base)
    second = first.with_transformer()
    features(first)
    features(second)
    second.prompts.embed(["another prompt"])
    features(first)
    text, _ = memory.stages
    assert [name for name, _ in memory.after].count("transformer") == 3
    assert {allocated for name, allocated in memory.after if name == "transformer"} == {memory.size["transformer"]}
    assert max(allocated for name, allocated in memory.after if name == "text_encoder_2") == text
    del first
    assert memory.allocated() == 0


class Calls:
    """How often the models of a pipeline run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.text = self.images = 0
        self.encoded: list[int] = []

        def counted(forward: Any) -> Any:
            def text(*args: Any, **kwargs: Any) -> Any:
                self.text += 1
                return forward(*args, **kwargs)

            return text

        for encoder in (CLIPTextModelWithProjection, T5EncoderModel):
            monkeypatch.setattr(encoder, "forward", functools.wraps(encoder.forward)(counted(encoder.forward)))
        run = SD3Transformer2DModel.forward

        @functools.wraps(run)
        def images(*args: Any, **kwargs: Any) -> Any:
            self.images += len(kwargs["hidden_states"])
            return run(*args, **kwargs)

        monkeypatch.setattr(SD3Transformer2DModel, "forward", images)
        encode = latents.encode

        def encoded(vae: Any, rule: str, pixels: torch.Tensor, batch: int) -> torch.Tensor:
            self.encoded.append(len(pixels))
            return encode(vae, rule, pixels, batch)

        monkeypatch.setattr(latents, "encode", encoded)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


SELF_TEST = 3  # images


def test_a_ranking_of_9_images_runs_9_images_and_one_text_encoding(base: Path, calls: Calls, tmp_path: Path) -> None:
    prefs = probekit.load_preferences(write_rankings(tmp_path / "prefs", {"a red dog": 9}))
    assert len(prefs.pairs) == 36
    loaded = Backbone.from_pretrained(base)
    store = probekit.dump_features(loaded, prefs, tmp_path / "store", sigmas=["0"], batch_size=4)
    assert (calls.images, calls.text, sum(calls.encoded)) == (SELF_TEST + 9, 2, 9)  # two text encoders
    assert len(store.pairs(split="train").label) == 36
    probekit.dump_features(loaded, prefs, tmp_path / "store", sigmas=["0"], batch_size=4)
    assert (calls.images, calls.text, sum(calls.encoded)) == (SELF_TEST + 9, 2, 9)


def test_sigmas_draws_and_blocks_share_prompts_and_latents(
    prefs: probekit.PreferenceSet, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("probekit.dump.plan.rows_per_shard", lambda **_: 4)
    loaded = Backbone.from_pretrained(PIXART["pixart_sigma"].build(tmp_path / "base"), resolution=16)
    store = probekit.dump_features(loaded, prefs, tmp_path / "store", sigmas=["0", "0.05", "0.1"], draws=2)
    assert (calls.text, sum(calls.encoded)) == (4, 11)
    assert len(store.coordinates) == 5  # of sigma 0, no further draws
    assert len(list((tmp_path / "store").rglob("*.h5"))) == 5 * 3


def test_prompts_are_embedded_once_where_memory_is_short(
    prefs: probekit.PreferenceSet,
    calls: Calls,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("probekit.dump.plan.rows_per_shard", lambda **_: 4)
    monkeypatch.setattr(prompts, "PROMPT_BYTES", 1)
    loaded = Backbone.from_pretrained(PIXART["pixart_sigma"].build(tmp_path / "base"), resolution=16)
    probekit.dump_features(loaded, prefs, tmp_path / "store", sigmas=["0"])
    assert calls.text == 4
    assert "prompts are embedded later: a cache folder holds them all at once" in caplog.text
    loaded.prompts.embed(["one", "two"])
    loaded.prompts.embed(["two", "three"])  # as a prompt whose images lie in two blocks
    assert calls.text == 4 + 3


def test_with_a_full_cache_only_the_transformer_is_loaded(
    base: Path, prefs: probekit.PreferenceSet, memory: Memory, tmp_path: Path
) -> None:
    for number in range(2):
        loaded = Backbone.from_pretrained(base, cache=tmp_path / "cache")
        probekit.dump_features(loaded, prefs, tmp_path / f"store {number}")
        names = [name for name, _ in memory.after]
        text = ["text_encoder", "text_encoder_2"]
        # first the self-test on one prompt, then all prompts
        assert names == (["transformer"] if number else ["vae", *text, "transformer", *text, "transformer"])
        memory.after.clear()


# --- offloading, compiling, step caches


def test_group_offloading_gives_the_same_features(base: Path) -> None:
    plain, offloaded = Backbone.from_pretrained(base), Backbone.from_pretrained(base, offload="group")
    half = [("mean", 1)]
    for options in ({}, {"wanted": half}, {}):
        expected, found = features(plain, **options), features(offloaded, **options)
        assert all(np.array_equal(values, found[place]) for place, values in expected.items())
    assert offloaded.fingerprint_config() == plain.fingerprint_config()


def test_a_transformer_that_cannot_be_offloaded_is_refused(tmp_path: Path) -> None:
    loaded = Backbone.from_pretrained(PIXART["hunyuan_dit"].build(tmp_path / "base"), offload="group")
    with pytest.raises(ConfigError, match="offload is 'group'; allowed for HunyuanDiT2DModel: none"):
        loaded._passes.load("tree", torch.Size(SHAPE))


@pytest.mark.parametrize("offload", ["none", "group"])
def test_compiled_blocks_give_the_same_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: Literal["none", "group"]
) -> None:
    """With a backend that generates no code, in seconds; graphs, hooks and early exit are those of any other."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    base = tiny_pipeline(tmp_path / "base", n_blocks=3)
    plain = Backbone.from_pretrained(base, max_tokens=0)
    compiled = Backbone.from_pretrained(base, max_tokens=0, compile=True, offload=offload)
    for options in ({}, {"wanted": [("mean", 1)]}, {}):
        expected, found = features(plain, **options), features(compiled, **options)
        for place, values in expected.items():
            assert np.abs(values - found[place]).max() <= 1e-6 * np.abs(values).max()
    assert graphs


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_step_caches_are_refused(base: Path, tmp_path: Path, family: str) -> None:
    loaded = Backbone.from_pretrained(base if family == "sd3" else FLUX["flux"].build(tmp_path / "flux"), resolution=16)
    before = features(loaded)
    config = FirstBlockCacheConfig(threshold=0.5)
    if family == "flux":
        loaded.stages.transformer.enable_cache(config)
    else:
        apply_first_block_cache(loaded.stages.transformer, config)
    with pytest.raises(BackboneError, match=r"Transformer2DModel has the hook 'fbc_\w+' on .*; a step cache .* remove"):
        features(loaded)
    assert all(np.array_equal(values, before[place]) for place, values in features(loaded).items())  # loaded anew


# --- memory that does not suffice


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let the transformer's last block fail with more than `most` images; the sizes that were tried."""
    tried: list[int] = []
    run = SD3Transformer2DModel.forward

    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        k = len(kwargs["hidden_states"])
        if torch.is_inference_mode_enabled():  # and not the self-test
            tried.append(k)
            if k > most:
                msg = "CUDA out of memory. Tried to allocate 20.00 MiB."
                raise torch.OutOfMemoryError(msg)
        return run(*args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", forward)
    return tried


@pytest.mark.parametrize(("most", "sizes"), [(3, [4, 2]), (1, [4, 2, 1])])
def test_batches_are_halved_where_memory_is_short(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, most: int, sizes: list[int]
) -> None:
    plain = features(Backbone.from_pretrained(base, max_tokens=0))
    tried = short_of_memory(monkeypatch, most)
    done: list[int] = []
    backbone = Backbone.from_pretrained(base, max_tokens=0)
    found = features(backbone, on_batch=done.append)
    features(backbone)  # remembers what the device holds
    for place, values in plain.items():
        assert np.abs(values - found[place]).max() <= 1e-6 * max(1, np.abs(values).max())
    assert sum(done) == len(PROMPTS)
    assert max(done) <= most
    logged = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert logged == [
        f"out of memory with {large} images a forward pass; going on with {small}"
        for large, small in itertools.pairwise(sizes)
    ]
    assert [size for size in tried if size > most] == sizes[:-1]  # nothing too large is tried twice


def test_one_image_that_does_not_fit_is_one_clear_line(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, 0)
    with pytest.raises(DeviceMemoryError) as caught:
        features(Backbone.from_pretrained(base))
    assert str(caught.value) == (
        "base: out of memory on cpu with one image of 16 x 16 pixels; "
        "try --offload group, --dtype bfloat16 or a smaller --resolution"
    )


def test_what_cannot_be_measured_for_want_of_memory_does_not_stop_a_dump(
    base: Path, prefs: probekit.PreferenceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SD3Transformer2DModel.forward

    @functools.wraps(run)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.proj_out.weight.dtype == torch.float32:
            raise torch.OutOfMemoryError
        return run(self, *args, **kwargs)

    loaded = Backbone.from_pretrained(base, dtype="bfloat16")
    expected = features(loaded)
    monkeypatch.setattr(SD3Transformer2DModel, "forward", forward)
    store = probekit.dump_features(loaded, prefs, tmp_path / "store")
    assert len(store.rows) == 11
    assert store.sigma_resolution["0.005"]["note"].startswith("not measured: the transformer does not fit")
    assert all(np.array_equal(values, expected[place]) for place, values in features(loaded).items())


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        (AutoencoderKL, "encode", "out of memory on cpu with the VAE and images of 16 x 16 pixels; try --dtype"),
        (CLIPTextModelWithProjection, "forward", "out of memory on cpu with the text encoders; try --dtype bfloat16"),
        (CLIPTextModelWithProjection, "to", "out of memory on cpu with the text encoders; try --dtype bfloat16"),
        (SD3Transformer2DModel, "to", "out of memory on cpu with the transformer; try --offload group"),
    ],
)
def test_stages_that_do_not_fit_are_one_clear_line(
    base: Path,
    prefs: probekit.PreferenceSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    method: str,
    message: str,
) -> None:
    loaded = Backbone.from_pretrained(base)

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, method, functools.wraps(getattr(model, method))(fails))
    with pytest.raises(DeviceMemoryError, match=message) as caught:
        probekit.dump_features(loaded, prefs, tmp_path / "store")
    assert "\n" not in str(caught.value)
