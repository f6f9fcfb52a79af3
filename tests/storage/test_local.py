"""The local file system: the suite for every storage, and every system call failing once."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time

import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.names import hidden_path
from shardckpt.storage.posix import System
from shardckpt.testing import StorageTests
from tests.ranks import start_ranks
from tests.storage.clones import Clones
from tests.storage.systems import Failing, Plain, descriptors


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "above" / "checkpoint")


class TestLocal(StorageTests):
    @pytest.fixture
    def storage(self):
        return LocalStorage()


class TestPlain(StorageTests):
    @pytest.fixture
    def storage(self):
        return LocalStorage(Plain())


class Unlinked(System):
    """A file system without hard links and clones."""

    def link(self, name, target, *, dir_fd):
        raise OSError(errno.EPERM, "no links here")

    def clone(self, source_fd, target_fd, *, offset=0, size_bytes=0):
        raise OSError(errno.EOPNOTSUPP, "no clones here")


class TestUnlinked(StorageTests):
    @pytest.fixture(params=[Unlinked, Clones])
    def storage(self, request):
        return LocalStorage(request.param())


class Dribbling(System):
    """Writes and reads that take a part of what they are given, as they may."""

    def write(self, fd, data, *, offset):
        return super().write(fd, data[: max(1, len(data) // 3)], offset=offset)

    def read(self, fd, buffers, *, offset, wait=True):
        return super().read(fd, [buffers[0][:777]], offset=offset, wait=wait)


class TestDribbling(StorageTests):
    @pytest.fixture
    def storage(self):
        return LocalStorage(Dribbling())


STATE = {"w": torch.arange(3000.0), "step": 2}
OLD = {"w": torch.zeros(3000), "step": 1}


def loadable(path):
    state = shardckpt.load_state(path)
    return state["step"], torch.equal(state["w"], {1: OLD, 2: STATE}[state["step"]]["w"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_every_call_of_a_save_failing_once(tmp_path, overwrite):
    """Each system call fails once (tests/faults/errnos has all errors). The save raises a typed
    error or succeeds, the old checkpoint stays, and neither leftovers nor open descriptors
    remain after the next save."""
    if overwrite:
        shardckpt.save(OLD, tmp_path / "count")
    count = Failing()
    shardckpt.save(STATE, tmp_path / "count", overwrite=overwrite, storage=LocalStorage(count))
    assert {"fsync", "rename", "write", "mkdir", "allocate"} <= set(count.calls)
    before = descriptors()
    codes = itertools.cycle(
        [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT, errno.EROFS],
    )
    for (at, name), code in zip(enumerate(count.calls), codes, strict=False):
        path = tmp_path / f"{at}"
        if overwrite:
            shardckpt.save(OLD, path)
        faulty = LocalStorage(Failing(at, code))
        try:
            shardckpt.save(STATE, path, overwrite=overwrite, storage=faulty)
            assert loadable(path) == (2, True), (at, name)
        except errors.StorageError as error:
            assert error.errno == code, (at, name)
            assert error.path, (at, name)
            assert error.remedy, (at, name)
            if path.exists():  # a failed fsync of the parent comes after the new name
                assert loadable(path) in ((2, True), (1, True)), (at, name)
            else:
                assert not overwrite, (at, name)
        assert descriptors() == before, (at, name)
        shardckpt.save(STATE, path, overwrite=True)
        assert loadable(path) == (2, True)
        assert not [left for left in os.listdir(tmp_path) if left.startswith(f".{at}.")], name


@pytest.mark.parametrize("takes", [True, False])
def test_shards_are_written_past_the_cache(path, takes):
    """Where the file system takes that."""
    turned = []

    class Direct(Plain):
        def direct(self, fd, *, on):
            turned.append(on)
            if not takes:
                super().direct(fd, on=on)

    transaction = LocalStorage(Direct()).begin(path, checkpoint_id="0", overwrite=False)
    file = transaction.create("shard", size_bytes=5)
    assert (file.direct, turned) == (takes, [True])
    file.discard()
    transaction.abandon()


@pytest.mark.parametrize(("direct", "code"), [(True, errno.EIO), (False, errno.EINVAL)])
def test_a_write_that_fails_is_not_made_again(path, direct, code):
    """But where the disk does not take it past the cache, which is EINVAL."""
    asked = []

    class Fails(Plain):
        def direct(self, fd, *, on):
            if not direct:
                super().direct(fd, on=on)

        def write(self, fd, data, *, offset):
            asked.append(offset)
            if len(asked) > 1:
                return len(data)
            raise OSError(code, "planted")

    transaction = LocalStorage(Fails()).begin(path, checkpoint_id="0", overwrite=False)
    file = transaction.create("shard", size_bytes=4096)
    with pytest.raises(errors.StorageError) as caught:
        file.write(memoryview(bytes(4096)), offset=0)
    assert (caught.value.errno, asked) == (code, [0])
    file.discard()
    transaction.abandon()


@pytest.mark.parametrize(("taken", "turned"), [(4096, [True]), (777, [True, False])])
def test_a_short_write_goes_on(path, taken, turned):
    """Past the cache only from where a page begins."""
    found, written = [], []

    class Short(Plain):
        def direct(self, fd, *, on):
            found.append(on)

        def write(self, fd, data, *, offset):
            written.append((offset, len(data)))
            return min(taken, len(data)) if len(written) == 1 else len(data)

    transaction = LocalStorage(Short()).begin(path, checkpoint_id="0", overwrite=False)
    file = transaction.create("shard", size_bytes=8192)
    file.write(memoryview(bytes(8192)), offset=0)
    assert written == [(0, 8192), (taken, 8192 - taken)]
    assert (found, file.direct) == (turned, turned[-1])
    file.discard()
    transaction.abandon()


def test_a_file_is_discarded_once(path):
    """Its descriptor is somebody else's by the second time."""
    closed = []

    class Watched(Plain):
        def close(self, fd):
            closed.append(fd)
            super().close(fd)

    transaction = LocalStorage(Watched()).begin(path, checkpoint_id="0", overwrite=False)
    closed.clear()
    file = transaction.create("shard", size_bytes=4096)
    file.discard()
    file.discard()
    assert len(closed) == 1
    transaction.abandon()


