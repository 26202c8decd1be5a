"""A small form of the demo: the whole line on two shapes, with the planted facts of the playground."""

import pytest

import probekit
from probekit import demo
from probekit.config import SweepConfig, load_yaml
from probekit.playground import models


def test_the_demo_and_the_shipped_configuration_are_the_same():
    from pathlib import Path

    shipped = load_yaml(Path(__file__).parent.parent / "sweeps" / "demo.yaml")
    assert SweepConfig.checked(shipped, source="demo.yaml") == demo.SWEEP


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Made by a process for each core; then by this one alone, which must find everything done."""
    folder = tmp_path_factory.mktemp("demo")
    small = [model for model in models() if model.name in ("3x48-seed0", "6x48")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TRAIN_PAIRS", 400)
        patch.setattr(demo, "TEST_PAIRS", 300)
        patch.setattr(demo, "RANDOM_SEEDS", (0,))
        patch.setattr(demo, "models", lambda: small)
        seen = []
        page = demo.run_demo(folder, progress=lambda done, total, text: seen.append((done, total, text)))
        assert page == folder / "report.html"
        stages = {text.split()[0]: (done, total) for done, total, text in seen}
        assert stages["dump"] == (4, 4)
        assert stages["sweep"] == (26, 26)
        before = (folder / "run" / "results.parquet").read_bytes()
        again = []
        patch.setattr(demo.os, "sched_getaffinity", lambda pid: {0}, raising=False)
        demo.run_demo(folder, progress=lambda done, total, text: again.append(text))
        assert not [text for text in again if text.startswith("sweep")]
        assert (folder / "run" / "results.parquet").read_bytes() == before
    return folder


def test_the_page_and_its_figures_are_there(out):
    page = (out / "report.html").read_text()
    assert "3x48" in page
    assert "http" + "://" not in page.replace("http://www.w3.org", "")
    for kind in ("svg", "png", "csv"):
        assert list(out.rglob(f"depth.{kind}"))
        assert list(out.rglob(f"scaling.{kind}"))


def test_before_the_first_block_no_text_has_been_seen(out):
    """Swap-balanced content pairs show each picture under both captions: layer 0 is at 50 % by construction."""
    frame = probekit.load_results(out / "run").query(
        "split == 'test' and layer == 0 and control == 'trained' and backbone == '6x48'"
    )
    content = frame[frame["source"].isin(["colour", "background", "count", "size", "shape", "binding", "relation"])]
    assert len(content) == 7
    assert (content["accuracy"] - 0.5).abs().max() <= 1 / content["n_pairs"].min()  # noise is drawn per prompt
    assert frame.set_index("source").loc["degradation", "accuracy"] > 0.6
