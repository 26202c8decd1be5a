"""Rows of the table that do not fit a model are refused with what was found; users add rows of their own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import PatchEmbed
from own_model import ROW, OwnTransformer, own_pipeline
from tiny_families import all_pipelines
from tiny_prefs import write_rankings

import probekit
from probekit.backbones import Backbone, passes
from probekit.backbones.catalogue import FAMILIES
from probekit.errors import BackboneError

PIPELINES = all_pipelines()
NAMES = ("sd3", "flux2", "chroma", "pixart_sigma", "sana", "ideogram4")
Change = Callable[[probekit.Family], probekit.Family]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: PIPELINES[name].build(root / name) for name in NAMES}


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the table as it was."""
    monkeypatch.setattr("probekit.backbones.catalogue.FAMILIES", dict(FAMILIES))


def blocks(at: int, **changes: Any) -> Change:
    """Change one list of blocks of a row."""
    return lambda row: replace(
        row, blocks=tuple(replace(old, **changes) if i == at else old for i, old in enumerate(row.blocks))
    )


def row(**changes: Any) -> Change:
    return lambda old: replace(old, **changes)


def features(folder: Path, size: tuple[int, int], **options: Any) -> dict[tuple[str, int], np.ndarray]:
    backbone = Backbone.from_pretrained(folder, resolution=max(size), **options)
    shape = backbone._latent_shape(*size)
    latents = list(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    wanted = backbone.wanted(["mean"], [1, backbone.output_point.index])
    return backbone.features(latents, ["tree", "red"], sigma="0.05", eps=latents, wanted=wanted, batch_size=2)


WRONG = [
    ("sd3", blocks(0, returns="first"), r"transformer_blocks returns \(None, \(3, 24, 32\)\), no tensor first"),
    ("sd3", blocks(0, returns="only"), r"returns \(\(3, 280, 32\), \(3, 24, 32\)\), no tensor only"),
    ("sd3", blocks(0, argument="encoder_hidden_states"), r"\(3, 280, 32\) enter .*, not 24 image tokens of each of 3"),
    ("sd3", blocks(0, argument="x"), r"a block of transformer_blocks gets no tensor 'x', only hidden_states, encoder"),
    ("sd3", blocks(0, text="last"), "the image leaves transformer_blocks.0 as text"),
    ("sd3", blocks(0, text_argument="hidden_states"), "another image changes what enters transformer_blocks.0 as text"),
    ("sd3", blocks(0, last_text=True), r"returns \(None, \(3, 24, 32\)\), no tensor first"),
    ("sd3", blocks(0, sequence_first=True), r"\(24, 3, 32\) enter transformer_blocks\.0"),
    (
        "sd3",
        blocks(0, path="blocks"),
        "has no module 'blocks', which its row .* it has pos_embed, ",
    ),
    ("sd3", blocks(0, path="pos_embed"), "pos_embed is a PatchEmbed; allowed: a list of blocks"),
    ("sd3", row(patch=4), "24, 32.* enter .*, not 6 image tokens"),
    ("sd3", row(output=probekit.Output("proj")), "has no module 'proj'"),
    ("sd3", row(output=probekit.Output("norm_out.linear")), "what enters norm_out.linear does not depend on what"),
    (
        "sd3",
        row(noise="vp"),
        "FlowMatchEulerDiscreteScheduler has no alphas_cumprod, which",
    ),
    (
        "flux2",
        blocks(1, tokens="first"),
        r"leaves transformer_blocks\.1 .* does not enter single_transformer_b",
    ),
    ("flux2", blocks(1, tokens="all"), r"\(3, 536, 32\) enter single_transformer_blocks\.0, not 24 image tokens"),
    ("flux2", blocks(0, returns="first", text="last"), r"\(3, 512, 32\) leave transformer_blocks\.0, not 24 image"),
    ("flux2", lambda old: replace(old, blocks=old.blocks[::-1]), "another image changes"),
    (
        "flux2",
        lambda old: replace(old, blocks=(replace(old.blocks[1], tokens="first", text=None),)),
        r"another image changes tokens .* of 536 of what enters .*, the row takes tokens 0-23 of 536",
    ),
    (
        "chroma",
        blocks(1, tokens="first"),
        r"leaves transformer_blocks\.1 .* does not enter single_transformer_b",
    ),
    ("pixart_sigma", blocks(0, argument="encoder_hidden_states"), r"\(3, 300, 48\) enter transformer_blocks\.0"),
    ("pixart_sigma", row(patch=1), r"\(3, 24, 48\) enter transformer_blocks\.0, not 96 image tokens"),
    (
        "ideogram4",
        row(output=probekit.Output("final_layer.linear", tokens="first")),
        "the output depends on tokens 0-23 of 2072 of what",
    ),
    ("sana", row(patch=2), r"\(3, 32, 32\) enter transformer_blocks\.0, not 8 image tokens"),
]


@pytest.mark.parametrize(("name", "change", "found"), WRONG)
def test_wrong_rows_are_refused_with_what_was_found(
    folders: dict[str, Path], name: str, change: Change, found: str
) -> None:
    builder = PIPELINES[name]
    right = FAMILIES[builder.transformer, builder.pipeline]
    probekit.register_family(change(right))
    with pytest.raises(BackboneError, match=found) as caught:
        features(folders[name], builder.size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_right_rows_pass(folders: dict[str, Path], name: str) -> None:
    features(folders[name], PIPELINES[name].size)


def test_tokens_in_another_order_are_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Column by column instead of row by row: the right tokens, at the wrong places of the picture."""
    embed = PatchEmbed.forward
    monkeypatch.setattr(
        PatchEmbed, "forward", lambda *args: embed(*args).unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    )
    with pytest.raises(BackboneError, match="another top right corner changes image token 12 of 4 x 4, not 3"):
        features(folders["sd3"], (16, 16))


def test_it_runs_once_a_backbone_and_before_anything_is_stored(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = []
    check = passes.selftest.check_slices
    monkeypatch.setattr(passes.selftest, "check_slices", lambda *a, **k: (runs.append(1), check(*a, **k)))
    prefs = probekit.load_preferences(write_rankings(tmp_path / "prefs", {"tree": 2, "red": 2}))
    backbone = Backbone.from_pretrained(folders["sd3"])
    probekit.dump_features(backbone, prefs, tmp_path / "store")
    backbone.prompts.embed(["another prompt"])  # the transformer leaves memory and comes back
    probekit.dump_features(backbone, prefs, tmp_path / "store", sigmas=["0.1"])
    assert len(runs) == 1

    probekit.register_family(blocks(0, argument="temb")(FAMILIES["SD3Transformer2DModel", "StableDiffusion3Pipeline"]))
    wrong = Backbone.from_pretrained(folders["sd3"])
    for _ in range(2):  # the second time as well
        with pytest.raises(BackboneError, match="does not fit this model"):
            probekit.dump_features(wrong, prefs, tmp_path / "wrong")
    assert not list((tmp_path / "wrong").rglob("*.h5"))


# --- classes that the table does not know


def test_an_unknown_class_is_told_what_is_known_and_how_to_add_it(tmp_path: Path) -> None:
    folder = own_pipeline(tmp_path / "own")
    with pytest.raises(BackboneError) as caught:
        Backbone.from_pretrained(folder)
    message = str(caught.value)
    assert "transformer class 'OwnTransformer' is not known; known: AuraFlowTransformer2DModel, " in message
    assert "SD3Transformer2DModel" in message
    assert "probekit.register_family(probekit.Family(transformer='OwnTransformer', pipeline='OwnPipeline'" in message


def test_a_known_class_in_an_unknown_pipeline_is_told_the_pipelines(folders: dict[str, Path], tmp_path: Path) -> None:
    own = own_pipeline(tmp_path / "own")
    with pytest.raises(BackboneError, match="known: StableDiffusion3Pipeline; add a row with probekit"):
        Backbone.from_pretrained(own, transformer=folders["sd3"] / "transformer")


def test_a_users_own_transformer_and_pipeline_are_dumped_after_register_family(tmp_path: Path) -> None:
    folder = own_pipeline(tmp_path / "own")
    probekit.register_family(ROW)
    backbone = Backbone.from_pretrained(folder)
    assert (backbone.n_blocks, backbone.width, backbone.layers[2].name) == (2, 24, "layers.1")
    prefs = probekit.load_preferences(write_rankings(tmp_path / "prefs", {"tree": 3, "red dog": 2}))
    store = probekit.dump_features(backbone, prefs, tmp_path / "store", sigmas=["0"], pooling=["mean", "text_mean"])
    assert len(store.rows) == 5
    model = OwnTransformer.from_pretrained(folder / "transformer")
    files = [(Path(path), digest) for path, digest in prefs.image_digests().items()]
    latents = torch.stack([image.latents for image in next(backbone.latents([files]))])
    expected = model.embed(latents.flatten(2).transpose(1, 2)).mean(dim=1)
    stored = store.read(layer=0, pooling="mean")
    assert all(np.abs(stored - values).max(axis=1).min() < 1e-3 for values in expected.detach().numpy())
    probekit.register_family(replace(ROW, blocks=(replace(ROW.blocks[0], tokens="first"),)))
    with pytest.raises(BackboneError, match=r"changes tokens 24-87 of 88 of what enters .*, the row takes tokens 0-63"):
        features(folder, (16, 16))


def test_a_family_that_is_not_tested_says_so(
    tmp_path: Path, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    probekit.register_family(ROW)
    own, known = Backbone.from_pretrained(own_pipeline(tmp_path / "own")), Backbone.from_pretrained(folders["sd3"])
    assert (own.describe()["family_tested"], known.describe()["family_tested"]) == (False, True)
    prefs = probekit.load_preferences(write_rankings(tmp_path / "prefs", {"tree": 2}))
    store = probekit.dump_features(own, prefs, tmp_path / "store")
    assert "OwnTransformer is untested: probekit's own tests do not run this family" in caplog.text
    assert store.summary()["backbone"]["family_tested"] is False
    caplog.clear()
    probekit.dump_features(known, prefs, tmp_path / "known")
    assert "untested" not in caplog.text
