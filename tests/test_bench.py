"""The benchmark runs through the command line, says what it promises, and leaves nothing behind."""

import json
import shutil
import tempfile
import time
from functools import partial, wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from test_cli import probekit, refused
from tiny_models import tiny_pipeline

from probekit.backbones import passes
from probekit.backbones.capture import POOLINGS
from probekit.backbones.conditioning import Conditioner
from probekit.bench import dump as bench
from probekit.bench import dump_runs, store_runs, sweep_cases, sweep_runs, sweep_search
from probekit.bench import store as store_bench
from probekit.bench import sweep as sweep_bench

IMAGES, ROUNDS = 10, 2


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny", n_blocks=4)


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Where the benchmark puts its files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def options(pipeline: Path) -> list[object]:
    return ["bench", "dump", "--backbone", pipeline, "--max-tokens", 0, "--device", "cpu", "--images", IMAGES]


def test_json_holds_ratios_parts_and_rates(pipeline, temporary):
    before = passes.pooled_layers, passes.Passes.prepare, Conditioner.encode, POOLINGS["mean"]
    done = probekit(*options(pipeline), "--rounds", ROUNDS, "--batch-size", 4, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["backbone"]["n_blocks"] == 4
    assert (found["images"], found["batch_size"], found["rounds"]) == (IMAGES, 4, ROUNDS)
    assert found["threads"] == torch.get_num_threads()
    for name in bench.RATIOS:
        median, smallest, largest = found[name]
        assert 0 < smallest <= median <= largest
    assert {name: len(values) for name, values in found["seconds"].items()} == dict.fromkeys(
        ("bare", "captured", "dump", "bare_beside_half", "half"), ROUNDS
    )
    assert set(found["parts"]) == set(bench.PARTS)
    assert sum(part["share"] for part in found["parts"].values()) == pytest.approx(1)
    assert all(part["seconds"] > 0 for part in found["parts"].values())
    # the bare loop is given latents, embeddings and noise, pools nothing and writes nothing
    bare = {name for name, part in found["parts"].items() if part["bare_seconds"] > 0}
    assert bare == {"inputs", "dit"}
    assert 0 < found["idle_share"] < 1
    assert found["tflop_per_second"] == pytest.approx(
        found["share_of_matrix_product"] * found["matrix_product_tflop_per_second"]
    )
    assert not list(temporary.iterdir())
    assert before == (passes.pooled_layers, passes.Passes.prepare, Conditioner.encode, POOLINGS["mean"])


def test_operations_are_those_of_one_image(pipeline, temporary):
    settings = {"backbone": str(pipeline), "max_tokens": 0, "device": "cpu"}
    several, single = (
        bench.bench_dump(settings | {"batch_size": size}, images=IMAGES, rounds=1).flop for size in (4, 1)
    )
    assert several == single > 0


def test_beside_each_batch_runs_the_bare_transformer_whole(pipeline, temporary, monkeypatch):
    seen = []
    run, whole = passes.pooled_layers, SD3Transformer2DModel.forward

    def noted(*args, wanted, **kwargs):
        seen.append(max(layer for _, layer in wanted))
        return run(*args, wanted=wanted, **kwargs)

    @wraps(whole)
    def ended(*args, **kwargs):
        result = whole(*args, **kwargs)
        seen.append("bare")  # a pass that captures leaves before
        return result

    monkeypatch.setattr(dump_runs, "pooled_layers", noted)
    monkeypatch.setattr(SD3Transformer2DModel, "forward", ended)
    bench.bench_dump({"backbone": str(pipeline), "device": "cpu", "batch_size": 2}, images=4, rounds=1)
    assert [one for one in seen if one != "bare"] == [4, 4, 2, 2]
    assert seen[-8:] == ["bare", 4, 4, "bare", "bare", 2, 2, "bare"]


def test_a_transformer_without_weights_can_be_timed(pipeline, temporary, tmp_path, monkeypatch):
    """Speed does not depend on the weights, so a config is enough."""
    monkeypatch.setitem(bench._PRODUCT, "cpu", 64)  # many CPUs have no products in bfloat16
    folder = tmp_path / "transformer"
    folder.mkdir()
    shutil.copy(pipeline / "transformer" / "config.json", folder)
    config = ["--transformer", folder, "--random-weights", "init:0", "--dtype", "bfloat16"]
    done = probekit(*options(pipeline), *config, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    assert "capture, pool, write / bare" in done.stdout
    assert "bfloat16" in done.stdout


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["--images", 3], 2, "images is 3; allowed: even numbers"),
        (["--rounds", 0], 2, "rounds is 0; allowed"),
        (["--batch-size", 0], 2, "batch_size"),
        (["--resolution", 17], 2, "resolution is 17; allowed"),
        (["--random-weights", "init"], 2, "random weights 'init'"),
        (["--device", "cpu:nowhere"], 2, "device 'cpu:nowhere'"),
    ],
)
def test_wrong_options_are_one_line(pipeline, temporary, given, code, message):
    refused(probekit(*options(pipeline), *given), code, message)
    assert not list(temporary.iterdir())


