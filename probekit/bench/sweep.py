"""How long fits take beside scikit-learn and a plain training loop, on the same features, at equal accuracy.

Both sides run in one process on one thread, in turn, and CPU time is counted, so that other work on the machine slows
both. A ratio is that of one layer: both sides fit layers one after another, so that of 24 layers is the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from probekit._types import Progress
from probekit.bench.ratios import spread
from probekit.bench.sweep_cases import CASES, RIVALS, Case
from probekit.bench.sweep_runs import Run, run_case
from probekit.errors import ConfigError
from probekit.heads.solvers import one_thread

BOUNDS = {"loss_gap": 2e-6, "accuracy_gap": 1e-3, "coefficient_error": 1e-3, "regret": 2e-3}
"""What the design allows at most, see `Run`."""
LEAST_RANK_CORRELATION = 0.97
_WORDS = {"loss_gap": "loss gap", "accuracy_gap": "accuracy", "coefficient_error": "coefficients", "regret": "regret"}


@dataclass(frozen=True)
class SweepBench:
    """What `bench_sweep` measured.

    Attributes
    ----------
    scale
        Factor of all sizes.
    runs
        Each case with its rounds, a layer each.
    """

    scale: float
    runs: dict[Case, list[Run]]

    def facts(self) -> dict[str, Any]:
        """Return all figures as plain JSON values; ratios as median, smallest and largest of the rounds."""
        return {"scale": self.scale, "cases": {case.name: _facts(case, runs) for case, runs in self.runs.items()}}

    def lines(self) -> list[tuple[str, str]]:
        """Return the figures as (heading, text)."""
        lines = [("case", "pairs x channels  asked  measured: their CPU time / ours")]
        for name, figure in self.facts()["cases"].items():
            size = f"{figure['pairs']} x {figure['channels']}"
            ratios = "{median:.1f} ({smallest:.1f} to {largest:.1f})".format(**figure["ratio"])
            missed = "" if figure["reached"] else "missed"
            lines.append((f"  {name}", f"{size:<17} {figure['asked']:<6g} {ratios:<22} {missed}".rstrip()))
            seconds = "{theirs:.3g} / {ours:.3g} s".format(**figure["seconds"])
            exact = [f"{words} {figure[key]:.0e}" for key, words in _WORDS.items() if figure[key] is not None]
            if figure["rank_correlation"] is not None:
                exact.append(f"rank correlation {figure['rank_correlation']:.3f}")
            lines.append(("", ", ".join([seconds, *exact])))
        used = dict.fromkeys(figure["rival"] for figure in self.facts()["cases"].values())
        return lines + [("theirs", text) for text in used]


def _facts(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    ratio = spread([run.theirs for run in runs], [run.ours for run in runs])
    found: dict[str, Any] = {
        "rival": RIVALS[case.rival],
        "pairs": case.n,
        "channels": case.d,
        "splits": case.repeats,
        "heads": case.heads,
        "hidden": case.hidden,
        "layers": case.layers,
        "asked": case.asked,
        "ratio": dict(zip(("median", "smallest", "largest"), ratio, strict=True)),
        "seconds": {side: float(np.median([getattr(run, side) for run in runs])) for side in ("ours", "theirs")},
    }
    reached = ratio[0] >= case.asked
    for name, bound in BOUNDS.items():
        values = [value for run in runs if (value := getattr(run, name)) is not None]
        found[name] = max(values) if values else None
        reached &= not values or max(values) <= bound
    ranks = [run.rank_correlation for run in runs if run.rank_correlation is not None]
    found["rank_correlation"] = min(ranks) if ranks else None
    reached &= not ranks or min(ranks) >= LEAST_RANK_CORRELATION
    return found | {"reached": bool(reached)}


def bench_sweep(
    *, names: Sequence[str] = (), scale: float = 1.0, layers: int = 1, progress: Progress | None = None
) -> SweepBench:
    """Time fits of heads on synthetic features.

    Parameters
    ----------
    names
        Which of `CASES`; all if none is named.
    scale
        Factor of their pairs and channels.
    layers
        Factor of the rounds of each case, on the features of another layer each.
    progress
        Called as ``progress(done, total, text)`` after every round.

    Raises
    ------
    ConfigError
        If a case is unknown, or a number out of range.
    """
    unknown = [name for name in names if name not in {case.name for case in CASES}]
    if unknown:
        msg = f"case is {unknown[0]!r}; allowed: {', '.join(case.name for case in CASES)}"
        raise ConfigError(msg)
    if not 0 < scale <= 100:
        msg = f"scale is {scale:g}; allowed: numbers above 0, at most 100"
        raise ConfigError(msg)
    if layers < 1:
        msg = f"layers is {layers}; allowed: whole numbers from 1"
        raise ConfigError(msg)
    cases = [case.scaled(scale) for case in CASES if not names or case.name in names]
    runs: dict[Case, list[Run]] = {case: [] for case in cases}
    with threadpool_limits(1), one_thread():
        for case in {case.rival: case for case in cases}.values():  # first calls load libraries
            run_case(case.scaled(0.0), seed=0)
        # rounds of one case lie apart, so that a busy minute of the machine does not spoil all of them
        plan = [case for layer in range(max(case.rounds for case in cases)) for case in cases if layer < case.rounds]
        plan *= layers
        for number, case in enumerate(plan, start=1):
            runs[case].append(run_case(case, seed=len(runs[case])))
            if progress is not None:
                progress(number, len(plan), case.name)
    return SweepBench(scale, runs)
