"""A job of any size, as its ranks see it: the state of one rank, and the local plans of all."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardckpt.plan.local_plan import ChunkTable, LocalPlan, local_plan
from shardckpt.state import local_chunks as chunks
from shardckpt.state.flatten import flatten

COLUMNS = 1024


@dataclass(frozen=True, kw_only=True)
class World:
    """`ranks` that hold `tensors` float32 matrices, on a mesh of two dimensions.

    Layouts: "fsdp" shards rows over all ranks; "hsdp" over all ranks of a replica, of which
    there are two; "tp" shards columns over eight ranks, and rows over the rest; "ddp" shards
    nothing. Every shard has `rows` rows.
    """

    ranks: int
    tensors: int
    layout: str = "fsdp"
    rows: int = 4

    @property
    def mesh_shape(self) -> tuple[int, int]:
        """The sizes of the two mesh dimensions."""
        inner = {"fsdp": 1, "hsdp": 2, "tp": min(8, self.ranks), "ddp": self.ranks}[self.layout]
        return self.ranks // inner, inner

    @property
    def replicas(self) -> int:
        """The number of ranks that hold the same chunk."""
        return 1 if self.layout in ("fsdp", "tp") else self.mesh_shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of each tensor."""
        return self.mesh_shape[0] * self.rows, COLUMNS

    def state(self) -> dict[str, object]:
        """The state of the rank that `as_rank` made this process."""
        numbers = torch.arange(self.ranks).reshape(self.mesh_shape)
        mesh = DeviceMesh("cpu", numbers, _init_backend=False, mesh_dim_names=("outer", "inner"))
        return a_state(
            mesh,
            [Shard(0), Shard(1) if self.layout == "tp" else Replicate()],
            shape=self.shape,
            tensors=self.tensors,
        )

    def plans(self, real: LocalPlan) -> list[LocalPlan]:
        """The local plans of all ranks, of which `real` is rank 0's, made by the library."""
        inner = self.mesh_shape[1]
        columns = COLUMNS // inner if self.layout == "tp" else COLUMNS
        plans = []
        for rank in range(self.ranks):
            boxes = np.empty((self.tensors, 2, 2), dtype=np.int64)
            boxes[:, 0, 0] = rank // inner * self.rows
            boxes[:, 0, 1] = rank % inner * columns if self.layout == "tp" else 0
            boxes[:, 1] = self.rows, columns
            table = ChunkTable(tensor=real.chunks.tensor, boxes=boxes)
            plans.append(dataclasses.replace(real, chunks=table, data=()))
        return plans


def a_state(
    mesh: DeviceMesh, placements: list[Placement], *, shape: tuple[int, int], tensors: int
) -> dict[str, object]:
    """A state of DTensors of this rank, without any communication."""
    sizes, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
    layers = {
        f"layers.{index}.weight": DTensor.from_local(
            torch.ones(sizes),
            mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=(COLUMNS, 1),
        )
        for index in range(tensors)
    }
    return {"model": layers, "step": 7}


def loading_state(ranks: int, *, shape: tuple[int, int], tensors: int) -> dict[str, object]:
    """The state of a rank of another job that loads, rows sharded over all ranks."""
    mesh = DeviceMesh("cpu", torch.arange(ranks), _init_backend=False)
    return a_state(mesh, [Shard(0)], shape=shape, tensors=tensors)


def as_rank(rank: int, ranks: int) -> None:
    """Make this process that rank; nothing it sends goes anywhere."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for cached in (chunks._boxes, chunks._runs):  # by mesh, of which a process has its own place
        cached.cache_clear()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)


def plan_of(world: World, rank: int) -> LocalPlan:
    """A rank's local plan as the library makes it."""
    as_rank(rank, world.ranks)
    return local_plan(flatten(world.state(), rank=rank), world_size=world.ranks)


def check(world: World, plans: list[LocalPlan], rank: int) -> None:
    """That what `World.plans` says is what the library says."""
    real = plan_of(world, rank)
    if real.digests() != plans[rank].digests():
        raise AssertionError(f"the plan of rank {rank} is not what the library makes")
