"""Every system call of every operation failing, once and for ever, with every error: typed, the
previous checkpoint loads, no descriptor stays open, and the next save leaves nothing behind."""

from __future__ import annotations

import errno
import itertools
import resource
import signal
import subprocess

import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.storage.local import LocalStorage
from tests.faults import crash
from tests.faults.disk import Disk

CODES = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, errno.EMFILE, errno.EROFS]


def replacing(run: crash.Run) -> None:
    run.save()


def two_renames(run: crash.Run) -> None:
    run.disk.can_exchange = False
    run.save()


def fresh(run: crash.Run) -> None:
    shardckpt.save(run.next_state(), f"{crash.FOLDER}/new", storage=run.storage)


def in_background(run: crash.Run) -> None:
    run.async_save()


def with_a_base(run: crash.Run) -> None:
    run.based_save()


def resharding(run: crash.Run) -> None:
    run.reshard(2)


def loading(run: crash.Run) -> None:
    state = {"w": torch.zeros(300), "b": torch.zeros(3, dtype=torch.int64)}
    shardckpt.load(state, crash.PATH, storage=run.storage)
    assert torch.equal(state["w"], crash.state_of(run.version)["w"])


def verifying(run: crash.Run) -> None:
    with shardckpt.open_checkpoint(crash.PATH, storage=run.storage) as opened:
        opened.verify()


OPERATIONS = [
    replacing,
    two_renames,
    fresh,
    in_background,
    with_a_base,
    resharding,
    loading,
    verifying,
]


def outcome(operation, at: int, code: int, *, for_ever: bool) -> bool:
    """Whether the fault came to pass: the operation makes so many calls."""
    disk = Disk()
    run = crash.Run(disk)
    run.based_save()
    disk.settle()
    faulty = LocalStorage(disk)
    run.storage = faulty
    before, calls = run.version, disk.calls
    disk.fail_at, disk.fail_for_ever = (calls + at, code), for_ever
    acknowledged = False
    try:
        operation(run)
        acknowledged = True
    except errors.StorageError as error:
        assert error.errno == code
        assert error.path
        assert error.remedy
    except errors.CorruptionError:
        assert operation is verifying  # what can't be read is damage to it
    reached = disk.calls >= calls + at
    assert not disk.descriptors, f"{len(disk.descriptors)} descriptors stay open"
    disk.fail_at = None
    writes = operation not in (loading, verifying)
    least = run.version if acknowledged and writes and operation is not fresh else before
    assert least <= (crash.version_at(disk) or 0) <= run.version
    run.save()
    assert crash.version_at(disk) == run.version
    assert not [name for name in disk.listdir(crash.FOLDER) if name.startswith(".c.")]
    return reached


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for_ever"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_call_failing(operation, for_ever):
    for at in itertools.count(1):
        reached = [outcome(operation, at, code, for_ever=for_ever) for code in CODES]
        if not any(reached):
            break
    assert at > 8


class Lying(Disk):
    """One write that takes nothing and says that it took a byte, or all."""

    lie_at = 0
    says_all = False

    def write(self, fd, data, *, offset):
        self.lie_at -= 1
        if self.lie_at == 0:
            return len(data) if self.says_all else 1
        return super().write(fd, data, offset=offset)


@pytest.mark.parametrize("says_all", [False, True])
@pytest.mark.parametrize("at", [1, 2])
def test_a_write_that_lies_is_found_by_the_load(at, says_all):
    disk = Lying()
    crash.Run(disk).save()
    disk.lie_at, disk.says_all = at, says_all
    shardckpt.save(crash.state_of(2), f"{crash.FOLDER}/d", storage=LocalStorage(disk))
    with pytest.raises(errors.CheckpointError):
        crash.version_at(disk, f"{crash.FOLDER}/d")
    assert crash.version_at(disk) == 1


def test_a_leak_is_seen(monkeypatch):
    """A planted fault: files that stay open after an error."""
    from shardckpt.storage.local import LocalFile

    monkeypatch.setattr(LocalFile, "discard", lambda self: None)
    with pytest.raises(AssertionError, match="stay open"):
        for at in range(1, 40):
            outcome(replacing, at, errno.EIO, for_ever=False)


def test_an_interrupted_fallocate_is_made_again(monkeypatch, tmp_path):
    """fallocate and renameat2 go past Python, which retries all other calls for us."""
    from shardckpt.storage import system

    asked = []

    class Libc:
        def __init__(self, real):
            self.renameat2 = real.renameat2
            self.real = real

        def fallocate(self, *arguments):
            asked.append(arguments)
            if len(asked) == 1:
                import ctypes

                ctypes.set_errno(errno.EINTR)
                return -1
            return self.real.fallocate(*arguments)

    monkeypatch.setattr(system, "_libc", Libc(system._libc))
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "c")
    assert len(asked) > 2


def test_a_limit_on_file_sizes(tmp_path):
    """RLIMIT_FSIZE, for real: the save is refused and what was there stays."""
    shardckpt.save({"w": torch.ones(10)}, tmp_path / "c")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        with pytest.raises(errors.NoSpaceError) as caught:
            shardckpt.save({"w": torch.ones(100_000)}, tmp_path / "c", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "ulimit" in caught.value.remedy
    assert shardckpt.load_state(tmp_path / "c")["w"].tolist() == [1.0] * 10


def test_a_small_tmpfs_fills_up(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        shardckpt.save({"w": torch.ones(10)}, tmp_path / "c")
        with pytest.raises(errors.NoSpaceError):
            shardckpt.save({"w": torch.ones(100_000)}, tmp_path / "c", overwrite=True)
        assert shardckpt.load_state(tmp_path / "c")["w"].tolist() == [1.0] * 10
        assert [path.name for path in tmp_path.iterdir()] == ["c"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
