"""Files and folders that appear at once, and the files that they replace, remove or keep."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch

from shardckpt import errors
from shardckpt.convert.single_files import read_many, read_one, write_many, write_one
from shardckpt.storage.atomic_write import atomic_write, sweep_writes, write_file
from shardckpt.storage.names import hidden_file_path
from shardckpt.storage.posix import System

ID = "0123456789abcdef" * 2


def listed(folder) -> list[str]:
    return sorted(os.listdir(folder))


def lock_name(folder, name: str) -> str:
    return os.path.basename(hidden_file_path(str(folder / name), "lock"))


KILLED = """
import os, sys, signal
from shardckpt.storage.atomic_write import atomic_write
with atomic_write(sys.argv[1], overwrite=True) as write:
    write.add_bytes(b"half")
    if sys.argv[2] == "wait":
        print("ready", flush=True)
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED, str(path), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("name", ["x.pth", "y.pth"])
def test_what_a_killed_write_left_is_collected_by_any_write_in_the_folder(tmp_path, name):
    child = start(tmp_path / "x.pth", "die")
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert len(listed(tmp_path)) == 2
    write_file(str(tmp_path / name), b"new", overwrite=False)
    assert listed(tmp_path) == [name]


def test_a_write_that_is_alive_is_not_collected_and_not_joined(tmp_path):
    child = start(tmp_path / "x.pth", "wait")
    assert child.stdout is not None
    child.stdout.readline()
    before = listed(tmp_path)
    write_file(str(tmp_path / "y.pth"), b"new", overwrite=False)
    assert listed(tmp_path) == sorted([*before, "y.pth"])
    with pytest.raises(errors.CheckpointBusyError):
        write_file(str(tmp_path / "x.pth"), b"new", overwrite=True)
    child.communicate("", timeout=60)
    write_file(str(tmp_path / "x.pth"), b"new", overwrite=True)
    assert listed(tmp_path) == ["x.pth", "y.pth"]


def test_files_of_others_are_never_touched(tmp_path):
    names = [
        f".x.part-{ID}",
        f".shardckpt-{ID}.{ID}.part",
        f".shardckpt-{ID}.old",
        f".shardckpt-{ID}.lock",
        f"{lock_name(tmp_path, 'x')[:-5]}x.part",
        lock_name(tmp_path, "z"),
    ]
    for name in names:
        (tmp_path / name).write_text("thesis")
    write_file(str(tmp_path / "x"), b"new", overwrite=True)
    sweep_writes(System(), str(tmp_path))
    with pytest.raises(errors.StorageError, match="did not make"):
        write_file(str(tmp_path / "z"), b"new", overwrite=True)
    assert listed(tmp_path) == sorted([*names, "x"])
    assert all((tmp_path / name).read_text() == "thesis" for name in names)


def test_a_symlink_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "latest.pth").symlink_to("real/x.pth")
    (tmp_path / "parts").symlink_to("real/parts")
    for value in (1.0, 2.0):
        state = {"w": torch.full((3,), value)}
        write_one(state, str(tmp_path / "latest.pth"), overwrite=True)
        write_many(state, str(tmp_path / "parts"), "torch", overwrite=True)
    assert listed(tmp_path) == ["latest.pth", "parts", "real"]
    assert listed(tmp_path / "real") == ["parts", "x.pth"]
    assert (tmp_path / "parts").is_symlink()
    assert read_one(str(tmp_path / "latest.pth"))["w"].tolist() == [2.0] * 3
    assert read_many(str(tmp_path / "parts"))["w"].tolist() == [2.0] * 3


