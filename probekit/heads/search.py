"""Search over subsets of layers: all pairs and triples and a greedy path are screened, the best are fitted exactly.

Nothing but training pairs is used: the screen and the exact fits both score subsets by grouped cross-validation.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from probekit._types import FloatArray, IntArray
from probekit.config import STRENGTHS
from probekit.errors import HeadError
from probekit.heads import solvers
from probekit.heads.base import checked_groups, checked_targets
from probekit.heads.combine import concatenate
from probekit.heads.cross_fit import LayerFit, cross_fit
from probekit.heads.linear import BradleyTerryClassifierCV, _folds
from probekit.heads.screening import (
    JointGram,
    basis_width,
    expected_losses,
    joint_gram,
    margin_shape,
    project,
    supervised_basis,
)

Differences = Callable[[int], FloatArray]
"""Differences (n, d_l) of a layer, by its number, first minus second."""
_Scored = tuple[tuple[int, ...], float, float]
"""Layer numbers, log-loss, C."""
_BEAM = 5
"""Sets of the largest size so far that are extended by every layer; a greedy path would follow one."""


def screen_subsets(
    differences: Differences,
    layers: Sequence[int],
    label: FloatArray,
    sample_weight: FloatArray | None = None,
    groups: NDArray[Any] | None = None,
    *,
    max_size: int = 2,
    Cs: Sequence[float] = STRENGTHS,
    cv: int = 5,
    quantisation: Callable[[int], FloatArray] | None = None,
    memory: int = 2**30,
) -> pd.DataFrame:
    """Rank subsets of layers by the held-out log-loss that a linear head on their concatenation is expected to have.

    All pairs and, from ``max_size`` 3 on, all triples; above, the best five sets of a size with every further layer.
    The ranking is close, the values are not exact: fit the first few with `refit_subsets`.

    Parameters
    ----------
    differences
        Called with a layer number, at least twice for each layer and never for two at a time; arrays are not kept.
        Where n is below the channels, once.
    layers
        Layer numbers.
    label, sample_weight, groups
        (n,): as in `probekit.heads.BradleyTerryClassifierCV`.
    max_size
        Layers of the largest sets.
    Cs, cv
        Candidate strengths and folds, as there; pass the same to `refit_subsets`.
    quantisation
        Called with a layer number: root mean square (d_l,) of what rounding in the store adds to its differences, as
        there (default: nothing).
    memory
        Bytes for the projected differences, of n k L float32 numbers a fold with k = max(L + 4, about 32); with less
        than all folds take, layers are asked for once more for every part. Besides, min(n, d)^2 float32 numbers a layer
        are kept, and twice (k L)^2 float64 numbers a fold.

    Returns
    -------
    DataFrame
        A row for each subset, the lowest ``log_loss`` first: ``layers`` (tuple of int, ascending), ``size``,
        ``log_loss`` (mean over folds; of single layers as fitted, of larger sets as expected), ``C`` (as chosen for
        it). Layers in which no pair differs are in no subset.

    Raises
    ------
    HeadError
        As the heads raise it; also if ``max_size`` is below 1, or no pair differs in any layer.
    """
    if max_size < 1:
        message = f"max_size is {max_size}; a set has at least 1 layer"
        raise HeadError(message)
    strengths = np.sort(np.asarray(Cs, dtype=np.float64))
    layers = sorted(layers)
    with solvers.one_thread():
        fits, label, weight, fold_of = _fit_layers(
            differences, layers, label, sample_weight, groups, strengths, cv, quantisation
        )
        varying = list(fits)
        table: list[_Scored] = [
            ((layer,), float(fit.log_loss[:, fit.best].mean()), float(strengths[fit.best]))
            for layer, fit in fits.items()
        ]
        if max_size > 1 and len(varying) > 1:
            gram = _joint(differences, fits, strengths, label, weight, fold_of, memory)
            best = np.array([fit.best for fit in fits.values()])
            table += _enlarge(gram, best, strengths, varying, max_size)
    frame = pd.DataFrame(table, columns=["layers", "log_loss", "C"])
    frame.insert(1, "size", frame["layers"].map(len))
    return frame.sort_values("log_loss", kind="stable", ignore_index=True)


def best_subsets(screened: pd.DataFrame, top: int) -> list[tuple[int, ...]]:
    """Pick the first ``top`` sets of each size from 2 on, the smallest first, from what `screen_subsets` returned."""
    larger = screened[screened["size"] > 1].sort_values(["size", "log_loss"], kind="stable")
    return list(larger.groupby("size", sort=True).head(top)["layers"])


def refit_subsets(
    differences: Differences,
    subsets: Iterable[Sequence[int]],
    label: FloatArray,
    sample_weight: FloatArray | None = None,
    groups: NDArray[Any] | None = None,
    *,
    Cs: Sequence[float] = STRENGTHS,
    cv: int = 5,
) -> pd.DataFrame:
    """Fit subsets of layers exactly, each with `BradleyTerryClassifierCV` on its concatenation.

    Parameters
    ----------
    differences, label, sample_weight, groups, Cs, cv
        As in `screen_subsets`; the folds are the same.
    subsets
        Layer numbers of each, as `best_subsets` gives them.

    Returns
    -------
    DataFrame
        A row for each subset, the lowest ``log_loss`` first: ``layers``, ``size``, ``log_loss`` and ``accuracy``
        (held-out, means over folds), ``C``, ``converged``.
    """
    rows = []
    for subset in subsets:
        D = concatenate([differences(layer) for layer in subset])
        head = BradleyTerryClassifierCV(Cs=Cs, cv=cv).fit_differences(D, label, sample_weight, groups)
        loss, accuracy = head.cv_log_loss_.mean(axis=0), head.cv_accuracy_.mean(axis=0)
        at = int(np.argmin(loss))
        rows.append((tuple(subset), len(subset), loss[at], accuracy[at], head.C_, head.converged_))
    frame = pd.DataFrame(rows, columns=["layers", "size", "log_loss", "accuracy", "C", "converged"])
    return frame.sort_values("log_loss", kind="stable", ignore_index=True)


def _fit_layers(
    differences: Differences,
    layers: Sequence[int],
    label: FloatArray,
    sample_weight: FloatArray | None,
    groups: NDArray[Any] | None,
    strengths: FloatArray,
    cv: int,
    quantisation: Callable[[int], FloatArray] | None,
) -> tuple[dict[int, LayerFit], FloatArray, FloatArray, IntArray]:
    """Fit every layer alone in every fold; layers in which no pair differs are left out."""
    fits: dict[int, LayerFit] = {}
    weight: FloatArray = np.zeros(0)
    fold_of: IntArray = np.zeros(0, dtype=np.int64)
    for layer in layers:
        D, label, weight = checked_targets(differences(layer), label, sample_weight)
        if not len(fold_of):
            fold_of = _folds(np.arange(len(D)) if groups is None else checked_groups(groups, len(D)), cv)
        noise = None if quantisation is None else quantisation(layer)
        fit = cross_fit(D, label, weight, fold_of, strengths, noise=noise)
        del D  # before the next layer is read
        if fit is not None:
            fits[layer] = fit
    if not fits:
        message = f"no pair differs in any of the layers {', '.join(map(str, layers))}; there is nothing to search"
        raise HeadError(message)
    return fits, label, weight, fold_of


def _joint(
    differences: Differences,
    fits: dict[int, LayerFit],
    strengths: FloatArray,
    label: FloatArray,
    weight: FloatArray,
    fold_of: IntArray,
    memory: int,
) -> JointGram:
    """Project every layer on its basis, fold by fold, and take the second moments."""
    n, n_folds = len(label), int(fold_of.max()) + 1
    width = basis_width(len(fits), len(strengths))
    together = max(1, memory // (4 * n * width * len(fits)))
    slope = float(np.mean([fit.slope for fit in fits.values()]))
    shape = margin_shape(list(fits.values()))
    parts = []
    for start in range(0, n_folds, together):
        folds = range(start, min(start + together, n_folds))
        share = torch.from_numpy(np.stack([np.where(fold_of == fold, 0.0, weight) for fold in folds]))
        total = share.sum(1)
        answers = torch.stack([fit.margins[start : folds.stop] for fit in fits.values()], dim=2)
        answers = answers * (share / total[:, None]).float()[:, :, None]
        projected = torch.zeros(len(folds), len(fits), n, width)
        for place, (layer, fit) in enumerate(fits.items()):
            scaled = fit.rotated(np.asarray(differences(layer)) if fit.primal else np.zeros((0, 0)))
            ridge = 1 / (strengths[fit.best] * total * fit.slope)
            basis = supervised_basis(fit, folds, scaled, answers, ridge)
            projected[:, place, :, : basis.shape[2]] = project(fit, scaled, basis)
            del scaled
        parts.append(joint_gram(projected, folds, fold_of, label, weight, slope=slope, shape=shape))
    return JointGram(
        train=torch.cat([part.train for part in parts]),
        held_out=torch.cat([part.held_out for part in parts]),
        pull=torch.cat([part.pull for part in parts]),
        held_out_pull=torch.cat([part.held_out_pull for part in parts]),
        total=torch.cat([part.total for part in parts]),
        slope=slope,
        shape=shape,
        columns=width,
    )


def _enlarge(
    gram: JointGram, best: IntArray, strengths: FloatArray, layers: Sequence[int], max_size: int
) -> list[_Scored]:
    """Score sets of 2 to ``max_size`` layers: (layer numbers, expected log-loss, C)."""
    found = []
    last: list[tuple[int, ...]] = []
    for size in range(2, min(max_size, len(layers)) + 1):
        if size <= 3:
            sets = list(combinations(range(len(layers)), size))
        else:
            sets = sorted(
                {tuple(sorted({*one, more})) for one in last for more in range(len(layers)) if more not in one}
            )
        subsets = np.array(sets)
        around = np.median(best[subsets], axis=1).astype(np.int64)[:, None] + np.arange(-1, 2)
        candidates = strengths[np.clip(around, 0, len(strengths) - 1)]
        losses = expected_losses(gram, subsets, candidates)
        at = np.argmin(losses, axis=1)
        picked = np.arange(len(sets))
        loss, C = losses[picked, at], candidates[picked, at]
        order = np.argsort(loss, kind="stable")
        last = [sets[place] for place in order[:_BEAM]]
        found += [(tuple(layers[place] for place in one), float(loss[i]), float(C[i])) for i, one in enumerate(sets)]
    return found
