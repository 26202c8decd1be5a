"""Lint: every fault that is planted is found and counted, and a clean file has none."""

import json
import os

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cli import probekit, refused
from test_preferences import write

from probekit.preferences import load_preferences
from probekit.preferences.lint import lint
from probekit.preferences.near_duplicates import NEAR_BITS, near_hashes
from probekit.preferences.pictures import look_at


def picture(seed, side=96):
    """A picture with the spectrum of photographs: most of it is in large shapes."""
    rng = np.random.default_rng(seed)
    waves = np.fft.rfftn(rng.normal(size=(side, side, 3)), axes=(0, 1))
    y, x = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    values = np.fft.irfftn(waves / np.maximum(np.hypot(y, x), 1 / side)[..., None], axes=(0, 1))
    values = (values - values.min()) / np.ptp(values)
    return Image.fromarray((255 * values).astype(np.uint8))


def judged(count, name="", **more):
    return [
        {"prompt": f"{name}p{i}", "image_a": f"{name}{i}a.png", "image_b": f"{name}{i}b.png", "label": i % 2} | more
        for i in range(count)
    ]


def split_of(count):
    return [name for name in ("train", "validation", "test") for _ in range(count)]


@pytest.fixture
def clean(tmp_path):
    """Twelve pairs over three splits, with pictures: nothing is wrong with it."""
    records = [record | {"split": name} for record, name in zip(judged(12), split_of(4), strict=True)]
    for i, record in enumerate(records):
        picture(2 * i).save(tmp_path / record["image_a"])
        picture(2 * i + 1).save(tmp_path / record["image_b"])
    return write(tmp_path / "p.jsonl", records)


def test_nothing_is_found_where_nothing_is_wrong(clean):
    found = lint(load_preferences(clean), images=True)
    assert found.errors == found.warnings == ()
    facts = found.facts()
    assert (facts["pairs"], facts["rows"], facts["prompts"], facts["images"]) == (12, 24, 12, 24)
    assert facts["splits"]["test"] == {"pairs": 4, "prompts": 4, "images": 8, "groups": 4}
    assert facts["groups"] == {"count": 12, "median": 1, "90 %": 1, "99 %": 1, "largest": 1} | {
        "largest_group": facts["groups"]["largest_group"]
    }
    assert json.loads(json.dumps(facts)) == facts


