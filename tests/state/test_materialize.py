"""Saved values without a template."""

from __future__ import annotations

import types
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from shardckpt.errors import CheckpointError
from shardckpt.format.typed_json import UnknownEnum
from shardckpt.state.markers import PerRank
from shardckpt.state.materialize import Builder
from tests.state.saved import Saved


def built(saved, **options):
    reads = []
    builder = Builder(saved.tree, reads, **options)
    value = builder.build(saved.tree.tree, "")
    saved.read(reads)
    return value, builder


@dataclass
class Settings:
    rate: float


def test_values_and_containers_come_back_with_their_types():
    state = {
        1: [1, (2, "x"), deque([3], maxlen=4)],
        "c": Counter("aab"),
        "s": {4, 5},
        "e": [{}, (), None],
        "settings": Settings(0.5),
    }
    value, _ = built(Saved(state))
    assert value["settings"] == types.SimpleNamespace(rate=0.5)
    del value["settings"], state["settings"]
    assert value == state
    assert type(value["c"]) is Counter
    assert value[1][2].maxlen == 4


def test_tensors_and_arrays_are_filled_and_tied_ones_are_one_object():
    w = torch.arange(3.0)
    value, builder = built(Saved({"a": w, "b": {"c": w}, "n": np.arange(2)}))
    assert value["a"].tolist() == [0, 1, 2]
    assert value["b"]["c"] is value["a"]
    assert isinstance(value["n"], np.ndarray)
    assert value["n"].tolist() == [0, 1]
    assert builder.built == ["a", "b.c", "n"]


def test_the_caller_may_change_what_was_built():
    saved = Saved({"s": {1}, "b": bytearray(b"x"), "e": []})
    first, _ = built(saved)
    first["s"].add(2)
    first["b"] += b"y"
    first["e"].append(3)
    assert built(saved)[0] == {"s": {1}, "b": bytearray(b"x"), "e": []}


@pytest.mark.parametrize(
    ("like", "is_used"),
    [
        (torch.zeros(3), True),
        (torch.zeros(6)[::2], True),
        (torch.zeros(4), False),
        (torch.zeros(3, dtype=torch.float64), False),
        (torch.zeros(3, device="meta"), False),
    ],
)
def test_a_tensor_of_the_caller_is_filled_only_if_it_fits(like, is_used):
    value, _ = built(Saved({"a": torch.arange(3.0)}), like={"a": like})
    assert (value["a"] is like) == is_used
    assert value["a"].tolist() == [0, 1, 2]


def test_one_memory_is_not_filled_with_two_tensors():
    memory = torch.zeros(2)
    state = {"a": torch.ones(2), "b": torch.full((2,), 2.0)}
    value, _ = built(Saved(state), like={"a": memory, "b": memory})
    assert value["a"].tolist() == [1, 1]
    assert value["b"].tolist() == [2, 2]


def test_a_function_may_make_tensors_that_no_read_fills():
    made = []

    def new(name, source, entry):
        made.append((name, source, entry.shape))
        return torch.full(entry.shape, 9.0), False

    value, _ = built(Saved({"a": torch.zeros(2)}), new=new)
    assert value["a"].tolist() == [9, 9]
    assert made == [("a", "a", (2,))]


def test_values_of_ranks_become_a_list(tmp_path):
    value, _ = built(Saved({"r": PerRank({"seed": 3})}, tmp_path / "c"))
    assert value == {"r": [{"seed": 3}]}


def test_an_enum_that_the_program_lacks_is_an_error_of_its_entry():
    saved = Saved({"a": 1, "c": OrderedDict(x=1)})
    saved.tree.tree["c"] = UnknownEnum("some", "Colour", "RED")
    with pytest.raises(CheckpointError) as caught:
        built(saved)
    assert caught.value.tensor == "c"
