"""The marks that figures share: curves, levels, direct labels and the legend. Accuracies here are in %."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from probekit._types import FloatArray
from probekit.diagnostics import marked
from probekit.errors import ResultsError
from probekit.report.points import ONE_HEAD, SEED_RANGE
from probekit.report.select import ALL_LAYERS, OUTPUT, PROMPTS
from probekit.report.style import BEHIND, CHANCE, MUTED, label
from probekit.results import CONTROLS

DASHES = {
    "init": (0, (0.9, 1.7)),
    "shuffled": (0, (3, 1.4, 0.9, 1.4)),
    "empty-prompts": (0, (2.4, 1.2)),
    "shuffled-prompts": (0, (2.4, 1.2, 0.9, 1.2, 0.9, 1.2)),
}
MARKERS = {"init": "o", "shuffled": "s", "empty-prompts": "v", "shuffled-prompts": "^"}
OUTPUT_MARKER = "P"
IMPORTED_MARKER = "X"
BESIDE = 0.06  # of the depth of the backbone: between the last layer and what is drawn beyond it
LEVEL = (0, (5, 2))  # dashes of a value that no depth belongs to
LONGEST_NAME = 16
_CROSS = {"color": "#b3261e", "marker": "x", "markersize": 5.5, "markeredgewidth": 1.4, "linestyle": ""}


def mark_unconverged(axes: Axes, x: FloatArray, rows: pd.DataFrame) -> None:
    """Cross out the points whose fits did not all converge; x (rows,) is where they stand."""
    failed = ~rows["converged"].to_numpy(dtype=bool)
    if failed.any():
        axes.plot(x[failed], rows["accuracy"].to_numpy()[failed], **_CROSS, zorder=6, clip_on=False)  # type: ignore[arg-type]


def unconverged_handles(points: pd.DataFrame) -> list[Line2D]:
    """Legend entry of crossed out points, where there are any."""
    return [] if points["converged"].all() else [Line2D([], [], label="fit did not converge", **_CROSS)]  # type: ignore[arg-type]


def in_percent(points: pd.DataFrame, figure: str) -> pd.DataFrame:
    """Accuracies in %, or an error where there is nothing to draw."""
    if points.empty:
        msg = f"no points for the {figure} figure; it needs test rows of at least one trained backbone"
        raise ResultsError(msg)
    return points.assign(**{name: points[name] * 100 for name in ("accuracy", "low", "high")})


def short_name(name: str) -> str:
    """Shorten a long name from the front, at a separator: what tells checkpoints apart stands at the end."""
    if len(name) <= LONGEST_NAME:
        return name
    tails = [name[match.end() :] for match in re.finditer(r"[-_/ ]", name)]
    fitting = [tail for tail in tails if 0 < len(tail) < LONGEST_NAME]
    return "\N{HORIZONTAL ELLIPSIS}" + (fitting[0] if fitting else name[1 - LONGEST_NAME :])


def curve(
    axes: Axes, points: pd.DataFrame, colour: str, *, width: float, band: bool = False, marker: bool = False
) -> None:
    """Trained single layers: a line for each backbone (training seeds are several).

    One imported layer has no depth: it is a level across the panel.
    """
    trained = points[(points["weights"] == "trained") & (points["layers"] == "single")]
    zorder = 2 if colour == BEHIND else 4
    names = trained["backbone"].unique()
    for name in names:
        line = trained[trained["backbone"] == name].sort_values("layer")
        if line["relative_depth"].isna().all():
            line = pd.concat([line, line]).assign(relative_depth=[0.0, 1.0])
            axes.plot([0, 1], line["accuracy"], color=colour, linewidth=width, linestyle=LEVEL, zorder=zorder)
        else:
            axes.plot(
                line["relative_depth"],
                line["accuracy"],
                color=colour,
                linewidth=width / len(names) ** 0.35,
                zorder=zorder,
                marker="o" if marker else "",
                markersize=2.8 if len(line) < 20 else 2.0,
            )
        if colour != BEHIND:
            mark_unconverged(axes, line["relative_depth"].to_numpy(dtype=np.float64), line)
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


_PLATEAU = {"marker": "s", "markersize": 3.6, "linestyle": "", "markeredgewidth": 0}


def plateau_marks(axes: Axes, points: pd.DataFrame, colour: str) -> None:
    """Squares at the foot of the panel under the layers that may be the best, a row for each training seed."""
    inside = points[points["in_plateau"] & (points["weights"] == "trained")]
    for row, (_, mine) in enumerate(inside.groupby("backbone", sort=False)):
        height = np.full(len(mine), 0.025 + 0.04 * row)
        where = {"transform": axes.get_xaxis_transform(), "zorder": 5, "clip_on": False}
        axes.plot(mine["relative_depth"], height, color=colour, **_PLATEAU, **where)  # type: ignore[arg-type]


def plateau_handles() -> list[Line2D]:
    """Legend entry of these squares."""
    return [Line2D([], [], color=MUTED, label="may be the best layer", **_PLATEAU)]  # type: ignore[arg-type]


def random_curves(axes: Axes, points: pd.DataFrame, colour: str, *, seeds: bool) -> None:
    """Draw controls: the mean over seeds in the dashes of its kind, single seeds thin; other prompts in grey."""
    single = points[(points["layers"] == "single") & (points["weights"] != "trained")]
    for (kind, name), line in single.groupby(["weights", "backbone"], sort=False):
        line = line.sort_values("layer")
        places, values = line["relative_depth"], line["accuracy"]
        if name == "mean":
            axes.plot(places, values, linestyle=DASHES[str(kind)], zorder=3, **_control_look(str(kind), colour))
            mark_unconverged(axes, places.to_numpy(dtype=np.float64), line)
        elif seeds:
            axes.plot(places, values, color=_control_colour(str(kind), colour), linewidth=0.5, alpha=0.35, zorder=2)


def _control_colour(kind: str, colour: str) -> str:
    return MUTED if kind in PROMPTS else colour


def _control_look(kind: str, colour: str) -> dict[str, Any]:
    """Random weights in the colour of their model; other prompts in grey with their marker."""
    if kind not in PROMPTS:
        return {"color": colour, "linewidth": 1.5}
    marker = {"marker": MARKERS[kind], "markersize": 3.2, "markerfacecolor": "white", "markeredgewidth": 0.8}
    return {"color": MUTED, "linewidth": 1.0} | marker


def levels(axes: Axes, points: pd.DataFrame, colour: str, *, line: bool) -> None:
    """All layers together: diamonds beyond the last block, filled for trained and hollow for controls."""
    place = right_end(points)
    mark_at(axes, points[points["layers"] == ALL_LAYERS], colour, marker="D", place=place, bars=line)
    joined = points[(points["layers"] == ALL_LAYERS) & (points["weights"] == "trained")]
    joined = joined[joined["interval"] == ONE_HEAD]
    if line and len(joined):
        level = float(joined["accuracy"].mean())
        axes.plot([0, place], [level, level], color=colour, linewidth=0.9, linestyle=LEVEL, zorder=3)
        text = marked(f"all layers: {level:.1f}" + (" (mean)" if len(joined) > 1 else ""), *joined["converged"])
        label(axes, 0, level, text, colour, va="bottom", offset=(0, 1.5))


def output_point(axes: Axes, points: pd.DataFrame, colour: str, *, bars: bool) -> None:
    """Draw the tokens entering the output projection: crosses beyond the last block, apart from the curve of layers."""
    rows = points[points["layers"] == OUTPUT]
    mark_at(axes, rows, colour, marker=OUTPUT_MARKER, place=1 + BESIDE, bars=bars)


def right_end(points: pd.DataFrame) -> float:
    """Place of all layers together on the axis of relative depth: right of the output point where there is one."""
    return 1 + BESIDE * (2 if (points["layers"] == OUTPUT).any() else 1)


def mark_at(axes: Axes, points: pd.DataFrame, colour: str, *, marker: str, place: float, bars: bool) -> None:
    """Mark trained and controls at one place of the axis: filled and hollow, their means where there are several."""
    for weights, rows in points.groupby("weights", sort=False):
        trained = weights == "trained"
        rows = rows[rows["interval"] == (ONE_HEAD if trained else SEED_RANGE)]
        if not trained and not bars:
            continue
        level, shown = rows["accuracy"].mean(), _control_colour(str(weights), colour)
        axes.errorbar(
            [place],
            [level],
            yerr=[[level - rows["low"].min()], [rows["high"].max() - level]] if bars else None,
            fmt=MARKERS[str(weights)] if weights in PROMPTS else marker,
            markersize=(4 if trained else 3.2) + 1.2 * (marker == OUTPUT_MARKER),
            color=shown,
            elinewidth=0.9,
            markeredgewidth=1.0 if trained else 0.8,
            markerfacecolor=shown if trained else "white",
            zorder=5,
            clip_on=False,
        )
        mean = pd.DataFrame({"accuracy": [level], "converged": [bool(rows["converged"].all())]})
        mark_unconverged(axes, np.array([place]), mean)


def name_chosen(axes: Axes, points: pd.DataFrame, colour: str, *, text_height: float) -> None:
    """Ring the chosen layer and write its accuracy beside the band: above or below it, or over the name of all layers.

    Parameters
    ----------
    axes, points, colour
        Where, what, in which colour.
    text_height
        Height of a line of text in percentage points.
    """
    chosen = points[points["chosen"] & (points["weights"] == "trained")]
    if chosen.empty:
        return
    ring = {"color": colour, "markerfacecolor": "white", "markersize": 6.0, "zorder": 5}
    axes.plot(chosen["relative_depth"], chosen["accuracy"], "o", **ring)  # type: ignore[arg-type]
    place = float(chosen["relative_depth"].mean())
    side = "left" if place < 0.2 else "right" if place > 0.75 else "center"
    reach = {"left": (0.0, 0.45), "right": (0.45, 0.0), "center": (0.22, 0.22) if len(chosen) == 1 else (0.45, 0.45)}[
        side
    ]
    depth = points["relative_depth"]
    near = points[(points["layers"] == "single") & (depth >= place - reach[0]) & (depth <= place + reach[1])]
    trained, random = near[near["weights"] == "trained"], near[near["weights"] != "trained"]
    joined = points[(points["layers"] == ALL_LAYERS) & (points["weights"] == "trained")]
    ceiling = joined["accuracy"].min() if len(joined) else axes.get_ylim()[1]
    above = ceiling - trained["high"].max() - (text_height if place < 0.45 else 0)  # its name stands on the left
    below = trained["low"].min() - max([CHANCE, *random["accuracy"]])
    up = bool(above > max(1.3 * text_height, below))
    numbers = ", ".join(map(str, sorted(set(chosen["layer"]))))
    text = f"layer{'s' * (',' in numbers)} {numbers}: {chosen['accuracy'].mean():.1f}"
    height = float(trained["high"].max() if up else trained["low"].min())
    if not up and len(joined) and below < 1.3 * text_height:
        height, up = float(joined["accuracy"].max()) + 1.3 * text_height, True
    options = {"ha": side, "va": "bottom" if up else "top", "offset": (0, 1 if up else -1)}
    text = marked(text + " (mean)" * (len(chosen) > 1), *chosen["converged"])
    label(axes, place, height, text, colour, **options)


def name_only(axes: Axes, points: pd.DataFrame, colour: str) -> None:
    """Write the accuracy of an imported layer without a depth on its level."""
    only = points[(points["layers"] == "single") & (points["weights"] == "trained") & points["relative_depth"].isna()]
    for row in only.to_dict("records"):
        text = marked(f"its only layer: {row['accuracy']:.1f}", row["converged"])
        label(axes, 0, row["high"], text, colour, va="bottom", offset=(0, 1))


def control_handles(points: pd.DataFrame, *, colour: str = MUTED, of: str = "", marker: bool = False) -> list[Line2D]:
    """Legend entries of the kinds of controls that are drawn."""
    means = points[points["interval"] == SEED_RANGE]
    handles = []
    for kind in [kind for kind in DASHES if kind in set(means["weights"])]:
        seeds = int(means[means["weights"] == kind]["n_seeds"].max())
        number = "" if kind == "empty-prompts" else f", {seeds} seed{'s' * (seeds > 1)}"
        text = f"{of}, {CONTROLS[kind]}" if of else f"{CONTROLS[kind]}{number}"
        handle = Line2D([], [], linestyle=DASHES[kind], label=text, **_control_look(kind, colour))
        if marker:
            handle.set(marker=MARKERS[kind], markersize=4.5, markerfacecolor="white")
        handles.append(handle)
    return handles


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
