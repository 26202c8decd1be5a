"""What the pictures of a preference set show once each was looked at: bad files, and the same picture in two splits."""

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from probekit.preferences.groups import SPLITS
from probekit.preferences.lint_checks import by_split, names, touched
from probekit.preferences.near_duplicates import near_duplicates
from probekit.preferences.preference_set import PreferenceSet

PROBLEMS = {"missing": "are missing", "zero_bytes": "have no bytes", "unreadable": "cannot be read as images"}


def bad_files(prefs: PreferenceSet, looks: pd.DataFrame) -> dict[str, Any]:
    """Count the files of each problem, the pairs that they cost, and the first ten names.

    ``one_colour`` counts pictures with nothing on them, and ``without_contrast`` those that are flat in grey, which are
    not compared with others.

    Parameters
    ----------
    prefs
        The set.
    looks
        What `probekit.preferences.pictures.look_at` found, indexed by path.
    """
    found: dict[str, Any] = {}
    for problem in PROBLEMS:
        paths = looks.index[looks["problem"] == problem].tolist()
        pairs = touched(prefs, set(paths))
        found[problem] = {"files": len(paths), "pairs": int(pairs.sum()), "names": names(prefs, paths)}
    flat = looks.index[looks["one_colour"]].tolist()
    pairs = touched(prefs, set(flat))
    found["one_colour"] = {"files": len(flat), "pairs": int(pairs.sum()), "names": names(prefs, flat)}
    readable = looks["problem"] == ""
    found["without_contrast"] = {"files": int((readable & ~looks["hashed"]).sum())}
    return found


def across_splits(prefs: PreferenceSet, looks: pd.DataFrame) -> dict[str, Any]:
    """Find pictures that are in two splits under two names, as equal bytes or as near duplicates.

    Placeholders are left aside.

    Returns
    -------
    dict
        Names of two splits -> `shared_pictures`, where they share any.
    """
    images = _images_of_splits(prefs)
    found = {}
    for one, other in combinations(SPLITS, 2):
        shared = shared_pictures(prefs, looks.loc[images[one]], prefs, looks.loc[images[other]])
        if shared:
            found[f"{one} and {other}"] = shared
    return found


def _images_of_splits(prefs: PreferenceSet) -> dict[str, list[str]]:
    """Paths of the images of each split, placeholders aside."""
    path = prefs.items["path"].to_numpy()
    found = {}
    for name in SPLITS:
        here = prefs.pairs[prefs.pairs["split"] == name]
        used = pd.Series(path[np.unique(here[["item_a", "item_b"]].to_numpy())]).drop_duplicates()
        found[name] = used[~used.isin(prefs.placeholders)].tolist()
    return found


def shared_pictures(
    ours: PreferenceSet, our_looks: pd.DataFrame, theirs: PreferenceSet, their_looks: pd.DataFrame
) -> dict[str, Any]:
    """Count the images of one side that are also on the other, and the pairs that show them.

    Returns
    -------
    dict
        ``equal_bytes`` and ``near_duplicates``, each ``images`` (of our side), ``pairs`` (by split; of both sides
        where they are one set) and ``names`` (first ten: ours and theirs); empty if there are none.
    """
    found = {}
    equal = our_looks[(our_looks["digest"] != "") & our_looks["digest"].isin(their_looks["digest"])]
    mirrored = their_looks[(their_looks["digest"] != "") & their_looks["digest"].isin(our_looks["digest"])]
    twin = mirrored.reset_index().drop_duplicates("digest").set_index("digest")["path"]
    examples = [(str(path), str(twin[digest])) for path, digest in equal["digest"].head(10).items()]
    near = near_duplicates(our_looks, their_looks)
    for kind, left, right, pairs in (
        ("equal_bytes", set(equal.index), set(mirrored.index), examples),
        ("near_duplicates", *near),
    ):
        if left:
            paths = left | right if ours is theirs else left
            found[kind] = {
                "images": len(left),
                "pairs": by_split(ours, touched(ours, paths)),
                "names": [names(ours, [one]) + names(theirs, [other]) for one, other in pairs],
            }
    return found