def test_bad_files_are_errors_with_the_pairs_that_they_cost(clean):
    folder = clean.parent
    records = [json.loads(line) for line in clean.read_text().splitlines()]
    again = {"prompt": "p0", "image_a": "0a.png", "image_b": "1b.png", "label": 1, "split": "train"}
    write(clean, [*records, again])
    (folder / "0a.png").unlink()  # in two pairs
    (folder / "2a.png").write_bytes(b"")
    (folder / "2b.png").write_bytes(b"")  # one pair
    whole = (folder / "3a.png").read_bytes()
    (folder / "3a.png").write_bytes(whole[: len(whole) // 2])
    (folder / "4b.png").write_text("<html>")
    (folder / "5a.png").unlink()
    os.mkfifo(folder / "5a.png")
    prefs = load_preferences(clean)
    assert lint(prefs).errors == ()  # no file is touched without --images
    assert lint(prefs, images=True).errors == (
        "2 image files are missing, which costs 3 pairs: 0a.png, 5a.png",
        "2 image files have no bytes, which costs 1 pairs: 2b.png, 2a.png",
        "2 image files cannot be read as images, which costs 2 pairs: 3a.png, 4b.png",
    )


def test_processes_find_the_same(clean):
    paths = load_preferences(clean).items["path"].tolist()
    alone = look_at(paths, jobs=1)
    assert look_at(paths, jobs=2).equals(alone)
    assert alone.index.tolist() == paths


def test_repeated_and_contradicting_judgements_are_told_apart(tmp_path):
    first = {"prompt": "p", "image_a": "1", "image_b": "2", "label": 1}
    turned = {"prompt": "p", "image_a": "2", "image_b": "1", "label": 0.1}  # the same winner from the other side
    records = [first, turned, first | {"prompt": "r"}, first | {"prompt": "r", "label": 0.2}]
    records += [{"prompt": "q", "image_a": "3", "image_b": "4", "label": label} for label in (0.5, 0.5, 1)]
    records += [first | {"prompt": "another"}]
    found = lint(load_preferences(write(tmp_path / "p.jsonl", records)))
    assert found.facts()["repeats"] == {
        "duplicates": 2,
        "contradicting_pairs": 1,
        "contradicting_judgements": 2,
    }
    assert found.facts()["true_ties"] == 2
    assert "2 judgements repeat another one of the same prompt and images" in found.warnings
    assert "1 pairs were judged both ways (2 judgements)" in found.warnings


def test_the_overlap_of_the_file_s_own_splits_is_counted(tmp_path):
    records = [record | {"split": name} for record, name in zip(judged(30), split_of(10), strict=True)]
    records[0]["prompt"] = records[20]["prompt"]
    records[1]["image_a"] = records[21]["image_a"]
    found = lint(load_preferences(write(tmp_path / "p.jsonl", records)))
    assert found.facts()["left_out"] == {"train_connected_to_test": 2}
    assert found.warnings == (
        "2 pairs are left out: train connected to test",
        "train and test share 1 prompts and 1 images in the file, in 2 groups",
    )
    assert found.facts()["overlap"]["train and test"] == {"prompts": 1, "images": 1, "groups": 2}


def test_large_groups_placeholders_and_absent_splits_are_said(tmp_path):
    records = [record | {"image_b": "black.png"} for record in judged(40)]
    records += [record | {"group": "one"} for record in judged(10, "g")]
    found = lint(load_preferences(write(tmp_path / "p.jsonl", [record | {"split": "train"} for record in records])))
    assert found.facts()["placeholders"] == {"images": 1, "pairs": 40, "names": ["black.png"]}
    assert "the largest group has 20.0 % of the pairs and stays in one split" in found.warnings
    assert "1 images stand under more than 20 prompts, in 40 pairs, and do not join groups: black.png" in found.warnings
    assert "no test pairs: a sweep needs train, validation and test" in found.warnings


def test_a_side_that_wins_too_often_is_said(tmp_path):
    rng = np.random.default_rng(0)
    records = [record | {"label": float(rng.random() < 0.7)} for record in judged(400)]
    found = lint(load_preferences(write(tmp_path / "p.jsonl", records)))
    assert abs(found.facts()["sides"]["listed"]["share"] - 0.7) < 0.07
    assert any("listed first in the file wins" in warning for warning in found.warnings)
    fair = [record | {"label": float(rng.random() < 0.5)} for record in judged(400)]
    found = lint(load_preferences(write(tmp_path / "q.jsonl", fair)))
    assert not any("wins" in warning for warning in found.warnings)


def test_the_listed_side_is_read_where_the_set_says_it(tmp_path):
    prefs = load_preferences(write(tmp_path / "p.jsonl", judged(40)))
    prefs.pairs["a_listed_first"] = prefs.pairs["label"] == 1  # the first always wins
    sides = lint(prefs).facts()["sides"]
    assert (sides["listed"]["share"], sides["hashed"]["share"]) == (1.0, prefs.pairs["label"].mean())


@pytest.mark.parametrize(("ties", "share"), [("soft", 0.625), ("half", 0.75), ("drop", 0.75)])
def test_ties_count_as_asked(tmp_path, ties, share):
    records = [record | {"label": 0.75 if i % 2 else 0.5} for i, record in enumerate(judged(20))]
    prefs = load_preferences(write(tmp_path / "p.jsonl", records))
    facts = lint(prefs, ties=ties).facts()
    assert facts["sides"]["listed"]["share"] == share
    assert facts["true_ties"] == 10


def test_generators_alone_are_judged_on_test_pairs(tmp_path):
    """Strengths 3 > 2 > 1 > 0: three of four labels follow them, so the model reads 75 % and no more."""
    rng = np.random.default_rng(0)
    records = []
    for i, record in enumerate(judged(1200, split="train")):
        a, b = rng.choice(4, 2, replace=False)
        records.append(record | {"model_a": f"m{a}", "model_b": f"m{b}", "label": int((a > b) == (i % 4 > 0))})
        records[-1]["split"] = ["train", "test", "validation"][i // 4 % 3]
    records.append(judged(1, "same")[0] | {"split": "test", "model_a": "m1", "model_b": "m1"})
    records.append(judged(1, "none")[0] | {"split": "test", "model_a": "m1"})
    facts = lint(load_preferences(write(tmp_path / "p.jsonl", records))).facts()["generators"]
    assert (facts["count"], facts["pairs"], facts["same"], facts["test_pairs"]) == (4, 1201, 1, 400)
    assert facts["accuracy"] == 0.75
    wins = {name: at["wins"] for name, at in facts["most_common"].items()}
    assert wins["m3"] > wins["m2"] > wins["m1"] > wins["m0"]
    without = lint(load_preferences(write(tmp_path / "q.jsonl", judged(30)))).facts()["generators"]
    assert (without["count"], without["accuracy"]) == (0, None)


def test_a_generator_unseen_in_training_says_nothing_and_is_counted(tmp_path):
    """Two of four test pairs show m9, which is only ever compared with itself in training: half a point each."""

    def pair(name, split, model_a, model_b, label):
        return judged(1, name)[0] | {"split": split, "model_a": model_a, "model_b": model_b, "label": label}

    records = [pair(f"t{i}", "train", "m1", "m0", 1) for i in range(5)] + [pair("s", "train", "m9", "m9", 1)]
    records += [pair("v", "validation", "m1", "m0", 1)]
    records += [pair("a", "test", "m1", "m0", 1), pair("b", "test", "m0", "m1", 1)]
    records += [pair("c", "test", "m1", "m9", 1), pair("d", "test", "m9", "m0", 1)]
    report = lint(load_preferences(write(tmp_path / "p.jsonl", records)))
    found = report.facts()["generators"]
    assert (found["accuracy"], found["test_pairs"], found["unseen"]) == ((1 + 0 + 0.5 + 0.5) / 4, 4, 2)
    alone = dict(report.lines())["generators alone"]
    assert alone.startswith("predict 50.0 % of 4 test pairs of two generators; 2 of these show one unseen in training")


def test_the_same_picture_in_two_splits_is_found(clean):
    """Saved again as JPEG, and scaled: near. Copied: equal bytes. Unrelated, or in the same split: nothing."""
    folder = clean.parent
    jpeg = picture(0).resize((64, 64))
    jpeg.save(folder / "8a.png", format="JPEG", quality=70)  # test looks like 0a of train
    (folder / "9b.png").write_bytes((folder / "1b.png").read_bytes())
    (folder / "3a.png").write_bytes((folder / "2a.png").read_bytes())  # both train
    Image.new("RGB", (64, 64), "black").save(folder / "2b.png")
    Image.new("RGB", (32, 32), "white").save(folder / "10a.png")  # flat: no near duplicate of black
    found = lint(load_preferences(clean), images=True)
    across = found.facts()["across_splits"]
    assert across == {
        "train and test": {
            "equal_bytes": {"images": 1, "pairs": {"train": 1, "test": 1}, "names": [["1b.png", "9b.png"]]},
            "near_duplicates": {"images": 1, "pairs": {"train": 1, "test": 1}, "names": [["0a.png", "8a.png"]]},
        }
    }
    assert found.errors == ()
    assert found.warnings == (
        "2 images are one colour, in 2 pairs: 2b.png, 10a.png",
        "train and test: 1 train images have the same bytes under another name on the other side, "
        "1 train and 1 test pairs: 1b.png = 9b.png",
        "train and test: 1 train images have a near duplicate (at most 4 of 64 bits differ) on the other side, "
        "1 train and 1 test pairs: 0a.png = 8a.png",
    )


def test_what_two_files_share_is_counted(clean, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    records = judged(4, "other")
    records[0]["prompt"] = "p9"  # a test prompt
    records[1]["image_a"] = "0a.png"  # a name of train, with other bytes
    for i, record in enumerate(records):
        for side in ("image_a", "image_b"):
            picture(100 + 2 * i + (side == "image_b")).save(other / record[side])
    (other / records[2]["image_a"]).write_bytes((clean.parent / "5a.png").read_bytes())
    picture(9).resize((80, 80)).save(other / records[3]["image_b"])  # 4b, seen smaller
    theirs = load_preferences(write(other / "q.jsonl", records))
    ours = load_preferences(clean)
    found = lint(ours, against=theirs).facts()["against"]
    assert found == {
        "file": str(other / "q.jsonl"),
        "prompts": 1,
        "images": 1,
        "pairs_by_prompt": {"test": 1},
        "pairs_by_image": {"train": 1},
    }
    report = lint(ours, against=theirs, images=True)
    seen = report.facts()["against"]
    assert seen["equal_bytes"] == {"images": 1, "pairs": {"validation": 1}, "names": [["5a.png", "other2a.png"]]}
    assert seen["near_duplicates"] == {"images": 1, "pairs": {"validation": 1}, "names": [["4b.png", "other3b.png"]]}
    assert report.facts()["files"]["missing"]["files"] == 0
    assert f"{other}/q.jsonl: shares 1 prompts, 1 test pairs here" in report.warnings
    assert (
        f"{other}/q.jsonl: has the bytes of 1 images here, 1 validation pairs: 5a.png = other2a.png" in report.warnings
    )
    assert len(report.warnings) == 4


hashes = st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=12)


@given(hashes, hashes, st.lists(st.tuples(st.integers(0, 11), st.sets(st.integers(0, 63), max_size=6)), max_size=12))
@settings(max_examples=60)
def test_near_hashes_are_those_of_a_search_through_all(left, right, flips):
    for place, bits in flips:
        if place < len(left):
            right = list(dict.fromkeys([*right, left[place] ^ sum(1 << bit for bit in bits)]))
    found = near_hashes(np.array(left, np.uint64), np.array(right, np.uint64))
    wanted = [
        [i, j] for i, one in enumerate(left) for j, other in enumerate(right) if (one ^ other).bit_count() <= NEAR_BITS
    ]
    assert found.tolist() == wanted


def test_near_hashes_may_differ_anywhere():
    """Four bits that are spread as widely as can be leave no band of 16 bits the same."""
    one = np.array([0x0123456789ABCDEF], np.uint64)
    for bits, wanted in ([(8, 24, 40, 56), 1], [(0, 16, 32, 48), 1], [(3, 14, 27, 40), 1], [(8, 24, 40, 56, 60), 0]):
        other = one ^ np.uint64(sum(1 << bit for bit in bits))
        assert len(near_hashes(one, other)) == wanted


def test_the_threshold_parts_copies_from_other_pictures(tmp_path):
    originals = [picture(seed, 128) for seed in range(20)]
    for quality, side in ((50, 128), (80, 64), (90, 200)):
        for image in originals:
            image.resize((side, side)).save(tmp_path / "copy.jpg", quality=quality)
            assert imagehash.phash(Image.open(tmp_path / "copy.jpg")) - imagehash.phash(image) <= NEAR_BITS
    between = [imagehash.phash(a) - imagehash.phash(b) for i, a in enumerate(originals) for b in originals[:i]]
    assert min(between) > 2 * NEAR_BITS


def test_from_the_shell(clean):
    done = probekit("lint", clean, "--images")
    assert done.returncode == 0
    assert "0 errors, 0 warnings" in done.stdout
    (clean.parent / "0a.png").unlink()
    assert probekit("lint", clean).returncode == 0
    done = probekit("lint", clean, "--images", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["errors"] == ["1 image files are missing, which costs 1 pairs: 0a.png"]
    # Warnings alone are no failure.
    write(clean, [json.loads(line) for line in clean.read_text().splitlines()][2:6] * 2)
    done = probekit("lint", clean, "--images", "--against", clean)
    assert done.returncode == 0
    assert "warning" in done.stdout
    refused(probekit("lint", clean.parent / "none.jsonl"), 2, "no such file")
    clean.write_text('{"prompt": 1')
    refused(probekit("lint", clean), 1, "line 1: not JSON")
    assert probekit("lint", clean, "--ties", "both").returncode == 2
