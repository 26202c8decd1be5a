"""The heads: scikit-learn as oracle, invariants, planted and absent signals, the estimator contract."""

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression

from probekit.errors import ConfigError, HeadError
from probekit.heads import (
    BradleyTerryClassifier,
    BradleyTerryClassifierCV,
    BradleyTerryMLP,
    combination_name,
    concatenate,
    layer_set_name,
    resolve_layer_sets,
    training,
)
from probekit.heads.linear import _folds
from probekit.heads.mlp import fit_together
from probekit.stats import accuracy_interval, strict

HEADS = [
    BradleyTerryClassifier(),
    BradleyTerryClassifierCV(Cs=(0.01, 1.0), cv=3),
    BradleyTerryMLP(hidden=(8,), max_epochs=3),
]
small = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def synthetic(n, d, *, seed=0, spread=0.0, signal=1.0):
    """Correlated differences (n, d) with scales over ``spread`` decades, and labels drawn from a linear head."""
    rng = np.random.default_rng(seed)
    D = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    z = D @ rng.normal(size=d)
    label = (rng.random(n) < 1 / (1 + np.exp(-signal * z / z.std()))).astype(float)
    return D * 10 ** (spread * (rng.random(d) - 0.5)), label


def rows_and_pairs(n, d, *, seed=0, signal=1.0):
    """Rows (2 n, d) float32 with large common offsets, disjoint pairs, labels from a linear head."""
    D, label = synthetic(n, d, seed=seed, signal=signal)
    rng = np.random.default_rng(seed + 1)
    second = rng.normal(size=(n, d)) + 100
    X = np.concatenate([second + D, second]).astype(np.float32)
    return X, np.stack([np.arange(n), np.arange(n) + n], axis=1), label


