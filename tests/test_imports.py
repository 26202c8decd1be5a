"""Features computed elsewhere become a store that sweeps and reports take, or one line says what is wrong with them."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from planted_store import planted_store
from safetensors.torch import save_file
from test_cli import probekit, refused

from probekit import FeatureStore, import_features, load_preferences, load_results, run_sweep
from probekit.config import ImportConfig, SweepConfig
from probekit.errors import ConfigError, FeatureFileError, FingerprintError, ProbekitError
from probekit.imports import plan_import
from probekit.report import depth_points, scaling_points
from probekit.report.effects import Verdicts, joining_effects
from probekit.report.select import narrow, trained_models
from probekit.report.select import settings as report_settings
from probekit.store.files import LOCK

ROOT = Path(__file__).parent.parent
WIDTHS = {"early": 3, "late": 5}
WORDS = {"definition": "made up for a test"}


@pytest.fixture(scope="module")
def prefs(tmp_path_factory):
    """120 prompts with a pair each; picture ``0-a.png`` is judged under two prompts."""
    folder = tmp_path_factory.mktemp("prefs")
    rng = np.random.default_rng(0)
    lines = []
    for pair in range(120):
        split = ["train", "validation", "test", "train"][pair % 4]
        for side in "ab":
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{pair}-{side}.png")
        sides = {"image_a": f"{pair}-a.png", "image_b": f"{pair}-b.png"}
        lines.append({"prompt": f"prompt {pair}", **sides, "label": pair % 3 % 2, "split": split})
    lines.append(lines[0] | {"prompt": "another prompt"})
    path = folder / "prefs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_preferences(path)


def keys_of(prefs, *, prompts: bool) -> pd.DataFrame:
    columns = ["image", "prompt"] if prompts else ["image"]
    return prefs.items[columns].drop_duplicates().sample(frac=1, random_state=0).reset_index(drop=True)


def planted(prefs, keys: pd.DataFrame, strength: float = 3.0) -> dict[str, np.ndarray]:
    """Vectors whose layer ``late`` tells the winner; ``early`` knows nothing."""
    rng = np.random.default_rng(1)
    arrays = {name: rng.normal(size=(len(keys), width)).astype(np.float32) for name, width in WIDTHS.items()}
    pairs, items = prefs.pairs, prefs.items
    winners = np.where(pairs["label"] > 0.5, pairs["item_a"], pairs["item_b"])
    arrays["late"][:, 0] += strength * keys["image"].isin(items["image"].to_numpy()[winners])
    return arrays


def write(path: Path, keys: pd.DataFrame, arrays: dict[str, np.ndarray], *, kind: str) -> Path:
    """Write one kind of file; ``long`` and ``fixed`` are Parquet by layers and by rows with fixed-size lists."""
    texts = {name: keys[name].tolist() for name in keys}
    if kind == "npz":
        path = path.with_suffix(".npz")
        np.savez_compressed(path, **{name: np.array(some) for name, some in texts.items()}, **arrays)
    elif kind == "safetensors":
        path = path.with_suffix(".safetensors")
        tensors = {f"{k} {name}": torch.from_numpy(some) for k, (name, some) in enumerate(arrays.items())}
        save_file(tensors, path, metadata={name: json.dumps(some) for name, some in texts.items()})
    else:
        path = path.with_suffix(".parquet")
        tables = [keys.assign(layer=name, vector=list(some)) for name, some in arrays.items()]
        table = pa.Table.from_pandas(pd.concat(tables, ignore_index=True))
        if kind == "fixed":  # by rows, as a loop over pictures writes it, with a dictionary of layer names
            (name, array), *_ = arrays.items()
            vector = pa.array(list(array)).cast(pa.list_(pa.float32(), array.shape[1]))
            table = pa.table({**texts, "layer": pa.array([name] * len(keys)).dictionary_encode(), "vector": vector})
        pq.write_table(table, path, row_group_size=50)
    return path


def read_back(store: FeatureStore, layer: int) -> dict[tuple[str, str], np.ndarray]:
    rows = store.rows
    return dict(zip(zip(rows["image_id"], rows["prompt"], strict=True), store.read(layer=layer), strict=True))


@pytest.mark.parametrize("kind", ["npz", "safetensors", "long"])
@pytest.mark.parametrize("prompts", [False, True])
def test_every_kind_of_file_gives_the_vectors_of_its_keys(prefs, tmp_path, kind, prompts):
    keys = keys_of(prefs, prompts=prompts)
    arrays = planted(prefs, keys)
    file = write(tmp_path / "f", keys, arrays, kind=kind)
    store = import_features(file, prefs, tmp_path / "store", **WORDS, shard_size=1)
    assert [layer.name.split()[-1] for layer in store.layers] == list(arrays)
    assert (store.sigmas, store.draws, store.poolings) == (["0"], [0], ["given"])
    assert len(store.rows) == len(prefs.items) == 242
    for layer, array in enumerate(arrays.values()):
        given = dict(zip(keys.itertuples(index=False, name=None), array, strict=True))
        for (image, prompt), vector in read_back(store, layer).items():
            expected = given[(image, prompt) if prompts else (image,)]
            np.testing.assert_allclose(vector, expected, rtol=1e-3)
    assert store.describe["width"] == 5
    assert store.config["keys"] == ("image and prompt" if prompts else "image")


def test_a_parquet_file_of_fixed_size_lists_and_one_layer(prefs, tmp_path):
    keys = keys_of(prefs, prompts=False)
    arrays = planted(prefs, keys)
    store = import_features(write(tmp_path / "f", keys, arrays, kind="fixed"), prefs, tmp_path / "store", **WORDS)
    given = dict(zip(keys["image"], arrays["early"], strict=True))
    for (image, _), vector in read_back(store, 0).items():
        np.testing.assert_allclose(vector, given[image], rtol=1e-3)
    assert store.describe["n_blocks"] == 0


@given(
    bits=st.lists(st.integers(0, 2**16 - 1), min_size=4, max_size=4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
@settings(max_examples=40)
def test_numbers_of_safetensors_are_read_exactly(tmp_path_factory, bits, dtype):
    """What torch says a number of these types is as float32 is what is read, not finite ones included."""
    from probekit.imports.feature_files import open_features

    halves = torch.tensor(bits, dtype=torch.int32).to(torch.int16)
    values = halves.view(dtype) if dtype.itemsize == 2 else halves.view(torch.bfloat16).to(dtype)
    path = tmp_path_factory.mktemp("f") / "f.safetensors"
    save_file({"layer": values.reshape(2, 2)}, path, metadata={"image": '["a", "b"]'})
    (part,) = open_features(path).parts()
    np.testing.assert_array_equal(part.values, values.reshape(2, 2).to(torch.float32).numpy())


@pytest.mark.parametrize(
    ("names", "blocks", "numbers", "n_blocks"),
    [
        (["12", "0", "6"], None, [12, 0, 6], 12),
        (["12", "0", "6"], 24, [12, 0, 6], 24),
        (["0", "1", "2"], 1, [0, 1, 2], 1),  # the last is the output point
        (["down", "mid"], None, [0, 1], 1),
        (["12"], None, [0], 0),
        (["12"], 24, [12], 24),
        (["1", "mid"], None, [0, 1], 1),
    ],
)
def test_numbers_of_layers(prefs, tmp_path, names, blocks, numbers, n_blocks):
    keys = keys_of(prefs, prompts=False)
    arrays = {name: np.full((len(keys), 2), place, np.float32) for place, name in enumerate(names)}
    store = import_features(
        write(tmp_path / "f", keys, arrays, kind="npz"), prefs, tmp_path / "store", **WORDS, blocks=blocks
    )
    assert store.describe["n_blocks"] == n_blocks
    for place, (name, number) in enumerate(zip(names, numbers, strict=True)):
        assert {layer.index: layer.name for layer in store.layers}[number] == name
        assert (store.read(layer=number) == place).all()


@pytest.mark.parametrize(
    ("names", "blocks", "error", "message"),
    [
        (["mid"], 3, ConfigError, "'mid'"),
        (["1", "5"], 3, ConfigError, "layer 5; allowed: 0 to 4"),
        (["1", "01"], None, FeatureFileError, "two layers have the number 1"),
    ],
)
def test_wrong_numbers_of_layers_are_named(prefs, tmp_path, names, blocks, error, message):
    keys = keys_of(prefs, prompts=False)
    file = write(tmp_path / "f", keys, {name: np.ones((len(keys), 2), np.float32) for name in names}, kind="npz")
    with pytest.raises(error, match=message):
        import_features(file, prefs, tmp_path / "store", **WORDS, blocks=blocks)
    assert not (tmp_path / "store").exists()


def broken(prefs, path: Path, what: str) -> Path:
    """A file with one mistake."""
    keys = keys_of(prefs, prompts=False)
    arrays = planted(prefs, keys)
    images = np.array(keys["image"].tolist())
    table = pd.concat([keys.assign(layer=name, vector=list(some)) for name, some in arrays.items()], ignore_index=True)
    npz = {
        "objects": {"image": images.astype(object), **arrays},
        "pickled layer": {"image": images, "late": np.array([None] * len(images), object)},
        "numbers for images": {"image": np.arange(len(images)), **arrays},
        "no images": arrays,
        "no layers": {"image": images},
        "whole numbers": {"image": images, "late": np.ones((len(images), 2), np.int64)},
        "one more row": {"image": images, "late": np.ones((len(images) + 1, 2), np.float32)},
        "one dimension": {"image": images, "late": np.ones(len(images), np.float32)},
        "columns first": {"image": images, "late": np.asfortranarray(np.ones((len(images), 2), np.float32))},
        "fewer prompts": {"image": images, "prompt": images[:3], **arrays},
        "twice": {"image": np.concatenate([images, images[:1]]), "late": np.ones((len(images) + 1, 2), np.float32)},
    }
    if what in npz:
        np.savez(path.with_suffix(".npz"), **npz[what])
        return path.with_suffix(".npz")
    if what.startswith("safetensors"):
        path = path.with_suffix(".safetensors")
        metadata = {"safetensors without keys": None, "safetensors with other keys": {"image": '{"a": 1}'}}
        kind = torch.int8 if what.endswith("of bytes") else torch.float32
        tensor = torch.ones((len(images), 2), dtype=kind)
        save_file({"late": tensor}, path, metadata=metadata.get(what, {"image": json.dumps(images.tolist())}))
        return path
    if what == "cut":
        path = write(path, keys, arrays, kind="npz")
        path.write_bytes(path.read_bytes()[:-200])
        return path
    if what == "damaged inside":
        np.savez(path.with_suffix(".npz"), image=images, **arrays)
        path = path.with_suffix(".npz")
        data = path.read_bytes()
        place = data.index(arrays["late"].tobytes()[:64])
        path.write_bytes(data[:place] + b"\1" + data[place + 1 :])
        return path
    if what == "pickle":
        path = path.with_suffix(".pt")
        torch.save(arrays, path)
        return path
    tables = {
        "no vector": table.drop(columns="vector"),
        "texts for vectors": table.assign(vector="x"),
        "numbers for vectors": table.assign(vector=1.0),
        "lists of whole numbers": table.assign(vector=[[1, 2]] * len(table)),
        "no image in a row": table.assign(image=table["image"].mask(table.index == 7)),
        "no vector in a row": table.assign(vector=table["vector"].mask(table.index == 7)),
        "unequal lengths": table.assign(vector=[v[:2] if i == 9 else v for i, v in enumerate(table["vector"])]),
        "twice in two places": pd.concat([table, table.iloc[[3]]]),
    }
    whole = pa.Table.from_pandas(table)
    pq.write_table(
        whole[:0] if what == "empty" else pa.Table.from_pandas(tables[what]),
        path.with_suffix(".parquet"),
        row_group_size=50,
    )
    return path.with_suffix(".parquet")


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("objects", ["f.npz", "allow_pickle"]),
        ("pickled layer", ["'late'", "object"]),
        ("numbers for images", ["'image'", "int64", "texts"]),
        ("no images", ["names no images"]),
        ("no layers", ["0 layers"]),
        ("whole numbers", ["'late'", "int64", "float32"]),
        ("one more row", ["'late'", "(241, 2)", "(240, channels)"]),
        ("one dimension", ["'late'", "(240,)"]),
        ("columns first", ["'late'", "ascontiguousarray"]),
        ("fewer prompts", ["3 prompts for 240 images"]),
        ("twice", ["two vectors for", ".png'"]),
        ("safetensors without keys", ["names no images", "metadata"]),
        ("safetensors with other keys", ["'image'", "JSON list"]),
        ("safetensors of bytes", ["'late'", "I8", "BF16"]),
        ("cut", ["f.npz", "cannot be read"]),
        ("damaged inside", ["f.npz", "cannot be read"]),
        ("pickle", ["'.pt'", ".safetensors"]),
        ("no vector", ["no column 'vector'", "found: image, layer"]),
        ("texts for vectors", ["'vector'", "string"]),
        ("numbers for vectors", ["'vector'", "double"]),
        ("lists of whole numbers", ["'vector'", "int64"]),
        ("no image in a row", ["row 8: image is missing"]),
        ("no vector in a row", ["row 8: vector is missing"]),
        ("unequal lengths", ["row 10", "2 numbers", "'early' 3"]),
        ("twice in two places", ["two vectors for", "'early'"]),
        ("empty", ["0 layers"]),
    ],
)
def test_a_mistake_in_a_file_is_one_line(prefs, tmp_path, what, parts, monkeypatch):
    monkeypatch.setattr("probekit.imports.feature_files.CHUNK_BYTES", 1024)
    file = broken(prefs, tmp_path / "f", what)
    done = probekit("import-features", file, "--prefs", prefs.path, "--out", tmp_path / "store", "--definition", "x")
    refused(done, 1, *parts)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_rows_without_features_are_counted_and_named_unless_a_share_is_accepted(prefs, tmp_path):
    keys = keys_of(prefs, prompts=False)
    arrays = planted(prefs, keys)
    keep = ~keys["image"].isin(["0-a.png", "1-b.png"])  # the first is two rows
    arrays["late"][keys["image"] == "5-a.png", 1] = np.inf
    keys.loc[keys["image"] == "9-b.png", "image"] = "elsewhere.png"
    file = write(tmp_path / "f", keys[keep], {name: some[keep] for name, some in arrays.items()}, kind="long")
    table = pd.read_parquet(file)
    table[(table["image"] != "7-a.png") | (table["layer"] != "late")].to_parquet(file)  # one layer of it is there
    command = ["import-features", file, "--prefs", prefs.path, "--out", tmp_path / "store", "--definition", "x"]
    rows = ["6 of 242 rows", "5 absent", "1 not finite", "'0-a.png'", "'1-b.png'", "'5-a.png'", "'9-b.png'"]
    done = probekit(*command)
    refused(done, 1, *rows, "1 other keys, such as 'elsewhere.png'", "a share of 0 (--max-bad)")
    assert done.stderr.count("'0-a.png'") == 1  # a key is named once, however many rows it is
    assert "1 of the file are not in the preference file, such as 'elsewhere.png'" in " ".join(
        probekit(*command, "--dry-run").stdout.split()
    )
    refused(probekit(*command, "--max-bad", 5.9 / 242), 1, *rows)
    assert not (tmp_path / "store").exists()
    asked = {"file": file, "prefs": prefs.path, "out": tmp_path / "store", **WORDS}
    plan = plan_import(ImportConfig.checked(asked, source="test"))
    assert (plan.rows, plan.absent, plan.not_finite, plan.unused) == (242, 5, 1, 1)
    assert (plan.pairs, plan.pairs_left_out) == (121, 6)
    assert probekit(*command, "--max-bad", 6 / 242).returncode == 0
    store = FeatureStore(tmp_path / "store")
    status = store.rows.set_index("image_id")["status"]
    assert status[status > 0].groupby(level=0).max().to_dict() == {
        "0-a.png": 1,
        "1-b.png": 1,
        "5-a.png": 2,
        "7-a.png": 1,
        "9-b.png": 1,
    }
    assert np.isnan(store.read(layer=0)).all(axis=1).sum() == 6
    assert store.pairs().left_out == {"missing_rows": 0, "bad_status": 6, "no_label": 0}


def test_keys_with_prompts_tell_the_prompts_of_a_picture_apart(prefs, tmp_path):
    keys = keys_of(prefs, prompts=True)
    keys = keys[keys["prompt"] != "another prompt"]
    file = write(tmp_path / "f", keys, planted(prefs, keys), kind="npz")
    with pytest.raises(FeatureFileError, match=r"2 of 242 rows .*'0-a.png' under 'another prompt'"):
        import_features(file, prefs, tmp_path / "store", **WORDS)


def test_no_vector_for_any_row_is_an_error_whatever_is_accepted(prefs, tmp_path):
    keys = keys_of(prefs, prompts=False).assign(image=lambda keys: "./" + keys["image"])
    file = write(tmp_path / "f", keys, {"x": np.ones((len(keys), 2), np.float32)}, kind="npz")
    with pytest.raises(FeatureFileError, match=r"242 of 242 rows.* 240 other keys, such as './0-a.png'"):
        import_features(file, prefs, tmp_path / "store", **WORDS, max_bad=0.999)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock-"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_same_command_changes_nothing_and_other_files_or_words_are_another_store(prefs, tmp_path):
    keys = keys_of(prefs, prompts=False)
    arrays = planted(prefs, keys)
    file = write(tmp_path / "f", keys, arrays, kind="npz")
    import_features(file, prefs, tmp_path / "store", **WORDS)
    before = contents(tmp_path / "store")
    import_features(file, prefs, tmp_path / "store", **WORDS)
    assert contents(tmp_path / "store") == before
    with pytest.raises(FingerprintError, match=r"poolings.given"):
        import_features(file, prefs, tmp_path / "store", definition="other words")
    arrays["late"][0, 0] += 1
    write(tmp_path / "f", keys, arrays, kind="npz")
    with pytest.raises(FingerprintError, match="file_sha256"):
        import_features(file, prefs, tmp_path / "store", **WORDS)
    assert contents(tmp_path / "store") == before


def test_a_longer_preference_file_adds_its_rows(prefs, tmp_path):
    keys = keys_of(prefs, prompts=False)
    file = write(tmp_path / "f", keys, planted(prefs, keys), kind="long")
    few = prefs.limit(60)
    assert len(import_features(file, few, tmp_path / "store", **WORDS).rows) < 130
    shards = contents(tmp_path / "store" / "shards")
    store = import_features(file, prefs, tmp_path / "store", **WORDS)
    assert len(store.rows) == 242
    after = contents(tmp_path / "store" / "shards")
    assert {name: after[name] for name in shards} == shards


_SLOW = """
import sys, time
from probekit import import_features, load_preferences
def slow(done, total, text):
    print(text, done, flush=True)
    time.sleep(0.2)
