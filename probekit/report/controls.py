"""Refits and altered features in the report: their table, and accuracy against training pairs."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from probekit.diagnostics import marked
from probekit.report import style
from probekit.report.marks import figure_legend, in_percent, unconverged_handles
from probekit.report.select import Setting
from probekit.report.style import look, new_figure, percent_axis
from probekit.report.tables import NONE, interval, percent, points
from probekit.results import ALTERED, load_controls

if TYPE_CHECKING:
    Column = pd.Series[Any]
else:  # the subscript exists for type checkers only
    Column = pd.Series

_KEYS = ["backbone", "control", "layer_set", "combination"]


def control_rows_of(run: Path, setting: Setting, whole: pd.DataFrame, *, datasets: Collection[str]) -> pd.DataFrame:
    """Rows of a setting for chosen layers and the widest set of each backbone, with `fit`, accuracy and pairs as it is.

    Parameters
    ----------
    run, setting
        The run, and the setting of the figures.
    whole
        Test rows of its fits as they are.
    datasets
        Data sets that the run tests on. Outer folds are of those that it is fitted on; where these are no others, they
        are shown with each.
    """
    rows = load_controls(run)
    rows = rows[~rows["altered"].str.startswith("source:")]  # these make a matrix of their own
    folds = rows["altered"].str.startswith("nested:") & ~rows["dataset"].isin(datasets)
    rows = rows[(rows["dataset"] == setting.dataset) | folds]
    for key in ("protocol", "sigma", "draw", "pooling", "head"):
        rows = rows[rows[key] == getattr(setting, key)]
    most = rows.groupby(["backbone", "control"])["n_layers"].transform("max")
    shown = rows[rows["chosen"] | ((rows["n_layers"] == most) & (most > 1))]
    asis = whole[["record_id", "accuracy", "low", "high", "n_train", "train_accuracy", "head_parameters", "converged"]]
    return shown.merge(asis, on="record_id", how="left", suffixes=("", "_as_it_is"))


def altered_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Show `control_rows_of`: each kind of what is altered, beside the fit as it is."""
    table, several = [], rows["dataset"].nunique() > 1
    for row in rows.to_dict("records"):
        kind, _, parameter = row["altered"].partition(":")
        entry: dict[str, Any] = {
            "Backbone": f"{row['backbone']}" + f" ({row['control']})" * (row["control"] != "trained"),
            "Layers": _layers(row),
            "Altered": f"{ALTERED[kind]}: {parameter}".removesuffix(": ")
            + f"\n{row['n_fits']} fits" * (row["n_fits"] > 1)
            + f"\nof {row['dataset']}" * (kind == "nested" and several),
            "Training pairs": f"{row['n_train']:,}",
            "As it is": marked(percent(row["accuracy_as_it_is"]), row["converged_as_it_is"] is not False, before="\n"),
            "Training, as it is": percent(row["train_accuracy_as_it_is"]),
            "Training": marked(percent(row["train_accuracy"]), row["converged"], before="\n"),
            "Test accuracy": marked(percent(row["accuracy"]), row["converged"], before="\n"),
            "Interval": interval(row["low"], row["high"]),
            "SE over pairs": _error(row["se_test"]),
            "SE over training": _error(row["se_train"]),
            "SE of both": _error(row["se"]) if kind == "half" else NONE,
            "Difference": NONE,
        }
        if row["against"]:
            told = interval(row["difference_low"], row["difference_high"], signed=True)
            named = f" ({row['selected'].partition(':')[0]})" * bool(row["selected"])
            entry["Difference"] = f"{points(row['difference'])} {told}\nto {row['against']}{named}"
        table.append(entry)
    return pd.DataFrame(table)


def _layers(row: dict[Any, Any]) -> str:
    if row["altered"].startswith("nested:"):
        return f"chosen in each fold, times\n{row['selected']}"
    return f"{row['layer_set']} (chosen)" if row["chosen"] else f"{row['n_layers']} together"


def _error(value: float) -> str:
    return NONE if pd.isna(value) else f"{100 * value:.1f}"


