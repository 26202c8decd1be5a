"""What other tools get is what the store reads, row by row."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from planted_store import planted_store
from safetensors.numpy import load_file
from test_cli import probekit
from test_store import CONFIG, dump, expected, judged, table

from probekit._types import scaled
from probekit.errors import StoreError
from probekit.store import FeatureStore, export_store, open_store
from probekit.store.files import TEMP

COORDINATES = [("0.005", 0), ("0.1", 0), ("0.1", 1)]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    path = tmp_path_factory.mktemp("made") / "store"
    planted_store(path, signal={1: 1.0}, seed=0, broken=3, ties=0.1, coordinates=COORDINATES, further=True)
    return FeatureStore(path)


def files(path: Path) -> dict[str, tuple[int, int]]:
    """Name -> (inode, time) of every file: a file that is written anew has others."""
    found = [p for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


def test_datasets_reads_the_parquet(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets  # takes a second

    export_store(store, tmp_path / "out", to="parquet")
    for sigma, draw in COORDINATES:
        for pooling in store.poolings:
            file = tmp_path / "out" / "features" / f"sigma-{sigma}" / f"draw-{draw}" / f"{pooling}.parquet"
            loaded = datasets.load_dataset(
                "parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
            )
            rows = store.rows
            for column in rows:
                assert loaded[column] == rows[column].tolist()
            numbers = loaded.with_format("numpy")
            for layer in store.layers_of(pooling):
                column = f"layer_{layer.index:03d}"
                wanted = store.read(layer=layer.index, sigma=sigma, draw=draw, pooling=pooling)
                assert loaded.features[column].length == wanted.shape[1]
                np.testing.assert_array_equal(np.asarray(numbers[column][:], np.float32), wanted)
    one = datasets.load_dataset(
        "parquet",
        data_files=str(file),
        columns=["row_id", "layer_001"],
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert one.column_names == ["row_id", "layer_001"]
    pairs = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "out/pairs/planted.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    ).to_pandas()
    held = store.pairs()
    assert pairs["pair_id"].tolist() == held.frame["pair_id"].tolist()
    assert pairs["label"].tolist() == held.label.tolist()
    assert {"group", "split", "source", "row_a", "row_b"} <= set(pairs)
    for side, index in (("row_a", "index_a"), ("row_b", "index_b")):
        assert store.rows["row_id"][pairs[index]].tolist() == pairs[side].tolist()


def test_safetensors(store, tmp_path):
    made = export_store(store, tmp_path, to="safetensors", sigmas=["0.10"], draws=[1])
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "rows.parquet"), store.rows, check_dtype=False)
    seen = 0
    for pooling in store.poolings:
        for layer in store.layers_of(pooling):
            name = f"layer_{layer.index:03d}"
            (tensor,) = load_file(tmp_path / f"features/sigma-0.1/draw-1/{pooling}/{name}.safetensors").values()
            np.testing.assert_array_equal(
                tensor.astype(np.float32), store.read(layer=layer.index, sigma="0.1", draw=1, pooling=pooling)
            )
            seen += 1
    assert len(made.written) == seen + 2  # rows and pairs
    assert made.left_out == {"planted": {"missing_rows": 0, "bad_status": 3, "no_label": 0}}
    assert sorted(made.written) == sorted(set(files(tmp_path)) - {"export.json"})


def test_numbers_keep_their_type(tmp_path):
    def change(part, features):
        features["mean", 2] += 40000 * (part["row_id"].iloc[0] == rows["row_id"][0])  # float32 in the first shard only

    rows = table(4)
    dump(tmp_path / "s", rows, change=change)
    export_store(FeatureStore(tmp_path / "s"), tmp_path / "p", to="parquet")
    schema = pq.read_schema(next((tmp_path / "p").rglob("mean.parquet")))
    assert [str(schema.field(f"layer_00{layer}").type.value_type) for layer in (0, 1, 2)] == [
        "halffloat",
        "halffloat",
        "float",
    ]
    export_store(FeatureStore(tmp_path / "s"), tmp_path / "t", to="safetensors", layers=[0, 2])
    kinds = {p.stem: next(iter(load_file(p).values())).dtype for p in (tmp_path / "t").rglob("*.safetensors")}
    assert kinds == {"layer_000": np.float16, "layer_002": np.float32}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("batch_bytes", [1, 100, 10**6])
def test_batches_are_the_rows_in_order(tmp_path, batch_bytes, order):
    """Also where the rows of one noise level lie in other blocks than those of another, or in another order."""
    rows = table(6)
    dump(tmp_path, rows, size=18)
    dump(tmp_path, rows[::order], "0.1", size=6)
    store = FeatureStore(tmp_path)
    for sigma in store.sigmas:
        places, parts = zip(*store.batches(layers=[2, 0], sigma=sigma, batch_bytes=batch_bytes), strict=True)
        assert [row for place in places for row in range(place.start, place.stop)] == list(range(18))
        assert len(parts) == (1 if batch_bytes == 10**6 else 18 if batch_bytes == 1 else 4)
        for layer in (0, 2):
            np.testing.assert_array_equal(
                np.concatenate([part[layer] for part in parts]), expected(store, layer, sigma)
            )
    with pytest.raises(StoreError, match=r"layer 9 is not in the store"):
        next(store.batches(layers=[9], sigma="0.1"))


def test_a_flipped_byte_is_not_exported(tmp_path):
    dump(tmp_path / "s", table(2))
    (h5,) = tmp_path.rglob("*.h5")
    record = json.loads(h5.with_suffix(".json").read_bytes())["datasets"]["features/mean/001"]
    data = bytearray(h5.read_bytes())
    data[record["offset"]] ^= 16
    h5.write_bytes(data)
    for to in ("parquet", "safetensors"):
        with pytest.raises(StoreError, match="features/mean/001 does not have the checksum"):
            export_store(FeatureStore(tmp_path / "s"), tmp_path / to, to=to)
        assert not [
            p for p in (tmp_path / to).rglob("*") if "001" in p.name or TEMP in p.name or p.suffix == ".parquet"
        ]


@pytest.mark.parametrize("to", ["parquet", "safetensors"])
def test_the_same_command_continues_and_updates(tmp_path, to):
    path, out = tmp_path / "s", tmp_path / "out"
    writer = dump(path, table(4))
    writer.write_judgements("votes", judged(table(4), 3))
    count = 1 if to == "parquet" else 3
    first = export_store(FeatureStore(path), out, to=to)
    assert first.kept == []
    before = files(out)
    again = export_store(FeatureStore(path), out, to=to)
    assert len(again.kept) == count
    assert {name: before[name] for name in again.kept} == {name: files(out)[name] for name in again.kept}
    damaged = out / again.kept[0]
    os.truncate(damaged, damaged.stat().st_size // 2)
    (out / f"{TEMP}dead").touch()
    assert again.kept[0] in export_store(FeatureStore(path), out, to=to).written
    assert not (out / f"{TEMP}dead").exists()
    dump(path, table(4), "0.1")  # a further noise level changes nothing of the first
    assert len(export_store(FeatureStore(path), out, to=to).kept) == count
    dump(path, table(6))
    dump(path, table(6), "0.1")
    assert export_store(FeatureStore(path), out, to=to).kept == []
    if to == "parquet":
        assert pq.read_metadata(out / "features/sigma-0.1/draw-0/mean.parquet").num_rows == 18


def test_foreign_folders_and_other_selections_are_refused(store, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"holds 'thesis.tex' and no export.json; allowed: a new or empty folder"):
        export_store(store, tmp_path / "thesis", to="parquet")
    with pytest.raises(StoreError, match=r"thesis.tex: a file; allowed"):
        export_store(store, tmp_path / "thesis" / "thesis.tex", to="parquet")
    with pytest.raises(StoreError, match=r"and no export.json; allowed"):
        export_store(store, store.path, to="parquet")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]
    out = tmp_path / "out"
    export_store(store, out, to="parquet", layers=[1], poolings=["mean"])
    before = files(out)
    with pytest.raises(StoreError, match=r'to is "parquet" in this export, "safetensors" was asked for'):
        export_store(store, out, to="safetensors", layers=[1], poolings=["mean"])
    with pytest.raises(
        StoreError, match=r"selection.layers.000 is 1 in this export, 2 was asked for; use another --out"
    ):
        export_store(store, out, to="parquet", layers=[2], poolings=["mean"])
    dump(tmp_path / "other", table(2))
    with pytest.raises(StoreError, match=r"fingerprint is "):
        export_store(FeatureStore(tmp_path / "other"), out, to="parquet", layers=[1], poolings=["mean"])
    (out / "export.json").write_text("[1]")
    with pytest.raises(StoreError, match=r"export.json: damaged"):
        export_store(store, out, to="parquet")
    assert before.keys() == files(out).keys()


def test_a_folder_of_any_name_may_hold_an_export(store, tmp_path):
    made = export_store(store, tmp_path / "pairs", to="safetensors", layers=[1], sigmas=["0.005"], poolings=["mean"])
    assert {"rows.parquet", *(f"pairs/{name}.parquet" for name in store.judgements)} < set(made.written)
    assert made.nbytes == sum(
        p.stat().st_size for p in made.path.rglob("*") if p.suffix in (".parquet", ".safetensors")
    )


def test_what_is_not_there_is_said(store, tmp_path):
    for options, message in [
        ({"layers": [1, 77]}, r"layer \[77\] is not in the store; allowed: 0, 1, 2, 3, 4"),
        ({"sigmas": ["0.3"]}, r"sigma \['0.3'\] is not in the store; allowed: 0.005, 0.1"),
        ({"poolings": ["max"]}, r"pooling \['max'\] is not in the store; allowed: mean, text"),
        ({"draws": [2]}, r"draw \[2\] is not in the store; allowed: 0, 1"),
        ({"draws": [1], "sigmas": ["0.005"]}, "holds no features with the selected"),
        ({"layers": [4], "poolings": ["text"]}, "holds no features with the selected"),
    ]:
        with pytest.raises(StoreError, match=message):
            export_store(store, tmp_path / "out", to="parquet", **options)
    open_store(tmp_path / "empty", config=CONFIG, describe={})
    with pytest.raises(StoreError, match=r"sigma  is not in the store; allowed: $|holds no features"):
        export_store(FeatureStore(tmp_path / "empty"), tmp_path / "out", to="parquet")
    odd = CONFIG | {"poolings": {"../up": "a name that leaves the folder"}}
    writer = open_store(tmp_path / "odd", config=odd, describe={})
    (block,) = writer.plan(table(1), sigma="0", rows_per_shard=6)
    features = {("../up", layer): np.ones((3, 2), np.float32) for layer in (0, 1, 2)}
    writer.write_shard(block, sigma="0", timestep=0.0, rows=table(1), features=features)
    with pytest.raises(StoreError, match=r"pooling '../up' cannot be a file name"):
        export_store(FeatureStore(tmp_path / "odd"), tmp_path / "out", to="parquet")
    assert not (tmp_path / "out").exists()


def test_command(store, tmp_path):
    out = tmp_path / "out"
    options = ["export", store.path, "--to", "parquet", "--out", out]
    done = probekit(*options, "--layer", 3, "--layer", 1, "--sigma", "0.1", "--pooling", "mean", "--draw", 0)
    assert done.returncode == 0, done.stderr
    size = sum(p.stat().st_size for p in out.rglob("*.parquet"))
    assert done.stdout == f"planted: pairs left out: 3 bad_status\n{out}: 2 files written, {scaled(size, 'B')} in all\n"
    (file,) = (out / "features").rglob("*.parquet")
    assert file == out / "features" / "sigma-0.1" / "draw-0" / "mean.parquet"
    assert pq.read_schema(file).names == [*store.rows.columns, "layer_001", "layer_003"]
    done = probekit(*options)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "use another --out" in done.stderr
    assert probekit("export", store.path, "--to", "csv", "--out", tmp_path / "x").returncode == 2
