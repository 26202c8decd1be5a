"""Selection, families, size and training samples: planted answers found, known formulas, promises kept in simulation.

Small forms of ``campaigns/statistics_coverage.py``.
"""

import numpy as np
import pytest
from campaigns.statistics_coverage import best, family, plateau, plateau_of_layers, repeat, seeds, slope, training
from scipy.stats import linregress, t
from test_stats import clustered, within_binomial_bounds

from probekit.stats import (
    accuracy_interval,
    best_of_many,
    holm,
    network_contrast,
    paired_difference,
    paired_family,
    pairs_needed,
    permutation_test,
    plateau_set,
    size_slope,
    slope_weights,
    training_covariance,
    with_training,
)
from probekit.stats.families import step_down
from probekit.stats.training import TrainingPart


def margins_of(accuracies, n, *, seed, shared=0.8):
    """Margins (L, n) of lone pairs whose label is 1, right with these probabilities, heads alike in what they see."""
    rng = np.random.default_rng(seed)
    noise = np.sqrt(shared) * rng.normal(size=n) + np.sqrt(1 - shared) * rng.normal(size=(len(accuracies), n))
    order = np.argsort(np.argsort(noise, axis=1), axis=1) / n  # uniform, with the heads' dependence
    return np.asarray(accuracies)[:, None] - order


def looks(accuracies, *, n=2000, seed=0, shared=0.8):
    """Plateau, best-of-many and permutation test of heads with these accuracies."""
    margins = margins_of(accuracies, n, seed=seed, shared=shared)
    # the shares of right answers are exact so far; a sample of them varies
    rng = np.random.default_rng(seed + 1)
    correct = margins > 0
    resampled = rng.integers(n, size=n)
    correct, side = correct[:, resampled], rng.choice([-1.0, 1.0], n)
    judged = np.where(correct, 1.0, -1.0) * side
    pairs = (0.5 + side / 2, np.arange(n), n + np.arange(n), np.arange(n))
    given = correct.astype(float), np.arange(n)
    return plateau_set(*given), best_of_many(*given), permutation_test(judged, *pairs)


def test_a_planted_layer_is_found():
    planted = np.full(24, 0.5)
    planted[15] = 0.62
    found, chosen, null = looks(planted)
    assert list(np.flatnonzero(found.inside)) == [15]
    assert found.best == chosen.best == 15
    assert chosen.frequency[15] > 0.99
    assert chosen.corrected == pytest.approx(chosen.naive, abs=0.003)
    assert list(np.flatnonzero(null.adjusted < 0.05)) == [15]
    assert found.within_point[15]
    assert found.behind[[0, 23]] == pytest.approx(0.12, abs=0.05)


def test_a_planted_plateau_of_three_is_found():
    planted = np.full(24, 0.6)
    planted[10:13] = 0.7
    found, chosen, _ = looks(planted)
    assert list(np.flatnonzero(found.inside)) == [10, 11, 12]
    assert chosen.frequency[10:13].sum() > 0.99
    assert not found.within_point[:10].any()
    # with fifteen times the pairs they are also proven to be within a point of the best
    assert list(np.flatnonzero(looks(planted[9:14], n=30_000)[0].within_point)) == [1, 2, 3]


def test_a_planted_absence_is_not_found():
    found, chosen, null = looks(np.full(24, 0.5), seed=3, shared=0.2)
    assert (null.adjusted > 0.05).all()
    assert chosen.low < 0.5 < chosen.high
    assert chosen.naive - 0.5 > 0.015 > abs(chosen.corrected - 0.5)
    assert found.inside.sum() > 15
    assert chosen.tried == 24


def test_indistinguishable_is_not_equal():
    """Few pairs: every layer is in the set and none is proven within a point."""
    correct, groups = clustered(np.random.default_rng(7), 60, layers=5)
    found = plateau_set(correct, groups)
    assert found.inside.all()
    assert not found.within_point.any()
    assert (found.behind >= found.estimate.max() - found.estimate).all()


def test_equal_heads_few_groups_and_one_head():
    correct, groups = clustered(np.random.default_rng(6), 400)
    same = plateau_set(np.repeat(correct, 3, axis=0), groups)
    assert same.inside.all()
    assert same.p == pytest.approx(1)
    # not one pair differs, yet so many groups could hide a small difference
    assert 0 < same.behind[0] < 0.01
    assert same.within_point.all()
    few = plateau_set(np.repeat(correct, 2, axis=0)[:, groups < 5], groups[groups < 5])
    assert few.inside.all()
    assert not few.within_point.any()
    alone = plateau_set(correct, groups)
    assert (alone.inside[0], alone.behind[0], alone.best) == (True, 0, 0)
    with pytest.raises(ValueError, match="one group"):
        best_of_many(np.ones((2, 4)), np.zeros(4))
    perfect = best_of_many(np.ones((2, 40)), np.arange(40))
    assert (perfect.naive, perfect.corrected, perfect.high) == (1, 1, 1)


