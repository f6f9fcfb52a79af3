"""Ranks that raise, die or stop in each phase: the others raise, nothing appears, and the next
save works."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import errors
from shardckpt.loading import agreement as load_agreement
from shardckpt.loading import pipeline as load_pipeline
from shardckpt.saving import agreement, commit
from tests.ranks import run_ranks, start_ranks

pytestmark = pytest.mark.ranks

FAULTS = {
    "raise": lambda: (_ for _ in ()).throw(ValueError("planted")),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


DEFAULT = {("raise", 0), ("raise", 1), ("kill", 0), ("stop", 1)}  # each waits for a deadline


def cases(*phases: str) -> pytest.MarkDecorator:
    """Each fault of each rank in each phase."""
    return pytest.mark.parametrize(
        ("phase", "rank", "fault"),
        [
            pytest.param(
                *(phase, rank, fault),
                marks=[] if (fault, rank) in DEFAULT else pytest.mark.long,
            )
            for phase in phases
            for rank in (0, 1)
            for fault in FAULTS
        ],
    )


def plant(modules, phase: str, fault: str) -> None:
    """Let this rank fail where it does its part of a phase."""
    exchange = modules[0].exchange

    def faulty(coordinator, name, local, decide):
        def part():
            if name == phase:
                FAULTS[fault]()
            return local()

        return exchange(coordinator, name, part, decide)

    for module in modules:
        module.exchange = faulty


def deadlines(arrival_s: float = 10.0) -> None:
    os.environ["SHARDCKPT_DEADLINE_S"] = str(5.0)
    os.environ["SHARDCKPT_ARRIVAL_DEADLINE_S"] = str(arrival_s)


def save_with_fault(folder: str, phase: str, rank: int, fault: str) -> tuple[object, ...]:
    deadlines()
    state = {"w": torch.arange(10.0), "step": 1}
    shardckpt.save(state, f"{folder}/before")
    exchange = agreement.exchange
    if dist.get_rank() == rank:
        plant((agreement, commit), phase, fault)
    begun = time.monotonic()
    error: object = None
    try:
        shardckpt.save({**state, "new": torch.ones(3)}, f"{folder}/faulty")
    except ValueError as own:
        error = ("own", str(own))
    except errors.RankFailedError as other:
        error = ("other", other.rank, other.facts.get("phase"))
    took_s = time.monotonic() - begun
    agreement.exchange = commit.exchange = exchange
    if fault == "raise":
        shardckpt.save(state, f"{folder}/after")
    return (error, took_s)


@cases("plan", "divide", "write")
def test_a_rank_fails_while_saving(tmp_path, phase, rank, fault):
    ranks = start_ranks(2, save_with_fault, str(tmp_path), phase, rank, fault)
    results = ranks.wait(30, ending=2 if fault == "raise" else 1)
    ok, value = results[1 - rank]
    assert ok, value
    (kind, who, when), took_s = value
    assert (kind, who) == ("other", (rank,))
    assert when == phase
    assert took_s < 10
    assert not (tmp_path / "faulty").exists()
    assert shardckpt.load_state(tmp_path / "before")["w"].tolist() == list(range(10))
    if fault == "raise":
        ok, value = results[rank]
        assert ok, value
        assert value[0] == ("own", "planted")
        assert shardckpt.load_state(tmp_path / "after")["step"] == 1
    shardckpt.save({"step": 2}, tmp_path / "faulty")  # leftovers don't stand in the way
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".faulty")]


def load_with_fault(folder: str, phase: str, rank: int, fault: str) -> object:
    deadlines()
    if dist.get_rank() == rank:
        plant((load_agreement, load_pipeline), phase, fault)
    try:
        shardckpt.load({"w": torch.zeros(10)}, f"{folder}/c")
    except ValueError as own:
        return "own", str(own)
    except errors.RankFailedError as other:
        return "other", other.rank, other.facts.get("phase")


@cases("open", "read")
def test_a_rank_fails_while_loading(tmp_path, phase, rank, fault):
    shardckpt.save({"w": torch.ones(10)}, tmp_path / "c")
    ranks = start_ranks(2, load_with_fault, str(tmp_path), phase, rank, fault)
    ok, value = ranks.wait(30, ending=2 if fault == "raise" else 1)[1 - rank]
    assert ok, value
    assert value == ("other", (rank,), phase)


def one_comes_late(folder: str) -> object:
    state = {"w": torch.ones(2)}
    given_up = Path(folder, "given up")
    found = []
    for number in range(3):
        deadlines(arrival_s=60.0 if number or dist.get_rank() else 1.0)
        while number == 0 and dist.get_rank() == 1 and not given_up.exists():
            time.sleep(0.1)  # busy elsewhere
        try:
            shardckpt.save(state, f"{folder}/{number}")
            found.append("saved")
        except errors.RankFailedError as error:
            found.append((error.rank, error.facts["phase"]))
        given_up.touch()
    return found


def test_a_rank_that_comes_too_late(tmp_path):
    expected = [((1,), "begin"), "saved", "saved"]
    assert run_ranks(2, one_comes_late, str(tmp_path)) == [expected, expected]
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "given up"]


def different_paths(folder: str) -> object:
    try:
        shardckpt.save({"a": 1}, f"{folder}/{dist.get_rank() // 2}")
    except errors.RankMismatchError as error:
        return error.rank


def test_ranks_that_disagree_on_the_path(tmp_path):
    assert run_ranks(3, different_paths, str(tmp_path)) == [2, 2, 2]
    assert os.listdir(tmp_path) == []


def unpicklable() -> object:
    class Odd(Exception):
        def __reduce__(self):
            raise TypeError("not me")

    try:
        if dist.get_rank() == 1:

            class Breaks:
                def state_dict(self):
                    raise Odd("planted")

                def load_state_dict(self, state):
                    raise Odd

            shardckpt.save({"a": Breaks()}, "/nowhere/at/all")
        shardckpt.save({"a": 1}, "/nowhere/at/all")
    except Odd:
        return "own"
    except errors.RankFailedError as error:
        return error.rank, "planted" in str(error)


def test_an_exception_that_no_pickle_takes():
    assert run_ranks(2, unpicklable) == [((1,), True), "own"]


def states_that_differ(folder: str) -> list[tuple[str, str | None, object]]:
    rank = dist.get_rank()
    found = []
    for number, state in enumerate(
        (
            {"a": torch.ones(2), **({"b": torch.ones(2)} if rank == 1 else {})},
            {"a": torch.ones(2 + rank // 2)},
            {"a": torch.ones(2), "v": {"x": [1, rank]}},
            {"a": torch.full((3,), float(rank == 2))},
        )
    ):
        try:
            shardckpt.save(state, f"{folder}/{number}")
        except errors.StateError as error:
            found.append((type(error).__name__, error.tensor, error.rank))
    big = torch.zeros(100_000)
    big[-1] = rank
    shardckpt.save({"big": big}, f"{folder}/unchecked")
    try:
        shardckpt.save({"big": big}, f"{folder}/checked", check_replicas=True)
    except errors.ReplicaMismatchError as error:
        found.append((type(error).__name__, error.tensor, error.rank))
    return found


def test_states_that_differ_between_ranks(tmp_path):
    expected = [
        ("RankMismatchError", "b", 1),
        ("RankMismatchError", "a", 2),
        ("ReplicaMismatchError", "v.x.1", 1),
        ("ReplicaMismatchError", "a", (2,)),
        ("ReplicaMismatchError", "big", (1, 2)),
    ]
    assert run_ranks(3, states_that_differ, str(tmp_path)) == [expected] * 3
    assert sorted(os.listdir(tmp_path)) == ["unchecked"]
