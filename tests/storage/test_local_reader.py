"""The files of a checkpoint on a file system: reads past the page cache, torn reads, and errors."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor

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
from shardckpt.storage.posix import System
from shardckpt.testing import StorageTests
from tests.ranks import run_ranks
from tests.storage.systems import Cold, Failing, descriptors

STATE = {"w": torch.arange(3000.0), "step": 2}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "above" / "checkpoint")


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


def test_a_path_that_is_a_file_or_another_folder_is_refused(tmp_path):
    shardckpt.save(STATE, tmp_path / "c")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").touch()
    (tmp_path / "many").mkdir()
    for name in "abcdefg":
        (tmp_path / "many" / name).touch()
    found = {
        "file": "a file",
        "empty": "an empty directory",
        "dcp": "a checkpoint of torch.distributed.checkpoint",
        "many": "a directory with a, b, c, d, e",
    }
    for name, actual in found.items():
        with pytest.raises(errors.NotACheckpointError) as raised:
            LocalStorage().open(str(tmp_path / name)).manifest()
        assert (raised.value.path, raised.value.actual) == (str(tmp_path / name), actual)
        assert "shardckpt convert" in raised.value.remedy
    with pytest.raises(errors.CheckpointNotFoundError, match="does not exist"):
        LocalStorage().open(str(tmp_path / "nothing"))


def test_links_pipes_and_large_manifests_are_not_read(tmp_path, monkeypatch):
    shardckpt.save(STATE, tmp_path / "c")
    (shard,) = (tmp_path / "c").glob("*.safetensors")
    files = LocalStorage().open(str(tmp_path / "c"))
    monkeypatch.setattr(files_module, "_MANIFEST_LIMIT_BYTES", 100)
    with pytest.raises(errors.CorruptionError, match="too large") as raised:
        files.manifest()
    assert raised.value.expected == "at most 100 bytes"
    shard.rename(tmp_path / "moved")
    shard.symlink_to(tmp_path / "moved")
    with pytest.raises(errors.CorruptionError, match="not a regular file") as raised:
        files.size_bytes(shard.name)
    assert raised.value.path == str(shard)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(errors.CorruptionError, match="not a regular file"):
        files.size_bytes(shard.name)
    files.close()


def test_a_shard_is_linked_or_cloned_or_neither_and_nothing_is_left(tmp_path):
    class NoClones(System):
        def clone(self, source_fd, target_fd, *, offset=0, size_bytes=0):
            raise OSError(errno.EOPNOTSUPP, "no clones here")

    class NoLinks(NoClones):
        def link(self, name, target, *, dir_fd):
            raise OSError(errno.EPERM, "no links here")

    class Renamed(NoClones):
        """The name is given to another file between the open and the link."""

        def link(self, name, target, *, dir_fd):
            with open(target, "x"):
                pass

    shardckpt.save(STATE, tmp_path / "c")
    (shard,) = (tmp_path / "c").glob("*.safetensors")
    made = {NoClones: True, NoLinks: False, Renamed: False}
    for system, expected in made.items():
        files = LocalStorage(system()).open(str(tmp_path / "c"))
        target = tmp_path / system.__name__
        assert files.link_or_clone(shard.name, str(target)) is expected
        assert not files.link_or_clone("shard-00007-of-00008.safetensors", str(target) + "2")
        assert target.exists() is expected
        files.close()
    assert os.path.samefile(tmp_path / "NoClones", shard)


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_not_corruption(tmp_path):
    shardckpt.save(STATE, tmp_path / "c")
    (shard,) = (tmp_path / "c").glob("*.safetensors")
    files = LocalStorage().open(str(tmp_path / "c"))
    for actual in ("no checkpoint", "another checkpoint"):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        if actual == "another checkpoint":
            shardckpt.save(STATE, tmp_path / "c")
        with pytest.raises(errors.CheckpointNotFoundError, match="was replaced") as raised:
            files.size_bytes(shard.name)
        assert (raised.value.expected, raised.value.actual) == (shard.name, actual)
    files.close()
