"""Open a checkpoint of any format as a source."""

from __future__ import annotations

import os
from typing import TypeAlias

import torch

from shardckpt.checkpoint import Checkpoint
from shardckpt.convert.dcp import DcpCheckpoint, fsdp_folders, is_dcp, open_fsdp
from shardckpt.convert.deepspeed import deepspeed_folder, open_deepspeed
from shardckpt.convert.gguf import GGUF_SUFFIX, open_gguf
from shardckpt.convert.layouts import WEIGHTS, raise_unreadable
from shardckpt.convert.like import Like
from shardckpt.convert.npz import NPZ_SUFFIX, open_npz
from shardckpt.convert.safetensors_files import open_hugging_face, open_safetensors
from shardckpt.convert.single_files import INDEX, is_single_file, read_many
from shardckpt.convert.sources import Foreign, Selected, foreign
from shardckpt.convert.torch_checkpointing import (
    has_metadata,
    has_rank_files,
    open_torch_checkpointing,
)
from shardckpt.convert.torch_sources import open_torch_file, open_torch_folder
from shardckpt.convert.torchsnapshot import SNAPSHOT_METADATA, open_torchsnapshot
from shardckpt.convert.transformed import Cast, Transformed, float_dtype
from shardckpt.errors import StateError
from shardckpt.state.saved_tree import Renaming, Select
from shardckpt.storage.base import MANIFEST_NAME, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.resolve import Location, resolve
from shardckpt.transforms import Transforms

__all__ = ["OpenedSource", "open_source"]

OpenedSource: TypeAlias = Checkpoint | Foreign | Selected | Transformed | Cast | Like


def open_source(
    path: str | os.PathLike[str] | Storage,
    *,
    keys: Select = None,
    rename: Renaming = None,
    transforms: Transforms | None = None,
    dtype: torch.dtype | str | None = None,
    like: str | os.PathLike[str] | None = None,
    check: bool = True,
    storage: Storage | None = None,
) -> OpenedSource:
    """Open a checkpoint of any format as a source. Not collective.

    Args:
        path: The checkpoint; see `convert`.
        keys: The entries to select, by their saved names; see `convert`.
        rename: New names of the selected entries; see `convert`.
        transforms: Changes of the tensors, before `keys` and `rename` apply; see `convert`.
        dtype: The dtype of floating-point tensors; see `convert`.
        like: A checkpoint whose tensors the source gets; see `convert`.
        check: Read single files completely now, and verify them if they have digests.
        storage: The storage of `path` and `like`.

    Returns:
        The source, a context manager.

    Raises:
        CheckpointError: The checkpoint can't be read.
        LoadMismatchError: A name or a tensor does not match.
        StateError: An argument is invalid.
    """
    place = resolve(path, storage)
    wanted = None if dtype is None else float_dtype(dtype)
    if wanted is not None and like is not None:
        raise StateError(
            "dtype= and like= exclude each other",
            expected="like= alone, which sets the dtype of each tensor",
            actual=f"dtype={str(wanted).removeprefix('torch.')!r} too",
            remedy="leave out one of them",
        )
    opened: OpenedSource
    if isinstance(place.storage, LocalStorage):
        opened = _open(place, check=check)
    else:
        opened = Checkpoint(place.path, storage=place.storage)
    try:
        if transforms:
            opened = Transformed(opened, transforms)
        if keys is not None:
            opened = Selected(opened, keys=keys)
        if rename is not None:
            opened = Selected(opened, rename=rename)
        if wanted is not None:
            opened = Cast(opened, wanted)
        if like is not None:
            with open_source(like, check=False, storage=storage) as model:
                opened = Like(opened, model)
    except BaseException:
        opened.close()
        raise
    return opened


def _open(place: Location, *, check: bool) -> Checkpoint | Foreign:
    """Open a local checkpoint of the format that its path or its files show."""
    path = place.path
    if is_single_file(path):
        if path.endswith(".safetensors"):
            return open_safetensors(path, check=check)
        if path.endswith(NPZ_SUFFIX):
            return open_npz(path, check=check)
        if path.endswith(GGUF_SUFFIX):
            return open_gguf(path)
        return open_torch_file(path, check=check)
    if os.path.isfile(os.path.join(path, INDEX)):
        return foreign(path, "files of components", read_many(path))
    if not os.path.isfile(os.path.join(path, MANIFEST_NAME)):
        if is_dcp(path):
            return DcpCheckpoint(path).source()
        if os.path.isfile(os.path.join(path, SNAPSHOT_METADATA)):
            return open_torchsnapshot(path)
        if has_metadata(path):
            return open_torch_checkpointing(path, check=check)
        for weights in WEIGHTS:
            if os.path.isfile(os.path.join(path, weights)):
                if ".safetensors" in weights:
                    return open_hugging_face(path, weights)
                return open_torch_folder(path, weights, check=check)
        if fsdp_folders(path):
            return open_fsdp(path)
        if folder := deepspeed_folder(path):
            return open_deepspeed(path, folder, check=check)
        if has_rank_files(path):
            return open_torch_checkpointing(path, check=check)
        raise_unreadable(path)
    return Checkpoint(path, storage=place.storage)
