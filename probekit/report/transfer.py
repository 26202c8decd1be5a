"""How heads do on data sets that they were not fitted on: a matrix from the results of one run, or of several."""

from collections.abc import Sequence

import pandas as pd

from probekit.report.select import Setting, narrow, probed
from probekit.report.tables import NONE, interval, percent
from probekit.results import ALL_SOURCES


def transfer_points(frame: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy of the chosen layers on every data set and kind of pair, by what the heads were fitted on.

    Frames of several runs, fitted on different data, may be concatenated into one matrix. A head is fitted, and its
    layer chosen, on ``trained_on`` alone.

    Parameters
    ----------
    frame
        Tidy frame of `probekit.results.load_results`.

    Returns
    -------
    pandas.DataFrame
        ``trained_on, dataset, source``, the setting, ``layer, accuracy, low, high, n_pairs``; source ``all`` is the
        whole data set.
    """
    rows = probed(frame)
    rows = rows[(rows["split"] == "test") & rows["slice_by"].isin(("all", "source"))]
    rows = rows[rows["chosen"] & (rows["control"] == "trained")]
    columns = ["trained_on", "dataset", "source", "backbone", "head", "seed", "sigma", "draw", "pooling", "layer"]
    return rows[[*columns, "accuracy", "low", "high", "n_pairs"]].reset_index(drop=True)


def transfer_table(frame: pd.DataFrame, settings: Sequence[Setting]) -> pd.DataFrame:
    """Matrix of data sets: what heads were fitted on against what they are tested on; empty where there is one only."""
    if frame["dataset"].nunique() < 2 and frame["trained_on"].nunique() < 2:
        return pd.DataFrame()
    found = transfer_points(pd.concat([narrow(frame, setting) for setting in settings]))
    found = found[found["source"] == ALL_SOURCES]
    table = []
    for (backbone, head, fitted), rows in found.groupby(["backbone", "head", "trained_on"], sort=False):
        entry = {"Backbone": backbone, "Head": head, "Fitted on": str(fitted).replace("+", " + ")}
        for dataset in found["dataset"].unique():
            here = rows[rows["dataset"] == dataset].to_dict("records")
            entry[dataset] = (
                f"{percent(here[0]['accuracy'])}\n{interval(here[0]['low'], here[0]['high'])}" if here else NONE
            )
        table.append(entry)
    return pd.DataFrame(table)
