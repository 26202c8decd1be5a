"""Differences of pairs and reading ahead: the plain formula, bounded memory, one thread, any kind of worker."""

import multiprocessing
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import dump, table

from probekit.errors import StoreError
from probekit.store import FeatureStore, differences, half, shards

LAYERS = [{"layer": layer} for layer in (0, 1, 2)]


def spoil(part, features):
    """Layer 1 overflows float16, layer 2 is not finite in one row of each block."""
    features["mean", 1] += 40_000
    features["mean", 2][1, 2] = np.nan


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    """Rows were added between two noise levels, so that the blocks of the second lie across those of the first."""
    path = tmp_path_factory.mktemp("reading") / "s"
    dump(path, table(5), sigma="0.1", size=6, change=spoil)
    dump(path, table(9), sigma="0.005", size=4, change=spoil)
    dump(path, table(9), sigma="0.1", size=6, change=spoil)
    store = FeatureStore(path)
    assert len(store.rows) == 27
    assert {type(place) for place in store._index[1].values()} == {slice, np.ndarray}
    assert 0 < (store.rows["status"] != 0).sum() < 27
    return store


@pytest.fixture(scope="module", autouse=True)
def _small_pieces():
    """So that a shard is more than one piece."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(differences, "_PIECE_BYTES", 50)
        yield


@given(st.lists(st.tuples(st.integers(0, 26), st.integers(0, 26)), max_size=60), st.sampled_from(LAYERS), st.booleans())
@settings(max_examples=60)
def test_differences_are_first_minus_second(store, pairs, layer, near):
    sigma = "0.005" if near else "0.1"
    rows = np.array(pairs, np.int64).reshape(-1, 2)
    whole = store.read(**layer, sigma=sigma)
    found = store.differences(**layer, sigma=sigma, pairs=rows)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, whole[rows[:, 0]] - whole[rows[:, 1]])


def test_differences_of_a_bad_row_are_nan(store):
    bad = np.flatnonzero(store.rows["status"] != 0)[0]
    good = np.flatnonzero(store.rows["status"] == 0)[0]
    found = store.differences(layer=0, sigma="0.1", pairs=np.array([[bad, good], [good, bad], [good, good]]))
    assert np.isnan(found[:2]).all()
    assert (found[2] == 0).all()


def test_differences_take_pairs_and_refuse_rows_that_are_not_there(store):
    with pytest.raises(StoreError, match="pairs name row 27; allowed: 0 to 26"):
        store.differences(layer=0, sigma="0.1", pairs=np.array([[0, 27]]))
    with pytest.raises(StoreError, match="pairs name row -1; allowed"):
        store.differences(layer=0, sigma="0.1", pairs=np.array([[-1, 0]]))


def test_neither_side_is_held_whole(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(differences, "_PIECE_BYTES", 2**16)
    width = 3000

    def wide(part, features):
        for layer in range(3):
            features["mean", layer] = np.full((len(part), width), layer, np.float32)

    dump(tmp_path / "s", table(200), size=1000, change=wide)
    store = FeatureStore(tmp_path / "s")
    pairs = np.stack([np.arange(0, 600, 2), np.arange(1, 600, 2)], axis=1)
    store.differences(layer=1, pairs=pairs[:1])  # what is loaded once
    tracemalloc.start()
    found = store.differences(layer=1, pairs=pairs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.nbytes == 300 * width * 4
    assert peak < 1.3 * found.nbytes  # a side is as large as the result


def test_a_layer_of_several_chunks_is_what_was_written(tmp_path):
    width = 4097
    whole = np.random.default_rng(0).integers(-2048, 2048, (600, width)).astype(np.float32) / 8  # float16 holds these

    def wide(part, features):
        at = part["row_id"].map(lambda key: int(key[:8], 16) % len(whole)).to_numpy()
        for layer in range(3):
            features["mean", layer] = whole[at] + (layer == 1) * np.float32(40_000)

    dump(tmp_path / "s", table(100), size=190, change=wide)
    store = FeatureStore(tmp_path / "s")
    assert {"float16", "float32"} == set(store.summary()["datasets"])
    assert 2 * 190 * width > shards.CHUNK_BYTES
    at = store.rows["row_id"].map(lambda key: int(key[:8], 16) % len(whole)).to_numpy()
    np.testing.assert_array_equal(store.read(layer=0), whole[at])
    np.testing.assert_array_equal(store.read(layer=1), whole[at] + np.float32(40_000))


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("probekit-read")]


def test_each_setting_is_read_in_order_by_one_thread(store):
    asked = [{**layer, "sigma": sigma} for sigma in store.sigmas for layer in LAYERS]
    found = []
    for setting, values in store.read_each(iter(asked)):
        found.append(setting)
        np.testing.assert_array_equal(values, store.read(**setting))
        assert len(reading_threads()) == 1
    assert found == asked
    assert not reading_threads()
    pairs = np.array([[0, 1], [5, 3]])
    for setting, values in store.read_each(asked, pairs=pairs):
        np.testing.assert_array_equal(values, store.differences(**setting, pairs=pairs))
    assert not list(store.read_each([]))


def test_only_the_next_setting_is_read_ahead(store, monkeypatch):
    begun, read = [], FeatureStore.read

    def noted(self, **setting):
        begun.append(setting)
        return read(self, **setting)

    monkeypatch.setattr(FeatureStore, "read", noted)
    asked = [{"layer": 0, "sigma": "0.1"}] * 6
    for step, _ in enumerate(store.read_each(asked), start=1):
        assert len(begun) <= step + 1


def test_an_error_is_raised_at_its_setting(store):
    steps = store.read_each([{"layer": 0, "sigma": "0.1"}, {"layer": 7, "sigma": "0.1"}, {"layer": 1, "sigma": "0.1"}])
    assert next(steps)[0] == {"layer": 0, "sigma": "0.1"}
    with pytest.raises(StoreError, match="layer 7 is not in the store"):
        next(steps)
    assert not reading_threads()


def test_leaving_early_ends_the_thread(store):
    for _ in store.read_each([{**layer, "sigma": "0.1"} for layer in LAYERS]):
        break
    assert not reading_threads()
    steps = store.read_each([{**layer, "sigma": "0.1"} for layer in LAYERS])
    next(steps)
    del steps
    assert not reading_threads()


def sums(store: FeatureStore, layer: int) -> tuple[float, float, int]:
    """Run in a worker: a layer, differences, the iterator's, and more values than torch converts without threads."""
    half.convert(np.ones(2**17, np.float16), np.empty(2**17, np.float32))
    pairs = np.array([[0, 1], [5, 3]])
    each = [values for _, values in store.read_each([{"layer": layer, "sigma": "0.1"}] * 2, pairs=pairs)]
    read = store.read(layer=layer, sigma="0.1")
    return float(np.nansum(read)), float(np.nansum(each[1])), len(each)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_any_kind_read(store, method):
    here = [sums(store, layer) for layer in range(3)]  # the parent has read, and converted, before it forks
    with multiprocessing.get_context(method).Pool(2) as pool:
        there = pool.starmap_async(sums, [(store, layer) for layer in range(3)]).get(timeout=120)
    assert there == here


def test_conversion_is_that_of_numpy():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    found = np.empty(2**16, np.float32)
    half.convert(every, found)
    np.testing.assert_array_equal(found, every.astype(np.float32))
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([bits[np.abs(bits) < 65504], found[np.isfinite(found)], np.float32([2**-25, -0.0])])
    values.flags.writeable = False
    rounded = np.empty(len(values), np.float16)
    half.convert(values, rounded)
    np.testing.assert_array_equal(rounded.view(np.uint16), values.astype(np.float16).view(np.uint16))
