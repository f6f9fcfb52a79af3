"""Match optimizers of a caller's state against a saved one."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
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
    keeps_state,
    packed_state,
    state_by_parameter,
)
from shardckpt.state.refusals import setting_state
from shardckpt.state.saved_tree import below
from shardckpt.state.sharded_tensors import carry_layout, describes_itself, shards_of
from shardckpt.state.tensor_matching import match_tensor
from shardckpt.state.wrapper_tensors import facts_of
from shardckpt.torch_compat import distribute_locally, is_dtensor

__all__ = ["match_optimizer"]

_OF_THE_DEVICE = ("capturable", "foreach", "fused")
"""The options for the device of an optimizer, which keep their values."""

_RATES = ("lr", "initial_lr")


def match_optimizer(context: MatchContext, optimizer: Optimizer, name: str) -> Finish:
    """Match an optimizer's state by parameter name.

    After the load, the optimizer has exactly the saved state: missing state of a parameter is
    created in the layout of the parameter, and state that was not saved is removed. If a parameter
    does not match the saved one, its state is not loaded, which is noted as a mismatch.
    """
    if name not in context.saved.nodes:
        if context.saved.selected(name):
            context.mismatches.missing.append(name)
        return lambda: optimizer
    context.owners.append(name)
    forms = TorchForms(optimizer)
    torch_forms: list[_TorchForm] = []

    def match(packed: Any, at: str) -> Finish:
        owner = forms.owner(packed)
        node = context.saved.nodes.get(at)
        if owner is not None:
            form = _TorchForm(context, owner, packed, at)
            torch_forms.append(form)
            keys = dict.fromkeys((*packed, *(node if isinstance(node, dict) else ())))
            rest = {
                key: match(packed.get(key), below(at, key)) for key in keys if key not in TORCH_KEYS
            }

            return lambda: {**form.finish(), **{key: item() for key, item in rest.items()}}
        if isinstance(packed, Mapping) and isinstance(node, dict) and node:
            context.used.add(at)
            items = {key: match(packed.get(key), below(at, key)) for key in node}
            return lambda: {key: item() for key, item in items.items()}
        value = context.build(at, like=packed)
        return lambda: packed if value is NOTHING else value

    try:
        loaded = match(packed_state(optimizer, at=name), name)
    finally:
        match = None  # type: ignore[assignment]  # it refers to itself, and so to the state

    def finish() -> Optimizer:
        # New tensors outlive an inference_mode() of the caller.
        with torch.inference_mode(False), setting_state(optimizer, at=name):
            optimizer.load_state_dict(loaded())
            for form in torch_forms:
                form.undo_casts()
        return optimizer

    return finish


class _TorchForm:
    """A dict in the form of torch's optimizers, which is filled with saved state."""

    def __init__(
        self, context: MatchContext, owner: Optimizer, packed: Mapping[str, Any], name: str
    ) -> None:
        self.context = context
        self.owner = owner
        self.packed = packed
        self.name = name
        self.parameters = flat_parameters(owner)
        self.numbers = [number for group in packed["param_groups"] for number in group["params"]]
        groups_name = below(name, "param_groups")
        if groups_name not in context.saved.nodes and not context.saved.selected(groups_name):
            raise StateError(
                "keys= leaves out the parameter groups of an optimizer",
                tensor=groups_name,
                expected="state and param_groups, which name the parameters of the state",
                actual="only a part of the optimizer",
                remedy=f"add {groups_name!r} to keys=, or leave the optimizer out",
            )
        groups = context.build(groups_name)
        self.saved_groups: list[dict[str, Any]] = groups if isinstance(groups, list) else []
        self.group_of = self._saved_names()
        self.names = self._best_names()
        self.groups = self._match_groups()
        self.filled: dict[int, Any] = {}  # by number
        self._match_state()

    def finish(self) -> dict[str, Any]:
        """Return the argument of load_state_dict, after the reads."""
        shared: dict[tuple[int, int], torch.Tensor] = {}
        groups = [
            {**group, **_options(group, saved, shared), "params": group["params"]}
            for group, saved in zip(self.packed["param_groups"], self.groups, strict=True)
        ]
        for group, names in zip(groups, self._param_names(), strict=True):
            if names is not None:
                group["param_names"] = names
        number_of = dict(zip(self.names, self.numbers, strict=True))
        order = [number_of.get(key, key) for key in self.saved_state]
        state = {**self.filled, **self.other_state}
        listed = set(order)
        order += [key for key in state if key not in listed]
        return {
            "state": {key: state[key] for key in order if key in state},
            "param_groups": groups,
        }

    def undo_casts(self) -> None:
        """Restore the saved dtypes of state that Optimizer.load_state_dict has cast.

        It casts state to the parameter's dtype, such as float32 moments of bfloat16 parameters.
        """
        state = state_by_parameter(self.owner)
        for number, parameter in zip(self.numbers, self.parameters, strict=True):
            saved, now = self.filled.get(number), state.get(parameter)
            for key, value in saved.items() if isinstance(saved, dict) else ():
                if isinstance(now, dict) and key in now and key != "step":
                    now[key] = _without_casts(now[key], value)

    def _saved_names(self) -> dict[str, dict[str, Any]]:
        """Return the options of the group of each saved parameter, by the name after renaming."""
        prefix = below(self.name, "state.")
        renamed = self.context.saved.renamed
        return {
            renamed(f"{prefix}{fqn}").removeprefix(prefix): group
            for group in self.saved_groups
            for fqn in group.get("params", ())
        }

    def _best_names(self) -> list[str]:
        """Return the names of the parameters. Saved names come before other possible
        names.
        """
        best: dict[int, str] = {}
        most = -1
        paths = self.context.parameter_names.paths
        for candidate in self.context.parameter_names.candidates(self.parameters, at=self.name):
            count = len(self.group_of.keys() & candidate.values())
            if count > most:
                best, most = candidate, count
            if count == len(self.group_of):
                break
        names = [best[id(parameter)] for parameter in self.parameters]
        if 0 < most < len(names):
            # A tied parameter has several names. The order of the modules decides which is saved.
            free = self.group_of.keys() - names
            names = [
                name
                if name in self.group_of
                else next(filter(free.__contains__, paths(id(parameter))), name)
                for name, parameter in zip(names, self.parameters, strict=True)
            ]
        if most == 0 and len(self.group_of) == len(names) > 0:
            # The parameters were saved as those of a submodule, or of a module that contains it.
            old, new = _common_path(self.group_of), _common_path(names)
            moved = [f"{old}{name[len(new) :]}" for name in names]
            nested = f".{old}".endswith(f".{new}") or f".{new}".endswith(f".{old}")
            if nested and set(moved) == self.group_of.keys():
                return moved
        return names

    def _names_by_group(self) -> list[list[str]]:
        names = iter(self.names)
        return [[next(names) for _ in group["params"]] for group in self.packed["param_groups"]]

    def _match_groups(self) -> list[dict[str, Any]]:
        """Return the saved options for each parameter group."""
        prefix, mismatches = below(self.name, "param_groups"), self.context.mismatches
        local = set(self.names)
        missing, unexpected = local - self.group_of.keys(), self.group_of.keys() - local
        mismatches.missing += [f"{prefix}.{fqn}" for fqn in sorted(missing)]
        mismatches.unexpected += [f"{prefix}.{fqn}" for fqn in sorted(unexpected)]
        groups = []
        for number, names in enumerate(self._names_by_group()):
            saved = [self.group_of[fqn] for fqn in names if fqn in self.group_of]
            if any(other is not saved[0] for other in saved):
                raise StateError(
                    "A parameter group holds parameters that were saved in different groups",
                    tensor=f"{prefix}.{number}",
                    expected="parameters grouped as they were when saved",
                    actual=f"{len({id(other) for other in saved})} saved groups in one",
                    remedy="create the optimizer with the same parameter groups",
                )
            groups.append(saved[0] if saved else {})
        if isinstance(self.owner, torch.optim.LBFGS) and not missing | unexpected:
            self._check_order(prefix)
        return groups

    def _check_order(self, prefix: str) -> None:
        saved = list(self.group_of)
        if saved != self.names:
            raise StateError(
                "The parameters of LBFGS must have the same order as when they were saved",
                tensor=prefix,
                expected=", ".join(saved)[:500],
                actual=", ".join(self.names)[:500],
                remedy="create the optimizer with the parameters in this order",
            )

    def _param_names(self) -> list[list[str] | None]:
        """Return torch's own parameter names of each group, if there are any."""
        saved = {
            fqn: name
            for fqn, group in self.group_of.items()
            for other, name in zip(group["params"], group.get("param_names", ()), strict=False)
            if fqn == other
        }
        return [
            group.get("param_names")
            or ([saved[fqn] for fqn in names] if all(fqn in saved for fqn in names) else None)
            for group, names in zip(
                self.packed["param_groups"], self._names_by_group(), strict=True
            )
        ]

    def _match_state(self) -> None:
        context, prefix = self.context, below(self.name, "state")
        context.used.add(prefix)
        node = context.saved.nodes.get(prefix)
        self.saved_state = node if isinstance(node, dict) else {}
        self.other_state = {
            key: context.build(below(prefix, key), like=self.packed["state"].get(key))
            for key in self.saved_state
            if key not in self.group_of and key not in self.names
        }
        for number, fqn, parameter in zip(self.numbers, self.names, self.parameters, strict=True):
            if not keeps_state(self.owner, parameter):
                context.used.update(
                    n for n in context.saved.leaves if n.startswith(f"{prefix}.{fqn}.")
                )
                continue
            current = self.packed["state"].get(number)
            if current is None:
                current = _first_state(self.owner, parameter, self.saved_state.get(fqn))
            state = current
            if fqn in self.group_of:
                state = self._state_of(parameter, current or {}, below(prefix, fqn))
            if state is not None:
                self.filled[number] = state

    def _state_of(self, parameter: torch.Tensor, current: Any, name: str) -> Any:
        """Return the saved state of one parameter, whose tensors later reads fill.

        Returns None if the parameter had no state. Returns `current`, and notes the mismatches, if
        the saved state does not fit.
        """
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
                remedy="materialize the module first (to_empty), then create the optimizer",
            )
        saved = self._saved_parameter(parameter)
        if saved is not None and not context.fits(saved, _global_form(parameter, name)):
            self._skip(node, parameter, saved, name)
            return current
        if not isinstance(node, dict):
            return context.build(name, like=current)

        def new(_name: str, _source: str, entry: TensorEntry) -> tuple[torch.Tensor, bool]:
            tensor = self._like(parameter, entry, saved)
            if tensor.dtype != DTYPES[entry.dtype]:
                context.cast.append((_name, str(DTYPES[entry.dtype]), str(tensor.dtype)))
            return tensor, True

        targets = self._targets(node, parameter, current, saved, name)
        if targets is None:
            context.used.update(below(name, key) for key in node)
            return current
        return {
            key: match_tensor(context, targets[key], below(name, key))
            if key in targets
            else context.build(below(name, key), like=current.get(key), new=new)
            for key in node
        }

    def _targets(
        self,
        node: dict[str, Any],
        parameter: torch.Tensor,
        current: Any,
        saved: TensorEntry | None,
        name: str,
    ) -> dict[str, torch.Tensor] | None:
        """Return the tensors and wrapper tensors to fill with a parameter's saved state.

        Returns None, and notes the mismatches, if one of them does not fit.
        """
        context = self.context
        targets: dict[str, torch.Tensor] = {}
        mismatched = False
        for key, ref in node.items():
            at = below(name, key)
            if isinstance(ref, TensorRef) and ref.ref_type == "tensor":
                entry = context.saved.manifest.tensors[ref.name]
                tensor = _dense(current.get(key))
                form = _global_form(tensor, at) if isinstance(tensor, torch.Tensor) else None
                if form is None or form.shape != entry.shape:
                    tensor = self._like(parameter, entry, saved)
                    form = _global_form(tensor, at)
                targets[key] = tensor
                if not context.fits(entry, form):
                    context.agrees(entry, form, at)
                    mismatched = True
            elif (facts := facts_of(ref)) is not None:
                if not isinstance(current.get(key), torch.Tensor):
                    raise _no_class(at, facts)
                targets[key] = current[key]
        return None if mismatched else targets

    def _saved_parameter(self, parameter: torch.Tensor) -> TensorEntry | None:
        """Return the saved entry of the parameter itself, if the checkpoint has it under the same
        name.
        """
        saved = self.context.saved
        for at in self.context.parameter_names.paths(id(parameter)):
            ref = saved.nodes.get(at)
            name = ref.name if isinstance(ref, TensorRef) and ref.ref_type == "tensor" else at
            if name in saved.manifest.tensors:
                return saved.manifest.tensors[name]
        return None

    def _skip(self, node: Any, parameter: torch.Tensor, saved: TensorEntry, name: str) -> None:
        """Note the saved state of a mismatched parameter.

        Tensors of its shape are mismatches in shape or dtype. Other entries stay unused, and the
        report lists them.
        """
        for key, ref in node.items() if isinstance(node, dict) else ():
            if not (isinstance(ref, TensorRef) and ref.ref_type == "tensor"):
                continue
            entry = self.context.saved.manifest.tensors[ref.name]
            target = _global_form(parameter, name)
            if entry.shape == saved.shape and not self.context.fits(entry, target):
                self.context.used.add(below(name, key))
                self.context.agrees(entry, target, below(name, key))

    def _like(
        self, parameter: torch.Tensor, entry: TensorEntry, saved: TensorEntry | None
    ) -> torch.Tensor:
        """Create an empty tensor for saved state, sharded as the parameter if it has its shape.

        With dtype="cast", state that had the dtype of the saved parameter gets the dtype of the
        parameter.
        """
        dtype = DTYPES[entry.dtype]
        if (
            self.context.may_cast
            and entry.shape
            and dtype.is_floating_point
            and (saved is None or saved.dtype == entry.dtype)
        ):
            dtype = parameter.dtype
        if tuple(_global_form(parameter, self.name).shape) == entry.shape:
            new = torch.zeros_like if hasattr(parameter, "global_shape") else torch.empty_like
            return carry_layout(parameter, new(parameter, dtype=dtype, requires_grad=False))
        if not entry.shape:
            return torch.empty((), dtype=dtype, device="cpu")
        if not is_dtensor(parameter):
            return torch.empty(entry.shape, dtype=dtype, device=parameter.device)
        from torch.distributed.tensor import Replicate

        empty = torch.empty(entry.shape, dtype=dtype, device=parameter.to_local().device)
        placements = [
            placement if _is_cut_alike(placement, parameter, empty) else Replicate()
            for placement in parameter.placements
        ]
        return distribute_locally(empty, parameter.device_mesh, placements)


