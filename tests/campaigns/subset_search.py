"""Screening of layer subsets against exact fits, to be run by hand:

``OMP_NUM_THREADS=1 python tests/campaigns/subset_search.py --pairs 5000 --channels 128 --exact 276``
``OMP_NUM_THREADS=1 python tests/campaigns/subset_search.py --pairs 20000 --channels 512 --exact 24 --baseline 1``

CPU seconds of the screen and of its first five exact fits; over all pairs of layers, or ``--exact`` of them, the rank
correlation of the screened with the exact held-out log-loss, and the regret: how far the best exact fit among the first
five lies above the best of all exact fits. ``--baseline`` pairs of layers are also fitted with scikit-learn's
LogisticRegressionCV (lbfgs, standardised, the same folds and strengths), and its time is scaled to all pairs.
"""

import argparse
import sys
import time
from itertools import combinations

import numpy as np
from scipy.stats import spearmanr

from probekit.bench.sweep_search import SyntheticDepth, looped_fit
from probekit.heads import best_subsets, refit_subsets, screen_subsets


def main() -> None:
    """Print one line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--exact", type=int, default=24, help="pairs of layers that are fitted exactly")
    parser.add_argument("--baseline", type=int, default=0, help="pairs of layers that are fitted with scikit-learn")
    parser.add_argument("--max-size", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    made = SyntheticDepth(options.layers, options.pairs, options.channels, seed=options.seed)
    held = [made(layer) for layer in range(options.layers)]
    layers, differences, given = range(options.layers), held.__getitem__, (made.label, None, made.groups)

    start = time.process_time()
    screened = screen_subsets(differences, layers, *given, max_size=options.max_size)
    screen = time.process_time() - start
    first = refit_subsets(differences, best_subsets(screened[screened["size"] <= 2], 5), *given)
    ours = time.process_time() - start
    say(f"screen {screen:.1f} s, with five exact fits {ours:.1f} s; {len(screened)} subsets")
    singles = screened[screened["size"] == 1]
    say(f"single layers: log-loss {singles['log_loss'].min():.4f} to {singles['log_loss'].max():.4f}")

    pairs = list(combinations(layers, 2))
    rng = np.random.default_rng(options.seed)
    some = [pairs[i] for i in sorted(rng.permutation(len(pairs))[: options.exact])]
    start = time.process_time()
    exact = refit_subsets(differences, some, *given)
    each = (time.process_time() - start) / len(some)
    expected = screened.set_index("layers")["log_loss"][list(exact["layers"])].to_numpy()
    rank = spearmanr(expected, exact["log_loss"]).statistic
    regret = first["log_loss"].min() - min(exact["log_loss"].min(), first["log_loss"].min())
    say(f"{len(some)} exact pairs, {each:.2f} s each: rank correlation {rank:.4f}, regret {regret:.5f}")
    alone = refit_subsets(differences, best_subsets(screened, 1)[:1], *given)["log_loss"][0] - first["log_loss"].min()
    say(
        f"log-loss of pairs {exact['log_loss'].min():.4f} to {exact['log_loss'].max():.4f}; expected minus exact "
        f"{np.mean(expected - exact['log_loss']):+.4f}; the screened first alone lies {alone:.5f} above"
    )
    for size in range(3, options.max_size + 1):
        found = refit_subsets(differences, best_subsets(screened[screened["size"] == size], 3), *given)
        say(f"size {size}: {found.iloc[0].to_dict()}")
    if options.baseline:
        times = [
            looped_fit(np.concatenate([held[i] for i in pair], axis=1), made.label, made.groups)
            for pair in some[: options.baseline]
        ]
        loop = np.mean(times) * len(pairs)
        say(f"scikit-learn {np.mean(times):.1f} s a pair, {loop:.0f} s for all: {loop / ours:.0f} times ours")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
