"""Dumps with bad rows, of several workers, and said beforehand: nothing is lost, and everything is counted."""

import json
import logging
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli import probekit, refused, tree
from test_dump import feature_bytes

import probekit as pk
from probekit.backbones import Backbone
from probekit.dump.run import dump_features
from probekit.dump.workers import local_device, worker_of
from probekit.errors import ConfigError, ImageError
from probekit.playground import base_folder, models
from probekit.store import FeatureStore

ROWS = 16
"""Rows of a shard here."""


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.from_pretrained(base_folder(), transformer=models()[0].folder, max_tokens=0, device="cpu")


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("probekit.dump.plan.rows_per_shard", lambda **_: ROWS)


@pytest.fixture
def damaged(pairs, tmp_path) -> tuple[Path, list[str]]:
    """A copy of the pairs in which one picture is missing, one is cut in half and one is empty."""
    folder = tmp_path / "damaged"
    shutil.copytree(pairs.parent, folder)
    images = sorted(folder.rglob("*.png"))[3:30:10]
    images[0].unlink()
    images[1].write_bytes(images[1].read_bytes()[: images[1].stat().st_size // 2])
    images[2].write_bytes(b"")
    return folder / pairs.name, [str(path.relative_to(folder)) for path in images]


def test_by_default_no_row_may_be_bad(backbone, damaged, tmp_path):
    path, (missing, half, _) = damaged
    prefs = pk.load_preferences(path)
    with pytest.raises(ImageError, match=rf"1 image files are missing: \S*{missing}; .* allowed: a share of 0 "):
        dump_features(backbone, prefs, tmp_path / "store")
    shutil.copy(path.parent / half.replace("-1.", "-0."), path.parent / missing)
    with pytest.raises(ImageError, match=r"3 of 224 rows have no features .* allowed: a share of 0 \(--max-bad\); "):
        dump_features(backbone, prefs, tmp_path / "store")
    assert not list((tmp_path / "store").rglob("*.h5"))


def test_bad_rows_get_a_status_and_their_pairs_are_counted(backbone, damaged, small_shards, tmp_path, caplog):
    path, names = damaged
    prefs = pk.load_preferences(path)
    whole = dump_features(backbone, prefs, tmp_path / "store", max_bad=0.05, batch_size=8)
    bad = whole.rows[whole.rows["status"] == 1]
    assert set(bad["image_id"]) == set(names)
    assert np.isnan(whole.read(layer=1)[bad.index]).all()
    assert np.isfinite(np.delete(whole.read(layer=1), bad.index, axis=0)).all()
    left_out = whole.pairs().left_out
    lost = prefs.pairs[["item_a", "item_b"]].map(lambda item: prefs.items["image"][item] in names).any(axis=1)
    assert left_out == {"missing_rows": 0, "bad_status": lost.sum(), "no_label": 0}
    said = [record.getMessage() for record in caplog.records if "rows have no features" in record.getMessage()]
    assert said == [
        f"{len(bad)} of {len(whole.rows)} rows have no features ({len(bad)} missing or unreadable, 0 not finite); "
        f"{lost.sum()} of {len(prefs.pairs)} pairs are left out: {', '.join(sorted(set(bad['image_id'])))}"
    ]
    before = tree(tmp_path / "store")
    dump_features(backbone, prefs, tmp_path / "store", max_bad=0.05, batch_size=8)
    assert tree(tmp_path / "store") == before
    with pytest.raises(ImageError, match="found by an earlier dump"):
        dump_features(backbone, prefs, tmp_path / "store", max_bad=0.01, batch_size=8)


def test_a_mended_picture_costs_its_own_rows_only(backbone, damaged, pairs, tmp_path):
    path, names = damaged
    dump_features(backbone, pk.load_preferences(path), tmp_path / "store", max_bad=0.05)
    held = feature_bytes(tmp_path / "store")
    for name in names:
        shutil.copy(pairs.parent / name, path.parent / name)
    mended = dump_features(backbone, pk.load_preferences(path), tmp_path / "store")
    assert held.items() <= feature_bytes(tmp_path / "store").items()
    assert mended.pairs().left_out["bad_status"] == 0
    whole = dump_features(backbone, pk.load_preferences(pairs), tmp_path / "whole")
    both = [store.rows["row_id"] for store in (whole, mended)]
    np.testing.assert_allclose(
        mended.read(layer=2)[pd.Index(both[1]).get_indexer(both[0])], whole.read(layer=2), rtol=1e-3, atol=1e-3
    )


def test_a_block_of_bad_rows_alone_is_a_shard_like_the_others(backbone, pairs, monkeypatch, tmp_path):
    folder = tmp_path / "pairs"
    shutil.copytree(pairs.parent, folder)
    prefs = pk.load_preferences(folder / pairs.name)
    prompt = prefs.items["prompt"][0]
    for name in prefs.items.loc[prefs.items["prompt"] == prompt, "path"]:
        Path(name).write_bytes(b"no picture")
    monkeypatch.setattr("probekit.dump.plan.rows_per_shard", lambda **_: 2)
    prefs = pk.load_preferences(folder / pairs.name).limit(20)
    store = dump_features(backbone, prefs, tmp_path / "store", max_bad=0.9, pooling=["mean", "mean_std"])
    assert store.read(layer=1, pooling="mean_std").shape == (len(store.rows), 2 * backbone.width)


def test_features_that_are_not_finite_are_refused_or_marked(backbone, pairs, monkeypatch, tmp_path):
    prefs = pk.load_preferences(pairs).limit(20)
    plain = Backbone.features

    def broken(self, latents, prompts, **options):
        found = plain(self, latents, prompts, **options)
        if options["sigma"] == "0.1":
            found["mean", 2][3] = np.inf
        return found

    monkeypatch.setattr(Backbone, "features", broken)
    with pytest.raises(
        ImageError, match=r"1 not finite\).*not finite \(sigma 0.1, float32\); another --dtype may help"
    ):
        dump_features(backbone, prefs, tmp_path / "store", sigmas=["0", "0.1"])
    assert FeatureStore(tmp_path / "store").sigmas == ["0"]
    store = dump_features(backbone, prefs, tmp_path / "store", sigmas=["0", "0.1"], max_bad=0.2)
    assert (store.rows["status"] == 2).sum() == 1


def test_the_share_of_bad_rows_is_that_of_the_whole_store(backbone, damaged, small_shards, tmp_path):
    prefs = pk.load_preferences(damaged[0])
    bad = 5
    share = (bad - 1) / len(prefs.items)

    def all_workers() -> None:
        for rank in range(8):
            dump_features(backbone, prefs, tmp_path / "store", worker=(rank, 8), max_bad=share)

    with pytest.raises(ImageError, match=r"5 of 224 rows have no features .* allowed: a share of"):
        all_workers()


def test_many_bad_rows_are_named_once_and_few(backbone, pairs, tmp_path, caplog):
    folder = tmp_path / "pairs"
    shutil.copytree(pairs.parent, folder)
    prefs = pk.load_preferences(folder / pairs.name)
    for path in prefs.items["path"].unique()[:60]:
        Path(path).unlink()
    dump_features(backbone, prefs, tmp_path / "store", max_bad=0.9)
    said = [record.getMessage() for record in caplog.records]
    assert sum(message.startswith("left out: ") for message in said) == 10
    (summary,) = [message for message in said if "pairs are left out: " in message]
    named = summary.partition("left out: ")[2].partition(" and ")[0].split(", ")
    assert len(named) == len(set(named)) == 10


def test_resolution_is_not_measured_on_a_picture_that_is_not_there(backbone, damaged, monkeypatch, tmp_path):
    monkeypatch.setattr("probekit.dump.plan.rows_per_shard", lambda **_: 2)
    prefs = pk.load_preferences(damaged[0]).limit(20)
    prompt = prefs.items["prompt"][0]
    for name in prefs.items.loc[prefs.items["prompt"] == prompt, "path"]:
        Path(name).write_bytes(b"no picture")
    store = dump_features(backbone, pk.load_preferences(damaged[0]).limit(20), tmp_path / "store", max_bad=0.9)
    whole = dump_features(backbone, pk.load_preferences(damaged[0]).limit(20), tmp_path / "again", max_bad=0.9)
    assert store.sigma_resolution == whole.sigma_resolution
    assert store.rows["status"][store.rows["prompt"] == prompt].all()
    assert store.sigma_resolution["0.005"]["rows"] == 2


def test_one_missing_picture_under_two_spellings_is_one_picture(tmp_path):
    lines = [
        {"prompt": "p", "image_a": "x.png", "image_b": "y.png", "label": 1},
        {"prompt": "q", "image_a": "./x.png", "image_b": "y.png", "label": 1},
    ]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "y.png").write_bytes(b"")
    prefs = pk.load_preferences(tmp_path / "prefs.jsonl")
    rows = prefs.rows(prefs.image_digests(max_bad=0.5))
    missing = rows["path"].str.endswith("x.png")
    assert rows["status"].tolist() == missing.astype(int).tolist()
    assert missing.sum() == 2
    assert rows["image_sha256"].nunique() == 2


def test_a_dry_run_refuses_what_the_dump_refuses(dump, damaged, tmp_path):
    out = tmp_path / "store"
    assert probekit(*dump, "--out", out).returncode == 0
    before = tree(out)
    refused(probekit(*dump, "--out", out, "--limit", 20, "--dry-run"), 1, "pairs are not in the new set of this name")
    again = [*dump[:-1], damaged[0]]
    assert probekit(*again, "--out", tmp_path / "bad", "--max-bad", 0.2).returncode == 0
    refused(probekit(*again, "--out", tmp_path / "bad", "--max-bad", 0.01, "--dry-run"), 1, "found by an earlier dump")
    assert tree(out) == before


def test_workers_together_write_what_one_writes(backbone, pairs, small_shards, tmp_path):
    prefs = pk.load_preferences(pairs)
    options = {"sigmas": ["0", "0.1"], "batch_size": 8}
    dump_features(backbone, prefs, tmp_path / "one", **options)
    numbers = []
    for rank in (2, 0, 1):
        dump_features(backbone, prefs, tmp_path / "three", worker=(rank, 3), **options)
        numbers.append(len(list((tmp_path / "three").rglob("*.h5"))))
    assert feature_bytes(tmp_path / "one") == feature_bytes(tmp_path / "three")
    share = numbers[-1] / 3
    assert all(abs(b - a - share) <= 2 for a, b in pairwise([0, *numbers]))


def test_a_worker_that_was_stopped_does_its_own_share_again(backbone, pairs, small_shards, tmp_path):
    prefs = pk.load_preferences(pairs)
    dump_features(backbone, prefs, tmp_path / "store", worker=(0, 2))
    first = {path.name for path in (tmp_path / "store").rglob("*.h5")}
    for name in sorted(first)[:2]:
        next((tmp_path / "store").rglob(name)).with_suffix(".json").unlink()
    dump_features(backbone, prefs, tmp_path / "store", worker=(0, 2))
    assert {path.name for path in (tmp_path / "store").rglob("*.h5")} == first
    done = {path.stem for path in (tmp_path / "store" / "shards").rglob("*.json")}
    assert done == {Path(name).stem for name in first}


@given(world=st.integers(1, 9), first=st.integers(0, 5), step=st.integers(1, 4), data=st.data())
def test_workers_of_the_environment(world, first, step, data):
    rank = data.draw(st.integers(0, world - 1))
    assert worker_of({"RANK": str(rank), "WORLD_SIZE": str(world)}) == (rank, world)
    array = {"ID": first + rank * step, "MIN": first, "STEP": step, "COUNT": world}
    assert worker_of({f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}) == (rank, world)
    assert worker_of({}) == (0, 1)
    with pytest.raises(ConfigError, match=f"rank {world} of {world} workers; allowed: 0 to {world - 1}"):
        worker_of({"RANK": str(world), "WORLD_SIZE": str(world)})


def test_variables_that_are_missing_or_no_numbers_are_named():
    with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK_MIN is missing"):
        worker_of({"SLURM_ARRAY_TASK_ID": "3"})
    with pytest.raises(ConfigError, match="RANK is '-1'"):
        worker_of({"RANK": "-1", "WORLD_SIZE": "2"})
    assert local_device({"LOCAL_RANK": "3"}) == "cuda:3"
    assert local_device({}) is None


@pytest.mark.parametrize("worker", ["2/2", "1", "a/b", "-1/2", "0/0"])
def test_a_wrong_worker_is_a_usage_error(dump, worker, tmp_path):
    refused(probekit(*dump, "--out", tmp_path / "store", "--worker", worker), 2, "worker", "RANK/WORLD", "0/4")


def lines(done) -> dict[str, str]:
    """Headings and texts of a dry run."""
    found, last = {}, ""
    for line in done.stdout.splitlines():
        heading, text = line[:16].strip(), line[16:].strip()
        last = heading or last
        found[last] = f"{found.get(last, '')} {text}".strip()
    return found


def test_a_dry_run_says_what_the_dump_then_does(dump, small_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    out = tmp_path / "store"
    command = [*dump, "--out", out, "--pooling", "mean", "--pooling", "grid4", "--batch-size", 8]
    done = probekit(*command, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    said = lines(done)
    assert probekit(*command).returncode == 0
    store = FeatureStore(out)
    rows, pairs_, shards = len(store.rows), len(store.pairs().frame), store.n_shards
    images = store.rows["image_id"].nunique()
    assert said["rows"].startswith(f"{rows:,} of ")
    assert f"{store.rows['prompt'].nunique():,} prompts, for {pairs_:,} pairs" in said["rows"]
    assert f"of {images:,} distinct images" in said["rows"]
    assert said["forward passes"].startswith(f"{rows:,} images")
    assert f"{2 * pairs_ - rows:,} saved" in said["forward passes"]
    assert f"0 done and skipped, 0 done again, {shards:,} new" in said["shards"]
    layers, width = len(store.layers), store.describe["width"]
    assert f"mean: at most {4 * rows * width / 1e3:.3g} kB a layer, {layers} layers" in said["bytes"]
    entering = sum(store.read(layer=0, pooling=name).shape[1] for name in store.inputs)
    assert f"in all at most {4 * rows * (width * 17 * layers + entering) / 1e6:.3g} MB" in said["bytes"]
    assert said["time"].startswith("about ")
    assert "points" in said["resolves"]
    again = lines(probekit(*command, "--dry-run"))
    assert f"{shards:,} done and skipped, 0 done again, 0 new" in again["shards"]
    assert again["forward passes"].startswith("0 images")
    assert again["time"] == "none: nothing is to be done"


def test_a_dry_run_names_what_is_done_again_and_changes_nothing(dump, small_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    out = tmp_path / "store"
    assert probekit(*dump, "--out", out).returncode == 0
    short, lost = sorted(out.rglob("*.h5"))[:2]
    short.write_bytes(short.read_bytes()[:-1])
    lost.unlink()
    before = tree(out)
    said = lines(probekit(*dump, "--out", out, "--dry-run"))
    assert tree(out) == before
    assert "2 done again, 0 new" in said["shards"]
    again = said["done again"].replace(" ", "")  # long paths are cut where a line ends
    assert str(short) in again
    assert str(lost) in again
    refused(
        probekit(*dump, "--out", out, "--dry-run", "--seed", 3), 1, "noise.seed is 0 in this store, 3 was asked for"
    )


def test_without_weights_the_time_is_unknown(pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    base, transformer = tmp_path / "base", tmp_path / "transformer"
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(base_folder(), base, ignore=weights)
    shutil.copytree(models()[0].folder, transformer, ignore=weights)
    command = ["dump", "--backbone", base, "--transformer", transformer, "--prefs", pairs, "--out", tmp_path / "store"]
    done = probekit(*command, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert lines(done)["time"] == "unknown: the weights are not here"
    assert "new" in lines(done)["shards"]
    refused(probekit(*command), 1, "has no weights")


def test_progress_says_speed_shares_and_what_was_skipped(backbone, pairs, small_shards, tmp_path):
    prefs = pk.load_preferences(pairs)
    dump_features(backbone, prefs.limit(40), tmp_path / "store")
    skipped = len(FeatureStore(tmp_path / "store").rows)
    said: list[tuple[int, int, str]] = []
    store = dump_features(backbone, prefs, tmp_path / "store", progress=lambda *what: said.append(what))
    done, total, text = [what for what in said if what[2].startswith("rows")][-1]
    assert done == total == len(store.rows)
    assert "rows/s" in text
    assert "DiT" in text
    assert text.endswith(f"{skipped} skipped")


def test_what_is_stored_is_said_when_a_dump_ends_early(backbone, pairs, small_shards, tmp_path, caplog):
    class StoppedError(BaseException):
        pass

    def stop(done: int, total: int, text: str) -> None:
        if done > 2 * ROWS:
            raise StoppedError

    with pytest.raises(StoppedError):
        dump_features(backbone, pk.load_preferences(pairs), tmp_path / "store", progress=stop)
    stored = len(FeatureStore(tmp_path / "store").rows)
    assert 0 < stored <= 2 * ROWS
    (message,) = [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "are stored" in r.getMessage()
    ]
    assert f": {stored} of " in message
    assert not [path for path in (tmp_path / "store").rglob(".*") if path.name.startswith(".tmp")]


def test_what_a_lost_head_recorded_of_noise_levels_is_measured_again(backbone, pairs, tmp_path):
    prefs = pk.load_preferences(pairs)
    first = dump_features(backbone, prefs, tmp_path / "store", sigmas=["0", "0.0001", "0.1"])
    assert not first.sigma_resolution["0.0001"]["resolved"]
    held = feature_bytes(tmp_path / "store")
    (tmp_path / "store" / "store.json").unlink()
    again = dump_features(backbone, prefs, tmp_path / "store", sigmas=["0", "0.0001", "0.1"])
    assert again.sigma_resolution.keys() == {"0.0001", "0.1"}
    assert not again.sigma_resolution["0.0001"]["resolved"]
    assert feature_bytes(tmp_path / "store") == held
