"""Archives: a small store of every format version, written by the release that introduced it, is read on every run.

Checksums are recomputed here from ``FORMAT.md`` with hashlib, zlib and h5py only.
"""

import hashlib
import json
import shutil
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from probekit.store import FORMAT_VERSION, FeatureStore, open_store

ARCHIVES = Path(__file__).parent / "data" / "archives"
sys.path.insert(0, str(ARCHIVES))

import make  # noqa: E402

VERSIONS = sorted(path.name for path in ARCHIVES.iterdir() if path.is_dir() and path.name[0].isdigit())
COORDINATES = [("0.005", 0), ("0.1", 0), ("0.1", 1)]
WRITTEN = {(pooling, layer): make.WIDTHS[pooling] for pooling, layers in make.LAYERS.items() for layer in layers}
WITHOUT_INPUTS = {key: width for key, width in WRITTEN.items() if key[0] not in make.CONFIG["inputs"]}
WIDTHS = {"1.0": {("mean", 0): 3, ("mean", 1): 3}, "1.1": WITHOUT_INPUTS, "1.2": WITHOUT_INPUTS}
"""(pooling, layer) -> width of a version; all others are what ``make.py`` writes."""

archives = pytest.mark.parametrize("version", VERSIONS)


def copied(version: str, path: Path) -> Path:
    return Path(shutil.copytree(ARCHIVES / version, path / "store"))


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def unsealed(file: Path) -> dict:
    data = file.read_bytes()
    content = json.loads(data)
    assert canonical(content) == data
    digest = content.pop("self_sha256")
    assert digest == hashlib.sha256(canonical(content)).hexdigest()
    return content


def test_every_version_has_an_archive():
    assert all(version == f"1.{minor}" for minor, version in enumerate(VERSIONS))
    assert VERSIONS[-1] == FORMAT_VERSION, "run tests/data/archives/make.py"


@archives
def test_values_and_judgements_of_an_archive(version):
    store = FeatureStore(ARCHIVES / version)
    assert store.format_version == store.summary()["format_version"] == version
    assert store.coordinates == COORDINATES
    place = np.array([make.IMAGES.index(image) for image in store.rows["image_id"]])
    assert sorted(place) == [0, 1, 2, 3]
    assert store.rows["prompt"].tolist() == [image.rpartition("-")[0] for image in store.rows["image_id"]]
    widths = WIDTHS.get(version, WRITTEN)
    assert store.inputs == (["latents"] if ("latents", 0) in widths else [])
    held = [*store.poolings, *store.inputs]
    assert {(pooling, layer.index) for pooling in held for layer in store.layers_of(pooling)} == set(widths)
    for sigma, draw in store.coordinates:
        for (pooling, layer), width in widths.items():
            wanted = make.features(place, layer=layer, width=width, sigma=sigma, draw=draw)
            read = store.read(layer=layer, sigma=sigma, draw=draw, pooling=pooling)
            np.testing.assert_allclose(read, wanted, rtol=1e-6)
    pairs = store.pairs()
    assert pairs.label.tolist() == [1.0, 0.0]
    assert place[pairs.rows].tolist() == [[0, 1], [2, 3]]
    assert pairs.frame["split"].tolist() == ["train", "test"]
    if version == "1.0":
        assert store.sigma_resolution == {}
    else:
        assert {sigma: entry["resolved"] for sigma, entry in store.sigma_resolution.items()} == {
            "0.005": False,
            "0.1": True,
        }
        assert store.describe["prompts"] == "empty"


@archives
def test_checksums_of_an_archive(version):
    root = ARCHIVES / version
    store = unsealed(root / "store.json")
    assert store["format_version"] == version
    assert store["fingerprint"] == hashlib.sha256(canonical(store["config"])).hexdigest()
    for plan in root.glob("plans/*.json"):
        digest = hashlib.sha256(canonical(unsealed(plan)["blocks"])).hexdigest()
        assert plan.stem == digest[:32]
    if version in ("1.0", "1.1"):
        assert not list(root.glob("judgements/*.json"))
    else:
        said, data = unsealed(root / "judgements" / "votes.json"), (root / "judgements" / "votes.parquet").read_bytes()
        assert (said["name"], said["bytes"], said["sha256"]) == ("votes", len(data), hashlib.sha256(data).hexdigest())
    sidecars = sorted(root.glob("shards/**/*.json"))
    assert len(sidecars) == 6
    for file in sidecars:
        sidecar, data = unsealed(file), file.with_suffix(".h5").read_bytes()
        assert sidecar["fingerprint"] == store["fingerprint"]
        assert sidecar["bytes"] == len(data)
        assert sidecar["sha256"] == hashlib.sha256(data).hexdigest()
        assert sidecar["rows_sha256"][:32] == sidecar["block"] == file.stem
        ranges = sorted((r["offset"], r["nbytes"]) for r in sidecar["datasets"].values() if r["nbytes"])
        position, metadata = 0, b""
        for offset, length in [*ranges, (len(data), 0)]:
            metadata += data[position:offset]
            position = offset + length
        assert sidecar["meta_sha256"] == hashlib.sha256(metadata).hexdigest()
        said = {key: value for key, value in sidecar.items() if key not in ("bytes", "sha256", "meta_sha256")}
        assert (hashlib.sha256(canonical(said)).hexdigest().encode() in metadata) == (version not in ("1.0", "1.1"))
        with h5py.File(file.with_suffix(".h5")) as hdf5:
            for name, record in sidecar["datasets"].items():
                assert record["crc32"] == zlib.crc32(hdf5[name][:].tobytes())
                assert (record["dtype"], tuple(record["shape"])) == (hdf5[name].dtype.str, hdf5[name].shape)
                assert hdf5[name].id.get_offset() == record["offset"]
            keys = hdf5["rows/row_id"][:].tobytes()
        assert sidecar["rows_sha256"] == hashlib.sha256(keys).hexdigest()


@archives
def test_an_archive_is_added_to(version, tmp_path):
    path = copied(version, tmp_path)
    store, before = FeatureStore(path), files(path)
    widths = WIDTHS.get(version, WRITTEN)
    config = {key: value for key, value in store.config.items() if key not in ("format", "dtype_policy")}
    writer = open_store(path, config=config, describe=store.describe)
    assert files(path) == before
    rows = store.rows.assign(image_sha256=[bytes(32)] * 4, status=0)
    for sigma, draw in store.coordinates:
        assert writer.plan(rows, sigma=sigma, draw=draw, rows_per_shard=2) == []
    for block in writer.plan(rows, sigma="0.5", rows_per_shard=2):
        part = rows.set_index("row_id").loc[list(block.row_ids)].reset_index()
        features = {key: np.ones((2, width), np.float32) for key, width in widths.items()}
        writer.write_shard(block, sigma="0.5", timestep=5.0, rows=part, features=features)
    assert before.items() <= files(path).items()
    writer.record_resolution("0.5", ratio=9.0, rows=4)
    store = FeatureStore(path)
    assert store.sigmas == ["0.005", "0.1", "0.5"]
    assert store.format_version == version
    for pooling, layer in widths:
        assert (store.read(layer=layer, sigma="0.5", pooling=pooling) == 1).all()
        old = FeatureStore(ARCHIVES / version).read(layer=layer, sigma="0.1", draw=1, pooling=pooling)
        np.testing.assert_array_equal(store.read(layer=layer, sigma="0.1", draw=1, pooling=pooling), old)
