"""The reports that save, load and the other functions return."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardckpt.errors import CorruptionError

if TYPE_CHECKING:
    import torch

__all__ = [
    "CheckpointMetadata",
    "ConvertReport",
    "DiffReport",
    "LoadReport",
    "RescueReport",
    "SaveReport",
    "Stopwatch",
    "TensorDifference",
    "TensorMetadata",
    "TensorStats",
    "VerifyReport",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """The result of a save.

    Attributes:
        path: The checkpoint.
        checkpoint_id: Its identifier, 32 hexadecimal digits.
        world_size: The number of ranks that saved.
        bytes_by_rank: The bytes of each rank's shards.
        manifest_bytes: The bytes of the manifest.
        seconds: The seconds of each phase on this rank, including the time spent waiting for other
            ranks.
        linked_by_rank: The bytes in `bytes_by_rank` that were linked or cloned from the base, not
            written. Empty after a save with a planner.
        base_problems: Why unchanged files and blocks were written.
        tiers: The path in each tier of a TieredStorage: "durable" for the first one, and "pending"
            for the others. TieredStorage.tiers has the state at a later time.
        profile: The seconds of each rank's own work by phase, without waiting: "plan", "write"
            (copy, hash and write), "sync" (fsync), "compare" (digests of replicas), and on rank 0
            "divide" and "commit". Rank 0 has the profiles of all ranks, other ranks their own.

    Example:
        >>> import torch, shardckpt
        >>> report = shardckpt.save({"weight": torch.ones(1000)}, "run/step-1")
        >>> report.total_bytes == sum(report.bytes_by_rank) + report.manifest_bytes
        True
    """

    path: str
    checkpoint_id: str
    world_size: int
    bytes_by_rank: tuple[int, ...]
    manifest_bytes: int
    seconds: dict[str, float]
    linked_by_rank: tuple[int, ...] = ()
    base_problems: tuple[str, ...] = ()
    tiers: dict[str, str] = field(default_factory=dict)
    profile: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards and the manifest."""
        return sum(self.bytes_by_rank) + self.manifest_bytes

    @property
    def written_bytes(self) -> int:
        """Bytes that were written: `total_bytes` without what was linked or cloned."""
        return self.total_bytes - sum(self.linked_by_rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The result of a load on this rank, with the differences between state and checkpoint.

    Attributes:
        path: The checkpoint.
        checkpoint_id: Its identifier, 32 hexadecimal digits.
        saved_world_size: The number of ranks that saved it.
        bytes_read: The bytes that this rank read.
        seconds: The seconds of each phase on this rank, including the time spent waiting for other
            ranks.
        profile: The seconds of each rank's own work by phase: "open" (the manifest), "match" (state
            and checkpoint), "read" (and verify), "place" (values, modules, optimizers). Rank 0 has
            the profiles of all ranks, other ranks their own.
        tiers: The bytes that this rank read from each tier of a TieredStorage, by path.
        missing: Names in the state that are not in the checkpoint (with strict=False).
        unexpected: Names in the checkpoint that are not in the state.
        wrong_shape: (name, expected shape, saved shape) of entries that were skipped (with
            strict=False).
        wrong_dtype: (name, expected dtype, saved dtype) of entries that were skipped (with
            strict=False).
        cast: (name, saved dtype, dtype in the state) of entries that were converted.
        kept: PerRank entries that were not loaded because the number of ranks differs.

    Example:
        >>> import torch, shardckpt
        >>> _ = shardckpt.save({"weight": torch.ones(3)}, "run/step-1")
        >>> state = {"weight": torch.zeros(3, dtype=torch.float16)}
        >>> [name for name, *dtypes in shardckpt.load(state, "run/step-1", dtype="cast").cast]
        ['weight']
    """

    path: str
    checkpoint_id: str
    saved_world_size: int
    bytes_read: int
    seconds: dict[str, float]
    profile: dict[int, dict[str, float]] = field(default_factory=dict)
    tiers: dict[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[tuple[str, object, object], ...] = ()
    wrong_dtype: tuple[tuple[str, object, object], ...] = ()
    cast: tuple[tuple[str, str, str], ...] = ()
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """The result of a conversion.

    Attributes:
        path: The new checkpoint.
        source: The checkpoint that was read.
        source_format: The format of the source, in words.
        target_format: The format of the target, a value of the argument `to` of `convert`.
        writer: The library that wrote the source; None if unknown.
        size_bytes: The bytes of the converted tensors.
        tensors: The names of the converted tensors.
        values: The names of the other converted entries.
        files: The files that were read, if the source is a folder that holds other files too.
        copied: Files beside the weights, such as a tokenizer's, that were copied to the target.
        changed: Entry -> the form in which it was converted, because its class is not loaded.
        left_out: Entry or file -> why it is not in the target. Entries that `keys` did not choose
            are not listed.

    Example:
        >>> import torch, shardckpt
        >>> torch.save({"weight": torch.ones(3)}, "last.pt")
        >>> report = shardckpt.convert("last.pt", "last.safetensors")
        >>> report.target_format, report.tensors
        ('safetensors', ('weight',))
    """

    path: str
    source: str
    source_format: str
    target_format: str
    writer: str | None
    size_bytes: int
    tensors: tuple[str, ...]
    values: tuple[str, ...]
    files: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    changed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """How a tensor differs between two checkpoints.

    Attributes:
        dtypes: Both dtypes.
        shapes: Both shapes.
        elements: The number of elements that differ. None if shapes differ, or dtypes that were not
            compared by value.
        largest: The largest absolute difference of two elements; NaN if one of them is NaN. None if
            `elements` is None, or the dtype has no arithmetic.

    Example:
        >>> import torch, shardckpt
        >>> for step, value in ((1, 0.0), (2, 0.5)):
        ...     report = shardckpt.save({"w": torch.tensor([1.0, value])}, f"run/step-{step}")
        >>> shardckpt.diff("run/step-1", "run/step-2").tensors["w"].largest
        0.5
    """

    dtypes: tuple[torch.dtype, torch.dtype]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    elements: int | None
    largest: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffReport:
    """The differences between two checkpoints.

    Attributes:
        first: The path of the first checkpoint.
        second: The path of the second one.
        only_first: The names of entries that only the first one has.
        only_second: The names of entries that only the second one has.
        tensors: Name -> difference, of the tensors that differ.
        values: Name -> both values, of the other entries that differ. Enums are text.
        dtypes: Name -> both dtypes, of the tensors whose elements are equal within a given
            tolerance, but whose dtypes differ.
        equal_tensors: The number of equal tensors.
        equal_values: The number of equal values.
        bytes_read: The bytes of tensors that were read from the first one, because their digests
            differ or are not comparable.

    Example:
        >>> import torch, shardckpt
        >>> report = shardckpt.save({"w": torch.ones(3), "step": 1}, "run/step-1")
        >>> report = shardckpt.save({"w": torch.ones(3), "step": 2}, "run/step-2")
        >>> report = shardckpt.diff("run/step-1", "run/step-2")
        >>> report.equal, report.values
        (False, {'step': (1, 2)})
    """

    first: str
    second: str
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    tensors: dict[str, TensorDifference]
    values: dict[str, tuple[object, object]]
    dtypes: dict[str, tuple[torch.dtype, torch.dtype]]
    equal_tensors: int
    equal_values: int
    bytes_read: int

    @property
    def equal(self) -> bool:
        """Whether the checkpoints are equal. Dtypes count only without a tolerance."""
        return not (self.only_first or self.only_second or self.tensors or self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStats:
    """Statistics of the elements of a tensor, in float64.

    Attributes:
        dtype: The dtype.
        shape: The shape.
        norm: The Euclidean norm of the finite elements.
        smallest: The smallest finite element, an int for dtypes of integers. None for a complex
            tensor or one without finite elements.
        largest: The largest finite element, an int for dtypes of integers. None for a complex
            tensor or one without finite elements.
        mean: The mean of the finite elements. None for a complex tensor or one without finite
            elements.
        nan: The number of elements that are NaN.
        inf: The number of elements that are infinite.
        zeros: The number of elements that are zero.

    Example:
        >>> import torch, shardckpt
        >>> report = shardckpt.save({"w": torch.tensor([3.0, 4.0, float("nan")])}, "run/step-1")
        >>> stats = shardckpt.stats("run/step-1")["w"]
        >>> stats.norm, stats.nan
        (5.0, 1)
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    norm: float
    smallest: float | None
    largest: float | None
    mean: float | None
    nan: int
    inf: int
    zeros: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The result of verifying a checkpoint, or a part of it.

    Attributes:
        path: The checkpoint.
        checked_bytes: The bytes that were read and compared with their digests.
        corrupted: The names of the tensors with corrupted bytes.
        intact: The names of the other tensors.
        errors: An error for each corrupted shard.

    Example:
        >>> import torch, shardckpt
        >>> _ = shardckpt.save({"weight": torch.ones(3)}, "run/step-1")
        >>> report = shardckpt.verify("run/step-1", strict=False)
        >>> report.corrupted, report.intact
        ((), ('weight',))
    """

    path: str
    checked_bytes: int
    corrupted: tuple[str, ...]
    intact: tuple[str, ...]
    errors: tuple[CorruptionError, ...]

    def raise_if_corrupted(self) -> None:
        """Raise one error for all corrupted shards, if there are any. Not collective.

        Raises:
            CorruptionError: At least one shard is corrupted.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            texts = [str(error) for error in self.errors]
            raise CorruptionError(
                "\n".join([f"{len(texts)} shards are corrupted", *texts]),
                path=self.path,
                tensor=", ".join(self.corrupted) or None,
                remedy="load another checkpoint, or rescue the intact tensors: `shardckpt rescue`",
                shards=tuple(f"{error.path}: {error.message}" for error in self.errors),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RescueReport:
    """The result of a rescue.

    Attributes:
        path: The new checkpoint.
        saved: The names of the tensors in the new checkpoint.
        lost: Tensor or file -> why it could not be saved.
        repaired: A text for each flipped bit that was repaired.
        rebuilt: Whether the manifest was lost and was rebuilt from the headers of the shards. Then
            all values are lost, and no bytes could be verified.

    Example:
        >>> import torch, shardckpt
        >>> _ = shardckpt.save({"weight": torch.ones(3)}, "run/step-1")
        >>> report = shardckpt.rescue("run/step-1", "run/rescued")
        >>> report.saved, report.lost
        (('weight',), {})
    """

    path: str
    saved: tuple[str, ...]
    lost: dict[str, str]
    repaired: tuple[str, ...]
    rebuilt: bool


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """The shape and dtype of a saved tensor.

    Attributes:
        shape: The global shape.
        dtype: The dtype.

    Example:
        >>> import torch, shardckpt
        >>> shardckpt.TensorMetadata((3, 2), torch.float32).size_bytes
        24
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of the full tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMetadata:
    """The description of a checkpoint, read from its manifest.

    Attributes:
        path: The checkpoint.
        format_version: The version of the format on disk.
        checkpoint_id: Its identifier, 32 hexadecimal digits.
        created: When it was saved: an ISO 8601 time in UTC.
        library: The name and version of the library that saved it.
        world_size: The number of ranks that saved it.
        shards: The bytes of each shard, by file name.
        tensors: The shape and dtype of each tensor or array, by name.
        values: The names of all other entries.
        notes: Texts that tools such as `rescue` added.
        total_bytes: The bytes of all shards and the manifest.

    Example:
        >>> import torch, shardckpt
        >>> _ = shardckpt.save({"weight": torch.ones(3, 2)}, "run/step-1")
        >>> metadata = shardckpt.metadata("run/step-1")
        >>> metadata.tensors["weight"].shape
        (3, 2)
    """

    path: str
    format_version: int
    checkpoint_id: str
    created: str
    library: str
    world_size: int
    shards: dict[str, int]
    tensors: dict[str, TensorMetadata]
    values: tuple[str, ...]
    notes: dict[str, str]
    total_bytes: int


@dataclass(slots=True)
class Stopwatch:
    """Measures seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time that the with block takes to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
