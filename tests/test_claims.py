"""What a run may claim: planted truths come out, what it cannot speak to is said, and a second computation agrees."""

import json
import re
import shutil
from dataclasses import replace

import independent_claims as again
import independent_statistics as basic
import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from planted_store import planted_store
from synthetic_run import Net, with_controls, write_run
from typer.testing import CliRunner

import probekit
from probekit.cli import app
from probekit.config import SweepConfig
from probekit.errors import ConfigError, ResultsError
from probekit.report import build_report, depth_points
from probekit.report.claim import COMBINING, DECLINE, INPUTS, LARGER, MIDDLE, TRAINED, Claim
from probekit.report.claims import make_claims
from probekit.report.claims_text import claims_table, glance_table
from probekit.report.controls import lines_figure
from probekit.report.depth import of_setting, paths_table
from probekit.report.effects import Side, Verdicts
from probekit.report.primary import find_primary
from probekit.report.select import Setting
from probekit.report.transfer import transfer_points, transfer_table
from probekit.results import (
    PLAN,
    load_config,
    load_families,
    load_margins,
    load_trajectories,
    write_config,
    write_families,
)
from probekit.stats import holm, permutation_test, plateau_set
from probekit.sweep.families import _images, judge_families

HEAD = {"kind": "linear", "layer_sets": ["singles", "all"], "strengths": [0.1], "folds": 2}
N_BOOT = 400
NETS = (
    Net("2x16-seed0", 2, 16),
    Net("2x16-seed1", 2, 16),
    Net("2x32", 2, 32),
    Net("3x32", 3, 32),
)


def swept(folder, signal, *, sets=("singles",), pairs=900, seeds=3, **controls):
    """A sweep of one planted backbone and of random controls, which know next to nothing, on the same pairs."""
    told = {"trained": signal} | {f"init:{seed}": {0: 0.02} for seed in range(seeds)}
    stores = [
        planted_store(
            folder / str(place),
            signal=strength,
            seed=4,
            of=1,
            pairs=pairs,
            control=None if control == "trained" else control,
            noise=place if place > 1 else None,
        )
        for place, (control, strength) in enumerate(told.items())
    ]
    head = HEAD | {"layer_sets": list(sets), "controls": controls}
    config = SweepConfig.checked({"heads": [head], "resamples": N_BOOT}, source="test")
    return probekit.run_sweep(config, stores=stores, out=folder / "run")


def verdicts(run):
    """Verdict of the main row of each claim, and all rows."""
    rows = make_claims(run).rows
    return {row.claim: row for row in reversed(rows)}, rows


def plateau(run):
    families = load_families(run).query("control == 'trained'")
    return list(families[families["in_plateau"]]["layer"])


def test_a_planted_layer_is_found(tmp_path):
    run = swept(tmp_path, {2: 2.0}, sets=("singles", "all"))
    found, rows = verdicts(run)
    assert plateau(run) == [2]
    assert found[MIDDLE].verdict == found[DECLINE].verdict == found[TRAINED].verdict == "supported"
    assert found[MIDDLE].reason.endswith("may be the best: layer 2")
    assert all(row.verdict != "supported" for row in rows if row.claim in (COMBINING, LARGER))
    assert "one known size: no two sizes to compare" in found[LARGER].reason
    families = load_families(run).query("control == 'trained'").set_index("layer")
    assert (families.loc[[0, 1, 3], "p_adjusted"] < 0.05).all()
    assert families.loc[2, "permutation_p"] < 0.01 < families["permutation_adjusted"].drop(2).min()
    assert families["best"].tolist() == [False, False, True, False]


