"""How heads do on data sets that they were not fitted on: a matrix from the results of one run, or of several."""

from collections.abc import Sequence

import pandas as pd

from probekit.report.select import Setting, narrow
from probekit.report.tables import NONE, interval, percent
from probekit.results import ALL_SOURCES, FIT_KEYS, UNPROBED, as_they_are


def transfer_points(frame: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy of the chosen layers on every data set and kind of pair, by what the heads were fitted on.

    Frames of several runs, fitted on different data, may be concatenated into one matrix. A head is fitted, and its
    layer chosen, on ``trained_on`` alone. Where a head was also fitted on single sources (``sources`` of its controls),
    these are at the same layer.

    Parameters
    ----------
    frame
        Tidy frame of `probekit.results.load_results`.

    Returns
    -------
    pandas.DataFrame
        ``trained_on, fitted_source, dataset, source``, the setting, ``layer, accuracy, low, high, n_pairs``; source
        ``all`` is the whole data set.
    """
    rows = frame[~frame["head_kind"].isin(UNPROBED) & (frame["control"] == "trained")]
    rows = rows[(rows["split"] == "test") & rows["slice_by"].isin(("all", "source"))]
    chosen = as_they_are(rows[rows["chosen"]])
    alone = rows[rows["altered"].str.startswith("source:")].merge(chosen[[*FIT_KEYS, "dataset"]].drop_duplicates())
    rows = pd.concat(
        [
            chosen.assign(fitted_source=ALL_SOURCES),
            alone.assign(fitted_source=alone["altered"].str.removeprefix("source:")),
        ]
    )
    columns = [
        "trained_on",
        "fitted_source",
        "dataset",
        "source",
        "backbone",
        "head",
        "seed",
        "sigma",
        "draw",
        "pooling",
        "layer",
    ]
    return rows[[*columns, "accuracy", "low", "high", "n_pairs"]].reset_index(drop=True)


def transfer_table(frame: pd.DataFrame, settings: Sequence[Setting]) -> pd.DataFrame:
    """Matrix of data sets: what heads were fitted on against what they are tested on; empty where there is one only."""
    if frame["dataset"].nunique() < 2 and frame["trained_on"].nunique() < 2:
        return pd.DataFrame()
    found = transfer_points(pd.concat([narrow(frame, setting) for setting in settings]))
    found = found[(found["source"] == ALL_SOURCES) & (found["fitted_source"] == ALL_SOURCES)]
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


def sources_table(frame: pd.DataFrame, setting: Setting, backbone: str) -> pd.DataFrame:
    """Matrix of sources: what the head on the chosen layer was fitted on against the pairs it is tested on.

    Parameters
    ----------
    frame
        All rows of the run.
    setting, backbone
        Of which heads; empty where none was fitted on single sources.
    """
    found = transfer_points(frame)
    found = found[(found["backbone"] == backbone) & found["accuracy"].notna()]
    for name in ("dataset", "sigma", "draw", "pooling", "head"):
        found = found[found[name] == getattr(setting, name)]
    if found["fitted_source"].nunique() < 2:
        return pd.DataFrame()
    columns = [ALL_SOURCES, *(name for name in found["source"].unique() if name != ALL_SOURCES)]
    cells = {
        (row["fitted_source"], row["source"]): f"{percent(row['accuracy'])}\n{interval(row['low'], row['high'])}"
        for row in found.to_dict("records")
    }
    return pd.DataFrame(
        {"Fitted on": fitted} | {name: cells.get((fitted, name), NONE) for name in columns}
        for fitted in found["fitted_source"].unique()
    )
