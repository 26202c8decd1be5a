import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_run import Net, write_run

from probekit import results
from probekit.errors import ResultsError

SMALL = (Net("2x8", 2, 8),)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    run = tmp_path_factory.mktemp("results") / "run"
    keys = write_run(run, SMALL, kinds=("colour", "shape"), n_test=120, n_validation=60)
    return run, keys


@pytest.fixture
def run(written, tmp_path):
    """A copy that a test may damage."""
    source, keys = written
    for path in source.rglob("*.*"):
        target = tmp_path / "run" / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path / "run", keys


def rows_of(run, key):
    frame = results.load_results(run)
    filled_in = ["chosen", "family_tested", "sigma_ratio", "pooling_layers", "imported"]
    return frame[frame["record_id"] == key].drop(columns=filled_in)


def margins_of(run, key):
    return results.load_margins(run, [key]).drop(columns="record_id")


def test_round_trip_keeps_values_and_types(written):
    run, keys = written
    frame = results.load_results(run)
    assert list(frame.columns) == list(results.RESULT_COLUMNS)
    for name, dtype in results.RESULT_COLUMNS.items():
        assert frame[name].dtype == pd.Series(dtype=dtype).dtype, name
    joined = frame[frame["combination"] == "concat"]
    assert joined["layer"].isna().all()
    assert joined["relative_depth"].isna().all()
    assert list(frame["record_id"].unique()) == keys  # the order of the plan


def test_equal_rows_give_equal_bytes(run, tmp_path):
    folder, keys = run
    rows, margins = rows_of(folder, keys[0]), margins_of(folder, keys[0])
    results.write_part(tmp_path / "again", keys[0], rows.sample(frac=1, axis=1, random_state=0), margins)
    for kind in ("parts", "margins"):
        again = tmp_path / "again" / kind / f"{keys[0]}.parquet"
        assert again.read_bytes() == (folder / kind / f"{keys[0]}.parquet").read_bytes()


def test_chosen_is_the_best_single_layer_on_validation(written):
    frame = results.load_results(written[0])
    everything = frame[(frame["source"] == "all") & (frame["combination"] == "single")]
    validation = everything[everything["split"] == "validation"]
    best = validation.loc[validation["accuracy"].idxmax(), "record_id"]
    assert set(frame[frame["chosen"]]["record_id"]) == {best}
    assert frame[frame["record_id"] == best]["chosen"].all()  # test rows and kinds of that record too


def test_equal_validation_accuracies_choose_the_earlier_layer(written):
    frame = results.load_results(written[0])
    frame.loc[frame["split"] == "validation", "accuracy"] = 0.6
    chosen = results.mark_chosen(frame)
    assert set(chosen[chosen["chosen"]]["layer"]) == {0}


def test_without_validation_rows_nothing_is_chosen(tmp_path):
    write_run(tmp_path / "run", SMALL, kinds=(), n_test=60, validation=False)
    assert not results.load_results(tmp_path / "run")["chosen"].any()


def test_margins_reproduce_the_accuracies(written):
    run, keys = written
    frame = results.load_results(run)
    margins = results.load_margins(run)
    assert set(margins["record_id"]) == set(keys)
    decided = margins[(margins["split"] == "test") & (margins["label"] != 0.5)]
    right = (decided["margin"] > 0) == (decided["label"] > 0.5)
    test = frame[(frame["split"] == "test") & (frame["source"] == "all")].set_index("record_id")["accuracy"]
    np.testing.assert_allclose(right.groupby(decided["record_id"]).mean()[keys], test[keys])


def test_done_records_are_those_whose_part_reads(run):
    folder, keys = run
    assert results.done_records(folder) == set(keys)
    (folder / "parts" / f"{keys[1]}.parquet").unlink()
    assert results.done_records(folder) == set(keys) - {keys[1]}
    assert results.done_records(folder / "nowhere") == set()


def test_margins_without_a_part_do_not_count_as_done(run):
    folder, keys = run
    (folder / "parts" / f"{keys[0]}.parquet").unlink()
    assert (folder / "margins" / f"{keys[0]}.parquet").exists()
    assert keys[0] not in results.done_records(folder)


def test_parts_of_other_plans_stay_and_are_counted(run):
    folder, keys = run
    assert results.rebuild(folder, keys[:2]) == len(keys) - 2
    assert list(results.load_results(folder)["record_id"].unique()) == keys[:2]
    assert results.done_records(folder) == set(keys)
    assert results.rebuild(folder, keys) == 0


