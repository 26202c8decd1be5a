"""A sweep stays within its memory and reads layers once where they fit; its run is a directory that goes on."""

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import yaml
from planted_store import planted_store

import probekit
from probekit.cli import app
from probekit.config import SweepConfig
from probekit.errors import ConfigError, FingerprintError, HeadError, ProbekitError
from probekit.results import load_config, load_margins
from probekit.sweep import layer_sets, memory
from probekit.sweep.features import KEPT, Features, Place
from probekit.sweep.input_baselines import InputBaseline
from probekit.sweep.material import forget, material, open_cached
from probekit.sweep.memory import Budget, bytes_of, groups_of
from probekit.sweep.plan import plan_records, select_stores

LINEAR = {"kind": "linear", "layer_sets": ["singles", "pairs"], "strengths": [0.001, 0.1, 10.0]}
MLP = {"kind": "mlp", "layer_sets": [[0, 1]], "hidden": [4], "max_epochs": 1}
MIB = 2**20


def config(*heads: dict, **settings: object) -> SweepConfig:
    return SweepConfig.checked({"heads": list(heads or [LINEAR]), "resamples": 100} | settings, source="test")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("planted") / "store", signal={2: 1.5}, seed=0, pairs=200)


SETS = partial(layer_sets.layer_sets, run=Path("none"), allowed=2**30)


def selected(path):
    forget()
    (selection,) = select_stores([open_cached(path)], judged=None, ties="soft")
    return selection


@pytest.mark.parametrize(
    ("text", "size"), [("4G", 4 * 2**30), ("512M", 512 * MIB), ("1.5g", 3 * 2**29), ("2GiB", 2**31), ("1000", 1000)]
)
def test_memory_is_bytes_or_a_number_with_a_power_of_1024(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "4X", "0", "4 G B", "1e9"])
def test_other_amounts_of_memory_are_refused_in_one_line(text):
    with pytest.raises(ConfigError, match=r"^memory is .*; allowed: bytes, or a number with K, M, G or T"):
        bytes_of(text)


def test_a_layer_is_read_once_where_it_may_be_kept_and_sides_are_subtracted(planted):
    selection = selected(planted)
    rows = material(selection).rows
    X = {layer: probekit.FeatureStore(planted).read(layer=layer) for layer in range(4)}
    for keep, reads in ((2**20, 4), (0, 12)):
        KEPT.trim(0)
        before = KEPT.reads
        for first, second in ((0, 1), (0, 2), (1, 2), (2, 3), (1, 3), (0, 3)):
            places = tuple(Place(selection, ("0.005",), 0, ("mean",), layer) for layer in (first, second))
            both = Features(places, keep=keep)
            together = np.concatenate([X[first], X[second]], axis=1)
            D = both.differences
            train = rows[: len(D)]
            assert np.array_equal(D, together[train[:, 0]] - together[train[:, 1]])
            coef = np.random.default_rng(first).normal(size=16)
            scores = together.astype(np.float64) @ coef
            assert both.margins(coef) == pytest.approx(scores[rows[:, 0]] - scores[rows[:, 1]], abs=1e-5)
        assert KEPT.reads - before == reads
    KEPT.trim(0)


def test_jobs_are_reduced_until_all_processes_fit_and_this_is_said(planted):
    records = list(plan_records(config(LINEAR, MLP), selected(planted), sets=SETS))
    alone = max(work.needed for _, some in groups_of(records, Budget(2**40, 0), 1) for work in some)
    for total, jobs in ((2**40, 4), (3 * (alone + 100 * MIB) + 16 * MIB + 100 * MIB, 3), (alone + 100 * MIB, 1)):
        budget = Budget(total, 100 * MIB)
        groups = groups_of(records, budget, 4)
        assert max(count for count, _ in groups) <= jobs == groups[0][0]
        for count, some in groups:
            assert budget.taken(count, max(work.needed + work.keep for work in some)) <= total
        said = list(memory.told(groups, budget, 4))
        assert bool(said) == (jobs < 4)
        assert all(f"in {jobs} of 4 processes" in line for line in said)


