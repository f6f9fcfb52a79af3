"""Local plans for tests of plans."""

from __future__ import annotations

import numpy as np

from shardckpt.plan.local_plan import (
    ChunkTable,
    LocalPlan,
    TensorSpec,
    pad_boxes,
)


def a_plan(common, own, held, kind=None):
    """A rank's local plan; `held` are (tensor, offsets, sizes, shared)."""
    return LocalPlan(
        common=tuple(common),
        own=tuple(own),
        file_group=np.array(kind or [0] * (len(common) + len(own)), dtype=np.int64),
        chunks=ChunkTable(
            tensor=np.array([index for index, *_ in held], dtype=np.int64),
            boxes=pad_boxes([(offsets, sizes) for _, offsets, sizes, _ in held]),
        ),
        shared=np.array([shared for *_, shared in held], dtype=np.bool_),
        tree=b"{}",
        own_trees=b"[]",
    )


def replicated(sizes, ranks, solo=()):
    """Every rank holds 1-D tensors of these sizes; rank r one of solo[r] bytes beside them."""
    common = [TensorSpec(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]
    common += [TensorSpec(f"s{rank}", "U8", (size,)) for rank, size in enumerate(solo)]
    plans = []
    for rank in range(ranks):
        held = [(i, (0,), (size,), True) for i, size in enumerate(sizes)]
        if rank < len(solo):
            held.append((len(sizes) + rank, (0,), (solo[rank],), False))
        plans.append(a_plan(common, (), held))
    return plans
