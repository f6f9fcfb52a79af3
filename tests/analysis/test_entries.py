"""The entries of a source by name."""

from __future__ import annotations

import enum

import torch

import shardckpt
from shardckpt import PerRank
from shardckpt.analysis.entries import pieces, saved_entries, tensors_of, values_of


class Phase(enum.Enum):
    WARM = "warm"


def test_tensors_and_values_have_names(tmp_path):
    tied = torch.ones(2)
    state = {"a": tied, "b": tied, "phase": Phase.WARM, "rng": PerRank({"t": torch.zeros(3)})}
    shardckpt.save(state, tmp_path / "c")
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        saved = saved_entries(checkpoint)
        tensors = tensors_of(saved)
        assert tensors["a"] == tensors["b"]
        assert list(tensors) == ["a", "b", "rng.0.t"]
        values = values_of(saved)
        assert values["phase"].endswith("Phase.WARM")
        assert list(values) == ["phase"]
        chosen = saved_entries(checkpoint, keys="a")
        assert list(tensors_of(chosen)) == ["a"]
        assert values_of(chosen) == {}


def test_pieces_cover_a_tensor_once(tmp_path):
    shardckpt.save({"w": torch.zeros(5, 1_000_003), "none": torch.zeros(0, 2)}, tmp_path / "c")
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        seen = torch.zeros(5, 1_000_003)
        for (row, column), (rows, columns) in pieces(checkpoint, "w", (0, 0), (5, 1_000_003)):
            assert rows * columns * 4 <= 8 << 20
            seen[row : row + rows, column : column + columns] += 1
        assert bool((seen == 1).all())
        assert list(pieces(checkpoint, "none", (0, 0), (0, 2))) == []
