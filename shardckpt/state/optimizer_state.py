"""Optimizers as nested dicts, with the names of parameters as keys.

torch numbers the parameters of an optimizer. Here each has its name in the module that owns it, so
the order of parameters and other entries of the state don't matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardckpt.errors import OptimizerModuleError, StateError
from shardckpt.state.markers import Union
from shardckpt.state.module_state import (
    NamedState,
    module_state,
    modules_in,
    named_state,
    names_by_identity,
)
from shardckpt.state.refusals import reading_state
from shardckpt.state.sharded_array import ShardedArray
from shardckpt.state.sharded_tensors import carry_layout
from shardckpt.torch_compat import owner_rank

__all__ = [
    "TORCH_KEYS",
    "OptimizerState",
    "ParameterNames",
    "TorchForms",
    "flat_parameters",
    "keeps_state",
    "optimizer_state",
    "packed_state",
    "plain_state",
    "state_by_parameter",
]


TORCH_KEYS = ("state", "param_groups")


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """The state of an optimizer, as optimizer_state returns it."""

    entries: dict[str, Any]


class ParameterNames:
    """The names of the parameters of a state's modules, by the identity of the parameter."""

    def __init__(
        self,
        modules: Iterable[tuple[str, nn.Module]],
        *,
        read: Mapping[int, NamedState] | None = None,
    ) -> None:
        """`read` holds the modules that have just been read, by id."""
        self._named_modules = list(modules)
        self._read = read or {}

    def add(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Add the modules that the state_dict of an object has returned."""
        self._named_modules += modules
        self.__dict__.pop("_modules", None)

    @cached_property
    def _modules(self) -> list[tuple[str, Mapping[int, str]]]:
        names = []
        for path, module in self._named_modules:
            state = self._read.get(id(module)) or named_state(module, at=path)
            names.append((path, names_by_identity(module, state)))
        return names

    def of(self, parameters: Sequence[torch.Tensor], *, at: str) -> dict[int, str]:
        """Return the name of each parameter of the optimizer at `at`, by the id of the parameter.

        A name is that in the first module that has all of these parameters; other modules don't
        matter. If the parameters are in several modules, a name begins with the module's path in
        the state.

        Raises:
            OptimizerModuleError: A parameter is in no module of the state.
        """
        return next(self.candidates(parameters, at=at))

    def candidates(
        self, parameters: Sequence[torch.Tensor], *, at: str
    ) -> Iterator[dict[int, str]]:
        """Yield all the names that `of` may have returned for these parameters when they were
        saved.

        The result of `of` depends on the other modules of a state.
        """
        wanted = [id(parameter) for parameter in parameters]
        owners = [
            (path, names)
            for path, names in self._modules
            if all(identity in names for identity in wanted)
        ]
        for _, names in owners:
            yield {identity: names[identity] for identity in wanted}
        for path, names in owners:  # the names of version 0.1.0 in a state of several modules
            yield {identity: _join(path, names[identity]) for identity in wanted}
        paths = {identity: self.paths(identity) for identity in wanted}
        for index, parameter in enumerate(parameters):
            if not paths[id(parameter)]:
                raise _without_module(index, parameter, at)
        yield {identity: paths[identity][0] for identity in wanted}

    def paths(self, identity: int) -> list[str]:
        """Return the names in the state of one parameter."""
        return [_join(path, names[identity]) for path, names in self._modules if identity in names]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _without_module(index: int, parameter: torch.Tensor, at: str) -> OptimizerModuleError:
    return OptimizerModuleError(
        "The optimizer holds a parameter that no module in the state has",
        tensor=at,
        expected="every parameter of the optimizer in a module of the same state",
        actual=f"parameter {index} of shape {tuple(parameter.shape)}",
        remedy='save both: {"model": model, "optimizer": optimizer}. Create the optimizer after '
        "wrapping the model",
    )


def flat_parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    """List the parameters of an optimizer in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(optimizer: Optimizer, names: ParameterNames, *, at: str) -> dict[str, Any]:
    """Return the optimizer's state dict with parameter names in place of torch's numbers.

    Its form is `{"state": {name: {key: value}}, "param_groups": [{"params": [name, ...], ...}],
    ...}`. A state dict of another form is not changed, but dicts of torch's form inside it are
    named in the same way.

    Raises:
        OptimizerModuleError: A parameter is in no module of the state.
    """
    forms = TorchForms(optimizer)

    def named(packed: Any) -> Any:
        owner = forms.owner(packed)
        if owner is not None:
            rest = {key: named(item) for key, item in packed.items() if key not in TORCH_KEYS}
            return {**rest, **_with_names(packed, owner, names, at=at)}
        if isinstance(packed, Mapping) and not isinstance(packed, Counter):
            return {key: named(value) for key, value in packed.items()}
        if type(packed) in (list, tuple):
            return type(packed)(map(named, packed))
        return packed

    try:
        state = named(packed_state(optimizer, at=at))
    finally:
        named = None  # type: ignore[assignment]  # it refers to itself, and so to the optimizer
    if not isinstance(state, dict):
        raise StateError(
            "The state_dict of an optimizer is not a dict",
            tensor=at,
            expected="a dict",
            actual=type(state).__qualname__,
            remedy="return a dict from its state_dict()",
        )
    return state


def _with_names(
    packed: Mapping[str, Any], owner: Optimizer, names: ParameterNames, *, at: str
) -> dict[str, Any]:
    """Return the TORCH_KEYS of a dict in torch's form, with parameter names for numbers."""
    parameters = flat_parameters(owner)
    name_of = names.of(parameters, at=at)
    taken = set(name_of.values()) & packed["state"].keys()
    if taken:
        raise StateError(
            "An optimizer has other state under the name of a parameter",
            tensor=f"{at}.state.{min(taken)}",
            expected="keys that differ from the names of the parameters",
            actual=repr(min(taken)),
            remedy="keep it under another key of optimizer.state",
        )
    numbers = [number for group in packed["param_groups"] for number in group["params"]]
    parameter_of = dict(zip(numbers, parameters, strict=True))
    by_number = {number: name_of[id(parameter)] for number, parameter in parameter_of.items()}
    return {
        "state": {
            by_number.get(key, key): _as_sharded(parameter_of.get(key), item)
            for key, item in packed["state"].items()
        },
        "param_groups": [
            {**group, "params": [by_number[number] for number in group["params"]]}
            for group in packed["param_groups"]
        ],
    }


def _as_sharded(parameter: torch.Tensor | None, state: Any) -> Any:
    """Copy the shard description of a parameter to the tensors of its shape in its state."""
    if parameter is None or not hasattr(parameter, "global_shape") or not isinstance(state, dict):
        return state
    return {
        key: carry_layout(parameter, value.detach())
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
        else value
        for key, value in state.items()
    }


class TorchForms:
    """Finds dicts in the form of torch's optimizers in a state dict, and the optimizer of each.

    It is the optimizer itself, or one that it wraps.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        # The optimizer inside a ZeroRedundancyOptimizer has the same parameters in another order.
        inner = () if _is_zero(optimizer) else _inner(optimizer, seen={id(optimizer)})
        self._left: list[Optimizer] = [*inner, optimizer]
        self._all = tuple(self._left)

    def owner(self, packed: Any) -> Optimizer | None:
        """Return the optimizer to which a dict of torch's form belongs. None for any other dict."""
        if not (
            isinstance(packed, Mapping)
            and isinstance(packed.get("state"), Mapping)
            and isinstance(groups := packed.get("param_groups"), (list, tuple))
            and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
            and all(type(number) is int for g in groups for number in g["params"])
        ):
            return None
        sizes = [len(group["params"]) for group in groups]
        for among in (self._left, self._all):
            for optimizer in among:
                if [len(group["params"]) for group in optimizer.param_groups] == sizes:
                    if optimizer in self._left:
                        self._left.remove(optimizer)
                    return optimizer
        return None


def _inner(value: Any, *, seen: set[int]) -> Iterator[Optimizer]:
    """Yield the optimizers in the attributes of an object, also those in lists, tuples and
    dicts.
    """
    attributes = getattr(value, "__dict__", {})
    for attribute in attributes.values():
        items: Iterable[Any] = (attribute,)
        if type(attribute) in (list, tuple):
            items = attribute
        elif type(attribute) is dict:
            items = attribute.values()
        for item in items:
            if isinstance(item, Optimizer) and id(item) not in seen:
                seen.add(id(item))
                yield item
                yield from _inner(item, seen=seen)


def _is_zero(optimizer: Optimizer) -> bool:
    return any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__)


