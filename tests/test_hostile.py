"""Hostile and damaged stores: refused in one line that names the path, never read as something else.

Damage of every kind comes from ``damages.py``; here are a sample of it, HDF5 files that lead elsewhere, links that lead
out of the store, and Parquet files that hold more than texts and numbers.
"""

import hashlib
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path
from random import Random

import damages
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from campaigns.damaged_copies import run

from probekit.errors import StoreError
from probekit.store import Block, FeatureStore, open_store, records
from probekit.store import format as fmt
from probekit.store.judgements import read_judgements

SECRET = b"root:x:0:0:a file that belongs to somebody else" * 50


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores") / "whole"
    damages.fill(root)
    return root


@pytest.fixture
def store(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "store"))


def refused(path: Path, *, by=damages.everything, what: str | None = None, name: Path | None = None) -> str:
    """Call a reader, which must refuse in one line that begins with the path."""
    with pytest.raises(StoreError, match=what) as caught:
        by(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(name or path) in message
    return message


IN_PLACE = ("symbolic link", "pipe", "folder in its place", "linked folder", "file in place of folder")
ALWAYS = ("flip: features", "flip: tables", "JSON laid out anew: sidecar", "JSON laid out anew: store")


def sample() -> list[str]:
    """One kind of each group, in turn with what it is about, and all that put something in the place of a file."""
    groups: dict[str, list[str]] = {}
    for name in damages.KINDS:
        groups.setdefault(name.partition(":")[0], []).append(name)
    few = [names[number % len(names)] for number, names in enumerate(groups.values())]
    return list(dict.fromkeys([*few, *ALWAYS, *(name for group in IN_PLACE for name in groups[group])]))


def test_damaged_copies_are_refused_or_read_as_if_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nobody pulls the plug here, and it takes most of the time
    names = sample()
    assert len(names) >= 50
    found = run(tmp_path, len(names), seed=1, names=names, redo=5)
    assert [fault for _, _, fault in found if fault] == []
    assert {outcome for _, outcome, _ in found} == {"refused", "refused, redone", "equal"}


PLANS = [name for name in damages.KINDS if name.endswith(": plan") or name.startswith("plan edited")]


@pytest.mark.parametrize("name", [name for name in PLANS if name not in ("missing: plan", "JSON huge: plan")])
def test_a_damaged_plan_stops_a_dump(store, tmp_path, name):
    copy = damages.Copy(store, tmp_path, Random(0))
    path = copy.file("plan")
    copy.shard().with_suffix(".json").unlink()  # plans are read where rows are missing
    damages.KINDS[name](copy)
    refused(store, by=damages.planned, name=path)


def external_link(file, secret):
    with h5py.File(secret.with_suffix(".h5"), "w") as other:
        other["features/mean/000"] = np.frombuffer(SECRET, np.float16)[: 6 * 5].reshape(6, 5)
    del file["features/mean/000"]
    file["features/mean/000"] = h5py.ExternalLink(secret.with_suffix(".h5"), "features/mean/000")


def external_link_mid_path(file, secret):
    with h5py.File(secret.with_suffix(".h5"), "w") as other:
        other["000"] = other["001"] = other["002"] = np.frombuffer(SECRET, np.float16)[: 6 * 5].reshape(6, 5)
    del file["features/mean"]
    file["features/mean"] = h5py.ExternalLink(secret.with_suffix(".h5"), "/")


def soft_link(file, secret):
    del file["features/mean/000"]
    file["features/mean/000"] = h5py.SoftLink("/features/text_mean/001")


def external_storage(file, secret):
    del file["features/mean/000"]
    file.create_dataset("features/mean/000", (6, 5), "<f2", external=[(str(secret), 0, 60)])


def virtual_dataset(file, secret):
    layout = h5py.VirtualLayout((6, 5), "<f2")
    layout[:] = h5py.VirtualSource(str(secret.with_suffix(".h5")), "x", (6, 5))
    del file["features/mean/000"]
    file.create_virtual_dataset("features/mean/000", layout)


def filtered(file, secret):
    values = file["features/mean/000"][:]
    del file["features/mean/000"]
    file.create_dataset("features/mean/000", data=values, chunks=(6, 5), compression="gzip", shuffle=True)


def bomb(file, secret):
    del file["features/mean/000"]
    file.create_dataset("features/mean/000", (6, 2**24), "<f2", chunks=(6, 2**20), compression="gzip", fillvalue=1)
    file["features/mean/000"][:, : 2**20] = 1


def huge_shape(file, secret):
    del file["features/mean/000"]
    file.create_dataset("features/mean/000", (6, 2**50), "<f2", chunks=(6, 1024))


def variable_length(file, secret):
    del file["features/mean/000"]
    file.create_dataset("features/mean/000", data=["text"] * 6, dtype=h5py.string_dtype())
    file.attrs["note"] = "a text of variable length"


class Evil:
    """Would make a folder if anything unpickled it."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def pickled(file, secret):
    file.attrs["config_json"] = np.void(pickle.dumps(Evil()))
    file.attrs["object"] = np.array([b"object"], h5py.special_dtype(vlen=bytes))


@pytest.mark.parametrize("sealed", [False, True], ids=["old sidecar", "digests forged"])
@pytest.mark.parametrize(
    "build",
    [
        external_link,
        external_link_mid_path,
        soft_link,
        external_storage,
        virtual_dataset,
        filtered,
        bomb,
        huge_shape,
        variable_length,
        pickled,
    ],
)
def test_nothing_in_an_hdf5_file_leads_a_reader_away(whole, store, tmp_path, monkeypatch, build, sealed):
    """Even with the digests of the file forged, what is read are bytes of the file itself, at the sidecar's offsets."""
    monkeypatch.chdir(tmp_path)
    path = sorted(store.glob("shards/0.005/*.h5"))[0]
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    content = fmt.unseal(path.with_suffix(".json").read_bytes())
    with h5py.File(path, "r+") as file:
        build(file, secret)
    if sealed:
        data = path.read_bytes()
        content |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        content["meta_sha256"] = damages.meta_sha256(path, content)
        path.with_suffix(".json").write_bytes(fmt.seal(content))
    opened, message, found = [], "", None
    genuine = os.open
    monkeypatch.setattr(os, "open", lambda path, *args, **kwargs: opened.append(Path(path)) or genuine(path, *args))
    monkeypatch.setattr(h5py, "File", None)
    try:
        found = damages.everything(store)
    except StoreError as error:
        message = str(error)
    assert found or (str(path.with_suffix("")) in message and "\n" not in message)
    assert opened
    assert all(path.is_relative_to(store) for path in opened)
    monkeypatch.undo()
    assert not (tmp_path / "unpickled").exists()
    if found is not None:  # the old bytes still lie where the sidecar says
        assert sealed
        assert found == damages.everything(whole)


def test_bytes_of_other_files_cannot_be_claimed(store):
    """A dataset that holds no bytes of the file (external storage) cannot be described by a sidecar."""
    path = sorted(store.glob("shards/0.005/*.json"))[0]
    content = fmt.unseal(path.read_bytes())
    content["datasets"]["features/mean/000"]["offset"] = None
    path.write_bytes(fmt.seal(content))
    refused(store, what="an offset is given if and only if the dataset holds bytes", name=path)


def changed(**members):
    return lambda record, content: content.update(members)


def record_changed(**members):
    return lambda record, content: record.update(members)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (record_changed(offset=10**9), "overlap or pass the end"),
        (record_changed(offset=-2), "offset: Input should be greater than or equal to 0"),
        (record_changed(offset=2**64), "offset: Input should be less than"),
        (lambda record, content: record.update(offset=content["bytes"] - 59), "pass the end of the file"),
        (lambda r, content: r.update(offset=content["datasets"]["features/mean/001"]["offset"] + 2), "overlap"),
        (record_changed(shape=[6, 2**40], nbytes=12 * 2**40), "overlap or pass the end of the file"),
        (record_changed(shape=[6, 4]), "60 bytes do not hold"),
        (record_changed(shape=[30]), "should be <f2 or <f4 with rows x d"),
        (record_changed(shape=[5, 6]), "should be <f2 or <f4 with rows x d"),
        (record_changed(shape=[6, 5] * 10**4), "shape: List should have at most 2 items"),
        (record_changed(shape=["6", 5]), "shape.0: Input should be a valid integer"),
        (record_changed(shape=[6.0, 5]), "shape.0: Input should be a valid integer"),
        (record_changed(dtype="|u1", shape=[6, 10]), "should be <f2 or <f4"),
        (record_changed(dtype=">f2"), "dtype: Input should be"),
        (record_changed(dtype="|O"), "dtype: Input should be"),
        (changed(n_rows=2**62), "should be .u1 with rows x 32 entries"),
        (changed(n_prompts=3), "should be <i8 with prompts"),
        (changed(block="0" * 32), "the block is not named after its rows"),
        (changed(datasets={}), "dataset rows/row_id should be"),
        (changed(sha256="x"), "sha256: String should match"),
        (changed(draw=True), "draw: Input should be a valid integer"),
        (lambda record, content: content.update(bytes=content["bytes"] + 2**27), "more than 67108864 bytes outside"),
        (
            lambda record, content: content["datasets"]["rows/image_id_utf8"].update(shape=[2, 54]),
            "should be .u1 with any",
        ),
    ],
)
def test_sidecars_that_claim_too_much(store, change, what):
    path = sorted(store.glob("shards/0.005/*.json"))[0]
    content = fmt.unseal(path.read_bytes())
    change(content["datasets"]["features/mean/000"], content)
    with pytest.raises(ValueError, match=what) as caught:
        records.parse_sidecar(fmt.seal(content))
    assert "\n" not in str(caught.value)
    path.write_bytes(fmt.seal(content))
    refused(store, name=path)


