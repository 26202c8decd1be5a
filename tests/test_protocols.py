"""The named accuracies against what the original repositories compute on rankings, and what chance gets."""

import doctest
import itertools
from dataclasses import astuple
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from scipy.stats import binom

from probekit.config import SweepConfig
from probekit.stats import (
    PROTOCOLS,
    accuracy_interval,
    expectations,
    macro_interval,
    paired_difference,
    prompt_weights,
    protocols,
    tune_threshold,
)

INVERSIONS = ("hpsv2-inversion", "hpsv2-inversion-listed", "mps-inversion")


def all_pairs(rankings, *, turned=None):
    """Pairs i < j of rankings (ranks, scores): margins, labels, prompts, and whether the first side stood first.

    `turned` (a generator) decides, as a hash does, which picture of a pair is its first side.
    """
    margins, labels, prompts, listed = [], [], [], []
    for prompt, (ranks, scores) in enumerate(rankings):
        for i, j in itertools.combinations(range(len(ranks)), 2):
            swap = turned is not None and turned.random() < 0.5
            a, b = (j, i) if swap else (i, j)
            margins.append(scores[a] - scores[b])
            labels.append(0.5 + 0.5 * np.sign(ranks[b] - ranks[a]))
            prompts.append(f"prompt {prompt}")
            listed.append(not swap)
    return np.array(margins, float), np.array(labels, float), np.array(prompts), np.array(listed, bool)


# What the originals do with the ranks (1 = best) and scores of one prompt, told anew.


def pairs_right(ranks, scores):
    """Right and decided pairs as ImageReward counts them."""
    right = decided = 0
    for i, j in itertools.combinations(range(len(ranks)), 2):
        if ranks[i] != ranks[j]:
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            decided += 1
            right += scores[better] > scores[worse]
    return right, decided


