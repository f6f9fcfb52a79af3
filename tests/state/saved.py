"""Saved states in memory, for tests of modules that read them."""

from __future__ import annotations

from typing import Any

import shardckpt
from shardckpt.format.manifest import from_bytes
from shardckpt.loading.memory_checkpoint import StateStorage
from shardckpt.loading.shard_reader import read_all
from shardckpt.plan.read_plan import plan_reads
from shardckpt.state.match_context import MatchContext
from shardckpt.state.saved_tree import SavedState


class Saved:
    """The state of a checkpoint, and what fills tensors from it."""

    def __init__(self, state: Any, path: Any = None, **options: Any) -> None:
        if path is None:
            self.files: Any = StateStorage(state).open("memory")
        else:  # markers need a checkpoint on disk
            shardckpt.save(state, path)
            self.files = shardckpt.open_checkpoint(path).files
        self.manifest = from_bytes(self.files.manifest(), path="memory")
        self.tree = SavedState(self.manifest, **options)

    def context(self, state: Any = None, *, cast: bool = False, ranks: int = 1) -> MatchContext:
        return MatchContext(state, self.tree, rank=0, world_size=ranks, cast=cast)

    def read(self, reads: Any) -> None:
        read_all(self.files, self.manifest, plan_reads(reads))
