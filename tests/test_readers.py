"""Preference files as they are published, field for field, with their traps; images as bytes; data set folders."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from probekit.errors import ConfigError, PreferenceError
from probekit.preferences import load_preferences
from probekit.preferences.lint import lint


def save(path, records):
    path.parent.mkdir(exist_ok=True, parents=True)
    text = json.dumps(records) if path.suffix == ".json" else "".join(json.dumps(one) + "\n" for one in records)
    path.write_text(text)
    return path


def listed(prefs):
    """Pairs with the sides as the file has them: (image, image, label, models)."""
    image = prefs.items["image"]
    lines = []
    for pair in prefs.pairs.itertuples():
        sides = [(image[pair.item_a], pair.model_a), (image[pair.item_b], pair.model_b)]
        label = pair.label if pair.a_listed_first else 1 - pair.label
        (first, model), (second, other) = sides if pair.a_listed_first else sides[::-1]
        lines.append((first, second, label, model, other))
    return lines


def picture(colour, kind="PNG", size=(6, 4)):
    data = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(data, kind)
    return data.getvalue()


HPDV2_TRAIN = [
    {"human_preference": [1, 0], "prompt": "a", "file_path": ["train/1.jpg", "train/2.jpg"]},
    {"human_preference": [0, 1], "prompt": "b", "file_path": ["3.jpg", "4.jpg"]},
]
HPDV2_TEST = [
    {
        "prompt": "a",
        "image_path": ["test/0.jpg", "test/1.jpg", "test/2.jpg"],
        "rank": [2, 1, 3],
        # 0 over 1: 1 of 4 votes; 0 over 2: 1.5 of 4, against the rank; 1 over 2: 4 of 4
        "raw_annotations": [
            {"rank": [2, 1, 3], "user_hash": "u1"},
            {"rank": [3, 1, 2], "user_hash": "u2"},
            {"rank": [2, 1, 2], "user_hash": "u3"},
            {"rank": [1, 2, 0], "user_hash": "u4"},
        ],
    },
    {"prompt": "b", "image_path": ["test/3.jpg", "test/4.jpg"], "rank": [1, 1], "raw_annotations": []},
]
HPDV3 = [
    {
        "prompt": "a",
        "choice_dist": [9, 3],
        "confidence": 0.97,
        "path1": "i/1",
        "path2": "i/2",
        "model1": "f",
        "model2": "g",
    },
    {
        "prompt": "b",
        "choice_dist": [7, 5],
        "confidence": 0.6,
        "path1": "i/3",
        "path2": "i/4",
        "model1": "f",
        "model2": "g",
    },
    {
        "prompt": "c",
        "choice_dist": None,
        "confidence": None,
        "path1": "i/5",
        "path2": "i/6",
        "model1": "f",
        "model2": "g",
    },
    {
        "prompt": "d",
        "choice_dist": [3, 9],
        "confidence": 0.99,
        "path1": "i/7",
        "path2": "i/8",
        "model1": "f",
        "model2": "g",
    },
]
IMAGEREWARD = [
    {
        "id": "000-1",
        "prompt": "a",
        "generations": ["t/0.png", "t/1.png", "t/2.png", "t/3.png"],
        "ranking": [1, 2, 2, 5],
    },
    {"id": "000-2", "prompt": "b", "generations": ["t/4.png"], "ranking": [1]},
]
IMAGEREWARD_ROWS = [
    {
        "image_path": f"images/{i}.webp",
        "prompt_id": "p-1",
        "prompt": "a",
        "classification": "People",
        "image_amount_in_total": 4,
        "rank": rank,
        "overall_rating": 5,
        "image_text_alignment_rating": 5,
        "fidelity_rating": 6,
    }
    for i, rank in enumerate([1, 2, 2])
]
GENAI = [
    {
        "prompt": f"p{i}",
        "left_model": "A",
        "left_image": f"{i}l",
        "right_model": "B",
        "right_image": f"{i}r",
        "vote_type": v,
    }
    for i, v in enumerate(["leftvote", "rightvote", "tievote", "bothbad_vote"])
]
MJ_BENCH = [
    {"caption": "a", "image0": "0", "image1": "1", "label": 0},
    {"caption": "b", "image0": "2", "image1": "3", "label": 1},
]
RAPIDATA = [
    {"prompt": "a", "image1": "0", "image2": "1", "votes_image1": 6, "votes_image2": 2, "model1": "f", "model2": "g"},
    {"prompt": "b", "image1": "2", "image2": "3", "votes_image1": 0, "votes_image2": 0, "model1": "f", "model2": "g"},
]


def pickapic_rows():
    def row(caption, uids, labels, **changes):
        best = "tie" if labels[0] == 0.5 else uids[0] if labels[0] else uids[1]
        return {
            "are_different": True,
            "best_image_uid": best,
            "caption": caption,
            "created_at": pd.Timestamp("2023-01-08"),
            "has_label": True,
            "image_0_uid": uids[0],
            "image_0_url": "https://example.org/0",
            "image_1_uid": uids[1],
            "image_1_url": "https://example.org/1",
            "jpg_0": picture(ord(uids[0]), "JPEG"),
            "jpg_1": picture(ord(uids[1]), "JPEG"),
            "label_0": labels[0],
            "label_1": labels[1],
            "model_0": "dreamlike",
            "model_1": "sdxl",
            "ranking_id": 7,
            "user_id": 3,
            "num_example_per_prompt": 2,
        } | changes

    return [
        row("cat", "ab", (1.0, 0.0)),
        row("cat", "bc", (0.5, 0.5)),
        row("dog", "de", (0.0, 1.0)),
        row("dog", "df", (1.0, 0.0), has_label=False),
        row("dog", "dd", (1.0, 0.0)),
    ]


def pickapic(path, rows, row_group_size=2):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def test_hpdv2_train(tmp_path):
    prefs = load_preferences(save(tmp_path / "train.json", HPDV2_TRAIN))
    assert listed(prefs) == [("train/1.jpg", "train/2.jpg", 1, "", ""), ("train/3.jpg", "train/4.jpg", 0, "", "")]
    assert set(prefs.pairs["split"]) <= {"train", "validation"}  # the file is the official training set


def test_hpdv2_test_takes_votes_where_they_agree_with_the_rank(tmp_path, caplog):
    prefs = load_preferences(save(tmp_path / "test.json", HPDV2_TEST))
    assert [line[:3] for line in listed(prefs)] == [
        ("test/0.jpg", "test/1.jpg", 0.25),
        ("test/0.jpg", "test/2.jpg", 1),
        ("test/1.jpg", "test/2.jpg", 0.75),
        ("test/3.jpg", "test/4.jpg", 0.5),
    ]
    assert len(prefs.items) == 5  # rankings share their images
    assert prefs.pairs["n_votes"].tolist() == [4, 4, 4, pd.NA]
    assert prefs.pairs["ranking_id"].tolist() == ["1", "1", "1", "2"]
    assert (prefs.pairs["split"] == "test").all()
    assert "1 pairs where the majority of votes is not for the published rank" in caplog.text


def test_hpdv3_path1_wins_and_null_confidence_stays(tmp_path, caplog):
    path = save(tmp_path / "all.json", HPDV3)
    prefs = load_preferences(path)
    assert listed(prefs) == [
        ("i/1", "i/2", 0.75, "f", "g"),
        ("i/3", "i/4", 7 / 12, "f", "g"),
        ("i/5", "i/6", 1, "f", "g"),
        ("i/7", "i/8", 1, "f", "g"),
    ]
    assert prefs.pairs["n_votes"].tolist() == [12, 12, pd.NA, 12]
    assert "1 pairs where the majority of votes is not for path1, the preferred image" in caplog.text
    sure = load_preferences(path, min_confidence=0.95)
    assert [line[0] for line in listed(sure)] == ["i/1", "i/5", "i/7"]
    assert sure.dropped == {"confidence_below_0.95": 1}
    assert "1 pairs left out: confidence below 0.95" in caplog.text
    bare = [{key: record[key] for key in ("prompt", "path1", "path2", "model1", "model2")} for record in HPDV3]
    test = load_preferences(save(tmp_path / "test.json", bare), min_confidence=0.95)
    assert [line[2] for line in listed(test)] == [1, 1, 1, 1]
    assert test.dropped == {}
    assert "4 pairs have no confidence and stay: the least of 0.95 is for those that have one" in caplog.text


def test_imagereward_groups_have_ties_and_gaps(tmp_path, caplog):
    prefs = load_preferences(save(tmp_path / "test.json", IMAGEREWARD))
    assert [line[2] for line in listed(prefs)] == [1, 1, 1, 0.5, 1, 1]
    assert prefs.pairs["ranking_id"].unique().tolist() == ["000-1"]
    assert prefs.pairs["group"].nunique() == 1
    assert len(prefs.items) == 4
    assert "1 rankings have one image only" in caplog.text


def test_imagereward_rows(tmp_path, caplog):
    path = tmp_path / "rows.parquet"
    pd.DataFrame(IMAGEREWARD_ROWS).to_parquet(path)
    prefs = load_preferences(path)
    assert [line[2] for line in listed(prefs)] == [1, 1, 0.5]
    assert prefs.pairs["source"].tolist() == ["People"] * 3
    assert prefs.pairs["ranking_id"].tolist() == ["p-1"] * 3
    assert "1 prompts have fewer rows than image_amount_in_total says" in caplog.text


def test_genai_bench(tmp_path, caplog):
    caplog.set_level("INFO")
    prefs = load_preferences(save(tmp_path / "g.jsonl", GENAI))
    assert [line[2:] for line in listed(prefs)] == [(label, "A", "B") for label in (1, 0, 0.5, 0.5)]
    assert "1 pairs were voted bothbad_vote: ties of label 0.5, as tievote" in caplog.text


def test_presets_and_mappings(tmp_path):
    mj = save(tmp_path / "mj.json", MJ_BENCH)
    assert [line[:3] for line in listed(load_preferences(mj))] == [("0", "1", 1), ("2", "3", 0)]
    votes = load_preferences(save(tmp_path / "votes.jsonl", RAPIDATA))
    assert listed(votes) == [("0", "1", 0.75, "f", "g")]
    assert votes.dropped == {"no_votes": 1}
    assert votes.pairs["n_votes"].tolist() == [8]
    mapped = load_preferences(mj, columns="prompt=caption, image_a=image1,image_b=image0,label=label")
    assert [line[:3] for line in listed(mapped)] == [("1", "0", 0), ("3", "2", 1)]
    assert mapped.pairs["pair_id"].tolist() == load_preferences(mj, columns="mj-bench").pairs["pair_id"].tolist()
    for columns, message in {
        "prompt=caption,image_c=x": "columns has 'image_c=x'; allowed: mj-bench, rapidata, or OURS=THEIRS",
        "caption": "columns has 'caption'; allowed",
        "prompt=caption,image_a=image0,image_b=image0": "each column once on either side",
        "prompt=text": r"no column 'text' for prompt \(found: caption, image0, image1, label\)",
    }.items():
        with pytest.raises((ConfigError, PreferenceError), match=message):
            load_preferences(mj, columns=columns)
    with pytest.raises(ConfigError, match="columns with format 'hpdv3'; allowed: format general"):
        load_preferences(mj, columns="mj-bench", format="hpdv3")


@pytest.mark.parametrize(
    ("name", "records"),
    [
        ("hpdv2", HPDV2_TRAIN),
        ("hpdv2", HPDV2_TEST),
        ("hpdv3", HPDV3),
        ("imagereward", IMAGEREWARD),
        ("imagereward", IMAGEREWARD_ROWS),
        ("genai-bench", GENAI),
        ("mj-bench", MJ_BENCH),
        ("rapidata", RAPIDATA),
    ],
)
def test_formats_are_recognised_and_others_refused(tmp_path, caplog, name, records):
    caplog.set_level("INFO")
    path = save(tmp_path / "some.json", records)
    found = load_preferences(path)
    assert f"{path}: read as {name}, by its fields" in caplog.messages
    pd.testing.assert_frame_equal(load_preferences(path, format=name).pairs, found.pairs)
    other = "hpdv3" if name != "hpdv3" else "pickapic"
    with pytest.raises(PreferenceError, match=rf"some.json: is not {other} \(found: .*\); needed: \w+, "):
        load_preferences(path, format=other)
    with pytest.raises(PreferenceError, match=r"some.json: no column '.*needed: prompt, chosen, rejected or"):
        load_preferences(path, format="general")


@pytest.mark.parametrize(
    ("records", "at", "change", "message"),
    [
        (HPDV2_TRAIN, 1, {"human_preference": [1, 1]}, r"human_preference is \[1, 1\]; allowed: \[1, 0\] or \[0, 1\]"),
        (HPDV2_TRAIN, 1, {"human_preference": None}, "human_preference is missing"),
        (HPDV2_TRAIN, 1, {"file_path": ["x"]}, r"file_path is \['x'\]; allowed: a list of 2 paths"),
        (HPDV2_TRAIN, 1, {"file_path": ["x", 3]}, "file_path has 3; allowed: texts"),
        (HPDV2_TRAIN, 1, {"file_path": ["x", "../y"]}, "image is '../y'; allowed: a relative path that stays inside"),
        (HPDV2_TRAIN, 1, {"file_path": ["x", "/y"]}, "image is '/y'; allowed: a relative path that stays inside"),
        (HPDV2_TEST, 0, {"rank": [1, 2]}, "rank has 2 numbers for 3 images; allowed: one for each"),
        (HPDV2_TEST, 0, {"rank": ["1", 2, 3]}, "rank is .*; allowed: a list of whole numbers"),
        (HPDV2_TEST, 0, {"raw_annotations": [{"rank": [1]}]}, "raw_annotations: rank has 1 numbers for 3 images"),
        (HPDV2_TEST, 0, {"raw_annotations": 3}, "raw_annotations is 3; allowed: a list of records"),
        (HPDV3, 1, {"path1": None}, "path1 is missing; allowed: a text that is not empty"),
        (HPDV3, 1, {"path1": "i/4"}, "both images are 'i/4'"),
        (HPDV3, 1, {"prompt": 4}, "prompt is 4; allowed: a text"),
        (HPDV3, 1, {"choice_dist": [1]}, r"choice_dist is \[1\]; allowed: two numbers of votes, or null"),
        (HPDV3, 1, {"choice_dist": [0, 0]}, r"choice_dist is \[0, 0\]"),
        (HPDV3, 1, {"confidence": 1.5}, "confidence is 1.5; allowed: a number from 0 to 1, or null"),
        (IMAGEREWARD, 0, {"ranking": [1, 2]}, "ranking has 2 numbers for 4 images"),
        (IMAGEREWARD, 0, {"generations": []}, r"generations is \[\]; allowed: a list"),
        (IMAGEREWARD_ROWS, 1, {"rank": 1.5}, "rank is 1.5; allowed: a whole number"),
        (IMAGEREWARD_ROWS, 1, {"prompt": "b"}, "prompt of prompt_id 'p-1' is not the one of an earlier row"),
        (
            IMAGEREWARD_ROWS,
            1,
            {"image_path": "images/0.webp"},
            "image 'images/0.webp' stands twice under prompt_id 'p-1'",
        ),
        (GENAI, 1, {"vote_type": "left"}, "vote_type is 'left'; allowed: leftvote, rightvote, tievote, bothbad_vote"),
        (MJ_BENCH, 1, {"label": "tie"}, "label is 'tie'; allowed: a number from 0 to 1"),
        (MJ_BENCH, 1, {"label": 2}, "label is 2; allowed: a number from 0 to 1, the share of votes for image_b"),
        (RAPIDATA, 1, {"votes_image1": -1}, "votes_image1 is -1; allowed: a number >= 0"),
    ],
)
def test_bad_records(tmp_path, records, at, change, message):
    changed = [record | change if i == at else record for i, record in enumerate(records)]
    with pytest.raises(PreferenceError, match=rf"p.json, record {at + 1}: {message}") as info:
        load_preferences(save(tmp_path / "p.json", changed))
    assert "\n" not in str(info.value)


def test_pickapic_counts_what_was_not_judged(tmp_path):
    prefs = load_preferences(pickapic(tmp_path / "validation_unique-00000.parquet", pickapic_rows()))
    names = {uid: f"validation_unique-00000.images/{uid}.jpg" for uid in "abcde"}
    assert listed(prefs) == [
        (names["a"], names["b"], 1, "dreamlike", "sdxl"),
        (names["b"], names["c"], 0.5, "dreamlike", "sdxl"),
        (names["d"], names["e"], 0, "dreamlike", "sdxl"),
    ]
    assert prefs.dropped == {"not_judged": 1, "same_image": 1}
    assert (prefs.pairs["split"] == "validation").all()
    assert len(prefs.items) == 5
    assert prefs.pairs["ranking_id"].tolist() == ["7"] * 3
    assert not (tmp_path / "validation_unique-00000.images").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_0": 0.7}, "label_0 is 0.7; allowed: 1, 0 or 0.5"),
        ({"label_1": 1.0}, "label_0 and label_1 are 1.0 and 1.0; allowed: 1 and 0"),
        ({"label_1": None}, "label_0 and label_1 are 1.0 and missing"),
        ({"image_0_uid": None}, "image_0_uid is missing"),
        ({"image_0_uid": "../../x"}, "image is 'p.images/../../x.jpg'; allowed: a relative path that stays inside"),
        ({"has_label": None}, "has_label is missing; allowed: true or false"),
    ],
)
def test_bad_pickapic(tmp_path, change, message):
    rows = pickapic_rows()
    rows[0] |= change
    with pytest.raises(PreferenceError, match=rf"p.parquet, row 1: {message}"):
        load_preferences(pickapic(tmp_path / "p.parquet", rows))
    pq.write_table(pa.table({"caption": ["a"], "image_0_uid": ["u"]}), tmp_path / "q.parquet")
    with pytest.raises(
        PreferenceError, match=r"q.parquet: is not pickapic \(found: caption, image_0_uid\); needed: cap"
    ):
        load_preferences(tmp_path / "q.parquet", format="pickapic")


def test_bytes_become_files_once_they_are_needed(tmp_path, monkeypatch):
    prefs = load_preferences(pickapic(tmp_path / "p.parquet", pickapic_rows()))
    digests = prefs.image_digests()  # of the bytes where they are: a dry run writes nothing
    assert not (tmp_path / "p.images").exists()
    count, size = prefs.images_to_unpack()
    assert count == 5
    assert 5 * 300 < size < 5 * 3000
    prefs.check_images()
    real = Path.replace

    def stopped(self, target):
        if Path(target).name == "c.jpg":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        prefs.unpack_images()
    monkeypatch.undo()
    assert not list((tmp_path / "p.images").glob("*c.jpg"))
    seen = []
    prefs.unpack_images(lambda done, total, _: seen.append((done, total)))
    assert 0 < seen[-1][0] == seen[-1][1] < 5  # what was there stays
    assert sorted(path.name for path in (tmp_path / "p.images").iterdir()) == [f"{uid}.jpg" for uid in "abcde"]
    assert (tmp_path / "p.images" / "e.jpg").read_bytes() == picture(ord("e"), "JPEG")
    assert prefs.images_to_unpack() == (0, 0)
    assert prefs.image_digests() == digests
    judged = prefs.judgements(prefs.image_digests())
    assert judged["bytes_a"].tolist() == [len(picture(ord(Path(image).stem), "JPEG")) for image in judged["image_a"]]
    assert set(judged["width_a"]) == set(judged["width_b"]) == {6}
    assert set(judged["height_a"]) == {4}
    assert set(judged["format_b"]) == {"JPEG"}


def test_one_uid_with_two_pictures_is_said(tmp_path, caplog):
    rows = pickapic_rows()
    rows[1]["jpg_0"] = picture(200, "JPEG")  # b was another picture a row before
    prefs = load_preferences(pickapic(tmp_path / "p.parquet", rows, row_group_size=1))
    prefs.unpack_images()
    assert "1 images have other bytes than an earlier one of the same name" in caplog.text
    prefs = load_preferences(pickapic(tmp_path / "q.parquet", pickapic_rows()))
    caplog.clear()
    prefs.unpack_images()
    assert caplog.text == ""


def general_with_bytes(path):
    """Write what ``datasets`` writes for images: structs of bytes and path."""
    images = [[{"bytes": picture(40 * i + j), "path": "image.png"} for i in range(3)] for j in range(2)]
    table = {"prompt": ["a", "b", "c"], "image_a": images[0], "image_b": images[1], "label": [1.0, 0.0, 0.5]}
    pq.write_table(pa.table(table), path)
    return path


def test_the_general_form_with_bytes(tmp_path):
    prefs = load_preferences(general_with_bytes(tmp_path / "p.parquet"))
    assert prefs.items["image"].nunique() == 6  # equal paths inside are not one image
    prefs.unpack_images()
    for first, second, *_ in listed(prefs):
        assert (tmp_path / first).read_bytes() != (tmp_path / second).read_bytes()
    assert (tmp_path / listed(prefs)[2][1]).read_bytes() == picture(81)
    raw = pa.table({"prompt": ["a"], "chosen": [picture(1)], "rejected": [picture(2)]})
    pq.write_table(raw, tmp_path / "raw.parquet")
    prefs = load_preferences(tmp_path / "raw.parquet")
    prefs.unpack_images()
    assert (tmp_path / listed(prefs)[0][0]).read_bytes() == picture(1)


def test_order_alone_says_nothing(tmp_path):
    """Chosen first in every file: a scorer that always prefers A is right half the time, over 12 files."""
    shares = []
    for seed in range(12):
        records = [
            {"prompt": f"{seed}-{i}", "path1": f"{seed}/{i}a", "path2": f"{seed}/{i}b", "model1": "", "model2": ""}
            for i in range(300)
        ]
        pairs = load_preferences(save(tmp_path / "all.json", records)).pairs
        assert (pairs["a_listed_first"] == (pairs["label"] == 1)).all()
        shares.append((pairs["label"] == 1).mean())
    # 3600 fair coins: a standard error of 0.8 points in all, of 2.9 points in each file
    assert abs(np.mean(shares) - 0.5) < 0.03
    assert 0.01 < np.std(shares) < 0.06


records_of_any_kind = st.lists(
    st.dictionaries(
        st.sampled_from(["prompt", "path1", "path2", "choice_dist", "confidence", "rank", "image_path", "label"]),
        st.none()
        | st.booleans()
        | st.integers(-2, 3)
        | st.floats()
        | st.text(max_size=3)
        | st.lists(st.integers(0, 2)),
    ),
    max_size=4,
)


@given(records_of_any_kind, st.sampled_from(["auto", "hpdv3", "hpdv2", "general"]))
@settings(deadline=None, max_examples=60)
def test_whatever_stands_there_is_read_or_refused_in_one_line(tmp_path_factory, records, format):
    path = save(tmp_path_factory.mktemp("any") / "p.json", records)
    try:
        said = str(load_preferences(path, format=format).pairs["label"].between(0, 1).all())
    except PreferenceError as error:
        said = str(error)
    assert said == "True" or said.startswith(str(path))
    assert "\n" not in said


@pytest.mark.parametrize("cut", [7, 64, 10**6])
def test_a_list_is_read_in_pieces(tmp_path, monkeypatch, cut):
    monkeypatch.setattr("probekit.preferences.records._READ", cut)
    records = [{"prompt": 'é 😀 "]},{[' * (i % 3 + 1), "path1": f"{i}a", "path2": f"{i}b"} for i in range(9)]
    path = tmp_path / "all.json"
    path.write_text(" \n" + json.dumps(records, indent=2, ensure_ascii=False) + "\n ")
    assert len(load_preferences(path).pairs) == 9
    good = path.read_text()
    for text, message in {
        good.rstrip()[:-1]: "after record 9: not JSON .*the file ends",
        good + "x": "after the list: not JSON .*'x' follows",
        good.replace('"4a"', "4a"): "record 5: not JSON",
        good.replace("  },", "  }", 1): "after record 1: not JSON",
    }.items():
        path.write_text(text)
        with pytest.raises(PreferenceError, match=message):
            load_preferences(path)


def test_folders_of_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"prompt": ["a", "b"], "image_a": ["1", "3"], "image_b": ["2", "4"], "label": [1.0, 0.0]}
    parts = {"train": rows, "test": {**rows, "prompt": ["c", "d"], "image_a": ["5", "6"], "image_b": ["7", "8"]}}
    for split, part in parts.items():
        (tmp_path / "files").mkdir(exist_ok=True)
        pd.DataFrame(part).to_parquet(tmp_path / "files" / f"{split}-00000-of-00001.parquet")
    saved = datasets.DatasetDict({split: datasets.Dataset.from_dict(part) for split, part in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    for name in ("files", "saved"):
        prefs = load_preferences(tmp_path / name)
        assert (prefs.pairs["split"] == "test").sum() == 2
        assert [line[2] for line in listed(prefs)] == [1, 0, 1, 0]
        assert set(prefs.items["path"]) == {str(tmp_path / name / str(i)) for i in range(1, 9)}
    pictures = datasets.Dataset.from_dict(
        {
            "prompt": ["a"],
            "chosen": [{"bytes": picture(1), "path": None}],
            "rejected": [{"bytes": picture(2), "path": None}],
        },
        features=datasets.Features(
            {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
        ),
    )
    pictures.save_to_disk(tmp_path / "pictures")
    prefs = load_preferences(tmp_path / "pictures")
    prefs.unpack_images()
    assert (tmp_path / listed(prefs)[0][0]).read_bytes() == picture(1)
    assert prefs.name == "pictures"


def test_folders_without_the_library_or_data(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PreferenceError, match=r"empty: datasets cannot open it|empty: holds no data files"):
        load_preferences(tmp_path / "empty")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(PreferenceError, match=r"empty: folders and ids .* pip install 'dit-probekit\[datasets\]'"):
        load_preferences(tmp_path / "empty")
    with pytest.raises(PreferenceError, match=r"^owner/name: folders and ids"):
        load_preferences("owner/name")


def noted(prefs, caplog):
    """Give what a set's notes say; each was a warning while it was loaded, and is one of lint in text and JSON."""
    report = lint(prefs)
    for what, count in prefs.notes.items():
        assert f"{count} {what}" in caplog.text
        assert f"{count:,} {what}" in report.warnings
        assert ("warning", f"{count:,} {what}") in report.lines()
    assert report.facts()["notes"] == prefs.notes
    return prefs.notes


