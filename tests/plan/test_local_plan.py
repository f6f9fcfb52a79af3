"""Local plans are sent between ranks in few bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.plan.local_plan import (
    TensorSpec,
    pack_columns,
    unpack_columns,
)
from shardckpt.plan.save_plan import global_plan
from tests.plan.plans import a_plan


@given(
    st.lists(st.lists(st.sampled_from([-1, 0, 255, 256, 70_000, 1 << 40]), min_size=2, max_size=2))
)
def test_columns_travel(rows):
    columns = np.array(rows, dtype=np.int64).reshape(len(rows), 2)
    assert unpack_columns(pack_columns(columns)).tolist() == columns.tolist()


def test_what_travels_is_small():
    """A rank's part of 1,000 tensors sharded by rows: a few bytes a chunk."""
    common = [TensorSpec(f"layers.{i}.weight", "F32", (16_384, 4096)) for i in range(1000)]
    held = [(i, (5 * 16, 0), (16, 4096), False) for i in range(1000)]
    plan = a_plan(common, (), held)
    assert len(plan.pack(complete=False)) < 4 * 1000
    (share,) = global_plan([a_plan(common[:1], (), [(0, (0, 0), (16_384, 4096), False)])]).shares
    assert len(share) < 64
