"""The agreement of all ranks on one save: the boxes that each rank writes, and their files.

Every rank sends the digests of its local plan. Rank 0 answers with a verdict and begins the
checkpoint. If nothing has changed since an earlier save, each rank writes the same boxes as in that
save. Otherwise the ranks send their plans, and rank 0 divides the chunks among them.
"""

from __future__ import annotations

import enum
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import msgspec

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import Attempt, attempt, exchange
from shardckpt.format.digests import text_digest
from shardckpt.format.entries import FORMAT_VERSION
from shardckpt.io.gc_pause import collector_paused
from shardckpt.plan.local_plan import LocalPlan, Offer, TensorSpec, filled
from shardckpt.plan.plan_cache import KnownPlan, PlanCache
from shardckpt.plan.save_plan import RankWrites, global_plan
from shardckpt.plan.state_merge import merge_states
from shardckpt.reports import Stopwatch
from shardckpt.storage.base import Storage, WriteTransaction

__all__ = ["Agreement", "Division", "SaveTarget", "agree", "divide", "new_id"]

_cache = PlanCache()


def new_id() -> str:
    """Return a fresh checkpoint id: 32 hex digits."""
    return uuid.uuid4().hex


class SaveTarget(NamedTuple):
    """The target of a save: its path, its storage, and whether it replaces a checkpoint."""

    path: str
    storage: Storage
    overwrite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """The result of agree. A with block that raises abandons the checkpoint.

    Attributes:
        local: This rank's plan.
        writes: This rank's part of the global plan.
        transaction: The checkpoint that is being written.
        checkpoint_id: Its id.
        merged: Whether the ranks hold different entries or values.
        plan: The global plan, on rank 0.
        tree: The typed JSON of the state, on rank 0.
    """

    local: LocalPlan
    writes: RankWrites
    transaction: WriteTransaction
    checkpoint_id: str
    merged: bool
    plan: KnownPlan | None = None
    tree: bytes = b""

    def __enter__(self) -> Agreement:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error_type is not None:
            self.transaction.abandon()
        self.transaction.close()


class Division(NamedTuple):
    """This rank's part of the global plan, and whether the ranks hold different entries or
    values."""

    writes: RankWrites
    merged: bool


class _Verdict(enum.Enum):
    """Rank 0's answer to the digests of the local plans."""

    KNOWN = "known"  # every rank has its part of the global plan from an earlier save
    DIVIDE = "divide"  # the ranks send their plans, and rank 0 divides the work
    MERGE = "merge"  # the ranks send their entries and values, and rank 0 merges them
    MERGE_VALUES = "merge values"  # the ranks send only their values: rank 0 has the entries


class _Digests(msgspec.Struct, array_like=True, frozen=True):
    """The digests of a local plan, and the id of the global plan that this rank remembers."""

    structure: str
    values: str
    rows: str
    known: str


class _Answer(msgspec.Struct, array_like=True, frozen=True):
    """Rank 0's answer: its verdict, and the ids of the plan, the transaction and the checkpoint."""

    verdict: _Verdict
    plan_id: str
    token: str
    checkpoint_id: str


class _Summary(NamedTuple):
    """The digests of this rank's plan, its key in the plan cache, and its writes if remembered."""

    digests: _Digests
    key: tuple[str, str, str]
    writes: RankWrites | None


_encode = msgspec.msgpack.encode
_decode_digests = msgspec.msgpack.Decoder(_Digests).decode
_decode_answer = msgspec.msgpack.Decoder(_Answer).decode
_decode_offer = msgspec.msgpack.Decoder(Offer).decode


def agree(
    coordinator: Coordinator, local: Attempt[LocalPlan], target: SaveTarget, work: Stopwatch
) -> Agreement:
    """Agree on the part of each rank, and begin the checkpoint. Collective.

    Args:
        coordinator: The ranks.
        local: This rank's plan, or the error of its making.
        target: The target of the save.
        work: Counts the seconds of this rank's own work.

    Returns:
        The agreement, with this rank's part of the global plan.

    Raises:
        RankMismatchError: The states of the ranks contradict each other.
        ShardckptError: The error in `local`, on its rank. The other ranks raise an error that names
            that rank.
    """
    with ExitStack() as on_error:
        lead = _Lead(local, target, work, on_error)
        agreement = _agree(coordinator, target, lead, on_error)
        on_error.pop_all()
    return agreement


def divide(coordinator: Coordinator, local: LocalPlan, work: Stopwatch) -> Division:
    """Agree on the part of each rank, and begin no checkpoint. Collective.

    `agree` gives each rank the same part, as long as no plan changes. Raises as `agree`.
    """
    with ExitStack() as on_error:
        lead = _Lead(attempt(lambda: local), None, work, on_error)
        summary, answer, merged = _compare(coordinator, lead)
        writes = summary.writes
        if answer.verdict is _Verdict.DIVIDE:
            writes = _divide(coordinator, attempt(lambda: None), summary.key, answer, lead)
    assert writes is not None, "rank 0 answers KNOWN only if every rank has its plan"
    return Division(writes, merged)


