"""Torch files of other programs as sources: one file, or `pytorch_model.bin` (Hugging Face)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from shardckpt.convert.foreign_file import file_in, indexed_file, read_small
from shardckpt.convert.layouts import companions, left_beside, writer_of
from shardckpt.convert.single_files import errors_of, read_one
from shardckpt.convert.sources import Foreign, Origin, foreign
from shardckpt.convert.torch_objects import ObjectsLoader, StandIn
from shardckpt.errors import CorruptionError, NotACheckpointError

__all__ = ["Index", "open_torch_file", "open_torch_folder", "read_objects"]

_REMEDY = "convert another checkpoint, or download the file again"
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_LIGHTNING = "pytorch-lightning_version"


class Index(msgspec.Struct):
    """An index in the layout of Hugging Face: name of a tensor -> its file."""

    weight_map: dict[str, str]


def open_torch_file(path: str, *, check: bool) -> Foreign:
    """Open a torch file as a source. Objects in it are left out and listed. `check`: verify its
    checksums."""
    _check_magic(path)
    objects = ObjectsLoader()
    state = read_objects(path, objects, check=check)
    version = state.get(_LIGHTNING)
    origin = Origin(
        format="a torch file",
        writer=f"Lightning {version}" if version else None,
        left_out=objects.left_out,
        changed=objects.changed,
    )
    size = os.path.getsize(path)
    return foreign(path, "a torch file", state, identity=size, origin=origin)


def _check_magic(path: str) -> None:
    """Check that a file without the suffix of a torch file begins like one."""
    if path.endswith(_SUFFIXES):
        return
    with errors_of(path, _REMEDY), open(path, "rb") as file:
        magic = file.read(4)
    folder = os.path.dirname(path) or "."
    is_part = path.endswith(".distcp")
    if is_part or not magic.startswith((b"PK\3\4", b"\x80")):
        raise NotACheckpointError(
            "The file is not a torch file",
            path=path,
            expected="a zip archive of torch.save, or a pickle of torch before 1.6",
            actual="a part of a DCP checkpoint" if is_part else f"a file that begins {magic!r}",
            remedy=f"convert the folder {folder}" if is_part else "check the path",
        )


def read_objects(path: str, objects: ObjectsLoader, *, check: bool = True) -> dict[Any, Any]:
    """Read the dict in a torch file. Objects in it are left out and listed in `objects`.

    Raises NotACheckpointError for a file that holds anything else, and CorruptionError.
    """
    state = read_one(path, check=check, load=objects.load)
    with errors_of(path, _REMEDY):
        state = objects.plain(state, "")
    if isinstance(state, Mapping):
        return dict(state)
    if isinstance(state, StandIn) and state.name:
        raise NotACheckpointError(
            "This file holds one object of a class, which only unpickling could read",
            path=path,
            expected="a dict of tensors and values, such as a state_dict()",
            actual=f"an object of {state.name}",
            remedy="if you trust it, load it in a program with its class; save its state_dict()",
        )
    raise NotACheckpointError(
        "This file does not hold a dict",
        path=path,
        expected="a dict of tensors and values",
        actual=state.state if isinstance(state, StandIn) else type(state).__name__,
        remedy='save it again as a dict: torch.save({"name": value}, path)',
    )


def open_torch_folder(path: str, weights: str, *, check: bool) -> Foreign:
    """Open a folder in the layout of Hugging Face with torch files as a source: a flat state of
    tensors. `weights` is the file with the tensors, or the index."""
    weight_map: dict[str, str] | None = None
    with errors_of(path, _REMEDY):
        if weights.endswith(".json"):
            text = read_small(file_in(path, weights))
            weight_map = msgspec.json.decode(text, type=Index).weight_map
    objects = ObjectsLoader()
    state: dict[Any, Any] = {}
    names = sorted(set(weight_map.values())) if weight_map is not None else [weights]
    for name in names:
        file_path = indexed_file(path, name, weights)
        found = read_objects(file_path, objects, check=check)
        wanted = {tensor for tensor, at in (weight_map or {}).items() if at == name}
        if missing := wanted - {key for key, item in found.items() if torch.is_tensor(item)}:
            raise CorruptionError(
                "The index does not match a file of these weights",
                path=file_path,
                tensor=min(missing),
                expected=f"the {len(wanted)} tensors that {weights} names",
                actual=f"{len(found)} entries",
                remedy=_REMEDY,
            )
        state.update(found)
    used = {*names, weights}
    origin = Origin(
        format="Hugging Face's layout, torch files",
        writer=writer_of(path),
        left_out={**left_beside(path, used), **objects.left_out},
        changed=objects.changed,
        files=tuple(sorted(used)),
        companions=companions(path),
    )
    sizes = [os.path.getsize(file_in(path, name)) for name in names]
    return foreign(path, "Hugging Face", state, identity=sizes, origin=origin)
