"""The statistics: invariants of the protocol, known intervals, coverage in simulation, what happens at the edges."""

import dataclasses
import subprocess
import sys
import time
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import expit, ndtr
from scipy.stats import beta, binom, norm

from probekit.stats import (
    PROTOCOLS,
    accuracy_interval,
    effective_groups,
    macro_interval,
    paired_difference,
    planned_difference,
    simultaneous_band,
    strict,
)


@lru_cache
def common_logit(accuracy, spread):
    """Centre of normal logits with this spread whose mean probability is ``accuracy``."""
    quantiles = norm.ppf((np.arange(2000) + 0.5) / 2000)
    return brentq(lambda centre: expit(centre + spread * quantiles).mean() - accuracy, -20, 20)


def clustered(rng, n_groups, *, accuracy=0.7, spread=1.0, largest=6, layers=1, shared=0.5):
    """Right or wrong (layers, n) in groups of 1 to ``largest`` pairs, and the groups.

    Each group has a logit of its own, ``shared`` of whose variance all layers have in common; the mean accuracy is
    ``accuracy``.
    """
    groups = np.repeat(np.arange(n_groups), rng.integers(1, largest + 1, n_groups))
    common, own = rng.normal(size=n_groups), rng.normal(size=(layers, n_groups))
    logits = common_logit(accuracy, spread) + spread * (np.sqrt(shared) * common + np.sqrt(1 - shared) * own)
    return (rng.random((layers, len(groups))) < expit(logits[:, groups])).astype(float), groups


def within_binomial_bounds(covered, runs, rate=0.95, slack=0.0):
    low, high = binom.ppf([0.001, 0.999], runs, rate)
    return low - slack * runs <= covered <= high + slack * runs


margins_and_labels = st.lists(
    st.tuples(st.sampled_from([-2.0, -0.1, 0.0, 0.1, 3.0]), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])), max_size=30
).map(lambda pairs: np.array(pairs, dtype=float).reshape(-1, 2).T)


@given(margins_and_labels)
@settings(deadline=None)
def test_strict_protocol_invariants(pairs):
    margins, labels = pairs
    outcome = strict(margins, labels)
    assert outcome.n_pairs + outcome.true_ties == len(labels)
    np.testing.assert_array_equal(np.isnan(outcome.correct), labels == 0.5)
    mirrored = strict(-margins, 1 - labels)
    np.testing.assert_array_equal(outcome.correct, mirrored.correct)
    scored = labels != 0.5
    answered_wrong = np.nansum(strict(-margins, labels).correct)
    assert np.nansum(outcome.correct) + answered_wrong + outcome.predicted_ties == scored.sum()
    assert np.nansum(strict(np.zeros_like(margins), labels).correct) == 0
    if outcome.n_pairs:
        assert outcome.accuracy == np.nanmean(outcome.correct)
    else:
        assert np.isnan(outcome.accuracy)


def test_strict_protocol_by_hand():
    outcome = PROTOCOLS["strict"](np.array([1.0, -1.0, 0.0, 2.0, 0.0]), np.array([1.0, 0.6, 0.0, 0.5, 0.5]))
    np.testing.assert_array_equal(outcome.correct, [1, 0, 0, np.nan, np.nan])
    assert (outcome.n_pairs, outcome.true_ties, outcome.predicted_ties) == (3, 2, 1)


def test_standard_error_is_the_cluster_linearised_one():
    correct, groups = clustered(np.random.default_rng(0), 50)
    interval = accuracy_interval(correct[0], groups)
    members = [correct[0][groups == group] for group in np.unique(groups)]
    a = correct.mean()
    residual = np.array([right.sum() - a * len(right) for right in members])
    assert interval.estimate == pytest.approx(a)
    assert interval.se == pytest.approx(np.sqrt(50 / 49 * np.sum(residual**2)) / correct.size)
    sizes = np.array([len(right) for right in members])
    assert interval.effective_groups == pytest.approx(sizes.sum() ** 2 / np.sum(sizes**2))
    assert (interval.n_pairs, interval.n_groups) == (correct.size, 50)
    assert effective_groups(groups) == pytest.approx(interval.effective_groups)
    assert effective_groups(np.arange(7)) == 7
    assert effective_groups(np.zeros(0)) == 0


