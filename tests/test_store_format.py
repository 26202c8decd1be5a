"""What a store looks like on disk, sentence by sentence of ``FORMAT.md``: sections in its order.

Damage and hostile files are in ``test_hostile.py``, archives of every version in ``test_store_archives.py``.
"""

import hashlib
import json
import os
from itertools import pairwise
from pathlib import Path

import damages
import h5py
import numpy as np
import pandas as pd
import pytest

from probekit.errors import StoreError
from probekit.store import Block, FeatureStore, canonical_json, open_store
from probekit.store import format as fmt
from probekit.store.shards import read_plan, read_store_file


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores") / "store"
    damages.fill(root)
    return root


def h5_files(root: Path) -> list[Path]:
    return sorted(root.glob("shards/**/*.h5"))


def test_1_layout(store):
    files = {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()}
    blocks = {path.stem for path in h5_files(store)}
    assert len(blocks) == 3
    shards = {
        f"shards/{place}/{block}.{ending}"
        for place in ("0.005", "0.1", "0.1/1")
        for block in blocks
        for ending in ("h5", "json")
    }
    (plan,) = (store / "plans").iterdir()
    assert files == shards | {"store.json", "judgements/votes.parquet", "judgements/votes.json", f"plans/{plan.name}"}
    for path in h5_files(store):
        with h5py.File(path) as file:
            assert hashlib.sha256(file["rows/row_id"][:].tobytes()).hexdigest()[:32] == path.stem


def test_1_unknown_and_temporary_names_are_ignored(store, tmp_path):
    root = tmp_path / "store"
    damages.fill(root)
    block = h5_files(root)[0].name
    for name in ("notes.txt", "shards/notes.txt", "shards/0.005/notes.txt", f"shards/0.005/.tmp-{block}-1-a"):
        (root / name).write_text("x")
    for name in (
        "later",
        "shards/later",
        "shards/0.10",
        "shards/1e-3",
        "shards/0.1/0",
        "shards/0.1/01",
        "shards/0.1/x",
    ):
        (root / name).mkdir()
        (root / name / "x.json").write_text("{}")
    for name in (
        "shards/0.005/.tmp-x.json",
        "shards/0.005/.lock-x.json",
        "judgements/.tmp-x.parquet",
        "judgements/.x.json",
    ):
        (root / name).write_text("{}")
    assert damages.everything(root) == damages.everything(store)


def test_2_canonical_json():
    value = {"b": [1, 2.5, 1e-7, True, None], "ü": "ü\n", "a": {}, "Z": 0.1}
    assert canonical_json(value) == '{"Z":0.1,"a":{},"b":[1,2.5,1e-07,true,null],"ü":"ü\\n"}'
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            canonical_json({"a": number})
    assert fmt.fingerprint(value) == hashlib.sha256(canonical_json(value).encode()).hexdigest()


def test_2_a_seal_is_the_digest_of_the_rest():
    content = {"zz": 1, "ü": [1], "a": {"self_sha256": "inner"}, "sea": "x"}
    digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    assert fmt.seal(content) == canonical_json(content | {"self_sha256": digest}).encode()
    assert fmt.unseal(fmt.seal(content)) == content | {"self_sha256": digest}


def test_3_head_of_a_store(store):
    content = json.loads((store / "store.json").read_bytes())
    assert content.keys() == {
        "format",
        "format_version",
        "fingerprint",
        "config",
        "describe",
        "provenance",
        "self_sha256",
    }
    assert (content["format"], content["format_version"]) == ("probekit-features", fmt.FORMAT_VERSION)
    assert content["config"].keys() == damages.CONFIG.keys() | {"format", "dtype_policy"}
    assert content["config"]["format"] == "probekit-features/1"
    for config in ({"poolings": {"mean": "m"}}, {"layers": damages.CONFIG["layers"]}):
        with pytest.raises(ValueError, match=r"config needs 'layers'.*and 'poolings'"):
            open_store(store.parent / "new", config=config, describe={})