import probekit.imports.importing as importing
importing._Job.rows_per_shard = lambda self: 40
import_features(sys.argv[1], load_preferences(sys.argv[2]), sys.argv[3], definition="d", progress=slow)
"""


@pytest.mark.parametrize("where", ["vectors", "rows"])
def test_killed_and_run_again_it_ends_with_the_same_bytes_and_leaves_nothing(prefs, tmp_path, where, monkeypatch):
    keys = keys_of(prefs, prompts=False)
    file = write(tmp_path / "f", keys, planted(prefs, keys), kind="long")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", _SLOW, str(file), str(prefs.path), str(tmp_path / "out" / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith(where):
                process.kill()
                break
        process.wait()
    assert process.returncode == -signal.SIGKILL
    left = contents(tmp_path / "out")
    assert not left if where == "vectors" else any(name.endswith(".h5") for name in left)
    monkeypatch.setattr("probekit.imports.importing._Job.rows_per_shard", lambda job: 40)
    import_features(file, prefs, tmp_path / "out" / "store", definition="d")
    import_features(file, prefs, tmp_path / "whole", definition="d")
    ours, whole = contents(tmp_path / "out" / "store" / "shards"), contents(tmp_path / "whole" / "shards")
    assert len(whole) > 8
    assert ours == whole
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"store"}


def test_a_full_disk_is_one_line_and_nothing_is_written(prefs, tmp_path):
    keys = keys_of(prefs, prompts=False)
    file = write(tmp_path / "f", keys, {"x": np.ones((len(keys), 500), np.float32)}, kind="npz")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from probekit.cli import main; main()"
    )
    options = ["--prefs", prefs.path, "--out", tmp_path / "store", "--definition", "x"]
    command = [sys.executable, "-c", code, "import-features", file, *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    refused(done, 1, str(tmp_path), "480 kB", "File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]


@pytest.mark.parametrize("row_group_size", [500, 100_000])
def test_a_parquet_file_is_read_in_bounded_memory(tmp_path, monkeypatch, row_group_size):
    from probekit.imports import feature_files

    monkeypatch.setattr(feature_files, "CHUNK_BYTES", 2**17)
    vectors = list(np.random.default_rng(0).normal(size=(8000, 256)).astype(np.float32))
    table = pa.table({"image": [f"{row}.png" for row in range(8000)], "vector": vectors})
    pq.write_table(table, tmp_path / "f.parquet", row_group_size=row_group_size, compression="none")
    del table
    before, most, n_vectors = pa.total_allocated_bytes(), 0, 0
    for part in feature_files.open_features(tmp_path / "f.parquet").parts():
        most = max(most, pa.total_allocated_bytes() - before)
        n_vectors += len(part.values)
    assert n_vectors == 8000
    assert most < (tmp_path / "f.parquet").stat().st_size / 2


HEAD = {"kind": "linear", "layer_sets": ["singles", "all"], "strengths": [0.01, 1.0]}


def swept(stores: list[Path], out: Path, **options: object) -> pd.DataFrame:
    config = SweepConfig.checked({"heads": [HEAD], "resamples": 100} | options, source="test")
    return load_results(run_sweep(config, stores=stores, out=out)).query("control != 'metadata'")


def test_what_was_planted_is_found_and_layers_of_two_widths_are_joined(prefs, tmp_path):
    keys = keys_of(prefs, prompts=False)
    file = write(tmp_path / "f", keys, planted(prefs, keys), kind="safetensors")
    import_features(file, prefs, tmp_path / "store", **WORDS, name="elsewhere")
    frame = swept([tmp_path / "store"], tmp_path / "run").query("split == 'test' and source == 'all'")
    test = frame.set_index("layer_set")
    assert test["backbone"].unique().tolist() == ["elsewhere"]
    assert test.loc["1", "low"] > 0.8
    assert test.loc["1", "chosen"]
    assert test.loc["0", "low"] < 0.6
    assert test.loc["0+1", "accuracy"] > 0.8
    assert test.loc["0+1", "head_parameters"] == sum(WIDTHS.values())
    assert test["relative_depth"].tolist()[:2] == [0, 1]
    assert test["backbone_parameters"].isna().all()
    done = probekit("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert "elsewhere" in (tmp_path / "page.html").read_text()


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A run of a planted backbone (3 blocks, sigma 0.005, pooling mean) and of noise imported as one and three layers.

    All judge the same pairs: the imports are of pictures whose digests are those of the planted rows.
    """
    folder = tmp_path_factory.mktemp("beside")
    store = planted_store(folder / "store", signal={2: 6.0}, seed=7, pairs=400)
    judged = FeatureStore(store)
    lines, order = [], judged.rows.set_index("row_id")
    (folder / "pictures").mkdir()
    pairs = judged.pairs().frame.assign(label=judged.pairs().label)
    for pair in pairs.to_dict("records"):
        a, b = (order.loc[pair[side]] for side in ("row_a", "row_b"))
        number, _ = a["image_id"].split("-")
        for side in "ab":
            (folder / "pictures" / f"{number}-{side}.png").write_bytes(f"7 {number} {side}".encode())
        sides = {"image_a": a["image_id"], "image_b": b["image_id"]}
        columns = {"label": pair["label"], "split": pair["split"], "source": pair["source"]}
        lines.append({"prompt": a["prompt"], **sides, **columns})
    path = folder / "pictures" / "planted.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prefs = load_preferences(path)
    keys = keys_of(prefs, prompts=False)
    rng = np.random.default_rng(2)
    noise = {str(k): rng.normal(size=(len(keys), 2 + k)).astype(np.float32) for k in (2, 4, 6)}
    one = write(folder / "one", keys, {"embedding": noise["2"]}, kind="npz")
    three = write(folder / "three", keys, noise, kind="npz")
    import_features(one, prefs, folder / "import-one", definition="noise", parameters=5_000)
    import_features(three, prefs, folder / "import-three", definition="noise", blocks=6)
    paths = [folder / "import-one", folder / "import-three"]
    config = SweepConfig.checked(
        {"heads": [HEAD], "resamples": 100, "sigmas": ["0.005"], "poolings": ["mean"]}, source="test"
    )
    run_sweep(config, stores=paths[:1], out=folder / "alone")
    return run_sweep(config, stores=[*paths, store], out=folder / "run", prefs=path)


