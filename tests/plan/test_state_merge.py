"""The states of several ranks are merged. The test starts no ranks."""

from __future__ import annotations

import collections
import types

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardckpt import FromRank0, Union, errors
from shardckpt.plan.local_plan import LocalPlan, filled, local_plan
from shardckpt.plan.save_plan import global_plan
from shardckpt.plan.state_merge import merge_states
from shardckpt.state.flatten import flatten


def merged(*states):
    plans = [
        local_plan(flatten(state, rank=rank), world_size=len(states))
        for rank, state in enumerate(states)
    ]
    offers = [plan.offer(tensors=True) for plan in plans]
    return msgspec.json.decode(filled(merge_states(offers).tree, plans[0].rank0_trees))


def plan_of_rows(rank, *, tied):
    """The plan of a rank of two, of which rank 0 alone holds elements: views of one buffer."""
    dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    try:
        mesh, buffer, rows = init_device_mesh("cpu", (2,)), torch.zeros(2, 4), 1 - rank
        state = {
            name: DTensor.from_local(
                buffer[begin : begin + rows],
                mesh,
                [Shard(0)],
                run_check=False,
                shape=torch.Size((1, 4)),
                stride=(4, 1),
            )
            for name, begin in (("a", 0), ("b", 0 if tied else rows))
        }
        return local_plan(flatten(state, rank=rank), world_size=2)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_without_elements_does_not_tie_the_tensors_of_others(tied):
    plans = [plan_of_rows(rank, tied=tied) for rank in (0, 1)]
    sent = [LocalPlan.unpack(plan.pack(complete=True)) for plan in plans]  # as the planner of DCP
    assert [plan.offer(tensors=True) for plan in sent] == [p.offer(tensors=True) for p in plans]
    for offers in ([plan.offer(tensors=True) for plan in order] for order in (plans, plans[::-1])):
        merged = merge_states(offers)
        tree = {"a": {"$tensor": "a"}, "b": {"$tensor": "a" if tied else "b"}}
        assert msgspec.json.decode(merged.tree) == tree
        assert merged.partial == frozenset()
    common = None if tied else [plan.common for plan in plans]
    names = [spec.name for spec in global_plan(plans, common).specs]
    assert names == (["a"] if tied else ["a", "b"])


def t():
    return torch.ones(2)


def group(*params, lr=0.1):
    return {"params": list(params), "lr": lr}


def an_optimizer(*groups):
    return {
        "state": {f: {"m": t()} for g in groups for f in g["params"]},
        "param_groups": list(groups),
    }


def groups_of(*states):
    tree = merged(
        *({"o": {**state, "param_groups": list(state["param_groups"])}} for state in states)
    )
    return tree["o"]["param_groups"]


def test_groups_with_the_same_options_become_one():
    assert groups_of(an_optimizer(group("a", "b")), an_optimizer(group("c"))) == [
        group("a", "b", "c")
    ]


def test_groups_keep_their_places():
    decay, none = group("a"), group("b", lr=0.0)
    both = an_optimizer(decay, none)
    assert groups_of(both, an_optimizer(group("c"), group("d", lr=0.0))) == [
        group("a", "c"),
        group("b", "d", lr=0.0),
    ]
    assert groups_of(both, an_optimizer(group("d", lr=0.0))) == [decay, group("b", "d", lr=0.0)]
    assert groups_of(both, an_optimizer(group("c", lr=9.0))) == [decay, none, group("c", lr=9.0)]


def test_a_parameter_of_two_ranks_has_one_set_of_options():
    mine, theirs = (an_optimizer(group("a", own, lr=lr)) for own, lr in (("b", 0.1), ("c", 0.2)))
    with pytest.raises(errors.ReplicaMismatchError) as caught:
        groups_of(mine, theirs)
    assert caught.value.tensor == "o.param_groups.0.lr"


def test_another_order_of_keys_is_no_difference():
    assert list(merged({"a": t(), "b": 1}, {"b": 1, "a": t()})) == ["a", "b"]


def test_containers_are_merged_item_by_item():
    def state(rank):
        own = {f"w{rank}": t()}
        return {
            "tuple": (1, own),
            "deque": collections.deque([own], 3),
            "object": types.SimpleNamespace(a=1, b=own),
            "keys": {1: own, "x": 2},
            "stages": [{f"v{rank}": t()}] * (rank == 0) + [own] * (rank == 1),
        }

    tree = merged(state(0), state(1))
    both = {"w0", "w1"}
    assert tree["tuple"]["$tuple"][1].keys() == both
    assert tree["deque"]["$deque"][1][0].keys() == both
    assert tree["object"]["$record"][1]["b"].keys() == both
    assert dict(map(tuple, tree["keys"]["$dict"]))[1].keys() == both
    assert tree["stages"][0].keys() == {"v0", "w1"}


def test_one_and_true_and_1_0_differ():
    for mine, theirs in ((1, True), (1, 1.0), (0.0, -0.0), ((1,), [1])):
        with pytest.raises(errors.ReplicaMismatchError):
            merged({"a": mine}, {"a": theirs})


def test_a_union_of_unions():
    tree = merged({"u": Union({"a": {"x": 1}, "n": 0})}, {"u": Union({"a": {"y": 2}, "n": 0})})
    assert tree == {"u": {"a": {"x": 1, "y": 2}, "n": 0}}


def test_a_text_that_looks_like_a_placeholder():
    text = '{"$from_rank0":"f"}'
    state = {"f": FromRank0(7), "text": text}
    assert merged(state, state) == {"f": 7, "text": text}