def test_3_noise_level_0_is_never_unresolved(store, tmp_path):
    damages.fill(tmp_path / "s")
    file = tmp_path / "s" / "store.json"
    for sigma in ("0", "0.10", "x"):
        damages.edit(
            file,
            lambda x, sigma=sigma: x["describe"]["sigma_resolution"].update(
                {sigma: {"ratio": 5.0, "resolved": True, "rows": 4, "note": ""}}
            ),
        )
        with pytest.raises(StoreError, match=r"store\.json: describe\.sigma_resolution\..*delete it"):
            FeatureStore(tmp_path / "s")
        damages.edit(file, lambda x, sigma=sigma: x["describe"]["sigma_resolution"].pop(sigma))
    FeatureStore(tmp_path / "s")


def nodes(file: h5py.File) -> dict[str, h5py.Group | h5py.Dataset]:
    found = {"/": file}
    file.visititems(lambda name, node: found.update({name: node}))
    return found


def test_4_files_are_plain_hdf5(store):
    for path in h5_files(store):
        with h5py.File(path) as file:
            assert file.id.get_create_plist().get_version()[0] <= 3  # superblock of HDF5 1.10
            for node in nodes(file).values():
                for key in node.attrs:
                    kind = node.attrs.get_id(key).get_type()
                    assert not isinstance(kind, h5py.h5t.TypeStringID) or not kind.is_variable_str(), key
                    assert kind.get_class() in (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.FLOAT), key
                if isinstance(node, h5py.Group):
                    assert all(isinstance(node.get(name, getlink=True), h5py.HardLink) for name in node)
                    continue
                plist = node.id.get_create_plist()
                assert plist.get_layout() == h5py.h5d.CONTIGUOUS
                assert (plist.get_nfilters(), plist.get_external_count()) == (0, 0)
                assert node.dtype.str in ("<f2", "<f4", "<i8", "|u1")
            expected = {"format", "format_version", "fingerprint", "block", "sigma", "draw", "timestep", "config_json"}
            assert set(file.attrs) == expected | {"writer", "record_sha256"}
            place = path.relative_to(store / "shards").parts
            assert (file.attrs["sigma"].decode(), file.attrs["block"].decode()) == (place[0], path.stem)
            assert file.attrs["draw"] == (int(place[1]) if len(place) == 3 else 0)


def test_4_tables_say_what_they_should(store):
    rows = damages.table().set_index("row_id")
    for path in h5_files(store):
        with h5py.File(path) as file:
            m, k = 6, 2
            shapes = {
                name: (data.dtype.str, data.shape)
                for name, data in nodes(file).items()
                if isinstance(data, h5py.Dataset)
            }
            features = {fmt.dataset_name(*key) for key in damages.WANTED}
            assert set(shapes) == set(fmt.TABLES) | features
            for name in ("row_id", "image_sha256"):
                assert shapes[f"rows/{name}"] == ("|u1", (m, 32))
            for name in ("prompt_index", "width", "height", "file_bytes"):
                assert shapes[f"rows/{name}"] == ("<i8", (m,))
            assert shapes["rows/image_id_offsets"] == ("<i8", (m + 1,))
            assert shapes["rows/status"] == ("|u1", (m,))
            assert shapes["prompts/text_offsets"] == ("<i8", (k + 1,))
            assert shapes["prompts/sha256"] == ("|u1", (k, 32))
            assert all(shapes[name][1] == (m, 5) for name in features)
            text, ends = file["prompts/text_utf8"][:].tobytes(), file["prompts/text_offsets"][:]
            prompts = [text[a:b] for a, b in pairwise(ends)]
            names, cuts = file["rows/image_id_utf8"][:].tobytes(), file["rows/image_id_offsets"][:]
            for i in range(m):
                key = file["rows/row_id"][i].tobytes()
                image, prompt = file["rows/image_sha256"][i].tobytes(), prompts[file["rows/prompt_index"][i]]
                digest = hashlib.sha256(prompt).digest()
                assert file["prompts/sha256"][file["rows/prompt_index"][i]].tobytes() == digest
                assert key == hashlib.sha256(image + digest).digest()
                row = rows.loc[key.hex()]
                assert (row["prompt"].encode(), row["image_sha256"]) == (prompt, image)
                assert names[cuts[i] : cuts[i + 1]].decode() == row["image_id"]
                assert [file[f"rows/{name}"][i] for name in ("width", "height", "file_bytes", "status")] == [
                    row[name] for name in ("width", "height", "file_bytes", "status")
                ]
            assert (np.diff(file["rows/prompt_index"][:]) >= 0).all()


