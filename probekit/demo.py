"""The playground through the whole line: draw pairs, dump every shape and its controls, sweep, report.

Everything here goes through the same functions as on any other backbone; this module only says what is dumped. One
process a core works through the dumps, because importing diffusers takes longer than most of them.
"""

import os
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from probekit import backbones
from probekit._types import Progress
from probekit._workers import run_in_processes
from probekit.config import LinearHead, SweepConfig
from probekit.playground import PlaygroundModel, base_folder, models
from probekit.playground.pairs import write_pairs
from probekit.preferences import load_preferences
from probekit.report import build_report
from probekit.sweep import run_sweep

TRAIN_PAIRS, TEST_PAIRS = 1600, 1400
RANDOM_SEEDS = (0, 1, 2)
SWEEP = SweepConfig(heads=[LinearHead(kind="linear", layer_sets=["singles", "all"])])


@dataclass(frozen=True)
class _Dump:
    model: PlaygroundModel
    random_weights: str | None

    @property
    def store(self) -> str:
        return (
            self.model.name
            if self.random_weights is None
            else f"{self.model.name}-{self.random_weights.replace(':', '-')}"
        )


def run_demo(out: Path | str, *, progress: Progress | None = None) -> Path:
    """Make the whole demo in a folder; the same call continues one that was stopped.

    Parameters
    ----------
    out
        Folder for ``pairs``, ``stores``, ``run`` and ``report.html``.
    progress
        Called as ``progress(done, total, text)``; the first word of the text is the stage.

    Returns
    -------
    Path
        The report.
    """
    out = Path(out)
    cores = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    prefs = out / "pairs" / "preferences.jsonl"
    if not prefs.exists():
        write_pairs(prefs.parent, n_train=TRAIN_PAIRS, n_test=TEST_PAIRS, seed=0)
    dumps = _dumps()
    work = run_in_processes(partial(_run, out=out, prefs=prefs), sorted(dumps, key=_cost, reverse=True), jobs=cores)
    for done, (dump, _) in enumerate(work, start=1):
        if progress is not None:
            progress(done, len(dumps), f"dump {dump.store}")
    run = run_sweep(
        SWEEP,
        stores=[out / "stores" / dump.store for dump in dumps],
        out=out / "run",
        jobs=cores,
        progress=None if progress is None else lambda done, total, text: progress(done, total, f"sweep {text}"),
    )
    return build_report(run, out / "report.html")


def _dumps() -> list[_Dump]:
    """Every trained transformer, then untrained copies of each shape under several seeds."""
    trained = [_Dump(model=model, random_weights=None) for model in models()]
    shapes = {(model.blocks, model.width): model for model in models() if model.fraction == 1.0}
    untrained = [
        _Dump(model=model, random_weights=f"init:{seed}") for model in shapes.values() for seed in RANDOM_SEEDS
    ]
    return trained + untrained


def _cost(dump: _Dump) -> int:
    return dump.model.blocks * dump.model.width**2


def _run(dump: _Dump, *, out: Path, prefs: Path) -> None:
    from probekit.dump import dump_features

    backbone = _base(out / "cache").with_transformer(
        dump.model.folder, random_weights=dump.random_weights, name=dump.model.name
    )
    dump_features(
        backbone,
        load_preferences(prefs),
        out / "stores" / dump.store,
        batch_size=64,
        training_images=dump.model.images_seen if dump.random_weights is None else 0,
    )


@lru_cache(maxsize=1)
def _base(cache: Path) -> "backbones.Backbone":
    """Load the shared parts, once in each process."""
    transformer = models()[0].folder
    return backbones.Backbone.from_pretrained(
        base_folder(), transformer=transformer, max_tokens=0, device="cpu", cache=cache
    )
