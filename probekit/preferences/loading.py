"""From a preference file to a set: sides by hash, images resolved, groups, splits, items.

n = pairs.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api.types import union_categoricals

from probekit._types import IntArray
from probekit.errors import ConfigError, PreferenceError
from probekit.preferences.formats import FORMATS, Shape, choose
from probekit.preferences.groups import SPLITS, assign_groups, assign_splits, placeholder_images, split_overlap
from probekit.preferences.hub import open_folder, open_hub, seems_hub_id
from probekit.preferences.packed import Packed, PackedColumn
from probekit.preferences.preference_set import COLUMNS, PreferenceSet, log_dropped
from probekit.preferences.readers import parse_columns, split_of
from probekit.preferences.split_files import apply_split
from probekit.preferences.tables import Opened, Table

logger = logging.getLogger(__name__)

_CHUNK = 50_000  # texts that are Python objects at once
CODED = ["prompt", "image_a", "image_b", "path_a", "path_b"]  # kept as categories while a file is read


def load_preferences(
    path: str | Path,
    *,
    format: str = "auto",
    columns: str | Mapping[str, str] | None = None,
    min_confidence: float | None = None,
    split_file: str | Path | None = None,
) -> PreferenceSet:
    """Read preferences as they were published, or in the general form.

    Which image of a pair is A is decided by hashes of prompt and image (the smaller is A), not by the file;
    ``a_listed_first`` says where A stood.

    Parameters
    ----------
    path
        A JSON Lines, JSON, CSV or Parquet file; a folder of such files or one that `datasets` saved; or the id of a
        data set on the Hugging Face Hub. General form: ``prompt, chosen, rejected``, or ``prompt, image_a, image_b``
        with ``label`` (share of votes for A), ``label_b`` (for B) or ``votes_a, votes_b``. Images are paths relative to
        the file and lie in its folder, or bytes in Parquet, which become files beside it once they are needed.
    format
        ``general``, the name of a published format (`probekit.preferences.formats.FORMATS`), or ``auto``: by the fields
        of the first record.
    columns
        Columns of the general form that have other names in the file: ``prompt=caption,image_a=image0,...``, the same
        as a mapping, or the name of a published one (``mj-bench``, ``rapidata``).
    min_confidence
        Leave out pairs of a lower confidence; those without one stay.
    split_file
        File of `probekit split` that says which pair is in which split, in place of the hash.

    Raises
    ------
    ConfigError
        If there is no such format, or `columns` is no mapping of columns.
    PreferenceError
        If the file or a value in it cannot be used; names the file, the place, the column, the value and what is
        allowed.
    """
    file = Path(path).absolute()
    if format not in ("auto", *FORMATS):
        msg = f"format is {format!r}; allowed: auto, {', '.join(FORMATS)}"
        raise ConfigError(msg)
    mapping = {} if columns is None else parse_columns(columns)
    notes: Counter[str] = Counter()
    if file.is_file():
        opened = [("", Opened(file))]
    elif file.is_dir():
        opened = open_folder(file, notes)
    elif seems_hub_id(path):
        file, opened = Path(path), open_hub(str(path), notes)
    else:
        msg = f"{file}: no such file; allowed: a preference file, a folder of them, or the id of a data set"
        raise PreferenceError(msg)
    frames: list[pd.DataFrame] = []
    packed: list[PackedColumn] = []
    for split, one in opened:
        pairs, of_bytes, of_table = _read(one, choose(one, format, mapping), split, min_confidence)
        frames.append(pairs)
        packed += of_bytes
        notes += of_table
    del pairs  # the frame alone is kept, and given back step by step
    given = [bool((frame["split"] != "").any()) for frame in frames]
    if any(given) and not all(given):
        msg = f"{file}: {opened[given.index(False)][1].path.name} has no split; allowed: one for each part, or for none"
        raise PreferenceError(msg)
    return replace(_prepare(file, _together(frames), Packed(packed), split_file), notes=dict(notes))


def _read(
    opened: Opened, shape: Shape, split: str, min_confidence: float | None
) -> tuple[pd.DataFrame, list[PackedColumn], Counter[str]]:
    """Read the pairs of one file; its table is given back to memory."""
    table = opened.read((*shape.needed, *shape.others))
    try:
        frame = _take_splits(table, shape.read(table), split, shape)
    except UnicodeEncodeError:
        table.refuse_half_characters()
    frame = _by_confidence(table, frame, min_confidence)
    return _resolve_images(table, frame), _packed_columns(table, shape), table.notes


def _together(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Put the pairs of several files into one frame."""
    if len(frames) == 1:
        return frames.pop()
    together = pd.concat([frame.drop(columns=CODED) for frame in frames], ignore_index=True)
    return together.assign(**{name: union_categoricals([frame[name] for frame in frames]) for name in CODED})