def test_refits_on_halves_make_the_plateau_one_of_layers(tmp_path):
    store = planted_store(tmp_path / "store", signal={1: 0.5, 2: 2.0}, seed=3, pairs=600)
    families = {}
    for name, controls in (("fitted", {}), ("layers", {"halves": 10})):
        config = SweepConfig.checked({"heads": [HEAD | {"controls": controls}], "resamples": 200}, source="test")
        run = probekit.run_sweep(config, stores=[store], out=tmp_path / name)
        families[name] = load_families(run).set_index("layer")
    assert set(families["fitted"]["n_refits"]) == {0}
    assert set(families["layers"]["n_refits"]) == {10}
    frame = probekit.load_results(run).query("split == 'test' and slice_by == 'all' and combination == 'single'")
    right = load_margins(run).query("split == 'test'").pivot(index="pair_id", columns="record_id", values="correct")
    at = frame.set_index(["altered", "seed", "layer"])["record_id"]
    fits = np.array([right[at["", 0, layer]] for layer in range(4)])
    refits = np.array([[right[at["half", seed, layer]] for layer in range(4)] for seed in range(10)])
    groups = load_margins(run).drop_duplicates("pair_id").set_index("pair_id")["group"][right.index].to_numpy()
    for name, given in (("fitted", None), ("layers", refits)):
        expected = plateau_set(fits, groups, refits=given, n_boot=200)
        np.testing.assert_allclose(families[name]["behind"], expected.behind, atol=1e-12)
    assert (families["layers"]["behind"] != families["fitted"]["behind"]).any()
    (row,) = [row for row in make_claims(run).rows if row.claim == MIDDLE]
    assert row.reason.endswith("may be the best: layer 2, with other training pairs too")


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """A planted layer with refits on halves, and three random networks."""
    folder = tmp_path_factory.mktemp("halved")
    return swept(folder, {1: 0.6, 2: 0.9}, sets=([1], [2], [3], [1, 2]), pairs=300, seeds=2, halves=10)


def test_a_second_computation_gives_headline_and_claims_with_other_training_pairs(halved):
    """The headline with its limits, as a sweep wrote them, and both standard errors of the claims."""
    second, claims = again.Run(halved), make_claims(halved)
    backbone, groups = claims.endpoint.model.label, second.groups
    key = second.chosen(backbone)
    expected = basic.interval(second.test(key), groups, N_BOOT)
    assert (claims.primary.estimate, claims.primary.low, claims.primary.high) == pytest.approx(expected, abs=1e-9)
    rows = {(row.claim, row.quantity): row for row in claims.rows}

    def agrees(claim, quantity, *terms, shared=False):
        sides = [(sign, np.stack([second.test(key) for key in keys])) for sign, keys in terms]
        refits = sum(sign * np.mean([second.refits(key) for key in keys], axis=0) for sign, keys in terms)
        if shared:  # one network, fitted in two ways
            sides = [(1, sum(sign * side for sign, side in sides))]
        row = rows[claim, quantity]
        expected = again.contrast(sides, groups, N_BOOT, refits)
        assert (row.estimate, row.low, row.high) == pytest.approx(expected, abs=1e-6)
        held = again.contrast(sides, groups, N_BOOT)
        assert row.low <= held[1] + 1e-9
        assert row.high >= held[2] - 1e-9
        assert row.se_train == pytest.approx(np.sqrt(again.of_training(refits, groups)[0]))
        assert row.about.endswith("other training pairs")
        return row

    def part(wanted):
        return [second.best(backbone, "trained", lambda row: row["n_layers"] == 1 and wanted(row["layer"]))]

    late, early = part(lambda layer: layer >= 2), part(lambda layer: layer < 2)
    row = agrees(MIDDLE, "second half minus first half", (1, late), (-1, early), shared=True)
    assert row.se_networks == 0
    before, last = part(lambda layer: layer < 3), part(lambda layer: layer == 3)
    agrees(DECLINE, "before the last minus the last layer", (1, before), (-1, last), shared=True)
    joined = [second.best(backbone, "trained", lambda row: row["n_layers"] > 1)]
    agrees(COMBINING, "several layers minus the chosen one", (1, joined), (-1, [key]), shared=True)
    random = [second.chosen(backbone, f"init:{seed}") for seed in range(2)]
    row = agrees(TRAINED, "trained minus random weights (init)", (1, [key]), (-1, random))
    assert row.se_networks > 0
    assert sum(row.se_train > 0 for row in claims.rows) >= 2
    shown = CliRunner().invoke(app, ["claims", str(halved)]).output
    assert re.search(r"\d\.\d pairs, \d\.\d training, \d\.\d networks", shown)


