"""What is fetched from the Hub, and the one line that a user reads when it cannot be."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, point_at, served
from huggingface_hub import constants
from tiny_models import tiny_pipeline

from probekit.backbones import Backbone
from probekit.backbones.hub import Source, locate
from probekit.errors import BackboneError, ConfigError

OLD, NEW = 40 * "a", 40 * "b"
PIPELINE = {
    "_class_name": "AnyPipeline",
    "text_encoder": ["transformers", "AnyEncoder"],
    "text_encoder_2": [None, None],
    "tokenizer": ["transformers", "AnyTokenizer"],
    "transformer": ["diffusers", "AnyTransformer"],
    "scheduler": ["diffusers", "AnyScheduler"],
    "vae": ["diffusers", "AnyVAE"],
}
CONFIGS = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/spiece.model",
    "transformer/config.json",
    "vae/config.json",
}
SHARDS = {"text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors"}
OTHER_WEIGHTS = {"transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
NEVER = {  # single-file checkpoints, variants, pickles, code, and folders that are no component
    "README.md",
    "other.safetensors",
    "pipeline.py",
    "onnx/model.safetensors",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/modeling_any.py",
    "transformer/diffusion_pytorch_model.bin",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/deeper/model.safetensors",
    "vae/diffusion_pytorch_model.bin",
}


def files(commit: str) -> dict[str, bytes]:
    names = CONFIGS | SHARDS | OTHER_WEIGHTS | NEVER
    return {name: f"{name} {commit}".encode() for name in names} | {"model_index.json": json.dumps(PIPELINE).encode()}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    fake = FakeHub({OLD: files(OLD), NEW: files(NEW)}, {"main": NEW, "v1": OLD})
    with served(fake) as endpoint:
        point_at(monkeypatch, endpoint)
        yield fake


def found(revision: str | None = None, *, without_transformer: bool = False, weights: bool = True) -> Source:
    return locate("owner/name", revision=revision, without_transformer=without_transformer, weights=weights)


def on_disk(source: Source) -> set[str]:
    return {path.relative_to(source.folder).as_posix() for path in source.folder.rglob("*") if path.is_file()}


def refusal(model_id: str = "owner/name", **options: object) -> str:
    with pytest.raises(BackboneError) as caught:
        locate(model_id, **({"revision": None, "without_transformer": False} | options))
    message = str(caught.value)
    assert message.startswith(f"{model_id}: ")
    assert "\n" not in message
    return message


def test_fetches_configs_and_one_copy_of_the_safetensors(hub):
    source = found()
    assert on_disk(source) == CONFIGS | SHARDS | OTHER_WEIGHTS
    assert source.name == "name"
    assert source.component("vae") == ("diffusers", "AnyVAE")
    assert source.component("text_encoder_2") == (None, None)


def test_without_weights_no_safetensors_travel(hub):
    assert on_disk(found(weights=False)) == CONFIGS


def test_a_transformer_of_ones_own_leaves_the_base_s_on_the_hub(hub):
    kept = {name for name in CONFIGS | SHARDS | OTHER_WEIGHTS if not name.startswith("transformer/")}
    assert on_disk(found(without_transformer=True)) == kept


def test_shards_win_over_a_whole_file_beside_them(hub):
    hub.commits[NEW]["text_encoder/model.safetensors"] = b"the same again"
    assert on_disk(found()) == CONFIGS | SHARDS | OTHER_WEIGHTS


def test_nothing_is_fetched_twice(hub):
    found()
    hub.fetched.clear()
    found()
    assert not hub.fetched


@pytest.mark.parametrize(("revision", "commit"), [(None, NEW), ("main", NEW), ("v1", OLD), (OLD, OLD)])
def test_a_branch_or_tag_is_recorded_as_its_commit_also_from_the_cache(hub, monkeypatch, revision, commit):
    online = found(revision)
    assert online.revision == commit
    assert (online.folder / "vae/config.json").read_text().endswith(commit)
    point_at(monkeypatch, constants.ENDPOINT, offline=True)
    hub.seen.clear()
    assert found(revision) == online
    assert not hub.seen


def test_a_branch_that_moved_is_followed(hub):
    assert found("v1").revision == OLD
    hub.refs["v1"] = NEW
    assert found("v1").revision == NEW


@pytest.mark.parametrize("where", ["/resolve/", "/api/models/"])
@pytest.mark.parametrize("status", [401, 403])
def test_gated(hub, where, status):
    hub.refused[where] = (status, "GatedRepo")
    assert f"is gated; accept its licence at {constants.ENDPOINT}/owner/name and log in with HF_TOKEN" in refusal()


def test_missing_model(hub):
    assert "is not at" in refusal("nobody/nothing")
    assert "check the name, or log in with HF_TOKEN" in refusal("nobody/nothing")


def test_missing_revision(hub):
    assert "has no revision 'v9'; allowed: its branches, tags and commits" in refusal(revision="v9")
    assert f"has no revision '{40 * 'c'}'" in refusal(revision=40 * "c")


def test_a_hub_that_fails(hub):
    hub.refused["/api/models/"] = (418, "")
    assert "cannot be had from the Hub" in refusal()


def test_not_a_diffusers_repository(hub):
    del hub.commits[NEW]["model_index.json"]
    assert "has no model_index.json; allowed: repositories in diffusers' folder layout" in refusal()
    assert not hub.fetched


def test_only_pickles_or_variants(hub):
    del hub.commits[NEW]["vae/diffusion_pytorch_model.safetensors"]
    message = refusal()
    assert (
        "the repository holds no complete safetensors of vae, only diffusion_pytorch_model.bin; pickles and" in message
    )
    assert hub.fetched == ["model_index.json"]
    assert found(weights=False).revision == NEW


def test_a_missing_shard_and_a_missing_component(hub):
    del hub.commits[NEW]["text_encoder/model-00002-of-00002.safetensors"]
    assert "no complete safetensors of text_encoder" in refusal()
    del hub.commits[NEW]["scheduler/scheduler_config.json"]
    assert "the repository holds nothing of scheduler" in refusal(weights=False)


def test_offline_without_the_model(monkeypatch, cache):
    point_at(monkeypatch, "http://127.0.0.1:9", offline=True)
    assert (
        f"is not in the cache {cache}, and HF_HUB_OFFLINE is set; unset it to download, or give a folder" in refusal()
    )


def test_offline_with_another_revision_or_half_of_it(hub, monkeypatch):
    found("v1", weights=False)
    point_at(monkeypatch, constants.ENDPOINT, offline=True)
    assert found("v1", weights=False).revision == OLD
    assert "is not in the cache" in refusal()
    assert "at revision 'v2'" in refusal(revision="v2")
    message = refusal(revision="v1")
    assert f"the cache, commit {OLD} (HF_HUB_OFFLINE is set) holds no complete safetensors of text_encoder" in message


def test_no_network(hub, monkeypatch, cache):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    found("v1")
    point_at(monkeypatch, endpoint)
    assert f"is not in the cache {cache}, and {endpoint} cannot be reached; check the network, or" in refusal()
    assert found("v1").revision == OLD  # the cache will do


def test_a_backbone_of_the_hub_names_its_commit(hub, monkeypatch, tmp_path):
    folder = tiny_pipeline(tmp_path / "tiny")
    hub.commits[OLD] = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    } | {"vae/diffusion_pytorch_model.bin": b"a pickle"}
    online = Backbone.from_pretrained("owner/name", revision="v1")
    assert (online.name, online.model_id, online.revision) == ("name", "owner/name", OLD)
    assert not [name for name in hub.fetched if name.endswith(".bin")]
    point_at(monkeypatch, constants.ENDPOINT, offline=True)
    offline = Backbone.from_pretrained("owner/name", revision="v1")
    assert offline.fingerprint_config() == online.fingerprint_config()
    assert online.fingerprint_config()["revision"] == OLD


@pytest.mark.parametrize("model_id", ["nowhere", "./a/b", "/a/b", "a/b/c", "a b/c", "owner/name.."])
def test_neither_a_folder_nor_an_id(hub, model_id):
    assert "no such folder, and not a hub id (owner/name)" in refusal(model_id)
    assert not hub.seen


def test_a_folder_needs_an_index_and_no_revision(tmp_path):
    with pytest.raises(BackboneError, match=r"has no model_index\.json"):
        locate(str(tmp_path), revision=None, without_transformer=False)
    with pytest.raises(ConfigError, match="only hub ids have revisions"):
        locate(str(tmp_path), revision="main", without_transformer=False)
