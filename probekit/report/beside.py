"""What stands beside the heads: baselines without a backbone, slices of the test pairs, and gains over generators."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from probekit.diagnostics import marked
from probekit.report.select import (
    CHOSEN,
    Model,
    Setting,
    layer_rows,
    narrow,
    reported_rows,
    trained_models,
    trained_rows,
)
from probekit.report.tables import NONE, accuracy_text, interval, percent, points
from probekit.results import SLICES, load_beyond, load_margins
from probekit.stats import right_with_a_coin

_SLICINGS = {"same_generator": "", "generators": "Generators", "vote_share": "Votes", "images": "Pictures compared"}
_SAME = {
    "same": "Pictures of one generator",
    "different": "Pictures of two generators",
    "unknown": "Unknown generators",
}
_MOST_MODELS = 6
_SEES = {"metadata": "no picture", "inputs": "what enters the backbone"}  # by kind of head


def baselines_table(run: Path, frame: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """Return one row for each baseline of the data set, in the order of the run.

    Parameters
    ----------
    run
        Where the margins are.
    frame
        All rows of the run.
    setting
        Its data set and protocol count; noise, pooling and head are nothing to a baseline.
    """
    rows = reported_rows(frame[frame["head_kind"].isin(_SEES)])
    rows = rows[(rows["dataset"] == setting.dataset) & (rows["protocol"] == setting.protocol)]
    table = []
    for row in rows.to_dict("records"):
        silent, coin = _with_coin(run, row["record_id"], setting.dataset)
        table.append(
            {
                "Baseline": row["backbone"],
                "Sees": _SEES[row["head_kind"]],
                "Fitted": "no" if row["head"] == "rule" else "yes",
                "Test accuracy": marked(percent(row["accuracy"]), row["converged"], before="\n"),
                "Interval": interval(row["low"], row["high"]),
                "Says nothing about": f"{percent(silent)} % of pairs",
                "With a coin there": percent(coin),
                "Training": percent(row["train_accuracy"]),
                "Pairs": f"{row['n_pairs']:,}",
            }
        )
    return pd.DataFrame(table)


def _with_coin(run: Path, record_id: str, dataset: str) -> tuple[float, float]:
    """Share of decided test pairs that a baseline gives a margin of 0, and what is right if a coin decides them.

    Pairs weigh alike, also where the protocol is a mean over prompts.
    """
    margins = load_margins(run, [record_id])
    test = margins[(margins["split"] == "test") & (margins["dataset"] == dataset) & (margins["label"] != 0.5)]
    right = right_with_a_coin(test["margin"].to_numpy(), test["label"].to_numpy())
    return float((test["margin"] == 0).mean()), float(right.mean())


def slices_table(frame: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """Test accuracy of the validation-chosen layers on every slice of the pairs; kinds of the file are drawn instead.

    Parameters
    ----------
    frame, setting
        All rows of the run, and the setting of the figures.
    """
    rows = narrow(frame, setting, slices=True)
    rows = rows[(rows["split"] == "test") & rows["slice_by"].isin(SLICES) & (rows["slice_by"] != "source")]
    models = trained_models(rows)[-_MOST_MODELS:]
    table = []
    for slicing, title in _SLICINGS.items():
        part = rows[rows["slice_by"] == slicing]
        for value in _SAME if slicing == "same_generator" else part["source"].unique():
            here = part[part["source"] == value]
            if here.empty:
                continue
            first = here.iloc[0]
            entry = {
                "Slice": f"{title}: {value}" if title else _SAME[value],
                "Pairs": f"{first['n_pairs']:,}",
                "Ties": f"{first['true_ties']:,}",
            }
            for model in models:
                entry[model.label] = accuracy_text(trained_rows(layer_rows(here, CHOSEN), model))
            table.append(entry)
    return pd.DataFrame(table)


def beyond_rows(run: Path, frame: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """Gains of the chosen layers over the generators' names, with ``backbone`` and ``control``; empty where unknown."""
    rows = reported_rows(narrow(frame, setting))
    rows = rows.loc[rows["chosen"], ["record_id", "backbone", "control", "layer", "accuracy", "converged"]]
    gains = load_beyond(run)
    return rows.merge(gains[gains["dataset"] == setting.dataset], on="record_id")


def beyond_table(gains: pd.DataFrame) -> pd.DataFrame:
    """Show `beyond_rows`: the generators' names alone, with the chosen layer, and the paired difference."""
    return pd.DataFrame(
        {
            "Backbone": row["backbone"],
            "Condition": row["control"].replace("+", " + "),
            "Layer": str(row["layer"]),
            "Names alone": percent(row["accuracy_generator"]),
            "Names and layer": marked(percent(row["accuracy_both"]), row["converged"], before="\n"),
            "Gain": points(row["difference"]),
            "Paired interval": interval(row["low"], row["high"], signed=True),
            "Detectable": f"{100 * row['detectable']:.1f}",
            "Pairs": f"{row['n_pairs']:,}",
            "Without a generator logit": f"{row['n_same']:,}",
        }
        for row in gains.to_dict("records")
    )


def found_beside(frame: pd.DataFrame, setting: Setting, baselines: pd.DataFrame, gains: pd.DataFrame) -> list[str]:
    """Headline sentences: pairs of one generator, the gain over generators' names, and the baselines."""
    sentences: list[str] = []
    models: Sequence[Model] = trained_models(narrow(frame, setting))[-1:]
    for model in models:
        rows = narrow(frame, setting, slices=True)
        here = rows[(rows["split"] == "test") & (rows["slice_by"] == "same_generator") & (rows["source"] == "same")]
        for row in trained_rows(layer_rows(here, CHOSEN), model).head(1).to_dict("records"):
            if row["n_pairs"]:
                sentences.append(
                    f"On the {row['n_pairs']:,} test pairs whose pictures come from one generator, the chosen layer of"
                    f" {row['backbone']} reads"
                    f" {marked(percent(row['accuracy']) + ' %', row['converged'])}"
                    f" {interval(row['low'], row['high'])}."
                )
        mine = gains[(gains["control"] == "trained") & gains["backbone"].isin(model.backbones)]
        for row in mine.head(1).to_dict("records"):
            sentences.append(
                f"The generators' names alone decide {percent(row['accuracy_generator'])} % of the test pairs rightly"
                f" (a coin where they say nothing); with the chosen layer of {row['backbone']} it is"
                f" {marked(percent(row['accuracy_both']) + ' %', row['converged'])}, a gain of"
                f" {points(row['difference'])} points"
                f" {interval(row['low'], row['high'], signed=True)}."
            )
    for sees in dict.fromkeys(baselines["Sees"]) if len(baselines) else ():
        known = baselines[(baselines["Sees"] == sees) & (baselines["With a coin there"] != NONE)]
        if len(known):
            best = known.iloc[int(known["With a coin there"].astype(float).argmax())]
            sentences.append(
                f"Of baselines that see {sees} ({len(known)}) the highest reads {best['With a coin there']} %"
                f" ({best['Baseline']}), a coin deciding where it says nothing."
            )
    return sentences
