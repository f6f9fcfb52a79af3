"""A StatefulDataLoader, resumed on other numbers of ranks."""

from __future__ import annotations

import itertools
import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset

import shardckpt
from shardckpt.errors import StateError
from tests.ranks import PRELOAD, on_world_sizes, run_ranks

torchdata = pytest.importorskip("torchdata")

from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: E402
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler  # noqa: E402

from shardckpt.integrations.torchdata import loader_position  # noqa: E402

PRELOAD += ["shardckpt.integrations.torchdata", "torchdata.stateful_dataloader"]
pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]
SAMPLES = 48


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(SAMPLES))


def loader(kind: str, step: int = 12):
    data = torch.arange(SAMPLES)
    size = step // dist.get_world_size()
    samplers = {
        "distributed": lambda: DistributedSampler(data, seed=1),
        "stateful": lambda: StatefulDistributedSampler(data, seed=1),
        "workers": lambda: DistributedSampler(data, seed=1),
    }
    if kind == "random":
        return StatefulDataLoader(data, batch_size=size, shuffle=True)
    if kind == "iterable":
        return StatefulDataLoader(Stream(), batch_size=size)
    workers = {"num_workers": 1} if kind == "workers" else {}
    if workers:  # the ranks of a test are daemons, which may not have children
        multiprocessing.current_process()._config["daemon"] = False
    return StatefulDataLoader(data, batch_size=size, sampler=samplers[kind](), **workers)


def steps(batches) -> list[set[int]]:
    """The samples of each step over all ranks."""
    found = []
    for batch in batches:
        parts = [torch.empty_like(batch) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, batch)
        found.append(set(torch.cat(parts).tolist()))
    return found


def save_and_resume(kind, path, before, after, step):
    made = {}

    def part(world_size):
        if world_size == before and "all" not in made:
            made["all"] = steps(loader(kind))
            own = loader(kind)
            batches = iter(own)
            taken = [next(batches), next(batches)]
            if kind != "random":
                assert steps(taken) == made["all"][:2]
            shardckpt.save({"loader": loader_position(own)}, path)
            made["next"] = next(batches)
        elif world_size == after:
            own = loader(kind, step)
            shardckpt.load({"loader": loader_position(own)}, path)
            made["rest"] = steps(own)

    if before == after:
        part(before)
        own = loader(kind, step)
        shardckpt.load({"loader": loader_position(own)}, path)
        assert torch.equal(next(iter(own)), made["next"])
        return
    on_world_sizes([before, after], part)
    if dist.is_initialized():
        dist.destroy_process_group()
    if "rest" in made and "all" in made:
        rest = [n for one in made["rest"] for n in one]
        expected = [n for one in made["all"][2:] for n in one]
        assert sorted(rest) == sorted(expected)
        if step == 12:
            assert made["rest"] == made["all"][2:]


@pytest.mark.parametrize("kind", ["distributed", "stateful", "random", "workers", "iterable"])
def test_each_rank_continues_at_its_own_position(tmp_path, kind):
    run_ranks(2, save_and_resume, kind, str(tmp_path / "c"), 2, 2, 12)


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("kind", ["distributed", "stateful"])
@pytest.mark.parametrize("step", [12, 6])
def test_other_ranks_continue_after_the_samples_taken(tmp_path, kind, after, step):
    run_ranks(max(after, 2), save_and_resume, kind, str(tmp_path / "c"), 2, after, step)


def take(path, count):
    """Continue at the saved position, if there is one, take batches, and save."""
    own = loader("stateful")
    state = {"loader": loader_position(own)}
    if os.path.exists(path):
        shardckpt.load(state, path)
    found = steps(itertools.islice(own, count))
    shardckpt.save(state, path, overwrite=True)
    return found


@pytest.mark.parametrize("after", [1, 2])
def test_new_processes_continue(tmp_path, after):
    complete = run_ranks(2, take, str(tmp_path / "complete"), None)[0]
    path = str(tmp_path / "c")
    assert run_ranks(2, take, path, 2)[0] == complete[:2]
    assert run_ranks(after, take, path, None)[0] == complete[2:]


