"""Every kind of damage is found and said in a line, and repair forgets the bad shards and nothing else."""

import json
import os
import re
import shutil
import sys
import zlib
from hashlib import sha256
from pathlib import Path
from random import Random

import damages
import h5py
import numpy as np
import pandas as pd
import pytest
from planted_store import planted_store
from test_cli import probekit
from test_hostile import sample
from test_store import CONFIG, WIDTH, dump, judged, shard_bytes, table

from probekit._types import scaled
from probekit.errors import NoStoreError, StoreError
from probekit.store import Block, FeatureStore, open_store, verify_store
from probekit.store import format as fmt
from probekit.store.files import LOCK, TEMP, locked, temporary
from probekit.store.judgements import read_judgements

UNFINISHED = "a dump is not finished, or did not name this sigma and draw"
AGAIN = "run the same probekit dump command again"


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def found(path: Path, **options) -> list[tuple[str, str]]:
    """(path below the store, problem) of everything that is wrong."""
    lines = verify_store(path, **options).problems
    assert all("\n" not in f"{line.path}{line.problem}{line.mend}" and line.mend for line in lines)
    return [(os.path.relpath(line.path, path), line.problem) for line in lines]


def commit(h5: Path, changes: dict[str, dict] | None = None, **members) -> None:
    """Make a sidecar for a file as it is now, as somebody would who wants it to be accepted.

    Changes of its members, and by name of its datasets, get into the digest that the file holds of its record.
    """
    sidecar = json.loads(h5.with_suffix(".json").read_bytes()) | members
    for name, change in (changes or {}).items():
        sidecar["datasets"][name] |= change
    digest = fmt.record_digest(sidecar).encode()
    if digest not in h5.read_bytes():
        with h5py.File(h5, "r+") as file:
            file.attrs.modify(fmt.RECORD, np.bytes_(digest))
    data = h5.read_bytes()
    outside, position = sha256(), 0
    records = [r for r in sidecar["datasets"].values() if r["offset"] is not None]
    for record in sorted(records, key=lambda record: record["offset"]):
        outside.update(data[position : record["offset"]])
        position = record["offset"] + record["nbytes"]
    outside.update(data[position:])
    sidecar |= {"bytes": len(data), "sha256": sha256(data).hexdigest(), "meta_sha256": outside.hexdigest()}
    h5.with_suffix(".json").write_bytes(fmt.seal(sidecar))


def overwrite(h5: Path, name: str, values: np.ndarray) -> None:
    """Give a dataset other values, with checksums that fit."""
    with h5py.File(h5, "r+") as file:
        file[name][...] = values
        crc32 = zlib.crc32(file[name][...].tobytes())
    commit(h5, {name: {"crc32": crc32}})


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


def offset(h5: Path, name: str) -> int:
    return json.loads(h5.with_suffix(".json").read_bytes())["datasets"][name]["offset"]


def swap(h5: Path) -> None:
    other = next(path for path in sorted(h5.parent.glob("*.json")) if path.stem != h5.stem)
    h5.with_suffix(".json").write_bytes(other.read_bytes())


def link(h5: Path) -> None:
    elsewhere = h5.parents[3] / "elsewhere.h5"
    h5.rename(elsewhere)
    h5.symlink_to(elsewhere)


