"""Matching optimizers of a caller's state against a saved one."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from shardckpt.errors import StateError
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.entries import TensorEntry
from shardckpt.format.typed_json import TensorRef
from shardckpt.state.match_context import Finish, MatchContext
from shardckpt.state.materialize import NOTHING
from shardckpt.state.optimizer_state import (
    TORCH_KEYS,
    TorchForms,
    flat_parameters,
    is_own,
    packed_state,
    state_of,
)
from shardckpt.state.refusals import setting_state
from shardckpt.state.saved_tree import below
from shardckpt.state.sharded_tensors import carry_layout, describes_itself, shards_of
from shardckpt.state.tensor_matching import match_tensor
from shardckpt.state.wrapper_tensors import facts_of

__all__ = ["match_optimizer"]

_OF_THE_DEVICE = ("capturable", "foreach", "fused")
"""Options that say how an optimizer works on its device: they stay as the program set them."""

_RATES = ("lr", "initial_lr")


def match_optimizer(context: MatchContext, optimizer: Optimizer, name: str) -> Finish:
    """Fill an optimizer's state by parameter name, whatever state it has had so far.

    Afterwards its state is what was saved: state that a parameter had not yet is made like
    the parameter, state that was not saved is dropped. Of a parameter that does not fit the
    saved one no state is loaded; the mismatches say so.
    """
    if name not in context.saved.nodes:
        if context.saved.selected(name):
            context.mismatches.missing.append(name)
        return lambda: optimizer
    context.owners.append(name)
    forms = TorchForms(optimizer)
    own: list[_TorchForm] = []

    def match(packed: Any, place: str) -> Finish:
        owner = forms.owner(packed)
        node = context.saved.nodes.get(place)
        if owner is not None:
            form = _TorchForm(context, owner, packed, place)
            own.append(form)
            keys = dict.fromkeys((*packed, *(node if isinstance(node, dict) else ())))
            rest = {
                key: match(packed.get(key), below(place, key))
                for key in keys
                if key not in TORCH_KEYS
            }

            def whole() -> Any:
                return {**form.finish(), **{key: part() for key, part in rest.items()}}

            return whole
        if isinstance(packed, Mapping) and isinstance(node, dict) and node:
            context.used.add(place)
            parts = {key: match(packed.get(key), below(place, key)) for key in node}
            return lambda: {key: part() for key, part in parts.items()}
        value = context.build(place, like=packed)
        return lambda: packed if value is NOTHING else value

    loaded = match(packed_state(optimizer, at=name), name)

    def finish() -> Optimizer:
        # New tensors outlive an inference_mode() of the caller.
        with torch.inference_mode(False), setting_state(optimizer, at=name):
            optimizer.load_state_dict(loaded())
            for form in own:
                form.undo_casts()
        return optimizer

    return finish


class _TorchForm:
    """A dict of the form of torch's optimizers, to be filled with saved state."""

    def __init__(
        self, context: MatchContext, owner: Optimizer, packed: Mapping[str, Any], name: str
    ) -> None:
        self.context = context
        self.owner = owner
        self.packed = packed
        self.name = name
        self.parameters = flat_parameters(owner)
        self.numbers = [number for group in packed["param_groups"] for number in group["params"]]
        groups = context.build(below(name, "param_groups"))
        self.saved_groups: list[dict[str, Any]] = groups if isinstance(groups, list) else []
        self.group_of = self._saved_names()
        self.names = self._best_names()
        self.groups = self._match_groups()
        self.filled: dict[int, Any] = {}  # by number
        self._match_state()

    def finish(self) -> dict[str, Any]:
        """What load_state_dict takes, once the tensors have been read."""
        shared: dict[tuple[int, int], torch.Tensor] = {}
        groups = [
            {**own, **_options(own, saved, shared), "params": own["params"]}
            for own, saved in zip(self.packed["param_groups"], self.groups, strict=True)
        ]
        for group, names in zip(groups, self._param_names(), strict=True):
            if names is not None:
                group["param_names"] = names
        number_of = dict(zip(self.names, self.numbers, strict=True))
        order = [number_of.get(key, key) for key in self.saved_state]
        state = {**self.filled, **self.beside}
        order += [key for key in state if key not in set(order)]
        return {
            "state": {key: state[key] for key in order if key in state},
            "param_groups": groups,
        }

    def undo_casts(self) -> None:
        """Put back what Optimizer.load_state_dict cast to the parameter's dtype: what was saved
        wins, such as float32 moments of bfloat16 parameters."""
        state = state_of(self.owner)
        for number, parameter in zip(self.numbers, self.parameters, strict=True):
            saved, now = self.filled.get(number), state.get(parameter)
            for key, value in saved.items() if isinstance(saved, dict) else ():
                if isinstance(now, dict) and key in now and key != "step":
                    now[key] = _without_casts(now[key], value)

    def _saved_names(self) -> dict[str, dict[str, Any]]:
        """Name of a saved parameter, as renamed -> the options of its group."""
        prefix = below(self.name, "state.")
        renamed = self.context.saved.renamed
        return {
            renamed(f"{prefix}{fqn}").removeprefix(prefix): group
            for group in self.saved_groups
            for fqn in group.get("params", ())
        }

    def _best_names(self) -> list[str]:
        """The names of the parameters, as far as possible those that were saved."""
        best: dict[int, str] = {}
        agreeing = -1
        for candidate in self.context.parameter_names.candidates(self.parameters, at=self.name):
            count = len(self.group_of.keys() & candidate.values())
            if count > agreeing:
                best, agreeing = candidate, count
            if count == len(self.group_of):
                break
        names = [best[id(parameter)] for parameter in self.parameters]
        if agreeing == 0 and len(self.group_of) == len(names) > 0:
            # Saved as parameters of a part of this module, or of a module that holds it.
            saved, own = _common_path(self.group_of), _common_path(names)
            moved = [f"{saved}{name[len(own) :]}" for name in names]
            nested = f".{saved}".endswith(f".{own}") or f".{own}".endswith(f".{saved}")
            if nested and set(moved) == self.group_of.keys():
                return moved
        return names

    def _names_by_group(self) -> list[list[str]]:
        names = iter(self.names)
        return [[next(names) for _ in group["params"]] for group in self.packed["param_groups"]]

    def _match_groups(self) -> list[dict[str, Any]]:
        """For each parameter group the options that were saved for its parameters."""
        place, mismatches = below(self.name, "param_groups"), self.context.mismatches
        local = set(self.names)
        missing, unexpected = local - self.group_of.keys(), self.group_of.keys() - local
        mismatches.missing += [f"{place}.{fqn}" for fqn in sorted(missing)]
        mismatches.unexpected += [f"{place}.{fqn}" for fqn in sorted(unexpected)]
        groups = []
        for number, names in enumerate(self._names_by_group()):
            found = [self.group_of[fqn] for fqn in names if fqn in self.group_of]
            if any(other is not found[0] for other in found):
                raise StateError(
                    "A parameter group holds parameters that were saved in different groups",
                    tensor=f"{place}.{number}",
                    expected="parameters grouped as they were when saved",
                    actual=f"{len({id(other) for other in found})} saved groups in one",
                    remedy="create the optimizer with the same parameter groups",
                )
            groups.append(found[0] if found else {})
        if isinstance(self.owner, torch.optim.LBFGS) and not missing | unexpected:
            self._check_order(place)
        return groups

    def _check_order(self, place: str) -> None:
        saved = list(self.group_of)
        if saved != self.names:
            raise StateError(
                "The history of LBFGS needs its parameters in the order in which it was saved",
                tensor=place,
                expected=", ".join(saved)[:500],
                actual=", ".join(self.names)[:500],
                remedy="hand the parameters over in this order",
            )

    def _param_names(self) -> list[list[str] | None]:
        """For each group, torch's own names of its parameters, where it has any."""
        saved = {
            fqn: name
            for fqn, group in self.group_of.items()
            for own, name in zip(group["params"], group.get("param_names", ()), strict=False)
            if fqn == own
        }
        return [
            group.get("param_names")
            or ([saved[fqn] for fqn in names] if all(fqn in saved for fqn in names) else None)
            for group, names in zip(
                self.packed["param_groups"], self._names_by_group(), strict=True
            )
        ]

    def _match_state(self) -> None:
        context, place = self.context, below(self.name, "state")
        context.used.add(place)
        node = context.saved.nodes.get(place)
        self.saved_state = node if isinstance(node, dict) else {}
        self.beside = {
            key: context.build(below(place, key), like=self.packed["state"].get(key))
            for key in self.saved_state
            if key not in self.group_of and key not in self.names
        }
        for number, fqn, parameter in zip(self.numbers, self.names, self.parameters, strict=True):
            if not is_own(self.owner, parameter):
                context.used.update(
                    n for n in context.saved.leaves if n.startswith(f"{place}.{fqn}.")
                )
                continue
            mine = self.packed["state"].get(number)
            if mine is None:
                mine = _first_state(self.owner, parameter, self.saved_state.get(fqn))
            state = mine
            if fqn in self.group_of:
                state = self._state_of(parameter, mine or {}, below(place, fqn))
            if state is not None:
                self.filled[number] = state

    def _state_of(self, parameter: torch.Tensor, mine: Any, name: str) -> Any:
        """The saved state of one parameter, its tensors to be read; None where there was none;
        `mine`, with the mismatches noted, where it does not fit."""
        context = self.context
        node = context.saved.nodes.get(name)
        if node is None:
            return None
        context.used.add(name)
        if parameter.is_meta:
            raise StateError(
                "An optimizer over parameters on the meta device can't be loaded",
                tensor=name,
                expected="parameters with memory",
                actual="device meta",
                remedy="materialise the module first (to_empty), then create the optimizer",
            )
        saved = self._saved_parameter(parameter)
        if saved is not None and not context.fits(saved, _read_out(parameter, name)):
            self._skip(node, parameter, saved, name)
            return mine
        if not isinstance(node, dict):
            return context.build(name, like=mine)

        def new(_name: str, _source: str, entry: TensorEntry) -> tuple[torch.Tensor, bool]:
            tensor = self._like(parameter, entry, saved)
            if tensor.dtype != DTYPES[entry.dtype]:
                context.cast.append((_name, str(DTYPES[entry.dtype]), str(tensor.dtype)))
            return tensor, True

        targets: dict[str, torch.Tensor] = {}
        wrappers: dict[str, torch.Tensor] = {}
        for key, ref in node.items():
            if isinstance(ref, TensorRef) and ref.kind == "tensor":
                entry = context.saved.manifest.tensors[ref.name]
                own = _dense(mine.get(key))
                place = below(name, key)
                fits = (
                    isinstance(own, torch.Tensor)
                    and tuple(_read_out(own, place).shape) == entry.shape
                )
                targets[key] = own if fits else self._like(parameter, entry, saved)
                if not context.fits(entry, _read_out(targets[key], place)):
                    context.agrees(entry, _read_out(targets[key], place), place)
            elif (facts := facts_of(ref)) is not None:
                if not isinstance(mine.get(key), torch.Tensor):
                    raise _no_class(below(name, key), facts)
                wrappers[key] = mine[key]
        if any(not self._fits(node[key], tensor) for key, tensor in targets.items()):
            context.used.update(below(name, key) for key in node)
            return mine
        return {
            key: match_tensor(context, {**targets, **wrappers}[key], below(name, key))
            if key in targets or key in wrappers
            else context.build(below(name, key), like=mine.get(key), new=new)
            for key in node
        }

    def _fits(self, ref: TensorRef, tensor: torch.Tensor) -> bool:
        entry = self.context.saved.manifest.tensors[ref.name]
        return self.context.fits(entry, _read_out(tensor, ref.name))

    def _saved_parameter(self, parameter: torch.Tensor) -> TensorEntry | None:
        """The entry of the parameter itself, where the checkpoint has it under the same name."""
        saved = self.context.saved
        for place in self.context.parameter_names.places(id(parameter)):
            ref = saved.nodes.get(place)
            name = ref.name if isinstance(ref, TensorRef) and ref.kind == "tensor" else place
            if name in saved.manifest.tensors:
                return saved.manifest.tensors[name]
        return None

    def _skip(self, node: Any, parameter: torch.Tensor, saved: TensorEntry, name: str) -> None:
        """Note the saved state of a parameter that does not fit: tensors of its shape by shape or
        dtype; all else stays unused, which the report says."""
        for key, ref in node.items() if isinstance(node, dict) else ():
            if not (isinstance(ref, TensorRef) and ref.kind == "tensor"):
                continue
            entry = self.context.saved.manifest.tensors[ref.name]
            own = _read_out(parameter, name)
            if entry.shape == saved.shape and not self.context.fits(entry, own):
                self.context.used.add(below(name, key))
                self.context.agrees(entry, own, below(name, key))

    def _like(
        self, parameter: torch.Tensor, entry: TensorEntry, saved: TensorEntry | None
    ) -> torch.Tensor:
        """An empty tensor for saved state: sharded as the parameter if of its shape. With
        dtype="cast", state that had the saved parameter's dtype gets the parameter's."""
        dtype = DTYPES[entry.dtype]
        if (
            self.context.may_cast
            and entry.shape
            and dtype.is_floating_point
            and (saved is None or saved.dtype == entry.dtype)
        ):
            dtype = parameter.dtype
        if tuple(_read_out(parameter, self.name).shape) == entry.shape:
            new = torch.zeros_like if hasattr(parameter, "global_shape") else torch.empty_like
            return carry_layout(parameter, new(parameter, dtype=dtype, requires_grad=False))
        if not entry.shape:
            return torch.empty((), dtype=dtype, device="cpu")
        if not isinstance(parameter, DTensor):
            return torch.empty(entry.shape, dtype=dtype, device=parameter.device)
        empty = torch.empty(entry.shape, dtype=dtype, device=parameter.to_local().device)
        placements = [
            placement if _is_cut_alike(placement, parameter, empty) else Replicate()
            for placement in parameter.placements
        ]
        return distribute_tensor(empty, parameter.device_mesh, placements, src_data_rank=None)


