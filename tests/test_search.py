"""Subsets of layers: screened from Gram matrices, ranked as exact fits rank them, without held-out labels."""

import weakref
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import norm, spearmanr

from probekit.bench.sweep_search import SyntheticDepth
from probekit.errors import HeadError
from probekit.heads import (
    BradleyTerryClassifier,
    BradleyTerryClassifierCV,
    best_subsets,
    concatenate,
    refit_subsets,
    screen_subsets,
)
from probekit.heads.cross_fit import cross_fit
from probekit.heads.linear import _folds
from probekit.heads.screening import JointGram, expected_losses, project


class Own(np.ndarray):
    """Arrays that can be watched by a weak reference."""


@pytest.fixture(scope="module")
def made():
    """Eight layers, 800 pairs, 40 channels; signal shared and of their own."""
    return SyntheticDepth(8, 800, 40, seed=1)


@pytest.fixture(scope="module")
def screened(made):
    return screen_subsets(made, range(8), made.label, None, made.groups, max_size=4)


def test_screened_pairs_rank_as_exact_fits_do(made, screened):
    pairs = list(combinations(range(8), 2))
    exact = refit_subsets(made, pairs, made.label, None, made.groups).set_index("layers")["log_loss"]
    expected = screened.set_index("layers")["log_loss"][pairs]
    assert spearmanr(expected, exact[pairs]).statistic >= 0.97
    assert np.abs(expected - exact[pairs]).max() < 0.02
    top = best_subsets(screened[screened["size"] == 2], 5)
    assert exact[top].min() - exact.min() <= 0.002


def test_all_pairs_and_triples_and_extensions_of_the_best_are_in_the_table(screened):
    sizes = screened["size"].value_counts()
    assert (sizes[1], sizes[2], sizes[3]) == (8, 28, 56)
    best = [set(one) for one in best_subsets(screened, 5) if len(one) == 3]
    fours = [set(one) for one in screened.loc[screened["size"] == 4, "layers"]]
    assert fours
    assert all(any(three < four for three in best) for four in fours)
    assert screened["layers"].is_unique
    assert all(list(one) == sorted(set(one)) for one in screened["layers"])
    assert screened["log_loss"].is_monotonic_increasing
    assert [len(one) for one in best_subsets(screened, 2)] == [2, 2, 3, 3, 4, 4]


def test_single_layers_are_scored_as_the_head_scores_them(made, screened):
    head = BradleyTerryClassifierCV().fit_differences(made(3), made.label, groups=made.groups)
    row = screened.set_index("layers").loc[[(3,)]].iloc[0]
    assert row["log_loss"] == pytest.approx(head.cv_log_loss_.mean(axis=0).min(), abs=1e-5)
    assert row["C"] == head.C_


def test_exact_fits_are_those_of_the_head_on_the_concatenation(made):
    found = refit_subsets(made, [(1, 6), (2, 5)], made.label, None, made.groups)
    assert found["log_loss"].is_monotonic_increasing
    row = found.set_index("layers").loc[[(1, 6)]].iloc[0]
    head = BradleyTerryClassifierCV().fit_differences(concatenate([made(1), made(6)]), made.label, groups=made.groups)
    assert row["log_loss"] == head.cv_log_loss_.mean(axis=0).min()
    assert row["converged"]


def test_little_memory_changes_no_number_and_no_two_layers_are_held(made):
    calls, handed_out = [], []

    def read(layer):
        assert all(array() is None for array in handed_out)
        array = made(layer).view(Own)
        handed_out.append(weakref.ref(array))
        calls.append(layer)
        return array

    options = {"max_size": 2, "Cs": (1e-2, 1.0), "cv": 3}
    given = (made.label, None, made.groups)
    whole = screen_subsets(made, range(8), *given, **options)
    parts = screen_subsets(read, range(8), *given, **options, memory=1)
    assert calls == [*range(8)] * 4  # once to fit, once for each fold
    assert list(whole["layers"]) == list(parts["layers"])
    np.testing.assert_allclose(whole["log_loss"], parts["log_loss"], rtol=1e-6)


def test_labels_of_held_out_pairs_are_not_seen():
    """Where nothing is to be found, screened sets lose as much as exact ones; with bases of other folds, 0.02 less."""
    noise = SyntheticDepth(6, 300, 60, seed=2)
    label = np.random.default_rng(0).integers(0, 2, 300).astype(float)
    given = (label, None, noise.groups)
    screened = screen_subsets(noise, range(6), *given, Cs=(0.1,)).query("size == 2")
    exact = refit_subsets(noise, screened["layers"], *given, Cs=(0.1,))
    assert screened["log_loss"].mean() > exact["log_loss"].mean() - 0.01


def test_where_the_basis_spans_all_channels_projection_loses_nothing(made):
    fold_of = _folds(made.groups, 2)
    for n in (800, 30):  # more pairs than channels, fewer
        D, label = made(2)[:n], made.label[:n]
        fit = cross_fit(D, label, np.ones(n), fold_of[:n], np.array([0.01, 0.1]))
        scaled = fit.rotated(D)
        rank = len(fit.eigenvalues)
        full = project(fit, scaled, torch.eye(rank, dtype=torch.float64)[None])[0].double()
        Z = D / fit.scale
        np.testing.assert_allclose(full @ full.T, Z @ Z.T, rtol=1e-4, atol=1e-3 * np.abs(Z @ Z.T).max())


