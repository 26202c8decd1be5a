"""Code for a CUDA device, on one that is pretended: it mixes no devices and gives what the CPU gives."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from pretend_device import OnDevice, pretended
from sklearn.base import clone
from tiny_families import Builder, all_pipelines
from tiny_prefs import write_rankings

from probekit import dump_features, load_preferences
from probekit.backbones import Backbone
from probekit.heads import BradleyTerryClassifier, BradleyTerryClassifierCV, BradleyTerryMLP


def test_the_pretended_device_refuses_what_cuda_refuses():
    with pretended():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device == torch.device("cuda:0")
        assert isinstance(there + 1, OnDevice)
        assert (there + there).cpu().tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="two devices"):
            there + here
        with pytest.raises(RuntimeError, match="two devices"):
            there @ here
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            there.normal_(generator=torch.Generator())


@pytest.mark.parametrize(("n", "channels"), [(450, 24), (150, 300)], ids=["tall", "wide"])
@pytest.mark.parametrize(
    "head",
    [
        BradleyTerryClassifier(),
        BradleyTerryClassifier(standardize=False),
        BradleyTerryClassifierCV(),
        BradleyTerryClassifierCV(memory=0.0),  # too little to factorise
        BradleyTerryMLP(hidden=[16, 8], max_epochs=3, linear_skip=True),
    ],
    ids=["plain", "raw", "cv", "matrix-free", "mlp"],
)
def test_heads_are_those_of_the_cpu(head, n, channels):
    rng = np.random.default_rng(0)
    X, pairs = rng.standard_normal((2 * n, channels), dtype=np.float32), np.arange(2 * n).reshape(n, 2)
    label = (0.5 * rng.standard_normal(n) + (X[pairs[:, 0]] - X[pairs[:, 1]])[:, 0] > 0).astype(float)
    on_cpu = head.fit(X, pairs, label).score_items(X)
    with pretended():
        there = clone(head).set_params(device="cuda").fit(X, pairs, label).score_items(X)
    assert there == pytest.approx(on_cpu, abs=1e-4 * np.abs(on_cpu).max())


def dumps_on_both(builder: Builder, folder: Path) -> float:
    """Dump a family on both devices; the largest relative difference of a layer and pooling."""
    model, side = builder.build(folder / "model"), builder.size[0]
    sizes = ((2 * side, side), (side, 2 * side))
    prefs = load_preferences(write_rankings(folder / "pairs", {"a red dog": 2, "tree": 2}, sizes))
    options = {"resize": builder.resize, "max_tokens": builder.max_tokens, "resolution": side, "dtype": "float32"}
    what = {"sigmas": ["0.1"], "pooling": ["mean", "grid4"], "output_tokens": True, "batch_size": 3}
    stores = []
    for device in ("cpu", "cuda"):
        with pretended() if device == "cuda" else nullcontext():
            backbone = Backbone.from_pretrained(model, device=device, **options)
            stores.append(dump_features(backbone, prefs, folder / device, **what))
    apart = []
    for pooling in what["pooling"]:
        for point in backbone.layers:
            one, other = (store.read(layer=point.index, pooling=pooling) for store in stores)
            apart.append(float(np.linalg.norm(one - other) / np.linalg.norm(one)))
    return max(apart)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of autocast for a device that is not there
@pytest.mark.parametrize("family", ["sd3_t5", "flux", "sana"])
def test_a_dump_is_that_of_the_cpu(family, tmp_path):
    """Every family: ``tests/campaigns/device.py``."""
    assert dumps_on_both(all_pipelines()[family], tmp_path) < 2e-4  # stored in float16
