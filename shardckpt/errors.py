"""Every exception that shardckpt raises.

    ShardckptError(Exception)
    ├── StateError(ValueError)             invalid state or argument
    │   ├── UnsupportedLeafError(TypeError)    a leaf that a checkpoint can't hold
    │   ├── PartialPlacementError              a DTensor that still holds partial sums
    │   ├── OptimizerModuleError               an optimizer without its module
    │   ├── OptionError                        an unknown option or an invalid value
    │   ├── RankMismatchError                  ranks pass different names, dtypes or shapes
    │   ├── ReplicaMismatchError               replicas of one entry differ in value
    │   └── CoverageError                      chunks that overlap or leave a gap
    ├── LoadMismatchError(ValueError)      state and checkpoint differ in names, shapes or dtypes
    ├── CheckpointError(ValueError)        the checkpoint can't be read
    │   ├── CheckpointNotFoundError(FileNotFoundError)
    │   ├── NotACheckpointError                another file or directory
    │   ├── FormatVersionError                 written by a newer shardckpt
    │   └── CorruptionError                    corrupted, truncated or malicious
    ├── StorageError(OSError)              the file system refused an operation
    │   ├── CheckpointExistsError(FileExistsError)
    │   ├── CheckpointBusyError(BlockingIOError)   another save to this path is running
    │   ├── StoragePermissionError(PermissionError)
    │   ├── NoSpaceError
    │   ├── StoreUnavailableError              an object store that does not answer, or throttles
    │   └── StalledError(TimeoutError)         a read or write that does not return
    ├── CoordinationError(RuntimeError)    the ranks can't work together
    │   ├── RankFailedError                    a rank raised an error, died or hangs
    │   ├── DirectoryNotSharedError            ranks that don't see the same directory
    │   └── ShardMismatchError                 a shard that does not match the manifest
    └── DependencyError(ImportError)       an optional dependency is not installed

The command `shardckpt` exits with the `exit_code` of the error's class. Each family has its own
code.
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
    "ShardMismatchError",
    "ShardckptError",
    "StalledError",
    "StateError",
    "StorageError",
    "StoragePermissionError",
    "StoreUnavailableError",
    "UnsupportedLeafError",
]


def printable(text: str) -> str:
    """Escape all control characters of a text except line ends.

    Names in a checkpoint could otherwise control a terminal.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def printable_line(text: str) -> str:
    """Escape all control characters of a text, also line ends.

    A name with a line end could otherwise look like several lines of a list.
    """
    return printable(text).replace("\n", "\\n")


def _one_line(name: str | None) -> str | None:
    """Escape the line ends of a name, which could otherwise look like another fact."""
    return None if name is None else str(name).replace("\n", "\\n")


class ShardckptError(Exception):
    """The base class of all errors of shardckpt.

    `str(error)` lists the message and all facts. Facts that do not apply are None. Errors can be
    pickled, so that they can travel between processes.

    Args:
        message: The problem, in one sentence.
        path: The file or directory.
        rank: The rank that failed, or a tuple of ranks.
        tensor: The name of the entry, or several names joined with commas.
        expected: The expected value or situation.
        actual: The actual value or situation.
        remedy: An action of the user that solves the problem.
        **facts: Further facts. They are kept in the attribute `facts`, by name.

    Attributes:
        message: See Args, as for the other facts.
        exit_code: The exit code of the command `shardckpt` after this error.

    Example:
        >>> import shardckpt
        >>> try:
        ...     shardckpt.load_state("no-such-folder")
        ... except shardckpt.ShardckptError as error:
        ...     print(type(error).__name__)
        CheckpointNotFoundError
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
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        facts = {
            "path": _one_line(self.path),
            "rank": ", ".join(map(str, ranks)) if self.rank is not None else None,
            "tensor": _one_line(self.tensor),
            "expected": self.expected,
            "actual": self.actual,
            **self.facts,
            "remedy": self.remedy,
        }
        texts = {name: str(fact) for name, fact in facts.items() if fact is not None}
        # A line end in a fact must not begin another fact.
        lines = [f"  {name}: {text}".replace("\n", "\n    ") for name, text in texts.items()]
        return printable("\n".join([self.message, *lines]))

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
    """The state or an argument is invalid for this call."""

    exit_code = 3


class UnsupportedLeafError(StateError, TypeError):
    """A leaf of the state has a type or dtype that a checkpoint can't hold."""


