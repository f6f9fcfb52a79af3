"""The requests that an object store takes, one method each. Tests inject faults here.

An object appears under its key at once and complete, and is never changed afterwards. Only the
manifest of a checkpoint replaces another object, under a condition.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["ConditionFailedError", "NoObjectError", "ObjectInfo", "Objects", "Upload"]


class NoObjectError(Exception):
    """No object has this key."""


class ConditionFailedError(Exception):
    """The condition of a put does not hold: nothing was changed."""


class ObjectInfo(NamedTuple):
    """An object as the store describes it.

    Attributes:
        key: The key.
        size_bytes: The size.
        version: A text that no other content of this key has.
        modified_s: The time of the put by the store's clock, in seconds since 1970.
    """

    key: str
    size_bytes: int
    version: str
    modified_s: float


class Upload(ABC):
    """An object being uploaded. It appears when it is finished."""

    @abstractmethod
    def write(self, data: memoryview | bytes) -> None:
        """Append bytes. The memory may change when this returns."""

    @abstractmethod
    def finish(self) -> None:
        """Upload the rest and make the object appear, durably."""

    @abstractmethod
    def cancel(self) -> None:
        """End the upload after an error, without an object as far as that works. Never raises."""


class Objects(ABC):
    """The objects of one bucket.

    Methods raise StorageError: StoreUnavailableError if the store does not answer or throttles,
    StoragePermissionError if it refuses the credentials. A request that raised an error may have
    been carried out.

    Attributes:
        url: The URL of the bucket, such as `s3://bucket`.
        in_memory: Reads never wait for another machine.
    """

    url: str
    in_memory: bool = False

    @abstractmethod
    def put_if(self, key: str, data: bytes, *, replaces: str | None) -> str:
        """Put an object under a condition, with one attempt; returns its version.

        Args:
            key: The key.
            data: The content.
            replaces: The version that it replaces; None if there must be no object.

        Raises:
            ConditionFailedError: The condition does not hold.
        """

    @abstractmethod
    def upload(self, key: str, *, size_bytes: int) -> Upload:
        """Begin the upload of an object of this size."""

    @abstractmethod
    def get(self, key: str) -> tuple[bytes, str]:
        """Return the content and the version of an object.

        Raises:
            NoObjectError: The object does not exist.
        """

    @abstractmethod
    def read(self, key: str, *, offset: int, size_bytes: int) -> memoryview:
        """Return a range of an object: fewer bytes only at its end.

        Raises:
            NoObjectError: The object does not exist.
        """

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """Describe an object. None if it does not exist."""

    @abstractmethod
    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        """Describe all objects whose keys begin with a prefix."""

    @abstractmethod
    def folders(self, prefix: str) -> Sequence[str]:
        """List the distinct parts of keys between a prefix, which ends in `/`, and the next `/`."""

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, as far as they exist."""

    @abstractmethod
    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store.

        Raises:
            NoObjectError: The object does not exist.
        """
