"""The files of a checkpoint in several tiers: each block from the first tier that has it intact."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from shardckpt.errors import CheckpointError, CorruptionError, ShardckptError, StorageError
from shardckpt.format.lazy_manifest import LazyManifest
from shardckpt.format.manifest import check_text
from shardckpt.storage.base import PARTS_NOTE, CheckpointFiles, OnFilled, WouldWait
from shardckpt.storage.copying import id_in
from shardckpt.storage.resolve import Location

__all__ = ["BROKEN", "TieredFiles", "was_saved_in_parts"]

BROKEN = (CheckpointError, StorageError)
"""The errors of a tier after which the next one is tried."""


class TieredFiles(CheckpointFiles):
    """A checkpoint in several tiers, of which the first has an intact manifest.

    Args:
        path: The path in all tiers.
        manifest: The manifest.
        places: The places in the tiers.
        first: The files in the first place, if they are open.
        is_part: Whether the first place may hold only the shards of one machine.
    """

    def __init__(
        self,
        path: str,
        manifest: bytes,
        places: Sequence[Location],
        *,
        first: CheckpointFiles | None,
        is_part: bool,
    ) -> None:
        self.path = path
        self._manifest = manifest
        self._places = places
        self._is_part = is_part
        identity = id_in(manifest)
        self._tiers = [_TierFiles(place, identity) for place in places]
        self._tiers[0].opened = first
        self.remote = first is not None and first.remote

    @property
    def nearest(self) -> CheckpointFiles:
        """The files of the first tier."""
        return self._tiers[0].files()

    def manifest(self) -> bytes:
        """See CheckpointFiles.manifest."""
        return self._manifest

    def _first(self, call: Callable[[CheckpointFiles], Any]) -> Any:
        """Return the result of a call in the first tier where it succeeds."""
        errors: list[ShardckptError] = []
        for tier in self._tiers:
            try:
                return call(tier.files())
            except BROKEN as error:
                errors.append(error)
        raise errors[0]

    def size_bytes(self, name: str) -> int:
        """See CheckpointFiles.size_bytes: that of the first tier that has the shard."""
        size: int = self._first(lambda files: files.size_bytes(name))
        return size

    def read(self, name: str, buffer: memoryview, *, offset: int) -> None:
        """See CheckpointFiles.read."""
        self._first(lambda files: files.read(name, buffer, offset=offset))

    def readinto(
        self,
        name: str,
        buffers: Sequence[memoryview],
        *,
        offset: int,
        on_filled: OnFilled = lambda buffer: None,
        wait: bool = True,
    ) -> None:
        """See CheckpointFiles.readinto."""
        if not wait:
            raise WouldWait(name)
        self._first(lambda files: files.readinto(name, buffers, offset=offset))
        for buffer in buffers:
            on_filled(buffer)

    def map(self, name: str) -> memoryview:
        """See CheckpointFiles.map."""
        mapped: memoryview = self._first(lambda files: files.map(name))
        return mapped

    def names(self) -> list[str]:
        """See CheckpointFiles.names."""
        return self.nearest.names()

    def copies(self) -> Sequence[CheckpointFiles]:
        """See CheckpointFiles.copies."""
        return self._tiers

    def elsewhere(self, name: str) -> bool:
        """See CheckpointFiles.elsewhere."""
        return self._is_part and not self.has_nearby(name) and not self._is_copied()

    def nearby(self) -> Sequence[str] | None:
        """See CheckpointFiles.nearby."""
        if not self._is_part:
            return None
        shards = LazyManifest(self._manifest, path=self.path).all_shards()
        return [shard.name for shard in shards if self.has_nearby(shard.name)]

    def has_nearby(self, name: str) -> bool:
        """Whether the first tier has a shard."""
        with suppress(*BROKEN):
            self.nearest.size_bytes(name)
            return True
        return False

    def _is_copied(self) -> bool:
        """Whether a slower tier has the checkpoint, and so all of its shards."""
        for tier in self._tiers[1:]:
            with suppress(*BROKEN):
                tier.files()
                return True
        return False

    def bytes_read(self) -> dict[str, int]:
        """See CheckpointFiles.bytes_read."""
        return {tier.path: tier.verified_bytes for tier in self._tiers if tier.verified_bytes}

    def duplicate(self) -> TieredFiles:
        """See CheckpointFiles.duplicate."""
        return TieredFiles(
            self.path, self._manifest, self._places, first=None, is_part=self._is_part
        )

    def close(self) -> None:
        """See CheckpointFiles.close."""
        for tier in self._tiers:
            tier.close()


class _TierFiles(CheckpointFiles):
    """The files of one tier, opened when they are first needed."""

    def __init__(self, place: Location, identity: str) -> None:
        self.path = place.path
        self.opened: CheckpointFiles | None = None
        self.verified_bytes = 0
        self._place, self._identity = place, identity
        self._lock = threading.Lock()

    def files(self) -> CheckpointFiles:
        """Return the files. Raises CheckpointError if this tier does not have the checkpoint."""
        with self._lock:
            if self.opened is None:
                opened = self._place.storage.open(self.path)
                try:
                    text = opened.manifest()
                    check_text(text, path=self.path)
                    if id_in(text) != self._identity:
                        raise CorruptionError(
                            "This tier has another checkpoint",
                            path=self.path,
                            expected=self._identity,
                            actual=id_in(text),
                            remedy="wait until it is copied",
                        )
                except BaseException:
                    opened.close()
                    raise
                self.opened = opened
            return self.opened

    def count_verified(self, size_bytes: int) -> None:
        """See CheckpointFiles.count_verified."""
        with self._lock:
            self.verified_bytes += size_bytes

    def manifest(self) -> bytes:
        """See CheckpointFiles.manifest."""
        return self.files().manifest()

    def size_bytes(self, name: str) -> int:
        """See CheckpointFiles.size_bytes."""
        return self.files().size_bytes(name)

    def read(self, name: str, buffer: memoryview, *, offset: int) -> None:
        """See CheckpointFiles.read."""
        self.files().read(name, buffer, offset=offset)

    def close(self) -> None:
        """See CheckpointFiles.close."""
        with self._lock:
            opened, self.opened = self.opened, None
        if opened is not None:
            opened.close()


class _Notes(msgspec.Struct):
    notes: dict[str, str] = {}


def was_saved_in_parts(manifest: bytes) -> bool:
    """Whether each machine wrote its shards to a fast tier of its own.

    Raises:
        CorruptionError: The manifest is not valid JSON.
    """
    try:
        return PARTS_NOTE in msgspec.json.decode(manifest, type=_Notes).notes
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise CorruptionError(
            "The manifest is not valid JSON",
            expected="the members of format version 1",
            actual=str(error)[:200],
            remedy="load another checkpoint",
        ) from error
