"""Settings are checked once, and a mistake is one line that says what is allowed."""

from pathlib import Path

import pytest

from probekit.config import DumpConfig, SweepConfig, load_yaml
from probekit.errors import ConfigError

SWEEPS = sorted((Path(__file__).parent.parent / "sweeps").glob("*.yaml"))


def sweep(text: str, tmp_path: Path) -> SweepConfig:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return SweepConfig.checked(load_yaml(path), source=path.name)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_shipped_sweeps_are_valid_and_say_what_they_are_for(path):
    SweepConfig.checked(load_yaml(path), source=path.name)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Question:", "Command:", "Hardware:", "Time:", "Expected:"):
        assert any(line.startswith(f"# {word}") for line in header), word


def test_the_shipped_sweeps_are_the_promised_ones():
    assert {path.stem for path in SWEEPS} >= {"demo", "depth", "combinations", "dit_reward"}


def test_numbers_written_in_any_way_mean_the_same(tmp_path):
    config = sweep("heads: [{kind: linear, layer_sets: [singles], strengths: [1e-3]}]\nsigmas: [5e-3, 0.10]", tmp_path)
    assert config.sigmas == ["0.005", "0.1"]
    assert config.heads[0].strengths == [0.001]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("heads: [{kind: linear, layer_sets: [singles], strenghts: [1]}]", ["heads.0", "'strenghts'", "strengths"]),
        ("heads: [{kind: linear, layer_sets: [singels]}]", ["layer_sets.0", "'singels'", "'singles', 'all'"]),
        ("heads: [{kind: linear, layer_sets: [{relative: [1.5]}]}]", ["layer_sets.0", "depths from 0 to 1", "1.5"]),
        ("heads: [{kind: linear, layer_sets: [[]]}]", ["layer_sets.0", "layer numbers", "[]"]),
        ("sigmas: [0]", ["heads: is required"]),
        ("heads: [{kind: forest, layer_sets: [all]}]", ["heads.0.kind: is 'forest'; allowed: 'linear', 'mlp'"]),
        (
            "heads: [{kind: linear, layer_sets: [all]}]\nsigmas: [2]",
            ["sigmas.0: sigma is '2'; allowed: a decimal number from 0 to 1"],
        ),
        ("heads: [{kind: linear, layer_sets: [all]}]\nseed: 1", ["unknown key 'seed'", "allowed: heads"]),
        ("heads: [{layer_sets: [all]}]", ["heads.0.kind: is required"]),
        ("heads: []", ["heads: is []; allowed: at least 1 entry"]),
        ("heads: [{kind: linear, layer_sets: []}]", ["heads.0.layer_sets: is []; allowed: at least 1 entry"]),
        ("heads: [{kind: linear, layer_sets: all}]", ["heads.0.layer_sets: is 'all'; allowed: a list"]),
        ("heads: [{kind: linear, layer_sets: [all], folds: 1}]", ["heads.0.folds: is 1; allowed: 2 or more"]),
        ("heads: [{kind: linear, layer_sets: [all], name: a b}]", ["heads.0.name: is 'a b'; allowed: letters, digits"]),
        ("heads: [{kind: mlp, layer_sets: [all], hidden: [x]}]", ["heads.0.hidden.0: is 'x'; allowed: a whole number"]),
        ("heads: [{kind: mlp, layer_sets: [all], dropout: 1}]", ["heads.0.dropout: is 1; allowed: less than 1"]),
        (
            "heads: [{kind: linear, layer_sets: [all]}]\nsigmas: []",
            ["sigmas: is []; allowed: 'all' or at least 1 entry"],
        ),
        ("heads: [{kind: linear, layer_sets: [all]}]\nsigmas: 0.1", ["sigmas: is 0.1; allowed: 'all' or a list"]),
        ("heads: [{kind: linear, layer_sets: [all]}]\ndraws: [-1]", ["draws.0: is -1; allowed: 0 or more"]),
        (
            "heads: [{kind: linear, layer_sets: [all]}]\nprotocol: x",
            ["protocol: is 'x'; allowed: 'strict', 'imagereward'"],
        ),
        ("heads: &h []\nsigmas: *h", ["aliases are not allowed"]),
        ("heads: []\nheads: []", ["duplicate key 'heads'"]),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", ["aliases are not allowed"]),
        ("heads: []\nc: {<<: *h}", ["sweep.yaml"]),
        ("heads: [{kind: linear, kind: mlp}]", ["duplicate key 'kind'"]),
        ("heads: !!python/object/apply:os.getcwd []", ["could not determine a constructor"]),
        ("[" * 5000, ["nested too deeply"]),
        ("{a: " * 5000, ["nested too deeply"]),
        ("heads: " + "1" * 5000, ["sweep.yaml"]),
        ("heads: 2001-99-99", ["sweep.yaml"]),
        ("heads: [\0]", ["sweep.yaml"]),
        ("[heads]: 1", ["unhashable key"]),
        ("- heads", ["key: value"]),
        ("heads: [", ["sweep.yaml"]),
        (
            "heads: [{kind: linear, layer_sets: [all]}, {kind: linear, layer_sets: [singles]}]",
            ["two heads", "'linear'"],
        ),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_what_is_allowed(text, parts, tmp_path):
    with pytest.raises(ConfigError) as error:
        sweep(text, tmp_path)
    message = str(error.value)
    assert "sweep.yaml" in message
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_dump_settings_refuse_what_no_dump_can_do():
    good = {"backbone": "x", "prefs": "p.jsonl", "out": "o"}
    assert DumpConfig.checked(good | {"sigma": [0, "0.0050"]}, source="options").sigma == ["0", "0.005"]
    for wrong in ({"sigma": ["1.5"]}, {"noise": "some"}, {"batch_size": 0}, {"layers": ["x"]}, {"sigmas": ["0"]}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            DumpConfig.checked(good | wrong, source="options")


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_yaml(Path("nowhere.yaml"))
