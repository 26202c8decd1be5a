"""One look for every figure, and the same bytes each time a figure is saved."""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter

INK, MUTED, FAINT, BEHIND = "#22262b", "#5f6b76", "#a9b2ba", "#d5dadf"
WIDTH = 7.2  # inches: a full-width figure of a two-column paper
CHANCE = 50.0

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so every machine draws the same letters
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.labelsize": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#eceff1",
    "grid.linewidth": 0.7,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "text.color": INK,
    "text.parse_math": False,  # names come from files; a dollar sign in one is a dollar sign
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.solid_capstyle": "round",
    "lines.dash_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",  # no reader needs the font
    "svg.hashsalt": "probekit",
    "path.simplify": False,
}


def look() -> AbstractContextManager[None]:
    """Return a context that draws in probekit's style and leaves the caller's settings alone."""
    clean = dict(mpl.rcParamsDefault.items()) | {"backend": mpl.rcParams["backend"]}
    return mpl.rc_context(clean | _RC)


def colours(n: int) -> list[str]:
    """`n` colours from light (small backbone) to dark (large), apart for every kind of colour vision and in grey."""
    places = [0.3] if n == 1 else [0.75 - 0.70 * i / (n - 1) for i in range(n)]
    return [mpl.colors.to_hex(mpl.colormaps["viridis"](place)) for place in places]


def palette(models: pd.DataFrame) -> dict[str, str]:
    """Colour of each model (columns ``model``, ``imported``): imported features stand apart, in orange."""
    models = models.drop_duplicates("model")
    dumped, imported = models[~models["imported"]]["model"], models[models["imported"]]["model"]
    places = [0.8 - 0.3 * i / max(1, len(imported) - 1) for i in range(len(imported))]
    oranges = [mpl.colors.to_hex(mpl.colormaps["Oranges"](place)) for place in places]
    return dict(zip(dumped, colours(len(dumped)), strict=True)) | dict(zip(imported, oranges, strict=True))


def readable(colour: str) -> str:
    """Darken a line's colour until text in it reads on white (contrast of 4.5)."""
    rgb = mpl.colors.to_rgb(colour)
    while 1.05 / (0.05 + _luminance(rgb)) < 4.5:
        rgb = (0.95 * rgb[0], 0.95 * rgb[1], 0.95 * rgb[2])
    return mpl.colors.to_hex(rgb)


def _luminance(rgb: tuple[float, float, float]) -> float:
    """Relative luminance of an sRGB colour, as the contrast rules of the web define it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def new_figure(width: float, height: float) -> Figure:
    """Return a figure that belongs to no window system."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def percent_axis(axes: Axes, values: Iterable[float], *, headroom: float = 0.0) -> None:
    """Scale the y axis to `values` (in %) and chance, with room for text above, and draw the chance line."""
    known = [value for value in values if value == value]
    low, high = min([CHANCE, *known]), max([CHANCE + 5, *known])
    room = 0.06 * (high - low)
    axes.set_ylim(max(-room, low - room), high + room + headroom * (high - low))
    step = 5 if high - low < 22 else 10
    axes.set_yticks(range(step * math.ceil(max(0.0, low - room) / step), 101, step))
    axes.set_ylim(max(-room, low - room), high + room + headroom * (high - low))  # ticks must not widen it
    axes.axhline(CHANCE, color=FAINT, linewidth=0.9, zorder=1)


def log_axis(axes: Axes, ticks: Sequence[float], labels: Sequence[str]) -> None:
    """Give a log x axis exactly these ticks."""
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), list(labels))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda _value, _place: ""))
    axes.tick_params(axis="x", which="minor", length=0)


def label(axes: Axes, x: float | int, y: float | int, text: str, colour: str, **options: Any) -> Text:
    """Write a direct label; its white rim covers the grid and cuts no curve."""
    offset = options.pop("offset", (0, 0))
    options = {"fontsize": 7.5, "xytext": offset, "textcoords": "offset points", "annotation_clip": False, **options}
    rim = axes.annotate(text, (x, y), color="white", zorder=1.5, **options)
    rim.set_path_effects([withStroke(linewidth=2.2, foreground="white")])
    return axes.annotate(text, (x, y), color=readable(colour), zorder=6, **options)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Move label heights apart to at least `gap`, keeping their order and moving them as little as a chain allows."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    blocks: list[list[float]] = []  # [mean, members]; touching blocks merge around their common mean
    for i in order:
        blocks.append([values[i], 1])
        while len(blocks) > 1 and blocks[-1][0] - blocks[-2][0] < gap * (blocks[-1][1] + blocks[-2][1]) / 2:
            mean, members = blocks.pop()
            before, count = blocks[-1]
            blocks[-1] = [(before * count + mean * members) / (count + members), count + members]
    placed = [mean + gap * (k - (count - 1) / 2) for mean, count in blocks for k in range(int(count))]
    return [placed[order.index(i)] for i in range(len(values))]


def in_millions(parameters: float | int) -> str:
    """Large numbers in short: 0.26 M, 4.7 M, 8.1 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size or (unit == "M" and parameters >= 1e5):
            value = parameters / size
            return f"{value:.{2 if value < 0.995 else 1 if value < 9.95 else 0}f} {unit}"
    return f"{parameters:.0f}"


def save(figure: Figure, stem: Path, points: pd.DataFrame) -> str:
    """Write ``stem.svg``, ``stem.png`` and ``stem.csv``; returns the SVG text."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with look():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, the same in both files
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "probekit"})
        figure.savefig(stem.with_suffix(".png"), dpi=200, metadata={"Software": None})
    svg = buffer.getvalue().decode()
    stem.with_suffix(".svg").write_text(svg, encoding="utf-8")
    points.to_csv(stem.with_suffix(".csv"), index=False, lineterminator="\n")
    return svg
