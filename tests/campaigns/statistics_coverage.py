"""What the statistics promise, in simulation, to be run by hand: ``python tests/campaigns/statistics_coverage.py``.

Each experiment draws data whose truth is known, and notes in each run whether the promise was kept. Two thousand runs
leave a standard error of 0.5 points on a coverage of 95 %. Right and wrong are drawn in groups of 1 to 6 pairs, each
group with a logit of its own (standard deviation 1), so that 248 groups count as 200. Experiments are independent of
each other: ``--only band plateau`` runs some.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_stats import clustered

from probekit.stats import (
    accuracy_interval,
    best_of_many,
    calibration,
    holm,
    macro_interval,
    network_contrast,
    paired_difference,
    paired_family,
    permutation_test,
    plateau_set,
    simultaneous_band,
    size_slope,
    with_training,
)

PER_GROUP = 3.5**2 / (91 / 6)
"""Effective number of groups over their number, where groups hold 1 to 6 pairs."""


def groups_for(effective):
    return round(effective / PER_GROUP)


def worsened(rng, correct, loss):
    """Right answers taken from layers, so that layer l loses the share ``loss[l]`` of its accuracy."""
    return np.where(rng.random(correct.shape) < np.asarray(loss)[:, None], 0.0, correct)


def shifted(rng, correct, shift, accuracy=0.7):
    """Layers whose true accuracy is ``accuracy + shift[l]``."""
    shift = np.asarray(shift)[:, None]
    draws = rng.random(correct.shape)
    lost = np.where(draws < -shift / accuracy, 0.0, correct)
    return np.where((shift > 0) & (draws < shift / (1 - accuracy)), 1.0, lost)


def interval(rng, effective, accuracy=0.7, n_boot=1000):
    correct, groups = clustered(rng, groups_for(effective), accuracy=accuracy)
    found = accuracy_interval(correct[0], groups, n_boot=n_boot)
    return {"covered": found.low <= accuracy <= found.high}


def macro(rng, effective, accuracy=0.7, n_boot=1000):
    """Mean over three kinds, 15 points apart and of unequal size."""
    shifts = np.array([-0.15, 0.0, 0.15]) if accuracy < 0.8 else np.array([-0.08, 0.0, 0.08])
    n_groups = groups_for(effective)
    parts, groups = zip(*(clustered(rng, n_groups, accuracy=accuracy + shift) for shift in shifts), strict=True)
    kinds = np.repeat([0, 1, 2], [len(group) for group in groups])
    kept = rng.random(len(kinds)) < np.array([1.0, 0.6, 0.3])[kinds]
    correct = np.hstack([part[0] for part in parts])
    found = macro_interval(correct[kept], np.hstack(groups)[kept], kinds[kept], n_boot=n_boot)
    return {"covered": found.low <= accuracy <= found.high}


def band(rng, effective, accuracy=0.7, layers=24, n_boot=1000):
    correct, groups = clustered(rng, groups_for(effective), accuracy=accuracy, layers=layers, shared=0.8)
    found = simultaneous_band(correct, groups, n_boot=n_boot)
    return {"all covered": bool(((found.low <= accuracy) & (found.high >= accuracy)).all())}


def paired(rng, effective, accuracy=0.7, n_boot=1000):
    correct, groups = clustered(rng, groups_for(effective), accuracy=accuracy, layers=2, shared=0.8)
    found = paired_difference(correct[0], correct[1], groups, n_boot=n_boot)
    return {"covered": found.low <= 0 <= found.high}


def family(rng, effective, heads=12, better=3, n_boot=500):
    """Twelve heads against one; in a second look three of them are better."""
    correct, groups = clustered(rng, groups_for(effective), layers=heads + 1, shared=0.8)
    nothing = paired_family(correct[1:], correct[0], groups, n_boot=n_boot)
    gain = np.where(np.arange(heads) < better, 0.06, 0.0)
    some = paired_family(shifted(rng, correct[1:], gain), correct[0], groups, n_boot=n_boot)
    covered = ((some.low <= gain) & (gain <= some.high)).all()
    return {
        "any false discovery": (nothing.adjusted <= 0.05).any(),
        "false beside true": (some.adjusted[better:] <= 0.05).any(),
        "found": np.mean(some.adjusted[:better] <= 0.05),
        "found by Holm": np.mean(holm(some.p)[:better] <= 0.05),
        "all covered": bool(covered),
    }


def plateau(rng, effective, layers=24, n_boot=500):
    """All equal; then three best, the others 5 points worse; then one best, two exactly a point behind."""
    correct, groups = clustered(rng, groups_for(effective), layers=layers, shared=0.8)
    equal = plateau_set(correct, groups, n_boot=n_boot)
    three = plateau_set(shifted(rng, correct, np.where(np.arange(layers) < 3, 0, -0.05)), groups, n_boot=n_boot)
    behind = np.array([0.0, -0.01, -0.01])
    near = plateau_set(shifted(rng, correct[:3], behind), groups, n_boot=n_boot)
    return {
        "a best one inside, all equal": equal.inside[0],
        "all inside, all equal": equal.inside.all(),
        "a best one inside": three.inside[0],
        "all three inside": three.inside[:3].all(),
        "layers inside": three.inside.sum(),
        "distance limit holds": three.behind[-1] >= 0.05,
        "falsely within a point": near.within_point[1],
    }


def plateau_of_layers(rng, effective, layers=12, tau=0.01, n_refits=20, n_boot=500):
    """Equal layers whose heads differ by what training samples make, standard deviation one point."""
    correct, groups = clustered(rng, groups_for(effective), layers=layers, shared=0.8)
    refits = np.stack([shifted(rng, correct, rng.normal(0, tau, layers)) for _ in range(n_refits)])
    correct = shifted(rng, correct, rng.normal(0, tau, layers))
    return {
        "a best one inside, heads held fixed": plateau_set(correct, groups, n_boot=n_boot).inside[0],
        "with refits": plateau_set(correct, groups, refits=refits, n_boot=n_boot).inside[0],
    }


def best(rng, effective, layers=24, n_boot=500):
    """Layers that are all equal, and layers 0 to 5 points worse than the best."""
    correct, groups = clustered(rng, groups_for(effective), layers=layers, shared=0.5)
    equal = best_of_many(correct, groups, n_boot=n_boot)
    shift = np.linspace(0, -0.05, layers)
    sloping = best_of_many(shifted(rng, correct, shift), groups, n_boot=n_boot)
    true = 0.7 + shift[sloping.best]
    return {
        "naive - 70 %": equal.naive - 0.7,
        "corrected - 70 %": equal.corrected - 0.7,
        "covered": equal.low <= 0.7 <= equal.high,
        "naive covered": accuracy_interval(correct[equal.best], groups, n_boot=n_boot).low <= 0.7,
        "sloping: naive - true": sloping.naive - true,
        "sloping: corrected - true": sloping.corrected - true,
        "sloping: covered": sloping.low <= true <= sloping.high,
    }


def ranked(rng, k, n_prompts, *, tied=0.0):
    """Margins and labels of rankings of k images that have nothing to do with each other."""
    i, j = np.triu_indices(k, 1)
    scores, ranks = rng.normal(size=(n_prompts, k)), rng.normal(size=(n_prompts, k))
    if tied:
        ranks = np.floor(ranks / tied)
    images = k * np.arange(n_prompts)[:, None] + np.arange(k)
    order = np.sign(ranks[:, i] - ranks[:, j])
    return {
        "margins": (scores[:, i] - scores[:, j]).ravel(),
        "labels": (0.5 + order / 2).ravel(),
        "images_a": images[:, i].ravel(),
        "images_b": images[:, j].ravel(),
        "prompts": np.repeat(np.arange(n_prompts), len(i)),
    }


def joined(rng, n_components):
    """Three prompts over the same four images, five pairs each: quality and score belong to the image mostly."""
    i, j = np.triu_indices(4, 1)
    parts = []
    for prompt in range(3):
        kept = rng.permutation(6)[:5]
        parts.append((prompt, i[kept], j[kept]))
    quality, score = rng.normal(size=(2, n_components, 4))
    found = {name: [] for name in ("margins", "labels", "images_a", "images_b", "prompts")}
    for prompt, a, b in parts:
        told = quality + 0.5 * rng.normal(size=quality.shape)
        given = score + 0.5 * rng.normal(size=score.shape)
        found["margins"].append(given[:, a] - given[:, b])
        found["labels"].append(told[:, a] > told[:, b])
        base = 4 * np.arange(n_components)[:, None]
        found["images_a"].append(base + a)
        found["images_b"].append(base + b)
        found["prompts"].append(np.broadcast_to(3 * np.arange(n_components)[:, None] + prompt, (n_components, 5)))
    return {name: np.concatenate([part.ravel() for part in parts]).astype(float) for name, parts in found.items()}


def permutation(rng, effective, n_draws=299):
    """P-values where there is nothing, and those of flipping every pair by itself."""
    cases = {
        "lone": ranked(rng, 2, effective),
        "of 4": ranked(rng, 4, effective // 4),
        "of 4, ties": ranked(rng, 4, effective // 4, tied=0.7),
        "of 9": ranked(rng, 9, effective // 9),
        "shared": joined(rng, effective // 4),
    }
    found = {}
    for name, pairs in cases.items():
        margins, n = pairs.pop("margins")[None], len(pairs["labels"])
        seed = int(rng.integers(2**31))
        p = permutation_test(margins, n_draws=n_draws, seed=seed, **pairs).p[0]
        found |= {f"{name}: p <= 0.05": p <= 0.05, f"{name}: p <= 0.5": p <= 0.5}
        if name != "lone":
            apart = pairs | {"images_a": np.arange(n), "images_b": n + np.arange(n)}
            found[f"{name}: each pair flipped"] = permutation_test(margins, n_draws=n_draws, **apart).p[0] <= 0.05
    return found


def networks(rng, accuracy, groups, uneven):
    """Right or wrong of networks with these accuracies; the pairs of a group move with ``uneven`` (R, G) in common."""
    chance = np.clip(np.asarray(accuracy)[:, None] + uneven[:, groups], 0.01, 0.99)
    return (rng.random(chance.shape) < chance).astype(float)


def slope(rng, effective, k=5, tau=0.01, rise=0.01):
    """Backbones scatter about a line by one point; size helps more in some groups of pairs than in others."""
    x = np.linspace(0, 4, k)
    _, groups = clustered(rng, groups_for(effective))
    n_groups = groups.max() + 1
    uneven = rng.normal(0, 0.12, n_groups) + (x - 2)[:, None] * rng.normal(0, 0.05, n_groups)
    accuracy = 0.65 + rise * x + rng.normal(0, tau, k)
    correct = networks(rng, accuracy, groups, uneven)
    found = size_slope(correct, x, groups)
    ends = paired_difference(correct[-1], correct[0], groups, n_boot=300)
    controls = 0.56 + 0.004 * x[:, None] + rng.normal(0, 0.008, (k, 3))
    random = np.stack([networks(rng, row, groups, 0 * uneven[:3]).mean(axis=0) for row in controls])
    margin = size_slope(correct - random, x, groups)
    return {
        "covered": found.low <= rise <= found.high,
        "half-width": (found.high - found.low) / 2,
        "two ends as if for new backbones": ends.low <= 4 * rise <= ends.high,
        "margin covered": margin.low <= rise - 0.004 <= margin.high,
    }


def seeds(rng, effective, tau=0.008):
    """Difference of differences: two shapes with three trainings and three random networks each."""
    _, groups = clustered(rng, groups_for(effective))
    uneven = rng.normal(0, 0.15, (1, groups.max() + 1))
    true = np.array([0.74, 0.56, 0.70, 0.55])
    sides = [networks(rng, a + rng.normal(0, tau, 3), groups, np.repeat(uneven, 3, axis=0)) for a in true]
    found = network_contrast(list(zip((1.0, -1.0, -1.0, 1.0), sides, strict=True)), groups)
    fixed = network_contrast(
        [(c, side.mean(axis=0)[None]) for c, side in zip((1.0, -1.0, -1.0, 1.0), sides, strict=True)],
        groups,
        n_boot=300,
    )
    return {
        "covered": found.low <= 0.03 <= found.high,
        "networks held fixed": fixed.low <= 0.03 <= fixed.high,
    }


def agreeing(rng, effective):
    """See `agreeing_of`, for three and for ten networks a side."""
    return {f"{n} networks: {what}": kept for n in (3, 10) for what, kept in agreeing_of(rng, effective, n).items()}


def agreeing_of(rng, effective, n_networks, n_boot=300):
    """Networks of one true accuracy: they scatter by what pairs do to each, by chance less or more than that."""
    _, groups = clustered(rng, groups_for(effective))
    uneven = rng.normal(0, 0.15, (1, groups.max() + 1))
    sides = [networks(rng, np.full(n_networks, a), groups, np.repeat(uneven, n_networks, axis=0)) for a in (0.7, 0.6)]
    found = network_contrast([(1.0, sides[0]), (-1.0, sides[1])], groups, n_boot=n_boot)
    right = np.concatenate(sides)
    size = np.bincount(groups)
    total = np.stack([np.bincount(groups, row) for row in right])
    influence = (total - right.mean(axis=1)[:, None] * size) / size.sum()
    covariance = len(size) / (len(size) - 1) * influence @ influence.T
    taken_off = 0.0
    for own in (slice(0, n_networks), slice(n_networks, None)):
        block = covariance[own, own]
        taken_off += (np.trace(block) - block.sum() / n_networks) / ((n_networks - 1) * n_networks)
    lower = np.sqrt(max(found.se_networks**2 + found.se_pairs**2 - taken_off, 0))
    t = stdtrit(found.freedom, 0.975)
    reach = np.hypot(t * found.se_networks, 1.96 * np.sqrt(max(lower**2 - found.se_networks**2, 0)))
    return {
        "covered": found.low <= 0.1 <= found.high,
        "without the floor": abs(found.estimate - 0.1) <= reach,
        "error below that of pairs": found.se < found.se_pairs - 1e-12,
        "and without the floor": lower < found.se_pairs,
    }


def logistic(differences, weights, strength=1.0):
    """Coefficients (R, d) of heads without intercept on differences (n, d), by Newton; weights (R, n)."""
    n, d = differences.shape
    products = (differences[:, :, None] * differences[:, None, :]).reshape(n, -1)
    w = np.zeros((len(weights), d))
    for _ in range(6):
        p = 1 / (1 + np.exp(-w @ differences.T))
        gradient = (weights * (1 - p)) @ differences - w / strength
        hessian = ((weights * p * (1 - p)) @ products).reshape(-1, d, d) + np.eye(d) / strength
        w = w + np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
    return w


class Heads:
    """Two layers of 12 channels, 8 of them in common, on pairs in groups of two."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.true = rng.normal(size=16) / 4
        self.layers = slice(0, 12), slice(4, 16)
        self.everything = self.draw(rng, 20_000)

    def draw(self, rng, n):
        x = 0.7 * np.repeat(rng.normal(size=(n // 2, 16)), 2, axis=0) + 0.7 * rng.normal(size=(n, 16))
        return x * np.where(rng.random(n) < 1 / (1 + np.exp(-1.5 * x @ self.true)), 1, -1)[:, None]

    def fit(self, rng, n=400, n_refits=20):
        """Function from pairs to right or wrong (2, 1 + refits, n): the full fit first, then half-samples."""
        train = self.draw(rng, n)
        halves = [np.isin(np.arange(n) // 2, rng.permutation(n // 2)[: n // 4]) for _ in range(n_refits)]
        weights = np.vstack([np.ones(n), np.array(halves)])
        w = [logistic(train[:, layer], weights) for layer in self.layers]
        return lambda pairs: np.stack([v @ pairs[:, layer].T > 0 for v, layer in zip(w, self.layers, strict=True)])


HEADS = Heads()


def training(rng, _, n_boot=300):
    """Logistic heads on 400 pairs: half-samples against fresh training samples, and limits for both samples."""
    right = HEADS.fit(rng)
    whole = right(HEADS.everything)[:, 0].mean(axis=1)
    correct = right(HEADS.draw(rng, 800)).astype(float)
    groups = np.arange(800) // 2
    one = accuracy_interval(correct[0, 0], groups, n_boot=n_boot)
    both = paired_difference(*correct[:, 0], groups, n_boot=n_boot)
    refits = correct[0, 1:], correct[0, 1:] - correct[1, 1:]
    found = {}
    for what, alone, again, true in zip(
        ("accuracy", "difference"), (one, both), refits, (whole[0], whole[0] - whole[1]), strict=True
    ):
        total = with_training(alone, again, groups)
        found[what] = [true, total.se_train, alone.low, alone.high, total.low, total.high]
    return found


def trained_networks(rng, _, n_networks=3, n=400, n_refits=10):
    """Three networks a side, each with 8 of a layer's 12 channels, fitted on the same 400 pairs and the same halves."""
    train, pairs = HEADS.draw(rng, n), HEADS.draw(rng, 800)
    halves = [np.isin(np.arange(n) // 2, rng.permutation(n // 2)[: n // 4]) for _ in range(n_refits)]
    weights = np.vstack([np.ones(n), np.array(halves)])
    whole, sides = [], []
    for layer in HEADS.layers:
        seen = [np.sort(rng.permutation(np.arange(16)[layer])[:8]) for _ in range(n_networks)]
        w = [logistic(train[:, some], weights) for some in seen]
        whole.append(
            np.mean([(v[0] @ HEADS.everything[:, some].T > 0).mean() for v, some in zip(w, seen, strict=True)])
        )
        sides.append(np.stack([v @ pairs[:, some].T > 0 for v, some in zip(w, seen, strict=True)]).astype(float))
    terms = [(1.0, sides[0][:, 0]), (-1.0, sides[1][:, 0])]
    refits = (sides[0][:, 1:] - sides[1][:, 1:]).mean(axis=0)
    held = network_contrast(terms, np.arange(800) // 2, n_boot=200)
    found = network_contrast(terms, np.arange(800) // 2, refits=refits, n_boot=200)
    beyond = np.hypot(found.se_networks, found.se_train)
    return {"difference": [whole[0] - whole[1], beyond, held.low, held.high, found.low, found.high]}


def summed(runs):
    """What the runs of `training` and `trained_networks` say together."""
    found = {}
    for what in runs[0]:
        true, se, *limits = np.array([run[what] for run in runs]).T
        held, both = ((limits[i] <= true.mean()) & (true.mean() <= limits[i + 1]) for i in (0, 2))
        found[f"{what}: SE / SD over samples"] = np.sqrt(np.mean(se**2)) / true.std(ddof=1)
        found |= {f"{what}: covered": both.mean(), f"{what}: by test pairs alone": held.mean()}
    return found


def scores(rng, effective, n_boot=500):
    """A calibrated and an overconfident head on shares of five votes, opinions joined by groups."""

    def draw(n_groups):
        _, groups = clustered(rng, n_groups)
        opinion = rng.normal(0, 1, len(groups)) + 0.5 * rng.normal(size=groups.max() + 1)[groups]
        return opinion, rng.binomial(5, 1 / (1 + np.exp(-opinion))) / 5, groups

    margins, labels, groups = draw(groups_for(effective))
    good = calibration(margins, labels, groups, n_boot=n_boot)
    bad = calibration(2 * margins, labels, groups, n_boot=n_boot)
    return {
        "Brier covered": good.brier.low <= TRUE_SCORES[0] <= good.brier.high,
        "log-loss covered": good.log_loss.low <= TRUE_SCORES[1] <= good.log_loss.high,
        "calibrated head below chance level": good.ece <= good.ece_by_chance,
        "overconfident head above it": bad.ece > bad.ece_by_chance,
        "its ECE covered": bad.ece_low <= TRUE_SCORES[2] <= bad.ece_high,
    }


def true_scores():
    """Brier score, log-loss, and the doubled head's calibration error, in the whole population."""
    rng = np.random.default_rng(0)
    opinion = np.sqrt(1.25) * rng.normal(size=2_000_000)
    p = 1 / (1 + np.exp(-opinion))
    twice = 1 / (1 + np.exp(-2 * np.abs(opinion)))
    return (
        float(np.mean(p * (1 - p)) / 5),
        float(-np.mean(p * np.log(p) + (1 - p) * np.log(1 - p))),
        float(np.mean(twice - np.maximum(p, 1 - p))),
    )


TRUE_SCORES = true_scores()

EXPERIMENTS = {
    function.__name__: function
    for function in (
        interval,
        macro,
        band,
        paired,
        family,
        plateau,
        plateau_of_layers,
        best,
        permutation,
        slope,
        seeds,
        agreeing,
        training,
        trained_networks,
        scores,
    )
}


OF_SAMPLES = (training, trained_networks)  # whose truth is that of all runs together


def repeat(experiment, runs, *arguments, seed=0, **options):
    """Means over runs."""
    rng = np.random.default_rng([seed, *arguments])
    found = [experiment(rng, *arguments, **options) for _ in range(runs)]
    return (
        summed(found)
        if experiment in OF_SAMPLES
        else {name: np.mean([run[name] for run in found]) for name in found[0]}
    )


def main():
    """Print one row per experiment and number of groups."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--groups", type=int, nargs="+", default=[50, 100, 200], help="effective numbers of groups")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.only:
        for effective in [0] if EXPERIMENTS[name] in OF_SAMPLES else options.groups:
            start = time.process_time()
            found = repeat(EXPERIMENTS[name], options.runs, effective, seed=options.seed)
            line = ", ".join(f"{what} {value:.4f}" for what, value in found.items())
            sys.stdout.write(f"{name} {effective}: {line} ({time.process_time() - start:.0f} s)\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
