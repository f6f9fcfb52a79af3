"""The hidden names beside a checkpoint or file, and which names in a directory are shardckpt's.

A save of a checkpoint NAME makes `.NAME.tmp-ID`, ID being 32 hexadecimal digits that are new each
time. Its lock is `.NAME.MARK.lock`, and `.NAME.MARK.old` holds the checkpoint that it replaces
where the file system can't swap names; MARK is 32 hexadecimal digits that follow from NAME. A long
NAME is cut in them, so that no hidden name is longer than 138 bytes.

A write of a file or folder in another format makes `.shardckpt-HASH.ID.part`, with the lock
`.shardckpt-HASH.lock` and, as above, `.shardckpt-HASH.old`; HASH follows from NAME. Such files hold
nothing by which they could be told from a user's, so the lock file says that they are shardckpt's.
"""

from __future__ import annotations

import hashlib
import os
import re

import xxhash

from shardckpt.format.manifest import is_shard_name
from shardckpt.storage.base import MANIFEST_NAME

__all__ = ["Hidden", "beside", "beside_file", "is_beside_file", "is_cut", "is_ours", "parse"]

_STEM_BYTES = 100
_TEMPORARY = re.compile(r"\.(?P<stem>.+)\.(?P<kind>tmp)-[0-9a-f]{32}", re.DOTALL)
_FIXED = re.compile(r"\.(?P<stem>.+)\.(?P<mark>[0-9a-f]{32})\.(?P<kind>old|lock)", re.DOTALL)
_OF_FILE = re.compile(r"\.shardckpt-[0-9a-f]{32}\.(?:lock|old|[0-9a-f]{32}\.part)")
_CUT = re.compile(r".*~[0-9a-f]{32}", re.DOTALL)

Hidden = tuple[str, str]
"""The stem of a hidden name, and its kind: "tmp", "old" or "lock"."""


def beside(target: str, kind: str) -> str:
    """The hidden path beside a target, of a kind: "lock", "old" or "tmp-ID"."""
    parent, name = os.path.split(target)
    stem = _stem(name)
    middle = f"{_mark(stem)}." if kind in ("lock", "old") else ""
    return os.path.join(parent, f".{stem}.{middle}{kind}")


def beside_file(target: str, kind: str) -> str:
    """The hidden path beside a file or folder in another format: "lock", "old" or "ID.part"."""
    folder, name = os.path.split(target)
    mark = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    return os.path.join(folder, f".shardckpt-{mark}.{kind}")


def is_beside_file(name: str) -> bool:
    """Whether `beside_file` could have made a name; who made it, the lock file says."""
    return _OF_FILE.fullmatch(name) is not None


def parse(name: str) -> Hidden | None:
    """What a hidden name that `beside` has made says; None for any other name."""
    if found := _TEMPORARY.fullmatch(name):
        return found["stem"], found["kind"]
    found = _FIXED.fullmatch(name)
    if found and found["mark"] == _mark(found["stem"]):
        return found["stem"], found["kind"]
    return None


def is_cut(stem: str) -> bool:
    """Whether a stem is that of a name that was too long."""
    return _CUT.fullmatch(stem) is not None


def is_ours(name: str) -> bool:
    """Whether a file of a checkpoint's directory has a name that shardckpt gives."""
    return name == MANIFEST_NAME or is_shard_name(name)


def _stem(name: str) -> str:
    data = os.fsencode(name)
    if len(data) <= _STEM_BYTES:
        return name
    mark = _mark(name)
    return data[: _STEM_BYTES - len(mark) - 1].decode(errors="ignore") + f"~{mark}"


def _mark(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(b"shardckpt " + os.fsencode(text))
