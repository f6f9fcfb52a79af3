"""Limits on the modules that a checkpoint may create: no larger than its own tensors."""

from __future__ import annotations

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
from shardckpt.nn_handler.recording import signature
from shardckpt.nn_handler.trust import is_torch_module

__all__ = ["Bounds"]

_FEW_ELEMENTS, _FEW_TENSORS = 1 << 16, 64  # for tensors that are not saved, such as buffers
_MANY_ELEMENTS, _TIMES = 1 << 26, 16  # for the largest parameter of a class of the user


class Bounds:
    """Creates modules that are at most as large as a checkpoint.

    A module of torch is first created on the meta device, where it takes no memory. It may hold as
    many elements and tensors as the checkpoint. In a module of another class, no parameter may be
    far larger than the checkpoint, unless the caller gave the class. `shapes` returns the shapes of
    the checkpoint's tensors.
    """

    def __init__(self, shapes: Callable[[], Sequence[Sequence[int]]], *, path: str) -> None:
        self._shapes, self.path = shapes, path

    @cached_property
    def elements(self) -> int:
        """The limit on elements: those of the checkpoint, and a few more."""
        return _FEW_ELEMENTS + sum(math.prod(shape) for shape in self._shapes())

    @cached_property
    def tensors(self) -> int:
        """The limit on tensors: those of the checkpoint, and a few more."""
        return _FEW_TENSORS + len(self._shapes())

    def construct(
        self, cls: Any, args: Sequence[Any], kwargs: dict[str, Any], *, given: bool = False
    ) -> Any:
        """Return cls(*args, **kwargs). `given`: the caller chose the class."""
        if not issubclass(type(cls), type) or not issubclass(cls, nn.Module):
            return cls(*args, **kwargs)
        if is_torch_module(cls):
            self._probe(cls, args, kwargs)
        elif not given:
            with _registering(self._check_one):
                return cls(*args, **kwargs)
        return cls(*args, **kwargs)

    def _check_one(self, parameter: torch.Tensor, *, is_buffer: bool) -> None:
        if not is_buffer and parameter.numel() > max(_MANY_ELEMENTS, _TIMES * self.elements):
            raise self._too_large(f"a parameter of shape {tuple(parameter.shape)}")

    def _probe(self, cls: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Raise CheckpointError if a module of torch would be larger than the checkpoint."""
        if args and cls is not nn.Sequential:
            raise TypeError("expected keyword arguments")
        bound = signature(cls).bind(*args, **kwargs)
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
            made = cls(*args, **{**kwargs, **device})
        if not parts and _elements(made) > self.elements:
            raise self._too_large(f"{_elements(made)} elements")

    def _too_large(self, actual: str) -> CheckpointError:
        return CheckpointError(
            "The checkpoint asks for a larger module than its tensors can fill",
            path=self.path,
            expected=f"at most {self.elements} elements in {self.tensors} tensors",
            actual=actual,
            remedy="if the arguments are right, load the weights into a model of your own with "
            "NNHandler.initialize_from_checkpoint",
        )


def _elements(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


@contextmanager
def _registering(see: Callable[..., None]) -> Iterator[None]:
    """Call `see` for each parameter and buffer that a module of this thread registers.

    It is called before the tensor is filled, for all modules that are created in the with block.
    """
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
