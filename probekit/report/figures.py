"""Figures over depth: one panel for each backbone, and one for each kind of pair. Pure functions of the tidy frame."""

import math
import textwrap
from collections.abc import Sequence

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from probekit.errors import ResultsError
from probekit.report.points import ONE_HEAD, SEED_RANGE, depth_points, kinds_points
from probekit.report.select import ALL_LAYERS, Setting
from probekit.report.style import (
    BEHIND,
    CHANCE,
    FAINT,
    MUTED,
    WIDTH,
    colours,
    label,
    look,
    new_figure,
    percent_axis,
    spread,
)

DASHES = {"init": (0, (0.9, 1.7)), "shuffled": (0, (3, 1.4, 0.9, 1.4))}
WORDS = {"init": "random weights (init)", "shuffled": "random weights (shuffled)"}


def depth_figure(frame: pd.DataFrame, *, setting: Setting | None = None, level: float = 0.95) -> Figure:
    """Test accuracy against relative depth.

    Parameters
    ----------
    frame
        Tidy frame of `probekit.results.load_results`.
    setting
        Which data set, noise level, pooling and head to draw; default: the first of the run.
    level
        Of the intervals in the frame, for the legend.

    Returns
    -------
    matplotlib.figure.Figure
        One panel for each model (others thin behind), and one with all models where there are several.
    """
    points = in_percent(depth_points(frame, setting=setting), "depth")
    models = list(points["model"].unique())
    palette = dict(zip(models, colours(len(models)), strict=True))
    with look():
        if len(models) == 1:
            figure = new_figure(5.4, 3.7)
            panels = [figure.subplots()]
        else:
            figure, panels = _grid(len(models) + 1, panel_height=2.05)
            _overview(panels[0], points, palette)
        for axes, model in zip(panels[-len(models) :], models, strict=True):
            for other in models:
                if other != model:
                    _curve(axes, points[points["model"] == other], BEHIND, width=0.8)
            axes.set_title(model)
            _panel(axes, points[points["model"] == model], palette[model])
        _finish(figure, panels, points)
        if len(models) > 1:
            panels[0].set_xlim(-0.03, 1.5)  # room for the names
        handles = [
            _line(f"trained, {100 * level:g} % interval", marker="o"),
            Line2D(
                [],
                [],
                color=MUTED,
                marker="o",
                markerfacecolor="white",
                markersize=6,
                linestyle="",
                label="chosen on validation",
            ),
            Line2D(
                [], [], color=MUTED, linestyle=(0, (2.5, 1.5)), marker="D", markersize=3.5, label="all layers together"
            ),
            *_control_handles(points),
        ]
        figure_legend(figure, handles, columns=2 if len(models) == 1 else 4)
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
    palette = dict(zip(models, colours(len(models)), strict=True))
    largest = points[(points["model"] == models[-1]) & (points["weights"] == "trained")]
    kinds = list(largest.groupby("source")["accuracy"].max().sort_values(ascending=False, kind="stable").index)
    with look():
        figure, panels = _grid(len(kinds), panel_height=1.75, columns=4 if len(kinds) > 4 else len(kinds))
        for axes, kind in zip(panels, kinds, strict=True):
            here = points[points["source"] == kind]
            for model in models:
                mine = here[here["model"] == model]
                last = model == models[-1]
                _curve(axes, mine, palette[model], width=1.7 if last else 1.1, band=last)
                if last:
                    _random(axes, mine, palette[model], seeds=False)
                _levels(axes, mine, palette[model], line=False)
            axes.set_title(kind)
            axes.text(
                1,
                1.03,
                f"{here['n_pairs'].max()} pairs",
                transform=axes.transAxes,
                ha="right",
                va="bottom",
                fontsize=6.5,
                color=MUTED,
            )
        drawn = points.assign(
            low=points["low"].where(points["model"] == models[-1]),
            high=points["high"].where(points["model"] == models[-1]),
        )
        _finish(figure, panels, drawn[(drawn["weights"] == "trained") & (drawn["interval"] == ONE_HEAD)])
        handles: list[Artist] = [Line2D([], [], color=palette[model], linewidth=1.7, label=model) for model in models]
        handles.append(Line2D([], [], color=MUTED, marker="D", markersize=4, linestyle="", label="all layers together"))
        handles.append(
            Patch(color=palette[models[-1]], alpha=0.2, linewidth=0, label=f"{models[-1]}, {100 * level:g} % interval")
        )
        handles.extend(_control_handles(points, colour=palette[models[-1]], of=models[-1]))
        figure_legend(figure, handles, columns=4 if len(kinds) > 3 else 2)
    return figure


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


