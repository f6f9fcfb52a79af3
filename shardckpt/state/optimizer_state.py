"""Optimizers as nested dicts in which state goes by parameter name.

torch numbers the parameters of an optimizer; here each goes by its name in the module that
owns it, so that neither the order of parameters nor what else the state holds matters.
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
    OwnState,
    module_state,
    modules_in,
    names_by_identity,
    own_state,
)
from shardckpt.state.refusals import reading_state
from shardckpt.state.sharded_array import ShardedArray
from shardckpt.state.sharded_tensors import carry_layout

__all__ = [
    "TORCH_KEYS",
    "OptimizerState",
    "ParameterNames",
    "TorchForms",
    "flat_parameters",
    "is_own",
    "optimizer_state",
    "packed_state",
    "plain_state",
    "state_of",
]


TORCH_KEYS = ("state", "param_groups")


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """An optimizer read out; see optimizer_state."""

    entries: dict[str, Any]


class ParameterNames:
    """Names of the parameters of a state's modules, by the identity of the parameter."""

    def __init__(
        self,
        modules: Iterable[tuple[str, nn.Module]],
        *,
        read: Mapping[int, OwnState] | None = None,
    ) -> None:
        """`read` holds, by id, modules that have just been read."""
        self._found = list(modules)
        self._read = read or {}

    @cached_property
    def _modules(self) -> list[tuple[str, dict[int, str]]]:
        return [
            (
                path,
                names_by_identity(module, self._read.get(id(module)) or own_state(module, at=path)),
            )
            for path, module in self._found
        ]

    def of(self, parameters: Sequence[torch.Tensor], *, at: str) -> dict[int, str]:
        """id -> name of the parameters of the optimizer at `at`.

        The name is the one in the first module that has all of these parameters, whatever other
        modules the state has. Where they come from several modules, it begins with the module's
        own path in the state. Raises OptimizerModuleError for a parameter without a name.
        """
        return next(self.candidates(parameters, at=at))

    def candidates(
        self, parameters: Sequence[torch.Tensor], *, at: str
    ) -> Iterator[dict[int, str]]:
        """All that `of` may have said of these parameters when another state was saved."""
        wanted = [id(parameter) for parameter in parameters]
        owners = [
            (path, names)
            for path, names in self._modules
            if all(identity in names for identity in wanted)
        ]
        for _, names in owners:
            yield {identity: names[identity] for identity in wanted}
        for path, names in owners:  # as version 0.1.0 names them in a state of several modules
            yield {identity: _join(path, names[identity]) for identity in wanted}
        places = {identity: self.places(identity) for identity in wanted}
        for index, parameter in enumerate(parameters):
            if not places[id(parameter)]:
                raise _without_module(index, parameter, at)
        yield {identity: places[identity][0] for identity in wanted}

    def places(self, identity: int) -> list[str]:
        """The paths in the state under which a parameter stands."""
        return [_join(path, names[identity]) for path, names in self._modules if identity in names]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _without_module(index: int, parameter: torch.Tensor, at: str) -> OptimizerModuleError:
    return OptimizerModuleError(
        "The optimizer holds a parameter that no module in the state has",
        tensor=at,
        expected="every parameter of the optimizer in a module of the same state",
        actual=f"parameter {index} of shape {tuple(parameter.shape)}",
        remedy='put the module beside it: {"model": model, "optimizer": optimizer}; '
        "and create the optimizer after wrapping the model",
    )


def flat_parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    """The parameters of an optimizer in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(optimizer: Optimizer, names: ParameterNames, *, at: str) -> dict[str, Any]:
    """The optimizer's state dict with parameter names in place of torch's numbers.

    `{"state": {name: {key: value}}, "param_groups": [{"params": [name, ...], ...}], ...}`. A
    state dict of another form stays as it is, except that dicts of torch's form inside it are
    named in the same way. Raises OptimizerModuleError for a parameter without a name.
    """
    forms = TorchForms(optimizer)

    def named(packed: Any) -> Any:
        owner = forms.owner(packed)
        if owner is not None:
            parameters = flat_parameters(owner)
            name_of = names.of(parameters, at=at)
            numbers = [number for group in packed["param_groups"] for number in group["params"]]
            taken = set(name_of.values()) & packed["state"].keys()
            if taken:
                raise StateError(
                    "An optimizer has other state under the name of a parameter",
                    tensor=f"{at}.state.{min(taken)}",
                    expected="keys that differ from the names of the parameters",
                    actual=repr(min(taken)),
                    remedy="keep it under another key of optimizer.state",
                )
            by_number = {
                number: name_of[id(parameter)]
                for number, parameter in zip(numbers, parameters, strict=True)
            }
            owners = dict(zip(numbers, parameters, strict=True))
            return {
                **{key: named(item) for key, item in packed.items() if key not in TORCH_KEYS},
                "state": {
                    by_number.get(key, key): _as_sharded(owners.get(key), own)
                    for key, own in packed["state"].items()
                },
                "param_groups": [
                    {**group, "params": [by_number[number] for number in group["params"]]}
                    for group in packed["param_groups"]
                ],
            }
        if isinstance(packed, Mapping) and not isinstance(packed, Counter):
            return {key: named(value) for key, value in packed.items()}
        if type(packed) in (list, tuple):
            return type(packed)(map(named, packed))
        return packed

    found = named(packed_state(optimizer, at=at))
    if not isinstance(found, dict):
        raise StateError(
            "The state_dict of an optimizer is not a dict",
            tensor=at,
            expected="a dict",
            actual=type(found).__qualname__,
            remedy="return a dict from its state_dict()",
        )
    return found


def _as_sharded(parameter: torch.Tensor | None, state: Any) -> Any:
    """The state of a parameter that says how it is sharded: tensors of its shape are cut as it
    is."""
    if parameter is None or not hasattr(parameter, "global_shape") or not isinstance(state, dict):
        return state
    return {
        key: carry_layout(parameter, value.detach())
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
        else value
        for key, value in state.items()
    }


class TorchForms:
    """Finds dicts of the form of torch's own optimizers in the state dict of one, and whose they
    are: its own, or those of an optimizer that it wraps."""

    def __init__(self, optimizer: Optimizer) -> None:
        # The optimizer inside a ZeroRedundancyOptimizer has the same parameters in another order.
        inner = () if _is_zero(optimizer) else _inner(optimizer, seen={id(optimizer)})
        self._left: list[Optimizer] = [*inner, optimizer]
        self._all = tuple(self._left)

    def owner(self, packed: Any) -> Optimizer | None:
        """The optimizer whose parameters a dict of torch's form numbers; None for any other."""
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
    """The optimizers among the attributes of one, those in lists, tuples and dicts included."""
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
    return any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__)


