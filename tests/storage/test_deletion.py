"""Removal of checkpoints, and of what dead saves have left."""

from __future__ import annotations

import errno
import os

import pytest
import torch

import shardckpt
from shardckpt.errors import CheckpointBusyError, NotACheckpointError, StorageError
from shardckpt.storage import deletion as removal
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.posix import System

TOKEN = "0123456789abcdef" * 2


def saved(path) -> str:
    shardckpt.save({"w": torch.ones(3)}, path)
    return str(path)


def test_a_checkpoint_is_removed(tmp_path):
    removal.remove(System(), saved(tmp_path / "c"))
    assert os.listdir(tmp_path) == []
    with pytest.raises(StorageError):
        removal.remove(System(), str(tmp_path / "c"))
    assert os.listdir(tmp_path) == []


def test_the_name_goes_first_and_for_good(tmp_path):
    calls = []

    class Watched(System):
        def rename(self, source, target):
            calls.append("rename")
            super().rename(source, target)

        def fsync(self, fd):
            calls.append("fsync")
            super().fsync(fd)

        def unlink(self, path):
            super().unlink(path)
            calls.append(os.path.basename(path))

    removal.remove(Watched(), saved(tmp_path / "c"))
    assert calls[:3] == ["rename", "fsync", "manifest.json"]


def test_not_while_a_save_goes_on(tmp_path):
    path = saved(tmp_path / "c")
    transaction = LocalStorage().begin(path, checkpoint_id=TOKEN, overwrite=True)
    with pytest.raises(CheckpointBusyError):
        removal.remove(System(), path)
    removal.sweep(System(), str(tmp_path))
    assert os.path.isdir(tmp_path / f".c.tmp-{TOKEN}")  # alive
    transaction.abandon()
    assert shardckpt.load_state(path)["w"].tolist() == [1.0] * 3


def leftover(folder, name) -> None:
    (folder / name).mkdir()
    (folder / name / "shard-00000-of-00001.safetensors").write_bytes(b"x")


