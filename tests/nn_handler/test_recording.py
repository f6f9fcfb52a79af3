"""Noting the arguments of modules changes nothing else about them."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from shardckpt.nn_handler.recording import recorded
from tests.nn_handler.models import Net, same


class Loss(nn.Module):
    def __init__(self, scale: float, *, kind: str = "a", **others: int) -> None:
        super().__init__()
        self.scale = scale / 2  # an attribute with the name of an argument and another value

    def forward(self, inputs):
        return inputs * self.scale


class Base:
    def __new__(cls, *args, **kwargs):
        made = super().__new__(cls)
        made.seen = args
        return made


class Mixed(nn.Module, Base):
    """Another base class has a __new__ of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()


class NoHash(nn.Module):
    __hash__ = None  # type: ignore[assignment]


class HashOfState(nn.Module):
    """A hash of what __init__ sets, as the metrics of torchmetrics have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def __hash__(self) -> int:
        return hash(self.width)


def test_arguments_are_noted():
    assert recorded(Loss(2.0, kind="b", more=3)) == {"scale": 2.0, "kind": "b", "more": 3}
    assert recorded(Loss(scale=1.0)) == {"scale": 1.0}
    assert Mixed(3).seen == (3,)
    assert recorded(Mixed(3)) == {"width": 3}
    assert recorded(NoHash()) == {}
    assert recorded(HashOfState(3)) == {"width": 3}


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_are_as_before_and_have_no_arguments(copied):
    module = Net(5)
    assert b"_made" not in pickle.dumps(module)
    assert vars(module).keys() == vars(copied(module)).keys()
    assert same(copied(module).state_dict(), module.state_dict())
    assert recorded(copied(Loss(1.0))) is None
    assert recorded(module) == {"width": 5}


def test_a_module_is_freed_as_before():
    module = Loss(1.0)
    inner = nn.Linear(2, 2)
    outer = nn.Sequential(inner)
    gone = [weakref.ref(module), weakref.ref(inner)]
    del module, inner, outer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def double(module):
    return float(module(torch.ones(())))


def test_compiled_and_in_another_process():
    module = Loss(3.0)
    assert double(torch.compile(module, backend="eager", fullgraph=True)) == 1.5
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(double, (module,)) == 1.5


def test_only_nn_handler_sets_it():
    code = """
import torch
before = dict(vars(torch.nn.Module))
import shardckpt
shardckpt.save, shardckpt.CheckpointManager
assert dict(vars(torch.nn.Module)) == before
import shardckpt.nn_handler
changed = {n for n, v in vars(torch.nn.Module).items() if before.get(n) is not v}
assert changed == {"__new__", "__setstate__"}, changed
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
