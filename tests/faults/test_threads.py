"""Worker threads that raise or hang, two writers, and a reader of a checkpoint that is replaced."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import errors
from shardckpt.loading import shard_reader as reader
from shardckpt.saving import shard_writer as writer
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.posix import System
from tests.ranks import run_ranks

BIG = {"w": torch.arange(6_000_000, dtype=torch.int32)}  # 24 MB: some buffers


class Planted(Exception):
    pass


class Breaks(System):
    """Call number `at` of a method raises what no file system raises."""

    def __init__(self, name: str, at: int) -> None:
        self.left = at
        self.name = name
        self.lock_ = threading.Lock()

    def maybe(self, name: str) -> None:
        with self.lock_:
            self.left -= name == self.name
            if self.left == 0 and name == self.name:
                raise Planted

    def write(self, fd, data, *, offset):
        self.maybe("write")
        return super().write(fd, data, offset=offset)

    def read(self, fd, buffers, *, offset, wait=True):
        self.maybe("read")
        return super().read(fd, buffers, offset=offset, wait=wait)


def test_each_writing_thread_that_raises_fails_the_save(tmp_path):
    count = Breaks("write", 1 << 30)
    shardckpt.save(BIG, tmp_path / "count", storage=LocalStorage(count))
    calls = (1 << 30) - count.left
    assert calls > 3
    for at in range(1, calls + 1):
        with pytest.raises(Planted):
            shardckpt.save(BIG, tmp_path / "c", storage=LocalStorage(Breaks("write", at)))
        assert os.listdir(tmp_path) == ["count"]


def test_each_reading_thread_that_raises_fails_the_load(tmp_path):
    shardckpt.save(BIG, tmp_path / "c")
    count = Breaks("read", 1 << 30)
    shardckpt.load_state(tmp_path / "c", storage=LocalStorage(count))
    calls = (1 << 30) - count.left
    assert calls > 3
    for at in range(1, calls + 1):
        with pytest.raises(Planted):
            shardckpt.load_state(tmp_path / "c", storage=LocalStorage(Breaks("read", at)))


class Hangs(Breaks):
    """A call that returns only when the test allows it."""

    go_on = threading.Event()

    def maybe(self, name: str) -> None:
        try:
            super().maybe(name)
        except Planted:
            self.go_on.wait(60)


@pytest.fixture
def hanging(monkeypatch):
    monkeypatch.setenv("SHARDCKPT_STALL_DEADLINE_S", str(0.5))
    Hangs.go_on.clear()
    yield
    Hangs.go_on.set()


@pytest.mark.usefixtures("hanging")
@pytest.mark.parametrize("at", [1, 3])
def test_a_write_that_hangs_ends_the_save(tmp_path, at):
    begun = time.monotonic()
    with pytest.raises(errors.StorageError, match="no progress"):
        shardckpt.save(BIG, tmp_path / "c", storage=LocalStorage(Hangs("write", at)))
    assert time.monotonic() - begun < 30
    assert not (tmp_path / "c").exists()


@pytest.mark.usefixtures("hanging")
@pytest.mark.parametrize("call", ["load", "verify"])
def test_a_read_that_hangs_ends_the_load(tmp_path, call):
    shardckpt.save(BIG, tmp_path / "c")
    begun = time.monotonic()
    opened = shardckpt.open_checkpoint(tmp_path / "c", storage=LocalStorage(Hangs("read", 3)))
    with pytest.raises(errors.StorageError, match="no progress"):
        opened.load_state() if call == "load" else opened.verify()
    assert time.monotonic() - begun < 30


class Elsewhere(Hangs):
    """Nothing is in the page cache; what waits for the disk hangs from the `at`-th time on."""

    def read(self, fd, buffers, *, offset, wait=True):
        if not wait:
            raise OSError(errno.EAGAIN, "not in the page cache")
        return super().read(fd, buffers, offset=offset)


@pytest.mark.usefixtures("hanging")
def test_a_slice_that_hangs_ends(tmp_path):
    shardckpt.save({"w": torch.arange(10)}, tmp_path / "c")
    with shardckpt.open_checkpoint(tmp_path / "c", storage=LocalStorage(Elsewhere("read", 2))) as c:
        begun = time.monotonic()
        with pytest.raises(errors.StalledError, match="no progress"):
            c["w"][:5]
        assert time.monotonic() - begun < 30


class AtHand(System):
    """All is in the page cache."""

    def read(self, fd, buffers, *, offset, wait=True):
        return super().read(fd, buffers, offset=offset)


def test_what_the_page_cache_has_takes_no_thread(tmp_path, monkeypatch):
    shardckpt.save({"w": torch.arange(10), "large": torch.ones(3, 1 << 20)}, tmp_path / "c")

    def none(*arguments, **named):
        raise AssertionError("a thread")

    with shardckpt.open_checkpoint(tmp_path / "c", storage=LocalStorage(AtHand())) as opened:
        monkeypatch.setattr(reader, "workers", none)
        assert opened["w"][2:5].tolist() == [2, 3, 4]
        with pytest.raises(AssertionError, match="a thread"):
            opened["large"][:]


def test_bytes_that_were_planned_and_not_written_fail_the_save(tmp_path, monkeypatch):
    finish = writer._Stream.finish
    monkeypatch.setattr(
        writer._Stream, "finish", lambda self: (finish(self)[0] - 1, finish(self)[1])
    )
    with pytest.raises(errors.StorageError, match="size"):
        shardckpt.save({"w": torch.ones(3)}, tmp_path / "c")
    assert os.listdir(tmp_path) == []


def save_and_load_in_turn(path):
    """How many saves of this process, which knows of no other, were done, and how many refused."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    saved = busy = 0
    for number in range(15):
        try:
            state = {"w": torch.full((1000,), float(rank)), "n": number}
            shardckpt.save(state, path, overwrite=True)
            saved += 1
        except errors.CheckpointBusyError:
            busy += 1
        try:
            found = shardckpt.load_state(path)["w"] if saved else torch.ones(1)
        except errors.CheckpointNotFoundError:  # the other one replaced it meanwhile
            continue
        assert (found == found[0]).all()
    return saved, busy