def test_one_layer_has_no_depth_and_stands_for_the_chosen_layer_and_for_all(beside):
    frame = load_results(beside).query("control != 'metadata'")
    one = frame[frame["backbone"] == "one"]
    assert one["relative_depth"].isna().all()
    assert (one["pooling_layers"] == 1).all()
    points = scaling_points(frame)
    drawn = points[points["model"] == "one"]
    assert sorted(drawn["layers"]) == ["all layers", "chosen layer"]
    assert drawn["accuracy"].nunique() == 1
    assert set(points["model"]) == {"one", "planted-7"}  # of three the size is not known
    depths = depth_points(frame)
    three = depths[depths["model"] == "three"]
    assert three.query("layers == 'single'")["relative_depth"].tolist() == [1 / 3, 2 / 3, 1]
    assert three["layers"].value_counts()["all layers"] == 1


def test_imported_features_are_in_the_setting_of_the_backbones_and_never_lead_it(beside):
    frame = load_results(beside).query("control != 'metadata'")
    (setting,) = report_settings(frame)
    assert (setting.sigma, setting.pooling) == ("0.005", "mean")
    models = trained_models(frame)
    assert [(model.label, model.imported) for model in models] == [
        ("three", True),
        ("one", True),
        ("planted-7", False),
    ]