def sealed_as_it_stands(data: bytes) -> bytes:
    """Seal a sidecar anew without making it canonical JSON."""
    old = json.loads(data)["self_sha256"].encode()
    digest = hashlib.sha256(data.replace(b'"self_sha256":"' + old + b'",', b"")).hexdigest()
    return data.replace(old, digest.encode())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"draw":', b'"draw":1,"draw":'),
        (b'"bytes":', b'"bytes":1,"bytes":'),
        (b'"offset":', b'"offset":1,"offset":'),
        (
            b'"rows/status":',
            b'"rows/status":{"crc32":1,"dtype":"|u1","nbytes":6,"offset":1,"shape":[6]},"rows/status":',
        ),
        (b'"rows/status":{', b'"rows/status":{"sha256":"x",'),
        (b'"sigma":', b'"one":{"later":1,"later":2},"sigma":'),
        (b'"sigma":', b'"one":NaN,"sigma":'),
        (b'"sigma":', b'"one":[-Infinity],"sigma":'),
    ],
)
def test_a_seal_excuses_nothing(store, old, new):
    path = sorted(store.glob("shards/0.005/*.json"))[0]
    assert records.parse_sidecar(sealed_as_it_stands(path.read_bytes()))
    with pytest.raises(ValueError, match="not a record that carries its own SHA-256"):
        records.parse_sidecar(sealed_as_it_stands(path.read_bytes().replace(old, new, 1)))


