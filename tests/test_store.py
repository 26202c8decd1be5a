"""The feature store: round trips, plain-h5py readability, kills, damage, additions."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from probekit._types import canonical_sigma, row_id
from probekit.errors import ConfigError, FingerprintError, StoreError
from probekit.store import FeatureStore, blocks, canonical_json, open_store, rows_per_shard, verify_store
from probekit.store import format as fmt
from probekit.store.blocks import _pack
from probekit.store.files import TEMP
from probekit.store.settings import differing

CONFIG = {
    "layers": [{"index": i, "name": f"transformer_blocks.{i - 1}", "stream": "image"} for i in (0, 1, 2)],
    "poolings": {"mean": "arithmetic mean over the image tokens"},
    "noise": {"seed": 0, "scheme": "shared"},
}
WIDTH = 5


def table(prompts: int, images: int = 3) -> pd.DataFrame:
    """Rows of ``prompts`` prompts with ``images`` images each; the digest says which."""
    rows = []
    for prompt in (f"prompt {i}, ü" for i in range(prompts)):
        for image in range(images):
            digest = sha256(f"{prompt}{image}".encode()).digest()
            rows.append(
                {
                    "row_id": row_id(digest, prompt),
                    "prompt": prompt,
                    "image_id": f"images/{prompt}/{image}.png",
                    "image_sha256": digest,
                    "width": 64,
                    "height": 48,
                    "file_bytes": 1000 + image,
                    "status": 0,
                }
            )
    return pd.DataFrame(rows)


def values(key: str, layer: int, sigma: str) -> np.ndarray:
    """Feature of a row: a function of its identity only, exactly representable in float16."""
    seed = int.from_bytes(sha256(f"{key}{layer}{sigma}".encode()).digest()[:8], "big")
    return np.random.default_rng(seed).integers(-512, 512, WIDTH).astype(np.float32) / 8


def dump(path: Path, rows: pd.DataFrame, sigma: str = "0.005", *, size: int = 6, change=None, **config):
    writer = open_store(path, config=CONFIG | config, describe={"name": "tiny"})
    for block in writer.plan(rows, sigma=sigma, rows_per_shard=size):
        with writer.claim(block, sigma=sigma) as mine:
            if not mine:  # another process was quicker
                continue
            part = rows.set_index("row_id").loc[list(block.row_ids)].reset_index()
            features = {
                ("mean", layer): np.stack([values(key, layer, sigma) for key in part["row_id"]]) for layer in (0, 1, 2)
            }
            if change:
                change(part, features)
            writer.write_shard(block, sigma=sigma, timestep=5.0, rows=part, features=features)
    return writer


def expected(store: FeatureStore, layer: int, sigma: str = "0.005") -> np.ndarray:
    return np.stack([values(key, layer, sigma) for key in store.rows["row_id"]])


def shard_bytes(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.glob("shards/**/*")) if p.is_file()}


def left_overs(path: Path) -> list[str]:
    return [p.name for p in path.rglob("*") if p.name.startswith(".")]


def test_round_trip(tmp_path):
    rows = table(7)
    dump(tmp_path / "s", rows)
    store = FeatureStore(tmp_path / "s")
    assert sorted(store.rows["row_id"]) == sorted(rows["row_id"])
    same = rows.set_index("row_id").loc[store.rows["row_id"]].reset_index()
    for column in ("prompt", "image_id", "width", "height", "file_bytes", "status"):
        assert store.rows[column].tolist() == same[column].tolist()
    for layer in (0, 1, 2):
        read = store.read(layer=layer)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, expected(store, layer))
    assert (store.sigmas, store.draws, store.poolings, store.judgements) == (["0.005"], [0], ["mean"], [])
    assert store.layers[2].name == "transformer_blocks.1"
    assert store.n_shards == 4
    assert store.nbytes == sum(p.stat().st_size for p in tmp_path.rglob("*.h5"))
    assert store.summary()["rows"] == 21
    assert json.dumps(store.summary())
    assert not left_overs(tmp_path)


def test_plain_h5py_reads_it(tmp_path):
    dump(tmp_path / "s", table(3))
    store = FeatureStore(tmp_path / "s")
    for path in tmp_path.rglob("*.h5"):
        sidecar = json.loads(path.with_suffix(".json").read_text())
        assert sidecar["sha256"] == sha256(path.read_bytes()).hexdigest()
        with h5py.File(path) as file:
            assert file.attrs["format"].decode() == "probekit-features"
            assert json.loads(file.attrs["config_json"].decode()) == store.config
            assert file.attrs["timestep"] == 5.0
            found: list[str] = []
            file.visit(found.append)
            found = [name for name in found if isinstance(file[name], h5py.Dataset)]
            assert sorted(found) == sorted(sidecar["datasets"])
            for name in found:
                data, record = file[name], sidecar["datasets"][name]
                assert (data.chunks, data.compression, data.is_virtual, data.external) == (None, None, False, None)
                assert data.dtype.str == record["dtype"]
                assert data.id.get_offset() == record["offset"]
                assert not any(h5py.check_vlen_dtype(data.attrs.get_id(key).dtype) for key in data.attrs)
            keys = [bytes(key).hex() for key in file["rows/row_id"][:]]
            np.testing.assert_array_equal(
                file["features/mean/001"][:], np.stack([values(key, 1, "0.005") for key in keys])
            )
            text = file["prompts/text_utf8"][:].tobytes()
            ends = file["prompts/text_offsets"][:]
            assert text[ends[0] : ends[1]].decode() in set(store.rows["prompt"])


def test_same_rows_give_the_same_bytes(tmp_path):
    dump(tmp_path / "a", table(5))
    dump(tmp_path / "b", table(5))
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


def test_rows_and_sigmas_are_added(tmp_path):
    path = tmp_path / "s"
    dump(path, table(4))
    before = shard_bytes(path)
    dump(path, table(9))
    dump(path, table(9))
    assert before.items() <= shard_bytes(path).items()
    dump(path, table(9), "0.10")
    store = FeatureStore(path)
    assert store.sigmas == ["0.005", "0.1"]
    blocks = {sigma: sorted(p.name for p in path.glob(f"shards/{sigma}/*.h5")) for sigma in store.sigmas}
    assert blocks["0.005"] == blocks["0.1"]  # a further noise level takes the blocks of the first
    for sigma, text in (("0.005", "0.005"), ("0.1", "0.10")):
        np.testing.assert_array_equal(store.read(layer=1, sigma=sigma), expected(store, 1, text))
    with pytest.raises(StoreError, match=r"sigma is not given; allowed: 0.005, 0.1"):
        store.read(layer=1)
    dump(path, table(11))
    with pytest.raises(StoreError, match=r"6 of 33 rows have no features at sigma 0.1"):
        FeatureStore(path).read(layer=1, sigma="0.1")


def test_rows_in_other_blocks_at_another_sigma(tmp_path):
    path, rows = tmp_path / "s", table(6)
    dump(path, rows, size=6)
    dump(path, rows, "0", size=4)  # the old blocks are too large, so new ones are cut
    store = FeatureStore(path)
    for sigma in ("0", "0.005"):
        np.testing.assert_array_equal(store.read(layer=2, sigma=sigma), expected(store, 2, sigma))
    assert len(store.rows) == 18


def test_several_draws(tmp_path):
    writer = dump(tmp_path / "s", table(2))
    (block,) = writer.plan(table(2), sigma="0.005", draw=1, rows_per_shard=6)
    features = {("mean", layer): np.full((6, WIDTH), layer, np.float32) for layer in (0, 1, 2)}
    rows = table(2).set_index("row_id").loc[list(block.row_ids)].reset_index()
    writer.write_shard(block, sigma="0.005", draw=1, timestep=5.0, rows=rows, features=features)
    store = FeatureStore(tmp_path / "s")
    assert store.draws == [0, 1]
    assert (store.read(layer=2, draw=1) == 2).all()
    np.testing.assert_array_equal(store.read(layer=2, draw=0), expected(store, 2))


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 5))
def test_blocks_hold_whole_prompts(sizes, size):
    prompts = [[f"{i}-{j}" for j in range(n)] for i, n in enumerate(sizes)]
    blocks = _pack(prompts, size)
    assert [row for block in blocks for row in block] == [row for prompt in prompts for row in prompt]
    assert all(1 <= len(block) <= size for block in blocks)
    for prompt in prompts:
        holders = sum(bool(set(prompt) & set(block)) for block in blocks)
        assert holders == -(-len(prompt) // size)  # no prompt is cut unless it is larger than a block


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"noise": {"seed": 1, "scheme": "shared"}}, "noise.seed is 0 in this store, 1 was asked for"),
        ({"poolings": {"max": "largest"}}, 'poolings.max is absent in this store, "largest" was asked for'),
        ({"layers": CONFIG["layers"][:2]}, "layers.002 is {.*} in this store, absent was asked for"),
        ({"new": True}, "new is absent in this store, true was asked for"),
    ],
)
def test_other_settings_are_refused(tmp_path, config, message):
    dump(tmp_path / "s", table(2))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(FingerprintError, match=message + ".*; use another --out, or the store's value"):
        open_store(tmp_path / "s", config=CONFIG | config, describe={})
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_all_settings_that_differ_are_named(tmp_path):
    dump(tmp_path / "s", table(2))
    config = {"noise": {"seed": 1, "scheme": "none"}, "new": True}
    text = (
        "new is absent in this store, true was asked for; "
        'noise.scheme is "shared" in this store, "none" was asked for; '
        "noise.seed is 0 in this store, 1 was asked for; use another --out"
    )
    with pytest.raises(FingerprintError, match=text):
        open_store(tmp_path / "s", config=CONFIG | config, describe={})
    many = {f"new{i}": {"x": i} for i in range(8)}
    with pytest.raises(
        FingerprintError, match=r"new4 is absent .* was asked for; more differs in new5, new6, new7; use"
    ):
        open_store(tmp_path / "s", config=CONFIG | many, describe={})


def test_damage_that_a_command_does_not_mend_is_said_at_its_start(tmp_path, caplog):
    path, rows = tmp_path / "s", table(6)
    dump(path, rows, sigma="0.1")
    assert not caplog.records
    bad, other, *_ = sorted(path.rglob("*.h5"))
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-1])
    writer = dump(path, rows, sigma="0.005")
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{bad}: {len(whole) - 1} bytes instead of {len(whole)}; this command does not ask for its noise level and "
        "draw, and leaves it so: delete it and its .json or .h5 companion, and run the same probekit command again "
        "that made the store"
    )
    os.truncate(other, 9)
    assert writer.plan(rows, sigma="0.005", rows_per_shard=6) == []
    assert f"{len(whole) - 1} bytes instead of {len(whole)} (and 1 more); this" in caplog.text
    caplog.clear()
    dump(path, rows, sigma="0.1")  # this one does it again
    assert not caplog.records
    assert bad.read_bytes() == whole


def test_all_noise_levels_are_planned_with_one_scan(tmp_path, monkeypatch):
    path, rows = tmp_path / "s", table(7)
    writer = dump(path, table(3), sigma="0.1")
    scans, scan = [], blocks.scan
    monkeypatch.setattr(blocks, "scan", lambda *args, **kwargs: scans.append(args) or scan(*args, **kwargs))
    places = [("0.005", 0), ("0.1", 0), ("0.1", 1)]
    dry = open_store(path, config=CONFIG, describe={"name": "tiny"}, dry_run=True)
    planned = dry.blocks(rows, places=places, rows_per_shard=6)
    assert len(scans) == 1
    assert list(planned) == places
    assert writer.blocks(rows, places=places, rows_per_shard=6) == planned  # and it writes its plans
    for sigma, draw in places:
        assert writer.blocks(rows, places=[(sigma, draw)], rows_per_shard=6) == {(sigma, draw): planned[sigma, draw]}


def test_pairs_without_rows_are_named_once(tmp_path, caplog):
    rows = table(4, images=2)
    dump(tmp_path / "s", rows[:6])
    store = FeatureStore(tmp_path / "s")
    frame = judged(rows, 4)
    assert store.bind(frame).pairs().left_out["missing_rows"] == 1
    assert store.bind(frame).pairs(split="train").left_out["missing_rows"] == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{store.path}: 1 judged pair has no rows in this store: pair 3"
    ]


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"holds 'thesis.tex' and no store.json"):
        open_store(tmp_path, config=CONFIG, describe={})
    with pytest.raises(StoreError, match=r"a file; allowed"):
        open_store(tmp_path / "thesis.tex", config=CONFIG, describe={})
    with pytest.raises(StoreError, match=r"cannot be written \(Not a directory\); allowed"):
        open_store(tmp_path / "thesis.tex" / "store", config=CONFIG, describe={})
    with pytest.raises(StoreError, match=r"no store.json"):
        FeatureStore(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_versions(tmp_path):
    dump(tmp_path, table(2))
    file = tmp_path / "store.json"
    content = fmt.unseal(file.read_bytes())
    file.write_bytes(fmt.seal(content | {"format_version": "1.7", "added_later": 1}))
    assert len(FeatureStore(tmp_path).rows) == 6
    file.write_bytes(fmt.seal(content | {"format_version": "2.0"}))
    with pytest.raises(StoreError, match=r"format version is 2.0; this probekit reads 1.x"):
        FeatureStore(tmp_path)
    file.write_bytes(file.read_bytes().replace(b"tiny", b"tony"))
    with pytest.raises(StoreError, match=r"carries its own SHA-256"):
        FeatureStore(tmp_path)


def test_every_flipped_byte_is_found(tmp_path):
    """Reading everything after any one flipped byte of a shard or sidecar is an error that names the shard."""
    dump(tmp_path, table(2))
    (h5,) = tmp_path.rglob("*.h5")
    random.seed(0)
    for path in (h5, h5.with_suffix(".json")):
        intact = path.read_bytes()
        for position in random.sample(range(len(intact)), 60):
            path.write_bytes(intact[:position] + bytes([intact[position] ^ 16]) + intact[position + 1 :])
            with pytest.raises(StoreError, match=h5.stem + ".*run the same probekit command again"):
                read_everything(tmp_path)
        path.write_bytes(intact)
    read_everything(tmp_path)


def read_everything(path: Path) -> None:
    """Read every dataset of every shard."""
    store = FeatureStore(path)
    for layer in (0, 1, 2):
        store.read(layer=layer)
    for shard in store._shards:
        for name in shard.sidecar.datasets:
            for _ in shard.chunks(name):
                pass


@pytest.mark.parametrize("damage", ["truncated", "longer", "gone", "no sidecar", "swapped sidecar", "link"])
def test_damaged_shards_are_refused_and_redone(tmp_path, damage):
    path = tmp_path / "s"
    dump(path, table(6))
    intact = shard_bytes(path)
    first, second = sorted(path.rglob("*.h5"))[:2]
    if damage == "truncated":
        os.truncate(first, 4000)
    elif damage == "longer":
        first.write_bytes(first.read_bytes() + b"x")
    elif damage == "gone":
        first.unlink()
    elif damage == "no sidecar":
        first.with_suffix(".json").unlink()
    elif damage == "swapped sidecar":
        first.with_suffix(".json").write_bytes(second.with_suffix(".json").read_bytes())
    else:
        first.rename(tmp_path / "elsewhere.h5")
        first.symlink_to(tmp_path / "elsewhere.h5")
    if damage == "no sidecar":  # never committed: simply not there
        assert len(FeatureStore(path).rows) == 12
    else:
        with pytest.raises(StoreError, match=first.stem + ".*run the same probekit command again"):
            FeatureStore(path)
    dump(path, table(6))
    assert shard_bytes(path) == intact
    np.testing.assert_array_equal(FeatureStore(path).read(layer=0), expected(FeatureStore(path), 0))


@pytest.mark.parametrize(("rows", "size"), [(table(2), 6), (table(6), 5)])
def test_a_damaged_shard_that_would_not_be_done_again_is_said_before_the_work(tmp_path, rows, size):
    """Fewer rows, or smaller shards."""
    dump(tmp_path, table(6))
    bad = next(path for path in sorted(tmp_path.rglob("*.h5")) if rows["row_id"][0] not in keys_of(path))
    os.truncate(bad, 4000)
    for dry_run in (True, False):
        writer = open_store(tmp_path, config=CONFIG, describe={"name": "tiny"}, dry_run=dry_run)
        with pytest.raises(StoreError, match=rf"{bad.name}: 4000 bytes .*: run probekit verify .* --repair first"):
            writer.plan(rows, sigma="0.005", rows_per_shard=size)
    assert any(problem.repaired for problem in verify_store(tmp_path, repair=True).problems)
    dump(tmp_path, rows, size=size)
    FeatureStore(tmp_path).read(layer=1)


def keys_of(h5: Path) -> list[str]:
    with h5py.File(h5) as file:
        return [bytes(key).hex() for key in file["rows/row_id"][:]]


def test_dtype_rule(tmp_path):
    rng = np.random.default_rng(0)

    def change(part, features):
        features["mean", 1][0, 0] = 40000  # passes half of float16's range
        # A large common part and a small difference: float16 would round the difference away.
        features["mean", 2][:] = 1000 + rng.normal(0, 0.1, features["mean", 2].shape)

    dump(tmp_path, table(4), size=100, change=change)
    (sidecar,) = (json.loads(p.read_text()) for p in tmp_path.glob("shards/*/*.json"))
    records = [sidecar["datasets"][f"features/mean/00{layer}"] for layer in (0, 1, 2)]
    assert [record["dtype"] for record in records] == ["<f2", "<f4", "<f4"]
    assert records[1]["absmax"] == 40000
    assert records[2]["noise_ratio"] > 1e-3
    assert FeatureStore(tmp_path).read(layer=1).max() == 40000


@given(arrays(np.float32, (8, 3), elements=st.floats(-60000, 60000, width=32)))
def test_float16_only_where_it_is_safe(data):
    prompt = np.repeat(np.arange(4), 2)
    dtype, figures = fmt.choose_dtype(data, np.ones(8, bool), prompt)
    assert figures.absmax == np.abs(data).max()
    if dtype == "<f2":
        stored = data.astype(np.float16).astype(np.float64)
        signal = data[0::2].astype(np.float64) - data[1::2]
        noise = (stored[0::2] - stored[1::2]) - signal
        ratio = [(n**2).sum() / (s**2).sum() for n, s in zip(noise.T, signal.T, strict=True) if (s**2).sum() > 0]
        assert figures.absmax < 32752
        assert not ratio or np.quantile(ratio + [0] * (3 - len(ratio)), 0.99) <= 1e-3 * (1 + 1e-9)


def test_lone_images_stay_float32():
    assert fmt.choose_dtype(np.ones((4, 2), np.float32), np.ones(4, bool), np.arange(4))[0] == "<f4"


def test_bad_rows_are_nan_and_their_pairs_counted(tmp_path):
    rows = table(4)
    unreadable, infinite = rows["row_id"][0], rows["row_id"][4]
    rows.loc[0, "status"] = 1

    def change(part, features):
        features["mean", 1][part["row_id"] == infinite] = np.inf

    writer = dump(tmp_path, rows, change=change)
    ids = rows["row_id"]
    frame = pd.DataFrame(
        {
            "pair_id": list("abcde"),
            "row_a": [ids[0], ids[3], ids[6], ids[9], ids[9]],
            "row_b": [ids[1], ids[4], ids[7], "0" * 64, ids[10]],
            "label": [1.0, 0.0, 0.5, 1.0, np.nan],
            "split": ["train", "train", "train", "test", "test"],
            "group": list("12345"),
            "source": list("vwxyz"),
        }
    )
    writer.write_judgements("votes", frame)
    store = FeatureStore(tmp_path)
    status = store.rows.set_index("row_id")["status"]
    assert (status[unreadable], status[infinite], (status != 0).sum()) == (1, 2, 2)
    for layer in (0, 1, 2):
        np.testing.assert_array_equal(np.isnan(store.read(layer=layer)).any(axis=1), store.rows["status"] != 0)
    pairs = store.pairs()
    assert pairs.left_out == {"missing_rows": 1, "bad_status": 2, "no_label": 1}
    assert pairs.excluded.columns.tolist() == ["pair_id", "source", "split", "reason"]
    assert pairs.excluded.to_numpy().tolist() == [
        ["a", "v", "train", "bad_status"],
        ["b", "w", "train", "bad_status"],
        ["d", "y", "test", "missing_rows"],
        ["e", "z", "test", "no_label"],
    ]
    assert pairs.frame["source"].tolist() == ["x"]
    assert store.rows["row_id"][pairs.rows[0]].tolist() == [ids[6], ids[7]]
    assert pairs.label.tolist() == [0.5]
    assert len(store.pairs(split="test").label) == 0
    assert store.bind(frame).pairs(split="train").left_out["bad_status"] == 2
    with pytest.raises(StoreError, match=r"no split 'tset'; allowed: test, train"):
        store.pairs(split="tset")
    with pytest.raises(StoreError, match=r"no column 'label'"):
        store.bind(frame.drop(columns="label"))
    with pytest.raises(StoreError, match=r"judgements 'other' is not in the store; allowed: votes"):
        store.pairs(judgements="other")
    with pytest.raises(StoreError, match=r"judgements are named '../up'"):
        writer.write_judgements("../up", frame)


def test_a_picture_that_was_replaced_leaves_a_row_that_no_other_noise_level_needs(tmp_path):
    rows = table(4)
    gone = rows.assign(status=[1] + [0] * 11)
    dump(tmp_path, gone, size=100)
    digest = sha256(b"another file").digest()
    rows.loc[0, ["row_id", "image_sha256"]] = [row_id(digest, rows["prompt"][0]), digest]
    dump(tmp_path, rows, size=100)
    dump(tmp_path, rows, "0.1", size=100)
    store = FeatureStore(tmp_path)
    assert (len(store.rows), (store.rows["status"] == 1).sum()) == (13, 1)
    old = store.rows.index[store.rows["row_id"] == gone["row_id"][0]][0]
    pairs = np.array([[old, (old + 1) % 13], [(old + 2) % 13, (old + 3) % 13], [(old + 1) % 13, old]])
    for sigma in ("0.005", "0.1"):
        read, wanted = store.read(layer=1, sigma=sigma), expected(store, 1, sigma)
        wanted[old] = np.nan
        np.testing.assert_array_equal(read, wanted)
        different = store.differences(layer=1, pairs=pairs, sigma=sigma)
        np.testing.assert_array_equal(different, wanted[pairs[:, 0]] - wanted[pairs[:, 1]])
        batches = list(store.batches(layers=[1], sigma=sigma, batch_bytes=4 * WIDTH))
        np.testing.assert_array_equal(np.concatenate([found[1] for _, found in batches]), wanted)
    assert verify_store(tmp_path, deep=True).problems == []
    dump(tmp_path, table(5), size=100)
    with pytest.raises(StoreError, match=r"3 of 16 rows have no features at sigma 0.1"):
        FeatureStore(tmp_path).read(layer=1, sigma="0.1")
    assert len(verify_store(tmp_path).problems) == 1


def judged(rows, pairs):
    """Judgements of the first `pairs` pairs of neighbouring rows, with the columns that the format demands."""
    ids = rows["row_id"].to_numpy()
    return pd.DataFrame(
        {
            "pair_id": [f"pair {i}" for i in range(pairs)],
            "row_a": ids[0 : 2 * pairs : 2],
            "row_b": ids[1 : 2 * pairs : 2],
            "label": 1.0,
            "group": [f"group {i}" for i in range(pairs)],
            "split": "train",
        }
    )


def test_judgements_are_never_lost(tmp_path):
    rows = table(4, images=2)
    writer, whole = dump(tmp_path, rows), judged(rows, 4)
    path = writer.write_judgements("votes", whole[:3])
    writer.write_judgements("votes", whole.assign(label=0.0)[::-1])  # more pairs, other labels, another order
    assert FeatureStore(tmp_path).pairs().label.tolist() == [0.0] * 4
    before = path.read_bytes()
    other = whole.assign(pair_id=[f"other {i}" for i in range(4)])
    for frame, lost in ((whole[:1], 3), (other, 4)):
        with pytest.raises(StoreError) as info:
            writer.write_judgements("votes", frame)
        assert str(info.value) == (
            f"{path}: {lost} of its 4 pairs are not in the new set of this name; "
            f"use a preference file of another name, or delete {path} to replace it"
        )
        assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["votes.json", "votes.parquet"]
    writer.write_judgements("other", other)
    path.unlink()
    writer.write_judgements("votes", whole[:1])
    assert len(FeatureStore(tmp_path).pairs(judgements="votes").label) == 1
    whole.drop(columns="pair_id").to_parquet(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(StoreError, match="4 of its 4 pairs are not in the new set"):
        writer.write_judgements("votes", whole)
    path.write_bytes(b"damaged")
    with pytest.raises(StoreError, match=r"votes.parquet: cannot be read as judgements \(.*\); delete it"):
        writer.write_judgements("votes", whole)


def test_judgements_of_others_get_defaults_or_a_message(tmp_path):
    rows = table(3, images=2)
    dump(tmp_path, rows)
    store, frame = FeatureStore(tmp_path), judged(rows, 3)
    bound = store.bind(frame).pairs().frame
    assert bound["source"].tolist() == [""] * 3
    assert bound["weight"].tolist() == [1.0] * 3
    holes = frame.assign(source=["kind", None, "kind"], weight=[2.0, 3.0, np.nan])
    bound = store.bind(holes).pairs().frame
    assert bound["source"].tolist() == ["kind", "", "kind"]
    assert bound["weight"].tolist() == [2.0, 3.0, 1.0]
    assert store.bind(frame.assign(source=None)).pairs().frame["source"].tolist() == [""] * 3
    for column in frame:
        with pytest.raises(StoreError, match=f"the judgements have no column '{column}'; needed: pair_id, row_a, "):
            store.bind(frame.drop(columns=column))
    with pytest.raises(StoreError, match="1 judgements have no 'group'; allowed: a value in each"):
        store.bind(frame.assign(group=["x", None, "y"]))


def test_facts_of_the_backbone_can_be_corrected(tmp_path, caplog):
    rows = table(2)
    dump(tmp_path, rows)
    file = tmp_path / "store.json"
    before, fingerprint = file.read_bytes(), FeatureStore(tmp_path).fingerprint
    shards = shard_bytes(tmp_path)
    open_store(tmp_path, config=CONFIG, describe={"name": "tiny"})
    assert file.read_bytes() == before
    assert not caplog.records
    writer = open_store(tmp_path, config=CONFIG, describe={"name": "tinier", "training_images": 10})
    assert writer.describe == {"name": "tinier", "training_images": 10}
    assert [record.getMessage() for record in caplog.records] == [
        f'{file}: name was "tiny", is now "tinier"',
        f"{file}: training_images was absent, is now 10",
    ]
    store = FeatureStore(tmp_path)
    assert (store.describe, store.fingerprint) == (writer.describe, fingerprint)
    assert json.loads(file.read_bytes())["provenance"] == json.loads(before)["provenance"]
    assert shard_bytes(tmp_path) == shards
    after = file.read_bytes()
    with pytest.raises(FingerprintError):
        open_store(tmp_path, config=CONFIG | {"noise": None}, describe={"name": "wrong"})
    assert file.read_bytes() == after
    assert not left_overs(tmp_path)


def test_wrong_coordinates(tmp_path):
    dump(tmp_path, table(2))
    store = FeatureStore(tmp_path)
    with pytest.raises(StoreError, match=r"layer 7 is not in the store; allowed: 0, 1, 2"):
        store.read(layer=7)
    with pytest.raises(StoreError, match=r"sigma '0.2' is not in the store; allowed: 0.005"):
        store.read(layer=1, sigma="0.20")
    np.testing.assert_array_equal(store.read(layer=1, sigma="5e-3", pooling="mean", draw=0), store.read(layer=1))


def test_empty_store(tmp_path):
    open_store(tmp_path, config=CONFIG, describe={})
    store = FeatureStore(tmp_path)
    assert len(store.rows) == 0
    with pytest.raises(StoreError, match=r"sigma is not given; allowed: none"):
        store.read(layer=1)


@given(st.decimals(0, 1, allow_nan=False, places=6))
def test_sigma_has_one_spelling(value):
    text = canonical_sigma(str(value))
    assert float(text) == float(value)
    assert "e" not in text.lower()
    assert canonical_sigma(text) == text == canonical_sigma(f"{value:e}")


@pytest.mark.parametrize("text", ["-1", "1.5", "nan", "inf", "low", ""])
def test_sigma_is_a_number(text):
    with pytest.raises(ConfigError, match=r"sigma is .*; allowed: a decimal number from 0 to 1"):
        canonical_sigma(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key != fmt.SEAL), json_values, max_size=4))
def test_fingerprint_survives_json_and_order(config):
    again = dict(reversed(json.loads(json.dumps(config)).items()))
    assert fmt.fingerprint(again) == fmt.fingerprint(config)
    assert not list(differing(config, again))
    unsealed = fmt.unseal(fmt.seal(config))
    assert {key: value for key, value in unsealed.items() if key != fmt.SEAL} == config
    assert canonical_json(config).encode()


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_store
print("ready", flush=True)
test_store.dump(Path({path!r}), test_store.table(60), size=6)
"""