def reference(Z, label, C, weight=None):
    """scikit-learn's solution, with soft labels as two weighted rows."""
    weight = np.ones(len(label)) if weight is None else weight
    # lbfgs takes flat separable problems to float precision; newton-cholesky needs n >= d
    solver = "newton-cholesky" if len(Z) > Z.shape[1] else "lbfgs"
    model = LogisticRegression(C=C, fit_intercept=False, tol=1e-12, solver=solver, max_iter=200_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns at its own precision limit
        model.fit(np.vstack([Z, Z]), np.repeat([1, 0], len(Z)), np.concatenate([weight * label, weight * (1 - label)]))
    return model.coef_[0]


def objective(w, Z, label, C, weight):
    margins = Z @ w
    return (weight @ (np.logaddexp(0, margins) - label * margins) + w @ w / (2 * C)) / weight.sum()


@pytest.mark.parametrize("C", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize(("n", "d", "spread"), [(600, 40, 0.0), (600, 40, 8.0), (80, 150, 0.0), (80, 150, 8.0)])
def test_equals_scikit_learn(n, d, spread, C):
    D, label = synthetic(n, d, spread=spread)
    rms = np.sqrt(np.mean(D**2, axis=0))
    head = BradleyTerryClassifier(C=C).fit_differences(D, label)
    Z, found = D / rms, head.coef_ * rms
    expected = reference(Z, label, C)
    assert head.converged_
    assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)
    assert objective(found, Z, label, C, np.ones(n)) - objective(expected, Z, label, C, np.ones(n)) <= 2e-6


@pytest.mark.parametrize("standardize", [True, False])
def test_equals_scikit_learn_with_soft_labels_and_weights(standardize):
    D, label = synthetic(400, 20)
    rng = np.random.default_rng(5)
    label = np.clip(label + rng.choice([0.0, 0.25, 0.5, -0.25, -0.5], 400), 0, 1)
    weight = rng.exponential(size=400)
    rms = np.sqrt(weight @ D**2 / weight.sum()) if standardize else np.ones(20)
    head = BradleyTerryClassifier(C=0.1, standardize=standardize, tol=1e-12).fit_differences(D, label, weight)
    expected = reference(D / rms, label, 0.1, weight)
    np.testing.assert_allclose(head.coef_ * rms, expected, atol=1e-5 * np.linalg.norm(expected))
    gradient = (D / rms).T @ (weight * (1 / (1 + np.exp(-D @ head.coef_)) - label)) / weight.sum()
    gradient += head.coef_ * rms / (0.1 * weight.sum())
    assert head.gradient_norm_ == pytest.approx(np.linalg.norm(gradient), abs=1e-9)


@pytest.mark.parametrize(("n", "d"), [(600, 40), (60, 150)])
@pytest.mark.parametrize("C", [1.0, 1e4])
def test_float32_channels_that_almost_repeat_each_other(n, d, C):
    """The condition is 1e8 after standardising too, which float32 iterations alone do not solve."""
    D, label = synthetic(n, d, spread=4.0)
    D[:, 1::2] = D[:, ::2] * (1 + 1e-4 * np.random.default_rng(1).normal(size=(n, d // 2)))
    D = D.astype(np.float32)
    head = BradleyTerryClassifier(C=C).fit_differences(D, label)
    rms = np.sqrt(np.mean(D.astype(float) ** 2, axis=0))
    Z, found = D / rms, head.coef_ * rms
    # scikit-learn's solvers end at their own precision, so only the optimum's own condition is asked for
    gradient = Z.T @ (1 / (1 + np.exp(-Z @ found)) - label) / n + found / (C * n)
    curvature = Z.T * ((p := 1 / (1 + np.exp(-Z @ found))) * (1 - p)) @ Z / n + np.eye(d) / (C * n)
    step = np.linalg.solve(curvature, gradient)
    assert head.converged_
    assert gradient @ step / 2 <= 1e-8
    assert np.linalg.norm(step) <= 1e-3 * np.linalg.norm(found)
    assert np.linalg.norm(gradient) == pytest.approx(head.gradient_norm_, rel=1e-2, abs=1e-9)


def test_few_iterations_whatever_the_condition():
    D, label = synthetic(2000, 60, spread=8.0)
    assert BradleyTerryClassifier(C=0.01).fit_differences(D, label).n_iter_ <= 5
    assert BradleyTerryClassifier(C=100.0).fit_differences(D.astype(np.float32), label).n_iter_ <= 5


@pytest.mark.parametrize(("n", "d"), [(300, 20), (40, 90)])
def test_matrix_free_fits_reach_the_same_optimum(n, d):
    D, label = synthetic(n, d, spread=6.0)
    Cs = (0.01, 1.0)
    known = BradleyTerryClassifierCV(Cs=Cs).fit_differences(D, label)
    free = BradleyTerryClassifierCV(Cs=Cs, memory=1000.0).fit_differences(D, label)
    assert free.matrix_free_
    assert not known.matrix_free_
    assert free.converged_
    assert free.C_ == known.C_
    # the gap is only estimated by a preconditioner that is far from the Hessian
    assert np.linalg.norm(D @ (free.coef_ - known.coef_)) <= 1e-2 * np.linalg.norm(D @ known.coef_)
    np.testing.assert_allclose(free.cv_log_loss_, known.cv_log_loss_, atol=1e-2)
    assert free.n_less_than_d_ == known.n_less_than_d_ == (n < d)


def test_separable_and_duplicated_pairs_converge():
    D, _ = synthetic(60, 100)
    D = np.concatenate([D, D, D[:7]])
    label = np.ones(len(D))
    head = BradleyTerryClassifier(C=1e4).fit_differences(D, label)
    assert head.converged_
    assert (D @ head.coef_ > 0).all()


def test_cross_validation_equals_a_scikit_learn_loop():
    D, label = synthetic(300, 25, signal=0.7)
    groups = np.arange(300) // 3
    Cs = (1e-3, 1e-2, 1e-1, 1.0)
    head = BradleyTerryClassifierCV(Cs=Cs, cv=4).fit_differences(D, label, groups=groups)
    Z = D / np.sqrt(np.mean(D**2, axis=0))
    folds = _folds(groups, 4)
    loss, accuracy = np.empty((4, 4)), np.empty((4, 4))
    for fold in range(4):
        train, test = folds != fold, folds == fold
        for column, C in enumerate(Cs):
            margins = Z[test] @ reference(Z[train], label[train], C)
            loss[fold, column] = np.mean(np.logaddexp(0, margins) - label[test] * margins)
            accuracy[fold, column] = np.mean((margins > 0) == (label[test] > 0.5))
    np.testing.assert_allclose(head.cv_log_loss_, loss, atol=1e-4)
    np.testing.assert_allclose(head.cv_log_loss_.mean(axis=0), loss.mean(axis=0), atol=4e-5)
    assert np.abs(head.cv_accuracy_.mean(axis=0) - accuracy.mean(axis=0)).max() <= 0.004  # one of 300 pairs
    assert Cs.index(head.C_) == loss.mean(axis=0).argmin()
    alone = BradleyTerryClassifier(C=head.C_).fit_differences(D, label)
    np.testing.assert_allclose(head.coef_, alone.coef_, atol=1e-4 * np.linalg.norm(alone.coef_))


def test_folds_keep_groups_whole_and_even():
    groups = np.random.default_rng(0).integers(0, 40, 500)
    folds = _folds(groups, 5)
    assert all(len(set(folds[groups == group])) == 1 for group in np.unique(groups))
    assert np.bincount(folds).min() >= 90
    np.testing.assert_array_equal(folds, _folds(groups, 5))


def test_pairs_that_share_rows_stay_in_one_fold():
    X, pairs, label = rows_and_pairs(60, 5)
    chained = np.stack([np.arange(60), np.arange(60) + 1], axis=1)  # one chain: a single group
    BradleyTerryClassifierCV().fit(X, pairs, label)
    with pytest.raises(HeadError, match="1 groups of pairs cannot fill cv=5"):
        BradleyTerryClassifierCV().fit(X, chained, label)


def test_a_fold_may_be_one_group():
    D, label = synthetic(90, 10)
    groups = np.repeat([0, 1, 2], [10, 30, 50])
    head = BradleyTerryClassifierCV(Cs=(0.1,), cv=3).fit_differences(D, label, groups=groups)
    Z = D / np.sqrt(np.mean(D**2, axis=0))
    for fold, group in enumerate([2, 1, 0]):  # the largest group is dealt first
        margins = Z[groups == group] @ reference(Z[groups != group], label[groups != group], 0.1)
        loss = np.mean(np.logaddexp(0, margins) - label[groups == group] * margins)
        assert head.cv_log_loss_[fold, 0] == pytest.approx(loss, abs=1e-4)


def test_repeated_splits_add_folds_to_the_first():
    D, label = synthetic(200, 10)
    groups = np.arange(200) // 4
    once = BradleyTerryClassifierCV(cv=4).fit_differences(D, label, groups=groups)
    thrice = BradleyTerryClassifierCV(cv=4, n_repeats=3).fit_differences(D, label, groups=groups)
    assert thrice.cv_accuracy_.shape == thrice.cv_log_loss_.shape == (12, len(once.Cs))
    np.testing.assert_allclose(thrice.cv_log_loss_[:4], once.cv_log_loss_, atol=1e-6)
    splits = [_folds(groups, 4, repeat) for repeat in range(3)]
    for split in splits:
        assert all(len(set(split[groups == group])) == 1 for group in np.unique(groups))
    assert len({split.tobytes() for split in splits}) == 3


def test_edge_of_the_grid_is_marked():
    D, label = synthetic(300, 5, signal=3.0)
    assert BradleyTerryClassifierCV(Cs=(1e-6, 1e-5)).fit_differences(D, label).edge_of_grid_
    assert not BradleyTerryClassifierCV(Cs=(1e-6, 1.0, 1e9)).fit_differences(D, label).edge_of_grid_
    assert not BradleyTerryClassifierCV(Cs=(1.0,)).fit_differences(D, label).edge_of_grid_


@small
@given(seed=st.integers(0, 10_000), n=st.integers(5, 60), d=st.integers(1, 80), C=st.sampled_from([0.01, 1.0, 100.0]))
def test_invariants_of_the_linear_head(seed, n, d, C):
    D, label = synthetic(n, d, seed=seed)
    rng = np.random.default_rng(seed)
    head = BradleyTerryClassifier(C=C, tol=1e-11)
    coef = head.fit_differences(D, label).coef_
    size = np.linalg.norm(D @ coef)

    def same(other, scale=1.0):
        assert np.linalg.norm(D @ (other * scale - coef)) <= 1e-4 * size

    flip = rng.choice([-1.0, 1.0], n)
    same(head.fit_differences(D * flip[:, None], np.where(flip < 0, 1 - label, label)).coef_)
    order = rng.permutation(n)
    same(head.fit_differences(D[order], label[order]).coef_)
    scale = 10 ** rng.uniform(-3, 3, d)
    same(head.fit_differences(D * scale, label).coef_, scale)
    twice = np.concatenate([np.arange(n), np.arange(0, n, 2)])
    weight = np.where(np.arange(n) % 2 == 0, 2.0, 1.0)
    doubled = head.fit_differences(D[twice], label[twice]).coef_
    weighted = head.fit_differences(D, label, weight).coef_
    assert np.linalg.norm(D @ (doubled - weighted)) <= 1e-4 * np.linalg.norm(D @ weighted)


def test_soft_labels_pull_to_zero():
    D, label = synthetic(200, 10)
    norms = [
        np.linalg.norm(D @ BradleyTerryClassifier().fit_differences(D, 0.5 + share * (label - 0.5)).coef_)
        for share in (1.0, 0.5, 0.1, 1e-6)
    ]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-5 * norms[0]


def test_probabilities_swap_exactly_with_the_sides():
    X, pairs, label = rows_and_pairs(100, 12)
    for head in HEADS:
        fitted = clone(head).fit(X, pairs, label)
        chance = fitted.predict_proba(X, pairs)
        np.testing.assert_array_equal(chance, fitted.predict_proba(X, pairs[:, ::-1])[:, ::-1])
        np.testing.assert_allclose(chance.sum(axis=1), 1)
        margins = fitted.decision_function(X, pairs)
        np.testing.assert_array_equal(chance[:, 1] > 0.5, margins > 0)
        scores = fitted.score_items(X)
        np.testing.assert_array_equal(margins, scores[:100] - scores[100:])


def test_channels_of_rounding_noise_are_dropped():
    D, label = synthetic(200, 10)
    D[:, 3] = 0
    D[:, 4] *= 1e-9
    head = BradleyTerryClassifier().fit_differences(D, label)
    assert head.n_dropped_ == 2
    assert head.n_parameters_ == 8
    np.testing.assert_array_equal(np.flatnonzero(head.coef_ == 0), [3, 4])
    noise = np.zeros(10)
    noise[7] = 0.34 * np.sqrt(np.mean(D[:, 7] ** 2))
    assert BradleyTerryClassifier(quantisation=noise).fit_differences(D, label).n_dropped_ == 3
    assert BradleyTerryClassifier(quantisation=noise * 0.9).fit_differences(D, label).n_dropped_ == 2
    X = np.concatenate([D, np.zeros_like(D)])
    mlp = BradleyTerryMLP(hidden=(4,), max_epochs=2).fit(X, np.arange(400).reshape(2, 200).T, label)
    assert mlp.n_dropped_ == 2


def test_planted_layer_is_found():
    rng = np.random.default_rng(3)
    n, d = 400, 16
    layers = [rng.normal(size=(2 * n, d)) for _ in range(5)]
    pairs = np.arange(2 * n).reshape(2, n).T
    score = layers[3] @ rng.normal(size=d) / 4
    label = (rng.random(n) < 1 / (1 + np.exp(-2 * (score[pairs[:, 0]] - score[pairs[:, 1]])))).astype(float)
    train, test = pairs[:250], pairs[250:]
    heads = [BradleyTerryClassifierCV().fit(X, train, label[:250]) for X in layers]
    accuracy = [
        strict(head.decision_function(X, test), label[250:]).accuracy for head, X in zip(heads, layers, strict=True)
    ]
    assert np.argmax(accuracy) == 3
    assert accuracy[3] > 0.7
    assert max(accuracy[:3] + accuracy[4:]) < 0.62


def test_intervals_cover_one_half_where_nothing_is_planted():
    rng = np.random.default_rng(11)
    n, d = 260, 8
    X = rng.normal(size=(2 * n, d))
    pairs = np.arange(2 * n).reshape(2, n).T
    groups = np.arange(n) // 2
    covered, accuracies = 0, []
    for _ in range(200):
        # the two pairs of a group share their label, as pairs of one prompt do
        label = np.repeat(rng.integers(0, 2, n // 2), 2).astype(float)
        head = BradleyTerryClassifierCV(Cs=(1e-4, 1e-2, 1.0), cv=3).fit(
            X, pairs[:100], label[:100], groups=groups[:100]
        )
        outcome = strict(head.decision_function(X, pairs[100:]), label[100:])
        interval = accuracy_interval(outcome.correct, groups[100:], n_boot=500)
        covered += interval.low <= 0.5 <= interval.high
        accuracies.append(interval.estimate)
    low, high = binom.ppf([0.001, 0.999], 200, 0.95)
    assert low <= covered <= high
    assert abs(np.mean(accuracies) - 0.5) < 4 * np.std(accuracies) / np.sqrt(200)


def test_mlp_learns_what_a_linear_head_cannot():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1200, 6)).astype(np.float32)
    pairs = np.arange(1200).reshape(2, 600).T
    utility = X[:, 0] ** 2
    label = (utility[pairs[:, 0]] > utility[pairs[:, 1]]).astype(float)
    options = {"hidden": (64, 16), "max_epochs": 40, "learning_rate": 3e-3}
    linear = BradleyTerryClassifierCV().fit(X, pairs[:450], label[:450])
    mlp = BradleyTerryMLP(**options).fit(X, pairs[:450], label[:450])
    skipped = BradleyTerryMLP(**options, linear_skip=True).fit(X, pairs[:450], label[:450])
    right = [np.mean((head.decision_function(X, pairs[450:]) > 0) == label[450:]) for head in (linear, mlp, skipped)]
    assert right[0] < 0.6
    assert min(right[1:]) > 0.75
    assert mlp.n_parameters_ == 6 * 64 + 64 + 64 * 16 + 16 + 16
    assert skipped.n_parameters_ == mlp.n_parameters_ + 6
    assert 0 < mlp.best_epoch_ <= mlp.epochs_ <= 40


def test_mlp_with_linear_skip_starts_at_the_linear_head():
    X, pairs, label = rows_and_pairs(200, 10)
    mlp = BradleyTerryMLP(hidden=(16,), linear_skip=True, max_epochs=1, learning_rate=1e-12).fit(X, pairs, label)
    linear = BradleyTerryClassifierCV().fit(X, pairs[~mlp._held_out(pairs[:, 0])], label[~mlp._held_out(pairs[:, 0])])
    np.testing.assert_allclose(mlp.decision_function(X, pairs), linear.decision_function(X, pairs), atol=1e-6)


def test_mlp_repeats_itself_and_leaves_global_state_alone():
    X, pairs, label = rows_and_pairs(150, 10)
    head = BradleyTerryMLP(hidden=(32, 4), max_epochs=4, seed=7)
    state, numpy_state, threads = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    first = head.fit(X, pairs, label).score_items(X)
    torch.manual_seed(1)
    state_later = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        again = clone(head).fit(X, pairs, label).score_items(X)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(first, again)
    assert torch.equal(torch.get_rng_state(), state_later)
    torch.set_rng_state(state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    assert not np.array_equal(first, clone(head).set_params(seed=8).fit(X, pairs, label).score_items(X))


def test_mlp_stops_early_and_keeps_the_best_epoch():
    X, pairs, label = rows_and_pairs(120, 30, signal=0.1)
    head = BradleyTerryMLP(hidden=(64,), max_epochs=60, patience=3, learning_rate=1e-2).fit(X, pairs, label)
    assert head.converged_
    assert head.epochs_ == head.best_epoch_ + 3 < 60
    held_out = head._held_out(pairs[:, 0])
    margins = head.decision_function(X, pairs[held_out])
    loss = np.mean(np.logaddexp(0, margins) - label[held_out] * margins)
    assert loss == pytest.approx(head.best_validation_loss_, abs=1e-5)
    assert 0.15 * 120 <= held_out.sum() < 0.15 * 120 + 1


@pytest.mark.parametrize("shapes", [((24,), (8,), (24,)), ((32, 4), (16,), (8, 8, 4))])
@pytest.mark.parametrize("linear_skip", [False, True])
def test_mlps_fitted_together_are_those_fitted_alone(shapes, linear_skip):
    X, pairs, label = rows_and_pairs(160, 12, signal=0.5)
    heads = [
        BradleyTerryMLP(hidden=shape, seed=seed, max_epochs=15, patience=1, learning_rate=1e-2, linear_skip=linear_skip)
        for seed, shape in enumerate(shapes)
    ]
    alone = [clone(head).fit(X, pairs, label) for head in heads]
    fit_together(heads, X, pairs, label)
    assert len({head.epochs_ for head in heads}) > 1  # some stopped while others went on
    for one, other in zip(heads, alone, strict=True):
        assert (one.epochs_, one.best_epoch_, one.converged_) == (other.epochs_, other.best_epoch_, other.converged_)
        assert one.best_validation_loss_ == pytest.approx(other.best_validation_loss_, abs=1e-5)
        margins = other.decision_function(X, pairs)
        np.testing.assert_allclose(one.decision_function(X, pairs), margins, atol=1e-4 * np.abs(margins).max())


def test_mlps_that_differ_in_training_are_not_fitted_together():
    X, pairs, label = rows_and_pairs(40, 4)
    with pytest.raises(HeadError, match=r"dropout is 0.05 and 0.2; heads fitted together share it"):
        fit_together([BradleyTerryMLP(), BradleyTerryMLP(dropout=0.2)], X, pairs, label)
    with pytest.raises(HeadError, match="hidden is empty"):
        BradleyTerryMLP(hidden=()).fit(X, pairs, label)


def test_loss_counts_soft_labels_both_ways():
    margins, label = torch.tensor([2.0]), torch.tensor([0.3])
    both = -0.3 * torch.sigmoid(margins).log() - 0.7 * torch.sigmoid(-margins).log()
    assert torch.allclose(training.bradley_terry_loss(margins, label, torch.ones(1)), both)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_estimator_contract(head):
    X, pairs, label = rows_and_pairs(80, 6)
    before = [array.copy() for array in (X, pairs, label)]
    fresh = clone(head)
    with pytest.raises(NotFittedError, match="not fitted"):
        fresh.score_items(X)
    assert fresh.fit(X, pairs, label) is fresh
    for array, copy in zip((X, pairs, label), before, strict=True):
        np.testing.assert_array_equal(array, copy)
    assert fresh.get_params() == head.get_params()
    assert fresh.n_features_in_ == 6
    scores = fresh.score_items(X)
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fresh)).score_items(X), scores)
    np.testing.assert_array_equal(clone(fresh).fit(X, pairs, label).score_items(X), scores)
    np.testing.assert_array_equal(fresh.fit(X, pairs, label).score_items(X), scores)
    with pytest.raises(HeadError, match="X has 5 channels; the head was fitted on 6"):
        fresh.score_items(X[:, :5])


def test_common_checks_of_scikit_learn():
    """Run outside the shape-checking hook: scikit-learn hands parameters of wrong types to constructors on purpose."""
    code = """
from sklearn.utils import estimator_checks
from probekit.heads import BradleyTerryClassifier, BradleyTerryClassifierCV, BradleyTerryMLP
# by beginnings, as scikit-learn renamed some
wanted = ("no_attributes_set_in_init", "parameters_default_constructible", "get_params_invariance", "set_params",
          "estimator_cloneable", "estimator_repr", "do_not_raise_errors_in_init_or_set_param")
for beginning in wanted:
    found = [name for name in dir(estimator_checks) if name.startswith("check_" + beginning)]
    assert len(found) == 1, (beginning, found)
    for head in (BradleyTerryClassifier(), BradleyTerryClassifierCV(), BradleyTerryMLP()):
        getattr(estimator_checks, found[0])(type(head).__name__, head)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": np.array([[0, 400]])}, "names row 400; X has rows 0 to 159"),
        ({"pairs": np.array([[0, -1]])}, "names row -1"),
        ({"pairs": np.zeros((0, 2), dtype=int), "label": np.zeros(0)}, "0 pairs"),
        ({"label": np.full(80, 1.5)}, "label of pair 0 is 1.5; it must lie in 0 to 1"),
        ({"label": np.full(80, np.nan)}, "label of pair 0 is nan"),
        ({"label": np.full(80, 0.5)}, "all 80 pairs are tied"),
        ({"label": np.ones(3)}, r"label has shape \(3,\); it must be \(80,\)"),
        ({"sample_weight": np.full(80, -1.0)}, "sample_weight of pair 0 is -1.0"),
        ({"sample_weight": np.zeros(80)}, "all sample weights are 0"),
        ({"X": np.full((160, 6), np.nan)}, "pair 0 hold NaN"),
        ({"X": np.full((160, 6), 0.1)}, "none of the 6 channels"),
        ({"X": np.ones(160)}, "X has shape"),
    ],
)
@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_bad_arrays_are_named(head, change, message):
    X, pairs, label = rows_and_pairs(80, 6)
    with pytest.raises(HeadError, match=message) as caught:
        clone(head).fit(**({"X": X, "pairs": pairs, "label": label} | change))
    assert "\n" not in str(caught.value)


def test_other_bad_input_is_named():
    X, pairs, label = rows_and_pairs(80, 6)
    with pytest.raises(HeadError, match="C is 0"):
        BradleyTerryClassifier(C=0.0).fit(X, pairs, label)
    with pytest.raises(HeadError, match=r"quantisation has shape \(2,\)"):
        BradleyTerryClassifier(quantisation=np.zeros(2)).fit(X, pairs, label)
    with pytest.raises(HeadError, match="Cs is nan"):
        BradleyTerryClassifierCV(Cs=(1.0, float("nan"))).fit(X, pairs, label)
    with pytest.raises(HeadError, match="groups has shape"):
        BradleyTerryClassifierCV().fit(X, pairs, label, groups=np.arange(3))
    with pytest.raises(HeadError, match="in one group"):
        BradleyTerryMLP().fit(X, pairs, label, groups=np.zeros(80))
    with pytest.raises(HeadError, match="all pairs of a fold"):
        BradleyTerryClassifierCV(cv=2).fit(X, pairs, label, np.repeat([0.0, 1.0], 40), np.repeat([0, 1], 40))
    head = BradleyTerryClassifier().fit(X, pairs, label)
    X[5, 2] = np.inf
    with pytest.raises(HeadError, match="row 5 of X holds NaN or infinity"):
        head.score_items(X)


def test_an_unconverged_fit_is_marked():
    D, label = synthetic(80, 60, signal=5.0)
    head = BradleyTerryClassifier(C=100.0, max_iter=1).fit_differences(D, label)
    assert not head.converged_
    assert head.n_iter_ == 1
    assert not BradleyTerryClassifierCV(Cs=(1e-6, 1e3), max_iter=1).fit_differences(D, label).converged_


def test_layer_sets():
    assert resolve_layer_sets(["singles", "all"], 2) == [(0,), (1,), (2,), (0, 1, 2)]
    assert resolve_layer_sets([[2, 0], [1]], 2) == [(0, 2), (1,)]
    assert resolve_layer_sets([{"relative": [16 / 38, 24 / 38, 29 / 38, 1.0]}], 24) == [(10, 15, 18, 24)]
    assert resolve_layer_sets([{"relative": [0.5, 0.5]}, [1], "singles"], 1) == [(1,), (0,)]
    assert resolve_layer_sets(["all", "singles"], 8, stored=[8, 2]) == [(2, 8), (2,), (8,)]
    assert layer_set_name((0, 1, 12)) == "0+1+12"
    assert [combination_name(layers) for layers in ((3,), (0, 3))] == ["single", "concat"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("triples", "'triples' is unknown; allowed: 'singles', 'all'"),
        ([3], "layer 3 is not there; allowed: 0, 1, 2"),
        ([], "names no layer"),
        ({"relative": [1.5]}, "relative depth 1.5 is outside 0 to 1"),
        ({"absolute": [0.5]}, "is unknown"),
    ],
)
def test_bad_layer_sets_are_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        resolve_layer_sets([spec], 2)


def test_concatenation():
    first, second = np.zeros((3, 2), dtype=np.float32), np.ones((3, 4), dtype=np.float32)
    assert concatenate([first, second]).shape == (3, 6)
    assert concatenate([first]) is first
    with pytest.raises(HeadError, match=r"rows \[3, 5\]"):
        concatenate([first, np.zeros((5, 2))])
