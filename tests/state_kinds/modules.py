"""Rows: modules, optimizers, and what else keeps state through state_dict."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim
from torch.nn.utils import parametrizations, parametrize

from shardckpt.state.optimizer_state import plain_state
from tests.state import test_module_matching as hooks
from tests.state import test_optimizer_state as own_forms
from tests.state.test_optimizer_matching import OPTIMIZERS, SCHEDULERS, a_model, a_step
from tests.state_kinds.registry import row


def _rows(name: str, make: Callable[[int], Any]) -> None:
    """A row whose modules and optimizers load_state gives as plain dicts."""
    row(name, whole=lambda seed: plain_state(make(seed)))(make)


def _seeded(make: Callable[[], nn.Module]) -> Callable[[int], Any]:
    def state(seed: int) -> Any:
        torch.manual_seed(seed)
        return make()

    return state


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def _parametrized() -> nn.Module:
    module = nn.Linear(3, 3)
    parametrize.register_parametrization(module, "weight", _Doubled())
    return module


def _tied() -> nn.Module:
    module = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    module[1].weight = module[0].weight
    return module


class _LoRA(nn.Linear):
    """A linear module with two small factors beside its frozen weight."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight.requires_grad = False
        self.lora = nn.ParameterDict({"a": torch.randn(2, 4), "b": torch.randn(4, 2)})


class _SharedBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        table = torch.randn(4)
        self.register_buffer("one", table)
        self.register_buffer("other", table)
        self.register_buffer("unsaved", torch.ones(2), persistent=False)


def _averaged() -> nn.Module:
    average = optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    average.update_parameters(nn.Linear(2, 2))
    return average


MODULES: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(3),
    "LSTM": lambda: nn.LSTM(2, 3, proj_size=2),
    "ParameterDict": lambda: nn.ParameterDict({"a": torch.randn(2), "c": torch.randn(1)}),
    "ParameterList": lambda: nn.ParameterList([torch.randn(2), torch.randn(3)]),
    "complex and bfloat16 parameters": lambda: nn.ParameterList(
        [torch.randn(2, dtype=torch.complex64), torch.randn(2).bfloat16()]
    ),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 2)),
    "spectral_norm, hooks": lambda: nn.utils.spectral_norm(nn.Linear(3, 2)),
    "weight_norm, hooks": lambda: nn.utils.weight_norm(nn.Linear(3, 2)),
    "parametrization": _parametrized,
    "tied weights": _tied,
    "LoRA": _LoRA,
    "shared buffers": _SharedBuffer,
    "AveragedModel": _averaged,
    "compiled": lambda: torch.compile(nn.Linear(2, 2), backend="eager"),  # type: ignore[dict-item]
    "module without state": lambda: nn.ReLU(),
    "observer": lambda: torch.ao.quantization.HistogramObserver(),
    "fake quantization": lambda: torch.ao.quantization.FakeQuantize(),
}
for _name, _module in MODULES.items():
    _rows(f"module {_name}", _seeded(_module))


def _derived(kind: Callable[[], Any]) -> Callable[[int], Any]:
    def state(seed: int) -> Any:
        module = kind()
        module.w.data.fill_(seed)
        module.refresh()
        return module

    return state


for _kind in hooks.KINDS:
    _rows(f"module {_kind.__name__}", _derived(_kind))
for _name, _extra in {"bytes": b"a%d", "dict": {"a": 1}}.items():
    _rows(f"module with extra state, {_name}", lambda seed, extra=_extra: hooks.Extra(extra))  # type: ignore[misc]
row("module, lazy", refused=True)(lambda seed: nn.LazyLinear(3))
row("module, quantized", refused=True)(lambda seed: torch.ao.nn.quantized.Linear(2, 2))


def _optimizer(make: Callable[[Any], optim.Optimizer]) -> Callable[[int], Any]:
    def state(seed: int) -> Any:
        model = a_model(seed)
        optimizer = make(model.parameters())
        a_step(model, optimizer)
        return {"m": model, "o": optimizer}

    return state


def _linear(kind: Any, **options: Any) -> Callable[[int], Any]:
    def state(seed: int) -> Any:
        torch.manual_seed(seed)
        module, optimizer = own_forms.trained(kind=kind, **options)
        return {"m": module, "o": optimizer}

    return state


class Queues(optim.SGD):
    """Keeps the last gradients of each parameter in a deque, as AdaShift does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            queue = self.state[parameter].setdefault("last", collections.deque(maxlen=2))
            queue.append(parameter.grad.clone())


class Preconditioned(optim.SGD):
    """Keeps an object of a class of its own for each parameter."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["preconditioner"] = hooks.stream


for _name, _make in OPTIMIZERS.items():
    _rows(f"optimizer {_name}", _optimizer(_make))
_rows("optimizer with entries beside", _linear(own_forms.Beside, momentum=0.9))
_rows("optimizer of its own form", _linear(own_forms.Lookahead))
_rows("optimizer of two", _linear(own_forms.Two))
_rows("optimizer with deques", _linear(Queues, lr=0.1))
row("optimizer with objects", refused=True)(_linear(Preconditioned, lr=0.1))


def _scheduler(make: Callable[[Any], Any]) -> Callable[[int], Any]:
    def state(seed: int) -> Any:
        optimizer = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        scheduler = make(optimizer)
        for _ in range(seed + 1):
            optimizer.step()
            scheduler.step(*([0.5] if "Plateau" in type(scheduler).__name__ else []))
        return scheduler

    return state


for _name in ("plateau", "sequence", "chain", "one cycle", "milestones"):
    _make = _scheduler(SCHEDULERS[_name])
    row(f"scheduler {_name}", whole=lambda seed, make=_make: make(seed).state_dict())(_make)  # type: ignore[misc]


def _scaler(seed: int) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0 + seed)
    scaler.scale(torch.ones(1))
    return scaler


row("GradScaler", whole=lambda seed: _scaler(seed).state_dict())(_scaler)
