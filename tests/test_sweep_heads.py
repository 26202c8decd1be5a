"""Every head that a configuration can name is fitted, told apart, resumed and scored as the head itself would be."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted_store import planted_store

import probekit
from probekit.config import PRESETS, SweepConfig
from probekit.errors import ConfigError
from probekit.heads import BradleyTerryClassifierCV, BradleyTerryLateFusion, BradleyTerryScalarMix, concatenate
from probekit.report import build_report
from probekit.report.select import settings
from probekit.results import UNPROBED, describe_run, load_blocks, load_margins
from probekit.sweep.features import Features
from probekit.sweep.fitting import fit
from probekit.sweep.layer_sets import layer_sets
from probekit.sweep.material import material
from probekit.sweep.memory import places_of
from probekit.sweep.plan import plan_records, select_stores, units

STRENGTHS = [0.01, 0.1, 1.0]
LINEAR = {"kind": "linear", "layer_sets": [[1, 2]], "strengths": STRENGTHS, "folds": 3}
MLP = {"kind": "mlp", "layer_sets": [[1, 2]], "hidden": [8], "max_epochs": 3, "seeds": [0, 1, 2]}
TWO = (("0.005", 0), ("0.1", 0))


def config(*heads: dict, **given: object) -> SweepConfig:
    return SweepConfig.checked({"heads": list(heads), "resamples": 100} | given, source="test")


def planned(config: SweepConfig, *stores) -> list:
    opened = [probekit.FeatureStore(store) for store in stores]
    selections = select_stores(opened, judged=None, ties="soft")
    sets = partial(layer_sets, run=Path("none"), allowed=2**30)
    return [record for selection in selections for record in plan_records(config, selection, sets=sets)]


def features_of(record) -> Features:
    return Features(places_of(record), averaged=record.combination == "mean")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("heads") / "store"
    return planted_store(path, signal={1: 1.0, 2: 1.5}, seed=0, coordinates=TWO, pairs=300)


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    rules = LINEAR | {"layer_sets": ["singles", [1, 2]], "combine": ["concat", "mean", "scalar-mix", "late-fusion"]}
    both = LINEAR | {"name": "levels", "layer_sets": ["singles", [1, 2]], "across": "sigma"}
    out = tmp_path_factory.mktemp("heads") / "run"
    return probekit.run_sweep(config(rules, both, MLP), stores=[store], out=out)


def heads_of(run) -> pd.DataFrame:
    frame = probekit.load_results(run)
    return frame[(frame["split"] == "test") & (frame["slice_by"] == "all") & ~frame["head_kind"].isin(UNPROBED)]


def test_each_rule_is_a_record_of_its_own_and_single_layers_are_there_once(run):
    rows = heads_of(run).query("head == 'linear' and sigma == '0.005'")
    assert rows["combination"].tolist() == ["single"] * 4 + ["concat", "mean", "scalar-mix", "late-fusion"]
    assert rows.set_index("combination").loc["mean", "head_parameters"] == 8
    assert rows.set_index("combination").loc["concat", "head_parameters"] == 16
    assert rows["accuracy"].iloc[4:].min() > 0.6


@pytest.mark.parametrize("rule", ["scalar-mix", "late-fusion", "mean"])
def test_a_rule_scores_pairs_as_its_head_does(run, store, rule):
    key = heads_of(run).query("head == 'linear' and sigma == '0.005'").set_index("combination").loc[rule, "record_id"]
    held = probekit.FeatureStore(store)
    layers = [held.read(layer=layer, sigma="0.005") for layer in (1, 2)]
    X = (layers[0] + layers[1]) / 2 if rule == "mean" else concatenate(layers)
    noise = [held.quantisation(layer=layer, sigma="0.005") for layer in (1, 2)]
    noise = np.sqrt(noise[0] ** 2 + noise[1] ** 2) / 2 if rule == "mean" else np.concatenate(noise)
    kinds = {"scalar-mix": BradleyTerryScalarMix, "late-fusion": BradleyTerryLateFusion}
    make = kinds.get(rule, BradleyTerryClassifierCV)
    head = make(Cs=STRENGTHS, cv=3, quantisation=noise, **({} if rule == "mean" else {"widths": [8, 8]}))
    train, test = held.pairs(split="train"), held.pairs(split="test")
    head.fit(X, train.rows, train.label, train.frame["weight"].to_numpy(), train.frame["group"].to_numpy())
    margins = load_margins(run, [key]).query("split == 'test'").set_index("pair_id")["margin"]
    np.testing.assert_allclose(
        margins.loc[test.frame["pair_id"]], head.decision_function(X, test.rows), rtol=1e-4, atol=1e-5
    )


def test_noise_levels_side_by_side_are_one_record_and_choose_a_layer_of_their_own(run, store):
    rows = heads_of(run).query("head == 'levels'")
    assert rows["sigma"].unique().tolist() == ["0.005+0.1"]
    assert len(rows) == 5
    assert rows["chosen"].sum() == 1
    assert rows.set_index("layer_set").loc["1+2", "head_parameters"] == 32
    assert rows.set_index("layer_set").loc["1+2", "low"] > 0.55


def test_single_noise_levels_lead_the_report(run, store, tmp_path):
    frame = probekit.load_results(run)
    assert settings(frame)[0].sigma == "0.005"
    again = probekit.run_sweep(
        config(LINEAR | {"layer_sets": ["singles"], "across": ["sigma"]}), stores=[store], out=tmp_path / "run"
    )
    assert settings(probekit.load_results(again))[0].sigma == "0.005+0.1"


def test_poolings_side_by_side_have_the_layers_that_all_of_them_have(tmp_path):
    store = planted_store(tmp_path / "store", signal={1: 1.0}, seed=1, further=True, coordinates=TWO)
    records = planned(config(LINEAR | {"layer_sets": ["singles", "all"], "across": ["sigma", "pooling"]}), store)
    assert {(record.sigma, record.pooling) for record in records} == {("0.005+0.1", "mean+text")}
    assert [record.layers for record in records] == [(0,), (1,), (2,), (0, 1, 2)]
    found = features_of(records[-1])
    assert found.rows.shape[1] == len(found.noise) == 3 * 2 * (8 + 3)
    held = probekit.FeatureStore(store)
    places = [("0.005", "mean"), ("0.005", "text"), ("0.1", "mean"), ("0.1", "text")]
    expected = [held.read(layer=0, sigma=sigma, pooling=pooling) for sigma, pooling in places]
    np.testing.assert_array_equal(features_of(records[0]).rows, np.concatenate(expected, axis=1))


def test_joining_one_noise_level_is_said(store, caplog):
    head = LINEAR | {"name": "levels", "across": ["sigma", "pooling"]}
    assert [record.sigma for record in planned(config(head, sigmas=["0.1"]), store)] == ["0.1"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{store}, head levels: across: {what} joins nothing, since {only} is the only one; its fits are those on it "
        "alone"
        for what, only in (("sigma", "0.1"), ("pooling", "mean"))
    ]


def test_draws_that_are_not_at_all_levels_are_not_put_side_by_side(tmp_path):
    places = [("0.005", 0), ("0.005", 1), ("0.1", 0)]
    store = planted_store(tmp_path / "store", signal={}, seed=0, coordinates=places, pairs=60)
    records = planned(config(LINEAR | {"across": "sigma"}), store)
    assert [(record.sigma, record.draw) for record in records] == [("0.005+0.1", 0)]
    apart = planted_store(tmp_path / "apart", signal={}, seed=0, coordinates=[("0.005", 0), ("0.1", 1)], pairs=60)
    with pytest.raises(ConfigError, match="no noise draw is there at all noise levels"):
        planned(config(LINEAR | {"across": "sigma"}), apart)


def test_the_rule_is_part_of_what_a_record_is(store):
    records = planned(config(LINEAR | {"combine": ["concat", "late-fusion"]}), store)
    assert len({record.record_id for record in records}) == len(records) == 4
    again = planned(config(LINEAR | {"combine": ["late-fusion"]}), store)
    assert {record.record_id for record in again} < {record.record_id for record in records}


def test_seeds_are_one_unit_fitted_as_each_alone(store):
    records = [record for record in planned(config(LINEAR, MLP), store) if record.sigma == "0.005"]
    together = units(records)
    assert [[record.seed for record in unit] for unit in together] == [[0], [0, 1, 2]]
    train = material(records[0].selection).train
    features = features_of(together[1][0])
    scores = [head.score_items(features.rows) for _, head, _ in fit(together[1], features, train)]
    for record, score in zip(together[1], scores, strict=True):
        ((_, alone, facts),) = fit([record], features, train)
        np.testing.assert_allclose(score, alone.score_items(features.rows), atol=1e-4)
        assert facts["n_iter"] == 3


def test_a_seed_that_is_missing_is_fitted_again(run, store, tmp_path):
    heads = MLP | {"seeds": [0]}
    out = probekit.run_sweep(config(heads, sigmas=["0.1"]), stores=[store], out=tmp_path / "run")
    seen: list[str] = []
    probekit.run_sweep(
        config(MLP, sigmas=["0.1"]), stores=[store], out=out, progress=lambda done, total, text: seen.append(text)
    )
    assert len(seen) == 2
    resumed = heads_of(out).set_index("seed")["accuracy"]
    whole = heads_of(run).query("head == 'mlp' and sigma == '0.1'").set_index("seed")["accuracy"]
    assert resumed.to_numpy() == pytest.approx(whole.to_numpy(), abs=0.03)


def test_every_fit_says_how_it_went(run):
    rows = heads_of(run)
    linear = rows[rows["head_kind"] == "linear"]
    assert (linear["n_iter"] >= 1).all()
    assert (linear["gradient_norm"] < 1e-3).all()
    assert not rows["n_less_than_d"].any()
    assert not rows["matrix_free"].any()
    assert (rows["n_dropped"] == 0).all()
    assert (rows[rows["head_kind"] == "mlp"]["n_iter"] == 3).all()
    assert not rows[rows["head_kind"] == "mlp"]["converged"].any()  # three epochs end before patience does


def test_the_noise_of_rounding_is_that_of_half_an_ulp(store):
    held = probekit.FeatureStore(store)
    x = held.read(layer=2, sigma="0.1")
    assert held.summary()["datasets"] == {"float16": 16}
    ulp = np.spacing(np.abs(x).astype(np.float16)).astype(np.float64)
    expected = np.median(np.sqrt(2 * (ulp**2 / 12).mean(axis=0)))
    noise = held.quantisation(layer=2, sigma="0.1")
    assert noise.shape == (8,)
    assert noise == pytest.approx(expected, rel=0.2)


def test_channels_below_the_noise_of_rounding_are_dropped_by_every_head(store, monkeypatch):
    records = [
        record
        for record in planned(
            config(LINEAR | {"combine": ["concat", "scalar-mix", "late-fusion"]}, MLP | {"linear_skip": True}), store
        )
        if record.sigma == "0.1"
    ]
    train = material(records[0].selection).train
    for unit in units(records):
        features = features_of(unit[0])
        noise = features.noise
        noise[3] = 1e3
        monkeypatch.setattr(Features, "noise", noise)
        for _, head, facts in fit(unit, features, train):
            assert facts["n_dropped"] == 1, unit[0].combination
            moved = features.rows.copy()
            moved[:, 3] += np.arange(len(moved))
            np.testing.assert_allclose(head.score_items(moved), head.score_items(features.rows), atol=1e-4)


def test_a_fit_that_did_not_converge_is_marked_wherever_it_is_shown(tmp_path, caplog):
    stores = [
        planted_store(tmp_path / name, signal={2: 1.5}, seed=0, pairs=120, control=control)
        for name, control in (("trained", None), ("control", "init:0"))
    ]
    hasty = {"kind": "mlp", "layer_sets": ["singles", "all", [1, 2]], "hidden": [4], "max_epochs": 1}
    run = probekit.run_sweep(config(hasty), stores=stores, out=tmp_path / "run")
    assert "12 heads did not converge" in caplog.text
    assert not describe_run(run)["chosen"][0]["converged"]
    page = build_report(run, tmp_path / "report.html").read_text()
    figures = tmp_path / "report_figures"
    assert not pd.read_csv(figures / "depth.csv")["converged"].any()
    drawn = page.count("fit did not converge")
    assert drawn == len(list(figures.glob("*.svg"))) == 2  # in the legend of every figure
    text = re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", text, flags=re.DOTALL):
        accuracy = re.search(r"<td>(?:\d+\.\d|[+\N{MINUS SIGN}]\d+\.\d)\s", row)
        assert "planted" not in row or accuracy is None or "not converged" in row, row
    for sentence in re.findall(r"<li>(planted.*?|That .*?|A head .*?)</li>", text):
        assert "not converged" in sentence, sentence


def test_pairs_within_a_block_are_compared_with_pairs_across(store, tmp_path):
    heads = LINEAR | {"layer_sets": ["singles", "pairs", {"blocks": 2}]}
    run = probekit.run_sweep(config(heads, sigmas=["0.1"]), stores=[store], out=tmp_path / "run")
    (row,) = load_blocks(run).to_dict("records")
    first, second = ([int(end) for end in block.split("-")] for block in row["blocks"].split(", "))
    inside = [set(range(block[0], block[-1] + 1)) for block in (first, second)]
    rows = heads_of(run).query("n_layers == 2")
    pairs = [set(map(int, name.split("+"))) for name in rows["layer_set"]]
    within = np.array([any(pair <= block for block in inside) for pair in pairs])
    assert (row["n_within"], row["n_across"]) == (within.sum(), (~within).sum())
    assert row["within"] == pytest.approx(rows["accuracy"][within].mean())
    assert row["difference"] == pytest.approx(rows["accuracy"][~within].mean() - rows["accuracy"][within].mean())
    assert row["low"] <= row["difference"] <= row["high"]
    page = build_report(run, tmp_path / "report.html").read_text()
    assert f"<td>{row['blocks']}</td>" in page


def test_ways_of_joining_stand_in_the_report_with_their_rule(run, tmp_path):
    page = build_report(run, tmp_path / "report.html").read_text()
    table = page[page.index("<h2>Combinations</h2>") : page.index("<h2>Without the backbone")]
    for text in ("2 by concat", "2 by mean", "2 by scalar-mix", "2 by late-fusion", "<td>0.005 + 0.1</td>", "seeds "):
        assert text in table
    assert "1 + 2 (late-fusion)" in page[page.index("<h2>Every backbone") :]


def test_a_preset_fills_in_what_is_not_said():
    head = config({"kind": "mlp", "preset": "dit-reward", "seeds": [0, 1], "dropout": 0.1}).heads[0]
    preset = PRESETS["dit-reward"]
    assert (head.hidden, head.layer_sets) == ([1024, 16], preset["layer_sets"])
    assert (head.dropout, head.seeds, head.combine) == (0.1, [0, 1], ["concat"])


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        ({}, "dit-reward"),
        ({"seeds": [0, 1], "layer_sets": ["singles"], "hidden": [1024, 16], "dropout": 0.05}, "dit-reward"),
        ({"hidden": [64]}, "dit-reward-hidden-64"),
        (
            {"dropout": 0.1, "hidden": [64, 8], "linear_skip": True},
            "dit-reward-hidden-64-8-linear_skip-True-dropout-0.1",
        ),
        ({"hidden": [64], "name": "small"}, "small"),
    ],
)
def test_a_head_that_is_trained_otherwise_than_its_preset_says_so_in_its_name(beside, name):
    once = config({"kind": "mlp", "preset": "dit-reward"} | beside)
    assert once.heads[0].name == name
    assert SweepConfig.checked(once.model_dump(), source="again").heads[0].name == name
