"""What imports what, and what does not get loaded."""

import json
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

import probekit

ROOT = Path(__file__).parent.parent


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


HELP = "import probekit.cli\ntry:\n    probekit.cli.app(['--help'])\nexcept SystemExit:\n    pass"


@pytest.mark.parametrize("code", ["import probekit", HELP], ids=["import", "help"])
def test_import_and_help_load_no_model_stack(code):
    assert not loaded_by(code) & {"torch", "diffusers", "transformers", "sklearn", "matplotlib", "pandas"}


@pytest.mark.parametrize("room", ["store", "stats", "results", "report", "preferences"])
def test_rooms_right_of_the_store_run_without_torch(room):
    assert not loaded_by(f"import probekit.{room}") & {"torch", "diffusers", "transformers"}


@pytest.mark.parametrize("room", ["heads", "sweep"])
def test_probing_runs_without_diffusers(room):
    assert not loaded_by(f"import probekit.{room}") & {"diffusers", "transformers"}


def test_every_public_name_exists_and_equals_no_submodule():
    for name in probekit.__all__:
        assert getattr(probekit, name).__name__ == name
        assert not (ROOT / "probekit" / name).exists()
        assert not (ROOT / "probekit" / f"{name}.py").exists()
    with pytest.raises(AttributeError, match="no_such_name"):
        probekit.no_such_name  # noqa: B018


def test_the_top_level_is_the_agreed_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    top = {line.split("/")[0] for line in tracked if line and not line.startswith(".")}
    assert top <= {"pyproject.toml", "probekit", "sweeps", "notebooks", "tests", "README.md", "LICENSE"}


def test_dependencies_are_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]:
        assert "==" not in requirement
