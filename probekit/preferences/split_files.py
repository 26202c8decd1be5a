"""Splits as files: made once, named by a hash, and applied to the same pairs for every backbone and store.

A split file is one JSON object: ``probekit_split`` (1), ``sha256`` of everything else, ``prefs`` (name of the file it
was made of), ``rule`` (how), ``splits`` (``train``, ``validation``, ``test``: lists of ``pair_id``) and ``dropped``
(pairs left out, by reason). n = pairs.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from probekit.errors import ConfigError, PreferenceError
from probekit.preferences.groups import SPLITS, TEST_SHARE, VALIDATION_SHARE, assign_splits, hash_share, seeded

logger = logging.getLogger(__name__)

AGAIN = "make it again with `probekit split`"


class SplitFile(BaseModel):
    """The content of a split file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probekit_split: Literal[1] = 1
    prefs: str
    rule: dict[str, Any]
    splits: dict[Literal["train", "validation", "test"], list[str]]
    dropped: dict[str, list[str]]

    @property
    def sha256(self) -> str:
        """Hash of the content, hex."""
        plain = json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(plain.encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write the file, as a whole or not at all.

        Raises
        ------
        ConfigError
            If there is another split.
        """
        if path.exists() and read_split(path).sha256 != self.sha256:
            msg = f"{path}: holds another split, which runs may name; allowed: a new file"
            raise ConfigError(msg)
        text = json.dumps({"sha256": self.sha256} | self.model_dump(), ensure_ascii=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)


@dataclass(frozen=True)
class AppliedSplit:
    """What a split file makes of pairs.

    Attributes
    ----------
    split
        Split of each pair (n,), missing where it is left out.
    dropped
        How many pairs the file leaves out, by reason; ``not_in_split_file`` for those that it does not name.
    sha256
        Hash of the file's content.
    """

    split: pd.Series
    dropped: dict[str, int]
    sha256: str


def make_split(
    pairs: pd.DataFrame,
    *,
    prefs: Path,
    own: tuple[str, ...],
    test: float | None = None,
    validation: float | None = None,
    seed: int = 0,
    leave_out_generator: str | None = None,
) -> SplitFile:
    """Split pairs so that no group is cut.

    What the preference file names itself (its own test or validation split) is kept as it is; only what it does not
    name is made here. With the defaults the result is the split that loading the file gives.

    Parameters
    ----------
    pairs
        The pairs of a `PreferenceSet` (n rows).
    prefs, own
        Its file, and the splits that this names.
    test, validation
        Shares of the groups, by hash; default 15 % each, and no test split where the file names others only. Where
        there is a test split of another kind, the validation share is one of the other groups.
    seed
        Another seed gives other groups to each split; 0 is what loading does.
    leave_out_generator
        The test pairs are those that show a picture of this generator on either side. Other pairs of their groups are
        left out, so that no training prompt or image is theirs. Where the file has its own test split, only its test
        pairs of the generator are test, and all other pairs that show the generator, and all other test pairs, are
        left out.

    Raises
    ------
    PreferenceError
        If a share is asked for of a split that the file names itself, the generator is not in it, or no training pair
        is left.
    """
    for name, share in (("test", test), ("validation", validation)):
        if share is not None and name in own:
            msg = f"{prefs}: has its own {name} split, which is kept; allowed: no --{name}"
            raise PreferenceError(msg)
    group = pairs["group"]
    # Loading has made what the file does not name of training pairs: here it is made anew.
    split = pairs["split"].where(pairs["split"].isin(own), "train")
    reasons = pd.Series("", pairs.index)
    held_out = (0.0 if "validation" in own else VALIDATION_SHARE) if validation is None else validation
    if leave_out_generator is not None:
        if test is not None:
            msg = "--test and --leave-out-generator: allowed: one of the two, since the generator says what test is"
            raise PreferenceError(msg)
        split, reasons = _without_generator(pairs, split, leave_out_generator, prefs=prefs, official="test" in own)
        split = _hold_out(group, split, "validation", held_out, seed)
    elif not own:
        shares = {"test": TEST_SHARE if test is None else test, "validation": held_out}
        split, _ = assign_splits(group, None, **shares, seed=seed)
    else:
        if test is not None:
            split = _hold_out(group, split, "test", test, seed)
        split = _hold_out(group, split, "validation", held_out, seed)
    if not (split == "train").any():
        msg = f"{prefs}: no training pair is left of {len(pairs)} pairs in {group.nunique()} groups"
        raise PreferenceError(msg)
    rule = {"test": test, "validation": validation, "seed": seed, "leave_out_generator": leave_out_generator}
    ids = pairs["pair_id"]
    return SplitFile(
        prefs=prefs.name,
        rule=rule | {"own_splits": list(own)},
        splits={name: sorted(ids[split == name].tolist()) for name in SPLITS},
        dropped={reason: sorted(ids[reasons == reason].tolist()) for reason in sorted(set(reasons) - {""})},
    )


def apply_split(path: Path, pairs: pd.DataFrame, *, own: pd.Series | None) -> AppliedSplit:
    """Give pairs the splits of a split file.

    Parameters
    ----------
    path
        The split file.
    pairs
        Columns ``pair_id``, ``group`` and ``split`` (n rows); pairs whose split is missing stay left out.
    own
        Splits that the preference file names (n,), None if it names none.

    Raises
    ------
    PreferenceError
        If the file is damaged or edited, names none of the pairs, contradicts the preference file's own test or
        validation split, or has a group in two splits.
    """
    content = read_split(path)
    target = {pair: name for name, ids in content.splits.items() for pair in ids}
    reason = {pair: name for name, ids in content.dropped.items() for pair in ids}
    chosen = pairs["pair_id"].map(target).where(pairs["split"].notna())
    if chosen.isna().all():
        msg = f"{path}: names none of the {len(pairs)} pairs (made of {content.prefs!r}); allowed: a split of this file"
        raise PreferenceError(msg)
    absent = len(target) - int(chosen.notna().sum())
    if absent:
        logger.warning("%s: %d of its pairs are not in the preference file", path, absent)
    if own is not None:
        _refuse_contradiction(path, chosen, own, pairs["pair_id"])
    cut = chosen.groupby(pairs["group"]).nunique()
    if (cut > 1).any():
        msg = f"{path}: group {cut.idxmax()!r} is in {cut.max()} splits, so the test would leak; {AGAIN}"
        raise PreferenceError(msg)
    lost = pairs.loc[chosen.isna() & pairs["split"].notna(), "pair_id"]
    reasons = Counter(reason.get(pair, "not_in_split_file") for pair in lost)
    return AppliedSplit(chosen, dict(sorted(reasons.items())), content.sha256)


def read_split(path: Path) -> SplitFile:
    """Read a split file and check its hash.

    Raises
    ------
    PreferenceError
        If it is no split file, was damaged or edited, or names a pair twice.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror or error}); allowed: a split file of `probekit split`"
        raise PreferenceError(msg) from None
    except (ValueError, RecursionError) as error:
        msg = f"{path}: not JSON ({error}); {AGAIN}"
        raise PreferenceError(msg) from None
    if not isinstance(found, dict) or "probekit_split" not in found:
        msg = f"{path}: no key 'probekit_split'; allowed: a split file of `probekit split`"
        raise PreferenceError(msg)
    said = found.pop("sha256", None)
    try:
        content = SplitFile.model_validate(found, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        msg = f"{path}: key {key!r}: {first['msg']}; {AGAIN}"
        raise PreferenceError(msg) from None
    if content.sha256 != said:
        actual, stated = content.sha256[:16], str(said)[:16]
        msg = f"{path}: was edited or damaged: its content has the hash {actual}..., not {stated}...; {AGAIN}"
        raise PreferenceError(msg)
    listed = pd.Series([pair for ids in [*content.splits.values(), *content.dropped.values()] for pair in ids])
    if listed.duplicated().any():
        msg = f"{path}: pair {listed[listed.duplicated()].iloc[0]!r} stands twice; {AGAIN}"
        raise PreferenceError(msg)
    return content


def _refuse_contradiction(path: Path, chosen: pd.Series, own: pd.Series, pair_ids: pd.Series) -> None:
    """Test and validation pairs of the preference file itself are that here too, or left out, and no others are."""
    for name in ("test", "validation"):
        wrong = chosen.notna() & ((own == name) != (chosen == name))
        if (own == name).any() and wrong.any():
            place = int(wrong.to_numpy().argmax())
            msg = (
                f"{path}: {int(wrong.sum())} pairs contradict the preference file's own {name} split, such as "
                f"{pair_ids.iloc[place]}, there {own.iloc[place]}, here {chosen.iloc[place]}; {AGAIN}"
            )
            raise PreferenceError(msg)


def _hold_out(group: pd.Series, split: pd.Series, name: str, share: float, seed: int) -> pd.Series:
    """Make a split of a share of the training groups."""
    return split.mask((split == "train") & (hash_share(group, seeded(name, seed)) < share), name)


def _without_generator(
    pairs: pd.DataFrame, split: pd.Series, generator: str, *, prefs: Path, official: bool
) -> tuple[pd.Series, pd.Series]:
    """Make the pairs of a generator the test split: split of each pair, missing where left out, and the reason."""
    shows = (pairs["model_a"] == generator) | (pairs["model_b"] == generator)
    if not shows.any():
        known = sorted({*pairs["model_a"], *pairs["model_b"]} - {""})
        some = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "") or "none are named"
        msg = f"{prefs}: no pair has the generator {generator!r}; allowed: {some}"
        raise PreferenceError(msg)
    test = shows & (split == "test") if official else shows
    if not test.any():
        msg = f"{prefs}: no pair of its own test split has the generator {generator!r}"
        raise PreferenceError(msg)
    reasons = pd.Series("", pairs.index)
    reasons[~shows & (split == "test")] = "test_without_the_generator"
    reasons[shows & ~test] = "left_out_generator_outside_test"
    connected = test.groupby(pairs["group"]).transform("any")
    reasons[~test & connected & (reasons == "")] = "connected_to_the_left_out_generator"
    return split.mask(test, "test").mask(reasons != ""), reasons
