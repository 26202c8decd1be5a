"""Groups that must not be cut (pairs connected by a prompt or an image) and the split of each group.

n = pairs.
"""

import hashlib
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

PLACEHOLDER_PROMPTS = 20  # an image under more prompts than this says nothing about any of them
SPLITS = ("train", "validation", "test")
TEST_SHARE = VALIDATION_SHARE = 0.15


def placeholder_images(pairs: pd.DataFrame) -> list[str]:
    """Images under more than 20 distinct prompts, such as a black picture in place of a refused one.

    Parameters
    ----------
    pairs
        Columns ``prompt``, ``path_a``, ``path_b`` (n rows).
    """
    sides = [pairs[["prompt", side]].set_axis(["prompt", "path"], axis=1) for side in ("path_a", "path_b")]
    prompts_of = pd.concat(sides).drop_duplicates()["path"].value_counts()
    return sorted(prompts_of.index[prompts_of > PLACEHOLDER_PROMPTS])


def assign_groups(pairs: pd.DataFrame, placeholders: list[str]) -> pd.Series:
    """Name the connected component of each pair over shared prompts, images and groups of the file.

    Parameters
    ----------
    pairs
        Columns ``prompt``, ``path_a``, ``path_b`` and ``group`` (missing where the file gives none), n rows.
    placeholders
        Images that do not join components.

    Returns
    -------
    Series
        Group names (n,): a digest of the component's prompts, so it does not depend on order.
    """
    prompt, prompts = pd.factorize(pairs["prompt"])
    image, images = pd.factorize(pd.concat([pairs["path_a"], pairs["path_b"]]))
    joins = ~images.isin(placeholders)[image]
    own, own_groups = pd.factorize(pairs["group"])  # -1 where missing
    # Every edge starts at a prompt: nodes are prompts, then images, then groups of the file.
    start = np.concatenate([np.tile(prompt, 2)[joins], prompt[own >= 0]])
    end = len(prompts) + np.concatenate([image[joins], len(images) + own[own >= 0]])
    size = len(prompts) + len(images) + len(own_groups)
    graph = coo_array((np.ones(len(start), bool), (start, end)), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    digests = np.array([hashlib.sha256(text.encode()).hexdigest()[:16] for text in prompts], str)
    smallest = pd.Series(digests).groupby(component[: len(prompts)]).min()
    return pd.Series(component[prompt], pairs.index).map(smallest)


def hash_share(groups: pd.Series, purpose: str) -> pd.Series:
    """Map each group to a number in [0, 1) that depends on its name and the purpose only."""
    distinct = groups.unique().tolist()
    heads = [hashlib.sha256(f"{purpose}:{group}".encode()).digest()[:8] for group in distinct]
    shares = [int.from_bytes(head, "big") / 2**64 for head in heads]
    return groups.map(dict(zip(distinct, shares, strict=True)))


def assign_splits(
    group: pd.Series,
    split: pd.Series | None,
    *,
    test: float = TEST_SHARE,
    validation: float = VALIDATION_SHARE,
    seed: int = 0,
) -> tuple[pd.Series, dict[str, int]]:
    """Give each pair a split that cuts no group.

    Parameters
    ----------
    group
        Group of each pair (n,).
    split
        Split of each pair in the file (n,): ``train``, ``validation`` or ``test``; None if it gives none.
    test, validation
        Shares of the groups, by hash. With splits in the file only a missing validation split is made, of training
        groups.
    seed
        Another seed gives other groups to each split.

    Returns
    -------
    split
        Split of each pair (n,), missing for pairs that must be dropped.
    dropped
        How many pairs were dropped, by reason: a training pair connected to a test pair would teach the answer.
    """
    if split is None:
        bounds = [1 - test - validation, 1 - test]
        share = hash_share(group, seeded("split", seed))
        return pd.Series(np.array(SPLITS)[np.searchsorted(bounds, share, side="right")], group.index), {}
    kept, dropped = drop_connected(group, split)
    if not (split == "validation").any():
        chosen = (kept == "train") & (hash_share(group, seeded("validation", seed)) < validation)
        kept = kept.mask(chosen, "validation")
    return kept, dropped


def seeded(purpose: str, seed: int) -> str:
    """Name a purpose of `hash_share`; seed 0 is the split that loading makes."""
    return f"{purpose}:{seed}" if seed else purpose


def drop_connected(group: pd.Series, split: pd.Series) -> tuple[pd.Series, dict[str, int]]:
    """Keep of each group the pairs of its last split, so that no group is in two; see ``assign_splits``."""
    rank = split.map({name: i for i, name in enumerate(SPLITS)})
    highest = rank.groupby(group).transform("max")
    lost = rank < highest
    reasons = split[lost] + "_connected_to_" + highest[lost].map(dict(enumerate(SPLITS)))
    dropped = {str(reason): int(count) for reason, count in reasons.value_counts().sort_index().items()}
    return split.mask(lost), dropped


def split_overlap(pairs: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Count what the splits of a file share, before connected pairs are dropped.

    Parameters
    ----------
    pairs
        Columns ``prompt``, ``path_a``, ``path_b``, ``group`` and ``split`` (n rows).

    Returns
    -------
    dict
        For each two splits that share anything, such as ``train and test``: ``prompts``, ``images`` and ``groups``.
        Placeholder images count where their group is in both.
    """
    pairs = pairs[pairs.groupby("group")["split"].transform("nunique") > 1]  # what is shared lies in such groups
    found = {}
    for one, other in combinations(SPLITS, 2):
        left, right = pairs[pairs["split"] == one], pairs[pairs["split"] == other]
        shared = {
            "prompts": len(set(left["prompt"]) & set(right["prompt"])),
            "images": len(_images(left) & _images(right)),
            "groups": len(set(left["group"]) & set(right["group"])),
        }
        if any(shared.values()):
            found[f"{one} and {other}"] = shared
    return found


def _images(pairs: pd.DataFrame) -> set[str]:
    return {*pairs["path_a"], *pairs["path_b"]}