def test_what_the_device_still_computes_counts_to_the_part_that_started_it(monkeypatch):
    now, queued = [0.0], [0.0]

    def synchronise(clock):
        now[0], queued[0] = now[0] + queued[0], 0.0

    def work(seconds, later=0.0, inside=None):
        now[0] += seconds
        queued[0] += later
        if inside is not None:
            inside()

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(dump_runs.PartsClock, "_synchronise", synchronise)
    clock = dump_runs.PartsClock(torch.device("cpu"))
    for _ in range(2):  # every start begins anew
        clock.start()
        clock.timed(work, "inputs")(1, later=2)  # the device is not waited for
        clock.timed(work, "dit")(4, later=8, inside=partial(clock.timed(work, "write"), 16))
        work(32, later=64)
        found = {name: seconds for name, seconds in clock.stop().items() if seconds}
    assert found == {"inputs": 1, "dit": 4 + 2 + 8, "write": 16, "other": 32 + 64}


SMALL_STORE = ["bench", "store", "--rows", 12, "--layers", 4, "--width", 8, "--shard-size", 1, "--rounds", 2]


@pytest.fixture
def few_shards(monkeypatch):
    monkeypatch.setattr(store_runs, "SCANNED_SHARDS", 3)


def test_the_store_beside_the_bare_disk_as_json(temporary, few_shards):
    done = probekit(*SMALL_STORE, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["rows"], found["layers"], found["width"], found["rounds"]) == (12, 4, 8, 2)
    assert found["folder"] == str(temporary)
    assert found["datasets"] == {"float16": 2, "float32": 2}  # massive activations and offsets are among the layers
    assert set(found["figures"]) == set(store_bench.TARGETS)
    for name, figure in found["figures"].items():
        assert 0 < figure["smallest"] <= figure["median"] <= figure["largest"], name
        ((rule, bound),) = figure["design"].items()
        reached = figure["median"] >= bound if rule == "at least" else figure["median"] <= bound
        assert figure["reached"] == reached
    for name in ("write", "cold", "warm"):
        ratios = np.array(found["seconds"][name]["raw"]) / found["seconds"][name]["store"]
        assert found["figures"][name]["median"] == pytest.approx(np.median(ratios))
    assert not list(temporary.iterdir())


def test_the_store_is_measured_where_the_user_says(temporary, tmp_path, few_shards):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = probekit(*SMALL_STORE, "--folder", disk)
    assert done.returncode == 0, done.stderr
    assert str(disk) in "".join(done.stdout.split())  # whatever the width of the terminal
    for target in store_bench.TARGETS.values():
        assert target.text in done.stdout
    assert not [*disk.iterdir(), *temporary.iterdir()]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rows", 3], "rows is 3; allowed: even numbers"),
        (["--layers", 0], "layers is 0; allowed"),
        (["--width", -1], "width is -1; allowed"),
        (["--shard-size", 0], "shard_size is 0; allowed"),
        (["--rounds", 0], "rounds is 0; allowed"),
        (["--folder", "nowhere"], "folder is 'nowhere', which is no folder; allowed"),
    ],
)
def test_wrong_options_of_the_store_are_one_line(temporary, given, message):
    refused(probekit(*SMALL_STORE, *given), 2, message)
    assert not list(temporary.iterdir())


def test_the_fits_beside_scikit_learn_as_json(temporary):
    chosen = [case for case in sweep_cases.CASES if not case.set_size]  # searches, which loop over sets, are below
    done = probekit(
        "bench", "sweep", "--scale", 0.01, "--json", *(word for case in chosen for word in ("--case", case.name))
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["cases"]) == [case.name for case in chosen]
    for case in chosen:
        figure = found["cases"][case.name]
        if case.rounds == 1:  # of several rounds, the ratio of medians is not the median of ratios
            assert figure["ratio"]["median"] == pytest.approx(figure["seconds"]["theirs"] / figure["seconds"]["ours"])
        assert 0 < figure["ratio"]["smallest"] <= figure["ratio"]["median"] <= figure["ratio"]["largest"]
        exact = [figure[name] is None or figure[name] <= bound for name, bound in sweep_bench.BOUNDS.items()]
        assert figure["reached"] == (figure["ratio"]["median"] >= case.asked and all(exact))
        assert figure["rank_correlation"] is None
        if not case.hidden:
            assert figure["loss_gap"] <= 2e-6
            assert figure["coefficient_error"] <= 1e-3


def test_a_search_finds_what_exact_fits_of_all_sets_find():
    case = sweep_cases.Case("search", "set-loop", 1_000, 16, asked=1.0, layers=6, set_size=2)
    ours, theirs, rank, regret = sweep_search.run_search(case, seed=0)
    assert ours > 0
    assert theirs > 0
    assert rank >= 0.9
    assert regret <= 2e-3


def test_chosen_cases_and_their_words():
    done = probekit("bench", "sweep", "--scale", 0.01, "--case", "5k-512", "--case", "mlp-16", "--layers", 2)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "5k-512 60 x 5 12" in words
    assert "mlp-16 60 x 5 4" in words
    assert "20k-512" not in words
    assert sweep_cases.RIVALS["logistic-cv"].split(":")[0] in words


def test_the_optimum_that_fits_are_judged_by():
    D, label = sweep_runs.synthetic_differences(200, 8, seed=0)
    Z = D / np.sqrt(np.mean(D.astype(float) ** 2, axis=0))
    w = sweep_runs.optimum(Z, label, 10.0, start=np.zeros(8))
    assert np.linalg.norm(Z.T @ (1 / (1 + np.exp(-Z @ w)) - label) + w / 10) < 1e-9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--case", "nothing"], "case is 'nothing'; allowed: 20k-512, "),
        (["--scale", 0], "scale is 0; allowed"),
        (["--layers", 0], "layers is 0; allowed"),
    ],
)
def test_wrong_options_of_the_fits_are_one_line(given, message):
    refused(probekit("bench", "sweep", *given), 2, message)