def test_expected_loss_is_that_of_the_fitted_head_for_gaussian_differences():
    rng = np.random.default_rng(0)
    n, q = 100_000, 6
    X = rng.normal(size=(n, q)) @ rng.normal(size=(q, q)) / 2
    w = rng.normal(size=q) / 2
    y = (rng.random(n) < 1 / (1 + np.exp(-X @ w))).astype(float)
    G, b = torch.from_numpy(X.T @ X / n), torch.from_numpy(X.T @ (y - 0.5) / n)
    shape = torch.from_numpy(norm.ppf(0.5 + (np.arange(400) + 0.5) / 800))
    shape /= shape.square().mean().sqrt()
    gram = JointGram(G[None], G[None], b[None], b[None], torch.tensor([float(n)]), 0.15, shape, 2)
    C = 100.0 / n  # lam = 0.01

    for subset in ([0, 1, 2], [0, 2], [1]):
        columns = np.concatenate([[2 * layer, 2 * layer + 1] for layer in subset])
        margins = X[:, columns] @ BradleyTerryClassifier(C=C, standardize=False).fit_differences(X[:, columns], y).coef_
        exact = np.mean(np.logaddexp(0, margins) - y * margins)
        found = expected_losses(gram, np.array([subset]), np.array([[C]]))[0, 0]
        assert found == pytest.approx(exact, abs=2e-4)


def test_weights_count_as_copies(made):
    twice = np.concatenate([np.arange(800), np.arange(0, 800, 2)])
    weight = np.where(np.arange(800) % 2 == 0, 2.0, 1.0)
    options = {"Cs": (1e-2, 1.0), "cv": 3}
    groups = np.arange(800) // 2
    doubled = screen_subsets(
        lambda layer: made(layer)[twice], range(4), made.label[twice], None, groups[twice], **options
    )
    weighted = screen_subsets(made, range(4), made.label, weight, groups, **options)
    left, right = (frame.set_index("layers")["log_loss"].sort_index() for frame in (doubled, weighted))
    np.testing.assert_allclose(left, right, atol=1e-3)


def test_soft_labels_turned_pairs_give_the_same(made):
    label = np.clip(made.label, 0.2, 0.9)
    flip = np.random.default_rng(0).random(800) < 0.5
    sign = np.where(flip, -1.0, 1.0)[:, None]
    options = {"Cs": (1e-2, 1.0), "cv": 3}
    one = screen_subsets(made, range(3), label, None, made.groups, **options)
    other = screen_subsets(
        lambda layer: made(layer) * sign, range(3), np.where(flip, 1 - label, label), None, made.groups, **options
    )
    np.testing.assert_allclose(one["log_loss"], other["log_loss"], atol=1e-6)


def test_layers_without_differences_are_in_no_subset(made):
    def read(layer):
        return made(layer) * (layer != 2)

    found = screen_subsets(read, range(4), made.label, None, made.groups, Cs=(0.01, 0.1), cv=3)
    assert not any(2 in one for one in found["layers"])
    assert len(found) == 3 + 3
    with pytest.raises(HeadError, match="no pair differs in any of the layers 2, 5"):
        screen_subsets(lambda layer: 0 * made(layer), [5, 2], made.label)
    with pytest.raises(HeadError, match="max_size is 0"):
        screen_subsets(made, range(4), made.label, max_size=0)
    with pytest.raises(HeadError, match="groups has shape"):
        screen_subsets(made, range(4), made.label, groups=np.arange(3))


def test_fewer_pairs_than_channels(made):
    wide = SyntheticDepth(5, 60, 100, seed=3)
    pairs = list(combinations(range(5), 2))
    found = screen_subsets(wide, range(5), wide.label, None, wide.groups, Cs=(0.01, 0.1, 1.0), cv=3)
    exact = refit_subsets(wide, pairs, wide.label, None, wide.groups, Cs=(0.01, 0.1, 1.0), cv=3).set_index("layers")[
        "log_loss"
    ]
    assert spearmanr(found.set_index("layers")["log_loss"][pairs], exact[pairs]).statistic >= 0.97


@pytest.mark.parametrize("n_pairs", [800, 30])
def test_channels_that_rounding_explains_are_not_screened(made, n_pairs):
    """A channel that holds the label, but moves by less than three times what rounding adds to it."""
    label, groups = made.label[:n_pairs], np.arange(n_pairs)

    def telling(layer):
        D = made(layer)[:n_pairs].copy()
        D[:, 5] = 1e-4 * (2 * label - 1)
        return D

    def without(layer):
        return made(layer)[:n_pairs] * (np.arange(40) != 5)

    def rounding(layer):
        return np.where(np.arange(40) == 5, 1e-4 / 2.9, 0.0)

    given, options = (range(3), label, None, groups), {"Cs": (1e-2, 1.0), "cv": 3}
    told, dropped, never = (
        screen_subsets(telling, *given, **options),
        screen_subsets(telling, *given, **options, quantisation=rounding),
        screen_subsets(without, *given, **options),
    )
    np.testing.assert_allclose(dropped["log_loss"], never["log_loss"], atol=1e-6)
    assert told["log_loss"].max() < 0.7 * dropped["log_loss"].min()


def test_the_number_of_threads_is_left_alone(made):
    before = torch.get_num_threads()
    screen_subsets(made, range(2), made.label, Cs=(0.01, 0.1), cv=2)
    assert torch.get_num_threads() == before
