"""Fits on differences in files: equal to those in memory, few passes, bounded memory, errors that name the file."""

import os
import subprocess
import sys

import numpy as np
import pytest

from probekit.errors import HeadError
from probekit.heads import BradleyTerryClassifier, BradleyTerryClassifierCV, StreamedDifferences, solvers, streaming


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Write columns of D side by side into files; blocks are so small that there are many."""
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 2**14)
    monkeypatch.setattr(streaming, "_SCRATCH_BYTES", 2**12)

    def write(D, widths):
        files = [tmp_path / f"layer-{number}.f32" for number in range(len(widths))]
        for file, part in zip(files, np.split(D, np.cumsum(widths)[:-1], axis=1), strict=True):
            part.astype("<f4").tofile(file)
        return StreamedDifferences(files, widths, len(D))

    return write


def synthetic(n, d, *, seed=0):
    """Correlated differences (n, d) float32 on scales of several decades, labels of a linear head, pair weights."""
    rng = np.random.default_rng(seed)
    D = rng.normal(size=(n, d)) @ (rng.normal(size=(d, d)) / np.sqrt(np.arange(1, d + 1))[:, None])
    score = D @ rng.normal(size=d)
    label = (rng.random(n) < 1 / (1 + np.exp(-score / score.std()))).astype(float)
    D *= 10 ** rng.uniform(-2, 2, d)
    return D.astype(np.float32), label, rng.exponential(size=n)


def same_fit(streamed, known, D, within=1e-3):
    assert streamed.converged_
    assert known.converged_
    size = np.linalg.norm(D @ known.coef_)
    assert np.linalg.norm(D @ (streamed.coef_ - known.coef_)) <= within * size
    for name in ("n_dropped_", "n_features_in_", "n_parameters_", "n_less_than_d_", "matrix_free_"):
        assert getattr(streamed, name) == getattr(known, name)


SHAPES = [(900, (30, 25, 5), 1e9), (70, (100, 60), 1e9), (300, (80, 40), 4e5), (70, (100, 60), 1e5)]
"""Pairs, channels of the files and bytes: n > d, n < d, and both too large for the bytes."""


@pytest.mark.parametrize(("n", "widths", "memory"), SHAPES)
@pytest.mark.parametrize("standardize", [True, False])
def test_equals_the_fit_in_memory(on_disk, n, widths, memory, standardize):
    D, label, weight = synthetic(n, sum(widths))
    if not standardize:
        D /= D.std(axis=0)
    label = np.clip(label + np.random.default_rng(1).choice([0.0, 0.25, -0.25, 0.5], n), 0, 1)
    D[:, 3] = 0
    D[:, -2] *= 1e-12
    options = {"C": 0.1, "standardize": standardize, "memory": memory}
    streamed = BradleyTerryClassifier(**options).fit_differences(on_disk(D, widths), label, weight)
    known = BradleyTerryClassifier(**options).fit_differences(D, label, weight)
    same_fit(streamed, known, D, within=1e-3 if memory > 1e8 else 1e-2)
    assert streamed.matrix_free_ == (memory < 1e8)
    assert streamed.n_dropped_ == (2 if standardize else 0)


@pytest.mark.parametrize(("n", "widths", "memory"), SHAPES[:3])
def test_cross_validation_equals_the_one_in_memory(on_disk, n, widths, memory):
    D, label, weight = synthetic(n, sum(widths))
    groups = np.arange(n) // 2
    options = {"Cs": (1e-3, 1e-2, 1e-1), "cv": 3, "memory": memory}
    streamed = BradleyTerryClassifierCV(**options).fit_differences(on_disk(D, widths), label, weight, groups)
    known = BradleyTerryClassifierCV(**options).fit_differences(D, label, weight, groups)
    same_fit(streamed, known, D, within=1e-3 if memory > 1e8 else 1e-2)
    assert streamed.C_ == known.C_
    loose = 1e-3 if memory > 1e8 else 1e-2
    np.testing.assert_allclose(streamed.cv_log_loss_, known.cv_log_loss_, atol=loose)
    np.testing.assert_allclose(streamed.cv_accuracy_, known.cv_accuracy_, atol=10 * loose)


def test_channels_of_quantisation_noise_are_dropped(on_disk):
    D, label, _ = synthetic(300, 20)
    noise = np.zeros(20)
    noise[[4, 17]] = D[:, [4, 17]].std(axis=0)
    head = BradleyTerryClassifier(quantisation=noise).fit_differences(on_disk(D, (15, 5)), label)
    np.testing.assert_array_equal(np.flatnonzero(head.coef_ == 0), [4, 17])


def test_columns_take_turns_where_their_state_is_too_large(on_disk, monkeypatch):
    D, label, _ = synthetic(900, 40)
    stream = on_disk(D, (40,))
    head = BradleyTerryClassifierCV(Cs=(1e-3, 1e-2, 1e-1), cv=3)
    together = head.fit_differences(stream, label)
    loss, coef = together.cv_log_loss_, together.coef_
    monkeypatch.setattr(solvers, "_columns_at_a_time", lambda problem, columns: 2)
    apart = head.fit_differences(stream, label)
    np.testing.assert_allclose(apart.cv_log_loss_, loss, atol=1e-5)
    np.testing.assert_allclose(apart.coef_, coef, atol=1e-4 * np.linalg.norm(coef))


def test_full_steps_that_fail_are_replaced(on_disk, monkeypatch):
    """With the line search's own condition for full steps, the fit goes the way of that in memory."""
    D, label, weight = synthetic(400, 30)
    monkeypatch.setattr(solvers, "_UNDERSHOOT", 0.1)
    monkeypatch.setattr(solvers, "_OVERSHOOT", 0.1)
    known = BradleyTerryClassifier(C=1e3).fit_differences(D, label, weight)
    searched = []
    search = solvers._line_search
    monkeypatch.setattr(solvers, "_line_search", lambda *given: searched.append(0) or search(*given))
    streamed = BradleyTerryClassifier(C=1e3).fit_differences(on_disk(D, (10, 20)), label, weight)
    assert searched
    same_fit(streamed, known, D, within=1e-4)


