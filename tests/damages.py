"""Ways to damage a small complete store, one at a time, and what must become of each: refused, or no other values.

A kind is a function of a `Copy`; the campaign ``campaigns/damaged_copies.py`` runs many copies of each kind, the suite
one or two. Reading happens in a child process (``python damages.py REFERENCE``), so a crash or a hang is an outcome.
"""

import hashlib
import json
import os
import re
import resource
import select
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd

from probekit._types import row_id
from probekit.errors import StoreError
from probekit.store import FeatureStore, open_store
from probekit.store import format as fmt

COORDINATES = [("0.005", 0), ("0.1", 0), ("0.1", 1)]
CONFIG = {
    "layers": [{"index": i, "name": f"blocks.{i}", "stream": "image"} for i in (0, 1, 2)],
    "poolings": {"mean": "mean over image tokens", "text_mean": "mean over text tokens"},
    "pooling_layers": {"text_mean": [0, 1]},
    "noise": {"seed": 0, "scheme": "shared"},
}
WIDTHS = {"mean": 5, "text_mean": 5}  # of equal size, so that datasets can be taken for one another
WANTED = [("mean", 0), ("mean", 1), ("mean", 2), ("text_mean", 0), ("text_mean", 1)]
SECONDS = 60  # for one copy; a read takes about 0.05


def table() -> pd.DataFrame:
    """18 rows: six prompts with three images each."""
    rows = []
    for prompt in (f"prompt {i}, ü" for i in range(6)):
        for image in range(3):
            digest = hashlib.sha256(f"{prompt}{image}".encode()).digest()
            rows.append(
                {
                    "row_id": row_id(digest, prompt),
                    "prompt": prompt,
                    "image_id": f"{prompt}/{image}.png",
                    "image_sha256": digest,
                    "width": 64 + image,
                    "height": 48 + image,
                    "file_bytes": 1000 + image,
                    "status": 0,
                }
            )
    return pd.DataFrame(rows)


def values(*place: object) -> np.ndarray:
    """Features of one row as a function of where they belong; float16 holds them, but for layer 2."""
    seed = int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], "big")
    features = np.random.default_rng(seed).integers(-512, 512, 5).astype(np.float32) / 8
    return features + (60000 if "2" in map(str, place[1:3]) else 0)


def fill(root: Path, *, seed: int = 0) -> list[str]:
    """Write what the store lacks; return the shards that were written, as ``sigma[/draw]/block``."""
    config = CONFIG | {"noise": {"seed": seed, "scheme": "shared"}}
    writer, rows, done = open_store(root, config=config, describe={"name": "tiny"}), table(), []
    for sigma, draw in COORDINATES:
        for block in writer.plan(rows, sigma=sigma, draw=draw, rows_per_shard=6):
            part = rows.set_index("row_id").loc[list(block.row_ids)].reset_index()
            features = {
                (pooling, layer): np.stack([values(key, layer, pooling, sigma, draw, seed) for key in part["row_id"]])
                for pooling, layer in WANTED
            }
            path = writer.write_shard(block, sigma=sigma, draw=draw, timestep=5.0, rows=part, features=features)
            done.append(shard_name(path))
    ids = rows["row_id"].tolist()
    pairs = pd.DataFrame({"pair_id": [f"pair {i}" for i in range(9)], "row_a": ids[0::2], "row_b": ids[1::2]})
    pairs = pairs.assign(label=[1.0, 0.0, 0.5] * 3, group=pairs["row_a"], split=["train", "validation", "test"] * 3)
    writer.write_judgements("votes", pairs.assign(source="tiny", weight=1.0))
    writer.record_resolution("0.005", ratio=2.5, rows=4)
    return done


def shard_name(path: Path) -> str:
    """``sigma[/draw]/block`` of a file of a shard."""
    return str(path.with_suffix("")).rpartition("/shards/")[2]


def planned(root: Path) -> list[str]:
    """Shards that the dump command would do again."""
    writer = open_store(root, config=CONFIG, describe={"name": "tiny"})
    return [
        f"{sigma}/{f'{draw}/' if draw else ''}{block.name}"
        for sigma, draw in COORDINATES
        for block in writer.plan(table(), sigma=sigma, draw=draw, rows_per_shard=6)
    ]


