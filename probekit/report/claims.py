"""Claims about layers, size and training, each taken to supported, contradicted or undetermined on the stored margins.

Every row is one contrast of accuracies on the same test pairs: an estimate with its interval, and what it stands
against. It is *supported* if the interval lies above zero and its p stays within the level after Holm's correction for
the rows of the same question (backbones), *contradicted* if it lies below, and otherwise *undetermined*; beside it
stands the number of test pairs that would decide if the effect were as large as it looks. What the run cannot speak to
is undetermined, with the reason.

All contrasts use one bootstrap: data with equally many groups share their resamples. Where the run holds refits on
halves of the training groups, intervals and p cover other training pairs too; without them rows are about the fitted
heads, and say so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit.report.claim import LARGER, Claim, because
from probekit.report.contrasts import Judge
from probekit.report.effects import Effect, Verdicts
from probekit.report.primary import Cells, Endpoint, cells_tried, find_primary
from probekit.report.select import Setting, narrow, settings
from probekit.results import check_finished, load_config, load_results
from probekit.stats import holm
from probekit.stats.selection import POINT


@dataclass(frozen=True)
class Claims:
    """Everything that a run lets one claim.

    Attributes
    ----------
    run
        Its folder.
    level
        Of intervals and tests.
    endpoint, primary
        The primary endpoint and its accuracy, None where the run has none.
    cells
        What was tried, by data set.
    rows
        The table.
    """

    run: Path
    level: float
    endpoint: Endpoint
    primary: Effect | None
    cells: dict[str, Cells]
    rows: tuple[Claim, ...]

    def subject(self, dataset: str) -> str:
        """Label of the backbone that is spoken of first: that of the endpoint, else the last one of the data set."""
        known = [row.subject for row in self.of(dataset) if row.claim != LARGER]
        primary = self.endpoint.model.label if self.endpoint.model else ""
        return primary if primary in known else known[-1] if known else ""

    def of(self, dataset: str) -> list[Claim]:
        """Rows of one data set."""
        return [row for row in self.rows if row.dataset == dataset]


def make_claims(run: str | Path) -> Claims:
    """Judge the claims on every data set of a run, from its results and stored margins.

    Parameters
    ----------
    run
        Folder that ``probekit sweep`` wrote.

    Raises
    ------
    ResultsError
        If the run is not finished or has no margins, or its primary endpoint names what it does not hold.
    """
    run = Path(run)
    check_finished(run)
    frame = load_results(run)
    sweep = load_config(run).get("sweep")
    options: Mapping[str, Any] = sweep if isinstance(sweep, dict) else {}
    level, resamples = float(options.get("level", 0.95)), int(options.get("resamples", 2000))
    endpoint = find_primary(frame, options)
    primary, cells, rows = None, {}, []
    for setting in shown_settings(frame, endpoint):
        verdicts = Verdicts(run, setting.protocol, dataset=setting.dataset, level=level, resamples=resamples)
        if setting == endpoint.setting:
            primary = endpoint.accuracy(frame, verdicts)
        cells[setting.dataset] = cells_tried(frame, setting, verdicts, level=level, resamples=resamples)
        rows += claims_of(frame, setting, verdicts, layers=endpoint.layers, level=level, resamples=resamples)
    return Claims(run, level, endpoint, primary, cells, tuple(rows))


def shown_settings(frame: pd.DataFrame, endpoint: Endpoint) -> list[Setting]:
    """Return the setting of each data set, on the primary one that of the endpoint."""
    of = endpoint.setting
    return [of if setting.dataset == of.dataset else setting for setting in settings(frame)]


def claims_of(
    frame: pd.DataFrame, setting: Setting, verdicts: Verdicts, *, layers: str, level: float, resamples: int
) -> list[Claim]:
    """Judge the claims on one data set.

    Parameters
    ----------
    frame
        Tidy frame of the run.
    setting
        Data set, head and the rest; its draws and noise levels are not mixed.
    verdicts
        Of the data set.
    layers
        `CHOSEN` or `ALL_LAYERS`: what claims about size and training compare.
    level, resamples
        Of intervals and tests.
    """
    seen = frame[
        (frame["head_kind"] == "inputs") & (frame["dataset"] == setting.dataset) & (frame["slice_by"] == "all")
    ]
    rows = pd.concat([narrow(frame, setting), seen[seen["protocol"] == setting.protocol]])
    judge = Judge(rows, setting.dataset, verdicts, layers, level, resamples)
    found = [*judge.depth(), *judge.combining(), *judge.size(), *judge.trained(), *judge.inputs(), *judge.decline()]
    return _corrected(found, level)


def _corrected(rows: Sequence[Claim], level: float) -> list[Claim]:
    """Correct the p of rows that ask the same of several backbones, and take back verdicts that do not survive it."""
    asked: dict[tuple[str, ...], list[int]] = {}
    for place, row in enumerate(rows):
        if not np.isnan(row.p):
            alone = (row.about, row.subject) if row.claim == LARGER else ()  # each row there is a quantity of its own
            asked.setdefault((row.claim, row.quantity, *alone), []).append(place)
    found = list(rows)
    for places in asked.values():
        for place, p in zip(places, holm(np.array([rows[place].p for place in places])), strict=True):
            row = replace(rows[place], p_adjusted=float(p))
            if row.verdict != "undetermined" and p > 1 - level:
                text = (
                    f"not after correction for {len(places)} backbones (p {p:.2g})" if len(places) > 1 else f"p {p:.2g}"
                )
                row = because(replace(row, verdict="undetermined"), text)
            elif row.low <= 0 <= row.high:
                near = f", and lies within {100 * POINT:g} point of it" * bool(max(-row.low, row.high) <= POINT)
                row = because(row, f"the interval contains zero{near}")
            found[place] = row
    return found
