import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import independent_claims as again
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from synthetic_run import STRENGTHS, Net, with_controls, write_run

from probekit.errors import ResultsError
from probekit.report import (
    build_report,
    depth_figure,
    depth_points,
    kinds_figure,
    kinds_points,
    scaling_figure,
    scaling_points,
    training_figure,
    training_points,
)
from probekit.report.captions import found, size_sentence
from probekit.report.effects import Effect, Verdicts, control_margins, joining_effects, size_effects
from probekit.report.page import store_tables
from probekit.report.select import (
    CHOSEN,
    all_layers,
    control_kinds,
    control_rows,
    narrow,
    settings,
    trained_models,
    training_series,
)
from probekit.report.style import colours, in_millions, readable, spread
from probekit.report.tables import controls_table, other_settings_table, unresolved, warnings_list
from probekit.results import load_margins, load_results, write_config, write_part
from probekit.stats import network_contrast, paired_difference

NETS = (
    Net("2x16-seed0", 2, 16),
    Net("2x16-seed1", 2, 16),
    Net("3x32", 3, 32),
    Net("3x32-step30", 3, 32, 30_000),
)
KINDS = ("colour", "shape")
SIZE = {"n_test": 240, "n_validation": 90}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "family"
    write_run(folder, with_controls(NETS, n_init=2), kinds=KINDS, heads=("linear", "mlp"), **SIZE)
    return folder


@pytest.fixture(scope="module")
def frame(run):
    return load_results(run)


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    return build_report(run, tmp_path_factory.mktemp("page") / "report.html")


def single(tmp_path, **options):
    """Write a run of one backbone."""
    folder = tmp_path / "single"
    write_run(folder, (Net("only", 3, 32, None),), **(SIZE | {"kinds": ()} | options))
    return folder


def test_the_csv_holds_the_numbers_of_the_frame(page, frame):
    points = pd.read_csv(page.parent / "report_figures" / "depth.csv")
    test = frame[(frame["split"] == "test") & (frame["source"] == "all") & (frame["head"] == "linear")]
    trained = test[(test["control"] == "trained") & (test["combination"] == "single")]
    drawn = points[(points["weights"] == "trained") & (points["layers"] == "single")]
    shown = trained[trained["backbone"] != "3x32-step30"]  # only the longest training is drawn over depth
    both = shown.merge(drawn, on=["backbone", "layer"], suffixes=("", "_drawn"), validate="one_to_one")
    assert len(both) == len(shown) == len(drawn)
    for name in ("accuracy", "low", "high", "relative_depth"):
        np.testing.assert_allclose(both[name], both[f"{name}_drawn"], rtol=1e-12)
    assert (both["chosen"] == both["chosen_drawn"]).all()


def test_control_means_are_means_over_seeds(frame):
    points = depth_points(frame)
    mean = points[(points["weights"] == "init") & (points["backbone"] == "mean") & (points["layers"] == "single")]
    seeds = points[(points["weights"] == "init") & (points["backbone"] != "mean") & (points["layers"] == "single")]
    by_layer = seeds.groupby(["model", "layer"])["accuracy"].agg(["mean", "min", "max"])
    indexed = mean.set_index(["model", "layer"]).loc[by_layer.index]
    np.testing.assert_allclose(indexed[["accuracy", "low", "high"]], by_layer)
    assert (mean["n_seeds"] == 2).all()


def test_scaling_points_are_the_chosen_layers(frame):
    points = scaling_points(frame)
    chosen = frame[frame["chosen"] & (frame["split"] == "test") & (frame["source"] == "all")]
    expected = chosen[chosen["control"] == "trained"].set_index("backbone")["accuracy"]
    drawn = points[(points["weights"] == "trained") & (points["layers"] == "chosen layer")]
    drawn = drawn[drawn["backbone"] != "mean"].set_index("backbone")["accuracy"]
    pd.testing.assert_series_equal(
        drawn.sort_index(), expected.drop("3x32-step30").sort_index(), check_index_type=False
    )


def test_training_starts_from_untrained_weights_of_the_same_shape(frame):
    points = training_points(frame)
    assert sorted(points["training_images"].unique()) == [0, 30_000, 300_000]
    assert set(points[points["training_images"] == 0]["weights"]) == {"init"}
    assert set(points["series"]) == {"3x32"}


def test_the_same_run_gives_the_same_bytes(run, page, tmp_path):
    again = build_report(run, tmp_path / "report.html")
    assert again.read_bytes() == page.read_bytes()
    files = sorted(path.name for path in (page.parent / "report_figures").iterdir())
    assert files == sorted(
        f"{name}.{kind}" for name in ("depth", "kinds", "scaling", "training") for kind in ("csv", "png", "svg")
    )
    for name in files:
        ours, theirs = (folder / "report_figures" / name for folder in (page.parent, tmp_path))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_drawing_leaves_the_callers_style_alone(frame):
    before = dict(mpl.rcParams)
    depth_figure(frame)
    assert dict(mpl.rcParams) == before


