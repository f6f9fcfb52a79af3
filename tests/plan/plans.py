"""Local plans for tests of plans."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

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
        rank_only=tuple(own),
        file_group=np.array(kind or [0] * (len(common) + len(own)), dtype=np.int64),
        chunks=ChunkTable(
            tensor=np.array([index for index, *_ in held], dtype=np.int64),
            boxes=pad_boxes([(offsets, sizes) for _, offsets, sizes, _ in held]),
        ),
        shared=np.array([shared for *_, shared in held], dtype=np.bool_),
        tree=b"{}",
        per_rank_trees=b"[]",
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


@st.composite
def worlds(draw):
    """Local plans of up to 5 ranks: tensors replicated, sharded by rows, or both at once over a
    mesh of two dimensions, and tensors that one rank alone has."""
    ranks = draw(st.integers(1, 5))
    common, held = [], [[] for _ in range(ranks)]
    for index in range(draw(st.integers(0, 6))):
        dtype = draw(st.sampled_from(["F32", "BF16", "U8", "I64"]))
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        common.append(TensorSpec(f"t{index}", dtype, shape))
        parts = draw(st.integers(1, ranks)) if shape and 0 not in shape else 1
        step = -(-shape[0] // parts) if shape and shape[0] else 0
        for rank in range(ranks):
            offsets, sizes = [0] * len(shape), list(shape)
            part = rank % parts
            if parts > 1:
                offsets[0] = min(part * step, shape[0])
                sizes[0] = min(step, shape[0] - offsets[0])
            if parts > 1 and 0 in sizes:
                continue
            held[rank].append((index, offsets, sizes, parts < ranks or draw(st.booleans())))
    own = [[] for _ in range(ranks)]
    for rank in range(ranks):
        for number in range(draw(st.integers(0, 2))):
            own[rank].append(TensorSpec(f"o{number}@rank{rank}", "F32", (3, number)))
            held[rank].append((len(common) + number, (0, 0), (3, number), False))
    plans = []
    for rank in range(ranks):
        count = len(common) + len(own[rank])
        kind = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
        plans.append(a_plan(common, own[rank], held[rank], kind))
    return plans


def travelled(plans):
    """Return the plans as rank 0 receives them."""
    return LocalPlan.unpack_all([p.pack(complete=rank == 0) for rank, p in enumerate(plans)])
