"""Communicators that can't be used are refused; the ranks of MPI meet and exchange messages."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

import shardckpt
from shardckpt import errors
from shardckpt.coordination.mpi import coordinator
from shardckpt.coordination.mpi import link as link_module
from shardckpt.coordination.mpi.coordinator import check_communicator, mpi_coordinator
from shardckpt.coordination.mpi.link import Link
from shardckpt.coordination.resolve import operation
from tests.coordination.mpi.stand_in import Comm, Threads, fake_mpi

pytestmark = pytest.mark.usefixtures("launched_by")


@pytest.mark.parametrize(("channel", "level"), [("main", 1), ("async", 2)])
def test_mpi_without_threads(monkeypatch, channel, level):
    mpi = fake_mpi(size=2, level=level)
    monkeypatch.setattr(coordinator, "load_mpi", lambda: mpi)
    with (
        pytest.raises(errors.CoordinationError, match="thread level"),
        operation("save", comm=Comm(2), channel=channel),
    ):
        pass
    with operation("save", comm=Comm(1), channel=channel) as ranks:
        assert ranks.world_size == 1


@pytest.mark.parametrize(
    ("mpi", "comm", "expected", "actual"),
    [
        ({}, object(), "an intracommunicator of mpi4py", "<object object"),
        ({"Is_finalized": lambda: True}, Comm(2), "MPI that runs", "MPI that was finalized"),
        ({"COMM_NULL": Comm(0)}, None, "an open communicator", "one that was freed"),
        ({"Intracomm": int}, Comm(2), "an intracommunicator", "an intercommunicator"),
        ({}, Comm(0), "an open communicator", "integer division"),
    ],
)
def test_a_communicator_that_can_not_be_used_is_refused(monkeypatch, mpi, comm, expected, actual):
    stand_in = fake_mpi(size=2)
    vars(stand_in).update(mpi)
    monkeypatch.setattr(Comm, "Get_size", lambda self: self.size * (1 // self.size))
    monkeypatch.setattr(coordinator, "load_mpi", lambda: stand_in)
    with pytest.raises(errors.CoordinationError, match="can't be used") as raised:
        check_communicator(comm or stand_in.COMM_NULL, channel="main")
    assert raised.value.expected == expected
    assert raised.value.actual.startswith(actual)
    assert "MPI.COMM_WORLD" in raised.value.remedy


@pytest.mark.parametrize(("channel", "level", "taken"), [("main", 2, True), ("async", 2, False)])
def test_a_background_save_needs_mpi_for_many_threads(monkeypatch, channel, level, taken):
    monkeypatch.setattr(coordinator, "load_mpi", lambda: fake_mpi(size=2, level=level))
    if taken:
        assert check_communicator(Comm(2), channel=channel) == 2
        return
    with pytest.raises(errors.CoordinationError) as raised:
        check_communicator(Comm(2), channel=channel)
    assert '"multiple"' in raised.value.expected
    assert check_communicator(Comm(1), channel=channel) == 1


@pytest.fixture
def mpi(monkeypatch):
    """An MPI of three ranks, which are threads."""
    made = Threads(3)
    for module in (coordinator, link_module):
        monkeypatch.setattr(module, "load_mpi", lambda: made)
    monkeypatch.setattr(link_module, "_lost", set())
    monkeypatch.setattr(link_module, "atexit", SimpleNamespace(register=id, unregister=id))
    return made


def on_ranks(mpi, work, ranks=(0, 1, 2), **options) -> list:
    """Run the work of each rank in a thread of its own. Returns the results, or the errors."""
    links = {rank: Link(mpi.world[rank]) for rank in ranks}

    def run(rank):
        with shardckpt.options(**options):
            try:
                return work(links[rank])
            except errors.ShardckptError as error:
                return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(run, ranks))


def test_ranks_gather_on_rank_0_and_each_gets_its_part(mpi):
    def work(link):
        link.claim()
        with mpi_coordinator(link, channel="main", subject="save c") as ranks:
            found = []
            for phase in ("plan", "write"):
                payloads = ranks.gather(f"{phase} {link.rank}".encode(), phase=phase)
                answers = payloads and [payload.upper() for payload in payloads]
                found.append(ranks.scatter(answers, phase=phase))
            assert (ranks.rank, ranks.world_size) == (link.rank, 3)
        assert link.inboxes == {}
        return found

    expected = [[f"PLAN {rank}".encode(), f"WRITE {rank}".encode()] for rank in range(3)]
    assert on_ranks(mpi, work) == expected


def test_ranks_with_different_calls_get_an_error_that_names_the_odd_one(mpi):
    def work(link):
        link.claim()
        subject = "save d" if link.rank == 2 else "save c"
        with mpi_coordinator(link, channel="main", subject=subject):
            raise AssertionError("the ranks must not meet")

    found = on_ranks(mpi, work)
    assert [type(error) for error in found] == [errors.RankMismatchError] * 3
    assert {error.rank for error in found} == {2}
    assert found[1].actual == "save d"


def test_a_rank_that_does_not_call_is_named_on_the_others(mpi, monkeypatch):
    given_up = set()
    monkeypatch.setattr(
        Link, "give_up", lambda self, ranks: given_up.add((self.rank, tuple(ranks)))
    )

    def work(link):
        link.claim()
        with mpi_coordinator(link, channel="main", subject="save c"):
            raise AssertionError("the ranks must not meet")

    found = on_ranks(mpi, work, ranks=(0, 1), arrival_deadline_s=0.5)
    assert [type(error) for error in found] == [errors.RankFailedError] * 2
    assert {error.rank for error in found} == {(2,)}
    assert given_up == {(0, (2,)), (1, (2,))}
    late = on_ranks(mpi, work, ranks=(2,))  # it calls after the others have given it up
    assert "came too late" in late[0].actual


def test_a_rank_without_heartbeats_has_failed(mpi):
    def work(link):
        link.claim()
        with mpi_coordinator(link, channel="main", subject="save c") as ranks:
            if link.rank == 2:
                mpi.mute.add(2)  # as if it were stopped
            elif not link.rank:
                ranks.gather(b"", phase="write")
            else:
                ranks.gather(b"", phase="write")
                ranks.scatter(None, phase="write")

    found = on_ranks(mpi, work, deadline_s=0.5)
    assert [type(error) for error in found[:2]] == [errors.RankFailedError] * 2
    assert [(error.rank, error.facts["phase"]) for error in found[:2]] == [((2,), "write")] * 2
    assert "no sign of life" in found[0].actual
    assert found[1].actual == "rank 0 has given them up"
