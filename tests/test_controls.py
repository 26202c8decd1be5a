"""Refits and altered features find what was planted, find nothing where nothing was, and resume like every fit."""

import numpy as np
import pandas as pd
import pytest
from planted_store import planted_store

import probekit
from probekit.config import SweepConfig
from probekit.errors import ConfigError
from probekit.heads import BradleyTerryClassifier, BradleyTerryClassifierCV
from probekit.report import build_report
from probekit.report.claim import MIDDLE
from probekit.report.claims import make_claims
from probekit.report.transfer import transfer_points
from probekit.results import load_controls, load_margins
from probekit.stats import permuted_labels
from probekit.sweep import dry_run
from probekit.sweep.altered import altered
from probekit.sweep.run import prepare

LINEAR = {"kind": "linear", "layer_sets": [[1], [2]], "strengths": [0.001, 0.1, 10.0]}


def config(controls: dict, **head: object) -> SweepConfig:
    heads = [LINEAR | {"controls": controls} | head]
    return SweepConfig.checked({"heads": heads, "resamples": 100}, source="test")


def heads_of(run) -> pd.DataFrame:
    frame = probekit.load_results(run)
    return frame[(frame["split"] == "test") & (frame["slice_by"] == "all") & (frame["head_kind"] == "linear")]


@pytest.fixture(scope="module")
def refitted(tmp_path_factory):
    """A run with all refits of two layers, of which the second knows the preference."""
    folder = tmp_path_factory.mktemp("refitted")
    store = planted_store(folder / "store", signal={2: 1.5}, seed=0)
    asked = config({"permuted": 20, "halves": 10, "shares": [0.1, 0.5]})
    return probekit.run_sweep(asked, stores=[store], out=folder / "run"), store, asked


def test_refits_are_rows_with_what_was_altered(refitted):
    run, _, _ = refitted
    frame = heads_of(run)
    assert frame.groupby(["layer", "altered"]).size().to_dict() == {
        (layer, altered): n
        for layer in (1, 2)
        for altered, n in (("", 1), ("permuted", 20), ("half", 10), ("share:0.1", 1), ("share:0.5", 1))
    }
    n_train = frame.groupby("altered")["n_train"].unique().map(list).to_dict()
    assert n_train == {"": [200], "permuted": [200], "half": [100], "share:0.1": [20], "share:0.5": [100]}
    assert list(frame.loc[frame["chosen"] & (frame["altered"] == ""), "layer"]) == [2]
    refits = frame[frame["altered"].isin(["permuted", "half"])]
    whole = frame[frame["altered"] == ""].set_index("layer")["strength"]
    assert (refits["strength"] == refits["layer"].map(whole)).all()


def test_permuted_labels_leave_chance_and_what_is_memorised(refitted):
    run, _, _ = refitted
    rows = load_controls(run).set_index(["layer", "altered"])
    row = rows.loc[(2, "permuted")]
    assert row["low"] < 0.5 < row["high"]
    assert row["accuracy"] == pytest.approx(0.5, abs=0.06)
    assert row["train_accuracy"] > 0.53  # eight channels and 200 pairs memorise a little
    assert rows.loc[(2, "share:0.5"), "low"] > 0.6
    assert rows.loc[(1, "share:0.5"), "low"] < 0.5 < rows.loc[(1, "share:0.5"), "high"]


def test_halves_widen_the_interval_and_decide_between_layers(refitted):
    run, _, _ = refitted
    rows = load_controls(run).set_index(["layer", "altered"])
    whole = heads_of(run).query("altered == ''").set_index("layer")
    best = rows.loc[(2, "half")]
    assert best["accuracy"] == pytest.approx(whole.loc[2, "accuracy"])
    assert best["se"] == pytest.approx(np.hypot(best["se_test"], best["se_train"]))
    assert best["high"] - best["low"] >= 0.98 * (whole.loc[2, "high"] - whole.loc[2, "low"])
    other = rows.loc[(1, "half")]
    assert (other["against"], best["against"]) == ("chosen layer 2", "")
    assert other["difference_high"] < -0.1  # the planted layer is told apart, other training pairs included


