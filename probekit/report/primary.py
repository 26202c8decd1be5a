"""The one endpoint that a run is about: named in its configuration, or the default; everything else is exploratory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from probekit.config import Primary
from probekit.errors import ResultsError
from probekit.report.effects import Effect, Verdicts, trained_side
from probekit.report.select import (
    ALL_LAYERS,
    CHOSEN,
    Model,
    Setting,
    dumped_models,
    layer_rows,
    narrow,
    probed,
    reported_rows,
    settings,
    trained_models,
    trained_rows,
)
from probekit.stats import BestOf, best_of_many


@dataclass(frozen=True)
class Endpoint:
    """The primary endpoint of a run.

    Attributes
    ----------
    setting
        Its data set, protocol, noise level, draw, pooling and head.
    model
        Its backbone; None where the run holds no trained one.
    layers
        `CHOSEN` or `ALL_LAYERS`.
    named
        Whether the configuration names any part of it.
    """

    setting: Setting
    model: Model | None
    layers: str
    named: bool

    def rows(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Test rows of the endpoint: one, or one for each training seed; none where no head is like this."""
        rows = layer_rows(reported_rows(narrow(frame, self.setting)), self.layers)
        return rows[:0] if self.model is None else trained_rows(rows, self.model)

    def accuracy(self, frame: pd.DataFrame, verdicts: Verdicts) -> Effect | None:
        """Accuracy with its interval: over pairs, and of several training seeds over seeds; None without rows.

        Parameters
        ----------
        frame
            Tidy frame of the run.
        verdicts
            Of the endpoint's data set.
        """
        rows = self.rows(frame)
        if rows.empty or self.model is None or not rows["accuracy"].notna().all():
            return None
        if len(rows) > 1:
            return verdicts.compare(self.model.label, [trained_side(rows, self.model)], [])
        row = rows.iloc[0]
        return Effect(
            self.model.label,
            float(row["accuracy"]),
            float(row["low"]),
            float(row["high"]),
            float("nan"),
            int(row["n_pairs"]),
            converged=bool(row["converged"]),
        )


def find_primary(frame: pd.DataFrame, options: Mapping[str, Any]) -> Endpoint:
    """Find the primary endpoint of a run.

    Parameters
    ----------
    frame
        Tidy frame of the run.
    options
        Settings of its sweep, whose ``primary`` names parts of the endpoint: see `probekit.config.Primary`.

    Raises
    ------
    ResultsError
        If it names what the run does not hold.
    """
    asked = Primary.checked(options.get("primary") or {}, source="primary")
    found = settings(frame)
    setting = next((one for one in found if asked.dataset in (None, one.dataset)), None)
    if setting is None:
        names = ", ".join(one.dataset for one in found)
        msg = f"primary: data set is {asked.dataset!r}; the run holds {names}; name one of them and sweep again"
        raise ResultsError(msg)
    if asked.head not in (None, setting.head):
        # a head may read other noise levels or poolings than the first one does
        read = [one for one in settings(frame[frame["head"] == asked.head]) if one.dataset == setting.dataset]
        if not read:
            msg = f"primary: head is {asked.head!r}; the run holds none of this name; name another and sweep again"
            raise ResultsError(msg)
        setting = read[0]
    rows = reported_rows(narrow(frame, setting))
    if asked.backbone is None:
        model = next(reversed(dumped_models(rows)), None)
    else:
        own = rows[rows["backbone"] == asked.backbone]
        model = next(iter(trained_models(own, every_length=True)), None)
        if model is None:
            msg = f"primary: backbone is {asked.backbone!r}; the run holds none; name another and sweep again"
            raise ResultsError(msg)
    return Endpoint(setting, model, ALL_LAYERS if asked.layers == "all" else CHOSEN, asked != Primary())


@dataclass(frozen=True)
class Cells:
    """What was tried on the test pairs of a data set.

    Attributes
    ----------
    tried
        Test accuracies in the run: every head on features, trained backbones and controls.
    beside
        And those of refits, altered features, baselines and scores from elsewhere.
    where
        The highest of the trained ones, in words.
    best
        That one, corrected for having been looked for among all trained ones; None where there are no two.
    """

    tried: int
    beside: int
    where: str
    best: BestOf | None


def cells_tried(frame: pd.DataFrame, setting: Setting, verdicts: Verdicts, *, level: float, resamples: int) -> Cells:
    """Count the test accuracies of a data set, and correct the highest one for their number.

    Parameters
    ----------
    frame
        Tidy frame of the run.
    setting
        Its data set and protocol count.
    verdicts
        Of its data set.
    level, resamples
        Of the interval.
    """
    every = reported_rows(frame)
    every = every[(every["dataset"] == setting.dataset) & (every["protocol"] == setting.protocol)]
    every = every[every["accuracy"].notna() & ~every["altered"].str.startswith("nested:")]  # outer folds are no test
    rows = probed(every)
    beside = len(every) - len(rows)
    trained = rows[rows["control"] == "trained"]
    right = verdicts.right(list(trained["record_id"])) if len(trained) > 1 else pd.DataFrame()
    if right.empty:
        return Cells(len(rows), beside, "", None)
    groups, weights = verdicts.groups_and_weights(right)
    if len(set(groups)) < 2:
        return Cells(len(rows), beside, "", None)
    best = best_of_many(right.to_numpy().T, groups, weights=weights, n_boot=resamples, level=level)
    row = trained.iloc[best.best]
    return Cells(len(rows), beside, f"{row['backbone']}, layers {row['layer_set']}, head {row['head']}", best)
