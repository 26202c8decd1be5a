"""Preferences as probekit uses them: distinct (prompt, image) items and pairs over them.

n = pairs, m = items.
"""

import hashlib
import logging
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow.lib import ArrowException
from pyarrow.parquet import read_table

from probekit._types import row_id
from probekit.errors import ImageError, PreferenceError
from probekit.preferences.groups import (
    SPLITS,
    assign_groups,
    assign_splits,
    drop_connected,
    hash_share,
    placeholder_images,
    split_overlap,
)
from probekit.preferences.readers import FORMATS
from probekit.preferences.split_files import apply_split

logger = logging.getLogger(__name__)

COLUMNS = ["label", "weight", "strength", "n_votes", "group", "split", "source", "model_a", "model_b", "ranking_id"]
COLUMNS += ["split_file"]  # SHA-256 of the split file, empty without one
CACHE_COLUMNS = ["path", "size", "mtime_ns", "sha256"]


@dataclass(frozen=True)
class PreferenceSet:
    """Judged pairs of images; made by ``load_preferences``.

    Attributes
    ----------
    name, path
        Stem of the file, and the file.
    items
        One line per distinct (prompt, image) (m): ``prompt``, ``image`` as written in the file, ``path`` absolute.
    pairs
        One line per pair (n): ``pair_id``, ``item_a`` and ``item_b`` (positions in ``items``), ``label`` (probability
        that A is preferred, 0.5 = tie), ``weight``, ``strength``, ``n_votes``, ``group``, ``split`` (``train``,
        ``validation`` or ``test``), ``source``, ``model_a``, ``model_b``, ``ranking_id``, ``split_file``
        (SHA-256 of the split file, empty without one).
    dropped
        Pairs of the file that are not here, by reason: their group reaches into a later split, or a split file leaves
        them out.
    placeholders
        Images under more than 20 prompts; they do not join groups.
    own_splits
        The splits that the file itself names.
    overlap
        What these share; see ``split_overlap``.
    """

    name: str
    path: Path
    items: pd.DataFrame
    pairs: pd.DataFrame
    dropped: dict[str, int]
    placeholders: tuple[str, ...]
    own_splits: tuple[str, ...] = ()
    overlap: dict[str, dict[str, int]] = field(default_factory=dict)

    def limit(self, n: int) -> "PreferenceSet":
        """Take whole groups in the order of their hash, at most n pairs, so that smaller sets lie in larger ones.

        Raises
        ------
        PreferenceError
            If not even the first group fits.
        """
        order = hash_share(self.pairs["group"], "limit")
        last = order.map(order.value_counts().sort_index().cumsum())  # pairs up to the end of each pair's group
        keep = last <= n
        if not keep.any():
            msg = f"{self.path}: limit is {n}; allowed: at least {last.min()}, the pairs of the first group"
            raise PreferenceError(msg)
        pairs = self.pairs[keep].reset_index(drop=True)
        used = np.unique(pairs[["item_a", "item_b"]].to_numpy())
        renumbered = {side: np.searchsorted(used, pairs[side]) for side in ("item_a", "item_b")}
        return replace(self, items=self.items.iloc[used].reset_index(drop=True), pairs=pairs.assign(**renumbered))

    def check_images(self, *, max_bad: float = 0.0) -> None:
        """Look for every image file without reading any.

        Parameters
        ----------
        max_bad
            Largest share of items whose file may be missing.

        Raises
        ------
        ImageError
            If more are missing; names the first ten files and counts all.
        """
        self._stamps(max_bad)

    def image_digests(self, cache: Path | None = None, *, max_bad: float = 0.0) -> dict[str, bytes]:
        """SHA-256 of the bytes of each distinct image file, by absolute path; a stand-in where the file is missing.

        Parameters
        ----------
        cache
            Parquet file that remembers digests by path, size and time of change; made if absent.
        max_bad
            Largest share of items whose file may be missing.

        Raises
        ------
        ImageError
            If more are missing, before any is read; names the first ten and counts all.
        """
        stamps = self._stamps(max_bad)
        keys = [(path, *found) for path, found in stamps.items() if found is not None]
        known = _read_cache(cache)
        with ThreadPoolExecutor() as pool:  # hashing and reading leave the interpreter's lock alone
            new = [key for key in keys if key not in known]
            hashed = zip(new, pool.map(_file_digest, [key[0] for key in new]), strict=True)
            found = {key: digest for key, digest in hashed if digest is not None}
        if cache is not None and found:
            # One entry per path: an old one of a changed file goes.
            entries = {key[0]: (key, value) for key, value in (known | found).items()}
            _write_cache(cache, dict(entries.values()))
        digests = {key[0]: found.get(key) or known[key] for key in keys if key in found or key in known}
        absent = [path for path in stamps if path not in digests]
        self._refuse_absent(absent, max_bad)
        if absent:
            logger.warning("%s: %d image files are missing or cannot be read", self.path, len(absent))
        return {path: digests.get(path) or stand_in for path, stand_in in self._stand_ins().items()}

    def _stamps(self, max_bad: float) -> dict[str, tuple[int, int] | None]:
        """Size and time of change of each distinct image file, by path; None where there is no file."""
        stamps = {path: _file_status(path) for path in self.items["path"].unique().tolist()}
        self._refuse_absent([path for path, found in stamps.items() if found is None], max_bad)
        return stamps

    def _refuse_absent(self, paths: list[str], max_bad: float) -> None:
        items = int(self.items["path"].isin(paths).sum())
        if items > max_bad * len(self.items):
            more = f" and {len(paths) - 10} more" if len(paths) > 10 else ""
            msg = (
                f"{self.path}: {len(paths)} image files are missing: {', '.join(paths[:10])}{more}; "
                f"{items} of {len(self.items)} rows need them, allowed: a share of {max_bad:g} (--max-bad)"
            )
            raise ImageError(msg)

    def _stand_ins(self) -> dict[str, bytes]:
        """Give what stands for the digest of each image file, by path, where it is missing: no file has it."""
        named = self.items.drop_duplicates("path")
        digests = (hashlib.sha256(f"missing file: {image}".encode()).digest() for image in named["image"])
        return dict(zip(named["path"], digests, strict=True))

    def rows(self, digests: Mapping[str, bytes]) -> pd.DataFrame:
        """Rows of a feature store that these preferences need, each once, in the order of the items.

        Returns
        -------
        DataFrame
            ``row_id``, ``prompt``, ``image_id``, ``path``, ``image_sha256`` (bytes), ``status`` (0, or 1 where the
            image file is missing).
        """
        found = pd.Series([digests[path] for path in self.items["path"]], dtype=object)
        absent = {path for path, stand_in in self._stand_ins().items() if digests[path] == stand_in}
        return (
            pd.DataFrame(
                {
                    "row_id": self._row_ids(digests),
                    "prompt": self.items["prompt"],
                    "image_id": self.items["image"],
                    "path": self.items["path"],
                    "image_sha256": found,
                    "status": self.items["path"].isin(absent).astype("uint8"),
                }
            )
            .drop_duplicates("row_id")
            .reset_index(drop=True)
        )

    def judgements(self, digests: Mapping[str, bytes]) -> pd.DataFrame:
        """Pairs by the keys of their rows, as a feature store keeps them beside its shards.

        Files of equal bytes are one image here. A pair of two such files is left out; groups that share an image under
        two names become one, and the pairs of all but its last split are left out. Both are logged.
        """
        ids = self._row_ids(digests)
        keys = {"row_a": ids[self.pairs["item_a"]], "row_b": ids[self.pairs["item_b"]]}
        same = keys["row_a"] == keys["row_b"]
        if same.any():
            logger.warning("%s: %d pairs left out: both files are the same picture", self.path, same.sum())
        group = self._groups_by_content(digests)
        joined = int((self.pairs["group"].groupby(group).transform("nunique") > 1).sum())
        if joined:
            logger.warning("%s: equal pictures under different names join the groups of %d pairs", self.path, joined)
        split, dropped = drop_connected(group[~same], self.pairs["split"][~same])
        _log_dropped(self.path, dropped)
        images = self.items["image"].to_numpy()
        named = {f"image_{side}": images[self.pairs[f"item_{side}"]] for side in ("a", "b")}
        judged = self.pairs[COLUMNS].assign(group=group, split=split)
        frame = self.pairs[["pair_id"]].assign(**keys, **named).join(judged)
        return frame[frame["split"].notna()].reset_index(drop=True)

    def _groups_by_content(self, digests: Mapping[str, bytes]) -> pd.Series:
        """Join the groups of pairs (n) that show equal bytes under different names, by the rule for names."""
        image = np.array([digests[path].hex() for path in self.items["path"]], object)
        sides = {"path_a": image[self.pairs["item_a"]], "path_b": image[self.pairs["item_b"]]}
        prompt = self.items["prompt"].to_numpy()[self.pairs["item_a"]]
        pairs = self.pairs[["group"]].assign(prompt=prompt, **sides)
        placeholders = {digests[path].hex() for path in self.placeholders if path in digests}
        component = assign_groups(pairs, sorted(placeholders.union(placeholder_images(pairs))))
        return self.pairs["group"].groupby(component).transform("min")

    def _row_ids(self, digests: Mapping[str, bytes]) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
        keys = zip(self.items["path"], self.items["prompt"], strict=True)
        return np.array([row_id(digests[path], prompt) for path, prompt in keys], object)


