"""Removal of checkpoints, and of the leftovers of dead saves."""

from __future__ import annotations

import errno
import os

import pytest
import torch

import shardckpt
from shardckpt.errors import (
    CheckpointBusyError,
    CheckpointExistsError,
    NotACheckpointError,
    StateError,
    StorageError,
)
from shardckpt.storage import deletion
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.names import hidden_path
from shardckpt.storage.posix import System

TOKEN = "0123456789abcdef" * 2
OLD = hidden_path("c", "old")


def saved(path) -> str:
    shardckpt.save({"w": torch.ones(3)}, path)
    return str(path)


def test_a_checkpoint_is_removed(tmp_path):
    deletion.remove(System(), saved(tmp_path / "c"))
    assert os.listdir(tmp_path) == []
    with pytest.raises(StorageError):
        deletion.remove(System(), str(tmp_path / "c"))
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

    deletion.remove(Watched(), saved(tmp_path / "c"))
    assert calls[:3] == ["rename", "fsync", "manifest.json"]


def test_not_while_a_save_goes_on(tmp_path):
    path = saved(tmp_path / "c")
    transaction = LocalStorage().begin(path, checkpoint_id=TOKEN, overwrite=True)
    with pytest.raises(CheckpointBusyError):
        deletion.remove(System(), path)
    deletion.sweep(System(), str(tmp_path))
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
    leftover(tmp_path, OLD)
    open(hidden_path(str(tmp_path / "c"), "lock"), "x").close()
    os.rename(saved(tmp_path / "d"), hidden_path(str(tmp_path / "d"), "old"))
    deletion.sweep(System(), str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["c", "d"]
    assert shardckpt.load_state(tmp_path / "d")["w"].tolist() == [1.0] * 3


@pytest.mark.parametrize("collect", [deletion.sweep, deletion.collect_leftovers])
def test_what_others_left_is_not_collected(tmp_path, collect):
    names = [".c.old", ".c.lock", f".c.part-{TOKEN}", ".c.tmp-1", f"c.tmp-{TOKEN}"]
    names += [f".c.{TOKEN}.old", f".c.tmp-{TOKEN}0", f".c.tmp-{TOKEN.upper()}"]
    for name in names:
        leftover(tmp_path, name)
    theirs = [f".c.tmp-{digit * 32}" for digit in "123"]
    for name in theirs[:2]:
        leftover(tmp_path, name)
    (tmp_path / theirs[0] / "thesis.txt").touch()
    (tmp_path / theirs[1] / "folder").mkdir()
    (tmp_path / theirs[2]).write_text("a file")
    lock = tmp_path / os.path.basename(hidden_path("c", "lock"))
    lock.write_text("not a lock of ours")
    before = sorted(map(str, tmp_path.rglob("*")))
    collect(
        System(), str(tmp_path / "c") if collect is deletion.collect_leftovers else str(tmp_path)
    )
    deletion.sweep(System(), str(tmp_path / "nowhere"))
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "d")
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "c")
    made = {"c", "d", "c/manifest.json", "d/manifest.json"}
    made |= {f"{name}/shard-00000-of-00001.safetensors" for name in "cd"}
    after = {str(path) for path in tmp_path.rglob("*")}
    assert after == {*before, *(str(tmp_path / name) for name in made)}
    assert lock.read_text() == "not a lock of ours"


def test_without_locks_nothing_is_swept(tmp_path):
    class Lockless(System):
        def lock(self, fd):
            raise OSError(errno.ENOLCK, "no locks")

    leftover(tmp_path, f".c.tmp-{TOKEN}")
    deletion.sweep(Lockless(), str(tmp_path))
    assert os.listdir(tmp_path) == [f".c.tmp-{TOKEN}"]


def test_an_old_one_does_not_come_back_in_part(tmp_path):
    """A checkpoint that a save set aside is removed before the checkpoint that replaced it."""
    path, calls = saved(tmp_path / "c"), []
    leftover(tmp_path, OLD)

    class Watched(System):
        def fsync(self, fd):
            calls.append("fsync")
            super().fsync(fd)

        def rmdir(self, path):
            calls.append(os.path.basename(path).replace(OLD, "old")[:6])
            super().rmdir(path)

        def rename(self, source, target):
            calls.append("rename")
            super().rename(source, target)

    deletion.remove(Watched(), path)
    assert calls == ["fsync", "old", "fsync", "rename", "fsync", ".c.tmp"]


