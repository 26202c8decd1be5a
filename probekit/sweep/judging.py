"""What a protocol needs beside margins and labels, taken from the judgements of pairs, and the columns it fills.

n = pairs. A frame of pairs has ``dataset``, ``group``, ``prompt`` and ``prompt_id`` (of `prompt_ids`), and may have
``ranking_id`` (empty where a pair comes from no ranking) and ``a_listed_first`` (stores of earlier versions have none).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit._types import FloatArray, IntArray
from probekit.errors import ConfigError
from probekit.stats import PROTOCOLS, Expectations, Outcome, expectations, tune_threshold
from probekit.store import Pairs

P = ParamSpec("P")
Made = TypeVar("Made")


def kept_with_pairs(make: Callable[Concatenate[Pairs, P], Made]) -> Callable[Concatenate[Pairs, P], Made]:
    """Keep what a function makes of pairs as long as the pairs live: every head is judged on the same ones."""
    kept: WeakKeyDictionary[Pairs, dict[Any, Made]] = WeakKeyDictionary()

    @wraps(make)
    def once(pairs: Pairs, /, *args: P.args, **kwargs: P.kwargs) -> Made:
        of_these = kept.setdefault(pairs, {})
        key = (args, *sorted(kwargs.items()))
        if key not in of_these:
            of_these[key] = make(pairs, *args, **kwargs)
        return of_these[key]

    return once


def prompt_ids(frame: pd.DataFrame) -> NDArray[np.object_]:
    """Name the prompt of each pair (n,), or its ranking of that prompt: a hash of data set, prompt and ranking."""
    ranking = frame["ranking_id"].fillna("").astype(str) if "ranking_id" in frame else ""
    texts = frame["dataset"] + "\0" + frame["prompt"] + "\0" + ranking
    hashed = {text: hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts.unique()}
    return texts.map(hashed).to_numpy(object)


def listed_first(frame: pd.DataFrame) -> NDArray[np.bool_] | None:
    """Whether the first side of each pair (n,) stood first in the preference file; None where that is not known."""
    if "a_listed_first" not in frame or frame["a_listed_first"].isna().any():
        return None
    return frame["a_listed_first"].to_numpy(bool)


@dataclass(frozen=True)
class Asked:
    """What protocols look at beside margins and labels, (n,) each and free of pandas, as there are many slices.

    ``prompts`` are numbers, which are quicker to tell apart than names; ``first`` is whether the first side of a pair
    stood first in the preference file, where that is ``known``.
    """

    prompts: IntArray
    first: NDArray[np.bool_]
    known: NDArray[np.bool_]

    def __getitem__(self, inside: NDArray[np.bool_]) -> Self:
        return type(self)(self.prompts[inside], self.first[inside], self.known[inside])

    @property
    def listed_first(self) -> NDArray[np.bool_] | None:
        """As the function of this name."""
        return self.first if self.known.all() else None


@kept_with_pairs
def asked_of(pairs: Pairs) -> Asked:
    """Take from pairs what protocols look at."""
    frame = pairs.frame
    told = frame.get("a_listed_first", pd.Series(pd.NA, frame.index, dtype=object)).to_numpy(object)
    known = pd.notna(told)
    return Asked(pd.factorize(frame["prompt_id"])[0], np.where(known, told, 0).astype(bool), known)


def check_protocol(protocol: str, frame: pd.DataFrame, *, where: Path) -> None:
    """Refuse a protocol that looks at something the judgements do not say.

    Raises
    ------
    ConfigError
        If it looks at the order in the preference file and that is not known.
    """
    if "listed_first" in PROTOCOLS[protocol].needs and listed_first(frame) is None:
        others = ", ".join(name for name, one in PROTOCOLS.items() if "listed_first" not in one.needs)
        message = (
            f"{where}: protocol is {protocol!r}, but the judgements do not say which picture the file lists first "
            f"(an earlier version wrote them: give the preference file with --prefs); allowed here: {others}"
        )
        raise ConfigError(message)


def tuned_threshold(protocol: str, margins: FloatArray, labels: FloatArray) -> float | None:
    """Tune the threshold of a protocol that has one on these validation pairs; None for the others."""
    return tune_threshold(margins, labels) if "threshold" in PROTOCOLS[protocol].needs else None


def judge(protocol: str, margins: FloatArray, labels: FloatArray, asked: Asked, *, threshold: float | None) -> Outcome:
    """Score margins (n,) of pairs under a protocol."""
    return PROTOCOLS[protocol](
        margins, labels, prompts=asked.prompts, threshold=threshold, listed_first=asked.listed_first
    )


def knowing_nothing(protocol: str, labels: FloatArray, asked: Asked) -> Expectations:
    """Give what scorers that know nothing get on pairs, NaN where none of them is scored."""
    if not judge(protocol, np.zeros(len(labels)), labels, asked, threshold=0.0).n_pairs:
        return Expectations(np.nan, np.nan, np.nan)
    return expectations(protocol, labels, prompts=asked.prompts, listed_first=asked.listed_first)


def measures(
    outcome: Outcome, asked: Asked, nothing: Expectations, *, threshold: float | None, blind: bool
) -> dict[str, Any]:
    """Give the columns of results that belong to the protocol: both means, threshold, and what knows-nothing gets.

    Without a head (`blind`) there are no means.
    """
    return {
        "micro_accuracy": np.nan if blind else outcome.over_pairs,
        "prompt_accuracy": np.nan if blind else outcome.over_prompts(asked.prompts),
        "threshold": np.nan if threshold is None else threshold,
        "expected_random": nothing.random,
        "expected_constant": nothing.constant,
        "expected_first": nothing.first_listed,
    }
