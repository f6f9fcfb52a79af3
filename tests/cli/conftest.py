"""Checkpoints for the tests of the command."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardckpt


@pytest.fixture
def saved(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    state = {"model": model, "step": 4, "more": {"model": torch.ones(2)}}
    shardckpt.save(state, tmp_path / "c")
    return str(tmp_path / "c")


@pytest.fixture
def lightning(tmp_path):
    path = tmp_path / "last.ckpt"
    state = {"state_dict": {"w": torch.ones(2, 3)}, "epoch": 4, "pytorch-lightning_version": "2.6"}
    torch.save(state, path)
    return path
