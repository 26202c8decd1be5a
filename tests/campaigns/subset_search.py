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
from sklearn.linear_model import LogisticRegressionCV

from probekit.config import STRENGTHS
from probekit.heads import best_subsets, refit_subsets, screen_subsets
from probekit.heads.linear import _folds


class Depth:
    """Layers of a network in which preference is read from factors that come and go with depth.

    A pair differs in 48 factors. Layer l shows factor k with a gain that peaks at a depth of k's own, in directions
    that turn slowly with depth, among nuisance of its own and of all layers with a power-law spectrum and scales over
    two decades. Six factors make the preference, so that layers share signal and have signal of their own.
    """

    def __init__(self, n_layers: int, n: int, d: int, *, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.factors = rng.normal(size=(n, 48)) * np.sqrt(rng.chisquare(6, size=(n, 1)) / 6)
        self.shared = rng.normal(size=(n, d))
        self.n_layers, self.d, self.seed = n_layers, d, seed
        self.peaks, self.spreads = rng.uniform(0, 1, 48), rng.uniform(0.05, 0.5, 48)
        self.turns = rng.normal(size=(2, 48, d)) / np.sqrt(d)
        self.mixing = rng.normal(size=(2, d, d)) / np.sqrt(d)
        self.scale = 10 ** rng.uniform(-1, 1, d)
        utility = self.factors[:, :6] @ np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
        self.label = (rng.random(n) < 1 / (1 + np.exp(-1.3 * utility))).astype(float)
        self.groups = np.arange(n) // 2

    def __call__(self, layer: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, layer))
        depth = layer / max(1, self.n_layers - 1)
        gain = np.exp(-(((depth - self.peaks) / self.spreads) ** 2) / 2)
        angle = depth * np.pi / 2
        turn = np.cos(angle) * self.turns[0] + np.sin(angle) * self.turns[1]
        mixing = np.cos(angle) * self.mixing[0] + np.sin(angle) * self.mixing[1]
        spectrum = (1 + np.arange(self.d)) ** -0.5
        own = rng.normal(size=self.shared.shape) * spectrum @ (rng.normal(size=(self.d, self.d)) / np.sqrt(self.d))
        return ((self.factors * gain) @ turn + 0.6 * own + 0.6 * (self.shared * spectrum) @ mixing) * self.scale


def scikit_learn(D: np.ndarray, label: np.ndarray, groups: np.ndarray) -> float:
    """CPU seconds of one well-used fit: signs drawn at random, as one class alone is refused."""
    sign = np.where(np.random.default_rng(0).random(len(D)) < 0.5, -1.0, 1.0)
    Z = D / np.sqrt(np.mean(D**2, axis=0)) * sign[:, None]
    fold_of = _folds(groups, 5)
    folds = [(np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)) for fold in range(5)]
    model = LogisticRegressionCV(
        Cs=list(STRENGTHS),
        cv=folds,
        fit_intercept=False,
        scoring="neg_log_loss",
        max_iter=1000,
        use_legacy_attributes=False,
        l1_ratios=(0,),
    )
    start = time.process_time()
    model.fit(Z, (label - 0.5) * sign > 0)
    return time.process_time() - start


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
    made = Depth(options.layers, options.pairs, options.channels, seed=options.seed)
    held = [made(layer).astype(np.float32) for layer in range(options.layers)]
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
            scikit_learn(np.concatenate([held[i] for i in pair], axis=1).astype(float), made.label, made.groups)
            for pair in some[: options.baseline]
        ]
        loop = np.mean(times) * len(pairs)
        say(f"scikit-learn {np.mean(times):.1f} s a pair, {loop:.0f} s for all: {loop / ours:.0f} times ours")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
