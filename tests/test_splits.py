"""Split files: no group is cut, official tests are kept, generators are left out whole, and files are what they say."""

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planted_store import planted_store
from sklearn.linear_model import LogisticRegression
from test_cli import probekit, refused
from test_preferences import write

from probekit.errors import ConfigError, PreferenceError
from probekit.preferences import load_preferences
from probekit.preferences.split_files import make_split, read_split


def split(prefs, **options):
    return make_split(prefs.pairs, prefs=prefs.path, own=prefs.own_splits, **options)


def seen(prefs, name):
    """Prompts and images of a split."""
    here = prefs.pairs[prefs.pairs["split"] == name]
    items = prefs.items.iloc[np.unique(here[["item_a", "item_b"]].to_numpy())]
    return {*("prompt " + items["prompt"]), *("image " + items["path"])}


def splits_are_apart(prefs):
    return not any(
        seen(prefs, one) & seen(prefs, other) for one, other in combinations(["train", "validation", "test"], 2)
    )


pair_lists = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 40), st.integers(0, 40), st.sampled_from(["train", "test"])),
    min_size=1,
    max_size=40,
)


@given(pair_lists, st.booleans(), st.integers(0, 3), st.sampled_from([None, "m0", "m1"]))
@example([(0, 0, 1, "train"), (1, 1, 0, "train")], True, 0, "m0")  # the file names splits, but no test split
@settings(max_examples=25)
def test_no_group_is_cut(tmp_path_factory, drawn, official, seed, generator):
    """Images stand under several prompts: whatever splits are asked for, none shares a prompt or an image."""
    folder = tmp_path_factory.mktemp("prefs")
    records = [
        {"prompt": f"p{p}", "image_a": f"{a}", "image_b": f"{b}x", "label": 1, "model_a": f"m{a % 4}", "model_b": "m9"}
        | ({"split": name} if official else {})
        for p, a, b, name in drawn
    ]
    path = write(folder / "p.jsonl", records)
    prefs = load_preferences(path)
    assert splits_are_apart(prefs)
    options = {"validation": 0.3, "seed": seed, "leave_out_generator": generator}
    if not official and generator is None:
        options["test"] = 0.4
    try:
        made = split(prefs, **options)
    except PreferenceError:  # nothing to train on, or no such generator: an error, never a split that is cut
        return
    made.write(folder / "s.json")
    again = load_preferences(path, split_file=folder / "s.json")
    assert splits_are_apart(again)
    named = [set(ids) for ids in [*made.splits.values(), *made.dropped.values()]]
    assert sum(map(len, named)) == len(set.union(*named)) == len(prefs.pairs)
    counts = again.pairs["split"].value_counts()
    assert {name: len(ids) for name, ids in made.splits.items() if ids} == counts.to_dict()
    lost = len(prefs.pairs) - len(again.pairs)
    assert sum(again.dropped.values()) - sum(prefs.dropped.values()) == lost
    if official and (generator is None or "test" in prefs.own_splits):
        test = prefs.pairs.set_index("pair_id")["split"] == "test"
        assert set(made.splits["test"]) <= set(test.index[test])
        if generator is None:
            assert set(made.splits["test"]) == set(test.index[test])
    if generator is not None:
        shows = (again.pairs[["model_a", "model_b"]] == generator).any(axis=1)
        assert (again.pairs.loc[shows, "split"] == "test").all()
        assert shows[again.pairs["split"] == "test"].all()


def test_features_that_know_the_image_leak_through_folds_that_cut_groups(tmp_path):
    """Labels depend on which image it is and on nothing else; a head of many random features learns images by heart.

    Images recur under many prompts. Where single pairs are drawn for the test, it knows their images; where whole
    groups are, it is at chance.
    """
    rng = np.random.default_rng(0)
    records, worth = [], rng.normal(size=500)
    for prompt in range(1500):
        a, b = 5 * (prompt % 100) + rng.choice(5, 2, replace=False)
        label = float(worth[a] > worth[b])
        records.append({"prompt": f"p{prompt}", "image_a": f"{a}", "image_b": f"{b}", "label": label})
    path = write(tmp_path / "p.jsonl", records)
    prefs = load_preferences(path)
    assert prefs.pairs["group"].nunique() == 100
    features = rng.normal(size=(500, 600))
    shown = prefs.items["image"].astype(int).to_numpy()

    def accuracy(pairs, train, test):
        differences = features[shown[pairs["item_a"]]] - features[shown[pairs["item_b"]]]
        head = LogisticRegression(fit_intercept=False).fit(differences[train], pairs["label"][train])
        return (head.predict(differences[test]) == pairs["label"][test]).mean()

    cut, whole = [], []
    for seed in range(3):
        test = rng.random(len(prefs.pairs)) < 0.3
        cut.append(accuracy(prefs.pairs, ~test, test))
        split(prefs, test=0.3, validation=0.0, seed=seed).write(tmp_path / f"{seed}.json")
        ours = load_preferences(path, split_file=tmp_path / f"{seed}.json").pairs
        whole.append(accuracy(ours, ours["split"] == "train", ours["split"] == "test"))
    assert np.mean(cut) > 0.9
    assert abs(np.mean(whole) - 0.5) < 0.05


