"""Preference files: the general form, sides, groups, splits, limits, digests and messages."""

import csv
import json
import os
from collections import defaultdict
from hashlib import sha256

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit._types import row_id
from probekit.errors import ConfigError, ImageError, PreferenceError
from probekit.preferences import load_preferences
from probekit.preferences.groups import assign_groups, assign_splits, placeholder_images

RECORDS = [
    {"prompt": "a cat", "image_a": "1.png", "image_b": "2.png", "label": 1, "source": "kind", "n_votes": 3},
    {"prompt": "a cat", "image_a": "sub/3.png", "image_b": "1.png", "label": 0.5, "source": "kind", "n_votes": 4},
    {"prompt": 'a "dog",\nred', "image_a": "4.png", "image_b": "5.png", "label": 0.25, "source": "", "n_votes": 4},
    {"prompt": "NA", "image_a": "4.png", "image_b": "6.png", "label": 0, "source": "null", "n_votes": 1},
]


def write(path, records):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".parquet":
        pd.DataFrame(records).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    return path


def as_listed(prefs):
    """Pairs with the sides as the file has them."""
    pairs, image = prefs.pairs, prefs.items["image"].to_numpy()
    first, label = pairs["a_listed_first"], pairs["label"]
    sides = [image[pairs["item_a"]], image[pairs["item_b"]]]
    return pd.DataFrame(
        {
            "image_a": np.where(first, sides[0], sides[1]),
            "image_b": np.where(first, sides[1], sides[0]),
            "label": label.where(first, 1 - label),
        }
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_the_four_files_say_the_same(tmp_path, suffix):
    prefs = load_preferences(write(tmp_path / f"votes{suffix}", RECORDS))
    reference = load_preferences(write(tmp_path / "reference.jsonl", RECORDS))
    pd.testing.assert_frame_equal(prefs.pairs, reference.pairs)
    pd.testing.assert_frame_equal(prefs.items, reference.items)
    assert prefs.name == "votes"
    assert prefs.items["prompt"].tolist() == ["a cat"] * 3 + ['a "dog",\nred'] * 2 + ["NA"] * 2
    assert set(prefs.items["image"]) == {record[side] for record in RECORDS for side in ("image_a", "image_b")}
    assert (prefs.items["path"] == str(tmp_path) + "/" + prefs.items["image"]).all()
    listed = as_listed(prefs)
    assert listed["image_a"].tolist() == [record["image_a"] for record in RECORDS]
    assert listed["image_b"].tolist() == [record["image_b"] for record in RECORDS]
    assert listed["label"].tolist() == [1, 0.5, 0.25, 0]
    assert prefs.pairs["n_votes"].tolist() == [3, 4, 4, 1]
    assert prefs.pairs["source"].tolist() == ["kind", "kind", "", "null"]
    assert prefs.pairs["weight"].tolist() == [1.0] * 4
    assert prefs.pairs["strength"].isna().all()
    group = prefs.pairs["group"]
    assert group[0] == group[1] != group[2] == group[3]  # the last two share an image


def test_the_side_says_nothing_about_the_winner(tmp_path):
    """Chosen always comes first and is always the smaller name; a head that looks at order scores 50 %."""
    records = [
        {"prompt": f"p{i}", "chosen": f"a{i}.png", "rejected": f"b{i}.png", "model_a": "good", "model_b": "bad"}
        for i in range(2000)
    ]
    prefs = load_preferences(write(tmp_path / "p.jsonl", records))
    first = prefs.pairs["label"] == 1
    assert 0.45 < first.mean() < 0.55
    image = prefs.items["image"]
    winner = np.where(first, prefs.pairs["item_a"], prefs.pairs["item_b"])
    assert image[winner].str.startswith("a").all()
    assert (np.where(first, prefs.pairs["model_a"], prefs.pairs["model_b"]) == "good").all()
    swapped = [record | {"chosen": record["rejected"], "rejected": record["chosen"]} for record in records]
    other = load_preferences(write(tmp_path / "q.jsonl", swapped))
    assert other.pairs["pair_id"].tolist() == prefs.pairs["pair_id"].tolist()
    assert image[prefs.pairs["item_a"]].tolist() == other.items["image"][other.pairs["item_a"]].tolist()
    assert (other.pairs["label"] == 1 - prefs.pairs["label"]).all()


def test_repeated_pairs_stay_apart(tmp_path):
    prefs = load_preferences(write(tmp_path / "p.json", RECORDS[:1] * 3))
    assert prefs.pairs["pair_id"].nunique() == 3
    assert len(prefs.items) == 2


pair_lists = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 14), st.integers(0, 14)), min_size=1, max_size=25)