def test_a_second_computation_gives_size_and_slope_with_other_training_pairs(tmp_path):
    signal = {1: 0.4, 2: 0.7, 6: 1.1}  # of backbones of 2,000, 3,000 and 7,000 parameters, on the same pairs
    stores = [
        planted_store(tmp_path / str(of), signal={2: strength}, seed=4, of=of, pairs=300, noise=of)
        for of, strength in signal.items()
    ]
    head = HEAD | {"layer_sets": [[1], [2]], "controls": {"halves": 10}}
    config = SweepConfig.checked({"heads": [head], "resamples": N_BOOT}, source="test")
    run = probekit.run_sweep(config, stores=stores, out=tmp_path / "run")
    second = again.Run(run)
    keys = [second.chosen(f"planted-{of}") for of in signal]
    refits = [second.refits(key) for key in keys]
    rows = {row.quantity: row for row in make_claims(run).rows if row.claim == LARGER}

    def agrees(quantity, expected, held):
        row = rows[quantity]
        assert (row.estimate, row.low, row.high) == pytest.approx(expected, abs=1e-6)
        assert row.se_train > 0
        assert row.high - row.low > held[2] - held[1]
        assert row.about.endswith("other training pairs")

    ends = [(1, second.test(keys[2])[None]), (-1, second.test(keys[0])[None])]
    both = [again.contrast(ends, second.groups, N_BOOT, given) for given in (refits[2] - refits[0], None)]
    agrees("largest minus smallest", *both)
    values, sizes = [second.test(key) for key in keys], [1000 * (of + 1) for of in signal]
    both = [again.slope(values, sizes, second.groups, given) for given in (refits, None)]
    agrees("slope of the accuracy per doubling of the parameters", *both)


def test_a_row_without_refits_on_both_sides_is_about_the_fitted_heads(halved, tmp_path):
    folder = shutil.copytree(halved, tmp_path / "run")
    table = pq.read_table(folder / "results.parquet")
    kept = pc.or_(pc.not_equal(table["altered"], "half"), pc.equal(table["control"], "trained"))
    pq.write_table(table.filter(kept), folder / "results.parquet")
    write_config(folder, load_config(folder) | {PLAN: table.filter(kept)["record_id"].unique().to_pylist()})
    held = [row for row in make_claims(folder).rows if not np.isnan(row.estimate) and "random weights" in row.quantity]
    assert len(held) >= 2
    assert all(row.about.endswith("the fitted heads") and np.isnan(row.se_train) for row in held)
    assert any(row.about.endswith("other training pairs") for row in make_claims(folder).rows)


def test_the_primary_accuracy_is_that_of_the_fitted_heads_whatever_the_number_of_training_seeds(halved):
    """Of one seed the limits are those of the sweep, which hold heads fixed; so do those of a mean over seeds."""
    second = again.Run(halved)
    backbone = make_claims(halved).endpoint.model.label
    keys = [second.chosen(backbone), second.chosen(backbone, "init:0")]  # as if two training seeds
    found = Verdicts(halved, "strict", resamples=N_BOOT).compare("", [Side("trained", tuple(keys), ("a", "b"))], [])
    expected = again.contrast([(1, np.stack([second.test(key) for key in keys]))], second.groups, N_BOOT)
    assert np.isnan(found.contrast.se_train)
    assert found.contrast.high > 1 == found.high  # two networks are a small sample, and no share is above one
    assert (found.estimate, found.contrast.high) == pytest.approx((expected[0], expected[2]), abs=1e-6)


def test_everything_that_was_tried_is_counted(halved):
    frame = probekit.load_results(halved).query("split == 'test' and slice_by == 'all'")
    (cells,) = make_claims(halved).cells.values()
    features = frame["head_kind"] == "linear"
    assert (
        cells.tried
        == (features & (frame["altered"] == "") & frame["control"].isin(["trained", "init:0", "init:1"])).sum()
    )
    assert cells.beside == len(frame) - cells.tried > 100


def test_a_plateau_needs_more_than_pairs_where_training_samples_differ_as_much(tmp_path):
    """Test pairs cannot tell layers apart whose heads differ more with their training pairs than from each other."""
    run = swept(tmp_path, {1: 0.5, 2: 0.55}, pairs=200, seeds=0, halves=10)
    (row,) = [row for row in make_claims(run).rows if row.claim == MIDDLE]
    assert row.verdict == "undetermined"
    assert row.pairs_needed == np.inf
    assert "more training pairs" in CliRunner().invoke(app, ["claims", str(run)]).output


