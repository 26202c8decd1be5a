"""The search over sets of layers beside a scikit-learn loop over all of them.

n pairs, d channels of each layer.
"""

import time
import warnings
from itertools import combinations

import numpy as np
from scipy.special import expit
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegressionCV

from probekit._types import FloatArray, IntArray
from probekit.bench.sweep_cases import LOOPED_SETS, Case
from probekit.config import STRENGTHS
from probekit.heads import best_subsets, refit_subsets, screen_subsets
from probekit.heads.linear import _folds

FOLDS = 5
REFIT_TOP = 5
_SAMPLED_SETS = 24  # are fitted exactly, to be compared with what the screen expects of them


class SyntheticDepth:
    """Differences of a network in which preference is read from factors that come and go with depth.

    A pair differs in 48 factors. Layer l shows factor k with a gain that peaks at a depth of k's own, in directions
    that turn slowly with depth, among nuisance of its own and of all layers with a power-law spectrum and scales over
    two decades. Six factors make the preference, so that layers share signal and have signal of their own.

    Attributes
    ----------
    label, groups
        (n,): labels in {0, 1}, two pairs to a group.
    """

    def __init__(self, n_layers: int, n: int, d: int, *, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._factors = rng.normal(size=(n, 48)) * np.sqrt(rng.chisquare(6, size=(n, 1)) / 6)
        self._shared = rng.normal(size=(n, d))
        self._n_layers, self._seed = n_layers, seed
        self._peaks, self._spreads = rng.uniform(0, 1, 48), rng.uniform(0.05, 0.5, 48)
        self._turns = rng.normal(size=(2, 48, d)) / np.sqrt(d)
        self._mixing = rng.normal(size=(2, d, d)) / np.sqrt(d)
        self._scale = 10 ** rng.uniform(-1, 1, d)
        utility = self._factors[:, :6] @ np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
        self.label: FloatArray = (rng.random(n) < expit(1.3 * utility)).astype(np.float64)
        self.groups: IntArray = np.arange(n) // 2

    def __call__(self, layer: int) -> FloatArray:
        """Differences (n, d) float32 of a layer."""
        n, d = self._shared.shape
        rng = np.random.default_rng((self._seed, layer))
        depth = layer / max(1, self._n_layers - 1)
        gain = np.exp(-(((depth - self._peaks) / self._spreads) ** 2) / 2)
        angle = depth * np.pi / 2
        turn = np.cos(angle) * self._turns[0] + np.sin(angle) * self._turns[1]
        mixing = np.cos(angle) * self._mixing[0] + np.sin(angle) * self._mixing[1]
        spectrum = (1 + np.arange(d)) ** -0.5
        own = rng.normal(size=(n, d)) * spectrum @ (rng.normal(size=(d, d)) / np.sqrt(d))
        D = (self._factors * gain) @ turn + 0.6 * own + 0.6 * (self._shared * spectrum) @ mixing
        found: FloatArray = (D * self._scale).astype(np.float32)
        return found


def looped_fit(D: FloatArray, label: FloatArray, groups: IntArray) -> float:
    """CPU seconds of one well-used fit of scikit-learn; signs are drawn, as one class alone would be refused."""
    sign = np.random.default_rng(0).choice([-1.0, 1.0], len(D))
    fold_of = _folds(groups, FOLDS)
    folds = [(np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)) for fold in range(FOLDS)]
    start = time.process_time()
    Z = D / np.sqrt(np.mean(D**2, axis=0)) * sign[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits stopped before they have converged
        LogisticRegressionCV(Cs=STRENGTHS, cv=folds, fit_intercept=False, scoring="neg_log_loss", max_iter=1000).fit(
            Z, (label - 0.5) * sign > 0
        )
    return time.process_time() - start


def run_search(case: Case, *, seed: int) -> tuple[float, float, float, float]:
    """Search all sets of ``case.set_size`` layers, and a few of them by a loop.

    Returns
    -------
    ours, theirs
        CPU seconds of the screen of every set up to this size and five exact fits, and of the loop over all sets of
        the size, as the mean of `LOOPED_SETS` of them times their number.
    rank_correlation
        Of the expected with the exact held-out log-loss over sampled sets.
    regret
        How far the best of the five exact fits lies above the best of all exact fits.
    """
    made = SyntheticDepth(case.layers, case.n, case.d, seed=seed)
    held = [made(layer) for layer in range(case.layers)]
    layers, given = range(case.layers), (made.label, None, made.groups)
    start = time.process_time()
    screened = screen_subsets(held.__getitem__, layers, *given, max_size=case.set_size)
    screened = screened[screened["size"] == case.set_size]
    first = refit_subsets(held.__getitem__, best_subsets(screened, REFIT_TOP), *given)
    ours = time.process_time() - start

    sets = list(combinations(layers, case.set_size))
    order = np.random.default_rng(seed).permutation(len(sets))
    some = [sets[place] for place in order[:_SAMPLED_SETS]]
    each = [
        looped_fit(np.concatenate([held[layer] for layer in one], axis=1), made.label, made.groups)
        for one in some[:LOOPED_SETS]
    ]
    exact = refit_subsets(held.__getitem__, some, *given)
    expected = screened.set_index("layers")["log_loss"][list(exact["layers"])].to_numpy()
    rank = float(spearmanr(expected, exact["log_loss"]).statistic)
    regret = first["log_loss"].min() - min(first["log_loss"].min(), exact["log_loss"].min())
    return ours, float(np.mean(each)) * len(sets), rank, float(regret)
