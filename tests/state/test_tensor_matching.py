"""Tensors and arrays of a state are filled in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import errors
from shardckpt.state.sharded_array import ShardedArray
from shardckpt.state.tensor_matching import (
    match_array,
    match_generator,
    match_sharded_array,
    match_tensor,
)
from tests.state.saved import Saved


@pytest.mark.filterwarnings("ignore")
def test_targets_that_cannot_be_filled(tmp_path):
    shardckpt.save({"t": torch.ones(4)}, tmp_path / "c")
    with pytest.raises(errors.StateError, match="share memory"):
        shardckpt.load({"t": torch.zeros(1).expand(4)}, tmp_path / "c")
    shardckpt.save({"none": torch.empty(0, 2)}, tmp_path / "none")
    shardckpt.load({"none": torch.empty(1, 1).expand(1, 2)[:0]}, tmp_path / "none")
    for target in (torch.zeros(4).to_sparse(), nn.LazyLinear(2).weight):
        with pytest.raises(errors.UnsupportedLeafError):
            shardckpt.load({"t": target}, tmp_path / "c")


VIEWS = {
    "as it is": lambda: torch.zeros(4),
    "every other element": lambda: torch.zeros(8)[::2],
    "negative": lambda: torch.zeros(4, dtype=torch.complex64).conj().imag,
    "of a matrix": lambda: torch.zeros(4, 3)[:, 1],
    "a parameter": lambda: nn.Parameter(torch.zeros(4)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_filled_in_place(tmp_path, view):
    values = torch.arange(1.0, 5)
    shardckpt.save({"t": values}, tmp_path / "c")
    target = VIEWS[view]()
    shardckpt.load({"t": target}, tmp_path / "c")
    assert target.tolist() == values.tolist()


def test_a_conjugate_view_is_filled_in_place(tmp_path):
    values = torch.complex(torch.arange(1.0, 4), torch.ones(3))
    shardckpt.save({"t": values}, tmp_path / "c")
    below = torch.zeros(3, dtype=torch.complex64)
    shardckpt.load({"t": below.conj()}, tmp_path / "c")
    assert below.tolist() == values.conj().resolve_conj().tolist()


def test_views_without_elements_may_begin_at_the_same_place(tmp_path):
    shardckpt.save({"a": torch.empty(0), "b": torch.empty(0)}, tmp_path / "c")
    memory = torch.zeros(4)
    shardckpt.load({"a": memory[:0], "b": memory[:0]}, tmp_path / "c")


def test_views_of_the_same_memory_are_not_filled_with_two_tensors(tmp_path):
    shardckpt.save({"a": torch.ones(2), "b": torch.zeros(2)}, tmp_path / "c")
    memory = torch.zeros(4)
    with pytest.raises(errors.StateError, match="same memory"):
        shardckpt.load({"a": memory[1:3], "b": memory[1:3]}, tmp_path / "c")


def test_tensors_made_in_inference_mode_are_filled(tmp_path):
    shardckpt.save({"a": torch.ones(4, 4), "b": torch.ones(4, 4).t()}, tmp_path / "c")
    with torch.inference_mode():
        state = {"a": torch.zeros(4, 4).t(), "b": torch.zeros(4, 4)}
    shardckpt.load(state, tmp_path / "c")
    assert all(tensor.eq(1).all() for tensor in state.values())


def test_a_tensor_on_meta_is_replaced_and_filled():
    saved = Saved({"w": torch.arange(4.0)})
    context = saved.context()
    template = torch.empty(4, device="meta")
    made = match_tensor(context, template, "w")
    assert made is not template
    saved.read(context.reads)
    assert made.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("template", "field", "entry"),
    [
        (torch.zeros(3), "wrong_shape", ("w", [3], [4])),
        (torch.zeros(4, dtype=torch.int8), "wrong_dtype", ("w", "torch.int8", "torch.float32")),
    ],
)
def test_a_tensor_that_does_not_fit_is_noted_and_not_filled(template, field, entry):
    context = Saved({"w": torch.arange(4.0)}).context()
    assert match_tensor(context, template, "w") is template
    assert getattr(context.mismatches, field) == [entry]
    assert context.reads == []
    match_tensor(context, template, "absent")
    context.note_missing_and_unused()
    assert context.mismatches.missing == ["absent"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.zeros(4, dtype="f4"),
        lambda: np.zeros(4, dtype=">f4"),
        lambda: np.zeros(8, dtype="f4")[::2],
        lambda: np.zeros(4, dtype="f4")[::-1],
    ],
    ids=["plain", "another byte order", "strided", "reversed"],
)
def test_an_array_of_any_layout_is_filled_in_place(make):
    saved = Saved({"a": np.arange(4, dtype="f4")})
    array, context = make(), saved.context()
    finish = match_array(context, array, "a")
    saved.read(context.reads)
    assert finish() is array
    assert array.tolist() == [0, 1, 2, 3]


def test_a_generator_is_set_to_its_saved_state():
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    saved = Saved({"g": generator})
    expected = torch.rand(4, generator=generator)
    other, context = torch.Generator(), saved.context()
    finish = match_generator(context, other, "g")
    saved.read(context.reads)
    assert finish() is other
    assert torch.equal(torch.rand(4, generator=other), expected)


def test_a_part_of_an_array_is_filled_from_its_offsets():
    saved = Saved({"a": np.arange(12.0).reshape(4, 3)})
    part = ShardedArray(np.zeros((2, 3)), global_shape=(4, 3), offsets=(1, 0))
    context = saved.context()
    finish = match_sharded_array(context, part, "a")
    saved.read(context.reads)
    assert finish() is part
    assert part.local.tolist() == [[3, 4, 5], [6, 7, 8]]
    read_only = ShardedArray(np.zeros((2, 3)), global_shape=(4, 3), offsets=(1, 0))
    read_only.local.flags.writeable = False
    with pytest.raises(errors.StateError, match="can't be written to"):
        match_sharded_array(saved.context(), read_only, "a")