def test_one_layer_is_not_compared_with_itself(beside):
    joined = joining_effects(narrow(load_results(beside)), Verdicts(beside, "strict", resamples=100))
    assert set(joined) == {"three", "planted-7"}


def test_the_page_sets_imports_apart(beside, tmp_path):
    from probekit.report import build_report

    text = build_report(beside, tmp_path / "page.html").read_text(encoding="utf-8")
    found = re.search(r'<ul class="found">(.*?)</ul>', text, re.DOTALL).group(1)
    assert "planted-7: layer" in found
    assert re.search(r"planted-7 is [\d.]+ points \[.*\] above the imported features one", found)
    assert "longer" not in found
    assert "above one" not in found  # no effect of size
    assert "2 = 2, 4 = 4, 6 = 6" in text
    assert "There are no two backbones to compare" in text
    assert "Layer 0 is the tokens" in text


def test_one_layer_alone_needs_no_depth_figure(beside, tmp_path):
    from probekit.report import build_report

    page = build_report(beside.parent / "alone", tmp_path / "page.html")
    text = page.read_text(encoding="utf-8")
    assert "its only layer orders" in text
    assert "it says nothing about depth" in text
    assert "Layer 0 is the tokens" not in text
    assert not (tmp_path / "page_figures" / "depth.png").exists()


