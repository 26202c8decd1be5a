"""What can be said of a preference set without reading a picture; each function returns plain facts.

n = pairs, m = items.
"""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit.config import Ties
from probekit.preferences.generators import fit_generators
from probekit.preferences.groups import SPLITS
from probekit.preferences.preference_set import PreferenceSet
from probekit.stats import right_with_a_coin

SHOWN = 10  # names that are listed


def targets(label: pd.Series, ties: Ties) -> pd.Series:
    """Turn labels (n,) into what counts under a rule of ties.

    As in a sweep, ``soft``: the label as it is; ``half``: the winner, 1 or 0, and 0.5 for a tie; ``drop``: the label as
    it is, and nothing (missing) for a tie.
    """
    if ties == "drop":
        return label.mask(label == 0.5)
    return label.mask(label > 0.5, 1.0).mask(label < 0.5, 0.0) if ties == "half" else label


def sizes(prefs: PreferenceSet) -> dict[str, Any]:
    """Count rows, prompts, images and pairs, also of each split, and the groups."""
    prompt, prompts = pd.factorize(prefs.items["prompt"])
    image, images = pd.factorize(prefs.items["path"])
    pairs = prefs.pairs
    splits = {}
    for name in SPLITS:
        here = pairs[pairs["split"] == name]
        used = here[["item_a", "item_b"]].to_numpy().ravel()
        splits[name] = {
            "pairs": len(here),
            "prompts": _distinct(prompt[used], len(prompts)),
            "images": _distinct(image[used], len(images)),
            "groups": int(here["group"].nunique()),
        }
    groups = pairs["group"].value_counts()
    quantiles = groups.quantile([0.5, 0.9, 0.99], interpolation="lower")
    return {
        "pairs": len(pairs),
        "left_out": prefs.dropped,
        "notes": prefs.notes,
        "rows": len(prefs.items),
        "prompts": len(prompts),
        "images": len(images),
        "true_ties": int((pairs["label"] == 0.5).sum()),
        "weighted": int((pairs["weight"] != 1).sum()),
        "n_votes": int(pairs["n_votes"].notna().sum()),
        "strength": int(pairs["strength"].notna().sum()),
        "own_splits": list(prefs.own_splits),
        "split_file": str(pairs["split_file"].iloc[0]),
        "splits": splits,
        "overlap": prefs.overlap,
        "groups": {
            "count": len(groups),
            "median": int(quantiles[0.5]),
            "90 %": int(quantiles[0.9]),
            "99 %": int(quantiles[0.99]),
            "largest": int(groups.iloc[0]),
            "largest_group": str(groups.index[0]),
        },
        "placeholders": {
            "images": len(prefs.placeholders),
            "pairs": int(touched(prefs, set(prefs.placeholders)).sum()),
            "names": names(prefs, list(prefs.placeholders)),
        },
    }


def repeats(prefs: PreferenceSet) -> dict[str, int]:
    """Count pairs of the same prompt and the same two images that were judged more than once.

    Returns
    -------
    dict
        ``duplicates``: judgements that repeat an earlier one of the same pair (the same side preferred, or a tie
        again); ``contradicting_pairs``: pairs of which each image was preferred at least once, and
        ``contradicting_judgements``: how many judgements these have.
    """
    a, b = prefs.pairs["item_a"].to_numpy(), prefs.pairs["item_b"].to_numpy()
    smaller = np.where(a < b, prefs.pairs["label"], 1 - prefs.pairs["label"])
    key = np.minimum(a, b).astype(np.int64) * len(prefs.items) + np.maximum(a, b)
    verdict = np.sign(smaller - 0.5).astype(np.int64) + 1  # 0, 1 = tie, 2
    _, place, count = np.unique(key, return_inverse=True, return_counts=True)
    votes = np.bincount(place * 3 + verdict, minlength=3 * len(count)).reshape(-1, 3)
    against = (votes[:, 0] > 0) & (votes[:, 2] > 0)
    return {
        "duplicates": int(np.maximum(votes - 1, 0).sum()),
        "contradicting_pairs": int(against.sum()),
        "contradicting_judgements": int(count[against].sum()),
    }


def sides(prefs: PreferenceSet, ties: Ties) -> dict[str, Any]:
    """Say how often the first side is preferred: as listed in the file, and as hashes of prompt and image put it.

    Returns
    -------
    dict
        ``listed`` and ``hashed``: each ``share`` of wins and its ``standard_error``, clustered by prompt, since the
        sides of a ranking's pairs are one order of its images; missing where no pair, or of one prompt only, counts.
    """
    target = targets(prefs.pairs["label"], ties)
    # Sets that do not say which side stood first are as the file has them.
    first = prefs.pairs["a_listed_first"].astype(bool) if "a_listed_first" in prefs.pairs else target.notna()
    shares = {"listed": target.where(first, 1 - target), "hashed": target}
    prompt = pd.Series(pd.factorize(prefs.items["prompt"])[0][prefs.pairs["item_a"]], target.index)
    return {
        name: {"share": _plain(values.mean()), "standard_error": _plain(_clustered_error(values, prompt))}
        for name, values in shares.items()
    }


