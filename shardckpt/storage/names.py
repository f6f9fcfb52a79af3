"""The hidden names beside a checkpoint or file, and the names that files of a checkpoint have.

A save of a checkpoint NAME writes to `.NAME.tmp-ID`. ID is 32 hexadecimal digits, new for each
save. A checkpoint that several processes assemble is in `.NAME.parts-ID`, with the ID of the
checkpoint. The lock of both is `.NAME.HASH.lock`. Where the file system can't exchange names,
`.NAME.HASH.old` holds the checkpoint that is being replaced. HASH is a hash of NAME, 32 hexadecimal
digits. A long NAME is shortened, so that no hidden name is longer than 138 bytes.

A write of a file or folder in another format uses `.shardckpt-HASH.ID.part`,
`.shardckpt-HASH.lock` and `.shardckpt-HASH.old` in the same way. The content of such files does not
show who made them. The lock file holds a text which shows that they are shardckpt's.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import NamedTuple

import xxhash

from shardckpt.format.manifest import is_shard_name
from shardckpt.storage.base import MANIFEST_NAME

__all__ = [
    "Hidden",
    "hidden_file_path",
    "hidden_path",
    "is_checkpoint_file",
    "is_hidden_file",
    "is_shortened",
    "parse",
]

_STEM_BYTES = 100
_TEMPORARY = re.compile(r"\.(?P<stem>.+)\.(?P<role>tmp|parts)-[0-9a-f]{32}", re.DOTALL)
_FIXED = re.compile(r"\.(?P<stem>.+)\.(?P<hash>[0-9a-f]{32})\.(?P<role>old|lock)", re.DOTALL)
_OF_FILE = re.compile(r"\.shardckpt-[0-9a-f]{32}\.(?:lock|old|[0-9a-f]{32}\.part)")
_SHORTENED = re.compile(r".*~[0-9a-f]{32}", re.DOTALL)


class Hidden(NamedTuple):
    """A parsed hidden name: the name that it belongs to, and its role.

    Attributes:
        stem: The name of the checkpoint, shortened if it is long.
        role: "tmp", "parts", "old" or "lock".
    """

    stem: str
    role: str


def hidden_path(target: str, role: str) -> str:
    """Return the hidden path beside a checkpoint. The role is "lock", "old", "tmp-ID"
    or "parts-ID"."""
    parent, name = os.path.split(target)
    stem = _stem(name)
    middle = f"{_hash(stem)}." if role in ("lock", "old") else ""
    return os.path.join(parent, f".{stem}.{middle}{role}")


def hidden_file_path(target: str, role: str) -> str:
    """Return the hidden path beside a file or folder in another format.

    The role is "lock", "old" or "ID.part".
    """
    folder, name = os.path.split(target)
    digest = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    return os.path.join(folder, f".shardckpt-{digest}.{role}")


def is_hidden_file(name: str) -> bool:
    """Whether a name has the form of `hidden_file_path`. A user's file may have it too."""
    return _OF_FILE.fullmatch(name) is not None


def parse(name: str) -> Hidden | None:
    """Parse a name that `hidden_path` has made. Returns None for any other name."""
    if temporary := _TEMPORARY.fullmatch(name):
        return Hidden(temporary["stem"], temporary["role"])
    fixed = _FIXED.fullmatch(name)
    if fixed and fixed["hash"] == _hash(fixed["stem"]):
        return Hidden(fixed["stem"], fixed["role"])
    return None


def is_shortened(stem: str) -> bool:
    """Whether a stem stands for a name that was too long."""
    return _SHORTENED.fullmatch(stem) is not None


def is_checkpoint_file(name: str) -> bool:
    """Whether a name is that of a manifest or a shard. All other files belong to the user."""
    return name == MANIFEST_NAME or is_shard_name(name)


def _stem(name: str) -> str:
    data = os.fsencode(name)
    if len(data) <= _STEM_BYTES:
        return name
    digest = _hash(name)
    return data[: _STEM_BYTES - len(digest) - 1].decode(errors="ignore") + f"~{digest}"


def _hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(b"shardckpt " + os.fsencode(text))
