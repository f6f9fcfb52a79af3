"""The stages of a load, from a checkpoint into a state.

    open -> match -> plan -> read -> place

Each stage takes the result of the stage before it. After the match the ranks agree that the
checkpoint fits. No state changes before that. An error on any rank ends the load on all ranks.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import msgspec

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import Attempt, attempt, exchange
from shardckpt.format.entries import Manifest
from shardckpt.io.gc_pause import collector_paused
from shardckpt.loading.agreement import agree_on_reads, open_manifest
from shardckpt.loading.shard_reader import read_all
from shardckpt.logs import logger, reported
from shardckpt.plan.read_plan import plan_reads
from shardckpt.reports import LoadReport, Stopwatch
from shardckpt.state.matching import MatchedState, match_state
from shardckpt.state.saved_tree import Rename, SavedState, Select
from shardckpt.storage.base import CheckpointFiles, Storage
from shardckpt.transforms import Transforms, transformed

__all__ = ["run_load"]

Opened = tuple[CheckpointFiles, Manifest]


@reported("load", lambda state, path, *, coordinator, **_: (path, coordinator.rank))
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
    transforms: Transforms | None,
) -> LoadReport:
    """Load into a state, in place. Collective. See shardckpt.load."""
    watch, work = Stopwatch(), Stopwatch()
    with ExitStack() as closing:
        with watch.phase("plan"):
            with work.phase("open"), collector_paused():
                opened = attempt(open_manifest, storage, path)
            if opened.value is not None:
                closing.callback(opened.value[0].close)
            with work.phase("match"), collector_paused():
                ranks = {"rank": coordinator.rank, "world_size": coordinator.world_size}
                manifest = opened.then(lambda pair: transformed(pair[1], transforms, path=path))
                saved = manifest.then(lambda found: SavedState(found, keys=keys, rename=rename))
                if strict:
                    saved = saved.then(lambda saved: saved.check_used(path=path))
                matched = saved.then(lambda saved: match_state(state, saved, cast=cast, **ranks))
            past_cache = agree_on_reads(coordinator, path, opened, matched, strict=strict)
        with watch.phase("read"):
            read = attempt(_read, opened.get(), matched.get(), past_cache, coordinator, work)
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


def _read(
    opened: Opened,
    matched: MatchedState,
    past_cache: float,
    coordinator: Coordinator,
    work: Stopwatch,
) -> int:
    """Plan the reads and fill the tensors. Returns the number of bytes read."""
    files, manifest = opened
    with work.phase("read"):
        with collector_paused():
            reads = plan_reads(matched.reads)
        return read_all(
            files, manifest, reads, past_cache=past_cache, progress=coordinator.progress
        )


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

    def gather(payloads: list[bytes]) -> bytes:
        decode = msgspec.msgpack.Decoder(dict[str, float]).decode
        profile.update({rank: decode(seconds) for rank, seconds in enumerate(payloads)})
        return b""

    encoded = placed.then(lambda _: msgspec.msgpack.encode(work.seconds))
    exchange(coordinator, "read", encoded.get, gather)
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
