"""Blocks that several ranks need are read once, and sent. Each rank acts as on its own machine."""

from __future__ import annotations

import errno
import os
import platform
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardckpt
from shardckpt import LocalStorage, errors
from shardckpt.io.sockets import receive_exactly
from shardckpt.loading.sharing import TOKEN_BYTES, Sharing
from shardckpt.plan.shared_reads import Unit
from shardckpt.storage.posix import System
from tests.ranks import run_ranks, start_ranks

pytestmark = pytest.mark.ranks
ROWS, COLUMNS = 5000, 1024  # 20.5 MB


class Counting(System):
    """Counts the bytes that this process reads from shards, and can fail."""

    read_bytes = 0
    fail_after: float = float("inf")
    shrinks = False  # whether this process alone sees shards of another size

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def fstat(self, fd):
        found = super().fstat(fd)
        shorter = self.shrinks and found.st_size > 1 << 20
        return os.stat_result([*found[:6], found[6] - 1, *found[7:]]) if shorter else found

    def read(self, fd, buffers, *, offset, wait=True):
        if self.read_bytes > self.fail_after:
            raise OSError(errno.EIO, "the disk failed")
        count = super().read(fd, buffers, offset=offset, wait=wait)
        with self._lock:
            self.read_bytes += count
        return count


def tensors():
    numbers = torch.arange(ROWS * COLUMNS, dtype=torch.float32)
    return {
        "model": {"weight": numbers.view(ROWS, COLUMNS), "bias": numbers[-777:].clone()},
        "half": numbers[: 1000 * 999].view(1000, 999).to(torch.bfloat16),
        "count": torch.arange(3),
    }


def act_as_machine(number: int) -> None:
    platform.node = lambda: f"machine{number}"


def total(number: int) -> int:
    numbers = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return sum(numbers)


def empty_like(state):
    if isinstance(state, dict):
        return {key: empty_like(value) for key, value in state.items()}
    return torch.zeros_like(state)


def is_equal(one, other) -> bool:
    if isinstance(one, dict):
        return all(is_equal(one[key], other[key]) for key in other)
    return torch.equal(one, other)


def load_replicas(path: str, machines: int) -> None:
    rank = dist.get_rank()
    act_as_machine(rank % machines)
    system = Counting()
    state = empty_like(tensors())
    report = shardckpt.load(state, path, storage=LocalStorage(system))
    assert is_equal(state, tensors())
    shards = list(Path(path).glob("*.safetensors"))
    unique = sum(shard.stat().st_size for shard in shards)
    manifest = os.path.getsize(f"{path}/manifest.json")
    read = total(system.read_bytes - manifest)
    if machines > 1:
        assert read <= 1.05 * unique
        assert total(report.bytes_read) <= 1.05 * unique
        assert unique / 4 - (6 << 20) < report.bytes_read < unique / 4 + (6 << 20), "balanced"
    else:
        assert read > 3.9 * unique, "on one machine the page cache does this"


@pytest.mark.parametrize("machines", [4, pytest.param(2, marks=pytest.mark.long), 1])
def test_replicas_are_read_once(tmp_path, machines):
    path = str(tmp_path / "saved")
    shardckpt.save(tensors(), path)
    run_ranks(4, load_replicas, path, machines)


def load_meshes(path: str) -> None:
    rank = dist.get_rank()
    act_as_machine(rank)
    full = tensors()["model"]["weight"]
    shardckpt.save(
        {"weight": distribute_tensor(full, init_device_mesh("cpu", (4,)), [Shard(0)])}, path
    )
    for shape, placements in (
        ((2, 2), [Replicate(), Shard(0)]),  # HSDP
        ((2, 2), [Shard(0), Replicate()]),
        ((4,), [Shard(1)]),  # each rank needs a part of each block
        ((4,), [Shard(0)]),  # nothing is shared
    ):
        mesh = init_device_mesh("cpu", shape)
        state = {"weight": distribute_tensor(torch.zeros_like(full), mesh, placements)}
        system = Counting()
        shardckpt.load(state, path, storage=LocalStorage(system))
        assert torch.equal(state["weight"].full_tensor(), full)
        assert total(system.read_bytes) <= 1.05 * full.nbytes + 4 * os.path.getsize(
            f"{path}/manifest.json"
        ), placements


def test_replicas_of_parts_are_read_once(tmp_path):
    run_ranks(4, load_meshes, str(tmp_path / "saved"))


