"""Limits on the modules that a checkpoint asks for: what its own tensors can fill."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy

from shardckpt.errors import CheckpointError
from shardckpt.nn_handler.trust import is_torch_module

__all__ = ["Bounds"]

_FEW_ELEMENTS, _FEW_TENSORS = 1 << 16, 64  # what no checkpoint need hold: buffers, a metric's own
_MANY_ELEMENTS, _TIMES = 1 << 26, 16  # what a class of the user's may hold for a while


class Bounds:
    """Makes modules, within what a checkpoint's tensors can fill.

    torch's own modules are first made on the meta device, where they take no memory, and may hold
    as many elements and tensors as the checkpoint. `shapes` asks for its tensors' shapes. Of any
    other class a single parameter must not be far above that, unless the caller gave the class.
    """

    def __init__(self, shapes: Callable[[], Sequence[Sequence[int]]], *, path: str) -> None:
        self._shapes, self.path = shapes, path

    @cached_property
    def elements(self) -> int:
        """So many elements the checkpoint's tensors have, and a few."""
        return _FEW_ELEMENTS + sum(math.prod(shape) for shape in self._shapes())

    @cached_property
    def tensors(self) -> int:
        """So many tensors the checkpoint holds, and a few."""
        return _FEW_TENSORS + len(self._shapes())

    def construct(
        self, kind: Any, args: Sequence[Any], kwargs: dict[str, Any], *, given: bool = False
    ) -> Any:
        """kind(*args, **kwargs); `given`: the class is the caller's choice."""
        if not issubclass(type(kind), type) or not issubclass(kind, nn.Module):
            return kind(*args, **kwargs)
        if is_torch_module(kind):
            self._probe(kind, args, kwargs)
        elif not given:
            with _registering(self._check_one):
                return kind(*args, **kwargs)
        return kind(*args, **kwargs)

    def _check_one(self, parameter: torch.Tensor, *, is_buffer: bool) -> None:
        if not is_buffer and parameter.numel() > max(_MANY_ELEMENTS, _TIMES * self.elements):
            raise self._too_large(f"a parameter of shape {tuple(parameter.shape)}")

    def _probe(self, kind: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Raise CheckpointError if one of torch's modules would hold more than the checkpoint."""
        if args and kind is not nn.Sequential:
            raise TypeError("arguments by name expected")
        bound = inspect.signature(kind).bind(*args, **kwargs)
        values = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        layers = [n for name, n in values.items() if "layers" in name and type(n) is int]
        parts = [m for m in values.values() if isinstance(m, nn.Module)]
        copied = max(layers, default=0) * sum(map(_elements, parts))
        if max(layers, default=0) > self.tensors or copied > self.elements:
            raise self._too_large(f"{max(layers)} layers")
        device = {"device": "meta"} if kwargs.get("device") is not None else {}
        elements = tensors = 0

        def count(tensor: torch.Tensor, *, is_buffer: bool) -> None:
            nonlocal elements, tensors
            elements, tensors = elements + tensor.numel(), tensors + 1
            if elements > self.elements or tensors > self.tensors:
                raise self._too_large(f"{elements} elements in {tensors} tensors, or more")

        with torch.device("meta"), _registering(count):
            made = kind(*args, **{**kwargs, **device})
        if not parts and _elements(made) > self.elements:
            raise self._too_large(f"{_elements(made)} elements")

    def _too_large(self, actual: str) -> CheckpointError:
        return CheckpointError(
            "The checkpoint asks for a larger module than its tensors can fill",
            path=self.path,
            expected=f"at most {self.elements} elements in {self.tensors} tensors",
            actual=actual,
            remedy="if the arguments are right, make the model by yourself and take the weights "
            "with NNHandler.initialize_from_checkpoint",
        )


def _elements(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


@contextmanager
def _registering(see: Callable[..., None]) -> Iterator[None]:
    """Inside the with block each parameter and buffer that this thread's modules register is
    seen, before it is filled."""
    thread = threading.get_ident()

    def hook(is_buffer: bool) -> Callable[..., None]:
        def registered(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
            if tensor is not None and threading.get_ident() == thread and not is_lazy(tensor):
                see(tensor, is_buffer=is_buffer)

        return registered

    handles = [
        register_module_parameter_registration_hook(hook(False)),
        register_module_buffer_registration_hook(hook(True)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
