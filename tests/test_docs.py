"""Every block of the README runs as written, or, where it needs real weights, is parsed and checked."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from probekit.cli import app
from probekit.config import SweepConfig, load_yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
SHELL = [text for language, text in BLOCKS if language == "bash"]


def test_the_first_two_blocks_are_one_command_each():
    for block in SHELL[:2]:
        assert len(block.strip().splitlines()) == 1
    assert SHELL[0].strip().endswith("probekit demo")
    assert SHELL[1].strip().endswith("pytest")


def needs_real_weights(block: str) -> bool:
    return re.search(r"\b(stabilityai|black-forest-labs|Qwen|openai|hpdv3)/", block) is not None


def commands() -> list[str]:
    lines = [line for block in SHELL[2:] if needs_real_weights(block) for line in block.strip().splitlines()]
    headers = [
        line.removeprefix("# Command:").strip()
        for path in sorted((ROOT / "sweeps").glob("*.yaml"))
        for line in path.read_text().splitlines()
        if line.startswith("# Command:") and "--" in line and "..." not in line
    ]
    return lines + headers


@pytest.mark.parametrize("line", commands())
def test_commands_on_real_weights_are_valid(line, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: True)  # the data, too, are elsewhere
    program, name, *arguments = shlex.split(line)
    assert program == "probekit"
    command = typer.main.get_command(app).commands[name]
    context = command.make_context(name, arguments)  # refuses unknown options and missing arguments
    for value in context.params.values():
        if isinstance(value, Path) and value.parts[0] == "sweeps":
            SweepConfig.checked(load_yaml(ROOT / value), source=str(value))


def test_the_other_blocks_run_in_one_folder(tmp_path):
    shutil.copytree(ROOT / "sweeps", tmp_path / "sweeps")
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    for language, text in BLOCKS:
        if (language == "bash" and text in SHELL[:2]) or needs_real_weights(text):
            continue
        program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[language]
        done = subprocess.run(
            [*program, text], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stderr}"
        ran += 1
    assert ran >= 2
    assert (tmp_path / "report.html").exists()


def test_the_tree_in_the_readme_is_the_tree():
    (tree,) = re.findall(r"^```\n(probekit/.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    there = {path.name for path in (ROOT / "probekit").iterdir() if not path.name.startswith(("_", "."))}
    assert named == there - {"py.typed", "errors.py"}


def test_help_names_every_option_of_the_dump():
    from probekit.config import DumpConfig

    options = {parameter.name for parameter in typer.main.get_command(app).commands["dump"].params}
    assert options >= set(DumpConfig.model_fields) | {"config"}