def _panel(axes: Axes, points: pd.DataFrame, colour: str) -> None:
    """Everything about one model: band, random weights, level of all layers, the chosen layer in words."""
    _random(axes, points, colour, seeds=True)
    _curve(axes, points, colour, width=1.7, band=True, marker=True)
    _levels(axes, points, colour, line=True)
    _name_chosen(axes, points, colour)
    joined = points[
        (points["layers"] == ALL_LAYERS) & (points["weights"] == "trained") & (points["interval"] == ONE_HEAD)
    ]
    if len(joined):
        text = f"all layers: {joined['accuracy'].mean():.1f}" + (" (mean)" if len(joined) > 1 else "")
        label(axes, 0, joined["accuracy"].mean(), text, colour, va="bottom", offset=(0, 1.5))


def _name_chosen(axes: Axes, points: pd.DataFrame, colour: str) -> None:
    """Ring the chosen layer and write its accuracy on the side of the band that has more room."""
    chosen = points[points["chosen"] & (points["weights"] == "trained")]
    if chosen.empty:
        return
    axes.plot(
        chosen["relative_depth"], chosen["accuracy"], "o", color=colour, markerfacecolor="white", markersize=6, zorder=5
    )
    place = float(chosen["relative_depth"].mean())
    near = points[(points["layers"] == "single") & ((points["relative_depth"] - place).abs() < 0.35)]
    trained, random = near[near["weights"] == "trained"], near[near["weights"] != "trained"]
    joined = points[(points["layers"] == ALL_LAYERS) & (points["weights"] == "trained")]
    above = joined["low"].min() - trained["high"].max() if len(joined) else float("inf")
    up = bool(above > trained["low"].min() - max([CHANCE, *random["accuracy"]]))
    layers = ", ".join(map(str, sorted(set(chosen["layer"]))))
    text = f"layer{'s' if ',' in layers else ''} {layers}: {chosen['accuracy'].mean():.1f}" + (
        " (mean)" if len(chosen) > 1 else ""
    )
    options = {"ha": "left" if place < 0.2 else "right" if place > 0.75 else "center", "va": "bottom" if up else "top"}
    label(
        axes,
        place,
        trained["high"].max() if up else trained["low"].min(),
        text,
        colour,
        offset=(0, 1 if up else -1),
        **options,
    )


def _overview(axes: Axes, points: pd.DataFrame, palette: dict[str, str]) -> None:
    ends: dict[str, float] = {}
    for model, colour in palette.items():
        mine = points[points["model"] == model]
        _curve(axes, mine, colour, width=1.4)
        last = mine[(mine["weights"] == "trained") & (mine["layers"] == "single")]
        ends[model] = float(last[last["layer"] == last["layer"].max()]["accuracy"].mean())
    axes.set_title("Trained, together")
    span = points["accuracy"].max() - min(CHANCE, points["accuracy"].min())
    for (model, end), height in zip(ends.items(), spread(list(ends.values()), span * 0.085), strict=True):
        axes.plot([1.01, 1.06], [end, height], color=palette[model], linewidth=0.6, clip_on=False)
        name = textwrap.shorten(model.partition(" (")[0], 18, placeholder="…") if " " in model else model[:18]
        label(axes, 1.07, height, name, palette[model], va="center", fontsize=7)


def _curve(
    axes: Axes, points: pd.DataFrame, colour: str, *, width: float, band: bool = False, marker: bool = False
) -> None:
    """Trained single layers: a line for each backbone (training seeds are several)."""
    trained = points[(points["weights"] == "trained") & (points["layers"] == "single")]
    zorder = 2 if colour == BEHIND else 4
    names = trained["backbone"].unique()
    for name in names:
        line = trained[trained["backbone"] == name].sort_values("layer")
        axes.plot(
            line["relative_depth"],
            line["accuracy"],
            color=colour,
            linewidth=width / len(names) ** 0.35,
            zorder=zorder,
            marker="o" if marker else "",
            markersize=2.8,
        )
        if band:
            axes.fill_between(
                line["relative_depth"],
                line["low"],
                line["high"],
                color=colour,
                alpha=0.2 / len(names) ** 0.6,
                linewidth=0,
                zorder=zorder - 1,
            )


