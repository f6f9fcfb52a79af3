"""The checkpoints of one job: saved by step, pruned by policies, restored by age or by metric."""

from shardckpt.manager.manager import CheckpointManager, Restored
from shardckpt.manager.retention import (
    KeepBest,
    KeepEveryHours,
    KeepEverySteps,
    KeepLast,
    Retention,
    SavedCheckpoint,
)

__all__ = [
    "CheckpointManager",
    "KeepBest",
    "KeepEveryHours",
    "KeepEverySteps",
    "KeepLast",
    "Restored",
    "Retention",
    "SavedCheckpoint",
]
