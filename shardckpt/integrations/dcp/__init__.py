"""Planners and storage of shardckpt for torch.distributed.checkpoint (DCP).

    dcp.save(state, storage_writer=ShardWriter(path), planner=ShardSavePlanner())
    dcp.load(state, storage_reader=ShardReader(path), planner=ReshardLoadPlanner())

Other DCP planners work with ShardWriter and ShardReader too. Tested with torch 2.13.
"""

from shardckpt.integrations.dcp.driver import save_with_planner
from shardckpt.integrations.dcp.planners import ReshardLoadPlanner, ShardSavePlanner
from shardckpt.integrations.dcp.reader import ShardReader
from shardckpt.integrations.dcp.writer import ShardWriter

__all__ = [
    "ReshardLoadPlanner",
    "ShardReader",
    "ShardSavePlanner",
    "ShardWriter",
    "save_with_planner",
]
