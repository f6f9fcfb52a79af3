"""Leaves other than tensors keep their values in every kind of save and load."""

from __future__ import annotations

import collections
import dataclasses
import decimal
import enum
import sys
import types

import numpy as np
import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.convert.convert import convert
from shardckpt.format import typed_json as values
from tests.state_kinds.leaves import Frozen, Pair, Progress


def test_leaves_can_be_converted(tmp_path):
    state = {
        "p": Progress(4),
        "g": torch.Generator().manual_seed(5),
        "d": collections.deque([1], 2),
    }
    shardckpt.save({**state, "other": 1}, tmp_path / "c")
    convert(str(tmp_path / "c"), str(tmp_path / "again"), keys=list(state))
    again = shardckpt.load_state(tmp_path / "again")
    assert again["p"].epoch == 4
    assert again["d"] == state["d"]
    assert torch.equal(again["g"], torch.Generator().manual_seed(5).get_state())


def test_an_object_is_filled_in_place_and_a_frozen_one_is_replaced(tmp_path):
    shardckpt.save({"p": Progress(7, torch.ones(2)), "f": Frozen(0.1)}, tmp_path / "c")
    tensor, progress, frozen = torch.zeros(2), Progress(), Frozen()
    progress.seen = tensor
    state = {"p": progress, "f": frozen}
    shardckpt.load(state, tmp_path / "c")
    assert state["p"] is progress
    assert progress.seen is tensor
    assert (progress.epoch, tensor.tolist()) == (7, [1, 1])
    assert (state["f"], frozen) == (Frozen(0.1), Frozen())


def test_an_enum_that_the_program_does_not_have_hinders_its_own_entry_alone(tmp_path, monkeypatch):
    module = types.ModuleType("gone")
    module.Mode = enum.Enum("Mode", "A", module="gone")
    monkeypatch.setitem(sys.modules, "gone", module)
    member = module.Mode.A
    state = {"w": torch.ones(2), "e": member, "s": {member}, "t": ((member,),), "k": {member: 1}}
    shardckpt.save(state, tmp_path / "c")
    monkeypatch.delitem(sys.modules, "gone")
    target = {"w": torch.zeros(2)}
    shardckpt.load(target, tmp_path / "c")
    assert target["w"].tolist() == [1, 1]
    for key, name in {"e": "e", "s": "s", "t": "t.0.0", "k": "k"}.items():
        with pytest.raises(errors.CheckpointError, match="import gone first") as caught:
            shardckpt.load_state(tmp_path / "c", keys=key)
        assert caught.value.tensor == name
    del module.Mode
    monkeypatch.setitem(sys.modules, "gone", module)  # which has no such enum any more
    with pytest.raises(errors.CheckpointError, match="Mode with the member A"):
        shardckpt.load_state(tmp_path / "c", keys="e")


def test_arrays_are_filled_in_place(tmp_path):
    saved = np.arange(6.0).reshape(2, 3)
    shardckpt.save({"big": saved.astype(">f8"), "turned": saved, "field": saved}, tmp_path / "c")
    record = np.zeros((2, 3), dtype=[("a", "i1"), ("b", "f8")])
    arrays = {"big": np.zeros((2, 3), ">f8"), "turned": np.zeros((2, 3))[:, ::-1]}
    arrays["field"] = record["b"]
    state = dict(arrays)
    shardckpt.load(state, tmp_path / "c")
    for key, array in arrays.items():
        assert state[key] is array
        assert np.array_equal(array, saved)
    assert np.array_equal(record["b"], saved)


def test_fields_that_differ(tmp_path):
    @dataclasses.dataclass
    class Other:
        epoch: int = 0
        more: int = 1

    shardckpt.save({"p": Progress(), "t": Pair(1, 2)}, tmp_path / "c")
    with pytest.raises(errors.LoadMismatchError) as caught:
        shardckpt.load({"p": Other()}, tmp_path / "c")
    assert caught.value.facts["missing"] == ("p.more",)
    three = collections.namedtuple("three", "a b c")(0, 0, 0)
    with pytest.raises(errors.LoadMismatchError, match="shape of t"):
        shardckpt.load({"t": three}, tmp_path / "c")


def test_everything_that_can_t_be_saved_is_named_at_once(tmp_path):
    state = {"a": object(), "b": [torch.zeros(2, device="meta"), {len}], "c": {"d": 1, "e": print}}
    with pytest.raises(errors.UnsupportedLeafError) as caught:
        shardckpt.save(state, tmp_path / "c")
    for name in ("a: builtins.object", "b.0: device meta", "b.1: builtins", "c.e: builtins"):
        assert name in str(caught.value)
    assert "c.d" not in str(caught.value)


@pytest.mark.parametrize("value", [{Frozen()}, {Frozen(): 1}, collections.Counter([Frozen()])])
def test_an_object_that_could_not_come_back_as_a_key(value):
    with pytest.raises(errors.UnsupportedLeafError):
        values.encode(value, at="v")


def test_what_load_state_builds_is_the_caller_s_alone(tmp_path):
    shardckpt.save({"s": {1}, "l": [], "p": Progress()}, tmp_path / "c")
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        first = checkpoint.load_state()
        first["s"].add(2)
        first["l"].append(1)
        second = checkpoint.load_state()
    assert (second["s"], second["l"]) == ({1}, [])


@pytest.mark.parametrize(
    "node",
    [
        {"$datetime": ["x", 0]},
        {"$datetime": ["2024-01-01", 2]},
        {"$timedelta": [1 << 40, 0, 0]},
        {"$timedelta": [0, 0]},
        {"$decimal": "x"},
        {"$fraction": [1, 0]},
        {"$uuid": "x"},
        {"$array": ["|O", [1], ""]},
        {"$array": ["<U1", [-1], "YQAAAA=="]},
        {"$array": ["<U1", [1], ""]},
        {"$numpy_dtype": "O"},
        {"$memory_format": "float32"},
        {"$record": ["x"]},
        {"$record": ["x", [1]]},
        {"$bytesio": 1},
    ],
    ids=str,
)
def test_malformed_nodes_are_refused(node):
    with pytest.raises(errors.CorruptionError):
        values.decode(node, tensor=lambda ref: ref)


def test_a_tag_of_a_newer_version():
    with pytest.raises(errors.FormatVersionError, match="does not support"):
        values.decode({"$tomorrow": 1}, tensor=lambda ref: ref)


def test_a_number_is_not_evaluated():
    assert values.encode(decimal.Decimal("1e999999"), at="") == {"$decimal": "1E+999999"}


@pytest.mark.parametrize(("target", "to"), [("t.pth", "torch"), ("d", "dcp")])
def test_a_value_that_pickle_can_t_take(tmp_path, target, to):
    shardckpt.save({"w": torch.ones(1), "v": torch.channels_last}, tmp_path / "c")
    with pytest.raises(errors.UnsupportedLeafError):
        convert(str(tmp_path / "c"), str(tmp_path / target), to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
