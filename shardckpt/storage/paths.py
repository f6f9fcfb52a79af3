"""Check the paths that users pass, and convert them to local paths."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from shardckpt.errors import StateError
from shardckpt.storage.posix import translated

__all__ = ["absolute", "local_path"]

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
            remedy="give the path of a file or directory",
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
        "The path is a URL, but checkpoints are saved to and loaded from local paths",
        path=text,
        expected="a path of a mounted file system, or file:///folder",
        actual=f"the scheme {url['scheme']}",
        remedy=f"mount the storage and give that path; a local folder of this name is ./{text}",
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