def test_what_the_dead_left_is_swept(tmp_path):
    saved(tmp_path / "c")
    leftover(tmp_path, f".c.tmp-{TOKEN}")
    leftover(tmp_path, f".gone.tmp-{TOKEN}")
    leftover(tmp_path, ".c.old")
    (tmp_path / ".c.lock").touch()
    os.rename(saved(tmp_path / "d"), tmp_path / ".d.old")
    removal.sweep(System(), str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["c", "d"]
    assert shardckpt.load_state(tmp_path / "d")["w"].tolist() == [1.0] * 3


def test_what_others_left_is_not_swept(tmp_path):
    names = [".profile.old", ".x.lock", f".x.part-{TOKEN}", ".x.tmp-1", f"x.tmp-{TOKEN}"]
    for name in names:
        leftover(tmp_path, name)
    removal.sweep(System(), str(tmp_path))
    removal.sweep(System(), str(tmp_path / "nowhere"))
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_without_locks_nothing_is_swept(tmp_path):
    class Lockless(System):
        def lock(self, fd):
            raise OSError(errno.ENOLCK, "no locks")

    leftover(tmp_path, f".c.tmp-{TOKEN}")
    removal.sweep(Lockless(), str(tmp_path))
    assert os.listdir(tmp_path) == [f".c.tmp-{TOKEN}"]


def test_an_old_one_does_not_come_back_in_part(tmp_path):
    """What a save left aside goes for good before the checkpoint that took its place."""
    path, calls = saved(tmp_path / "c"), []
    leftover(tmp_path, ".c.old")

    class Watched(System):
        def fsync(self, fd):
            calls.append("fsync")
            super().fsync(fd)

        def rmdir(self, path):
            calls.append(os.path.basename(path)[:6])
            super().rmdir(path)

        def rename(self, source, target):
            calls.append("rename")
            super().rename(source, target)

    removal.remove(Watched(), path)
    assert calls == ["fsync", ".c.old", "fsync", "rename", "fsync", ".c.tmp"]


def test_what_can_not_be_removed_is_told(tmp_path, monkeypatch):
    manager = shardckpt.CheckpointManager(tmp_path, keep=[shardckpt.KeepLast(1)])
    manager.save(1, {"w": torch.ones(3)})
    with monkeypatch.context() as patch:
        patch.setattr(System, "rename", refusing(System.rename))
        with pytest.warns(UserWarning, match=r"step-1 can't be removed"):
            manager.save(2, {"w": torch.ones(3)})
    assert manager.all_steps() == [1, 2]
    manager.save(3, {"w": torch.ones(3)})
    assert sorted(os.listdir(tmp_path)) == ["step-3"]


def refusing(rename):
    def refused(self, source, target):
        if "tmp-" in target:
            raise PermissionError(errno.EPERM, "no", source)
        rename(self, source, target)

    return refused


@pytest.mark.parametrize("name", [f".c.tmp-{TOKEN}", ".c.old"])
def test_what_a_symlink_leads_to_stays(tmp_path, name):
    path = saved(tmp_path / "c")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / name).symlink_to(tmp_path / "precious")
    removal.sweep(System(), str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["c", "precious"]
    (tmp_path / "c" / "more").symlink_to(tmp_path / "precious")
    removal.remove(System(), path)
    assert os.listdir(tmp_path) == ["precious"]
    assert os.listdir(tmp_path / "precious") == ["file"]


def test_an_old_one_that_is_a_symlink_does_not_come_back(tmp_path):
    path = saved(tmp_path / "other")
    (tmp_path / ".c.old").symlink_to(path)
    shardckpt.save({"w": torch.zeros(3)}, tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["c", "other"]
    assert shardckpt.load_state(path)["w"].tolist() == [1.0] * 3


def test_what_others_keep_in_a_checkpoint_stays(tmp_path):
    """A checkpoint that was saved into another one does not go with it."""
    path, inner = saved(tmp_path / "c"), saved(tmp_path / "c" / "best" / "d")
    with pytest.raises(NotACheckpointError, match="directories as well: best"):
        shardckpt.save({"w": torch.zeros(3)}, path, overwrite=True)
    with pytest.raises(StorageError, match="a directory in it") as caught:
        removal.remove(System(), path)
    assert caught.value.actual == "best"
    for kept in (path, inner):
        assert shardckpt.load_state(kept)["w"].tolist() == [1.0] * 3
    assert os.listdir(tmp_path) == ["c"]
    (tmp_path / "c" / "best").rename(tmp_path / "best")
    (tmp_path / "c" / "notes.txt").touch()
    shardckpt.save({"w": torch.zeros(3)}, path, overwrite=True)
    removal.remove(System(), path)
    assert os.listdir(tmp_path) == ["best"]


def test_of_many_directories_in_a_checkpoint_five_are_named(tmp_path):
    path = saved(tmp_path / "c")
    for name in "abcdefg":
        os.mkdir(os.path.join(path, name))
    with pytest.raises(StorageError, match="a directory in it") as caught:
        removal.remove(System(), path)
    assert len(caught.value.actual.split(", ")) == 5


def test_shards_are_not_looked_at_one_by_one(tmp_path):
    """There may be thousands of them, on a file system where each look takes its time."""
    path, looked = saved(tmp_path / "c"), []

    class Watched(System):
        def stat(self, path):
            looked.append(os.path.basename(path))
            return super().stat(path)

    removal.remove(Watched(), path)
    assert not [name for name in looked if name.endswith((".safetensors", ".json"))]


def test_a_directory_in_a_leftover_stays_but_no_shard(tmp_path):
    leftover(tmp_path, f".c.tmp-{TOKEN}")
    (tmp_path / f".c.tmp-{TOKEN}" / "a").mkdir()
    saved(tmp_path / "c")
    assert os.listdir(tmp_path / f".c.tmp-{TOKEN}") == ["a"]


def test_a_folder_that_is_gone(tmp_path, monkeypatch):
    """A relative path from a directory that somebody has removed."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    removal.sweep(System(), ".")
    for call in (
        lambda: shardckpt.save({"w": torch.ones(3)}, "c"),
        lambda: shardckpt.load_state("c"),
        lambda: removal.remove(System(), "c"),
        lambda: LocalStorage().join("c", token=TOKEN),
    ):
        with pytest.raises(StorageError):
            call()


def test_only_a_directory_is_synced(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        removal.sync_directory(System(), str(tmp_path / "file"))


def test_which_hidden_name_holds_a_checkpoint():
    assert removal.old_name(".c.old") == "c"
    for name in (f".c.tmp-{TOKEN}", ".c.lock", "c.old", ".old"):
        assert removal.old_name(name) is None
