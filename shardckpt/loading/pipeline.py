"""Load, from a checkpoint into a state: open, plan, read, place."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import exchange
from shardckpt.errors import DirectoryNotSharedError
from shardckpt.format.entries import Manifest
from shardckpt.format.manifest import from_bytes
from shardckpt.io.gc_pause import collector_paused
from shardckpt.loading.shard_reader import read_all
from shardckpt.logs import logger
from shardckpt.plan.page_cache_policy import Share, past_cache, share_of
from shardckpt.plan.read_plan import plan_reads
from shardckpt.reports import LoadReport, Stopwatch
from shardckpt.state.matching import Matcher, Mismatches, check_untaken
from shardckpt.state.saved_tree import Rename, SavedState, Select
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
    watch = Stopwatch()
    load = _Load(state, path, coordinator=coordinator, storage=storage)
    try:
        with watch.phase("plan"):
            load.plan(strict=strict, cast=cast, keys=keys, rename=rename)
        with watch.phase("read"):
            load.read()
    finally:
        load.close()
    report = LoadReport(
        path=path,
        checkpoint_id=load.manifest.checkpoint_id,
        saved_world_size=load.manifest.world_size,
        bytes_read=load.read_bytes,
        seconds=watch.seconds,
        profile=load.profile or {coordinator.rank: load.own.seconds},
        **_differences(load.matcher),
    )
    logger.info(
        "loaded %s: %d bytes on this rank in %.2f s",
        path,
        report.bytes_read,
        sum(watch.seconds.values()),
    )
    return report


class _Load:
    def __init__(
        self, state: Any, path: str, *, coordinator: Coordinator, storage: Storage
    ) -> None:
        self.state = state
        self.path = path
        self.coordinator = coordinator
        self.storage = storage
        self.files: CheckpointFiles | None = None
        self.own = Stopwatch()  # this rank's work, without waiting
        self.profile: dict[int, dict[str, float]] = {}  # on rank 0
        self.read_bytes = 0

    def plan(self, *, strict: bool, cast: bool, keys: Select, rename: Rename) -> None:
        """Agree on what is read; see that it fits the state."""

        def plan() -> bytes:
            with self.own.phase("open"), collector_paused():
                self.files, self.manifest = open_manifest(self.storage, self.path)
            # to_local() is free without gradients
            with self.own.phase("match"), collector_paused(), torch.no_grad():
                self.matcher = Matcher(
                    self.state,
                    SavedState(self.manifest, keys=keys, rename=rename),
                    rank=self.coordinator.rank,
                    world_size=self.coordinator.world_size,
                    cast=cast,
                )
                self.finish = self.matcher.match(self.state)
                self.matcher.settle()
            several = self.coordinator.world_size > 1
            found = self.matcher.strict_part() if strict else Mismatches()
            error = found.error(self.path)
            if error is not None and not (several and found.only_unexpected):
                raise error
            share = share_of(self.matcher.reads if several else (), machine=platform.node())
            untaken = zlib.compress(msgspec.msgpack.encode(found.unexpected), 1)
            return msgspec.msgpack.encode((self.manifest.checkpoint_id, share, untaken))

        answer = exchange(self.coordinator, "open", plan, _agree(self.path))
        self.past_cache = msgspec.msgpack.decode(answer, type=float)

    def read(self) -> None:
        """Fill the tensors, then put everything else in place."""

        def read() -> bytes:
            assert self.files is not None
            with self.own.phase("read"):
                with collector_paused():
                    reads = plan_reads(self.matcher.reads)
                self.read_bytes = read_all(
                    self.files,
                    self.manifest,
                    reads,
                    past_cache=self.past_cache,
                    progress=self.coordinator.progress,
                )
            with self.own.phase("place"):
                self.matcher.mark_changed()
                self.finish()
            return msgspec.msgpack.encode(self.own.seconds)

        def gather(payloads: list[bytes]) -> bytes:
            decode = msgspec.msgpack.Decoder(dict[str, float]).decode
            self.profile = {rank: decode(seconds) for rank, seconds in enumerate(payloads)}
            return b""

        exchange(self.coordinator, "read", read, gather)

    def close(self) -> None:
        if self.files is not None:
            self.files.close()


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


def _agree(path: str) -> Callable[[list[bytes]], list[bytes]]:
    """The decision on what the ranks have opened: same_checkpoint; each is told what it reads past
    the page cache."""

    def decide(payloads: list[bytes]) -> list[bytes]:
        decode = msgspec.msgpack.Decoder(tuple[str, Share, bytes]).decode
        ids, shares, untaken = zip(*map(decode, payloads), strict=True)
        same_checkpoint(path)([found.encode() for found in ids])
        check_untaken([msgspec.msgpack.decode(zlib.decompress(u)) for u in untaken], path)
        return [msgspec.msgpack.encode(part) for part in past_cache(shares)]

    return decide


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
