import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two spinning thread pools on two cores are many times slower

from jaxtyping import install_import_hook

install_import_hook("probekit", "typecheck.typechecked")  # shapes and types are checked in the tests only


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