def _is_cut_alike(placement: Any, parameter: torch.Tensor, state: torch.Tensor) -> bool:
    """Whether a placement of the parameter shards state of another shape into the same rows."""
    return (
        state.dim() == parameter.dim()
        and placement.is_shard()
        and state.shape[placement.dim] == parameter.shape[placement.dim]
    )


def _common_path(names: Iterable[str]) -> str:
    """Return the common beginning of the names, up to a dot."""
    first, last = min(names), max(names)
    while not last.startswith(first):
        first = first[: first.rstrip(".").rfind(".") + 1]
    return first if first.endswith(".") else first[: first.rfind(".") + 1]


def _global_form(tensor: torch.Tensor, name: str) -> Any:
    """Return the Shards of a tensor that describes them, otherwise the tensor itself.

    The shape of either is the global shape.
    """
    return shards_of(tensor, name=name) if describes_itself(tensor) else tensor


def _first_state(optimizer: Any, parameter: torch.Tensor, node: Any) -> dict[str, Any] | None:
    """Create wrapper tensors for an optimizer without state, as torchao does in the first step.

    Returns None for all other optimizers. The method is private in torchao 0.18.
    """
    new = getattr(optimizer, "_new_buffer", None)
    if not callable(new) or not isinstance(node, dict):
        return None
    state: dict[str, Any] = {}
    for key, item in node.items():
        if (facts := facts_of(item)) is not None:
            context = facts.get("context")
            signed = context[0] if isinstance(context, list) and context else True
            state[key] = new(parameter, bool(signed))
    return state or None