def test_few_seeds_of_random_weights_support_nothing(tmp_path):
    run = swept(tmp_path, {2: 2.0}, seeds=2)
    rows = [row for row in make_claims(run).rows if row.claim == TRAINED]
    assert rows[0].low > 0
    assert rows[0].verdict == "undetermined"
    assert "2 seeds of random weights, where 3 are the least" in rows[0].reason
    assert rows[0].pairs_needed == np.inf
    (needed,) = set(claims_table(rows)["Pairs needed"])
    assert needed == "more seeds"


def test_random_weights_of_every_training_seed_count(tmp_path):
    """Two training seeds are the sample, with three shuffles of each: six networks of random weights."""
    seeds = (Net("2x16-seed0", 2, 16), Net("2x16-seed1", 2, 16))
    shuffled = [replace(net, control=f"shuffled:{seed}", training_images=None) for net in seeds for seed in range(3)]
    write_run(tmp_path / "run", (*with_controls(seeds, n_init=2), *shuffled), kinds=(), n_test=240, n_validation=90)
    rows = {row.quantity: row for row in make_claims(tmp_path / "run").rows if row.claim == TRAINED}
    told = {kind: rows[f"trained minus random weights ({kind})"] for kind in ("init", "shuffled")}
    assert {kind: row.random_seeds for kind, row in told.items()} == {"init": 2, "shuffled": 6}
    assert ["are the least" in row.reason for row in told.values()] == [True, False]
    assert told["shuffled"].against == "random weights (shuffled, 6 seeds)"
    assert told["shuffled"].about == "other trainings of 2x16, other random networks, the fitted heads"


def claim(kind, **told):
    given = {"dataset": "demo", "subject": "b", "quantity": f"trained minus random weights ({kind})"}
    return Claim(TRAINED, **given | {"against": "", "about": "this b, the fitted heads"} | told)


def test_no_number_of_pairs_decides_an_effect_of_zero_and_nothing_else_is_asked_for():
    zero = claim("init", estimate=0.0, pairs_needed=np.inf, se_networks=0.0)
    assert claims_table([zero])["Pairs needed"].item() == "\N{EN DASH}"
    wide = replace(zero, se_networks=0.1, se_train=0.1)
    assert claims_table([wide])["Pairs needed"].item() == "more networks and training pairs"


def test_the_first_table_says_of_every_kind_of_random_weights_what_it_is_about():
    up = {"verdict": "supported", "estimate": 0.05, "low": 0.04, "high": 0.06}
    down = {"verdict": "contradicted", "estimate": -0.1, "low": -0.12, "high": -0.08}
    for other, mark in ((up, "supported"), (down, "undetermined")):
        table = glance_table([claim("init", **up), claim("shuffled", **other)], "b").set_index("Claim")
        row = table.loc[TRAINED]
        assert row["mark"] == mark
        told = row["Verdict"].split("\n")
        assert told[:3] == ["init: supported", "+5.0 [+4.0, +6.0]", "about this b, the fitted heads"]
        assert told[3] == f"shuffled: {other['verdict']}"
        assert row["All backbones"] == f"init: supported for 1 of 1 (b); shuffled: {other['verdict']} for 1 of 1 (b)"


def test_the_first_table_keeps_every_kind_of_random_weights_that_size_stands_against():
    quantity = "margin over random weights ({}): largest minus smallest"
    rows = [
        replace(claim("", quantity=text, about=about, estimate=0.1, verdict=verdict), claim=LARGER)
        for text, told in (
            ("largest minus smallest", ("supported", "supported")),
            (quantity.format("init"), ("supported", "contradicted")),
            (quantity.format("shuffled"), ("undetermined", "supported")),
        )
        for about, verdict in zip(("these checkpoints", "other trainings of b"), told, strict=True)
    ]
    row = glance_table(rows, "b").set_index("Claim").loc[LARGER]
    assert "these checkpoints" not in row["Verdict"] + row["Beyond random weights"]
    assert [line for line in row["Beyond random weights"].split("\n") if ":" in line] == [
        "init: contradicted",
        "shuffled: supported",
    ]


def test_a_planted_plateau_of_three_is_found(tmp_path):
    run = swept(tmp_path, {1: 1.2, 2: 1.2, 3: 1.2})
    found, _ = verdicts(run)
    assert plateau(run) == [1, 2, 3]
    assert found[MIDDLE].verdict == "undetermined"
    assert found[DECLINE].verdict != "supported"
    assert found[TRAINED].verdict == "supported"