def test_members_of_a_later_version_are_ignored(store):
    path = sorted(store.glob("shards/0.005/*.json"))[0]
    content = fmt.unseal(path.read_bytes())
    before = records.parse_sidecar(path.read_bytes())
    content["datasets"]["rows/status"]["later"] = {"a": [1.5, None, 'x":y']}
    after = records.parse_sidecar(fmt.seal(content | {"later": "é"}))
    assert after.datasets == before.datasets
    assert after.record_sha256 == fmt.record_digest(content | {"later": "é"}) != before.record_sha256


def test_a_sidecar_is_bound_to_its_file(store):
    """Edits that only the digest in the file can show: a sidecar that fits in every other respect."""
    path = sorted(store.glob("shards/0.005/*.json"))[0]
    content = fmt.unseal(path.read_bytes())
    data, layers = path.with_suffix(".h5").read_bytes(), content["datasets"]
    assert fmt.record_digest(content).encode() in data
    layers["features/mean/000"], layers["features/mean/001"] = layers["features/mean/001"], layers["features/mean/000"]
    for version in ("1.2", "1.1", "1.0", "1.10"):
        path.write_bytes(fmt.seal(content | {"format_version": version}))
        refused(store, what=r"is not the record that was written with its \.h5 file; delete it", name=path)


def test_a_row_stands_in_one_shard_of_a_coordinate(store, monkeypatch):
    monkeypatch.setattr("probekit.store.writer._refuse_rows_of_others", lambda *_: None)  # another writer's shards
    writer = open_store(store, config=damages.CONFIG, describe={"name": "tiny"})
    rows = damages.table()
    ids = rows["row_id"].tolist()

    def write(chosen):
        part = rows.set_index("row_id").loc[chosen].reset_index()
        block = Block(fmt.block_name(chosen), tuple(chosen))
        features = {key: np.ones((len(chosen), 5), np.float32) for key in damages.WANTED}
        return writer.write_shard(block, sigma="0.005", timestep=5.0, rows=part, features=features)

    extra = write(ids[:2])
    refused(store, what="holds rows of another shard of its noise level and draw", name=store)
    for ending in (".h5", ".json"):
        extra.with_suffix(ending).unlink()
    damages.everything(store)
    extra = write([ids[0], ids[0]])
    refused(store, what="holds a row twice", name=extra)