def _prepare(file: Path, frame: pd.DataFrame, packed: Packed, split_file: str | Path | None) -> PreferenceSet:
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
    own = None if (frame["split"] == "").all() else frame["split"]
    overlap = {} if own is None else split_overlap(frame)
    frame["split"], lost = assign_splits(frame["group"], own)
    dropped |= lost
    frame["split_file"] = ""
    if split_file is not None:
        chosen = apply_split(Path(split_file), frame[["pair_id", "group", "split"]], own=own)
        frame["split"], frame["split_file"] = chosen.split, chosen.sha256
        dropped |= chosen.dropped
    frame = frame[frame["split"].notna()].reset_index(drop=True)
    log_dropped(file, dropped)
    sizes = frame["group"].value_counts()
    counts = (len(frame), frame["prompt"].nunique(), len(sizes), sizes.max())
    logger.info("%s: %d pairs, %d prompts, %d groups, largest %d pairs", file, *counts)
    items, number = _items(frame)
    pairs = frame[["pair_id"]].assign(item_a=number[:, 0], item_b=number[:, 1]).join(frame[COLUMNS])
    named = () if own is None else tuple(name for name in SPLITS if (own == name).any())
    return PreferenceSet(file.stem, file, items, pairs, dropped, tuple(placeholders), packed, named, overlap)


