"""System calls that fail, and writes that report a wrong length, simulated and real."""

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
from tests.faults import crash, errnos
from tests.faults.disk import Disk


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] * (name == "retaining"))
        for name in errnos.OPERATIONS
    ],
)
@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.long)])
def test_every_call_failing(name, step):
    """One call in `step`, once or for ever and with one error each, in turn; scripts/torture tries
    all of them."""
    turns = itertools.cycle(itertools.product((False, True), errnos.CODES))
    for at, (for_ever, code) in zip(itertools.count(1, step), turns, strict=False):
        if not errnos.OPERATIONS[name](at, code, for_ever=for_ever):
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
def test_a_load_detects_a_write_that_reported_a_wrong_length(at, says_all):
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
            errnos.OPERATIONS["replacing"](at, errno.EIO, for_ever=False)


def test_an_interrupted_fallocate_is_made_again(monkeypatch, tmp_path):
    """fallocate and renameat2 go past Python, which retries all other calls for us."""
    from shardckpt.storage import posix as system

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