def frame_of(pairs, groups=None):
    return pd.DataFrame(
        {
            "prompt": [f"p{p}" for p, _, _ in pairs],
            "path_a": [f"i{a}" for _, a, _ in pairs],
            "path_b": [f"i{b}" for _, _, b in pairs],
            "group": groups if groups else pd.Series([None] * len(pairs), dtype=object),
        }
    )


def brute_force(frame):
    """Merge sets of pairs until no two of them share a prompt, an image or a group."""
    keys = defaultdict(set)
    for i, row in frame.iterrows():
        for key in (("p", row.prompt), ("i", row.path_a), ("i", row.path_b), ("g", row.group)):
            if key[1] is not None and key[1] == key[1]:
                keys[key].add(i)
    parts = list(keys.values())
    merged = True
    while merged:
        merged = False
        for i in range(len(parts)):
            for j in range(i):
                if parts[i] & parts[j]:
                    parts[j] |= parts.pop(i)
                    merged = True
                    break
            if merged:
                break
    return {frozenset(part) for part in parts}


@given(pair_lists, st.data())
@settings(deadline=None, max_examples=50)
def test_groups_are_the_connected_components(pairs, data):
    groups = data.draw(st.lists(st.sampled_from([None, None, "x", "y"]), min_size=len(pairs), max_size=len(pairs)))
    frame = frame_of(pairs, groups)
    names = assign_groups(frame, [])
    assert {frozenset(index) for index in names.groupby(names).groups.values()} == brute_force(frame)
    order = np.random.default_rng(0).permutation(len(frame))
    assert assign_groups(frame.iloc[order].reset_index(drop=True), []).tolist() == names[order].tolist()


def test_placeholders_do_not_join(tmp_path):
    records = [
        {"prompt": f"p{i}", "image_a": f"{i}.png", "image_b": "black.png" if i < 21 else "twenty.png", "label": 1}
        for i in range(41)
    ]
    prefs = load_preferences(write(tmp_path / "p.csv", records))
    assert prefs.placeholders == (str(tmp_path / "black.png"),)
    groups = prefs.pairs["group"]
    assert groups[:21].nunique() == 21
    assert groups[21:].nunique() == 1
    assert placeholder_images(frame_of([(0, 1, 2)] * 50)) == []


@given(pair_lists, st.data())
@settings(deadline=None, max_examples=50)
def test_splits_cut_no_group(pairs, data):
    names = assign_groups(frame_of(pairs), [])
    given_splits = data.draw(
        st.none() | st.lists(st.sampled_from(["train", "validation", "test"]), min_size=len(pairs), max_size=len(pairs))
    )
    splits, dropped = assign_splits(names, None if given_splits is None else pd.Series(given_splits, dtype="str"))
    assert sum(dropped.values()) == splits.isna().sum()
    assert (splits.groupby(names).nunique() == 1).all()
    if given_splits is not None:
        asked = pd.Series(given_splits, dtype="str")
        assert (splits[asked == "test"] == "test").all()  # an official test set is never touched
        assert not ((asked != "test") & (splits == "test")).any()


def test_shares_of_splits(tmp_path):
    records = [{"prompt": f"p{i}", "image_a": f"{i}a", "image_b": f"{i}b", "label": 1} for i in range(3000)]
    prefs = load_preferences(write(tmp_path / "p.jsonl", records))
    shares = prefs.pairs["split"].value_counts(normalize=True)
    assert abs(shares["train"] - 0.70) < 0.03
    assert abs(shares["validation"] - 0.15) < 0.03
    official = [record | {"split": "test" if i % 3 == 0 else "train"} for i, record in enumerate(records)]
    prefs = load_preferences(write(tmp_path / "q.jsonl", official))
    counts = prefs.pairs["split"].value_counts()
    assert counts["test"] == 1000
    assert abs(counts["validation"] / 2000 - 0.15) < 0.03