def places(scores):
    """Place of each picture after a stable sort by falling score."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [order.index(i) for i in range(len(scores))]


def inversions(ranks, predicted):
    """1 - discordant / (n (n - 1) / 2) for ranks and predicted places, both 1 = best."""
    n = len(ranks)
    crossed = 0
    for i in range(n - 1):
        for j in range(i + 1, n):
            crossed += (ranks[i] - ranks[j]) * (predicted[i] - predicted[j]) < 0
    return 1 - crossed / (n * (n - 1) / 2)


def reference(name, rankings):
    if name in ("strict", "imagereward"):
        counts = np.array([pairs_right(*ranking) for ranking in rankings]).sum(axis=0)
        return counts[0] / counts[1] if counts[1] else np.nan
    if name == "hpsv2-imagereward":
        shares = [right / decided for right, decided in (pairs_right(*ranking) for ranking in rankings) if decided]
        return np.mean(shares) if shares else np.nan
    if name == "mps-inversion":
        return np.mean([inversions(ranks, [-score for score in scores]) for ranks, scores in rankings])
    return np.mean([inversions(ranks, places(scores)) for ranks, scores in rankings])


ranking = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 4), min_size=n, max_size=n),
        st.lists(st.sampled_from([-1.5, 0.0, 0.25, 0.5, 2.0]), min_size=n, max_size=n),
    )
)


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "pickscore"])
@given(rankings=st.lists(ranking, min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_rankings_are_counted_as_the_originals_count_them(name, rankings, seed):
    # sorted by hash, the picture that comes first is the first side of each of its pairs: here the order is the file's
    turned = None if name == "hpsv2-inversion" else np.random.default_rng(seed)
    margins, labels, prompts, listed = all_pairs(rankings, turned=turned)
    outcome = PROTOCOLS[name](margins, labels, prompts=prompts, listed_first=listed)
    assert outcome.accuracy == pytest.approx(reference(name, rankings), nan_ok=True)
    assert outcome.true_ties == (labels == 0.5).sum()
    assert outcome.n_pairs == (len(labels) if name in INVERSIONS else (labels != 0.5).sum())
    assert outcome.predicted_ties == (margins[~np.isnan(outcome.correct)] == 0).sum()


def pickscore_points(scores, label, threshold):
    """Points of one example of Pick-a-Pic, as its evaluation script gives them."""
    p0, p1 = softmax(scores)
    said = "tie" if abs(p1 - p0) <= threshold else "0" if p0 > p1 else "1"
    true = "tie" if label == 0.5 else "0" if label == 1 else "1"
    return 1 if said == true else 0.5 if "tie" in (said, true) else 0


examples = st.lists(
    st.tuples(st.floats(-4, 4), st.floats(-4, 4), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=25
)


@given(examples)
@settings(deadline=None)
def test_pickscore_is_counted_and_tuned_as_the_original_does(pairs):
    scores, labels = np.array([pair[:2] for pair in pairs]), np.array([pair[2] for pair in pairs])
    margins = scores[:, 0] - scores[:, 1]
    gap = np.abs(np.diff(softmax(scores, axis=1), axis=1))[:, 0]
    grid = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    points = []
    for threshold in grid:
        near = np.abs(gap - threshold) < 1e-9  # where the two ways to compute the gap may round to different sides
        expected = [pickscore_points(pair, label, threshold) for pair, label in zip(scores, labels, strict=True)]
        found = PROTOCOLS["pickscore"](margins, labels, threshold=threshold)
        np.testing.assert_array_equal(found.correct[~near], np.array(expected)[~near])
        points.append(found.correct.mean())
    tuned = tune_threshold(margins, labels)
    assert tuned == grid[int(np.argmax(points))]
    assert PROTOCOLS["pickscore"](margins, labels, threshold=tuned).accuracy == max(points)


def test_equally_good_thresholds_give_the_smallest():
    assert tune_threshold(np.array([5.0, -5.0]), np.array([1.0, 0.0])) == 0
    assert tune_threshold(np.array([0.5, -0.5, 6.0]), np.array([0.5, 0.5, 1.0])) == 0.3  # the gap is 0.245
    with pytest.raises(ValueError, match="no pair to tune"):
        tune_threshold(np.zeros(0), np.zeros(0))


def test_soft_labels_name_the_side_with_more_votes():
    margins, labels = np.array([0.3, -2.0, 1.0, 0.0]), np.array([0.51, 0.2, 0.49, 0.5])
    hard, prompts = np.array([1.0, 0.0, 0.0, 0.5]), np.array(["x", "x", "y", "y"])
    known = {"prompts": prompts, "threshold": 0.2, "listed_first": np.ones(4, bool)}
    for protocol in PROTOCOLS.values():
        np.testing.assert_array_equal(
            protocol(margins, labels, **known).correct, protocol(margins, hard, **known).correct
        )


def test_worked_examples():
    found = doctest.testmod(protocols)
    assert found.failed == 0
    assert found.attempted > 15
    for name, protocol in PROTOCOLS.items():
        assert ">>>" in protocol.function.__doc__, name
        assert "Notes\n" in protocol.function.__doc__, name  # where it comes from
        assert protocol.rule.endswith("."), name


def test_the_configuration_knows_every_protocol():
    assert set(get_args(SweepConfig.model_fields["protocol"].annotation)) == set(PROTOCOLS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PROTOCOLS["pickscore"](np.ones(1), np.ones(1)), "'pickscore' needs threshold"),
        (lambda: PROTOCOLS["mps-inversion"](np.ones(1), np.ones(1)), "'mps-inversion' needs prompts"),
        (
            lambda: PROTOCOLS["hpsv2-inversion-listed"](np.ones(1), np.ones(1), prompts=np.zeros(1)),
            "'hpsv2-inversion-listed' needs listed_first",
        ),
        (lambda: PROTOCOLS["pickscore"](np.ones(1), np.ones(1), threshold=1.2), "threshold is 1.2"),
        (lambda: PROTOCOLS["mps-inversion"](np.ones(2), np.ones(2), prompts=np.zeros(3)), r"prompts have shape \(3,\)"),
        (lambda: PROTOCOLS["hpsv2-inversion"](np.array([np.nan]), np.ones(1), prompts=np.zeros(1)), "not finite"),
        (lambda: expectations("strict", np.full(3, 0.5)), "none of the 3 pairs is scored"),
    ],
)
def test_what_is_missing_or_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def imagereward_shape(rng, *, tie_share=0.1):
    """Rankings as in ImageReward's test file: 466 prompts of 4 to 9 pictures, ties with gaps, a tenth of pairs tied.

    The share is exact in each prompt group of one size, so that it is exact in the mean over prompts as well.
    """
    rankings = []
    for size, prompts in zip(range(4, 10), [100, 106, 100, 60, 50, 50], strict=True):
        n_pairs = size * (size - 1) // 2
        tied = round(tie_share * n_pairs * prompts)
        for left in range(prompts, 0, -1):
            here = min(tied // left + (tied % left > 0), size // 2)  # couples of pictures that share a rank
            tied -= here
            ranks = np.arange(size)
            for couple in range(here):
                ranks[2 * couple + 1] = ranks[2 * couple]
            rankings.append((rng.permutation(ranks) + 1, rng.normal(size=size)))
        assert tied == 0
    return rankings


def test_random_scores_get_50_and_55_on_the_shape_of_imagereward():
    rankings = imagereward_shape(np.random.default_rng(0))
    _, labels, prompts, listed = all_pairs(rankings, turned=np.random.default_rng(1))
    assert len(rankings) == 466
    tie_share = np.average(labels == 0.5, weights=prompt_weights(labels, prompts))
    assert tie_share == pytest.approx(0.1, abs=1e-9)
    where = {"prompts": prompts, "listed_first": listed}
    assert expectations("imagereward", labels, **where).random == 0.5
    assert expectations("hpsv2-imagereward", labels, **where).random == pytest.approx(0.5)
    for name in INVERSIONS:
        assert expectations(name, labels, **where).random == pytest.approx(0.55, abs=1e-9)
    assert expectations("mps-inversion", labels, **where).constant == 1
    assert expectations("imagereward", labels, **where).constant == 0
    pairs = expectations("pickscore", labels, **where)
    assert pairs.random == 0.5
    assert pairs.constant == pytest.approx(0.5 + 0.5 * np.mean(labels == 0.5))
    # a constant keeps the order of the file, so that it is the first-listed scorer
    quirk = expectations("hpsv2-inversion-listed", labels, **where)
    assert quirk.constant == pytest.approx(quirk.first_listed)
    assert quirk.floor == max(astuple(quirk))


def test_what_a_file_order_is_worth_is_seen():
    """A file whose rankings begin with the best picture: constant scores win by the quirk, and not without it."""
    rng = np.random.default_rng(3)
    rankings = [(np.arange(5), np.zeros(5)) for _ in range(300)]
    _, labels, prompts, listed = all_pairs(rankings, turned=rng)
    where = {"prompts": prompts, "listed_first": listed}
    assert expectations("hpsv2-inversion-listed", labels, **where).constant == 1
    hashed = expectations("hpsv2-inversion", labels, **where)
    assert hashed.constant == pytest.approx(0.5, abs=0.05)
    assert hashed.first_listed == hashed.floor == 1
    assert np.isnan(expectations("strict", labels).first_listed)
    assert expectations("strict", labels).floor == 0.5


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_expectation_of_random_scores_is_that_of_all_orders(name):
    """Every order of the pictures of each prompt, counted out."""
    ranks = [np.array([1, 2, 2, 4]), np.array([1, 1, 3]), np.array([2, 1])]
    rng = np.random.default_rng(5)
    by_prompt, all_labels, all_prompts, all_listed = [], [], [], []
    for prompt, some in enumerate(ranks):
        turn = int(rng.integers(99))
        outcomes = []
        for order in itertools.permutations(range(len(some))):
            margins, labels, _, listed = all_pairs([(some, np.array(order) * 9.0)], turned=np.random.default_rng(turn))
            prompts = np.full(len(labels), str(prompt))
            outcome = PROTOCOLS[name](margins, labels, prompts=prompts, threshold=0.0, listed_first=listed)
            outcomes.append(outcome.correct)
        by_prompt.append(np.mean(outcomes, axis=0))
        all_labels.append(labels)
        all_prompts.append(prompts)
        all_listed.append(listed)
    labels, prompts = np.concatenate(all_labels), np.concatenate(all_prompts)
    expected = np.concatenate(by_prompt)
    macro = "prompts" in PROTOCOLS[name].needs
    weight = prompt_weights(expected, prompts) if macro else (~np.isnan(expected)).astype(float)
    found = expectations(name, labels, prompts=prompts, listed_first=np.concatenate(all_listed))
    assert found.random == pytest.approx(np.nansum(weight * expected) / weight.sum())


def test_both_means_are_there_whatever_the_protocol():
    rankings = imagereward_shape(np.random.default_rng(7))[::9]
    margins, labels, prompts, _ = all_pairs(rankings)
    by_pair, by_prompt = (PROTOCOLS[name](margins, labels, prompts=prompts) for name in ("strict", "hpsv2-imagereward"))
    assert by_pair.accuracy == by_pair.over_pairs == by_prompt.over_pairs
    assert by_prompt.accuracy == pytest.approx(by_pair.over_prompts(prompts))
    assert by_pair.accuracy != pytest.approx(by_prompt.accuracy)
    nothing = PROTOCOLS["strict"](np.ones(2), np.full(2, 0.5))
    assert np.isnan([nothing.accuracy, nothing.over_pairs, nothing.over_prompts(np.zeros(2))]).all()


def drawn_rankings(rng, n_prompts):
    """Right or wrong for all pairs of prompts of 2 to 6 pictures; larger prompts are harder."""
    sizes = rng.integers(2, 7, n_prompts)
    chance = 0.7 + 0.05 * (4 - sizes)
    own = expit(rng.normal(np.log(chance / (1 - chance)), 0.5))
    prompts = np.repeat(np.arange(n_prompts), sizes * (sizes - 1) // 2)
    return (rng.random(len(prompts)) < own[prompts]).astype(float), prompts


def test_intervals_of_means_over_prompts_cover():
    rng = np.random.default_rng(11)
    many, prompts = drawn_rankings(rng, 400_000)
    weight = prompt_weights(many, prompts)
    truth = float((weight * many).sum() / weight.sum())
    assert abs(truth - many.mean()) > 0.03  # the mean over pairs is another quantity
    covered = 0
    for _ in range(300):
        correct, prompts = drawn_rankings(rng, 150)
        groups = prompts // 2  # two prompts that share a picture
        interval = accuracy_interval(correct, groups, weights=prompt_weights(correct, prompts), n_boot=500)
        covered += interval.low <= truth <= interval.high
    low, high = binom.ppf([0.001, 0.999], 300, 0.95)
    assert low - 3 <= covered <= high + 3


def test_weights_in_intervals_and_means_over_kinds():
    rng = np.random.default_rng(12)
    correct, prompts = drawn_rankings(rng, 120)
    weight = prompt_weights(correct, prompts)
    interval = accuracy_interval(correct, prompts, weights=weight)
    assert interval.estimate == pytest.approx(np.mean([correct[prompts == p].mean() for p in range(120)]))
    assert interval.effective_groups == pytest.approx(120)
    ones = np.ones(len(correct))
    plain = accuracy_interval(correct, prompts)
    assert accuracy_interval(correct, prompts, weights=ones) == plain
    kinds = prompts % 3
    assert macro_interval(correct, prompts, kinds, weights=ones) == macro_interval(correct, prompts, kinds)
    by_kind = macro_interval(correct, prompts, kinds, weights=weight)
    means = [np.average(correct[kinds == k], weights=weight[kinds == k]) for k in range(3)]
    assert by_kind.estimate == pytest.approx(np.mean(means))
    assert by_kind.low < by_kind.estimate < by_kind.high
    twice = paired_difference(correct, 1 - correct, prompts, weights=weight)
    assert twice.estimate == pytest.approx(2 * interval.estimate - 1)
