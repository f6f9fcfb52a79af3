"""S3, Google Cloud Storage and Azure Blob Storage, through obstore.

Credentials, regions and endpoints come from the environment, as the stores' own tools take them
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME
and so on), or from the option `storage`. obstore has the list of their names. For S3, boto3 finds
the credentials that neither of them holds: those of a profile in ~/.aws, or of the machine's role.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from shardckpt.config import current
from shardckpt.errors import (
    DependencyError,
    StateError,
    StorageError,
    StoragePermissionError,
    StoreUnavailableError,
)
from shardckpt.storage.object_store import ObjectStorage
from shardckpt.storage.objects import (
    ConditionFailedError,
    NoObjectError,
    ObjectInfo,
    Objects,
    Upload,
)

__all__ = ["ClientObjects", "open_url"]

T = TypeVar("T")

PART_BYTES = 8 << 20
"""The size of a part of an upload: that of a buffer of the write pipeline."""

_PARTS_IN_FLIGHT = 4  # for each object being uploaded
_PARTS = 10_000  # at most, in S3
_EXTRAS = {"s3": "s3", "gs": "gcs", "az": "azure"}
_UNAVAILABLE = re.compile(r"status code: (408|409|429|5\d\d)\b|HTTP error: (?!builder)")
"""The texts of errors after which the same request may succeed. obstore has no types for them."""

_EXISTS = "<Code>BlobAlreadyExists</Code>"
_CUT = "response body error"
_READS = 3  # of a body that was cut: obstore repeats all other reads by itself
_CLIENT = {
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "proxy_ca_certificate",
    "proxy_excludes",
    "proxy_url",
    "root_certificate",
    "timeout",
    "user_agent",
}
"""Settings of the connection; obstore takes them apart from those of the store."""

_AWS_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
}
"""Settings with which obstore has the credentials, or needs none."""

_AWS_ENDPOINTS = {"AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"}

_MACHINE = re.compile(r"169\.254\.169\.254|metadata\.google\.internal")
"""In the texts of errors of a request for the credentials of the machine."""

_VARIABLES = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT",
    "az": "AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or AZURE_USE_AZURE_CLI",
}

_ALLOW_HTTP = ("AWS_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP", "AZURE_ALLOW_HTTP")
_DELETE_AT_ONCE = 1000


def open_url(url: str) -> ObjectStorage:
    """Return the storage of all URLs of object stores.

    Raises:
        DependencyError: obstore is not installed.
    """
    scheme = url.partition(":")[0]
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            f"URLs of {scheme}:// need obstore, which is not installed",
            path=url,
            remedy=f'pip install "shardckpt[{_EXTRAS[scheme]}]"',
        ) from error
    return _storage


def _bucket(url: str) -> Objects:
    settings = json.dumps(dict(current().storage), sort_keys=True)
    names = ("AWS_", "GOOGLE_", "AZURE_")
    environment = tuple(item for item in os.environ.items() if item[0].startswith(names))
    deadlines = current().store_deadline_s, current().stall_deadline_s
    return _client(url, settings, environment, deadlines, os.getpid())


@functools.lru_cache(maxsize=32)
def _client(
    url: str,
    settings: str,
    environment: tuple[tuple[str, str], ...],
    deadlines: tuple[float, float],
    process: int,
) -> ClientObjects:
    """Return the client of a bucket, which keeps its connections.

    Another environment or process gets another client.
    """
    return ClientObjects(url, json.loads(settings))


_storage = ObjectStorage(_bucket)


class ClientObjects(Objects):
    """The objects of a bucket; see Objects.

    Args:
        url: The URL of the bucket.
        settings: Settings of obstore's store, such as `endpoint`.
    """

    def __init__(self, url: str, settings: dict[str, Any]) -> None:
        from obstore import store

        self.url = url
        retried: dict[str, Any] = {
            "backoff": {
                "init_backoff": timedelta(seconds=0.1),
                "max_backoff": timedelta(seconds=5),
                "base": 2,
            },
            "retry_timeout": timedelta(seconds=current().store_deadline_s),
        }
        profile = _profile(url, settings)
        options: dict[str, Any] = {
            **profile,
            "config": {
                **_unsigned(url, {**profile.get("config", {}), **settings}),
                **profile.get("config", {}),
                **{key: value for key, value in settings.items() if key not in _CLIENT},
            },
            "client_options": {
                "timeout": timedelta(seconds=current().stall_deadline_s),
                "connect_timeout": timedelta(seconds=10),
                "allow_http": any(_is_true(os.environ.get(name)) for name in _ALLOW_HTTP),
                **_certificates(url),
                **{key: value for key, value in settings.items() if key in _CLIENT},
            },
        }
        try:
            open_store: Any = store.from_url  # its overloads depend on the scheme
            self._store: Any = open_store(
                url, retry_config={"max_retries": 10, **retried}, **options
            )
            # With a single attempt, the answer shows whether the condition holds.
            self._once: Any = open_store(url, retry_config={"max_retries": 0, **retried}, **options)
        except Exception as error:
            raise StateError(
                "The store can't be opened with these settings",
                path=url,
                actual=_first_line(error),
                remedy="check the environment variables of the store, and the option storage",
            ) from error

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn the errors of obstore into those of Objects."""
        from obstore import exceptions

        try:
            yield
        except StorageError:
            raise
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._error("The bucket does not exist", key, error) from error
            raise NoObjectError(key) from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise StoragePermissionError(
                "The store refused the credentials",
                path=f"{self.url}/{key}",
                actual=_first_line(error),
                remedy="check the credentials and the rights of their owner",
            ) from error
        except (exceptions.BaseError, OSError, ValueError) as error:
            if _MACHINE.search(_first_line(error)):
                scheme = self.url.partition(":")[0]
                raise StoragePermissionError(
                    "The environment has no credentials for the store, and this machine has none",
                    path=f"{self.url}/{key}",
                    actual=_first_line(error),
                    remedy=f"set {_VARIABLES.get(scheme, 'the credentials')}",
                ) from error
            if _UNAVAILABLE.search(_first_line(error)):
                raise StoreUnavailableError(
                    "The store does not answer, or asks for fewer requests",
                    path=f"{self.url}/{key}",
                    actual=_first_line(error),
                    remedy="check the endpoint and the network; then try again",
                ) from error
            raise self._error("The store refused a request", key, error) from error

    @contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        """Turn errors into those of Objects, for a request that needs no object."""
        try:
            with self._errors(key):
                yield
        except NoObjectError as error:
            raise self._error("The store does not take an object", key, error) from error

    def _error(self, message: str, key: str, error: Exception) -> StorageError:
        return StorageError(
            message,
            path=f"{self.url}/{key}",
            actual=_first_line(error),
            remedy="check the bucket, the endpoint and the region",
        )

    def put_if(self, key: str, data: bytes, *, replaces: str | None) -> str:
        """See Objects.put_if."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "create" if replaces is None else json.loads(replaces)
        with self._writing(key):
            try:
                put = obstore.put(self._once, key, data, mode=mode, use_multipart=False)
            except (AlreadyExistsError, PreconditionError) as error:
                # 409 says that another request was under way, apart from this code of Azure.
                if _UNAVAILABLE.search(_first_line(error)) and _EXISTS not in str(error):
                    raise
                raise ConditionFailedError(key) from error
        return _version(put)

    def upload(self, key: str, *, size_bytes: int) -> Upload:
        """See Objects.upload."""
        return _ClientUpload(self, key, size_bytes)

    def get(self, key: str) -> tuple[bytes, str]:
        """See Objects.get."""
        import obstore

        def get() -> tuple[bytes, str]:
            result = obstore.get(self._store, key)
            return bytes(result.bytes()), _version(result.meta)

        with self._errors(key):
            return _repeated(get)

    def read(self, key: str, *, offset: int, size_bytes: int) -> memoryview:
        """See Objects.read."""
        import obstore

        if not size_bytes:
            return memoryview(b"")

        with self._errors(key):
            try:
                return memoryview(
                    _repeated(
                        lambda: obstore.get_range(self._store, key, start=offset, length=size_bytes)
                    )
                )
            except Exception as error:
                if "status code: 416" not in _first_line(error):
                    raise
                return memoryview(b"")  # the object ends before the range begins

    def head(self, key: str) -> ObjectInfo | None:
        """See Objects.head."""
        import obstore

        with suppress(NoObjectError), self._errors(key):
            return _object_info(obstore.head(self._store, key))
        return None

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        """See Objects.list."""
        import obstore

        # obstore takes a prefix as whole parts of keys.
        with self._errors(prefix):
            for chunk in obstore.list(self._store, prefix.rstrip("/") or None):
                yield from map(_object_info, chunk)

    def folders(self, prefix: str) -> Sequence[str]:
        """See Objects.folders."""
        import obstore

        with self._errors(prefix):
            found = obstore.list_with_delimiter(self._store, prefix.rstrip("/") or None)
        return [path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]]

    def delete(self, keys: Sequence[str]) -> None:
        """See Objects.delete."""
        import obstore

        for begin in range(0, len(keys), _DELETE_AT_ONCE):
            with suppress(NoObjectError), self._errors(keys[begin]):
                obstore.delete(self._store, list(keys[begin : begin + _DELETE_AT_ONCE]))

    def copy(self, source: str, target: str) -> None:
        """See Objects.copy."""
        import obstore

        with self._errors(source):
            obstore.copy(self._store, source, target)


class _ClientUpload(Upload):
    """An upload in parts, several of them in flight."""

    def __init__(self, objects: ClientObjects, key: str, size_bytes: int) -> None:
        import obstore

        self._objects, self._key, self._size_bytes = objects, key, size_bytes
        part_bytes = max(PART_BYTES, -(-size_bytes // _PARTS))
        with objects._writing(key):
            self._writer: Any = obstore.open_writer(
                objects._store, key, buffer_size=part_bytes, max_concurrency=_PARTS_IN_FLIGHT
            )

    def write(self, data: memoryview | bytes) -> None:
        """See Upload.write."""
        with self._objects._writing(self._key):
            # obstore reads it later. This copies it unless it is bytes.
            self._writer.write(bytes(data))

    def finish(self) -> None:
        """See Upload.finish."""
        try:
            with self._objects._writing(self._key):
                self._writer.close()
        except StorageError:
            # The last request may have been carried out although its answer was lost.
            with suppress(StorageError):
                found = self._objects.head(self._key)
                if found is not None and found.size_bytes == self._size_bytes:
                    return
            raise

    def cancel(self) -> None:
        """See Upload.cancel. obstore can't abort an upload: it is finished, then deleted."""
        with suppress(Exception):
            self._writer.close()
        with suppress(Exception):
            self._objects.delete([self._key])


