"""Load a source of any format into a state: each rank reads the boxes that it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import Attempt, attempt, exchange
from shardckpt.loading.agreement import same_checkpoint
from shardckpt.maintenance.rewritable import Source
from shardckpt.reports import LoadReport, Stopwatch
from shardckpt.state.matching import MatchedState, match_state
from shardckpt.state.mismatches import Mismatches, check_unused
from shardckpt.state.saved_tree import SavedState

__all__ = ["load_source"]


def load_source(
    state: Any,
    path: str,
    source: Attempt[Source],
    ranks: Coordinator,
    *,
    strict: bool,
    cast: bool,
    excuse: Callable[[Mismatches], None] = lambda mismatches: None,
) -> LoadReport:
    """Load into a state, in place, as `shardckpt.load` does. Collective.

    Args:
        state: The state.
        path: The path of the source, for errors.
        source: The open source, or the error of this rank that opening raised.
        ranks: The ranks that load.
        strict: Require that state and source agree.
        cast: Saved dtypes may be converted.
        excuse: Removes acceptable mismatches from those that fail a strict load.

    Returns:
        The differences between state and source. `bytes_read` are the bytes of the filled boxes.

    Raises:
        ShardckptError: See `shardckpt.load`.
    """
    watch = Stopwatch()

    def match(opened: Source) -> MatchedState:
        found = match_state(
            state,
            SavedState(opened.manifest),
            rank=ranks.rank,
            world_size=ranks.world_size,
            cast=cast,
        )
        excuse(found.strict_mismatches)
        return found

    with watch.phase("plan"):
        matched = source.then(match)
        _agree(ranks, path, source, matched, strict=strict)
    with watch.phase("read"):
        read = attempt(_read, source.get(), matched.get(), ranks)
        placed = read.then(lambda size_bytes: matched.get().place())
        exchange(ranks, "read", lambda: _nothing(placed.get()), lambda payloads: b"")
    mismatches, manifest = matched.get().mismatches, source.get().manifest
    return LoadReport(
        path=path,
        checkpoint_id=manifest.checkpoint_id,
        saved_world_size=manifest.world_size,
        bytes_read=read.get(),
        seconds=watch.seconds,
        missing=tuple(mismatches.missing),
        unexpected=tuple(mismatches.unexpected),
        wrong_shape=tuple(mismatches.wrong_shape),
        wrong_dtype=tuple(mismatches.wrong_dtype),
        cast=tuple(matched.get().cast),
        kept=tuple(matched.get().kept),
    )


def _agree(
    ranks: Coordinator,
    path: str,
    source: Attempt[Source],
    matched: Attempt[MatchedState],
    *,
    strict: bool,
) -> None:
    """Agree that all ranks opened one source, and that it fits, before any rank changes its state.
    Collective."""

    def report() -> bytes:
        refused = matched.get().strict_mismatches if strict else Mismatches()
        error = refused.error(path)
        if error is not None and not (ranks.world_size > 1 and refused.only_unexpected):
            raise error
        return msgspec.msgpack.encode((source.get().manifest.checkpoint_id, refused.unexpected))

    def decide(payloads: list[bytes]) -> bytes:
        decode = msgspec.msgpack.Decoder(tuple[str, list[str]]).decode
        ids, unused = zip(*map(decode, payloads), strict=True)
        check_unused(list(unused), path)
        return same_checkpoint(path)([checkpoint_id.encode() for checkpoint_id in ids])

    exchange(ranks, "open", report, decide)


def _read(source: Source, matched: MatchedState, ranks: Coordinator) -> int:
    """Fill the boxes. Returns their bytes."""
    names = {id(entry): name for name, entry in source.manifest.tensors.items()}
    done_bytes = 0
    with torch.no_grad():
        for entry, chunk in matched.reads:
            box = source.read_box(names[id(entry)], chunk.offsets, chunk.sizes)
            chunk.data.detach().copy_(box)
            done_bytes += box.nbytes
            ranks.progress(done_bytes)
    return done_bytes


def _nothing(placed: Any) -> bytes:
    """Return the message of a rank that has filled its state."""
    return b""
