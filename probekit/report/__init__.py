"""Figures, tables and the page of a run: pure functions of its results.

Each figure is a function of the tidy frame, and ``<figure>_points`` is the table of exactly what it draws.
"""

from probekit.report.figures import depth_figure, kinds_figure
from probekit.report.page import build_report
from probekit.report.points import depth_points, kinds_points, scaling_points, training_points
from probekit.report.size_figures import scaling_figure, training_figure

__all__ = [
    "build_report",
    "depth_figure",
    "depth_points",
    "kinds_figure",
    "kinds_points",
    "scaling_figure",
    "scaling_points",
    "training_figure",
    "training_points",
]
