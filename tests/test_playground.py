"""The playground: drawn scenes, preference pairs with known labels, really trained models, resumable training."""

import json
from collections import defaultdict
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from probekit.errors import ConfigError
from probekit.playground import (
    base_folder,
    checkpoint,
    edits,
    models,
    pairs,
    scenes,
    train,
    train_dit,
    train_vae,
)
from probekit.playground.architectures import new_transformer
from probekit.playground.checkpoint import read_tensors, write_tensors
from probekit.playground.export import load_base, load_pipeline

WEIGHTS = base_folder().parent


class Killed(Exception):
    """Stands for the end of the process."""


def sampled(count, *, seed=5):
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng) for _ in range(count)]


# Scenes


def test_scenes_follow_from_the_seed():
    assert sampled(50) == sampled(50)
    assert sampled(50) != sampled(50, seed=6)
    first, second = (np.stack([scenes.draw(scene) for scene in sampled(20)]) for _ in range(2))
    assert first.shape == (20, 32, 32, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)


def test_pictures_show_what_their_captions_say():
    for scene in sampled(300):
        picture, words = scenes.draw(scene), scenes.caption(scene).split()
        assert len(words) <= 14  # with start and end token as long as the text encoders allow
        assert words[-2] == scene.background
        for thing in scene.things:
            assert {thing.size, thing.colour} <= set(words)
            assert thing.shape in words or scenes.SHAPES[thing.shape] in words
            # The centre of every shape is filled.
            np.testing.assert_array_equal(
                picture[round(thing.y - 0.5), round(thing.x - 0.5)], scenes.COLOURS[thing.colour]
            )
        if scene.kind == "count":
            assert words[0] == scenes.NUMBERS[len(scene.things) - 1]
        if scene.kind == "pair":
            first, second = scene.things
            steps = {"left of": second.x - first.x, "right of": first.x - second.x}
            steps |= {"above": second.y - first.y, "below": first.y - second.y}
            assert max(steps, key=steps.__getitem__) == scene.relation
            assert f" {scene.relation} " in scenes.caption(scene)


@pytest.mark.parametrize(
    ("edit", "attribute"),
    [(edits.edit_colour, "colour"), (edits.edit_shape, "shape"), (edits.edit_size, "size")],
)
def test_an_edit_changes_one_attribute_only(edit, attribute):
    rng = np.random.default_rng(0)
    for scene in sampled(100):
        other = edit(scene, rng)
        assert scenes.caption(other) != scenes.caption(scene)
        assert (other.background, other.relation) == (scene.background, scene.relation)
        for before, after in zip(scene.things, other.things, strict=True):
            changed = {name for name in vars(before) if getattr(before, name) != getattr(after, name)}
            assert changed <= {attribute}


def test_counting_keeps_what_stays():
    rng = np.random.default_rng(0)
    for scene in (scenes.sample_scene(rng, "count") for _ in range(100)):
        other = edits.edit_count(scene, rng)
        common = min(len(scene.things), len(other.things))
        assert len(scene.things) != len(other.things)
        assert scene.things[:common] == other.things[:common]


# Pairs


@pytest.fixture(scope="module")
def prefs(tmp_path_factory):
    """A small preference set, its rows with label flips undone in `truth`, and its folder."""
    path = pairs.write_pairs(tmp_path_factory.mktemp("pairs"), n_train=1000, n_test=300, seed=3)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["truth"] = 1 - row["label"] if row["flipped"] else row["label"]
    return path.parent, rows


def test_the_file_is_in_the_general_form(prefs):
    folder, rows = prefs
    for row in rows:
        assert {"prompt", "image_a", "image_b", "label", "group", "split", "source"} <= row.keys()
        assert 0 <= row["label"] <= 1
        assert row["image_a"] != row["image_b"]
        assert not Path(row["image_a"]).is_absolute()
    with Image.open(folder / rows[0]["image_a"]) as picture:
        assert (picture.format, picture.size, picture.mode) == ("PNG", (32, 32), "RGB")
    written = {file.relative_to(folder).as_posix() for file in folder.rglob("*.png")}
    assert written == {row[side] for row in rows for side in ("image_a", "image_b")}