def test_fits_that_are_too_large_are_streamed_or_refused_before_anything_is_fitted(planted, monkeypatch, tmp_path):
    selection = selected(planted)
    monkeypatch.setattr(memory, "resident", lambda: 900 * MIB)
    with pytest.raises(ConfigError, match="this process takes 944 MB before it fits anything"):
        probekit.run_sweep(config(), stores=[planted], out=tmp_path / "run", memory="905M")
    for name in ("_FIXED", "_BUFFERS"):  # what is the same for every fit would hide these small ones
        monkeypatch.setattr(memory, name, 0)
    (linear, *_), (mlp, *_) = (list(plan_records(config(head), selection, sets=SETS)) for head in (LINEAR, MLP))
    needs = [memory.work_of([linear], Budget(total, 0)) for total in (2**40, 400_000, 140_000)]
    assert [work.streamed for work in needs] == [False, False, True]
    assert [bool(work.head_memory) for work in needs] == [True, False, True]  # the second is matrix-free
    assert needs[0].needed > needs[1].needed > needs[2].needed == 140_000 > needs[2].head_memory
    with pytest.raises(
        ConfigError, match=r"head 'mlp' \(concat\) on layers 0\+1 needs about .* kB; allowed: 140 kB, the memory"
    ):
        memory.work_of([mlp], Budget(140_000, 0))
    with pytest.raises(
        ConfigError, match=r"head 'linear' \(single\) on layers 0 needs about .* give more --memory or fewer"
    ):
        memory.work_of([linear], Budget(50_000, 0))
    with pytest.raises(ConfigError, match="head 'mlp'"):
        probekit.run_sweep(config(LINEAR, MLP), stores=[planted], out=tmp_path / "run", memory=900 * MIB + 140_000)
    assert not (tmp_path / "run").exists()


def test_streamed_fits_give_what_fits_in_memory_give_and_leave_no_files(planted, monkeypatch, tmp_path):
    streaming(monkeypatch)
    heads = LINEAR | {"layer_sets": [[0], [2], [1, 2]]}
    whole = probekit.run_sweep(config(heads), stores=[planted], out=tmp_path / "whole")
    usual = memory.work_of

    def streamed(unit, budget):
        return replace(usual(unit, budget), streamed=True, head_memory=1e8)

    monkeypatch.setattr(memory, "work_of", streamed)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".tmp-differences-0-1-abc").write_bytes(b"of a sweep that was killed")
    out = probekit.run_sweep(config(heads), stores=[planted], out=tmp_path / "run")
    assert not list(out.glob(".tmp-*"))
    one, other = (load_margins(folder).sort_values(["record_id", "pair_id"]) for folder in (whole, out))
    assert one["record_id"].tolist() == other["record_id"].tolist()
    assert other["margin"].to_numpy() == pytest.approx(one["margin"].to_numpy(), abs=1e-4)


def test_refits_and_altered_features_of_streamed_fits(planted, monkeypatch, tmp_path):
    """What is fitted again on parts of the pairs is the same whether differences lie in files or in memory."""
    controls = {"halves": 10, "shares": [0.5], "nested": 2, "projected": [2], "sources": True}
    heads = {"kind": "linear", "layer_sets": [[2]], "strengths": [0.1], "folds": 2, "controls": controls}
    whole = probekit.run_sweep(config(heads), stores=[planted], out=tmp_path / "whole")
    usual = memory.work_of
    monkeypatch.setattr(memory, "work_of", lambda *given: replace(usual(*given), streamed=True, head_memory=1e8))
    out = probekit.run_sweep(config(heads), stores=[planted], out=tmp_path / "run")
    one, other = (load_margins(folder).sort_values(["record_id", "split", "pair_id"]) for folder in (whole, out))
    assert one["record_id"].tolist() == other["record_id"].tolist()
    assert other["margin"].to_numpy() == pytest.approx(one["margin"].to_numpy(), abs=1e-3)


def streaming(monkeypatch):
    """Stand in for differences in files where the heads do not read them yet: the files are read whole."""
    try:
        import probekit.heads.streaming  # noqa: F401
    except ImportError:

        def read(files, widths, n):
            parts = [np.fromfile(file, "<f4").reshape(n, width) for file, width in zip(files, widths, strict=True)]
            return np.concatenate(parts, axis=1)

        module = ModuleType("probekit.heads.streaming")
        module.StreamedDifferences = read
        monkeypatch.setitem(sys.modules, "probekit.heads.streaming", module)