def test_a_dry_run_says_what_there_is_and_writes_nothing(prefs, tmp_path):
    keys = keys_of(prefs, prompts=False)
    file = write(tmp_path / "f", keys, planted(prefs, keys), kind="npz")
    command = ["import-features", file, "--prefs", prefs.path, "--out", tmp_path / "store", "--definition", "x"]
    done = probekit(*command, "--dry-run")
    assert done.returncode == 0, done.stderr
    for part in ("242", "0 in the store", "0 (early, 3 channels) to 1 (late, 5 channels)", "at most 7.74 kB"):
        assert part in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]
    assert probekit(*command).returncode == 0
    assert "242 in the store" in probekit(*command, "--dry-run").stdout


def test_a_damaged_store_is_planned_and_done_again_by_the_same_command(prefs, tmp_path):
    keys = keys_of(prefs, prompts=False)
    wide = {"x": np.random.default_rng(3).normal(size=(len(keys), 2000)).astype(np.float32)}  # more than one shard
    command = ["import-features", write(tmp_path / "f", keys, wide, kind="npz"), "--prefs", prefs.path]
    command += ["--out", tmp_path / "store", "--definition", "x", "--shard-size", 1]
    assert probekit(*command).returncode == 0
    shards = sorted((tmp_path / "store").rglob("*.h5"))
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:-100])
    done = probekit(*command, "--dry-run")
    assert done.returncode == 0, done.stderr
    held = int(re.search(r"242; (\d+) in the store", done.stdout).group(1))
    assert 0 < held < 242
    assert len(shards[0].read_bytes()) < len(whole)
    done = probekit(*command)
    assert done.returncode == 0, done.stderr
    assert len(shards[0].read_bytes()) == len(whole)
    assert "242 in the store" in probekit(*command, "--dry-run").stdout