def test_resampled_sums_equal_an_explicit_bootstrap():
    """The matrix products against a loop that resamples whole groups of pairs."""
    correct, groups = clustered(np.random.default_rng(1), 60)
    interval = accuracy_interval(correct[0], groups, n_boot=4000)
    rng = np.random.default_rng(5)
    members = [correct[0][groups == group] for group in np.unique(groups)]

    def logit_and_error(chosen):
        y, n = np.array([right.sum() for right in chosen]), np.array([len(right) for right in chosen])
        a = y.sum() / n.sum()
        se = np.sqrt(60 / 59 * np.sum((y - a * n) ** 2)) / n.sum()
        return np.log(a / (1 - a)), se / (a * (1 - a))

    centre, scale = logit_and_error(members)
    ts = []
    for _ in range(4000):
        drawn, error = logit_and_error([members[i] for i in rng.integers(60, size=60)])
        ts.append((drawn - centre) / error)
    limits = 1 / (1 + np.exp(-(centre - np.quantile(ts, [0.975, 0.025]) * scale)))
    np.testing.assert_allclose([interval.low, interval.high], limits, atol=0.006)


def test_interval_of_lone_pairs_is_close_to_the_binomial_one():
    correct = np.repeat([1.0, 0.0], [700, 300])
    interval = accuracy_interval(correct, np.arange(1000))
    exact = beta.ppf([0.025, 0.975], [700, 701], [301, 300])
    np.testing.assert_allclose([interval.low, interval.high], exact, atol=0.004)
    assert interval.method == "bootstrap-t"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_everything_right_or_wrong_keeps_a_limit(value):
    interval = accuracy_interval(np.full(40, value), np.arange(40) // 2)
    assert interval.estimate == value
    assert interval.method == "korn-graubard"
    limits = beta.ppf([0.025, 0.975], [20, 21], [1, 0.0]) if value else beta.ppf([0.025, 0.975], [0.0, 1], [21, 20])
    inner = limits[0] if value else limits[1]
    assert (interval.low if value else interval.high) == pytest.approx(inner)
    assert (interval.high if value else interval.low) == value


@pytest.mark.parametrize("n_wrong", [1, 3, 9, 12])
def test_few_errors_give_nearly_binomial_limits(n_wrong):
    correct = np.ones(300)
    correct[:n_wrong] = 0
    interval = accuracy_interval(correct, np.arange(300))
    low, high = beta.ppf([0.025, 0.975], [300 - n_wrong, 301 - n_wrong], [n_wrong + 1, n_wrong])
    assert interval.low == pytest.approx(low, abs=0.006)
    assert interval.high == pytest.approx(high, abs=0.006)


def test_one_group_and_no_pairs():
    interval = accuracy_interval(np.array([1.0, 1.0, 0.0]), np.zeros(3))
    assert np.isnan(interval.se)
    assert interval.low < 0.05
    assert interval.high > 0.95
    for correct in (np.zeros(0), np.full(4, np.nan)):
        with pytest.raises(ValueError, match="pairs is scored"):
            accuracy_interval(correct, np.zeros(len(correct)))


def test_ties_weights_order_and_names_of_groups():
    rng = np.random.default_rng(2)
    correct, groups = clustered(rng, 80)
    correct = correct[0]
    interval = accuracy_interval(correct, groups)
    assert accuracy_interval(correct, groups) == interval
    assert accuracy_interval(correct, groups, seed=1) != interval
    assert accuracy_interval(
        correct, np.char.add("group", groups.astype(str).astype("U4")).astype(object)
    ).estimate == (interval.estimate)
    tied = np.concatenate([correct, np.full(9, np.nan)])
    assert accuracy_interval(tied, np.concatenate([groups, np.arange(1000, 1009)])) == interval
    order = rng.permutation(len(correct))
    again = accuracy_interval(correct[order], groups[order])
    assert dataclasses.astuple(again)[:4] == pytest.approx(dataclasses.astuple(interval)[:4])
    doubled = accuracy_interval(np.repeat(correct, 2), np.repeat(groups, 2))
    weighted = accuracy_interval(correct, groups, weights=np.full(len(correct), 2.0))
    for other in (doubled, weighted):
        assert (other.low, other.high, other.se) == pytest.approx((interval.low, interval.high, interval.se))
    flipped = accuracy_interval(1 - correct, groups)
    assert flipped.low == pytest.approx(1 - interval.high, abs=1e-9)


def test_macro_mean_counts_kinds_alike():
    rng = np.random.default_rng(4)
    correct, groups = clustered(rng, 200)
    correct = correct[0]
    kinds = groups % 3  # kinds of whole groups
    interval = macro_interval(correct, groups, kinds)
    means = [correct[kinds == kind].mean() for kind in range(3)]
    assert interval.estimate == pytest.approx(np.mean(means))
    # independent kinds: the variance is the mean of the kinds' variances, over their number
    errors = [accuracy_interval(correct[kinds == kind], groups[kinds == kind]).se for kind in range(3)]
    assert interval.se == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 3, rel=0.02)
    assert interval.low < interval.estimate < interval.high
    one = macro_interval(correct, groups, np.zeros(len(correct)))
    same = accuracy_interval(correct, groups)
    assert (one.low, one.high, one.se) == pytest.approx((same.low, same.high, same.se))
    spread_kinds = np.concatenate([correct, np.full(5, np.nan)])
    labels = np.concatenate([kinds, np.full(5, 9)])  # a kind of ties only does not count
    assert macro_interval(spread_kinds, np.concatenate([groups, np.arange(5)]), labels).estimate == interval.estimate


