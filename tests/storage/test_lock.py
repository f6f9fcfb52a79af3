"""The lock beside a checkpoint, and a save that has begun, as other ranks see it."""

from __future__ import annotations

import errno
import os
import time

import pytest

from shardckpt.errors import CheckpointBusyError, StoragePermissionError
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.lock import Lock
from shardckpt.storage.posix import System


def test_one_holder_at_a_time(tmp_path):
    path = str(tmp_path / ".c.lock")
    lock = Lock(System(), path)
    assert lock.held
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointBusyError) as caught:
        Lock(System(), path)
    assert len(os.listdir("/proc/self/fd")) == before
    assert (caught.value.errno, caught.value.path) == (errno.EAGAIN, path)
    lock.release()
    assert os.listdir(tmp_path) == []
    Lock(System(), path).release()


def test_a_file_that_is_not_a_lock_stays(tmp_path):
    (tmp_path / "text").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("text")
    for name in ("text", "pipe"):
        Lock(System(), str(tmp_path / name)).release()
    with pytest.raises(OSError, match="symbolic links"):
        Lock(System(), str(tmp_path / "link"))
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe", "text"]
    assert (tmp_path / "text").read_text() == "precious"


def test_a_child_does_not_keep_it(tmp_path):
    """A process that was forked meanwhile holds the same open file."""

    class Kept(System):
        def unlink(self, path):
            raise PermissionError(errno.EPERM, "planted", path)

    lock = Lock(Kept(), str(tmp_path / ".c.lock"))
    childs = os.dup(lock.fd)
    lock.release()
    Lock(System(), str(tmp_path / ".c.lock")).release()
    os.close(childs)


def test_a_lock_file_that_its_holder_removed_is_not_taken(tmp_path):
    """Between open and flock the holder let go, and removed it: another one has another file."""

    class Removed(System):
        opened = 0

        def lock(self, fd):
            super().lock(fd)
            if self.opened == 0:
                os.unlink(tmp_path / ".c.lock")
            elif self.opened == 1:
                os.rename(tmp_path / "other", tmp_path / ".c.lock")
            self.opened += 1

    (tmp_path / "other").touch()
    before = len(os.listdir("/proc/self/fd"))
    system = Removed()
    lock = Lock(system, str(tmp_path / ".c.lock"))
    assert (system.opened, lock.held) == (3, True)
    assert os.fstat(lock.fd).st_ino == os.stat(tmp_path / ".c.lock").st_ino
    lock.release()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EINVAL, errno.ENOSYS])
def test_no_lock_is_held_where_the_file_system_has_none(tmp_path, code):
    lock = Lock(refusing(code), str(tmp_path / ".c.lock"))
    assert not lock.held
    lock.release()


def test_an_error_is_no_lock(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="refused"):
        Lock(refusing(errno.EIO), str(tmp_path / ".c.lock"))
    assert len(os.listdir("/proc/self/fd")) == before


def refusing(code):
    class Refusing(System):
        def lock(self, fd):
            raise OSError(code, "refused")

    return Refusing()


def test_a_directory_that_is_seen_late_is_waited_for(tmp_path, monkeypatch):
    """A network file system may take a moment to show what another node has made, and looks again
    where the directory above is listed."""
    transaction = LocalStorage().begin(str(tmp_path / "c"), checkpoint_id="0" * 32, overwrite=False)

    pauses, listed = [], []
    monkeypatch.setattr(time, "sleep", pauses.append)

    class Late(System):
        asked = 0

        def listdir(self, path):
            listed.append(path)
            raise OSError(errno.ESTALE, "planted")

        def stat(self, path):
            self.asked += 1
            if self.asked < 3:
                raise FileNotFoundError(errno.ENOENT, "not yet", path)
            return super().stat(path)

    system = Late()
    joined = LocalStorage(system).join(str(tmp_path / "c"), token=transaction.token)
    assert (joined.token, system.asked) == (transaction.token, 3)
    assert listed == [str(tmp_path)] * 2
    assert pauses == [0.05] * 2
    transaction.abandon()


def test_an_error_is_not_waited_out(tmp_path):
    class Refusing(System):
        def stat(self, path):
            raise PermissionError(errno.EACCES, "no", path)

    with pytest.raises(StoragePermissionError):
        LocalStorage(Refusing()).join(str(tmp_path / "c"), token="0" * 32)
