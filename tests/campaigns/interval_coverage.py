"""Coverage of the intervals in simulation, to be run by hand: ``python tests/campaigns/interval_coverage.py --runs
2000``.

Right and wrong are drawn in groups of 1 to 6 pairs, each group with a logit of its own (standard deviation 1);
accuracies are the true ones of that process. Two thousand runs leave a standard error of 0.5 points on a coverage of 95
%.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_stats import clustered

from probekit.stats import accuracy_interval, macro_interval, paired_difference, simultaneous_band


def interval(rng, n_groups, accuracy):
    """Whether the interval of one accuracy covers it."""
    correct, groups = clustered(rng, n_groups, accuracy=accuracy)
    found = accuracy_interval(correct[0], groups, n_boot=1000)
    return found.low <= accuracy <= found.high


def macro(rng, n_groups, accuracy):
    """Whether the interval of a mean over three kinds, 15 points apart and of unequal size, covers it."""
    shifts = np.array([-0.15, 0.0, 0.15]) if accuracy < 0.8 else np.array([-0.08, 0.0, 0.08])
    parts, groups = zip(*(clustered(rng, n_groups, accuracy=accuracy + shift) for shift in shifts), strict=True)
    kinds = np.repeat([0, 1, 2], [len(group) for group in groups])
    kept = rng.random(len(kinds)) < np.array([1.0, 0.6, 0.3])[kinds]
    correct = np.hstack([part[0] for part in parts])
    found = macro_interval(correct[kept], np.hstack(groups)[kept], kinds[kept], n_boot=1000)
    return found.low <= accuracy <= found.high


def paired(rng, n_groups, accuracy):
    """Whether the interval of the difference of two equally good heads covers zero."""
    correct, groups = clustered(rng, n_groups, accuracy=accuracy, layers=2, shared=0.8)
    found = paired_difference(correct[0], correct[1], groups, n_boot=1000)
    return found.low <= 0 <= found.high


def band(rng, n_groups, accuracy):
    """Whether the band over 24 layers covers all of them."""
    correct, groups = clustered(rng, n_groups, accuracy=accuracy, layers=24, shared=0.8)
    found = simultaneous_band(correct, groups, n_boot=1000)
    return bool(((found.low <= accuracy) & (found.high >= accuracy)).all())


def main():
    """Print one row per number of groups and accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--groups", type=int, nargs="+", default=[12, 25, 50, 100, 200, 500])
    parser.add_argument("--accuracies", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    checks = [interval, macro, paired, band]
    sys.stdout.write("groups accuracy " + " ".join(f"{check.__name__:>8}" for check in checks) + "\n")
    for n_groups in options.groups:
        for accuracy in options.accuracies:
            rates = []
            for check in checks:
                rng = np.random.default_rng([options.seed, n_groups, int(1000 * accuracy)])
                rates.append(np.mean([check(rng, n_groups, accuracy) for _ in range(options.runs)]))
            row = " ".join(f"{100 * rate:8.1f}" for rate in rates)
            sys.stdout.write(f"{n_groups:6d} {accuracy:8.2f} {row}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
