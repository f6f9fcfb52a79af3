"""Ranks that hold the same tensors stage only the part that each of them writes."""

from __future__ import annotations

import contextlib
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardckpt
from shardckpt import errors
from shardckpt.coordination import resolve
from shardckpt.saving import async_save, staged_part
from shardckpt.saving.staged_part import Divider, StagedPart
from tests.ranks import run_ranks

RANKS = 4
NO_LIMIT_S = 100.0
"""The ranks of a busy machine may take longer than a second."""


def staged_sizes(monkeypatched=async_save) -> list[int]:
    """The bytes of each staged plan from now on."""
    sizes: list[int] = []
    stage = monkeypatched.stage

    def noted(plan, *arguments):
        sizes.append(sum(data.nbytes for data in plan.data))
        return stage(plan, *arguments)

    monkeypatched.stage = noted
    return sizes


def replicated(seed: int = 1) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, object] = {
        f"layer{index}": torch.randn(4096, 64, generator=generator) for index in range(8)
    }
    return {**state, "buffer": torch.arange(7), "step": seed}


def size_bytes(state) -> int:
    return sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))


def same(state, path) -> bool:
    found = {
        key: torch.zeros_like(value) if isinstance(value, torch.Tensor) else None
        for key, value in state.items()
    }
    shardckpt.load(found, path)
    return all(
        torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        for key, value in state.items()
    )


def save_replicas(folder: str) -> list[float]:
    staged_part._LIMIT_S = NO_LIMIT_S
    sizes, fractions = staged_sizes(), []
    for number in (1, 2):  # the division of the second save is known
        state = replicated(number)
        kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
        handle = shardckpt.async_save(state, f"{folder}/{number}", check_replicas=True)
        handle.wait_staged()
        for value in state.values():  # another part than the staged one changes too
            if isinstance(value, torch.Tensor):
                value.zero_()
        handle.result(60)
        assert same(kept, f"{folder}/{number}")
        fractions.append(sizes.pop() / size_bytes(kept))
    return fractions


def test_replicated_tensors_are_staged_in_equal_parts(tmp_path):
    for fractions in run_ranks(RANKS, save_replicas, str(tmp_path)):
        assert all(0.2 < fraction < 0.3 for fraction in fractions), fractions


def save_hybrid(folder: str) -> list[float]:
    """Tensors that two groups of two ranks hold, one of one's own, and values that differ."""
    staged_part._LIMIT_S = NO_LIMIT_S
    sizes = staged_sizes()
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.arange(1 << 21).reshape(2048, 1024).float()
    tensor = distribute_tensor(whole, mesh, [Replicate(), Shard(0)])
    state = {"w": tensor, "own": shardckpt.PerRank(torch.full((3,), float(dist.get_rank())))}
    kept = tensor.to_local().clone()
    handle = shardckpt.async_save(state, f"{folder}/c")
    handle.wait_staged()
    tensor.to_local().zero_()
    handle.result(60)
    found = {"w": tensor, "own": shardckpt.PerRank(torch.zeros(3))}
    shardckpt.load(found, f"{folder}/c")
    assert torch.equal(tensor.to_local(), kept)
    assert torch.equal(found["own"].value, torch.full((3,), float(dist.get_rank())))
    return [sizes[0] / kept.nbytes]


def test_replicas_of_shards_are_staged_in_equal_parts(tmp_path):
    for (fraction,) in run_ranks(RANKS, save_hybrid, str(tmp_path)):
        assert 0.4 < fraction < 0.6


def save_with_a_late_rank(folder: str, late: int) -> list[float]:
    sizes, fractions = staged_sizes(), []
    for number in (1, 2, 3):
        state = replicated(number)
        staged_part._LIMIT_S = 1.0 if number == 2 else NO_LIMIT_S
        if number == 2 and dist.get_rank() == late:
            time.sleep(5)
        shardckpt.async_save(state, f"{folder}/{number}").result(60)
        assert same(state, f"{folder}/{number}")
        fractions.append(sizes.pop() / size_bytes(state))
    return fractions


@pytest.mark.parametrize("late", [0, 1])
def test_if_a_rank_is_late_the_others_stage_all_their_data(tmp_path, late):
    for rank, fractions in enumerate(run_ranks(2, save_with_a_late_rank, str(tmp_path), late)):
        assert fractions[0] < 0.6
        assert fractions[1] == 1 or rank == late
        assert fractions[2] < 0.6


def save_beside_a_rank_with_little(folder: str) -> list[bool]:
    """Whether each save tried to divide the work."""
    staged_part._LIMIT_S = 0.2
    tried: list[bool] = []
    enter = resolve.Operation.__enter__

    def noted(operation):
        if threading.current_thread().name.startswith("shardckpt-stage"):
            tried[-1] = True
        return enter(operation)

    resolve.Operation.__enter__ = noted
    for number in range(4):
        tried.append(False)
        state = replicated() if dist.get_rank() else {"little": torch.ones(3)}
        shardckpt.async_save({"all": shardckpt.Union(state)}, f"{folder}/{number}").result(60)
        assert torch.equal(
            shardckpt.load_state(f"{folder}/{number}")["all"]["buffer"], replicated()["buffer"]
        )
    return tried


