"""A sweep finds what was planted, finds nothing where nothing was, resumes, and refuses what a store does not hold."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted_store import planted_store

import probekit
from probekit._workers import run_in_processes
from probekit.config import SweepConfig, load_yaml
from probekit.errors import ConfigError, ProbekitError, StoreError
from probekit.heads import resolve_layer_sets
from probekit.results import describe_run, load_config, load_margins
from probekit.stats import tune_threshold
from probekit.store import open_store

LINEAR = {"kind": "linear", "layer_sets": ["singles"], "strengths": [0.001, 0.1, 10.0]}


def config(*heads: dict, **settings: object) -> SweepConfig:
    return SweepConfig.checked({"heads": list(heads or [LINEAR]), "resamples": 200} | settings, source="test")


def test_the_planted_layer_is_found_and_chosen(tmp_path):
    store = planted_store(tmp_path / "store", signal={2: 1.5}, seed=0)
    run = probekit.run_sweep(
        config(LINEAR | {"layer_sets": ["singles", "all", [1, 2]]}), stores=[store], out=tmp_path / "run"
    )
    frame = probekit.load_results(run)
    test = frame.query("split == 'test' and source == 'all'").set_index("layer_set")
    assert test.loc["2", "low"] > 0.6
    assert list(test.index[test["chosen"]]) == ["2"]
    for layer in "013":
        assert test.loc[layer, "low"] < 0.5 < test.loc[layer, "high"]
    assert test.loc["0+1+2+3", "low"] > 0.6
    assert test.loc["1+2", "combination"] == "concat"


def null_coverage(folder: Path, draws: range) -> int:
    """In how many draws of labels, on one store that knows nothing, the chosen layer's interval covers 50 %.

    The whole line runs each time: strengths by cross-validation, layers by validation, accuracy on test.
    """
    path = planted_store(folder / "store", signal={}, seed=1, pairs=240)
    (file,) = (path / "judgements").glob("*.parquet")
    judgements = pd.read_parquet(file)
    file.with_suffix(".json").unlink()  # it vouches for the labels that were written with it
    covered = 0
    for draw in draws:
        labels = np.random.default_rng(draw).integers(0, 2, len(judgements)).astype(float)
        judgements.assign(label=labels).to_parquet(file, index=False)
        run = probekit.run_sweep(config(), stores=[path], out=folder / str(draw))
        (chosen,) = probekit.load_results(run).query("chosen and split == 'test' and source == 'all'").itertuples()
        covered += chosen.low <= 0.5 <= chosen.high
    return covered


def test_nothing_is_found_where_nothing_was_planted(tmp_path):
    """Over 20 draws of labels; `campaigns/sweep_null.py` is the long form, 60 draws and more."""
    # 95 % of 20 is 19; a binomial with that chance is below 16 three times in a thousand
    assert null_coverage(tmp_path, range(20)) >= 16


def test_heads_of_both_kinds_and_seeds_are_separate_records(tmp_path):
    store = planted_store(tmp_path / "store", signal={2: 1.5}, seed=0)
    mlp = {"kind": "mlp", "layer_sets": [{"relative": [0.67, 1.0]}], "hidden": [8], "max_epochs": 4, "seeds": [0, 1]}
    run = probekit.run_sweep(config(LINEAR, mlp), stores=[store], out=tmp_path / "run")
    frame = _test_rows(run)
    assert frame.groupby("head").size().to_dict() == {"linear": 4, "mlp": 2}
    assert set(frame.query("head == 'mlp'")["layer_set"]) == {"2+3"}
    assert frame.query("head == 'mlp'")["head_parameters"].unique() == [16 * 8 + 8 + 8]
    assert frame["record_id"].is_unique


def test_margins_give_the_accuracy_again(tmp_path):
    store = planted_store(tmp_path / "store", signal={2: 1.0}, seed=3)
    run = probekit.run_sweep(config(), stores=[store], out=tmp_path / "run")
    frame = probekit.load_results(run).query("source == 'all'").set_index(["record_id", "split"])
    margins = load_margins(run).query("label != 0.5")
    right = (margins["margin"] > 0) == (margins["label"] > 0.5)
    again = right.groupby([margins["record_id"], margins["split"]]).mean()
    for (record, split), accuracy in again.items():
        assert frame.loc[(record, split), "accuracy"] == pytest.approx(accuracy, abs=1e-12)


def test_sources_are_rows_and_ties_are_counted(tmp_path):
    store = planted_store(tmp_path / "store", signal={2: 1.5}, seed=0, ties=0.2)
    run = probekit.run_sweep(config(), stores=[store], out=tmp_path / "run")
    frame = probekit.load_results(run).query("split == 'test' and layer == 2").set_index("source")
    assert set(frame.index) == {"all", "easy", "none"}
    assert frame.loc["all", "true_ties"] == frame.loc[["easy", "none"], "true_ties"].sum() > 0
    assert frame.loc["all", "n_pairs"] == frame.loc[["easy", "none"], "n_pairs"].sum()
    assert frame.loc["easy", "accuracy"] > frame.loc["none", "accuracy"] + 0.1
    assert frame.loc["all", "macro_accuracy"] == pytest.approx(frame.loc[["easy", "none"], "accuracy"].mean())


def test_the_same_command_adds_only_what_is_missing(tmp_path):
    store = planted_store(tmp_path / "store", signal={2: 1.5}, seed=0)
    run = tmp_path / "run"
    seen: list[str] = []
    probekit.run_sweep(config(), stores=[store], out=run, progress=lambda d, t, text: seen.append(text))
    parts = {path: path.read_bytes() for path in run.glob("parts/*")}
    first = (run / "results.parquet").read_bytes()
    assert len(seen) == 4
    assert len(parts) == 5  # with the baseline that every data set has: A first
    probekit.run_sweep(config(), stores=[store], out=run, progress=lambda d, t, text: seen.append(text))
    assert len(seen) == 4
    assert (run / "results.parquet").read_bytes() == first
    probekit.run_sweep(
        config(LINEAR | {"layer_sets": ["singles", [0, 1]]}), stores=[store], out=run,
        progress=lambda d, t, text: seen.append(text),
    )  # fmt: skip
    assert len(seen) == 5
    assert all(path.read_bytes() == content for path, content in parts.items())
    for path in list(parts)[:2]:
        path.unlink()
    probekit.run_sweep(config(), stores=[store], out=run)
    assert (run / "results.parquet").read_bytes() == first


def test_changed_labels_are_another_record_and_another_file_binds_to_the_same_rows(tmp_path):
    store = planted_store(tmp_path / "store", signal={2: 1.5}, seed=0)
    run = probekit.run_sweep(config(), stores=[store], out=tmp_path / "run")
    before = _test_rows(run)
    held = probekit.FeatureStore(store)
    path = store / "judgements" / f"{held.judgements[0]}.parquet"
    frame = pd.read_parquet(path)
    frame["label"] = 1 - frame["label"]
    frame.to_parquet(path, index=False)
    path.with_suffix(".json").unlink()
    probekit.run_sweep(config(), stores=[store], out=run)
    after = _test_rows(run)
    assert not set(before["record_id"]) & set(after["record_id"])
    assert after["accuracy"].to_numpy() == pytest.approx(before["accuracy"].to_numpy())  # antisymmetric by construction


def test_two_processes_give_the_same_bytes_as_one(tmp_path):
    store = planted_store(tmp_path / "store", signal={2: 1.5}, seed=0)
    one = probekit.run_sweep(config(), stores=[store], out=tmp_path / "one")
    two = probekit.run_sweep(config(), stores=[store], out=tmp_path / "two", jobs=2)
    assert (one / "results.parquet").read_bytes() == (two / "results.parquet").read_bytes()


@pytest.mark.parametrize(
    ("settings", "error", "parts"),
    [
        ({"sigmas": ["0.3"]}, ConfigError, ["store", "sigma", "'0.3'", "0.005"]),
        ({"poolings": ["max"]}, ConfigError, ["store", "pooling", "'max'", "mean"]),
        ({"heads": [LINEAR | {"layer_sets": [[9]]}]}, ConfigError, ["9", "3"]),
    ],
)
def test_what_a_store_does_not_hold_is_named(settings, error, parts, tmp_path):
    store = planted_store(tmp_path / "store", signal={}, seed=0)
    with pytest.raises(error) as caught:
        probekit.run_sweep(config(**settings), stores=[store], out=tmp_path / "run")
    for part in parts:
        assert part in str(caught.value)
    assert not list((tmp_path / "run").glob("parts/*"))


def test_a_store_without_test_pairs_is_refused(tmp_path):
    store = planted_store(tmp_path / "store", signal={}, seed=0)
    path = next((store / "judgements").glob("*.parquet"))
    pd.read_parquet(path).assign(split="train").to_parquet(path, index=False)
    path.with_suffix(".json").unlink()
    with pytest.raises(StoreError, match="has no validation pairs with features, only train"):
        probekit.run_sweep(config(), stores=[store], out=tmp_path / "run")


def test_two_stores_that_the_results_could_not_tell_apart_are_refused(tmp_path):
    first = planted_store(tmp_path / "first", signal={}, seed=0)
    second = planted_store(tmp_path / "second", signal={2: 1.0}, seed=0)
    with pytest.raises(ConfigError, match=r"first and .*second: both are 'planted-0' \(trained\).*--name"):
        probekit.run_sweep(config(), stores=[first, second], out=tmp_path / "run")
    control = planted_store(tmp_path / "control", signal={}, seed=0, control="init:0")
    frame = _heads(probekit.run_sweep(config(), stores=[first, control], out=tmp_path / "run"))
    assert set(frame["control"]) == {"trained", "init:0"}


def test_rows_without_features_are_left_out_and_counted_by_source(tmp_path):
    store = planted_store(tmp_path / "store", signal={2: 1.5}, seed=0, broken=9)
    run = probekit.run_sweep(config(), stores=[store], out=tmp_path / "run")
    frame = probekit.load_results(run).query("layer == 2").set_index(["split", "source"])
    # pairs 0 to 8, of which 3 and 7 are of source "none"; 5 and 6 of ten are validation, 7 and 8 test
    assert frame.loc[("test", ["all", "easy", "none"]), "left_out"].tolist() == [2, 1, 1]
    assert frame.loc[("validation", ["all", "easy", "none"]), "left_out"].tolist() == [2, 2, 0]
    assert frame.loc[("test", "all"), "n_pairs"] == 118


def test_a_killed_sweep_ends_with_the_same_bytes(tmp_path):
    store = planted_store(tmp_path / "store", signal={2: 1.5}, seed=0)
    whole = probekit.run_sweep(config(), stores=[store], out=tmp_path / "whole")
    settings = tmp_path / "sweep.yaml"
    settings.write_text(
        "heads: [{kind: linear, layer_sets: [singles], strengths: [0.001, 0.1, 10.0]}]\nresamples: 200\n"
    )
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "probekit", "sweep", str(settings), "--store", str(store), "--out", str(run)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(run.glob("parts/*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(run.glob("parts/*.parquet"))
    assert not (run / "results.parquet").exists()
    probekit.run_sweep(settings, stores=[store], out=run)
    assert (run / "results.parquet").read_bytes() == (whole / "results.parquet").read_bytes()


def test_the_dit_reward_layers_are_the_stated_ones():
    """{16, 24, 29, 38} of 38 blocks, the paper's 0-based {15, 23, 28, 37}; the same depths of 24 blocks."""
    path = Path(__file__).parent.parent / "sweeps" / "dit_reward.yaml"
    (head,) = (head for head in SweepConfig.checked(load_yaml(path), source=path.name).heads if head.kind == "mlp")
    assert resolve_layer_sets(head.layer_sets, 38) == [(16, 24, 29, 38)]
    assert resolve_layer_sets(head.layer_sets, 24) == [(10, 15, 18, 24)]
    assert head.hidden == [1024, 16]


