"""Where the ranks' states differ though they should be the same, said in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardckpt.errors import RankMismatchError, ReplicaMismatchError, ShardckptError
from shardckpt.plan.local_plan import LocalPlan, TensorSpec
from shardckpt.plan.save_plan import GlobalPlan

__all__ = ["compare_replicas", "explain_difference"]


def compare_replicas(plan: GlobalPlan, digests: Sequence[NDArray[np.uint64]]) -> None:
    """Raise ReplicaMismatchError where replicas differ: `digests[r]` are those of the local chunks
    that rank r compares, 0 for one that was not compared."""
    every, group = np.concatenate(digests), plan.group
    if len(every) == 0:
        return
    rank = np.repeat(np.arange(len(digests)), [len(own) for own in digests])
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
        "Ranks hold different values of a tensor that should be the same on all of them",
        rank=tuple(others),
        tensor=name,
        expected=f"the bytes that rank {int(rank[group == differing[0]][0])} holds",
        actual=f"other bytes; {len(set(differing.tolist()))} tensors differ in all",
        remedy="broadcast it from one rank before saving, or mark it with PerRank(...) if it is "
        "meant to differ",
    )


def explain_difference(payloads: list[bytes]) -> bytes:
    """Raise RankMismatchError or ReplicaMismatchError for the first entry in which a rank's
    state differs from rank 0's; b"" where none does. The payloads are whole local plans."""
    plans = [LocalPlan.unpack(payload) for payload in payloads]
    mine = {spec.name: spec for spec in plans[0].common}
    for rank, plan in enumerate(plans[1:], start=1):
        theirs = {spec.name: spec for spec in plan.common}
        if mine != theirs:
            raise _different_tensors(mine, theirs, rank)
        if plan.tree != plans[0].tree:
            raise _different_values(plans[0].tree, plan.tree, rank)
    return b""


def _different_tensors(
    mine: dict[str, TensorSpec], theirs: dict[str, TensorSpec], rank: int
) -> ShardckptError:
    for name in sorted(mine.keys() ^ theirs.keys()):
        return RankMismatchError(
            "The ranks hand over states with different keys",
            rank=rank,
            tensor=name,
            expected="the same keys on every rank",
            actual=f"rank {0 if name in mine else rank} has it, rank {rank if name in mine else 0} "
            f"does not; {len(mine.keys() ^ theirs.keys())} keys differ in all",
            remedy="give every rank the same keys; what belongs to one rank goes into PerRank(...)",
        )
    name = next(name for name, spec in mine.items() if theirs[name] != spec)
    return RankMismatchError(
        "The ranks hand over a tensor with different dtypes or shapes",
        rank=rank,
        tensor=name,
        expected=f"{mine[name].dtype} {list(mine[name].shape)}, as on rank 0",
        actual=f"{theirs[name].dtype} {list(theirs[name].shape)}",
        remedy="hand over DTensors for parts of a tensor, PerRank(...) for what differs by rank",
    )


def _different_values(mine: bytes, theirs: bytes, rank: int) -> ShardckptError:
    name, a, b = _first_difference(msgspec.json.decode(mine), msgspec.json.decode(theirs), "")
    return ReplicaMismatchError(
        "The ranks hand over different values",
        rank=rank,
        tensor=name,
        expected=f"{a}, as on rank 0",
        actual=b,
        remedy="give every rank the same value, or mark it with PerRank(...)",
    )


def _first_difference(mine: Any, theirs: Any, name: str) -> tuple[str, str, str]:
    if isinstance(mine, dict) and isinstance(theirs, dict) and list(mine) == list(theirs):
        pairs: Any = ((key, mine[key], theirs[key]) for key in mine)
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        pairs = ((index, a, b) for index, (a, b) in enumerate(zip(mine, theirs, strict=True)))
    else:
        return name, repr(mine)[:200], repr(theirs)[:200]
    for key, a, b in pairs:
        if a != b or type(a) is not type(b):
            step = "" if str(key).startswith("$") else str(key)
            return _first_difference(a, b, ".".join(part for part in (name, step) if part))
    return name, repr(mine)[:200], repr(theirs)[:200]
