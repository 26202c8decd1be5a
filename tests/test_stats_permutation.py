"""The null hypothesis on pairs that hang together: what is recognised, exact probabilities, uniform p."""

from itertools import permutations

import numpy as np
import pytest
from campaigns.statistics_coverage import joined, permutation, ranked, repeat
from test_stats import within_binomial_bounds

from probekit.stats import permutation_test


def test_rankings_lone_pairs_and_shared_images_are_recognised():
    rng = np.random.default_rng(0)
    parts = [ranked(rng, 2, 5), ranked(rng, 4, 3), ranked(rng, 9, 2), joined(rng, 2)]
    for number, part in enumerate(parts):
        for name in ("images_a", "images_b", "prompts"):
            part[name] = np.array([f"{number}-{value:g}" for value in part[name]])
    pairs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    found = permutation_test(pairs.pop("margins")[None], n_draws=50, **pairs)
    assert (found.lone, found.rankings, found.joint) == (5, 5, 2)
    assert found.n_pairs == 5 + 3 * 6 + 2 * 36 + 2 * 15


@pytest.mark.parametrize(
    ("a", "b", "prompts", "kinds"),
    [
        ([0, 0, 1], [1, 2, 2], "xxx", (0, 1, 0)),  # a ranking of three
        ([1, 2, 2], [0, 0, 1], "xxx", (0, 1, 0)),  # sides do not matter
        ([0, 0], [1, 2], "xx", (0, 0, 1)),  # a pair of it is missing
        ([0, 1], [1, 0], "xx", (0, 0, 1)),  # one pair twice
        ([0, 0, 0], [1, 2, 1], "xxx", (0, 0, 1)),  # three pairs, one of them twice
        ([0, 0, 1], [1, 2, 2], "xxy", (0, 0, 1)),  # two prompts
        ([0, 2], [1, 3], "xx", (2, 0, 0)),  # one prompt, no image in common
        ([0, 0], [1, 1], "xy", (0, 0, 1)),
    ],
)
def test_kinds(a, b, prompts, kinds):
    n = len(a)
    found = permutation_test(np.ones((1, n)), np.ones(n), np.array(a), np.array(b), np.array(list(prompts)), n_draws=9)
    assert (found.lone, found.rankings, found.joint) == kinds


def test_one_ranking_has_the_p_of_all_its_orders():
    scores, ranks = np.array([3.0, 1.0, 2.0, 0.0]), np.array([3, 2, 1, 0])
    i, j = np.triu_indices(4, 1)
    margins = scores[i] - scores[j]

    def right(order):
        return np.mean(np.sign(margins) == np.sign(order[i] - order[j]))

    exact = np.mean([right(np.array(order)) >= right(ranks) for order in permutations(ranks)])
    labels = (ranks[i] > ranks[j]).astype(float)
    found = permutation_test(margins[None], labels, i, j, np.zeros(6), n_draws=20_000)
    assert found.accuracy[0] == pytest.approx(right(ranks))
    assert found.p[0] == pytest.approx(exact, abs=0.01)
    # the same pairs without one of them flip together: as good or its opposite
    found = permutation_test(margins[None, 1:], labels[1:], i[1:], j[1:], np.zeros(5), n_draws=20_000)
    assert found.p[0] == pytest.approx(0.5, abs=0.015)


def test_ties_move_with_the_ranks_and_prompts_may_weigh_alike():
    rng = np.random.default_rng(1)
    pairs = ranked(rng, 5, 30, tied=1.2)
    assert 0.1 < np.mean(pairs["labels"] == 0.5) < 0.9
    margins = pairs.pop("margins")[None]
    found = permutation_test(margins, **pairs)
    scored = pairs["labels"] != 0.5
    right = np.sign(margins[0]) == np.sign(pairs["labels"] - 0.5)
    assert found.accuracy[0] == pytest.approx(right[scored].mean())
    by_prompt = permutation_test(margins, by_prompt=True, **pairs)
    means = [right[scored & (pairs["prompts"] == p)] for p in np.unique(pairs["prompts"][scored])]
    assert by_prompt.accuracy[0] == pytest.approx(np.mean([m.mean() for m in means]))


def test_only_signs_matter_and_predicted_ties_are_wrong():
    pairs = ranked(np.random.default_rng(2), 4, 40)
    margins = pairs.pop("margins")[None]
    found = permutation_test(margins, **pairs)
    assert permutation_test(np.sign(margins) * 7, **pairs).p[0] == found.p[0]
    mirrored = pairs | {"labels": 1 - pairs["labels"], "images_a": pairs["images_b"], "images_b": pairs["images_a"]}
    assert permutation_test(-margins, **mirrored).accuracy[0] == found.accuracy[0]
    silent = permutation_test(np.zeros_like(margins), **pairs)
    assert (silent.accuracy[0], silent.p[0]) == (0, 1)


def test_the_best_of_many_is_held_against_the_best_of_many():
    rng = np.random.default_rng(3)
    pairs = ranked(rng, 2, 300)
    pairs.pop("margins")
    nothing = rng.normal(size=(24, 300))
    knows = np.where(rng.random(300) < 0.65, 1, -1) * np.sign(pairs["labels"] - 0.5)
    found = permutation_test(np.vstack([nothing, knows]), **pairs)
    assert (found.adjusted >= found.p).all()
    assert (found.adjusted[:24] > 0.05).all()
    assert found.adjusted[24] < 0.01
    assert found.p.min() == pytest.approx(1 / 2001)


def test_p_is_uniform_and_flipping_pairs_by_themselves_is_not():
    found = repeat(permutation, 60, 72, n_draws=99)
    for case in ("lone", "of 4", "of 4, ties", "of 9", "shared"):
        assert within_binomial_bounds(60 * found[f"{case}: p <= 0.05"], 60, rate=0.05, slack=0.01)
        assert within_binomial_bounds(60 * found[f"{case}: p <= 0.5"], 60, rate=0.5, slack=0.02)
    assert found["of 9: each pair flipped"] > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.full(3, 1.5)}, "label of pair 0 is 1.5"),
        ({"labels": np.full(3, 0.5)}, "none of the 3 pairs is scored"),
        ({"margins": np.array([[1.0, np.nan, 0.0]])}, "margin of pair 1 is not finite"),
        ({"images_b": np.array([9, 1, 8])}, "pair 1 holds one image twice"),
        ({"prompts": np.zeros(2)}, r"allowed: \(layers, pairs\)"),
        ({"margins": np.ones(3)}, r"margins have shape \(3,\)"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "margins": np.ones((1, 3)),
        "labels": np.ones(3),
        "images_a": np.arange(3),
        "images_b": np.array([5, 6, 7]),
        "prompts": np.zeros(3),
    } | change
    with pytest.raises(ValueError, match=message):
        permutation_test(*good.values())
