"""The state of one rank in a torch file. test_torch_checkpointing has files with DTensors."""

from __future__ import annotations

import pytest
import torch

from shardckpt import errors
from shardckpt.convert.torch_structure import LocalTensor, read_local_state

WEIGHT = torch.arange(12.0).reshape(3, 4)


@pytest.fixture
def root(tmp_path):
    state = {
        "w": WEIGHT,
        "tied": WEIGHT,
        "turned": WEIGHT.t(),
        "part": WEIGHT[1:, 2:],
        "values": [7, (0.5, "text"), None, {"deep": True}],
    }
    torch.save(state, tmp_path / "model_0.pt")
    return read_local_state(str(tmp_path / "model_0.pt"), rank=0).root


def test_values_are_read_without_torch_load(root):
    assert root["values"] == [7, (0.5, "text"), None, {"deep": True}]


@pytest.mark.parametrize("name", ["w", "turned", "part"])
def test_boxes_of_tensors_and_views_are_read(root, name):
    expected = {"w": WEIGHT, "turned": WEIGHT.t(), "part": WEIGHT[1:, 2:]}[name]
    tensor = root[name]
    assert isinstance(tensor, LocalTensor)
    assert (tensor.dtype, tensor.shape) == (torch.float32, tuple(expected.shape))
    assert torch.equal(tensor.read((0, 0), tensor.shape), expected)
    assert torch.equal(tensor.read((1, 1), (1, 1)), expected[1:2, 1:2])
    assert tensor.read((0, 0), (0, 1)).shape == (0, 1)


def test_tied_tensors_have_one_identity(root):
    assert root["w"].identity == root["tied"].identity
    assert root["w"].identity != root["turned"].identity


def test_a_file_that_torch_did_not_write_is_refused(tmp_path):
    (tmp_path / "model_0.pt").write_bytes(b"text")
    with pytest.raises((errors.NotACheckpointError, errors.CorruptionError)):
        read_local_state(str(tmp_path / "model_0.pt"), rank=0)