def test_reads_the_files_a_few_times(on_disk, monkeypatch):
    D, label, _ = synthetic(1500, 60)
    stream = on_disk(D, (20, 40))
    read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *given: read.append(preadv(*given)) or read[-1])
    BradleyTerryClassifierCV().fit_differences(stream, label)
    assert sum(read) <= 12 * D.nbytes  # 40 fits and a refit
    read.clear()
    BradleyTerryClassifier().fit_differences(stream, label)
    assert sum(read) <= 8 * D.nbytes
    read.clear()
    few = StreamedDifferences(on_disk(D[:50], (20, 40)).files, (20, 40), 50)
    BradleyTerryClassifierCV().fit_differences(few, label[:50])
    assert sum(read) == 3 * D[:50].nbytes  # scales, kernel, coefficients


def test_memory_does_not_grow_with_the_files(tmp_path):
    """64 MB of differences, read in blocks of 1 MiB."""
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from probekit.heads import BradleyTerryClassifier, StreamedDifferences, streaming
streaming.BLOCK_BYTES = 2**20
folder = Path(sys.argv[1])
rng = np.random.default_rng(0)
block = rng.standard_normal((2000, 512), dtype=np.float32)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def fit(times):
    files = [folder / f"{layer}-{times}" for layer in range(2)]
    for file, part in zip(files, (block[:, :112], block[:, 112:])):
        with file.open("wb") as stream:
            for _ in range(times):
                stream.write(part.tobytes())
    label = np.tile((block[:, 0] + rng.standard_normal(len(block)) > 0).astype(float), times)
    stream = StreamedDifferences(files, (112, 400), len(label))
    assert BradleyTerryClassifier(C=0.1).fit_differences(stream, label).converged_
    return peak()
fit(1)
before = peak()
print(fit(16) - before)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20  # MiB, labels, weights and margins of the 32,000 pairs included


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.unlink(), r"layer-1.f32 cannot be read \(No such file or directory\)"),
        (lambda file: os.truncate(file, 400), r"layer-1.f32 has 400 bytes; \(80, 20\) float32 take 6400"),
        (lambda file: file.write_bytes(file.read_bytes() * 2), "has 12800 bytes"),
    ],
)
def test_files_that_are_not_as_said_are_named(on_disk, harm, message):
    D, label, _ = synthetic(80, 30)
    stream = on_disk(D, (10, 20))
    harm(stream.files[1])
    with pytest.raises(HeadError, match=message) as caught:
        BradleyTerryClassifierCV().fit_differences(stream, label)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n", [80, 25])
@pytest.mark.parametrize("memory", [1e9, 1e3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(on_disk, n, memory, value):
    D, label, _ = synthetic(n, 30)
    D[17, 25] = value
    with pytest.raises(HeadError, match=r"pair 17 in .*layer-1\.f32 hold NaN or infinity") as caught:
        BradleyTerryClassifier(memory=memory).fit_differences(on_disk(D, (10, 20)), label)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_during_a_fit_is_named(on_disk):
    stream = on_disk(synthetic(3000, 30)[0], (30,))
    blocks = stream.blocks()
    next(blocks)
    os.truncate(stream.files[0], 90_000)
    with pytest.raises(HeadError, match=r"layer-0\.f32 ended at byte 90000 while it was read"):
        list(blocks)


def test_other_bad_input_is_named(on_disk):
    D, label, _ = synthetic(80, 30)
    stream = on_disk(D, (10, 20))
    with pytest.raises(HeadError, match=r"2 files have widths \[30\]; give one positive width for each file"):
        StreamedDifferences(stream.files, [30], 80)
    with pytest.raises(HeadError, match=r"label has shape \(3,\); it must be \(80,\)"):
        BradleyTerryClassifier().fit_differences(stream, np.ones(3))
    with pytest.raises(HeadError, match="none of the 30 channels"):
        BradleyTerryClassifier().fit_differences(on_disk(0 * D, (10, 20)), label)
