"""A snapshot keeps the state of the call, whatever happens to the state afterwards."""

from __future__ import annotations

import copy

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shardckpt.state.flatten import flatten
from shardckpt.state.markers import PerRank
from shardckpt.state.snapshot import take_snapshot

SMALL_BYTES = 64

leaves = (
    st.none()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.sets(st.integers(0, 9))
    | st.binary(max_size=3).map(bytearray)
    | st.integers(0, 8).map(lambda n: np.arange(n, dtype="f4"))
    | st.integers(0, 16).map(lambda n: torch.arange(n, dtype=torch.float32))  # all of them small
)
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.integers(0, 5) | st.text("ab", min_size=1, max_size=2), inner, max_size=3
        )
    ),
    max_leaves=12,
)


def facts(state):
    flat = flatten(state, rank=0)
    tensors = {name: tensor.tolist() for name, tensor in (flat.tensors | flat.rank_only).items()}
    return msgspec.json.encode((flat.tree, flat.per_rank_trees)), tensors, flat.file_groups


def spoil(value) -> None:
    """Change all of it in place."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        value *= 0
        value -= 1
    elif isinstance(value, dict):
        for item in value.values():
            spoil(item)
        value["more"] = 1
    elif isinstance(value, (list, tuple)):
        for item in value:
            spoil(item)
        if isinstance(value, list):
            value.append(1)
    elif isinstance(value, set):
        value.add("more")
    elif isinstance(value, bytearray):
        value += b"more"


@settings(max_examples=60, deadline=None)
@given(inner=states)
def test_nothing_that_happens_later_is_seen(inner):
    state = {"a": inner, "own": PerRank(copy.deepcopy(inner))}
    before = facts(state)
    snapshot = take_snapshot(state, small_bytes=SMALL_BYTES)
    spoil(state["a"])
    spoil(state["own"].value)
    assert facts(snapshot.state) == before


def a_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), nn.BatchNorm1d(40), nn.Linear(40, 5))
    model.register_buffer("big", torch.ones(999))
    return model


def test_parameters_and_optimizer_state_are_held_and_buffers_copied():
    model = a_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    state = {"m": model, "o": optimizer, "large": torch.ones(99), "small": torch.ones(3)}
    before = facts(state)
    snapshot = take_snapshot(state, small_bytes=SMALL_BYTES)
    flat = flatten(snapshot.state, rank=0)
    held = {name for name, tensor in flat.tensors.items() if id(tensor) in snapshot.held}
    parameters = {f"m.{name}" for name, _ in model.named_parameters()}
    assert held == parameters | {"large"} | {name for name in flat.tensors if "o.state" in name}
    model(torch.randn(4, 5))
    model.big.zero_()
    optimizer.param_groups[0]["lr"] = 7
    assert facts(snapshot.state) == before
    assert snapshot.changed(flat) is None
    optimizer.step()
    assert snapshot.changed(flat) is not None


def test_small_tensors_that_are_tied_to_state_of_an_optimizer_stay_tied():
    model = a_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    own = optimizer.state[model[0].bias]
    state = {"first": own["exp_avg"], "m": model, "o": optimizer, "later": [own["step"]]}
    flat = flatten(take_snapshot(state, small_bytes=1 << 16).state, rank=0)
    assert list(flat.tensors) == list(flatten(state, rank=0).tensors)


@pytest.mark.parametrize("name", ["m.0.weight", "large", "o.state.0.weight.exp_avg"])
def test_each_change_is_seen(name):
    model = a_model()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    state = {"m": model, "o": optimizer, "large": torch.ones(99)}
    snapshot = take_snapshot(state, small_bytes=SMALL_BYTES)
    flat = flatten(snapshot.state, rank=0)
    live = flatten(state, rank=0).tensors[name]
    live.add_(0)
    assert snapshot.changed(flat) == name


def test_inference_tensors_are_copied():
    with torch.inference_mode():
        tensor = torch.ones(99)
        state = {"t": tensor, "m": nn.Linear(9, 9)}
        before = facts(state)
        snapshot = take_snapshot(state, small_bytes=0)
        tensor.zero_()
        state["m"].weight.zero_()
    assert facts(snapshot.state) == before


class Counting:
    """Its state_dict makes new objects, which nothing else refers to."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self):
        return {
            "tensors": [torch.full((size,), self.count) for size in (1, 2, 8)],
            "arrays": [np.full(size, self.count) for size in (1, 2, 8)],
        }

    def load_state_dict(self, state): ...


def test_memory_of_an_earlier_state_dict_that_is_used_again():
    state = [Counting(number) for number in range(20)]
    taken = take_snapshot(state, small_bytes=SMALL_BYTES).state
    assert [{int(item[0]) for group in one.values() for item in group} for one in taken] == [
        {number} for number in range(20)
    ]