def test_a_killed_worker_is_one_line():
    with pytest.raises(ProbekitError, match="killed"):
        list(run_in_processes(signal.raise_signal, [signal.SIGKILL] * 2, jobs=2))


def test_a_worker_keeps_to_one_thread_although_it_reads_numpy_first(tmp_path):
    """The command imports numpy, and so do its workers before they are told anything."""
    (tmp_path / "told.py").write_text(
        "def threads(_):\n"
        "    import torch\n"
        "    from threadpoolctl import threadpool_info\n"
        "    return [torch.get_num_threads(), *(pool['num_threads'] for pool in threadpool_info())]\n"
    )
    (tmp_path / "main.py").write_text(
        "import numpy\nfrom told import threads\nfrom probekit._workers import run_in_processes\n"
        "if __name__ == '__main__':\n"
        "    print(max(count for _, found in run_in_processes(threads, [0, 1], jobs=2) for count in found))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    command = [sys.executable, str(tmp_path / "main.py")]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "1"


def _test_rows(run: Path) -> pd.DataFrame:
    return _heads(run).query("split == 'test' and slice_by == 'all'")


def _heads(run: Path) -> pd.DataFrame:
    """Return the results of the heads: baselines, which see no features, have tests of their own."""
    return probekit.load_results(run).query("control != 'metadata'")


def test_noise_draws_are_settings_of_their_own(tmp_path):
    held = [("0", 0), ("0.1", 0), ("0.1", 1)]
    store = planted_store(tmp_path / "store", signal={2: 1.0}, seed=0, coordinates=held)
    frame = _test_rows(probekit.run_sweep(config(), stores=[store], out=tmp_path / "run"))
    assert frame.groupby(["sigma", "draw"], sort=True).size().to_dict() == dict.fromkeys(held, 4)
    assert frame["record_id"].is_unique
    first, second = (frame.query(f"sigma == '0.1' and draw == {draw}")["accuracy"].to_numpy() for draw in (0, 1))
    assert not np.array_equal(first, second)
    assert frame[frame["chosen"]].groupby(["sigma", "draw"]).size().tolist() == [1, 1, 1]
    frame = _test_rows(probekit.run_sweep(config(draws=[1]), stores=[store], out=tmp_path / "run"))
    assert set(zip(frame["sigma"], frame["draw"], strict=True)) == {("0.1", 1)}
    with pytest.raises(ConfigError, match=r"holds no draw 2; it holds 0, 1"):
        probekit.run_sweep(config(draws=[2]), stores=[store], out=tmp_path / "other")
    with pytest.raises(ConfigError, match=r"holds no draw 1 at sigma 0; it holds 0 there"):
        probekit.run_sweep(config(sigmas=["0", "0.1"], draws=[1]), stores=[store], out=tmp_path / "other")


def test_the_output_point_is_a_single_and_neither_in_all_nor_chosen(tmp_path):
    store = planted_store(tmp_path / "store", signal={1: 0.7, 4: 3.0}, seed=0, further=True)
    settings = config(LINEAR | {"layer_sets": ["singles", "all", [3, 4], {"relative": [1.0]}]}, poolings=["mean"])
    frame = _test_rows(probekit.run_sweep(settings, stores=[store], out=tmp_path / "run")).set_index("layer_set")
    assert set(frame.index) == {"0", "1", "2", "3", "4", "0+1+2+3", "3+4"}
    assert frame["accuracy"].idxmax() in ("4", "3+4")
    assert frame.loc["4", ["layer", "relative_depth", "chosen"]].tolist() == [4, 1.0, False]
    assert frame.index[frame["chosen"]].tolist() == ["1"]
    assert frame.loc["3", "relative_depth"] == 1.0


def test_layer_sets_are_those_of_the_pooling(tmp_path):
    store = planted_store(tmp_path / "store", signal={}, seed=0, further=True)
    heads = LINEAR | {"layer_sets": ["singles", "all"]}
    frame = _test_rows(probekit.run_sweep(config(heads), stores=[store], out=tmp_path / "run"))
    text = frame[frame["pooling"] == "text"].set_index("layer_set")
    assert set(text.index) == {"0", "1", "2", "0+1+2"}
    assert text.loc["1", "low"] > 0.6
    assert frame.groupby("pooling")["pooling_layers"].unique().map(list).to_dict() == {"mean": [4], "text": [3]}
    with pytest.raises(ConfigError, match=r"pooling 'text', head 'linear': .*layer 3 is not there; allowed: 0, 1, 2"):
        probekit.run_sweep(config(LINEAR | {"layer_sets": [[3]]}), stores=[store], out=tmp_path / "other")


@pytest.mark.parametrize(
    ("weights", "prompts", "control"),
    [
        (None, None, "trained"),
        (None, "real", "trained"),
        ("init:0", "real", "init:0"),
        (None, "empty", "empty-prompts"),
        (None, "shuffled:3", "shuffled-prompts:3"),
        ("shuffled:1", "empty", "shuffled:1+empty-prompts"),
        ("init:0", "shuffled:3", "init:0+shuffled-prompts:3"),
    ],
)
def test_other_prompts_are_controls_of_the_backbone(tmp_path, weights, prompts, control):
    store = planted_store(tmp_path / "store", signal={}, seed=0, pairs=60, control=weights, prompts=prompts)
    frame = _test_rows(probekit.run_sweep(config(), stores=[store], out=tmp_path / "run"))
    assert set(frame["control"]) == {control}
    assert set(frame["backbone"]) == {"planted-0"}


def test_results_carry_how_far_a_noise_level_is_resolved_without_fitting_again(tmp_path):
    held = [("0", 0), ("0.1", 0)]
    store = planted_store(tmp_path / "store", signal={}, seed=0, pairs=60, coordinates=held)
    run = tmp_path / "run"
    frame = _test_rows(probekit.run_sweep(config(), stores=[store], out=run))
    assert frame["sigma_ratio"].isna().all()
    parts = {path: path.read_bytes() for path in run.glob("parts/*")}
    held_store = probekit.FeatureStore(store)
    writer = open_store(store, config=_own(held_store), describe=held_store.describe)
    writer.record_resolution("0.1", ratio=2.5, rows=8)
    fitted: list[str] = []
    probekit.run_sweep(config(), stores=[store], out=run, progress=lambda d, t, text: fitted.append(text))
    frame = _test_rows(run)
    assert frame.query("sigma == '0'")["sigma_ratio"].isna().all()
    assert frame.query("sigma == '0.1'")["sigma_ratio"].eq(2.5).all()
    assert (fitted, {path: path.read_bytes() for path in run.glob("parts/*")}) == ([], parts)
    assert describe_run(run)["unresolved"] == [
        {"backbone": "planted-0", "control": "trained", "sigma": "0.1", "sigma_ratio": 2.5}
    ]
    settings = load_config(run)["stores"][0]
    assert settings["sigma_resolution"]["0.1"]["resolved"] is False


def _own(store: probekit.FeatureStore) -> dict:
    """Return the configuration of a store as its dump gave it."""
    return {key: value for key, value in store.config.items() if key not in ("format", "dtype_policy")}


def test_where_no_pair_differs_there_is_no_accuracy_and_the_rest_goes_on(tmp_path):
    store = planted_store(tmp_path / "store", signal={}, seed=0, further=True)
    mlp = {"kind": "mlp", "layer_sets": [[0]], "hidden": [4], "max_epochs": 2}
    settings = config(LINEAR | {"layer_sets": ["singles", "all"]}, mlp, poolings=["text"])
    run = probekit.run_sweep(settings, stores=[store], out=tmp_path / "run")
    frame = _test_rows(run).set_index(["head", "layer_set"])
    for head in ("linear", "mlp"):
        assert np.isnan(frame.loc[(head, "0"), "accuracy"])
        assert frame.loc[(head, "0"), "head_parameters"] == 0
    assert frame.loc[("linear", "1"), "chosen"]
    assert frame.loc[("linear", "0+1+2"), "low"] > 0.6
    text = probekit.build_report(run, tmp_path / "report.html").read_text()
    assert "2 heads had nothing to fit, since no training pair differs there" in text
    assert "exactly equal scores" not in text
    assert "nan" not in (tmp_path / "report_figures" / "depth.svg").read_text().lower()
    assert list(pd.read_csv(tmp_path / "report_figures" / "depth.csv")["layers"]) == ["single"] * 3 + ["all layers"]


def test_left_out_pairs_of_every_split_reach_the_report(tmp_path):
    path = planted_store(tmp_path / "store", signal={1: 2.0}, seed=0, broken=60)
    run = probekit.run_sweep(config(), stores=[path], out=tmp_path / "run")
    store = probekit.FeatureStore(path)
    lost = {split: len(store.pairs(split=split).excluded) for split in ("train", "validation", "test")}
    assert sum(lost.values()) == 60
    assert all(lost.values())
    text = probekit.build_report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    counted = f"{lost['train']} training, {lost['validation']} validation, {lost['test']} test pairs are left out"
    assert f"Up to {counted}" in " ".join(text.split())


def test_a_sweep_is_judged_by_the_protocol_it_names(tmp_path):
    store = planted_store(tmp_path / "store", signal={2: 1.5}, seed=0, ties=0.3)
    frames = {}
    for protocol in ("strict", "mps-inversion", "pickscore"):
        run = probekit.run_sweep(config(protocol=protocol), stores=[store], out=tmp_path / protocol)
        frames[protocol] = (
            probekit.load_results(run).query("split == 'test' and source == 'all' and layer == 2").iloc[0]
        )
        margins = load_margins(run, [frames[protocol]["record_id"]]).query("split == 'test'")
        # each planted pair has a prompt of its own, so that both means are the same
        assert margins["correct"].mean() == pytest.approx(frames[protocol]["accuracy"])
        assert margins["prompt_id"].is_unique
        assert frames[protocol]["protocol"] == protocol
    strict, inversion, pickscore = frames.values()
    ties = strict["true_ties"] / (strict["n_pairs"] + strict["true_ties"])
    assert 0.15 < ties < 0.45
    assert inversion["accuracy"] == pytest.approx(ties + (1 - ties) * strict["accuracy"])
    assert strict["true_ties"] == inversion["true_ties"] == pickscore["true_ties"]
    assert (strict["expected_random"], strict["expected_constant"], inversion["expected_constant"]) == (0.5, 0, 1)
    assert inversion["expected_random"] == pytest.approx(0.5 + ties / 2)
    assert np.isnan(strict["threshold"])
    judged = load_margins(tmp_path / "pickscore", [pickscore["record_id"]]).query("split == 'validation'")
    assert pickscore["threshold"] == tune_threshold(judged["margin"].to_numpy(), judged["label"].to_numpy())
    assert pickscore["predicted_ties"] > 0


def test_a_protocol_that_needs_the_order_of_the_file_is_refused_without_it(tmp_path):
    store = planted_store(tmp_path / "store", signal={2: 1.5}, seed=0)
    (file,) = (store / "judgements").glob("*.parquet")
    judgements = pd.read_parquet(file)
    file.with_suffix(".json").unlink()
    judgements.drop(columns="a_listed_first", errors="ignore").to_parquet(file, index=False)
    with pytest.raises(ConfigError, match="protocol is 'hpsv2-inversion-listed', but the judgements do not say"):
        probekit.run_sweep(config(protocol="hpsv2-inversion-listed"), stores=[store], out=tmp_path / "run")
    first = np.arange(len(judgements)) % 2 == 0
    judgements.assign(a_listed_first=first).to_parquet(file, index=False)
    run = probekit.run_sweep(config(protocol="hpsv2-inversion-listed"), stores=[store], out=tmp_path / "run")
    assert probekit.load_results(run)["expected_first"].notna().all()
