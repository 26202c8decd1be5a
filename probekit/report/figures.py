"""Figures over depth: one panel for each backbone, and one for each kind of pair. Pure functions of the tidy frame."""

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from probekit.report import style
from probekit.report.marks import (
    OUTPUT_MARKER,
    control_handles,
    curve,
    figure_legend,
    in_percent,
    levels,
    mark_at,
    name_chosen,
    name_only,
    output_point,
    plateau_handles,
    plateau_marks,
    random_curves,
    right_end,
    short_name,
    unconverged_handles,
)
from probekit.report.points import ONE_HEAD, depth_points, kinds_points
from probekit.report.select import OUTPUT, Setting
from probekit.report.style import (
    BEHIND,
    CHANCE,
    FAINT,
    MUTED,
    WIDTH,
    label,
    look,
    new_figure,
    percent_axis,
    spread,
)

_TEXT = 0.14  # height of a line of text, inches


def depth_figure(
    frame: pd.DataFrame,
    *,
    setting: Setting | None = None,
    level: float = 0.95,
    families: pd.DataFrame | None = None,
) -> Figure:
    """Test accuracy against relative depth.

    Parameters
    ----------
    frame
        Tidy frame of `probekit.results.load_results`.
    setting
        Which data set, noise level, pooling and head to draw; default: the first of the run.
    level
        Of the intervals in the frame, for the legend.
    families
        Of `probekit.results.load_families`: then bands hold for all layers of a backbone together, and the layers that
        may be the best are marked.

    Returns
    -------
    matplotlib.figure.Figure
        One panel for each model (others thin behind), and one with all models where there are several.
    """
    points = in_percent(depth_points(frame, setting=setting, families=families), "depth")
    banded = families is not None and bool(points["band_low"].notna().any())
    if banded:
        together = {end: 100 * points[f"band_{end}"] for end in ("low", "high")}
        points = points.assign(**{end: limit.fillna(points[end]) for end, limit in together.items()})
    models = list(points["model"].unique())
    palette = style.palette(points)
    with look():
        height = 2.5 if len(models) == 1 else 1.75
        figure, panels = depth_panels(1 if len(models) == 1 else len(models) + 1, points)
        low, high = panels[0].get_ylim()
        text_height = _TEXT * (high - low) / height
        if len(models) > 1:
            _overview(panels[0], points, palette, gap=0.85 * text_height)
        for axes, model in zip(panels[-len(models) :], models, strict=True):
            for other in models:
                if other != model:
                    curve(axes, points[points["model"] == other], BEHIND, width=0.8)
            mine, colour = points[points["model"] == model], palette[model]
            axes.set_title(model)
            random_curves(axes, mine, colour, seeds=True)
            curve(axes, mine, colour, width=1.7, band=True, marker=True)
            levels(axes, mine, colour, line=True)
            output_point(axes, mine, colour, bars=True)
            if banded:
                plateau_marks(axes, mine, colour)
            name_chosen(axes, mine, colour, text_height=text_height)
            name_only(axes, mine, colour)
        text = f"trained, {100 * level:g} % {'band over all layers' if banded else 'interval'}"
        ring = {"marker": "o", "markerfacecolor": "white", "markersize": 6, "linestyle": ""}
        dashed = {"linestyle": (0, (2.5, 1.5)), "marker": "D", "markersize": 3.5}
        handles = [
            Line2D([], [], color=MUTED, linewidth=1.7, marker="o", markersize=3, label=text),
            Line2D([], [], color=MUTED, label="chosen on validation", **ring),  # type: ignore[arg-type]
            Line2D([], [], color=MUTED, label="all layers together", **dashed),  # type: ignore[arg-type]
            *plateau_handles() * banded,
            *_output_handles(points),
            *control_handles(points),
            *unconverged_handles(points),
        ]
        figure_legend(figure, handles, columns=2 if len(models) == 1 else 4 if len(handles) < 5 else 3)
    return figure


def kinds_figure(frame: pd.DataFrame, *, setting: Setting | None = None, level: float = 0.95) -> Figure:
    """Test accuracy against relative depth for each kind of pair, easiest kind first.

    Parameters
    ----------
    frame
        Tidy frame of `probekit.results.load_results`.
    setting
        Which data set, noise level, pooling and head to draw; default: the first of the run.
    level
        Of the intervals in the frame, for the legend.
    """
    points = in_percent(kinds_points(frame, setting=setting), "kinds")
    models = list(points["model"].unique())
    palette = style.palette(points)
    last = models[-1]
    largest = points[(points["model"] == last) & (points["weights"] == "trained")]
    kinds = list(largest.groupby("source")["accuracy"].max().sort_values(ascending=False, kind="stable").index)
    if points[points["layers"] == "single"].empty:
        with look():
            return _kinds_side_by_side(points, kinds, palette, level)
    with look():
        figure, panels = _grid(len(kinds), panel_height=1.75, columns=4 if len(kinds) > 4 else len(kinds))
        drawn = points[(points["weights"] == "trained") & (points["interval"] == ONE_HEAD)]
        _finish(
            figure, panels, drawn.assign(**{end: drawn[end].where(drawn["model"] == last) for end in ("low", "high")})
        )
        small = {"ha": "right", "va": "bottom", "fontsize": 6.5, "color": MUTED}
        for axes, kind in zip(panels, kinds, strict=True):
            here = points[points["source"] == kind]
            random_curves(axes, here[here["model"] == last], palette[last], seeds=False)
            for model in models:
                mine = here[here["model"] == model]
                curve(axes, mine, palette[model], width=1.7 if model == last else 1.1, band=model == last)
                levels(axes, mine, palette[model], line=False)
                output_point(axes, mine, palette[model], bars=False)
            axes.set_title(kind)
            axes.text(1, 1.03, f"{here['n_pairs'].max()} pairs", transform=axes.transAxes, **small)  # type: ignore[arg-type]
        of = short_name(last) if len(models) > 1 else ""
        band = f"{of}, {100 * level:g} % interval".removeprefix(", ")
        handles: list[Artist] = [Line2D([], [], color=palette[name], linewidth=1.7, label=name) for name in models]
        handles.append(Line2D([], [], color=MUTED, marker="D", markersize=4, linestyle="", label="all layers together"))
        handles.extend(_output_handles(points))
        handles.append(Patch(color=palette[last], alpha=0.2, linewidth=0, label=band))
        handles.extend(control_handles(points[points["model"] == last], colour=palette[last], of=of))
        handles.extend(unconverged_handles(points))
        figure_legend(figure, handles, columns=4 if max(map(len, models)) <= 16 else 3)
    return figure