def changed(records, at, **changes):
    return [record | changes if i == at else record for i, record in enumerate(records)]


RANKED = {"id": "000-1", "prompt": "a", "generations": ["5.png", "6.png"], "ranking": [1, 2]}


@pytest.mark.parametrize(
    ("name", "records", "notes"),
    [
        (
            "train.json",
            HPDV2_TRAIN,
            {"records have file names without a folder: taken from train/, where HPDv2 publishes them": 1},
        ),
        (
            "test.json",
            changed(HPDV2_TEST, 1, image_path=["3.jpg", "4.jpg"]),
            {
                "records have file names without a folder: taken from test/, where HPDv2 publishes them": 1,
                "rankings have no raw_annotations: the published rank alone says who won": 1,
                "pairs where the majority of votes is not for the published rank, which counts: label 1, 0 or 0.5, "
                "not the share": 1,
            },
        ),
        (
            "all.json",
            HPDV3,
            {
                "pairs where the majority of votes is not for path1, the preferred image, which counts: label 1, 0 or "
                "0.5, not the share": 1,
                "pairs have no votes (choice_dist): path1, the preferred image, has label 1": 1,
            },
        ),
        (
            "test.json",
            [*IMAGEREWARD, RANKED | {"prompt": "c"}, RANKED],
            {
                "rankings have one image only, which makes no pair": 1,
                "rankings have the id of another prompt: they stay rankings of their own": 1,
                "rankings have the id and the prompt of an earlier one: they count as one ranking": 1,
            },
        ),
        ("rows.json", IMAGEREWARD_ROWS, {"prompts have fewer rows than image_amount_in_total says": 1}),
        (
            "rows.json",
            changed(IMAGEREWARD_ROWS, 2, image_amount_in_total=2),
            {
                "prompts have fewer rows than image_amount_in_total says": 1,
                "prompts have more rows than image_amount_in_total says: all of them are compared": 1,
            },
        ),
        ("g.jsonl", GENAI, {"pairs were voted bothbad_vote: ties of label 0.5, as tievote": 1}),
    ],
)
def test_every_trap_of_a_published_file_is_said_when_loading_and_by_lint(tmp_path, caplog, name, records, notes):
    assert noted(load_preferences(save(tmp_path / name, records)), caplog) == notes