def test_layer_sets_are_searched_once_for_a_run(planted, monkeypatch, tmp_path, caplog):
    calls = []
    for name in ("screen_subsets", "find_blocks"):
        usual = getattr(layer_sets, name)
        monkeypatch.setattr(
            layer_sets, name, lambda *given, usual=usual, name=name, **more: calls.append(name) or usual(*given, **more)
        )

    def swept(*sets):
        head = LINEAR | {"layer_sets": [[0], *sets]}
        out = probekit.run_sweep(config(head), stores=[planted], out=tmp_path / "run")
        frame = probekit.load_results(out)
        return list(frame["layer_set"].unique())

    search, blocks = {"search": {"max_size": 2, "refit_top": 2}}, {"blocks": 2}
    first = swept(search, blocks)
    assert sorted(calls) == ["find_blocks", "screen_subsets"]
    assert swept(search, blocks) == first
    fewer = swept({"search": {"max_size": 2, "refit_top": 1}}, [0, 3])  # amended
    assert len(calls) == 2
    assert fewer[:2] == first[:2]
    files = sorted((tmp_path / "run" / "layer_sets").iterdir())
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes().replace(b"[0", b"[1"))
    files[1].write_bytes(files[0].read_bytes())
    assert swept(search, blocks) == first
    assert len(calls) == 4
    assert sum("layer sets are searched again" in line for line in caplog.messages) == 2
    files[0].write_bytes(files[1].read_bytes())  # intact, but of another question
    assert swept(search, blocks) == first
    assert len(calls) == 5
    assert "answers another question" in caplog.text


def test_a_search_that_does_not_fit_is_one_line(planted, monkeypatch):
    with pytest.raises(ConfigError, match=r"layer_sets: \{'blocks': 2\}: needs about .*; allowed: 1 kB; give more"):
        layer_sets.layer_sets(
            config(LINEAR | {"layer_sets": [{"blocks": 2}]}).heads[0],
            selected(planted),
            sigmas=["0.005"],
            draw=0,
            poolings=["mean"],
            run=Path("none"),
            allowed=1000,
        )


@pytest.mark.parametrize("moved", [False, True])
def test_a_store_that_was_made_anew_is_refused_and_a_further_one_is_not(tmp_path, moved):
    heads = LINEAR | {"layer_sets": [[0]]}
    first = planted_store(tmp_path / "store", signal={}, seed=0, pairs=60, of=0)
    out = probekit.run_sweep(config(heads), stores=[first], out=tmp_path / "run")
    held = probekit.FeatureStore(first).fingerprint[:12]
    parts = sorted(path.name for path in out.glob("parts/*"))
    further = planted_store(tmp_path / "further", signal={}, seed=1, pairs=60, of=1)
    first.rename(tmp_path / "away")
    anew = planted_store(
        tmp_path / ("moved" if moved else "store"), signal={}, seed=0, pairs=60, of=0, control="init:0"
    )
    if moved:  # the same backbone in another folder: what tells it is its name
        store = anew / "store.json"
        (tmp_path / "away").rename(first)
        other = {"store": "store", "backbone": "planted-0 (init:0)", "fingerprint": "0" * 64}
        saved = load_config(out)
        probekit.results.write_config(out, saved | {"made_from": [*saved["made_from"], other]})
        assert store.is_file()
    now = probekit.FeatureStore(anew).fingerprint[:12]
    with pytest.raises(FingerprintError) as caught:
        probekit.run_sweep(config(heads), stores=[anew, further], out=out)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(out), str(anew), now, "0" * 12 if moved else held, "another --out"):
        assert part in message
    assert sorted(path.name for path in out.glob("parts/*")) == parts
    if moved:
        probekit.run_sweep(config(heads), stores=[first, further], out=out)
        assert len(load_config(out)["made_from"]) == 3