SHARD_DAMAGE = {
    "truncated": (lambda h5: os.truncate(h5, 4000), "h5", r"4000 bytes instead of \d+"),
    "longer": (lambda h5: h5.write_bytes(h5.read_bytes() + b"x"), "h5", r"bytes instead of"),
    "gone": (Path.unlink, "h5", "no such file or directory; allowed: a regular file"),
    "never committed": (lambda h5: h5.with_suffix(".json").unlink(), "h5", "never committed: it has no sidecar"),
    "swapped sidecar": (swap, "json", "belongs to another shard"),
    "flipped sidecar": (lambda h5: flip(h5.with_suffix(".json"), 50), "json", "carries its own SHA-256"),
    "link": (link, "h5", "is a symbolic link"),
    "metadata": (lambda h5: flip(h5, 100), "h5", "its HDF5 metadata is not what was written"),
    "row keys": (lambda h5: flip(h5, offset(h5, "rows/row_id")), "h5", "rows/row_id does not have the checksum"),
    "foreign rows": (
        lambda h5: overwrite(h5, "rows/row_id", np.zeros((6, 32), np.uint8)),
        "h5",
        "the rows are not those of the block",
    ),
    "other digest": (
        lambda h5: commit(h5, rows_sha256=h5.stem * 2),
        "h5",
        "the rows are not those of the block",
    ),
    "edited sidecar": (
        lambda h5: h5.with_suffix(".json").write_bytes(
            fmt.seal(json.loads(h5.with_suffix(".json").read_bytes()) | {"rows_sha256": h5.stem * 2})
        ),
        "json",
        "is not the record that was written with its .h5 file",
    ),
    "features": (lambda h5: flip(h5, offset(h5, "features/mean/001")), "h5", "its SHA-256 is not that of its sidecar"),
    "prompts": (lambda h5: flip(h5, offset(h5, "prompts/text_utf8")), "h5", "its SHA-256 is not that of its sidecar"),
}
DEEP = {"features", "prompts"}


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_damaged_shards_are_found_forgotten_and_redone(tmp_path, damage):
    change, suffix, message = SHARD_DAMAGE[damage]
    path = tmp_path / "s"
    dump(path, table(6)).write_judgements("votes", judged(table(6), 5))
    intact, (bad, *_) = tree(path), sorted(path.rglob("*.h5"))
    assert verify_store(path).facts() == {
        "path": str(path),
        "deep": False,
        "counts": {
            "problems": 0,
            "repaired": 0,
            "shards": 3,
            "rows": 18,
            "bytes": sum(p.stat().st_size for p in path.rglob("*.h5")),
        },
        "problems": [],
    }
    change(bad)
    hurt = tree(path)
    if damage in DEEP:
        assert found(path) == []
    (problem,) = verify_store(path, deep=damage in DEEP).problems
    assert problem.path == str(bad.with_suffix(f".{suffix}"))
    assert re.search(message, problem.problem)
    assert problem.mend.endswith(AGAIN)
    assert not problem.repaired
    assert tree(path) == hurt  # looking changes nothing
    report = verify_store(path, deep=damage in DEEP, repair=True)
    assert [problem.repaired for problem in report.problems] == [True]
    assert report.problems[0].mend == f"forgotten, file and sidecar; {AGAIN}"
    assert tree(path) == {name: data for name, data in intact.items() if bad.stem not in name}
    text = f"6 of 18 rows have no features here (1 of 3 blocks): {UNFINISHED}"
    assert found(path) == [("shards/0.005", text)]
    dump(path, table(6))
    assert tree(path) == intact
    assert found(path, deep=damage in DEEP) == []
    if damage == "link":
        assert (tmp_path / "elsewhere.h5").exists()