@pytest.mark.parametrize(
    ("kind", "step", "reason"),
    [
        ("random", 12, "a sampler with a state of its own"),
        ("workers", 12, "worker processes"),
        ("iterable", 12, "an iterable dataset"),
        ("distributed", 9, "24 samples taken, and 9 for each new step"),
    ],
)
def test_what_does_not_fit_other_ranks_is_refused(tmp_path, kind, step, reason):
    run_ranks(2, refused, kind, str(tmp_path / "c"), step, reason)


def refused(kind, path, step, reason):
    def part(world_size):
        if world_size == 2:
            own = loader(kind)
            batches = iter(own)
            for _ in range(2):
                next(batches)
            shardckpt.save({"loader": loader_position(own)}, path)
        else:
            with pytest.raises(StateError, match=reason):
                shardckpt.load({"loader": loader_position(loader(kind, step))}, path)

    on_world_sizes([2, 1], part)


def positions(world_size, steps_taken):
    """Loaders of all ranks in one process, after a number of steps."""
    data, batches = torch.arange(26), 8 // world_size
    loaders = [
        StatefulDataLoader(
            data,
            batch_size=batches,
            sampler=DistributedSampler(data, num_replicas=world_size, rank=rank, shuffle=False),
        )
        for rank in range(world_size)
    ]
    for own in loaders:
        list(itertools.islice(own, steps_taken))
    return loaders


@pytest.mark.parametrize("taken", [3, 4])
def test_other_ranks_continue_after_a_last_batch_that_is_smaller(taken):
    saved = [loader_position(own).value.state_dict() for own in positions(2, taken)]
    (own,) = positions(1, 0)
    loader_position(own).value.take(saved)
    rest = [batch.tolist() for batch in own]
    assert rest == ([[24, 25]] if taken == 3 else [])


class Contiguous(DistributedSampler):
    """Divides the data in another way."""

    def __iter__(self):
        each = len(self.dataset) // self.num_replicas
        return iter(range(self.rank * each, (self.rank + 1) * each))


class Backwards(BatchSampler):
    def __iter__(self):
        return iter([*super().__iter__()][::-1])


OWN = {
    "a sampler": lambda data, sampler: StatefulDataLoader(
        data, batch_size=4, sampler=Contiguous(data, sampler.num_replicas, sampler.rank)
    ),
    "a batch sampler": lambda data, sampler: StatefulDataLoader(
        data, batch_sampler=Backwards(sampler, 4, drop_last=False)
    ),
    "batches of any size": lambda data, sampler: StatefulDataLoader(
        data, batch_sampler=[[0, 1], [2]]
    ),
}


@pytest.mark.parametrize("kind", OWN)
def test_samplers_that_divide_the_data_in_another_way_are_refused_on_other_ranks(kind):
    """The samples that were taken are not the first ones, so that some would be lost."""
    data = torch.arange(32)
    saved = []
    for rank in range(2):
        own = OWN[kind](data, DistributedSampler(data, 2, rank, shuffle=False))
        next(iter(own))
        saved.append(loader_position(own).value.state_dict())
    own = OWN[kind](data, DistributedSampler(data, 1, 0, shuffle=False))
    with pytest.raises(StateError, match="other than those of torch and torchdata"):
        loader_position(own).value.take(saved)


def test_other_ranks_continue_a_loader_of_single_samples():
    data = torch.arange(8)

    def single(ranks, rank):
        sampler = DistributedSampler(data, ranks, rank, shuffle=False)
        return StatefulDataLoader(data, batch_size=None, sampler=sampler)

    saved = []
    for rank in range(2):
        own = single(2, rank)
        list(itertools.islice(own, 3))
        saved.append(loader_position(own).value.state_dict())
    own = single(1, 0)
    loader_position(own).value.take(saved)
    assert [int(sample) for sample in own] == [6, 7]
