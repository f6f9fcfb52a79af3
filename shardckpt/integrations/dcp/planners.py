"""DCP planners that exchange packed tables of chunks in place of plan items."""

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
from shardckpt.plan.state_merge import merge_states
from shardckpt.state.flatten import flatten
from shardckpt.state.matching import DtypePolicy, MatchedState, casts, match_state
from shardckpt.state.mismatches import Mismatches, check_unused
from shardckpt.state.saved_tree import SavedState

__all__ = [
    "ReshardLoadPlanner",
    "ShardMetadata",
    "ShardSavePlanner",
    "ShardStorageMeta",
    "UnreadableMetadata",
]


class ShardStorageMeta(StorageMeta):
    """The storage metadata by which planners recognize ShardWriter."""

    rank: int | None = None  # in the group that saves; DCP tells it to the writer only


@dataclass
class ShardMetadata(Metadata):
    """The metadata of a checkpoint of shardckpt, with its saved state."""

    saved: SavedState | None = None
    cast: bool = False


class UnreadableMetadata(ShardMetadata):
    """Metadata that could not be read. Each attribute raises the error."""

    def __init__(self, error: ShardckptError) -> None:
        self._error = error

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattribute__(name)
        raise self._error


def _needs(planner: object, partner: str) -> ShardckptError:
    return StateError(
        f"{type(planner).__name__} needs shardckpt's own storage",
        expected=f"shardckpt.{partner}",
        actual="another storage",
        remedy=f"pass a shardckpt.{partner}, or one of DCP's default planners",
    )


class ShardSavePlanner(DefaultSavePlanner):
    """Plans a dcp.save to a ShardWriter as shardckpt.save does.

    It divides replicas by bytes, checks the states of the ranks against each other, and keeps int
    keys. States that differ between ranks raise RankMismatchError or ReplicaMismatchError inside
    DCP's CheckpointException. Collective, as a part of dcp.save.

    Args:
        **options: None are accepted; the options of DefaultSavePlanner do not apply.

    Raises:
        StateError: An option was passed.

    Example:
        >>> import torch, shardckpt
        >>> planner = shardckpt.ShardSavePlanner()
        >>> report = shardckpt.save({"weight": torch.ones(3)}, "run/step-1", planner=planner)
        >>> report.world_size
        1
    """

    local: LocalPlan
    writes: RankWrites
    global_writes: GlobalPlan
    tree: bytes
    merging: bool  # whether the ranks hold different entries

    def __init__(self, **options: Any) -> None:
        if options:
            raise StateError(
                "ShardSavePlanner takes no options",
                actual=", ".join(options),
                remedy="leave them out: names are always flat, replicas are divided by bytes, and "
                "unchanged plans are reused",
            )
        super().__init__()

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """See SavePlanner.set_up_planner."""
        if not isinstance(storage_meta, ShardStorageMeta):
            raise _needs(self, "ShardWriter")
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator
        self._meta = storage_meta

    def create_local_plan(self) -> SavePlan:
        """See SavePlanner.create_local_plan. The plan has the chunks of this rank, packed."""
        rank, world_size = 0, 1
        if dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        if self._meta.rank is not None:
            rank = self._meta.rank
        self.local = local_plan(flatten(self.state_dict, rank=rank), world_size=world_size)
        return SavePlan([], planner_data=self.local.pack(complete=True))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """See SavePlanner.create_global_plan."""
        locals_ = LocalPlan.unpack_all([plan.planner_data for plan in all_plans])
        merged = merge_states([local.offer(tensors=True) for local in locals_])
        self.tree = filled(merged.tree, self.local.rank0_trees)
        self.global_writes = global_plan(locals_, merged.common)
        merging = len(set(merged.common)) > 1
        plans = [SavePlan([], planner_data=(s, merging)) for s in self.global_writes.shares]
        return plans, Metadata(state_dict_metadata={})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """See SavePlanner.finish_plan."""
        share, self.merging = new_plan.planner_data
        self.writes = RankWrites.of(self.local, share)
        return new_plan


class ReshardLoadPlanner(DefaultLoadPlanner):
    """Plans a dcp.load from a ShardReader as shardckpt.load does.

    Shapes and dtypes must match, and one LoadMismatchError lists every mismatch. Collective, as a
    part of dcp.load.

    Args:
        allow_partial_load: Skip mismatched entries, as strict=False of `shardckpt.load` does.
        dtype: "strict", or "cast" to convert saved dtypes to those of the state.

    Example:
        >>> import torch, shardckpt
        >>> import torch.distributed.checkpoint as dcp
        >>> _ = shardckpt.save({"weight": torch.ones(3)}, "run/step-1")
        >>> state = {"weight": torch.zeros(3, dtype=torch.float16)}
        >>> dcp.load(
        ...     state,
        ...     storage_reader=shardckpt.ShardReader("run/step-1"),
        ...     planner=shardckpt.ReshardLoadPlanner(dtype="cast"),
        ... )
        >>> state["weight"]
        tensor([1., 1., 1.], dtype=torch.float16)
    """

    matched: MatchedState

    def __init__(self, *, allow_partial_load: bool = False, dtype: DtypePolicy = "strict") -> None:
        super().__init__(allow_partial_load=allow_partial_load)
        self.may_cast = casts(dtype)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """See LoadPlanner.set_up_planner."""
        if not isinstance(metadata, ShardMetadata) or metadata.saved is None:
            raise _needs(self, "ShardReader")
        self.original_state_dict = state_dict
        self._saved = metadata.saved
        self._cast = self.may_cast or metadata.cast

    def create_local_plan(self) -> LoadPlan:
        """See LoadPlanner.create_local_plan. This planner keeps the reads."""
        initialized = dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)
        self._match(rank, world_size)
        refused = Mismatches() if self.allow_partial_load else self.matched.strict_mismatches
        error = refused.error("")
        if error is not None and not refused.only_unexpected:
            raise error
        return LoadPlan([], planner_data=refused.unexpected)

    def _match(self, rank: int, world_size: int) -> None:
        self._matched_for = rank, world_size
        self.matched = match_state(
            self.original_state_dict,
            self._saved,
            rank=rank,
            world_size=world_size,
            cast=self._cast,
        )

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """See LoadPlanner.create_global_plan. Checks that every entry of a module is loaded."""
        check_unused([plan.planner_data for plan in global_plan], "")
        world_size = len(global_plan)
        return [LoadPlan([], planner_data=(rank, world_size)) for rank in range(world_size)]

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """See LoadPlanner.finish_plan. A part of the ranks may load, by `process_group` or
        `no_dist`. Only the plan shows which of them this one is."""
        if new_plan.planner_data != self._matched_for:
            self._match(*new_plan.planner_data)
        return new_plan