@pytest.mark.parametrize("seed", range(3))
def test_killed_dump_ends_with_the_same_bytes(tmp_path, seed):
    """Kill a dump of 30 shards at a random moment, go on, compare with an uninterrupted one."""
    dump(tmp_path / "whole", table(60))
    path = tmp_path / "killed"
    script = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    wanted = random.Random(seed).randrange(1, 20)
    while len(list(path.glob("shards/*/*.json"))) < wanted and process.poll() is None:
        time.sleep(0.001)
    time.sleep(random.Random(seed).random() * 0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    done = len(list(path.glob("shards/*/*.json")))
    assert 0 < done < 30, "killed too late to say anything"
    FeatureStore(path)  # what is there is whole
    dump(path, table(60))
    assert shard_bytes(path) == shard_bytes(tmp_path / "whole")
    assert not left_overs(path)


STAGES = ["_set_attributes", "fsync", "unlink", "replace", "write_atomically"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("call", [0, 1])
def test_failure_at_each_stage_loses_nothing(tmp_path, monkeypatch, stage, call):
    """An error at any step of a commit leaves every other shard whole, no temporary file, and a clear message."""
    from probekit.store import hdf5, writer

    path = tmp_path / "s"
    dump(path, table(2))
    where = {"_set_attributes": hdf5, "write_atomically": writer, "fsync": os}.get(stage, Path)
    genuine, calls = getattr(where, stage), []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) > call and str(args[0]).find(".lock-") < 0:
            raise OSError(28, "No space left on device")
        return genuine(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, stage, fails)
        if stage == "write_atomically":
            with pytest.raises((StoreError, OSError)):
                dump(path, table(6))
        else:
            with pytest.raises((StoreError, OSError), match=r"No space left on device"):
                dump(path, table(6))
    assert len(FeatureStore(path).read(layer=0)) in (6, 12)
    dump(path, table(6))
    store = FeatureStore(path)
    np.testing.assert_array_equal(store.read(layer=1), expected(store, 1))
    assert not left_overs(path)


def test_small_disk_is_said_before_writing(tmp_path, monkeypatch):
    writer = dump(tmp_path, table(2))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match=r"needs up to 16.8 MB, 1 kB are free; make space and run the same"):
        dump(tmp_path, table(4))
    assert writer.plan(table(2), sigma="0.005", rows_per_shard=6) == []