def test_the_same_command_adds_refits_to_what_is_there(refitted, tmp_path):
    run, store, asked = refitted
    plain = probekit.run_sweep(config({}), stores=[store], out=tmp_path / "run")
    assert load_controls(plain).empty
    before = {path.name: path.read_bytes() for path in plain.glob("parts/*")}
    told = dict(dry_run(asked, stores=[store], out=plain))
    assert told["linear fits"] == "0 to do, 2 already done"
    assert told["training labels permuted"] == "40 to do, 0 already done"
    probekit.run_sweep(asked, stores=[store], out=plain)
    after = {path.name: path.read_bytes() for path in plain.glob("parts/*")}
    assert all(after[name] == content for name, content in before.items())
    assert (plain / "results.parquet").read_bytes() == (run / "results.parquet").read_bytes()
    lost = sorted(plain.glob("parts/*"))[3:9]
    for path in lost:
        path.unlink()
    probekit.run_sweep(asked, stores=[store], out=plain)
    assert {path.name: path.read_bytes() for path in plain.glob("parts/*")} == after


def test_shares_are_nested_and_halves_the_same_for_all_layers(refitted, tmp_path):
    _, store, asked = refitted
    plan = prepare(asked, stores=[store], out=tmp_path, prefs=None, reading=None, ties=None, jobs=1, memory=None)
    places = {(one.layers, one.altered, one.seed): set(altered(one).train.tolist()) for one in plan.records}
    small, large = (places[(1,), f"share:{share}", 0] for share in (0.1, 0.5))
    assert small < large
    halves = [places[(2,), "half", seed] for seed in range(10)]
    assert halves == [places[(1,), "half", seed] for seed in range(10)]
    assert len({frozenset(half) for half in halves}) == 10


def test_permuted_labels_move_within_prompts_and_joined_images_together():
    """Two rankings of three, of which the second shares an image with a pair of another prompt."""
    first, second = np.array(list("aabddex")), np.array(list("bccefff"))
    prompts = np.array([0, 0, 0, 1, 1, 1, 2])
    labels = np.array([0.9, 0.8, 0.5, 1.0, 1.0, 1.0, 0.0])
    drawn = np.stack([permuted_labels(labels, first, second, prompts, seed=seed) for seed in range(400)])
    joint = {tuple(row) for row in drawn[:, 3:]}
    assert joint == {(1, 1, 1, 0), (0, 0, 0, 1)}
    assert np.allclose(np.sort(np.abs(drawn[:, :3] - 0.5)), [0, 0.3, 0.4])
    assert drawn[:, :3].mean(axis=0) == pytest.approx(0.5, abs=0.06)
    assert len({tuple(row) for row in drawn[:, :3].round(3)}) == 6


@pytest.mark.parametrize(("n", "d"), [(300, 20), (60, 90)])
def test_refits_together_are_the_fits_one_by_one(n, d):
    rng = np.random.default_rng(0)
    D = (rng.normal(size=(n, d)) * np.exp(rng.normal(size=d))).astype(np.float32)
    label = (D[:, 0] + rng.normal(size=n) > 0).astype(float)
    labels = np.stack([label, rng.permutation(label)])
    weights = np.stack([np.arange(n) % 2, np.ones(n)])
    head = BradleyTerryClassifierCV(Cs=[0.1, 1.0]).fit_differences(D, label, refits=(labels, weights))
    scale = np.sqrt((D.astype(np.float64) ** 2).mean(axis=0))
    for refit, y, weight in zip(head.refits_, labels, weights, strict=True):
        kept = weight > 0
        alone = BradleyTerryClassifier(C=head.C_, standardize=False, tol=1e-10).fit_differences(
            (D / scale)[kept].astype(np.float64), y[kept]
        )
        np.testing.assert_allclose(refit.coef_ * scale, alone.coef_, atol=2e-4 * np.abs(alone.coef_).max())


def test_what_controls_cannot_do_is_said(tmp_path):
    store = planted_store(tmp_path / "store", signal={}, seed=0, pairs=60)
    with pytest.raises(ConfigError, match=r"shares: 0\.1 of the training groups .* are 3; allowed: as many as folds"):
        probekit.run_sweep(config({"shares": [0.1]}), stores=[store], out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"controls\.permuted: is 5; allowed: 20 or more"):
        config({"permuted": 5})
    with pytest.raises(ConfigError, match="'late-fusion'; allowed: concat and mean"):
        config({"halves": 10}, combine=["late-fusion"])