def test_4_features_carry_their_description_and_figures(store):
    sidecar = json.loads(h5_files(store)[0].with_suffix(".json").read_bytes())
    with h5py.File(h5_files(store)[0]) as file:
        for pooling, layer in damages.WANTED:
            name = fmt.dataset_name(pooling, layer)
            attrs, record = dict(file[name].attrs), sidecar["datasets"][name]
            texts = {key: value.decode() for key, value in attrs.items() if isinstance(value, bytes)}
            assert texts == {
                "layer_name": f"blocks.{layer}",
                "stream": "image",
                "pooling": pooling,
                "pooling_definition": damages.CONFIG["poolings"][pooling],
                "units": "as the backbone computes them",
            }
            assert attrs["layer_index"] == layer
            for figure in ("absmax", "noise_ratio", "quantisation_noise", "nonfinite_rows"):
                assert attrs.get(figure) == record[figure]
            assert record["absmax"] == np.abs(file[name][:].astype(np.float64)).max()


def test_4_rows_of_a_prompt_are_adjacent_whatever_the_order(tmp_path):
    writer = open_store(tmp_path, config=damages.CONFIG, describe={})
    rows = damages.table().sample(frac=1, random_state=0)
    prompts = rows.set_index("row_id")["prompt"]
    for block in writer.plan(rows, sigma="0.1", rows_per_shard=7):
        told = prompts.loc[list(block.row_ids)].tolist()
        runs = [prompt for i, prompt in enumerate(told) if i == 0 or told[i - 1] != prompt]
        assert len(runs) == len(set(runs))


def test_5_the_record_digest_is_in_the_file(store):
    for path in h5_files(store):
        content = json.loads(path.with_suffix(".json").read_bytes())
        said = {
            key: value for key, value in content.items() if key not in ("bytes", "sha256", "meta_sha256", "self_sha256")
        }
        digest = hashlib.sha256(canonical_json(said).encode()).hexdigest()
        with h5py.File(path) as file:
            assert file.attrs["record_sha256"].decode() == digest
        assert path.read_bytes().count(digest.encode()) == 1


@pytest.mark.parametrize(("images", "prompts"), [(2, 40), (3, 1500), (5, 700)])
def test_6_the_figures_follow_their_definition(images, prompts):
    """Section 6 in numpy: neighbouring rows of a prompt are pairs, 2,048 evenly spaced ones where there are more."""
    rng = np.random.default_rng(images)
    values = (rng.normal(100, 3, (prompts * images, 4)) * [1, 1e-3, 1, 0]).astype(np.float32)
    ok, prompt = rng.random(len(values)) < 0.9, np.repeat(np.arange(prompts), images)
    values[~ok] = np.nan
    pairs = [i for i in range(len(values) - 1) if ok[i] and ok[i + 1] and prompt[i] == prompt[i + 1]]
    if len(pairs) > 2048:
        pairs = [pairs[int(i)] for i in np.linspace(0, len(pairs) - 1, 2048)]
    first, exact = np.array(pairs), values.astype(np.float64)
    signal = exact[first] - exact[first + 1]
    rounded = values.astype(np.float16).astype(np.float64)
    noise = (rounded - exact)[first] - (rounded - exact)[first + 1]
    with np.errstate(invalid="ignore"):
        ratio = np.nan_to_num((noise**2).sum(0) / (signal**2).sum(0))
    dtype, figures = fmt.choose_dtype(values, ok, prompt)
    assert figures.absmax == np.nanmax(np.abs(values))
    assert figures.noise_ratio == pytest.approx(np.quantile(ratio, 0.99), rel=1e-5)
    assert dtype == ("<f2" if figures.noise_ratio <= 0.001 else "<f4")
    wanted = np.median(np.sqrt((noise**2).mean(0))) if dtype == "<f2" else 0
    assert figures.quantisation_noise == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("absmax", "dtype"), [(32751.0, "<f2"), (32752.0, "<f4"), (-32752.0, "<f4")])
