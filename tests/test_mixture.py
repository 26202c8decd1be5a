"""A sweep fits on several data sets and tests on several: weights, leaks, rows and errors; and the rule for ties."""

import numpy as np
import pandas as pd
import pytest
from planted_store import planted_store

import probekit
from probekit.config import SweepConfig
from probekit.errors import ConfigError, StoreError
from probekit.results import load_controls, load_margins

LINEAR = {"kind": "linear", "layer_sets": ["singles"], "strengths": [0.1]}
SIGNAL = {2: 1.5}
# pairs 0 to 4 of ten are for training, 5 and 6 validation, 7 to 9 test
TOLD = {0: "seen in b's test", 10: "seen in b's validation", 15: "a's validation, b's test"}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Data sets a and b of one backbone, with three prompts in common, and c, on which nothing is fitted."""
    folder = tmp_path_factory.mktemp("stores")
    told_b = {7: TOLD[0], 5: TOLD[10], 18: TOLD[15]}
    return {
        "a": planted_store(folder / "a", signal=SIGNAL, seed=0, of=9, dataset="a", told=TOLD, pairs=200),
        "b": planted_store(folder / "b", signal=SIGNAL, seed=1, of=9, dataset="b", told=told_b, pairs=240),
        "c": planted_store(folder / "c", signal=SIGNAL, seed=2, of=9, dataset="c", pairs=200),
    }


def config(stores, train, tested, **settings):
    data = {"heads": [LINEAR], "resamples": 200}
    data["train"] = [{"store": stores[name], "weight": weight} for name, weight in train.items()]
    data["test"] = [{"store": stores[name]} for name in tested]
    return SweepConfig.checked(data | settings, source="mixture.yaml")


@pytest.fixture(scope="module")
def run(stores, tmp_path_factory):
    mixture = config(stores, {"a": 2.0, "b": 1.0}, "bc")
    return probekit.run_sweep(mixture, out=tmp_path_factory.mktemp("run") / "run")


def heads(run):
    return probekit.load_results(run).query("head_kind == 'linear'")


def test_one_record_has_rows_for_every_test_set(run):
    frame = heads(run)
    assert frame["record_id"].nunique() == 4
    test = frame.query("split == 'test' and slice_by == 'all'").set_index(["dataset", "layer"])
    assert set(frame["trained_on"]) == {"2*a+b"}
    assert test.loc[("b", 2), ["n_pairs", "chosen"]].tolist() == [72, True]
    assert test.loc[("c", 2), ["n_pairs", "chosen"]].tolist() == [60, True]
    assert test.loc[("c", 2), "low"] > 0.6
    validation = frame.query("split == 'validation' and slice_by == 'all'").set_index(["layer", "dataset"])
    assert validation.loc[(2, "b"), "accuracy"] == validation.loc[(2, "c"), "accuracy"]


def test_what_is_connected_to_a_later_split_of_another_file_is_left_out_and_counted(run, stores):
    frame = heads(run)
    assert set(frame["train_connected"]) == {2}  # pairs 0 and 10 of a
    validation = frame.query("split == 'validation' and slice_by == 'all'")
    assert set(validation["left_out"]) == {1}  # pair 15 of a
    judged = load_margins(run, [frame["record_id"].iloc[0]]).query("split == 'validation'")
    assert len(judged) == (40 - 1) + 48
    assert "0-15" not in set(judged["pair_id"])


def test_a_weight_of_two_is_having_every_pair_twice(run, stores):
    frame = heads(run).query("layer == 2")
    held = {name: probekit.FeatureStore(path) for name, path in stores.items()}
    rows, label, offset = [], [], 0
    for name, times in (("a", 2), ("b", 1)):
        pairs = held[name].pairs(split="train")
        keep = ~pairs.frame["pair_id"].isin(["0-0", "0-10"]).to_numpy()
        rows += [pairs.rows[keep] + offset] * times
        label += [pairs.label[keep]] * times
        offset += len(held[name].rows)
    features = np.concatenate([held[name].read(layer=2) for name in "ab"])
    head = probekit.BradleyTerryClassifier(C=0.1).fit(features, np.concatenate(rows), np.concatenate(label))
    tested = held["c"].pairs(split="test")
    expected = head.decision_function(held["c"].read(layer=2), tested.rows)
    margins = load_margins(run, frame["record_id"].unique()).query("split == 'test' and dataset == 'c'")
    assert margins["pair_id"].tolist() == tested.frame["pair_id"].tolist()
    np.testing.assert_allclose(margins["margin"], expected, rtol=1e-3, atol=1e-3)


def test_the_layer_is_chosen_on_weighted_validation_pairs(run):
    frame = heads(run).query("layer == 2")
    margins = load_margins(run, frame["record_id"].unique()).query("split == 'validation' and label != 0.5")
    right = ((margins["margin"] > 0) == (margins["label"] > 0.5)).to_numpy()
    weight = np.where(margins["dataset"] == "a", 2.0, 1.0)
    accuracy = frame.query("split == 'validation' and slice_by == 'all'")["accuracy"].iloc[0]
    assert accuracy == pytest.approx(np.average(right, weights=weight))
    assert accuracy != pytest.approx(right.mean())


def test_the_same_mixture_resumes_and_another_weight_is_another_record(run, stores):
    seen: list[str] = []
    before = (run / "results.parquet").read_bytes()
    mixture = config(stores, {"a": 2.0, "b": 1.0}, "bc")
    probekit.run_sweep(mixture, out=run, progress=lambda d, t, text: seen.append(text))
    assert (seen, (run / "results.parquet").read_bytes()) == ([], before)


def test_the_report_has_a_section_for_every_test_set(run, tmp_path):
    text = probekit.build_report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<h2 class="dataset">b</h2>' in text
    assert '<h2 class="dataset">c</h2>' in text
    assert "heads fitted and layers chosen on 2*a+b" in text
    assert "2 training pairs left out: their group reaches" in text


def test_what_does_not_fit_together_is_one_line(stores, tmp_path):
    mixture, out = config(stores, {"a": 1.0}, "c"), tmp_path / "run"
    with pytest.raises(ConfigError, match=r"beside train and test of the configuration; allowed: stores \(--store"):
        probekit.run_sweep(mixture, stores=[stores["a"]], out=out)
    with pytest.raises(ConfigError, match="no store is given"):
        probekit.run_sweep(SweepConfig.checked({"heads": [LINEAR]}, source="test"), out=out)
    with pytest.raises(ConfigError, match="test: is required"):
        SweepConfig.checked({"heads": [LINEAR], "train": [{"store": "a"}]}, source="test")
    with pytest.raises(ConfigError, match="dataset 'z' is not in the store; allowed: c"):
        probekit.run_sweep(config(stores, {"a": 1.0}, "", test=[{"store": stores["c"], "dataset": "z"}]), out=out)
    with pytest.raises(ConfigError, match="two test sets of a backbone are named 'c'"):
        probekit.run_sweep(config(stores, {"a": 1.0}, "cc"), out=out)
    other = planted_store(tmp_path / "other", signal={}, seed=4, of=9, dataset="d", pairs=60, coordinates=[("0.1", 0)])
    with pytest.raises(
        ConfigError, match=r"both of 'planted-9', but coordinates.* 'sigma 0.005, draw 0' and 'sigma 0.1"
    ):
        probekit.run_sweep(config(stores | {"d": other}, {"a": 1.0}, "d"), out=out)
    lone = planted_store(tmp_path / "lone", signal={}, seed=5, dataset="e", pairs=60)
    with pytest.raises(ConfigError, match=r"test: no store is of 'planted-5' \(trained\), which train names"):
        probekit.run_sweep(config(stores | {"e": lone}, {"a": 1.0, "e": 1.0}, "c"), out=out)
    assert not out.exists()


def test_files_of_one_name_are_told_apart_by_a_name_in_the_mixture(tmp_path):
    held = [planted_store(tmp_path / str(i), signal=SIGNAL, seed=i, of=9, dataset="test", pairs=200) for i in (0, 1)]
    sets = [{"store": store, "name": name} for store, name in zip(held, ("hpdv2", "hpdv3"), strict=True)]
    settings = {"heads": [LINEAR], "resamples": 200, "train": sets}
    run = probekit.run_sweep(SweepConfig.checked(settings | {"test": sets}, source="m"), out=tmp_path / "run")
    assert set(heads(run)["dataset"]) == {"hpdv2", "hpdv3"}
    assert set(heads(run)["trained_on"]) == {"hpdv2+hpdv3"}
    without = [{"store": store} for store in held]
    with pytest.raises(ConfigError, match="named 'test'; allowed: one; give the others a name"):
        probekit.run_sweep(SweepConfig.checked(settings | {"test": without}, source="m"), out=tmp_path / "other")


def test_a_test_set_that_is_the_training_set_leaves_nothing_to_fit(stores, tmp_path):
    for others in ([], [{"store": stores["c"]}]):
        leaking = config(stores, {"a": 1.0}, "", test=[{"store": stores["a"], "split": "train"}, *others])
        with pytest.raises(StoreError, match="a: no train pairs are left"):
            probekit.run_sweep(leaking, out=tmp_path / "run")


@pytest.mark.parametrize("ties", ["soft", "half", "drop"])
def test_tied_training_pairs_follow_the_rule(tmp_path, ties):
    store = planted_store(tmp_path / "store", signal=SIGNAL, seed=0, pairs=200)
    path = next((store / "judgements").glob("*.parquet"))
    frame = pd.read_parquet(path)
    train = frame["split"] == "train"
    frame.loc[train, "label"] = np.resize([0.5, 0.7, 0.0], train.sum())
    frame.to_parquet(path, index=False)
    path.with_suffix(".json").unlink()
    settings = SweepConfig.checked({"heads": [LINEAR | {"layer_sets": [[2]]}], "resamples": 200}, source="test")
    run = probekit.run_sweep(settings, stores=[store], out=tmp_path / "run", ties=ties)
    held = probekit.FeatureStore(store)
    pairs = held.pairs(split="train")
    used = pairs.label != 0.5 if ties == "drop" else np.ones(len(pairs.label), bool)
    label = np.where(pairs.label == 0.7, 1.0, pairs.label) if ties == "half" else pairs.label
    head = probekit.BradleyTerryClassifier(C=0.1).fit(held.read(layer=2), pairs.rows[used], label[used])
    margins = load_margins(run, heads(run)["record_id"].unique()).query("split == 'test'")["margin"]
    again = head.decision_function(held.read(layer=2), held.pairs(split="test").rows)
    np.testing.assert_allclose(margins, again, rtol=1e-3, atol=1e-3)
    assert set(heads(run)["train_ties"]) == {int((pairs.label == 0.5).sum())}
    text = probekit.build_report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"True ties among the training pairs: {int((pairs.label == 0.5).sum())}" in text


def test_controls_of_a_mixture(stores, tmp_path):
    """Refits, outer folds and layers beside random weights, tested on a data set that nothing is fitted on."""
    told = {"a": TOLD, "b": {7: TOLD[0], 5: TOLD[10], 18: TOLD[15]}, "c": None}
    of = {"of": 9, "control": "init:0", "noise": 1}
    random = {
        f"random {name}": planted_store(
            tmp_path / name,
            signal={},
            seed=seed,
            dataset=name,
            told=told[name],
            pairs=240 if name == "b" else 200,
            **of,
        )
        for seed, name in enumerate(stores)
    }
    head = LINEAR | {"layer_sets": [[1], [2]], "controls": {"halves": 10, "nested": 2, "conditional": True}}
    weights = {"a": 2.0, "b": 1.0, "random a": 2.0, "random b": 1.0}
    asked = config(stores | random, weights, ["c", "random c"], heads=[head | {"folds": 2}], resamples=100)
    run = probekit.run_sweep(asked, out=tmp_path / "run")
    rows = load_controls(run).query("control == 'trained'").set_index(["dataset", "altered", "layer_set"])
    whole = heads(run).query("altered == '' and control == 'trained' and split == 'test' and slice_by == 'all'")
    half = rows.loc[("c", "half", "2")]
    assert half["accuracy"] == pytest.approx(whole.set_index("layer_set")["accuracy"]["2"])
    assert half["low"] > 0.6
    assert rows.loc[("c", "beside:init", "2"), "difference_low"] > 0
    folds = rows.query("altered == 'nested:2'").reset_index().set_index("dataset")
    assert set(folds.index) == {"a", "b"}  # what is fitted on, of which the run tests neither
    assert (folds["selected"] == "2: 2").all()
    assert (folds["low"] > 0.55).all()
    page = probekit.build_report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "of a</td>" in page
    assert "of b</td>" in page
