"""The work of rank 0 of default DCP on the same plans, by DCP's own code."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from simulation.world import World


@dataclass(frozen=True, kw_only=True)
class DcpResult:
    """Seconds of processor time on rank 0, and the bytes that it gets."""

    ranks: int
    tensors: int
    unpickle_s: float
    plan_s: float
    received_bytes: int


def simulate_dcp(world: World) -> DcpResult:
    """Unpickle the plans of all ranks of a "fsdp" world and make the global plan, which DCP
    validates. Neither its pickling of the answers nor its metadata file is counted."""
    properties = TensorProperties(dtype=torch.float32)
    columns = world.shape[1]
    packed = []
    for rank in range(world.ranks):
        offsets, sizes = torch.Size([rank * world.rows, 0]), torch.Size([world.rows, columns])
        items = [
            WriteItem(
                index=MetadataIndex(f"model.layers.{index}.weight", offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                    properties=properties,
                    size=torch.Size(world.shape),
                ),
            )
            for index in range(world.tensors)
        ]
        packed.append(pickle.dumps(SavePlan(items, planner_data={})))
    received = sum(map(len, packed[1:]))
    since = time.process_time()
    plans = [pickle.loads(payload) for payload in packed]
    unpickled = time.process_time()
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, is_coordinator=True)
    planner.create_global_plan(plans)
    return DcpResult(
        ranks=world.ranks,
        tensors=world.tensors,
        unpickle_s=unpickled - since,
        plan_s=time.process_time() - unpickled,
        received_bytes=received,
    )
