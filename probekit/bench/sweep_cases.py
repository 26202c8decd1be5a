"""What `probekit bench sweep` runs: each case with its size, the side it is compared with and the design's figure."""

from dataclasses import dataclass, replace
from typing import Literal

LOOPED_SETS = 2
"""Sets of layers that the loop of the other side is timed on; its time is scaled to all sets."""
Rival = Literal["logistic-cv", "newton-cholesky", "lbfgs-raw", "set-loop", "loop", "loop-20-epochs"]
RIVALS: dict[Rival, str] = {
    "logistic-cv": "LogisticRegressionCV: lbfgs, standardised, grouped folds, 8 C, then a refit",
    "newton-cholesky": "LogisticRegression, newton-cholesky, standardised, time a fit (8 C of one fold)",
    "lbfgs-raw": "LogisticRegression, lbfgs on raw features, time a fit (stopped after 1,000 iterations)",
    "set-loop": f"LogisticRegressionCV for every set of 24 layers: {LOOPED_SETS} sets timed, scaled to all sets",
    "loop": "a plain PyTorch loop over heads, the same epochs",
    "loop-20-epochs": "a plain PyTorch loop of 20 epochs, best epoch by validation, against the linear skip",
}


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes
    ----------
    name
        What ``--case`` takes.
    rival
        The other side, a key of `RIVALS`.
    n, d
        Pairs and channels.
    asked
        Ratio of CPU times that the design asks for at least.
    repeats
        Splits into five folds.
    heads, hidden
        MLP heads that are trained on the same rows, and their hidden width.
    layers, set_size
        Of a search: layers of d channels each, and how many make a set.
    rounds
        On the features of a layer each: more for cases that are quick or close to what is asked.
    """

    name: str
    rival: Rival
    n: int
    d: int
    asked: float
    repeats: int = 1
    heads: int = 1
    hidden: int = 0
    layers: int = 1
    set_size: int = 0
    rounds: int = 1

    def scaled(self, scale: float) -> "Case":
        """Return the case with sizes multiplied by ``scale``; at least 60 pairs and 4 channels."""
        return replace(self, n=max(60, round(scale * self.n)), d=max(4, round(scale * self.d)))


CASES = (
    Case("20k-512", "logistic-cv", 20_000, 512, asked=15.0),
    Case("30k-1536", "logistic-cv", 30_000, 1536, asked=25.0),
    Case("110k-512", "logistic-cv", 110_000, 512, asked=25.0),
    Case("5k-512", "logistic-cv", 5_000, 512, asked=12.0, rounds=3),
    Case("5k-1536", "logistic-cv", 5_000, 1536, asked=6.0),
    Case("160-fits", "logistic-cv", 20_000, 512, asked=25.0, repeats=4),
    Case("newton", "newton-cholesky", 20_000, 512, asked=40.0),
    Case("raw", "lbfgs-raw", 20_000, 512, asked=200.0),
    Case("n-below-d", "logistic-cv", 1_000, 2_048, asked=2.0, rounds=3),
    Case("search-pairs", "set-loop", 5_000, 256, asked=100.0, layers=24, set_size=2),
    Case("search-triples", "set-loop", 3_000, 128, asked=100.0, layers=24, set_size=3),
    Case("mlp-16", "loop", 4_000, 512, asked=4.0, heads=16, hidden=16),
    Case("mlp-32", "loop", 4_000, 512, asked=4.0, heads=16, hidden=32, rounds=3),
    Case("mlp-64", "loop", 4_000, 512, asked=1.5, heads=8, hidden=64),
    Case("mlp-256", "loop", 4_000, 512, asked=0.95, heads=4, hidden=256),
    Case("mlp-skip-32", "loop-20-epochs", 8_000, 512, asked=5.0, hidden=32, rounds=3),
    Case("mlp-skip-64", "loop-20-epochs", 8_000, 512, asked=5.0, hidden=64, rounds=3),
    Case("mlp-skip-256", "loop-20-epochs", 8_000, 512, asked=5.0, hidden=256),
)
