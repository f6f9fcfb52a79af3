"""The local file system: the suite for every storage, and every system call failing once."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import resource
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.cli.main import main
from shardckpt.format.digests import block_digest
from shardckpt.loading.shard_reader import read_all
from shardckpt.maintenance import verify
from shardckpt.plan.page_cache_policy import ALWAYS, MOSTLY, NEVER
from shardckpt.plan.read_plan import plan_reads
from shardckpt.state.local_chunks import LocalChunk
from shardckpt.storage import local_reader as files_module
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.names import hidden_path
from shardckpt.storage.posix import System
from shardckpt.testing import StorageTests, save
from tests.ranks import run_ranks, start_ranks
from tests.storage.clones import Clones


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "above" / "checkpoint")


class TestLocal(StorageTests):
    @pytest.fixture
    def storage(self):
        return LocalStorage()


class Plain(System):
    """A file system without O_DIRECT, locks, fallocate, exchange of names, or fsync of folders."""

    def direct(self, fd, *, on):
        raise OSError(errno.EINVAL, "no direct input and output here")

    def lock(self, fd):
        raise OSError(errno.ENOLCK, "no locks here")

    def allocate(self, fd, *, size_bytes):
        raise OSError(errno.EOPNOTSUPP, "no fallocate here")

    def exchange(self, one, other):
        raise OSError(errno.EINVAL, "no exchange here")


class TestPlain(StorageTests):
    @pytest.fixture
    def storage(self):
        return LocalStorage(Plain())


class Cold(System):
    """Nothing is ever in the page cache; `past` counts the reads past it. From number `at` on they
    fail with `error`; none gives more than `most_bytes`."""

    def __init__(self, error=None, *, at=1, most_bytes=1 << 30):
        self.error, self.at, self.most_bytes, self.past = error, at, most_bytes, 0

    def cached(self, fd, *, offset, size_bytes):
        return False

    def read(self, fd, buffers, *, offset, wait=True):
        if not wait:
            raise OSError(errno.EAGAIN, "not in the page cache")
        if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            return super().read(fd, buffers, offset=offset)
        self.past += 1
        if offset % 4096:
            raise OSError(errno.EINVAL, "as disks with sectors of 4096 bytes say")
        if self.error and self.past >= self.at:
            raise OSError(self.error, "planted")
        return min(super().read(fd, buffers, offset=offset), self.most_bytes)


class Torn(System):
    """No read gives more than 1000 bytes."""

    def read(self, fd, buffers, *, offset, wait=True):
        return super().read(fd, [buffers[0][:1000]], offset=offset, wait=wait)


class TestTorn(StorageTests):
    @pytest.fixture
    def storage(self):
        return LocalStorage(Torn())


class Undirected(Cold):
    """A file system that does not open files for reading past the cache."""

    def open(self, path, flags, *, dir_fd=None):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "planted")
        return super().open(path, flags, dir_fd=dir_fd)


class TestCold(StorageTests):
    @pytest.fixture
    def storage(self):
        return LocalStorage(Cold())


def load_cold(path, system):
    with shardckpt.open_checkpoint(path, storage=LocalStorage(system)) as checkpoint:
        checkpoint.verify()
        return checkpoint.load_state()


COLD = [
    {},
    *({"most_bytes": most} for most in (1 << 20, 512, 65000)),
    *(
        {"error": code, "at": at}
        for code in (errno.EINVAL, errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.EIO)
        for at in (1, 3)
    ),
]
"""Reads past the cache that go well, that are torn, or that fail."""


@pytest.fixture(scope="module")
def a_large_one(tmp_path_factory):
    """Blocks that end within a tensor, small tensors, one that is copied, and an odd end."""
    state = {"a": torch.arange(1_000_003), "b": torch.randn(700, 900).t()}
    state |= {"c": {str(n): torch.full((n,), float(n)) for n in range(50)}, "d": b"x" * 7}
    path = tmp_path_factory.mktemp("cold") / "c"
    shardckpt.save(state, path)
    return state, path


@pytest.mark.parametrize("faults", COLD, ids=str)
def test_a_load_past_the_cache_takes_the_same_bytes(a_large_one, faults):
    (state, path), system = a_large_one, Cold(**faults)
    found = load_cold(path, system)
    assert system.past
    assert torch.equal(found["a"], state["a"])
    assert torch.equal(found["b"], state["b"])
    assert all(torch.equal(found["c"][name], state["c"][name]) for name in state["c"])


def test_a_load_without_reads_past_the_cache(a_large_one):
    (state, path), system = a_large_one, Undirected()
    assert torch.equal(load_cold(path, system)["a"], state["a"])
    assert not system.past


@pytest.mark.parametrize(
    ("past_cache", "rows", "past"),
    [(ALWAYS, 9, True), (MOSTLY, 9, False), (MOSTLY, 10**6, True), (NEVER, 10**6, False)],
)
def test_blocks_that_others_want_too_are_read_into_the_cache(a_large_one, past_cache, rows, past):
    (state, path), system = a_large_one, Cold()
    found = torch.empty(rows, dtype=torch.int64)
    with shardckpt.open_checkpoint(path, storage=LocalStorage(system)) as opened:
        part = LocalChunk((0,), (rows,), found)
        reads = plan_reads([(opened.manifest.tensors["a"], part)])
        read_all(opened.files, opened.manifest, reads, past_cache=past_cache)
    assert torch.equal(found, state["a"][:rows])
    assert bool(system.past) == past


@pytest.mark.parametrize("faults", COLD, ids=str)
def test_damage_is_found_past_the_cache_and_in_it(a_large_one, tmp_path, monkeypatch, faults):
    monkeypatch.setattr(verify, "find_flipped_bit", lambda data, digest: None)  # takes too long
    path = shutil.copytree(a_large_one[1], tmp_path / "c")
    (shard,) = path.glob("*.safetensors")
    with open(shard, "r+b") as file:
        file.seek(5_000_000)
        file.write(b"damaged!")
    cold = LocalStorage(Cold(**faults))
    for storage in (cold, LocalStorage(Undirected())):
        with pytest.raises(errors.CorruptionError, match="block 4"):
            shardckpt.load_state(path, storage=storage)
        with shardckpt.open_checkpoint(path, storage=storage) as checkpoint:
            assert checkpoint.verify(strict=False).corrupted == ("a",)


@pytest.mark.parametrize("end", [3_000_000, 4096 * 1000])
def test_a_file_that_is_cut_while_it_is_read(a_large_one, tmp_path, end):
    """It is truncated after its size was checked. The load raises, also past the cache."""
    path = shutil.copytree(a_large_one[1], tmp_path / "c")
    (shard,) = path.glob("*.safetensors")

    class Cut(Cold):
        def cached(self, fd, *, offset, size_bytes):
            os.truncate(shard, end)
            return False

    with pytest.raises(errors.CorruptionError, match="A file is truncated"):
        shardckpt.load_state(path, storage=LocalStorage(Cut()))


def test_an_error_of_the_disk_is_a_typed_error(a_large_one):
    class Broken(Cold):
        def read(self, fd, buffers, *, offset, wait=True):
            if offset:
                raise OSError(errno.EIO, "planted")
            return super().read(fd, buffers, offset=offset, wait=wait)

    with pytest.raises(errors.StorageError, match="planted"):
        shardckpt.load_state(a_large_one[1], storage=LocalStorage(Broken()))


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


class Failing(System):
    """Call number `at` fails; `calls` counts them."""

    def __init__(self, at=None, code=0, name=None):
        self.at, self.code, self.name = at, code, name
        self.calls = []

    def _maybe(self, name):
        self.calls.append(name)
        if len(self.calls) - 1 == self.at:
            raise OSError(self.code, os.strerror(self.code))


def _failing(name):
    def call(self, *arguments, **named):
        if name == "close":  # Linux closes a descriptor even where it reports an error
            System.close(self, *arguments)
        self._maybe(name)
        return None if name == "close" else getattr(System, name)(self, *arguments, **named)

    return call


for method in [name for name in vars(System) if not name.startswith("_")]:
    setattr(Failing, method, _failing(method))


STATE = {"w": torch.arange(3000.0), "step": 2}
OLD = {"w": torch.zeros(3000), "step": 1}


def loadable(path):
    state = shardckpt.load_state(path)
    return state["step"], torch.equal(state["w"], {1: OLD, 2: STATE}[state["step"]]["w"])


def descriptors():
    return len(os.listdir("/proc/self/fd"))


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


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_every_call_of_a_load_failing_once(tmp_path, code):
    shardckpt.save(STATE, tmp_path / "c")
    count = Failing()
    shardckpt.load({"w": torch.zeros(3000)}, tmp_path / "c", storage=LocalStorage(count))
    before = descriptors()
    for at, name in enumerate(count.calls):
        target = {"w": torch.zeros(3000)}
        try:
            shardckpt.load(target, tmp_path / "c", storage=LocalStorage(Failing(at, code)))
            assert torch.equal(target["w"], STATE["w"]), (at, name)
        except errors.StorageError as error:
            assert error.errno == code, (at, name)
        assert descriptors() == before, (at, name)


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


def test_the_suite_sees_a_storage_that_publishes_early(path):
    """A planted fault: the suite for storages must fail on it."""

    class Early(LocalStorage):
        def begin(self, path, *, checkpoint_id, overwrite):
            save(LocalStorage(), path, b"early", overwrite=True)
            return super().begin(path, checkpoint_id=checkpoint_id, overwrite=True)

    with pytest.raises(AssertionError):
        StorageTests().test_nothing_is_visible_before_commit(Early(), path)


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


def values_of_many_shards():
    return torch.arange(1200 * 1024.0).reshape(-1, 1024)


@pytest.fixture
def many_shards(tmp_path):
    """A checkpoint of more shards than may be open at once, and what is in it."""
    state = {"w": values_of_many_shards(), "n": torch.ones(7)}
    one, many = tmp_path / "one", tmp_path / "many"
    shardckpt.save(state, one)
    assert main(["reshard", str(one), str(many), "--shards", "300"]) == 0
    with shardckpt.open_checkpoint(many) as opened:
        assert len(opened["w"].shards) == 300
    return many, state


def work_with_few_descriptors(path, other):
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
    os.environ["SHARDCKPT_READ_THREADS"] = "8"
    expected = values_of_many_shards()
    for device_map in ("cpu", "disk"):
        state = shardckpt.load_state(path, device_map=device_map)
        assert torch.equal(state["w"] + 0, expected)
    assert main(["verify", path]) == 0
    assert main(["reshard", path, other, "--shards", "200"]) == 0


@pytest.mark.ranks
def test_more_shards_than_descriptors(many_shards, tmp_path):
    """Files that nobody reads are closed, and maps keep none open."""
    run_ranks(1, work_with_few_descriptors, str(many_shards[0]), str(tmp_path / "other"))


def test_files_in_use_stay_open(many_shards, monkeypatch):
    """Eight threads read all shards at once, and at most two may be open that nobody reads."""
    monkeypatch.setattr(files_module, "_MOST_OPEN", 2)
    path, _ = many_shards
    with shardckpt.open_checkpoint(path) as opened, ThreadPoolExecutor(8) as pool:
        shards = opened.manifest.shards * 5
        random.Random(0).shuffle(shards := list(shards))

        def read(shard):
            found = bytearray(shard.size_bytes)
            opened.files.readinto(shard.name, [memoryview(found)], offset=0)
            return block_digest(found) == shard.digests[0]

        assert all(pool.map(read, shards))
        assert len(opened.files._open) <= 2 + 8


def test_tensors_on_disk_outlive_their_checkpoint(tmp_path, many_shards):
    """Also where others have put another checkpoint at the path, and it would be read past the
    page cache."""
    path, state = many_shards
    cold = Cold()
    there = shardckpt.load_state(path, device_map="disk", storage=LocalStorage(cold))
    gone = shardckpt.load_state(path, device_map="disk", storage=LocalStorage(Cold()))
    assert torch.equal(there["w"] + 0, state["w"])
    assert cold.past
    shutil.rmtree(path)
    shardckpt.save({"w": torch.zeros(3)}, path)
    assert torch.equal(gone["w"] + 0, state["w"])
