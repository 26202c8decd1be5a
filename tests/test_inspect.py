"""What `probekit inspect` says of a store, of a run, and of a run that was stopped; reports say the last as well."""

import json

import pytest
from planted_store import planted_store

import probekit
from probekit.config import SweepConfig
from probekit.errors import ResultsError
from probekit.report import build_report
from probekit.report.summary import run_lines, store_lines
from probekit.results import describe_run, load_config

CONFIG = {"heads": [{"kind": "linear", "layer_sets": ["singles"], "strengths": [0.1, 1], "folds": 3}], "resamples": 100}


def swept(store, out, **further):
    return probekit.run_sweep(SweepConfig.checked(CONFIG | further, source="test"), stores=[store], out=out)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("inspect") / "store", signal={2: 1.5}, seed=0, pairs=160)


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    return swept(store, tmp_path_factory.mktemp("inspect") / "run")


def test_a_store_is_told_in_words(store):
    facts = probekit.FeatureStore(store).summary()
    said = dict(store_lines(json.loads(json.dumps(facts))))
    splits = facts["judgements"]["planted"]
    assert said["features"] == "planted-0: 3 blocks, width 8, 1.0 k parameters"
    assert said["rows"] == "320 of 160 prompts"
    assert said["sigma 0.005, draw 0"] == "320 rows"
    assert said["pairs of planted"] == ", ".join(f"{count} {split}" for split, count in splits.items())
    assert not any(mark in text for text in said.values() for mark in "{}")


def test_a_run_is_told_in_words_with_its_chosen_layer(run):
    (row,) = probekit.load_results(run).query("chosen and split == 'test' and slice_by == 'all'").to_dict("records")
    said = dict(run_lines(json.loads(json.dumps(describe_run(run)))))
    assert said["fits"] == "4: 4 linear"
    share = f"{100 * row['accuracy']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    assert said["layer chosen, linear"] == f"planted-0 (trained): layer {row['layer_set']}, {share} on test pairs"
    assert not any(mark in text for text in said.values() for mark in "{}")


def test_a_stopped_run_says_how_far_it_is_until_the_same_sweep_finishes_it(store, tmp_path):
    out = swept(store, tmp_path / "run")
    planned = len(load_config(out)["plan"])
    finished = {path: path.read_bytes() for path in out.rglob("*.parquet")}
    whole = (
        rf"run: not finished: {planned - 1} of {planned} fits are done; the same `probekit sweep` command finishes it$"
    )
    next((out / "parts").glob("*.parquet")).unlink()
    (out / "results.parquet").unlink()
    for read in (describe_run, probekit.load_results, lambda run: build_report(run, tmp_path / "page.html")):
        with pytest.raises(ResultsError, match=whole):
            read(out)
    swept(store, out)
    assert {path: path.read_bytes() for path in out.rglob("*.parquet")} == finished
    build_report(out, tmp_path / "page.html")


def test_a_stopped_sweep_of_more_fits_is_not_reported_as_the_earlier_one(store, tmp_path):
    out = swept(store, tmp_path / "run")
    earlier = (out / "results.parquet").read_bytes()
    swept(store, out, resamples=120)
    (out / "results.parquet").write_bytes(earlier)  # all its parts are there, the table is not joined yet
    with pytest.raises(ResultsError, match=r"not finished: (\d+) of \1 fits are done"):
        build_report(out, tmp_path / "page.html")
    assert len(probekit.load_results(out)) > 0
