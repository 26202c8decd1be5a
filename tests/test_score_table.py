"""Scores of other models: judged on the pairs of a preference file, kept in a run beside its heads."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic_run import Net, write_run
from typer.testing import CliRunner

from probekit import build_report, load_preferences, results
from probekit.cli import app
from probekit.config import ScoreTableConfig
from probekit.errors import ConfigError, ResultsError, ScoreFileError
from probekit.report.effects import Side, Verdicts
from probekit.stats import accuracy_interval, vote_ceiling
from probekit.sweep import score_table
from probekit.sweep.score_files import read_scores

PROMPTS, IMAGES = 30, 4


def write_prefs(path, *, validation=10, votes=False):
    """Rankings of four pictures under each prompt, picture 0 best, the last two tied; all pairs of each."""
    lines = []
    for prompt in range(PROMPTS):
        for a in range(IMAGES):
            for b in range(a + 1, IMAGES):
                label = 0.5 if a == 2 else 0.8 if votes else 1.0
                lines.append(
                    {"prompt": f"prompt {prompt}", "image_a": f"{prompt}/{a}.png", "image_b": f"{prompt}/{b}.png"}
                    | {"label": label, "split": "validation" if prompt < validation else "test"}
                    | {"ranking_id": f"r{prompt}", "source": "even" if prompt % 2 == 0 else "odd"}
                    | ({"n_votes": 10} if votes else {})
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def scores_of(*, good=0.8, seed=0):
    """Scores that fall with the rank in most prompts."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in range(PROMPTS):
        sign = 1 if rng.random() < good else -1
        for image in range(IMAGES):
            rows.append({"prompt": f"prompt {prompt}", "image": f"{prompt}/{image}.png", "score": -sign * image * 0.7})
    return pd.DataFrame(rows)


@pytest.fixture
def prefs(tmp_path):
    return write_prefs(tmp_path / "data" / "judged.jsonl")


def run_scores(tmp_path, prefs, frame, *, name="scorer.csv", out="run", **options):
    path = tmp_path / name
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)
    config = ScoreTableConfig.checked({"scores": path, "prefs": prefs, "out": tmp_path / out} | options, source="test")
    return score_table(config), tmp_path / out


def whole(frame, split="test"):
    rows = frame[(frame["split"] == split) & (frame["source"] == "all")]
    assert len(rows) == 1
    return rows.iloc[0]


def test_an_empty_folder_becomes_a_run(tmp_path, prefs):
    frame = scores_of()
    made, run = run_scores(tmp_path, prefs, frame)
    row = whole(results.load_results(run))
    assert (row["backbone"], row["control"], row["head_kind"], row["head"]) == (
        *["scorer", "external"],
        "external",
        "scores",
    )
    assert (row["dataset"], row["protocol"], row["n_pairs"], row["true_ties"]) == ("judged", "strict", 100, 20)
    # by hand: a prompt is right or wrong as a whole
    score = frame.set_index(["prompt", "image"])["score"]
    right = [score[f"prompt {p}", f"{p}/0.png"] > score[f"prompt {p}", f"{p}/1.png"] for p in range(10, 30)]
    assert row["accuracy"] == row["micro_accuracy"] == row["prompt_accuracy"] == pytest.approx(np.mean(right))
    expected = accuracy_interval(np.repeat(np.array(right, float), 5), np.repeat(np.arange(20), 5))
    assert (row["n_groups"], row["se"]) == (20, pytest.approx(expected.se))
    assert set(made.rows["source"]) == {"all", "even", "odd"}
    (told,) = results.describe_run(run)["scorers"]
    assert (told["backbone"], told["dataset"], told["accuracy"]) == ("scorer", "judged", row["accuracy"])
    margins = results.load_margins(run)
    ids = load_preferences(prefs).pairs["pair_id"]
    assert set(margins["pair_id"]) == set(ids)  # as stores keep them
    np.testing.assert_array_equal(margins["correct"].isna(), margins["label"] == 0.5)


