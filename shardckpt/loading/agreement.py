"""The agreement of all ranks on one load: the same checkpoint is open, and it fits their states."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Callable

import msgspec

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import Attempt, exchange
from shardckpt.errors import DirectoryNotSharedError
from shardckpt.format.entries import Manifest
from shardckpt.format.manifest import from_bytes
from shardckpt.plan.page_cache_policy import ReadSummary, past_cache, summarize_reads
from shardckpt.state.matching import MatchedState
from shardckpt.state.mismatches import Mismatches, check_unused
from shardckpt.storage.base import CheckpointFiles, Storage

__all__ = ["agree_on_reads", "open_manifest", "same_checkpoint"]


def open_manifest(storage: Storage, path: str) -> tuple[CheckpointFiles, Manifest]:
    """Open a checkpoint and read its manifest. Not collective."""
    files = storage.open(path)
    try:
        return files, from_bytes(files.manifest(), path=files.path)
    except BaseException:
        files.close()
        raise


def agree_on_reads(
    coordinator: Coordinator,
    path: str,
    opened: Attempt[tuple[CheckpointFiles, Manifest]],
    matched: Attempt[MatchedState],
    *,
    strict: bool,
) -> float:
    """Agree that the checkpoint fits, before any rank changes its state. Collective.

    Args:
        coordinator: The ranks.
        path: The checkpoint.
        opened: The checkpoint that this rank opened.
        matched: This rank's state, matched against the checkpoint, or the error of the match.
        strict: Raise an error for mismatches.

    Returns:
        The fraction of a block that this rank must need for a read that bypasses the page cache.
        See plan/page_cache_policy.

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
        summary = summarize_reads(state.reads if several else (), machine=platform.node())
        unused = zlib.compress(msgspec.msgpack.encode(refused.unexpected), 1)
        return msgspec.msgpack.encode((manifest.checkpoint_id, summary, unused))

    def decide(payloads: list[bytes]) -> list[bytes]:
        decode = msgspec.msgpack.Decoder(tuple[str, ReadSummary, bytes]).decode
        ids, summaries, unused = zip(*map(decode, payloads), strict=True)
        same_checkpoint(path)([checkpoint_id.encode() for checkpoint_id in ids])
        check_unused([msgspec.msgpack.decode(zlib.decompress(names)) for names in unused], path)
        return [msgspec.msgpack.encode(part) for part in past_cache(summaries)]

    return msgspec.msgpack.decode(exchange(coordinator, "open", report, decide), type=float)


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
