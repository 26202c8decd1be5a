"""Dumps that are killed, to be run by hand: ``OMP_NUM_THREADS=1 python tests/campaigns/kills.py --kills 100``.

First, the process leaves at every single system call by which shards are committed. Then dumps of the smallest shipped
backbone over three noise levels are killed with SIGKILL at random moments, every other time while a shard is written,
and started again until they end. After
each kill every shard that counts as done must be whole and equal to that of an undisturbed dump; after the last run the
features must be those of the undisturbed dump, byte for byte, and no temporary file may be left.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_store import dump, table

from probekit.config import DumpConfig
from probekit.dump import plan as dump_plan
from probekit.dump import run_dump
from probekit.playground import base_folder, models
from probekit.playground.pairs import write_pairs
from probekit.store import FeatureStore

CALLS = ("fsync", "replace", "rename", "unlink", "open", "pread")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def shards(store: Path) -> dict[str, bytes]:
    """Committed shards by name."""
    done = (path.with_suffix(".h5") for path in (store / "shards").rglob("[!.]*.json"))
    return {str(path.relative_to(store)): path.read_bytes() for path in done}


def left_overs(store: Path) -> list[Path]:
    return list(store.rglob(".tmp-*"))


def check(store: Path, whole: dict[str, bytes], *, ended: bool) -> list[str]:
    """List what is wrong with a store after a kill or, if it has ended, after the last run."""
    if not (store / "store.json").exists():
        return ["no store.json"] if ended else []
    wrong = []
    try:
        opened = FeatureStore(store)
        for sigma, draw in opened.coordinates:
            for layer in opened.layers if ended else []:
                opened.read(layer=layer.index, sigma=sigma, draw=draw)
    except Exception as error:  # noqa: BLE001
        wrong.append(f"{type(error).__name__}: {error}")
    found = shards(store)
    wrong += [f"{name} differs" for name, data in found.items() if whole.get(name) != data]
    if ended:
        wrong += [f"{name} is missing" for name in whole.keys() - found.keys()]
        wrong += [f"{path} is left" for path in left_overs(store)]
    return wrong


def in_child(
    work: Callable[[], object], *, after: float | None = None, then: Callable[[], bool] = lambda: True
) -> bool:
    """Run something in a forked process, killed when so many seconds are over and `then` is true; whether it ended."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            work()
        except BaseException:  # noqa: BLE001
            os._exit(1)
        os._exit(0)
    if after is not None:
        deadline = time.monotonic() + after
        while time.monotonic() < deadline or not then():
            if os.waitpid(child, os.WNOHANG)[0]:
                return True
            time.sleep(0.0002)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def random_kills(folder: Path, kills: int, seed: int) -> None:
    prefs = write_pairs(folder / "pairs", n_train=60, n_test=30, seed=5)
    dump_plan.rows_per_shard = lambda **_: 32
    base = {"backbone": str(base_folder()), "transformer": models()[0].folder, "max_tokens": 0, "device": "cpu"}
    base |= {"prefs": prefs, "sigma": ["0", "0.005", "0.1"], "batch_size": 8}

    def work(out: Path) -> Callable[[], object]:
        return lambda: run_dump(DumpConfig.checked(base | {"out": out}, source="campaign"))

    began = time.monotonic()
    assert in_child(work(folder / "whole"))
    lasted = time.monotonic() - began
    whole = shards(folder / "whole")
    say(f"undisturbed: {len(whole)} shards in {lasted:.1f} s")
    chance, done, dumps, violations, seen = random.Random(seed), 0, 0, [], []
    out = folder / "killed"
    while done < kills:
        # every other kill hits a shard while it is written
        writing = (lambda: bool(left_overs(out))) if done % 2 else (lambda: True)
        if in_child(work(out), after=chance.uniform(0, lasted), then=writing):
            violations += check(out, whole, ended=True)
            shutil.rmtree(out)
            dumps += 1
        else:
            done += 1
            seen.append(len(left_overs(out)))
            violations += check(out, whole, ended=False)
    assert in_child(work(out))
    violations += check(out, whole, ended=True)
    say(f"{done} kills over {dumps + 1} dumps, {sum(seen)} of them left a temporary file for the next to remove")
    say("\n".join(violations) or "no violation")


def exits_at_each_stage(folder: Path) -> None:
    rows = table(24)
    dump(folder / "whole", rows)
    whole = shards(folder / "whole")

    def leave(out: Path, call: str, number: int) -> Callable[[], object]:
        def work() -> None:
            plain, count = getattr(os, call), 0

            def counted(*args: object, **options: object) -> object:
                nonlocal count
                count += 1
                if count == number:
                    os._exit(9)
                return plain(*args, **options)

            setattr(os, call, counted)
            dump(out, rows)

        return work

    stages, violations = 0, []
    for call in CALLS:
        number = 1
        while True:
            out = folder / f"{call}-{number}"
            ended = in_child(leave(out, call, number))
            violations += [f"{call} {number}: {what}" for what in check(out, whole, ended=ended)]
            if ended:
                break
            stages += 1
            dump(out, rows)
            violations += [f"{call} {number}, resumed: {what}" for what in check(out, whole, ended=True)]
            number += 1
    say(f"left at {stages} calls of {', '.join(CALLS)}")
    say("\n".join(violations) or "no violation")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        exits_at_each_stage(Path(folder) / "stages")
        random_kills(Path(folder) / "random", options.kills, options.seed)
