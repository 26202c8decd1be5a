"""Scores of other models on the same pairs: judged as heads are, and put into the run beside them.

n = pairs.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit import results
from probekit._types import FloatArray
from probekit.config import ScoreTableConfig
from probekit.errors import ConfigError
from probekit.preferences import PreferenceSet, load_preferences
from probekit.preferences.loading import turned_once
from probekit.stats import PROTOCOLS, VoteCeiling, vote_ceiling
from probekit.store import Pairs, canonical_json
from probekit.sweep.evaluate import accuracies, kept_margins
from probekit.sweep.folder import check_folder
from probekit.sweep.judging import check_protocol, judge, prompt_ids, tuned_threshold
from probekit.sweep.plan import Judged
from probekit.sweep.score_files import match_scores, read_scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreTable:
    """What was put into a run.

    Attributes
    ----------
    rows
        Rows of the results: one for each split, and kind of pair where there are several.
    unknown
        Scores of nothing in the preference file.
    ceiling
        What votes say of how well single votes can be predicted; None where pairs have no two votes.
    """

    rows: pd.DataFrame
    unknown: int = 0
    ceiling: VoteCeiling | None = None

    def lines(self) -> Iterator[tuple[str, str]]:
        """Say it in lines of (heading, text)."""
        for row in self.rows[self.rows["slice_by"] == "all"].to_dict("records"):
            yield f"{row['backbone']}, {row['split']}", _accuracy(row)
            if row["head"] == "agreement":
                continue
            yield "", f"mean over pairs {_percent(row['micro_accuracy'])}, prompts {_percent(row['prompt_accuracy'])}"
            counts = f"{row['n_pairs']:,} pairs scored, {row['left_out']:,} left out"
            yield "", f"{counts}; true ties {row['true_ties']:,}, predicted ties {row['predicted_ties']:,}"
            if not np.isnan(row["threshold"]):
                yield "", f"ties are predicted up to a difference in probability of {row['threshold']:g}"
            yield "knowing nothing", results.knowing_nothing(pd.DataFrame([row])) or "no pair is scored"
        if self.ceiling is not None:
            found = self.ceiling
            yield (
                "single votes",
                f"two annotators agree in about {_percent(found.agreement)}, no scorer predicts a vote in more than "
                f"about {_percent(found.ceiling)} ({found.n_pairs:,} test pairs, {found.votes:.3g} votes each)",
            )
        if self.unknown:
            yield "not used", f"{self.unknown:,} scores of nothing in the preference file"


def score_table(config: ScoreTableConfig) -> ScoreTable:
    """Judge a file of scores on the pairs of a preference file, and put the result into a run.

    In the run of a sweep on the same preference file the pairs are those that its heads were judged on, with the groups
    and splits that they have there.

    Raises
    ------
    ScoreFileError
        If the scores cannot be used.
    ConfigError
        If the folder is no run, its data set of this name is another one, or a split or threshold is missing.
    """
    check_folder(config.out)
    known = results.load_config(config.out)
    sweep = known.get("sweep", {})
    rules = Judged(
        protocol=config.protocol or sweep.get("protocol", "strict"),
        resamples=sweep.get("resamples", 2000),
        level=sweep.get("level", 0.95),
    )
    if sweep and rules.protocol != sweep.get("protocol"):
        message = (
            f"--protocol is {rules.protocol!r}, but the heads of {config.out} are judged by {sweep.get('protocol')!r}; "
            "allowed: that, or another folder"
        )
        raise ConfigError(message)
    loaded = load_preferences(config.prefs, **config.loading())
    if config.scores is None:
        made, name = _given(config, rules, loaded.name), str(config.name)
        record_id, margins = made.rows["record_id"].iloc[0], _no_margins()
    else:
        name = config.name or config.scores.stem
        values, unknown = match_scores(config.scores, read_scores(config.scores), loaded.items)
        pairs = _scored(loaded, values, out=config.out)
        record_id, made, margins = _judged(config, rules, name, loaded.name, pairs, values, unknown)
    entry = {
        "name": name,
        "scores": None if config.scores is None else config.scores.name,
        "dataset": loaded.name,
        "protocol": rules.protocol,
        "agreement": config.agreement,
    }
    others = [one for one in known.get("scorers", []) if _key(one) != _key(entry)]
    results.add_external(config.out, record_id, made.rows, margins)
    results.write_config(config.out, known | {"scorers": [*others, entry]})
    return made


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[part] for part in ("name", "dataset", "protocol"))


def _scored(loaded: PreferenceSet, values: FloatArray, *, out: Path) -> Pairs:
    """Pairs both of whose items have a score; beside a sweep, those that it judged, in its groups and splits."""
    items = loaded.pairs[["item_a", "item_b"]].to_numpy()
    frame = loaded.pairs.drop(columns=["item_a", "item_b"])
    frame = frame.assign(prompt=loaded.items["prompt"].to_numpy(object)[items[:, 0]], dataset=loaded.name)
    frame["prompt_id"] = prompt_ids(frame)
    frame[["row_a", "row_b"]] = items
    reason = np.where(np.isnan(values[items]).any(axis=1), "no_score", "")
    held = _run_pairs(out, loaded.name)
    if held is not None:
        place = pd.Index(held["pair_id"]).get_indexer(frame["pair_id"])
        inside = place >= 0
        there = held.iloc[place[inside]]
        differ = _other_labels(loaded, inside, there["label"].to_numpy(np.float64))
        if not inside.any() or differ:
            what = f"labels {differ} pairs otherwise" if inside.any() else "has no pair in common with it"
            message = (
                f"{loaded.path}: {what}: {out} holds another data set {loaded.name!r}; allowed: the preference file of "
                "that sweep, or another folder"
            )
            raise ConfigError(message)
        for column in ("group", "split"):
            frame.loc[inside, column] = there[column].to_numpy(object)
        judged = frame["split"].isin(held["split"].unique()).to_numpy()
        lost = judged & ~inside
        reason = np.where(lost, "not_in_run", reason)
        if lost.any():
            logger.warning("%s: %d pairs are left out: no head of %s was judged on them", loaded.path, lost.sum(), out)
    lost = reason != ""
    return Pairs(
        rows=items[~lost],
        label=frame["label"].to_numpy(np.float64)[~lost],
        frame=frame[~lost].reset_index(drop=True),
        excluded=frame[["pair_id", "source", "split"]].assign(reason=reason)[lost].reset_index(drop=True),
    )


def _other_labels(loaded: PreferenceSet, inside: NDArray[np.bool_], held: FloatArray) -> int:
    """Count the pairs that a run labels otherwise; one of an earlier version may have their sides the other way."""
    pairs = loaded.pairs[inside]
    ours = pairs["label"].to_numpy(np.float64)
    differ = np.abs(held - ours) > 1e-9
    if not differ.any():
        return 0
    a, b = (loaded.items.iloc[pairs[item]] for item in ("item_a", "item_b"))
    turned = np.abs(held - np.where(turned_once(a["prompt"], a["image"], b["image"]), 1 - ours, ours)) > 1e-9
    return int(min(differ.sum(), turned.sum()))


def _run_pairs(out: Path, dataset: str) -> pd.DataFrame | None:
    """Give the validation and test pairs that heads of a run were judged on; None where it has none on this data."""
    if not (out / "results.parquet").is_file():
        return None
    frame = results.as_they_are(results.load_results(out))
    frame = frame[(frame["dataset"] == dataset) & ~frame["head_kind"].isin(results.UNPROBED)]
    if frame.empty:
        return None
    pairs = frame[frame["slice_by"] == "all"].assign(all=lambda rows: rows["n_pairs"] + rows["true_ties"])
    kept = results.load_margins(out, [str(pairs.groupby("record_id", sort=False)["all"].sum().idxmax())])
    return kept[kept["dataset"] == dataset]


def _judged(
    config: ScoreTableConfig,
    rules: Judged,
    name: str,
    dataset: str,
    pairs: Pairs,
    values: FloatArray,
    unknown: int,
) -> tuple[str, ScoreTable, pd.DataFrame]:
    """Record id, rows and margins of a scorer."""
    check_protocol(rules.protocol, pairs.frame, where=config.prefs)
    held = [*dict.fromkeys([*pairs.frame["split"], *pairs.excluded["split"]])]
    wanted = config.split or [split for split in ("validation", "test") if split in held]
    if not wanted or not set(wanted) <= set(held):
        lacking = ", ".join(split for split in config.split or ("validation", "test") if split not in held)
        message = f"{config.prefs}: has no {lacking} pairs; allowed for --split: {', '.join(held)}"
        raise ConfigError(message)
    by_split = {split: _of_split(pairs, split) for split in dict.fromkeys([*wanted, "validation"])}
    margins = {split: values[some.rows[:, 0]] - values[some.rows[:, 1]] for split, some in by_split.items()}
    threshold = config.threshold
    if threshold is not None and "threshold" not in PROTOCOLS[rules.protocol].needs:
        message = f"--threshold is {threshold:g}, but protocol {rules.protocol!r} has none; allowed: with pickscore"
        raise ConfigError(message)
    if threshold is None:
        if "threshold" in PROTOCOLS[rules.protocol].needs and not len(margins["validation"]):
            message = f"{config.prefs}: has no scored validation pairs to tune on; give --threshold (0 to 1)"
            raise ConfigError(message)
        threshold = tuned_threshold(rules.protocol, margins["validation"], by_split["validation"].label)
    scores = hashlib.sha256(Path(str(config.scores)).read_bytes()).hexdigest()
    table = pd.concat([pairs.frame[["pair_id", "group", "split"]].assign(label=pairs.label), pairs.excluded])
    data = hashlib.sha256(pd.util.hash_pandas_object(table.astype(str), index=False).to_numpy().tobytes()).hexdigest()
    plain = {"name": name, "scores": scores, "data": data, "split": wanted, "threshold": threshold} | vars(rules)
    record_id = results.EXTERNAL + hashlib.sha256(canonical_json(plain).encode()).hexdigest()[:24]
    facts = _facts(record_id, name, dataset, rules, head="scores") | {
        "store_fingerprint": scores,
        "data_digest": data,
    }
    rows, kept = [], []
    for split in wanted:
        some = by_split[split]
        rows += [facts | row for row in accuracies(rules, some, margins[split], split=split, threshold=threshold)]
        kept.append(
            kept_margins(some, margins[split], partial(judge, rules.protocol, threshold=threshold), split=split)
        )
    test = _of_split(pairs, "test")
    votes = test.frame["n_votes"].fillna(0).to_numpy(np.int64)
    ceiling = vote_ceiling(test.label, votes) if (votes >= 2).any() else None
    return record_id, ScoreTable(pd.DataFrame(rows), unknown, ceiling), pd.concat(kept)


def _of_split(pairs: Pairs, split: str) -> Pairs:
    inside = (pairs.frame["split"] == split).to_numpy()
    return Pairs(
        rows=pairs.rows[inside],
        label=pairs.label[inside],
        frame=pairs.frame[inside].reset_index(drop=True),
        excluded=pairs.excluded[pairs.excluded["split"] == split].reset_index(drop=True),
    )


def _given(config: ScoreTableConfig, rules: Judged, dataset: str) -> ScoreTable:
    """One row with an agreement as it was published: nothing is judged, so it has no interval and no pairs."""
    plain = {"name": config.name, "dataset": dataset, "agreement": config.agreement, "protocol": rules.protocol}
    record_id = results.EXTERNAL + hashlib.sha256(canonical_json(plain).encode()).hexdigest()[:24]
    unknown = ["low", "high", "se", "effective_groups", "macro_accuracy", "macro_low", "macro_high", "micro_accuracy"]
    unknown += ["prompt_accuracy", "threshold", "expected_random", "expected_constant", "expected_first"]
    none = dict.fromkeys(unknown, np.nan)
    none |= dict.fromkeys(("n_pairs", "true_ties", "predicted_ties", "left_out", "n_groups"), 0)
    row = {"split": "test", "slice_by": "all", "source": results.ALL_SOURCES, "accuracy": config.agreement}
    facts = _facts(record_id, str(config.name), dataset, rules, head="agreement")
    return ScoreTable(pd.DataFrame([facts | none | row]))


def _no_margins() -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in results.MARGIN_COLUMNS.items()})


def _facts(record_id: str, name: str, dataset: str, rules: Judged, *, head: str) -> dict[str, Any]:
    """Columns of results that say who scored; those of features and fits are empty."""
    who = {
        "record_id": record_id,
        "backbone": name,
        "control": "external",
        "dataset": dataset,
        "trained_on": "",
        "protocol": rules.protocol,
        "head": head,
        "head_kind": "external",
        "data_digest": "",
        "probekit_version": version("dit-probekit"),
    }
    untrained = {"train_accuracy": np.nan} | dict.fromkeys(
        ("n_train", "train_left_out", "train_ties", "train_connected"), 0
    )
    return results.NO_FEATURES | results.NO_FIT | untrained | who


def _percent(value: float) -> str:
    return "unknown" if np.isnan(value) else f"{100 * value:.1f} %"


def _accuracy(row: dict[Any, Any]) -> str:
    if row["head"] == "agreement":
        return f"{_percent(row['accuracy'])} by {row['protocol']}, as given: not measured here, and no ceiling"
    limits = "" if np.isnan(row["low"]) else f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    return f"{_percent(row['accuracy'])}{limits} by {row['protocol']} on {row['dataset']}"