@pytest.mark.parametrize("other", ["file", "definition"])
def test_a_dry_run_refuses_the_store_of_another_import(prefs, tmp_path, other):
    keys = keys_of(prefs, prompts=False)
    arrays = planted(prefs, keys)
    file = write(tmp_path / "f", keys, arrays, kind="npz")
    store = tmp_path / "store"
    import_features(file, prefs, store, **WORDS)
    if other == "file":
        file = write(tmp_path / "g", keys, {name: some + 1 for name, some in arrays.items()}, kind="npz")
    definition = "another" if other == "definition" else WORDS["definition"]
    command = ["import-features", file, "--prefs", prefs.path, "--out", store, "--definition", definition]
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    refused(probekit(*command, "--dry-run"), 1, "file_sha256" if other == "file" else "another")
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_an_import_hashes_the_pictures_once_while_no_other_process_does(prefs, tmp_path, monkeypatch):
    seen = []
    plain = type(prefs).image_digests

    def noted(self, cache=None, **options):
        seen.append(cache)
        assert (cache.parent / f"{LOCK}{cache.name}").exists()
        return plain(self, cache, **options)

    monkeypatch.setattr(type(prefs), "image_digests", noted)
    keys = keys_of(prefs, prompts=False)
    file = write(tmp_path / "f", keys, planted(prefs, keys), kind="npz")
    for _ in range(2):
        import_features(file, prefs, tmp_path / "store", **WORDS)
    assert seen == [tmp_path / "store" / "image_digests.parquet"] * 2


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--max-bad", 1.5], ["max_bad", "1.5"]),
        (["--max-bad", 1], ["max_bad", "less than 1"]),
        (["--blocks", 0], ["blocks", "0"]),
        (["--definition", ""], ["definition"]),
        (["--shard-size", 0], ["shard_size", "0"]),
    ],
)
def test_a_wrong_option_is_a_usage_error(prefs, tmp_path, options, parts):
    (tmp_path / "f.npz").touch()
    command = [
        "import-features",
        tmp_path / "f.npz",
        "--prefs",
        prefs.path,
        "--out",
        tmp_path / "s",
        "--definition",
        "x",
    ]
    refused(probekit(*command, *options), 2, *parts)


