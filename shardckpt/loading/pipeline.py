"""The stages of a load, from a checkpoint into a state.

    open -> match -> plan -> read -> place

Each stage takes the result of the stage before it. After the match the ranks agree that the
checkpoint fits. No state changes before that. After the plan they agree on the blocks that one rank
reads for others. An error on any rank ends the load on all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import msgspec

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import Attempt, exchange
from shardckpt.errors import RankFailedError
from shardckpt.format.entries import Manifest
from shardckpt.io.gc_pause import collector_paused, ends_pauses
from shardckpt.loading.agreement import Shares, agree_on_reads, agree_on_sharing, open_together
from shardckpt.loading.shard_reader import read_all
from shardckpt.loading.sharing import Sharing, TransferError
from shardckpt.logs import logger, reported
from shardckpt.plan.read_plan import Reads, plan_reads
from shardckpt.reports import LoadReport, Stopwatch
from shardckpt.state.matching import MatchedState, match_state
from shardckpt.state.saved_tree import Renaming, SavedState, Select
from shardckpt.storage.base import CheckpointFiles, Storage
from shardckpt.transforms import Transforms, transformed

__all__ = ["LoadOptions", "run_load"]

_Opened = tuple[CheckpointFiles, Manifest]

_LITTLE_BYTES = 64 << 20
"""The bytes that a single rank may read from its own machine before the garbage collector runs
again. When it runs, it scans all objects of the match, which exist until the load ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The entries that a load takes, and how it matches them; see shardckpt.load."""

    strict: bool = True
    cast: bool = False
    keys: Select = None
    rename: Renaming = None
    transforms: Transforms | None = None


@reported("load", lambda state, path, *, coordinator, **_: (path, coordinator.rank))
@ends_pauses
def run_load(
    state: Any,
    path: str,
    *,
    coordinator: Coordinator,
    storage: Storage,
    options: LoadOptions,
) -> LoadReport:
    """Load into a state, in place. Collective. See shardckpt.load."""
    with ExitStack() as pause:
        if coordinator.world_size == 1:  # then no wait for other ranks prolongs the pause
            pause.enter_context(collector_paused())
        return _load(state, path, coordinator, storage, options, pause)


def _load(
    state: Any,
    path: str,
    coordinator: Coordinator,
    storage: Storage,
    options: LoadOptions,
    pause: ExitStack,
) -> LoadReport:
    """Load as run_load does. `pause` is closed before many bytes are read."""
    watch, work = Stopwatch(), Stopwatch()
    with ExitStack() as closing:
        with watch.phase("plan"):
            with work.phase("open"), collector_paused():
                opened = open_together(coordinator, storage, path)
            if opened.value is not None:
                closing.callback(opened.value[0].close)
            with work.phase("match"), collector_paused():
                matched = opened.then(_match, state, path, coordinator, options)
            past_cache, shares = agree_on_reads(
                coordinator, path, opened, matched, strict=options.strict
            )
        with watch.phase("read"):
            with work.phase("read"), collector_paused():
                planned = matched.then(lambda matched: plan_reads(matched.reads))
            if planned.value is None or (
                opened.get()[0].remote or planned.value.size_bytes() > _LITTLE_BYTES
            ):
                pause.close()
            sharing = None
            if shares is not Shares.NOTHING:
                sharing = agree_on_sharing(coordinator, *opened.get(), planned, shares, closing)
            read = planned.then(
                _read,
                opened.get(),
                past_cache=past_cache,
                sharing=sharing,
                progress=coordinator.progress,
                work=work,
            )
            placed = read.then(lambda _: _place(matched.get(), work))
            profile = _finish(coordinator, placed, work)
            tiers = opened.get()[0].bytes_read()
    report = LoadReport(
        path=path,
        checkpoint_id=opened.get()[1].checkpoint_id,
        saved_world_size=opened.get()[1].world_size,
        bytes_read=read.get(),
        tiers=tiers,
        seconds=watch.seconds,
        profile=profile,
        **_differences(matched.get()),
    )
    logger.info(
        "loaded %s: %d bytes on this rank in %.2f s",
        path,
        report.bytes_read,
        sum(watch.seconds.values()),
    )
    return report


def _match(
    opened: _Opened, state: Any, path: str, coordinator: Coordinator, options: LoadOptions
) -> MatchedState:
    """Match the state with the entries of the checkpoint."""
    manifest = transformed(opened[1], options.transforms, path=path)
    saved = SavedState(manifest, keys=options.keys, rename=options.rename)
    if options.strict:
        saved.check_used(path=path)
    ranks = {"rank": coordinator.rank, "world_size": coordinator.world_size}
    return match_state(state, saved, cast=options.cast, **ranks)


def _read(
    reads: Reads,
    opened: _Opened,
    *,
    past_cache: float,
    sharing: Sharing | None,
    progress: Callable[[int], None],
    work: Stopwatch,
) -> int:
    """Fill the tensors. Returns the number of bytes that this rank read from the storage."""
    with work.phase("read"), contextlib.closing(sharing) if sharing else nullcontext():
        return read_all(*opened, reads, past_cache=past_cache, progress=progress, sharing=sharing)


def _place(matched: MatchedState, work: Stopwatch) -> None:
    """Put values, modules and optimizers back into the state."""
    with work.phase("place"):
        matched.place()


def _finish(
    coordinator: Coordinator, placed: Attempt[None], work: Stopwatch
) -> dict[int, dict[str, float]]:
    """End the load on all ranks.

    Returns:
        The seconds of work by rank and phase. Rank 0 gets those of all ranks, other ranks only
        their own.
    """
    profile: dict[int, dict[str, float]] = {coordinator.rank: work.seconds}

    def report() -> bytes:
        # The error of the rank that failed first has the reason. It must not be hidden by those of
        # the ranks that lost its blocks.
        if isinstance(placed.error, TransferError):
            return msgspec.msgpack.encode(str(placed.error))
        placed.get()
        return msgspec.msgpack.encode(work.seconds)

    def gather(payloads: list[bytes]) -> bytes:
        decode = msgspec.msgpack.Decoder(dict[str, float] | str).decode
        results = dict(enumerate(map(decode, payloads)))
        broken = {rank: result for rank, result in results.items() if isinstance(result, str)}
        if broken:
            raise RankFailedError(
                "The ranks could not send each other the blocks of the checkpoint",
                rank=tuple(broken),
                actual="; ".join(text for text in dict.fromkeys(broken.values()) if text),
                remedy="look at the logs of these ranks, and at the network between them; "
                "create the state again before you continue: it may be partly overwritten",
            )
        profile.update({rank: s for rank, s in results.items() if s and not isinstance(s, str)})
        return b""

    exchange(coordinator, "read", report, gather)
    return profile


def _differences(matched: MatchedState) -> dict[str, Any]:
    """Return the fields of a LoadReport that list differences of state and checkpoint."""
    mismatches = matched.mismatches
    return {
        "missing": tuple(mismatches.missing),
        "unexpected": tuple(mismatches.unexpected),
        "wrong_shape": tuple(mismatches.wrong_shape),
        "wrong_dtype": tuple(mismatches.wrong_dtype),
        "cast": tuple(matched.cast),
        "kept": tuple(matched.kept),
    }
