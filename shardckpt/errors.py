"""Every exception that shardckpt raises.

    ShardckptError(Exception)
    ├── StateError(ValueError)             what was handed to save or load
    │   ├── UnsupportedLeafError(TypeError)    a leaf that no checkpoint can hold
    │   ├── PartialPlacementError              a DTensor that still awaits its reduction
    │   ├── OptimizerModuleError               an optimizer without its module
    │   ├── OptionError                        an option that does not exist or a bad value
    │   ├── RankMismatchError                  ranks hand over different keys or shapes
    │   ├── ReplicaMismatchError               replicas of one entry differ in value
    │   └── CoverageError                      chunks that overlap or leave a hole
    ├── LoadMismatchError(ValueError)      missing, unexpected, wrong shape, wrong dtype
    ├── CheckpointError(ValueError)        what was found at the path
    │   ├── CheckpointNotFoundError(FileNotFoundError)
    │   ├── NotACheckpointError                a directory or file of another kind
    │   ├── FormatVersionError                 written by a newer shardckpt
    │   └── CorruptionError                    damaged, cut or hostile
    ├── StorageError(OSError)              the file system said no
    │   ├── CheckpointExistsError(FileExistsError)
    │   ├── CheckpointBusyError(BlockingIOError)   another save to this path is under way
    │   ├── StoragePermissionError(PermissionError)
    │   ├── NoSpaceError
    │   └── StalledError(TimeoutError)         a read or write that does not come back
    ├── CoordinationError(RuntimeError)    other ranks
    │   ├── RankFailedError                    ranks that raised, died or fell silent
    │   └── DirectoryNotSharedError            ranks that see another directory
    └── DependencyError(ImportError)       an extra that is not installed

The command line exits with one code a family: `exit_code` of the class.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "CheckpointBusyError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "CoordinationError",
    "CorruptionError",
    "CoverageError",
    "DependencyError",
    "DirectoryNotSharedError",
    "FormatVersionError",
    "LoadMismatchError",
    "NoSpaceError",
    "NotACheckpointError",
    "OptimizerModuleError",
    "OptionError",
    "PartialPlacementError",
    "RankFailedError",
    "RankMismatchError",
    "ReplicaMismatchError",
    "ShardckptError",
    "StalledError",
    "StateError",
    "StorageError",
    "StoragePermissionError",
    "UnsupportedLeafError",
]


class ShardckptError(Exception):
    """Base of all: a message, and the facts that a program may want to read.

    `path` is the file or directory, `rank` the rank (or ranks) at fault, `tensor`
    the name of the entry, `expected` and `actual` what should have been there and
    what was, `remedy` what to do about it. Absent facts are None.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        rank: int | tuple[int, ...] | None = None,
        tensor: str | None = None,
        expected: object = None,
        actual: object = None,
        remedy: str | None = None,
        **facts: Any,
    ) -> None:
        self.message = message
        self.path = None if path is None else str(path)
        self.rank = rank
        self.tensor = tensor
        self.expected = expected
        self.actual = actual
        self.remedy = remedy
        self.facts = facts
        self.__dict__.update(facts)
        Exception.__init__(self, message)

    def __str__(self) -> str:
        facts = {
            "path": self.path,
            "rank": self.rank,
            "tensor": self.tensor,
            "expected": self.expected,
            "found": self.actual,
            **self.facts,
            "remedy": self.remedy,
        }
        lines = [f"  {name}: {fact}" for name, fact in facts.items() if fact is not None]
        return "\n".join([self.message, *lines])

    def __reduce__(self) -> tuple[Any, ...]:
        facts = {
            name: getattr(self, name)
            for name in ("path", "rank", "tensor", "expected", "actual", "remedy")
        }
        return _rebuild, (type(self), self.message, {**facts, **self.facts}, self.__dict__)


def _rebuild(
    cls: type[ShardckptError], message: str, facts: dict[str, Any], attributes: dict[str, Any]
) -> ShardckptError:
    error = cls(message, **facts)
    error.__dict__.update(attributes)
    return error


class StateError(ShardckptError, ValueError):
    """What was handed to save or load can't be saved or loaded as it is."""

    exit_code = 3


class UnsupportedLeafError(StateError, TypeError):
    """A leaf of the state is of a type or dtype that a checkpoint can't hold."""


class PartialPlacementError(StateError):
    """A DTensor holds partial sums; reduce it before saving."""


class OptimizerModuleError(StateError):
    """An optimizer whose parameters belong to no module in the same state."""


class OptionError(StateError):
    """An option, or an environment variable of one, that does not exist or has a bad value."""


class RankMismatchError(StateError):
    """The ranks handed over states with different keys, dtypes or shapes."""


class ReplicaMismatchError(StateError):
    """Ranks that should hold the same value hold different ones."""


class CoverageError(StateError):
    """The chunks of a tensor overlap, or leave a part of it uncovered."""


class LoadMismatchError(ShardckptError, ValueError):
    """What was asked for and what was saved don't agree; lists every entry.

    `missing`, `unexpected`, `wrong_shape` and `wrong_dtype` are tuples of names
    (for the last two, of (name, expected, found)), or None if there are none.
    """

    missing: tuple[str, ...] | None = None
    unexpected: tuple[str, ...] | None = None
    wrong_shape: tuple[tuple[str, Any, Any], ...] | None = None
    wrong_dtype: tuple[tuple[str, Any, Any], ...] | None = None

    exit_code = 4


class CheckpointError(ShardckptError, ValueError):
    """What was found at the path is no checkpoint that can be read."""

    exit_code = 5


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """Nothing at this path."""


class NotACheckpointError(CheckpointError):
    """Something is at this path, but no shardckpt checkpoint."""


class FormatVersionError(CheckpointError):
    """The checkpoint was written in a format version that this shardckpt does not know."""


class CorruptionError(CheckpointError):
    """A shard or manifest is missing, cut, changed, or breaks a rule of the format."""

    exit_code = 6


class StorageError(ShardckptError, OSError):
    """The file system refused an operation; `errno` says why."""

    exit_code = 7

    def __init__(self, message: str, *, errno: int | None = None, **facts: Any) -> None:
        ShardckptError.__init__(self, message, **facts)
        self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        build, (cls, message, facts, attributes) = super().__reduce__()
        return build, (cls, message, {**facts, "errno": self.errno}, attributes)


class CheckpointExistsError(StorageError, FileExistsError):
    """The path is taken, and overwrite was not asked for."""


class CheckpointBusyError(StorageError, BlockingIOError):
    """Another save to this path is under way."""


class StoragePermissionError(StorageError, PermissionError):
    """No permission to read or write here."""


class NoSpaceError(StorageError):
    """The disk or the quota is full."""


class StalledError(StorageError, TimeoutError):
    """A read or write has not come back within its deadline (SHARDCKPT_STALL_DEADLINE_S)."""


class CoordinationError(ShardckptError, RuntimeError):
    """Something went wrong between ranks."""

    exit_code = 8


class RankFailedError(CoordinationError):
    """Ranks raised, died or fell silent; `rank` names them, `phase` says when."""


class DirectoryNotSharedError(CoordinationError):
    """Some ranks don't see the directory that rank 0 made."""


class DependencyError(ShardckptError, ImportError):
    """An optional dependency is not installed; `remedy` names the extra."""

    exit_code = 9
