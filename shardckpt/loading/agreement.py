"""The agreement of all ranks on one load: the same checkpoint is open, and it fits their states."""

from __future__ import annotations

import platform
import uuid
import zlib
from collections.abc import Callable
from typing import Any

import msgspec

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import Attempt, attempt, exchange
from shardckpt.errors import DirectoryNotSharedError
from shardckpt.format.entries import Manifest
from shardckpt.format.manifest import from_bytes
from shardckpt.loading.sharing import Sharing
from shardckpt.plan.page_cache_policy import ReadSummary, past_cache, summarise_reads
from shardckpt.plan.read_plan import Reads
from shardckpt.plan.shared_reads import Segments, Wanted, find_segments, units_of, wanted_runs
from shardckpt.state.matching import MatchedState
from shardckpt.state.mismatches import Mismatches, check_untaken
from shardckpt.storage.base import CheckpointFiles, Storage

__all__ = [
    "agree_on_reads",
    "agree_on_sharing",
    "open_manifest",
    "open_together",
    "same_checkpoint",
]


def open_manifest(storage: Storage, path: str) -> tuple[CheckpointFiles, Manifest]:
    """Open a checkpoint and read its manifest. Not collective."""
    files = storage.open(path)
    try:
        return files, from_bytes(files.manifest(), path=files.path)
    except BaseException:
        files.close()
        raise


def open_together(
    coordinator: Coordinator, storage: Storage, path: str
) -> Attempt[tuple[CheckpointFiles, Manifest]]:
    """Open a checkpoint on all ranks. Collective if each machine may hold a part of it.

    Then all ranks open the newest checkpoint that any rank finds at the path: the disk of a
    machine that was away may hold an older one, or none. They get the manifest from a rank that has
    it.

    Returns:
        The checkpoint, or the error with which this rank did not open it.
    """
    opened = attempt(open_manifest, storage, path)
    if not storage.in_parts or coordinator.world_size == 1:
        return opened

    lacking: list[int] = []  # on rank 0

    def find() -> bytes:
        facts = (opened.value[1].created, opened.value[1].checkpoint_id) if opened.value else ()
        return msgspec.msgpack.encode(facts)

    def choose(payloads: list[bytes]) -> list[bytes]:
        found = [tuple(msgspec.msgpack.decode(payload)) for payload in payloads]
        newest = max(found)
        lacking.extend(rank for rank, facts in enumerate(found) if facts != newest)
        sender = found.index(newest)
        return [
            msgspec.msgpack.encode((bool(lacking), rank == sender, rank in lacking))
            for rank in range(len(found))
        ]

    any_lacks, sends, lacks = msgspec.msgpack.decode(exchange(coordinator, "find", find, choose))
    if not any_lacks:
        return opened

    def send() -> bytes:
        return opened.get()[0].manifest() if sends else b""

    def forward(payloads: list[bytes]) -> list[bytes]:
        manifest = b"".join(payloads)
        return [manifest if rank in lacking else b"" for rank in range(len(payloads))]

    manifest = exchange(coordinator, "manifest", send, forward)
    if not lacks:
        return opened
    if opened.value is not None:
        opened.value[0].close()
    return attempt(_open_part, storage, path, manifest)


def _open_part(storage: Storage, path: str, manifest: bytes) -> tuple[CheckpointFiles, Manifest]:
    files = storage.open_part(path, manifest)
    return files, from_bytes(manifest, path=files.path)