def test_kinds_are_equally_frequent_and_numbers_as_asked(prefs):
    _, rows = prefs
    counts = {split: defaultdict(int) for split in ("train", "validation", "test")}
    for row in rows:
        counts[row["split"]][row["source"]] += 1
    assert sum(counts["test"].values()) in range(300, 320)
    assert sum(counts["train"].values()) + sum(counts["validation"].values()) in range(1000, 1040)
    for kinds in counts.values():
        assert kinds.keys() == pairs.KIND_WEIGHTS.keys()
        frequent = [count for kind, count in kinds.items() if kind != "tie"]
        assert max(frequent) - min(frequent) <= 5  # a ranking has six pairs


def test_content_pairs_are_swap_balanced(prefs):
    folder, rows = prefs
    units = defaultdict(list)
    for row in rows:
        if row["source"] in pairs.SWAPPED_KINDS:
            units[row["group"], row["image_a"], row["image_b"]].append(row)
    for first, second in units.values():
        assert first["prompt"] != second["prompt"]
        assert {first["truth"], second["truth"]} == {0.0, 1.0}
    # So a judge that looks at the pictures only, here by brightness, is right exactly half of the time.
    hits = [
        (
            np.asarray(Image.open(folder / row["image_a"])).mean()
            > np.asarray(Image.open(folder / row["image_b"])).mean()
        )
        == (row["truth"] == 1)
        for row in rows
        if row["source"] in pairs.SWAPPED_KINDS
    ]
    assert np.mean(hits) == 0.5


def test_nothing_is_shared_between_splits(prefs):
    folder, rows = prefs
    for key in ("group", "prompt", "image_a", "image_b"):
        splits = defaultdict(set)
        for row in rows:
            splits[row[key]].add(row["split"])
        assert all(len(found) == 1 for found in splits.values()), key
    contents = [file.read_bytes() for file in folder.rglob("*.png")]
    assert len(set(contents)) == len(contents)


def test_labels_are_flipped_in_training_only(prefs):
    _, rows = prefs
    assert {row["split"] for row in rows if row["flipped"]} == {"train"}
    hard = [row for row in rows if row["split"] == "train" and row["source"] not in ("tie", "tradeoff")]
    assert 0.02 < np.mean([row["flipped"] for row in hard]) < 0.09
    assert {row["label"] for row in rows if row["source"] == "tie"} == {0.5}


def test_the_side_of_the_winner_is_no_cue(prefs):
    _, rows = prefs
    one_sided = [row["truth"] > 0.5 for row in rows if row["source"] in ("degradation", "ranking", "tradeoff")]
    assert abs(np.mean(one_sided) - 0.5) < 4 * 0.5 / len(one_sided) ** 0.5
    swapped = [row["truth"] for row in rows if row["source"] in pairs.SWAPPED_KINDS]
    assert np.mean(swapped) == 0.5


def test_tradeoff_votes_follow_the_utility(prefs):
    _, rows = prefs
    tradeoffs = [row for row in rows if row["source"] == "tradeoff"]
    for row in tradeoffs:
        votes = row["label"] * row["n_votes"]
        assert votes == pytest.approx(round(votes), abs=1e-9)
    expected = np.array([1 / (1 + np.exp(-row["utility"])) for row in tradeoffs])
    labels = np.array([row["label"] for row in tradeoffs])
    assert np.corrcoef(expected, labels)[0, 1] > 0.6
    assert abs((labels - expected).mean()) < 0.1


def test_rankings_are_transitive(prefs):
    _, rows = prefs
    rankings = defaultdict(list)
    for row in rows:
        if row["source"] == "ranking":
            rankings[row["ranking_id"]].append((row["image_a"], row["image_b"])[:: 1 if row["truth"] == 1 else -1])
    for judged in rankings.values():
        wins = defaultdict(int, {loser: 0 for _, loser in judged})
        for winner, _ in judged:
            wins[winner] += 1
        assert sorted(wins.values()) == [0, 1, 2, 3]


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    contents = []
    for name in ("a", "b"):
        pairs.write_pairs(tmp_path / name, n_train=60, n_test=30, seed=1)
        files = sorted((tmp_path / name).rglob("*.*"))
        contents.append([(file.relative_to(tmp_path / name), file.read_bytes()) for file in files if file.is_file()])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("stage", ["save", "replace"])