def test_a_write_that_takes_nothing(path):
    class Full(Plain):
        def write(self, fd, data, *, offset):
            return 0

    transaction = LocalStorage(Full()).begin(path, checkpoint_id="0", overwrite=False)
    file = transaction.create("shard", size_bytes=4096)
    with pytest.raises(errors.StorageError, match="refused"):
        file.write(memoryview(bytes(4096)), offset=0)
    file.discard()
    transaction.abandon()


def test_a_manifest_is_made_once(path):
    transaction = LocalStorage().begin(path, checkpoint_id="0", overwrite=False)
    transaction.create("manifest.json", size_bytes=1).close(size_bytes=1)
    with pytest.raises(errors.StorageError) as caught:
        transaction.commit(b"{}")
    assert caught.value.errno == errno.EEXIST
    transaction.abandon()
    assert not os.path.exists(path)


def calls_of_a_replacing_save(path):
    shardckpt.save(OLD, path)
    count = Failing()
    shardckpt.save(OLD, path, overwrite=True, storage=LocalStorage(count))
    return count.calls


def test_the_old_checkpoint_stays_until_the_new_one_is_durable(tmp_path):
    """The fsync of the folder fails once the names were exchanged."""
    path = tmp_path / "c"
    calls = calls_of_a_replacing_save(path)
    last = max(at for at, name in enumerate(calls) if name == "fsync")
    assert calls.index("exchange") < last
    with pytest.raises(errors.StorageError):
        faulty = LocalStorage(Failing(last, errno.EIO))
        shardckpt.save(STATE, path, overwrite=True, storage=faulty)
    assert loadable(path) == (2, True)
    (old,) = tmp_path.glob(".c.tmp-*")
    assert loadable(old) == (1, True)


@pytest.mark.parametrize("name", ["rename", "exchange"])
def test_a_rename_that_fails_is_not_made_in_another_way(tmp_path, name):
    path = tmp_path / "c"
    at = calls_of_a_replacing_save(path).index(name)
    faulty = Failing(at, errno.EIO)
    with pytest.raises(errors.StorageError) as caught:
        shardckpt.save(STATE, path, overwrite=True, storage=LocalStorage(faulty))
    assert caught.value.errno == errno.EIO
    assert faulty.calls[at] == name
    assert not {"rename", "exchange"} & set(faulty.calls[at + 1 :])
    assert loadable(path) == (1, True)


def test_a_full_disk_is_called_so(tmp_path):
    with pytest.raises(errors.NoSpaceError) as caught:
        faulty = Failing()
        faulty.allocate = lambda fd, size_bytes: (_ for _ in ()).throw(
            OSError(errno.ENOSPC, "full")
        )
        shardckpt.save(STATE, tmp_path / "c", storage=LocalStorage(faulty))
    assert "free some space" in caught.value.remedy
    assert os.listdir(tmp_path) == []


def test_no_permission_is_called_so(tmp_path):
    faulty = Failing()
    faulty.mkdir = lambda path: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no", path))
    with pytest.raises(errors.StoragePermissionError) as caught:
        shardckpt.save(STATE, tmp_path / "c", storage=LocalStorage(faulty))
    assert caught.value.errno == errno.EACCES
    assert isinstance(caught.value, PermissionError)


def test_a_failed_fsync_is_not_asked_again(tmp_path):
    asked = []

    class Once(System):
        def fsync(self, fd):
            asked.append(fd)
            if len(asked) == 1:
                raise OSError(errno.EIO, "lost")
            super().fsync(fd)

    with pytest.raises(errors.StorageError):
        shardckpt.save(STATE, tmp_path / "c", storage=LocalStorage(Once()))
    assert len(asked) == 1