def load_in_groups(path: str) -> None:
    rank = dist.get_rank()
    act_as_machine(rank)
    groups = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    for _ in range(3):
        state = empty_like(tensors())
        report = shardckpt.load(state, path, process_group=groups[rank in (1, 2)])
        assert is_equal(state, tensors())
        assert report.bytes_read < 14 << 20, "half of it"


def test_groups_share_apart_from_each_other(tmp_path):
    path = str(tmp_path / "saved")
    shardckpt.save(tensors(), path)
    run_ranks(4, load_in_groups, path)


def fail_on_one_rank(path: str, how: str) -> None:
    rank = dist.get_rank()
    act_as_machine(rank)
    system = Counting()
    if rank == 2 and how == "disk":
        system.fail_after = 2 << 20
    system.shrinks = rank == 2 and how == "size"
    expected = errors.StorageError if how == "disk" else errors.CorruptionError
    began = time.monotonic()
    with pytest.raises(expected) as caught:
        shardckpt.load(empty_like(tensors()), path, storage=LocalStorage(system))
    assert time.monotonic() - began < 60
    if how == "size":
        return
    if how == "disk":
        assert caught.value.rank == (2,)
        state = empty_like(tensors())  # the ranks can load again
        shardckpt.load(state, path)
        assert is_equal(state, tensors())
    else:
        assert "block 7" in str(caught.value)


@pytest.mark.parametrize("how", ["disk", "damage", "size"])
def test_a_reader_that_fails_is_an_error_on_all_ranks(tmp_path, how):
    path = tmp_path / "saved"
    shardckpt.save(tensors(), path)
    if how == "damage":
        (shard,) = path.glob("*.safetensors")
        data = bytearray(shard.read_bytes())
        data[(7 << 20) + 5] ^= 4
        shard.write_bytes(data)
    run_ranks(4, fail_on_one_rank, str(path), how)


class Ending(Counting):
    """Ends or stops the process in the middle of a read, or waits there for long."""

    how = ""

    def read(self, fd, buffers, *, offset, wait=True):
        if self.how and self.read_bytes > 2 << 20:
            if self.how == "dies":
                os._exit(1)
            if self.how == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)
        return super().read(fd, buffers, offset=offset, wait=wait)


def load_with_a_rank_that_ends(path: str, how: str) -> str:
    rank = dist.get_rank()
    act_as_machine(rank)
    system = Ending()
    if rank == 2:
        system.how = how
    expected = errors.StalledError if how == "hangs" else errors.RankFailedError
    began = time.monotonic()
    with (
        shardckpt.options(deadline_s=4, stall_deadline_s=3 if how == "hangs" else 60),
        pytest.raises(expected) as caught,
    ):
        shardckpt.load(empty_like(tensors()), path, storage=LocalStorage(system))
    assert caught.value.rank == (2,) or rank == 2
    assert time.monotonic() - began < 30
    return "failed as expected"


@pytest.mark.parametrize("how", ["dies", pytest.param("stops", marks=pytest.mark.long), "hangs"])
def test_a_reader_that_ends_is_an_error_on_all_other_ranks(tmp_path, how):
    path = str(tmp_path / "saved")
    shardckpt.save(tensors(), path)
    ranks = start_ranks(4, load_with_a_rank_that_ends, path, how)
    results = ranks.wait(90, ending=None if how == "hangs" else 3)
    alive = [result for rank, result in enumerate(results) if rank != 2]
    assert alive == [(True, "failed as expected")] * 3


def load_what_is_damaged_on_the_way(path: str) -> None:
    rank = dist.get_rank()
    act_as_machine(rank)
    if rank == 2:
        offer = Sharing.offer

        def offer_other_bytes(sharing, unit, view):
            other = bytearray(view)
            other[-1] ^= 1
            offer(sharing, unit, memoryview(other))

        Sharing.offer = offer_other_bytes
    state = empty_like(tensors())
    shardckpt.load(state, path)
    assert is_equal(state, tensors())


def test_what_is_damaged_on_the_way_is_read_again(tmp_path):
    path = str(tmp_path / "saved")
    shardckpt.save(tensors(), path)
    run_ranks(4, load_what_is_damaged_on_the_way, path)


def load_without_listeners(path: str, what: str) -> None:
    act_as_machine(dist.get_rank())
    if what == "none" and dist.get_rank() == 1:
        Sharing.__init__ = lambda self, host, rank: (_ for _ in ()).throw(OSError("no sockets"))
    if what == "unreachable" and dist.get_rank() == 1:
        Sharing.begin = lambda self, units, addresses, token: begin(
            self, units, [("127.0.0.1", 9)] * len(addresses), token
        )
    system = Counting()
    state = empty_like(tensors())
    with shardckpt.options(deadline_s=2, read_once=what != "option"):
        shardckpt.load(state, path, storage=LocalStorage(system))
    assert is_equal(state, tensors())
    unique = sum(shard.stat().st_size for shard in Path(path).glob("*.safetensors"))
    if what != "unreachable":
        assert system.read_bytes > 0.9 * unique


