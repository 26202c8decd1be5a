"""Preference files as they are published, one short function for each shape; `probekit.preferences.formats` lists them.

What a shape leaves open is decided here and said, with how many records it is about (`Table.note`): a published winner
is never overruled by votes, a tie is a tie, and a row that was not judged is counted and left out.
n = pairs, k = images of a ranking.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from probekit._types import FloatArray
from probekit.errors import PreferenceError
from probekit.preferences.packed import uid_name
from probekit.preferences.readers import SHARE, finish, image_names
from probekit.preferences.records import show
from probekit.preferences.tables import Table

VOTE_TYPES = {"leftvote": 1.0, "rightvote": 0.0, "tievote": 0.5, "bothbad_vote": 0.5}
_BARE = "records have file names without a folder: taken from {}/, where HPDv2 publishes them"


def hpdv2_pairs(table: Table) -> pd.DataFrame:
    """HPDv2, train.json: two files, and which of them was preferred as [1, 0] or [0, 1]."""
    labels, sides = [], []
    bare = 0
    for i, (paths, chosen) in enumerate(zip(table.values("file_path"), table.values("human_preference"), strict=True)):
        if chosen not in ([1, 0], [0, 1]) or True in map(_is_bool, chosen):
            table.fail(i, f"human_preference is {show(chosen)}; allowed: [1, 0] or [0, 1]")
        given = _paths(table, i, "file_path", paths, count=2)
        sides.append(_in_folder("train", given))
        bare += sides[-1] != given
        labels.append(float(chosen[0]))
    table.note(bare, _BARE.format("train"))
    image_a, image_b = _columns(table, sides)
    prompt = table.texts("prompt", required=True)
    return finish(table, pd.DataFrame({"prompt": prompt, "image_a": image_a, "image_b": image_b, "label": labels}))


def hpdv2_rankings(table: Table) -> pd.DataFrame:
    """HPDv2, test.json: a ranking of images, lower is better, and the rankings of single annotators.

    The label of a pair is the share of annotators who rank A better (ties count half) where their majority agrees with
    the published rank, else what the rank says: 1, 0, or 0.5 where two images share a rank.
    """
    rankings, shares, votes, bare, unvoted = [], [], [], 0, 0
    annotations = table.values("raw_annotations")
    for i, (paths, ranks) in enumerate(zip(table.values("image_path"), table.values("rank"), strict=True)):
        listed = _paths(table, i, "image_path", paths)
        images = _in_folder("test", listed)
        bare += images != listed
        rankings.append((i, images, _ranks(table, i, "rank", ranks, len(images))))
        given = [] if annotations[i] is None else annotations[i]
        unvoted += not given
        if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
            table.fail(i, f"raw_annotations is {show(given)}; allowed: a list of records with rank")
        raw = np.array(
            [_ranks(table, i, "raw_annotations: rank", one.get("rank"), len(images)) for one in given], float
        ).reshape(len(given), len(images))
        for a, b in combinations(range(len(images)), 2):
            won = (raw[:, a] < raw[:, b]) + 0.5 * (raw[:, a] == raw[:, b])
            shares.append(won.mean() if len(raw) else math.nan)
            votes.append(len(raw) if len(raw) else math.nan)
    table.note(bare, _BARE.format("test"))
    table.note(unvoted, "rankings have no raw_annotations: the published rank alone says who won")
    frame = _ranked(table, rankings, prompts=table.texts("prompt", required=True))
    frame["label"] = _softened(table, frame["label"].to_numpy(), np.array(shares), what="the published rank")
    return finish(table, frame.assign(n_votes=votes))


def hpdv3(table: Table) -> pd.DataFrame:
    """HPDv3: ``path1`` is always the preferred image; votes and confidence may be null or absent, as in test.json."""
    counts = table.values("choice_dist")
    shares, votes = np.full(len(table), math.nan), np.full(len(table), math.nan)
    for i, pair in enumerate(counts):
        if pair is None:
            continue
        if not isinstance(pair, list) or len(pair) != 2 or not all(_is_count(x) for x in pair) or not sum(pair):
            table.fail(i, f"choice_dist is {show(pair)}; allowed: two numbers of votes, or null")
        shares[i], votes[i] = pair[0] / sum(pair), sum(pair)
    label = _softened(table, np.ones(len(table)), shares, what="path1, the preferred image")
    table.note(
        int(np.isnan(shares).sum()), "pairs have no votes (choice_dist): path1, the preferred image, has label 1"
    )
    frame = pd.DataFrame({"prompt": table.texts("prompt", required=True)})
    frame["image_a"], frame["image_b"] = image_names(table, "path1"), image_names(table, "path2")
    frame["label"], frame["n_votes"] = label, votes
    frame["confidence"] = table.numbers(
        "confidence", allowed=f"{SHARE}, or null", fits=lambda x: 0 <= x <= 1, default=math.nan
    )
    frame["model_a"], frame["model_b"] = (table.texts(name, required=False) for name in ("model1", "model2"))
    return finish(table, frame)


def imagereward_groups(table: Table) -> pd.DataFrame:
    """ImageReward, data/test.json: generations of a prompt and their ranking, 1 = best, with ties and gaps."""
    rankings = []
    for i, (paths, ranks) in enumerate(zip(table.values("generations"), table.values("ranking"), strict=True)):
        images = _paths(table, i, "generations", paths)
        rankings.append((i, images, _ranks(table, i, "ranking", ranks, len(images))))
    named, prompts = table.texts("id", required=False, numbered=True), table.texts("prompt", required=True)
    known = pd.DataFrame({"id": named, "prompt": prompts})[named != ""]
    again = known.duplicated("id")
    same = known.duplicated(["id", "prompt"])
    table.note(int((again & ~same).sum()), "rankings have the id of another prompt: they stay rankings of their own")
    table.note(int(same.sum()), "rankings have the id and the prompt of an earlier one: they count as one ranking")
    return finish(table, _ranked(table, rankings, prompts=prompts, named=named))


def imagereward_rows(table: Table) -> pd.DataFrame:
    """ImageRewardDB: one row for each image, with its rank among the images of a prompt."""
    rows = pd.DataFrame(
        {"id": table.texts("prompt_id", required=True, numbered=True), "image": image_names(table, "image_path")}
    )
    rows["prompt"] = table.texts("prompt", required=True)
    rank = table.numbers("rank", allowed="a whole number >= 1", fits=lambda x: x >= 1 and x % 1 == 0, default=None)
    total = table.numbers(
        "image_amount_in_total", allowed="a whole number >= 1", fits=lambda x: x >= 1 and x % 1 == 0, default=math.nan
    )
    kinds = table.texts("classification", required=False)
    first = rows.groupby("id", sort=False)["prompt"].transform("first")
    for i in np.flatnonzero(rows["prompt"] != first)[:1]:
        table.fail(int(i), f"prompt of prompt_id {rows['id'][i]!r} is not the one of an earlier row; allowed: one")
    for i in np.flatnonzero(rows.duplicated(["id", "image"]))[:1]:
        table.fail(int(i), f"image {rows['image'][i]!r} stands twice under prompt_id {rows['id'][i]!r}; allowed: once")
    rankings = []
    short = long = 0
    for at in rows.groupby("id", sort=False).indices.values():
        short += bool((total[at] > len(at)).any())
        long += bool((total[at] < len(at)).any())
        rankings.append((int(at[0]), rows["image"][at].tolist(), [int(x) for x in rank[at]]))
    table.note(short, "prompts have fewer rows than image_amount_in_total says")
    table.note(long, "prompts have more rows than image_amount_in_total says: all of them are compared")
    frame = _ranked(table, rankings, prompts=rows["prompt"], named=rows["id"], prefixed=True)
    return finish(table, frame.assign(source=kinds[frame["record"]].to_numpy()))


def pickapic(table: Table) -> pd.DataFrame:
    """Pick-a-Pic v1 and v2: images by uid, as bytes or without, label_0 and label_1 of 1 and 0 or 0.5 each."""
    labels = [
        table.numbers(name, allowed="1, 0 or 0.5", fits=lambda x: x in (0, 0.5, 1), default=math.nan)
        for name in ("label_0", "label_1")
    ]
    judged = np.ones(len(table), bool)
    if table.has("has_label"):
        for i, value in enumerate(table.values("has_label")):
            if value not in (True, False):
                table.fail(i, f"has_label is {show(value)}; allowed: true or false")
            judged[i] = value
    uids = [table.texts(f"image_{side}_uid", required=True) for side in (0, 1)]
    for i in np.flatnonzero(judged & (labels[0] + labels[1] != 1).to_numpy())[:1]:
        found = " and ".join(show(table.values(f"label_{side}")[i]) for side in (0, 1))
        table.fail(int(i), f"label_0 and label_1 are {found}; allowed: 1 and 0, 0 and 1, 0.5 and 0.5")
    best = table.texts("best_image_uid", required=False)
    named = ((best == uids[0]) & (labels[0] != 1)) | ((best == uids[1]) & (labels[0] != 0))
    named |= (best == "tie") & (labels[0] != 0.5)
    other = int((named & judged & (uids[0] != uids[1])).sum())
    table.note(other, "pairs where best_image_uid is not what label_0 says: label_0 counts")
    frame = pd.DataFrame({"prompt": table.texts("caption", required=True), "label": labels[0]})
    for side, uid in zip("ab", uids, strict=True):
        frame[f"image_{side}"] = f"{table.root.packed.name}/" + uid_name(uid)
        frame[f"model_{side}"] = table.texts("model_0" if side == "a" else "model_1", required=False)
    frame["ranking_id"] = table.texts("ranking_id", required=False, numbered=True)
    frame["drop"] = np.select([~judged, uids[0] == uids[1]], ["not_judged", "same_image"], "")
    return finish(table, frame)


def genai_bench(table: Table) -> pd.DataFrame:
    """GenAI-Bench: a left and a right image and one vote; both kinds of tie are ties."""
    votes = table.texts("vote_type", required=True)
    for i in np.flatnonzero(~votes.isin(VOTE_TYPES))[:1]:
        table.fail(int(i), f"vote_type is {votes[i]!r}; allowed: {', '.join(VOTE_TYPES)}")
    table.note(int((votes == "bothbad_vote").sum()), "pairs were voted bothbad_vote: ties of label 0.5, as tievote")
    frame = pd.DataFrame({"prompt": table.texts("prompt", required=True), "label": votes.map(VOTE_TYPES)})
    for side, theirs in (("a", "left"), ("b", "right")):
        frame[f"image_{side}"] = image_names(table, f"{theirs}_image")
        frame[f"model_{side}"] = table.texts(f"{theirs}_model", required=False)
    return finish(table, frame)


def _ranked(
    table: Table,
    rankings: Sequence[tuple[int, list[str], list[int]]],
    *,
    prompts: pd.Series,
    named: pd.Series | None = None,
    prefixed: bool = False,
) -> pd.DataFrame:
    """Make all pairs i < j of rankings (record, images, ranks; lower is better); their images stay shared."""
    lines = [
        (at, images[a], images[b], 0.5 * (ranks[a] < ranks[b]) + 0.5 * (ranks[a] <= ranks[b]))
        for at, images, ranks in rankings
        for a, b in combinations(range(len(images)), 2)
    ]
    alone = sum(len(images) < 2 for _, images, _ in rankings)
    table.note(alone, "rankings have one image only, which makes no pair")
    if not lines:
        msg = f"{table.path}: no ranking has two images, so there are no pairs; allowed: one pair at least"
        raise PreferenceError(msg)
    frame = pd.DataFrame(lines, columns=["record", "image_a", "image_b", "label"])
    prefix = "" if prefixed else table.root.prefix
    for side in ("image_a", "image_b"):
        names = frame[side].astype("str")
        frame[side] = names.where(names.str.startswith("/"), prefix + names)
    frame["prompt"] = prompts[frame["record"]].to_numpy()
    places = pd.Series(table.places).astype("str")
    ids = places if named is None else named.mask(named == "", places)
    return frame.assign(ranking_id=ids[frame["record"]].to_numpy())


def _softened(table: Table, label: FloatArray, share: FloatArray, *, what: str) -> FloatArray:
    """Take vote shares as labels where the majority agrees with the published winner; others are counted and said."""
    known = ~np.isnan(share)
    agrees = np.sign(share - 0.5) == np.sign(label - 0.5)
    other = int((known & ~agrees).sum())
    against = f"pairs where the majority of votes is not for {what}, which counts: label 1, 0 or 0.5, not the share"
    table.note(other, against)
    return np.where(known & agrees, share, label)


def _paths(table: Table, at: int, key: str, paths: Any, *, count: int | None = None) -> list[str]:
    if not isinstance(paths, list) or (len(paths) != count if count else not paths):
        table.fail(at, f"{key} is {show(paths)}; allowed: a list of {count or 'one or more'} paths")
    for path in paths:
        if not isinstance(path, str) or not path:
            table.fail(at, f"{key} has {show(path)}; allowed: texts that are not empty")
    return paths


def _in_folder(folder: str, paths: list[str]) -> list[str]:
    """Put bare file names of HPDv2 into the folder in which it publishes them."""
    return [path if "/" in path else f"{folder}/{path}" for path in paths]


def _ranks(table: Table, at: int, key: str, ranks: Any, count: int) -> list[int]:
    if not isinstance(ranks, list) or not all(_is_count(rank) for rank in ranks):
        table.fail(at, f"{key} is {show(ranks)}; allowed: a list of whole numbers")
    if len(ranks) != count:
        table.fail(at, f"{key} has {len(ranks)} numbers for {count} images; allowed: one for each")
    return ranks


def _columns(table: Table, sides: list[list[str]]) -> list[pd.Series]:
    return [
        pd.Series([path if path.startswith("/") else table.root.prefix + path for path in column], dtype="str")
        for column in zip(*sides, strict=True)
    ]


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