class Reader(HTMLParser):
    """Collects ids, addresses that a browser would load, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.loads, self.tags, self.words = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.loads += [attrs[name] for name in ("src", "href", "xlink:href", "srcset", "data") if name in attrs]

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_self_contained(page):
    text = page.read_text(encoding="utf-8")
    reader = Reader(text)
    assert not {"script", "link", "img", "iframe", "object"} & reader.tags
    assert not [load for load in reader.loads if re.match(r"(?i)(https?:)?//|data:|file:", load)]
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert len(set(reader.ids)) == len(reader.ids)
    used = re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text)
    assert set(used) <= set(reader.ids)
    for load in reader.loads:
        assert load.startswith("#") or (page.parent / load).is_file()


def test_the_page_names_no_folder_of_the_machine(page, run):
    text = page.read_text(encoding="utf-8")
    assert run.name in text
    assert str(run.parent) not in text


def test_every_chosen_layer_and_its_interval_is_on_the_page(page, frame):
    text = "".join(Reader(page.read_text(encoding="utf-8")).words)
    chosen = frame[frame["chosen"] & (frame["split"] == "test") & (frame["source"] == "all")]
    for row in chosen[chosen["control"] == "trained"].itertuples():
        assert f"{100 * row.accuracy:.1f}" in text
        assert f"[{100 * row.low:.1f}, {100 * row.high:.1f}]" in text
        assert row.backbone in text


def test_headline_effects_come_from_the_margins(run, frame):
    """An independent computation with numpy only: mean right answers of the same pairs."""
    primary = narrow(frame)
    verdicts = Verdicts(run, "strict")
    margins = load_margins(run)
    margins = margins[(margins["split"] == "test") & (margins["label"] != 0.5)]
    right = (margins["margin"] > 0) == (margins["label"] > 0.5)
    accuracy = right.groupby(margins["record_id"]).mean()
    chosen = primary[primary["chosen"] & (primary["split"] == "test") & (primary["source"] == "all")]
    value = {
        (backbone, control): accuracy[record]
        for backbone, control, record in chosen[["backbone", "control", "record_id"]].to_numpy()
    }
    random = {shape: np.mean([value[shape, f"init:{seed}"] for seed in (0, 1)]) for shape in ("2x16-seed0", "3x32")}
    small = np.mean([value["2x16-seed0", "trained"], value["2x16-seed1", "trained"]])
    found_margins = {m.model: m for m in control_margins(primary, verdicts) if m.layers == "chosen layer"}
    assert found_margins["3x32"].effect.estimate == pytest.approx(value["3x32", "trained"] - random["3x32"])
    assert found_margins["2x16 (2 seeds)"].effect.estimate == pytest.approx(small - random["2x16-seed0"])
    trained, control, left = size_effects(primary, verdicts)["chosen layer"]
    assert trained.estimate == pytest.approx(value["3x32", "trained"] - small)
    assert control.estimate == pytest.approx(random["3x32"] - random["2x16-seed0"])
    assert left.estimate == pytest.approx(trained.estimate - control.estimate)
    for effect in (trained, control, left, *(m.effect for m in found_margins.values())):
        assert effect.low < effect.estimate < effect.high


def test_intervals_contain_the_variance_over_seeds(run, frame):
    """As a second computation from the margins has it, and wider than over the pairs alone."""
    primary = narrow(frame)
    effects = dict(
        zip(("trained", "random", "left"), size_effects(primary, Verdicts(run, "strict"))["chosen layer"], strict=True)
    )
    rows = primary[primary["chosen"] & (primary["split"] == "test") & (primary["source"] == "all")]
    margins = load_margins(run, rows["record_id"])
    margins = margins[(margins["split"] == "test") & (margins["label"] != 0.5)]
    right = ((margins["margin"] > 0) == (margins["label"] > 0.5)).astype(float)
    table = right.set_axis([margins["pair_id"], margins["record_id"]]).unstack()
    groups = margins.drop_duplicates("pair_id").set_index("pair_id")["group"].loc[table.index]

    def side(backbones, control):
        mine = rows["backbone"].isin(backbones) & rows["control"].str.startswith(control)
        return table[rows.loc[mine, "record_id"]]

    small = ("2x16-seed0", "2x16-seed1")
    seeds = {
        "trained": [side(["3x32"], "trained"), side(small, "trained")],
        "random": [side(["3x32"], "init"), side(small, "init")],
    }
    seeds["left"] = [*seeds["trained"], *seeds["random"][::-1]]
    for name, sides in seeds.items():
        terms = [(sign, part.to_numpy().T) for sign, part in zip([1, -1, 1, -1], sides, strict=False)]
        estimate, low, high = again.contrast(terms, groups.to_numpy())
        effect = effects[name]
        assert effect.estimate == pytest.approx(estimate)
        assert (effect.low, effect.high) == pytest.approx((low, high), abs=1e-6)
        total = [part.mean(axis=1).to_numpy() for part in sides]
        gain, loss = np.mean(total[::2], axis=0), np.mean(total[1::2], axis=0)
        pairs = paired_difference(gain, loss, groups.to_numpy())
        assert effect.high - effect.low > len(total) / 2 * (pairs.high - pairs.low)
    assert effects["left"].seeds == (("trained 3x32", 1), ("init 2x16", 2), ("trained 2x16", 2), ("init 3x32", 2))


def test_sides_with_one_seed_keep_the_interval_over_pairs_and_say_so(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, (Net("a", 2, 16, None), Net("b", 3, 32, None)), kinds=(), **SIZE)
    (effect,) = size_effects(load_results(folder), Verdicts(folder, "strict"))["all layers"]
    assert effect.seeds == (("trained b", 1), ("trained a", 1))
    text = size_sentence("all layers", [effect], "a", "b")
    assert text.endswith(
        "In the interval: test pairs; not the variance over seeds of trained b and trained a (one seed each: unknown)."
    )
    assert "In the interval: test pairs" in build_report(folder, tmp_path / "out.html").read_text(encoding="utf-8")


def test_joining_is_compared_within_training_seeds(run, frame):
    effect = joining_effects(narrow(frame), Verdicts(run, "strict"))["2x16 (2 seeds)"]
    rows = narrow(frame)
    rows = rows[(rows["split"] == "test") & (rows["source"] == "all") & (rows["control"] == "trained")]
    rows = rows[rows["backbone"].str.startswith("2x16")]
    joined, chosen = (
        rows[mask].set_index("backbone")["accuracy"] for mask in (rows["combination"] != "single", rows["chosen"])
    )
    assert effect.estimate == pytest.approx((joined - chosen).mean())
    assert effect.seeds == (("trained 2x16", 2),)
    part = (joined - chosen).var(ddof=1) / 2
    assert effect.high - effect.estimate > 1.96 * np.sqrt(part)
    assert effect.high - effect.estimate == pytest.approx(effect.estimate - effect.low)


def test_the_page_says_of_every_difference_which_seeds_it_covers(page):
    text = "".join(Reader(page.read_text(encoding="utf-8")).words)
    assert "trained 3x32: 1; init 2x16: 2; trained 2x16: 2; init 3x32: 2" in text
    assert (
        "In these intervals, each for its own sides: test pairs, 2 seeds of trained 2x16, 2 seeds of init 3x32,"
        " 2 seeds of init 2x16; not the variance over seeds of trained 3x32 (one seed: unknown)." in text
    )
    assert "of one accuracy over test pairs, not seeds" in text


def test_a_difference_of_differences_is_wider_than_neither_side_allows(run, frame):
    effects = size_effects(narrow(frame), Verdicts(run, "strict"))["all layers"]
    widths = [effect.high - effect.low for effect in effects]
    assert max(widths[:2]) < widths[2] < 1.5 * sum(widths[:2])


@pytest.mark.parametrize("estimate", [0.05, -0.05])
def test_sentences_keep_the_sign(estimate):
    effect = Effect("a - b", estimate, estimate - 0.02, estimate + 0.02, 0.03, 100)
    words = "above" if estimate > 0 else "below"
    text = size_sentence("chosen layer", [effect], "small", "large")
    assert text == f"At the layer chosen on validation, large is 5.0 points [3.0, 7.0] {words} small."


def test_an_effect_around_zero_is_not_called_one():
    effect = Effect("a - b", 0.01, -0.01, 0.03, 0.03, 100)
    text = size_sentence("all layers", [effect], "small", "large")
    assert text == "With all layers together, large cannot be told (+1.0 points [\N{MINUS SIGN}1.0, +3.0]) from small."


def test_few_seeds_of_random_weights_conclude_nothing_in_sentences(run, frame, page):
    text = "".join(Reader(page.read_text(encoding="utf-8")).words)
    assert "no conclusion from 2 seeds of random weights" in text
    (margin,) = [
        one
        for one in control_margins(narrow(frame), Verdicts(run, "strict"))
        if one.layers == CHOSEN and one.model == "3x32"
    ]
    assert margin.effect.random_seeds == 2
    size = size_effects(narrow(frame), Verdicts(run, "strict"))
    for seeds, words in ((2, ": no conclusion from 2 seeds"), (3, ", and that is separated")):
        apart = Effect("a - b", 0.05, 0.03, 0.07, 0.03, 100, random_seeds=seeds)
        told = found(frame, [replace(margin, effect=apart)], {}, {CHOSEN: [size[CHOSEN][0], apart, apart]}, {}, {})
        assert words in told[2]
        above = "That is 5.0 points [3.0, 7.0] above the same network with random weights" in told[1]
        differs = "That differs by +5.0 points [+3.0, +7.0] from the same network with random weights" in told[1]
        assert (above, differs) == (seeds == 3, seeds == 2)


def test_controls_of_training_seeds_are_told_apart(tmp_path):
    seeds = (Net("2x16-seed0", 2, 16), Net("2x16-seed1", 2, 16))
    shuffled = [replace(net, control=f"shuffled:{seed}", training_images=None) for net in seeds for seed in range(3)]
    nets = (*with_controls(seeds, n_init=1), *shuffled)
    write_run(tmp_path / "run", nets, kinds=(), **SIZE)
    frame = load_results(tmp_path / "run")
    table = controls_table(frame)
    assert list(zip(table["Backbone"], table["Control"], strict=True)) == [
        ("2x16 (2 seeds)", "init:0"),
        *((net.name, net.control) for net in shuffled),
    ]


def test_names_from_files_are_escaped(tmp_path):
    evil = "<script>alert('{}')</script>&\"</svg>"
    nets = with_controls((Net(evil, 2, 16, None), Net("$\\frac{x$", 3, 32, None)), n_init=1)
    write_run(tmp_path / "run", nets, kinds=("<b>bold</b>", "$_$"), **SIZE)
    text = build_report(tmp_path / "run", tmp_path / "a b&c" / "<p>.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<b>bold" not in text
    assert text.count("</svg>") == 3


def test_one_backbone_without_controls_kinds_or_joined_layers(tmp_path):
    folder = single(tmp_path, joined=False)
    text = build_report(folder, tmp_path / "out.html").read_text(encoding="utf-8")
    assert "no random-weights controls" in text
    assert "no head on all layers together" in text
    files = {path.name for path in (tmp_path / "out_figures").glob("*.svg")}
    assert files == {"depth.svg"}


def test_joined_layers_alone_need_no_depth_figure(tmp_path):
    nets = with_controls((Net("a", 2, 16, None), Net("b", 3, 32, None)), n_init=1)
    write_run(tmp_path / "run", nets, kinds=KINDS, singles=False, **SIZE)
    text = build_report(tmp_path / "run", tmp_path / "out.html").read_text(encoding="utf-8")
    assert "says nothing about depth" in text
    assert not (tmp_path / "out_figures" / "depth.svg").exists()
    assert (tmp_path / "out_figures" / "scaling.svg").is_file()


def test_without_validation_no_layer_is_chosen(tmp_path):
    folder = single(tmp_path, validation=False)
    text = build_report(folder, tmp_path / "out.html").read_text(encoding="utf-8")
    assert "for want of single-layer heads or of validation rows" in text
    assert "have no validation rows" in text


def test_random_weights_alone_say_so(tmp_path):
    write_run(tmp_path / "run", (Net("only", 2, 16, None, "init:0"),), kinds=(), **SIZE)
    text = build_report(tmp_path / "run", tmp_path / "out.html").read_text(encoding="utf-8")
    assert "no trained backbone" in text
    with pytest.raises(ResultsError, match="no points for the depth figure"):
        depth_figure(load_results(tmp_path / "run"))


def test_several_settings_are_listed_and_the_first_is_drawn(tmp_path):
    frame = load_results(single(tmp_path, sigmas=("0.1", "0.005"), heads=("mlp", "linear")))
    assert settings(frame)[0].sigma == "0.1"
    assert settings(frame)[0].head == "mlp"  # the only head that was fitted on single layers here
    others = other_settings_table(frame)
    assert list(others["Sigma"]) == ["0.005"]
    assert set(depth_points(frame, setting=replace(settings(frame)[0], sigma="0.005"))["accuracy"]) == set(
        frame[(frame["sigma"] == "0.005") & (frame["split"] == "test") & (frame["head"] == "mlp")]["accuracy"]
    )


def test_every_cell_of_every_noise_level_is_on_the_page(tmp_path):
    nets = with_controls((Net("only", 2, 16),), n_init=1)
    run = tmp_path / "levels"
    write_run(run, nets, kinds=(), sigmas=("0.005", "0.1"), heads=("linear", "mlp"), output=True, **SIZE)
    page = build_report(run, tmp_path / "report.html")
    text = page.read_text()
    table = text[text.index("<h3>only</h3>") : text.index("<h3>Controls</h3>")]
    rows = [
        re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    ]
    shown = pd.DataFrame(rows[1:], columns=rows[0])
    frame = load_results(run).query("split == 'test' and source == 'all'")
    cells = frame[frame["control"] == "trained"]
    assert len(shown) == len(cells) == 2 * (4 + 2)
    assert shown["Noise level"].tolist() == ["0.005"] * 6 + ["0.1"] * 6
    for row in cells.to_dict("records"):
        name = "all layers" if row["n_layers"] > 1 else row["layer_set"]
        mine = shown[(shown["Noise level"] == row["sigma"]) & (shown["Head"] == row["head"])]
        (mine,) = mine[mine["Layers"].str.split(" ").str[0] == name.split()[0]].to_dict("records")
        same = frame[(frame["control"] == "init:0") & (frame["sigma"] == row["sigma"])]
        same = same[(same["head"] == row["head"]) & (same["layer_set"] == row["layer_set"])]
        assert mine["Test accuracy"].split()[0] == f"{100 * row['accuracy']:.1f}"
        assert mine["Random (init)"].split(",")[0] == f"{100 * same['accuracy'].item():.1f}"
    joined = text[text.index("<h2>Combinations</h2>") : text.index("<h2>Warnings")]
    assert joined.count("<td>all layers</td>") == 4  # two heads at two noise levels
    points = pd.read_csv(page.parent / "report_figures" / "levels.csv")
    for sigma in ("0.005", "0.1"):
        drawn = points[(points["level"] == f"sigma {sigma}") & (points["layers"] == "single")]
        single = cells[(cells["sigma"] == sigma) & (cells["layer"] <= 2)]
        np.testing.assert_allclose(drawn["accuracy"], single["accuracy"])
        assert drawn["chosen"].sum() == 1


def test_kinds_without_a_depth_stand_side_by_side_and_the_legend_names_what_is_drawn(tmp_path):
    nets = (Net("small", 2, 16), *with_controls((Net("large", 3, 32),), n_init=1))
    run = tmp_path / "joined"
    write_run(run, nets, kinds=KINDS, singles=False, **SIZE)
    figure = kinds_figure(load_results(run))
    (axes,) = figure.axes
    assert [text.get_text().split("\n")[0] for text in axes.get_xticklabels()] == ["colour", "shape"]
    assert len(axes.containers) == 2 * 3  # trained twice and untrained once, on each kind
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "small, all layers together, 95 % interval",
        "large, all layers together, 95 % interval",
        "random weights (init), 1 seed",
    ]


def test_the_legend_of_kinds_promises_no_control_that_the_largest_backbone_lacks(tmp_path):
    nets = (*with_controls((Net("small", 2, 16),), n_init=1), Net("large", 3, 32))
    run = tmp_path / "lacking"
    write_run(run, nets, kinds=KINDS, **SIZE)
    (legend,) = kinds_figure(load_results(run)).legends
    assert not [text for text in legend.get_texts() if "random" in text.get_text()]


def test_a_label_covers_no_curve_and_chance_is_named_in_every_figure(frame):
    for figure in (depth_figure(frame), kinds_figure(frame), scaling_figure(frame), training_figure(frame)):
        assert "chance" in [text.get_text() for axes in figure.axes for text in axes.texts]
        for axes in figure.axes:
            rims = [text for text in axes.texts if text.get_path_effects()]
            curves = [line for line in axes.lines if len(line.get_xdata()) > 2]
            assert all(rim.get_zorder() < line.get_zorder() for rim in rims for line in curves)


def test_a_linear_head_is_preferred_to_an_earlier_mlp(frame):
    reordered = pd.concat([frame[frame["head"] == "mlp"], frame[frame["head"] == "linear"]])
    assert settings(reordered)[0].head == "linear"


def test_kinds_without_decided_pairs_are_named_and_not_drawn(frame):
    tied = frame.copy()
    tied.loc[tied["source"] == "shape", ["accuracy", "low", "high"]] = np.nan
    assert set(kinds_points(tied)["source"]) == {"colour"}
    assert len(kinds_figure(tied).axes) == 1


def test_models_join_seeds_and_drop_shorter_training(frame):
    assert [model.label for model in trained_models(frame)] == ["2x16 (2 seeds)", "3x32"]
    labels = [model.label for model in trained_models(frame, every_length=True)]
    assert labels == ["2x16 (2 seeds)", "3x32-step30", "3x32"]


def test_untrained_controls_of_the_same_shape_stand_in(frame):
    early = next(model for model in trained_models(frame, every_length=True) if model.label == "3x32-step30")
    assert set(control_rows(frame, early)["backbone"]) == {"3x32"}
    shuffled = frame.assign(control=frame["control"].str.replace("init", "shuffled"))
    assert control_rows(shuffled, early).empty  # shuffled weights are a model's own


def test_training_seeds_keep_the_shuffled_weights_of_each_and_init_weights_once(tmp_path):
    nets = tuple(Net(f"m-seed{seed}", 2, 16) for seed in range(3))
    controls = tuple(
        replace(net, control=kind, training_images=None) for net in nets for kind in ("init:0", "shuffled:0")
    )
    write_run(tmp_path / "run", nets + controls, kinds=(), **SIZE)
    frame = load_results(tmp_path / "run")
    (model,) = trained_models(frame)
    rows = control_rows(frame, model)
    assert set(rows.loc[rows["control"] == "shuffled:0", "backbone"]) == {"m-seed0", "m-seed1", "m-seed2"}
    assert set(rows.loc[rows["control"] == "init:0", "backbone"]) == {"m-seed0"}
    margins = {margin.kind: margin for margin in control_margins(frame, Verdicts(tmp_path / "run", "strict"))}
    assert margins["shuffled"].effect.seeds == (("trained m", 3), ("shuffled m", 3))
    assert margins["init"].effect.seeds == (("trained m", 3), ("init m", 1))


@pytest.mark.parametrize(
    ("names", "n_shown"),
    [
        (("3x96-at3", "3x96-at10", "3x96"), 1),
        (("base-3x96-at3", "base-3x96-10pct", "base-3x96"), 1),
        (("dit-step2000-seed0", "dit-step3000-seed0"), 1),
        (("sd3-anime", "sd3-photo"), 2),
        (("sd3", "sd3-photo"), 2),
        (("one", "two"), 2),
    ],
)
def test_only_lengths_of_one_training_are_a_series(frame, names, n_shown):
    row = frame[frame["backbone"] == "3x32"].iloc[:1]
    rows = pd.concat(row.assign(backbone=name, training_images=images) for images, name in enumerate(names, start=1000))
    assert [model.label for model in trained_models(rows)][-1] == names[-1]
    assert len(trained_models(rows)) == n_shown
    series = [[model.label for model in models] for models in training_series(rows)]
    assert series == ([list(names)] if n_shown == 1 else [])


def test_all_figures_draw_a_family_with_both_kinds_of_controls(tmp_path):
    nets = with_controls(NETS[2:], n_init=1, n_shuffled=1)
    write_run(tmp_path / "run", nets, kinds=KINDS, **SIZE)
    frame = load_results(tmp_path / "run")
    assert len(depth_figure(frame).axes) == 1
    assert len(scaling_figure(frame).axes) == 2
    assert len(training_figure(frame).axes) == 2
    assert set(depth_points(frame)["weights"]) == {"trained", "init", "shuffled"}


def test_warnings_name_what_a_reader_must_know(frame):
    broken = frame.assign(edge_of_grid=True, converged=False, effective_groups=20.0, predicted_ties=3)
    text = " ".join(warnings_list(broken))
    for words in (
        "edge of the grid",
        "did not converge",
        "fewer than 50 effective groups",
        "left out",
        "true ties",
        "equal scores",
    ):
        assert words in text
    assert "rows missing from the store, unreadable or non-finite pictures, no label" in text
    calm = frame.assign(edge_of_grid=False, converged=True, effective_groups=500.0, left_out=0, true_ties=0)
    assert warnings_list(calm) == []


def test_strengths_at_either_end_of_the_grid_are_two_warnings(frame):
    linear = frame[frame["head"] == "linear"]
    ends = linear["layer"].map({0: 1e-4, 1: 10.0}).fillna(0.1)
    rows = linear.assign(strength=ends, edge_of_grid=linear["layer"].isin([0, 1]), converged=True)
    top, bottom = warnings_list(rows, (), {"linear": STRENGTHS})[:2]
    assert "the largest strength of the grid; a wider grid may fit better" in top
    assert "layers 1;" in top
    assert "layers 0" not in top
    assert "the smallest strength of the grid (found next to nothing to fit; usual at chance level)" in bottom
    assert "layers 0;" in bottom
    assert "layers 1" not in bottom
    assert "a strength at the edge of the grid; a wider" in warnings_list(rows)[0]


def test_stores_with_other_data_are_named_in_short_and_in_the_warnings(run, frame, tmp_path):
    other = (frame["backbone"] == "3x32") & (frame["control"] == "init:1")
    changed = frame.assign(data_digest=frame["data_digest"].where(~other, "cd" * 32))
    for text in (found(changed, [], {}, {}, {}, {})[0], warnings_list(changed)[0]):
        assert text.startswith("Not the same data: 1 of 8 store was fitted or judged on other pairs")
        assert "3x32 (init:1)." in text
    assert "Not the same data" not in " ".join([*found(frame, [], {}, {}, {}, {}), *warnings_list(frame)])


def test_pairs_that_one_side_did_not_judge_are_counted(tmp_path):
    folder = tmp_path / "run"
    keys = write_run(folder, (Net("a", 2, 16, None), Net("b", 3, 32, None)), kinds=(), singles=False, **SIZE)
    margins = load_margins(folder, [keys[0]]).drop(columns="record_id")
    decided = margins[(margins["split"] == "test") & (margins["label"] != 0.5)]
    rows = load_results(folder).query("record_id == @keys[0]")
    rows = rows.drop(columns=["chosen", "family_tested", "sigma_ratio", "pooling_layers", "imported"])
    write_part(folder, keys[0], rows, margins.drop(decided.index[:7]))
    (effect,) = size_effects(load_results(folder), Verdicts(folder, "strict"))["all layers"]
    assert (effect.dropped, effect.n_pairs) == (7, len(decided) - 7)
    text = build_report(folder, tmp_path / "out.html").read_text(encoding="utf-8")
    assert f"7 pairs dropped and {len(decided) - 7} kept in b" in text
    write_part(folder, keys[0], rows, margins.drop(decided.index))
    with pytest.raises(ResultsError, match="no test pair in common"):
        build_report(folder, tmp_path / "out.html")


def test_differences_use_the_resamples_and_the_level_of_the_run(tmp_path, monkeypatch):
    folder = tmp_path / "family"
    write_run(folder, (Net("a", 2, 16, None), Net("b", 3, 32, None)), kinds=(), **SIZE)
    write_config(folder, {"sweep": {"resamples": 150, "level": 0.8}})
    used = []
    monkeypatch.setattr(
        "probekit.report.effects.network_contrast",
        lambda *sides, **options: used.append(options) or network_contrast(*sides, **options),
    )
    build_report(folder, tmp_path / "out.html")
    assert used
    assert all(options == {"refits": None, "weights": None, "n_boot": 150, "level": 0.8} for options in used)


@pytest.mark.parametrize(("folder", "title"), [("me/family", "family"), ("demo/run", "demo/run")])
def test_the_title_names_the_run_and_not_its_owner(tmp_path, folder, title):
    write_run(tmp_path / folder, (Net("only", 2, 16, None),), kinds=(), **SIZE)
    text = build_report(tmp_path / folder, tmp_path / "out.html").read_text(encoding="utf-8")
    assert f"<title>{title}: probing report</title>" in text
    assert "me/" not in text


def test_joining_is_compared_with_the_chosen_layer(run, frame):
    effects = joining_effects(narrow(frame), Verdicts(run, "strict"))
    assert set(effects) == {"2x16 (2 seeds)", "3x32"}
    assert effects["3x32"].estimate > 0


def test_sentences_for_seeds_of_the_largest_model(frame):
    small = frame[frame["backbone"].str.startswith("2x16")]
    assert "mean of 2 training seeds" in found(small, [], {}, {}, {}, {})[0]


def test_facts_of_stores_are_split_into_shared_and_differing():
    stores = [{"path": f"/secret/{name}", "noise": {"seed": 0}, "id": name * 40} for name in "ab"]
    common, differing = store_tables(stores)
    assert common.to_dict("records") == [{"Setting": "noise.seed", "Value": "0"}]
    assert differing.to_dict("list") == {"store": ["a", "b"], "id": ["a" * 12 + "…", "b" * 12 + "…"]}
    assert all(table.empty for table in store_tables([]))


def test_a_folder_as_page_is_refused(run, tmp_path):
    with pytest.raises(ResultsError, match="is a folder; name the page"):
        build_report(run, tmp_path)


def test_label_heights_keep_order_and_distance():
    placed = spread([60.0, 60.1, 70.0, 60.2], 2.0)
    assert placed == pytest.approx([58.1, 60.1, 70.0, 62.1])
    ordered = sorted(placed)
    assert all(b - a >= 2.0 - 1e-9 for a, b in pairwise(ordered))


def test_colours_are_ordered_in_lightness_and_text_is_readable():
    def lightness(colour):
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), mpl.colors.to_rgb(colour), strict=True))

    ladder = [lightness(colour) for colour in colours(6)]
    assert ladder == sorted(ladder, reverse=True)
    assert lightness(readable(colours(6)[0])) < ladder[0]


@pytest.mark.parametrize(
    ("n", "text"), [(254_000, "0.25 M"), (999_168, "1.0 M"), (8.1e9, "8.1 B"), (2_432, "2.4 k"), (12, "12")]
)
def test_sizes_in_words(n, text):
    assert in_millions(n) == text


def with_prompts(net):
    """Controls of one net: random weights, other prompts, and both in one."""
    kinds = ["init:0", "init:1", "empty-prompts", "shuffled-prompts:0", "shuffled-prompts:1", "init:0+empty-prompts"]
    return (net, *(replace(net, control=kind) for kind in kinds))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run with every axis of a dump: prompt conditions, the output point, two draws, an unresolved noise level."""
    folder = tmp_path_factory.mktemp("told") / "run"
    nets = (*with_prompts(Net("2x16", 2, 16)), *with_prompts(Net("3x32", 3, 32)))
    write_run(folder, nets, kinds=("colour", "degradation"), draws=(0, 1), output=True, ratio=2.1, **SIZE)
    return folder


