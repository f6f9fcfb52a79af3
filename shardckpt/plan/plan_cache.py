"""A cache of plans of earlier saves.

A plan depends only on the local plans of all ranks. Its id is the digest of their digests. Another
state, placement or world size has another id, so that a cached plan is never stale.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from shardckpt.errors import ShardMismatchError
from shardckpt.format.manifest import encode_tensors
from shardckpt.format.number_lists import Ints
from shardckpt.plan.save_plan import GlobalPlan, RankWrites
from shardckpt.plan.shard_layout import layout_digests, tensor_entries

__all__ = ["KnownPlan", "PlanCache", "shard_mismatch"]

_LIMIT_BYTES = 1 << 30
_LIMIT_PLANS = 8


class KnownPlan:
    """A plan on rank 0, with the encoded tensors of its manifest.

    `partial` are the names of the tensors that only some ranks hold.
    """

    def __init__(self, plan: GlobalPlan, partial: frozenset[str] = frozenset()) -> None:
        self.plan = plan
        self.partial = partial
        self._encoded = b""
        self._files: Ints | None = None

    def encoded_tensors(self, files: Ints) -> bytes:
        """Return the encoded member `tensors` of the manifest.

        `files` [s, 4] are the rank, the number of chunks, the bytes of the header and the digest of
        the layout of each file that the ranks have written.

        Raises:
            ShardMismatchError: A rank has written other chunks than planned, or in another order.
        """
        if self._files is None or not np.array_equal(self._files, files):
            plan = self.plan
            rank, counts, header_bytes, layouts = files.T
            bounds = np.cumsum(np.append(0, counts))
            written = np.bincount(rank, counts, len(plan.bounds) - 1)
            wrong = np.flatnonzero(written != np.diff(plan.bounds))
            if not len(wrong):
                planned = layout_digests(plan.specs, plan.chunks, bounds.tolist())
                wrong = rank[np.array(planned) != layouts]
            if len(wrong):
                raise shard_mismatch(int(wrong[0]))
            entries = tensor_entries(
                plan.specs, plan.chunks, bounds=bounds, header_bytes=header_bytes
            )
            self._encoded, self._files = encode_tensors(entries), files
        return self._encoded

    @property
    def size_bytes(self) -> int:
        """The approximate memory of the plan in bytes."""
        chunks = self.plan.chunks
        return chunks.tensor.nbytes + chunks.boxes.nbytes + len(self._encoded)


def shard_mismatch(rank: int, **facts: Any) -> ShardMismatchError:
    """Return the error for a rank whose shards are not those of the plan."""
    facts = {"expected": "the chunks of the plan", "actual": "other ones", **facts}
    return ShardMismatchError(
        "A rank wrote a shard that does not match the manifest",
        rank=rank,
        remedy="restart all ranks and save again; please report this error, as it is a fault of "
        "shardckpt",
        **facts,
    )


class PlanCache:
    """The latest plans: on every rank its part of them, on rank 0 also the global plans."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # background saves use the cache too
        self._plans: OrderedDict[str, KnownPlan] = OrderedDict()
        self._writes: OrderedDict[tuple[str, ...], tuple[str, RankWrites]] = OrderedDict()

    def plan(self, identity: str) -> KnownPlan | None:
        """Return the plan with an id, or None."""
        with self._lock:
            known = self._plans.get(identity)
            if known is not None:
                self._plans.move_to_end(identity)
            return known

    def add_plan(self, identity: str, known: KnownPlan) -> None:
        """Add a plan, and remove the oldest ones if the cache is full."""
        with self._lock:
            self._plans[identity] = known
            while len(self._plans) > _LIMIT_PLANS or (
                len(self._plans) > 1
                and sum(plan.size_bytes for plan in self._plans.values()) > _LIMIT_BYTES
            ):
                self._plans.popitem(last=False)

    def writes(self, local: tuple[str, ...]) -> tuple[str, RankWrites] | None:
        """Return the id of the latest global plan that includes a local plan, and this rank's part
        of it.
        """
        with self._lock:
            known = self._writes.get(local)
            if known is not None:
                self._writes.move_to_end(local)
            return known

    def add_writes(self, local: tuple[str, ...], identity: str, writes: RankWrites) -> None:
        """Add this rank's part of a plan."""
        with self._lock:
            self._writes[local] = identity, writes
            while len(self._writes) > _LIMIT_PLANS:
                self._writes.popitem(last=False)
