"""Pipeline stages: ranks that hold different tensors; and the markers Union and FromRank0."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import shardckpt
from shardckpt import FromRank0, PerRank, Union, errors
from shardckpt.integrations.dcp import (
    ReshardLoadPlanner,
    ShardReader,
    ShardSavePlanner,
    ShardWriter,
)
from tests.ranks import on_world_sizes, run_ranks

pytestmark = pytest.mark.ranks
LAYERS = 4


class Stage(nn.Module):
    """Some layers of a model, under the names that they have in all of it."""

    def __init__(self, layers, fill: float = 0.0):
        super().__init__()
        self.layers = nn.ModuleDict({str(n): nn.Linear(3, 3) for n in layers})
        if 0 in layers:
            self.embedding = nn.Embedding(5, 3)
        if fill:
            for name, parameter in self.named_parameters():
                parameter.data.fill_(fill + sum(map(ord, name)))


def layers_of(rank: int, world_size: int, stages: int):
    stage = rank * stages // world_size
    return range(LAYERS)[stage * LAYERS // stages : (stage + 1) * LAYERS // stages]


def a_job(layers, fill: float = 0.0, step: int = 0):
    model = Stage(layers, fill)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5 if fill else 0.1, foreach=False)
    if fill:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return {"model": model, "optimizer": optimizer, "step": step}


def is_restored(job, expected) -> None:
    for (name, mine), theirs in zip(
        job["model"].named_parameters(), expected["model"].parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name
        moments = (o["optimizer"].state[p] for o, p in ((job, mine), (expected, theirs)))
        (a, b) = (state["exp_avg"] for state in moments)
        assert torch.equal(a, b), name
    assert job["optimizer"].param_groups[0]["lr"] == 0.5
    assert job["step"] == expected["step"]


def stages(world_size: int, folder: str) -> None:
    rank = dist.get_rank()
    mine = layers_of(rank, world_size, min(world_size, 2))
    if world_size == 4:
        for step in (7, 8, 9):  # the second save knows the plan, the third has a base
            base = f"{folder}/8" if step == 9 else None
            shardckpt.save(a_job(mine, 1.0, step), f"{folder}/{step}", base=base)
        shardckpt.async_save(a_job(mine, 1.0, 9), f"{folder}/async").result()
        job = a_job(mine, 1.0, 9)
        model, optimizer = job["model"], job["optimizer"]
        dcp.save(
            {**job, "optimizer": get_optimizer_state_dict(model, optimizer)},
            storage_writer=ShardWriter(f"{folder}/dcp"),
            planner=ShardSavePlanner(),
        )
    for name in ("8", "9", "async", "dcp"):
        job, step = a_job(mine), 8 if name == "8" else 9
        shardckpt.load(job, f"{folder}/{name}")
        is_restored(job, a_job(mine, 1.0, step))
    if world_size > 1:
        state = a_job(mine)["model"].state_dict()
        reader = ShardReader(f"{folder}/9")
        dcp.load({"model": state}, storage_reader=reader, planner=ReshardLoadPlanner())
        expected = a_job(mine, 1.0)["model"].state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_stages_of_a_pipeline_onto_any_number_of_ranks(tmp_path):
    run_ranks(4, on_world_sizes, (4, 2, 1), stages, str(tmp_path))
    for name in ("7", "async", "dcp"):
        state = shardckpt.load_state(tmp_path / name)
        assert len(state["model"]) == 2 * LAYERS + 1
        assert state["optimizer"]["state"].keys() == state["model"].keys()
        (group,) = state["optimizer"]["param_groups"]
        assert set(group["params"]) == state["model"].keys()
        shardckpt.open_checkpoint(tmp_path / name).verify()


class FlatOptimizers:
    """Optimizers of several model parts in one flat dict by name, as training frameworks do it."""

    def __init__(self, parts, optimizers):
        self.parts, self.optimizers = parts, optimizers

    def state_dict(self):
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        return {
            key: value
            for part, own in zip(self.parts, self.optimizers, strict=True)
            for key, value in get_optimizer_state_dict(part, own, options=options).items()
        }

    def load_state_dict(self, state):
        self.loaded = state


def flat_optimizers(folder: str) -> None:
    rank = dist.get_rank()
    jobs = [a_job([rank], 1.0), a_job([rank + 2], 1.0)]  # two virtual stages on each rank
    parts = [job["model"] for job in jobs]
    state = {
        "model": {k: v for part in parts for k, v in part.state_dict().items()},
        "optimizer": FlatOptimizers(parts, [job["optimizer"] for job in jobs]),
    }
    shardckpt.save(state, f"{folder}/c")
    expected = state["optimizer"].state_dict()
    shardckpt.load(state, f"{folder}/c")
    assert state["optimizer"].loaded.keys() >= expected.keys()


def test_optimizers_in_a_flat_dict(tmp_path):
    run_ranks(2, flat_optimizers, str(tmp_path))
    optimizer = shardckpt.load_state(tmp_path / "c")["optimizer"]
    for layer in range(LAYERS):
        assert optimizer[f"param_groups.layers.{layer}.weight.lr"] == 0.5
        assert f"state.layers.{layer}.weight.exp_avg" in optimizer


def mistakes(folder: str):
    rank = dist.get_rank()
    own = {f"layers.{rank}": torch.ones(2)}
    other_lr = {"state": {}, "param_groups": [{"params": ["w"], "lr": float(rank)}]}
    states = {
        "a key too many": {"a": torch.ones(1), **({"x": torch.ones(1)} if rank else {})},
        "a rank without tensors": own if rank else {},
        "a value": {"model": own, **({"late": 1} if rank else {})},
        "another value": {"model": own, "step": rank},
        "a large tensor": {"model": own, "w": torch.full((1 << 16,), float(rank))},
        "a shape": {"model": own, "w": torch.ones(2 + rank)},
        "options": {"model": own, "optimizer": other_lr},
        "values per rank": {f"layers.{rank}": {"w": torch.ones(1), "r": PerRank(rank)}},
        "a length": {"model": own, "list": [1] * (rank + 1)},
        "a kind": {"model": own, "v": torch.ones(1) if rank else 3},
        "rank 0 has none": {"u": Union({"f": FromRank0(1)} if rank else {})},
        "a union's value": {"u": Union({f"k{rank}": 1, "both": [rank]})},
        "no union": {"u": Union([1])},
    }
    found = {}
    for name, state in states.items():
        try:
            shardckpt.save(state, f"{folder}/{name}")
        except errors.StateError as error:
            found[name] = type(error).__name__, error.tensor
    return found


def test_what_ranks_do_not_agree_on(tmp_path):
    expected = {
        "a key too many": ("RankMismatchError", "x"),
        "a rank without tensors": ("RankMismatchError", "layers.1"),
        "a value": ("RankMismatchError", "late"),
        "another value": ("ReplicaMismatchError", "step"),
        "a large tensor": ("ReplicaMismatchError", "w"),
        "a shape": ("RankMismatchError", "w"),
        "options": ("ReplicaMismatchError", "optimizer.param_groups.0.lr"),
        "values per rank": ("RankMismatchError", "layers.0"),
        "a length": ("ReplicaMismatchError", "list"),
        "a kind": ("ReplicaMismatchError", "v"),
        "rank 0 has none": ("RankMismatchError", "u.f"),
        "a union's value": ("ReplicaMismatchError", "u.both.0"),
        "no union": ("StateError", "u"),
    }
    found = run_ranks(2, mistakes, str(tmp_path))
    assert found[0] == expected
    assert found[1] == expected
    assert list(tmp_path.iterdir()) == []


def left_by_all(folder: str):
    """No rank has layer 3; and rank 1 has a layer less than rank 0."""
    found = []
    for layers in (range(3), range(3 + (dist.get_rank() == 0))):
        try:
            shardckpt.load({"model": Stage(layers)}, f"{folder}/c")
        except errors.LoadMismatchError as error:
            found.append((tuple(error.facts["unexpected"]), error.rank))
    return found


def test_what_no_rank_takes_is_an_error(tmp_path):
    shardckpt.save({"model": Stage(range(4))}, tmp_path / "c")
    left = ("model.layers.3.weight", "model.layers.3.bias")
    expected = [(left, None), (tuple(sorted(left)), 1)]
    assert run_ranks(2, left_by_all, str(tmp_path)) == [expected] * 2


def a_marked_state(rank: int):
    return {
        "w": torch.ones(2),
        "loader": Union({f"dp_{rank // 2}": {"at": rank // 2, "t": torch.ones(3)}, "n": 2}),
        "callbacks": FromRank0({"best": [rank], "t": torch.full((2,), float(rank))}),
        "ignored": FromRank0(object() if rank else {"x": 1}),
        "random": PerRank(rank),
    }


def marked(world_size: int, folder: str) -> None:
    rank = dist.get_rank()
    if world_size == 4:
        shardckpt.save(a_marked_state(rank), f"{folder}/save")
        shardckpt.async_save(a_marked_state(rank), f"{folder}/async").result()
        dcp.save(
            a_marked_state(rank),
            storage_writer=ShardWriter(f"{folder}/dcp"),
            planner=ShardSavePlanner(),
        )
    for name in ("save", "async", "dcp"):
        state = {
            "loader": Union({f"dp_{rank % 2}": {"at": -1, "t": torch.zeros(3)}}),
            "callbacks": FromRank0({"best": [], "t": torch.zeros(2)}),
            "ignored": FromRank0(None),
        }
        shardckpt.load(state, f"{folder}/{name}")
        own = state["loader"].value[f"dp_{rank % 2}"]
        assert own["at"] == rank % 2
        assert own["t"].tolist() == [1, 1, 1]
        assert state["callbacks"].value["best"] == [0]
        assert state["callbacks"].value["t"].tolist() == [0, 0]
        assert state["ignored"].value == {"x": 1}


def test_union_and_from_rank_0(tmp_path):
    run_ranks(4, on_world_sizes, (4, 1), marked, str(tmp_path))
    for name in ("save", "async", "dcp"):
        state = shardckpt.load_state(tmp_path / name)
        assert list(state["loader"]) == ["dp_0", "n", "dp_1"]
        assert state["callbacks"]["best"] == [0]
        assert state["callbacks"]["t"].tolist() == [0, 0]
        assert state["random"] == [0, 1, 2, 3]


def save_in_other_orders(folder: str) -> list[str]:
    """Ranks whose common tensor follows one that other ranks lack."""
    rank, wrong = dist.get_rank(), []
    for size in (10, 300_000):  # small and large tensors have places of their own
        whole = {f"stage{n}": torch.full((size,), float(n)) for n in range(3)}
        whole["tied"] = torch.full((size,), 9.0)
        state = {key: whole[key] for key in (f"stage{rank}", "tied")}
        shardckpt.save({"m": shardckpt.Union(state)}, f"{folder}/{size}")
        found = shardckpt.load_state(f"{folder}/{size}")["m"]
        wrong += [key for key in whole if not torch.equal(found[key], whole[key])]
    return wrong


def test_stages_with_tensors_in_other_orders(tmp_path):
    assert run_ranks(3, save_in_other_orders, str(tmp_path)) == [[], [], []]
