"""Rows of modules and optimizers for a table of kinds of state: (name, make_state, equal)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim

from tests.state import test_module_hooks as hooks
from tests.state import test_optimizer_state as own_forms
from tests.state.test_optimizers import OPTIMIZERS, a_model, a_step, same

__all__ = ["ROWS"]

Row = tuple[str, Callable[[int], Any], Callable[[Any, Any], bool]]


def _equal(a: Any, b: Any) -> bool:
    return all(same(dict(a[key].state_dict()), dict(b[key].state_dict())) for key in a)


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


def _module(kind: Callable[[], nn.Module]) -> Callable[[int], Any]:
    def state(seed: int) -> Any:
        module = kind()
        module.w.data.fill_(seed)
        module.refresh()
        return {"m": module}

    return state


def _equal_with_derived(a: Any, b: Any) -> bool:
    return _equal(a, b) and torch.equal(a["m"].twice, b["m"].twice)


ROWS: list[Row] = [
    *((f"optimizer {name}", _optimizer(make), _equal) for name, make in OPTIMIZERS.items()),
    ("optimizer with entries beside", _linear(own_forms.Beside, momentum=0.9), _equal),
    ("optimizer of its own form", _linear(own_forms.Lookahead), _equal),
    ("optimizer of two", _linear(own_forms.Two), _equal),
    *((f"module {kind.__name__}", _module(kind), _equal_with_derived) for kind in hooks.KINDS),
]