def test_a_planted_absence_is_not_found(tmp_path):
    run = swept(tmp_path, {})
    _, rows = verdicts(run)
    assert not [row for row in rows if row.verdict == "supported"]
    smallest = load_families(run).groupby("control")["permutation_adjusted"].min()
    assert len(smallest) == 4
    assert (holm(smallest.to_numpy()) > 0.05).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims") / "family"
    write_run(folder, with_controls(NETS, n_init=2), kinds=("colour", "shape"), n_test=360, n_validation=120)
    write_config(folder, {"sweep": {"resamples": N_BOOT, "level": 0.95}})
    write_families(folder, *judge_families(folder, resamples=N_BOOT, level=0.95))
    return folder


@pytest.fixture(scope="module")
def told(run):
    shown = CliRunner().invoke(app, ["claims", str(run), "--json"])
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.output)


def test_a_second_computation_gives_headline_band_and_claims(run, told):
    """By numpy and pandas alone, from the stored margins, layers chosen anew."""
    second, groups = again.Run(run), again.Run(run).groups
    key = second.chosen("3x32")
    expected = basic.interval(second.test(key), groups)
    assert told["primary"]["backbones"] == ["3x32"]
    assert told["primary"]["accuracy"] == pytest.approx(expected[0])
    families = load_families(run).query("backbone == '3x32' and control == 'trained'").sort_values("layer")
    layers = second.layers("3x32")
    columns = families[["accuracy", "band_low", "band_high"]].to_numpy().T
    np.testing.assert_allclose(basic.band(layers, groups, N_BOOT), columns, atol=1e-9)
    p, behind = basic.plateau(layers, groups, N_BOOT)
    np.testing.assert_allclose(behind, families["behind"], atol=1e-9)
    # of so few pairs some resamples are tied with what was observed, up to rounding
    np.testing.assert_allclose(p, families["plateau_p"], atol=0.01)
    assert list(p > 0.05) == list(families["in_plateau"])
    chosen = (families["chosen"] == 1).to_numpy()
    adjusted = basic.romano_wolf(layers[~chosen], layers[chosen][0], groups, N_BOOT)
    np.testing.assert_allclose(adjusted, families["p_adjusted"][~chosen], atol=0.01)

    seeds = {"3x32": ["3x32"], "2x16 (2 seeds)": ["2x16-seed0", "2x16-seed1"], "2x32": ["2x32"]}
    home = {"3x32": "3x32", "2x16 (2 seeds)": "2x16-seed0", "2x32": "2x32"}  # whose random weights they are

    def chosen_of(label, kind):
        if kind == "trained":
            return np.stack([second.test(second.chosen(name)) for name in seeds[label]])
        return np.stack([second.test(second.chosen(home[label], f"init:{seed}")) for seed in (0, 1)])

    def part(label, wanted):
        return np.stack([second.test(second.best(name, "trained", wanted)) for name in seeds[label]])

    def agrees(claim, subject, quantity, expected, about=""):
        (row,) = [
            row
            for row in told["claims"]
            if (row["claim"], row["subject"], row["quantity"]) == (claim, subject, quantity) and about in row["about"]
        ]
        assert (row["estimate"], row["low"], row["high"]) == pytest.approx(expected, abs=1e-6)

    for label in seeds:
        blocks = int(label[0])
        trained, random = chosen_of(label, "trained"), chosen_of(label, "init")
        expected = again.contrast([(1, trained), (-1, random)], groups, N_BOOT)
        agrees(TRAINED, label, "trained minus random weights (init)", expected)
        late = part(label, lambda row, n=blocks: row["n_layers"] == 1 and row["layer"] / n >= 0.5)
        early = part(label, lambda row, n=blocks: row["n_layers"] == 1 and row["layer"] / n < 0.5)
        agrees(MIDDLE, label, "second half minus first half", again.contrast([(1, late - early)], groups, N_BOOT))
        before = part(label, lambda row, n=blocks: row["n_layers"] == 1 and row["layer"] < n)
        last = part(label, lambda row, n=blocks: row["n_layers"] == 1 and row["layer"] == n)
        agrees(
            DECLINE, label, "before the last minus the last layer", again.contrast([(1, before - last)], groups, N_BOOT)
        )
        joined = part(label, lambda row: row["n_layers"] > 1)
        agrees(
            COMBINING,
            label,
            "several layers minus the chosen one",
            again.contrast([(1, joined - trained)], groups, N_BOOT),
        )
    large, small = "3x32", "2x16 (2 seeds)"
    subject, about = f"{large} against {small}", "these checkpoints"
    means = [chosen_of(label, "trained").mean(axis=0, keepdims=True) for label in (large, small)]
    expected = again.contrast([(1, means[0]), (-1, means[1])], groups, N_BOOT)
    agrees(LARGER, subject, "largest minus smallest", expected, about)
    ends = [(1, chosen_of(large, "trained")), (-1, chosen_of(small, "trained"))]
    agrees(LARGER, subject, "largest minus smallest", again.contrast(ends, groups, N_BOOT), "other trainings")
    ends += [(1, chosen_of(small, "init")), (-1, chosen_of(large, "init"))]
    quantity = "margin over random weights (init): largest minus smallest"
    agrees(LARGER, subject, quantity, again.contrast(ends, groups, N_BOOT), "other random networks")
    sizes = [second.rows[second.rows["backbone"] == seeds[label][0]]["backbone_parameters"].iloc[0] for label in seeds]
    values = [chosen_of(label, "trained").mean(axis=0) for label in seeds]
    quantity = "slope of the accuracy per doubling of the parameters"
    agrees(LARGER, "3 backbones", quantity, again.slope(values, sizes, groups))
    values = [value - chosen_of(label, "init").mean(axis=0) for value, label in zip(values, seeds, strict=True)]
    quantity = "slope of the margin over random weights (init) per doubling of the parameters"
    agrees(LARGER, "3 backbones", quantity, again.slope(values, sizes, groups))


