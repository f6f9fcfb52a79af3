"""Holes in the defences, to be planted: with each of them one hostile input does harm, and the
harness must see it."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shardckpt.convert import dcp, dcp_metadata, foreign_file, safetensors_files
from shardckpt.convert import single_files as whole_files
from shardckpt.convert import torch_reader as torch_file
from shardckpt.format import typed_json as values


def metadata_unpickled() -> None:
    dcp.parse_metadata = lambda data: pickle.loads(bytes(data))  # type: ignore[assignment]


def torch_file_unpickled() -> None:
    whole_files.load_torch_file = lambda path, *_: torch.load(path, weights_only=False)


def torch_file_unchecked() -> None:
    torch_file.check_torch_file = lambda data, path: None


def pickle_not_scanned() -> None:
    dcp_metadata.scan = len


def kind_of_file_unchecked() -> None:
    for module in (foreign_file, whole_files, dcp):
        module.check_regular = os.stat  # type: ignore[attr-defined]
    whole_files.load_torch_file = lambda path, *_: Path(path).read_bytes()


def names_followed() -> None:
    for module in (whole_files, safetensors_files, dcp):
        module.file_in = os.path.join  # type: ignore[attr-defined]


def seal_by_one_key() -> None:
    for module in (whole_files, safetensors_files):
        module.is_sealed = lambda path, metadata: whole_files.TREE in metadata  # type: ignore[attr-defined]


def errors_untyped() -> None:
    for module in (whole_files, safetensors_files):
        module.errors_of = lambda path, remedy: contextlib.nullcontext()  # type: ignore[attr-defined]


def index_of_any_size() -> None:
    def read(path: str, **limits: Any) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    safetensors_files.read_small = read


def enum_imported() -> None:
    values._class_at = lambda module, name: getattr(importlib.import_module(module), name, None)


def expansion_unbounded() -> None:
    torch_file._SPREAD_BYTES = 1 << 62


def sharing_unbounded() -> None:
    torch_file._SHARED_VALUES = 1 << 62


HOLES: dict[str, Callable[[], None]] = {
    "metadata of DCP is unpickled": metadata_unpickled,
    "a torch file is unpickled": torch_file_unpickled,
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
