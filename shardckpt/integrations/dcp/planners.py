"""DCP planners that send packed columns instead of plan items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan

from shardckpt.errors import ShardckptError, StateError
from shardckpt.plan.local_plan import LocalPlan, filled, local_plan
from shardckpt.plan.save_plan import GlobalPlan, RankWrites, global_plan
from shardckpt.plan.state_merge import merge
from shardckpt.state.flatten import flatten
from shardckpt.state.matching import MatchedState, match_state
from shardckpt.state.mismatches import Mismatches, check_untaken
from shardckpt.state.saved_tree import SavedState

__all__ = ["ReshardLoadPlanner", "ShardMetadata", "ShardSavePlanner", "ShardStorageMeta"]


class ShardStorageMeta(StorageMeta):
    """How ShardWriter makes itself known to planners."""


@dataclass
class ShardMetadata(Metadata):
    """The metadata of one of shardckpt's checkpoints, with the saved state itself."""

    saved: SavedState | None = None
    cast: bool = False


def _needs(planner: object, partner: str) -> ShardckptError:
    return StateError(
        f"{type(planner).__name__} works with shardckpt's own storage alone",
        expected=f"shardckpt.{partner}",
        actual="storage of another kind",
        remedy=f"pass a shardckpt.{partner}, or one of DCP's default planners",
    )


class ShardSavePlanner(DefaultSavePlanner):
    """Plans a dcp.save as shardckpt.save does: divided by bytes, checked, int keys kept.

    For ShardWriter. DefaultSavePlanner's options have no use here, and are refused. Ranks whose
    keys, shapes or values differ as shardckpt.save does not take them get RankMismatchError or
    ReplicaMismatchError (inside DCP's CheckpointException).
    """

    local: LocalPlan
    writes: RankWrites
    global_writes: GlobalPlan
    tree: bytes
    merging: bool  # the ranks don't hold the same

    def __init__(self, **options: Any) -> None:
        if options:
            raise StateError(
                "ShardSavePlanner takes no options",
                actual=", ".join(options),
                remedy="leave them out: names are always flat, replicas are divided among their "
                "ranks by bytes, and plans that don't change are not made again",
            )
        super().__init__()

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state; see SavePlanner."""
        if not isinstance(storage_meta, ShardStorageMeta):
            raise _needs(self, "ShardWriter")
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """This rank's chunks, packed."""
        rank, world_size = 0, 1
        if dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        self.local = local_plan(flatten(self.state_dict, rank=rank), world_size=world_size)
        return SavePlan([], planner_data=self.local.pack(whole=True))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Who writes what, on the coordinator."""
        locals_ = [LocalPlan.unpack(plan.planner_data) for plan in all_plans]
        merged = merge([local.offer(whole=True) for local in locals_])
        self.tree = filled(merged.tree, self.local.rank0_trees)
        self.global_writes = global_plan(locals_, merged.common)
        merging = len(set(merged.common)) > 1
        plans = [SavePlan([], planner_data=(s, merging)) for s in self.global_writes.shares]
        return plans, Metadata(state_dict_metadata={})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Take what this rank writes."""
        share, self.merging = new_plan.planner_data
        self.writes = RankWrites.of(self.local, share)
        return new_plan


class ReshardLoadPlanner(DefaultLoadPlanner):
    """Plans a dcp.load as shardckpt.load does: strict shapes and dtypes, every mismatch listed.

    For ShardReader. `allow_partial_load` loads what is there; `cast` converts dtypes.
    """

    matched: MatchedState

    def __init__(self, *, allow_partial_load: bool = False, cast: bool = False) -> None:
        super().__init__(allow_partial_load=allow_partial_load)
        self.may_cast = cast

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state; see LoadPlanner."""
        if not isinstance(metadata, ShardMetadata) or metadata.saved is None:
            raise _needs(self, "ShardReader")
        self.original_state_dict = state_dict
        self._saved = metadata.saved
        self._cast = self.may_cast or metadata.cast

    def create_local_plan(self) -> LoadPlan:
        """Match the state against the saved one; the reads stay with this planner."""
        initialised = dist.is_initialized()
        self.matched = match_state(
            self.original_state_dict,
            self._saved,
            rank=dist.get_rank() if initialised else 0,
            world_size=dist.get_world_size() if initialised else 1,
            cast=self._cast,
        )
        refused = Mismatches() if self.allow_partial_load else self.matched.strict_mismatches
        error = refused.error("")
        if error is not None and not refused.only_unexpected:
            raise error
        return LoadPlan([], planner_data=refused.unexpected)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """See that some rank takes whatever modules and optimizers should take."""
        check_untaken([plan.planner_data for plan in global_plan], "")
        return global_plan

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """Nothing to change."""
        return new_plan