def test_confidences_that_are_null_keep_their_pairs_and_are_said(tmp_path, caplog):
    prefs = load_preferences(save(tmp_path / "all.json", HPDV3), min_confidence=0.95)
    told = "pairs have no confidence and stay: the least of 0.95 is for those that have one"
    assert noted(prefs, caplog)[told] == 1
    assert lint(prefs).facts()["left_out"] == {"confidence_below_0.95": 1}


@pytest.mark.parametrize(("at", "best"), [(0, "b"), (1, "c"), (0, "tie")])
def test_a_best_image_that_is_not_what_the_label_says_is_said(tmp_path, caplog, at, best):
    rows = changed(pickapic_rows(), at, best_image_uid=best)
    prefs = load_preferences(pickapic(tmp_path / "p.parquet", rows))
    assert noted(prefs, caplog) == {"pairs where best_image_uid is not what label_0 says: label_0 counts": 1}
    assert load_preferences(pickapic(tmp_path / "q.parquet", pickapic_rows())).notes == {}


def test_rankings_of_one_id_stay_apart_by_their_prompts(tmp_path):
    records = [RANKED, RANKED | {"prompt": "c", "generations": ["7.png", "8.png"]}]
    pairs = load_preferences(save(tmp_path / "test.json", records)).pairs
    assert pairs["ranking_id"].tolist() == ["000-1", "000-1"]
    assert pairs["group"].nunique() == 2


