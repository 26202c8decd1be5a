"""Stores and a configuration in, results out: the plan of all fits, their run, and how they are judged."""

from probekit.sweep.run import run_sweep

__all__ = ["run_sweep"]
