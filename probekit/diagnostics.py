"""What fits say of themselves: warnings that reports and sweeps share, and the mark of a fit that did not converge."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from probekit.results import UNPROBED, set_label

UNCONVERGED = "not converged"
"""The mark beside every number of a fit that did not converge."""
_NAMED = 4


def marked(text: str, *converged: bool | np.bool_, before: str = ", ") -> str:
    """Put the mark behind a number unless every fit behind it converged."""
    return text if all(converged) else f"{text}{before}{UNCONVERGED}"


def fit_warnings(records: pd.DataFrame, grids: Mapping[str, Sequence[float]] | None = None) -> list[str]:
    """List what the fits of some records warn of; of long lists the first few are named.

    Parameters
    ----------
    records
        Rows of `probekit.results.RESULT_COLUMNS`, one for each record.
    grids
        Candidate strengths of linear heads by name, where known: a strength at the upper end says something else than
        one at the lower end.
    """
    dropped = records[records["n_dropped"] > 0]
    found = [
        *_strengths(records[records["edge_of_grid"]], grids or {}),
        counted(
            records[~records["converged"]],
            "did not converge (every number of such a fit is marked; an MLP that was still improving at its last epoch"
            " needs a larger max_epochs in the configuration)",
        ),
        counted(
            records[records["n_less_than_d"]],
            "had fewer training pairs than channels, so that a weak penalty fits all of them; their training accuracy"
            " says nothing",
        ),
        counted(
            dropped,
            f"left out channels that do not vary, or by no more than rounding in the store (up to"
            f" {int(dropped['n_dropped'].max()) if len(dropped) else 0:,})",
        ),
        counted(
            records[records["matrix_free"]],
            "were fitted without a factorisation, for want of memory: by more iterations, to the same optimum",
        ),
        counted(
            records[(records["head_parameters"] == 0) & ~records["head_kind"].isin(UNPROBED)],
            "had nothing to fit, since no training pair differs there (such as text before it meets the image)",
        ),
    ]
    return [text for text in found if text]


def counted(records: pd.DataFrame, what: str) -> str:
    """Say in a sentence how many heads, and name the first few; empty without any."""
    if records.empty:
        return ""
    shown = {"head": "{}", "sigma": "sigma {}", "seed": "seed {}"}  # where there are several
    several = [column for column in shown if records[column].nunique() > 1]
    first = records.head(_NAMED).to_dict("records")
    names = [
        f"{row['backbone']} ({row['control']}) layers {set_label(_short(row['layer_set']), row['combination'])}"
        + "".join(f", {shown[column].format(row[column])}" for column in several)
        for row in first
    ]
    more = f" and {len(records) - _NAMED} more" if len(records) > _NAMED else ""
    return f"{len(records)} {'heads' if len(records) > 1 else 'head'} {what}: {'; '.join(names)}{more}."


def _strengths(records: pd.DataFrame, grids: Mapping[str, Sequence[float]]) -> list[str]:
    """Split the strengths at the edge of their grid by the edge, where the grid is known."""
    largest = [max(grids.get(head, ()), default=float("nan")) for head in records["head"]]
    known = ~np.isnan(largest) & records["strength"].notna().to_numpy()  # late fusion has one for each layer
    top = np.isclose(records["strength"], largest)
    return [
        counted(records[top], "chose the largest strength of the grid; a wider grid may fit better"),
        counted(
            records[known & ~top],
            "chose the smallest strength of the grid (found next to nothing to fit; usual at chance level)",
        ),
        counted(records[~known], "chose a strength at the edge of the grid; a wider grid may fit better"),
    ]


def _short(layer_set: str) -> str:
    layers = layer_set.split("+")
    return layer_set if len(layers) < 4 else f"{layers[0]}+\N{HORIZONTAL ELLIPSIS}+{layers[-1]}"