begin = Sharing.begin


@pytest.mark.parametrize("what", ["none", "unreachable", "option"])
def test_ranks_that_can_not_reach_each_other_read_for_themselves(tmp_path, what):
    path = str(tmp_path / "saved")
    shardckpt.save(tensors(), path)
    run_ranks(4, load_without_listeners, path, what)


UNIT = Unit(tag=5, shard=0, first=0, end=2, path=(0, 1))
BLOCKS = bytes(range(256)) * 8192


@pytest.fixture
def pair():
    """Two ranks of a load, with one unit that the first one reads."""
    with shardckpt.options(deadline_s=2):
        ranks = [Sharing("127.0.0.1", rank) for rank in range(2)]
    for rank in ranks:
        rank.begin([UNIT], [one.address for one in ranks], b"t" * TOKEN_BYTES)
    yield ranks
    for rank in reversed(ranks):
        rank.close()


def in_thread(function, *arguments):
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    return thread


def test_blocks_arrive_when_they_have_been_read(pair):
    reader, other = pair
    assert other.windows() == reader.windows() == [(0, 0)]
    assert list(other.units(0, 0)) == [UNIT]
    view = memoryview(bytearray(len(BLOCKS)))
    arrived = []
    thread = in_thread(lambda: arrived.append(other.receive(UNIT, view)))
    time.sleep(0.5)  # longer than a sign of life takes
    reader.offer(UNIT, memoryview(BLOCKS))
    reader.withdraw(UNIT)
    thread.join(10)
    assert arrived == [True]
    assert view == BLOCKS
    assert other.received_bytes == len(BLOCKS)


def test_a_connection_without_the_token_is_refused(pair, caplog):
    reader, _ = pair
    reader.offer(UNIT, memoryview(BLOCKS))
    stranger = Sharing("127.0.0.1", 1)
    stranger.begin([UNIT], [reader.address, stranger.address], b"x" * TOKEN_BYTES)
    assert not stranger.receive(UNIT, memoryview(bytearray(len(BLOCKS))))
    assert "does not belong to this load" in caplog.text
    with socket.create_connection(reader.address) as connection:
        challenge = receive_exactly(connection, memoryview(bytearray(TOKEN_BYTES)))
        connection.sendall(
            bytes(challenge) + (1).to_bytes(4, "little") + UNIT.tag.to_bytes(8, "little")
        )
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert reader._expected[UNIT.tag] == {1}, "the rank that needs the blocks can still get them"
    stranger.close()
    assert reader._gone == set(), "a stranger can't say that a rank needs nothing"


def test_a_rank_that_has_failed_is_not_waited_for(pair):
    reader, other = pair
    reader.offer(UNIT, memoryview(BLOCKS))
    began = time.monotonic()
    other.stop()
    other.close()
    reader.withdraw(UNIT)
    assert time.monotonic() - began < 1.5


def test_a_rank_that_fetches_nothing_is_waited_for_once(pair):
    reader, other = pair
    reader.offer(UNIT, memoryview(BLOCKS))
    reader.withdraw(UNIT)
    assert reader._gone == {1}
    reader.offer(UNIT, memoryview(BLOCKS))
    began = time.monotonic()
    reader.withdraw(UNIT)
    assert time.monotonic() - began < 1
    reader.stop()
    assert not other.receive(UNIT, memoryview(bytearray(len(BLOCKS))))
    assert not other.receive(UNIT, memoryview(b"")), "it is not asked again"


def test_a_rank_that_fails_says_farewell_for_a_limited_time(monkeypatch):
    """Each of 20 machines that are gone takes a second."""
    rank, now, asked = Sharing("127.0.0.1", 20), [0.0], []
    rank.begin([Unit(n, 0, 0, 1, (n, 20)) for n in range(20)], [rank.address] * 21, b"t" * 32)

    def ask(source, tag, *, wait_s):
        now[0] += wait_s
        asked.append(source)
        raise OSError("gone")

    monkeypatch.setattr(rank, "_ask", ask)
    monkeypatch.setattr("shardckpt.loading.sharing.time.monotonic", lambda: now[0])
    rank.close()
    assert len(asked) == 5