def test_band_is_wider_than_one_interval_and_survives_flat_layers():
    rng = np.random.default_rng(6)
    correct, groups = clustered(rng, 300, layers=6)
    band = simultaneous_band(correct, groups)
    single = accuracy_interval(correct[2], groups)
    assert band.quantile > 2.1
    assert band.low[2] < single.low < single.high < band.high[2]
    np.testing.assert_allclose(band.estimate, correct.mean(axis=1))
    flat = simultaneous_band(np.vstack([correct, np.ones(correct.shape[1])]), groups)
    np.testing.assert_allclose(flat.low[:6], band.low, atol=0.003)
    assert band.quantile < flat.quantile < band.quantile + 0.2
    assert flat.high[6] == 1
    assert 0.9 < flat.low[6] < 1
    nothing = simultaneous_band(np.ones((2, 30)), np.arange(30))
    assert np.isnan(nothing.quantile)
    assert (nothing.low < 1).all()


def test_paired_difference_uses_the_pairing():
    rng = np.random.default_rng(8)
    correct, groups = clustered(rng, 400, layers=1)
    better = np.where(rng.random(correct.shape[1]) < 0.06, 1.0, correct[0])
    difference = paired_difference(better, correct[0], groups)
    assert difference.estimate == pytest.approx(better.mean() - correct.mean())
    assert 0 < difference.low < difference.estimate < difference.high
    assert difference.se < accuracy_interval(better, groups).se / 2
    assert difference.detectable == pytest.approx((1.959964 + 0.841621) * difference.se, rel=1e-5)
    mirrored = paired_difference(correct[0], better, groups)
    assert (mirrored.low, mirrored.high) == pytest.approx((-difference.high, -difference.low))
    tie = np.array([np.nan])
    padded = paired_difference(np.append(better, tie), np.append(correct[0], tie), np.append(groups, 9999))
    assert padded == difference


def test_heads_that_hardly_differ_still_get_limits():
    same = paired_difference(np.ones(100), np.ones(100), np.arange(100))
    assert same.estimate == 0
    assert same.method == "bonett-price"
    assert -0.06 < same.low < 0 < same.high < 0.06
    assert same.low == pytest.approx(-same.high)
    assert same.detectable > 0
    other = np.ones(100)
    other[:3] = 0
    few = paired_difference(np.ones(100), other, np.arange(100))
    assert few.estimate == pytest.approx(0.03)
    assert -0.02 < few.low < 0.03 < few.high < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: strict(np.array([1.0, np.nan]), np.ones(2)), "margin of pair 1 is not finite"),
        (lambda: strict(np.array([np.inf]), np.ones(1)), "margin of pair 0 is not finite"),
        (lambda: strict(np.ones(2), np.ones(3)), r"margins have shape \(2,\) and labels \(3,\)"),
        (lambda: strict(np.ones(1), np.array([1.5])), "label of pair 0 is 1.5"),
        (lambda: accuracy_interval(np.ones(3), np.zeros(2)), r"groups \(2,\)"),
        (lambda: accuracy_interval(np.full(3, 2.0), np.zeros(3)), "correct holds 2.0"),
        (lambda: accuracy_interval(np.ones(2), np.zeros(2), weights=np.array([1.0, -1.0])), "not negative"),
        (lambda: macro_interval(np.ones(2), np.zeros(2), np.zeros(3)), r"kinds have shape \(3,\)"),
        (lambda: paired_difference(np.ones(2), np.ones(3), np.zeros(2)), r"correct_b \(3,\)"),
        (lambda: paired_difference(np.ones(2), np.array([1, np.nan]), np.zeros(2)), "leave out different pairs"),
        (lambda: simultaneous_band(np.array([[1, 0.0], [1, np.nan]]), np.zeros(2)), "leave out different pairs"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("n_groups", "accuracy", "largest"), [(100, 0.7, 6), (200, 0.85, 6), (200, 0.5, 2)])
