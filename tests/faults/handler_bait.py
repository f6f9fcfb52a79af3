"""The objects that hostile checkpoints of a handler name. The program that loads them has imported
this module; `called` notes each call."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import nn

called: list[str] = []


def function(*arguments: Any, **options: Any) -> Any:
    called.append("function")
    return nn.Linear(2, 2)


def __getattr__(name: str) -> Any:
    if not name.startswith("__"):
        called.append(f"the module's __getattr__({name})")
    raise AttributeError(name)


class Descriptor:
    def __get__(self, instance: Any, owner: Any) -> Any:
        called.append("a descriptor")
        return nn.Linear


class Meta(type):
    def __getattr__(cls, name: str) -> Any:
        called.append(f"the metaclass's __getattr__({name})")
        return nn.Linear


class Holder(metaclass=Meta):
    attribute = Descriptor()


class Plain:
    """Derives from nothing that a slot needs."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        called.append("Plain")

    def __call__(self, *arguments: Any) -> None:
        called.append("Plain()")


class Eager(nn.Module):
    """A model of the program that calls its argument when it is made."""

    def __init__(self, function: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(2, 2).weight.detach())
        if callable(function):
            function(3)


class Lazy(ModuleType):
    def __getattribute__(self, name: str) -> Any:
        called.append(f"a lazy module's {name}")
        raise AttributeError(name)


lazy = ModuleType("tests.faults.handler_lazy")
lazy.__class__ = Lazy
sys.modules["tests.faults.handler_lazy"] = lazy