def everything(root: Path) -> dict[str, Any]:
    """Read rows, all features, all tables and pairs of a store."""
    store = FeatureStore(root)
    found = {
        "rows": store.rows.to_dict("list"),
        "config": store.config,
        "layers": [repr(store.layers_of(pooling)) for pooling in ("mean", "text_mean")],
        "facts": store.describe,
    }
    for sigma, draw in COORDINATES:
        for pooling, layer in WANTED:
            read = store.read(layer=layer, sigma=sigma, draw=draw, pooling=pooling)
            found[f"{sigma} {draw} {pooling} {layer}"] = hashlib.sha256(read.tobytes() + repr(read.shape).encode())
    found |= {name: digest.hexdigest() for name, digest in found.items() if hasattr(digest, "hexdigest")}
    for shard in store._shards:
        for name in shard.sidecar.datasets:
            for _ in shard.chunks(name):
                pass
    for split in (None, "train", "validation", "test"):
        pairs = store.pairs(split=split)
        found[f"pairs {split}"] = [pairs.rows.tolist(), pairs.label.tolist(), pairs.frame.to_dict("list")]
        found[f"pairs {split}"].append(pairs.excluded.to_dict("list"))
    return found


def serve(reference: Path) -> None:
    """Read one path a line from stdin, answer one JSON line each: equal, facts, refused (with the message) or other."""
    right = everything(reference)
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))  # a bomb becomes a MemoryError, which is a fault
    for line in sys.stdin:
        try:
            found = everything(Path(line.rstrip("\n")))
            differing = sorted(name for name in right.keys() | found.keys() if found.get(name) != right.get(name))
            outcome = "equal" if not differing else "facts" if differing == ["facts"] else "other"
            answer = (outcome, str(differing))
        except StoreError as error:
            answer = ("refused", str(error))
        except BaseException as error:  # noqa: BLE001 - whatever else comes is what the campaign looks for
            answer = ("raised", repr(error))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


class Child:
    """A process that reads copies; one that dies or hangs is an outcome, and the next copy gets a new one."""

    def __init__(self, reference: Path) -> None:
        self.command = [sys.executable, "-W", "error::UserWarning", __file__, str(reference)]
        self.process: subprocess.Popen[str] | None = None

    def read(self, path: Path) -> tuple[str, str]:
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            )
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], SECONDS)[0]:
            self.close()
            return "hung", f"no answer in {SECONDS} s"
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.close()
            return "crashed", f"exit code {code}"
        return tuple(json.loads(line))

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@dataclass
class Copy:
    """A copy of a store that is about to be damaged.

    Attributes
    ----------
    root
        The copy.
    other
        A store of the same rows with another configuration, to take files from.
    random
        Where to damage.
    touched
        Shards that were damaged or removed, as ``sigma[/draw]/block``.
    """

    root: Path
    other: Path
    random: Random
    touched: set[str] = field(default_factory=set)

    def shard(self, folder: str | None = None) -> Path:
        """Choose a shard; return its ``.h5`` file."""
        pattern = f"shards/{folder}/*.h5" if folder else "shards/**/*.h5"
        path = self.random.choice(sorted(self.root.glob(pattern)))
        self.touched.add(shard_name(path))
        return path

    def sidecar(self) -> Path:
        return self.shard().with_suffix(".json")

    def file(self, name: str) -> Path:
        """Choose a file by the name of its sort."""
        return {
            "h5": self.shard,
            "sidecar": self.sidecar,
            "store": lambda: self.root / "store.json",
            "judgements": lambda: self.root / "judgements" / "votes.parquet",
            "judgements sidecar": lambda: self.root / "judgements" / "votes.json",
            "plan": lambda: next((self.root / "plans").glob("*.json")),
        }[name]()


Kind = Callable[[Copy], None]
KINDS: dict[str, Kind] = {}
EQUAL = {"plan", "judgements sidecar"}
"""Files that no reading needs: a store without them is the same store."""