def test_6_half_of_the_range_is_the_limit(absmax, dtype):
    values = np.array([[absmax], [0.0]], np.float32)
    values[0] = absmax if dtype == "<f4" else 32736.0  # the next smaller number of float16
    assert fmt.choose_dtype(values, np.ones(2, bool), np.zeros(2, np.int64))[0] == dtype


def test_7_steps_of_a_commit(tmp_path, monkeypatch):
    """The file synced, the old sidecar gone, the folder synced; then the file named, then the sidecar, each synced."""
    damages.fill(tmp_path)
    path = h5_files(tmp_path)[0]
    old = path.with_suffix(".json").read_bytes()
    path.write_bytes(path.read_bytes()[:-1])
    steps: list[str] = []

    def sort(name: str) -> str:
        return "sidecar" if ".json" in name else "file" if ".h5" in name else "folder"

    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink
    monkeypatch.setattr(
        os, "fsync", lambda fd: steps.append(f"sync {sort(str(Path(f'/proc/self/fd/{fd}').readlink()))}") or fsync(fd)
    )
    monkeypatch.setattr(Path, "replace", lambda self, to: steps.append(f"name {sort(to.name)}") or replace(self, to))

    def unlinked(self, missing_ok=False):
        if not self.name.startswith("."):
            steps.append(f"remove {sort(self.name)}")
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlinked)
    writer, rows = open_store(tmp_path, config=damages.CONFIG, describe={"name": "tiny"}), damages.table()
    (block,) = writer.plan(rows, sigma="0.005", rows_per_shard=6)
    part = rows.set_index("row_id").loc[list(block.row_ids)].reset_index()
    features = {
        (pooling, layer): np.stack([damages.values(key, layer, pooling, "0.005", 0, 0) for key in part["row_id"]])
        for pooling, layer in damages.WANTED
    }
    writer.write_shard(block, sigma="0.005", timestep=5.0, rows=part, features=features)
    assert steps[-9:] == [
        *("sync file", "remove sidecar", "sync folder"),
        *("sync file", "name file", "sync folder"),
        *("sync sidecar", "name sidecar", "sync folder"),
    ]
    assert path.with_suffix(".json").read_bytes() == old


def test_7_the_plan_is_there_before_the_first_shard(tmp_path):
    writer = open_store(tmp_path, config=damages.CONFIG, describe={})
    blocks = writer.plan(damages.table(), sigma="0.1", rows_per_shard=6)
    (plan,) = (tmp_path / "plans").iterdir()
    content = json.loads(plan.read_bytes())
    assert content["blocks"] == [list(block.row_ids) for block in blocks]
    assert plan.stem == hashlib.sha256(canonical_json(content["blocks"]).encode()).hexdigest()[:32]
    again = open_store(tmp_path, config=damages.CONFIG, describe={})
    assert again.plan(damages.table(), sigma="0.1", rows_per_shard=100) == blocks


@pytest.mark.parametrize(
    ("member", "value"),
    [
        *(("imported", value) for value in (1, "yes", None)),
        *(("n_blocks", value) for value in ("12", 12.0, True, -1, None)),
        *((member, 1) for member in ("prompts", "name", "random_weights")),
        *((member, "1") for member in ("width", "n_parameters", "training_images")),
    ],
)
def test_3_facts_have_the_types_of_the_format(store, tmp_path, member, value):
    file = tmp_path / "store.json"
    content = json.loads((store / "store.json").read_bytes())
    file.write_bytes(fmt.seal(content))
    read_store_file(file)
    content["describe"][member] = value
    file.write_bytes(fmt.seal(content))
    with pytest.raises(StoreError, match=rf"store.json: describe.{member}: "):
        read_store_file(file)