def test_a_dry_run_counts_fits_and_says_what_they_cost_without_writing(planted, tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    heads = [LINEAR | {"layer_sets": [[0], {"search": {"max_size": 3, "refit_top": 2}}]}, MLP]
    file.write_text(yaml.safe_dump({"heads": heads, "resamples": 100}))
    out = tmp_path / "run"
    command = ["sweep", str(file), "--store", str(planted), "--out", str(out), "--jobs", "2", "--memory", "64G"]
    app([*command, "--dry-run"], standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "linear fits 5 to do, 0 already done" in said
    assert "mlp fits 1 to do, 0 already done" in said
    assert re.search(r"baselines \d to do, 0 already done", said)
    assert "searched 1 search comes first, on training pairs; fits on at most 4 layer sets are counted" in said
    assert "400 rows; pairs: 100 training, 40 validation, 60 test; left out: 0 training, 0 validation, 0 test" in said
    assert re.search(r"time about .* \(fits .*, intervals .*, searches .*, baselines .*\), from small fits timed", said)
    assert "MLPs as if early stopping ended them" in said
    assert re.search(r"memory up to .* a process, of which .* without a fit; up to .* in all.* bound 68.7 GB", said)
    assert "resolves planted: 60 decided test pairs in 60 groups show a difference of two heads from 16 points" in said
    assert not out.exists()
    probekit.run_sweep(config(*heads), stores=[planted], out=out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    app([*command, "--dry-run"], standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "linear fits 0 to do, 5 already done" in said
    assert "at most" not in said.partition("resolves")[0]
    assert "none: nothing is to be done" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_memory_of_an_mlp_counts_the_exact_head_beside_it(planted):
    """Of few pairs on many channels the linear head takes more than the network."""
    selection = selected(planted)
    for skip in (False, True):
        head = {"kind": "mlp", "layer_sets": [[0, 1]], "hidden": [4], "linear_skip": skip}
        records = list(plan_records(config(head), selection, sets=SETS))
        needed = memory.work_of(records, Budget(2**40, 0)).needed
        assert (needed > 2**26 + 1_500_000) == skip  # 12 * 8192 bytes a channel


def test_a_dry_run_counts_fits_of_searched_sets_by_rule_and_seed(planted, tmp_path):
    searched = {"layer_sets": [{"search": {"max_size": 3, "refit_top": 2}}]}
    rules = LINEAR | searched | {"combine": ["concat", "late-fusion"]}
    seeds = MLP | searched | {"seeds": [0, 1, 2]}
    said = dict(probekit.sweep.dry_run(config(rules, seeds), stores=[planted], out=tmp_path / "run"))
    run = probekit.run_sweep(config(rules, seeds), stores=[planted], out=tmp_path / "run")
    fits = probekit.load_results(run).drop_duplicates("record_id")["head_kind"].value_counts()
    assert said["linear fits"] == f"{fits['linear']} to do, 0 already done" == "8 to do, 0 already done"
    assert said["mlp fits"] == f"{fits['mlp']} to do, 0 already done" == "12 to do, 0 already done"


@pytest.mark.parametrize("sets", [{"search": {"max_size": 2}}, {"blocks": 2}])
def test_a_dry_run_refuses_a_search_that_does_not_fit(planted, tmp_path, monkeypatch, sets):
    monkeypatch.setattr(memory, "resident", lambda: 0)
    settings = config(LINEAR | {"layer_sets": [sets]})
    monkeypatch.setattr(layer_sets, "_FIXED", 2**30)
    needs = r"layer_sets: \{'(search|blocks)': .*\}: needs about 1.(07|08|11) GB of memory"
    text = needs + "; allowed: 210 MB; give more --memory"
    for sweep in (probekit.sweep.dry_run, probekit.run_sweep):
        with pytest.raises(ConfigError, match=text):
            sweep(settings, stores=[planted], out=tmp_path / "run", memory="200M")
    assert not (tmp_path / "run").exists()


def test_baselines_of_inputs_that_do_not_fit_are_left_out_and_said(planted, monkeypatch, caplog):
    selection = selected(planted)
    (first, *_) = plan_records(config(), selection, sets=SETS)
    baseline = InputBaseline(
        name="VAE latents and prompt",
        seen="VAE latents and prompt",
        selection=selection,
        entering="",
        **{name: getattr(first, name) for name in ("draw", "datasets", "trained_on", "data_digest", "ties")},
        **{name: getattr(first, name) for name in ("sigma", "protocol", "resamples", "level")},
    )
    monkeypatch.setattr(memory, "place_of", lambda baseline: memory.places_of(first)[0])
    rows, hidden = len(probekit.FeatureStore(planted).rows), 64
    needed = 28 * rows * 8 + 24 * 8 * hidden + 2**26 + 4 * 100 * len(material(selection).validation.label)
    needed += 4 * 100 * sum(len(pairs.label) for pairs in material(selection).tests.values())
    assert memory.affordable([baseline], Budget(needed, 0), set()) == [baseline]
    assert memory.affordable([baseline], Budget(needed - 1, 0), set()) == []
    assert memory.affordable([baseline], Budget(needed - 1, 0), {baseline.record_id}) == [baseline]
    assert "baseline 'VAE latents and prompt' is left out: it needs about 67.3 MB" in caplog.text


def test_the_progress_names_layer_set_accuracy_and_the_best_so_far(planted, tmp_path):
    texts: list[str] = []
    head = LINEAR | {"layer_sets": ["singles"]}
    out = probekit.run_sweep(
        config(head), stores=[planted], out=tmp_path / "run", progress=lambda done, total, text: texts.append(text)
    )
    frame = probekit.load_results(out).query("split == 'test' and slice_by == 'all' and control != 'metadata'")
    shown = dict(zip(frame["layer_set"], frame["accuracy"], strict=True))
    assert [text.split(":")[0] for text in texts] == [f"store linear {layer} at 0.005" for layer in range(4)]
    (chosen,) = frame.loc[frame["chosen"], "layer_set"]
    assert texts[-1] == (
        f"store linear 3 at 0.005: test {100 * shown['3']:.1f} % "
        f"(best on validation so far: {chosen}, test {100 * shown[chosen]:.1f} %)"
    )


def test_a_process_ends_when_its_parent_is_killed():
    script = (
        "import os, sys, time\nfrom probekit._workers import run_in_processes\nif __name__ == '__main__':\n"
        "    for _, pid in run_in_processes(os.getpgid, [0, 0], jobs=2):\n"
        "        import multiprocessing\n"
        "        print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "        time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def edited(change):
    def edit(store):
        (file,) = (store / "judgements").glob("*.parquet")
        change(pd.read_parquet(file)).to_parquet(file, index=False)
        file.with_suffix(".json").unlink()

    return edit


@pytest.mark.parametrize(
    ("made", "edit", "settings", "parts"),
    [
        ({}, None, {"layer_sets": [[9]]}, ["layer_sets", "[9]", "layer 9 is not there", "allowed: 0, 1, 2, 3"]),
        ({}, edited(lambda frame: frame[frame["split"] != "validation"]), {}, ["validation", "only test, train"]),
        (
            {},
            edited(lambda frame: frame.assign(group=["same", *frame["group"][1:-1], "same"])),
            {},
            ["group 'same' is in 2 splits", "allowed: one"],
        ),
        (
            {"further": True},
            None,
            {"layer_sets": [[0]], "poolings": ["text"]},
            ["same features", "allowed: features that differ"],
        ),
        ({}, edited(lambda frame: frame.assign(label=0.5)), {}, ["all 30 training pairs are tied", "0.5"]),
        ({}, None, {"sigmas": ["0.3"]}, ["no sigma '0.3'", "it holds 0.005"]),
        ({}, None, {"kind": "forest"}, ["heads", "'forest'", "'linear', 'mlp'"]),
    ],
    ids=["layer", "empty", "group", "constant", "tied", "sigma", "head"],
)
def test_bad_input_is_one_line_with_key_value_and_what_is_allowed(tmp_path, made, edit, settings, parts):
    store = planted_store(tmp_path / "store", **({"signal": {}, "seed": 0, "pairs": 60} | made))
    if edit is not None:
        edit(store)
    head = (
        LINEAR | {"layer_sets": ["singles"]} | {key: settings[key] for key in settings if key in ("kind", "layer_sets")}
    )
    rest = {key: settings[key] for key in settings if key not in head}
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"heads": [head], "resamples": 100} | rest))
    with pytest.raises(ProbekitError) as caught:
        app(["sweep", str(file), "--store", str(store), "--out", str(tmp_path / "run")], standalone_mode=False)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert not (tmp_path / "run" / "results.parquet").exists()


def test_features_that_are_not_finite_are_named_by_store_setting_head_and_layers(planted, monkeypatch, tmp_path):
    """No writer of ours lets them into a store under a good status, so they are put in as they are read."""
    usual = probekit.FeatureStore.differences

    def damaged(self, *, layer, **where):
        found = usual(self, layer=layer, **where)
        found[7] += np.nan if layer == 2 else 0
        return found

    monkeypatch.setattr(probekit.FeatureStore, "differences", damaged)
    said = (
        r"store, head 'linear' \(single\), sigma 0.005, pooling mean, layers 2: the features of pair 7 hold NaN .*; "
        "they must be finite$"
    )
    with pytest.raises(HeadError, match=said):
        probekit.run_sweep(config(LINEAR | {"layer_sets": [[1], [2]]}), stores=[planted], out=tmp_path / "run")
    assert len(list((tmp_path / "run" / "parts").iterdir())) == 1