def test_every_protocol_and_what_knows_nothing_under_it(tmp_path, prefs):
    frame, found = scores_of(), {}
    for protocol in ("strict", "hpsv2-inversion", "mps-inversion", "pickscore"):
        found[protocol] = whole(run_scores(tmp_path, prefs, frame, protocol=protocol)[0].rows)
    all_of_them = results.load_results(tmp_path / "run")
    assert all_of_them["record_id"].nunique() == 4
    right = found["strict"]["accuracy"]
    assert found["hpsv2-inversion"]["accuracy"] == pytest.approx((5 * right + 1) / 6)  # one of six pairs is a tie
    assert found["hpsv2-inversion"]["expected_random"] == pytest.approx((5 * 0.5 + 1) / 6)
    assert found["mps-inversion"]["expected_constant"] == 1
    assert found["strict"]["expected_random"] == 0.5
    assert found["pickscore"]["threshold"] in np.arange(11) / 10
    assert np.isnan(found["strict"]["threshold"])
    assert found["pickscore"]["n_pairs"] == 120


def test_a_threshold_is_tuned_on_validation_or_given(tmp_path, prefs):
    frame = scores_of(good=1.0)
    near = frame["image"].str.endswith("3.png")
    frame.loc[near, "score"] += 0.6  # the two tied pictures of a prompt lie closer together than others
    tuned = whole(run_scores(tmp_path, prefs, frame, protocol="pickscore")[0].rows)
    assert (tuned["threshold"], tuned["accuracy"]) == (0.1, 1.0)
    given = whole(run_scores(tmp_path, prefs, frame, protocol="pickscore", threshold=0.0)[0].rows)
    assert (given["threshold"], given["accuracy"]) == (0.0, pytest.approx(1 - 0.5 / 6))
    test_only = write_prefs(tmp_path / "other" / "test_only.jsonl", validation=0)
    with pytest.raises(ConfigError, match="no scored validation pairs to tune on; give --threshold"):
        run_scores(tmp_path, test_only, frame, protocol="pickscore")


def test_missing_and_strange_scores_are_counted(tmp_path, prefs, caplog):
    frame = scores_of()
    lost = frame[(frame["prompt"] != "prompt 12") | frame["image"].str.endswith("0.png")]
    more = pd.concat([lost, pd.DataFrame([{"prompt": "prompt 12", "image": "99/7.png", "score": 1.0}])])
    made, _ = run_scores(tmp_path, prefs, more, name="scorer.parquet")
    row = whole(made.rows)
    assert (row["left_out"], row["n_pairs"], row["true_ties"]) == (6, 95, 19)
    assert whole(made.rows, "validation")["left_out"] == 0
    assert made.unknown == 1
    assert "1 scores are of nothing in the preference file: '99/7.png'" in caplog.text


def test_a_score_without_a_prompt_holds_for_its_image(tmp_path, prefs):
    by_prompt = whole(run_scores(tmp_path, prefs, scores_of())[0].rows)
    by_image = whole(run_scores(tmp_path, prefs, scores_of().drop(columns="prompt"), name="b.csv")[0].rows)
    assert by_prompt["accuracy"] == by_image["accuracy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.assign(score=f["score"].where(f.index != 4)), r"row 5: score is nan; allowed: a finite number"),
        (lambda f: f.assign(score=f["score"].where(f.index != 4, np.inf)), r"row 5: score is inf"),
        (lambda f: pd.concat([f, f.iloc[[0]].assign(score=9.0)]), r"row 121: scores prompt 'prompt 0' and image '0/0"),
        (lambda f: f.drop(columns="score"), r"no column 'score' \(found: prompt, image\)"),
        (lambda f: f.assign(image="x" + f["image"]), r"none of its images and prompts is in the preference file"),
        (lambda f: f.head(0), "holds no scores"),
        (lambda f: f.assign(score="good"), "cannot be read as a table of scores"),
    ],
)
@pytest.mark.parametrize("name", ["scores.csv", "scores.parquet"])
def test_unusable_scores_are_one_line(tmp_path, prefs, change, message, name):
    with pytest.raises(ScoreFileError, match=message) as caught:
        run_scores(tmp_path, prefs, change(scores_of()), name=name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_equal_duplicates_are_one_score(tmp_path, prefs):
    frame = scores_of()
    twice = whole(run_scores(tmp_path, prefs, pd.concat([frame, frame]))[0].rows)
    assert twice["n_pairs"] == 100


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "scores.parquet").write_bytes(b"no parquet")
    for name, message in [
        ("scores.parquet", "cannot be read"),
        ("no.csv", "no such file"),
        ("a.txt", "ends in '.txt'"),
    ]:
        with pytest.raises(ScoreFileError, match=message):
            read_scores(tmp_path / name)


