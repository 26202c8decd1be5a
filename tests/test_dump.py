"""A dump holds what the backbone computes, once for each row, and survives being killed at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from test_cli import probekit as run_here

import probekit
from probekit.backbones import noise
from probekit.errors import FingerprintError
from probekit.playground import base_folder, models
from probekit.playground.pairs import write_pairs

TORCH = torch.__version__.partition("+")[0]
ROWS = 16
"""Rows of a shard where a dump is killed."""


@pytest.fixture(scope="module")
def prefs_file(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), n_train=120, n_test=60, seed=5)


@pytest.fixture(scope="module")
def backbone() -> "probekit.Backbone":
    return probekit.Backbone.from_pretrained(base_folder(), transformer=models()[0].folder, max_tokens=0, device="cpu")


def feature_bytes(store: Path) -> dict[tuple[str, str], bytes]:
    """Every feature dataset of every shard, read with plain h5py."""
    found: dict[tuple[str, str], bytes] = {}
    for path in sorted(store.rglob("*.h5")):
        with h5py.File(path) as file:
            file["features"].visititems(
                lambda name, item, path=path: (
                    found.update({(path.name, name): item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
                )
            )
    return found


def test_rows_are_distinct_and_features_are_those_of_the_backbone(backbone, prefs_file, tmp_path):
    prefs = probekit.load_preferences(prefs_file)
    store = probekit.dump_features(backbone, prefs, tmp_path / "store", sigmas=["0.1"], batch_size=16)
    assert store.rows["row_id"].is_unique
    digests = prefs.image_digests()
    rows = prefs.rows(digests)
    assert set(rows["row_id"]) == set(store.rows["row_id"])
    sample = rows.iloc[[0, 7, 31]]
    files = list(zip(map(Path, sample["path"]), sample["image_sha256"], strict=True))
    latents = [image.latents for image in next(backbone.latents([files]))]
    eps = [noise(0, prompt, 0, tuple(latents[0].shape)) for prompt in sample["prompt"]]
    alone = backbone.features(
        latents,
        list(sample["prompt"]),
        sigma="0.1",
        eps=eps,
        wanted=backbone.wanted(["mean"], [0, 2]),
        batch_size=1,
    )
    order = [list(store.rows["row_id"]).index(row) for row in sample["row_id"]]
    for layer in (0, 2):
        stored = store.read(layer=layer)[order]
        # stored as float16 where the within-pair differences allow it
        assert np.abs(stored - alone["mean", layer]).max() <= 2e-3 * np.abs(stored).max()


def test_each_image_of_a_ranking_runs_once(backbone, prefs_file, tmp_path):
    prefs = probekit.load_preferences(prefs_file)
    rankings = prefs.pairs["ranking_id"] != ""
    assert rankings.any()
    store = probekit.dump_features(backbone, prefs, tmp_path / "store", batch_size=64)
    assert len(store.rows) < 2 * len(prefs.pairs)
    pairs = sum(len(store.pairs(split=split).label) for split in ("train", "validation", "test"))
    assert pairs == len(prefs.pairs)


def test_limited_stores_nest_and_grow(backbone, prefs_file, tmp_path):
    prefs = probekit.load_preferences(prefs_file)
    small = probekit.dump_features(backbone, prefs.limit(60), tmp_path / "store", batch_size=16)
    before, rows = feature_bytes(tmp_path / "store"), set(small.rows["row_id"])
    grown = probekit.dump_features(backbone, prefs, tmp_path / "store", batch_size=16)
    assert rows < set(grown.rows["row_id"])
    after = feature_bytes(tmp_path / "store")
    assert {key: after[key] for key in before} == before


def test_poolings_are_kept_side_by_side(backbone, prefs_file, tmp_path):
    prefs = probekit.load_preferences(prefs_file).limit(20)
    store = probekit.dump_features(backbone, prefs, tmp_path / "store", pooling=["mean", "max"])
    assert sorted(store.poolings) == ["max", "mean"]
    mean, largest = (store.read(layer=2, pooling=pooling) for pooling in ("mean", "max"))
    assert (largest >= mean - 1e-3).all()
    assert (largest > mean + 1e-2).mean() > 0.9


def test_noise_schemes_are_part_of_the_store(backbone, prefs_file, tmp_path):
    prefs = probekit.load_preferences(prefs_file).limit(20)
    stores = {
        scheme: probekit.dump_features(backbone, prefs, tmp_path / scheme, sigmas=["0.3"], noise=scheme)
        for scheme in ("shared", "independent", "none")
    }
    features = {scheme: store.read(layer=3) for scheme, store in stores.items()}
    assert len({store.fingerprint for store in stores.values()}) == 3
    assert not np.allclose(features["shared"], features["independent"], atol=1e-3)
    assert not np.allclose(features["shared"], features["none"], atol=1e-3)
    with pytest.raises(FingerprintError, match="noise"):
        probekit.dump_features(backbone, prefs, tmp_path / "none", sigmas=["0.3"], noise="shared")


def test_random_weights_are_recorded_and_change_the_features(backbone, prefs_file, tmp_path):
    prefs = probekit.load_preferences(prefs_file).limit(20)
    folder = models()[0].folder
    stores = {}
    for kind in (None, "init:0", "init:1", "shuffled:0"):
        name = str(kind).replace(":", "-")
        stores[kind] = probekit.dump_features(
            backbone.with_transformer(folder, random_weights=kind), prefs, tmp_path / name
        )
        assert stores[kind].describe["random_weights"] == kind
        assert stores[kind].config["random_weights"] == (f"{kind}, torch {TORCH}" if kind else None)
    last = [store.read(layer=3) for store in stores.values()]
    assert all(not np.allclose(a, b, atol=1e-3) for i, a in enumerate(last) for b in last[:i])


FORKS = """
import json, os, sys
import diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3, transformers
import probekit.backbones, probekit.dump.plan
from probekit import cli