def kind(name: str) -> Callable[[Kind], Kind]:
    def add(damage: Kind) -> Kind:
        KINDS[name] = damage
        return damage

    return add


FILES = ("h5", "sidecar", "store", "judgements", "judgements sidecar", "plan")


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def ranges(path: Path) -> dict[str, range]:
    """Where the datasets of a shard lie."""
    records = json.loads(path.with_suffix(".json").read_bytes())["datasets"]
    return {
        name: range(record["offset"], record["offset"] + record["nbytes"])
        for name, record in records.items()
        if record["nbytes"]
    }


def bit_flip(copy: Copy, path: Path, positions: list[int]) -> None:
    flip(path, copy.random.choice(positions), copy.random.randrange(8))


@kind("flip: features")
def _(copy: Copy) -> None:
    path = copy.shard()
    bit_flip(copy, path, [i for name, at in ranges(path).items() if name.startswith("features") for i in at])


@kind("flip: tables")
def _(copy: Copy) -> None:
    path = copy.shard()
    bit_flip(copy, path, [i for name, at in ranges(path).items() if not name.startswith("features") for i in at])


@kind("flip: HDF5 metadata")
def _(copy: Copy) -> None:
    path = copy.shard()
    data = {i for at in ranges(path).values() for i in at}
    bit_flip(copy, path, [i for i in range(path.stat().st_size) if i not in data])


def for_each_file(name: str, damage: Callable[[Copy, Path], None]) -> None:
    for file in FILES:
        KINDS[f"{name}: {file}"] = lambda copy, file=file: damage(copy, copy.file(file))


for_each_file("flip", lambda copy, path: bit_flip(copy, path, list(range(path.stat().st_size))))
for_each_file("truncated", lambda copy, path: os.truncate(path, copy.random.randrange(path.stat().st_size)))
for_each_file("emptied", lambda copy, path: os.truncate(path, 0))
for_each_file("appended", lambda copy, path: path.write_bytes(path.read_bytes() + copy.random.randbytes(7)))
for_each_file("missing", lambda copy, path: path.unlink())


def hole(copy: Copy, path: Path) -> None:
    """A page of zeros, as after a power cut; where zeros stood already, ones."""
    data = bytearray(path.read_bytes())
    start = copy.random.randrange(0, len(data), 512)
    page = data[start : start + 512]
    data[start : start + 512] = bytes(len(page)) if any(page) else b"\1" * len(page)
    path.write_bytes(data)


def link(copy: Copy, path: Path) -> None:
    away = path.rename(copy.root.parent / f"{copy.root.name}-away")
    path.symlink_to(away)


