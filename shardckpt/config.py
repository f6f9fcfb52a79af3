"""Options, which a with block or an environment variable changes.

An option is read when it is used. `options(...)` takes precedence over the environment variable
`SHARDCKPT_NAME`, which takes precedence over the default.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import Field, dataclass, field, fields, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from shardckpt.errors import OptionError

__all__ = ["Options", "current", "options"]


def _option(default: float, *, least: float) -> Any:
    return field(default=default, metadata={"least": least})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options and their defaults. Names end in their unit: _s is seconds.

    Attributes:
        arrival_deadline_s: Seconds to wait for a rank that has not called save or load yet. In a
            group that NNHandler started, also the limit of the collectives of training.
        deadline_s: Seconds without a heartbeat after which a rank counts as failed.
        stall_deadline_s: Seconds that one read, write or copy may take on a live rank.
        shared_deadline_s: Seconds to wait until a rank sees the directory that rank 0 created.
            Network file systems may show it late.
        read_threads: Number of reads at the same time, each in its own thread. Reads that bypass
            the page cache use twice as many.
        read_past_cache: Whether data outside the page cache may be read without filling it, if no
            other rank of the machine reads the same data. Set to 0 if unrelated processes on this
            machine read the same checkpoint.
        read_once: Whether blocks that several ranks need are read by one of them, if they are read
            from an object store or by several machines. Rank 0 decides for all ranks.
        staging_bytes: Bytes of staged state that a process may hold. A save beyond the limit is
            staged after earlier ones are written; one save is always accepted. 0 allows two saves.
        copy_at_once_bytes: async_save copies tensors up to this size before it returns, if
            they are neither parameters nor optimizer state.
        background_nice: By how much the background threads lower their priority (see nice(1)).
        store_deadline_s: Seconds for which a request to an object store is repeated.
        leftover_age_s: Seconds after which objects that no manifest names are leftovers of a dead
            save. No save may take longer. So are the files of a copy to a slower tier.
        storage: Settings of object stores by name, such as `{"endpoint": "http://127.0.0.1:9000"}`.
            They take precedence over the store's own environment variables.
    """

    arrival_deadline_s: float = _option(600.0, least=0.1)
    deadline_s: float = _option(30.0, least=0.1)
    stall_deadline_s: float = _option(600.0, least=0.1)
    shared_deadline_s: float = _option(0.8, least=0.1)
    read_threads: int = _option(min(8, os.cpu_count() or 1), least=1)
    read_past_cache: bool = _option(True, least=0)
    read_once: bool = _option(True, least=0)
    staging_bytes: int = _option(0, least=0)
    copy_at_once_bytes: int = _option(64 << 10, least=0)
    background_nice: int = _option(10, least=0)
    store_deadline_s: float = _option(60.0, least=0.1)
    leftover_age_s: float = _option(86400.0, least=1.0)
    storage: Mapping[str, Any] = field(default_factory=dict, metadata={"least": None})


_FIELDS: Mapping[str, Field[Any]] = MappingProxyType({f.name: f for f in fields(Options)})
_VARIABLES: Mapping[str, str] = MappingProxyType(
    {name: f"SHARDCKPT_{name.upper()}" for name in _FIELDS}
)
_overrides: ContextVar[Mapping[str, Any]] = ContextVar("shardckpt_options", default={})  # noqa: B039


def current() -> Options:
    """Return the current options. Not collective.

    Raises:
        OptionError: An environment variable does not hold a number that the option accepts.
    """
    found = _of_environment(tuple(map(os.environ.get, _VARIABLES.values())))
    overrides = _overrides.get()
    return replace(found, **overrides) if overrides else found


@lru_cache(maxsize=8)
def _of_environment(texts: tuple[str | None, ...]) -> Options:
    """Return the options for the texts of the environment variables."""
    values = {}
    for (name, variable), text in zip(_VARIABLES.items(), texts, strict=True):
        if text is not None:
            values[name] = _checked(name, text, source=variable)
    return Options(**values)


@contextmanager
def options(**changes: Any) -> Iterator[None]:
    """Change options for the calls inside a with block. Not collective.

    An async_save that starts inside the block keeps its options until it has ended. The options
    of other threads do not change.

    Args:
        **changes: The options to change; the attributes of `shardckpt.config.Options`.

    Raises:
        OptionError: The option does not exist, or does not accept the value.

    Example:
        >>> import shardckpt, torch
        >>> with shardckpt.options(read_threads=4, deadline_s=60):
        ...     report = shardckpt.save({"weight": torch.ones(3)}, "run/step-1")
    """
    checked = {name: _checked(name, value, source=name) for name, value in changes.items()}
    token = _overrides.set({**_overrides.get(), **checked})
    try:
        yield
    finally:
        _overrides.reset(token)


def _checked(name: str, value: Any, *, source: str) -> Any:
    if name not in _FIELDS:
        raise OptionError(
            "Unknown option", expected=f"one of {', '.join(_FIELDS)}", actual=repr(name)
        )
    option = _FIELDS[name]
    least = option.metadata["least"]
    if least is None:
        return _checked_mapping(value, source=source)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not least <= number < float("inf"):
        raise OptionError(
            f"Invalid value for the option {source}",
            expected=f"a number of at least {least}",
            actual=repr(value),
            remedy=f"set {source} to a number, or leave it out for the default, {option.default}",
        )
    option_type: Any = type(option.default)
    return option_type(number)


def _checked_mapping(value: Any, *, source: str) -> Mapping[str, Any]:
    """Check a mapping with str keys, or decode its JSON. Raises OptionError."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError:
            found = None
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise OptionError(
            f"Invalid value for the option {source}",
            expected="a dict with str keys, or a JSON object",
            actual=type(value).__name__,  # it may hold a password
            remedy=f"set {source} to a dict, or leave it out",
        )
    return MappingProxyType(dict(found))