def _agree(
    coordinator: Coordinator, target: SaveTarget, lead: _Lead, on_error: ExitStack
) -> Agreement:
    summary, answer, merged = _compare(coordinator, lead)

    # Every rank joins the transaction before any rank writes, as a directory may not be shared.
    def join() -> WriteTransaction:
        if lead.transaction is not None:
            return lead.transaction
        return _abandoned_by(on_error, target.storage.join_part(target.path, token=answer.token))

    transaction, writes = attempt(join), summary.writes
    if answer.verdict is _Verdict.DIVIDE:
        writes = _divide(coordinator, transaction, summary.key, answer, lead)
    else:
        exchange(coordinator, "join", transaction.then(lambda _: b"").get, lambda payloads: b"")
    assert writes is not None, "rank 0 answers KNOWN only if every rank has its plan"
    return Agreement(
        local=lead.local.get(),
        writes=writes,
        transaction=transaction.get(),
        checkpoint_id=answer.checkpoint_id,
        merged=merged,
        plan=lead.plan,
        tree=lead.tree,
    )


def _compare(coordinator: Coordinator, lead: _Lead) -> tuple[_Summary, _Answer, bool]:
    """Compare the plans of all ranks.

    Returns:
        The digests of this rank's plan, rank 0's answer, and whether the states were merged.
    """
    summary = lead.local.then(_summary, coordinator, lead.work)
    answer = _decode_answer(
        exchange(coordinator, "plan", lambda: _encode(summary.get().digests), lead.compare)
    )
    plan = lead.local.get()
    merged = answer.verdict in (_Verdict.MERGE, _Verdict.MERGE_VALUES)
    if merged:
        offer = _encode(plan.offer(tensors=answer.verdict is _Verdict.MERGE))
        answer = _decode_answer(exchange(coordinator, "compare", lambda: offer, lead.merge))
    return summary.get(), answer, merged


def _divide(
    coordinator: Coordinator,
    ready: Attempt[Any],
    key: tuple[str, str, str],
    answer: _Answer,
    lead: _Lead,
) -> RankWrites:
    """Divide the work anew. Returns this rank's part. Raises the error of `ready` on all ranks."""
    plan = lead.local.get()
    packed = ready.then(lambda _: plan.pack(complete=coordinator.rank == 0))
    writes = RankWrites.of(plan, exchange(coordinator, "divide", packed.get, lead.divide))
    _cache.add_writes(key, answer.plan_id, writes)
    return writes


def _summary(local: LocalPlan, coordinator: Coordinator, work: Stopwatch) -> _Summary:
    with work.phase("plan"), collector_paused():
        structure, values, rows = local.digests()
    # The same process may be another rank of another group, and then writes another part.
    key = structure, rows, f"{coordinator.rank} of {coordinator.world_size}"
    known, writes = _cache.writes(key) or ("", None)
    return _Summary(_Digests(structure, values, rows, known), key, writes)


def _abandoned_by(on_error: ExitStack, transaction: WriteTransaction) -> WriteTransaction:
    on_error.callback(transaction.close)
    on_error.callback(transaction.abandon)
    return transaction


class _Lead:
    """The decisions of rank 0. Its methods run only on rank 0; on other ranks it stays empty."""

    def __init__(
        self,
        local: Attempt[LocalPlan],
        target: SaveTarget | None,
        work: Stopwatch,
        on_error: ExitStack,
    ) -> None:
        self.local = local
        self.target = target
        self.work = work
        self.on_error = on_error
        self.transaction: WriteTransaction | None = None
        self.plan: KnownPlan | None = None
        self.plan_id = ""
        self.tree = b""
        self.common: tuple[tuple[TensorSpec, ...], ...] | None = None  # by rank, if merged
        self.partial: frozenset[str] = frozenset()

    def compare(self, payloads: list[bytes]) -> bytes:
        """Compare the digests of all ranks."""
        digests = [_decode_digests(payload) for payload in payloads]
        self.plan_id = text_digest(
            _encode((FORMAT_VERSION, [(rank.structure, rank.rows) for rank in digests]))
        )
        if {rank.known for rank in digests} == {self.plan_id}:
            self.plan = _cache.plan(self.plan_id)
        if len({(rank.structure, rank.values) for rank in digests}) > 1:
            verdict = _Verdict.MERGE_VALUES if self.plan else _Verdict.MERGE
            return _encode(_Answer(verdict, self.plan_id, "", ""))
        self.tree = self.local.get().tree
        return self._begin()

    def merge(self, payloads: list[bytes]) -> bytes:
        """Merge the states of all ranks into one."""
        with self.work.phase("plan"), collector_paused():
            offers = [_decode_offer(payload) for payload in payloads]
            merged = merge_states(offers, partial=self.plan.partial if self.plan else None)
        self.tree, self.common, self.partial = merged.tree, merged.common, merged.partial
        return self._begin()

    def divide(self, payloads: list[bytes]) -> list[bytes]:
        """Divide the work among the ranks."""
        with self.work.phase("divide"), collector_paused():
            plan = global_plan(LocalPlan.unpack_all(payloads), self.common)
            self.plan = KnownPlan(plan, self.partial)
        _cache.add_plan(self.plan_id, self.plan)
        return list(plan.shares)

    def _begin(self) -> bytes:
        """Begin the checkpoint, with the values that all ranks agree on. Returns the answer."""
        verdict = _Verdict.DIVIDE if self.plan is None else _Verdict.KNOWN
        if self.target is None:
            return _encode(_Answer(verdict, self.plan_id, "", ""))
        self.tree = filled(self.tree, self.local.get().rank0_trees)
        path, storage, overwrite = self.target
        identity = new_id()
        self.transaction = _abandoned_by(
            self.on_error, storage.begin(path, checkpoint_id=identity, overwrite=overwrite)
        )
        return _encode(_Answer(verdict, self.plan_id, self.transaction.token, identity))
