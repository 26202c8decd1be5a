"""Calibration: known scores, what means nothing changes nothing, planted overconfidence found."""

import numpy as np
import pytest
from campaigns.statistics_coverage import repeat, scores
from scipy.special import expit
from sklearn.metrics import brier_score_loss, log_loss
from test_stats import within_binomial_bounds

from probekit.stats import calibration


def voted(n=600, *, votes=5, seed=0):
    """Margins that are true logits, shares of votes, and groups of two."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(0, 1.5, n)
    return margins, rng.binomial(votes, expit(margins)) / votes, np.arange(n) // 2


def test_scores_are_the_known_ones():
    margins, labels, groups = voted(votes=1)
    found = calibration(margins, labels, groups)
    assert found.brier.estimate == pytest.approx(brier_score_loss(labels, expit(margins)))
    assert found.log_loss.estimate == pytest.approx(log_loss(labels, expit(margins)))
    for score in (found.brier, found.log_loss):
        assert score.low < score.estimate < score.high
        assert score.high - score.low == pytest.approx(2 * 1.96 * score.se, rel=0.15)
    assert (found.n_pairs, found.n_groups, found.effective_groups) == (600, 300, 300)


def test_calibration_error_by_a_loop():
    margins, labels, groups = voted()
    found = calibration(2 * margins, labels, groups, n_bins=6)
    said = expit(2 * np.abs(margins))
    meant = np.where(margins > 0, labels, 1 - labels)
    order = np.argsort(said)
    total = 0.0
    for chosen in np.split(order, 6):
        total += len(chosen) / 600 * abs(said[chosen].mean() - meant[chosen].mean())
    assert found.ece == pytest.approx(total)
    np.testing.assert_allclose(found.share, 1 / 6)
    assert (np.diff(found.said) > 0).all()
    assert found.ece == pytest.approx(np.sum(found.share * np.abs(found.said - found.voted)))


def test_overconfidence_is_found_and_calibration_is_not_faulted():
    margins, labels, groups = voted(2000)
    good, bad = calibration(margins, labels, groups), calibration(3 * margins, labels, groups)
    assert good.ece < good.ece_by_chance
    assert good.ece_low == 0
    assert bad.ece > bad.ece_by_chance
    assert bad.ece_low > 0
    assert bad.brier.estimate > good.brier.estimate
    assert (bad.said - bad.voted)[1:].min() > 0


def test_sides_mean_nothing_and_large_margins_stay_finite():
    margins, labels, groups = voted()
    turned = np.random.default_rng(1).choice([-1.0, 1.0], len(margins))
    found = calibration(margins, labels, groups)
    other = calibration(margins * turned, np.where(turned > 0, labels, 1 - labels), groups)
    assert other.ece == pytest.approx(found.ece)
    assert other.log_loss.estimate == pytest.approx(found.log_loss.estimate)
    sure = calibration(np.array([800.0, -800.0]), np.array([1.0, 1.0]), np.arange(2))
    assert sure.log_loss.estimate == pytest.approx(400)
    assert sure.brier.estimate == pytest.approx(0.5)
    undecided = calibration(np.zeros(30), np.ones(30), np.arange(30))
    assert undecided.ece == 0
    assert undecided.brier.estimate == pytest.approx(0.25)
    few = calibration(*voted(12))
    assert few.brier.low < few.brier.estimate < few.brier.high


def test_limits_cover():
    found = repeat(scores, 150, 150, n_boot=300)
    for what in ("Brier covered", "log-loss covered", "calibrated head below chance level"):
        assert within_binomial_bounds(150 * found[what], 150, slack=0.015)
    assert found["its ECE covered"] >= 0.93


@pytest.mark.parametrize(
    ("margins", "labels", "groups", "message"),
    [
        (np.ones(2), np.ones(3), np.zeros(2), "allowed"),
        (np.zeros(0), np.zeros(0), np.zeros(0), "allowed"),
        (np.array([np.inf]), np.ones(1), np.zeros(1), "finite"),
        (np.ones(1), np.array([2.0]), np.zeros(1), "0 to 1"),
    ],
)
def test_bad_input_is_named(margins, labels, groups, message):
    with pytest.raises(ValueError, match=message):
        calibration(margins, labels, groups)