def test_training_pairs_connected_to_test_are_dropped_and_counted(tmp_path):
    records = [
        {"prompt": "a", "image_a": "1", "image_b": "2", "label": 1, "split": "train"},
        {"prompt": "b", "image_a": "3", "image_b": "2", "label": 1, "split": "test"},
        {"prompt": "b", "image_a": "4", "image_b": "5", "label": 1, "split": "val"},
        {"prompt": "c", "image_a": "6", "image_b": "7", "label": 1, "split": "train"},
        {"prompt": "d", "image_a": "8", "image_b": "9", "label": 1, "split": "valid"},
    ]
    prefs = load_preferences(write(tmp_path / "p.jsonl", records))
    assert prefs.dropped == {"train_connected_to_test": 1, "validation_connected_to_test": 1}
    assert prefs.pairs["split"].tolist() == ["test", "train", "validation"]
    assert prefs.items["prompt"].tolist() == ["b", "b", "c", "c", "d", "d"]
    grouped = [record | {"group": "same"} for record in records[3:]]
    assert load_preferences(write(tmp_path / "q.jsonl", grouped)).dropped == {"train_connected_to_validation": 1}


def test_limits_nest_and_keep_groups_whole(tmp_path):
    rng = np.random.default_rng(0)
    records = [
        {"prompt": f"p{i // 4}", "image_a": f"{i}a", "image_b": f"{i}b", "label": float(rng.random())}
        for i in range(400)
    ]
    prefs = load_preferences(write(tmp_path / "p.jsonl", records))
    smaller: set[str] = set()
    for n in (4, 10, 50, 399, 400, 1000):
        part = prefs.limit(n)
        assert n - 4 < len(part.pairs) <= n or len(part.pairs) == 400
        assert smaller <= set(part.pairs["pair_id"])
        smaller = set(part.pairs["pair_id"])
        whole = prefs.pairs.set_index("pair_id")
        for side in ("item_a", "item_b"):
            wanted = prefs.items.loc[whole.loc[part.pairs["pair_id"], side]].reset_index(drop=True)
            pd.testing.assert_frame_equal(part.items.loc[part.pairs[side]].reset_index(drop=True), wanted)
        assert (part.pairs["group"].value_counts() == 4).all()
    with pytest.raises(PreferenceError, match="limit is 3; allowed: at least 4"):
        prefs.limit(3)