def pipe(copy: Copy, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(copy: Copy, path: Path) -> None:
    path.unlink()
    path.mkdir()


for_each_file("a page lost", hole)
for_each_file("symbolic link", link)
for_each_file("pipe", pipe)
for_each_file("folder in its place", folder)

FOLDERS = {"shards": None, "shards/0.005": "0.005/", "shards/0.1": "0.1/", "shards/0.1/1": "0.1/1/", "judgements": ""}


def for_each_folder(name: str, damage: Callable[[Copy, Path], None]) -> None:
    def act(copy: Copy, place: str, inside: str | None) -> None:
        names = {shard_name(path) for path in copy.root.glob("shards/**/*.h5")}
        copy.touched |= {shard for shard in names if inside is None or (inside and shard.startswith(inside))}
        damage(copy, copy.root / place)

    for place, inside in FOLDERS.items():
        KINDS[f"{name}: {place}"] = lambda copy, place=place, inside=inside: act(copy, place, inside)


def file_in_its_place(copy: Copy, path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"")


for_each_folder("missing folder", lambda copy, path: shutil.rmtree(path))
for_each_folder("linked folder", link)
for_each_folder("file in place of folder", file_in_its_place)


def swap(a: Path, b: Path, endings: tuple[str, ...]) -> None:
    for ending in endings:
        one, two = a.with_suffix(ending), b.with_suffix(ending)
        data = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(data)


def partner(copy: Copy, axis: str) -> tuple[Path, Path]:
    """Two shards that differ in one coordinate."""
    if axis == "blocks":
        a = copy.shard()
        b = copy.random.choice([path for path in sorted(a.parent.glob("*.h5")) if path != a])
    else:
        a = copy.shard({"sigmas": "0.005", "draws": "0.1"}[axis])
        b = copy.root / "shards" / {"sigmas": "0.1", "draws": "0.1/1"}[axis] / a.name
    copy.touched.add(shard_name(b))
    return a, b


ENDINGS = {"files": (".h5",), "sidecars": (".json",), "files and sidecars": (".h5", ".json")}
for axis in ("blocks", "sigmas", "draws"):
    for what, endings in ENDINGS.items():
        KINDS[f"swapped between {axis}: {what}"] = lambda copy, axis=axis, endings=endings: swap(
            *partner(copy, axis), endings
        )


def from_other(copy: Copy, endings: tuple[str, ...]) -> None:
    path = copy.shard()
    for ending in endings:
        file = path.with_suffix(ending)
        file.write_bytes((copy.other / file.relative_to(copy.root)).read_bytes())


for what, endings in ENDINGS.items():
    KINDS[f"from another store: {what}"] = lambda copy, endings=endings: from_other(copy, endings)


@kind("from another store: judgements without sidecar")
def _(copy: Copy) -> None:
    frame = pd.read_parquet(copy.other / "judgements" / "votes.parquet")
    frame.assign(label=1 - frame["label"]).to_parquet(copy.file("judgements"), index=False)


@kind("from another store: store.json")
def _(copy: Copy) -> None:
    copy.file("store").write_bytes((copy.other / "store.json").read_bytes())


@kind("from another store: a shard of its own")
def _(copy: Copy) -> None:
    path = sorted(copy.other.glob("shards/0.005/*.h5"))[0]
    for ending in (".h5", ".json"):
        target = copy.root / "shards" / "0.25" / path.with_suffix(ending).name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.with_suffix(ending).read_bytes())


@kind("a block under another name")
def _(copy: Copy) -> None:
    path = copy.shard()
    copy.touched.clear()  # what is there stays whole; there is one shard too many
    for ending in (".h5", ".json"):
        shutil.copy(path.with_suffix(ending), path.with_name("0" * 32 + ending))


def moved(copy: Copy, axis: str) -> None:
    """A shard in the place of another one, its sidecar edited to fit there and sealed again."""
    a, b = partner(copy, axis)
    copy.touched.discard(shard_name(a))
    there = json.loads(b.with_suffix(".json").read_bytes())
    content = json.loads(a.with_suffix(".json").read_bytes())
    content |= {key: there[key] for key in ("block", "sigma", "draw", "rows_sha256")}
    b.write_bytes(a.read_bytes())
    b.with_suffix(".json").write_bytes(fmt.seal(content))


for axis in ("blocks", "sigmas", "draws"):
    KINDS[f"moved between {axis}, resealed"] = lambda copy, axis=axis: moved(copy, axis)


def edit(path: Path, change: Callable[[dict[str, Any]], None], *, seal: bool = True) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_bytes(fmt.seal(content) if seal else fmt.canonical_json(content).encode())


