"""Checkpoints of Megatron-Core, and tensors that its optimizer saved flat up to version 0.14."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.convert.opening import open_source
from tests.convert import layouts

WEIGHT = torch.arange(72.0).reshape(3, 4, 6)


WRITTEN = Path(__file__).parent / "made_by" / "megatron-core-0.16.1"


def test_what_megatron_core_wrote_has_its_values(tmp_path):
    """made_by/write_megatron.py wrote it: four ranks, two of them with tensor parallelism."""
    report = shardckpt.convert(WRITTEN, tmp_path / "c")
    state = shardckpt.load_state(tmp_path / "c")
    weights = torch.stack([torch.arange(24.0).reshape(4, 6) + 100 * layer for layer in range(3)])
    assert torch.equal(state["layers.weight"], weights)
    assert torch.equal(state["optimizer.state.exp_avg.layers.weight"], weights + 0.5)
    assert torch.equal(state["bias"], torch.arange(5.0))
    assert (state["iteration"], state["args"]) == (7, {"hidden": 4})
    assert report.writer == "Megatron-Core"
    assert not [name for name in sys.modules if name.startswith("megatron")]


def grid(folder: Path, facts: object) -> None:
    """Write a tensor in a grid of flat parts of [1, 4, 3] elements."""
    parts = WEIGHT.reshape(3, 1, 1, 4, 2, 3).permute(0, 2, 4, 1, 3, 5).reshape(3, 1, 2, 12)
    layouts.write_dcp({"w": parts.contiguous()}, folder)
    found = pickle.loads((folder / ".metadata").read_bytes())
    found.mcore_data = facts
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def test_a_flattened_tensor_has_its_shape(tmp_path):
    grid(tmp_path / "c", {"w": {"nd_reformulated_orig_global_shape": (3, 4, 6)}})
    report, state = layouts.loaded(tmp_path / "c")
    assert torch.equal(state["w"], WEIGHT)
    assert not report.left_out


def test_every_box_of_a_flattened_tensor_is_read(tmp_path):
    grid(tmp_path / "c", {"w": {"nd_reformulated_orig_global_shape": (3, 4, 6)}})
    with open_source(tmp_path / "c") as source:
        for layer in range(3):
            for row in range(4):
                for column in range(6):
                    sizes = (3 - layer, 4 - row, min(2, 6 - column))
                    box = source.read_box("w", (layer, row, column), sizes)
                    assert torch.equal(box, WEIGHT[layer:, row:, column : column + 2])
        assert source.read_box("w", (0, 0, 0), (3, 0, 6)).shape == (3, 0, 6)


@pytest.mark.parametrize(
    "shape",
    [(3, 4, 7), (3, 4, 6, 1), (3, 24), (0, 4, 6), (1 << 40, 4, 6), "x", None, (3, -4, 6), (3, 4.0)],
)
def test_a_shape_that_does_not_fit_is_a_typed_error(shape, tmp_path):
    folder = tmp_path / "saved"
    layouts.write_dcp({"w": torch.arange(72.0).reshape(3, 1, 2, 12)}, folder)
    found = pickle.loads((folder / ".metadata").read_bytes())
    found.mcore_data = {"w": {"nd_reformulated_orig_global_shape": shape}}
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(errors.CorruptionError):
        shardckpt.convert(folder, tmp_path / "c")


def test_an_absent_tensor_and_other_facts(tmp_path):
    folder = tmp_path / "saved"
    layouts.write_dcp({"w": torch.arange(72.0).reshape(3, 1, 2, 12)}, folder)
    text = (folder / ".metadata").read_bytes()
    facts = {"nd_reformulated_orig_global_shape": (3, 4, 6)}
    for mcore_data in ({"other": facts}, [facts], {3: facts}):
        found = pickle.loads(text)
        found.mcore_data = mcore_data
        (folder / ".metadata").write_bytes(pickle.dumps(found))
        with pytest.raises(errors.CorruptionError):
            shardckpt.convert(folder, tmp_path / "c")