def test_every_claim_is_told_in_markdown_and_in_the_report(run, told, tmp_path):
    shown = CliRunner().invoke(app, ["claims", str(run)]).output
    page = build_report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    for row in told["claims"]:
        assert f"| {row['claim']} | {row['subject']} |" in shown
        assert f"<td>{row['claim']}</td><td>{row['subject']}</td>" in page
        assert row["verdict"] in ("supported", "contradicted", "undetermined")
        if row["estimate"] is None:
            assert row["verdict"] == "undetermined"
            assert row["reason"]
    assert "Primary endpoint (by default, as the configuration names none): 3x32" in page
    tried = told["exploratory"]["demo"]["tried"]
    assert f"{tried} test accuracies were computed" in page
    assert "What may be concluded" in page
    assert "may be the best" in page
    points = pd.read_csv(tmp_path / "report_figures" / "depth.csv")
    trained = points[(points["weights"] == "trained") & (points["layers"] == "single")]
    assert (trained["band_low"] < trained["low"] + 1e-9).all()
    families = load_families(run).set_index(["backbone", "layer"])
    drawn = trained[trained["in_plateau"]].set_index(["backbone", "layer"]).index
    assert families.query("control == 'trained'").loc[drawn, "in_plateau"].all()


def test_depth_points_without_families_have_no_band(run):
    assert "band_low" not in depth_points(probekit.load_results(run))


def test_verdicts_survive_the_correction_for_several_backbones(told):
    for row in told["claims"]:
        if row["verdict"] != "undetermined":
            assert row["p_adjusted"] <= 0.05
            assert row["low"] > 0 or row["high"] < 0
        if row["p"] is not None:
            assert row["p_adjusted"] >= row["p"]


@pytest.mark.parametrize(
    ("nets", "claim", "reason"),
    [
        ((Net("a", 2, 16),), TRAINED, "no random weights of this shape in the run"),
        ((Net("a", 2, 16),), LARGER, "1 backbone of one known size: no two sizes to compare"),
        ((Net("a", 2, 16),), INPUTS, "no baseline of pixels, latents or prompts in the run"),
        ((Net("a", 2, 16), Net("b", 3, 32)), LARGER, "2 backbones: a slope for new ones needs three"),
        ((Net("a", 2, 16), Net("b", 3, 32)), LARGER, "no random weights of both shapes in the run"),
    ],
)
def test_what_a_run_cannot_speak_to_is_undetermined(tmp_path, nets, claim, reason):
    write_run(tmp_path / "run", nets, kinds=(), n_test=90, n_validation=60)
    rows = [row for row in make_claims(tmp_path / "run").rows if row.claim == claim and reason in row.reason]
    assert len(rows) == 1
    assert rows[0].verdict == "undetermined"
    assert np.isnan(rows[0].estimate)