def test_other_prompts_are_controls_and_no_backbones(told):
    frame = narrow(load_results(told))
    assert [model.label for model in trained_models(frame)] == ["2x16", "3x32"]
    assert control_kinds(frame) == ["init", "empty-prompts", "shuffled-prompts"]
    margins = [m for m in control_margins(frame, Verdicts(told, "strict")) if (m.model, m.layers) == ("3x32", CHOSEN)]
    value = frame[frame["chosen"] & (frame["split"] == "test") & (frame["source"] == "all")]
    value = value[value["backbone"] == "3x32"].set_index("control")["accuracy"]
    assert {m.kind: m.control for m in margins} == {
        "init": pytest.approx(value[["init:0", "init:1"]].mean()),  # without init:0+empty-prompts
        "empty-prompts": pytest.approx(value["empty-prompts"]),
        "shuffled-prompts": pytest.approx(value[["shuffled-prompts:0", "shuffled-prompts:1"]].mean()),
    }
    empty = next(m.effect for m in margins if m.kind == "empty-prompts")
    assert empty.what == "3x32: real prompts - empty prompts"
    assert empty.estimate == pytest.approx(value["trained"] - value["empty-prompts"])
    (trained, *random) = size_effects(frame, Verdicts(told, "strict"))[CHOSEN]
    assert len(random) == 2  # other prompts are no null of size
    assert trained.what == "3x32 - 2x16, trained"