def test_a_writer_does_not_leave_the_store(store, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("shards/0.7", "shards/0.1/2", "plans", "judgements"):
        place = store / name
        if place.exists():
            place.rename(tmp_path / "kept")
        place.symlink_to(outside)
        refused(store, by=damages.planned, what="is a symbolic link; allowed", name=place)
        place.unlink()
        if (tmp_path / "kept").exists():
            (tmp_path / "kept").rename(place)
    for name in (".tmp-x", ".lock-store.json", "shards/.tmp-x"):
        (store / name).symlink_to(outside / "victim")
        refused(store, by=damages.planned, what="is a symbolic link", name=store / name)
        (store / name).unlink()
    os.mkfifo(store / ".tmp-pipe")
    assert damages.planned(store) == []
    assert not (store / ".tmp-pipe").exists()
    head = (store / "store.json").rename(tmp_path / "head")
    (store / "store.json").symlink_to(outside / "missing")
    refused(store, by=damages.planned, what="is a symbolic link", name=store / "store.json")
    assert not list(outside.iterdir())
    (store / "store.json").unlink()
    head.rename(store / "store.json")
    assert damages.planned(store) == []


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    from probekit.store.files import locked

    (tmp_path / ".lock-x").symlink_to(tmp_path / "victim")
    with pytest.raises(StoreError, match="cannot be written"), locked(tmp_path / "x"):
        pass
    assert not (tmp_path / "victim").exists()


def test_a_lost_head_is_written_again_for_the_same_shards_only(store, caplog):
    before = damages.everything(store)
    file = store / "store.json"
    file.unlink()
    (store / "thesis.tex").touch()
    refused(store, by=damages.planned, what="and no store.json; allowed")
    (store / "thesis.tex").unlink()
    other = damages.CONFIG | {"noise": {"seed": 1, "scheme": "shared"}}
    with pytest.raises(StoreError, match=r"and no store\.json"):
        open_store(store, config=other, describe={})
    bad = next((store / "shards").rglob("*.h5"))
    whole = bad.read_bytes()
    os.truncate(bad, 100)
    refused(store, by=damages.planned, what=f"{bad.name}: 100 bytes .*; delete it and its .json or .h5 companion")
    bad.write_bytes(whole)
    open_store(store, config=damages.CONFIG, describe={}, dry_run=True)
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}: is missing; without --dry-run it is written again, and what was recorded in it is lost"
    ]
    assert not file.exists()
    assert damages.planned(store) == []
    assert f"{file}: is missing and is written again" in caplog.text
    assert damages.everything(store) | {"facts": 0} == before | {"facts": 0}


def pairs(store: Path) -> pd.DataFrame:
    return pd.read_parquet(store / "judgements" / "votes.parquet")