def keeps_state(optimizer: Optimizer, parameter: torch.Tensor) -> bool:
    """Whether this rank keeps the optimizer's state of a parameter."""
    if not _is_zero(optimizer):
        return True
    return bool(owner_rank(optimizer, parameter) == optimizer.rank)  # type: ignore[attr-defined]


def state_by_parameter(optimizer: Optimizer) -> Any:
    """Return the dict in which an optimizer keeps its state by parameter."""
    return optimizer.optim.state if _is_zero(optimizer) else optimizer.state  # type: ignore[attr-defined]


def packed_state(optimizer: Optimizer, *, at: str) -> Any:
    """Return the optimizer's state_dict.

    A ZeroRedundancyOptimizer, whose ranks each keep a part, need not be consolidated. Its tensors
    are ShardedArrays.
    """
    if _is_zero(optimizer):
        return _packed_zero(optimizer, at=at)
    with reading_state(optimizer, at=at):
        return optimizer.state_dict()


def _packed_zero(optimizer: Optimizer, *, at: str) -> dict[str, Any]:
    parameters = flat_parameters(optimizer)
    local = state_by_parameter(optimizer)
    local_parameters = [p for p in parameters if keeps_state(optimizer, p)]
    example = next(((p, local[p]) for p in local_parameters if local.get(p)), None)
    if not local_parameters:
        raise StateError(
            "A rank keeps no parameter of a ZeroRedundancyOptimizer",
            tensor=at,
            expected="at least one parameter on each rank",
            actual=f"{len(parameters)} parameters in all",
            remedy="use a plain optimizer for a model this small, or fewer ranks",
        )
    state: dict[int, Any] = {}
    for number, parameter in enumerate(parameters):
        if keeps_state(optimizer, parameter):
            if local.get(parameter):
                state[number] = {
                    key: _as_full_array(item) for key, item in local[parameter].items()
                }
        elif example is not None:
            like, entries = example
            state[number] = {
                key: _as_empty_array(item, like, parameter, at=f"{at}.state.{key}")
                for key, item in entries.items()
            }
    groups = Optimizer.state_dict(optimizer)["param_groups"]
    return {"state": state, "param_groups": groups}


