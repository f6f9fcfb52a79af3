"""Optimizers of other packages: save, load, step, equal. scripts/frameworks installs them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardckpt
from tests.state.test_optimizer_matching import INPUT, same


def of(package, name, **options):
    return lambda p: getattr(pytest.importorskip(package), name)(p, lr=0.01, **options)


def lookahead(parameters):
    package = pytest.importorskip("pytorch_optimizer")
    return package.Lookahead(torch.optim.AdamW(parameters, lr=0.01), k=2)


def muon(parameters):
    package = pytest.importorskip("pytorch_optimizer")
    groups = {flag: [p for p in parameters if (p.dim() == 2) is flag] for flag in (True, False)}
    return package.Muon([{"params": part, "use_muon": flag} for flag, part in groups.items()])


OPTIMIZERS = {
    "Shampoo": of("pytorch_optimizer", "Shampoo"),
    "SOAP": of("pytorch_optimizer", "SOAP"),
    "Muon": muon,
    "Lookahead": lookahead,
    "Lion": of("pytorch_optimizer", "Lion"),
    "MADGRAD": of("pytorch_optimizer", "MADGRAD"),
    "Fromage": of("pytorch_optimizer", "Fromage"),
    "8-bit of torchao": of("torchao.optim", "AdamW8bit"),
    "4-bit of torchao": of("torchao.optim", "AdamW4bit"),
    "float8 of torchao": of("torchao.optim", "AdamWFp8"),
    "8-bit of bitsandbytes": of("bitsandbytes.optim", "AdamW8bit", min_8bit_size=16),
    "CAME": of("came_pytorch", "CAME"),
    "schedule-free": of("schedulefree", "AdamWScheduleFree"),
    "Adafactor of transformers": of(
        "transformers", "Adafactor", scale_parameter=False, relative_step=False
    ),
}


def job(make, seed):
    torch.manual_seed(seed)
    # torchao quantizes the moments of parameters with 4096 elements or more
    module = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 3))
    optimizer = make(list(module.parameters()))
    if hasattr(optimizer, "train"):
        optimizer.train()
    return module, optimizer


def step(module, optimizer):
    optimizer.zero_grad()
    module(INPUT).square().sum().backward()
    optimizer.step()


@pytest.fixture(autouse=True)
def not_compiled():
    """torchao compiles its steps: without a compiler here."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_continues_after_a_load(tmp_path, name):
    module, optimizer = job(OPTIMIZERS[name], 0)
    for _ in range(3):
        step(module, optimizer)
    if hasattr(optimizer, "eval"):
        optimizer.eval()  # as one saves with schedule-free optimizers
    shardckpt.save({"m": module, "o": optimizer}, tmp_path / "c")
    for steps in (0, 1):
        other, target = job(OPTIMIZERS[name], 1)
        for _ in range(steps):
            step(other, target)
        shardckpt.load({"m": other, "o": target}, tmp_path / "c")
        assert same(target.state_dict(), optimizer.state_dict())
    for part in (optimizer, target):
        if hasattr(part, "train"):
            part.train()
    step(module, optimizer)
    step(other, target)
    assert same(dict(other.state_dict()), dict(module.state_dict()))
