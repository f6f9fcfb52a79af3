"""Load a source of any format into a state: each rank reads the boxes that it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import Attempt, attempt, exchange
from shardckpt.loading.agreement import agree_on_reads
from shardckpt.maintenance.rewritable import Source
from shardckpt.reports import LoadReport, Stopwatch
from shardckpt.state.matching import MatchedState, match_state
from shardckpt.state.mismatches import Mismatches
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
        opened = source.then(lambda found: (None, found.manifest))
        agree_on_reads(ranks, path, opened, matched, strict=strict)  # type: ignore[arg-type]
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