class PartialPlacementError(StateError):
    """A DTensor holds partial sums. Reduce it before saving."""


class OptimizerModuleError(StateError):
    """The parameters of an optimizer belong to a module that is not in the same state."""


class OptionError(StateError):
    """An option, or its environment variable, is unknown or has an invalid value."""


class RankMismatchError(StateError):
    """The ranks passed states with different names, dtypes or shapes."""


class ReplicaMismatchError(StateError):
    """Replicas of one entry differ in value."""


class CoverageError(StateError):
    """The chunks of a tensor overlap, or do not cover all of it."""


class LoadMismatchError(ShardckptError, ValueError):
    """The state to load into and the checkpoint differ. The error lists every entry.

    `missing`, `unexpected`, `wrong_shape` and `wrong_dtype` are tuples of names
    (for the last two, of (name, expected, actual)), or None in place of an empty tuple.
    """

    missing: tuple[str, ...] | None = None
    unexpected: tuple[str, ...] | None = None
    wrong_shape: tuple[tuple[str, Any, Any], ...] | None = None
    wrong_dtype: tuple[tuple[str, Any, Any], ...] | None = None

    exit_code = 4


class CheckpointError(ShardckptError, ValueError):
    """The checkpoint can't be read."""

    exit_code = 5


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The path does not exist."""


class NotACheckpointError(CheckpointError):
    """The path exists, but does not hold a shardckpt checkpoint."""


class FormatVersionError(CheckpointError):
    """The checkpoint has a format version that this version of shardckpt does not support."""


class CorruptionError(CheckpointError):
    """A shard or manifest is missing, truncated or changed, or violates the format."""

    exit_code = 6


class StorageError(ShardckptError, OSError):
    """The file system or the object store refused an operation.

    Args:
        message: See ShardckptError, as for all other facts.
        errno: The error number of the system call, an attribute of `errno`; None if unknown.
        **facts: See ShardckptError.
    """

    exit_code = 7

    def __init__(self, message: str, *, errno: int | None = None, **facts: Any) -> None:
        ShardckptError.__init__(self, message, **facts)
        self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        build, (cls, message, facts, attributes) = super().__reduce__()
        return build, (cls, message, {**facts, "errno": self.errno}, attributes)


class CheckpointExistsError(StorageError, FileExistsError):
    """The path exists already, and `overwrite` is False."""


class CheckpointBusyError(StorageError, BlockingIOError):
    """Another save to this path is running."""


class StoragePermissionError(StorageError, PermissionError):
    """The process lacks the permission to read or write here."""


class NoSpaceError(StorageError):
    """The disk or the quota is full."""


class StoreUnavailableError(StorageError):
    """An object store does not answer, or asks for fewer requests. The same call may succeed later.

    A request that failed so may have been carried out."""


class StalledError(StorageError, TimeoutError):
    """A read or write did not return within its deadline, the option `stall_deadline_s`."""


class CoordinationError(ShardckptError, RuntimeError):
    """The ranks of an operation can't work together."""

    exit_code = 8


class RankFailedError(CoordinationError):
    """Other ranks raised an error, died or do not respond.

    `rank` has their numbers, and `facts["phase"]` the phase of the operation.
    """


class DirectoryNotSharedError(CoordinationError):
    """Some ranks don't see the directory that rank 0 created."""


class ShardMismatchError(CoordinationError):
    """A rank wrote a shard whose tensors, boxes or order are not those of the manifest.

    Nothing was committed.
    """


class DependencyError(ShardckptError, ImportError):
    """An optional dependency is not installed. `remedy` names the extra to install."""

    exit_code = 9
