"""Tests for implementations of Storage. They need pytest.

Subclass StorageTests in a test file, and define two fixtures:

    class TestMyStorage(StorageTests):
        @pytest.fixture
        def storage(self):
            return MyStorage()

        @pytest.fixture
        def path(self, tmp_path):
            return str(tmp_path / "checkpoint")
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import pytest

from shardckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptionError,
    DirectoryNotSharedError,
    NotACheckpointError,
    ShardckptError,
    StorageError,
)
from shardckpt.storage.base import MANIFEST_NAME, Storage, WouldWait, WritableFile, WriteTransaction

__all__ = ["StorageTests"]

_NAMES = ("shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors")
_DATA = bytes(range(256)) * 40  # 10,240 bytes: not a multiple of a page
_BLOCK_BYTES = 1 << 20


def _manifest(digit: str) -> bytes:
    return b'{"format":"shardckpt","version":1,"id":"%s"}' % (digit.encode() * 32)


_FIRST, _SECOND, _LATER, _NEW = map(_manifest, "abcd")


class StorageTests:
    """Tests that every Storage must pass.

    Define the fixtures `storage`, and `path`: the path of a checkpoint that does not exist yet.
    """

    def test_a_checkpoint_comes_back(self, storage: Storage, path: str) -> None:
        """After commit, the files of two ranks are read back, byte for byte."""
        write_checkpoint(storage, path, _FIRST)
        files = storage.open(path)
        assert files.manifest() == _FIRST
        for name in _NAMES:
            assert files.size_bytes(name) == len(_DATA)
            one, two = bytearray(1000), bytearray(5000)
            files.readinto(name, [memoryview(one), memoryview(two)], offset=77)
            assert one + two == _DATA[77:6077]
            filled: list[memoryview] = []
            again = [memoryview(bytearray(size)) for size in (1000, 0, 5000)]
            files.readinto(name, again, offset=77, on_filled=filled.append)
            assert filled == [one, b"", two]
            with suppress(WouldWait):
                files.readinto(name, [memoryview(one)], offset=5000, wait=False)
                assert one == _DATA[5000:6000]
            assert bytes(files.map(name)) == _DATA
        files.close()
        files.close()

    def test_a_map_outlives_its_checkpoint(self, storage: Storage, path: str) -> None:
        """A map stays valid after close, and changes of its content are private."""
        write_checkpoint(storage, path, _FIRST)
        files = storage.open(path)
        mapped = files.map(_NAMES[0])
        files.close()
        mapped[:4] = b"mine"
        files = storage.open(path)
        assert bytes(files.map(_NAMES[0])) == _DATA
        files.close()

    def test_duplicates_are_closed_by_themselves(self, storage: Storage, path: str) -> None:
        """A duplicate can be read after the original is closed, and the other way round."""
        write_checkpoint(storage, path, _FIRST)
        files = storage.open(path)
        other, third = files.duplicate(), files.duplicate()
        third.close()
        files.close()
        found = bytearray(len(_DATA))
        other.readinto(_NAMES[0], [memoryview(found)], offset=0)
        assert (bytes(found), other.manifest()) == (_DATA, _FIRST)
        other.close()

    def test_nothing_is_visible_before_commit(self, storage: Storage, path: str) -> None:
        """A checkpoint that is not committed can't be opened. An abandoned one leaves the path
        free."""
        transaction = storage.begin(path, checkpoint_id="a" * 32, overwrite=False)
        write(transaction.create(_NAMES[0], size_bytes=len(_DATA)))
        assert_absent(storage, path)
        transaction.abandon()
        transaction.abandon()
        assert_absent(storage, path)
        write_checkpoint(storage, path, _LATER)

    def test_files_are_made_once(self, storage: Storage, path: str) -> None:
        """To create a file twice is an error."""
        transaction = storage.begin(path, checkpoint_id="a" * 32, overwrite=False)
        write(transaction.create(_NAMES[0], size_bytes=len(_DATA)))
        with pytest.raises(StorageError):
            write(transaction.create(_NAMES[0], size_bytes=len(_DATA)))
        transaction.abandon()

    def test_a_file_of_two_ranks(self, storage: Storage, path: str) -> None:
        """Two ranks open one file, write their parts and close it, in any order. Only storages
        whose transactions have `shares_files` do this."""
        data = bytes(range(256)) * 4096 + _DATA
        transaction = storage.begin(path, checkpoint_id="a" * 32, overwrite=False)
        if not transaction.shares_files:
            transaction.abandon()
            return
        other = storage.join(path, token=transaction.token)
        files = [
            each.create(_NAMES[0], size_bytes=len(data), shared=True)
            for each in (transaction, other)
        ]
        for file, begin, end in zip(files[::-1], (1 << 20, 0), (None, 1 << 20), strict=True):
            write(file, data[begin:end], begin=begin, size_bytes=len(data))
        other.close()
        transaction.commit(_FIRST)
        found = storage.open(path)
        assert found.size_bytes(_NAMES[0]) == len(data)
        assert bytes(found.map(_NAMES[0])) == data
        found.close()

    def test_a_discarded_file_can_be_discarded_again(self, storage: Storage, path: str) -> None:
        """Cleaning up never raises an error."""
        transaction = storage.begin(path, checkpoint_id="a" * 32, overwrite=False)
        file = transaction.create(_NAMES[0], size_bytes=len(_DATA))
        file.discard()
        file.discard()
        transaction.abandon()
        transaction.close()

    def test_a_taken_path(self, storage: Storage, path: str) -> None:
        """Only overwrite replaces a checkpoint. The old one stays complete until commit."""
        write_checkpoint(storage, path, _FIRST)
        with pytest.raises(CheckpointExistsError):
            storage.begin(path, checkpoint_id="b" * 32, overwrite=False)
        transaction = storage.begin(path, checkpoint_id="b" * 32, overwrite=True)
        write(transaction.create(_NAMES[0], size_bytes=len(_DATA)))
        assert_manifest(storage, path, _FIRST)
        transaction.abandon()
        assert_manifest(storage, path, _FIRST)
        write_checkpoint(storage, path, _SECOND, overwrite=True)
        assert_manifest(storage, path, _SECOND)

    def test_a_reader_of_a_replaced_checkpoint(self, storage: Storage, path: str) -> None:
        """A reader of a replaced checkpoint reads the old one or gets an error, never a mixture."""
        write_checkpoint(storage, path, _FIRST)
        files = storage.open(path)
        files.manifest()
        write_checkpoint(storage, path, _SECOND, overwrite=True, data=bytes(len(_DATA)))
        into = bytearray(len(_DATA))
        with suppress(CheckpointNotFoundError):  # the storage may refuse to read a replaced file
            files.readinto(_NAMES[0], [memoryview(into)], offset=0)
            assert into == _DATA
        files.close()

    def test_two_writers_of_one_path(self, storage: Storage, path: str) -> None:
        """One of two writers is refused, at the start or at commit. The checkpoint of the other is
        complete."""
        first = storage.begin(path, checkpoint_id="a" * 32, overwrite=False)
        write(first.create(_NAMES[0], size_bytes=len(_DATA)))
        refused = 0
        try:
            second = storage.begin(path, checkpoint_id="b" * 32, overwrite=False)
            write(second.create(_NAMES[0], size_bytes=len(_DATA)))
            second.commit(_SECOND)
        except StorageError:
            refused += 1
        try:
            first.commit(_FIRST)
        except StorageError:
            refused += 1
            first.abandon()
        assert refused == 1
        files = storage.open(path)
        assert files.manifest() in (_FIRST, _SECOND)
        assert files.size_bytes(_NAMES[0]) == len(_DATA)
        files.close()

    def test_a_file_taken_over(self, storage: Storage, path: str) -> None:
        """A linked file stays intact when its source is replaced. If nothing was linked, the name
        is free."""
        write_checkpoint(storage, path, _FIRST)
        source = storage.open(path)
        transaction = storage.begin(path + "-new", checkpoint_id="d" * 32, overwrite=False)
        assert not transaction.link("shard-00007-of-00008.safetensors", source)
        other = storage.join(path + "-new", token=transaction.token)
        for each, name in zip((transaction, other), _NAMES, strict=True):
            if not each.link(name, source):
                write(each.create(name, size_bytes=len(_DATA)))
            with pytest.raises(StorageError):
                write(each.create(name, size_bytes=len(_DATA)))
        other.close()
        source.close()
        transaction.commit(_NEW)
        write_checkpoint(storage, path, _SECOND, overwrite=True, data=bytes(len(_DATA)))
        files = storage.open(path + "-new")
        for name in _NAMES:
            into = bytearray(len(_DATA))
            files.readinto(name, [memoryview(into)], offset=0)
            assert files.size_bytes(name) == len(_DATA)
            assert into == _DATA
        files.close()

    def test_a_file_that_takes_over_ranges(self, storage: Storage, path: str) -> None:
        """A file with ranges of another one stays intact when its source is replaced. If the
        storage can't do this, the name is free."""
        old, changed = bytes(_BLOCK_BYTES) + _DATA * 103, b"changed!" * (_BLOCK_BYTES // 8)
        name = _NAMES[0]
        write_checkpoint(storage, path, _FIRST, data=old)
        source = storage.open(path)
        transaction = storage.begin(path + "-new", checkpoint_id="d" * 32, overwrite=False)
        size = len(old)
        file = transaction.create_from(name, source, size_bytes=size)
        if file is None:
            file = transaction.create(name, size_bytes=size)
        assert not file.clone(offset=_BLOCK_BYTES, size_bytes=size), "it ends behind the source"
        if file.clone(offset=_BLOCK_BYTES, size_bytes=size - _BLOCK_BYTES):
            write(file, changed, size_bytes=size)
        else:
            write(file, changed + old[_BLOCK_BYTES:])
        write(transaction.create(_NAMES[1], size_bytes=len(_DATA)))
        source.close()
        transaction.commit(_NEW)
        write_checkpoint(storage, path, _SECOND, overwrite=True, data=bytes(len(_DATA)))
        files = storage.open(path + "-new")
        into = bytearray(size)
        files.readinto(name, [memoryview(into)], offset=0)
        assert into == changed + old[_BLOCK_BYTES:]
        files.close()

    def test_reading_past_the_cache(self, storage: Storage, path: str) -> None:
        """A read past the cache returns the bytes of the file, also at its end, or nothing."""
        write_checkpoint(storage, path, _FIRST)
        files = storage.open(path)
        with mmap.mmap(-1, 12288) as memory, memoryview(memory) as buffer:
            for offset in (0, 4096, 8192):
                size = min(8192, len(_DATA) - offset)
                if files.read_past_cache(_NAMES[0], buffer, offset=offset, size_bytes=size):
                    assert buffer[:size] == _DATA[offset : offset + size]
            with suppress(CorruptionError):  # either answer is right for a range beyond the end
                assert not files.read_past_cache(
                    _NAMES[0], buffer, offset=8192, size_bytes=len(_DATA) - 8192 + 1
                )
        files.close()

    def test_a_checkpoint_that_processes_assemble(self, storage: Storage, path: str) -> None:
        """Processes write a checkpoint without meeting. A later one goes on where an earlier one
        ended. Only storages whose `assemble` returns a transaction that `resumes` do this."""
        options = {"checkpoint_id": "b" * 32, "overwrite": True}
        write_checkpoint(storage, path, _FIRST)
        one = storage.assemble(path, **options)  # type: ignore[arg-type]
        if not one.resumes:
            one.abandon()
            return
        one.create(_NAMES[1], size_bytes=len(_DATA)).write(memoryview(_DATA[:4096]), offset=0)
        write(one.create(_NAMES[0], size_bytes=len(_DATA)))
        one.close()
        other = storage.assemble(path, **options)  # type: ignore[arg-type]
        assert other.has(_NAMES[0], size_bytes=len(_DATA))
        assert not other.has(_NAMES[0], size_bytes=len(_DATA) + 1)
        assert not other.has(_NAMES[1], size_bytes=len(_DATA)), "it was not closed"
        assert_manifest(storage, path, _FIRST)
        write(other.create(_NAMES[1], size_bytes=len(_DATA)))
        third = storage.assemble(path, **options)  # type: ignore[arg-type]
        assert third.has(_NAMES[1], size_bytes=len(_DATA))
        third.commit(_SECOND)
        for transaction in (other, third):
            transaction.abandon()
            transaction.close()
        files = storage.open(path)
        assert files.manifest() == _SECOND
        assert [bytes(files.map(name)) for name in _NAMES] == [_DATA, _DATA]
        files.close()

    def test_joining_a_checkpoint_that_was_not_begun(self, storage: Storage, path: str) -> None:
        """A rank that does not see the directory of rank 0 raises an error."""
        with pytest.raises(DirectoryNotSharedError):
            storage.join(path, token="c" * 32).create(_NAMES[0], size_bytes=1)

    def test_the_checkpoints_of_a_folder(self, storage: Storage, path: str) -> None:
        """Checkpoints are listed, told apart by version, and removed. Only storages that define
        `names` do this."""
        if type(storage).names is Storage.names:
            return
        folder = storage.child(path, "folder")
        one, two = storage.child(folder, "one"), storage.child(folder, "two")
        assert storage.names(folder) == []
        assert not storage.exists(one)
        write_checkpoint(storage, one, _FIRST)
        write_checkpoint(storage, two, _SECOND)
        assert storage.names(folder) == ["one", "two"]
        before = storage.version(one)
        assert storage.version(one) == before != storage.version(two)
        write_checkpoint(storage, one, _LATER, overwrite=True)
        assert storage.version(one) != before
        storage.remove(one)
        storage.sweep(folder)
        left = [n for n in storage.names(folder) if storage.exists(storage.child(folder, n))]
        assert left == ["two"]
        assert_absent(storage, one)
        assert_manifest(storage, two, _SECOND)

    def test_reading_missing_files(self, storage: Storage, path: str) -> None:
        """Missing files, and reads past the end, raise CorruptionError."""
        assert_absent(storage, path)
        write_checkpoint(storage, path, _FIRST)
        files = storage.open(path)
        with pytest.raises(CorruptionError):
            files.size_bytes("shard-00007-of-00008.safetensors")
        with pytest.raises(CorruptionError):
            files.readinto(_NAMES[0], [memoryview(bytearray(100))], offset=len(_DATA) - 50)
        files.close()


def write_checkpoint(
    storage: Storage, path: str, manifest: bytes, *, overwrite: bool = False, data: bytes = _DATA
) -> None:
    """Save a checkpoint of two ranks. Rank 1 joins the transaction of rank 0."""
    transaction = storage.begin(path, checkpoint_id=manifest[-34:-2].decode(), overwrite=overwrite)
    write(transaction.create(_NAMES[0], size_bytes=len(data)), data)
    other: WriteTransaction = storage.join(path, token=transaction.token)
    write(other.create(_NAMES[1], size_bytes=len(data)), data)
    other.close()
    transaction.commit(manifest)
    transaction.close()


def write(
    file: WritableFile, data: bytes = _DATA, *, begin: int = 0, size_bytes: int | None = None
) -> None:
    """Write two pieces, the second one first, from page-aligned memory. `begin` is the offset in a
    file of `size_bytes`."""
    memory = mmap.mmap(-1, -(-len(data) // 4096) * 4096)
    memory[: len(data)] = data
    view = memoryview(memory)[: len(memory) if file.direct else len(data)]
    file.write(view[4096:], offset=begin + 4096)
    file.write(view[:4096], offset=begin)
    file.close(size_bytes=size_bytes or len(data))


def assert_absent(storage: Storage, path: str) -> None:
    """Check that the path can't be opened."""
    try:
        storage.open(path).manifest()
    except (CheckpointNotFoundError, NotACheckpointError):
        return
    raise AssertionError(f"{MANIFEST_NAME} exists")


def assert_manifest(storage: Storage, path: str, manifest: bytes) -> None:
    """Check the manifest of the checkpoint at the path."""
    files = storage.open(path)
    try:
        assert files.manifest() == manifest
    except ShardckptError as error:
        raise AssertionError(f"not readable: {error}") from error
    finally:
        files.close()