def _clustered_error(values: pd.Series, cluster: pd.Series) -> float:
    """Give the standard error of the mean of values (n,) that go together in clusters, perhaps of one each."""
    sums = (values - values.mean()).dropna().groupby(cluster).sum()
    count = len(sums)
    return float(np.sqrt((sums**2).sum() * count / (count - 1)) / values.count()) if count > 1 else np.nan


def generators(prefs: PreferenceSet, ties: Ties) -> dict[str, Any]:
    """Say which generators there are and how well they alone predict the label.

    The model is the sweep's baseline of this name (`fit_generators`), fitted on training pairs of two different
    generators and judged on such test pairs that are no ties. Where it says nothing, since a generator is unseen in
    training, a pair counts half.

    Returns
    -------
    dict
        ``count``, ``pairs`` (with both generators known), ``same`` (of these, of one generator twice), ``most_common``
        (name -> share of wins and pairs), ``accuracy`` (missing where nothing can be fitted or judged), ``test_pairs``
        (behind it) and ``unseen`` (of these, with a generator that no training pair compares).
    """
    pairs = prefs.pairs[["model_a", "model_b", "split", "weight"]].assign(label=prefs.pairs["label"])
    pairs["target"] = targets(pairs["label"], ties)
    pairs = pairs[(pairs["model_a"] != "") & (pairs["model_b"] != "")]
    code, known = pd.factorize(pd.concat([pairs["model_a"], pairs["model_b"]]), sort=True)
    wins = pd.DataFrame(
        {"model": code, "wins": np.concatenate([pairs["target"], 1 - pairs["target"]]), "pairs": 1}
    ).dropna()
    table = wins.groupby("model").agg(wins=("wins", "mean"), pairs=("pairs", "sum"))
    table = table.sort_values("pairs", ascending=False, kind="stable").head(SHOWN)
    common = {
        str(known[int(model)]): {"wins": _plain(share), "pairs": int(count)}
        for model, share, count in table.itertuples()
    }
    differ = pairs["model_a"] != pairs["model_b"]
    train = pairs[differ & (pairs["split"] == "train") & pairs["target"].notna()]
    test = pairs[differ & (pairs["split"] == "test") & (pairs["label"] != 0.5)]
    accuracy, unseen = None, 0
    if len(train) and len(test):
        fitted = fit_generators(train, *(train[name].to_numpy(np.float64) for name in ("target", "weight")))
        accuracy = float(right_with_a_coin(fitted.margins(test), test["label"].to_numpy(np.float64)).mean())
        unseen = int((fitted.places(test) < 0).any(axis=1).sum())
    return {
        "count": len(known),
        "pairs": len(pairs),
        "same": int((~differ).sum()),
        "most_common": common,
        "accuracy": accuracy,
        "test_pairs": len(test),
        "unseen": unseen,
    }


def against(prefs: PreferenceSet, other: PreferenceSet) -> dict[str, Any]:
    """Count what two preference sets share by name: prompts, and images by path or as the files write them."""
    prompt = _also_in(prefs.items["prompt"], other.items["prompt"])
    image = _also_in(prefs.items["image"], other.items["image"])
    image |= _also_in(prefs.items["path"], other.items["path"])
    return {
        "file": str(other.path),
        "prompts": int(prefs.items["prompt"][prompt].nunique()),
        "images": int(prefs.items["path"][image].nunique()),
        "pairs_by_prompt": by_split(prefs, _pairs_of(prefs, prompt)),
        "pairs_by_image": by_split(prefs, _pairs_of(prefs, image)),
    }


def touched(prefs: PreferenceSet, paths: set[str]) -> pd.Series:
    """Say of each pair (n,) whether one of its images is among these."""
    return _pairs_of(prefs, prefs.items["path"].isin(paths).to_numpy())


def _pairs_of(prefs: PreferenceSet, inside: NDArray[np.bool_]) -> pd.Series:
    return pd.Series(inside[prefs.pairs["item_a"]] | inside[prefs.pairs["item_b"]], prefs.pairs.index)


def by_split(prefs: PreferenceSet, chosen: pd.Series) -> dict[str, int]:
    """Count chosen pairs (n,) of each split that has any."""
    counts = prefs.pairs["split"][chosen].value_counts()
    return {name: int(counts[name]) for name in SPLITS if name in counts}


def names(prefs: PreferenceSet, paths: list[str]) -> list[str]:
    """Give the first ten of these images as the file writes them."""
    items = prefs.items[prefs.items["path"].isin(paths[:SHOWN])].drop_duplicates("path")
    written = dict(zip(items["path"], items["image"], strict=True))
    return [written[path] for path in paths[:SHOWN] if path in written]


def _distinct(codes: NDArray[np.int64], size: int) -> int:
    """Count distinct whole numbers below a size."""
    seen = np.zeros(size, bool)
    seen[codes] = True
    return int(seen.sum())


def _also_in(ours: pd.Series, theirs: pd.Series) -> NDArray[np.bool_]:
    """Say of each text (m,) whether it is among others; by their codes, which takes a tenth of the time of isin."""
    codes, known = pd.factorize(pd.concat([ours, theirs]))
    seen = np.zeros(len(known), bool)
    seen[codes[len(ours) :]] = True
    inside: NDArray[np.bool_] = seen[codes[: len(ours)]]
    return inside


def _plain(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)
