"""Distributed, sharded checkpoints for PyTorch. Every rank saves its shard; any number loads."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shardckpt._version import __version__
from shardckpt.errors import (
    CheckpointBusyError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CoordinationError,
    CorruptionError,
    CoverageError,
    DependencyError,
    DirectoryNotSharedError,
    FormatVersionError,
    LoadMismatchError,
    NoSpaceError,
    NotACheckpointError,
    OptimizerModuleError,
    OptionError,
    PartialPlacementError,
    RankFailedError,
    RankMismatchError,
    ReplicaMismatchError,
    ShardckptError,
    ShardMismatchError,
    StalledError,
    StateError,
    StorageError,
    StoragePermissionError,
    StoreUnavailableError,
    UnsupportedLeafError,
)

if TYPE_CHECKING:
    from shardckpt.analysis.diff import diff
    from shardckpt.analysis.merge import merge
    from shardckpt.analysis.page import write_report
    from shardckpt.analysis.stats import stats
    from shardckpt.api import (
        async_save,
        load,
        load_state,
        metadata,
        open_checkpoint,
        rescue,
        reshard,
        save,
        verify,
    )
    from shardckpt.checkpoint import Checkpoint, SavedTensor
    from shardckpt.config import options
    from shardckpt.convert.convert import convert
    from shardckpt.coordination.process_group import init_from_mpi
    from shardckpt.coordination.resolve import alone
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
        Restored,
        SavedCheckpoint,
    )
    from shardckpt.nn_handler import NNHandler
    from shardckpt.nn_handler.trust import trust
    from shardckpt.reports import (
        CheckpointMetadata,
        ConvertReport,
        DiffReport,
        LoadReport,
        RescueReport,
        SaveReport,
        TensorDifference,
        TensorMetadata,
        TensorStats,
        VerifyReport,
    )
    from shardckpt.saving.async_save import SaveHandle
    from shardckpt.state.markers import FromRank0, PerRank, Union
    from shardckpt.state.sharded_array import ShardedArray
    from shardckpt.storage.base import Storage
    from shardckpt.storage.local import LocalStorage
    from shardckpt.storage.memory import MemoryStorage
    from shardckpt.storage.resolve import register_storage
    from shardckpt.storage.tiers import TieredStorage

__all__ = [
    "Checkpoint",
    "CheckpointBusyError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointManager",
    "CheckpointMetadata",
    "CheckpointNotFoundError",
    "ConvertReport",
    "CoordinationError",
    "CorruptionError",
    "CoverageError",
    "DependencyError",
    "DiffReport",
    "DirectoryNotSharedError",
    "FormatVersionError",
    "FromRank0",
    "KeepBest",
    "KeepEveryHours",
    "KeepEverySteps",
    "KeepLast",
    "LoadMismatchError",
    "LoadReport",
    "LocalStorage",
    "MemoryStorage",
    "NNHandler",
    "NoSpaceError",
    "NotACheckpointError",
    "OptimizerModuleError",
    "OptionError",
    "PartialPlacementError",
    "PerRank",
    "RankFailedError",
    "RankMismatchError",
    "ReplicaMismatchError",
    "RescueReport",
    "ReshardLoadPlanner",
    "Restored",
    "SaveHandle",
    "SaveReport",
    "SavedCheckpoint",
    "SavedTensor",
    "ShardMismatchError",
    "ShardReader",
    "ShardSavePlanner",
    "ShardWriter",
    "ShardckptError",
    "ShardedArray",
    "StalledError",
    "StateError",
    "Storage",
    "StorageError",
    "StoragePermissionError",
    "StoreUnavailableError",
    "TensorDifference",
    "TensorMetadata",
    "TensorStats",
    "TieredStorage",
    "Union",
    "UnsupportedLeafError",
    "VerifyReport",
    "__version__",
    "alone",
    "async_save",
    "convert",
    "diff",
    "init_from_mpi",
    "load",
    "load_state",
    "merge",
    "metadata",
    "open_checkpoint",
    "options",
    "register_storage",
    "rescue",
    "reshard",
    "save",
    "stats",
    "trust",
    "verify",
    "write_report",
]

# Import the package `convert` now: a later import of it would hide the function of the same name.
importlib.import_module(f"{__name__}.convert")
del globals()["convert"]

# Name -> module. Imported at first use, since the import of DTensor alone takes half a second.
_HOMES = {
    "Checkpoint": "checkpoint",
    "CheckpointManager": "manager",
    "CheckpointMetadata": "reports",
    "ConvertReport": "reports",
    "DiffReport": "reports",
    "FromRank0": "state.markers",
    "KeepBest": "manager",
    "KeepEveryHours": "manager",
    "KeepEverySteps": "manager",
    "KeepLast": "manager",
    "LoadReport": "reports",
    "LocalStorage": "storage.local",
    "MemoryStorage": "storage.memory",
    "NNHandler": "nn_handler",
    "PerRank": "state.markers",
    "RescueReport": "reports",
    "ReshardLoadPlanner": "integrations.dcp",
    "Restored": "manager",
    "SaveHandle": "saving.async_save",
    "SaveReport": "reports",
    "SavedCheckpoint": "manager",
    "SavedTensor": "checkpoint",
    "ShardReader": "integrations.dcp",
    "ShardSavePlanner": "integrations.dcp",
    "ShardWriter": "integrations.dcp",
    "ShardedArray": "state.sharded_array",
    "Storage": "storage.base",
    "TensorDifference": "reports",
    "TensorMetadata": "reports",
    "TensorStats": "reports",
    "TieredStorage": "storage.tiers",
    "Union": "state.markers",
    "VerifyReport": "reports",
    "alone": "coordination.resolve",
    "async_save": "api",
    "convert": "convert.convert",
    "diff": "analysis.diff",
    "init_from_mpi": "coordination.process_group",
    "load": "api",
    "load_state": "api",
    "merge": "analysis.merge",
    "metadata": "api",
    "open_checkpoint": "api",
    "options": "config",
    "register_storage": "storage.resolve",
    "rescue": "api",
    "reshard": "api",
    "save": "api",
    "stats": "analysis.stats",
    "trust": "nn_handler.trust",
    "verify": "api",
    "write_report": "analysis.page",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(__all__) | set(globals()))
