"""Baselines that see no picture, slices of the test pairs, and what a head adds to the generators' names."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted_store import planted_store
from scipy.optimize import minimize

import probekit
from probekit.config import SweepConfig
from probekit.preferences.generators import fit_generators
from probekit.results import load_beyond, load_margins
from probekit.stats import right_with_a_coin
from probekit.store import Pairs
from probekit.sweep.slices import further_slices, slices_of

LINEAR = {"kind": "linear", "layer_sets": ["singles"], "strengths": [0.01, 0.1]}
CONFIG = SweepConfig.checked({"heads": [LINEAR], "resamples": 200}, source="test")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two stores of one data set whose generators and file sizes say something of the labels."""
    folder = tmp_path_factory.mktemp("baselines")
    options = {"signal": {2: 1.5}, "seed": 0, "pairs": 1000, "ties": 0.1, "metadata": True}
    stores = [planted_store(folder / name, of=of, **options) for name, of in (("one", 0), ("two", 1))]
    return probekit.run_sweep(CONFIG, stores=stores, out=folder / "run"), probekit.FeatureStore(stores[0])


@pytest.fixture(scope="module")
def frame(run):
    return probekit.load_results(run[0])


def baseline(frame):
    test = frame.query("head_kind == 'metadata' and split == 'test' and slice_by == 'all'")
    return test.set_index("backbone")


def test_baselines_are_there_once_for_a_data_set(frame):
    names = baseline(frame)
    assert names.index.tolist() == [
        "generator", "file size", "format", "first listed", "larger file", "A first", "all metadata",
    ]  # fmt: skip
    assert set(names["control"]) == {"metadata"}
    apart = frame.query("backbone == 'generator' and split == 'test' and source == 'different'").iloc[0]
    assert apart["low"] > 0.6
    assert names.loc["generator", "accuracy"] < apart["accuracy"]  # pairs of one generator count as wrong
    assert names.loc["generator", "predicted_ties"] > 50
    assert names.loc["larger file", "low"] > 0.5
    for order in ("first listed", "A first"):
        assert names.loc[order, "low"] < 0.5 < names.loc[order, "high"]
    assert not names["chosen"].any()


def test_a_baseline_says_what_its_rule_says(run, frame):
    folder, store = run
    names = baseline(frame)
    margins = {name: load_margins(folder, [key]) for name, key in names["record_id"].items()}
    judged = store.pairs().frame.set_index("pair_id").loc[margins["generator"]["pair_id"]]
    assert (margins["first listed"]["margin"].to_numpy() > 0).tolist() == judged["a_listed_first"].tolist()
    larger = np.sign((judged["bytes_a"] - judged["bytes_b"]).to_numpy())
    np.testing.assert_array_equal(margins["larger file"]["margin"], larger)
    np.testing.assert_array_equal(np.sign(margins["file size"]["margin"]), larger)  # the better files are larger
    prior = margins["generator"]["margin"].to_numpy()
    assert ((prior == 0) == (judged["model_a"] == judged["model_b"]).to_numpy()).all()
    better = (judged["model_a"] > judged["model_b"]).to_numpy()  # g2 is better than g1, g1 than g0
    assert ((prior > 0) == better).all()


def test_generator_strengths_are_those_of_a_fit_on_training_pairs(run, frame):
    folder, store = run
    row = baseline(frame).loc["generator"]
    pairs = store.pairs(split="train")
    names = ["g0", "g1", "g2"]
    design = sum(
        sign * (pairs.frame[side].to_numpy()[:, None] == names) for sign, side in ((1.0, "model_a"), (-1.0, "model_b"))
    )

    def objective(strength):
        margin = design @ strength
        losses = pairs.label * np.logaddexp(0, -margin) + (1 - pairs.label) * np.logaddexp(0, margin)
        return losses.sum() + strength @ strength / (2 * row["strength"])

    found = minimize(objective, np.zeros(3), tol=1e-10).x
    margins = load_margins(folder, [row["record_id"]]).query("split == 'test'")
    test = store.pairs(split="test").frame
    expected = found[test["model_a"].map(names.index)] - found[test["model_b"].map(names.index)]
    np.testing.assert_allclose(margins["margin"], expected, rtol=1e-3, atol=1e-4)


def test_the_model_of_generators_is_that_of_lint_and_says_nothing_of_unseen_ones(tmp_path):
    """The sweep's margins are those of `fit_generators`, and 0 for a generator that only test pairs show."""
    store = planted_store(tmp_path / "store", signal={}, seed=0, pairs=200, metadata=True)
    path = next((store / "judgements").glob("*.parquet"))
    judged = pd.read_parquet(path)
    new = (judged["split"] == "test") & (np.arange(len(judged)) % 20 == 9)
    judged.loc[new, "model_a"] = "new"
    judged.to_parquet(path, index=False)
    path.with_suffix(".json").unlink()
    folder = probekit.run_sweep(CONFIG, stores=[store], out=tmp_path / "run")
    row = baseline(probekit.load_results(folder)).loc["generator"]
    margins = load_margins(folder, [row["record_id"]]).query("split == 'test'").set_index("pair_id")["margin"]
    train, test = (judged[judged["split"] == split] for split in ("train", "test"))
    model = fit_generators(train, train["label"].to_numpy(), np.ones(len(train)))
    np.testing.assert_allclose(margins[test["pair_id"]], model.margins(test), atol=1e-6)
    assert (margins[judged.loc[new, "pair_id"]] == 0).all()
    assert row["predicted_ties"] == (margins == 0).sum() > new.sum() > 5
    gain = load_beyond(folder).iloc[0]
    right = right_with_a_coin(model.margins(test), test["label"].to_numpy())
    assert (gain["accuracy_generator"], gain["n_same"]) == (pytest.approx(right.mean()), row["predicted_ties"])


