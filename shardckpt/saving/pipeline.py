"""Save, from a state to a committed checkpoint: plan, write, commit.

Every phase is one exchange: each rank does its part, rank 0 looks at what all of them
sent and answers. An error on any rank ends the save on all of them, and nothing appears.
"""

from __future__ import annotations

import datetime
import itertools
import uuid
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash

from shardckpt._version import __version__
from shardckpt.coordination.base import Coordinator, exchange
from shardckpt.format.digests import text_digest
from shardckpt.format.entries import FORMAT_VERSION, Manifest, ShardEntry
from shardckpt.format.manifest import to_bytes
from shardckpt.io.buffers import contiguous_parts, view_at
from shardckpt.io.gc_pause import collector_paused
from shardckpt.logs import logger
from shardckpt.plan.consistency import compare_replicas
from shardckpt.plan.local_plan import ChunkTable, Ints, LocalPlan, Offer, TensorSpec, filled
from shardckpt.plan.plan_cache import KnownPlan, PlanCache
from shardckpt.plan.save_plan import RankWrites, global_plan
from shardckpt.plan.state_merge import merge
from shardckpt.reports import SaveReport, Stopwatch
from shardckpt.saving.incremental import Base, OpenCheckpoint, open_base
from shardckpt.saving.rank_writer import ShardResult, write_rank
from shardckpt.state.local_chunks import box_slices
from shardckpt.storage.base import Storage, WriteTransaction

__all__ = [
    "commit",
    "file_table",
    "new_id",
    "planned_parts",
    "replica_digests",
    "run_save",
]

SMALL_BYTES = 64 << 10
"""Replicas up to this size are always compared; larger ones when asked for."""


_cache = PlanCache()


def new_id() -> str:
    """A fresh checkpoint id: 32 hex digits."""
    return uuid.uuid4().hex


def run_save(
    plan_locally: Callable[[], LocalPlan],
    path: str,
    *,
    coordinator: Coordinator,
    storage: Storage,
    overwrite: bool,
    check_replicas: bool,
    base: str | OpenCheckpoint | None = None,
    verify_base: bool = False,
    staged: bool = False,
) -> SaveReport:
    """Save what this rank's local plan holds; collective. See shardckpt.save.

    `staged`: nobody changes the plan's data meanwhile.
    """
    watch = Stopwatch()
    save = _Save(
        coordinator,
        storage,
        path,
        overwrite=overwrite,
        check_replicas=check_replicas,
        base=open_base(base, storage, verify=verify_base),
        staged=staged,
    )
    try:
        with watch.phase("plan"):
            save.plan(plan_locally)
        with watch.phase("write"):
            report = save.write_and_commit()
    except BaseException:
        save.abandon()
        raise
    finally:
        save.close()
    done = SaveReport(
        path=path,
        world_size=coordinator.world_size,
        seconds=watch.seconds,
        profile=save.profile or {coordinator.rank: save.own.seconds},
        **report,
    )
    logger.info(
        "saved %s: %d bytes by %d ranks in %.2f s",
        path,
        done.total_bytes,
        done.world_size,
        sum(watch.seconds.values()),
    )
    return done


