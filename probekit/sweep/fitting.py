"""The fits of records: which head with which settings on which features, and what is kept of it beside its margins."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from probekit._types import FloatArray
from probekit.config import LinearHead, MLPHead
from probekit.errors import HeadError
from probekit.heads import (
    BradleyTerryClassifierCV,
    BradleyTerryLateFusion,
    BradleyTerryMLP,
    BradleyTerryScalarMix,
    concatenate,
    fit_together,
    layer_set_name,
    mean_features,
)
from probekit.heads.base import PairHead
from probekit.results import NO_FIT
from probekit.store import FeatureStore, Pairs
from probekit.sweep.material import open_cached, read_features
from probekit.sweep.plan import OF_THE_PLAN, Record

_COLUMNS = {  # of the results, by attribute of a head
    "C_": "strength",
    "edge_of_grid_": "edge_of_grid",
    "converged_": "converged",
    "n_iter_": "n_iter",
    "epochs_": "n_iter",
    "gradient_norm_": "gradient_norm",
    "n_dropped_": "n_dropped",
    "n_less_than_d_": "n_less_than_d",
    "matrix_free_": "matrix_free",
    "n_parameters_": "head_parameters",
}
Fit = tuple[Record, PairHead | None, dict[str, Any]]
"""A record, its head (none if there was nothing to fit), and the columns of the results that say how it was fitted."""


@dataclass(frozen=True)
class Features:
    """What a head reads.

    Attributes
    ----------
    rows
        (m, d) of all stores of a selection.
    widths
        Channels of each of the layers that stand side by side.
    noise
        (d,): root mean square of what rounding in the stores adds to a difference.
    """

    rows: FloatArray
    widths: list[int]
    noise: FloatArray


def features_of(record: Record) -> Features:
    """Read what the head of a record reads, its layers side by side or averaged."""
    setting: dict[str, Any] = {"sigmas": record.sigmas, "poolings": record.poolings, "draw": record.draw}
    layers = [read_features(record.selection, layer, **setting) for layer in record.layers]
    noise = [_noise(record, layer) for layer in record.layers]
    if record.combination == "mean":
        rows = mean_features(layers)
        together = np.sqrt(np.square(noise).sum(axis=0)) / len(noise)  # errors of layers are independent
        return Features(rows, [rows.shape[1]], together)
    return Features(concatenate(layers), [rows.shape[1] for rows in layers], np.concatenate(noise))


def _noise(record: Record, layer: int) -> FloatArray:
    """Look up the rounding noise (d,) of differences of a layer, noise levels and poolings side by side.

    Stores of a mixture count by their rows.
    """
    stores = [open_cached(path) for path in record.selection.stores]
    share = np.array([len(store.rows) for store in stores]) / sum(len(store.rows) for store in stores)

    def squared(store: FeatureStore) -> FloatArray:
        places = product(record.sigmas, record.poolings)
        return np.concatenate(
            [
                store.quantisation(layer=layer, sigma=sigma, pooling=pooling, draw=record.draw) ** 2
                for sigma, pooling in places
            ]
        )

    return np.asarray(np.sqrt(share @ np.stack([squared(store) for store in stores])))


def fit(unit: Sequence[Record], features: Features, train: Pairs) -> list[Fit]:
    """Fit the heads of a unit, records that differ in their seed alone.

    No head is fitted where no training pair differs: text that has not met the image is that of its prompt.

    Raises
    ------
    HeadError
        If a head refuses its features; names the record.
    """
    X, first = features.rows, unit[0]
    if not any((X[a] != X[b]).any() for a, b in train.rows):
        return [(record, None, NO_FIT) for record in unit]
    given: dict[str, Any] = {
        "X": X,
        "pairs": train.rows,
        "label": train.label,
        "sample_weight": train.frame["weight"].to_numpy(),
        "groups": train.frame["group"].to_numpy(),
    }
    try:
        if isinstance(first.head, MLPHead):
            settings = first.head.model_dump(exclude={"kind", "name", *OF_THE_PLAN})
            mlps = [BradleyTerryMLP(**settings, quantisation=features.noise, seed=record.seed) for record in unit]
            fit_together(mlps, **given)
            return [(record, mlp, fit_facts(mlp)) for record, mlp in zip(unit, mlps, strict=True)]
        linear = _linear(first.head, first.combination, features).fit(**given)
        return [(record, linear, fit_facts(linear)) for record in unit]
    except HeadError as error:
        at = f"sigma {first.sigma}, pooling {first.pooling}, layers {layer_set_name(first.layers)}"
        message = f"{first.label}, head {first.head.name!r} ({first.combination}), {at}: {error}"
        raise HeadError(message) from None


def _linear(
    head: LinearHead, combination: str, features: Features
) -> BradleyTerryClassifierCV | BradleyTerryScalarMix | BradleyTerryLateFusion:
    settings: dict[str, Any] = {"Cs": head.strengths, "cv": head.folds, "quantisation": features.noise}
    match combination:
        case "scalar-mix":
            return BradleyTerryScalarMix(widths=features.widths, **settings)
        case "late-fusion":
            return BradleyTerryLateFusion(widths=features.widths, **settings)
        case _:
            return BradleyTerryClassifierCV(**settings)


def fit_facts(head: PairHead) -> dict[str, Any]:
    """Columns of the results about a fit, as far as this kind of head knows them."""
    return NO_FIT | {column: getattr(head, name) for name, column in _COLUMNS.items() if hasattr(head, name)}


def margins(head: PairHead | None, features: Features, pairs: Pairs) -> FloatArray:
    """Score the rows of the n pairs only: other rows of the store may have no features."""
    if head is None:
        return np.zeros(len(pairs.rows))
    used, place = np.unique(pairs.rows, return_inverse=True)
    return head.decision_function(features.rows[used], place.reshape(pairs.rows.shape))