def many(count=400, **more):
    return [{"prompt": f"p{i}", "image_a": f"{i}a", "image_b": f"{i}b", "label": 1} | more for i in range(count)]


def test_the_default_split_is_the_one_of_loading(tmp_path):
    for name, records in (
        ("p", many()),
        ("q", many(200, split="train") + [{**r, "split": "test"} for r in many()[200:]]),
    ):
        prefs = load_preferences(write(tmp_path / f"{name}.jsonl", records))
        made = split(prefs)
        for part in ("train", "validation", "test"):
            assert made.splits[part] == sorted(prefs.pairs.loc[prefs.pairs["split"] == part, "pair_id"])
        other = split(prefs, seed=1)
        assert other.sha256 != made.sha256
        assert other.splits["validation"] != made.splits["validation"]
        assert (other.splits["test"] == made.splits["test"]) == (name == "q")


def test_shares_are_those_asked_for(tmp_path):
    prefs = load_preferences(write(tmp_path / "p.jsonl", many(3000)))
    made = split(prefs, test=0.5, validation=0.1)
    assert abs(len(made.splits["test"]) / 3000 - 0.5) < 0.03
    assert abs(len(made.splits["validation"]) / 3000 - 0.1) < 0.02
    # A file that calls all of its pairs train has no official test: one is made where it is asked for.
    prefs = load_preferences(write(tmp_path / "q.jsonl", many(3000, split="train")))
    assert split(prefs).splits["test"] == []
    assert abs(len(split(prefs, test=0.5).splits["test"]) / 3000 - 0.5) < 0.03


def generated():
    """Three generators; the prompt ``both`` has a pair with and a pair without X."""
    rows = [("only", "1", "2", "X", "Y"), ("both", "3", "4", "Y", "X"), ("both", "5", "6", "Y", "Z")]
    rows += [(f"p{i}", f"{i}a", f"{i}b", "Y", "Z") for i in range(40)]
    return [{"prompt": p, "image_a": a, "image_b": b, "label": 1, "model_a": m, "model_b": n} for p, a, b, m, n in rows]


def test_a_generator_is_left_out_with_all_that_touches_it(tmp_path):
    prefs = load_preferences(write(tmp_path / "p.jsonl", generated()))
    ids = prefs.pairs["pair_id"].tolist()
    made = split(prefs, leave_out_generator="X")
    assert made.splits["test"] == sorted(ids[:2])
    assert made.dropped == {"connected_to_the_left_out_generator": [ids[2]]}
    assert len(made.splits["train"]) + len(made.splits["validation"]) == 40
    # With an official test split, only its pairs of the generator are test; it is trained on nowhere.
    names = ["test", "train", "train"] + ["train"] * 39 + ["test"]
    official = [record | {"split": name} for record, name in zip(generated(), names, strict=True)]
    made = split(load_preferences(write(tmp_path / "q.jsonl", official)), leave_out_generator="X")
    assert made.splits["test"] == [ids[0]]
    assert made.dropped == {"left_out_generator_outside_test": [ids[1]], "test_without_the_generator": [ids[-1]]}
    assert ids[2] in made.splits["train"] + made.splits["validation"]


def test_a_longer_file_is_counted_and_not_guessed(tmp_path, caplog):
    prefs = load_preferences(write(tmp_path / "p.jsonl", many()))
    split(prefs).write(tmp_path / "s.json")
    longer = write(tmp_path / "longer.jsonl", [*many()[5:], *({**r, "prompt": "new " + r["prompt"]} for r in many(3))])
    again = load_preferences(longer, split_file=tmp_path / "s.json")
    assert again.dropped == {"not_in_split_file": 3}
    assert f"{tmp_path}/s.json: 5 of its pairs are not in the preference file" in caplog.messages
    assert set(again.pairs["split_file"]) == {split(prefs).sha256}
    assert set(prefs.pairs["split_file"]) == {""}


def edited(change):
    def edit(text):
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return edit