def is_own(optimizer: Optimizer, parameter: torch.Tensor) -> bool:
    """Whether this rank keeps the optimizer's state of a parameter."""
    if not _is_zero(optimizer):
        return True
    # Private in torch 2.13, as no public name says which rank has which parameter.
    owner = optimizer._param_to_rank[parameter]  # type: ignore[attr-defined]
    return bool(owner == optimizer.rank)  # type: ignore[attr-defined]


def state_of(optimizer: Optimizer) -> Any:
    """Where an optimizer keeps state by parameter."""
    return optimizer.optim.state if _is_zero(optimizer) else optimizer.state  # type: ignore[attr-defined]


def packed_state(optimizer: Optimizer, *, at: str) -> Any:
    """What the optimizer's state_dict returns. A ZeroRedundancyOptimizer, whose ranks each keep a
    part, need not be consolidated; tensors are ShardedArrays then."""
    if _is_zero(optimizer):
        return _packed_zero(optimizer, at=at)
    with reading_state(optimizer, at=at):
        return optimizer.state_dict()


def _packed_zero(optimizer: Optimizer, *, at: str) -> dict[str, Any]:
    parameters = flat_parameters(optimizer)
    local = state_of(optimizer)
    mine = [p for p in parameters if is_own(optimizer, p)]
    example = next(((p, local[p]) for p in mine if local.get(p)), None)
    if not mine:
        raise StateError(
            "A rank keeps no parameter of a ZeroRedundancyOptimizer",
            tensor=at,
            expected="at least one parameter on each rank",
            actual=f"{len(parameters)} parameters in all",
            remedy="use a plain optimizer for a model this small, or fewer ranks",
        )
    state: dict[int, Any] = {}
    for number, parameter in enumerate(parameters):
        if is_own(optimizer, parameter):
            if local.get(parameter):
                state[number] = {key: _mine(item) for key, item in local[parameter].items()}
        elif example is not None:
            like, entries = example
            state[number] = {
                key: _another_ranks(item, like, parameter, at=f"{at}.state.{key}")
                for key, item in entries.items()
            }
    groups = Optimizer.state_dict(optimizer)["param_groups"]
    return {"state": state, "param_groups": groups}


def _mine(item: Any) -> Any:
    if isinstance(item, torch.Tensor) and item.dim():
        return ShardedArray(item, item.shape, (0,) * item.dim())
    return item


def _another_ranks(item: Any, like: torch.Tensor, parameter: torch.Tensor, *, at: str) -> Any:
    """What another rank's state of a parameter must be, as this rank's own of `like` is `item`."""
    if not isinstance(item, torch.Tensor):
        return item
    if not item.dim():
        return item.clone()  # a step count, equal for all parameters; the save compares it
    if item.shape != like.shape:
        raise StateError(
            "State of this form can't be saved out of a ZeroRedundancyOptimizer",
            tensor=at,
            expected="state of the shape of its parameter, or numbers",
            actual=f"shape {tuple(item.shape)} for a parameter of {tuple(like.shape)}",
            remedy="use fully_shard with the plain optimizer",
        )
    dtype = parameter.dtype if item.dtype == like.dtype else item.dtype
    empty = torch.empty((0, *parameter.shape[1:]), dtype=dtype, device=item.device)
    return ShardedArray(empty, parameter.shape, (0,) * parameter.dim())


def plain_state(state: Any) -> Any:
    """A nested state with its modules and optimizers as dicts of canonical names."""
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
