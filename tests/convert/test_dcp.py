"""Checkpoints of torch.distributed.checkpoint, read without running code."""

from __future__ import annotations

import os
import warnings
from collections import Counter

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.convert.convert import convert
from shardckpt.convert.dcp import DcpCheckpoint
from tests.nn_handler.models import Net


def write(state: dict, path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path)


def test_tensors_come_back(tmp_path):
    model = nn.Linear(3, 2)
    state = {"model": model.state_dict(), "half": torch.ones(3, dtype=torch.bfloat16), "step": 7}
    write(state, tmp_path / "c")
    found = DcpCheckpoint(str(tmp_path / "c"))
    assert found.tensors == {"model.weight": (2, 3), "model.bias": (2,), "half": (3,)}
    read = found.read(found.tensors)
    assert torch.equal(read["model.weight"], model.weight)
    assert read["half"].dtype == torch.bfloat16


def test_a_handler_begins_with_its_weights(tmp_path):
    model = Net(width=5)
    write({"app": {"model": model.state_dict(), "epoch": 3}}, tmp_path / "c")
    handler = NNHandler.initialize_from_checkpoint(tmp_path / "c", Net, width=5)
    assert torch.equal(handler.module.head.weight, model.head.weight)


class Attack:
    def __reduce__(self):
        return os.mkdir, (os.environ["ATTACK"],)


def test_tensor_files_run_no_code(tmp_path, monkeypatch):
    write({"w": torch.ones(2)}, tmp_path / "c")
    monkeypatch.setenv("ATTACK", str(tmp_path / "owned"))
    (file,) = (tmp_path / "c").glob("*.distcp")
    with open(file, "wb") as opened:
        torch.save(Attack(), opened)
    with pytest.raises(errors.CorruptionError):
        DcpCheckpoint(str(tmp_path / "c")).read(["w"])
    assert not (tmp_path / "owned").exists()


def test_invalid_folders_of_dcp_are_errors(tmp_path):
    with pytest.raises(errors.CheckpointNotFoundError):
        DcpCheckpoint(str(tmp_path / "absent"))
    with pytest.raises(errors.NotACheckpointError):
        DcpCheckpoint(str(tmp_path))
    write({"w": torch.ones(2)}, tmp_path / "c")
    metadata = tmp_path / "c" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:50])
    with pytest.raises(errors.CorruptionError):
        DcpCheckpoint(str(tmp_path / "c"))


def test_boxes_of_a_dcp_tensor_lie_in_several_parts(tmp_path):
    tensor = torch.arange(7 * 9).reshape(7, 9)
    shardckpt.save({"w": torch.arange(400_000.0), "t": tensor}, tmp_path / "c")
    convert(str(tmp_path / "c"), str(tmp_path / "d"), to="dcp", shards=3)
    found = DcpCheckpoint(str(tmp_path / "d"))
    assert found.read_box("w", (100,), (399_000,)).tolist() == list(range(100, 399_100))
    assert torch.equal(found.read_box("t", (2, 3), (4, 5)), tensor[2:6, 3:8])


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_an_optimizer_keeps_the_indices_of_its_parameters(tmp_path, lr):
    net = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"optimizers": [optimizer.state_dict()]}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "dcp", to="dcp")
    convert(tmp_path / "dcp", tmp_path / "b.pt")
    (found,) = torch.load(tmp_path / "b.pt", weights_only=True)["optimizers"]
    other = torch.optim.Adam(net.parameters())
    other.load_state_dict(found)
    assert torch.equal(other.state[net.weight]["exp_avg"], optimizer.state[net.weight]["exp_avg"])


def test_a_scheduler_keeps_the_epochs_of_its_milestones(tmp_path):
    """DCP turns the keys into texts, among which MultiStepLR would never find the epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 4])
    torch.save({"scheduler": scheduler.state_dict()}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "dcp", to="dcp")
    convert(tmp_path / "dcp", tmp_path / "ours")
    other = torch.optim.lr_scheduler.MultiStepLR(optimizer, [7])
    shardckpt.load({"scheduler": other}, tmp_path / "ours")
    assert other.milestones == Counter({4: 2, 2: 1})


class Setting:
    """An object that only unpickling could read."""


def test_items_of_lists_keep_their_indices(tmp_path):
    """DCP omits empty dicts. The next item took the place of one."""
    state = {"x": [{}, {"a": torch.ones(2)}, {}, {"b": 1}], "y": [[torch.ones(1)], [{}], {"c": 2}]}
    write(state, tmp_path / "dcp")
    convert(tmp_path / "dcp", tmp_path / "c.pt")
    found = torch.load(tmp_path / "c.pt")
    assert [list(item) for item in found["x"]] == [[], ["a"], [], ["b"]]
    assert found["y"][1:] == [{}, {"c": 2}]


def test_a_list_with_an_object_is_left_out_with_its_items(tmp_path):
    """The item after the object took its place."""
    write({"x": [Setting(), torch.ones(2)], "y": [{"o": Setting(), "a": 1}]}, tmp_path / "dcp")
    report = convert(tmp_path / "dcp", tmp_path / "c.pt")
    assert torch.load(tmp_path / "c.pt") == {"y": [{"a": 1}]}
    assert report.left_out.keys() == {"x", "x.0", "y.0.o"}


def test_a_list_of_many_absent_items_is_refused(tmp_path):
    """Otherwise one entry could fill the memory."""
    write({"x": [{}] * 10_000 + [torch.ones(2)]}, tmp_path / "dcp")
    with pytest.raises(errors.NotACheckpointError, match="lacks most of its items"):
        convert(tmp_path / "dcp", tmp_path / "c.pt")