def test_a_store_with_other_sides_gives_the_same_gain_over_generators(run, tmp_path):
    """Which picture is A says nothing; an earlier version chose it otherwise, and both may stand in one run."""
    options = {"signal": {2: 1.5}, "seed": 0, "pairs": 1000, "ties": 0.1, "metadata": True}
    stores = [planted_store(tmp_path / name, of=of, **options) for name, of in (("one", 0), ("two", 1))]
    path = next((stores[1] / "judgements").glob("*.parquet"))
    judged = pd.read_parquet(path)
    turned = np.arange(len(judged)) % 3 == 0
    for name in ("row", "model", "bytes", "width", "height", "format"):
        a, b = judged[f"{name}_a"], judged[f"{name}_b"]
        judged[f"{name}_a"], judged[f"{name}_b"] = a.mask(turned, b), b.mask(turned, a)
    judged["label"] = judged["label"].mask(turned, 1 - judged["label"])
    judged["a_listed_first"] ^= turned
    judged.to_parquet(path, index=False)
    path.with_suffix(".json").unlink()
    again = load_beyond(probekit.run_sweep(CONFIG, stores=stores, out=tmp_path / "run"))
    before = load_beyond(run[0])
    columns = ["n_pairs", "n_same", "accuracy_generator", "accuracy_both", "difference"]
    np.testing.assert_allclose(again[columns], before[columns], atol=0.005)
    np.testing.assert_allclose(again["generator_coefficient"], before["generator_coefficient"], rtol=0.02)


def test_slices_leave_no_pair_uncounted(frame):
    test = frame.query("split == 'test'")
    total = test[test["slice_by"] == "all"].set_index("record_id")[["n_pairs", "true_ties"]]
    for slicing in ("generators", "same_generator"):
        summed = test[test["slice_by"] == slicing].groupby("record_id")[["n_pairs", "true_ties"]].sum()
        pd.testing.assert_frame_equal(summed.sort_index(), total.sort_index(), check_names=False)
    assert set(test["slice_by"]) == {"all", "source", "generators", "same_generator"}  # winners alone, lone pairs
    assert set(frame.query("split == 'validation'")["slice_by"]) == {"all", "source"}


def test_accuracy_of_a_slice_is_that_of_its_pairs(run, frame):
    folder, store = run
    row = frame.query("layer == 2 and split == 'test' and slice_by == 'same_generator' and source == 'same'").iloc[0]
    margins = load_margins(folder, [row["record_id"]]).query("split == 'test'").set_index("pair_id")
    judged = store.pairs(split="test").frame.set_index("pair_id")
    same = judged.index[(judged["model_a"] == judged["model_b"]) & (judged["label"] != 0.5)]
    here = margins.loc[same]
    assert row["n_pairs"] == len(here)
    assert row["accuracy"] == pytest.approx(((here["margin"] > 0) == (here["label"] > 0.5)).mean())
    assert row["low"] < row["accuracy"] < row["high"]


def test_the_gain_over_generators_is_that_of_two_coefficients_fitted_on_validation(run, frame):
    folder, _ = run
    beyond = load_beyond(folder)
    chosen = frame.query("chosen and split == 'test' and slice_by == 'all'")
    assert sorted(beyond["record_id"]) == sorted(chosen["record_id"])
    row = beyond.iloc[0]
    both = [load_margins(folder, [row[key]]).query("label != 0.5") for key in ("record_id", "baseline_id")]
    scores = np.stack([margins["margin"].to_numpy() for margins in both], axis=1)
    split, label = both[0]["split"].to_numpy(), both[0]["label"].to_numpy()
    fit = split == "validation"
    head = probekit.BradleyTerryClassifier(C=100.0).fit_differences(scores[fit], label[fit])
    right = (scores[~fit] @ head.coef_ > 0) == (label[~fit] > 0.5)
    alone = np.where(scores[~fit, 1] == 0, 0.5, (scores[~fit, 1] > 0) == (label[~fit] > 0.5))
    assert row["accuracy_both"] == pytest.approx(right.mean())
    assert row["accuracy_generator"] == pytest.approx(alone.mean())
    assert row["difference"] == pytest.approx(right.mean() - alone.mean())
    assert 0 < row["low"] < row["difference"] < row["high"]
    assert row["n_same"] == (scores[~fit, 1] == 0).sum() > 0


