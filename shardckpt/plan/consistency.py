"""Compare the digests of replicas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardckpt.errors import ReplicaMismatchError
from shardckpt.plan.save_plan import GlobalPlan

__all__ = ["compare_replicas"]


def compare_replicas(plan: GlobalPlan, digests: Sequence[NDArray[np.uint64]]) -> None:
    """Raise ReplicaMismatchError if replicas differ.

    `digests[r]` has the digest of each local chunk that rank r compares, 0 if it was not compared.
    """
    every, group = np.concatenate(digests), plan.group
    if len(every) == 0:
        return
    rank = np.repeat(np.arange(len(digests)), [len(of_rank) for of_rank in digests])
    order = np.lexsort((rank, group))
    every, group, rank = every[order], group[order], rank[order]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    first = np.repeat(every[starts], np.diff(np.append(starts, len(group))))
    if (every == first).all():
        return
    differing = group[every != first]
    name = plan.specs[int(plan.replicated[differing[0]])].name
    others = sorted({int(r) for r in rank[(every != first) & (group == differing[0])]})
    raise ReplicaMismatchError(
        "The replicas of a tensor differ between ranks",
        rank=tuple(others),
        tensor=name,
        expected=f"the bytes of rank {int(rank[group == differing[0]][0])}",
        actual=f"different bytes; {len(set(differing.tolist()))} tensors differ",
        remedy="broadcast the tensor from one rank before you save, or mark it with PerRank(...) "
        "if it differs on purpose",
    )
