"""Plain facts of a run, for `inspect` and the end of a sweep."""

from pathlib import Path
from typing import Any

import pandas as pd

from probekit._types import RESOLVED_RATIO
from probekit.results.columns import UNPROBED, as_they_are
from probekit.results.run import check_finished, load_config, load_results
from probekit.stats import Expectations


def describe_run(run: str | Path) -> dict[str, Any]:
    """Plain facts of a run for ``inspect``: what was fitted, and the test accuracy of the chosen layers.

    Raises
    ------
    ResultsError
        If the run is not finished or its results are damaged.
    """
    check_finished(run)
    frame = as_they_are(load_results(run))
    test = frame[(frame["split"] == "test") & (frame["slice_by"] == "all")]
    beside = test[test["head_kind"].isin(UNPROBED)]
    frame, test = (rows[~rows["head_kind"].isin(UNPROBED)] for rows in (frame, test))
    shown = [
        "backbone",
        "control",
        "dataset",
        "sigma",
        "draw",
        "pooling",
        "head",
        "seed",
        "layer_set",
        "accuracy",
        "low",
        "high",
        "converged",
    ]
    unresolved = frame.loc[frame["sigma_ratio"] < RESOLVED_RATIO, ["backbone", "control", "sigma", "sigma_ratio"]]
    return {
        "path": str(run),
        "records": int(frame["record_id"].nunique()),
        "fits": frame.drop_duplicates("record_id").groupby("head", sort=False).size().to_dict(),
        **{
            f"{column}s": sorted(frame[column].unique().tolist())
            for column in ("dataset", "protocol", "sigma", "draw", "pooling", "backbone", "control", "head")
        },
        "splits": load_config(run).get("splits", {}),
        "left_out": load_config(run).get("left_out", {}),
        "unresolved": unresolved.drop_duplicates().to_dict("records"),
        "test_pairs": int(test["n_pairs"].max()) if len(test) else 0,
        "chosen": test.loc[test["chosen"], shown].to_dict("records"),
        "scorers": beside[["backbone", "control", "dataset", "protocol", "accuracy", "low", "high"]].to_dict("records"),
    }


def knowing_nothing(rows: pd.DataFrame) -> str:
    """Say what scorers that know nothing get, of the row with the most pairs; empty where no pair was scored."""
    known = rows[rows["expected_random"].notna()].sort_values("n_pairs", kind="stable")
    columns = ["expected_random", "expected_constant", "expected_first"]
    return str(Expectations(*known[columns].iloc[-1])) if len(known) else ""


def knowing_nothing_lines(run: str | Path) -> list[tuple[str, str]]:
    """Say this of the test pairs of each data set of a run, by the protocol of its heads, as (heading, text)."""
    frame = as_they_are(load_results(run))
    test = frame[(frame["split"] == "test") & (frame["slice_by"] == "all") & ~frame["head_kind"].isin(UNPROBED)]
    return [
        (f"knowing nothing, {dataset}", f"{text}; by {protocol} on {rows['n_pairs'].max():,} test pairs")
        for (dataset, protocol), rows in test.groupby(["dataset", "protocol"], sort=False)
        if (text := knowing_nothing(rows))
    ]