def _profile(url: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of obstore's store with the credentials that boto3 finds for S3, and with
    the endpoint of their profile. Empty if the environment or the settings have credentials."""
    given = {f"AWS_{key.upper().removeprefix('AWS_')}" for key in settings} | set(os.environ)
    if not url.startswith("s3://") or given & _AWS_CREDENTIALS:
        return {}
    try:
        import boto3
        import botocore.exceptions
        import botocore.session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise DependencyError(
            "The environment has no credentials for S3, and boto3, which finds those of a profile "
            "or of the machine, is not installed",
            path=url,
            remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            'pip install "shardckpt[s3]"',
        ) from error
    session = botocore.session.Session()
    try:
        credentials = session.get_credentials()
        endpoint = session.get_scoped_config().get("endpoint_url")
    except botocore.exceptions.BotoCoreError as error:
        raise StoragePermissionError(
            "The credentials of the AWS profile can't be used",
            path=url,
            actual=_first_line(error),
            remedy="check AWS_PROFILE and the files in ~/.aws",
        ) from error
    if credentials is None:
        raise StoragePermissionError(
            "No credentials for S3 were found",
            path=url,
            expected="credentials in the environment, in a profile in ~/.aws, or of the machine",
            remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
            "for a public bucket, set AWS_SKIP_SIGNATURE=true",
        )
    provider = Boto3CredentialProvider(boto3.Session(botocore_session=session))
    named = {} if endpoint is None or given & _AWS_ENDPOINTS else {"endpoint": endpoint}
    return {"credential_provider": provider, "config": named}


def _certificates(url: str) -> dict[str, bytes]:
    """Settings with the certificates to trust for S3, as AWS_CA_BUNDLE names their file."""
    path = os.environ.get("AWS_CA_BUNDLE")
    if not path or not url.startswith("s3://"):
        return {}
    try:
        return {"root_certificate": Path(path).read_bytes()}
    except OSError as error:
        raise StateError(
            "The certificates for S3 can't be read",
            path=path,
            actual=error.strerror,
            remedy="check the environment variable AWS_CA_BUNDLE",
        ) from error


def _unsigned(url: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for S3 that leave payloads out of signatures, as Amazon's own tools do over https:
    TLS protects them, and SHA-256 of all bytes takes more time than all other steps of a save.
    """
    endpoints = [settings.get(name) for name in ("endpoint", "aws_endpoint", "aws_endpoint_url")]
    endpoints += [os.environ.get("AWS_ENDPOINT_URL"), os.environ.get("AWS_ENDPOINT")]
    plain = any(str(endpoint).startswith("http://") for endpoint in endpoints)
    if not url.startswith("s3://") or plain or "AWS_UNSIGNED_PAYLOAD" in os.environ:
        return {}
    return {"unsigned_payload": "true"}


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes", "on")


def _repeated(read: Callable[[], T]) -> T:
    """Read again if the body of an answer was cut."""
    for _ in range(_READS - 1):
        try:
            return read()
        except Exception as error:
            if _CUT not in _first_line(error):
                raise
    return read()


def _object_info(meta: Any) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], _version(meta), meta["last_modified"].timestamp())


def _version(result: Any) -> str:
    parts = {name: result[name] for name in ("e_tag", "version")}
    return json.dumps({name: part for name, part in parts.items() if part is not None})


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