def test_the_order_of_a_commit(tmp_path):
    """Data durable before the manifest, the manifest before the name, the name before return."""
    seen = []

    class Watched(System):
        def open(self, path, flags, *, dir_fd=None):
            fd = super().open(path, flags, dir_fd=dir_fd)
            self.names = {**getattr(self, "names", {}), fd: os.path.basename(path)}
            return fd

        def fsync(self, fd):
            seen.append(("fsync", self.names[fd].split("-")[0]))
            super().fsync(fd)

        def rename(self, old, new):
            seen.append(("rename", os.path.basename(new)))
            super().rename(old, new)

    shardckpt.save(STATE, tmp_path / "c", storage=LocalStorage(Watched()))
    assert seen == [
        ("fsync", tmp_path.parent.name.split("-")[0]),
        ("fsync", "shard"),
        ("fsync", "manifest.json"),
        ("fsync", ".c.tmp"),
        ("rename", "c"),
        ("fsync", tmp_path.name.split("-")[0]),
    ]


class Dies(System):
    """The process dies before the checkpoint has its name."""

    def rename(self, old, new):
        os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(path):
    shardckpt.save({"w": torch.ones(9)}, path, storage=LocalStorage(Dies()))


@pytest.mark.ranks
def test_leftovers_of_a_dead_save_are_collected(tmp_path):
    ranks = start_ranks(1, save_and_die, tmp_path / "c")
    ranks.wait(110)
    assert ranks.processes[0].exitcode == -signal.SIGKILL
    assert [name[:7] for name in os.listdir(tmp_path) if ".tmp-" in name] == [".c.tmp-"]
    with pytest.raises(errors.CheckpointNotFoundError):
        shardckpt.load_state(tmp_path / "c")
    shardckpt.save(STATE, tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]


def test_a_replacing_save_that_died_between_its_renames(tmp_path):
    """Where names can't be exchanged the old one is aside for a moment: still loadable, and
    brought back by the next save."""
    shardckpt.save(OLD, tmp_path / "c")
    os.rename(tmp_path / "c", hidden_path(str(tmp_path / "c"), "old"))
    assert loadable(tmp_path / "c") == (1, True)
    with pytest.raises(errors.CheckpointExistsError):
        shardckpt.save(STATE, tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]
    assert loadable(tmp_path / "c") == (1, True)


def test_a_second_writer_is_refused_at_once(tmp_path):
    storage = LocalStorage()
    first = storage.begin(str(tmp_path / "c"), checkpoint_id="a" * 32, overwrite=False)
    begun = time.monotonic()
    with pytest.raises(errors.CheckpointBusyError):
        shardckpt.save(STATE, tmp_path / "c")
    assert time.monotonic() - begun < 5
    first.abandon()
    shardckpt.save(STATE, tmp_path / "c")


def test_a_symlink_to_a_checkpoint_is_followed_but_none_inside(tmp_path):
    shardckpt.save(STATE, tmp_path / "real")
    os.symlink(tmp_path / "real", tmp_path / "latest")
    assert loadable(tmp_path / "latest") == (2, True)
    shardckpt.save(OLD, tmp_path / "latest", overwrite=True)
    assert loadable(tmp_path / "real") == (1, True)
    assert os.path.islink(tmp_path / "latest")


def test_directories_above_are_made_and_durable(tmp_path):
    synced = []

    class Watched(System):
        def open(self, path, flags, *, dir_fd=None):
            fd = super().open(path, flags, dir_fd=dir_fd)
            self.paths = {**getattr(self, "paths", {}), fd: path}
            return fd

        def fsync(self, fd):
            synced.append(self.paths[fd])
            super().fsync(fd)

    path = tmp_path / "a" / "b" / "c"
    LocalStorage(Watched()).begin(str(path), checkpoint_id="0" * 32, overwrite=False).abandon()
    assert synced == [str(tmp_path.parent), str(tmp_path), str(tmp_path / "a")]
    assert os.listdir(path.parent) == []


def test_the_error_names_what_is_at_the_path(tmp_path):
    shardckpt.save(OLD, tmp_path / "checkpoint")
    (tmp_path / "directory" / "of").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name, found in (
        ("checkpoint", "a checkpoint"),
        ("directory", "a directory"),
        ("file", "a file"),
    ):
        with pytest.raises(errors.CheckpointExistsError) as exists:
            shardckpt.save(STATE, tmp_path / name)
        assert exists.value.actual == found
        if name != "checkpoint":
            with pytest.raises(errors.NotACheckpointError) as other:
                shardckpt.save(STATE, tmp_path / name, overwrite=True)
            assert (other.value.actual, other.value.expected) == (
                found,
                "a directory with a manifest.json of shardckpt",
            )
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "directory", "file"]


def test_a_file_that_is_linked_is_said_to_be(tmp_path):
    shardckpt.save(OLD, tmp_path / "c")
    (name,) = (path.name for path in (tmp_path / "c").glob("*.safetensors"))
    storage = LocalStorage()
    with shardckpt.open_checkpoint(tmp_path / "c") as base:
        begun = storage.begin(str(tmp_path / "d"), checkpoint_id="0" * 32, overwrite=False)
        assert begun.link(name, base.files) is True
        assert begun.link("shard-00009-of-00010.safetensors", base.files) is False
        begun.abandon()