def test_no_validation_pairs_no_single_layers_no_trained_backbone(tmp_path):
    few = {"kinds": (), "n_test": 90}
    write_run(tmp_path / "a", NETS[:1], validation=False, **few)
    assert {row.reason for row in make_claims(tmp_path / "a").rows if row.claim == MIDDLE} == {"no validation pairs"}
    write_run(tmp_path / "b", NETS[:1], singles=False, **few)
    assert all(row.verdict == "undetermined" for row in make_claims(tmp_path / "b").rows)
    write_run(tmp_path / "c", (Net("a", 2, 16, None, "init:0"),), **few)
    found = make_claims(tmp_path / "c")
    assert found.primary is None
    shown = CliRunner().invoke(app, ["claims", str(tmp_path / "c")])
    assert "The run holds no such head." in shown.output


def test_the_primary_endpoint_is_the_one_that_is_named(run, tmp_path):
    folder = tmp_path / "run"
    write_run(folder, NETS, kinds=(), heads=("linear", "mlp"), n_test=90, n_validation=60)
    frame = probekit.load_results(folder)
    write_config(folder, {"sweep": {"primary": {"backbone": "2x32", "head": "mlp", "layers": "all"}}})
    found = make_claims(folder)
    row = frame.query("backbone == '2x32' and head == 'mlp' and split == 'test' and slice_by == 'all'").iloc[0]
    assert (found.primary.estimate, found.primary.low) == (row["accuracy"], row["low"])
    page = build_report(folder, tmp_path / "out.html").read_text(encoding="utf-8")
    assert "Primary endpoint (as the configuration names it): 2x32, all layers, on demo, head mlp" in page
    for wrong in ({"backbone": "x"}, {"head": "x"}, {"dataset": "x"}):
        write_config(folder, {"sweep": {"primary": wrong}})
        with pytest.raises(ResultsError, match=r"primary: .* is 'x'; the run holds"):
            make_claims(folder)


def test_a_primary_head_that_reads_noise_levels_side_by_side_has_its_own_setting(run):
    frame = probekit.load_results(run)
    joined = frame[frame["n_layers"] > 1].assign(head="joined", sigma="0.005+0.1")
    both = pd.concat([frame, joined.assign(record_id=joined["record_id"] + "j")], ignore_index=True)
    found = find_primary(both, {"primary": {"head": "joined", "layers": "all"}})
    assert (found.setting.head, found.setting.sigma) == ("joined", "0.005+0.1")
    assert len(found.rows(both)) == 1


def test_imported_features_belong_to_every_setting():
    told = {
        "dataset": "d",
        "protocol": "strict",
        "sigma": "0.1",
        "draw": 0,
        "pooling": "mean",
        "head": "linear",
        "seed": 0,
    }
    table = pd.DataFrame([told | {"backbone": "dit"}, told | {"backbone": "clip", "sigma": "", "pooling": "given"}])
    assert list(of_setting(table, Setting(**told), imported={"clip"})["backbone"]) == ["dit", "clip"]
    assert list(of_setting(table, Setting(**told))["backbone"]) == ["dit"]


def test_rules_of_joining_are_lines_of_their_own():
    one = {"backbone": "dit", "control": "trained", "layer_set": "0+1", "layers": "widest set", "converged": True}
    rows = [
        one | {"combination": rule, "n_train": n, "accuracy": 0.6, "low": 0.5, "high": 0.7}
        for rule in ("concat", "mean")
        for n in (10, 100)
    ]
    figure = lines_figure(pd.DataFrame(rows), "n_train", "Training pairs")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dit, concat", "dit, mean"]


