"""What the names of the generators alone say of a preference: a Bradley-Terry model, fitted on training pairs.

n = pairs.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_array, vstack
from sklearn.linear_model import LogisticRegression

from probekit._types import FloatArray, IntArray

GENERATOR_C = 1.0  # scikit-learn's C: strengths are pulled to 0 as one more judgement or so would


@dataclass(frozen=True)
class Generators:
    """One strength for each generator that a training pair compares with another; made by `fit_generators`.

    Attributes
    ----------
    names
        The generators, sorted.
    strength
        Of each.
    converged
        Whether the fit came to its end.
    """

    names: pd.Index
    strength: FloatArray
    converged: bool

    def places(self, frame: pd.DataFrame) -> IntArray:
        """Give the places of the generators of ``model_a`` and ``model_b`` among the names (n, 2); -1 where unseen."""
        return np.stack(
            [self.names.get_indexer(pd.Index(frame[side].fillna(""))) for side in ("model_a", "model_b")], axis=1
        )

    def margins(self, frame: pd.DataFrame) -> FloatArray:
        """Strength of A minus that of B (n,); 0, which says nothing, where one is unseen in training or unknown."""
        places = self.places(frame)
        a, b = np.append(self.strength, 0.0)[places].T
        return np.where((places < 0).any(axis=1), 0.0, a - b)


def fit_generators(frame: pd.DataFrame, target: FloatArray, weight: FloatArray) -> Generators:
    """Fit strengths: scikit-learn's logistic regression without intercept; pairs of one generator say nothing.

    Parameters
    ----------
    frame
        Training pairs (n): ``model_a`` and ``model_b``, empty where unknown.
    target, weight
        Share of votes for A, and what the pair weighs (n,).
    """
    sides = [frame[side].fillna("").to_numpy(object) for side in ("model_a", "model_b")]
    differ = (sides[0] != sides[1]) & (sides[0] != "") & (sides[1] != "")
    code, known = pd.factorize(np.concatenate([side[differ] for side in sides]), sort=True)
    names = pd.Index(known)
    if not len(names):
        return Generators(names, np.empty(0), converged=True)
    # Judgements of the same two are summed first, so that a million cost as few.
    (a, b), size = code.reshape(2, -1), len(names)
    low, high = np.minimum(a, b).astype(np.int64), np.maximum(a, b)
    key, place = np.unique(low * size + high, return_inverse=True)
    counted = weight[differ]
    won = np.bincount(place, weights=counted * np.where(a == low, target[differ], 1 - target[differ]))
    lost = np.bincount(place, weights=counted) - won
    rows, signs = np.tile(np.arange(len(key)), 2), np.repeat([1.0, -1.0], len(key))
    design = csr_array((signs, (rows, np.concatenate(np.divmod(key, size)))), shape=(len(key), size))
    model = LogisticRegression(C=GENERATOR_C, fit_intercept=False, max_iter=1000, tol=1e-8)
    outcomes = np.repeat([1, 0], len(key))
    model.fit(vstack([design, design]), outcomes, sample_weight=np.maximum(np.concatenate([won, lost]), 0.0))
    return Generators(names, model.coef_[0], converged=bool(model.n_iter_[0] < model.max_iter))
