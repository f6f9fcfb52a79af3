"""Distributed, sharded checkpoints for PyTorch: saved by every rank, loaded by any number."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shardckpt._version import __version__

if TYPE_CHECKING:
    from shardckpt.api import async_save, load, load_state, open_checkpoint, save
    from shardckpt.checkpoint import Checkpoint
    from shardckpt.coordination.process_group import init_from_mpi
    from shardckpt.errors import ShardckptError
    from shardckpt.integrations.dcp import (
        ReshardLoadPlanner,
        ShardReader,
        ShardSavePlanner,
        ShardWriter,
    )
    from shardckpt.manager import (
        CheckpointManager,
        KeepBest,
        KeepEveryHours,
        KeepEverySteps,
        KeepLast,
    )
    from shardckpt.nn_handler import NNHandler
    from shardckpt.reports import LoadReport, SaveReport
    from shardckpt.state.flatten import PerRank
    from shardckpt.state.sharded_array import ShardedArray

__all__ = [
    "Checkpoint",
    "CheckpointManager",
    "KeepBest",
    "KeepEveryHours",
    "KeepEverySteps",
    "KeepLast",
    "LoadReport",
    "NNHandler",
    "PerRank",
    "ReshardLoadPlanner",
    "SaveReport",
    "ShardReader",
    "ShardSavePlanner",
    "ShardWriter",
    "ShardckptError",
    "ShardedArray",
    "__version__",
    "async_save",
    "init_from_mpi",
    "load",
    "load_state",
    "open_checkpoint",
    "save",
]

# Imported when first used: DTensor alone costs half a second.
_HOMES = {
    "Checkpoint": "checkpoint",
    "CheckpointManager": "manager",
    "KeepBest": "manager",
    "KeepEveryHours": "manager",
    "KeepEverySteps": "manager",
    "KeepLast": "manager",
    "LoadReport": "reports",
    "NNHandler": "nn_handler",
    "PerRank": "state.flatten",
    "ReshardLoadPlanner": "integrations.dcp",
    "SaveReport": "reports",
    "ShardReader": "integrations.dcp",
    "ShardSavePlanner": "integrations.dcp",
    "ShardWriter": "integrations.dcp",
    "ShardckptError": "errors",
    "ShardedArray": "state.sharded_array",
    "async_save": "api",
    "init_from_mpi": "coordination.process_group",
    "load": "api",
    "load_state": "api",
    "open_checkpoint": "api",
    "save": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(__all__) | set(globals()))