def _is_cut_alike(placement: Any, parameter: torch.Tensor, state: torch.Tensor) -> bool:
    """Whether a placement of the parameter cuts state of another shape into the same rows."""
    return (
        state.dim() == parameter.dim()
        and isinstance(placement, Shard)
        and state.shape[placement.dim] == parameter.shape[placement.dim]
    )


def _common_path(names: Iterable[str]) -> str:
    """The path, up to a dot, with which all of the names begin."""
    first, last = min(names), max(names)
    while not last.startswith(first):
        first = first[: first.rstrip(".").rfind(".") + 1]
    return first if first.endswith(".") else first[: first.rfind(".") + 1]


def _read_out(tensor: torch.Tensor, name: str) -> Any:
    """A tensor that says how it is sharded as its shards, whose shape is the global one."""
    return shards_of(tensor, name=name) if describes_itself(tensor) else tensor


def _first_state(optimizer: Any, parameter: torch.Tensor, node: Any) -> dict[str, Any] | None:
    """Wrapper tensors of an optimizer without state, as torchao's optimizers make them at their
    first step; None of all others. The method is private in torchao 0.18."""
    new = getattr(optimizer, "_new_buffer", None)
    if not callable(new) or not isinstance(node, dict):
        return None
    found: dict[str, Any] = {}
    for key, item in node.items():
        if (facts := facts_of(item)) is not None:
            context = facts.get("context")
            signed = context[0] if isinstance(context, list) and context else True
            found[key] = new(parameter, bool(signed))
    return found or None


