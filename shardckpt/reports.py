"""What save and load tell about themselves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from shardckpt.errors import CorruptionError

__all__ = ["ConvertReport", "LoadReport", "RescueReport", "SaveReport", "Stopwatch", "VerifyReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """What a save wrote.

    `path` and `checkpoint_id` name it; `bytes_by_rank` is the size of each rank's files,
    `linked_by_rank` how much of that the base has given (nothing is known of it after a save
    with a `planner`), `manifest_bytes` the size of the manifest; `base_problems` says why
    something unchanged was written all the same; `seconds` is the time this rank spent in
    each phase, waiting for others included. `profile`: by rank, the seconds of its own work,
    waiting excluded: "plan", "write" (copy, hash, write), "sync" (fsync), "compare" (digests of
    replicas); and "divide" and "commit", which are rank 0's. Rank 0 has every rank's profile,
    any other its own.
    """

    path: str
    checkpoint_id: str
    world_size: int
    bytes_by_rank: tuple[int, ...]
    manifest_bytes: int
    seconds: dict[str, float]
    linked_by_rank: tuple[int, ...] = ()
    base_problems: tuple[str, ...] = ()
    profile: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards and the manifest."""
        return sum(self.bytes_by_rank) + self.manifest_bytes

    @property
    def written_bytes(self) -> int:
        """Of these, the bytes that were written."""
        return self.total_bytes - sum(self.linked_by_rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load read on this rank, and where state and checkpoint differ.

    `missing`: asked for, not saved (strict=False only). `unexpected`: saved, not asked for.
    `wrong_shape` and `wrong_dtype`: left as they were (strict=False only), as (name,
    expected, found). `cast`: (name, saved dtype, own dtype). `kept`: PerRank entries left
    as they were because the number of ranks differs. `seconds` and `profile` are as in
    SaveReport; own work is "open" (the manifest), "match" (with the state), "read" (and verify)
    and "place" (values, modules, optimizers).
    """

    path: str
    checkpoint_id: str
    saved_world_size: int
    bytes_read: int
    seconds: dict[str, float]
    profile: dict[int, dict[str, float]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[tuple[str, object, object], ...] = ()
    wrong_dtype: tuple[tuple[str, object, object], ...] = ()
    cast: tuple[tuple[str, str, str], ...] = ()
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """What a conversion read, took and left out.

    Attributes:
        path: The new checkpoint.
        target_format: Its format, one of those that `convert` takes as `to`.
        source: The checkpoint that was read.
        source_format: Its format, in words.
        writer: The library that wrote it; None if unknown.
        size_bytes: The bytes of the tensors taken.
        tensors: Names of the tensors taken.
        values: Names of the other entries taken.
        files: The files that were read, if the source is a folder with others.
        copied: Files beside the weights, as a tokenizer's, that the target has as well.
        changed: Entry -> the form in which it was taken, where its own class is not loaded.
        left: Entry or file -> why it is not in the target. What `keys` did not choose is not
            listed.
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
    left: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a check of all bytes, or of a part of them, found.

    `hurt` and `whole` are the names of the tensors with and without damage; `damage` has an
    error for each shard that is damaged.
    """

    path: str
    checked_bytes: int
    hurt: tuple[str, ...]
    whole: tuple[str, ...]
    damage: tuple[CorruptionError, ...]

    def raise_damage(self) -> None:
        """Raise CorruptionError, one for all damage, if there is any."""
        if len(self.damage) == 1:
            raise self.damage[0]
        if self.damage:
            texts = [str(error) for error in self.damage]
            raise CorruptionError(
                "\n".join([f"{len(texts)} shards are damaged", *texts]),
                path=self.path,
                tensor=", ".join(self.hurt) or None,
                remedy="load another checkpoint, or `shardckpt rescue` what is whole",
                damage=tuple(f"{error.path}: {error.message}" for error in self.damage),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RescueReport:
    """What a rescue saved.

    `saved`: the names of the tensors in the new checkpoint at `path`. `lost`: name (or file) and
    why. `mended`: flipped bits that were turned back, in words. `rebuilt`: the manifest was lost
    and was made anew from the shards' headers: values are lost, and bytes are unverified.
    """

    path: str
    saved: tuple[str, ...]
    lost: dict[str, str]
    mended: tuple[str, ...]
    rebuilt: bool


@dataclass(slots=True)
class Stopwatch:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the with block towards a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
