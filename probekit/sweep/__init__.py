"""Stores and a configuration in, results out: the plan of all fits, their run, and how they are judged."""

from probekit.sweep.dry_run import dry_run
from probekit.sweep.external import ScoreTable, score_table
from probekit.sweep.run import run_sweep

__all__ = ["ScoreTable", "dry_run", "run_sweep", "score_table"]