def test_the_report_shows_refits_and_nothing_else_changes(refitted, tmp_path):
    run, _, _ = refitted
    page = build_report(run, tmp_path / "report.html").read_text()
    table = page[page.index("<h2>Refits and altered features") :]
    for text in ("training labels permuted", "20 fits", "part of the training groups: 0.1", "SE over training"):
        assert text in table
    assert "Accuracy against training pairs" in page
    points = pd.read_csv(tmp_path / "report_figures" / "efficiency.csv")
    assert points["n_train"].tolist() == [20, 100, 200]
    assert (pd.read_csv(tmp_path / "report_figures" / "depth.csv")["layer"] == [1, 2]).all()


def test_heads_on_one_source_make_a_matrix_of_sources(tmp_path, caplog):
    store = planted_store(tmp_path / "store", signal={2: 1.5}, seed=0, metadata=True)
    run = probekit.run_sweep(config({"sources": True}), stores=[store], out=tmp_path / "run")
    every = probekit.load_results(run)
    slicings = {kind: set(rows["slice_by"]) for kind, rows in every[every["head_kind"] == "linear"].groupby("altered")}
    assert slicings[""] > {"all", "source"} == slicings["source:easy"] == slicings["source:none"]
    frame = heads_of(run)
    assert frame.groupby("altered")["n_train"].first().to_dict() == {"": 200, "source:easy": 160, "source:none": 40}
    found = transfer_points(probekit.load_results(run)).set_index(["fitted_source", "source"])
    assert (found["layer"] == 2).all()
    margins = load_margins(run, frame.query("altered == 'source:easy' and layer == 2")["record_id"])
    easy = margins[(margins["split"] == "test") & (margins["source"] == "easy")]
    assert found.loc[("easy", "easy"), "accuracy"] == easy["correct"].mean()
    assert found.loc[("easy", "easy"), "low"] > 0.7
    assert found.loc[("none", "none"), "low"] < 0.5 < found.loc[("none", "none"), "high"]
    page = build_report(run, tmp_path / "report.html").read_text()
    table = page[page.index("<h2>Across kinds of pairs") :]
    assert "<td>easy</td>" in table[: table.index("</table>")]
    few = planted_store(tmp_path / "few", signal={2: 1.5}, seed=0, pairs=20)
    probekit.run_sweep(config({"sources": True}), stores=[few], out=tmp_path / "other")
    assert "no heads on none alone: fewer groups of decided training pairs than folds (5)" in caplog.text


@pytest.mark.parametrize(("signal", "found"), [({2: 1.5}, True), ({}, False)])
def test_nested_folds_measure_the_choice_of_a_layer(signal, found, tmp_path):
    store = planted_store(tmp_path / "store", signal=signal, seed=2)
    asked = config({"nested": 4}, layer_sets=["singles", "all"])
    run = probekit.run_sweep(asked, stores=[store], out=tmp_path / "run")
    frame = heads_of(run)
    folds = frame[frame["altered"] == "nested:4"]
    assert len(folds) == 4 * 4  # single layers alone: it is a layer that is chosen
    (row,) = load_controls(run).to_dict("records")
    chosen = folds[folds["chosen"]]
    assert sorted(chosen["seed"]) == [0, 1, 2, 3]
    counts = {int(part.split(":")[0]): int(part.split(":")[1]) for part in row["selected"].split(", ")}
    assert counts == chosen["layer"].value_counts().to_dict()
    margins = load_margins(run, chosen["record_id"])
    held = margins[margins["split"] == "test"]
    whole = load_margins(run, [frame.loc[frame["altered"] == "", "record_id"].iloc[0]])
    assert not set(held["pair_id"]) & set(whole.loc[whole["split"] == "test", "pair_id"])
    assert held["pair_id"].is_unique
    assert len(held) == 280  # all training and validation pairs, each once
    for _, fold in margins.groupby("record_id"):
        groups = [set(fold.loc[fold["split"] == split, "group"]) for split in ("validation", "test")]
        assert not groups[0] & groups[1]
    assert row["accuracy"] == pytest.approx(held["correct"].mean())
    assert (row["low"] > 0.6) if found else (row["low"] < 0.5 < row["high"])
    assert not found or row["selected"] == "2: 4"
    told = build_report(run, tmp_path / "report.html").read_text()
    assert "chosen in each fold" in told


