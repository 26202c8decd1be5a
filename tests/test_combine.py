"""Combinations of layers: which sets a specification means, how alike layers are, and heads on several layers."""

import pickle
import subprocess
import sys
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.base import clone

from probekit.config import LinearHead, SubsetSearch
from probekit.errors import ConfigError, HeadError
from probekit.heads import (
    BradleyTerryClassifier,
    BradleyTerryClassifierCV,
    BradleyTerryLateFusion,
    BradleyTerryScalarMix,
    PairKindSummary,
    block_ranges,
    combination_name,
    compare_pair_kinds,
    contiguous_blocks,
    depth_layers,
    find_blocks,
    layer_similarity,
    mean_features,
    pair_kinds,
    resolve_layer_sets,
    specs_with_features,
    stand_ins,
)

small = settings(max_examples=25)


# layer sets


def checked(*specs):
    """Specifications as a YAML file's head has them."""
    return LinearHead.checked({"kind": "linear", "layer_sets": list(specs)}, source="sweep.yaml").layer_sets


def test_kinds_of_layer_sets():
    def sets(spec, **options):
        return resolve_layer_sets(checked(spec), 4, **options)

    assert sets("pairs") == list(combinations(range(5), 2))
    assert sets({"windows": 3}) == [(0, 1, 2), (1, 2, 3), (2, 3, 4)]
    assert sets({"windows": 5}) == sets("all") == sets({"strides": 1}) == [(0, 1, 2, 3, 4)]
    assert sets({"strides": 2}) == [(0, 2, 4), (1, 3)]
    assert sets({"windows": 2}, stored=[4, 0, 2]) == [(0, 2), (2, 4)]  # neighbours among the layers at hand
    assert sets("singles", stored=[0, 4, 5]) == [(0,), (4,), (5,)]
    for spec in ("pairs", "all", {"windows": 2}, {"strides": 1}):  # the output point is no layer of its own
        assert sets(spec, stored=[0, 4, 5]) == [(0, 4)]
    assert depth_layers([5, 4, 0], 4) == [0, 4]


def test_layer_sets_from_features_come_in_two_steps():
    specs = checked("singles", {"search": {"refit_top": 2}}, [0, 1], {"blocks": 2})
    assert specs_with_features(specs) == [specs[1], specs[3]]
    assert specs[1] == {"search": SubsetSearch(max_size=3, refit_top=2)}
    found = [[(0, 2), (0, 1, 2)], [(0, 1), (2,)]]
    assert resolve_layer_sets(specs, 2, found=found) == [(0,), (1,), (2,), (0, 2), (0, 1, 2), (0, 1)]
    with pytest.raises(ConfigError, match="'blocks': 2}: needs features"):
        resolve_layer_sets(specs, 2, found=found[:1])
    assert stand_ins(specs[3], range(3)) == [(0, 1), (2,)]
    assert [len(one) for one in stand_ins(specs[1], range(3))] == [2, 2, 3]
    large = stand_ins({"search": SubsetSearch(max_size=4, refit_top=5)}, range(24))
    assert [len(one) for one in large] == [2] * 5 + [3] * 5 + [4] * 5
    assert len(set(large)) == 15


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("triples", ["'pairs'", "windows: K", "'triples'"]),
        ({"windows": 0}, ["whole numbers from 1", "{'windows': 0}"]),
        ({"windows": 2.5}, ["whole numbers from 1", "2.5"]),
        ({"blocks": True}, ["whole numbers from 1", "True"]),
        ({"windows": 2, "strides": 2}, ["allowed:", "'strides': 2"]),
        ({"search": {"top": 3}}, ["search", "unknown key 'top'", "allowed: max_size, refit_top"]),
        ({"search": {"max_size": 1}}, ["search: max_size", "is 1; allowed: 2 or more"]),
        ({"search": 3}, ["search: {max_size, refit_top}", "{'search': 3}"]),
        ([0, -1], ["layer numbers", "-1"]),
    ],
)
def test_a_wrong_layer_set_is_one_line(spec, parts):
    with pytest.raises(ConfigError) as error:
        checked("singles", spec)
    message = str(error.value)
    assert "\n" not in message
    for part in ("sweep.yaml: layer_sets.1", *parts):
        assert part in message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"windows": 4}, r"layer_sets: {'windows': 4}: needs 4 layers; allowed: 1 to 3"),
        ({"strides": 4}, r"layer_sets: {'strides': 4}: needs 4 layers; allowed: 1 to 3"),
        ({"blocks": 4}, r"layer_sets: {'blocks': 4}: needs 4 layers; allowed: 1 to 3"),
        ({"search": {"max_size": 4}}, r"'max_size': 4.*needs 4 layers; allowed: 1 to 3"),
        ("pairs", None),
    ],
)
def test_more_layers_than_there_are_is_named(spec, message):
    if message is None:
        with pytest.raises(ConfigError, match="'pairs': needs 2 layers; allowed: 1 to 1"):
            resolve_layer_sets([spec], 2, stored=[1])
    else:
        with pytest.raises(ConfigError, match=message):
            resolve_layer_sets(checked(spec), 2)


