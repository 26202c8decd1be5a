"""Figures over backbones: accuracy against parameters, and against training length at one shape."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from probekit._types import FloatArray
from probekit.report import style
from probekit.report.marks import (
    DASHES,
    IMPORTED_MARKER,
    MARKERS,
    control_handles,
    figure_legend,
    in_percent,
    mark_unconverged,
    short_name,
    unconverged_handles,
)
from probekit.report.points import ONE_HEAD, SEED_RANGE, scaling_points, training_points
from probekit.report.select import ALL_LAYERS, CHOSEN, Setting
from probekit.report.style import (
    CHANCE,
    FAINT,
    MUTED,
    WIDTH,
    colours,
    in_millions,
    label,
    log_axis,
    look,
    new_figure,
    percent_axis,
)

TITLES = {CHOSEN: "Single layer chosen on validation", ALL_LAYERS: "All layers together"}
_LINE = "#8a949d"


def scaling_figure(frame: pd.DataFrame, *, setting: Setting | None = None, level: float = 0.95) -> Figure:
    """Test accuracy against parameters of the transformer, trained and controls, single layer and all layers.

    Parameters
    ----------
    frame
        Tidy frame of `probekit.results.load_results`.
    setting
        Which data set, noise level, pooling and head to draw; default: the first of the run.
    level
        Of the intervals in the frame, for the legend.
    """
    points = in_percent(scaling_points(frame, setting=setting), "scaling")
    models = points.drop_duplicates("model")
    palette = style.palette(models)
    sizes = sorted({float(size) for size in models["parameters"]})
    margin = max((sizes[-1] / sizes[0]) ** 0.11, 1.3)
    shown = _apart(sizes, sizes[-1] / sizes[0] * margin**2)
    with look():
        figure, panels = _panels([name for name in TITLES if name in set(points["layers"])])
        for axes, layers in panels:
            here = points[points["layers"] == layers]
            _scaling_panel(axes, here, palette)
            axes.set_xlim(sizes[0] / margin, sizes[-1] * margin)
            log_axis(axes, shown, [in_millions(size) for size in shown])
        headroom = max(0.0, *(_name_models(axes, points, layers, palette) for axes, layers in panels))
        percent_axis(panels[0][0], pd.concat([points["low"], points["high"]]), headroom=headroom)
        for axes, _ in panels[1:]:
            axes.axhline(CHANCE, color=FAINT, linewidth=0.9, zorder=1)
        _name_chance(panels[0][0])
        of = "network" if models["imported"].any() else "transformer"
        figure.supxlabel(f"Parameters of the {of}", fontsize=8)
        figure.supylabel("Test accuracy (%)", fontsize=8)
        figure_legend(figure, _handles(points, level), columns=3)
    return figure


def training_figure(frame: pd.DataFrame, *, setting: Setting | None = None, level: float = 0.95) -> Figure:
    """Test accuracy against images seen in training, for backbones of one shape; random weights stand at 0.

    Parameters
    ----------
    frame
        Tidy frame of `probekit.results.load_results`.
    setting
        Which data set, noise level, pooling and head to draw; default: the first of the run.
    level
        Of the intervals in the frame, for the legend.
    """
    points = in_percent(training_points(frame, setting=setting), "training")
    series = list(points["series"].unique())
    palette = dict(zip(series, colours(len(series)), strict=True))
    lengths = sorted({float(images) for images in points["training_images"] if images > 0})
    start = lengths[0] / max(3.0, (lengths[-1] / lengths[0]) ** 0.3)  # where a log axis can show 0
    with look():
        figure, panels = _panels([name for name in TITLES if name in set(points["layers"])], height=2.6)
        for axes, layers in panels:
            here = points[points["layers"] == layers]
            percent_axis(axes, pd.concat([points["low"], points["high"]]))
            for name in series:
                _training_line(axes, here[here["series"] == name], palette[name], start)
                if len(series) > 1:
                    last = here[(here["series"] == name) & (here["training_images"] == lengths[-1])]
                    label(
                        axes,
                        lengths[-1],
                        last["accuracy"].max(),
                        name,
                        palette[name],
                        ha="right",
                        va="bottom",
                        offset=(0, 8),
                    )
            none = bool((points["training_images"] == 0).any())
            ticks = [start] * none + _apart(lengths, lengths[-1] / start)
            log_axis(axes, ticks, ["0"] * none + [_count(tick) for tick in ticks[none:]])
            axes.set_xlim((start if none else lengths[0]) / 1.4, lengths[-1] * 1.4)
            if none:  # the cut in the axis
                cut = (start * lengths[0]) ** 0.5
                axes.text(
                    cut,
                    0,
                    "//",
                    transform=axes.get_xaxis_transform(),
                    ha="center",
                    va="center",
                    color=MUTED,
                    fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
                )
        _name_chance(panels[0][0])
        figure.supxlabel(
            f"Images seen in training ({', '.join(series)})" if len(series) == 1 else "Images seen in training",
            fontsize=8,
        )
        figure.supylabel("Test accuracy (%)", fontsize=8)
        figure_legend(figure, _handles(points, level), columns=3)
    return figure


def _panels(names: Sequence[str], *, height: float = 3.0) -> tuple[Figure, list[tuple[Axes, str]]]:
    figure = new_figure(WIDTH if len(names) > 1 else 4.6, height + 0.5)
    grid = list(figure.subplots(1, len(names), sharey=True, squeeze=False)[0])
    for axes, name in zip(grid, names, strict=True):
        axes.set_title(TITLES[name])
    return figure, list(zip(grid, names, strict=True))


def _scaling_panel(axes: Axes, points: pd.DataFrame, palette: dict[str, str]) -> None:
    for weights, rows in points.groupby("weights", sort=False):
        trained = weights == "trained"
        # the line runs through one value for each model: its mean where there are several seeds, itself otherwise
        means = rows[
            (rows["interval"] == SEED_RANGE)
            | (trained & ~rows["model"].isin(rows[rows["interval"] == SEED_RANGE]["model"]))
        ]
        means = means[~means["imported"]]  # a line says that only size changes
        dashes = "-" if trained else DASHES[str(weights)]
        axes.plot(
            means["parameters"].astype(float), means["accuracy"], color=_LINE, linewidth=1.3, linestyle=dashes, zorder=2
        )
        for model, mine in rows.groupby("model", sort=False):
            colour = palette[str(model)]
            if trained:
                heads = mine[mine["interval"] == ONE_HEAD]
                x = _dodged(heads["parameters"].astype(float).to_numpy())
                mark = IMPORTED_MARKER if heads["imported"].all() else "o"
                _bars(axes, x, heads, colour, fmt=mark, markersize=5.0 if len(heads) == 1 else 4.0)
            else:
                mean = mine[mine["interval"] == SEED_RANGE]
                _bars(
                    axes,
                    mean["parameters"].astype(float).to_numpy(),
                    mean,
                    colour,
                    fmt=MARKERS[str(weights)],
                    markersize=4.5,
                    hollow=True,
                )


def _training_line(axes: Axes, points: pd.DataFrame, colour: str, start: float) -> None:
    trained = points[(points["weights"] == "trained") & (points["interval"] == ONE_HEAD)]
    x = trained["training_images"].astype(float).to_numpy()
    line = trained.groupby("training_images")["accuracy"].mean()
    axes.plot(line.index.astype(float), line.to_numpy(), color=colour, linewidth=1.5, zorder=3)
    _bars(axes, x, trained, colour, fmt="o", markersize=5.0)
    random = points[(points["weights"] == "init") & (points["interval"] == SEED_RANGE)]
    if len(random):
        _bars(axes, np.array([start]), random, colour, fmt="o", markersize=4.5, hollow=True)
        level = float(random["accuracy"].iloc[0])
        axes.plot([start, x.max()], [level, level], color=colour, linewidth=1.1, linestyle=DASHES["init"], zorder=2)


def _bars(
    axes: Axes, x: FloatArray, rows: pd.DataFrame, colour: str, *, fmt: str, markersize: float, hollow: bool = False
) -> None:
    error = [rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]]
    axes.errorbar(
        x,
        rows["accuracy"],
        yerr=np.clip(np.array(error, dtype=np.float64), 0, None),
        fmt=fmt,
        color=colour,
        elinewidth=1.0,
        markersize=markersize,
        markerfacecolor="white" if hollow else colour,
        markeredgewidth=1.1,
        zorder=4,
    )
    mark_unconverged(axes, x, rows)


def _name_models(axes: Axes, points: pd.DataFrame, layers: str, palette: dict[str, str]) -> float:
    """Write each model's name above its interval, one above the other where names would touch.

    Returns
    -------
    float
        Room needed above the highest interval of the figure, as a share of the range of the data.
    """
    known = pd.concat([points["low"], points["high"]])
    span = float(max(known.max(), CHANCE + 5) - min(known.min(), CHANCE))
    left, right = np.log(axes.get_xlim())
    trained = points[(points["layers"] == layers) & (points["weights"] == "trained")]
    boxes: list[tuple[float, float, float, float]] = []  # left, right, bottom, top as shares of panel and data range
    for model, rows in trained.groupby("model", sort=False):
        lines = [short_name(part) for part in re.split(r" (?=\(\d+ seeds\)$)", str(model))]
        centre = float((np.log(rows["parameters"].iloc[0]) - left) / (right - left))
        half = 0.011 * max(map(len, lines)) + 0.01
        middle = min(max(centre, half), 1 - half)
        top = (rows["high"].max() - known.min()) / span
        bottom, height = top + 0.02, 0.065 * len(lines)
        while any(
            middle - half < box[1] and box[0] < middle + half and bottom < box[3] and box[2] < bottom + height
            for box in boxes
        ):
            bottom += 0.01
        # the bar below a name keeps later names off it
        boxes += [(middle - half, middle + half, bottom, bottom + height), (centre - 0.01, centre + 0.01, 0, bottom)]
        x, y = float(np.exp(left + middle * (right - left))), known.min() + bottom * span
        label(axes, x, float(y), "\n".join(lines), palette[str(model)], ha="center", va="bottom", linespacing=1.0)
        if bottom > top + 0.03:
            ends = [known.min() + (top + 0.005) * span, y]
            axes.plot([rows["parameters"].iloc[0]] * 2, ends, color=palette[str(model)], linewidth=0.5, zorder=1)
    return float(max((box[3] for box in boxes), default=0.0)) - float(known.max() - known.min()) / span


def _name_chance(axes: Axes) -> None:
    label(axes, axes.get_xlim()[0], CHANCE, "chance", FAINT, va="top", offset=(3, -1.5), fontsize=6.5)


def _dodged(x: FloatArray) -> FloatArray:
    """Put seeds of one size side by side, 7 % apart."""
    return x * 1.07 ** (np.arange(len(x)) - (len(x) - 1) / 2)


def _apart(values: Sequence[float], ratio: float) -> list[float]:
    """Keep tick values whose labels do not touch, the largest always: an eighth of the axis apart."""
    kept: list[float] = []
    for value in reversed(values):
        if not kept or kept[-1] / value > max(ratio**0.125, 1.05):
            kept.append(float(value))
    return kept[::-1]


def _count(images: float) -> str:
    return (
        in_millions(images).replace(" ", "")
        if images >= 1e6
        else f"{images / 1000:g}k"
        if images >= 1000
        else f"{images:g}"
    )


def _handles(points: pd.DataFrame, level: float) -> list[Line2D]:
    text = f"trained, {100 * level:g} % interval"
    handles = [Line2D([], [], color=MUTED, marker="o", markersize=5, label=text)]
    if points["imported"].any():
        mark = {"marker": IMPORTED_MARKER, "markersize": 5, "linestyle": ""}
        handles.append(Line2D([], [], color=MUTED, label="imported features", **mark))  # type: ignore[arg-type]
    return [*handles, *control_handles(points, marker=True), *unconverged_handles(points)]