@pytest.mark.parametrize("ties", ["soft", "half", "drop"])
def test_outer_folds_judge_labels_as_they_are(ties, tmp_path):
    store = planted_store(tmp_path / "store", signal={2: 1.0}, seed=3, pairs=200, ties=0.3)
    plan = prepare(
        config({"nested": 2}),
        stores=[store],
        out=tmp_path / "run",
        prefs=None,
        reading=None,
        ties=ties,
        jobs=1,
        memory=None,
    )
    held = probekit.FeatureStore(store).pairs()
    labels = dict(zip(held.frame["pair_id"], held.label, strict=True))
    for record in plan.records:
        if record.kind == "nested":
            (test,) = altered(record).data.tests.values()
            assert all(labels[pair] == label for pair, label in zip(test.frame["pair_id"], test.label, strict=True))
            assert ties == "drop" or 0.5 in test.label
            assert (0.5 in altered(record).data.train.label) == (ties != "drop")


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """Layers 1 and 2 of the trained store know the preference, layer 0 of the random ones does."""
    folder = tmp_path_factory.mktemp("beside")
    stores = [planted_store(folder / "trained", signal={1: 0.8, 2: 0.8}, seed=4, pairs=1600, noise=0)]
    stores += [
        planted_store(
            folder / f"init-{seed}", signal={0: 1.0}, seed=4, pairs=1600, noise=1 + seed, control=f"init:{seed}"
        )
        for seed in range(3)
    ]
    asked = config({"conditional": True, "padded": True}, layer_sets=[[0], [1], [3], [1, 2], [1, 3]])
    return probekit.run_sweep(asked, stores=stores, out=folder / "run"), stores, asked


def test_what_a_trained_layer_adds_to_the_random_one(beside):
    run, _, _ = beside
    rows = load_controls(run).query("altered == 'beside:init'").set_index("layer")
    assert list(rows.index) == [0, 1, 3]
    assert (rows["n_fits"] == 3).all()
    assert rows.loc[1, "difference_low"] > 0.05
    for layer in (0, 3):  # at layer 0 the random network knows what there is to know
        assert rows.loc[layer, "difference_low"] < 0 < rows.loc[layer, "difference_high"]
    assert rows.loc[0, "accuracy"] > 0.6
    frame = heads_of(run)
    both = frame[frame["altered"].str.startswith("beside:init:")].groupby("layer")["accuracy"].mean()
    alone = (
        frame[(frame["altered"] == "") & frame["control"].str.startswith("init")].groupby("layer")["accuracy"].mean()
    )
    assert rows["difference"].to_numpy() == pytest.approx((both - alone[[0, 1, 3]]).to_numpy())
    assert set(frame.loc[frame["altered"].str.startswith("beside"), "head_parameters"]) == {16}


def test_a_second_trained_layer_adds_more_than_its_dimension_or_nothing(beside):
    run, _, _ = beside
    rows = load_controls(run).query("altered == 'padded:init'").set_index("layer_set")
    assert rows.loc["1+2", "difference_low"] > 0
    assert rows.loc["1+3", "difference_low"] < 0 < rows.loc["1+3", "difference_high"]
    assert rows.loc["1+3", "selected"] == "1: 3"
    frame = heads_of(run)
    padded = frame[frame["altered"].str.startswith("padded")]
    assert set(padded["altered"]) == {f"padded:{layer}:init:{seed}" for layer in (1, 2, 3) for seed in range(3)}
    assert set(padded["head_parameters"]) == {16}


def test_projections_lose_what_lies_in_many_channels(tmp_path, caplog):
    store = planted_store(tmp_path / "store", signal={2: 1.5}, seed=0)
    run = probekit.run_sweep(config({"projected": [2, 8]}), stores=[store], out=tmp_path / "run")
    rows = load_controls(run).set_index("layer")
    assert (rows["altered"] == "projected:2").all()  # eight directions are all channels
    assert sum("projected: 8 is left out where there are 8 channels" in line for line in caplog.messages) == 1
    assert (rows["n_fits"] == 10).all()
    whole = heads_of(run).query("altered == ''").set_index("layer")["accuracy"]
    assert rows.loc[2, "high"] < whole[2]
    assert rows.loc[2, "low"] > 0.5
    assert rows.loc[1, "low"] < 0.5 < rows.loc[1, "high"]
    page = build_report(run, tmp_path / "report.html").read_text()
    assert "random directions in the channels: 2" in page
    points = pd.read_csv(tmp_path / "report_figures" / "dimension.csv")
    assert points["channels"].tolist() == [2, 8]