def write_sweep(run, prefs, *, drop=(), seed=0):
    """A run of one small backbone whose margins are of the pairs of a preference file, in groups of two prompts."""
    keys = write_run(run, (Net("2x8", 2, 8),), kinds=(), n_test=60, n_validation=30, joined=False)
    loaded = load_preferences(prefs)
    pairs = loaded.pairs[~loaded.pairs.index.isin(drop)]
    number = pairs["ranking_id"].str.slice(1).astype(int)
    frame = results.load_results(run).assign(dataset=loaded.name)
    for key in keys:
        margins = pairs[["pair_id", "split", "source", "label"]].assign(
            dataset=prefs.stem,
            group="pair of prompts " + (number // 2).astype(str),
            prompt_id=pairs["ranking_id"],
            row_a=2 * np.arange(len(pairs)),
            row_b=2 * np.arange(len(pairs)) + 1,
            margin=1.0,
            correct=1.0,
        )
        rows = frame[frame["record_id"] == key].drop(
            columns=["family_tested", "sigma_ratio", "pooling_layers", "imported"]
        )
        results.write_part(run, key, rows, margins)
    results.rebuild(run, keys)
    return keys


def test_beside_a_sweep_pairs_and_groups_are_those_of_the_run(tmp_path, prefs):
    run = tmp_path / "run"
    last = len(load_preferences(prefs).pairs) - 1
    keys = write_sweep(run, prefs, drop=[last])
    before = results.load_results(run)
    made, _ = run_scores(tmp_path, prefs, scores_of())
    row = whole(made.rows)
    assert row["n_groups"] == 10  # by the preference file alone they would be 20
    assert row["left_out"] == 1
    after = results.load_results(run)
    pd.testing.assert_frame_equal(after[after["head_kind"] != "external"].reset_index(drop=True), before)
    assert after["record_id"].iloc[-1] == row["record_id"]
    # a later sweep keeps it, and so does its configuration
    assert results.rebuild(run, keys) == 0
    assert set(results.load_results(run)["backbone"]) == {"2x8", "scorer"}
    assert results.load_config(run)["scorers"][0]["name"] == "scorer"
    # better scores of the same name take its place
    run_scores(tmp_path, prefs, scores_of(good=1.0))
    again = results.load_results(run)
    assert whole(again[again["head_kind"] == "external"])["accuracy"] == 1
    assert len(results.load_config(run)["scorers"]) == 1
    assert len(list((run / "margins").iterdir())) == len(keys) + 1


def test_beside_nested_folds_pairs_are_those_of_the_fits_as_they_are(tmp_path, prefs):
    run = tmp_path / "run"
    keys = write_sweep(run, prefs)
    facts = ["family_tested", "sigma_ratio", "pooling_layers", "imported"]
    rows = results.load_results(run).query("record_id == @keys[0]").drop(columns=facts)
    turned = results.load_margins(run, keys[:1]).drop(columns="record_id")
    turned["split"] = turned["split"].map({"test": "validation", "validation": "test"})
    more = rows.assign(record_id="nested", altered="nested:2", n_pairs=100 * rows["n_pairs"])
    results.write_part(run, "nested", more, turned)
    results.rebuild(run, [*keys, "nested"])
    made, _ = run_scores(tmp_path, prefs, scores_of())
    assert whole(made.rows)["n_groups"] == 10  # test prompts, two a group; the other 10 prompts are 5


def test_a_run_on_another_file_of_the_same_name_is_refused(tmp_path, prefs):
    write_sweep(tmp_path / "run", prefs)
    other = write_prefs(tmp_path / "other" / "judged.jsonl", votes=True)
    with pytest.raises(ConfigError, match=r"labels 150 pairs otherwise: .* holds another data set 'judged'"):
        run_scores(tmp_path, other, scores_of())


def test_a_run_of_an_earlier_version_may_have_the_sides_of_pairs_the_other_way(tmp_path, prefs):
    """Sides were chosen pair by pair once; scores are judged beside such a run, and not beside other labels."""
    run = tmp_path / "run"
    keys = write_sweep(run, prefs)
    loaded = load_preferences(prefs)
    sides = [loaded.items.iloc[loaded.pairs[item]].reset_index(drop=True) for item in ("item_a", "item_b")]
    turned = {}
    for pair, a, b in zip(loaded.pairs["pair_id"], *(side.itertuples() for side in sides), strict=True):
        first, second = sorted([a.image, b.image])
        bit = hashlib.sha256(f"{a.prompt}\0{first}\0{second}".encode()).digest()[0] & 1
        turned[pair] = a.image != (first if bit else second)
    assert 20 < sum(turned.values()) < len(turned) - 20
    plain = whole(run_scores(tmp_path, prefs, scores_of())[0].rows)
    for key in keys:
        kept = results.load_margins(run, [key]).drop(columns="record_id")
        way = kept["pair_id"].map(turned)
        kept["label"] = kept["label"].where(~way, 1 - kept["label"])
        rows = results.load_results(run).query("record_id == @key")
        filled_in = ["family_tested", "sigma_ratio", "pooling_layers", "imported"]
        results.write_part(run, key, rows.drop(columns=filled_in), kept)
    row = whole(run_scores(tmp_path, prefs, scores_of())[0].rows)
    assert row["accuracy"] == plain["accuracy"]
    lines = [json.loads(line) for line in prefs.read_text().splitlines()]
    lines[-2]["label"] = 1 - lines[-2]["label"]
    prefs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match="labels 1 pairs otherwise"):
        run_scores(tmp_path, prefs, scores_of())