def _random(axes: Axes, points: pd.DataFrame, colour: str, *, seeds: bool) -> None:
    single = points[(points["layers"] == "single") & (points["weights"] != "trained")]
    for kind, rows in single.groupby("weights", sort=False):
        for name, line in rows.groupby("backbone", sort=False):
            line = line.sort_values("layer")
            if name == "mean":
                axes.plot(
                    line["relative_depth"],
                    line["accuracy"],
                    color=colour,
                    linewidth=1.5,
                    linestyle=DASHES[str(kind)],
                    zorder=3,
                )
            elif seeds:
                axes.plot(line["relative_depth"], line["accuracy"], color=colour, linewidth=0.5, alpha=0.35, zorder=2)


def _levels(axes: Axes, points: pd.DataFrame, colour: str, *, line: bool) -> None:
    """All layers together: diamonds beyond the last block, filled for trained and hollow for random weights."""
    for weights, rows in points[points["layers"] == ALL_LAYERS].groupby("weights", sort=False):
        trained = weights == "trained"
        rows = rows[rows["interval"] == (ONE_HEAD if trained else SEED_RANGE)]
        if not trained and not line:
            continue
        level = rows["accuracy"].mean()
        error = [[level - rows["low"].min()], [rows["high"].max() - level]] if line else None
        axes.errorbar(
            [1.06], [level], yerr=error, fmt="D", markersize=4 if trained else 3.2, color=colour, elinewidth=0.9,
            markerfacecolor=colour if trained else "white", zorder=5, clip_on=False,
        )  # fmt: skip
        if trained and line:
            axes.plot([0, 1.06], [level, level], color=colour, linewidth=0.9, linestyle=(0, (5, 2)), zorder=3)


def _finish(figure: Figure, panels: Sequence[Axes], points: pd.DataFrame) -> None:
    for axes in panels:
        percent_axis(axes, pd.concat([points["accuracy"], points["low"], points["high"]]))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
        axes.set_xlim(-0.03, 1.12)
    label(panels[0], 0.0, CHANCE, "chance", FAINT, va="top", offset=(0, -1.5), fontsize=6.5)
    figure.supxlabel("Relative depth (0 = tokens entering the first block, 1 = after the last)", fontsize=8)
    figure.supylabel("Test accuracy (%)", fontsize=8)


def figure_legend(figure: Figure, handles: Sequence[Artist], *, columns: int) -> None:
    """Put one legend above the panels."""
    figure.legend(
        handles=list(handles),
        loc="outside upper center",
        ncols=min(columns, len(handles)),
        handlelength=2.2,
        columnspacing=1.3,
        borderaxespad=0.1,
    )


def _line(text: str, **style: object) -> Line2D:
    return Line2D([], [], color=MUTED, linewidth=1.7, markersize=3, label=text, **style)  # type: ignore[arg-type]


def _control_handles(points: pd.DataFrame, *, colour: str = MUTED, of: str | None = None) -> list[Line2D]:
    means = points[points["interval"] == SEED_RANGE]
    handles = []
    for kind in [kind for kind in DASHES if kind in set(means["weights"])]:
        seeds = int(means[means["weights"] == kind]["n_seeds"].max())
        text = f"{of}, {WORDS[kind]}" if of else f"{WORDS[kind]}, {seeds} seed{'s' * (seeds > 1)}"
        handles.append(Line2D([], [], color=colour, linewidth=1.5, linestyle=DASHES[kind], label=text))
    return handles


def in_percent(points: pd.DataFrame, figure: str) -> pd.DataFrame:
    """Accuracies in %, or an error where there is nothing to draw."""
    if points.empty:
        msg = f"no points for the {figure} figure; it needs test rows of at least one trained backbone"
        raise ResultsError(msg)
    scale = ["accuracy", "low", "high"]
    return points.assign(**{name: points[name] * 100 for name in scale})
