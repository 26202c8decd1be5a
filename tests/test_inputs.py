"""What enters a backbone: statistics that a dump stores beside the features, and baselines made of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_families import all_pipelines
from tiny_prefs import write_rankings

import probekit
from probekit.backbones import Backbone
from probekit.backbones.inputs import picture_statistics, text_summary, widths
from probekit.config import SweepConfig
from probekit.store import FeatureStore, open_store
from probekit.sweep.baselines import COLUMNS
from probekit.sweep.input_baselines import SEEN

HEADS = [{"kind": "linear", "layer_sets": ["singles"]}]
LINEAR = SweepConfig.checked({"heads": HEADS, "resamples": 100}, source="test")
BOTH = {"VAE latents", "VAE latents and prompt"}


def test_statistics_are_those_of_the_sixteen_parts() -> None:
    pictures = torch.randn(5, 3, 16, 24, generator=torch.Generator().manual_seed(0)) + 100
    together = picture_statistics(pictures)
    assert torch.equal(together, torch.cat([picture_statistics(picture[None]) for picture in pictures]))
    picture, found = pictures[0], together[0].numpy()
    parts = picture.numpy().astype(np.float64).reshape(3, 4, 4, 4, 6).transpose(0, 1, 3, 2, 4).reshape(48, 24)
    np.testing.assert_allclose(found[:48], parts.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found[48:], parts.std(axis=1), rtol=1e-5)
    assert len(found) == widths(3)["pixels"] == widths(3)["latents"]


def test_a_text_summary_keeps_distances_between_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = [
        [torch.randn(1, 7, 300, generator=generator), None, torch.randn(1, 40, generator=generator), torch.arange(3)]
        for _ in range(6)
    ]
    summaries = [text_summary(one) for one in embeddings]
    plain = [torch.cat([long.mean(dim=(0, 1)), pooled[0]]) for long, _, pooled, _ in embeddings]
    for i in range(6):
        for j in range(i):
            ratio = (summaries[i] - summaries[j]).norm() / (plain[i] - plain[j]).norm()
            assert 0.8 < ratio < 1.2
    assert torch.equal(text_summary(embeddings[0]), summaries[0])


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> tuple[probekit.PreferenceSet, FeatureStore]:
    root = tmp_path_factory.mktemp("inputs")
    prefs = probekit.load_preferences(write_rankings(root / "set", {"a red dog": 3, "tree": 2}, ((16, 16),)))
    backbone = Backbone.from_pretrained(all_pipelines()["sd3"].build(root / "sd3"), resolution=16, cache=root / "cache")
    first = probekit.dump_features(backbone, prefs, root / "store", sigmas=["0.1"], layers=[1, 2])
    # once more, from the cache
    again = probekit.dump_features(backbone, prefs, root / "again", sigmas=["0.1", "0.5"], layers=[1, 2])
    for name in first.inputs:
        for sigma in again.sigmas:
            held = again.read(layer=1, pooling=name, sigma=sigma)
            assert np.array_equal(held, first.read(layer=1, pooling=name))
    return prefs, first


def test_a_dump_stores_them_at_its_first_layer(dumped: tuple[probekit.PreferenceSet, FeatureStore]) -> None:
    prefs, store = dumped
    assert (store.poolings, store.inputs) == (["mean"], ["pixels", "latents", "text"])
    assert store.read(layer=2).shape == (5, store.describe["width"])  # inputs are never meant by default
    assert all([point.index for point in store.layers_of(name)] == [1] for name in store.inputs)
    pixels = store.read(layer=1, pooling="pixels")
    paths = dict(zip(zip(prefs.items["prompt"], prefs.items["image"], strict=True), prefs.items["path"], strict=True))
    for row, found in zip(store.rows.to_dict("records"), pixels, strict=True):
        with Image.open(Path(paths[row["prompt"], row["image_id"]])) as image:
            values = np.asarray(image.convert("RGB"), np.float64) / 127.5 - 1
        parts = values.transpose(2, 0, 1).reshape(3, 4, 4, 4, 4).transpose(0, 1, 3, 2, 4).reshape(48, 16)
        np.testing.assert_allclose(found, np.concatenate([parts.mean(axis=1), parts.std(axis=1)]), atol=1e-3)
    text = store.read(layer=1, pooling="text")
    prompts = store.rows["prompt"].to_numpy()
    assert all(np.array_equal(text[i], text[j]) == (prompts[i] == prompts[j]) for i in range(5) for j in range(5))


def planted(path: Path, *, planted_in: str) -> FeatureStore:
    """Pairs whose label one of the groups of what enters tells, as a sum or (``text``) only with the prompt's sign."""
    rng = np.random.default_rng(0)
    prompts, width = 900, {"pixels": 6, "latents": 4, "text": 2}
    config: dict[str, Any] = {
        "layers": [{"index": k, "name": str(k), "stream": "image"} for k in (0, 1)],
        "poolings": {"mean": "tokens"} | dict.fromkeys(width, "what enters"),
        "pooling_layers": {name: [0] for name in width},
        "inputs": list(width),
    }
    describe = {"name": path.name, "n_blocks": 1, "width": 3, "n_parameters": 10, "random_weights": None}
    sign = rng.choice([-1.0, 1.0], prompts)
    groups = {name: rng.normal(size=(2 * prompts, columns)).astype(np.float32) for name, columns in width.items()}
    groups["text"] = np.repeat(np.stack([sign, -sign], axis=1), 2, axis=0).astype(np.float32)
    ids = [f"{row:064x}" for row in range(2 * prompts)]
    rows = pd.DataFrame(
        {"row_id": ids, "prompt": np.repeat([f"p{k}" for k in range(prompts)], 2), "image_id": ids}
        | {"image_sha256": [bytes.fromhex(row) for row in ids], "width": 8, "height": 8, "file_bytes": 9, "status": 0}
    )
    writer = open_store(path, config=config, describe=describe | {"training_images": None})
    (block,) = writer.plan(rows, sigma="0.1", rows_per_shard=len(rows))
    place = pd.Index(ids).get_indexer(block.row_ids)
    features = {(name, 0): values[place] for name, values in groups.items()}
    features |= {("mean", layer): rng.normal(size=(len(rows), 3)).astype(np.float32) for layer in (0, 1)}
    part = rows.iloc[place].reset_index(drop=True)
    writer.write_shard(block, sigma="0.1", timestep=1.0, rows=part, features=features)
    score = groups["latents" if planted_in == "text" else planted_in][:, 0]
    better = (score[0::2] - score[1::2]) * (sign if planted_in == "text" else 1)
    split = np.repeat(["train", "validation", "test"], prompts // 3)
    frame = pd.DataFrame({"pair_id": [f"{k}" for k in range(prompts)], "row_a": ids[0::2], "row_b": ids[1::2]})
    frame = frame.assign(label=(better > 0).astype(float), group=frame["pair_id"], split=split)
    writer.write_judgements("votes", frame)
    return FeatureStore(path)


@pytest.mark.parametrize(
    ("planted_in", "found"),
    [
        ("pixels", {"pixels"}),
        ("latents", BOTH),
        ("text", {"VAE latents and prompt"}),
    ],
)
def test_baselines_find_what_was_planted_and_nothing_else(planted_in: str, found: set[str], tmp_path: Path) -> None:
    store = planted(tmp_path / "store", planted_in=planted_in)
    run = probekit.run_sweep(LINEAR, stores=[store.path], out=tmp_path / "run")
    frame = probekit.load_results(run)
    test = frame[(frame["split"] == "test") & (frame["slice_by"] == "all")]
    accuracy = test[test["head_kind"] == "inputs"].set_index("backbone")["accuracy"]
    assert set(accuracy.index) == set(SEEN)
    for name, value in accuracy.items():
        assert value > 0.8 if name in found else 0.4 < value < 0.6
    heads = test[test["head_kind"] == "linear"]
    assert set(heads["pooling"]) == {"mean"}  # what enters is no layer
    assert not set(COLUMNS) & set(accuracy.index)


def test_backbones_that_see_the_same_have_them_once(tmp_path: Path) -> None:
    one, two = (planted(tmp_path / name, planted_in="pixels") for name in ("one", "two"))
    run = probekit.run_sweep(LINEAR, stores=[one.path, two.path], out=tmp_path / "run")
    frame = probekit.load_results(run)
    assert set(frame.loc[frame["head_kind"] == "inputs", "backbone"]) == set(SEEN)