def _kinds_side_by_side(points: pd.DataFrame, kinds: Sequence[str], palette: dict[str, str], level: float) -> Figure:
    """All layers together for each kind of pair, where nothing has a depth."""
    figure = new_figure(WIDTH, 3.1)
    axes = figure.subplots()
    percent_axis(axes, pd.concat([points["low"], points["high"]]))
    step = min(0.16, 0.7 / len(palette))
    for at, kind in enumerate(kinds):
        for number, (model, colour) in enumerate(palette.items()):
            mine = points[(points["source"] == kind) & (points["model"] == model)]
            mark_at(axes, mine, colour, marker="D", place=at + step * (number - (len(palette) - 1) / 2), bars=True)
    n_pairs = points.groupby("source")["n_pairs"].max()
    axes.set_xticks(range(len(kinds)), [f"{kind}\n{n_pairs[kind]} pairs" for kind in kinds], fontsize=6.5)
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    label(axes, -0.5, CHANCE, "chance", FAINT, va="top", offset=(3, -1.5), fontsize=6.5)
    figure.supylabel("Test accuracy (%)", fontsize=8)
    mark = {"marker": "D", "markersize": 4}
    text = f"all layers together, {100 * level:g} % interval"
    handles = [Line2D([], [], color=colour, label=f"{name}, {text}", **mark) for name, colour in palette.items()]  # type: ignore[arg-type]
    handles += [*control_handles(points, marker=True), *unconverged_handles(points)]
    figure_legend(figure, handles, columns=2)
    return figure


def _output_handles(points: pd.DataFrame) -> list[Line2D]:
    """Legend entry of the output point, where it is drawn."""
    if not (points["layers"] == OUTPUT).any():
        return []
    mark = {"marker": OUTPUT_MARKER, "markersize": 4.5, "linestyle": ""}
    return [Line2D([], [], color=MUTED, label="entering the output projection", **mark)]  # type: ignore[arg-type]


def depth_panels(n: int, points: pd.DataFrame) -> tuple[Figure, list[Axes]]:
    """Give a figure of some panels over depth, scaled to points."""
    if n == 1:
        figure = new_figure(5.4, 3.7)
        panels = [figure.subplots()]
    else:
        figure, panels = _grid(n, panel_height=2.05)
    _finish(figure, panels, points)
    return figure, panels


def _grid(n: int, *, panel_height: float, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    columns = columns or (2 if n in (2, 4) else 3)
    rows = math.ceil(n / columns)
    figure = new_figure(WIDTH, rows * panel_height + 0.65)
    grid = list(figure.subplots(rows, columns, sharey=True, squeeze=False).ravel())
    for spare in grid[n:]:
        spare.set_visible(False)
    for axes in grid[: n - columns]:
        axes.tick_params(labelbottom=False)
    return figure, grid[:n]


def _overview(axes: Axes, points: pd.DataFrame, palette: dict[str, str], *, gap: float) -> None:
    """All trained models in one panel, named at the last layer."""
    axes.set_title("Trained, together")
    axes.tick_params(labelbottom=True)  # its scale is not that of the panel below
    ends = []
    for model, colour in palette.items():
        mine = points[points["model"] == model]
        curve(axes, mine, colour, width=1.4)
        last = mine[(mine["weights"] == "trained") & (mine["layers"] == "single")]
        ends.append(float(last[last["layer"] == last["layer"].max()]["accuracy"].mean()))
    names = [short_name(model.partition(" (")[0]) for model in palette]
    for name, end, height, colour in zip(names, ends, spread(ends, gap), palette.values(), strict=True):
        axes.plot([1.01, 1.06], [end, height], color=colour, linewidth=0.6, clip_on=False)
        label(axes, 1.07, height, name, colour, va="center", fontsize=7)
    axes.set_xlim(-0.03, 1.2 + 0.05 * max(map(len, names)))


def _finish(figure: Figure, panels: Sequence[Axes], points: pd.DataFrame) -> None:
    for axes in panels:
        percent_axis(axes, pd.concat([points["accuracy"], points["low"], points["high"]]))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
        axes.set_xlim(-0.03, right_end(points) + 0.06)
    label(panels[0], 0.0, CHANCE, "chance", FAINT, va="top", offset=(0, -1.5), fontsize=6.5)
    blocks = "0 = tokens entering the first block, 1 = after the last"
    ends = "layer / number of blocks" if points["imported"].all() else blocks
    figure.supxlabel(f"Relative depth ({ends})", fontsize=8)
    figure.supylabel("Test accuracy (%)", fontsize=8)