def test_digests_rows_and_judgements(tmp_path):
    for i, name in enumerate(["1.png", "2.png", "4.png", "5.png", "6.png", "sub/3.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"same" if name in ("2.png", "sub/3.png") else str(i).encode())
    prefs = load_preferences(write(tmp_path / "p.json", RECORDS))
    cache = tmp_path / "cache" / "digests.parquet"
    digests = prefs.image_digests(cache)
    assert digests == prefs.image_digests()
    assert digests[str(tmp_path / "4.png")] == sha256(b"2").digest()
    rows, judgements = prefs.rows(digests), prefs.judgements(digests)
    assert len(rows) == 6  # two files of the same bytes under one prompt are one row
    assert row_id(sha256(b"same").digest(), "a cat") in set(rows["row_id"])
    assert set(judgements["row_a"]) | set(judgements["row_b"]) == set(rows["row_id"])
    sides = [set(judgements.loc[i, ["row_a", "row_b"]]) for i in (0, 1)]
    assert sides[0] == sides[1]  # 1 and 2, 3 and 1, where 2 and 3 are one picture
    assert judgements["bytes_a"].isna().sum() == 0
    assert judgements["width_a"].isna().all()
    assert (judgements["format_b"] == "").all()
    assert judgements["group"].tolist() == prefs.pairs["group"].tolist()
    assert judgements["split"].tolist() == prefs.pairs["split"].tolist()
    judgements.to_parquet(tmp_path / "j.parquet")
    again = pd.read_parquet(tmp_path / "j.parquet")
    assert again["label"].tolist() == prefs.pairs["label"].tolist()
    # The cache is by path, size and time: a changed file is read again, an unchanged one is not.
    (tmp_path / "4.png").write_bytes(b"something else")
    frame = pd.read_parquet(cache)
    frame["sha256"] = frame["sha256"].where(~frame["path"].str.endswith("5.png"), "ab" * 32)
    frame.to_parquet(cache)
    changed = prefs.image_digests(cache)
    assert changed[str(tmp_path / "4.png")] == sha256(b"something else").digest()
    assert changed[str(tmp_path / "5.png")] == bytes.fromhex("ab" * 32)
    cache.write_bytes(b"damaged")
    assert prefs.image_digests(cache)[str(tmp_path / "5.png")] == digests[str(tmp_path / "5.png")]


def judged(tmp_path, content, records):
    """Load records over files with the given content; return the set and its judgements."""
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    prefs = load_preferences(write(tmp_path / "p.jsonl", [record | {"label": 1} for record in records]))
    return prefs, prefs.judgements(prefs.image_digests())


def test_a_pair_of_one_picture_is_left_out(tmp_path, caplog):
    content = {"1": "one", "2": "one", "3": "two"}
    records = [{"prompt": "p", "image_a": "1", "image_b": "2"}, {"prompt": "p", "image_a": "1", "image_b": "3"}]
    prefs, judgements = judged(tmp_path, content, records)
    assert judgements["pair_id"].tolist() == prefs.pairs["pair_id"].tolist()[1:]
    assert (judgements["row_a"] != judgements["row_b"]).all()
    assert f"{prefs.path}: 1 pairs left out: both files are the same picture" in caplog.messages


def test_equal_pictures_under_two_names_do_not_leak(tmp_path, caplog):
    """A test picture under another name in train: that pair goes; unconnected pairs keep group and split."""
    content = {"1": "same", "2": "b", "3": "c", "4": "same", "5": "e", "6": "f", "7": "g", "8": "h"}
    records = [
        {"prompt": "a", "image_a": "1", "image_b": "2", "split": "train"},
        {"prompt": "b", "image_a": "3", "image_b": "4", "split": "test"},
        {"prompt": "c", "image_a": "5", "image_b": "6", "split": "train"},
        {"prompt": "d", "image_a": "7", "image_b": "8", "split": "validation"},
    ]
    prefs, judgements = judged(tmp_path, content, records)
    assert prefs.dropped == {}
    assert judgements["pair_id"].tolist() == prefs.pairs["pair_id"].tolist()[1:]
    assert judgements["split"].tolist() == ["test", "train", "validation"]
    assert judgements["group"][1:].tolist() == prefs.pairs["group"][2:].tolist()
    assert caplog.messages == [
        f"{prefs.path}: equal pictures under different names join the groups of 2 pairs",
        f"{prefs.path}: 1 pairs left out: train connected to test",
    ]
    # The same pictures in one split: the pairs stay and share a group.
    _, judgements = judged(tmp_path, content, [record | {"split": "train"} for record in records])
    assert len(judgements) == 4
    assert judgements["group"][0] == judgements["group"][1]
    assert judgements["group"].nunique() == 3


@pytest.mark.parametrize(("prompts", "groups"), [(20, 1), (21, 21)])
def test_placeholders_are_known_by_content(tmp_path, prompts, groups):
    content = {f"{side}{i}": "black" if side == "b" else f"{i}" for i in range(prompts) for side in "ab"}
    records = [{"prompt": f"p{i}", "image_a": f"a{i}", "image_b": f"b{i}", "split": "train"} for i in range(prompts)]
    prefs, judgements = judged(tmp_path, content, records)
    assert prefs.pairs["group"].nunique() == prompts
    assert judgements["group"].nunique() == groups


def test_a_placeholder_of_the_whole_file_stays_one_under_a_limit(tmp_path):
    content = {"black": "black"} | {f"a{i}": f"{i}" for i in range(21)}
    records = [{"prompt": f"p{i}", "image_a": f"a{i}", "image_b": "black"} for i in range(21)]
    part = judged(tmp_path, content, records)[0].limit(5)
    assert part.judgements(part.image_digests())["group"].nunique() == 5


def test_loading_says_what_was_left_out(tmp_path, caplog):
    caplog.set_level("INFO")
    records = [
        {"prompt": f"p{i}", "image_a": f"{i}", "image_b": f"black{k}", "label": 1, "split": "train", "spilt": "test"}
        for k in range(6)
        for i in range(21)
    ]
    records += [records[0] | {"split": "test", "image_b": "other"}]
    path = write(tmp_path / "p.jsonl", records)
    load_preferences(path)
    names = ", ".join(f"{tmp_path}/black{k}" for k in range(5))
    assert caplog.messages == [
        f"{path}: read as general, the fields of no published format",
        f"{path}: columns not used: spilt",
        f"{path}: 6 images under > 20 prompts do not join groups: {names}, ...",
        f"{path}: 6 pairs left out: train connected to test",
        f"{path}: 121 pairs, 21 prompts, 21 groups, largest 6 pairs",
    ]
    caplog.clear()
    winner = {"prompt": "p", "chosen": "a", "rejected": "b", "label": 0.3}
    load_preferences(write(tmp_path / "q.json", [winner]))
    assert caplog.messages[1] == f"{tmp_path}/q.json: columns not used: label"


def test_all_missing_images_are_named(tmp_path):
    records = [{"prompt": "p", "image_a": f"{i:02d}a", "image_b": f"{i:02d}b", "label": 1} for i in range(7)]
    prefs = load_preferences(write(tmp_path / "p.json", records))
    (tmp_path / "00a").touch()
    with pytest.raises(
        ImageError,
        match=r"p.json: 13 image files are missing: \S*00b, \S*01a.*05a and 3 more; 13 of 14 rows need them",
    ) as info:
        prefs.image_digests()
    assert "\n" not in str(info.value)


GOOD = {"prompt": "p", "image_a": "a.png", "image_b": "b.png", "label": 1}
NUMBER = "allowed: a number from 0 to 1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 1.5}, rf"line 2: label is 1.5; {NUMBER}"),
        ({"label": -0.1}, rf"line 2: label is -0.1; {NUMBER}"),
        ({"label": "left"}, rf"line 2: label is 'left'; {NUMBER}"),
        ({"label": None}, rf"line 2: label is missing; {NUMBER}"),
        ({"label": True}, rf"line 2: label is True; {NUMBER}"),
        ({"label": float("nan")}, rf"line 2: label is nan; {NUMBER}"),
        ({"prompt": ""}, "line 2: prompt is ''; allowed: a text that is not empty"),
        ({"prompt": None}, "line 2: prompt is missing; allowed"),
        ({"image_a": 3}, "line 2: image_a is 3; allowed: a text"),
        ({"image_a": "b.png"}, "line 2: both images are 'b.png'; allowed: two different files"),
        ({"image_a": "./x/../b.png"}, "line 2: both images are './x/../b.png'"),
        ({"image_b": "../b.png"}, "line 2: image is '../b.png'; allowed: a relative path that stays inside"),
        ({"image_b": "/etc/passwd"}, "line 2: image is '/etc/passwd'; allowed: a relative path"),
        ({"image_b": "a\0.png"}, "line 2: image is .*; allowed: a relative path"),
        ({"image_b": "link/b.png"}, "line 2: image is 'link/b.png'; allowed: a relative path"),
        ({"image_b": "outside.png"}, "line 2: image is 'outside.png'; allowed: a relative path"),
        ({"weight": 0}, "line 2: weight is 0; allowed: a number > 0"),
        ({"n_votes": 1.5}, "line 2: n_votes is 1.5; allowed: a whole number"),
        ({"split": "holdout"}, "line 2: split is 'holdout'; allowed: train, validation, test"),
        ({"split": "test"}, "line 1: split is ''; allowed: train, validation, test, in every record or in none"),
        ({"group": ["x"]}, "line 2: group is .*; allowed: a text"),
    ],
)
def test_bad_values(tmp_path, change, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path)
    (tmp_path / "data" / "outside.png").symlink_to(tmp_path / "secret.png")
    path = write(tmp_path / "data" / "p.jsonl", [GOOD, GOOD | change])
    with pytest.raises(PreferenceError, match=r"p\.jsonl, " + message) as info:
        load_preferences(path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.jsonl",
            '{"prompt": "p", "image_a": "a", "image_b": "b"}\n',
            r"no column 'label' \(found: prompt, image_a, image",
        ),
        ("p.jsonl", '{"prompt": "p", "chosen": "a"}\n', "no column 'rejected'"),
        ("p.jsonl", '{"caption": "p"}\n', "no column 'prompt'.*needed: prompt, chosen, rejected or prompt, image_a"),
        ("p.jsonl", '{"prompt": "p", "chosen": "a", "rejected": "b", "image_a": "c"}', "one of the two forms"),
        ("p.jsonl", "\n\n", "holds no pairs"),
        ("p.jsonl", '{"prompt"\n', "line 1: not JSON"),
        ("p.jsonl", "[" * 100000, "line 1: not JSON"),
        (
            "p.jsonl",
            '{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}',
            "line 1: .*key 'chosen' stands twice",
        ),
        ("p.json", '[{"prompt": "p", "prompt": "q"}]', "key 'prompt' stands twice"),
        ("p.jsonl", "[1]\n", "line 1: is .1.; allowed: a record"),
        ("p.json", "{}", "holds {}; allowed: a list"),
        ("p.json", "", "holds no pairs"),
        ("p.csv", "prompt,image_a,image_b,label\np,a,b\n", "line 2: 3 fields; allowed: 4"),
        ("p.csv", 'prompt,image_a,image_b,label\n"p,a,b,1\n', "line .: not CSV"),
        ("p.csv", "prompt,image_a,image_b,label\np,a,b,\n", "line 2: label is ''; allowed"),
        ("p.csv", b"\xff\xfe\x00", r"p.csv, line 1: not UTF-8 text \(byte 0xff at character 1\); allowed: UTF-8"),
        ("p.csv", b"prompt,image_a\n\np\xe9,a\n", "p.csv, line 3: not UTF-8 text .byte 0xe9 at character 2"),
        ("p.jsonl", b'{"prompt": "p"}\n{"prompt": "\xe9"}\n', "p.jsonl, line 2: not UTF-8 text .byte 0xe9"),
        ("p.json", b'[{"prompt": "\xc3\xa9"},\n{"prompt": "\xe9"}]', "p.json, record 2: not UTF-8 text .byte 0xe9"),
        ("p.json", '[{"prompt": "p"}]'.encode("utf-16"), "p.json, whole file: not UTF-8 text .byte 0xff"),
        ("p.parquet", "PAR1", "p.parquet: not a Parquet file .*; allowed: Parquet, or another ending for text"),
        ("p.parquet", '{"prompt": "p"}\n' * 9, "p.parquet: not a Parquet file .*; allowed: Parquet, or another"),
        ("p.parquet", "", "p.parquet: not a Parquet file .*; allowed: Parquet, or another ending for text"),
        ("p.xlsx", "", r"ends in '.xlsx'; allowed: .jsonl, .json, .csv, .parquet"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PreferenceError, match=message) as info:
        load_preferences(tmp_path / name)
    assert str(tmp_path / name) in str(info.value)
    assert "\n" not in str(info.value)