def agree_on_reads(
    coordinator: Coordinator,
    path: str,
    opened: Attempt[tuple[CheckpointFiles, Manifest]],
    matched: Attempt[MatchedState],
    *,
    strict: bool,
) -> tuple[float, bool]:
    """Agree that the checkpoint fits, before any rank changes its state. Collective.

    Args:
        coordinator: The ranks.
        path: The checkpoint.
        opened: The checkpoint that this rank opened.
        matched: This rank's state, matched against the checkpoint, or the error of the match.
        strict: Raise an error for mismatches.

    Returns:
        The fraction of a block that this rank must need for a read that bypasses the page cache,
        see plan/page_cache_policy; and whether one rank may read blocks for others.

    Raises:
        DirectoryNotSharedError: Ranks opened different checkpoints.
        LoadMismatchError: The checkpoint does not fit the states.
        ShardckptError: The error in `matched`, on its rank. The other ranks raise an error that
            names that rank.
    """
    several = coordinator.world_size > 1

    def report() -> bytes:
        state = matched.get()
        refused = state.strict_mismatches if strict else Mismatches()
        error = refused.error(path)
        if error is not None and not (several and refused.only_unexpected):
            raise error
        _, manifest = opened.get()
        summary = summarise_reads(state.reads if several else (), machine=platform.node())
        untaken = zlib.compress(msgspec.msgpack.encode(refused.unexpected), 1)
        return msgspec.msgpack.encode((manifest.checkpoint_id, summary, untaken))

    def decide(payloads: list[bytes]) -> list[bytes]:
        decode = msgspec.msgpack.Decoder(tuple[str, ReadSummary, bytes]).decode
        ids, summaries, untaken = zip(*map(decode, payloads), strict=True)
        same_checkpoint(path)([checkpoint_id.encode() for checkpoint_id in ids])
        check_untaken([msgspec.msgpack.decode(zlib.decompress(names)) for names in untaken], path)
        files = opened.get()[0]
        several_machines = len({summary.machine for summary in summaries}) > 1
        may_share = several and (files.remote or several_machines or files.nearby() is not None)
        return [msgspec.msgpack.encode((part, may_share)) for part in past_cache(summaries)]

    answer = exchange(coordinator, "open", report, decide)
    return msgspec.msgpack.decode(answer, type=tuple[float, bool])


def agree_on_sharing(
    coordinator: Coordinator,
    group: Any,
    files: CheckpointFiles,
    manifest: Manifest,
    reads: Attempt[Reads],
) -> Sharing | None:
    """Agree on the blocks that one rank reads for others. Collective.

    Args:
        coordinator: The ranks.
        group: Their process group.
        files: The checkpoint.
        manifest: Its manifest.
        reads: The reads of this rank, or the error of their plan.

    Returns:
        The blocks that this rank sends or receives. None if no rank does.
    """

    def describe() -> bytes:
        names = files.nearby()
        numbers = {shard.name: number for number, shard in enumerate(manifest.shards)}
        nearby = None if names is None else tuple(numbers[name] for name in names)
        runs = wanted_runs(reads.get()).tobytes()
        return msgspec.msgpack.encode(Wanted(platform.node(), runs, nearby))

    def decide(payloads: list[bytes]) -> bytes:
        wanted = [msgspec.msgpack.decode(payload, type=Wanted) for payload in payloads]
        segments = find_segments(wanted, remote=files.remote)
        return msgspec.msgpack.encode((uuid.uuid4().hex, segments))

    answer = exchange(coordinator, "share", describe, decide)
    identity, segments = msgspec.msgpack.decode(answer, type=tuple[str, Segments])
    if not segments.rows:
        return None
    return Sharing(group, identity, coordinator.rank, units_of(segments))


def same_checkpoint(path: str) -> Callable[[list[bytes]], bytes]:
    """Return the function with which rank 0 compares the checkpoint ids of an exchange.

    The function raises DirectoryNotSharedError if they differ.
    """

    def decide(payloads: list[bytes]) -> bytes:
        others = tuple(rank for rank, payload in enumerate(payloads) if payload != payloads[0])
        if others:
            raise DirectoryNotSharedError(
                "Some ranks see another checkpoint at this path than rank 0",
                path=path,
                rank=others,
                expected=f"checkpoint {payloads[0].decode()}",
                actual=f"checkpoint {payloads[others[0]].decode()}",
                remedy="load from a file system that all ranks share",
            )
        return b""

    return decide