class _Save:
    def __init__(
        self,
        coordinator: Coordinator,
        storage: Storage,
        path: str,
        *,
        overwrite: bool,
        check_replicas: bool,
        base: AbstractContextManager[Base | None],
        staged: bool,
    ) -> None:
        self.base = base
        self.coordinator = coordinator
        self.storage = storage
        self.path = path
        self.overwrite = overwrite
        self.check_replicas = check_replicas
        self.staged = staged
        self.transaction: WriteTransaction | None = None
        self.token = ""
        self.checkpoint_id = ""
        self.writes: RankWrites | None = None
        self.merging = False  # the ranks don't hold the same
        self.known: KnownPlan | None = None  # on rank 0
        self.tree = b""  # on rank 0
        self.common: tuple[tuple[TensorSpec, ...], ...] | None = None  # on rank 0, of each rank
        self.partial: frozenset[str] = frozenset()  # on rank 0
        self.own = Stopwatch()  # this rank's work, without waiting
        self.profile: dict[int, dict[str, float]] = {}  # on rank 0

    def plan(self, plan_locally: Callable[[], LocalPlan]) -> None:
        """Agree on who writes what, and begin the checkpoint."""

        def summary() -> bytes:
            with self.own.phase("plan"), collector_paused():
                self.local = plan_locally()
                structure, values, rows = self.local.digests()
            self.key = structure, rows, str(self.coordinator.world_size)
            known, self.writes = _cache.writes(self.key) or ("", None)
            return msgspec.msgpack.encode((structure, values, rows, known))

        decode = msgspec.msgpack.Decoder(tuple[str, str, str, str]).decode
        answer = exchange(self.coordinator, "plan", summary, self.answer_summaries)
        verdict, self.plan_id, self.token, self.checkpoint_id = decode(answer)
        if verdict in ("merge", "merge values"):
            self.merging = True
            offer = msgspec.msgpack.encode(self.local.offer(whole=verdict == "merge"))
            answer = exchange(self.coordinator, "compare", lambda: offer, self.merge)
            verdict, self.plan_id, self.token, self.checkpoint_id = decode(answer)
        if verdict == "same":
            exchange(self.coordinator, "join", self.join, lambda payloads: b"")
        if verdict == "send":
            share = exchange(self.coordinator, "divide", self.join_and_pack, self.divide)
            self.writes = RankWrites.of(self.local, share)
            _cache.add_writes(self.key, self.plan_id, self.writes)

    def answer_summaries(self, payloads: list[bytes]) -> bytes:
        decode = msgspec.msgpack.Decoder(tuple[str, str, str, str]).decode
        summaries = [decode(payload) for payload in payloads]
        self.plan_id = text_digest(
            msgspec.msgpack.encode((FORMAT_VERSION, [(a, rows) for a, _, rows, _ in summaries]))
        )
        self.known = _cache.plan(self.plan_id)
        if {known for *_, known in summaries} != {self.plan_id}:
            self.known = None
        if len({(structure, values) for structure, values, _, _ in summaries}) > 1:
            verdict = "merge values" if self.known else "merge"
            return msgspec.msgpack.encode((verdict, self.plan_id, "", ""))
        self.tree = self.local.tree
        return self.begin()

    def merge(self, payloads: list[bytes]) -> bytes:
        """Make one state of those of all ranks."""
        decode = msgspec.msgpack.Decoder(Offer).decode
        with self.own.phase("plan"), collector_paused():
            offers = [decode(payload) for payload in payloads]
            merged = merge(offers, partial=self.known.partial if self.known else None)
        self.tree, self.common, self.partial = merged.tree, merged.common, merged.partial
        return self.begin()

    def begin(self) -> bytes:
        """Begin the checkpoint, with values that all ranks agree on."""
        self.tree = filled(self.tree, self.local.rank0_trees)
        self.checkpoint_id = new_id()
        self.transaction = self.storage.begin(
            self.path, checkpoint_id=self.checkpoint_id, overwrite=self.overwrite
        )
        verdict = "same" if self.known is not None else "send"
        token = self.transaction.token
        return msgspec.msgpack.encode((verdict, self.plan_id, token, self.checkpoint_id))

    def join(self) -> bytes:
        """See what rank 0 has begun: before anyone writes, as a directory may not be shared."""
        if self.transaction is None:
            self.transaction = self.storage.join(self.path, token=self.token)
        return b""

    def join_and_pack(self) -> bytes:
        self.join()
        return self.local.pack(whole=self.coordinator.rank == 0)

    def divide(self, payloads: list[bytes]) -> list[bytes]:
        with self.own.phase("divide"), collector_paused():
            plan = global_plan([LocalPlan.unpack(payload) for payload in payloads], self.common)
            self.known = KnownPlan(plan, self.partial)
        _cache.add_plan(self.plan_id, self.known)
        return list(plan.shares)

    def write_and_commit(self) -> dict[str, Any]:
        def write() -> bytes:
            assert self.transaction is not None
            local, writes = self.local, self.writes
            assert writes is not None
            with self.own.phase("write"), self.base as base:
                with collector_paused(), torch.no_grad():
                    parts = planned_parts(local, writes)
                result = write_rank(
                    self.transaction,
                    rank=self.coordinator.rank,
                    world_size=self.coordinator.world_size,
                    progress=self.coordinator.progress,
                    specs=(*local.common, *local.own),
                    chunks=ChunkTable(tensor=local.chunks.tensor[writes.row], boxes=writes.boxes),
                    files=writes.files,
                    data=lambda part: parts[part],
                    layouts=writes.layouts,
                    base=base,
                    staged=self.staged,
                )
            self.own.seconds["write"] -= result.seconds["sync"]
            with self.own.phase("compare"):
                result.replicas = replica_digests(
                    local, writes, everything=self.check_replicas, sampled=self.merging
                )
            result.own_trees = local.own_trees
            result.seconds = self.own.seconds = {**self.own.seconds, **result.seconds}
            return msgspec.msgpack.encode(result)

        answer = exchange(self.coordinator, "write", write, self.commit)
        report: dict[str, Any] = msgspec.msgpack.decode(answer)
        sizes = np.frombuffer(zlib.decompress(report.pop("sizes")), dtype="<i8").reshape(2, -1)
        of_ranks = {"bytes_by_rank": sizes[0], "linked_by_rank": sizes[1]}
        report["base_problems"] = tuple(report["base_problems"])
        return {**report, **{name: tuple(column.tolist()) for name, column in of_ranks.items()}}

    def commit(self, payloads: list[bytes]) -> bytes:
        decode = msgspec.msgpack.Decoder(ShardResult).decode
        results = [decode(payload) for payload in payloads]
        assert self.known is not None
        assert self.transaction is not None
        self.profile = {rank: result.seconds for rank, result in enumerate(results)}
        with self.own.phase("commit"):
            compare_replicas(
                self.known.plan, [np.frombuffer(result.replicas, dtype="<u8") for result in results]
            )
            with collector_paused():
                tensors = self.known.encoded_tensors(file_table(results))
            answer = commit(
                self.transaction,
                checkpoint_id=self.checkpoint_id,
                tensors=tensors,
                results=results,
                tree=self.tree,
            )
        self.profile[0] = self.own.seconds
        return answer

    def abandon(self) -> None:
        if self.transaction is not None:
            self.transaction.abandon()

    def close(self) -> None:
        if self.transaction is not None:
            self.transaction.close()