def test_a_loop_of_symlinks_is_refused(tmp_path):
    (tmp_path / "a.pth").symlink_to("b.pth")
    (tmp_path / "b.pth").symlink_to("a.pth")
    with pytest.raises((errors.StorageError, errors.NotACheckpointError)):
        write_file(str(tmp_path / "a.pth"), b"new", overwrite=True)
    assert listed(tmp_path) == ["a.pth", "b.pth"]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_only_a_regular_file_is_replaced_by_one(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(errors.NotACheckpointError):
        write_file(str(tmp_path / "x"), b"new", overwrite=True)
    assert listed(tmp_path) == ["x"]


def test_a_folder_with_a_file_of_the_users_is_not_replaced(tmp_path):
    state, path = {"w": torch.ones(3)}, tmp_path / "parts"
    write_many(state, str(path), "torch", overwrite=False)
    (path / "mine.pth").write_text("thesis")
    with pytest.raises(errors.NotACheckpointError) as caught:
        write_many(state, str(path), "torch", overwrite=True)
    assert "mine.pth" in caught.value.actual
    assert listed(path) == ["components.json", "mine.pth", "w.pth"]
    assert listed(tmp_path) == ["parts"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_names_of_255_bytes(tmp_path, suffix):
    name = "é" * ((255 - len(suffix)) // 2)
    path = str(tmp_path / (name + suffix))
    for _ in range(2):
        write_one({"w": torch.ones(3)}, path, overwrite=True)
    assert read_one(path)["w"].tolist() == [1.0] * 3
    with pytest.raises(errors.StorageError, match="too long"):
        write_one({"w": torch.ones(3)}, f"{tmp_path}/{'x' * 255}{suffix}", overwrite=True)
    assert len(listed(tmp_path)) == 1


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_one({"w": torch.ones(3)}, str(tmp_path / "x.safetensors"), overwrite=False)
        write_many({"w": torch.ones(3)}, str(tmp_path / "x"), "torch", overwrite=False)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert modes.pop("x") == 0o750
    assert set(modes.values()) == {0o640}


class NoSync(System):
    """A system on which the last fsync of the folder fails: the one after the names changed."""

    renamed = False

    def rename(self, source, target):
        super().rename(source, target)
        self.renamed = True

    def exchange(self, one, other):
        super().exchange(one, other)
        self.renamed = True

    def fsync(self, fd):
        if self.renamed:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fsync(fd)


@pytest.mark.parametrize("folder", [True, False])
def test_an_error_after_the_new_one_is_visible_says_so_and_keeps_the_old_one(tmp_path, folder):
    def save(value: float, system: System) -> None:
        state = {"w": torch.full((3,), value)}
        if folder:
            write_many(state, str(tmp_path / "x"), "torch", overwrite=True, system=system)
        else:
            write_one(state, str(tmp_path / "x.pth"), overwrite=True, system=system)

    save(1.0, System())
    with pytest.raises(errors.StorageError, match="is visible, but may not be durable") as caught:
        save(2.0, NoSync())
    assert caught.value.errno == errno.EIO
    (old,) = [n for n in os.listdir(tmp_path) if n.endswith(".part")]
    read = read_many if folder else read_one
    if not folder:
        os.link(tmp_path / old, tmp_path / "old.pth")
    assert read(str(tmp_path / (old if folder else "old.pth")))["w"].tolist() == [1.0] * 3
    save(3.0, System())
    assert not [n for n in os.listdir(tmp_path) if n.startswith(".")]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "x"
    with (
        pytest.raises(errors.CheckpointExistsError),
        atomic_write(str(path), overwrite=False) as write,
    ):
        write.add_bytes(b"new")
        path.write_text("thesis")
    assert path.read_text() == "thesis"
    assert listed(tmp_path) == ["x"]


@pytest.mark.parametrize("leaf", [lambda: None, object()])
def test_a_state_that_torch_would_refuse_is_an_error_before_any_write(tmp_path, leaf):
    begun = time.monotonic()
    state = {"w": torch.ones(1, 1 << 24), "bad": leaf}
    with pytest.raises(errors.UnsupportedLeafError):
        write_one(state, str(tmp_path / "x.pth"), overwrite=False)
    assert time.monotonic() - begun < 5
    assert listed(tmp_path) == []
