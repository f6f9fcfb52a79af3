"""Names, ties and refusals of flatten."""

from __future__ import annotations

import collections
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import shardckpt
from shardckpt import PerRank, errors
from shardckpt.plan.local_plan import local_plan
from shardckpt.state.flatten import Ties, flatten


def test_the_worked_example():
    w = torch.ones(2)
    flat = flatten({"model": {"w": w, "tied": w}, "step": 7}, rank=0)
    assert flat.tensors == {"model.w": w}
    ref = {"$tensor": "model.w"}
    assert flat.tree == {"model": {"w": ref, "tied": ref}, "step": 7}


def test_values_per_rank_stand_apart():
    state = {"all": torch.ones(1), "mine": PerRank({"t": torch.ones(2), "n": 3})}
    flat = flatten(state, rank=5)
    assert list(flat.tensors) == ["all"]
    assert list(flat.rank_only) == ["mine.t@rank5"]
    assert flat.tree["mine"] == {"$per_rank": "0"}
    assert flat.per_rank_trees == [{"t": {"$tensor": "mine.t@rank5"}, "n": 3}]
    with pytest.raises(errors.StateError):
        flatten({"a": PerRank([PerRank(1)])}, rank=0)


def test_what_ties_tensors():
    base = torch.zeros(4, 4)
    ties = Ties()
    assert ties.first(base[1], "first") == "first"
    assert ties.first(base[1], "again") == "first"
    complex_base = torch.ones(2, dtype=torch.complex64)
    others = [base[2], base[1].view(2, 2), base[1].view(torch.int32), base[1].clone(), base]
    others += [torch.empty(0), torch.empty(0), complex_base, complex_base.conj()]
    for index, other in enumerate(others):
        assert ties.first(other, str(index)) == str(index)


@pytest.mark.parametrize("item", [torch.ones(1), 1, {"a": 1}])
def test_an_empty_key_is_no_name(item):
    with pytest.raises(errors.StateError, match="no name"):
        flatten({"": item}, rank=0)
    assert flatten({"a": {"": item}}, rank=0).tree["a"].keys() == {""}


AMBIGUOUS = {
    "tensors": ({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}, "a.b"),
    "values": ({"a": {"b": 1}, "a.b": 2}, "a.b"),
    "dicts": ({"a": {"b": {"x": 1}}, "a.b": {"y": 2}}, "a.b"),
    "an int and a text": ({"d": {1: "x", "1": "y"}}, "d.1"),
    "a place in a list": ({"l": [1, 2], "l.0": 3}, "l.0"),
    "a rank's own tensor": ({"m": PerRank(torch.ones(1)), "m@rank0": torch.ones(2)}, "m@rank0"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_names_that_two_entries_would_share(name):
    state, taken = AMBIGUOUS[name]
    with pytest.raises(errors.StateError, match="same name") as caught:
        flatten(state, rank=0)
    assert caught.value.tensor == taken


@pytest.mark.parametrize("state", [{"": torch.ones(1)}, {"": {"x": 1}}, {"\ud800": torch.ones(1)}])
def test_keys_that_make_no_name(state):
    with pytest.raises(errors.StateError):
        flatten(state, rank=0)


def a_fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


REFUSED = {
    "sparse": lambda: torch.eye(2).to_sparse(),
    "compressed": lambda: torch.eye(2).to_sparse_csr(),
    "mkldnn": lambda: torch.eye(2).to_mkldnn(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "without memory": a_fake,  # asked for its address, it would end the process
    "meta": lambda: torch.ones(2, device="meta"),
    "masked": lambda: np.ma.array([1, 2], mask=[0, 1]),
    "of objects": lambda: np.array([None]),
    "of records": lambda: np.zeros(1, dtype=[("a", "i4")]),
    "of long doubles": lambda: np.zeros(1, dtype=np.longdouble),
    "a function": lambda: len,
    "a class": lambda: nn.Linear,
    "a tensor in a set": lambda: {torch.ones(1)},
}


@pytest.mark.filterwarnings("ignore")  # torch warns of what it calls prototypes
@pytest.mark.parametrize("name", REFUSED)
def test_leaves_that_no_checkpoint_can_hold(name):
    with pytest.raises(errors.UnsupportedLeafError) as caught:
        local_plan(flatten({"a": {"b": REFUSED[name]()}}, rank=0), world_size=1)
    assert caught.value.tensor.startswith("a.b")
    assert caught.value.remedy


@pytest.mark.filterwarnings("ignore")
def test_a_lazy_module():
    with pytest.raises(errors.UnsupportedLeafError, match="lazy") as caught:
        flatten({"m": nn.LazyLinear(3)}, rank=0)
    assert caught.value.tensor == "m.weight"


@pytest.mark.parametrize("kind", [lambda a: {"k": a}, lambda a: [a], lambda a: (a,)])
def test_nesting_has_a_limit(kind):
    def nested(depth):
        return {"x": functools.reduce(lambda a, _: kind(a), range(depth), 1)}

    flatten(nested(98), rank=0)
    with pytest.raises(errors.UnsupportedLeafError, match="deeply"):
        flatten(nested(102), rank=0)


def test_sets_in_sets_have_one_too():
    state = {"x": functools.reduce(lambda a, _: frozenset([a]), range(5000), 1)}
    with pytest.raises(errors.UnsupportedLeafError, match="deeply"):
        flatten(state, rank=0)


def test_containers_by_their_kind():
    state = {
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(int, x=1),
        "counter": collections.Counter("aab"),
    }
    tree = flatten(state, rank=0).tree
    assert list(tree["ordered"]) == ["b", "a"]
    assert tree["default"] == {"x": 1}
    assert tree["counter"] == {"$counter": [["a", 2], ["b", 1]]}


@pytest.mark.filterwarnings("ignore")
def test_saves_in_the_background_take_and_refuse_the_same(tmp_path):
    counts = collections.Counter("aab")
    last = collections.deque([1, 2], 2)
    handle = shardckpt.async_save({"c": counts, "d": last}, tmp_path / "c")
    counts["a"], last[0] = 9, 9
    handle.result(60)
    state = shardckpt.load_state(tmp_path / "c")
    assert state["c"] == collections.Counter("aab")
    assert state["d"] == collections.deque([1, 2], 2)
    for name in ("without memory", "nested", "sparse"):
        with pytest.raises(errors.UnsupportedLeafError):
            shardckpt.async_save({"t": REFUSED[name]()}, tmp_path / "d").result(60)


def test_lazy_buffers_are_refused_like_lazy_parameters():
    with pytest.raises(errors.UnsupportedLeafError, match="2 entries") as caught:
        flatten({"m": nn.LazyBatchNorm1d(affine=False)}, rank=0)
    assert caught.value.tensor == "m.running_mean"
