"""The points of every figure as a table: what is drawn is exactly what the CSV beside a figure holds.

Accuracies are shares from 0 to 1 as in the results table. ``interval`` says what ``low`` and ``high`` are: the interval
of one fitted head, or the range over seeds of a mean; ``converged``, whether all fits behind a point did. ``weights``
is ``trained`` or the kind of a control.
"""

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import pandas as pd

from probekit.report.select import (
    ALL_LAYERS,
    CHOSEN,
    OUTPUT,
    Model,
    Setting,
    all_layers,
    control_kinds,
    control_rows,
    layer_rows,
    narrow,
    of_kind,
    output_rows,
    reported_rows,
    single_layers,
    sources,
    trained_models,
    trained_rows,
    training_series,
)

ONE_HEAD = "interval of one head"
SEED_RANGE = "range over seeds"

_DEPTH = [
    "model",
    "backbone",
    "imported",
    "weights",
    "layers",
    "layer",
    "relative_depth",
    "accuracy",
    "low",
    "high",
    "interval",
    "converged",
    "chosen",
    "n_seeds",
]
_BAND = ["band_low", "band_high", "in_plateau"]
_KINDS = ["source", *_DEPTH, "n_pairs"]
_SCALING = [
    "model",
    "backbone",
    "parameters",
    "imported",
    "weights",
    "layers",
    "layer",
    "accuracy",
    "low",
    "high",
    "interval",
    "converged",
    "n_seeds",
]
_TRAINING = ["series", "training_images", *_SCALING]


_NEEDED = [
    "backbone",
    "control",
    "slice_by",
    "source",
    "layer_set",
    "layer",
    "n_layers",
    "combination",
    "chosen",
    "n_pairs",
]
_NEEDED += ["accuracy", "low", "high", "relative_depth", "n_blocks", "width", "backbone_parameters", "training_images"]
_NEEDED += ["pooling_layers", "family_tested", "imported", "converged"]


