"""Preference sets of the Hugging Face Hub, through ``datasets`` and a Hub on localhost."""

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from fake_hub import FakeHub, point_datasets_at, served
from huggingface_hub import constants
from test_cli import probekit, refused

from probekit.errors import PreferenceError
from probekit.preferences import load_preferences

datasets = pytest.importorskip("datasets")

COMMIT, OTHER = 40 * "a", 40 * "b"


def records(count, start=0, **more):
    return [{"prompt": f"p{i}", "path1": f"{i}a.png", "path2": f"{i}b.png"} | more for i in range(start, start + count)]


def json_file(rows):
    return json.dumps(rows).encode()


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch, cache) -> Iterator[FakeHub]:
    """Hold a set of HPDv3's shape with a training and a test file."""
    files = {"README.md": b"# A set\n", "train.json": json_file(records(6)), "test.json": json_file(records(3, 10))}
    fake = FakeHub({COMMIT: files}, {"main": COMMIT})
    with served(fake) as endpoint:
        point_datasets_at(monkeypatch, endpoint, cache)
        yield fake


def refusal(name="owner/name"):
    with pytest.raises(PreferenceError) as caught:
        load_preferences(name)
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    return message


def test_a_set_of_the_hub_is_downloaded_and_read(hub, monkeypatch, cache, caplog):
    caplog.set_level("INFO")
    prefs = load_preferences("owner/name")
    assert (len(prefs.pairs), (prefs.pairs["split"] == "test").sum()) == (9, 3)
    assert prefs.own_splits == ("train", "test")
    assert (str(prefs.path), prefs.name) == ("owner/name", "name")
    assert sorted(name for name in hub.fetched if name.endswith(".json")) == ["test.json", "train.json"]
    assert "read as hpdv3, by its fields" in caplog.text
    assert "6 pairs have no votes" in caplog.text
    assert prefs.notes == {"pairs have no votes (choice_dist): path1, the preferred image, has label 1": 9}
    # What was downloaded once is there without the Hub.
    point_datasets_at(monkeypatch, constants.ENDPOINT, cache, offline=True)
    hub.seen.clear()
    assert load_preferences("owner/name").pairs["pair_id"].tolist() == prefs.pairs["pair_id"].tolist()
    assert not hub.seen


def test_images_in_the_parquet_files_of_a_set_are_unpacked(hub, cache):
    images = [[{"bytes": bytes([10 * side + i]), "path": None} for i in range(2)] for side in range(2)]
    table = {"prompt": ["a", "b"], "image_a": images[0], "image_b": images[1], "label": [1.0, 0.0]}
    data = io.BytesIO()
    pd.DataFrame(table).to_parquet(data)
    parts = {f"data/{split}-00000-of-00001.parquet": data.getvalue() for split in ("validation", "validation_unique")}
    hub.commits[COMMIT] = {"README.md": b"# A set\n"} | parts
    prefs = load_preferences("owner/name")
    assert prefs.notes == {"parts are left out, since their pairs are in other parts too: validation_unique": 1}
    assert len(prefs.pairs) == 2
    prefs.unpack_images()
    assert all(cache in Path(path).parents for path in prefs.items["path"])
    assert {Path(path).read_bytes() for path in prefs.items["path"]} == {bytes([i]) for i in (0, 1, 10, 11)}


def test_a_set_that_is_not_there(hub):
    message = refusal("nobody/nothing")
    assert f"is not at {constants.ENDPOINT}/datasets/nobody/nothing, or private; check the name, or log in" in message


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_set(hub, status):
    hub.refused["/resolve/"] = (status, "GatedRepo")
    assert f"is gated; accept its terms at {constants.ENDPOINT}/datasets/owner/name and log in" in refusal()


def test_a_set_of_another_kind_or_without_data(hub):
    hub.commits[COMMIT] = {"README.md": b"# A set\n", "model.bin": b"x"}
    assert "datasets cannot open it" in refusal()
    hub.commits[OTHER] = {"README.md": b"# A set\n", "notes.txt": b"nothing\n"}
    hub.refs["main"] = OTHER
    with pytest.raises(PreferenceError, match=r"^owner/name/train: no column 'prompt' \(found: text\); needed: prompt"):
        load_preferences("owner/name")


def test_offline_without_the_set(monkeypatch, cache):
    point_datasets_at(monkeypatch, "http://127.0.0.1:9", cache, offline=True)
    assert "is not in the cache" in refusal()
    assert "and HF_HUB_OFFLINE is set; unset it to download, or give a file or folder" in refusal()


def test_no_network(monkeypatch, cache):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    point_datasets_at(monkeypatch, endpoint, cache)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    assert f"and {endpoint} cannot be reached; check the network, or give a file or folder" in refusal()


def test_from_the_shell_a_missing_set_is_one_line(hub):
    refused(probekit("lint", "nobody/nothing"), 1, "nobody/nothing: is not at")
