"""CheckpointManager, which saves, prunes and restores the checkpoints of one job."""

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
