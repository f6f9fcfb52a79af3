"""Write a new checkpoint with the intact tensors of a corrupted one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from shardckpt.errors import CorruptionError, NotACheckpointError
from shardckpt.format.entries import Manifest
from shardckpt.format.manifest import from_bytes, to_bytes
from shardckpt.loading.shard_reader import read_box
from shardckpt.maintenance.bit_flips import repair_manifest
from shardckpt.maintenance.rebuild_manifest import rebuild_manifest
from shardckpt.maintenance.reshard import reshard
from shardckpt.maintenance.verify import find_corruption
from shardckpt.reports import RescueReport
from shardckpt.state.name_filters import without_tensors
from shardckpt.storage.base import CheckpointFiles
from shardckpt.storage.resolve import Location

__all__ = ["explain_manifest", "rescue"]


def rescue(
    source: Location,
    target: Location,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> RescueReport:
    """Write the intact tensors and the values of `source` to `target`. See `shardckpt.rescue`.

    Not collective. `progress` is called with the bytes written so far. Raises CorruptionError if
    nothing can be saved.
    """
    files = source.storage.open(source.path)
    try:
        manifest, lost, repaired, rebuilt = _manifest(files)
        flips: dict[str, list[tuple[int, int]]] = {}
        for corruption in find_corruption(files, manifest):
            name = manifest.shards[corruption.shard].name
            if corruption.flips:
                flips[name] = list(corruption.flips)
                repaired += [f"{name}: {corruption.actual}"]
            elif corruption.blocks:
                why = f"{name}: {corruption.message.lower()} ({corruption.actual})"
                lost.update(dict.fromkeys(corruption.tensors(manifest), why))
        kept = _without(manifest, lost, repaired, rebuilt=rebuilt)
        if rebuilt and not kept.tensors:
            raise CorruptionError(
                "Nothing in this checkpoint can be saved",
                path=source.path,
                expected="at least one intact tensor",
                actual="; ".join(f"{name}: {why}" for name, why in lost.items())[:500] or "none",
                remedy="load another checkpoint",
            )
        reshard(
            _RepairedSource(_RepairedFiles(files, kept, flips), kept),
            target.path,
            shards=max(len(kept.shards), 1),
            storage=target.storage,
            overwrite=overwrite,
            progress=progress,
        )
    finally:
        files.close()
    return RescueReport(
        path=target.path,
        saved=tuple(kept.tensors),
        lost=lost,
        repaired=tuple(repaired),
        rebuilt=rebuilt,
    )


def _manifest(files: CheckpointFiles) -> tuple[Manifest, dict[str, str], list[str], bool]:
    """Return the manifest, the lost tensors, the repaired bits, and whether it was rebuilt."""
    try:
        data = files.manifest()
        repair = repair_manifest(data)
        if repair is not None:
            data, byte, bit = repair
            repaired = [f"manifest.json: bit {bit} of byte {byte} flipped"]
            return from_bytes(data, path=files.path), {}, repaired, False
        return from_bytes(data, path=files.path), {}, [], False
    except (NotACheckpointError, CorruptionError):
        manifest, lost = rebuild_manifest(files)
        return manifest, lost, [], True


def _without(
    manifest: Manifest, lost: dict[str, str], repaired: list[str], *, rebuilt: bool
) -> Manifest:
    lost_tensors = lost.keys() & manifest.tensors.keys()
    notes = {
        "rescued": "The manifest was rebuilt from the headers of the shards. All values are lost, "
        "and no tensor could be verified."
        if rebuilt
        else "The intact tensors were saved.",
        "rescued: lost": "\n".join(f"{name}: {why}" for name, why in lost.items()),
        "rescued: repaired": "\n".join(repaired),
    }
    return replace(
        manifest,
        tensors={name: entry for name, entry in manifest.tensors.items() if name not in lost},
        state=without_tensors(manifest.state, lost_tensors),
        per_rank=tuple(without_tensors(values, lost_tensors) for values in manifest.per_rank),
        notes={**manifest.notes, **{name: text for name, text in notes.items() if text}},
    )


def explain_manifest(error: CorruptionError, place: Location) -> None:
    """Add the flipped bit to an error about a corrupted manifest, if a single bit was flipped."""
    files = place.storage.open(place.path)
    try:
        repair = repair_manifest(files.manifest())
    finally:
        files.close()
    if repair is not None:
        error.actual = f"bit {repair[2]} of byte {repair[1]} flipped"
        error.remedy = "repair it with `shardckpt rescue`"


class _RepairedFiles(CheckpointFiles):
    """Files of a corrupted checkpoint with another manifest. Flipped bits are repaired when
    read.
    """

    def __init__(
        self, files: CheckpointFiles, manifest: Manifest, flips: dict[str, list[tuple[int, int]]]
    ) -> None:
        self.path = files.path
        self._files = files
        self._manifest = to_bytes(manifest)
        self._sizes = {shard.name: shard.size_bytes for shard in manifest.shards}
        self._flips = flips

    def manifest(self) -> bytes:
        """See CheckpointFiles.manifest."""
        return self._manifest

    def size_bytes(self, name: str) -> int:
        """See CheckpointFiles.size_bytes."""
        return self._sizes[name]

    def read(self, name: str, buffer: memoryview, *, offset: int) -> None:
        """See CheckpointFiles.read."""
        self._files.read(name, buffer, offset=offset)
        for byte, bit in self._flips.get(name, ()):
            if offset <= byte < offset + len(buffer):
                buffer[byte - offset] ^= 1 << bit

    def duplicate(self) -> _RepairedFiles:
        """See CheckpointFiles.duplicate."""
        other = copy.copy(self)
        other._files = self._files.duplicate()
        return other

    def close(self) -> None:
        """See CheckpointFiles.close."""
        self._files.close()


@dataclass(frozen=True, slots=True)
class _RepairedSource:
    """The repaired files as reshard reads a checkpoint; see Source."""

    files: CheckpointFiles
    manifest: Manifest

    @property
    def path(self) -> str:
        """See Source.path."""
        return self.files.path

    def read_box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """See Source.read_box."""
        return read_box(self.files, self.manifest, self.manifest.tensors[name], offsets, sizes)

    def close(self) -> None:
        """See Source.close."""
        self.files.close()