def test_a_set_with_a_file_is_complete(stage, tmp_path, monkeypatch):
    def killed(self, *args, **kwargs):
        raise Killed

    whole = pairs.write_pairs(tmp_path / "whole", n_train=60, n_test=30, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image if stage == "save" else Path, stage, killed)
        with pytest.raises(Killed):
            pairs.write_pairs(tmp_path / "killed", n_train=60, n_test=30, seed=1)
    assert not (tmp_path / "killed" / "preferences.jsonl").exists()
    path = pairs.write_pairs(tmp_path / "killed", n_train=60, n_test=30, seed=1)
    found = [
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*") if file.is_file()}
        for folder in (whole.parent, path.parent)
    ]
    assert found[0] == found[1]


def test_another_set_is_never_written_over(tmp_path):
    path = pairs.write_pairs(tmp_path, n_train=60, n_test=30, seed=1)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")}
    assert pairs.write_pairs(tmp_path, n_train=60, n_test=30, seed=1) == path
    for change in ({"seed": 2}, {"n_train": 30}):
        with pytest.raises(ConfigError, match=r"preferences\.jsonl: .*choose another folder"):
            pairs.write_pairs(tmp_path, **({"n_train": 60, "n_test": 30, "seed": 1} | change))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")} == before


def test_too_many_pairs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "MAX_ATTEMPTS", 1)
    with pytest.raises(ConfigError, match="ask for fewer pairs"):
        pairs.write_pairs(tmp_path, n_train=200, n_test=10, seed=0)


# Shipped models


@pytest.fixture(scope="module")
def fresh_scenes():
    """Scenes that no training drew, encoded by the shipped VAE and text encoders."""
    vae, tokenizer, encoders = load_base(WEIGHTS, "cpu")
    drawn = sampled(256, seed=99)
    prompt, pooled = train_dit.encode_captions([scenes.caption(scene) for scene in drawn], tokenizer, encoders)
    pictures = torch.from_numpy(np.stack([scenes.draw(scene) for scene in drawn]))
    return train_dit.EncodedScenes(
        latents=train_vae.encode_pictures(vae, pictures, device="cpu"),
        prompt=prompt,
        pooled=pooled,
        caption_of=torch.arange(len(drawn)),
    )


def test_the_family_is_complete_and_small():
    shipped = {model.name: model for model in models()}
    full = {"3x48-seed0", "3x48-seed1", "3x48-seed2", "6x48", "3x96", "6x96", "8x128"}
    assert shipped.keys() == full | {"3x96-at3", "3x96-at10", "3x96-at30"}
    for name in full:
        assert shipped[name].images_seen >= 300_000
        assert shipped[name].fraction == 1
    for model in shipped.values():
        assert (model.folder / "config.json").is_file()
        assert model.name.startswith(f"{model.blocks}x{model.width}")
        assert model.images_seen == pytest.approx(model.fraction * shipped["3x96"].images_seen, rel=0.01)
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 30e6


@pytest.mark.parametrize("model", models(), ids=lambda model: model.name)
def test_shipped_transformers_are_trained(model, fresh_scenes, monkeypatch):
    monkeypatch.setattr(train_dit, "HELD_OUT", 256)
    trained = diffusers.SD3Transformer2DModel.from_pretrained(model.folder, low_cpu_mem_usage=False).float()
    untrained = new_transformer(blocks=model.blocks, width=model.width, seed=0)
    losses = [train_dit.held_out_loss(network, fresh_scenes, device="cpu") for network in (trained, untrained)]
    assert losses[0] < (0.35 if model.fraction == 1 else 0.65) * losses[1]
    recorded = json.loads((WEIGHTS / "training.json").read_text(encoding="utf-8"))[model.name]["curve"][-1][2]
    assert losses[0] == pytest.approx(recorded, rel=0.1)


