"""Preferences as probekit uses them: distinct (prompt, image) items and pairs over them.

n = pairs, m = items.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from probekit._types import Progress, row_id
from probekit.errors import ImageError, PreferenceError
from probekit.preferences.digests import (
    ImageDigests,
    SideFacts,
    Stamp,
    facts_of,
    file_status,
    stamp_bytes,
    stamp_files,
)
from probekit.preferences.groups import assign_groups, drop_connected, hash_share, placeholder_images
from probekit.preferences.packed import Packed

logger = logging.getLogger(__name__)

COLUMNS = ["label", "weight", "strength", "n_votes", "group", "split", "source", "model_a", "model_b", "ranking_id"]
COLUMNS += ["a_listed_first", "split_file"]  # split_file: SHA-256 of the split file, empty without one
FACTS = {"bytes": "Int64", "width": "Int64", "height": "Int64", "format": "str"}  # of each side, in judgements


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
        ``validation`` or ``test``), ``source``, ``model_a``, ``model_b``, ``ranking_id``, ``a_listed_first`` (whether A
        stands first in the file; which image is A is decided by hashes of prompt and image), ``split_file`` (SHA-256 of
        the split file, empty without one).
    dropped
        Pairs of the file that are not here, by reason: not judged, confidence too low, their group reaches into a
        later split, or a split file leaves them out.
    placeholders
        Images under more than 20 prompts; they do not join groups.
    packed
        Images that stand as bytes in the file; `unpack_images` writes them beside it.
    own_splits
        The splits that the file itself names.
    overlap
        What these share; see ``split_overlap``.
    notes
        What is odd in the file and is neither an error nor a pair left out, such as votes against the published
        winner, and of how many records it is true.
    """

    name: str
    path: Path
    items: pd.DataFrame
    pairs: pd.DataFrame
    dropped: dict[str, int]
    placeholders: tuple[str, ...]
    packed: Packed
    own_splits: tuple[str, ...] = ()
    overlap: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

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

    def unpack_images(self, progress: Progress | None = None) -> None:
        """Write images that stand as bytes in the file, and are needed here, as files beside it; present ones stay.

        Raises
        ------
        ImageError
            If the folder cannot be written.
        """
        differ = self.packed.unpack(self._packed_paths(), progress)
        if differ:
            logger.warning("%s: %d images have other bytes than an earlier one of the same name", self.path, differ)

    def images_to_unpack(self) -> tuple[int, int]:
        """How many images `unpack_images` would write, and about how many bytes they take."""
        absent = {path for path in self._packed_paths() if file_status(path) is None}
        return len(absent), self.packed.size(absent)

    def _packed_paths(self) -> set[str]:
        folders = self.packed.folders
        paths = self.items["path"].unique().tolist() if folders else []
        return {path for path in paths if path.rpartition("/")[0] in folders}

    def image_digests(self, cache: Path | None = None, *, max_bad: float = 0.0) -> ImageDigests:
        """SHA-256 of the bytes of each distinct image file, by absolute path; a stand-in where the file is missing.

        Images that stand as bytes in the preference file and are not unpacked yet are hashed where they are.

        Parameters
        ----------
        cache
            Parquet file that remembers digests and headers by path, size and time of change; made if absent.
        max_bad
            Largest share of items whose file may be missing.

        Raises
        ------
        ImageError
            If more are missing, before any is read; names the first ten and counts all.
        """
        stamps = self._stamps(max_bad)
        found: dict[str, tuple[int, Stamp]] = {}
        keys = [(path, *status) for path, status in stamps.items() if status is not None]
        for (path, size, _), stamp in stamp_files(keys, cache).items():
            found[path] = size, stamp
        for path, data in self.packed.read(self._packed_paths() - found.keys()):
            found.setdefault(path, (len(data), stamp_bytes(data)))
        absent = [path for path in stamps if path not in found]
        self._refuse_absent(absent, max_bad)
        if absent:
            logger.warning("%s: %d image files are missing or cannot be read", self.path, len(absent))
        stand_ins = self._stand_ins()
        digests = {path: found[path][1].sha256 if path in found else other for path, other in stand_ins.items()}
        return ImageDigests(digests, {path: facts_of(*known) for path, known in found.items()})

    def _stamps(self, max_bad: float) -> dict[str, tuple[int, int] | None]:
        """Size and time of change of each distinct image file, by path; None where there is no file."""
        stamps = {path: file_status(path) for path in self.items["path"].unique().tolist()}
        absent = {path for path, found in stamps.items() if found is None}
        self._refuse_absent([path for path in stamps if path in absent - self._packed_paths()], max_bad)
        return stamps

    def _refuse_absent(self, paths: list[str], max_bad: float) -> None:
        items = int(self.items["path"].isin(paths).sum())
        if items > max_bad * len(self.items):
            more = f" and {len(paths) - 10} more" if len(paths) > 10 else ""
            msg = (
                f"{self.path}: {len(paths)} image files are missing: {', '.join(sorted(paths)[:10])}{more}; "
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

        What `image_digests` found in the files comes along for each side: ``bytes_a``, ``width_a``, ``height_a``,
        ``format_a`` (such as PNG; empty where unknown) and the same of B.

        Files of equal bytes are one image here. A pair of two such files is left out; groups that share an image under
        two names become one, and the pairs of all but its last split are left out. Both are logged. ``left_out_of_set``
        says in each pair how many pairs of the file are not here, by reason; empty where all are.
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
        log_dropped(self.path, dropped)
        images = self.items["image"].to_numpy()
        named = {f"image_{side}": images[self.pairs[f"item_{side}"]] for side in ("a", "b")}
        lost = Counter(self.dropped) + Counter(dropped) + Counter({"same_picture_twice": int(same.sum())})
        told = "; ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(lost.items()))
        judged = self.pairs[COLUMNS].assign(group=group, split=split, left_out_of_set=told, **self._facts(digests))
        frame = self.pairs[["pair_id"]].assign(**keys, **named).join(judged)
        return frame[frame["split"].notna()].reset_index(drop=True)

    def _facts(self, digests: Mapping[str, bytes]) -> dict[str, pd.Series]:
        """Columns of what is known of the files of both sides (n)."""
        known: Mapping[str, SideFacts] = digests.facts if isinstance(digests, ImageDigests) else {}
        nothing = SideFacts(None, None, None, "")
        facts = [known.get(path, nothing) for path in self.items["path"]]
        columns = {}
        for name, kind in FACTS.items():
            values = pd.Series([getattr(fact, name) for fact in facts], dtype=kind)
            for side in ("a", "b"):
                columns[f"{name}_{side}"] = values[self.pairs[f"item_{side}"]].set_axis(self.pairs.index)
        return columns

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


def log_dropped(path: Path, dropped: Mapping[str, int]) -> None:
    """Say how many pairs were left out, by reason."""
    for reason, count in dropped.items():
        logger.warning("%s: %d pairs left out: %s", path, count, reason.replace("_", " "))
