"""Damaged copies of a small store, to be run by hand: ``python tests/campaigns/damaged_copies.py --copies 1000``.

Each copy is damaged once, in one of the ways of ``damages.py``, and read completely in a child process. It must be
refused in one line that names a path of the copy, or read as if nothing had happened; where shards were damaged, the
dump command must do exactly these again, and then everything must be as it was. Kinds take turns.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))
import damages


def run(folder: Path, copies: int, *, seed: int, names: list[str], redo: int = 1) -> list[tuple[str, str, str]]:
    """Damage and read copies, redo every ``redo``-th; return (kind, outcome, fault) of each, no fault being empty."""
    reference, other = folder / "reference", folder / "other"
    damages.fill(reference)
    damages.fill(other, seed=1)
    child, found = damages.Child(reference), []
    try:
        for number in range(copies):
            name = names[number % len(names)]
            copy = damages.Copy(folder / f"copy-{number}", other, Random(seed * 10**6 + number))
            shutil.copytree(reference, copy.root)
            outcome, fault = one(copy, name, child, redo=number % redo == 0)
            found.append((name, outcome, f"copy {number}: {fault}" if fault else ""))
            for path in folder.glob(f"copy-{number}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        child.close()
    return found


def one(copy: damages.Copy, name: str, child: damages.Child, *, redo: bool) -> tuple[str, str]:
    """Damage and read; with ``redo`` mend as the message says and read again."""
    damages.KINDS[name](copy)
    outcome, message = child.read(copy.root)
    if outcome != damages.expected(name):
        return outcome, f"{message} ({sorted(copy.touched)})"
    if outcome == "refused" and ("\n" in message or str(copy.root) not in message):
        return outcome, f"the message names no path of the copy or is not one line: {message!r}"
    if not redo or outcome == "facts" or (outcome == "refused" and ("link" in name or "folder" in name)):
        return outcome, ""
    if copy.touched:
        wrong = damages.redo(copy, message) if outcome == "refused" else ""
        damages.fill(copy.root)
    elif outcome == "refused" and "belongs to another store" in message:
        return outcome, ""  # the shards and store.json disagree: which of them is wrong is for a person to say
    else:
        wrong = damages.mend(copy, message if "delete it" in message else "")
    if wrong == "left":
        return outcome, ""
    again, message = ("", "") if wrong else child.read(copy.root)
    if wrong or again != "equal":
        return outcome, wrong or f"after a redo: {again}, {message}"
    return f"{outcome}, redone" if outcome == "refused" else outcome, ""


def main() -> None:
    """Print outcomes by group of kinds, and every fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="only kinds that contain this text")
    options = parser.parse_args()
    names = [name for name in damages.KINDS if options.kinds in name]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), options.copies, seed=options.seed, names=names)
    groups = Counter((name.partition(":")[0], outcome) for name, outcome, _ in found)
    for (group, outcome), count in sorted(groups.items()):
        print(f"{count:6d}  {group:60s} {outcome}")  # noqa: T201
    faults = [(name, outcome, fault) for name, outcome, fault in found if fault]
    for name, outcome, fault in faults:
        print(f"FAULT {name}: {outcome}: {fault}")  # noqa: T201
    seconds, kinds = time.monotonic() - start, len({name for name, _, _ in found})
    totals = ", ".join(f"{count} {outcome}" for outcome, count in Counter(outcome for _, outcome, _ in found).items())
    print(f"{len(found)} copies of {kinds} kinds in {seconds:.0f} s: {totals}; {len(faults)} faults")  # noqa: T201
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
