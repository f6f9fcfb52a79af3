"""DCP planners that send packed columns instead of plan items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan

from shardckpt.errors import ShardckptError, StateError
from shardckpt.plan.consistency import explain_difference
from shardckpt.plan.local_plan import LocalPlan, local_plan
from shardckpt.plan.save_plan import GlobalPlan, RankWrites, global_plan
from shardckpt.state.flatten import flatten
from shardckpt.state.matching import Matcher
from shardckpt.state.saved_tree import SavedState

__all__ = ["ReshardLoadPlanner", "ShardMetadata", "ShardSavePlanner", "ShardStorageMeta"]


class ShardStorageMeta(StorageMeta):
    """How ShardWriter makes itself known to planners."""


@dataclass
class ShardMetadata(Metadata):
    """The metadata of one of shardckpt's checkpoints, with the saved state itself."""

    saved: SavedState | None = None


def _needs(planner: object, partner: str) -> ShardckptError:
    return StateError(
        f"{type(planner).__name__} works with shardckpt's own storage alone",
        expected=f"shardckpt.{partner}",
        actual="storage of another kind",
        remedy=f"pass a shardckpt.{partner}, or one of DCP's default planners",
    )


class ShardSavePlanner(DefaultSavePlanner):
    """Plans a dcp.save as shardckpt.save does: divided by bytes, checked, int keys kept.

    For ShardWriter. Takes what DefaultSavePlanner takes; ranks whose keys, shapes or values
    differ get RankMismatchError or ReplicaMismatchError (inside DCP's CheckpointException).
    """

    local: LocalPlan
    writes: RankWrites
    global_writes: GlobalPlan

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
        payloads = [plan.planner_data for plan in all_plans]
        explain_difference(payloads)
        self.global_writes = global_plan([LocalPlan.unpack(payload) for payload in payloads])
        plans = [SavePlan([], planner_data=share) for share in self.global_writes.shares]
        return plans, Metadata(state_dict_metadata={})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Take what this rank writes."""
        self.writes = RankWrites.of(self.local, new_plan.planner_data)
        return new_plan


class ReshardLoadPlanner(DefaultLoadPlanner):
    """Plans a dcp.load as shardckpt.load does: strict shapes and dtypes, every mismatch listed.

    For ShardReader. `allow_partial_load` loads what is there; `cast` converts dtypes.
    """

    matcher: Matcher

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
        initialised = dist.is_initialized()
        self.matcher = Matcher(
            state_dict,
            metadata.saved,
            rank=dist.get_rank() if initialised else 0,
            world_size=dist.get_world_size() if initialised else 1,
            cast=self.may_cast,
        )

    def create_local_plan(self) -> LoadPlan:
        """Match the state against the saved one; the reads stay with this planner."""
        with torch.no_grad():
            self.finish_load = self.matcher.match(self.original_state_dict)
        self.matcher.settle()
        error = None if self.allow_partial_load else self.matcher.strict_part().error("")
        if error is not None:
            raise error
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to agree on."""
        return global_plan

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """Nothing to change."""
        return new_plan
