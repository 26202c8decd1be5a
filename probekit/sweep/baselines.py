"""Baselines that see no picture: what the generators' names, file sizes and the order of the file say of a preference.

They are fitted, tested and stored like heads, once for each data set. n = pairs, k = columns of a design; a design is
first minus second, so that it changes sign when the sides of a pair are swapped.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit import results
from probekit._types import FloatArray
from probekit.config import Ties
from probekit.heads import BradleyTerryClassifierCV
from probekit.preferences.generators import GENERATOR_C, fit_generators
from probekit.store import Pairs, canonical_json
from probekit.sweep.evaluate import judged_rows
from probekit.sweep.fitting import fit_facts
from probekit.sweep.judging import listed_first
from probekit.sweep.material import Selection, material
from probekit.sweep.plan import FIT_VERSION, Judged, Record

logger = logging.getLogger(__name__)

GENERATOR, JOINT = "generator", "all metadata"
_FOLDS = 5
Design = Callable[[pd.DataFrame], FloatArray]


_VERSION = 2  # of what is fitted here; 1 chose the generators' penalty by cross-validation


@dataclass(frozen=True, kw_only=True)
class Baseline(Judged):
    """One baseline on one data set; `metadata` is a digest of what it sees."""

    name: str
    selection: Selection
    datasets: tuple[str, ...]
    trained_on: str
    data_digest: str
    metadata: str
    ties: Ties

    @property
    def record_id(self) -> str:
        """SHA-256 over the plain values, without paths."""
        plain = {key: value for key, value in vars(self).items() if key != "selection"}
        plain |= {"fit_version": FIT_VERSION, "version": _VERSION}
        return hashlib.sha256(canonical_json(plain).encode()).hexdigest()[:32]


def plan_baselines(records: list[Record]) -> list[Baseline]:
    """All baselines of the data sets of some records; what a data set does not say is logged and has none.

    Where stores lack pairs and so differ, a data set is what most records have.
    """
    planned = []
    by_data: dict[tuple[str, tuple[str, ...]], list[Record]] = {}
    for record in records:
        by_data.setdefault((record.trained_on, record.datasets), []).append(record)
    for (trained_on, datasets), same in by_data.items():
        usual = Counter(record.data_digest for record in same).most_common(1)[0][0]
        record = next(record for record in same if record.data_digest == usual)
        frames = _frames(record.selection)
        silent = [name for name in COLUMNS if not _says(name, frames)]
        if silent:
            logger.info(
                "%s: no baselines of %s: the judgements do not say, or say the same of all training pairs",
                trained_on,
                ", ".join(silent),
            )
        for name in (name for name in COLUMNS if name not in silent):
            planned.append(
                Baseline(
                    name=name,
                    selection=record.selection,
                    datasets=datasets,
                    trained_on=trained_on,
                    data_digest=usual,
                    metadata=_digest(frames, COLUMNS[name]),
                    protocol=record.protocol,
                    ties=record.ties,
                    resamples=record.resamples,
                    level=record.level,
                )
            )
    return planned


def run_baseline(baseline: Baseline, *, out: Path) -> None:
    """Fit one baseline and write its part."""
    data = material(baseline.selection)
    margins, fitted = _fitted(baseline, data.train)
    facts = results.NO_FEATURES | {
        "record_id": baseline.record_id,
        "backbone": baseline.name,
        "control": "metadata",
        "trained_on": baseline.trained_on,
        "protocol": baseline.protocol,
        "head": "rule" if baseline.name in RULES else "linear",
        "head_kind": "metadata",
        "data_digest": baseline.data_digest,
        "probekit_version": version("dit-probekit"),
    }
    facts |= fitted
    rows, kept = judged_rows(baseline, data, margins, facts)
    results.write_part(out, baseline.record_id, rows, kept)


def _fitted(baseline: Baseline, train: Pairs) -> tuple[Callable[[Pairs], FloatArray], dict[str, Any]]:
    """From pairs to margins (n,), and what is said of the fit: that of generators is the one of lint."""
    if baseline.name == GENERATOR:
        weight = train.frame["weight"].to_numpy(np.float64)
        generators = fit_generators(train.frame, train.label, weight)
        said = results.NO_FIT | {"strength": GENERATOR_C, "converged": generators.converged}
        return lambda pairs: generators.margins(pairs.frame), said | {"head_parameters": len(generators.names)}
    design = _design(baseline.name, _frames(baseline.selection))
    head, fitted = _fit(design, train) if baseline.name not in RULES else (np.ones(1), results.NO_FIT)
    return lambda pairs: np.asarray(design(pairs.frame) @ head), fitted


def _fit(design: Design, train: Pairs) -> tuple[FloatArray, dict[str, Any]]:
    """Coefficients (k,) of a Bradley-Terry fit, its strength chosen as that of linear heads is."""
    groups = train.frame["group"].to_numpy()
    linear = BradleyTerryClassifierCV(cv=min(_FOLDS, len(np.unique(groups))))
    linear.fit_differences(design(train.frame), train.label, train.frame["weight"].to_numpy(), groups)
    return linear.coef_, fit_facts(linear)


def _names(column: str) -> Callable[[pd.DataFrame], Design]:
    """Give each name that training pairs have a column; all but the two of a pair are 0."""

    def fitted(train: pd.DataFrame) -> Design:
        sides = pd.concat([train[f"{column}_a"], train[f"{column}_b"]]).fillna("")
        names = np.array(sorted(set(sides) - {""}), dtype=object)

        def design(frame: pd.DataFrame) -> FloatArray:
            a, b = (frame[f"{column}_{side}"].fillna("").to_numpy(object)[:, None] == names for side in "ab")
            known = a.any(axis=1, keepdims=True) & b.any(axis=1, keepdims=True)  # one side alone says nothing
            return np.asarray((a.astype(np.float64) - b) * known)

        return design

    return fitted


def _numbers(column: str) -> Callable[[pd.DataFrame], Design]:
    """Difference of the logarithms of a positive number; 0 where one of the two is unknown."""

    def design(frame: pd.DataFrame) -> FloatArray:
        a, b = (frame[f"{column}_{side}"].astype("Float64").to_numpy(np.float64, na_value=np.nan) for side in "ab")
        known = (a > 0) & (b > 0)
        ratio = np.divide(a, b, out=np.ones_like(a), where=known)
        return np.log(ratio)[:, None]

    return lambda train: design


def _listed_first(frame: pd.DataFrame) -> FloatArray:
    return np.where(frame["a_listed_first"].astype(bool), 1.0, -1.0)[:, None]


_DESIGNS: dict[str, Callable[[pd.DataFrame], Design]] = {
    GENERATOR: _names("model"),
    "width": _numbers("width"),
    "height": _numbers("height"),
    "file size": _numbers("bytes"),
    "format": _names("format"),
    "first listed": lambda train: _listed_first,
    "larger file": lambda train: lambda frame: np.sign(_numbers("bytes")(train)(frame)),
    "A first": lambda train: lambda frame: np.ones((len(frame), 1)),
}
RULES = ("first listed", "larger file", "A first")  # nothing is fitted
_JOINED = (GENERATOR, "width", "height", "file size", "format", "first listed")

#: Columns of judgements that each baseline sees.
COLUMNS: dict[str, tuple[str, ...]] = {
    GENERATOR: ("model_a", "model_b"),
    "width": ("width_a", "width_b"),
    "height": ("height_a", "height_b"),
    "file size": ("bytes_a", "bytes_b"),
    "format": ("format_a", "format_b"),
    "first listed": ("a_listed_first",),
    "larger file": ("bytes_a", "bytes_b"),
    "A first": (),
}
COLUMNS[JOINT] = tuple(dict.fromkeys(column for name in _JOINED for column in COLUMNS[name]))


def _design(name: str, frames: list[pd.DataFrame]) -> Design:
    """Make the design of a baseline from the training pairs, the first of the frames of all its pairs."""
    if name != JOINT:
        return _DESIGNS[name](frames[0])
    parts = [_DESIGNS[part](frames[0]) for part in _JOINED if _says(part, frames)]
    return lambda frame: np.hstack([part(frame) for part in parts])


def _frames(selection: Selection) -> list[pd.DataFrame]:
    data = material(selection)
    return [pairs.frame for pairs in (data.train, data.validation, *data.tests.values())]


def _says(name: str, frames: list[pd.DataFrame]) -> bool:
    """Whether all data sets have the columns of a baseline and some training pair (first frame) differs in them."""
    if name == JOINT:  # more than one of its parts, else it is that part
        return sum(_says(part, frames) for part in _JOINED) > 1
    if not all(set(COLUMNS[name]) <= set(frame) for frame in frames):
        return False
    if "a_listed_first" in COLUMNS[name] and any(listed_first(frame) is None for frame in frames):
        return False
    return bool(_DESIGNS[name](frames[0])(frames[0]).any())


def _digest(frames: list[pd.DataFrame], columns: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for frame in frames:
        seen = frame[[column for column in columns if column in frame]].astype("string").fillna("")
        digest.update(pd.util.hash_pandas_object(seen, index=False).to_numpy().tobytes())
    return digest.hexdigest()