def test_rebuild_gives_the_same_bytes_after_a_resume(run):
    folder, keys = run
    before = (folder / "results.parquet").read_bytes()
    rows, margins = rows_of(folder, keys[2]), margins_of(folder, keys[2])
    (folder / "parts" / f"{keys[2]}.parquet").unlink()
    results.write_part(folder, keys[2], rows, margins)
    results.rebuild(folder, keys)
    assert (folder / "results.parquet").read_bytes() == before


def test_a_damaged_part_is_named_with_the_mend(run):
    folder, keys = run
    path = folder / "parts" / f"{keys[0]}.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ResultsError, match=rf"{keys[0]}\.parquet: damaged .*delete it and run the same sweep again"):
        results.done_records(folder)
    with pytest.raises(ResultsError, match="damaged"):
        results.rebuild(folder, keys)


def test_a_missing_part_is_named(run):
    folder, keys = run
    with pytest.raises(ResultsError, match=r"absent\.parquet: missing; run the same sweep again"):
        results.rebuild(folder, [*keys, "absent"])


def test_a_folder_without_results_says_so(tmp_path):
    with pytest.raises(ResultsError, match="no results table"):
        results.load_results(tmp_path)


def test_another_format_is_refused(run, monkeypatch):
    folder, _ = run
    monkeypatch.setattr("probekit.results.tables.RESULTS_VERSION", "2.0")
    with pytest.raises(ResultsError, match=r"written in results format 1\.5; this version reads 2\.0"):
        results.load_results(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "dev"}, "column split holds 'dev'; allowed: train, validation, test"),
        ({"head_kind": "tree"}, "column head_kind holds 'tree'"),
        ({"accuracy": 61.9}, r"column accuracy holds 61\.9; allowed: 0 to 1"),
        ({"source": "all"}, "two rows for data set 'demo', split 'test', 'source', source 'all'"),
        ({"backbone": None}, "column backbone has missing values"),
        ({"width": "wide"}, "type of the schema"),
        ({"record_id": "other"}, "column record_id holds"),
        ({"colour": 1}, r"unknown columns \['colour'\]"),
    ],
)
def test_rows_outside_the_schema_are_refused(run, change, message):
    folder, keys = run
    rows, margins = rows_of(folder, keys[0]).assign(**change), margins_of(folder, keys[0])
    with pytest.raises(ResultsError, match=message):
        results.write_part(folder / "new", keys[0], rows, margins)
    assert not (folder / "new" / "parts").exists()


def test_a_missing_column_is_named(run):
    folder, keys = run
    rows, margins = rows_of(folder, keys[0]), margins_of(folder, keys[0])
    with pytest.raises(ResultsError, match=r"missing columns \['sigma'\]"):
        results.write_part(folder / "new", keys[0], rows.drop(columns="sigma"), margins)
    with pytest.raises(ResultsError, match=r"missing columns \['margin'\]"):
        results.write_part(folder / "new", keys[0], rows, margins.drop(columns="margin"))


@pytest.mark.parametrize("name", ["../escape", "a/b", "", "x" * 200])
def test_record_ids_are_plain_names(run, name):
    folder, keys = run
    with pytest.raises(ResultsError, match="record_id is"):
        results.write_part(folder, name, rows_of(folder, keys[0]), margins_of(folder, keys[0]))


def test_config_round_trip_and_damage(tmp_path):
    assert results.load_config(tmp_path) == {}
    results.write_config(tmp_path, {"sweep": {"heads": ["linear"]}, "name": "größer"})
    assert results.load_config(tmp_path)["name"] == "größer"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ResultsError, match=r"config\.json: not readable as JSON"):
        results.load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ResultsError, match="holds a list"):
        results.load_config(tmp_path)


def test_a_killed_writer_leaves_only_whole_parts(run, tmp_path):
    """Write the same record over and over in a process that is killed at some moment: what is there reads."""
    folder, keys = run
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from probekit import results
frame = results.load_results({str(folder)!r})
rows = frame[frame["record_id"] == {keys[0]!r}]
rows = rows.drop(columns=["chosen", "family_tested", "sigma_ratio", "pooling_layers", "imported"])
margins = results.load_margins({str(folder)!r}, [{keys[0]!r}]).drop(columns="record_id")
print("ready", flush=True)
for i in range(10_000):
    key = f"k{{i}}"
    results.write_part({str(tmp_path / "out")!r}, key, rows.assign(record_id=key), margins)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    while not list(Path(tmp_path / "out").glob("parts/*.parquet")):
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    done = results.done_records(tmp_path / "out")
    assert done
    assert set(results.load_margins(tmp_path / "out", done)["record_id"]) == done