def _no_class(name: str, facts: dict[str, Any]) -> StateError:
    return StateError(
        "Optimizer state of a tensor subclass has no tensor to be loaded into",
        tensor=name,
        expected=f"state that holds a {facts.get('class')}",
        actual="an optimizer without state",
        remedy="take one step first, which makes the state; all of it is replaced by what was "
        "saved. Nothing that a checkpoint names is imported",
    )


def _dense(value: Any) -> Any:
    """The tensor that a ShardedArray of a whole tensor holds; anything else as it is."""
    local = getattr(value, "local", None)
    return (
        local if isinstance(local, torch.Tensor) and not isinstance(value, torch.Tensor) else value
    )


def _options(
    own: Mapping[str, Any], saved: Mapping[str, Any], shared: dict[tuple[int, int], torch.Tensor]
) -> dict[str, Any]:
    """The options of a group: the saved ones, as copies of its own."""
    options: dict[str, Any] = {}
    for key, value in saved.items():
        mine = own.get(key)
        if key in ("params", "param_names", *_OF_THE_DEVICE):
            continue
        if key in _RATES and isinstance(mine, torch.Tensor) and isinstance(value, (int, float)):
            options[key] = torch.full_like(mine, value)
        elif key in _RATES and isinstance(mine, (int, float)) and isinstance(value, torch.Tensor):
            options[key] = value.item()
        elif isinstance(value, torch.Tensor):
            # One tensor for several groups only where it is one in the optimizer and was one.
            tied = (id(value), id(mine) if isinstance(mine, torch.Tensor) else id(own))
            device = mine.device if isinstance(mine, torch.Tensor) else value.device
            shared.setdefault(tied, value.to(device, copy=True))
            options[key] = shared[tied]
        else:
            options[key] = copy.deepcopy(value)
    return options


def _without_casts(now: Any, saved: Any) -> Any:
    """`now`, with what differs in dtype from `saved` replaced by that."""
    if isinstance(saved, torch.Tensor):
        differs = isinstance(now, torch.Tensor) and now.dtype != saved.dtype
        return saved.to(now.device) if differs else now
    if type(saved) is dict and type(now) is dict and saved.keys() == now.keys():
        return {key: _without_casts(now[key], value) for key, value in saved.items()}
    if type(saved) is deque:  # torch makes it again without its length
        return saved
    if type(saved) in (list, tuple) and type(now) is type(saved) and len(now) == len(saved):
        return type(saved)(map(_without_casts, now, saved))
    return saved if isinstance(saved, str) else now