def test_refits_widen_a_plateau():
    planted = np.array([0.7, 0.67, 0.67, 0.55])
    n = 8000
    correct = (margins_of(planted, n, seed=8) > 0).astype(float)
    groups = np.arange(n)
    rng = np.random.default_rng(1)

    def refitted(shift):
        return np.stack([(margins_of(planted + row, n, seed=8) > 0).astype(float) for row in shift])

    assert list(plateau_set(correct, groups).inside) == [True, False, False, False]
    apart = refitted(rng.normal(0, 0.015, (30, 4)))
    assert list(plateau_set(correct, groups, refits=apart).inside) == [True, True, True, False]
    together = refitted(np.repeat(rng.normal(0, 0.015, (30, 1)), 4, axis=1))  # moves no layer against another
    assert list(plateau_set(correct, groups, refits=together).inside) == [True, False, False, False]
    with pytest.raises(ValueError, match=r"refits have shape \(30, 3, 8000\); allowed: \(refits, \*\(4, 8000\)\)"):
        plateau_set(correct, groups, refits=apart[:, :3])


def test_plateau_keeps_its_promise():
    found = repeat(plateau, 100, 100, layers=8, n_boot=300)
    assert found["a best one inside"] >= 0.9
    assert found["a best one inside, all equal"] >= 0.88
    assert found["distance limit holds"] >= 0.9
    assert found["falsely within a point"] <= 0.12
    of_layers = repeat(plateau_of_layers, 60, 200, layers=6, n_boot=200)
    assert of_layers["with refits"] >= 0.87


def test_best_of_many_loses_its_inflation():
    found = repeat(best, 60, 100, n_boot=300)
    assert found["naive - 70 %"] > 0.025
    assert abs(found["corrected - 70 %"]) < 0.01
    assert found["sloping: naive - true"] > 0.02
    assert abs(found["sloping: corrected - true"]) < 0.01
    assert min(found["covered"], found["sloping: covered"]) >= 0.87


def test_holm_and_step_down_by_hand():
    np.testing.assert_allclose(holm(np.array([0.01, 0.02, 0.3, 0.005])), [0.03, 0.04, 0.3, 0.02])
    assert list(holm(np.array([0.6, 0.9]))) == [1, 1]
    with pytest.raises(ValueError, match="0 to 1"):
        holm(np.array([1.2]))
    rng = np.random.default_rng(0)
    drawn, observed = np.abs(rng.normal(size=(99, 4))), np.array([1.0, 3.0, 0.2, 2.0])
    expected, last = {}, 0.0
    for place, j in enumerate([1, 3, 0, 2]):
        left = [1, 3, 0, 2][place:]
        last = max(last, (1 + (drawn[:, left].max(axis=1) >= observed[j]).sum()) / 100)
        expected[j] = last
    np.testing.assert_allclose(step_down(observed, drawn), [expected[j] for j in range(4)])


def test_a_family_of_one_is_a_paired_comparison():
    correct, groups = clustered(np.random.default_rng(9), 300, layers=2)
    one = paired_family(correct[:1], correct[1], groups)
    alone = paired_difference(correct[0], correct[1], groups)
    assert one.estimate[0] == pytest.approx(alone.estimate)
    assert one.se[0] == pytest.approx(alone.se)
    assert one.adjusted[0] == one.p[0]
    assert one.tried == 1
    assert one.detectable[0] == pytest.approx(alone.detectable, rel=0.05)
    assert (one.low[0], one.high[0]) == pytest.approx((alone.low, alone.high), abs=0.006)


def test_a_family_is_stricter_than_its_members_and_counts_heads_that_hardly_differ():
    rng = np.random.default_rng(10)
    correct, groups = clustered(rng, 300, layers=8)
    nearly = correct[0].copy()
    nearly[:4] = 1 - nearly[:4]
    found = paired_family(np.vstack([correct[1:], nearly]), correct[0], groups)
    assert found.tried == 8
    assert (found.adjusted >= found.p).all()
    assert found.adjusted[-1] == min(8 * found.p[-1], 1)
    assert found.low[-1] <= found.estimate[-1] <= found.high[-1]
    assert found.high[-1] - found.low[-1] < 0.05
    with pytest.raises(ValueError, match="leave out different pairs"):
        paired_family(np.array([[1, 0.0]]), np.array([1, np.nan]), np.arange(2))
    with pytest.raises(ValueError, match=r"allowed: \(m, n\)"):
        paired_family(np.ones(3), np.ones(3), np.arange(3))