def test_empty_prompts_of_training_seeds_are_those_seeds(tmp_path):
    nets = tuple(Net(f"m-seed{seed}", 2, 16, None) for seed in range(3))
    write_run(tmp_path / "run", nets + tuple(replace(net, control="empty-prompts") for net in nets), kinds=(), **SIZE)
    margin, *_ = control_margins(load_results(tmp_path / "run"), Verdicts(tmp_path / "run", "strict"))
    assert margin.effect.seeds == (("trained m", 3), ("empty-prompts m", 3))


def test_untrained_controls_are_not_lent_by_those_told_something_else(told):
    frame = load_results(told).query("control != 'init:0' and control != 'init:1'")
    assert control_kinds(control_rows(frame, trained_models(frame)[0])) == ["empty-prompts", "shuffled-prompts"]


def test_the_output_point_stands_apart_from_the_curve_of_layers(told):
    frame = load_results(told)
    points = depth_points(frame)
    mine = points[(points["model"] == "3x32") & (points["weights"] == "trained")]
    single, output = (mine[mine["layers"] == name] for name in ("single", "output point"))
    assert single["layer"].tolist() == [0, 1, 2, 3]
    assert (output["layer"].tolist(), output["relative_depth"].tolist(), output["chosen"].tolist()) == (
        [4],
        [1],
        [False],
    )
    assert single["relative_depth"].is_unique
    axes = depth_figure(frame).axes[-1]
    assert max(axes.lines[0].get_xdata()) <= 1 < axes.get_xlim()[1]
    assert axes.get_xlim()[1] > depth_figure(frame[~(frame["layer"] > frame["n_blocks"])]).axes[-1].get_xlim()[1]
    assert len(all_layers(frame)) == len(frame[frame["layer_set"].isin(["0+1+2", "0+1+2+3"])])
    with_output = frame.assign(layer_set=frame["layer_set"].replace("0+1+2+3", "1+2+3+4"))
    assert set(all_layers(with_output)["layer_set"]) == {"0+1+2"}


