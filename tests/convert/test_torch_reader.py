"""Torch files of other programs are read; changed files of shardckpt are refused."""

from __future__ import annotations

import argparse
import collections
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from shardckpt.convert.convert import convert
from shardckpt.convert.opening import open_source
from shardckpt.convert.single_files import read_one
from shardckpt.errors import NotACheckpointError, ShardckptError
from tests.convert.states import same

BASE = torch.arange(12.0)
SOUND = {
    "views of one storage": {"a": BASE, "b": BASE[3:6], "c": BASE.reshape(3, 4).t()},
    "expanded": {"mask": torch.zeros(1).expand(100, 100)},
    "empty and scalar": {"e": torch.empty(0, 3), "s": torch.tensor(3.0)},
    "a parameter": {"p": nn.Parameter(torch.ones(3))},
    "values": {"b": b"abc", "m": bytearray(b"xyz"), "s": {1, 2}, "c": 1j, "n": 2**100, "t": (1,)},
    "torch's": {"d": torch.float32, "z": torch.Size([1, 2]), "v": torch.device("cpu")},
    "a counter": {"c": collections.Counter("aab")},
    "shared lists": {"l": [[1] * 50] * 50},
    "other letters": {"ключ": torch.ones(1)},
    "random": {"r": torch.get_rng_state()},
    "a list": [torch.ones(2)],
    "conjugated": {"c": torch.ones(2, dtype=torch.complex64).conj()},
    "dtypes": {"h": torch.ones(3, dtype=torch.bfloat16), "q": torch.ones(2, dtype=torch.bool)},
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", SOUND)
def test_torch_files_are_read(tmp_path, name, legacy):
    path = str(tmp_path / "é.pth")
    torch.save(SOUND[name], path, _use_new_zipfile_serialization=not legacy)
    assert same(read_one(path), torch.load(path, weights_only=True))


def test_an_optimizer_and_many_records_are_read(tmp_path):
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, **{f"w{i}": torch.zeros(1) for i in range(200)}}, tmp_path / "x.pt")
    assert same(state["optimizer"], read_one(str(tmp_path / "x.pt"))["optimizer"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_function_that_makes_what_it_is_asked_for_is_named(tmp_path):
    """torch.load(weights_only=True) calls it."""
    state = {"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(NotACheckpointError, match="_rebuild_nested_tensor"):
        read_one(str(tmp_path / "x.pth"))


def test_messages_have_a_remedy(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ShardckptError) as caught:
        read_one(str(tmp_path / "x.pth"))
    assert caught.value.remedy


def test_many_classes_cost_one_pass(tmp_path):
    """Not a pass over the file for each."""
    made = {f"C{number}": type(f"C{number}", (), {"__module__": __name__}) for number in range(60)}
    globals().update(made)
    numbers = list(range(100_000))
    torch.save({"numbers": numbers, **{n: kind() for n, kind in made.items()}}, tmp_path / "x.ckpt")
    begun = time.process_time()
    with open_source(tmp_path / "x.ckpt") as source:
        assert set(source.origin.left_out) == set(made)
    assert time.process_time() - begun < 5


def test_objects_of_classes_have_their_plain_form(tmp_path):
    state = {"h": argparse.Namespace(a=1), "p": Path("x/y"), "d": collections.defaultdict(int, a=1)}
    torch.save(state, tmp_path / "x.ckpt")
    assert set(convert(tmp_path / "x.ckpt", tmp_path / "c").changed) == set(state)