def test_a_removal_that_fails_is_a_warning(tmp_path, monkeypatch):
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


@pytest.mark.parametrize("name", [f".c.tmp-{TOKEN}", OLD])
def test_a_symlink_under_a_hidden_name_is_not_followed(tmp_path, name):
    saved(tmp_path / "c")
    leftover(tmp_path, "precious")
    (tmp_path / name).symlink_to(tmp_path / "precious")
    deletion.sweep(System(), str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(["c", "precious", name])
    assert os.listdir(tmp_path / "precious") == ["shard-00000-of-00001.safetensors"]


def test_what_others_keep_in_a_checkpoint_stays(tmp_path):
    """A checkpoint that was saved into another one does not go with it."""
    path, inner = saved(tmp_path / "c"), saved(tmp_path / "c" / "best" / "d")
    with pytest.raises(NotACheckpointError, match="directories: best"):
        shardckpt.save({"w": torch.zeros(3)}, path, overwrite=True)
    with pytest.raises(StorageError, match="has not made") as caught:
        deletion.remove(System(), path)
    assert caught.value.actual == "best"
    for kept in (path, inner):
        assert shardckpt.load_state(kept)["w"].tolist() == [1.0] * 3
    assert os.listdir(tmp_path) == ["c"]


class NoExchange(System):
    def exchange(self, one, other):
        raise OSError(errno.EINVAL, "no exchange here")


@pytest.mark.parametrize("system", [System, NoExchange])
def test_files_that_others_lay_beside_the_shards_are_kept(tmp_path, system):
    path = saved(tmp_path / "c")
    (tmp_path / "c" / "tokenizer.json").write_text("precious")
    (tmp_path / "c" / "lora.safetensors").symlink_to("/nowhere")
    for value in (2.0, 3.0):
        state = {"w": torch.full((3,), value)}
        shardckpt.save(state, path, overwrite=True, storage=LocalStorage(system()))
        assert shardckpt.load_state(path)["w"].tolist() == [value] * 3
        assert (tmp_path / "c" / "tokenizer.json").read_text() == "precious"
        assert os.readlink(tmp_path / "c" / "lora.safetensors") == "/nowhere"
        assert os.listdir(tmp_path) == ["c"]
    with pytest.raises(StorageError, match="has not made") as caught:
        deletion.remove(System(), path)
    assert caught.value.actual == "lora.safetensors, tokenizer.json"
    assert shardckpt.load_state(path)["w"].tolist() == [3.0] * 3


def test_a_file_that_can_not_be_kept_is_an_error(tmp_path):
    class NoLinks(System):
        def link(self, name, target, *, dir_fd):
            raise PermissionError(errno.EPERM, "no links here")

    path = saved(tmp_path / "c")
    (tmp_path / "c" / "notes.txt").touch()
    with pytest.raises(StorageError, match="can't keep"):
        shardckpt.save({"w": 2}, path, overwrite=True, storage=LocalStorage(NoLinks()))
    assert shardckpt.load_state(path)["w"].tolist() == [1.0] * 3
    assert os.listdir(tmp_path) == ["c"]


def test_what_appears_at_the_path_during_a_save_stays(tmp_path):
    """A save must not replace what was not there when it began, but with overwrite=True."""

    class Late(System):
        def fsync(self, fd):
            super().fsync(fd)
            (tmp_path / "c").mkdir(exist_ok=True)
            (tmp_path / "c" / "notes.txt").touch()

    with pytest.raises(CheckpointExistsError):
        shardckpt.save({"w": 2}, tmp_path / "c", storage=LocalStorage(Late()))
    with pytest.raises(NotACheckpointError):
        shardckpt.save({"w": 2}, tmp_path / "c", storage=LocalStorage(Late()), overwrite=True)
    assert [os.listdir(tmp_path), os.listdir(tmp_path / "c")] == [["c"], ["notes.txt"]]


def test_the_working_directory_and_the_root_are_not_replaced(tmp_path, monkeypatch):
    """An empty directory is replaced: its processes would be left in one without a name."""
    monkeypatch.chdir(tmp_path)
    for path in (".", tmp_path, "/", "/.."):
        with pytest.raises(StateError, match="can't replace the root"):
            shardckpt.save({"w": 1}, path)
    assert os.listdir(tmp_path) == []
    assert os.path.samefile(os.getcwd(), tmp_path)


def test_a_manifest_of_another_program_is_not_replaced(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "my web app"}')
    with pytest.raises(NotACheckpointError, match="replaces only a checkpoint"):
        shardckpt.save({"w": 2}, tmp_path / "app", overwrite=True)
    assert (tmp_path / "app" / "manifest.json").read_text() == '{"name": "my web app"}'


def test_of_many_files_of_others_five_are_named(tmp_path):
    path = saved(tmp_path / "c")
    for name in "abcdefg":
        os.mkdir(os.path.join(path, name))
    with pytest.raises(StorageError, match="has not made") as caught:
        deletion.remove(System(), path)
    assert len(caught.value.actual.split(", ")) == 5


def test_shards_are_not_looked_at_one_by_one(tmp_path):
    """There may be thousands of them, on a file system where each look takes its time."""
    path, looked = saved(tmp_path / "c"), []

    class Watched(System):
        def stat(self, path):
            looked.append(os.path.basename(path))
            return super().stat(path)

    deletion.remove(Watched(), path)
    assert not [name for name in looked if name.endswith((".safetensors", ".json"))]


def test_a_folder_that_is_gone(tmp_path, monkeypatch):
    """A relative path from a directory that somebody has removed."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    deletion.sweep(System(), ".")
    for call in (
        lambda: shardckpt.save({"w": torch.ones(3)}, "c"),
        lambda: shardckpt.load_state("c"),
        lambda: deletion.remove(System(), "c"),
        lambda: LocalStorage().join("c", token=TOKEN),
    ):
        with pytest.raises(StorageError):
            call()


def test_only_a_directory_is_synced(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        deletion.sync_directory(System(), str(tmp_path / "file"))


def test_which_hidden_name_holds_a_checkpoint():
    for held in ("c", "a\nb", "é" * 50, "\udcff", ".hidden"):
        assert deletion.old_name(hidden_path(held, "old")) == held
    for name in (f".c.tmp-{TOKEN}", hidden_path("c", "lock"), ".c.old", f".c.{TOKEN}.old"):
        assert deletion.old_name(name) is None


@pytest.mark.parametrize("system", [System, NoExchange])
@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a\nb\tc", ".c", "c.old", "-rf", "\udcff"])
def test_any_name_that_the_file_system_takes(tmp_path, system, name):
    storage = LocalStorage(system())
    for value in (1, 2):
        shardckpt.save({"w": value}, tmp_path / name, overwrite=True, storage=storage)
        assert shardckpt.load_state(tmp_path / name)["w"] == value
        leftovers = [hidden_path(str(tmp_path / name), f"tmp-{TOKEN}"), hidden_path(name, "old")]
        for leftover_name in leftovers:
            assert len(os.fsencode(os.path.basename(leftover_name))) <= 138
            leftover(tmp_path, os.path.basename(leftover_name))
        deletion.sweep(System(), str(tmp_path))
        assert set(os.listdir(tmp_path)) <= {name, hidden_path(name, "old")}
    os.rename(tmp_path / name, tmp_path / "moved")
    deletion.collect_leftovers(System(), str(tmp_path / name))
    os.rename(tmp_path / "moved", hidden_path(str(tmp_path / name), "old"))
    deletion.sweep(System(), str(tmp_path))
    assert shardckpt.load_state(tmp_path / name)["w"] == 2
    with pytest.raises(CheckpointExistsError):
        shardckpt.save({"w": 3}, tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    deletion.remove(System(), str(tmp_path / name))
    assert os.listdir(tmp_path) == []


def test_modes_follow_the_umask(tmp_path):
    found = {}

    class Watched(System):
        def lock(self, fd):
            super().lock(fd)
            found["lock"] = os.fstat(fd).st_mode & 0o777

    for umask in (0o022, 0o027, 0o002):
        before = os.umask(umask)
        try:
            path = tmp_path / f"{umask:o}" / "c"
            shardckpt.save({"w": torch.ones(3)}, path, storage=LocalStorage(Watched()))
        finally:
            os.umask(before)
        found |= {p.name: p.stat().st_mode & 0o777 for p in [path.parent, path, *path.iterdir()]}
        directories = {f"{umask:o}", "c"}
        for name, mode in found.items():
            assert mode == (0o777 if name in directories else 0o666) & ~umask, name
        found.clear()


def test_a_path_of_a_thousand_new_folders_is_made(tmp_path):
    path = os.path.join(tmp_path, *"a" * 1500)
    deletion.make_directories(System(), path)
    while path != str(tmp_path):  # pytest would remove them by recursion
        os.rmdir(path)
        path = os.path.dirname(path)