@pytest.mark.parametrize("head", [{"format": "other"}, {"format_version": "2.0"}, {"format_version": 1}])
def test_7_a_plan_of_another_format_is_refused(store, tmp_path, head):
    plan = next((store / "plans").iterdir())
    copy = tmp_path / plan.name
    copy.write_bytes(fmt.seal(json.loads(plan.read_bytes()) | head))
    with pytest.raises(StoreError, match=f"{copy.name}: {next(iter(head))}: "):
        read_plan(copy)


def test_8_row_order(store):
    order = []
    for block in sorted({path.stem for path in h5_files(store)}):
        with h5py.File(store / "shards" / "0.005" / f"{block}.h5") as file:
            order += [bytes(key).hex() for key in file["rows/row_id"][:]]
    assert FeatureStore(store).rows["row_id"].tolist() == order


def test_8_a_row_stands_at_its_first_place_and_has_its_worst_status(tmp_path):
    writer, rows = open_store(tmp_path, config=damages.CONFIG, describe={}), damages.table()
    ids = rows["row_id"].tolist()
    blocks = {"0.1": [ids[:3], ids[3:6]], "0.2": [ids[:6][::-1]]}
    for sigma, cut in blocks.items():
        for chosen in cut:
            part = rows.set_index("row_id").loc[chosen].reset_index()
            part["status"] = [int(sigma == "0.2" and key == ids[4]) for key in chosen]
            values = np.array([[float(ids.index(key))] * 5 for key in chosen], np.float32)
            block = Block(fmt.block_name(chosen), tuple(chosen))
            writer.write_shard(
                block, sigma=sigma, timestep=1.0, rows=part, features=dict.fromkeys(damages.WANTED, values)
            )
    store = FeatureStore(tmp_path)
    named = {fmt.block_name(chosen): chosen for cut in blocks.values() for chosen in cut}
    order = list(dict.fromkeys(key for name in sorted(named) for key in named[name]))
    assert store.rows["row_id"].tolist() == order
    assert store.rows["status"].tolist() == [int(key == ids[4]) for key in order]
    for sigma in ("0.1", "0.2"):
        read = store.read(layer=1, sigma=sigma, pooling="mean")[:, 0]
        wanted = [np.nan if sigma == "0.2" and key == ids[4] else ids.index(key) for key in order]
        np.testing.assert_array_equal(read, wanted)


def test_9_a_group_is_in_one_split(store):
    frame = pd.read_parquet(store / "judgements" / "votes.parquet")
    with pytest.raises(StoreError, match=r"group 'x' is in 3 splits; allowed: one"):
        FeatureStore(store).bind(frame.assign(group="x"))
    with pytest.raises(StoreError, match=r"a judgement has the split 'dev'"):
        FeatureStore(store).bind(frame.assign(split="dev"))


def test_9_judgements_are_outside_the_fingerprint(tmp_path):
    damages.fill(tmp_path)
    before = {path: path.read_bytes() for path in h5_files(tmp_path)} | {"head": (tmp_path / "store.json").read_bytes()}
    writer = open_store(tmp_path, config=damages.CONFIG, describe={"name": "tiny"})
    frame = pd.read_parquet(tmp_path / "judgements" / "votes.parquet")
    writer.write_judgements("votes", frame.assign(label=0.5, split="test"))
    assert damages.planned(tmp_path) == []
    after = {path: path.read_bytes() for path in h5_files(tmp_path)} | {"head": (tmp_path / "store.json").read_bytes()}
    assert after == before
    assert set(FeatureStore(tmp_path).pairs(split="test").label) == {0.5}
