"""The file of each tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from shardckpt.state.file_groups import (
    FROZEN,
    MAIN,
    OPTIMIZER,
    file_suffix,
    files_of,
    frozen_entries,
    frozen_group,
    group_in_name,
)
from shardckpt.state.flatten import flatten

MIB = 1 << 20


class Quantised(nn.Module):
    """A layer whose weights are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.zeros(128, 256, dtype=torch.int32))
        self.register_buffer("table", torch.zeros(128, 256))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def test_frozen_parameters_and_large_buffers_of_what_is_not_trained():
    model = nn.ModuleDict({"frozen": nn.Linear(2, 2), "trained": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    model["trained"].register_buffer("mask", torch.zeros(256, 256, dtype=torch.int8))
    model["layer"] = Quantised()
    assert frozen_entries(model) == {"frozen.weight", "frozen.bias", "layer.packed"}
    model.eval()
    assert "layer.table" in frozen_entries(model)
    assert frozen_entries(nn.Linear(2, 2)) == set()


def test_names_are_those_without_wrappers():
    model = torch.compile(DataParallel(nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)))
    assert frozen_entries(model) == {"0.weight", "0.bias"}


def test_kinds_in_a_state():
    model, teacher = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    average = nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {
        "model": model,
        "teacher": teacher,
        "nested": [{"average": average}],
        "optimizer": optimizer,
        "plain": torch.ones(2),
        "tied": teacher.weight,
    }
    file_groups = flatten(state, rank=0).file_groups
    assert file_groups.pop("teacher.weight") == file_groups.pop("teacher.bias") == FROZEN
    assert file_groups.pop("nested.0.average.weight") == FROZEN + 1
    assert file_groups.pop("nested.0.average.bias") == FROZEN + 1
    assert set(file_groups.values()) == {OPTIMIZER}
    assert len(file_groups) == 6


@pytest.mark.parametrize(
    ("mib", "files"),
    [
        ({MAIN: 1, OPTIMIZER: 2, FROZEN: 3}, {MAIN}),
        ({MAIN: 1, OPTIMIZER: 2, FROZEN: 4}, {MAIN, FROZEN}),
        ({MAIN: 256, OPTIMIZER: 255}, {MAIN}),
        ({MAIN: 255, OPTIMIZER: 1000}, {MAIN}),
        ({MAIN: 256, OPTIMIZER: 256}, {MAIN, OPTIMIZER}),
        ({FROZEN + 1: 4}, {FROZEN + 1}),
        ({FROZEN: 2, FROZEN + 1: 3, FROZEN + 2: 9}, {MAIN, FROZEN + 2}),
        ({}, set()),
    ],
)
def test_what_is_little_has_no_file_of_its_own(mib, files):
    file_group = np.array([k for k in mib for _ in range(2)], dtype=np.int64)
    size = np.array([n * MIB // 2 for n in mib.values() for _ in range(2)], dtype=np.int64)
    found = files_of(file_group, size)
    assert set(found.tolist()) == files
    assert all(file in (MAIN, own) for file, own in zip(found, file_group, strict=True))


def test_names_of_files():
    file_groups = [MAIN, OPTIMIZER, *(frozen_group(number) for number in range(20))]
    names = {
        file_group: f"shard-00000-of-00001{file_suffix(file_group)}.safetensors"
        for file_group in file_groups
    }
    assert len(names) == 10
    assert {group_in_name(name): name for name in names.values()} == names
    assert names[FROZEN].endswith("-frozen.safetensors")
    assert group_in_name("shard-00000-of-00001-other.safetensors") == MAIN