def test_notes_of_several_files_are_counted_together(tmp_path, caplog):
    pytest.importorskip("datasets")
    (tmp_path / "set" / "data").mkdir(parents=True)
    other = [record | {"prompt": record["prompt"] * 2} for record in HPDV3]
    for split, records in {"train": HPDV3, "test": other, "test_unique": other[:1]}.items():
        pd.DataFrame(records).to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    notes = load_preferences(tmp_path / "set").notes
    assert notes["pairs have no votes (choice_dist): path1, the preferred image, has label 1"] == 2
    assert notes["parts are left out, since their pairs are in other parts too: test_unique"] == 1
    assert "1 parts are left out" in caplog.text


def test_identifiers_may_be_whole_numbers_and_names_may_not(tmp_path):
    """Pick-a-Pic numbers its rankings; a model 5 is a column in the wrong place."""
    record = {"prompt": "p", "image_a": "a", "image_b": "b", "label": 1, "group": 7, "ranking_id": 3}
    prefs = load_preferences(save(tmp_path / "p.jsonl", [record, record | {"group": "7", "prompt": "q"}]))
    assert prefs.pairs["ranking_id"].tolist() == ["3", "3"]
    assert prefs.pairs["group"].nunique() == 1
    pd.DataFrame([record, record | {"ranking_id": None}]).to_parquet(tmp_path / "gaps.parquet")  # 3.0 and NaN
    assert load_preferences(tmp_path / "gaps.parquet").pairs["ranking_id"].tolist() == ["3", ""]
    numbered = [one | {"prompt_id": 12} for one in IMAGEREWARD_ROWS]
    assert set(load_preferences(save(tmp_path / "rows.json", numbered)).pairs["ranking_id"]) == {"12"}
    for change, message in {
        ("model_a", 5): "model_a is 5; allowed: a text",
        ("source", 2): "source is 2; allowed: a text",
        ("split", 1): "split is 1; allowed: a text",
        ("group", 1.5): "group is 1.5; allowed: a text or a whole number",
        ("group", True): "group is True; allowed: a text or a whole number",
    }.items():
        with pytest.raises(PreferenceError, match=f"p.jsonl, line 2: {message}"):
            load_preferences(save(tmp_path / "p.jsonl", [record, record | dict([change])]))