def test_fewer_and_fewer_saves_wait_for_a_rank_that_never_divides(tmp_path):
    first, second = run_ranks(2, save_beside_a_rank_with_little, str(tmp_path))
    assert first == [False] * 4
    assert [number for number, tried in enumerate(second) if tried] == [0, 1, 3]


def test_ranks_that_count_other_failures_divide_again(monkeypatch):
    """A division takes place if both ranks try it at the same save."""
    plan = SimpleNamespace(data=[torch.ones(1 << 18)], shared=[True])
    ranks = SimpleNamespace(rank=0, world_size=2, __enter__=None)
    tried: list[Divider] = []

    def fail(coordinator, plan, watch):
        tried.append(divider)
        raise errors.RankFailedError("no call")

    monkeypatch.setattr(staged_part, "divide", fail)
    ranks = contextlib.nullcontext(ranks)
    ranks.rank, ranks.world_size = 0, 2
    both = one, other = Divider(), Divider()
    for save in range(200):
        tried.clear()
        for divider in both if save > 2 else [one]:  # the other one fails less often
            divider.divide(ranks, plan)
        if save <= 2:
            other.divide(None, plan)
        if len(tried) == 2:
            break
    assert len(tried) == 2


def save_unequal(folder: str) -> str:
    staged_part._LIMIT_S = NO_LIMIT_S
    state = replicated()
    if dist.get_rank() == 1:
        state["layer3"][5] += 1
    try:
        shardckpt.async_save(state, f"{folder}/c", check_replicas=True).result(60)
    except errors.ReplicaMismatchError as error:
        return error.tensor
    return "saved"


def test_replicas_that_differ_are_found_in_parts_that_are_not_staged(tmp_path):
    assert run_ranks(2, save_unequal, str(tmp_path)) == ["layer3"] * 2


def save_after_one_rank_changed(folder: str) -> bool:
    """One rank alone has another tensor from the second save on, and another value."""
    for number in (1, 2, 3):
        state = replicated(1)
        if number > 1 and dist.get_rank() == 1:
            state["only"] = torch.ones(300_000)
        shardckpt.async_save({"m": shardckpt.Union(state)}, f"{folder}/{number}").result(60)
        found = shardckpt.load_state(f"{folder}/{number}")["m"]
        assert all(
            torch.equal(found[key], value) if isinstance(value, torch.Tensor) else True
            for key, value in state.items()
        )
        assert ("only" in found) == (number > 1)
    return True


def test_a_rank_whose_state_changes_alone_stages_all_its_data(tmp_path):
    assert run_ranks(2, save_after_one_rank_changed, str(tmp_path)) == [True] * 2


def save_with_another_division(folder: str) -> str:
    staged_part._LIMIT_S = NO_LIMIT_S
    divide = staged_part.divide

    def wrong(*arguments):
        division = divide(*arguments)
        writes = division.writes
        boxes = writes.boxes.copy()
        boxes[0, 1, 0] -= 1  # one row of a tensor less
        planted = type(writes)(
            row=writes.row, boxes=boxes, files=writes.files, compare=writes.compare
        )
        return division._replace(writes=planted)

    staged_part.divide = wrong
    try:
        shardckpt.async_save(replicated(), f"{folder}/c").result(60)
    except errors.StateError as error:
        return error.message
    return "saved"


def test_a_part_of_another_division_is_never_written(tmp_path):
    messages = run_ranks(2, save_with_another_division, str(tmp_path))
    assert all("divided the save anew" in message for message in messages)
    assert not list(tmp_path.iterdir())


def writes(rows=(0, 1), first=4, files=((0, 2),)):
    boxes = np.array([[[0], [first]], [[0], [2]]])[: len(rows)]
    return SimpleNamespace(row=np.array(rows), boxes=boxes, files=files)


@pytest.mark.parametrize(
    "other", [writes(rows=(0, 2)), writes(first=3), writes(files=((1, 2),)), writes(rows=(0,))]
)
def test_a_part_knows_its_chunks(other):
    part = StagedPart(writes=writes(), data=(), replicas=b"")
    part.check(writes())
    with pytest.raises(errors.StateError, match="save again"):
        part.check(other)


def save_little(folder: str) -> bool:
    def never(*arguments):
        raise AssertionError("the ranks divide a state that is staged in no time")

    staged_part.divide = never
    shardckpt.async_save({"w": torch.ones(100)}, f"{folder}/c").result(60)
    return same({"w": torch.ones(100)}, f"{folder}/c")


def test_small_states_are_staged_without_a_division(tmp_path):
    assert run_ranks(2, save_little, str(tmp_path)) == [True] * 2