def _items(frame: pd.DataFrame) -> tuple[pd.DataFrame, IntArray]:
    """Distinct (prompt, path) in the order of pairs, A before B, and their numbers in each pair (n, 2)."""
    prompt, a, b = (frame[name].cat for name in ("prompt", "path_a", "path_b"))
    both = np.stack([a.codes, b.codes], axis=1).astype(np.int64)
    key = both + prompt.codes.to_numpy(np.int64)[:, None] * len(a.categories)
    number, _ = pd.factorize(key.ravel())
    first = np.unique(number, return_index=True)[1]
    images = np.stack([frame["image_a"].cat.codes, frame["image_b"].cat.codes], axis=1)
    columns = {
        "prompt": prompt.categories[prompt.codes.to_numpy()[first // 2]],
        "image": frame["image_a"].cat.categories[images.ravel()[first]],
        "path": a.categories[both.ravel()[first]],
    }
    return pd.DataFrame(columns), number.reshape(-1, 2)


def _take_splits(table: Table, frame: pd.DataFrame, split: str, shape: Shape) -> pd.DataFrame:
    """Keep official splits: those in the file, else of a folder's part, else the one in a published file's name."""
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
    unknown = int((frame["confidence"].isna() & (frame["drop"] == "")).sum())
    table.note(unknown, f"pairs have no confidence and stay: the least of {least:g} is for those that have one")
    low = (frame["confidence"] < least) & (frame["drop"] == "")
    return frame.assign(drop=frame["drop"].mask(low, f"confidence_below_{least:g}"))


def _packed_columns(table: Table, shape: Shape) -> list[PackedColumn]:
    """Columns of the table whose bytes are images of the pairs."""
    if table.rows is None:
        return []
    uids = dict(shape.packed)
    return [PackedColumn(table.rows, name, table.root.packed, table.root.stem, uids.get(name)) for name in table.packed]


def _resolve_images(table: Table, frame: pd.DataFrame) -> pd.DataFrame:
    """Add ``path_a`` and ``path_b``, absolute and inside the folder of the file; repeated texts become categories."""
    base, inside = (os.path.realpath(folder) for folder in (table.root.base, table.root.inside))
    code, names = pd.factorize(pd.concat([frame.pop("image_a"), frame.pop("image_b")], ignore_index=True))
    resolve = _Resolver(base, (f"{inside}/", f"{base}/{table.root.packed.name}/"))
    paths = pd.concat([pd.Series(map(resolve, part), dtype="str") for part in _chunks(names)], ignore_index=True)
    number, distinct = pd.factorize(paths)
    half = len(frame)
    for side, of in (("a", code[:half]), ("b", code[half:])):
        frame[f"image_{side}"] = pd.Categorical.from_codes(of, names)
        frame[f"path_{side}"] = pd.Categorical.from_codes(number[of], distinct)
    outside = (paths == "").to_numpy()
    for index in np.flatnonzero(outside[code[:half]] | outside[code[half:]])[:1] if outside.any() else ():
        image = names[code[index] if outside[code[index]] else code[half + index]]
        place = int(frame["record"].iloc[index])
        table.fail(place, f"image is {image!r}; allowed: a relative path that stays inside {inside}")
    same = (frame["path_a"].cat.codes == frame["path_b"].cat.codes) & (frame["drop"] == "")
    for index in np.flatnonzero(same)[:1]:
        image = frame["image_a"].iloc[index]
        place = int(frame["record"].iloc[index])
        table.fail(place, f"both images are {image!r}; allowed: two different files")
    prompt, prompts = pd.factorize(frame.pop("prompt"))
    return frame.assign(prompt=pd.Categorical.from_codes(prompt, prompts))


class _Resolver:
    """Turns the name of an image into its absolute path, empty where that is in none of the folders."""

    def __init__(self, base: str, allowed: tuple[str, ...]) -> None:
        self._base, self._allowed = base, allowed
        self._folders: dict[str, str] = {}

    def __call__(self, image: str) -> str:
        if "\0" in image or image.startswith("/"):
            return ""
        folder, _, name = image.rpartition("/")
        # Folders are resolved once each: a million images lie in few.
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(f"{self._base}/{folder}")
        path = f"{self._folders[folder]}/{name}"
        if name in ("", ".", "..") or os.path.islink(path):  # noqa: PTH114 - twice as fast, a million times
            path = os.path.realpath(path)
        return path if path.startswith(self._allowed) else ""


def _chunks(values: Any) -> Iterator[list[Any]]:
    """Values as Python has them, some at a time: a million texts take much memory as objects."""
    for start in range(0, len(values), _CHUNK):
        yield values[start : start + _CHUNK].tolist()


def _identify(frame: pd.DataFrame) -> pd.DataFrame:
    """Add ``pair_id`` and ``a_listed_first``, and turn half of the pairs round.

    A is the image of which the SHA-256 of prompt and name is smaller. That says nothing about the winner, does not
    depend on where an image stands in the file, and orders all images of a prompt: over the pairs of a ranking the
    sides are one order of its images. The identity of a pair does not depend on its sides.
    """
    parts, turned = [], []
    for rows in zip(*(_chunks(frame[name].array) for name in ("prompt", "image_a", "image_b")), strict=True):
        digests = []
        for prompt, a, b in zip(*rows, strict=True):
            first, second = (a, b) if a < b else (b, a)
            digests.append(_sha256(f"{prompt}\0{first}\0{second}"))
            turned.append(_sha256(f"{prompt}\0{b}") < _sha256(f"{prompt}\0{a}"))
        parts.append(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32))
    identity = np.concatenate(parts)
    heads = pd.Series(identity[:, :8].copy().view(np.uint64)[:, 0])
    occurrence = heads.groupby(heads).cumcount().to_numpy()  # pairs that stand in the file more than once stay apart
    starts = range(0, len(identity), _CHUNK)
    pair_ids = [_pair_ids(identity[at : at + _CHUNK], occurrence[at : at + _CHUNK]) for at in starts]
    turn = np.array(turned)
    frame = frame.assign(pair_id=pd.concat(pair_ids, ignore_index=True), a_listed_first=~turn)
    frame["label"] = frame["label"].mask(turn, 1 - frame["label"])
    for name in ("image", "path"):
        a, b = frame[f"{name}_a"].cat, frame[f"{name}_b"].cat
        sides = [np.where(turn, b.codes, a.codes), np.where(turn, a.codes, b.codes)]
        for side, codes in zip("ab", sides, strict=True):
            frame[f"{name}_{side}"] = pd.Categorical.from_codes(codes, a.categories)
    a, b = frame["model_a"], frame["model_b"]
    frame["model_a"], frame["model_b"] = a.mask(turn, b), b.mask(turn, a)
    return frame


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def turned_once(prompts: Iterable[str], images_a: Iterable[str], images_b: Iterable[str]) -> NDArray[np.bool_]:
    """Say of each pair (n,) whether its sides were the other way round in stores and runs of earlier versions.

    These took the first bit of the pair's identity for whether A is the image of the smaller name, pair by pair.
    """
    sides = zip(prompts, images_a, images_b, strict=True)
    bits = [(a < b) != _sha256(f"{prompt}\0{min(a, b)}\0{max(a, b)}")[0] & 1 for prompt, a, b in sides]
    return np.array(bits, bool)


def _pair_ids(identity: IntArray, occurrence: IntArray) -> pd.Series:
    texts = (f"{digest.tobytes().hex()}:{number}" for digest, number in zip(identity, occurrence, strict=True))
    return pd.Series([hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts], dtype="str")
