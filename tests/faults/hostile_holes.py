"""Holes in the defences, to be planted: with each of them one hostile input does harm, and the
harness must see it."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from shardckpt.convert import (
    dcp,
    dcp_metadata,
    foreign_file,
    safetensors_files,
    single_files,
    torch_checkpointing,
)
from shardckpt.convert import torch_reader as torch_file
from shardckpt.format import typed_json


def replace(name: str, value: Any, *modules: ModuleType) -> None:
    """Put a value in place of what the modules call by a name."""
    for module in modules:
        getattr(module, name)  # a hole in a wall that is gone would show nothing
        setattr(module, name, value)


def metadata_unpickled() -> None:
    replace("parse_metadata", lambda data: pickle.loads(bytes(data)), dcp)


def torch_file_unpickled() -> None:
    replace("load_torch_file", lambda path, *_: torch.load(path, weights_only=False), single_files)


def torch_file_unchecked() -> None:
    replace("check_torch_file", lambda data, path: set(), torch_file)


def pickle_not_scanned() -> None:
    replace("scan", len, dcp_metadata)


def kind_of_file_unchecked() -> None:
    replace("check_regular", os.stat, foreign_file, single_files, dcp)
    replace("load_torch_file", lambda path, *_: Path(path).read_bytes(), single_files)


def names_followed() -> None:
    replace("file_in", os.path.join, foreign_file, single_files, safetensors_files, dcp)


def seal_by_one_key() -> None:
    by_one = lambda path, metadata: single_files.TREE in metadata  # noqa: E731
    replace("is_sealed", by_one, single_files, safetensors_files)


def errors_untyped() -> None:
    untyped = lambda path, remedy: contextlib.nullcontext()  # noqa: E731
    replace("errors_of", untyped, single_files, safetensors_files)


def index_of_any_size() -> None:
    def read(path: str, **limits: Any) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    replace("read_small", read, safetensors_files)


def enum_imported() -> None:
    found = lambda module, name: getattr(importlib.import_module(module), name, None)  # noqa: E731
    replace("imported", found, typed_json)


def expansion_unbounded() -> None:
    replace("_SPREAD_BYTES", 1 << 62, torch_file)


def sharing_unbounded() -> None:
    replace("_SHARED_VALUES", 1 << 62, torch_file)


def rank_metadata_unpickled() -> None:
    replace("PickleStructure", _Unpickler, torch_checkpointing)
    replace("scan", len, torch_checkpointing)


class _Unpickler:
    def __init__(self, data: Any, **options: Any) -> None:
        self.data = data

    def load(self) -> Any:
        return pickle.loads(bytes(self.data))


def rank_file_unpickled() -> None:
    loaded = lambda path, rank: (torch.load(path, weights_only=False), {})  # noqa: E731
    replace("read_local_state", loaded, torch_checkpointing)


HOLES: dict[str, Callable[[], None]] = {
    "metadata of DCP is unpickled": metadata_unpickled,
    "a torch file is unpickled": torch_file_unpickled,
    "metadata of torch_checkpointing are unpickled": rank_metadata_unpickled,
    "a file of a rank is unpickled": rank_file_unpickled,
    "a torch file is not checked": torch_file_unchecked,
    "a pickle is not scanned": pickle_not_scanned,
    "a file of any kind is opened": kind_of_file_unchecked,
    "names and links are followed": names_followed,
    "names and links are followed in DCP": names_followed,
    "one key of the seal is enough": seal_by_one_key,
    "errors stay untyped": errors_untyped,
    "an index of any size is read": index_of_any_size,
    "an enum's module is imported": enum_imported,
    "tensors may be expanded without end": expansion_unbounded,
    "lists may be shared without end": sharing_unbounded,
}