def test_a_locked_temporary_file_is_left_alone(tmp_path):
    from probekit.store.files import temporary

    dump(tmp_path, table(2))
    (tmp_path / f"{TEMP}dead").touch()
    with temporary(tmp_path / "living") as (temp, _):
        open_store(tmp_path, config=CONFIG, describe={})
        assert temp.exists()
        assert not (tmp_path / f"{TEMP}dead").exists()


def test_two_identical_dumps_at_once(tmp_path):
    script = KILLED.format(tests=str(Path(__file__).parent), path=str(tmp_path / "s"))
    processes = [subprocess.Popen([sys.executable, "-W", "error", "-c", script]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    dump(tmp_path / "whole", table(60))
    assert shard_bytes(tmp_path / "s") == shard_bytes(tmp_path / "whole")
    assert not left_overs(tmp_path)


def write_block(writer, block, rows):
    part = rows.set_index("row_id").loc[list(block.row_ids)].reset_index()
    features = {("mean", at): np.stack([values(key, at, "0.005") for key in part["row_id"]]) for at in (0, 1, 2)}
    return writer.write_shard(block, sigma="0.005", timestep=5.0, rows=part, features=features)


def test_two_dumps_that_cut_rows_otherwise_store_no_row_twice(tmp_path):
    """Blocks of one command that another one does not take up, since they are too large for it."""
    rows = table(8)
    first = open_store(tmp_path, config=CONFIG, describe={})
    large = first.plan(rows, sigma="0.005", rows_per_shard=12)
    second = open_store(tmp_path, config=CONFIG, describe={})
    small = second.plan(rows, sigma="0.005", rows_per_shard=6)
    assert [len(large), len(small)] == [2, 4]
    with first.claim(large[0], sigma="0.005") as mine:  # computes while the other one stores half of its rows
        assert mine
        write_block(second, small[0], rows)
        with pytest.raises(
            StoreError, match=r"another command stored 6 of its rows meanwhile, cut into other blocks; "
        ):
            write_block(first, large[0], rows)
    with (
        pytest.raises(StoreError, match="run the same command again"),
        first.claim(large[0], sigma="0.005"),
    ):
        pytest.fail("half of its rows are stored")
    write_block(first, large[1], rows)
    for block in small[2:]:
        with second.claim(block, sigma="0.005") as mine:
            assert not mine  # all of its rows are stored
    (rest,) = first.plan(rows, sigma="0.005", rows_per_shard=12)
    write_block(first, rest, rows)
    store = FeatureStore(tmp_path)
    assert sorted(store.rows["row_id"]) == sorted(rows["row_id"])
    np.testing.assert_array_equal(store.read(layer=1), expected(store, 1))
    assert not left_overs(tmp_path)


AXES = {
    "layers": [{"index": i, "name": name, "stream": "image"} for i, name in enumerate(["in", "blocks.0", "out"])],
    "poolings": {"mean": "mean", "grid4": "means of a 4 x 4 grid", "text_mean": "mean over text tokens"},
    "pooling_layers": {"text_mean": [0, 1]},
}
WIDTHS = {"mean": 3, "grid4": 48, "text_mean": 4}


def several_poolings(rows: pd.DataFrame) -> dict[tuple[str, int], np.ndarray]:
    """Features that differ in every place; those of the output point (layer 2) overflow float16."""
    rng = np.random.default_rng(0)
    return {
        (pooling, layer): rng.normal(60000 * (layer == 2), 1, (len(rows), width)).astype(np.float32)
        for pooling, width in WIDTHS.items()
        for layer in range(2 if pooling == "text_mean" else 3)
    }


def write_axes(path: Path, change=None):
    writer = open_store(path, config=AXES, describe={"name": "tiny"})
    (block,) = writer.plan(table(4), sigma="0.005", rows_per_shard=100)
    rows = table(4).set_index("row_id").loc[list(block.row_ids)].reset_index()
    features = several_poolings(rows)
    if change:
        change(features)
    writer.write_shard(block, sigma="0.005", timestep=5.0, rows=rows, features=features)
    return features


def test_poolings_have_widths_and_layers_of_their_own(tmp_path):
    features = write_axes(tmp_path)
    store = FeatureStore(tmp_path)
    assert [layer.index for layer in store.layers_of("text_mean")] == [0, 1]
    assert store.layers_of("grid4") == store.layers
    for (pooling, layer), values in features.items():
        read = store.read(layer=layer, pooling=pooling)
        assert read.shape == (12, WIDTHS[pooling])
        np.testing.assert_allclose(read, values, rtol=0, atol=2e-3)  # rounded to float16 where that is safe
    (sidecar,) = (json.loads(path.read_text()) for path in tmp_path.glob("shards/*/*.json"))
    stored = {name: record for name, record in sidecar["datasets"].items() if name.startswith("features/")}
    assert {name: record["dtype"] for name, record in stored.items()} == {
        fmt.dataset_name(pooling, layer): "<f4" if layer == 2 else "<f2" for pooling, layer in features
    }
    assert all(record["noise_ratio"] is not None for name, record in stored.items() if not name.endswith("2"))
    with h5py.File(next(tmp_path.rglob("*.h5"))) as file:
        assert {
            f"features/{pooling}/{layer}" for pooling in file["features"] for layer in file["features"][pooling]
        } == (set(stored))
    with pytest.raises(StoreError, match=r"pooling 'text_mean' does not exist at layer 2; allowed: 0, 1$"):
        store.read(layer=2, pooling="text_mean")
    with pytest.raises(StoreError, match=r"pooling is not given; allowed: grid4, mean, text_mean"):
        store.read(layer=2)
    with pytest.raises(StoreError, match=r"pooling 'max' is not in the store"):
        store.layers_of("max")
    assert store.summary()["poolings"] == {"grid4": "3 layers", "mean": "3 layers", "text_mean": "2 layers"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda features: features.pop(("grid4", 2)), r"lacks features for \[\('grid4', 2\)\] and has \[\]"),
        (
            lambda features: features.update({("text_mean", 2): features["mean", 2]}),
            r"lacks features for \[\] and has \[\('text_mean', 2\)\], which the store's config does not",
        ),
    ],
)
def test_a_shard_holds_the_features_of_the_configuration_and_no_others(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_axes(tmp_path, change)
    assert not list(tmp_path.rglob("*.h5"))


def test_the_layers_of_a_pooling_are_part_of_the_fingerprint(tmp_path):
    write_axes(tmp_path)
    fewer = AXES | {"pooling_layers": {"text_mean": [0]}}
    with pytest.raises(FingerprintError, match=r"pooling_layers.text_mean.001 is 1 in this store, absent was asked"):
        open_store(tmp_path, config=fewer, describe={})
    for wrong in ({"max": [0]}, {"mean": []}, {"mean": [0, 1, 2]}, {"mean": [1, 0]}, {"mean": [7]}):
        with pytest.raises(ValueError, match="some but not all of the layers"):
            open_store(tmp_path / "new", config=AXES | {"pooling_layers": wrong}, describe={})


@given(st.integers(1, 2**40), st.integers(1, 2**33))
def test_a_shard_of_planned_rows_fits(values, shard_bytes):
    rows = rows_per_shard(values_per_row=values, shard_bytes=shard_bytes)
    assert rows == 1 or 4 * rows * values <= shard_bytes < 4 * (rows + 1) * values


def test_the_dtype_rule_does_not_depend_on_how_much_it_looks_at_together(monkeypatch):
    values = np.random.default_rng(0).normal(5, 1, (60, 48)).astype(np.float32)
    prompt = np.repeat(np.arange(20), 3)
    dtype, whole = fmt.choose_dtype(values, np.ones(60, bool), prompt)
    monkeypatch.setattr(fmt, "_CHOICE_VALUES", 100)
    again, parts = fmt.choose_dtype(values, np.ones(60, bool), prompt)
    assert (dtype, whole.absmax) == (again, parts.absmax)
    assert parts[1:] == pytest.approx(whole[1:])


def test_draws_are_planned_resumed_and_read_apart(tmp_path):
    rows, path = table(6), tmp_path / "s"
    dump(path, rows)
    writer = open_store(path, config=CONFIG, describe={"name": "tiny"})
    blocks = writer.plan(rows, sigma="0.005", draw=1, rows_per_shard=6)
    assert sorted(row for block in blocks for row in block.row_ids) == sorted(rows["row_id"])
    assert {block.name for block in blocks} == {p.stem for p in path.rglob("*.h5")}  # the blocks of draw 0

    def write(block, *, broken=False):
        with writer.claim(block, sigma="0.005", draw=1) as mine:
            if mine:
                part = rows.set_index("row_id").loc[list(block.row_ids)].reset_index()
                features = {("mean", layer): np.full((6, WIDTH), 10 + layer, np.float32) for layer in (0, 1, 2)}
                features["mean", 0][0] = np.nan if broken else 10
                writer.write_shard(block, sigma="0.005", draw=1, timestep=5.0, rows=part, features=features)
            return mine

    assert write(blocks[0])
    assert not write(blocks[0])
    with pytest.raises(StoreError, match=r"12 of 18 rows have no features at sigma 0.005, draw 1; .*and draw too"):
        FeatureStore(path).read(layer=1, draw=1)
    rest = writer.plan(rows, sigma="0.005", draw=1, rows_per_shard=6)
    assert [block.name for block in rest] == [block.name for block in blocks[1:]]
    write(rest[0], broken=True)
    write(rest[1])
    assert writer.plan(rows, sigma="0.005", draw=1, rows_per_shard=6) == []
    dump(path, rows, "0")
    store = FeatureStore(path)
    assert store.coordinates == [("0", 0), ("0.005", 0), ("0.005", 1)]
    assert (store.read(layer=2, sigma="0.005", draw=1)[store.rows["status"] == 0] == 12).all()
    good = (store.rows["status"] == 0).to_numpy()
    assert good.sum() == 17  # a row that is bad in one draw is bad in all
    np.testing.assert_array_equal(store.read(layer=2, sigma="0.005", draw=0), expected(store, 2))
    with pytest.raises(StoreError, match=r"draw is not given; allowed: 0, 1"):
        store.read(layer=2, sigma="0.005")
    with pytest.raises(StoreError, match=r"draw 1 is not in the store; allowed: 0$"):
        store.read(layer=2, sigma="0", draw=1)
    np.testing.assert_array_equal(store.read(layer=2, sigma="0"), expected(store, 2, "0"))


def test_resolution_of_noise_levels_is_recorded_beside_the_facts(tmp_path):
    writer = dump(tmp_path, table(2))
    other = open_store(tmp_path, config=CONFIG, describe={"name": "tiny"})
    shards, fingerprint = shard_bytes(tmp_path), writer.fingerprint
    writer.record_resolution("0.0050", ratio=2.5, rows=16)
    other.record_resolution("0.1", ratio=3.0, rows=16)  # opened before the first was recorded
    writer.record_resolution("1", ratio=None, rows=0, note="the device has no bfloat16")
    other.record_resolution("0.005", ratio=7.0, rows=16)  # a worker that measured it too: the first one stays
    other.record_resolution("0.005", ratio=None, rows=0, note="the device has no bfloat16")
    entries = {
        "0.005": {"ratio": 2.5, "resolved": False, "rows": 16, "note": ""},
        "0.1": {"ratio": 3.0, "resolved": True, "rows": 16, "note": ""},
        "1": {"ratio": None, "resolved": None, "rows": 0, "note": "the device has no bfloat16"},
    }
    assert FeatureStore(tmp_path).sigma_resolution == writer.describe["sigma_resolution"] == entries
    other.record_resolution("0.005", ratio=7.0, rows=16)
    assert other.describe == writer.describe
    renamed = open_store(tmp_path, config=CONFIG, describe={"name": "tinier"})
    assert renamed.describe == {"name": "tinier", "sigma_resolution": entries}
    store = FeatureStore(tmp_path)
    assert (store.sigma_resolution, store.fingerprint) == (entries, fingerprint)
    assert store.summary()["sigma_resolution"] == entries
    assert store.summary()["backbone"] == {"name": "tinier"}
    assert shard_bytes(tmp_path) == shards
    assert not left_overs(tmp_path)


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_store import StoreError, dump, table
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    dump(Path(sys.argv[1]), table(60))
except StoreError as error:
    print(error)
"""


def test_a_disk_that_fills_up_in_the_middle_of_a_file_is_one_line(tmp_path):
    """In another process: HDF5 itself would crash when it cannot write, not only raise."""
    dump(tmp_path / "whole", table(60))
    for limit in (0, 1000, 3000, 9000):
        out = tmp_path / str(limit)
        command = [sys.executable, "-c", LIMITED, str(out), str(limit), str(Path(__file__).parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "cannot be written (File too large)" in done.stdout
        assert len(done.stdout.splitlines()) == 1
        assert not list(out.rglob(".tmp-*"))
        dump(out, table(60))
        assert shard_bytes(out) == shard_bytes(tmp_path / "whole")
