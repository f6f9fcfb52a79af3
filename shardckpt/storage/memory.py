"""Checkpoints in the memory of this process, for tests: `memory://` URLs.

They are stored by the same steps as in an object store, so that a test without a server covers
these steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence

from shardckpt.storage.object_store import ObjectStorage
from shardckpt.storage.objects import (
    ConditionFailedError,
    NoObjectError,
    ObjectInfo,
    Objects,
    Upload,
)

__all__ = ["MemoryObjects", "MemoryStorage", "open_url"]


class MemoryStorage(ObjectStorage):
    """A storage in the memory of one process. It has the rules of an object store.

    Paths are URLs such as `memory://tests/run/step-1`. Without a storage of your own, all
    `memory://` URLs of a process share one. Several ranks can share it only as threads.

    Example:
        >>> import torch, shardckpt
        >>> storage = shardckpt.MemoryStorage()
        >>> report = shardckpt.save({"weight": torch.ones(3)}, "memory://run/1", storage=storage)
        >>> shardckpt.load_state("memory://run/1", storage=storage)
        {'weight': tensor([1., 1., 1.])}
    """

    def __init__(self) -> None:
        self._buckets: dict[str, MemoryObjects] = {}
        super().__init__(self._bucket)

    def _bucket(self, url: str) -> MemoryObjects:
        return self._buckets.setdefault(url, MemoryObjects(url))


class MemoryObjects(Objects):
    """See Objects."""

    in_memory = True

    def __init__(self, url: str) -> None:
        self.url = url
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, ObjectInfo]] = {}
        self._puts = 0

    def _put(self, key: str, data: bytes) -> str:
        self._puts += 1
        found = ObjectInfo(key, len(data), str(self._puts), time.time())
        self._objects[key] = data, found
        return found.version

    def put(self, key: str, data: bytes) -> None:
        """Put an object, whatever is there."""
        with self._lock:
            self._put(key, data)

    def put_if(self, key: str, data: bytes, *, replaces: str | None) -> str:
        """See Objects.put_if."""
        with self._lock:
            found = self._objects.get(key)
            if (found[1].version if found else None) != replaces:
                raise ConditionFailedError(key)
            return self._put(key, data)

    def upload(self, key: str, *, size_bytes: int) -> Upload:
        """See Objects.upload."""
        return _MemoryUpload(self, key)

    def get(self, key: str) -> tuple[bytes, str]:
        """See Objects.get."""
        with self._lock:
            if key not in self._objects:
                raise NoObjectError(key)
            data, found = self._objects[key]
            return data, found.version

    def read(self, key: str, *, offset: int, size_bytes: int) -> memoryview:
        """See Objects.read."""
        return memoryview(self.get(key)[0])[offset : offset + size_bytes]

    def head(self, key: str) -> ObjectInfo | None:
        """See Objects.head."""
        with self._lock:
            return self._objects[key][1] if key in self._objects else None

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        """See Objects.list."""
        with self._lock:
            return [found for key, (_, found) in self._objects.items() if key.startswith(prefix)]

    def folders(self, prefix: str) -> Sequence[str]:
        """See Objects.folders."""
        rests = [found.key.removeprefix(prefix) for found in self.list(prefix)]
        return sorted({rest.split("/")[0] for rest in rests if "/" in rest})

    def delete(self, keys: Sequence[str]) -> None:
        """See Objects.delete."""
        with self._lock:
            for key in keys:
                self._objects.pop(key, None)

    def copy(self, source: str, target: str) -> None:
        """See Objects.copy."""
        self.put(target, self.get(source)[0])


class _MemoryUpload(Upload):
    def __init__(self, objects: MemoryObjects, key: str) -> None:
        self._objects, self._key = objects, key
        self._parts: list[bytes] = []

    def write(self, data: memoryview | bytes) -> None:
        """See Upload.write."""
        self._parts.append(bytes(data))

    def finish(self) -> None:
        """See Upload.finish."""
        self._objects.put(self._key, b"".join(self._parts))

    def cancel(self) -> None:
        """See Upload.cancel."""
        self._parts.clear()


_shared = MemoryStorage()


def open_url(url: str) -> MemoryStorage:
    """Return the storage of all `memory://` URLs of this process."""
    return _shared
