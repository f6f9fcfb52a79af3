"""Write a new checkpoint of everything in a damaged one that still verifies."""

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
from shardckpt.maintenance.verify import survey
from shardckpt.reports import RescueReport
from shardckpt.state.name_filters import without_tensors
from shardckpt.storage.base import CheckpointFiles
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.local_reader import LocalFiles
from shardckpt.storage.paths import local_path

__all__ = ["explain_manifest", "rescue"]


def rescue(
    source: str,
    target: str,
    *,
    storage: LocalStorage,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda done_bytes: None,
) -> RescueReport:
    """Write what can be saved of the checkpoint at `source` to `target`; one process.

    Tensors whose blocks all verify are kept, and so are all values; what referred to a lost tensor
    goes (in a list or tuple None takes its place). A flipped bit is turned back where the digest
    tells which one it was. Where the manifest is lost, one is made from the shards' headers:
    tensors are named, shaped and nested as the headers tell, values are lost, and nothing is
    verified. The new checkpoint's notes say so. `progress` is called with the bytes written.

    Raises CorruptionError if nothing can be saved.
    """
    source, target = local_path(source), local_path(target)
    files = storage.open(source)
    try:
        manifest, lost, mended, rebuilt = _manifest(files)
        flips: dict[str, list[tuple[int, int]]] = {}
        for damage in survey(files, manifest):
            name = manifest.shards[damage.shard].name
            if damage.flips:
                flips[name] = list(damage.flips)
                mended += [f"{name}: {damage.actual}"]
            elif damage.blocks:
                why = f"{name}: {damage.what.lower()} ({damage.actual})"
                lost.update(dict.fromkeys(damage.hurt(manifest), why))
        kept = _without(manifest, lost, mended, rebuilt=rebuilt)
        if rebuilt and not kept.tensors:
            raise CorruptionError(
                "Nothing in this checkpoint can be saved",
                path=source,
                expected="a tensor that still verifies",
                actual="; ".join(f"{name}: {why}" for name, why in lost.items())[:500] or "none",
                remedy="load another checkpoint",
            )
        reshard(
            _RepairedSource(_RepairedFiles(files, kept, flips), kept),
            target,
            shards=max(len(kept.shards), 1),
            storage=storage,
            overwrite=overwrite,
            progress=progress,
        )
    finally:
        files.close()
    return RescueReport(
        path=target, saved=tuple(kept.tensors), lost=lost, mended=tuple(mended), rebuilt=rebuilt
    )


def _manifest(files: LocalFiles) -> tuple[Manifest, dict[str, str], list[str], bool]:
    """The manifest, what is lost already, what was mended, and whether it had to be rebuilt."""
    try:
        data = files.manifest()
        found = repair_manifest(data)
        if found is not None:
            data, byte, bit = found
            told = [f"manifest.json: bit {bit} of byte {byte} flipped"]
            return from_bytes(data, path=files.path), {}, told, False
        return from_bytes(data, path=files.path), {}, [], False
    except (NotACheckpointError, CorruptionError):
        manifest, lost = rebuild_manifest(files)
        return manifest, lost, [], True


def _without(
    manifest: Manifest, lost: dict[str, str], mended: list[str], *, rebuilt: bool
) -> Manifest:
    gone = lost.keys() & manifest.tensors.keys()
    notes = {
        "rescued": "the manifest was rebuilt from the shards' headers: values are lost, and what "
        "was kept could not be verified"
        if rebuilt
        else "what still verified was kept",
        "rescued: lost": "\n".join(f"{name}: {why}" for name, why in lost.items()),
        "rescued: mended": "\n".join(mended),
    }
    return replace(
        manifest,
        tensors={name: entry for name, entry in manifest.tensors.items() if name not in gone},
        state=without_tensors(manifest.state, gone),
        per_rank=tuple(without_tensors(own, gone) for own in manifest.per_rank),
        notes={**manifest.notes, **{name: text for name, text in notes.items() if text}},
    )


def explain_manifest(error: CorruptionError, path: str, *, storage: LocalStorage) -> None:
    """Say in an error about a manifest that a single bit was flipped, if that is what is wrong."""
    files = storage.open(path)
    try:
        found = repair_manifest(files.manifest())
    finally:
        files.close()
    if found is not None:
        error.actual = f"bit {found[2]} of byte {found[1]} flipped"
        error.remedy = "`shardckpt rescue` turns it back"


class _RepairedFiles(CheckpointFiles):
    """Files with another manifest, with the sizes in that, and with flipped bits turned back."""

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