def efficiency_points(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy against training pairs: shares of the training groups, and the fit as it is; empty without shares."""
    return _points(rows, "share", "n_train", rows["n_train"], rows["n_train_as_it_is"])


def dimension_points(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy against dimension: means over random projections, and all fitted channels; empty without projections."""
    number = pd.to_numeric(rows["altered"].str.extract(r"^projected:(\d+)$")[0])
    return _points(rows, "projected", "channels", number, rows["head_parameters"])


def _points(rows: pd.DataFrame, kind: str, x: str, at: Column, whole: Column) -> pd.DataFrame:
    """Rows of one kind at some places on the x axis, and the fits as they are at theirs."""
    rows = rows.assign(**{x: at, f"{x}_as_it_is": whole})
    part = rows[rows["altered"].str.startswith(f"{kind}:")]
    part = part.assign(layers=["chosen layer" if chosen else "widest set" for chosen in part["chosen"]])
    last = part.drop_duplicates(_KEYS).copy()
    for name in (x, "accuracy", "low", "high", "train_accuracy", "converged"):
        last[name] = last[f"{name}_as_it_is"]
    columns = [*_KEYS, "layers", x, "accuracy", "low", "high", "train_accuracy", "converged"]
    found = pd.concat([part, last])[columns].astype({x: "int64"})
    return found.sort_values([*_KEYS, x], kind="stable", ignore_index=True)


def lines_figure(drawn: pd.DataFrame, x: str, title: str) -> Figure:
    """Draw points over column `x`: one panel for chosen layers, one for the widest sets."""
    drawn = in_percent(drawn, x)
    kinds = sorted(drawn["layers"].unique())
    names = drawn["backbone"] + (" (" + drawn["control"] + ")").where(drawn["control"] != "trained", "")
    rules = drawn[drawn["combination"] != "single"].groupby("backbone")["combination"].transform("nunique")
    names += (", " + drawn["combination"]).where(rules.reindex(drawn.index).gt(1), "")
    drawn = drawn.assign(name=names)
    colours = dict(zip(names.unique(), style.colours(names.nunique()), strict=True))
    with look():
        figure = new_figure(style.WIDTH, 3.2)
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            percent_axis(axes, pd.concat([drawn["low"], drawn["high"]]))
            for name, mine in drawn[drawn["layers"] == kind].groupby("name", sort=False):
                dashed = "-" if (mine["control"] == "trained").all() else "--"
                axes.fill_between(mine[x], mine["low"], mine["high"], color=colours[name], alpha=0.12, lw=0)
                axes.plot(mine[x], mine["accuracy"], dashed, color=colours[name], marker="o", markersize=3, label=name)
            axes.set_title(kind)
            ticks = sorted(map(float, drawn.loc[drawn["layers"] == kind, x].unique()))
            style.log_axis(axes, ticks, [f"{tick:,.0f}" for tick in ticks])
        panels[0].set_ylabel("Test accuracy (%)")
        figure.supxlabel(title, fontsize=8)
        shown = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        handles = [*(shown[name] for name in colours), *unconverged_handles(drawn)]
        figure_legend(figure, handles, columns=3)
    return figure


def control_figures(rows: pd.DataFrame, *, level: float) -> Iterator[tuple[str, str, Figure, pd.DataFrame, str]]:
    """Name, title, figure, points and caption of each figure that `control_rows_of` gives rise to."""
    found = efficiency_points(rows)
    if len(found):
        caption = (
            "Test accuracy of heads that were fitted on nested parts of the training groups, each with a strength of"
            f" its own; the last point is the fit as it is. Bands: {100 * level:g} % intervals over test pairs, with"
            " these training pairs held fixed. The layer is the one that was chosen on all training pairs."
        )
        figure = lines_figure(found, "n_train", "Training pairs")
        yield "efficiency", "Accuracy against training pairs", figure, found, caption
    found = dimension_points(rows)
    if len(found):
        caption = (
            "Test accuracy of heads on random projections of the channels: means over ten draws, with"
            f" {100 * level:g} % intervals over draws and test pairs; the last point is the head on all channels, its"
            " interval over test pairs. What many channels hold together may be lost in few: no projection is a fair"
            " comparison of widths."
        )
        figure = lines_figure(found, "channels", "Channels")
        yield "dimension", "Accuracy against dimension", figure, found, caption
