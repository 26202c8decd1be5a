"""Headline, band, plateau, family and slope by a second computation from margins, to the last digits."""

import independent_statistics as again
import numpy as np
import pytest
from test_stats import clustered

from probekit.stats import (
    accuracy_interval,
    paired_difference,
    paired_family,
    plateau_set,
    simultaneous_band,
    size_slope,
)
from probekit.stats import strict as strict_protocol


@pytest.fixture(scope="module")
def judged():
    """Margins (6, n) of layers of unequal accuracy, soft labels with ties, and groups named by strings."""
    rng = np.random.default_rng(31)
    correct, groups = clustered(rng, 300, layers=6, shared=0.8)
    correct[3:] = np.where(rng.random(correct[3:].shape) < 0.12, 0, correct[3:])
    labels = rng.choice([0.0, 0.2, 0.5, 0.8, 1.0], len(groups))
    side = np.where(labels == 0.5, 1, np.sign(labels - 0.5))
    margins = side * np.where(correct == 1, 1, -1) * rng.exponential(size=correct.shape)
    return margins, labels, np.array([f"group {g}" for g in groups])


def test_a_second_computation_gives_the_same_numbers(judged):
    margins, labels, groups = judged
    ours = np.stack([strict_protocol(row, labels).correct for row in margins])
    decided = labels != 0.5
    theirs, kept = again.strict(margins[:, decided], labels[decided]), groups[decided]
    options = {"n_boot": 400}
    found = accuracy_interval(ours[2], groups, **options)
    assert again.interval(theirs[2], kept, **options) == pytest.approx(
        (found.estimate, found.low, found.high), abs=1e-9
    )
    found = simultaneous_band(ours, groups, **options)
    np.testing.assert_allclose(again.band(theirs, kept, **options), [found.estimate, found.low, found.high], atol=1e-9)
    found = plateau_set(ours, groups, **options)
    p, behind = again.plateau(theirs, kept, **options)
    np.testing.assert_allclose(p, found.p, atol=1e-12)
    np.testing.assert_allclose(behind, found.behind, atol=1e-9)
    assert list(p > 0.05) == list(found.inside)
    found = paired_family(ours[1:], ours[0], groups, **options)
    np.testing.assert_allclose(again.romano_wolf(theirs[1:], theirs[0], kept, **options), found.adjusted, atol=1e-12)
    found = paired_difference(ours[0], ours[5], groups, **options)
    expected = found.estimate, found.low, found.high
    assert again.difference(theirs[0], theirs[5], kept, **options) == pytest.approx(expected, abs=1e-9)
    found = size_slope(ours, np.log2(np.arange(1, 7)), groups)
    assert again.slope(theirs, np.log2(np.arange(1, 7)), kept) == pytest.approx((found.estimate, found.se), abs=1e-12)