def test_it_is_an_ordinary_pipeline(fresh_scenes):
    pipeline = load_pipeline(WEIGHTS, "3x48-seed0")
    assert type(pipeline) is diffusers.StableDiffusion3Pipeline
    grounds = ["white", "black"]
    prompts = [f"a small red circle on a {ground} background" for ground in grounds]
    # Trained on exactly what the pipeline computes.
    embedded, _, pooled, _ = pipeline.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=0
    )
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    expected, expected_pooled = train_dit.encode_captions(prompts, pipeline.tokenizer, encoders)
    torch.testing.assert_close(embedded, expected)
    torch.testing.assert_close(pooled, expected_pooled)
    images = pipeline(
        prompts,
        num_inference_steps=8,
        guidance_scale=3.0,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (2, 32, 32, 3)
    medians = np.median(images, axis=(1, 2))  # most of the picture is background
    for ground, median in zip(grounds, medians, strict=True):
        np.testing.assert_allclose(median, np.array(scenes.BACKGROUNDS[ground]) / 255, atol=0.1)


def test_the_vae_keeps_the_pictures(fresh_scenes):
    vae, _, _ = load_base(WEIGHTS, "cpu")
    assert fresh_scenes.latents.std().item() == pytest.approx(1, abs=0.1)
    pictures = train_vae.to_pixels(torch.from_numpy(np.stack([scenes.draw(scene) for scene in sampled(64, seed=99)])))
    latents = fresh_scenes.latents[:64] / vae.config.scaling_factor + vae.config.shift_factor
    with torch.no_grad():
        error = (vae.decode(latents).sample.clamp(-1, 1) - pictures).square().mean().item() / 4
    assert -10 * np.log10(error) > 35


# Training


def kill_after_saving(*args, **kwargs):
    checkpoint.save_training(*args, **kwargs)
    raise Killed


@pytest.fixture
def working_folder(tmp_path):
    """A folder with a little of everything the training commands read, and a twin of it."""
    generator = torch.Generator().manual_seed(0)
    encoded = {
        "latents": torch.randn(192, 8, 8, 8, generator=generator),
        "prompt": torch.randn(11, 16, 128, generator=generator),
        "pooled": torch.randn(11, 128, generator=generator),
        "caption_of": torch.randint(10, (192,), generator=generator),
    }
    folders = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        train.draw_scenes(out=folder, count=192, seed=0)
        write_tensors(folder / "encoded.safetensors", encoded, {})
    return folders


@pytest.mark.parametrize(
    ("stage", "options", "result"),
    [
        ("dit", ["--images", "48", "--batch", "8", "--keep-at", "0.5"], "dit-3x48-seed0.safetensors"),
        ("vae", ["--steps", "6", "--batch", "2"], "vae.safetensors"),
    ],
)
def test_a_killed_training_continues_where_it_was(stage, options, result, working_folder, monkeypatch):
    whole, killed = working_folder
    for module in (train_dit, train_vae):
        monkeypatch.setattr(module, "HELD_OUT", 64)
    command = [stage, *options, "--save-every", "4", "--out"]
    done = CliRunner().invoke(train.app, [*command, str(whole)], catch_exceptions=False)
    assert done.exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(train_dit if stage == "dit" else train_vae, "save_training", kill_after_saving)
        with pytest.raises(Killed):
            CliRunner().invoke(train.app, [*command, str(killed)], catch_exceptions=False)
    assert not (killed / result).exists()
    CliRunner().invoke(train.app, [*command, str(killed)], catch_exceptions=False)
    (expected, expected_record), (tensors, record) = (read_tensors(folder / result) for folder in working_folder)
    assert record == expected_record
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stage", "options", "changes"),
    [
        (
            "dit",
            {"--images": "16", "--batch": "8", "--keep-at": "0.5", "--name": "x"},
            {
                "blocks": ("2", 3, 2),
                "width": ("64", 48, 64),
                "seed": ("1", 0, 1),
                "images": ("32", 16, 32),
                "batch": ("4", 8, 4),
                "keep-at": ("1", [0.5], [1.0]),
            },
        ),
        (
            "vae",
            {"--steps": "2", "--batch": "2"},
            {"seed": ("1", 0, 1), "steps": ("4", 2, 4), "batch": ("4", 2, 4)},
        ),
        (
            "text",
            {"--steps": "2", "--batch": "8"},
            {"seed": ("1", 0, 1), "steps": ("4", 2, 4), "batch": ("4", 8, 4)},
        ),
    ],
)
def test_a_training_is_never_continued_with_other_settings(stage, options, changes, working_folder, monkeypatch):
    folder, _ = working_folder
    for module in (train_dit, train_vae):
        monkeypatch.setattr(module, "HELD_OUT", 64)

    def invoke(options):
        words = [word for option in options.items() for word in option]
        return CliRunner().invoke(train.app, [stage, *words, "--out", str(folder)])

    assert invoke(options).exit_code == 0
    before = {file: file.read_bytes() for file in folder.glob("*.safetensors")}
    for key, (value, stored, asked) in changes.items():
        error = invoke(options | {f"--{key}": value}).exception
        assert isinstance(error, ConfigError)
        assert f"{key.replace('-', '_')} {stored}, not {asked};" in str(error)
    assert {file: file.read_bytes() for file in folder.glob("*.safetensors")} == before
    assert invoke(options).exit_code == 0