def _as_full_array(item: Any) -> Any:
    if isinstance(item, torch.Tensor) and item.dim():
        return ShardedArray(item, item.shape, (0,) * item.dim())
    return item


def _as_empty_array(item: Any, like: torch.Tensor, parameter: torch.Tensor, *, at: str) -> Any:
    """Return an empty part in place of another rank's state of a parameter.

    Its form is that of `item`, this rank's own state of the parameter `like`.
    """
    if not isinstance(item, torch.Tensor):
        return item
    if not item.dim():
        return item.clone()  # a step count, which is equal for all parameters; the save compares it
    if item.shape != like.shape:
        raise StateError(
            "A ZeroRedundancyOptimizer with state of this form can't be saved",
            tensor=at,
            expected="state of the shape of its parameter, or numbers",
            actual=f"shape {tuple(item.shape)} for a parameter of {tuple(like.shape)}",
            remedy="use fully_shard with the plain optimizer",
        )
    dtype = parameter.dtype if item.dtype == like.dtype else item.dtype
    empty = torch.empty((0, *parameter.shape[1:]), dtype=dtype, device=item.device)
    return ShardedArray(empty, parameter.shape, (0,) * parameter.dim())


def plain_state(state: Any) -> Any:
    """Return a nested state with its modules and optimizers as dicts of canonical names."""
    names = ParameterNames(modules_in(state))

    def plain(value: Any, at: str) -> Any:
        if isinstance(value, Union):
            value = value.value
        if isinstance(value, nn.Module):
            return module_state(value)
        if isinstance(value, Optimizer):
            return optimizer_state(value, names, at=at)
        if isinstance(value, Mapping):
            return {key: plain(item, f"{at}.{key}") for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(plain(item, at) for item in value)
        return value

    return plain(state, "")
