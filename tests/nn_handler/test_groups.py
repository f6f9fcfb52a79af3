"""Parameters are chosen for optimizers and groups by name, pattern, tensor or function."""

from __future__ import annotations

import pytest
import torch

from shardckpt import NNHandler, errors
from tests.nn_handler.models import Net, a_handler, resumed_alike, train


def test_muon_beside_adamw(tmp_path):
    handler = a_handler()
    handler.optimizations.clear()
    handler.set_optimizer(
        torch.optim.Muon, params=lambda name, p: p.ndim == 2 and "head" not in name, lr=0.02
    )
    handler.set_optimizer(
        torch.optim.AdamW, name="rest", groups={"*.bias": {"weight_decay": 0.0}}, lr=0.01
    )
    assert [len(g["params"]) for g in handler.optimizers["rest"].param_groups] == [1, 3]
    with pytest.raises(errors.StateError, match="Two optimizers would hold"):
        handler.set_optimizer(torch.optim.SGD, name="third", params="head", lr=0.1)
    with pytest.raises(errors.StateError, match="would have no parameter"):
        handler.set_optimizer(torch.optim.SGD, name="third", lr=0.1)
    train(handler)
    loaded = resumed_alike(handler, tmp_path / "c")
    assert set(loaded.optimizers) == {"main", "rest"}
    assert set(loaded.history) >= {"lr", "lr_rest", "lr_rest_1"}
    loaded.set_optimizer(torch.optim.AdamW, name="rest", lr=0.5)
    with pytest.warns(UserWarning, match=r"rest\.optimizer lr"):
        loaded.restore(tmp_path / "c")


def test_parameter_groups_of_any_kind(tmp_path):
    handler = NNHandler(Net)
    groups = [
        {"params": [handler.module.head.bias], "lr": 0.5},
        {"params": ["layers.0", "head"], "lr": 0.25, "weight_decay": 0.0},
    ]
    handler.set_optimizer(torch.optim.AdamW, groups=groups, lr=0.1)
    handler.save(tmp_path / "c.pth")
    loaded = NNHandler.load(tmp_path / "c.pth").optimizer.param_groups
    assert [(g["lr"], len(g["params"])) for g in loaded] == [(0.1, 2), (0.5, 1), (0.25, 3)]
    assert loaded[2]["weight_decay"] == 0.0
