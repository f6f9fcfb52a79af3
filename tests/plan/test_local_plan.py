"""Local plans are sent between ranks in few bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import UnsupportedLeafError
from shardckpt.plan import local_plan as module
from shardckpt.plan.local_plan import (
    LocalPlan,
    TensorSpec,
    local_plan,
    pack_columns,
    unpack_columns,
)
from shardckpt.plan.save_plan import global_plan
from shardckpt.state.flatten import flatten
from tests.plan.plans import a_plan


@given(
    st.lists(st.lists(st.sampled_from([-1, 0, 255, 256, 70_000, 1 << 40]), min_size=2, max_size=2))
)
def test_columns_are_packed_and_unpacked(rows):
    columns = np.array(rows, dtype=np.int64).reshape(len(rows), 2)
    assert unpack_columns(pack_columns(columns)).tolist() == columns.tolist()


def test_plans_of_many_ranks_are_unpacked_as_each_alone(monkeypatch):
    """Their columns differ in length and in type: rank 9 has numbers of two bytes."""
    monkeypatch.setattr(module, "_BATCH_RANKS", 2)
    common = [TensorSpec(f"w{i}", "F32", (1000, 4)) for i in range(5)]
    plans = [
        a_plan(common, (), [(i, (100 * rank, 0), (100, 4), i > 1) for i in range(rank % 3 + 2)])
        for rank in range(10)
    ]
    packed = [plan.pack(complete=rank == 0) for rank, plan in enumerate(plans)]
    for plan, one, text in zip(plans, LocalPlan.unpack_all(packed), packed, strict=True):
        for found in (one, LocalPlan.unpack(text)):
            assert found.digests()[2] == plan.digests()[2]
            assert found.chunks.boxes.shape == plan.chunks.boxes.shape


def test_what_travels_is_small():
    """A rank's part of 1,000 tensors sharded by rows: a few bytes a chunk."""
    common = [TensorSpec(f"layers.{i}.weight", "F32", (16_384, 4096)) for i in range(1000)]
    held = [(i, (5 * 16, 0), (16, 4096), False) for i in range(1000)]
    plan = a_plan(common, (), held)
    assert len(plan.pack(complete=False)) < 4 * 1000
    (share,) = global_plan([a_plan(common[:1], (), [(0, (0, 0), (16_384, 4096), False)])]).shares
    assert len(share) < 64


def test_a_tensor_of_more_than_64_dimensions_is_refused():
    state = {"most": torch.ones((1,) * 64), "more": torch.ones((1,) * 65)}
    with pytest.raises(UnsupportedLeafError) as raised:
        local_plan(flatten(state, rank=0), world_size=1)
    assert raised.value.tensor == "more"
    del state["more"]
    assert local_plan(flatten(state, rank=0), world_size=1).chunks.boxes.shape == (1, 2, 64)