def test_a_family_keeps_its_level_and_finds_more_than_holm():
    found = repeat(family, 100, 150, n_boot=300)
    assert within_binomial_bounds(100 * found["any false discovery"], 100, rate=0.05, slack=0.01)
    assert found["found"] > found["found by Holm"] > 0.2
    assert found["all covered"] >= 0.88


def test_pairs_needed_is_the_detectable_effect_turned_round():
    correct, groups = clustered(np.random.default_rng(11), 300, layers=2)
    found = paired_difference(correct[0], correct[1], groups)
    needed = pairs_needed(found.detectable, found.se, found.n_pairs)
    assert needed == pytest.approx(found.n_pairs, abs=1)
    assert pairs_needed(0.0, found.se, found.n_pairs) == np.inf
    assert pairs_needed(0.05, 0.01, 1000, fixed_se=0.01) > pairs_needed(0.05, 0.01, 1000)


def test_slope_is_least_squares_with_k_minus_2_degrees_of_freedom():
    """Lone pairs without a slope of their own leave the residuals' error: the textbook interval."""
    rng = np.random.default_rng(12)
    x, accuracy = np.array([1.0, 2.0, 2.5, 4.0, 5.0]), np.array([0.60, 0.66, 0.63, 0.70, 0.69])
    correct = (rng.random((5, 40_000)) < accuracy[:, None]).astype(float)
    found = size_slope(correct, x, np.arange(40_000))
    book = linregress(x, correct.mean(axis=1))
    assert found.estimate == pytest.approx(book.slope)
    assert found.se_networks == pytest.approx(book.stderr)
    assert found.se == pytest.approx(book.stderr, rel=0.02)
    assert found.freedom == 3
    assert found.p == pytest.approx(book.pvalue, rel=0.1)
    assert found.high - found.estimate == pytest.approx(t.ppf(0.975, 3) * book.stderr, rel=0.05)
    assert slope_weights(x) @ correct.mean(axis=1) == pytest.approx(book.slope)
    assert found.about == "new backbones"


def test_pairs_that_decide_the_slope_widen_it():
    """Backbones exactly on a line whose slope is that of a few groups of pairs."""
    rng = np.random.default_rng(13)
    groups = np.arange(4000) // 80
    steep = np.where(groups < 10, 0.08, 0.0)
    x = np.arange(6.0)
    draws = rng.random(4000)
    correct = (draws < 0.5 + x[:, None] * steep).astype(float)
    found = size_slope(correct, x, groups)
    assert found.se > 3 * found.se_networks
    assert found.se_pairs > found.se_networks
    assert found.high - found.estimate < 2.2 * found.se  # what pairs do is known well, unlike what few backbones do


def test_two_backbones_have_a_difference_and_no_slope():
    with pytest.raises(ValueError, match="there are 2 backbones"):
        size_slope(np.ones((2, 5)), np.array([1.0, 2]), np.arange(5))
    with pytest.raises(ValueError, match="sizes that differ"):
        size_slope(np.ones((3, 5)), np.ones(3), np.arange(5))
    with pytest.raises(ValueError, match=r"correct has shape \(2, 5\)"):
        size_slope(np.ones((2, 5)), np.ones(3), np.arange(5))


def test_contrast_of_checkpoints_is_the_paired_difference():
    correct, groups = clustered(np.random.default_rng(14), 200, layers=4)
    alone = paired_difference(correct[0], correct[1], groups)
    found = network_contrast([(1.0, correct[:1]), (-1.0, correct[1:2])], groups)
    assert (found.estimate, found.low, found.high) == pytest.approx((alone.estimate, alone.low, alone.high))
    assert found.about == "these checkpoints"
    assert (found.p < 0.05) == (not found.low <= 0 <= found.high)
    twice = network_contrast([(c, correct[[i]]) for i, c in enumerate([1.0, -1.0, -1.0, 1.0])], groups)
    a = correct.mean(axis=1)
    assert twice.estimate == pytest.approx(a[0] - a[1] - a[2] + a[3])