def test_all_layers_of_a_pooling_that_lacks_some(frame):
    text = frame[frame["n_layers"] == 4].assign(layer_set="0+1+2", n_layers=3)
    assert all_layers(text).empty
    assert len(all_layers(text.assign(pooling_layers=3))) == len(text)


def test_draws_are_never_drawn_as_one(told):
    frame = load_results(told)
    assert settings(frame)[0].draw == 0
    first, second = (depth_points(frame, setting=replace(settings(frame)[0], draw=draw)) for draw in (0, 1))
    pd.testing.assert_frame_equal(depth_points(frame), first)
    assert len(first) == len(second) == len(first.drop_duplicates(["model", "backbone", "weights", "layers", "layer"]))
    assert not np.allclose(first["accuracy"], second["accuracy"])
    others = other_settings_table(frame)
    assert list(others["Draw"].unique()) == ["1"]
    assert set(others["Backbone"]) == {"2x16", "3x32"}


def test_the_page_says_what_the_axes_are(told, tmp_path):
    text = "".join(Reader(build_report(told, tmp_path / "out.html").read_text(encoding="utf-8")).words)
    for words in (
        "the same trained network with empty prompts (",
        "3x32: real prompts \N{MINUS SIGN} shuffled prompts",
        "init:0 + empty-prompts",
        "4 (entering the output projection)",
        "of noise draw 0, one of 2",
        "Noise level 0.005 is not resolved for 2x16 (2.1), 3x32 (2.1), 2x16 (init:0) (2.1)",
        "2.1, not resolved",
        "(see Warnings)",
        "Noise over rounding",
        "the tokens entering the output projection, a function of the last layer; never chosen",
    ):
        assert words in text, words