@pytest.mark.ranks
def test_two_processes_that_write_to_one_path(tmp_path):
    """Each save of each is whole or refused as busy, and one of them is there in the end."""
    told = run_ranks(2, save_and_load_in_turn, str(tmp_path / "c"))
    assert all(saved + busy == 15 for saved, busy in told)
    assert sum(saved for saved, _ in told) > 0
    assert len(set(shardckpt.load_state(tmp_path / "c")["w"].tolist())) == 1
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_reader_of_what_is_being_replaced(tmp_path, exchange):
    """A whole load, or an error that says that it was replaced; never a mixture or damage."""

    class Old(System):
        def exchange(self, one, other):
            if not exchange:
                raise OSError(22, "no exchange here")
            super().exchange(one, other)

    stop = threading.Event()
    failed: list[BaseException] = []
    storage = LocalStorage(Old())

    def replace() -> None:
        try:
            for number in range(1, 100_000):
                state = {"w": torch.full((5000,), float(number)), "n": number}
                shardckpt.save(state, tmp_path / "c", overwrite=True, storage=storage)
                if stop.is_set():
                    return
        except BaseException as error:
            failed.append(error)

    shardckpt.save({"w": torch.zeros(5000), "n": 0}, tmp_path / "c")
    thread = threading.Thread(target=replace)
    thread.start()
    whole, last = 0, 0
    give_up_at = time.monotonic() + 1.5
    try:
        while time.monotonic() < give_up_at or whole < 3:
            try:
                found = shardckpt.load_state(tmp_path / "c")
            except errors.CheckpointNotFoundError:
                continue
            assert (found["w"] == found["n"]).all()
            assert found["n"] >= last
            whole, last = whole + 1, found["n"]
    finally:
        stop.set()
        thread.join()
    assert not failed
