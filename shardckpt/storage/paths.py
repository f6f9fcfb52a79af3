"""Check the paths that users pass, and convert them to local paths."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from shardckpt.errors import StateError
from shardckpt.storage.posix import translated

__all__ = ["absolute", "is_alias", "local_path"]

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<second>/?)(?P<rest>.*)", re.DOTALL)


def local_path(path: object) -> str:
    """Convert a user's path to a path of the local file system. Makes no system call.

    `~` and `~user` are expanded, and `file:///folder` becomes `/folder`. Any other URL raises an
    error, also one that pathlib has shortened to `s3:/bucket`. A folder named `s3:` can be given as
    `./s3:`. A second call with the result returns it unchanged.

    Raises:
        StateError: `path` is another URL, is neither a str nor an os.PathLike[str], is empty, has a
            character that file names can't have, or names a user who does not exist.
    """
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
        if not isinstance(text, str) or not text or "\0" in text:
            raise TypeError
        os.fsencode(text)
    except (TypeError, UnicodeEncodeError) as error:
        raise StateError(
            "Invalid path",
            expected="a non-empty str or os.PathLike[str] that can be a file name",
            actual=repr(path)[:200],
            remedy="pass the path of a file or directory",
        ) from error
    if url := _URL.match(text):
        return _of_url(text, url)
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded == text:
        raise StateError(
            "The home directory in this path is unknown",
            path=text,
            expected="a user of this machine after the ~",
            actual=text.split("/")[0],
            remedy=f"write the path in full, or ./{text} for a file whose name begins with ~",
        )
    return expanded


def _of_url(text: str, url: re.Match[str]) -> str:
    scheme = url["scheme"].lower()
    host, slash, rest = url["rest"].partition("/")
    if scheme == "file" and not url["second"] and url["rest"]:
        return _checked(text, "/" + unquote(url["rest"]))
    if scheme == "file" and url["second"] and host in ("", "localhost") and slash and rest:
        return _checked(text, "/" + unquote(rest))
    raise StateError(
        "This URL can't be used here",
        path=text,
        expected="a local path or file:///folder; for sharded checkpoints also a URL of s3://, "
        "gs://, az:// or memory://, or of a scheme of register_storage",
        actual=f"the scheme {url['scheme']}",
        remedy=f"pass a local path, or register a storage; a local folder of this name is ./{text}",
    )


def _checked(text: str, path: str) -> str:
    if "\0" in path:
        raise StateError("Invalid path", path=text, expected="a path without %00")
    return path


def absolute(path: str) -> str:
    """Make a path absolute, so that it stays valid when the working directory changes.

    Raises:
        StorageError: The working directory has been removed.
    """
    with translated(path):
        return path if os.path.isabs(path) else os.path.join(os.getcwd(), path)


def is_alias(folder: str, name: str) -> bool:
    """Whether a name in a folder is a symlink to another name in it, such as `latest` to `step-7`.

    An alias must not be counted as a second checkpoint, nor be removed.
    """
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    real = os.path.realpath(path)
    return os.path.dirname(real) == os.path.realpath(folder) and os.path.basename(real) != name