def planned_parts(local: LocalPlan, writes: RankWrites) -> list[torch.Tensor]:
    """The data of each write: a local chunk, or the part of it that this rank writes."""
    held = local.chunks.boxes
    parts = []
    for row, whole, box in zip(
        writes.row.tolist(),
        (held[writes.row] == writes.boxes[:, :, : held.shape[2]]).all(axis=(1, 2)).tolist(),
        writes.boxes,
        strict=True,
    ):
        data = local.data[row]
        if not whole:
            dims = data.dim()
            offsets, sizes = box[:, :dims].tolist()
            data = data[box_slices(held[row, 0, :dims].tolist(), offsets, sizes)]
        parts.append(data)
    return parts


def commit(
    transaction: WriteTransaction,
    *,
    checkpoint_id: str,
    tensors: bytes,
    results: Sequence[ShardResult],
    tree: bytes,
    saved_by: Manifest | None = None,
) -> bytes:
    """Write the manifest and make the checkpoint visible; rank 0 alone. The facts of it, encoded.

    `tensors` are the manifest's, encoded. World size, PerRank values and notes are those of
    `saved_by`, if these shards hold again what it held.
    """
    own_trees = tuple(msgspec.Raw(result.own_trees) for result in results)
    has_own = any(result.own_trees != b"[]" for result in results)
    manifest = to_bytes(
        Manifest(
            checkpoint_id=checkpoint_id,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            library=f"shardckpt {__version__}",
            world_size=saved_by.world_size if saved_by else len(results),
            shards=tuple(
                ShardEntry(
                    name=file.name,
                    size_bytes=file.size_bytes,
                    digests=np.frombuffer(file.digests, dtype="<u8"),
                )
                for result in results
                for file in result.files
            ),
            tensors={},
            state=msgspec.Raw(tree),
            per_rank=saved_by.per_rank if saved_by else own_trees if has_own else (),
            notes=saved_by.notes if saved_by else {},
        ),
        tensors=tensors,
    )
    transaction.commit(manifest)
    return msgspec.msgpack.encode(
        {
            "checkpoint_id": checkpoint_id,
            # Every rank gets this: as deflated columns, for thousands of them.
            "sizes": zlib.compress(
                np.array(
                    [
                        [result.size_bytes for result in results],
                        [result.linked_bytes for result in results],
                    ],
                    dtype="<i8",
                ).tobytes()
            ),
            "base_problems": _told_once([result.problems for result in results]),
            "manifest_bytes": len(manifest),
        }
    )


def _told_once(problems: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The problems of all ranks with their bases, each once and a few at most."""
    ranks: dict[str, list[int]] = {}
    for rank, own in enumerate(problems):
        for problem in own:
            ranks.setdefault(problem, []).append(rank)
    return tuple(
        f"rank {having[0]}{f' and {len(having) - 1} more' if having[1:] else ''}: {problem}"
        for problem, having in itertools.islice(ranks.items(), 8)
    )


def file_table(results: Sequence[ShardResult]) -> Ints:
    """Of each file that was written, in order, [number of chunks, size of the header in bytes]."""
    rows = [(file.chunks, file.header_bytes) for result in results for file in result.files]
    return np.array(rows, dtype=np.int64)


def _beginning(data: torch.Tensor) -> torch.Tensor:
    """The first elements of a large tensor, of up to SMALL_BYTES."""
    while (size := data.numel() * data.element_size()) > SMALL_BYTES:
        rows = len(data) * SMALL_BYTES // size
        data = data[:rows] if rows else data[0]
    return data


def replica_digests(
    local: LocalPlan, writes: RankWrites, *, everything: bool, sampled: bool = False
) -> bytes:
    """A digest for each local chunk that other ranks hold as well; 0 for those not compared. If
    `sampled`, large ones are compared by their beginning."""
    digests = np.zeros(len(writes.compare), dtype="<u8")
    for index, row in enumerate(writes.compare.tolist()):
        data = local.data[row]
        size = data.numel() * data.element_size()
        if sampled and not everything and size > SMALL_BYTES:
            data, size = _beginning(data), SMALL_BYTES
        if size and (everything or size <= SMALL_BYTES):
            digest = xxhash.xxh3_64()
            for part in contiguous_parts(data.detach()):
                digest.update(view_at(part.data_ptr(), part.numel() * part.element_size()))
            digests[index] = digest.intdigest() | 1
    return digests.tobytes()
