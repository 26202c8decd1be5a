"""Tests of probekit.backbones.batching: how calls of several prompts become one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probekit.backbones.batching import Layout, runs
from probekit.errors import BackboneError, ConfigError


def call(k: int, *, length: int = 5, value: float = 0.0, ids: float = 0.0) -> dict:
    """Return the arguments of k images as a pipeline might: along axes 0 and 1, packed, listed, shared, nested."""
    return {
        "hidden_states": torch.full((k, 4, 3), value),
        "states_of_layers": torch.full((2, k, length, 3), value),
        "packed": torch.full((k * 7, 3), value),
        "img_ids": torch.full((4, 3), ids),
        "shapes": [(1, 2, 2)] * k,
        "nested": {"rope": (torch.full((4, 2), ids), torch.full((k, 2), value)), "scale": 2.0},
        "mask": None,
    }


LAYOUT = Layout.learn(call(1), call(2))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_joined_calls_are_the_call_of_all_images(sizes: list[int]) -> None:
    joined = LAYOUT.join([call(k, value=float(number)) for number, k in enumerate(sizes)])
    assert LAYOUT.n_images(joined) == sum(sizes)
    expected = call(sum(sizes))
    owner = [number for number, k in enumerate(sizes) for _ in range(k)]
    assert joined["hidden_states"][:, 0, 0].tolist() == owner
    assert joined["states_of_layers"][1, :, 0, 0].tolist() == owner
    assert joined["packed"][::7, 0].tolist() == owner
    assert joined["nested"]["rope"][1][:, 0].tolist() == owner
    assert joined["shapes"] == expected["shapes"]
    assert joined["img_ids"].shape == (4, 3)
    assert (joined["mask"], joined["nested"]["scale"]) == (None, 2.0)


def test_only_calls_that_are_alike_are_joined() -> None:
    """The signature tells apart what may not be joined; the number of images is no part of it."""
    assert LAYOUT.signature(call(1)) == LAYOUT.signature(call(3, value=2.0))
    assert LAYOUT.signature(call(1)) != LAYOUT.signature(call(1, length=6))
    other = call(1) | {"shapes": [(1, 4, 1)]}
    assert LAYOUT.signature(call(1)) != LAYOUT.signature(other)


def test_what_cannot_be_joined_is_an_error() -> None:
    with pytest.raises(BackboneError, match="'img_ids' does not grow with the images but differs between prompts"):
        LAYOUT.join([call(1), call(1, ids=1.0)])
    with pytest.raises(BackboneError, match=r"'mask' is a tensor of shape \(3,\) for one image and .* \(4,\) for two"):
        Layout.learn(call(1) | {"mask": torch.zeros(3)}, call(2) | {"mask": torch.zeros(4)})
    with pytest.raises(BackboneError, match="passes a, b for two images and a for one"):
        Layout.learn({"a": 1}, {"a": 1, "b": 2})
    with pytest.raises(BackboneError, match=r"batch sizes \[2, 3\]"):
        LAYOUT.n_images(call(2) | {"hidden_states": torch.zeros(3, 4, 3)})


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([(4, 8, 8), (4, 4, 16)])), max_size=20),
    st.integers(1, 5),
)
def test_a_run_has_one_prompt_and_one_shape(rows: list[tuple[str, tuple[int, ...]]], size: int) -> None:
    found = runs([prompt for prompt, _ in rows], [shape for _, shape in rows], size)
    assert sorted(row for run in found for row in run) == list(range(len(rows)))
    assert all(len({rows[row] for row in run}) == 1 and len(run) <= size for run in found)
    assert len(found) <= sum(-(-rows.count(key) // size) for key in set(rows))


def test_a_batch_size_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch size is 0"):
        runs(["a"], [(4, 8, 8)], 0)