def test_a_run_without_further_axes_says_nothing_of_them(page):
    text = "".join(Reader(page.read_text(encoding="utf-8")).words)
    for words in ("resolved", "Noise over rounding", "empty prompts", "Cross right", "one of 2"):
        assert words not in text


def test_only_measured_noise_levels_below_three_are_unresolved(frame):
    small = frame[frame["backbone"] == "3x32"]
    assert unresolved(small) == unresolved(small.assign(sigma_ratio=3.0)) == []
    both = pd.concat([small.assign(sigma="0", sigma_ratio=np.nan), small.assign(sigma="0.1", sigma_ratio=2.9)])
    (text,) = unresolved(both, brief=True)
    assert text.startswith("Noise level 0.1 is not resolved for 3x32 (2.9), 3x32 (init:0) (2.9)")


def test_a_backbone_of_an_untested_family_is_called_so_wherever_it_is_listed(tmp_path):
    folder = single(tmp_path, tested=False)
    text = " ".join(Reader(build_report(folder, tmp_path / "out.html").read_text(encoding="utf-8")).words)
    assert "Untested: " in text
    frame = load_results(folder)
    assert all(model.label.endswith(" (untested)") for model in trained_models(frame))
    assert "(untested)" not in "".join(model.label for model in trained_models(frame.assign(family_tested=True)))


def test_noise_levels_are_counted_over_the_whole_run(tmp_path):
    folder = single(tmp_path, sigmas=("0.1", "0.005"))
    text = build_report(folder, tmp_path / "out.html").read_text(encoding="utf-8")
    assert "One noise level only" not in text
