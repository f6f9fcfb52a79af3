"""System calls, the page cache, and the typed errors of the file system."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.errors import (
    CorruptionError,
    NoSpaceError,
    StorageError,
    StoragePermissionError,
)
from shardckpt.storage.posix import System, translated


class Older(System):
    """A kernel without cachestat."""

    def _cachestat(self, fd, offset, size_bytes):
        return None


def test_both_ways_to_ask_for_the_page_cache_say_the_same(tmp_path):
    path, pages = tmp_path / "a", 512
    path.write_bytes(bytes(pages * 4096))
    with open(path, "rb") as file:
        fd = file.fileno()
        assert System()._cachestat(fd, 0, pages * 4096) in (pages, None)
        assert System()._mincore(fd, 0, pages * 4096) == pages
        os.fsync(fd)
        for dropped in (0, pages // 16, pages // 4, pages):
            os.posix_fadvise(fd, 0, dropped * 4096, os.POSIX_FADV_DONTNEED)
            held = System()._mincore(fd, 0, pages * 4096)  # the kernel drops what it likes
            assert System()._cachestat(fd, 0, pages * 4096) in (held, None)
            for system in (System(), Older()):
                found = system.cached(fd, offset=0, size_bytes=pages * 4096)
                assert found == (held >= pages * 7 / 8)
        assert not held or _is_memory(path)


@pytest.mark.parametrize("system", [System, Older])
def test_what_is_in_the_cache_is_read_from_there(tmp_path, system):
    shardckpt.save({"a": torch.arange(1_000_003)}, tmp_path / "c")
    (shard,) = (tmp_path / "c").glob("*.safetensors")
    size = len(shard.read_bytes())
    with open(shard, "rb") as file:
        assert system().cached(file.fileno(), offset=0, size_bytes=size)
        assert system().cached(file.fileno(), offset=4096, size_bytes=size)  # beyond its end
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        in_memory = _is_memory(shard)
        assert system().cached(file.fileno(), offset=0, size_bytes=size) == in_memory


def _is_memory(path):
    mounts = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    kinds = {line.split()[1]: line.split()[2] for line in mounts}
    parents = [str(parent) for parent in path.resolve().parents if str(parent) in kinds]
    return kinds[max(parents, key=len)] == "tmpfs"


@pytest.mark.parametrize(
    ("code", "raised", "remedy"),
    [
        (errno.EACCES, StoragePermissionError, "ask for the right"),
        (errno.EROFS, StoragePermissionError, "ask for the right"),
        (errno.ENOSPC, NoSpaceError, "free some space"),
        (errno.EDQUOT, NoSpaceError, "free some space"),
        (errno.EFBIG, NoSpaceError, "ulimit -f"),
        (errno.EMFILE, StorageError, "ulimit -n"),
        (errno.ENAMETOOLONG, StorageError, "shorter name"),
        (errno.EBUSY, StorageError, "the system's log"),
        (None, StorageError, "the system's log"),
    ],
)
def test_an_error_of_the_file_system_is_typed_and_has_a_remedy(code, raised, remedy):
    error = OSError(code, os.strerror(code)) if code else OSError("no number")
    with pytest.raises(StorageError) as caught, translated("/run/c"):
        raise error
    assert type(caught.value) is raised
    assert (caught.value.errno, caught.value.path) == (code, "/run/c")
    assert remedy in caught.value.remedy
    assert caught.value.__cause__ is error


def test_the_error_names_the_file_of_the_call_if_its_path_is_full():
    for name, expected in (("/run/c/shard", "/run/c/shard"), ("shard", "/run/c")):
        with pytest.raises(StorageError) as caught, translated("/run/c"):
            raise OSError(errno.EIO, "planted", name)
        assert caught.value.path == expected


@pytest.mark.parametrize("error", [ValueError("a bug"), CorruptionError("typed"), KeyError("k")])
def test_other_errors_are_not_translated(error):
    with pytest.raises(type(error)) as caught, translated("/run/c"):
        raise error
    assert caught.value is error


def test_a_symlink_is_neither_opened_nor_described_nor_linked_as_its_target(tmp_path):
    system = System()
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(OSError) as caught:
        system.open(str(tmp_path / "link"), os.O_RDONLY)
    assert caught.value.errno == errno.ELOOP
    assert system.stat(str(tmp_path / "link")).st_size == len("file")
    folder = system.open(str(tmp_path), os.O_RDONLY | os.O_DIRECTORY)
    system.link("link", str(tmp_path / "other"), dir_fd=folder)
    system.close(folder)
    assert os.readlink(tmp_path / "other") == "file"


def test_descriptors_are_not_inherited(tmp_path):
    fd = System().open(str(tmp_path / "new"), os.O_CREAT | os.O_WRONLY)
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    System().close(fd)


def test_a_lock_excludes_other_descriptors_until_it_is_released(tmp_path):
    system = System()
    one, other = (system.open(str(tmp_path / "lock"), os.O_CREAT | os.O_RDWR) for _ in range(2))
    system.lock(one)
    with pytest.raises(BlockingIOError):
        system.lock(other)
    system.unlock(one)
    system.lock(other)
    for fd in (one, other):
        system.close(fd)


def test_a_map_is_private_and_outlives_its_descriptor(tmp_path):
    system = System()
    (tmp_path / "file").write_bytes(bytes(range(256)) * 16)
    fd = system.open(str(tmp_path / "file"), os.O_RDONLY)
    mapped = system.map(fd, size_bytes=4096)
    system.close(fd)
    mapped[:3] = b"own"
    assert bytes(mapped[:4]) == b"own\x03"
    assert (tmp_path / "file").read_bytes()[:3] == b"\0\1\2"
    with pytest.raises(OSError) as caught:
        system.map(fd, size_bytes=4096)
    assert caught.value.errno == errno.EBADF


def test_two_names_are_exchanged_in_one_step_or_not_at_all(tmp_path):
    system = System()
    for name in "ab":
        (tmp_path / name).write_text(name)
    system.exchange(str(tmp_path / "a"), str(tmp_path / "b"))
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("b", "a")
    with pytest.raises(OSError) as caught:
        system.exchange(str(tmp_path / "a"), str(tmp_path / "gone"))
    assert caught.value.errno == errno.ENOENT
    assert (caught.value.filename, caught.value.filename2) == (
        str(tmp_path / "a"),
        str(tmp_path / "gone"),
    )


def test_reads_and_writes_are_at_their_offset(tmp_path):
    system = System()
    fd = system.open(str(tmp_path / "file"), os.O_CREAT | os.O_RDWR)
    assert system.write(fd, memoryview(b"defg"), offset=3) == 4
    system.truncate(fd, size_bytes=5)
    found = bytearray(9)
    assert system.read(fd, [memoryview(found)], offset=1) == 4
    assert bytes(found[:4]) == b"\0\0de"
    assert system.read(fd, [memoryview(found)], offset=5) == 0
    system.close(fd)
