"""Helpers of the tests of object stores."""

from shardckpt.storage.resolve import resolve


def keys(path: str) -> list[str]:
    """Return the keys of the objects below a URL."""
    storage, path = resolve(path)
    objects, prefix = storage.at(path)
    return sorted(found.key.removeprefix(prefix) for found in objects.list(prefix))