def move(content):
    content["splits"]["train"].append(content["splits"]["test"].pop())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited(move), "was edited or damaged: its content has the hash"),
        (edited(lambda content: content.pop("sha256")), "was edited or damaged.*not None"),
        (lambda text: text[:1000], "not JSON"),
        (lambda text: "[]", "no key 'probekit_split'; allowed: a split file"),
        (edited(lambda content: content.update(probekit_split=2)), "key 'probekit_split': Input should be 1"),
        (edited(lambda content: content["splits"].update(holdout=[])), r"key 'splits.holdout"),
        (edited(lambda content: content["splits"]["train"].append(1)), "should be a valid string"),
    ],
)
def test_a_damaged_split_file_is_refused(tmp_path, edit, message):
    path, file = write(tmp_path / "p.jsonl", many()), tmp_path / "s.json"
    split(load_preferences(path)).write(file)
    file.write_text(edit(file.read_text()))
    with pytest.raises(PreferenceError, match=message) as info:
        load_preferences(path, split_file=file)
    assert str(info.value).startswith(f"{file}: ")
    assert "\n" not in str(info.value)


def test_split_files_that_do_not_fit_are_refused(tmp_path):
    path, file = write(tmp_path / "p.jsonl", many()), tmp_path / "s.json"
    made = split(load_preferences(path))
    made.write(file)

    def fails(records, message):
        with pytest.raises(PreferenceError, match=message) as info:
            load_preferences(write(tmp_path / "other.jsonl", records), split_file=file)
        assert "\n" not in str(info.value)

    fails([{**record, "prompt": "x" + record["prompt"]} for record in many()], "names none of the 400 pairs")
    fails([{**record, "group": "one"} for record in many()], "group '.*' is in 3 splits, so the test would leak")
    official = [{**record, "split": "test" if i % 2 else "train"} for i, record in enumerate(many())]
    fails(official, "pairs contradict the preference file's own test split, such as .*there test, here train")
    twice = made.model_copy(update={"dropped": {"twice": made.splits["train"][:1]}})
    with pytest.raises(ConfigError, match="holds another split, which runs may name; allowed: a new file"):
        twice.write(file)
    file.unlink()
    twice.write(file)
    with pytest.raises(PreferenceError, match="stands twice"):
        read_split(file)
    with pytest.raises(PreferenceError, match=r"cannot be read .No such file"):
        load_preferences(path, split_file=tmp_path / "none.json")


def test_what_cannot_be_split_is_refused(tmp_path):
    official = load_preferences(
        write(tmp_path / "p.jsonl", [*many(20, split="train"), many(21)[20] | {"split": "test"}])
    )
    with pytest.raises(PreferenceError, match="has its own test split, which is kept; allowed: no --test"):
        split(official, test=0.2)
    with pytest.raises(PreferenceError, match="no pair has the generator 'X'; allowed: none are named"):
        split(official, leave_out_generator="X")
    named = load_preferences(write(tmp_path / "q.jsonl", generated()))
    with pytest.raises(PreferenceError, match="no pair has the generator 'x'; allowed: X, Y, Z"):
        split(named, leave_out_generator="x")
    with pytest.raises(PreferenceError, match="--test and --leave-out-generator"):
        split(named, leave_out_generator="X", test=0.1)
    with pytest.raises(PreferenceError, match="no training pair is left of 43 pairs in 42 groups"):
        split(named, leave_out_generator="Y")


def test_from_the_shell(tmp_path):
    path, file = write(tmp_path / "p.jsonl", generated()), tmp_path / "splits" / "s.json"
    done = probekit("split", path, "--out", file, "--leave-out-generator", "X")
    assert done.returncode == 0, done.stderr
    assert "2 test, 1 left out (connected to the left out generator); sha256" in " ".join(done.stdout.split())
    before = file.read_bytes()
    assert probekit("split", path, "--out", file, "--leave-out-generator", "X").returncode == 0
    assert file.read_bytes() == before  # the same each time
    refused(probekit("split", path, "--out", file, "--leave-out-generator", "W"), 1, "p.jsonl", "'W'", "X, Y, Z")
    shown = json.loads(probekit("lint", path, "--split-file", file, "--json").stdout)
    assert shown["split_file"] == read_split(file).sha256
    assert shown["left_out"] == {"connected_to_the_left_out_generator": 1}


def test_a_sweep_says_by_which_file_it_was_split(tmp_path):
    store = planted_store(tmp_path / "store", signal={2: 1.0}, seed=0)
    path = tmp_path / "sweep.yaml"
    path.write_text("heads: [{kind: linear, layer_sets: [singles]}]\nresamples: 200\n")
    command = ["sweep", path, "--store", store, "--out", tmp_path / "run"]
    refused(probekit(*command, "--split-file", path), 2, "--split-file", "allowed: with --prefs")
    assert probekit(*command).returncode == 0
    found = json.loads(probekit("inspect", tmp_path / "run", "--json").stdout)["splits"]
    assert set(found.values()) == {"by the preference file or by hash"}
