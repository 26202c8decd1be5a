"""Bad input gives one clear line and an exit code, never a traceback, and nothing is lost."""

import io
import json
import logging
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
from PIL import Image
from planted_store import planted_store

from probekit.cli import main
from probekit.config import PreferenceOptions
from probekit.playground import base_folder, models
from probekit.results import load_results
from probekit.sweep import run_sweep


def probekit(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command's entry point in this process: importing diffusers anew for each case would take minutes."""
    command = ["probekit", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    handlers, logger = logging.root.handlers[:], logging.getLogger("probekit")
    level, hook = logger.level, sys.unraisablehook
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with mock.patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(err):
            main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        logging.root.handlers[:] = handlers
        logger.setLevel(level)
        sys.unraisablehook = hook
        for number, handler in signals.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def tree(folder: Path) -> dict[str, bytes]:
    """Every file and its bytes, but for the locks that a writer leaves empty."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock-"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def store(dump, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "store"
    done = probekit(*dump, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def refused(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in errors[0]
    assert done.returncode == code


@pytest.mark.parametrize(
    "command",
    [
        ["verify", "none"],
        ["inspect", "none"],
        ["report", "none", "--out", "page.html"],
        ["export", "none", "--to", "parquet", "--out", "out"],
        ["sweep", "sweeps/depth.yaml", "--store", "none", "--out", "out"],
        ["sweep", "sweeps/depth.yaml", "--store", "sweeps", "--prefs", "none", "--out", "out"],
        ["sweep", "none", "--store", "sweeps", "--out", "out"],
        ["dump", "--backbone", "b", "--prefs", "none", "--out", "out"],
        ["dump", "--config", "none"],
        ["import-features", "none", "--prefs", "sweeps/depth.yaml", "--out", "out", "--definition", "x"],
        ["import-features", "sweeps/depth.yaml", "--prefs", "none", "--out", "out", "--definition", "x"],
    ],
    ids=" ".join,
)
def test_a_path_that_is_not_there_is_a_usage_error(command):
    refused(probekit(*command), 2, "none: no such file or folder")


def test_a_folder_without_a_store_is_a_usage_error_and_a_store_without_its_head_a_failure(store, tmp_path):
    sweep = ["sweep", "sweeps/depth.yaml", "--out", tmp_path / "run", "--store"]
    export = ["export", "--to", "parquet", "--out", tmp_path / "out"]
    for command in (["verify"], ["inspect"], export, sweep):
        refused(probekit(*command, tmp_path), 2, str(tmp_path), "no store.json")
    shutil.copytree(store, tmp_path / "headless")
    (tmp_path / "headless" / "store.json").unlink()
    again = "holds shards and no store.json; run the same probekit command again that made the store: it writes it"
    for command in (["inspect"], export, sweep):
        refused(probekit(*command, tmp_path / "headless"), 1, again)
    assert probekit("verify", tmp_path / "headless").returncode == 1


def test_the_same_dump_again_changes_nothing(dump, store):
    before = tree(store)
    assert probekit(*dump, "--out", store).returncode == 0
    assert tree(store) == before


def test_a_further_sigma_and_more_rows_are_added(pairs, dump, store, tmp_path):
    grown = tmp_path / "store"
    shutil.copytree(store, grown)
    shards = tree(grown / "shards")
    assert probekit(*dump, "--out", grown, "--sigma", "0.005", "--sigma", "0.1").returncode == 0
    assert {name: data for name, data in tree(grown / "shards").items() if name in shards} == shards
    facts = json.loads(probekit("inspect", grown, "--json").stdout)
    assert [at["sigma"] for at in facts["coordinates"]] == ["0.005", "0.1"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--seed", 1], ["noise.seed", "0", "1"]),
        (["--noise", "independent"], ["noise", "shared", "independent"]),
        (["--pooling", "max"], ["poolings.max", "absent", "maximum"]),
        (["--layers", "0,1"], ["layers"]),
        (["--max-tokens", 16], ["max_tokens", "0", "16"]),
    ],
)
def test_a_store_made_with_other_settings_is_not_written_over(dump, store, options, parts):
    before = tree(store)
    refused(probekit(*dump, "--out", store, *options), 1, "store", *parts)
    assert tree(store) == before


def test_missing_images_are_listed_before_a_model_is_loaded(pairs, dump, tmp_path):
    shutil.copytree(pairs.parent, tmp_path / "pairs")
    images = sorted((tmp_path / "pairs").rglob("*.png"))
    for image in images[:2]:
        image.unlink()
    done = probekit(*dump[:-1], tmp_path / "pairs" / pairs.name, "--backbone", "nowhere", "--out", tmp_path / "store")
    refused(done, 1, images[0].name, images[1].name)
    assert not (tmp_path / "store").exists()


def test_a_broken_picture_is_named_and_nothing_of_it_is_kept(pairs, dump, tmp_path):
    shutil.copytree(pairs.parent, tmp_path / "pairs")
    image = sorted((tmp_path / "pairs").rglob("*.png"))[3]
    image.write_bytes(image.read_bytes()[:60])
    refused(probekit(*dump[:-1], tmp_path / "pairs" / pairs.name, "--out", tmp_path / "store"), 1, image.name)
    assert not list((tmp_path / "store").rglob("*.h5"))


def test_a_missing_column_is_named(dump, tmp_path):
    path = tmp_path / "prefs.jsonl"
    path.write_text('{"prompt": "a", "image_a": "a.png", "label": 1}\n')
    refused(probekit(*dump[:-1], path, "--out", tmp_path / "store"), 1, "prefs.jsonl", "image_b")


def test_a_backbone_without_a_transformer_is_named(dump, pairs, tmp_path):
    done = probekit("dump", "--backbone", base_folder(), "--prefs", pairs, "--out", tmp_path / "store")
    refused(done, 1, "base", "transformer")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--noise", "some"], ["noise", "'some'", "shared"]),
        (["--sigma", "2"], ["sigma", "2"]),
        (["--sigma", "x"], ["sigma", "x"]),
        (["--layers", "1,x"], ["layers", "x"]),
        (["--layers", "99"], ["99", "allowed"]),
        (["--pooling", "median"], ["median", "mean"]),
        (["--dtype", "int8"], ["dtype", "int8", "float32"]),
        (["--random-weights", "zeros:1"], ["zeros", "init", "shuffled"]),
        (["--batch-size", "0"], ["batch_size", "0"]),
    ],
)
def test_a_wrong_option_is_a_usage_error(dump, options, parts, tmp_path):
    refused(probekit(*dump, "--out", tmp_path / "store", *options), 2, *parts)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        (["sweep", "{file}", "--store", "{store}", "--out", "{out}", "--jobs", "0"], ["jobs is 0; allowed: 1 or more"]),
        (["sweep", "{file}", "--store", "{store}", "--out", "{out}", "--jobs", "x"], ["--jobs"]),
        (["sweep", "{file}", "--store", "{store}", "--out"], ["--out"]),
        (["sweep", "--out", "{out}"], ["config"]),
        (["sweep", "{file}", "--out", "{out}", "--job", "3"], ["--job", "--jobs"]),
        (["sweeep"], ["sweeep"]),
        (["playground", "pairs", "{out}", "--train", "0"], ["--train"]),
    ],
)
def test_what_the_command_line_does_not_know_is_one_line(command, parts, tmp_path):
    store, file = planted_store(tmp_path / "store", signal={}, seed=0, pairs=40), tmp_path / "sweep.yaml"
    file.write_text("heads: [{kind: linear, layer_sets: [all]}]\n")
    done = probekit(*(word.format(file=file, store=store, out=tmp_path / "out") for word in command))
    refused(done, 2, *parts)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_progress_that_goes_to_a_file_is_a_line_now_and_then(tmp_path, monkeypatch):
    store, file = planted_store(tmp_path / "store", signal={}, seed=0, pairs=60), tmp_path / "sweep.yaml"
    file.write_text("heads: [{kind: linear, layer_sets: [singles], strengths: [1]}]\nresamples: 100\n")
    quick = probekit("sweep", file, "--store", store, "--out", tmp_path / "quick")
    assert quick.returncode == 0
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" not in quick.stderr
    assert "/4 fits" not in quick.stderr
    monkeypatch.setattr("probekit._terminal.SECONDS_A_LINE", 0)
    slow = probekit("sweep", file, "--store", store, "--out", tmp_path / "slow")
    said = [line for line in slow.stderr.splitlines() if "/4 fits store linear" in line]
    assert [line.partition(":")[0] for line in said] == [f"{n + 1}/4 fits store linear {n} at 0.005" for n in range(4)]


def test_a_preference_file_away_from_its_images_is_one_line(pairs, store, tmp_path):
    moved, file = tmp_path / "moved.jsonl", tmp_path / "sweep.yaml"
    shutil.copy(pairs, moved)
    file.write_text("heads: [{kind: linear, layer_sets: [all]}]\n")
    command = ["sweep", file, "--store", store, "--prefs", moved, "--out", tmp_path / "run"]
    refused(
        probekit(*command), 2, "moved.jsonl: none of its", "image files is there, such as", str(tmp_path / "images")
    )
    strangers = planted_store(tmp_path / "other", signal={}, seed=0, pairs=40)
    command[command.index(store)], command[command.index(moved)] = strangers, pairs
    refused(probekit(*command), 1, "none of the", "pairs of data set 'preferences' has features here")


def test_options_come_from_a_file_and_from_the_command_line(dump, pairs, tmp_path):
    path = tmp_path / "dump.yaml"
    path.write_text(
        f"backbone: {base_folder()}\ntransformer: {models()[0].folder}\nmax_tokens: 0\nprefs: {pairs}\nsigma: [0]\n"
    )
    done = probekit("dump", "--config", path, "--out", tmp_path / "store", "--layers", "1,3", "--limit", 20)
    assert done.returncode == 0, done.stderr
    facts = json.loads(probekit("inspect", tmp_path / "store", "--json").stdout)
    assert [at["sigma"] for at in facts["coordinates"]] == ["0"]
    path.write_text("backbone: x\nprefs: p\nsigmas: [0]\n")
    refused(probekit("dump", "--config", path, "--out", tmp_path / "other"), 2, "dump.yaml", "'sigmas'", "sigma")


def test_an_unknown_key_in_a_sweep_is_named(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("heads: [{kind: linear, layer_sets: [all], strenght: [1]}]\n")
    store = planted_store(tmp_path / "store", signal={}, seed=0)
    refused(
        probekit("sweep", path, "--store", store, "--out", tmp_path / "run"), 2, "sweep.yaml", "'strenght'", "strengths"
    )
    assert not (tmp_path / "run").exists()


def test_inspect_and_report_name_what_is_no_run(tmp_path):
    refused(probekit("inspect", tmp_path), 2, str(tmp_path), "store.json")
    refused(probekit("report", tmp_path, "--out", tmp_path / "page.html"), 1, str(tmp_path))
    refused(probekit("sweep", "x.yaml", "--store", tmp_path, "--out", tmp_path / "run"), 2, "x.yaml")


def test_inspect_says_what_a_store_and_a_run_hold(store, tmp_path):
    shown = probekit("inspect", store).stdout
    assert "0.005" in shown
    planted = planted_store(tmp_path / "store", signal={2: 1.0}, seed=0)
    path = tmp_path / "sweep.yaml"
    path.write_text("heads: [{kind: linear, layer_sets: [singles]}]\nresamples: 200\n")
    assert probekit("sweep", path, "--store", planted, "--out", tmp_path / "run").returncode == 0
    assert json.loads(probekit("inspect", tmp_path / "run", "--json").stdout)["records"] == 4


def test_from_the_shell_an_error_is_one_line_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "probekit", "inspect", tmp_path], capture_output=True, text=True, check=False
    )
    refused(done, 2, str(tmp_path))
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_run_is_only_written_where_a_run_is(store, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("heads: [{kind: linear, layer_sets: [singles]}]\nresamples: 200\n")
    before = tree(store)
    refused(probekit("sweep", path, "--store", store, "--out", store), 2, str(store), "is no run")
    assert tree(store) == before
    (tmp_path / "file").write_text("x")
    refused(probekit("sweep", path, "--store", store, "--out", tmp_path / "file"), 2, "file", "is no run")
    run = tmp_path / "run"
    planted = planted_store(tmp_path / "store", signal={2: 1.0}, seed=0)
    assert probekit("sweep", path, "--store", planted, "--out", run).returncode == 0
    refused(probekit("report", run, "--out", tmp_path / "file" / "x.html"), 1, "file")
    refused(probekit("playground", "pairs", tmp_path / "file", "--train", 20, "--test", 10), 1, "file")


def test_a_cache_that_is_a_file_and_a_column_that_stands_twice_are_named(dump, pairs, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(probekit(*dump, "--out", tmp_path / "store", "--cache", tmp_path / "file"), 2, "file", "folder")
    path = tmp_path / "prefs.csv"
    path.write_text("prompt,image_a,image_b,label,label\nx,a.png,b.png,1,0\n")
    refused(probekit(*dump[:-1], path, "--out", tmp_path / "store"), 1, "prefs.csv", "'label'", "twice")
    assert not (tmp_path / "store").exists()


def test_prompts_that_are_cut_are_counted(dump, pairs, tmp_path, caplog):
    image = sorted(pairs.parent.rglob("*.png"))
    for side, source in zip("ab", image, strict=False):
        shutil.copy(source, tmp_path / f"{side}.png")
    long = "a small red circle " * 40
    lines = [{"prompt": text, "image_a": "a.png", "image_b": "b.png", "label": 1} for text in (long, "a red circle")]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = probekit(*dump[:-1], tmp_path / "prefs.jsonl", "--out", tmp_path / "store")
    assert done.returncode == 0, done.stderr
    assert "1 of 2 prompts are longer" in caplog.text
    assert len(done.stderr) < 4000


def test_another_preference_file_binds_to_the_rows_of_a_store(pairs, store, tmp_path):
    """Other labels, a pair whose pictures the store lacks, and a layer set that does not exist at first."""
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    shutil.copytree(pairs.parent, tmp_path / "pairs")
    known = sorted((tmp_path / "pairs" / "images" / "test").glob("*.png"))
    new = tmp_path / "pairs" / "images" / "new.png"
    Image.new("RGB", (32, 32), "red").save(new)
    turned = [line | {"label": 1 - line["label"]} for line in lines]
    extra = {"prompt": "unheard of", "image_a": "images/new.png", "image_b": f"images/test/{known[0].name}", "label": 1}
    turned.append(lines[-1] | extra | {"group": "new", "split": "test", "source": "new"})
    other = tmp_path / "pairs" / "turned.jsonl"
    other.write_text("".join(json.dumps(line) + "\n" for line in turned))
    path = tmp_path / "sweep.yaml"
    wrong = "heads: [{kind: linear, layer_sets: [[9]]}]\nresamples: 200\n"
    path.write_text(wrong)
    before = tree(store)
    command = ["sweep", path, "--store", store, "--prefs", other, "--out", tmp_path / "run"]
    refused(probekit(*command), 2, str(store), "layer 9")
    path.write_text(wrong.replace("[[9]]", "[singles]"))
    done = probekit(*command)
    assert done.returncode == 0, done.stderr
    assert tree(store) == before
    frame = load_results(tmp_path / "run")
    assert set(frame["dataset"]) == {"turned"}
    test = frame.query("split == 'test' and layer == 3").set_index("source")
    assert test.loc["all", "left_out"] == test.loc["new", "left_out"] == 1
    assert test.loc["new", "n_pairs"] == 0


def renamed(lines, path):
    """Write the pairs of a preference file with a caption, two pictures and a confidence that grows with the line."""
    ours = {"prompt": "caption", "image_a": "left", "image_b": "right", "label": "better"}
    texts = (
        json.dumps({ours.get(key, key): value for key, value in line.items()} | {"confidence": i / len(lines)})
        for i, line in enumerate(lines)
    )
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


COLUMNS = "prompt=caption,image_a=left,image_b=right,label=better"


def test_lint_reads_a_file_as_it_is_told(pairs, tmp_path):
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    path = renamed(lines, tmp_path / "renamed.jsonl")
    refused(probekit("lint", path), 1, "renamed.jsonl: no column 'prompt' (found: caption, left, right, better")
    told = json.loads(probekit("lint", path, "--columns", COLUMNS, "--json").stdout)
    usual = json.loads(probekit("lint", pairs, "--format", "general", "--json").stdout)
    assert (told["pairs"], told["true_ties"]) == (usual["pairs"], usual["true_ties"])
    sure = probekit("lint", path, "--columns", COLUMNS, "--min-confidence", "0.5", "--json")
    assert json.loads(sure.stdout)["left_out"]["confidence_below_0.5"] == -(-len(lines) // 2)
    refused(probekit("lint", pairs, "--format", "hpdv3"), 1, "is not hpdv3", "needed: prompt, path1, path2")
    refused(probekit("lint", pairs, "--format", "hpdv9"), 2, "format is 'hpdv9'; allowed: auto, general")
    refused(probekit("lint", pairs, "--columns", "text=caption"), 2, "columns has 'text=caption'; allowed: mj-bench")
    refused(probekit("lint", pairs, "--min-confidence", "95"), 2, "min_confidence", "95", "1")


def test_a_dump_reads_a_file_as_it_is_told(pairs, dump, tmp_path):
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    shutil.copytree(pairs.parent, tmp_path / "pairs")
    path = renamed(lines, tmp_path / "pairs" / "renamed.jsonl")
    command = [*dump[:-1], path, "--out", tmp_path / "store", "--layers", "1"]
    refused(probekit(*command), 1, "no column 'prompt'")
    refused(probekit(*command, "--format", "hpdv3"), 1, "is not hpdv3")
    done = probekit(*command, "--columns", COLUMNS, "--min-confidence", "0.9")
    assert done.returncode == 0, done.stderr
    (kept,) = (pd.read_parquet(path) for path in (tmp_path / "store" / "judgements").glob("*.parquet"))
    assert len(kept) <= len(lines) // 10
    assert kept["left_out_of_set"].str.contains("confidence below 0.9").all()


def test_a_sweep_and_scores_read_a_file_as_they_are_told(pairs, store, tmp_path):
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    shutil.copytree(pairs.parent, tmp_path / "pairs")
    path = renamed(lines[::2] + lines[1::2], tmp_path / "pairs" / "renamed.jsonl")
    config = tmp_path / "sweep.yaml"
    config.write_text("heads: [{kind: linear, layer_sets: [[3]], strengths: [0.1]}]\nresamples: 200\n")
    command = ["sweep", config, "--store", store, "--out", tmp_path / "run"]
    refused(probekit(*command, "--columns", COLUMNS), 2, "--columns: says how a preference file is read, and none is")
    refused(probekit(*command, "--prefs", path), 1, "renamed.jsonl: no column 'prompt'")
    done = probekit(*command, "--prefs", path, "--columns", COLUMNS, "--min-confidence", "0.25")
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "knowing nothing, renamed random 50.0 %, constant 0.0 %, first listed" in told
    assert "; by strict on" in told
    config_told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert f"{-(-len(lines) // 4)} confidence below 0.25" in config_told["left_out"]["renamed"]
    reading = PreferenceOptions(columns=COLUMNS, min_confidence=0.25)
    again = run_sweep(config, stores=[store], out=tmp_path / "again", prefs=path, reading=reading)
    judged = [load_results(run)[["record_id", "accuracy", "n_pairs"]] for run in (tmp_path / "run", again)]
    pd.testing.assert_frame_equal(*judged)
    names = sorted({line[side] for line in lines for side in ("image_a", "image_b")})
    pd.DataFrame({"image": names, "score": range(len(names))}).to_csv(tmp_path / "scores.csv", index=False)
    scores = ["score-table", tmp_path / "scores.csv", "--prefs", path, "--out", tmp_path / "run"]
    refused(probekit(*scores), 1, "renamed.jsonl: no column 'prompt'")
    refused(probekit(*scores, "--format", "hpdv3"), 1, "is not hpdv3")
    done = probekit(*scores, "--columns", COLUMNS, "--min-confidence", "0.25", "--format", "general")
    assert done.returncode == 0, done.stderr
    rows = load_results(tmp_path / "run").query("split == 'test' and slice_by == 'all'")
    assert rows.query("head_kind == 'external'")["n_pairs"].item() == rows.query("layer == 3")["n_pairs"].item()


DROPPED = """
import signal, time
from probekit import cli

class Closed:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)

def work(**_):
    Closed()
    time.sleep(100)

cli.app = work
cli.main()
"""


def test_a_signal_that_python_drops_in_a_destructor_still_stops():
    done = subprocess.run([sys.executable, "-c", DROPPED], capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.splitlines()[-1].endswith("the same command resumes")
    assert "Traceback" not in done.stderr