rows = int(sys.argv[1])
probekit.dump.plan.rows_per_shard = lambda **_: rows
for line in sys.stdin:
    arguments, said = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = ["probekit", *arguments]
        cli.main()
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def commands():
    """Return a function that starts a command in a process of its own, forked from one that has imported everything."""
    server = [sys.executable, "-c", FORKS, str(ROWS)]
    with subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def start(arguments: list[object], said: Path) -> tuple[int, Callable[[], int]]:
            process.stdin.write(json.dumps([[*map(str, arguments)], str(said)]) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline()), lambda: int(process.stdout.readline())

        yield start
        process.stdin.close()


def test_killed_or_stopped_at_random_moments_it_ends_with_the_same_bytes(pairs, dump, commands, monkeypatch, tmp_path):
    monkeypatch.setattr("probekit.dump.plan.rows_per_shard", lambda **_: ROWS)
    levels = [option for level in range(3) for option in ("--sigma", f"0.{level}")]
    command = [*dump, "--batch-size", 8, "--device", "cpu", *levels]
    done = run_here(*command, "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    chance = random.Random(0)
    shards = len(list((tmp_path / "whole").rglob("*.h5")))
    assert shards >= 7
    killed, said = tmp_path / "killed", tmp_path / "said"
    numbers = [signal.SIGKILL] * 3 + [signal.SIGINT, signal.SIGTERM]
    for number in numbers:
        there = len(list(killed.rglob("[!.]*.h5")))  # one more shows that this process is writing
        pid, exit_code = commands([*command, "--out", killed], said)
        deadline = time.monotonic() + 120
        while len(list(killed.rglob("[!.]*.h5"))) <= there and time.monotonic() < deadline:
            os.kill(pid, 0)  # an error if it has ended already
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(pid, number)
        code = exit_code()
        assert len(list(killed.rglob("*.h5"))) < shards
        if number == signal.SIGKILL:
            assert code == -number
            continue
        assert code == 128 + number
        assert "rows are stored" in " ".join(said.read_text().split())  # the line is cut where a path is long
        assert "the same command resumes" in said.read_text().splitlines()[-1]
        assert "Traceback" not in said.read_text()
        assert not list(killed.rglob(".tmp-*"))
    done = run_here(*command, "--out", killed)
    assert done.returncode == 0, done.stderr
    assert feature_bytes(killed) == feature_bytes(tmp_path / "whole")
    assert not list(killed.rglob(".tmp-*"))


def test_nothing_of_this_machine_is_in_the_fingerprint(backbone, prefs_file, tmp_path):
    store = probekit.dump_features(backbone, probekit.load_preferences(prefs_file).limit(10), tmp_path / "store")
    assert str(Path(base_folder())) not in json.dumps(store.config)


def test_a_store_says_which_programs_made_it(backbone, prefs_file, tmp_path):
    probekit.dump_features(backbone, probekit.load_preferences(prefs_file).limit(10), tmp_path / "store")
    made_by = json.loads((tmp_path / "store" / "store.json").read_text())["provenance"]
    assert made_by["torch"].partition("+")[0] == TORCH
    assert {"writer", "hdf5", "numpy", "h5py", "diffusers", "transformers"} <= made_by.keys()
