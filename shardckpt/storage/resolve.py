"""Find the storage of each path, URL or storage object that a user passes.

A URL belongs to the storage that is registered for its scheme. A path without a scheme, and a
`file://` URL, belong to the local file system.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from shardckpt.errors import StateError
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.paths import absolute

__all__ = ["Location", "register_storage", "resolve", "scheme_of"]

OpenStorage = Callable[[str], Storage]
"""A function that takes a URL and returns its storage."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+")
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>//?)(?P<rest>.*)", re.DOTALL)
_BUILT_IN = {
    "memory": "memory",
    "s3": "object_clients",
    "gs": "object_clients",
    "az": "object_clients",
    "tiers": "tiers",
}
"""Scheme -> module with a function `open_url`. Imported at first use: it may need an extra."""

_registered: dict[str, OpenStorage] = {}


class Location(NamedTuple):
    """A path in a storage."""

    storage: Storage
    path: str


def register_storage(scheme: str, open_storage: OpenStorage) -> None:
    """Register the storage of a URL scheme, for every function that takes a path. Not collective.

    A scheme that is registered already gets the new storage.

    Args:
        scheme: The scheme, such as "s3": letters, digits, `+`, `.` and `-`, at least two.
        open_storage: Called with a URL of the scheme; returns its storage. The storage gets the URL
            in full as the path. Called for each use of a URL: return one storage for all URLs that
            share connections or memory.

    Raises:
        StateError: The scheme is invalid, or "file".

    Example:
        >>> import shardckpt, torch
        >>> class Folder(shardckpt.LocalStorage):
        ...     def full_path(self, path):
        ...         return super().full_path(path.replace("runs://", "runs/"))
        >>> shardckpt.register_storage("runs", lambda url: Folder())
        >>> report = shardckpt.save({"weight": torch.ones(3)}, "runs://step-1")
        >>> shardckpt.load_state("runs/step-1")
        {'weight': tensor([1., 1., 1.])}
    """
    if _SCHEME.fullmatch(scheme) is None or scheme.lower() == "file":
        raise StateError(
            "Invalid scheme for a storage",
            expected='letters, digits, "+", "." and "-", at least two, other than "file"',
            actual=repr(scheme),
        )
    _registered[scheme.lower()] = open_storage


def scheme_of(path: str) -> str | None:
    """Return the scheme of a URL with a registered storage. None for any other path."""
    found = _URL.fullmatch(path)
    scheme = found["scheme"].lower() if found else ""
    return scheme if scheme in _registered or scheme in _BUILT_IN else None


def resolve(path: object, storage: Storage | None = None, *, fixed: bool = False) -> Location:
    """Find the storage and the full path of a path that a user passes.

    Args:
        path: A path, a URL, or a storage that has a root.
        storage: The storage of the path. By default the scheme of the path decides.
        fixed: Make local paths absolute, so that a later change of directory does not matter.

    Raises:
        StateError: The path is invalid, or no storage is registered for its scheme.
        DependencyError: The storage needs an extra that is not installed.
    """
    if isinstance(path, Storage):
        if storage not in (None, path):
            raise StateError(
                "A storage was given twice",
                expected="a storage as the path, or a path and storage=",
                actual=f"{type(path).__qualname__} and storage={type(storage).__qualname__}",
                remedy="leave out storage=",
            )
        return Location(path, path.full_path(""))
    if not (storage is None or isinstance(storage, Storage)):
        raise StateError(
            "Invalid storage", expected="a shardckpt.Storage", actual=repr(storage)[:200]
        )
    text = None
    with suppress(TypeError):
        text = os.fspath(path)  # type: ignore[call-overload]
    if storage is None and isinstance(text, str) and (scheme := scheme_of(text)) is not None:
        url = _canonical(text, shortened=not isinstance(path, str))
        storage = _open_storage(scheme, url)
        return Location(storage, storage.full_path(url))
    if storage is not None and not isinstance(storage, LocalStorage) and isinstance(text, str):
        return Location(storage, storage.full_path(text))
    storage = storage or LocalStorage()
    full = storage.full_path(path if text is None else text)  # type: ignore[arg-type]
    return Location(storage, absolute(full) if fixed else full)


def _canonical(text: str, *, shortened: bool) -> str:
    """Return a URL with its scheme in lower case and both slashes, as pathlib removes one."""
    found = _URL.fullmatch(text)
    assert found is not None
    slashes = "//" if shortened else found["slashes"]
    return f"{found['scheme'].lower()}:{slashes}{found['rest']}"


def _open_storage(scheme: str, url: str) -> Storage:
    if scheme in _registered:
        return _registered[scheme](url)
    opened: Storage = importlib.import_module(f"shardckpt.storage.{_BUILT_IN[scheme]}").open_url(
        url
    )
    return opened