def depth_points(
    frame: pd.DataFrame, *, setting: Setting | None = None, families: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Test accuracy of every single layer, the output point and all layers together, for each model and its controls.

    Imported features of one layer have no relative depth.

    The output point stands at relative depth 1 like the last layer, of which it is a function; ``layers`` tells them
    apart.

    With `families` (`probekit.results.load_families`): also the limits that hold for all layers of a backbone together,
    and which layers may be the best.
    """
    rows = reported_rows(narrow(frame, setting))
    if families is None:
        return _table(_depth_rows(rows[_NEEDED]), _DEPTH)
    joined = rows[[*_NEEDED, "record_id", "dataset"]].merge(
        families[["record_id", "dataset", *_BAND]], on=["record_id", "dataset"], how="left"
    )
    joined["in_plateau"] = joined["in_plateau"].eq(True)  # noqa: FBT003
    return _table(_depth_rows(joined), [*_DEPTH, *_BAND])


def kinds_points(frame: pd.DataFrame, *, setting: Setting | None = None) -> pd.DataFrame:
    """Return the depth points of each kind of pair; kinds without decided pairs have no accuracy and are left out."""
    narrowed = narrow(frame, setting)
    ties = undecided_kinds(frame, setting=setting)
    kinds = [source for source in sources(narrowed) if source not in ties]
    rows = narrowed[(narrowed["split"] == "test") & narrowed["source"].isin(kinds)][_NEEDED]
    n_pairs = rows.groupby("source")["n_pairs"].max()
    table = _table(({"n_pairs": n_pairs[row["source"]]} | row for row in _depth_rows(rows)), _KINDS)
    return table.sort_values("source", key=lambda column: column.map(kinds.index), kind="stable", ignore_index=True)


def undecided_kinds(frame: pd.DataFrame, *, setting: Setting | None = None) -> list[str]:
    """Kinds of pairs that hold true ties only, so that no accuracy exists."""
    narrowed = narrow(frame, setting)
    tested = narrowed[(narrowed["split"] == "test") & (narrowed["slice_by"] == "source")]
    decided = tested.groupby("source")["accuracy"].count()
    return [kind for kind in sources(narrowed) if not decided.get(kind, 0)]


def scaling_points(frame: pd.DataFrame, *, setting: Setting | None = None) -> pd.DataFrame:
    """Test accuracy of the validation-chosen layer and of all layers together against the size of the backbone.

    Imported features stand at the size of their network; where that is unknown they have no point.
    """
    rows = reported_rows(narrow(frame, setting))[_NEEDED]
    models = [model for model in trained_models(rows) if model.parameters is not None]
    return _table([point for model in models for point in _size_rows(rows, model)], _SCALING)


def training_points(frame: pd.DataFrame, *, setting: Setting | None = None) -> pd.DataFrame:
    """Like `scaling_points`, against the images seen in training; ``init`` weights of the same shape stand at 0."""
    rows = reported_rows(narrow(frame, setting))[_NEEDED]
    points: list[dict[str, Any]] = []
    for models in training_series(rows):
        series = models[-1].label
        start = [point for point in _size_rows(rows, models[-1]) if point["weights"] == "init"]
        points.extend({"series": series, "training_images": 0} | point for point in start)
        for model in models:
            trained = [point for point in _size_rows(rows, model) if point["weights"] == "trained"]
            points.extend({"series": series, "training_images": model.images} | point for point in trained)
    return _table(points, _TRAINING)


def _depth_rows(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    parts = {"single": single_layers(rows), OUTPUT: output_rows(rows), ALL_LAYERS: all_layers(rows)}
    for model in trained_models(rows):
        for layers, part in parts.items():
            for row in trained_rows(part, model).to_dict("records"):
                yield _one(row, model, "trained", layers)
            controls = control_rows(part, model)
            for kind in control_kinds(controls):
                seeds = of_kind(controls, kind)
                for row in seeds.to_dict("records"):
                    yield _one(row, model, kind, layers)
                for _, same in seeds.groupby(["source", "layer_set"], sort=False):
                    yield _mean(same, model, kind, layers)


def _size_rows(rows: pd.DataFrame, model: Model) -> Iterator[dict[str, Any]]:
    for layers in (CHOSEN, ALL_LAYERS):
        part = layer_rows(rows, layers)
        controls = control_rows(part, model)
        kinds = [(kind, of_kind(controls, kind)) for kind in control_kinds(controls)]
        for weights, seeds in [("trained", trained_rows(part, model)), *kinds]:
            for row in seeds.to_dict("records"):
                yield _one(row, model, weights, layers)
            if len(seeds) > 1 or (len(seeds) and weights != "trained"):
                yield _mean(seeds, model, weights, layers)


def _one(row: dict[Hashable, Any], model: Model, weights: str, layers: str) -> dict[str, Any]:
    name = row["backbone"] if weights == "trained" else f"{row['backbone']} {row['control']}"
    keep = ["source", "layer", "relative_depth", "accuracy", "low", "high", "converged", "chosen"]
    keep += [name for name in _BAND if name in row]
    return {"model": model.label, "backbone": name, "weights": weights, "layers": layers, "interval": ONE_HEAD} | {
        "parameters": model.parameters,
        "imported": model.imported,
        "n_seeds": 1,
        **{column: row[column] for column in keep},
    }


def _mean(seeds: pd.DataFrame, model: Model, weights: str, layers: str) -> dict[str, Any]:
    one_layer = seeds["layer"].nunique(dropna=False) == 1
    first = seeds.iloc[0]
    return {
        "model": model.label,
        "backbone": "mean",
        "weights": weights,
        "layers": layers,
        "interval": SEED_RANGE,
        "parameters": model.parameters,
        "imported": model.imported,
        "n_seeds": len(seeds),
        "layer": first["layer"] if one_layer else pd.NA,
        "relative_depth": first["relative_depth"] if one_layer else float("nan"),
        "source": first["source"],
        "accuracy": seeds["accuracy"].mean(),
        "low": seeds["accuracy"].min(),
        "high": seeds["accuracy"].max(),
        "converged": bool(seeds["converged"].all()),
        "chosen": False,
        "in_plateau": False,
    }


def _table(rows: Iterable[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    table = pd.DataFrame(list(rows), columns=columns)
    dtypes = {
        "imported": "bool",
        "converged": "bool",
        "in_plateau": "bool",
        "layer": "Int64",
        "training_images": "Int64",
        "parameters": "Int64",
        "n_seeds": "Int64",
        "n_pairs": "Int64",
    }
    return table.astype({name: dtype for name, dtype in dtypes.items() if name in columns})
