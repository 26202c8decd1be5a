"""Accuracy against depth at every noise level, draw and pooling: a panel for each backbone, a line for each level."""

from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from probekit.report.figures import depth_panels
from probekit.report.marks import curve, figure_legend, in_percent, levels
from probekit.report.points import depth_points
from probekit.report.select import Setting, narrow, settings
from probekit.report.style import MUTED, colours, look
from probekit.report.tables import LEVELS


def levels_points(frame: pd.DataFrame, *, setting: Setting | None = None) -> pd.DataFrame:
    """Depth points of the trained backbones at every level at which the head of the setting was fitted.

    ``level`` names noise level, draw and pooling as far as there are several. Imported features have none of them.
    """
    setting = setting or settings(frame)[0]
    rows = narrow(frame, setting, any_level=True)
    rows = rows[~rows["imported"] & (rows["control"] == "trained")]
    several = [column for column in LEVELS if rows[column].nunique() > 1]
    found = []
    for sigma, draw, pooling in rows[list(LEVELS)].drop_duplicates().itertuples(index=False, name=None):
        there = replace(setting, sigma=sigma, draw=draw, pooling=pooling)
        told = {"sigma": f"sigma {sigma}", "draw": f"draw {draw}", "pooling": pooling}
        name = ", ".join(told[column] for column in several).replace("+", " + ")
        found.append(depth_points(rows, setting=there).assign(level=name))
    points = pd.concat(found, ignore_index=True) if found else depth_points(rows, setting=setting).assign(level="")
    drawn = points[points["layers"] == "single"]["level"].unique()
    return points[points["level"].isin(drawn) & (points["layers"] != "output point")].reset_index(drop=True)


def levels_figure(frame: pd.DataFrame, *, setting: Setting | None = None, level: float = 0.95) -> Figure:
    """Test accuracy against relative depth, a line for each noise level, draw and pooling; without intervals.

    Parameters
    ----------
    frame
        Rows of `probekit.results.load_results`, of all settings.
    setting
        Data set and head to draw; default: those of the first of the run.
    level
        Of intervals, which are not drawn here.
    """
    points = in_percent(levels_points(frame, setting=setting), "levels")
    models, names = list(points["model"].unique()), list(points["level"].unique())
    palette = dict(zip(names, colours(len(names)), strict=True))
    with look():
        figure, panels = depth_panels(len(models), points)
        for axes, model in zip(panels, models, strict=True):
            axes.set_title(model)
            for name, colour in palette.items():
                mine = points[(points["model"] == model) & (points["level"] == name)]
                curve(axes, mine, colour, width=1.4, marker=True)
                levels(axes, mine, colour, line=False)
                chosen = mine[mine["chosen"]]
                ring = {"color": colour, "markerfacecolor": "white", "markersize": 6.0, "zorder": 5}
                axes.plot(chosen["relative_depth"], chosen["accuracy"], "o", **ring)
        handles = [Line2D([], [], color=palette[name], linewidth=1.7, label=name) for name in names]
        ring = {"marker": "o", "markerfacecolor": "white", "markersize": 6, "linestyle": ""}
        handles.append(Line2D([], [], color=MUTED, label="chosen on validation", **ring))
        if (points["layers"] != "single").any():
            mark = {"marker": "D", "markersize": 4, "linestyle": ""}
            handles.append(Line2D([], [], color=MUTED, label="all layers together", **mark))  # type: ignore[arg-type]
        figure_legend(figure, handles, columns=4 if max(map(len, names)) <= 16 else 3)
    return figure
