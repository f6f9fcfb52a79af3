"""The commit: rank 0 compares replicas, writes the manifest, and makes the checkpoint visible."""

from __future__ import annotations

import datetime
import itertools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, cast

import msgspec
import numpy as np

from shardckpt._version import __version__
from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import Attempt, exchange
from shardckpt.errors import ShardMismatchError
from shardckpt.format.entries import Manifest, ShardEntry
from shardckpt.format.manifest import to_bytes
from shardckpt.format.number_lists import Ints
from shardckpt.format.safetensors_header import parse_chunk_name, parse_header
from shardckpt.io.gc_pause import collector_paused
from shardckpt.plan.consistency import compare_replicas
from shardckpt.plan.plan_cache import shard_mismatch
from shardckpt.reports import Stopwatch
from shardckpt.saving.agreement import Agreement
from shardckpt.saving.rank_writer import ShardResult, layout
from shardckpt.storage.base import PARTS_NOTE, WriteTransaction

__all__ = ["Committed", "commit", "commit_manifest", "file_table"]


class Committed(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """The facts of a commit that every rank reports.

    `shard_bytes` and `linked_bytes` hold one int64 for each rank. They are compressed, as
    every rank receives all of them.
    """

    checkpoint_id: str
    manifest_bytes: int
    shard_bytes: bytes
    linked_bytes: bytes
    base_problems: tuple[str, ...]

    def report(self) -> dict[str, Any]:
        """Return the fields of a SaveReport."""
        return {
            "checkpoint_id": self.checkpoint_id,
            "manifest_bytes": self.manifest_bytes,
            "bytes_by_rank": _inflated(self.shard_bytes),
            "linked_by_rank": _inflated(self.linked_bytes),
            "base_problems": self.base_problems,
        }


class _Decision(msgspec.Struct, array_like=True, frozen=True):
    """Rank 0's answer to the results of all ranks.

    Attributes:
        committed: The facts of the commit. None if a shard does not match the manifest.
        in_parts: Whether the commit follows in another exchange, after those of other ranks.
        manifest: The manifest, for a rank that commits its part.
        differing: The rank whose shard does not match the manifest.
    """

    committed: Committed | None
    in_parts: bool = False
    manifest: bytes = b""
    differing: int = -1


def _deflated(sizes: list[int]) -> bytes:
    return zlib.compress(np.array(sizes, dtype="<i8").tobytes())


def _inflated(column: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(zlib.decompress(column), dtype="<i8").tolist())


_decode_result = msgspec.msgpack.Decoder(ShardResult).decode


def commit(
    coordinator: Coordinator, written: Attempt[ShardResult], agreement: Agreement, work: Stopwatch
) -> tuple[Committed, dict[int, dict[str, float]]]:
    """Commit the files of all ranks. Collective.

    Ranks whose transactions have `commits_part` commit first, and rank 0 last.

    Args:
        coordinator: The ranks.
        written: The result of this rank's writing, or its error.
        agreement: The agreement of the ranks.
        work: Counts the seconds of this rank's own work.

    Returns:
        The facts of the commit, and the seconds of work by rank and phase. Rank 0 gets those of all
        ranks, other ranks only their own.

    Raises:
        ReplicaMismatchError: Ranks hold different values of a tensor.
        ShardMismatchError: A rank has written other chunks than planned, or in another order.
        ShardckptError: The error in `written`, on its rank. The other ranks raise an error that
            names that rank.
    """
    profile: dict[int, dict[str, float]] = {}
    manifest = b""  # on rank 0
    results: list[ShardResult] = []

    def decide(payloads: list[bytes]) -> bytes | list[bytes]:
        nonlocal manifest
        results.extend(_decode_result(payload) for payload in payloads)
        in_parts = any(result.commits_part for result in results)
        with work.phase("commit"):
            try:
                with collector_paused():
                    committed, manifest = _manifest_of(agreement, results)
            except ShardMismatchError as error:
                differing = _Decision(None, differing=cast("int", error.rank))
                return msgspec.msgpack.encode(differing)
            if not in_parts:
                agreement.transaction.commit(manifest)
        profile.update({rank: result.seconds for rank, result in enumerate(results)})
        if not in_parts:
            return msgspec.msgpack.encode(_Decision(committed))
        texts = [manifest if result.commits_part else b"" for result in results]
        return [msgspec.msgpack.encode(_Decision(committed, True, text)) for text in texts]

    answer = exchange(coordinator, "write", lambda: msgspec.msgpack.encode(written.get()), decide)
    decision = msgspec.msgpack.decode(answer, type=_Decision)
    if decision.committed is None:
        _refuse(coordinator, decision.differing, agreement, results)
    if decision.in_parts:

        def commit_part() -> bytes:
            if agreement.transaction.commits_part:
                with work.phase("commit"):
                    agreement.transaction.commit(decision.manifest)
            return b""

        def commit_last(payloads: list[bytes]) -> bytes:
            with work.phase("commit"):
                agreement.transaction.commit(manifest)
            return b""

        exchange(coordinator, "commit", commit_part, commit_last)
    profile[coordinator.rank] = work.seconds
    return decision.committed, profile


def _manifest_of(agreement: Agreement, results: Sequence[ShardResult]) -> tuple[Committed, bytes]:
    assert agreement.plan is not None, "the plan is on rank 0"
    digests = [np.frombuffer(result.replicas, dtype="<u8") for result in results]
    compare_replicas(agreement.plan.plan, digests)
    tensors = agreement.plan.encoded_tensors(file_table(results))
    machines = 1 + sum(result.commits_part for result in results)
    note = f"on {machines} machines, each with the shards of its ranks"
    return build_manifest(
        checkpoint_id=agreement.checkpoint_id,
        tensors=tensors,
        results=results,
        tree=agreement.tree,
        notes={PARTS_NOTE: note} if machines > 1 else {},
    )


class _Chunk(NamedTuple):
    """A chunk in the header of a shard: its tensor, a description, and the path of the shard."""

    tensor: str
    text: str
    path: str


def _chunks_in(header: bytes, path: str) -> list[_Chunk]:
    tensors, _ = parse_header(header, file_size_bytes=None, path=path)
    return [
        _Chunk(parse_chunk_name(t.name)[0], f"{t.name}, {t.dtype} {list(t.shape)}", path)
        for t in tensors
    ]


def _refuse(
    coordinator: Coordinator, rank: int, agreement: Agreement, results: Sequence[ShardResult]
) -> NoReturn:
    """Raise the error for a rank whose shards do not match the plan. Collective.

    Rank 0 compares the headers of that rank's shards with the plan, to name the first chunk that
    differs.
    """

    def headers() -> bytes:
        own = agreement.writes if coordinator.rank == rank else None
        layouts = [own.layouts[group] for group, _ in own.files] if own else []
        return msgspec.msgpack.encode([file.header for file in layouts])

    def compare(payloads: list[bytes]) -> bytes:
        assert agreement.plan is not None, "the plan is on rank 0"
        plan, folder = agreement.plan.plan, agreement.transaction.path
        sent = msgspec.msgpack.decode(payloads[rank], type=list[bytes])
        written = [
            chunk
            for file, header in zip(results[rank].files, sent, strict=True)
            for chunk in _chunks_in(header, f"{folder}/{file.name}")
        ]
        planned = _chunks_in(layout(plan.specs, plan.of_rank(rank)).header, folder)
        missing = _Chunk("", "no such chunk", folder)
        for one, other in itertools.zip_longest(planned, written, fillvalue=missing):
            if one.text != other.text:
                facts = {"path": other.path, "tensor": one.tensor or other.tensor}
                raise shard_mismatch(rank, expected=one.text, actual=other.text, **facts)
        raise shard_mismatch(rank, path=folder)

    exchange(coordinator, "headers", headers, compare)
    raise AssertionError("rank 0 raises an error")


def commit_manifest(transaction: WriteTransaction, **facts: Any) -> Committed:
    """Write the manifest and make the checkpoint visible, on rank 0 only.

    Args:
        transaction: The checkpoint that is being written.
        **facts: The arguments of build_manifest.
    """
    committed, manifest = build_manifest(**facts)
    transaction.commit(manifest)
    return committed


def build_manifest(
    *,
    checkpoint_id: str,
    tensors: bytes,
    results: Sequence[ShardResult],
    tree: bytes,
    saved_by: Manifest | None = None,
    notes: dict[str, str] | None = None,
) -> tuple[Committed, bytes]:
    """Build the manifest of written files.

    Args:
        checkpoint_id: The id of the checkpoint.
        tensors: The member `tensors` of the manifest, encoded.
        results: The files of each rank.
        tree: The typed JSON of the state.
        saved_by: The manifest of the original save, if these files repeat its content. World size,
            PerRank values and notes are copied from it.
        notes: Other notes.
    """
    per_rank_trees = tuple(msgspec.Raw(result.per_rank_trees) for result in results)
    has_per_rank = any(result.per_rank_trees != b"[]" for result in results)
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
            per_rank=saved_by.per_rank if saved_by else per_rank_trees if has_per_rank else (),
            notes={**_kept_notes(saved_by), **(notes or {})},
        ),
        tensors=tensors,
    )
    committed = Committed(
        checkpoint_id=checkpoint_id,
        manifest_bytes=len(manifest),
        shard_bytes=_deflated([result.size_bytes for result in results]),
        linked_bytes=_deflated([result.linked_bytes for result in results]),
        base_problems=_without_repeats([result.problems for result in results]),
    )
    return committed, manifest


def _kept_notes(saved_by: Manifest | None) -> dict[str, str]:
    """Return the notes of the original save that hold for a copy in one place."""
    notes = saved_by.notes if saved_by else {}
    return {title: text for title, text in notes.items() if title != PARTS_NOTE}


def _without_repeats(problems: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the problems of all ranks with their bases, each once, and at most eight."""
    ranks: dict[str, list[int]] = {}
    for rank, problems_of_rank in enumerate(problems):
        for problem in problems_of_rank:
            ranks.setdefault(problem, []).append(rank)
    return tuple(
        f"rank {having[0]}{f' and {len(having) - 1} more' if having[1:] else ''}: {problem}"
        for problem, having in itertools.islice(ranks.items(), 8)
    )


def file_table(results: Sequence[ShardResult]) -> Ints:
    """Return the table of all files, in order, for KnownPlan.encoded_tensors."""
    rows = [
        (rank, file.chunks, file.header_bytes, file.layout)
        for rank, result in enumerate(results)
        for file in result.files
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)