def test_bad_calls(tmp_path):
    with pytest.raises(PreferenceError, match="no such file"):
        load_preferences(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="format is 'hpdv9'; allowed: auto, general"):
        load_preferences(tmp_path / "none.json", format="hpdv9")
    pd.DataFrame([GOOD | {"image_a": ["a.png"]}]).to_parquet(tmp_path / "lists.parquet")
    with pytest.raises(PreferenceError, match=r"row 1: image_a is \['a.png'\]; allowed: a text"):
        load_preferences(tmp_path / "lists.parquet")


def test_damaged_caches_of_digests_are_made_anew(tmp_path):
    """A flipped bit never gives another digest: that would be a row of its own."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    prefs = load_preferences(write(tmp_path / "p.jsonl", [GOOD]))
    cache, right = tmp_path / "cache.parquet", prefs.image_digests()
    assert prefs.image_digests(cache) == right
    intact = cache.read_bytes()
    for position in range(0, len(intact), 13):
        cache.write_bytes(intact[:position] + bytes([intact[position] ^ 2]) + intact[position + 1 :])
        assert prefs.image_digests(cache) == right
    cache.unlink()
    os.mkfifo(cache)
    assert prefs.image_digests(cache) == right
    assert prefs.image_digests(cache) == right


def test_only_regular_files_are_images(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    prefs = load_preferences(write(tmp_path / "p.jsonl", [GOOD]))
    with pytest.raises(ImageError, match=r"2 image files are missing: \S*a.png, \S*b.png; 2 of 2 rows"):
        prefs.image_digests()


def test_pairs_that_a_file_has_and_a_set_has_not_are_told_with_its_judgements(tmp_path):
    records = [{"prompt": f"p{i // 2}", "image_a": f"{i}a", "image_b": f"{i}b", "label": 1} for i in range(8)]
    for i, record in enumerate(records):
        record["split"] = "test" if i % 4 == 1 else "train"
        (tmp_path / record["image_a"]).write_bytes(bytes([2 * i]))
        (tmp_path / record["image_b"]).write_bytes(bytes([2 * i + 1]))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prefs = load_preferences(tmp_path / "p.jsonl")
    judged = prefs.judgements(prefs.image_digests())
    assert set(judged["left_out_of_set"]) == {"2 train connected to test"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": "1", "prompt": "p", "generations": ["a.png"], "ranking": [1]}]', "no ranking has two images"),
        (
            '[{"prompt": "p", "image_a": "a", "image_b": "b", "label": 1}, '
            '{"prompt": "\\ud800", "image_a": "a", "image_b": "b", "label": 1}]',
            r"record 2: prompt is '\\ud800', which holds half a character; allowed: Unicode",
        ),
        (
            '[{"prompt": "p", "file_path": ["a", "\\udc00"], "human_preference": [1, 0]}]',
            r"record 1: file_path is \['a', '\\udc00'\], which holds half a character",
        ),
    ],
)
def test_files_that_give_no_pairs_or_no_text_are_one_line(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(PreferenceError, match=message):
        load_preferences(tmp_path / "p.json")


def test_a_text_is_no_number_where_the_file_has_numbers(tmp_path):
    record = {"prompt": "p", "image_a": "a", "image_b": "b", "label": "1"}
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    with pytest.raises(PreferenceError, match="line 1: label is '1'; allowed: a number from 0 to 1"):
        load_preferences(tmp_path / "p.jsonl")
    (tmp_path / "p.csv").write_text("prompt,image_a,image_b,label\np,a,b,1\n")
    assert len(load_preferences(tmp_path / "p.csv").pairs) == 1


def test_parquet_without_rows_columns_or_unicode_is_one_line(tmp_path):
    path = tmp_path / "p.parquet"
    pd.DataFrame({"prompt": ["p"], "image_a": ["a"], "image_b": ["b"]}).to_parquet(path)
    with pytest.raises(
        PreferenceError, match=r"p.parquet: no column 'label' \(found: prompt, .*\); needed: prompt, ch"
    ):
        load_preferences(path)
    pd.DataFrame({"something": ["p"]}).to_parquet(path)
    with pytest.raises(PreferenceError, match=r"p.parquet: no column 'prompt' \(found: something\); needed: prompt"):
        load_preferences(path)
    pd.DataFrame({"prompt": [], "chosen": [], "rejected": []}).to_parquet(path)
    with pytest.raises(PreferenceError, match=r"p.parquet: holds no pairs; allowed: at least one"):
        load_preferences(path)
    text = pa.array([b"p", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"prompt": text, "chosen": ["a", "b"], "rejected": ["c", "d"]}), path)
    with pytest.raises(
        PreferenceError, match=r"p.parquet, row 2: prompt is not UTF-8 text \(b'.xff'\); allowed: UTF-8"
    ):
        load_preferences(path)
    paths = pa.ListArray.from_arrays([0, 2], text)
    pq.write_table(pa.table({"prompt": ["p"], "file_path": paths, "human_preference": [[1, 0]]}), path)
    with pytest.raises(PreferenceError, match=r"p.parquet, row 1: file_path is not UTF-8 text"):
        load_preferences(path)


def test_the_sides_of_a_ranking_are_one_order_of_its_images(tmp_path):
    """A is always the image of the smaller hash of prompt and name, however the file lists them: never a circle."""
    images = [f"{i}.png" for i in range(9)]
    records = [
        {"prompt": prompt, "image_a": a, "image_b": b, "label": 1}
        for prompt in ("one", "two")
        for a in images
        for b in images
        if a < b
    ]
    prefs = load_preferences(write(tmp_path / "p.jsonl", records))
    orders = []
    for prompt in ("one", "two"):
        place = {image: sha256(f"{prompt}\0{image}".encode()).digest() for image in images}
        here = prefs.pairs[(prefs.items["prompt"] == prompt).to_numpy()[prefs.pairs["item_a"]]]
        names = [prefs.items["image"].to_numpy()[here[item]] for item in ("item_a", "item_b")]
        assert all(place[a] < place[b] for a, b in zip(*names, strict=True))
        orders.append(sorted(images, key=place.__getitem__))
    assert orders[0] != orders[1] != images  # each prompt has an order of its own, and none is that of the names
    turned = [record | {"image_a": record["image_b"], "image_b": record["image_a"], "label": 0} for record in records]
    other = load_preferences(write(tmp_path / "q.jsonl", turned))
    assert other.pairs["pair_id"].tolist() == prefs.pairs["pair_id"].tolist()
    assert other.pairs["label"].tolist() == prefs.pairs["label"].tolist()
    assert (other.pairs["a_listed_first"] != prefs.pairs["a_listed_first"]).all()