def test_a_primary_endpoint_that_will_not_be_fitted_is_refused(tmp_path):
    store = planted_store(tmp_path / "store", signal={}, seed=0, pairs=60)
    for wrong, allowed in (({"backbone": "x"}, "planted-0"), ({"dataset": "x"}, "planted")):
        config = SweepConfig.checked({"heads": [HEAD], "primary": wrong}, source="test")
        with pytest.raises(ConfigError, match=rf"primary: .* is 'x'; allowed: {allowed}"):
            probekit.run_sweep(config, stores=[store], out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"primary: head is 'x'; allowed: linear"):
        SweepConfig.checked({"heads": [HEAD], "primary": {"head": "x"}}, source="test")


def test_paths_are_the_right_answers_of_the_margins(run):
    paths = load_trajectories(run).query("backbone == '3x32' and control == 'trained'").set_index("pair_id")
    frame = probekit.load_results(run).query("backbone == '3x32' and control == 'trained' and n_layers == 1")
    records = frame.drop_duplicates("record_id").sort_values("layer")
    margins = load_margins(run, records["record_id"])
    margins = margins[(margins["split"] == "test") & (margins["label"] != 0.5)]
    right = margins.assign(right=(margins["margin"] > 0) == (margins["label"] > 0.5))
    right = right.pivot(index="pair_id", columns="record_id", values="right")[records["record_id"]].astype(int)
    assert list(paths["path"].loc[right.index]) == ["".join(map(str, row)) for row in right.to_numpy()]
    first = paths[paths["path"] == "0110"].iloc[0]
    assert (first["flips"], first["last_flip"], first["right_share"]) == (2, 3, 0.5)
    assert paths[paths["path"] == "1111"]["last_flip"].isna().all()
    assert set(paths["layers"]) == {"0+1+2+3"}
    table = paths_table(load_trajectories(run), "3x32").set_index("Of")
    always = 100 * (right.sum(axis=1) == 4).mean()
    assert table.loc["3x32", "Always right"] == f"{always:.1f}"
    assert "3x32: colour" in table.index


def test_pairs_of_a_group_with_several_prompts_flip_as_one():
    """A row does not tell which images several prompts share; pairs of one prompt keep their ranking."""
    pairs = pd.DataFrame(
        {
            "group": ["a", "a", "a", "b", "c", "c"],
            "prompt_id": ["x", "x", "x", "y", "z", "w"],
            "row_a": [0, 0, 1, 3, 5, 7],
            "row_b": [1, 2, 2, 4, 6, 8],
        }
    )
    labels = np.array([1.0, 1, 1, 1, 1, 1])
    found = permutation_test(np.ones((1, 6)), labels, *_images(pairs), pairs["prompt_id"].to_numpy(), n_draws=50)
    assert (found.rankings, found.lone, found.joint) == (1, 1, 1)


def test_soft_labels_have_a_calibration_and_hard_ones_none(run, tmp_path):
    assert load_families(run)["ece"].isna().all()
    store = planted_store(tmp_path / "store", signal={2: 2.0}, seed=0)
    (file,) = (store / "judgements").glob("*.parquet")
    file.with_suffix(".json").unlink()
    judgements = pd.read_parquet(file)
    judgements.assign(label=0.1 + 0.8 * judgements["label"]).to_parquet(file, index=False)
    config = SweepConfig.checked({"heads": [HEAD], "resamples": 200}, source="test")
    families = load_families(probekit.run_sweep(config, stores=[store], out=tmp_path / "run")).set_index("layer")
    assert families.loc[2, "brier"] < families.loc[0, "brier"]
    assert (families["ece_low"] <= families["ece"]).all()


def test_transfer_sets_what_heads_were_fitted_on_against_what_they_meet(run):
    frame = probekit.load_results(run)
    other = frame.assign(dataset="other", accuracy=frame["accuracy"] - 0.1)
    both = pd.concat([frame, other], ignore_index=True).assign(trained_on="demo")
    found = transfer_points(both)
    assert set(found["source"]) == {"all", "colour", "shape"}
    whole = found[(found["source"] == "all") & (found["backbone"] == "3x32")].set_index("dataset")["accuracy"]
    assert whole["demo"] - whole["other"] == pytest.approx(0.1)
    claims = make_claims(run)
    setting = claims.endpoint.setting
    assert transfer_table(frame.assign(trained_on="demo"), [setting]).empty
    table = transfer_table(both, [setting, replace(setting, dataset="other")])
    assert list(table.columns) == ["Backbone", "Head", "Fitted on", "demo", "other"]