def test_the_report_shows_them_and_draws_no_baseline(run, tmp_path):
    text = probekit.build_report(run[0], tmp_path / "report.html").read_text(encoding="utf-8")
    for part in ("Without the backbone", "Slices of the test pairs", "The generators&#39; names alone decide"):
        assert part in text
    assert "Pictures of one generator" in text
    points = pd.read_csv(tmp_path / "report_figures" / "depth.csv")
    assert set(points["model"]) == {"planted-0", "planted-1"}


def test_judgements_that_do_not_say_have_no_such_baseline_and_it_is_said_once(tmp_path, caplog):
    options = {"signal": {}, "pairs": 60, "seed": 0}
    stores = [planted_store(tmp_path / name, of=of, **options) for name, of in (("one", 0), ("two", 1))]
    with caplog.at_level("INFO", logger="probekit"):
        run = probekit.run_sweep(CONFIG, stores=stores, out=tmp_path / "run")
    assert baseline(probekit.load_results(run)).index.tolist() == ["A first"]
    (said,) = [record.message for record in caplog.records if "no baselines of" in record.message]
    assert "generator, width, height, file size" in said
    assert load_beyond(run).empty


def pairs_of(**columns):
    """Pairs of rows with what slices look at."""
    frame = pd.DataFrame(columns)
    n = len(frame)
    defaults = {"prompt": [f"p{i}" for i in range(n)], "row_a": [f"a{i}" for i in range(n)]}
    defaults |= {"row_b": [f"b{i}" for i in range(n)]}
    frame = frame.assign(**{name: value for name, value in defaults.items() if name not in frame})
    label = frame.pop("label").to_numpy(float) if "label" in frame else np.ones(n)
    return Pairs(np.zeros((n, 2), np.int64), label, frame, pd.DataFrame())


def named(pairs):
    found: dict[str, dict[str, int]] = {}
    for slicing, value, inside in further_slices(pairs):
        found.setdefault(slicing, {})[value] = int(inside.sum())
    return found


def test_slices_count_what_is_left_out_and_live_as_long_as_their_pairs():
    def of(label):
        columns = {"source": ["x", "x", "tie"], "group": ["g2", "g1", "g3"], "prompt_id": ["p", "q", "r"]}
        left_out = pd.DataFrame({"source": ["x", "gone"]})
        return replace(pairs_of(label=label, **columns), excluded=left_out)

    pairs, turned = of([1, 0, 0.5]), of([0, 1, 0.5])
    kinds = {one.source: one for one in slices_of(pairs, "strict", detail="sources")}
    assert {name: (len(one.labels), one.left_out) for name, one in kinds.items()} == {
        "all": (3, 2),
        "gone": (0, 1),
        "tie": (1, 0),
        "x": (2, 1),
    }
    assert kinds["all"].groups.tolist() == [1, 0, 2]
    assert (kinds["x"].nothing.random, np.isnan(kinds["tie"].nothing.random)) == (0.5, True)
    assert [one.source for one in slices_of(pairs, "strict", detail="whole")] == ["all"]
    assert slices_of(turned, "strict", detail="whole")[0].labels.tolist() == [0, 1, 0.5]  # equal names, other pairs
    assert slices_of(pairs, "strict", detail="sources")[0] is kinds["all"]
    alive = weakref.ref(pairs)
    del pairs
    gc.collect()
    assert alive() is None


def test_frequent_generators_are_named_and_the_rest_is_together():
    a = ["x"] * 60 + ["y"] * 40 + ["rare", "", "z"]
    b = ["y"] * 60 + ["x"] * 40 + ["x", "x", "z"]
    found = named(pairs_of(model_a=a, model_b=b))
    assert found["generators"] == {"other": 2, "unknown": 1, "x / y": 100}
    assert found["same_generator"] == {"different": 101, "same": 1, "unknown": 1}
    assert named(pairs_of(model_a=["", ""], model_b=["", ""])) == {}


def test_vote_shares_are_those_of_the_preferred_side():
    found = named(pairs_of(label=[0.5, 0.55, 0.45, 0.6, 0.3, 0.9, 0.0]))
    assert found["vote_share"] == {"tie": 1, "under 60 %": 2, "60 to 75 %": 2, "90 % and more": 1, "no votes": 1}
    counted = named(pairs_of(label=[0.6, 1.0, 0.0], n_votes=[5, 5, None]))
    assert counted["vote_share"] == {"60 to 75 %": 1, "90 % and more": 1, "no votes": 1}


def test_images_are_those_of_a_ranking_or_of_a_prompt():
    prompt = ["p", "p", "p", "q", "q"]
    rows = {"row_a": ["1", "1", "2", "4", "6"], "row_b": ["2", "3", "3", "5", "7"]}
    assert named(pairs_of(prompt=prompt, **rows))["images"] == {"3": 3, "4": 2}
    ranked = named(pairs_of(prompt=prompt, ranking_id=["", "", "", "r", "s"], **rows))
    assert ranked["images"] == {"2": 2, "3": 3}