def load_preferences(path: str | Path, *, format: str = "auto", split_file: Path | None = None) -> PreferenceSet:
    """Read a preference file.

    Parameters
    ----------
    path
        JSON Lines, JSON, CSV or Parquet with ``prompt, chosen, rejected`` or ``prompt, image_a, image_b, label``.
        Images are paths relative to the file and lie in its folder. Where the winner is named, a hash of the pair
        decides which side it stands on; ``model_a`` then belongs to ``chosen``, ``model_b`` to ``rejected``.
    format
        ``general``, or ``auto``.
    split_file
        File of `probekit split` that says which pair is in which split, in place of the hash.

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
    if not file.is_file():
        msg = f"{file}: no such file; allowed: a preference file"
        raise PreferenceError(msg)
    frame = FORMATS["general" if format == "auto" else format](file)
    frame = _resolve_images(file, frame)
    frame = _identify(frame)
    placeholders = placeholder_images(frame)
    if placeholders:
        names = ", ".join(placeholders[:5]) + (", ..." if len(placeholders) > 5 else "")
        logger.warning("%s: %d images under > 20 prompts do not join groups: %s", file, len(placeholders), names)
    frame["group"] = assign_groups(frame.assign(group=frame["group"].mask(frame["group"] == "")), placeholders)
    own = None if (frame["split"] == "").all() else frame["split"]
    overlap = {} if own is None else split_overlap(frame)
    frame["split"], dropped = assign_splits(frame["group"], own)
    frame["split_file"] = ""
    if split_file is not None:
        chosen = apply_split(split_file, frame[["pair_id", "group", "split"]], own=own)
        frame["split"], frame["split_file"] = chosen.split, chosen.sha256
        dropped |= chosen.dropped
    frame = frame[frame["split"].notna()].reset_index(drop=True)
    _log_dropped(file, dropped)
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
    named = () if own is None else tuple(name for name in SPLITS if (own == name).any())
    return PreferenceSet(file.stem, file, items, pairs, dropped, tuple(placeholders), named, overlap)


def _log_dropped(file: Path, dropped: Mapping[str, int]) -> None:
    for reason, count in dropped.items():
        logger.warning("%s: %d pairs left out: %s", file, count, reason.replace("_", " "))


def _resolve_images(file: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """Add ``path_a`` and ``path_b``, absolute and inside the folder of the file."""
    root = os.path.realpath(file.parent)
    folders: dict[str, str] = {}
    resolved: dict[str, str] = {}
    for image in pd.unique(pd.concat([frame["image_a"], frame["image_b"]])).tolist():
        folder, _, name = image.rpartition("/")
        if "\0" in image or image.startswith("/"):
            resolved[image] = ""
            continue
        if folder not in folders:
            folders[folder] = os.path.realpath(f"{root}/{folder}")
        # Folders are resolved once each: a million images lie in few.
        path = f"{folders[folder]}/{name}"
        resolved[image] = os.path.realpath(path) if name in ("", ".", "..") or Path(path).is_symlink() else path
    outside = {image for image, path in resolved.items() if not path.startswith(f"{root}/")}
    frame = frame.assign(path_a=frame["image_a"].map(resolved), path_b=frame["image_b"].map(resolved))
    for index in np.flatnonzero(frame["image_a"].isin(outside) | frame["image_b"].isin(outside))[:1]:
        record = frame.iloc[index]
        image = record["image_a"] if record["image_a"] in outside else record["image_b"]
        msg = f"{file}, {record['place']}: image is {image!r}; allowed: a relative path that stays inside {root}"
        raise PreferenceError(msg)
    for index in np.flatnonzero(frame["path_a"] == frame["path_b"])[:1]:
        record = frame.iloc[index]
        msg = f"{file}, {record['place']}: both images are {record['image_a']!r}; allowed: two different files"
        raise PreferenceError(msg)
    return frame


def _identify(frame: pd.DataFrame) -> pd.DataFrame:
    """Add ``pair_id`` and, where the file names winners, turn half of the pairs round.

    The identity of a pair does not depend on which side an image stands on, so the side that its hash chooses says
    nothing about the winner.
    """
    columns = zip(frame["prompt"], frame["image_a"], frame["image_b"], strict=True)
    hashes = [hashlib.sha256("\0".join([prompt, *sorted([a, b])]).encode()).digest() for prompt, a, b in columns]
    identity = pd.Series([digest.hex() for digest in hashes], frame.index)
    occurrence = identity.groupby(identity).cumcount()
    pair_ids = [
        hashlib.sha256(f"{digest}:{number}".encode()).hexdigest()[:32]
        for digest, number in zip(identity, occurrence, strict=True)
    ]
    smaller_first = np.array([digest[0] & 1 for digest in hashes], bool)
    turn = frame["winner_first"] & ((frame["image_a"] < frame["image_b"]) != smaller_first)
    frame = frame.assign(pair_id=pair_ids, label=frame["label"].mask(turn, 1 - frame["label"]))
    for name in ("image", "path", "model"):
        a, b = frame[f"{name}_a"], frame[f"{name}_b"]
        frame[f"{name}_a"], frame[f"{name}_b"] = a.mask(turn, b), b.mask(turn, a)
    return frame


def _file_status(path: str) -> tuple[int, int] | None:
    """Size and time of change of a regular file, None if there is none."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _file_digest(path: str) -> bytes | None:
    """SHA-256 of a file; None where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None


def _read_cache(cache: Path | None) -> dict[tuple[str, int, int], bytes]:
    if cache is None or not cache.is_file():
        return {}
    try:
        table = read_table(cache, page_checksum_verification=True)
        rows = zip(*(table.column(name).to_pylist() for name in CACHE_COLUMNS), strict=True)
        return {(path, size, changed): bytes.fromhex(digest) for path, size, changed, digest in rows}
    except (OSError, ValueError, TypeError, KeyError, ArrowException) as error:
        logger.warning("%s: not a cache of digests, made anew (%s)", cache, error)
        return {}


def _write_cache(cache: Path, digests: Mapping[tuple[str, int, int], bytes]) -> None:
    rows = [(*key, digest.hex()) for key, digest in digests.items()]
    cache.parent.mkdir(parents=True, exist_ok=True)
    for left in cache.parent.glob(f"{cache.name}.*.tmp"):  # by a process that was killed here
        left.unlink(missing_ok=True)
    temp = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        # A flipped bit in a digest would make a row of its own: checksums of pages show it.
        pd.DataFrame(rows, columns=CACHE_COLUMNS).to_parquet(temp, index=False, write_page_checksum=True)
        temp.replace(cache)
    except OSError as error:
        temp.unlink(missing_ok=True)
        msg = f"{cache}: cannot be written ({error.strerror or error}); mend that and run the same command again"
        raise PreferenceError(msg) from error
