import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two spinning thread pools on two cores are many times slower

from beartype import BeartypeConf
from beartype.claw import beartype_package
from hypothesis import settings
from threadpoolctl import threadpool_limits

# What functions take and return is checked, in the tests only; variables have types that only mypy knows.
beartype_package("probekit", conf=BeartypeConf(claw_is_pep526=False))

settings.register_profile("probekit", deadline=None)  # no test fails because a machine is busy
settings.load_profile("probekit")

N_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # they share the cores, with what tests start
    N_THREADS = max(1, N_CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ["OMP_NUM_THREADS"] = str(N_THREADS)  # read when numpy and torch are loaded
    threadpool_limits(N_THREADS)  # where a plugin of pytest has loaded numpy before

LONGEST = ["families", "docs", "report", "claims", "plan", "sweep", "demo", "stages", "controls", "dump", "dump_shares"]
"""Test files that begin first, longest before shorter, so that no process is left alone with one of them."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use a process for each core, at most four (each takes 1.5 GB); none beside this one for a single file."""
    named = [Path(name.partition("::")[0]) for name in config.option.file_or_dir]
    files = N_CORES if any(path.is_dir() for path in named) or not named else len(set(named))
    processes = min(files, N_CORES, 4)
    return processes if processes > 1 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of the longest files to the front."""
    first = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Pairs of the playground: 178 pictures or so."""
    from probekit.playground.pairs import write_pairs

    return write_pairs(tmp_path_factory.mktemp("pairs"), n_train=60, n_test=30, seed=5)


@pytest.fixture(scope="module")
def dump(pairs):
    """Arguments of a working dump of the smallest shipped backbone."""
    from probekit.playground import base_folder, models

    return [
        "dump",
        "--backbone",
        base_folder(),
        "--transformer",
        models()[0].folder,
        "--max-tokens",
        0,
        "--prefs",
        pairs,
    ]
