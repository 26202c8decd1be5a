"""From a preference file to a set: sides by hash, images resolved, groups, splits, items.

n = pairs.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from probekit.errors import PreferenceError
from probekit.preferences.formats import FORMATS, Shape, choose
from probekit.preferences.groups import assign_groups, assign_splits, placeholder_images
from probekit.preferences.hub import open_folder, open_hub, seems_hub_id
from probekit.preferences.packed import Packed, PackedColumn
from probekit.preferences.preference_set import COLUMNS, PreferenceSet, log_dropped
from probekit.preferences.readers import parse_columns, split_of
from probekit.preferences.tables import Opened, Table

logger = logging.getLogger(__name__)


def load_preferences(
    path: str | Path,
    *,
    format: str = "auto",
    columns: str | Mapping[str, str] | None = None,
    min_confidence: float | None = None,
) -> PreferenceSet:
    """Read preferences as they were published, or in the general form.

    Which image of a pair is A is decided by a hash of the pair, never by the file; ``a_listed_first`` says where A stood.

    Parameters
    ----------
    path
        A JSON Lines, JSON, CSV or Parquet file; a folder of such files, or one that `datasets` saved; or the id of a data
        set on the Hugging Face Hub. General form: ``prompt, chosen, rejected`` or ``prompt, image_a, image_b`` with
        ``label`` (share of votes for A), ``label_b`` (for B) or ``votes_a, votes_b``. Images are paths relative to the
        file and lie in its folder, or bytes in Parquet, which become files beside it once they are needed.
    format
        ``general``, the name of a published format (`probekit.preferences.formats.FORMATS`), or ``auto``: by the fields
        of the first record.
    columns
        Columns of the general form that have other names in the file: ``prompt=caption,image_a=image0,...``, the same as
        a mapping, or the name of a published one (``mj-bench``, ``rapidata``).
    min_confidence
        Leave out pairs of a lower confidence; those without one stay.

    Raises
    ------
    PreferenceError
        If the file or a value in it cannot be used; names the file, the place, the column, the value and what is
        allowed.
    """
    file = Path(path).absolute()
    if format not in ("auto", *FORMATS):
        msg = f"format is {format!r}; allowed: auto, {', '.join(FORMATS)}"
        raise PreferenceError(msg)
    mapping = {} if columns is None else parse_columns(columns)
    if file.is_file():
        opened = [("", Opened(file))]
    elif file.is_dir():
        opened = open_folder(file)
    elif seems_hub_id(path):
        file, opened = Path(path), open_hub(str(path))
    else:
        msg = f"{file}: no such file; allowed: a preference file, a folder of them, or the id of a data set"
        raise PreferenceError(msg)
    tables, frames, packed = [], [], []
    for split, one in opened:
        shape = choose(one, format, mapping)
        table = one.read((*shape.needed, *shape.others))
        frame = _take_splits(table, shape.read(table), split, shape)
        frame = _by_confidence(table, frame, min_confidence)
        frames.append(_resolve_images(table, frame).assign(table=len(tables)))
        tables.append(table)
        packed += _packed_columns(table, shape, mapping)
    frame = frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)
    return _prepare(file, frame, Packed(packed))


def _prepare(file: Path, frame: pd.DataFrame, packed: Packed) -> PreferenceSet:
    """Name the pairs, put them into groups and splits, and make items of their images."""
    dropped = dict(Counter(frame["drop"][frame["drop"] != ""]))
    frame = _identify(frame)
    frame = frame[frame["drop"] == ""].reset_index(drop=True)
    if not len(frame):
        log_dropped(file, dropped)
        msg = f"{file}: no pair is left ({', '.join(f'{n} {reason}' for reason, n in dropped.items())}); needed: one"
        raise PreferenceError(msg)
    placeholders = placeholder_images(frame)
    if placeholders:
        names = ", ".join(placeholders[:5]) + (", ..." if len(placeholders) > 5 else "")
        logger.warning("%s: %d images under > 20 prompts do not join groups: %s", file, len(placeholders), names)
    frame["group"] = assign_groups(frame.assign(group=frame["group"].mask(frame["group"] == "")), placeholders)
    # A split file decides here: what follows is the rule where there is none.
    frame["split"], lost = assign_splits(frame["group"], None if (frame["split"] == "").all() else frame["split"])
    dropped |= lost
    frame = frame[frame["split"].notna()].reset_index(drop=True)
    log_dropped(file, dropped)
    sizes = frame["group"].value_counts()
    counts = (len(frame), frame["prompt"].nunique(), len(sizes), sizes.max())
    logger.info("%s: %d pairs, %d prompts, %d groups, largest %d pairs", file, *counts)
    sides = [
        frame[["prompt", f"image_{side}", f"path_{side}"]].set_axis(["prompt", "image", "path"], axis=1)
        for side in ("a", "b")
    ]
    # Item order: by pair, A before B.
    both = pd.concat(sides).sort_index(kind="stable")
    number = both.groupby(["prompt", "path"], sort=False).ngroup().to_numpy()
    items = both.iloc[np.unique(number, return_index=True)[1]].reset_index(drop=True)
    pairs = frame[["pair_id"]].assign(item_a=number[0::2], item_b=number[1::2]).join(frame[COLUMNS])
    return PreferenceSet(file.stem, file, items, pairs, dropped, tuple(placeholders), packed)


def _take_splits(table: Table, frame: pd.DataFrame, split: str, shape: Shape) -> pd.DataFrame:
    """Keep official splits: those in the file, else that of a folder's part, else the one in a published file's name."""
    if (frame["split"] != "").any():
        return frame
    official = split or (split_of(table.path.name) if shape.official else "")
    if official:
        logger.info("%s: all pairs have the split %s, as the file is named", table.path, official)
    return frame.assign(split=official)


def _by_confidence(table: Table, frame: pd.DataFrame, least: float | None) -> pd.DataFrame:
    """Mark pairs of a confidence that is too low; where there is none, pairs stay."""
    if least is None:
        return frame
    known = frame["confidence"].notna()
    if not known.any():
        logger.warning("%s: no record has a confidence: the least of %g leaves all pairs in", table.path, least)
    low = (frame["confidence"] < least) & (frame["drop"] == "")
    return frame.assign(drop=frame["drop"].mask(low, f"confidence_below_{least:g}"))


def _packed_columns(table: Table, shape: Shape, mapping: Mapping[str, str]) -> list[PackedColumn]:
    """Columns of the table whose bytes are images of the pairs."""
    if table.rows is None:
        return []
    uids = dict(shape.packed)
    return [
        PackedColumn(table.rows, name, table.root.packed, table.path.stem, uids.get(name))
        for name in table.packed
    ]


def _resolve_images(table: Table, frame: pd.DataFrame) -> pd.DataFrame:
    """Add ``path_a`` and ``path_b``, absolute and inside the folder of the file."""
    base, inside = (os.path.realpath(folder) for folder in (table.root.base, table.root.inside))
    allowed = (f"{inside}/", f"{base}/{table.root.packed.name}/")
    folders: dict[str, str] = {}
    code, names = pd.factorize(pd.concat([frame["image_a"], frame["image_b"]], ignore_index=True))
    resolved, outside = [], set()
    for image in names.tolist():
        folder, _, name = image.rpartition("/")
        if "\0" in image or image.startswith("/"):
            resolved.append("")
            outside.add(image)
            continue
        if folder not in folders:
            folders[folder] = os.path.realpath(f"{base}/{folder}")
        # Folders are resolved once each: a million images lie in few.
        path = f"{folders[folder]}/{name}"
        path = os.path.realpath(path) if name in ("", ".", "..") or os.path.islink(path) else path
        resolved.append(path)
        if not path.startswith(allowed):
            outside.add(image)
    paths = pd.Series(resolved, dtype="str")
    a, b = code[: len(frame)], code[len(frame) :]
    for index in np.flatnonzero(frame["image_a"].isin(outside) | frame["image_b"].isin(outside))[:1] if outside else ():
        record = frame.iloc[index]
        image = record["image_a"] if record["image_a"] in outside else record["image_b"]
        table.fail(int(record["record"]), f"image is {image!r}; allowed: a relative path that stays inside {inside}")
    frame = frame.assign(path_a=paths[a].to_numpy(), path_b=paths[b].to_numpy())
    same = (frame["path_a"] == frame["path_b"]) & (frame["drop"] == "")
    for index in np.flatnonzero(same)[:1]:
        record = frame.iloc[index]
        table.fail(int(record["record"]), f"both images are {record['image_a']!r}; allowed: two different files")
    return frame


def _identify(frame: pd.DataFrame) -> pd.DataFrame:
    """Add ``pair_id`` and ``a_listed_first``, and turn half of the pairs round.

    The identity of a pair does not depend on which side an image stands on, so the side that its hash chooses says
    nothing about the winner.
    """
    columns = zip(frame["prompt"], frame["image_a"], frame["image_b"], strict=True)
    hashes = [
        hashlib.sha256(f"{prompt}\0{a}\0{b}".encode() if a < b else f"{prompt}\0{b}\0{a}".encode()).digest()
        for prompt, a, b in columns
    ]
    identity = pd.Series([digest.hex() for digest in hashes], frame.index, dtype="str")
    occurrence = identity.groupby(identity).cumcount()
    pair_ids = [
        hashlib.sha256(f"{digest}:{number}".encode()).hexdigest()[:32]
        for digest, number in zip(identity, occurrence, strict=True)
    ]
    smaller_first = np.array([digest[0] & 1 for digest in hashes], bool)
    turn = (frame["image_a"] < frame["image_b"]) != smaller_first
    label = frame["label"].mask(turn, 1 - frame["label"])
    frame = frame.assign(pair_id=pair_ids, label=label, a_listed_first=~turn)
    for name in ("image", "path", "model"):
        a, b = frame[f"{name}_a"], frame[f"{name}_b"]
        frame[f"{name}_a"], frame[f"{name}_b"] = a.mask(turn, b), b.mask(turn, a)
    return frame
