"""A state with entries of many types, for tests of the command."""

from __future__ import annotations

import enum

import numpy as np
import torch

import shardckpt
from shardckpt import PerRank


class Phase(enum.Enum):
    WARM = "warm"


def save_some(path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    state = {
        "model": {"w": weight, "tied": weight, "half": torch.ones(2, dtype=torch.bfloat16)},
        "table": np.arange(3),
        "step": 7,
        "history": {1: [0.5, float("nan")]},
        "phase": Phase.WARM,
        "rng": PerRank({"seed": 3, "t": torch.ones(1)}),
        "text": "long " * 40,
    }
    shardckpt.save(state, path)