def test_a_missing_file_and_a_folder_with_other_things_are_named(prefs, tmp_path):
    with pytest.raises(ProbekitError, match=r"none.npz: cannot be read \(No such file"):
        import_features(tmp_path / "none.npz", prefs, tmp_path / "store", **WORDS)
    keys = keys_of(prefs, prompts=False)
    file = write(tmp_path / "f", keys, planted(prefs, keys), kind="npz")
    with pytest.raises(ProbekitError, match=r"no store\.json"):
        import_features(file, prefs, tmp_path, **WORDS)


def test_the_readmes_clip_block_runs_on_a_tiny_clip(prefs, tmp_path, monkeypatch):
    """The block as printed, on a CLIP with random weights in place of the published one."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "CLIPVisionModel" in block]
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path / "clip")
    small = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**small).save_pretrained(tmp_path / "clip")
    checkpoint, folder = '"openai/clip-vit-large-patch14"', 'Path("hpdv3")'
    assert checkpoint in block
    assert folder in block
    block = block.replace(checkpoint, '"clip"').replace(folder, f"Path({str(prefs.path.parent)!r})")
    monkeypatch.chdir(tmp_path)
    (prefs.path.parent / "preferences.jsonl").write_bytes(prefs.path.read_bytes())
    exec(compile(block, "README.md", "exec"), {})
    store = import_features("clip.parquet", prefs, "store", **WORDS)
    assert [layer.index for layer in store.layers] == [0, 1, 2]
    assert store.read(layer=2).shape == (242, 8)