def test_judgements_are_what_their_sidecar_says(store):
    path = store / "judgements" / "votes.parquet"
    sidecar = path.with_suffix(".json")
    said = fmt.unseal(sidecar.read_bytes())
    assert (said["format"], said["format_version"], said["name"]) == ("probekit-features", fmt.FORMAT_VERSION, "votes")
    assert said["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert said["bytes"] == path.stat().st_size
    right = FeatureStore(store).pairs().label.tolist()
    intact = path.read_bytes()
    for position in range(0, len(intact), 97):
        damages.flip(path, position, 4)
        refused(path, by=read_judgements, what="not the file of .*delete it and its .json companion")
        path.write_bytes(intact)
    path.unlink()
    assert FeatureStore(store).judgements == ["votes"]
    refused(store, by=lambda path: FeatureStore(path).pairs(), what="no such file", name=path)
    path.write_bytes(intact)
    sidecar.unlink()  # as in formats 1.0 and 1.1
    assert FeatureStore(store).pairs().label.tolist() == right


@pytest.mark.parametrize("at", ["fsync", "unlink", "replace", "sidecar"])
def test_killed_while_judgements_are_replaced(store, monkeypatch, at):
    """At every step there are the old pairs or the new ones, and never a sidecar of the others."""
    from probekit.store import judgements

    frame, path = pairs(store), store / "judgements" / "votes.parquet"
    handle = open_store(store, config=damages.CONFIG, describe={"name": "tiny"})
    where = {"fsync": os, "sidecar": judgements}.get(at, Path)
    name = "write_atomically" if at == "sidecar" else at
    genuine, killed = getattr(where, name), []

    def dies(*args, **kwargs):
        if killed or ".lock-" in str(args[0]):
            return genuine(*args, **kwargs)
        killed.append(args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, name, dies)
        with pytest.raises(KeyboardInterrupt):
            handle.write_judgements("votes", frame.assign(label=1 - frame["label"]))
    label = read_judgements(path)["label"].tolist()
    assert label in (frame["label"].tolist(), (1 - frame["label"]).tolist())
    handle.write_judgements("votes", frame.assign(label=0.25))
    assert set(FeatureStore(store).pairs().label) == {0.25}


class Foreign(pa.ExtensionType):
    """A type that only its author knows."""

    def __init__(self):
        super().__init__(pa.string(), "tests.foreign")

    def __arrow_ext_serialize__(self):
        return pickle.dumps(Evil())

    @classmethod
    def __arrow_ext_deserialize__(cls, storage, data):
        pickle.loads(data)
        return cls()


@pytest.mark.parametrize("name", ["pickled", "nested", "struct", "dictionary of bytes", "date"])
def test_judgements_hold_texts_and_numbers_only(store, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    table, path = pa.Table.from_pandas(pairs(store), preserve_index=False), tmp_path / "set.parquet"
    n = len(table)
    column = {
        "pickled": pa.array([pickle.dumps(Evil())] * n, pa.binary()),
        "nested": pa.array([[["x"]]] * n),
        "struct": pa.array([{"a": 1}] * n),
        "dictionary of bytes": pa.array([b"x"] * n).dictionary_encode(),
        "date": pa.array([0] * n, pa.date32()),
    }[name]
    pq.write_table(table.append_column("extra", column), path)
    refused(path, by=read_judgements, what="column 'extra' is .*; allowed: texts and numbers")
    assert not (tmp_path / "unpickled").exists()


def test_what_a_schema_says_of_types_is_not_followed(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table, path = pa.Table.from_pandas(pairs(store), preserve_index=False), tmp_path / "set.parquet"
    storage = pa.array(["x"] * len(table))
    foreign = pa.ExtensionArray.from_storage(Foreign(), storage)
    pq.write_table(table.append_column("extra", foreign), path)  # unknown to a reader: a plain text
    said = json.loads(table.schema.metadata[b"pandas"]) | {"index_columns": ["pair_id"], "column_indexes": [{"a": 1}]}
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(said)}), tmp_path / "advice.parquet")
    assert read_judgements(tmp_path / "advice.parquet").columns.tolist() == pairs(store).columns.tolist()
    read_judgements(path)
    assert not (tmp_path / "unpickled").exists()


def test_judgements_do_not_unpack_without_bound(store, tmp_path):
    path = tmp_path / "set.parquet"
    pq.write_table(pa.table({"label": pa.array(np.zeros(10**6))}), path, compression="zstd")
    refused(path, by=read_judgements, what=r"says that its \d+ bytes hold 1000000 pairs")
    names = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(1000)]
    pq.write_table(pa.table({"pair_id": names, "source": ["x" * 10**5] * 1000}), path, compression="zstd")
    refused(path, by=read_judgements, what=r"unpacks to more than 256 times its \d+ bytes")
    path.write_bytes(b"PAR1" + zlib.compress(b"x") + b"\xff\xff\xff\x7fPAR1")
    refused(path, by=read_judgements, what="cannot be read as judgements")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"label": 1.5}, r"the label 1.5; allowed: a number from 0 to 1, or none"),
        ({"label": np.inf}, r"the label inf"),
        ({"label": "A"}, r"the label 'A'"),
        ({"split": "dev"}, r"the split 'dev'; allowed: train, validation, test"),
        ({"row_a": 3}, r"not all judgements have a text as 'row_a'"),
        ({"group": 3}, r"not all judgements have a text as 'group'"),
        ({"weight": "x"}, r"the weight 'x'; allowed: a number above 0"),
        ({"weight": 0.0}, r"the weight 0.0; allowed: a number above 0"),
    ],
)
def test_values_of_judgements(store, change, what):
    frame = pairs(store)
    for wrong in (frame.assign(**change), pd.concat([frame, frame[:1].assign(**change)])):
        with pytest.raises(StoreError, match=what):
            FeatureStore(store).bind(wrong)
