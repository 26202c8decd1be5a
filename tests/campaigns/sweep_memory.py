"""A sweep over a store that is larger than the memory it may take, to be run by hand:

``OMP_NUM_THREADS=1 python tests/campaigns/sweep_memory.py --folder /tmp/campaign``
``OMP_NUM_THREADS=1 python tests/campaigns/sweep_memory.py --folder /tmp/campaign --sets '[singles]' --jobs 2``

A synthetic store with preference planted at two layers, several GB on disk, is swept twice: under ``--memory`` and
without a bound, each in a process of its own. While they run, the proportional set sizes (PSS, shared pages counted
once) and the resident set sizes (RSS, shared pages counted in each process) of the process and all its children are
added up five times a second. Printed are the peaks beside the bound, the times and their ratio, how the fits were made,
and the largest difference of margins between the two runs, over their standard deviation. Exit code 1 if the summed RSS
exceeded the bound, the time more than doubled, or margins differ by more than a thousandth.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from probekit._types import row_id
from probekit.results import load_margins
from probekit.store import FeatureStore, open_store
from probekit.sweep.memory import bytes_of


def make_store(path: Path, *, layers: int, pairs: int, width: int) -> None:
    """Write lone pairs: one direction of layers 1 and 2 carries quality, among correlated channels of unlike scales."""
    rng = np.random.default_rng(0)
    quality = rng.normal(size=(pairs, 2))
    ids = [
        (digest, f"prompt {pair}")
        for pair in range(pairs)
        for side in "ab"
        if (digest := hashlib.sha256(f"{pair} {side}".encode()).digest())
    ]
    rows = pd.DataFrame(
        {
            "row_id": [row_id(digest, prompt) for digest, prompt in ids],
            "prompt": [prompt for _, prompt in ids],
            "image_id": [f"{number}.png" for number in range(2 * pairs)],
            "image_sha256": [digest for digest, _ in ids],
            "width": 32,
            "height": 32,
            "file_bytes": 100,
            "status": 0,
        }
    )
    writer = open_store(
        path,
        config={
            "layers": [{"index": k, "name": f"blocks.{k}", "stream": "image"} for k in range(layers)],
            "poolings": {"mean": "mean over image tokens"},
            "seed": 0,
            "random_weights": None,
        },
        describe={
            "name": "synthetic",
            "n_blocks": layers - 1,
            "width": width,
            "n_parameters": 1000,
            "random_weights": None,
            "training_images": None,
        },
    )
    scale = 10 ** rng.uniform(-1, 1, size=(layers, width))
    direction = rng.normal(size=(layers, width)) / np.sqrt(width)
    mixing = rng.normal(size=(layers, 32, width)) / np.sqrt(32)
    order = rows.reset_index().set_index("row_id")["index"]
    size = max(1, 2**27 // (4 * layers * width))
    for block in writer.plan(rows[["row_id", "prompt"]], sigma="0.005", draw=0, rows_per_shard=size):
        at = order.loc[list(block.row_ids)].to_numpy()
        values = {}
        for layer in range(layers):
            own = rng.normal(size=(len(at), width)) + rng.normal(size=(len(at), 32)) @ mixing[layer]
            own += (1.5 * (layer in (1, 2))) * np.outer(quality.ravel()[at], direction[layer])
            values["mean", layer] = (own * scale[layer]).astype(np.float32)
        with writer.claim(block, sigma="0.005", draw=0) as mine:
            assert mine
            writer.write_shard(block, sigma="0.005", draw=0, timestep=5.0, rows=rows.iloc[at], features=values)
    chance = 1 / (1 + np.exp(-2 * (quality[:, 0] - quality[:, 1])))
    keys = rows["row_id"].to_numpy()
    writer.write_judgements(
        "synthetic",
        pd.DataFrame(
            {
                "pair_id": [str(pair) for pair in range(pairs)],
                "row_a": keys[0::2],
                "row_b": keys[1::2],
                "label": (rng.random(pairs) < chance).astype(float),
                "weight": 1.0,
                "group": [prompt for _, prompt in ids[::2]],
                "split": np.array(["train"] * 8 + ["validation", "test"])[np.arange(pairs) % 10],
                "source": "",
            }
        ),
    )


def measured(command: list[str]) -> tuple[float, int, int, str]:
    """Seconds of a command, the peaks of the summed PSS and RSS of its processes, and what it said."""
    began, peaks = time.monotonic(), [0, 0]
    log = Path(command[command.index("--out") + 1]).with_suffix(".log")
    with log.open("w") as stream:
        process = subprocess.Popen(command, stderr=stream, stdout=stream)
        while process.poll() is None:
            sizes = [sizes_of(pid) for pid in tree(process.pid)]
            peaks = [max(peak, sum(size[k] for size in sizes)) for k, peak in enumerate(peaks)]
            time.sleep(0.2)
    if process.returncode:
        sys.exit(f"{command}: exit code {process.returncode}: {log.read_text()}")
    return time.monotonic() - began, peaks[0], peaks[1], log.read_text()


def tree(pid: int) -> list[int]:
    """List a process and all its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in tree(int(child)))]


def sizes_of(pid: int) -> tuple[int, int]:
    """PSS and RSS of a process in bytes; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines[1:]}
    return sizes.get("Pss", 0), sizes.get("Rss", 0)


def main() -> int:
    """Print one line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="new folder, removed at the end")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=60_000)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--sets", default="[singles, [1, 2], all]", help="layer sets, as in a configuration")
    parser.add_argument("--memory", default="1G")
    parser.add_argument("--jobs", default="1")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        return campaign(options)
    finally:
        shutil.rmtree(options.folder)


def campaign(options: argparse.Namespace) -> int:
    """Make the store, sweep it twice, compare."""
    store = options.folder / "store"
    make_store(store, layers=options.layers, pairs=options.pairs, width=options.channels)
    say(f"store: {FeatureStore(store).nbytes / 1e9:.2f} GB, {options.layers} layers of {options.channels} channels")
    config = options.folder / "sweep.yaml"
    config.write_text(yaml.safe_dump({"heads": [{"kind": "linear", "layer_sets": yaml.safe_load(options.sets)}]}))
    usual = ["sweep", str(config), "--store", str(store), "--jobs", options.jobs]
    runs = {"bounded": ["--memory", options.memory], "in core": []}
    found = {}
    for name, more in runs.items():
        out = options.folder / name.replace(" ", "-")
        found[name] = measured([sys.executable, "-m", "probekit", *usual, *more, "--out", str(out)])
        seconds, pss, rss, said = found[name]
        say(f"{name}: {seconds:.1f} s, peak PSS {pss / 2**20:.0f} MiB, peak RSS {rss / 2**20:.0f} MiB")
        for line in said.splitlines():
            if "fits " in line and " of " in line and "best" not in line:
                say(f"    {line.strip()}")
    one, other = (
        load_margins(options.folder / name).sort_values(["record_id", "pair_id"])["margin"].to_numpy()
        for name in ("bounded", "in-core")
    )
    apart = float(np.abs(one - other).max() / other.std())
    ratio, bound = found["bounded"][0] / found["in core"][0], bytes_of(options.memory)
    share = found["bounded"][2] / bound
    say(f"bound {bound / 2**20:.0f} MiB: {100 * share:.0f} % used (RSS); time {ratio:.2f} times in core")
    say(f"margins differ by at most {apart:.1e} of their standard deviation")
    say(json.dumps({"rss_share": share, "ratio": ratio, "margins": apart, "cpus": os.cpu_count()}))
    return int(share > 1 or ratio > 2 or apart > 1e-3)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
