"""A rank that raises, exits, is killed, stops, is slow or is stuck, in each phase of save, load,
async save, and a handler's saves: the others raise an error that names it and the phase, nothing
appears, and the next save works. A rank that is only slow is waited for."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.convert.single_files import write_one
from shardckpt.loading import agreement as load_agreement
from shardckpt.loading import pipeline as load_pipeline
from shardckpt.nn_handler import saving
from shardckpt.saving import agreement, commit
from tests.ranks import start_ranks

DEADLINE_S = 5.0
MOST_S = 10.0
SLOW_S = 7.0  # longer than a rank may be silent


class Odd(Exception):
    """An exception that no pickle takes."""

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("not me")


def _raise() -> None:
    raise Odd("planted")


FAULTS: dict[str, Callable[[], None]] = {
    "raise": _raise,
    "exit": lambda: os._exit(3),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "slow": lambda: time.sleep(SLOW_S),
    "stuck": lambda: time.sleep(600),
}
PHASES = {
    "save": ("begin", "plan", "divide", "write"),
    "async": ("begin", "plan", "divide", "write"),
    "load": ("begin", "open", "read"),
    "file": ("state", "gather", "write"),
    "handler": ("state",),
}


@dataclass(frozen=True, slots=True)
class Case:
    world_size: int
    operation: str
    phase: str
    rank: int
    fault: str


CASES = [
    Case(world_size, operation, phase, rank, fault)
    for world_size in (2, 4)
    for operation, phases in PHASES.items()
    for phase in phases
    for rank in range(world_size)
    for fault in FAULTS
    if not (phase == "begin" and fault in ("slow", "stuck"))  # a late call: see ARRIVAL_DEADLINE_S
    if not (phase == "gather" and fault == "stuck")  # nobody tells who
]


def state_of() -> dict[str, object]:
    return {"w": torch.arange(1000.0), "step": 2}


def fail(case: Case) -> None:
    FAULTS.get(case.fault, lambda: None)()


def plant(case: Case) -> None:
    """Let this rank fail where it does its part of a phase."""
    if case.phase == "gather":
        gather = saving._GatheredState.gather

        def failing(*arguments):  # type: ignore[no-untyped-def]
            fail(case)
            gather(*arguments)

        saving._GatheredState.gather = failing
        return
    modules: tuple[Any, ...] = (agreement, commit)
    if case.operation in ("load", "file", "handler"):
        modules = (load_agreement, load_pipeline) if case.operation == "load" else (saving,)
    exchange = modules[0].exchange

    def faulty(coordinator, name, local, decide):  # type: ignore[no-untyped-def]
        def part() -> bytes:
            if name == case.phase:
                fail(case)
            found: bytes = local()
            return found

        return exchange(coordinator, name, part, decide)

    for module in modules:
        module.exchange = faulty


def operate(folder: str, case: Case) -> tuple[str, object, object, float]:
    """The outcome of a rank: ("saved" | "own" | "other", rank named, phase named, seconds)."""
    os.environ["SHARDCKPT_DEADLINE_S"] = str(DEADLINE_S)
    os.environ["SHARDCKPT_ARRIVAL_DEADLINE_S"] = str(DEADLINE_S if case.phase == "begin" else 60.0)
    os.environ["SHARDCKPT_STALL_DEADLINE_S"] = str(DEADLINE_S if case.fault == "stuck" else 60.0)
    if case.operation in ("file", "handler"):
        handler = NNHandler(nn.Linear, parallel="fsdp", in_features=8, out_features=8)
    dist.barrier()
    begun = time.monotonic()
    try:
        if dist.get_rank() == case.rank:
            plant(case)
            if case.phase == "begin":
                fail(case)
        if case.operation == "save":
            shardckpt.save(state_of(), f"{folder}/c")
        elif case.operation in ("file", "handler"):
            handler.save(f"{folder}/c{'.pth' if case.operation == 'file' else ''}")
        elif case.operation == "async":
            shardckpt.async_save(state_of(), f"{folder}/c").result(90)  # after any deadline
        else:
            shardckpt.load({"w": torch.zeros(1000), "step": 0}, f"{folder}/before")
        return "done", None, None, time.monotonic() - begun
    except Odd:
        return "own", None, None, time.monotonic() - begun
    except errors.RankFailedError as error:
        named = error.rank if isinstance(error.rank, tuple) else (error.rank,)
        return "other", named, error.facts.get("phase"), time.monotonic() - begun
    except Exception as error:
        return f"{type(error).__name__}: {error}", None, None, time.monotonic() - begun


def attempt(case: Case, folder: str, *, most_s: float = MOST_S) -> float:
    """Run a case and check what the survivors say; the seconds that the slowest of them took."""
    shardckpt.save(state_of(), f"{folder}/before")
    ranks = start_ranks(case.world_size, operate, folder, case)
    alive = case.fault in ("raise", "slow")
    results = ranks.wait(100, ending=case.world_size if alive else case.world_size - 1)
    told = "\n".join([str(case), *(f"rank {r}: {value}" for r, (_, value) in enumerate(results))])
    slowest = 0.0
    for rank, (ok, value) in enumerate(results):
        if rank == case.rank:
            if case.fault == "raise":
                assert ok, told
                assert value[0] == "own", told
            continue
        assert ok, told
        kind, who, when, seconds = value
        slowest = max(slowest, seconds)
        if case.fault == "slow":
            assert kind == "done", told
            continue
        assert kind == "other", told
        assert case.rank in who, told
        assert when == case.phase, told
        assert seconds < most_s, told
    path = f"{folder}/c"
    wanted = path + ".pth" if case.operation == "file" else path
    assert os.path.exists(wanted) == (case.fault == "slow" and case.operation != "load"), case
    if case.operation == "file":
        write_one(state_of(), wanted, overwrite=True)
    shardckpt.save(state_of(), path, overwrite=True)
    assert shardckpt.load_state(path)["step"] == 2
    left = [name for name in os.listdir(folder) if name.startswith(".")]
    assert not left, f"{case}: leftovers {left}"
    return slowest


def trial(seed: int) -> int:
    """One case: successive seeds try every one of them."""
    order = random.Random(0).sample(CASES, len(CASES))
    with tempfile.TemporaryDirectory() as folder:
        attempt(order[seed % len(order)], folder)
    return 1