def two_features(copy: Copy, content: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of two feature datasets of one size."""
    by_size: dict[int, list[dict[str, Any]]] = {}
    for name, record in content["datasets"].items():
        if name.startswith("features"):
            by_size.setdefault(record["nbytes"], []).append(record)
    return copy.random.sample(max(by_size.values(), key=len), 2)


def exchange(one: dict[str, Any], two: dict[str, Any], *keys: str) -> None:
    for key in keys or tuple(one):
        one[key], two[key] = two[key], one[key]


def one_feature(copy: Copy, content: dict[str, Any]) -> dict[str, Any]:
    return content["datasets"][copy.random.choice(["features/mean/000", "features/text_mean/001"])]


def other_type(record: dict[str, Any]) -> None:
    record |= {"dtype": "<f4", "shape": [record["shape"][0], record["shape"][1] // 2]}
    record["nbytes"] = 4 * record["shape"][0] * record["shape"][1]


SIDECAR_EDITS: dict[str, Callable[[Copy, dict[str, Any]], object]] = {
    "offsets exchanged": lambda copy, x: exchange(*two_features(copy, x), "offset"),
    "records exchanged": lambda copy, x: exchange(*two_features(copy, x)),
    "checksum of another dataset": lambda copy, x: exchange(*two_features(copy, x), "crc32"),
    "width and height exchanged": lambda _, x: exchange(x["datasets"]["rows/width"], x["datasets"]["rows/height"]),
    "checksum of a table": lambda _, x: x["datasets"]["prompts/sha256"].update(crc32=7),
    "offset moved": lambda copy, x: one_feature(copy, x).update(offset=one_feature(copy, x)["offset"] + 2),
    "offset outside": lambda copy, x: one_feature(copy, x).update(offset=x["bytes"] - 8),
    "offset in the metadata": lambda copy, x: one_feature(copy, x).update(offset=0),
    "shape": lambda copy, x: one_feature(copy, x)["shape"].reverse(),
    "narrower": lambda copy, x: one_feature(copy, x).update(shape=[6, 4], nbytes=48),
    "huge shape": lambda copy, x: one_feature(copy, x).update(shape=[6, 2**61], nbytes=12 * 2**61),
    "dtype": lambda copy, x: one_feature(copy, x).update(dtype="<f4"),
    "dtype and shape": lambda copy, x: other_type(one_feature(copy, x)),
    "integers": lambda copy, x: one_feature(copy, x).update(dtype="|u1", shape=[6, 10]),
    "n_rows": lambda _, x: x.update(n_rows=5),
    "huge n_rows": lambda _, x: x.update(n_rows=2**62),
    "n_prompts": lambda _, x: x.update(n_prompts=1),
    "sigma": lambda _, x: x.update(sigma="0.5"),
    "draw": lambda _, x: x.update(draw=x["draw"] + 1),
    "block": lambda _, x: x.update(block="0" * 32),
    "fingerprint": lambda _, x: x.update(fingerprint="0" * 64),
    "rows_sha256": lambda _, x: x.update(rows_sha256="0" * 64),
    "meta_sha256": lambda _, x: x.update(meta_sha256="0" * 64),
    "sha256": lambda _, x: x.update(sha256="0" * 64),
    "bytes": lambda _, x: x.update(bytes=x["bytes"] + 1),
    "absmax": lambda copy, x: one_feature(copy, x).update(absmax=1e9),
    "dataset dropped": lambda _, x: x["datasets"].pop("features/mean/001"),
    "dataset renamed": lambda _, x: x["datasets"].update({"features/mean/002": x["datasets"].pop("features/mean/001")}),
    "older version": lambda _, x: x.update(format_version="1.0"),
    "newer major": lambda _, x: x.update(format_version="2.0"),
    "other format": lambda _, x: x.update(format="other"),
    "wrong kinds": lambda _, x: x.update(datasets=[1, 2]),
    "unknown member": lambda _, x: x.update(note="from a later version"),
}
for name, change in SIDECAR_EDITS.items():
    for sealed in (True, False):
        KINDS[f"sidecar edited{', resealed' if sealed else ''}: {name}"] = lambda copy, change=change, sealed=sealed: (
            edit(copy.sidecar(), lambda content: change(copy, content), seal=sealed)
        )


def meta_sha256(path: Path, content: dict[str, Any]) -> str:
    """What ``meta_sha256`` should be for a file and the ranges of a sidecar."""
    data = bytearray(path.read_bytes())
    for record in sorted(content["datasets"].values(), key=lambda record: -(record["offset"] or 0)):
        if record["nbytes"]:
            del data[record["offset"] : record["offset"] + record["nbytes"]]
    return hashlib.sha256(data).hexdigest()


@kind("sidecar edited, resealed: dataset dropped, its bytes counted as metadata")
def _(copy: Copy) -> None:
    path = copy.shard()

    def change(content: dict[str, Any]) -> None:
        del content["datasets"]["features/mean/001"]
        content["meta_sha256"] = meta_sha256(path, content)

    edit(path.with_suffix(".json"), change)


@kind("sidecar edited, resealed: older version, records exchanged")
def _(copy: Copy) -> None:
    def change(content: dict[str, Any]) -> None:
        exchange(*two_features(copy, content))
        content["format_version"] = "1.1"

    edit(copy.sidecar(), change)


@kind("features edited, resealed with the digests of the file")
def _(copy: Copy) -> None:
    path = copy.shard()
    flip(path, ranges(path)["features/mean/001"][0], 3)
    edit(path.with_suffix(".json"), lambda x: x.update(sha256=hashlib.sha256(path.read_bytes()).hexdigest()))


@kind("features edited, resealed with all checksums")
def _(copy: Copy) -> None:
    import zlib

    path = copy.shard()
    at = ranges(path)["features/mean/001"]
    flip(path, at[0], 3)
    data = path.read_bytes()

    def change(content: dict[str, Any]) -> None:
        content["sha256"] = hashlib.sha256(data).hexdigest()
        content["datasets"]["features/mean/001"]["crc32"] = zlib.crc32(data[at.start : at.stop])

    edit(path.with_suffix(".json"), change)


@kind("metadata longer, resealed with the digests of the file")
def _(copy: Copy) -> None:
    path = copy.shard()
    path.write_bytes(path.read_bytes() + b"unused")

    def change(content: dict[str, Any]) -> None:
        data = path.read_bytes()
        content |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        content["meta_sha256"] = meta_sha256(path, content)

    edit(path.with_suffix(".json"), change)


def set_config(content: dict[str, Any], **config: Any) -> None:
    content["config"] |= config
    content["fingerprint"] = fmt.fingerprint(content["config"])


STORE_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "noise seed": lambda x: set_config(x, noise={"seed": 1, "scheme": "shared"}),
    "layers reversed": lambda x: set_config(x, layers=x["config"]["layers"][::-1]),
    "layer renamed": lambda x: set_config(x, layers=[x["config"]["layers"][0] | {"name": "other"}]),
    "layers of a pooling": lambda x: set_config(x, pooling_layers={"text_mean": [0]}),
    "layers of a pooling that fit none": lambda x: set_config(x, pooling_layers={"text_mean": [7]}),
    "poolings renamed": lambda x: set_config(x, poolings={"max": "x", "text_mean": "x"}),
    "poolings without definition": lambda x: set_config(x, poolings=["mean"]),
    "layers of the wrong kind": lambda x: set_config(x, layers="012"),
    "layers of the wrong members": lambda x: set_config(x, layers=[{"number": 0}]),
    "no layers": lambda x: set_config(x, layers=[]),
    "config of the wrong kind": lambda x: x.update(config=[], fingerprint=fmt.fingerprint({})),
    "config without fingerprint": lambda x: x["config"].update(noise=None),
    "fingerprint": lambda x: x.update(fingerprint="0" * 64),
    "fingerprint of the wrong kind": lambda x: x.update(fingerprint=None),
    "facts": lambda x: x["describe"].update(name="another"),
    "facts of the wrong kind": lambda x: x.update(describe=[]),
    "no facts": lambda x: x.pop("describe"),
    "resolution of the wrong kind": lambda x: x["describe"].update(sigma_resolution=[1]),
    "resolution that contradicts itself": lambda x: x["describe"]["sigma_resolution"]["0.005"].update(resolved=True),
    "newer minor": lambda x: x.update(format_version="1.99"),
    "newer major": lambda x: x.update(format_version="2.0"),
    "version of the wrong kind": lambda x: x.update(format_version=["1"]),
    "other format": lambda x: x.update(format="other"),
    "unknown member": lambda x: x.update(added_later=1),
}
for name, change in STORE_EDITS.items():
    for sealed in (True, False):
        KINDS[f"store.json edited{', resealed' if sealed else ''}: {name}"] = (
            lambda copy, change=change, sealed=sealed: edit(copy.file("store"), change, seal=sealed)
        )


def text_edit(copy: Copy, path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def reindented(copy: Copy, path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=2))


for file in ("sidecar", "store", "plan", "judgements sidecar"):
    for name, act in {
        "laid out anew": reindented,
        "a key twice": lambda copy, path: text_edit(copy, path, b"{", b'{"format":"probekit-features",'),
        "NaN": lambda copy, path: text_edit(copy, path, b'"format":"probekit-features"', b'"format":NaN'),
        "nested deeply": lambda copy, path: path.write_bytes(b"[" * 10**6 + b"]" * 10**6),
        "huge": lambda copy, path: path.write_bytes(b'{"a":[' + b"[]," * 6 * 10**6 + b"[]]}"),
    }.items():
        KINDS[f"JSON {name}: {file}"] = lambda copy, file=file, act=act: act(copy, copy.file(file))


def reseal_plan(copy: Copy, change: Callable[[dict[str, Any]], object]) -> None:
    edit(copy.file("plan"), change)


KINDS |= {
    "plan edited, resealed: a row less": lambda copy: reseal_plan(copy, lambda x: x["blocks"][0].pop()),
    "plan edited, resealed: wrong kinds": lambda copy: reseal_plan(copy, lambda x: x.update(blocks=7)),
    "plan edited, resealed: no row keys": lambda copy: reseal_plan(copy, lambda x: x.update(blocks=[["zz"]])),
    "judgements edited": lambda copy: text_edit(copy, copy.file("judgements"), b"pair", b"pbir"),
    "judgements edited, resealed: sha256": lambda copy: edit(
        copy.file("judgements sidecar"), lambda x: x.update(sha256="0" * 64)
    ),
    "judgements edited, resealed: name": lambda copy: edit(
        copy.file("judgements sidecar"), lambda x: x.update(name="other")
    ),
}

ACCEPTED = {
    "missing: plan": "equal",
    "missing: judgements sidecar": "equal",
    "a block under another name": "refused",
    "sidecar edited, resealed: sha256": "equal",
    "metadata longer, resealed with the digests of the file": "equal",
    "store.json edited, resealed: facts": "facts",
    "store.json edited, resealed: newer minor": "equal",
    "store.json edited, resealed: unknown member": "equal",
}
"""Kinds that are not refused: nothing that is read changes, or (``facts``) what a writer may change by the format."""
ACCEPTED |= {name: "equal" for name in KINDS if name.endswith(": plan") or name.startswith("plan edited")}


def expected(name: str) -> str:
    return ACCEPTED.get(name, "refused")


def redo(copy: Copy, message: str) -> str:
    """Follow the message of a refusal as a user would, then look at what the dump command does.

    Returns what is wrong; empty if exactly the damaged shards were written again.
    """
    for _ in range(4):
        try:
            again = planned(copy.root)
            break
        except StoreError as error:
            message = str(error)
            if not forget(copy, message):
                return f"stuck at {message}"
    else:
        return f"stuck at {message}"
    if set(again) != copy.touched:  # damaged values are found by reading, not by planning: then the message is followed
        forget(copy, message)
        again = planned(copy.root)
    return "" if sorted(again) == sorted(copy.touched) else f"planned {again}, damaged {sorted(copy.touched)}"


def mend(copy: Copy, message: str) -> str:
    """Follow the message about a file that is no shard's, and what comes after it; return what is wrong.

    ``left`` where the dump refuses it with its path and no advice: a pipe, say, which a person put there.
    """
    for _ in range(4):
        if message and not forget(copy, message):
            return "left" if message.startswith(f"{copy.root}/") and "\n" not in message else f"stuck at {message}"
        try:
            return f"wrote {done}" if (done := fill(copy.root)) else ""
        except StoreError as error:
            message = str(error)
    return f"stuck at {message}"


def forget(copy: Copy, message: str) -> bool:
    """Delete what a message says to delete."""
    path = Path(re.match(r"(.*?): ", message).group(1))
    if "delete it" not in message or not path.is_relative_to(copy.root):
        return False
    for file in {path, path.with_suffix(".json"), path.with_suffix(".h5"), path.with_suffix(".parquet")}:
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
    return True


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