def test_altered_features_are_counted_resumed_and_shown(beside, tmp_path):
    run, stores, asked = beside
    told = dict(dry_run(asked, stores=stores, out=run))
    assert told["beside the same layer of random weights"] == "0 to do, 9 already done"
    assert told["one trained layer, the others of random weights"] == "0 to do, 12 already done"
    before = (run / "results.parquet").read_bytes()
    for path in sorted(run.glob("parts/*"))[::4]:
        path.unlink()
    probekit.run_sweep(asked, stores=stores, out=run)
    assert (run / "results.parquet").read_bytes() == before
    page = build_report(run, tmp_path / "report.html").read_text()
    for text in ("to random layer alone", "to one trained layer"):
        assert text in page


def test_without_random_weights_there_is_nothing_to_put_beside(beside, tmp_path, caplog):
    _, stores, _ = beside
    asked = config({"conditional": True})
    probekit.run_sweep(asked, stores=stores[:1], out=tmp_path / "run")
    said = "no random weights of this backbone with the same pairs are in the sweep"
    assert sum(said in line for line in caplog.messages) == 1  # not once a layer


def test_controls_by_a_mean_over_prompts(tmp_path):
    """Rankings of unequal size weigh alike: in refits, in what they are compared with, and in claims."""
    # of ten pairs each is of its own split; prompts have one pair or several
    told = {pair: f"{pair % 10} {pair // 30 if pair // 10 % 2 else -pair}" for pair in range(400)}
    store = planted_store(tmp_path / "store", signal={1: 0.8, 2: 1.2}, seed=5, told=told)
    asked = config({"halves": 10}, folds=2).model_copy(update={"protocol": "hpsv2-imagereward"})
    run = probekit.run_sweep(asked, stores=[store], out=tmp_path / "run")
    whole = heads_of(run).query("altered == ''").set_index("layer")
    rows = load_controls(run).set_index("layer")
    margins = load_margins(run, whole["record_id"])
    margins = margins[margins["split"] == "test"]
    mean = margins.groupby(["record_id", "prompt_id"])["correct"].mean().groupby("record_id").mean()
    assert margins.groupby("prompt_id").size().nunique() > 1
    for layer in (1, 2):
        assert rows.loc[layer, "accuracy"] == pytest.approx(mean[whole.loc[layer, "record_id"]])
    by_layer = [mean[whole.loc[layer, "record_id"]] for layer in (1, 2)]
    assert rows.loc[1, "difference"] == pytest.approx(by_layer[0] - by_layer[1])
    (row,) = [row for row in make_claims(run).rows if row.claim == MIDDLE]
    assert row.estimate == pytest.approx(by_layer[1] - by_layer[0])
    assert row.about.endswith("other training pairs")
    right = load_margins(run).query("split == 'test'").pivot(index="pair_id", columns="record_id", values="correct")
    again = heads_of(run).query("altered == 'half'").sort_values("seed")
    refits = {layer: right[again.query(f"layer == {layer}")["record_id"]].to_numpy() for layer in (1, 2)}
    for layer in (1, 2):
        assert rows.loc[layer, "se_train"] == pytest.approx(se_train(refits[layer], right.index, margins), abs=1e-9)
    assert rows["se_train"].max() > 0
    assert row.se_train == pytest.approx(se_train(refits[2] - refits[1], right.index, margins), abs=1e-9)
    # here the refits of the difference scatter less than test pairs alone would make them
    assert row.se_train == 0
    assert "refits scatter no more than their test pairs make them" in row.reason


def se_train(gain, pairs, margins):
    """Standard error over training pairs by numpy: refits (n, R) on pairs of which prompts weigh alike."""
    told = margins.drop_duplicates("pair_id").set_index("pair_id").loc[pairs]
    weight = 1 / told.groupby("prompt_id")["prompt_id"].transform("size").to_numpy()
    weight /= weight.sum()
    accuracy, n = weight @ gain, gain.shape[1]
    residual = weight[:, None] * (gain - accuracy)
    by_group = np.array([residual[told["group"] == group].sum(axis=0) for group in told["group"].unique()])
    covariance = len(by_group) / (len(by_group) - 1) * by_group.T @ by_group
    by_pairs = np.trace((np.eye(n) - 1 / n) @ covariance) / (n - 1)
    return np.sqrt(max(accuracy.var(ddof=1) - by_pairs, 0))