def test_interval_covers(n_groups, accuracy, largest):
    rng = np.random.default_rng(n_groups)
    covered = 0
    for _ in range(300):
        correct, groups = clustered(rng, n_groups, accuracy=accuracy, largest=largest)
        interval = accuracy_interval(correct[0], groups, n_boot=500)
        covered += interval.low <= accuracy <= interval.high
    assert within_binomial_bounds(covered, 300, slack=0.01)


def test_band_covers_all_layers_together():
    rng = np.random.default_rng(21)
    covered = 0
    for _ in range(200):
        correct, groups = clustered(rng, 200, layers=8)
        band = simultaneous_band(correct, groups, n_boot=500)
        covered += bool(((band.low <= 0.7) & (band.high >= 0.7)).all())
    assert within_binomial_bounds(covered, 200, slack=0.015)


def test_paired_interval_covers():
    rng = np.random.default_rng(22)
    covered = 0
    for _ in range(300):
        correct, groups = clustered(rng, 150, layers=2, shared=0.8)
        difference = paired_difference(correct[0], correct[1], groups, n_boot=500)
        covered += difference.low <= 0 <= difference.high
    assert within_binomial_bounds(covered, 300, slack=0.01)


def test_power_is_what_the_detectable_difference_says():
    rng = np.random.default_rng(23)
    effect, lost = 0.035, 0.1
    gained = (effect + 0.7 * lost) / 0.3  # of the pairs that b has wrong
    found, detectable = 0, []
    for _ in range(300):
        correct, groups = clustered(rng, 200)
        flips = rng.random(correct.shape[1]) < np.where(correct[0] == 1, lost, gained)
        difference = paired_difference(np.where(flips, 1 - correct[0], correct[0]), correct[0], groups, n_boot=500)
        found += difference.low > 0
        detectable.append(difference.detectable)
    power = ndtr(effect / np.mean(detectable) * (1.959964 + 0.841621) - 1.959964)
    assert 0.4 < power < 0.95
    assert abs(found / 300 - power) < 0.08


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.floats(0.01, 1), st.floats(0.5, 0.999))
@settings(deadline=None)
def test_a_planned_difference_falls_with_pairs_and_is_larger_where_they_are_alike(groups, disagreement, level):
    options = {"disagreement": disagreement, "level": level}
    independent, alike = planned_difference(np.array(groups), **options)
    closed = (norm.ppf((1 + level) / 2) + norm.ppf(0.8)) * np.sqrt(disagreement / len(groups))
    assert independent == pytest.approx(closed)
    assert alike >= independent * (1 - 1e-9)
    assert planned_difference(np.arange(len(groups)), **options) == pytest.approx((independent, independent))
    more = planned_difference(np.array([*groups, 6]), **options)
    assert more[0] < independent
    assert more[1] < alike
    four_times = np.concatenate([np.array(groups) + 6 * copy for copy in range(4)])
    assert planned_difference(four_times, **options) == pytest.approx((independent / 2, alike / 2))


@pytest.mark.parametrize("alike", [False, True])
def test_a_planned_difference_is_what_such_pairs_detect(alike):
    rng = np.random.default_rng(24)
    groups = np.repeat(np.arange(3000), rng.integers(1, 6, 3000))
    gains = rng.choice([-1, 0, 1], len(groups), p=[0.1, 0.8, 0.1])  # the heads disagree on a fifth of the pairs
    if alike:
        gains = gains[np.unique(groups, return_index=True)[1]][groups]
    found = paired_difference((gains > 0).astype(float), (gains < 0).astype(float), groups, n_boot=100).detectable
    assert found == pytest.approx(planned_difference(groups)[int(alike)], rel=0.05)


def test_thousands_of_resamples_take_milliseconds():
    correct, groups = clustered(np.random.default_rng(9), 1000)
    accuracy_interval(correct[0], groups)
    start = time.process_time()
    for _ in range(20):
        accuracy_interval(correct[0], groups)
    assert (time.process_time() - start) / 20 < 0.05


def test_statistics_need_neither_torch_nor_scikit_learn():
    code = "import sys, probekit.stats; print(*{'torch', 'sklearn', 'pandas', 'scipy.stats'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