def test_an_agreement_is_a_line_without_pairs(tmp_path, prefs):
    config = {"prefs": prefs, "out": tmp_path / "run", "agreement": 0.651, "name": "one annotator"}
    made = score_table(ScoreTableConfig.checked(config, source="test"))
    row = whole(results.load_results(tmp_path / "run"))
    assert (row["accuracy"], row["n_pairs"], row["head"]) == (0.651, 0, "agreement")
    assert np.isnan(row["low"])
    assert "not measured here, and no ceiling" in dict(made.lines())["one annotator, test"]
    for change, message in [
        ({"name": None}, "needs --name"),
        ({"agreement": None}, "neither SCORES nor --agreement is given"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ScoreTableConfig.checked(config | change, source="test")


def test_the_command(tmp_path, prefs):
    scores_of().to_csv(tmp_path / "clip.csv", index=False)
    options = ["--prefs", str(prefs), "--out", str(tmp_path / "run"), "--protocol", "hpsv2-inversion"]
    told = CliRunner().invoke(app, ["score-table", str(tmp_path / "clip.csv"), *options])
    assert told.exit_code == 0, told.output
    assert "clip, test" in told.output
    assert "by hpsv2-inversion on judged" in told.output
    assert "120 pairs scored, 0 left out; true ties 20, predicted ties 0" in told.output
    assert "random 58.3 %" in told.output
    wrong = CliRunner().invoke(app, ["score-table", str(tmp_path / "clip.csv"), *options[:-1], "best"])
    assert isinstance(wrong.exception, ConfigError)


def test_votes_say_how_well_votes_can_be_predicted():
    """A planted share of votes: the limits hold the truth, where the plug-in lies above it."""
    rng = np.random.default_rng(0)
    p = rng.beta(2, 2, size=20_000)
    best = np.maximum(p, 1 - p).mean()
    for votes in (2, 5, 25):
        share = rng.binomial(votes, p) / votes
        found = vote_ceiling(share, np.full(len(p), votes))
        assert found.agreement == pytest.approx(np.mean(p**2 + (1 - p) ** 2), abs=0.01)
        assert found.agreement < best < found.ceiling
        assert found.plug_in > best
    alone = np.ones(3, dtype=int)
    with pytest.raises(ValueError, match="none of the 3 pairs has two votes"):
        vote_ceiling(np.ones(3), alone)


def test_votes_are_told_with_the_result(tmp_path):
    prefs = write_prefs(tmp_path / "votes" / "judged.jsonl", votes=True)
    made, _ = run_scores(tmp_path, prefs, scores_of())
    assert made.ceiling is not None
    assert made.ceiling.votes == 10
    assert "two annotators agree in about" in dict(made.lines())["single votes"]
    assert replace(made, ceiling=None, unknown=3).unknown == 3


def test_a_report_shows_other_scorers_beside_the_heads(tmp_path, prefs):
    write_sweep(tmp_path / "run", prefs)
    plain = build_report(tmp_path / "run", tmp_path / "plain.html").read_text()
    assert "Other scorers" not in plain
    made, run = run_scores(tmp_path, prefs, scores_of(), name="clip.csv")
    agreed = {"prefs": prefs, "out": run, "agreement": 0.651, "name": "one annotator"}
    score_table(ScoreTableConfig.checked(agreed, source="test"))
    page = build_report(run, tmp_path / "report.html").read_text()
    table = page.partition("Other scorers on the same pairs")[2].partition("</table>")[0]
    assert f"<td>clip</td><td>{100 * whole(made.rows)['accuracy']:.1f}</td>" in table
    assert "<td>65.1</td>" in table
    headline = page.partition('class="headline"')[2].partition("</table>")[0]
    assert "clip" not in headline
    assert "the floor is 50.0 %" in page


def test_scores_judged_by_another_protocol_than_the_heads_stay_in_the_report_and_say_so(tmp_path, prefs):
    run_scores(tmp_path, prefs, scores_of(), name="clip.csv", protocol="hpsv2-inversion")
    write_sweep(tmp_path / "run", prefs)
    page = build_report(tmp_path / "run", tmp_path / "report.html").read_text()
    table = page.partition("Other scorers on the same pairs")[2].partition("</table>")[0]
    assert "by hpsv2-inversion, unlike the heads" in table
    assert table.count("<td>clip") == 1


def test_a_run_of_scores_alone_has_no_report(tmp_path, prefs):
    _, run = run_scores(tmp_path, prefs, scores_of())
    with pytest.raises(ResultsError, match="holds no head on features"):
        build_report(run, tmp_path / "report.html")


@pytest.mark.parametrize(("protocol", "estimate"), [("strict", 0.5), ("hpsv2-imagereward", 2 / 3)])
def test_differences_in_reports_weigh_prompts_as_the_protocol_does(tmp_path, prefs, protocol, estimate):
    """Head a is right everywhere, head b in the third of prompts that have two pairs: as many pairs as all others."""
    run = tmp_path / "run"
    first, second = write_sweep(run, prefs)[:2]
    frame = results.load_results(run)
    many = np.repeat([0, 0, 1], 30)
    prompts = np.repeat(np.arange(90), np.array([1, 1, 2])[many + many])
    for key, right in ((first, np.ones(len(prompts))), (second, many[prompts].astype(float))):
        margins = pd.DataFrame({"pair_id": [f"p{i}" for i in range(len(prompts))], "prompt_id": prompts.astype(str)})
        margins = margins.assign(
            group=margins["prompt_id"],
            split="test",
            source="",
            row_a=0,
            row_b=1,
            label=1.0,
            margin=1.0,
            dataset=prefs.stem,
        )
        filled_in = ["family_tested", "sigma_ratio", "pooling_layers", "imported"]
        rows = frame[frame["record_id"] == key].drop(columns=filled_in)
        results.write_part(run, key, rows, margins.assign(correct=right))
    sides = [Side(name, (key,), (name,)) for name, key in (("a", first), ("b", second))]
    effect = Verdicts(run, protocol).compare("a - b", sides[:1], sides[1:])
    assert effect.estimate == pytest.approx(estimate)
    assert effect.low < estimate < effect.high