def test_exit_codes_and_output(tmp_path):
    path = tmp_path / "a store"
    dump(path, table(6))
    done = probekit("verify", path)
    assert (done.returncode, done.stdout) == (
        0,
        f"{path}: 0 problems; 3 good shards, 18 rows, "
        f"{scaled(sum(p.stat().st_size for p in path.rglob('*.h5')), 'B')} looked at; --deep reads them\n",
    )
    (bad, *_) = sorted(path.rglob("*.h5"))
    flip(bad, offset(bad, "features/mean/002"))
    assert probekit("verify", path).returncode == 0
    done = probekit("verify", path, "--deep")
    assert done.returncode == 1
    assert done.stdout.splitlines()[:2] == [
        f"{bad}: its SHA-256 is not that of its sidecar",
        f"    run probekit verify '{path}' --deep --repair, then run the same probekit dump command again",
    ]
    done = probekit("verify", path, "--deep", "--repair", "--json")
    assert done.returncode == 1
    facts = json.loads(done.stdout)
    assert facts["problems"] == [
        {
            "path": str(bad),
            "problem": "its SHA-256 is not that of its sidecar",
            "mend": f"forgotten, file and sidecar; {AGAIN}",
            "repaired": True,
        }
    ]
    assert (facts["counts"]["problems"], facts["counts"]["repaired"], facts["counts"]["shards"]) == (1, 1, 2)
    assert probekit("verify", path, "--deep").returncode == 1  # rows are missing until the dump is run again
    dump(path, table(6))
    assert probekit("verify", path, "--deep").returncode == 0
    done = probekit("verify", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {tmp_path}: no store.json; allowed: the folder of a feature store" in done.stderr


def test_stores_of_all_kinds_are_clean(tmp_path):
    versions = sorted(path.parent for path in (Path(__file__).parent / "data" / "archives").glob("*/store.json"))
    assert len(versions) >= 3
    for path in versions:
        assert found(path, deep=True) == []
    coordinates = [("0.005", 0), ("0.1", 0), ("0.1", 1)]
    planted_store(tmp_path, signal={1: 1.0}, seed=0, broken=3, ties=0.1, coordinates=coordinates, further=True)
    assert found(tmp_path, deep=True) == []
    open_store(tmp_path / "new", config=CONFIG, describe={})
    assert found(tmp_path / "new", deep=True) == []


def hostile(file: h5py.File, kind: str) -> None:
    """Do one thing that the format forbids; the other datasets stay where they are."""
    values = file["features/mean/001"][:]
    if kind in ("chunked", "filtered", "virtual", "external storage", "big-endian", "other shape"):
        del file["features/mean/001"]
    if kind == "external link":
        file["x"] = h5py.ExternalLink("/etc/passwd", "/")
    elif kind == "soft link in a path":
        file.move("rows", "zrows")
        file["rows"] = h5py.SoftLink("/zrows")
    elif kind == "external link in a path":
        file.move("rows", "zrows")
        file["rows"] = h5py.ExternalLink("other.h5", "/rows")
    elif kind == "second link":
        file["features/zalias"] = file["features/mean"]
    elif kind == "loop":
        file["features/mean/up"] = file["features"]
    elif kind == "deep":
        file.create_group("a/b/c/d/e")
    elif kind == "type":
        file["kind"] = np.dtype("<f4")
    elif kind == "text attribute":
        file["features/mean/001"].attrs["note"] = "of any length"
    elif kind == "object attribute":
        file.attrs.create("object", np.void(b"cos\nsystem"))
    elif kind == "other sigma":
        file.attrs["timestep"] = 7.0
        file.attrs["draw"] = 1
    elif kind == "other record":
        file.attrs["note"] = file.attrs[fmt.RECORD]
        file.attrs.modify(fmt.RECORD, np.bytes_(b"0" * 64))
    elif kind == "more":
        file["features/mean/009"] = values
    elif kind == "figure":
        file["features/mean/001"].attrs["absmax"] = 7.0
    elif kind == "chunked":
        file.create_dataset("features/mean/001", data=values, chunks=(1, WIDTH))
    elif kind == "filtered":
        file.create_dataset("features/mean/001", data=values, compression="gzip")
    elif kind == "virtual":
        layout = h5py.VirtualLayout(values.shape, "<f2")
        layout[:] = h5py.VirtualSource("other.h5", "x", values.shape)
        file.create_virtual_dataset("features/mean/001", layout)
    elif kind == "external storage":
        file.create_dataset("features/mean/001", values.shape, "<f2", external=[("/etc/passwd", 0, values.nbytes)])
    elif kind == "big-endian":
        file.create_dataset("features/mean/001", data=values.astype(">f2"))
    elif kind == "other shape":
        file.create_dataset("features/mean/001", data=values.reshape(-1))


HOSTILE = {
    "external link": "x is a soft or external link",
    "soft link in a path": "rows is a soft or external link",
    "external link in a path": "rows is a soft or external link",
    "second link": "is a second link to one object",
    "loop": "features/mean/up is a second link to one object",
    "deep": "a/b/c/d is neither a dataset nor a group in its place",
    "type": "kind is neither a dataset nor a group in its place",
    "text attribute": "attribute note of features/mean/001 is neither a number nor a text of fixed length",
    "object attribute": "attribute object of / is neither a number nor a text of fixed length",
    "other sigma": "attribute draw of / is not that of the store and the sidecar",
    "other record": "attribute record_sha256 of / is not that of the store and the sidecar",
    "more": "dataset features/mean/009 is not in the sidecar",
    "figure": "attribute absmax of features/mean/001 is 7.0, in the sidecar 6",
    "chunked": "dataset features/mean/001 is chunked",
    "filtered": "dataset features/mean/001 is chunked",
    "virtual": "dataset features/mean/001 is chunked",
    "external storage": "dataset features/mean/001 has external storage",
    "big-endian": "dataset features/mean/001 is not of the type and shape of the sidecar",
    "other shape": "dataset features/mean/001 is not of the type and shape of the sidecar",
    "lacking": "dataset rows/width is in the sidecar only",
    "garbage": "HDF5 cannot read it (",
    "user block": "it has a user block",
    "other places": "dataset rows/height lies elsewhere than the sidecar says",
}


def test_what_hdf5_may_hold(tmp_path):
    """Each shard of a store breaks one rule, with a sidecar that vouches for the file."""
    path = tmp_path / "s"
    dump(path, table(2 * len(HOSTILE)))
    for h5, kind in zip(sorted(path.rglob("*.h5")), HOSTILE, strict=True):
        changes = {}
        if kind == "garbage":
            h5.write_bytes(bytes(8) + h5.read_bytes()[8:])
        elif kind == "user block":
            h5.write_bytes(bytes(512) + h5.read_bytes())
            records = json.loads(h5.with_suffix(".json").read_bytes())["datasets"]
            changes = {name: {"offset": record["offset"] + 512} for name, record in records.items()}
        elif kind == "other places":
            records = json.loads(h5.with_suffix(".json").read_bytes())["datasets"]
            changes = {"rows/width": records["rows/height"], "rows/height": records["rows/width"]}
        else:
            with h5py.File(h5, "r+") as file:
                if kind == "lacking":
                    del file["rows/width"]
                hostile(file, kind)
        commit(h5, changes)
    assert found(path) == []
    problems = dict(found(path, deep=True))
    said = [problems.get(os.path.relpath(h5, path), "nothing") for h5 in sorted(path.rglob("*.h5"))]
    for problem, (kind, message) in zip(said, HOSTILE.items(), strict=True):
        assert message in problem, kind
    verify_store(path, deep=True, repair=True)
    assert not list(path.rglob("*.h5"))


def refigure(h5: Path, **figures: float) -> None:
    with h5py.File(h5, "r+") as file:
        file["features/mean/001"].attrs.update(figures)
    commit(h5, {"features/mean/001": figures})


def some_nan(h5: Path) -> None:
    values = np.ones((6, WIDTH), np.float16)
    values[2] = np.nan
    overwrite(h5, "features/mean/001", values)


CONTENT = {
    "absmax": (lambda h5: refigure(h5, absmax=70.0), "features/mean/001: absmax is 70.0, that of the values is 6"),
    "ratio": (lambda h5: refigure(h5, noise_ratio=0.5), "is float16 with absmax 6.* and noise_ratio 0.5, against"),
    "negative": (lambda h5: refigure(h5, quantisation_noise=-1.0), "allowed: numbers from 0"),
    "count": (lambda h5: refigure(h5, nonfinite_rows=2), r"0 rows are marked as not finite, .* are \[0, 2\]"),
    "image": (
        lambda h5: overwrite(h5, "rows/image_sha256", np.ones((6, 32), np.uint8)),
        "rows/row_id is not that of images and prompts",
    ),
    "prompt": (
        lambda h5: overwrite(h5, "prompts/sha256", np.ones((2, 32), np.uint8)),
        "prompts/sha256 is not that of the prompts",
    ),
    "index": (lambda h5: overwrite(h5, "rows/prompt_index", np.full(6, 2)), "prompt_index points outside the prompts"),
    "scattered": (
        lambda h5: overwrite(h5, "rows/prompt_index", np.array([0, 1, 0, 1, 0, 1])),
        "rows of one prompt are not adjacent",
    ),
    "nan": (some_nan, "features/mean/001: a row of status 0 is not finite"),
    "other status": (
        lambda h5: overwrite(h5, "rows/status", np.array([0, 0, 3, 0, 0, 0], np.uint8)),
        "rows/status holds other values than 0, 1 and 2",
    ),
    "status": (
        lambda h5: overwrite(h5, "rows/status", np.array([0, 0, 2, 0, 0, 0], np.uint8)),
        "features/mean/000: a row of a status other than 0 is not NaN",
    ),
    "text": (lambda h5: overwrite(h5, "prompts/text_utf8", np.uint8(255)), "text_utf8 is not UTF-8"),
    "checksum": (lambda h5: commit(h5, {"rows/width": {"crc32": 5}}), "rows/width does not have the checksum"),
}


def test_what_a_shard_says_of_itself_is_recomputed(tmp_path):
    """Each shard of a store is wrong in one way, with a sidecar, attributes and checksums that fit."""
    path = tmp_path / "s"
    dump(path, table(2 * len(CONTENT)))
    shards = sorted(path.rglob("*.h5"))
    for h5, (change, _) in zip(shards, CONTENT.values(), strict=True):
        change(h5)
    problems = found(path, deep=True)
    for h5, (_, message) in zip(shards, CONTENT.values(), strict=True):
        lines = [problem for of, problem in problems if of == os.path.relpath(h5, path)]
        assert any(re.search(message, line) for line in lines), (message, lines)
    assert found(path) == []


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_the_dtype_rule_is_checked(tmp_path, monkeypatch, dtype):
    genuine = fmt.choose_dtype

    def other(values, ok, prompt_index):
        return dtype, genuine(values, ok, prompt_index)[1]._replace(quantisation_noise=0.0)

    def close(part, features):
        features["mean", 1][:] = 1000 + np.random.default_rng(0).normal(0, 0.1, features["mean", 1].shape)

    with monkeypatch.context() as patch:
        patch.setattr(fmt, "choose_dtype", other)
        dump(tmp_path, table(2), change=close if dtype == "<f2" else None)
    problems = [problem for _, problem in found(tmp_path, deep=True)]
    assert len(problems) == (1 if dtype == "<f2" else 3)
    for problem in problems:
        assert problem.startswith("features/mean/00")
        assert f"is {'float16' if dtype == '<f2' else 'float32'} with absmax" in problem


def test_lone_images_in_float16_are_against_the_rule(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fmt, "choose_dtype", lambda values, *_: ("<f2", fmt.Figures(float(abs(values).max()), 0.0, 0.0)))
        dump(tmp_path, table(6, images=1))
    assert [problem.partition(" with ")[0] for _, problem in found(tmp_path, deep=True)] == [
        f"features/mean/00{layer}: is float16" for layer in (0, 1, 2)
    ]


def test_figures_of_float32_are_recomputed(tmp_path):
    def change(part, features):
        features["mean", 1] += 40000

    for figure, value in (("absmax", 1.0), ("noise_ratio", 0.5), ("quantisation_noise", 0.5)):
        dump(tmp_path / figure, table(2), change=change)
        (h5,) = (tmp_path / figure).rglob("*.h5")
        assert found(tmp_path / figure, deep=True) == []
        refigure(h5, **{figure: value})
        ((_, problem),) = found(tmp_path / figure, deep=True)
        assert problem.startswith(f"features/mean/001: {figure} is {value}")


def test_hdf5_that_cannot_run_or_does_not_end_is_no_reason_to_forget(tmp_path, monkeypatch):
    dump(tmp_path, table(4))
    before = tree(tmp_path)
    for program, reason in (
        ("exit 3", "the process in which HDF5 reads it ended with code 3"),
        ("kill -KILL $$", "the process in which HDF5 reads it ended with code -9"),  # as where memory is short
        ("exec sleep 60", "HDF5 did not end within 0 s"),
    ):
        monkeypatch.setattr("probekit.store.hdf5_check.SECONDS", 0.3 if "sleep" in program else 60)
        monkeypatch.setattr(sys, "executable", executable(tmp_path.parent / "program", program))
        problems = verify_store(tmp_path, deep=True, repair=True).problems
        assert [problem.problem for problem in problems] == [f"cannot be read ({reason})"] * 2
        assert not any(problem.repaired for problem in problems)
        assert tree(tmp_path) == before


def test_a_file_on_which_hdf5_crashes_is_forgotten(tmp_path, monkeypatch):
    dump(tmp_path, table(4))
    bad, good = sorted(tmp_path.rglob("*.h5"))
    crash = f'read line; case "$line" in *{bad.stem}.h5*) kill -SEGV $$;; *) echo null;; esac'
    monkeypatch.setattr(sys, "executable", executable(tmp_path.parent / "program", crash))
    (problem,) = verify_store(tmp_path, deep=True, repair=True).problems
    assert (problem.problem, problem.repaired) == ("HDF5 crashes on it (SIGSEGV)", True)
    assert list(tmp_path.rglob("*.h5")) == [good]


def executable(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_an_imported_store_is_imported_again(tmp_path):
    dump(tmp_path, table(4))
    open_store(tmp_path, config=CONFIG, describe={"imported": True})
    bad, _ = sorted(tmp_path.rglob("*.h5"))
    os.truncate(bad, 100)
    (problem,) = verify_store(tmp_path).problems
    assert problem.mend == "run the same probekit import-features command again"


def test_a_bad_disk_is_no_reason_to_forget(tmp_path, monkeypatch):
    dump(tmp_path, table(4))
    before = tree(tmp_path)

    def fails(*args, **kwargs):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("probekit.store.shards.os.preadv", fails)
        problems = verify_store(tmp_path, repair=True).problems
    assert [problem.problem for problem in problems] == ["cannot be read (Input/output error)"] * 2
    assert tree(tmp_path) == before


def test_a_shard_that_a_dump_redoes_meanwhile_is_left(tmp_path):
    path = tmp_path / "s"
    dump(path, table(4))
    intact, (bad, *_) = tree(path), sorted(path.rglob("*.h5"))
    os.truncate(bad, 100)
    (problem,) = verify_store(path, repair=True, progress=lambda *_: dump(path, table(4))).problems
    assert not problem.repaired
    assert problem.mend.startswith("not removed: it changed meanwhile; check again")
    assert tree(path) == intact


def test_store_json(tmp_path):
    path, file = tmp_path / "s", tmp_path / "s" / "store.json"
    dump(path, table(4))
    intact = tree(path)
    content = fmt.unseal(intact["store.json"])
    configs = [{"layers": [], "poolings": {}}, {"layers": 3}, [1], {**content["config"], "pooling_layers": {"x": [1]}}]
    damaged = [
        *(fmt.seal(content | {"config": c, "fingerprint": "0" * 64}) for c in configs),
        fmt.seal(content | {"describe": [1]}),
        fmt.seal(content | {"fingerprint": "0" * 64}),
        fmt.seal({"format": "other"}),
        intact["store.json"].replace(b"tiny", b"tony"),
        b"[" * 100000,
        b"\xff",
        None,
    ]
    for data in damaged:
        file.unlink() if data is None else file.write_bytes(data)
        (problem,) = verify_store(path, deep=True, repair=True).problems
        assert problem.path == str(file)
        assert problem.mend == (
            f"{'delete it and ' if data is not None else ''}run the same probekit command again that made the store: "
            "it writes it; no shard was checked, and none is lost"
        )
        assert not problem.repaired
        assert shard_bytes(path) == {name: data for name, data in intact.items() if name.startswith("shards")}
    file.write_bytes(fmt.seal(content | {"format_version": "2.0"}))
    (problem,) = verify_store(path).problems
    assert (problem.problem, problem.mend) == (
        "format version is 2.0; this probekit reads 1.x: use one that reads 2.0",
        "use a probekit of that version; no shard was checked",
    )
    file.unlink()  # what the messages say
    dump(path, table(4))
    assert found(path, deep=True) == []
    with pytest.raises(NoStoreError, match=r"no store.json"):
        verify_store(tmp_path / "nothing")


def test_judgements_and_plans(tmp_path):
    writer, rows = dump(tmp_path, table(4, images=2)), table(4, images=2)
    votes = writer.write_judgements("votes", judged(rows, 4))
    writer.write_judgements("good", judged(rows, 2))
    assert found(tmp_path) == []
    intact, shards, sidecar = votes.read_bytes(), shard_bytes(tmp_path), votes.with_suffix(".json")
    vouched = sidecar.read_bytes()
    for position in range(4, len(intact), 97):
        flip(votes, position)
        (problem,) = verify_store(tmp_path).problems
        assert f"(not the file of {sidecar})" in problem.problem
        assert problem.mend == f"delete it and votes.json, and {AGAIN}"
        votes.write_bytes(intact)
    edits = [{"name": "good"}, {"format": "other"}, {"format_version": "2.0"}, {"bytes": -1}]
    for damaged in (vouched[:-1], *(fmt.seal(json.loads(vouched) | edit) for edit in edits)):
        sidecar.write_bytes(damaged)
        ((of, problem),) = found(tmp_path, repair=True)
        assert of == "judgements/votes.parquet"
        assert sidecar.read_bytes() == damaged
    votes.unlink()
    assert found(tmp_path, repair=True) == [("judgements/votes.json", "its set votes.parquet is not there")]
    sidecar.unlink()
    assert found(tmp_path) == []  # no trace of a set: nothing says that there should be one
    for bad, message in [
        (b"PAR1 no", "cannot be read as judgements"),
        (judged(rows, 4).drop(columns="label"), "the judgements have no column 'label'"),
        (judged(rows, 4).assign(label="yes"), "a judgement has the label 'yes'"),
        (judged(rows, 4).assign(group=None), "4 judgements have no 'group'"),
        (judged(rows, 4).assign(group="one", split=["train", "train", "test", "test"]), "group 'one' is in 2 splits"),
    ]:
        votes.write_bytes(bad) if isinstance(bad, bytes) else bad.to_parquet(votes)
        hurt = votes.read_bytes()
        ((of, problem),) = found(tmp_path, repair=True)
        assert of == "judgements/votes.parquet"
        assert message in problem
        assert votes.read_bytes() == hurt  # judgements are never touched
    votes.write_bytes(intact)
    (problem,) = verify_store(tmp_path, repair=True).problems
    assert (problem.path, problem.problem) == (str(votes), "has no sidecar votes.json that vouches for it")
    assert problem.mend == f"{AGAIN}: it writes it"
    for position in range(4, len(intact) // 4, 5):  # pages have checksums, their headers do not
        flip(votes, position)
        ((_, problem),) = found(tmp_path)
        if problem.startswith("has no sidecar"):
            pd.testing.assert_frame_equal(read_judgements(votes), judged(rows, 4))
        votes.write_bytes(intact)
    writer.write_judgements("votes", judged(rows, 4))
    assert found(tmp_path) == []
    head = fmt.unseal((tmp_path / "store.json").read_bytes())
    for version, lines in (("1.1", 0), ("1.2", 1), ("1.10", 1)):  # older versions wrote none
        sidecar.unlink(missing_ok=True)
        (tmp_path / "store.json").write_bytes(fmt.seal(head | {"format_version": version}))
        assert len(found(tmp_path)) == lines
    writer.write_judgements("votes", judged(rows, 4))
    (plan,) = (tmp_path / "plans").glob("*.json")
    good = plan.read_bytes()
    twice = fmt.unseal(good)["blocks"][0][:1] * 2
    for content, message in [
        (b"{}", "not a record that carries its own SHA-256"),
        (fmt.seal({"blocks": [["x"]]}), "blocks.0.0: String should match"),
        (fmt.seal({"blocks": 3}), "blocks: Input should be a valid list"),
        (fmt.seal({"blocks": [twice]}), "blocks.0: Value error, a row stands there twice"),
    ]:
        plan.write_bytes(content)
        (problem,) = verify_store(tmp_path, repair=True).problems
        assert (problem.path, problem.mend) == (str(plan), f"delete it and {AGAIN}")
        assert problem.problem.startswith(message)
    plan.write_bytes(good)
    plan.rename(plan.with_stem("0" * 32))
    assert found(tmp_path) == [(f"plans/{'0' * 32}.json", "not the plan of this name")]
    assert shard_bytes(tmp_path) == shards


def test_unfinished_dumps(tmp_path):
    rows = table(8)
    writer = open_store(tmp_path, config=CONFIG, describe={"name": "tiny"})
    writer.plan(rows, sigma="0.005", rows_per_shard=6)
    assert found(tmp_path) == [("shards", "24 rows are planned and none is there: no shard")]
    dump(tmp_path, rows[:12])
    assert found(tmp_path) == [("shards/0.005", f"12 of 24 rows have no features here (2 of 4 blocks): {UNFINISHED}")]
    dump(tmp_path, rows)
    assert found(tmp_path) == []
    dump(tmp_path, rows[:6], "0.1")
    assert found(tmp_path) == [("shards/0.1", f"18 of 24 rows have no features here (3 of 4 blocks): {UNFINISHED}")]
    dump(tmp_path, rows, "0.1", size=4)  # other blocks, all rows
    assert found(tmp_path) == []
    (first, *_) = sorted(tmp_path.glob("shards/0.1/*.h5"))
    first.with_suffix(".json").unlink()
    with locked(first):  # a dump is writing it
        assert "never committed" not in str(found(tmp_path))
    ((of, problem),) = found(tmp_path)  # its rows are not said twice
    assert (of, problem) == (f"shards/0.1/{first.name}", "was never committed: it has no sidecar")


def test_shards_that_do_not_agree(tmp_path, monkeypatch):
    monkeypatch.setattr("probekit.store.writer._refuse_rows_of_others", lambda *_: None)  # another writer's shards
    rows, path = table(6), tmp_path / "s"
    writer = dump(path, rows)
    good = shard_bytes(path)

    def plant(part, width):
        block = Block(fmt.block_name(list(part["row_id"])), tuple(part["row_id"]))
        features = {("mean", layer): np.ones((len(part), width), np.float32) for layer in (0, 1, 2)}
        writer.write_shard(block, sigma="0.005", timestep=5.0, rows=part, features=features)
        return f"shards/0.005/{block.name}.h5"

    of = plant(table(7)[18:], WIDTH + 1)
    assert found(path, repair=True) == [(of, f"features/mean/000 is {WIDTH + 1} wide, in other shards {WIDTH}")]
    assert shard_bytes(path) == good
    plant(rows[3:9], WIDTH)  # over two blocks
    problems = [problem for of, problem in found(path, repair=True) if of.endswith("h5")]
    assert problems
    assert all("of its rows are in" in problem for problem in problems)
    of = plant(table(7)[18:].iloc[[0, 1, 1]], WIDTH)
    assert found(path, repair=True)[0] == (of, "holds a row twice")
    dump(path, rows)
    assert found(path, deep=True) == []
    assert len(FeatureStore(path).rows) == 18
    (h5, *_) = sorted(path.rglob("*.h5"))
    datasets = fmt.unseal(h5.with_suffix(".json").read_bytes())["datasets"]
    del datasets["features/mean/001"]
    commit(h5, datasets=datasets)
    lacks = "lacks dataset features/mean/001, which the store's config names"
    assert found(path) == [(os.path.relpath(h5, path), lacks)]


def test_left_over_files(tmp_path):
    dump(tmp_path, table(2))
    (h5,) = tmp_path.rglob("*.h5")
    dead = [tmp_path / f"{TEMP}store.json-1-ab", h5.with_name(LOCK + h5.name)]
    for path in dead:
        path.touch()
    (tmp_path / "shards" / "notes.json").touch()  # names that are not ours
    (h5.parent / "notes.json").touch()
    with temporary(h5) as (living, _):
        assert sorted(found(tmp_path)) == sorted(
            (os.path.relpath(path, tmp_path), "was left by a process that is gone") for path in dead
        )
        report = verify_store(tmp_path, repair=True)
        assert [(problem.repaired, problem.mend) for problem in report.problems] == [(True, "removed")] * 2
        assert living.exists()
        assert not any(path.exists() for path in dead)
    assert found(tmp_path) == []
    assert (h5.parent / "notes.json").exists()


def test_links_and_odd_names(tmp_path):
    path = tmp_path / "s"
    dump(path, table(2))
    (path / "shards" / "0.005").rename(tmp_path / "elsewhere")
    (path / "shards" / "0.005").symlink_to(tmp_path / "elsewhere")
    (path / "judgements").symlink_to(tmp_path)
    (path / "notes").symlink_to(tmp_path)
    (path / f"{TEMP}x").symlink_to(tmp_path / "nothing")
    (path / "plans" / os.fsdecode(b"a\n\xff.json")).mkdir()
    own = "is a symbolic link; allowed: a file or folder of its own"
    assert sorted(found(path, repair=True)) == [
        (f"{TEMP}x", own),
        ("judgements", "is a symbolic link; allowed: a folder"),
        ("notes", own),
        ("plans/a\\n\\udcff.json", "not a regular file"),
        ("shards", "6 rows are planned and none is there: no shard"),
        ("shards/0.005", "is a symbolic link; allowed: a folder"),
    ]
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2
    with pytest.raises(StoreError, match=r"shards/0.005: is a symbolic link; allowed: a folder \(and 1 more\)$"):
        FeatureStore(path)


@pytest.mark.parametrize("name", ["shards", "shards/0.1/1", "judgements", "plans"])
def test_folders_outside_a_store_are_not_looked_into(tmp_path, name):
    """Nothing behind a link is read or forgotten, however bad it is; a file in place of a folder is a line too."""
    path, outside = tmp_path / "s", tmp_path / "outside"
    damages.fill(path)
    place = path / name
    place.rename(outside)
    for file in outside.rglob("*.*"):
        if file.is_file():
            os.truncate(file, 10)
    before = tree(outside)
    place.symlink_to(outside)
    lines = [line for line in found(path, deep=True, repair=True) if line[1].startswith(("is a", "not a"))]
    assert lines == [(name, "is a symbolic link; allowed: a folder")]
    assert tree(outside) == before
    place.unlink()
    place.touch()
    assert (name, "not a folder; allowed: a folder") in found(path, repair=True)
    assert place.is_file()


# Nothing in a store says that there were judgements, or which noise levels: their whole folder leaves no trace.
@pytest.mark.parametrize("name", [name for name in sample() if name != "missing folder: judgements"])
def test_every_damage_is_a_line(tmp_path, name, whole):
    """Where a reader refuses a damaged copy, `verify_store` says so; it raises at none."""
    copy = damages.Copy(Path(shutil.copytree(whole[0], tmp_path / "s")), whole[1], Random(0))
    damages.KINDS[name](copy)
    problems = found(copy.root) or found(copy.root, deep=True)
    assert problems or damages.expected(name) != "refused"
    found(copy.root, repair=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    damages.fill(root / "whole")
    damages.fill(root / "other", seed=1)
    return root / "whole", root / "other"


def test_a_shard_that_changes_while_it_is_checked(tmp_path):
    dump(tmp_path, table(2))
    (h5,) = tmp_path.rglob("*.h5")
    (problem,) = verify_store(tmp_path, progress=lambda *_: os.truncate(h5, 100)).problems
    assert "100 bytes instead of" in problem.problem
    assert problem.mend == "check again when nothing writes into the store"
