"""Load, from a checkpoint into a state: open, plan, read, place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch

from shardckpt.coordination.base import Coordinator, exchange
from shardckpt.errors import DirectoryNotSharedError
from shardckpt.execution.collector import collector_paused
from shardckpt.execution.reader import read_all
from shardckpt.format.manifest import Manifest, from_bytes
from shardckpt.planning.load_plan import Finish, Matcher
from shardckpt.planning.reads import plan_reads
from shardckpt.planning.saved import Rename, SavedState, Select
from shardckpt.reports import LoadReport, Stopwatch
from shardckpt.storage.base import CheckpointFiles, Storage

__all__ = ["open_manifest", "run_load", "same_checkpoint"]


def open_manifest(storage: Storage, path: str) -> tuple[CheckpointFiles, Manifest]:
    """Open a checkpoint and read its manifest. Not collective."""
    files = storage.open(path)
    try:
        return files, from_bytes(files.manifest(), path=files.path)
    except BaseException:
        files.close()
        raise


def run_load(
    state: Any,
    path: str,
    *,
    coordinator: Coordinator,
    storage: Storage,
    strict: bool,
    cast: bool,
    keys: Select,
    rename: Rename,
) -> LoadReport:
    """Load into a state, in place; collective over the coordinator's ranks. See shardckpt.load."""
    watch, own = Stopwatch(), Stopwatch()
    opened: list[CheckpointFiles] = []
    matched: list[tuple[Manifest, Matcher, Finish]] = []
    profile: dict[int, dict[str, float]] = {}  # on rank 0
    read_bytes = 0

    def plan() -> bytes:
        with own.phase("open"), collector_paused():
            files, manifest = open_manifest(storage, path)
            opened.append(files)
        # to_local() is free without gradients
        with own.phase("match"), collector_paused(), torch.no_grad():
            matcher = Matcher(
                state,
                SavedState(manifest, keys=keys, rename=rename),
                rank=coordinator.rank,
                world_size=coordinator.world_size,
                cast=cast,
            )
            finish = matcher.match(state)
            matcher.settle()
        error = matcher.strict_part().error(path) if strict else None
        if error is not None:
            raise error
        matched.append((manifest, matcher, finish))
        return manifest.checkpoint_id.encode()

    def read() -> bytes:
        nonlocal read_bytes
        manifest, matcher, finish = matched[0]
        with own.phase("read"):
            with collector_paused():
                reads = plan_reads(matcher.reads)
            read_bytes = read_all(opened[0], manifest, reads, progress=coordinator.progress)
        with own.phase("place"):
            finish()
        return msgspec.msgpack.encode(own.seconds)

    def gather(payloads: list[bytes]) -> bytes:
        decode = msgspec.msgpack.Decoder(dict[str, float]).decode
        profile.update({rank: decode(seconds) for rank, seconds in enumerate(payloads)})
        return b""

    try:
        with watch.phase("plan"):
            exchange(coordinator, "open", plan, same_checkpoint(path))
        with watch.phase("read"):
            exchange(coordinator, "read", read, gather)
    finally:
        for files in opened:
            files.close()
    manifest, matcher, _ = matched[0]
    return LoadReport(
        path=path,
        checkpoint_id=manifest.checkpoint_id,
        saved_world_size=manifest.world_size,
        bytes_read=read_bytes,
        seconds=watch.seconds,
        profile=profile or {coordinator.rank: own.seconds},
        **_differences(matcher),
    )


def _differences(matcher: Matcher) -> dict[str, Any]:
    """Where state and checkpoint differ, as a LoadReport has it."""
    found = matcher.mismatches
    return {
        "missing": tuple(found.missing),
        "unexpected": tuple(found.unexpected),
        "wrong_shape": tuple(found.wrong_shape),
        "wrong_dtype": tuple(found.wrong_dtype),
        "cast": tuple(matcher.cast),
        "kept": tuple(matcher.kept),
    }


def same_checkpoint(path: str) -> Callable[[list[bytes]], bytes]:
    """The decision of an exchange of checkpoint ids: DirectoryNotSharedError where they differ."""

    def decide(payloads: list[bytes]) -> bytes:
        others = tuple(rank for rank, found in enumerate(payloads) if found != payloads[0])
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
