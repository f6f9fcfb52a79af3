"""Torch files of other programs are read; changed files of shardckpt are refused."""

from __future__ import annotations

import argparse
import collections
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from shardckpt.convert.convert import convert
from shardckpt.convert.opening import open_source
from shardckpt.convert.single_files import DIGEST, TREE, read_one, write_one
from shardckpt.errors import CorruptionError, NotACheckpointError, ShardckptError

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


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if type(one) in (list, tuple):
        return all(same(*pair) for pair in zip(one, other, strict=True))
    return type(one) is type(other) and one == other


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


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("key", [TREE, DIGEST, "__metadata__"])
def test_no_flipped_bit_makes_our_file_foreign(tmp_path, key, check):
    path = tmp_path / "x.safetensors"
    write_one({"a": torch.ones(2), "n": 1}, str(path), overwrite=False)
    data = path.read_bytes()
    begin = data.index(f'"{key}"'.encode()) + 1
    for bit in range(8 * len(key)):
        changed = bytearray(data)
        changed[begin + bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CorruptionError):
            read_one(str(path), check=check)
        if bit % 8 == 0:  # they share what tells
            with pytest.raises(CorruptionError):
                open_source(str(path), check=check)


def test_a_link_that_a_user_makes_to_a_file_is_followed(tmp_path):
    for name in ("x.pth", "x.safetensors"):
        write_one({"a": torch.ones(2)}, str(tmp_path / f"real-{name}"), overwrite=False)
        (tmp_path / name).symlink_to(f"real-{name}")
        assert same(read_one(str(tmp_path / name)), {"a": torch.ones(2)})


def test_messages_have_a_remedy(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ShardckptError) as caught:
        read_one(str(tmp_path / "x.pth"))
    assert caught.value.remedy


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt", ""])
def test_file_names_that_are_not_utf8(tmp_path, suffix):
    """Every reader can read a file that was saved under such a name."""
    path = str(tmp_path) + os.sep + os.fsdecode(b"w\xff") + suffix
    write_one({"a": torch.arange(3.0), "n": 1}, str(tmp_path / "x.pth"), overwrite=False)
    convert(tmp_path / "x.pth", path)
    convert(path, tmp_path / "back.pth")
    assert same(read_one(str(tmp_path / "back.pth")), {"a": torch.arange(3.0), "n": 1})


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