# similarity


def related(seed, m, widths):
    """Layers (m, d) that share a few directions."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(m, 3))
    return [base @ rng.normal(size=(3, d)) + rng.normal(size=(m, d)) + 10 * rng.normal(size=d) for d in widths]


@pytest.mark.parametrize(("m", "widths"), [(60, (5, 9, 7, 4)), (12, (30, 41, 25, 30))])
def test_similarity_is_linear_cka(m, widths):
    layers = related(0, m, widths)
    expected = np.empty((4, 4))
    for i, j in product(range(4), repeat=2):
        X, Y = (layers[k] - layers[k].mean(axis=0) for k in (i, j))
        expected[i, j] = np.linalg.norm(X.T @ Y) ** 2 / np.linalg.norm(X.T @ X) / np.linalg.norm(Y.T @ Y)
    for memory in (2**30, 1, 2 * 4 * m * widths[0]):  # all layers held, one, two
        found = layer_similarity(layers.__getitem__, range(4), memory=memory)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_array_equal(found, found.T)


@small
@given(seed=st.integers(0, 1000), m=st.integers(4, 40), d=st.integers(1, 20), size=st.floats(1e-3, 1e3))
def test_similarity_does_not_change_with_rotation_shift_and_scale(seed, m, d, size):
    rng = np.random.default_rng(seed)
    layers = related(seed, m, (d, d + 1))
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    moved = [size * layers[0] @ turn + rng.normal(size=d), layers[1], layers[0]]
    found = layer_similarity(moved.__getitem__, range(3))
    assert found[0, 2] == pytest.approx(1, abs=1e-5)
    assert found[0, 1] == pytest.approx(found[2, 1], abs=1e-4)
    assert ((found >= 0) & (found <= 1)).all()


def test_planted_blocks_are_found():
    rng = np.random.default_rng(0)
    limits = [(0, 2), (3, 8), (9, 9), (10, 13)]
    block_of = np.concatenate([np.full(last - first + 1, number) for number, (first, last) in enumerate(limits)])
    common = rng.normal(size=(200, 6))
    bases = [rng.normal(size=(200, 6)) + common for _ in limits]
    layers = {
        layer: bases[number] @ rng.normal(size=(6, 20)) + rng.normal(size=(200, 20))
        for layer, number in enumerate(block_of)
    }
    similarity = layer_similarity(layers.__getitem__, range(14))
    assert contiguous_blocks(similarity, 4) == limits
    blocks = find_blocks(layers.__getitem__, list(range(14))[::-1], 4)
    assert blocks == [tuple(range(first, last + 1)) for first, last in limits]
    assert block_ranges(blocks) == "0-2, 3-8, 9, 10-13"


@small
@given(seed=st.integers(0, 1000), L=st.integers(1, 8), n=st.integers(1, 4))
def test_blocks_are_the_best_of_all_cuts(seed, L, n):
    n = min(n, L)
    x = np.random.default_rng(seed).normal(size=(L, 3))
    similarity = (x @ x.T) ** 2

    def worth(blocks):
        return sum(similarity[a : b + 1, a : b + 1].sum() / (b + 1 - a) for a, b in blocks)

    best = max(
        worth([(a, b - 1) for a, b in zip((0, *cuts), (*cuts, L), strict=True)])
        for cuts in combinations(range(1, L), n - 1)
    )
    found = contiguous_blocks(similarity, n)
    assert [layer for a, b in found for layer in range(a, b + 1)] == list(range(L))
    assert len(found) == n
    assert worth(found) == pytest.approx(best)


def test_pairs_within_and_across_blocks():
    blocks = [(0, 1, 2), (3, 4)]
    kinds = pair_kinds(blocks)
    assert [pair for pair, kind in kinds.items() if kind == "within"] == [(0, 1), (0, 2), (1, 2), (3, 4)]
    assert len(kinds) == 10
    values = {(0, 1): 0.6, (0, 3): 0.7, (2, 4): 0.8, (0,): 0.9, (0, 1, 2): 0.9, (0, 9): 0.9}
    assert compare_pair_kinds(values, blocks) == {
        "within": PairKindSummary(n_pairs=1, mean=0.6, best=0.6),
        "across": PairKindSummary(n_pairs=2, mean=0.75, best=0.8),
    }
    assert list(compare_pair_kinds({(0, 1): 0.6}, blocks)) == ["within"]


def test_bad_features_for_similarity_are_named():
    layers = related(0, 20, (3, 3, 3))
    with pytest.raises(HeadError, match="layer 1 are the same in all 20 rows"):
        layer_similarity([layers[0], np.ones((20, 3))].__getitem__, range(2))
    with pytest.raises(HeadError, match="layer 1 hold NaN"):
        layer_similarity([layers[0], np.full((20, 3), np.nan)].__getitem__, range(2))
    with pytest.raises(HeadError, match="layer 1 has 9 rows, layers before it 20"):
        layer_similarity([layers[0], layers[1][:9]].__getitem__, range(2))
    with pytest.raises(HeadError, match="2 layers cannot form 3 blocks; allowed: 1 to 2"):
        contiguous_blocks(np.eye(2), 3)


# features of several layers


def test_mean_of_layers_and_names_of_rules():
    first, second = np.full((3, 2), 1, dtype=np.float16), np.full((3, 2), 4, dtype=np.float16)
    mean = mean_features([first, second])
    np.testing.assert_array_equal(mean, np.full((3, 2), 2.5))
    assert mean.dtype == np.float16
    assert mean_features([first]) is first
    with pytest.raises(HeadError, match=r"shapes \[\(3, 2\), \(3, 4\)\].*one width"):
        mean_features([first, np.zeros((3, 4))])
    assert combination_name((3,), "mean") == "single"
    assert combination_name((3, 4), "late-fusion") == "late-fusion"


# heads on several layers


def layered(n, layers, d, *, seed=0):
    """Differences (n, layers d) that share a direction with weights of their own, and labels from it."""
    rng = np.random.default_rng(seed)
    D = rng.normal(size=(n, layers, d)) * 10 ** rng.uniform(-1, 1, (layers, d))
    scaled = D / np.sqrt(np.mean(D**2, axis=0))
    g = np.linspace(-0.5, 1.5, layers)
    z = np.einsum("nld,l,d->n", scaled, g, rng.normal(size=d))
    label = (rng.random(n) < 1 / (1 + np.exp(-1.5 * z / z.std()))).astype(float)
    return D.reshape(n, -1), label


@pytest.mark.parametrize("soft", [False, True])
def test_scalar_mix_reaches_the_optimum_of_a_direct_search(soft):
    layers, d, C = 3, 5, 0.3
    D, label = layered(300, layers, d)
    rng = np.random.default_rng(1)
    label = np.clip(label, 0.1, 0.8) if soft else label
    weight = rng.exponential(size=300) if soft else np.ones(300)
    rms = np.sqrt(weight @ D**2 / weight.sum())
    Z = (D / rms).reshape(300, layers, d)

    def objective(parameters):
        g, w = parameters[:layers], parameters[layers:]
        z = np.einsum("nld,l,d->n", Z, g, w)
        return (weight @ (np.logaddexp(0, z) - label * z) + (g @ g) * (w @ w) / (2 * C)) / weight.sum()

    best = min(
        (minimize(objective, rng.normal(size=layers + d), method="BFGS", options={"gtol": 1e-9}) for _ in range(8)),
        key=lambda found: found.fun,
    )
    head = BradleyTerryScalarMix(widths=(d,) * layers, Cs=(C,), tol=1e-10).fit_differences(D, label, weight)
    assert head.converged_
    assert head.objective_[-1] - best.fun <= 1e-7
    assert (np.diff(head.objective_) <= 1e-9).all()
    W = (head.coef_ * rms).reshape(layers, d)
    expected = np.outer(best.x[:layers], best.x[layers:])
    np.testing.assert_allclose(W, expected, atol=2e-3 * np.linalg.norm(expected))
    assert np.linalg.matrix_rank(W, tol=1e-9) == 1
    assert np.linalg.norm(head.mix_) == pytest.approx(1)
    assert head.mix_.sum() >= 0
    assert head.n_parameters_ == layers + d


def test_a_slow_scalar_mix_goes_on_until_it_converges():
    """Where layers say different things, no one direction stands out, and many alternations are needed."""
    rng = np.random.default_rng(2)
    parts = [rng.normal(size=(400, 32)) for _ in range(8)]
    z = sum(part @ rng.normal(size=32) for part in parts)
    label = (rng.random(400) < 1 / (1 + np.exp(-z))).astype(float)
    head = BradleyTerryScalarMix(widths=[32] * 8, Cs=(1.0,)).fit_differences(np.concatenate(parts, axis=1), label)
    assert head.n_iter_ > 50
    assert head.converged_


def test_scalar_mix_of_one_layer_is_the_linear_head():
    D, label = layered(200, 1, 6)
    mix = BradleyTerryScalarMix(Cs=(0.1, 1.0), cv=3).fit_differences(D, label)
    linear = BradleyTerryClassifierCV(Cs=(0.1, 1.0), cv=3).fit_differences(D, label)
    np.testing.assert_allclose(mix.coef_, linear.coef_, rtol=1e-3)
    np.testing.assert_allclose(mix.mix_, [1])
    assert mix.C_ == linear.C_


def test_late_fusion_weighs_layers_by_their_held_out_margins():
    rng = np.random.default_rng(0)
    n, widths = 300, (6, 150, 10)  # the second layer has no signal, and more channels than its folds can resist
    parts = [rng.normal(size=(n, width)) for width in widths]
    z = parts[0] @ rng.normal(size=6) + 0.5 * parts[2] @ rng.normal(size=10)
    label = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float)
    groups = np.arange(n) // 2
    D = np.concatenate(parts, axis=1)
    head = BradleyTerryLateFusion(widths=widths).fit_differences(D, label, groups=groups)
    alone = [BradleyTerryClassifierCV().fit_differences(part, label, groups=groups) for part in parts]
    np.testing.assert_array_equal(head.layer_strengths_, [one.C_ for one in alone])
    scores = np.stack([part @ one.coef_ for part, one in zip(parts, alone, strict=True)], axis=1)
    fused = scores @ head.layer_weights_
    np.testing.assert_allclose(D @ head.coef_, fused, rtol=0, atol=1e-4 * np.abs(fused).max())
    assert head.layer_weights_[0] > 0.5
    assert head.layer_weights_[2] > 0.5
    assert np.std(scores[:, 1] * head.layer_weights_[1]) < 0.3 * np.std(scores[:, 0] * head.layer_weights_[0])
    equal = clone(head).set_params(weights="equal").fit_differences(D, label, groups=groups)
    assert len(set(equal.layer_weights_)) == 1


def test_late_fusion_weights_minimise_the_held_out_loss():
    """Against a direct search over the weights of margins of heads fitted without the fold of a pair."""
    from probekit.heads.linear import _folds

    D, label = layered(200, 2, 4, seed=4)
    head = BradleyTerryLateFusion(widths=(4, 4), Cs=(1.0,), cv=3).fit_differences(D, label)
    fold_of = _folds(np.arange(200), 3)
    margins = np.empty((200, 2))
    for layer, fold in product(range(2), range(3)):
        part = D[:, 4 * layer : 4 * layer + 4]
        part = part / np.sqrt(np.mean(part**2, axis=0))  # the scale of all pairs, as in cross-validation
        inside = fold_of != fold
        one = BradleyTerryClassifier(C=1.0, standardize=False).fit_differences(part[inside], label[inside])
        margins[~inside, layer] = part[~inside] @ one.coef_

    def objective(v):
        z = margins @ v
        return np.sum(np.logaddexp(0, z) - label * z) + v @ v / 2

    expected = minimize(objective, np.zeros(2), method="BFGS").x
    np.testing.assert_allclose(head.layer_weights_, expected, atol=2e-3 * np.linalg.norm(expected))


@pytest.mark.parametrize("kind", [BradleyTerryScalarMix, BradleyTerryLateFusion])
def test_heads_on_several_layers_keep_the_estimator_contract(kind):
    rng = np.random.default_rng(0)
    D, label = layered(120, 2, 4)
    second = rng.normal(size=D.shape)
    X, pairs = np.concatenate([second + D, second]), np.arange(240).reshape(2, 120).T
    head = kind(widths=(4, 4), Cs=(0.1, 1.0), cv=3)
    fitted = clone(head).fit(X, pairs, label)
    assert fitted.get_params() == head.get_params()
    chance = fitted.predict_proba(X, pairs)
    np.testing.assert_array_equal(chance, fitted.predict_proba(X, pairs[:, ::-1])[:, ::-1])
    assert np.mean((chance[:, 1] > 0.5) == label) > 0.7
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).score_items(X), fitted.score_items(X))
    sign = np.where(rng.random(120) < 0.5, -1.0, 1.0)
    turned = clone(head).fit_differences(D * sign[:, None], np.where(sign < 0, 1 - label, label))
    np.testing.assert_allclose(turned.coef_, fitted.coef_, atol=5e-3 * np.linalg.norm(fitted.coef_))
    constant = D.copy()
    constant[:, 4:] = 0
    flat = clone(head).fit_differences(constant, label)
    assert not flat.coef_[4:].any()
    assert flat.n_dropped_ == 4
    for change, message in (
        ({"widths": (4, 3)}, r"widths are \[4, 3\], in sum 7; they must add up to the 8 channels"),
        ({"cv": 500}, "120 groups of pairs cannot fill cv=500"),
    ):
        with pytest.raises(HeadError, match=message):
            clone(head).set_params(**change).fit(X, pairs, label)
    with pytest.raises(HeadError, match="none of the 8 channels differs"):
        clone(head).fit_differences(0 * D, label)


def test_unequal_widths_and_unknown_weights_are_named():
    D, label = layered(50, 2, 4)
    with pytest.raises(HeadError, match=r"layers have widths \[3, 5\]; a scalar mix needs layers of one width"):
        BradleyTerryScalarMix(widths=(3, 5)).fit_differences(D, label)
    with pytest.raises(HeadError, match="weights is 'some'; allowed: 'learned', 'equal'"):
        BradleyTerryLateFusion(widths=(4, 4), weights="some").fit_differences(D, label)


def test_an_alternation_that_is_cut_off_is_marked():
    D, label = layered(100, 3, 4)
    head = BradleyTerryScalarMix(widths=(4, 4, 4), Cs=(1.0,), max_iter=1).fit_differences(D, label)
    assert not head.converged_
    assert head.n_iter_ == 1


def test_common_checks_of_scikit_learn():
    code = """
from sklearn.utils import estimator_checks
from probekit.heads import BradleyTerryLateFusion, BradleyTerryScalarMix
wanted = ("no_attributes_set_in_init", "parameters_default_constructible", "get_params_invariance", "set_params",
          "estimator_cloneable", "estimator_repr", "do_not_raise_errors_in_init_or_set_param")
for beginning in wanted:
    found = [name for name in dir(estimator_checks) if name.startswith("check_" + beginning)]
    assert len(found) == 1, (beginning, found)
    for head in (BradleyTerryLateFusion(), BradleyTerryScalarMix()):
        getattr(estimator_checks, found[0])(type(head).__name__, head)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