def _no_class(name: str, facts: dict[str, Any]) -> StateError:
    return StateError(
        "Saved optimizer state in a wrapper tensor needs an existing tensor to load into",
        tensor=name,
        expected=f"state that holds a {facts.get('class')}",
        actual="an optimizer without state",
        remedy="take one step first, which creates the state; a load never imports a class that a "
        "checkpoint names",
    )


def _dense(value: Any) -> Any:
    """Return the tensor in a ShardedArray of a full tensor. Any other value is returned
    unchanged.
    """
    local = getattr(value, "local", None)
    return (
        local if isinstance(local, torch.Tensor) and not isinstance(value, torch.Tensor) else value
    )


def _options(
    current: Mapping[str, Any],
    saved: Mapping[str, Any],
    shared: dict[tuple[int, int], torch.Tensor],
) -> dict[str, Any]:
    """Return the saved options of a group, as copies, on the devices of the current ones."""
    options: dict[str, Any] = {}
    for key, value in saved.items():
        value_now = current.get(key)
        if key in ("params", "param_names", *_OF_THE_DEVICE):
            continue
        if (
            key in _RATES
            and isinstance(value_now, torch.Tensor)
            and isinstance(value, (int, float))
        ):
            options[key] = torch.full_like(value_now, value)
        elif (
            key in _RATES
            and isinstance(value_now, (int, float))
            and isinstance(value, torch.Tensor)
        ):
            options[key] = value.item()
        elif isinstance(value, torch.Tensor):
            # Groups share a tensor only if they share it in the optimizer and in the checkpoint.
            is_tensor = isinstance(value_now, torch.Tensor)
            tied = (id(value), id(value_now) if is_tensor else id(current))
            device = value_now.device if isinstance(value_now, torch.Tensor) else value.device
            shared.setdefault(tied, value.to(device, copy=True))
            options[key] = shared[tied]
        else:
            options[key] = copy.deepcopy(value)
    return options


def _without_casts(now: Any, saved: Any) -> Any:
    """Return `now`, with the tensors of `saved` in place of those that were cast."""
    if isinstance(saved, torch.Tensor):
        differs = isinstance(now, torch.Tensor) and now.dtype != saved.dtype
        return saved.to(now.device) if differs else now
    if type(saved) is dict and type(now) is dict and saved.keys() == now.keys():
        return {key: _without_casts(now[key], value) for key, value in saved.items()}
    if type(saved) is deque:  # torch rebuilds it without maxlen
        return saved
    if type(saved) in (list, tuple) and type(now) is type(saved) and len(now) == len(saved):
        return type(saved)(map(_without_casts, now, saved))
    return saved if isinstance(saved, str) else now
