"""From any kind of checkpoint that can be read to any kind that can be written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Literal, get_args

from shardckpt.checkpoint import Checkpoint
from shardckpt.convert.dcp import DcpCheckpoint, is_dcp
from shardckpt.convert.dcp_files import DcpFolder
from shardckpt.convert.safetensors_files import (
    HuggingFace,
    SafetensorsFile,
    is_hugging_face,
    open_hugging_face,
    open_safetensors,
)
from shardckpt.convert.sources import Foreign, Selected, foreign, state_of
from shardckpt.convert.whole_files import INDEX, is_one_file, read_many, read_one, write_one
from shardckpt.coordination.base import Coordinator, exchange
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import NotACheckpointError, StateError
from shardckpt.maintenance.reshard import reshard, rewrite
from shardckpt.maintenance.rewritable import Source
from shardckpt.state.saved_tree import Rename, Select
from shardckpt.storage.base import MANIFEST_NAME
from shardckpt.storage.local import LocalStorage

__all__ = ["FORMATS", "Format", "convert", "convert_source", "open_source"]

Format = Literal["shardckpt", "dcp", "hf", "safetensors", "torch"]
FORMATS: tuple[Format, ...] = get_args(Format)

_BYTES_PER_FILE = 1 << 30
_HUGGING_FACE_BYTES = 5_000_000_000  # as transformers has it


def convert(
    source: str,
    target: str,
    *,
    to: Format | None = None,
    keys: Select = None,
    rename: Rename = None,
    shards: int | None = None,
    file_bytes: int = _HUGGING_FACE_BYTES,
    overwrite: bool = False,
) -> None:
    """Convert the checkpoint at `source`, of whatever kind, to `target`. Not collective.

    `source`: a checkpoint of shardckpt or of torch.distributed.checkpoint (DCP), a torch file
    (weights_only=True), a safetensors file, a directory in Hugging Face's layout, or one of an
    NNHandler with a file for each component. `to` is by
    default told by the target's suffix: .pt, .pth or .safetensors, else "shardckpt". `keys` choose
    saved entries, `rename` gives those other names, both as in load_state. `shards`: of a
    checkpoint, or files of DCP; by default one for each GiB. `file_bytes`: at most so many in a
    file of "hf", but for a larger tensor.

    Values stay what they are, bit for bit; PerRank values become a list of every rank's wherever
    the target has no such thing. Memory: some buffers; the whole state for "torch", a file for
    "dcp". Nothing is at `target` before all is there. Raises CheckpointError for a source that
    can't be read, StateError for one that the target can't hold, StorageError.
    """
    with open_source(source, keys=keys, rename=rename) as opened:
        convert_source(
            opened,
            target,
            to=to,
            shards=shards,
            file_bytes=file_bytes,
            overwrite=overwrite,
        )


def open_source(
    path: str, *, keys: Select = None, rename: Rename = None, check: bool = True
) -> Checkpoint | Foreign | Selected:
    """A checkpoint of any kind as a Source, to be closed. `check`: read single files whole, and
    verify them where they say what they should be. Raises CheckpointError."""
    opened: Checkpoint | Foreign | Selected = _open(path, check=check)
    try:
        if keys is not None:
            opened = Selected(opened, keys=keys)
        if rename is not None:
            opened = Selected(opened, rename=rename)
    except BaseException:
        opened.close()
        raise
    return opened


def _open(path: str, *, check: bool) -> Checkpoint | Foreign:
    if path.endswith(".safetensors"):
        return open_safetensors(path, check=check)
    if is_one_file(path):
        state = read_one(path, check=check)
        if isinstance(state, Mapping):
            return foreign(path, "a torch file", state, identity=os.path.getsize(path))
        raise NotACheckpointError("This file holds no dict", path=path, actual=type(state).__name__)
    if os.path.isfile(os.path.join(path, INDEX)):
        return foreign(path, "files of components", read_many(path))
    if not os.path.isfile(os.path.join(path, MANIFEST_NAME)):
        if is_dcp(path):
            return DcpCheckpoint(path).source()
        if is_hugging_face(path):
            return open_hugging_face(path)
    return Checkpoint(path, storage=LocalStorage())


def convert_source(
    source: Source,
    target: str,
    *,
    to: Format | None,
    shards: int | None,
    file_bytes: int,
    overwrite: bool,
    coordinator: Coordinator | None = None,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> None:
    """See convert; collective over the coordinator's ranks, which divide the bytes, or the files of
    DCP. `progress` is called with the bytes that this rank has written."""
    ranks = coordinator or SingleCoordinator()
    kind = _format_of(target, to)
    if shards is None:
        total = sum(entry.size_bytes for entry in source.manifest.tensors.values())
        shards = max(ranks.world_size, -(-total // _BYTES_PER_FILE))
    if kind == "shardckpt":
        reshard(
            source,
            target,
            shards=shards,
            storage=LocalStorage(),
            overwrite=overwrite,
            coordinator=ranks,
            progress=progress,
        )
    elif kind == "dcp":
        rewrite(DcpFolder(source, target, files=shards, overwrite=overwrite), ranks, progress)
    elif kind == "hf":
        folder = HuggingFace(source, target, file_bytes=file_bytes, overwrite=overwrite)
        rewrite(folder, ranks, progress)
    elif kind == "safetensors":
        rewrite(SafetensorsFile(source, target, overwrite=overwrite), ranks, progress)
    else:

        def alone() -> bytes:
            if ranks.rank == 0:
                write_one(state_of(source, source.manifest.state), target, overwrite=overwrite)
            return b""

        exchange(ranks, "write", alone, lambda payloads: b"")


def _format_of(target: str, to: Format | None) -> Format:
    """The format to convert to; files tell it by their suffix."""
    by_suffix: Format = "shardckpt"
    if is_one_file(target):
        by_suffix = "safetensors" if target.endswith(".safetensors") else "torch"
    if to is None:
        return by_suffix
    if to not in FORMATS or (to != by_suffix and {to, by_suffix} & {"torch", "safetensors"}):
        raise StateError(
            "This path does not go with this format",
            path=target,
            expected=f"one of {', '.join(FORMATS)}; a path in .pt or .pth for torch, in "
            ".safetensors for safetensors, in none of them for the others",
            actual=repr(to),
        )
    return to