def test_margin_over_random_weights_counts_the_seeds():
    rng = np.random.default_rng(15)
    trained, groups = clustered(rng, 400, accuracy=0.75)
    control = (rng.random((3, trained.shape[1])) < np.array([[0.52], [0.56], [0.60]])).astype(float)
    found = network_contrast([(1.0, trained), (-1.0, control)], groups)
    mean = control.mean(axis=1)
    assert found.estimate == pytest.approx(trained.mean() - mean.mean())
    assert found.networks == (1, 3)
    assert np.isnan(found.sd[0])
    assert found.sd[1] == pytest.approx(mean.std(ddof=1))
    assert found.se_networks == pytest.approx(mean.std(ddof=1) / np.sqrt(3))
    held = network_contrast([(1.0, trained), (-1.0, control.mean(axis=0)[None])], groups)
    assert held.se < found.se < np.hypot(found.se_networks, found.se_pairs) * (1 + 1e-9)
    assert found.freedom == 2
    assert found.about == "other trainings"


def test_intervals_for_new_networks_cover():
    found = repeat(slope, 150, 150)
    assert within_binomial_bounds(150 * found["covered"], 150, slack=0.01)
    assert within_binomial_bounds(150 * found["margin covered"], 150, slack=0.01)
    assert found["two ends as if for new backbones"] < 0.9
    both = repeat(seeds, 150, 150)
    assert within_binomial_bounds(150 * both["covered"], 150, slack=0.01)


def test_training_samples_widen_limits():
    rng = np.random.default_rng(16)
    correct, groups = clustered(rng, 300)
    found = accuracy_interval(correct[0], groups)
    none = with_training(found, np.repeat(correct, 20, axis=0), groups)
    assert (none.low, none.high, none.se_train) == pytest.approx((found.low, found.high, 0))
    # refits that lose 0 to 20 % of the right answers
    loss = np.linspace(0, 0.2, 8)
    refits = np.where(rng.random((8, len(groups))) < loss[:, None], 0, correct)
    wide = with_training(found, refits, groups)
    assert 0.8 < wide.se_train / refits.mean(axis=1).std(ddof=1) < 1
    assert wide.se == pytest.approx(np.hypot(wide.se_test, wide.se_train))
    assert wide.se_test == pytest.approx(found.se, rel=0.1)
    below, above = found.estimate - found.low, found.high - found.estimate
    assert (wide.estimate - wide.low) / below == pytest.approx((wide.high - wide.estimate) / above)
    assert wide.high - wide.low > 2 * 1.96 * wide.se  # t, as eight refits know their variance badly
    with pytest.raises(ValueError, match="at least two refits"):
        with_training(found, correct, groups)


def test_errors_of_a_contrast_with_refits_add_up():
    rng = np.random.default_rng(18)
    correct, groups = clustered(rng, 60, layers=2)
    gain = correct[0] - correct[1]
    refits = np.where(rng.random((8, len(groups))) < np.linspace(0, 0.6, 8)[:, None], 1, gain)
    found = network_contrast([(1.0, gain[None])], groups, refits=refits)
    held = network_contrast([(1.0, gain[None])], groups)
    assert found.se_train > 0.01
    assert found.se == pytest.approx(np.hypot(found.se_pairs, found.se_train), rel=1e-12)
    assert found.se_pairs == pytest.approx((held.high - held.low) / 2 / 1.959964)


def test_degrees_of_freedom_are_never_fewer_than_those_of_the_refits():
    """Refits whose scatter is nearly all that of their test pairs, and hardly any other error."""
    mostly_pairs = TrainingPart(variance=1e-6, scatter=1e-3, n_refits=10)
    assert mostly_pairs.freedom(1e-7) == 9
    assert mostly_pairs.freedom(1e-3) == pytest.approx(9 * 1.001**2)


def test_training_covariance_by_a_loop():
    rng = np.random.default_rng(17)
    base, groups = clustered(rng, 120, layers=2)
    drift = rng.normal(0, 0.1, (12, 1, 1)) + rng.normal(0, 0.05, (12, 2, 1))
    refits = np.where(rng.random((12, *base.shape)) < np.abs(drift), 1 - base, base)
    found, scatter = training_covariance(refits, groups)
    accuracy = refits.mean(axis=2)
    np.testing.assert_allclose(scatter, accuracy.var(axis=0, ddof=1))
    by_pairs = np.zeros((2, 2))
    for refit in refits - refits.mean(axis=0):
        sums = np.array([[(row - row.mean())[groups == g].sum() for row in refit] for g in range(120)])
        by_pairs += 120 / 119 * sums.T @ sums / len(groups) ** 2 / 11
    np.testing.assert_allclose(found, np.cov(accuracy.T) - by_pairs, atol=1e-12)


def test_half_samples_show_what_training_samples_do():
    found = repeat(training, 60, 0, n_boot=200)
    for what in ("accuracy", "difference"):
        assert 0.8 < found[f"{what}: SE / SD over samples"] < 1.5
        assert found[f"{what}: covered"] >= 0.88
