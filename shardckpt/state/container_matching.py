"""Matching containers, values, markers and stateful objects of a caller's state."""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import MutableMapping
from typing import Any, TypeGuard

import torch

from shardckpt.errors import StateError
from shardckpt.format.typed_json import TensorRef, record_of
from shardckpt.state.markers import FromRank0, PerRank, Union
from shardckpt.state.match_context import Finish, Match, MatchContext
from shardckpt.state.materialize import NOTHING, Builder
from shardckpt.state.module_state import modules_in
from shardckpt.state.refusals import reading_state, setting_state
from shardckpt.state.saved_tree import below

__all__ = [
    "is_per_rank",
    "match_from_rank0",
    "match_mapping",
    "match_per_rank",
    "match_record",
    "match_sequence",
    "match_stateful",
    "match_union",
    "match_value",
]


def match_mapping(context: MatchContext, template: Any, name: str, match: Match) -> Finish:
    """Match each item of a dict. Saved entries for other keys stay unused."""
    if not isinstance(template, (MutableMapping, types.MappingProxyType)):
        raise StateError(
            "A read-only mapping can't be loaded into",
            tensor=name,
            expected="a dict, another mutable mapping, or a MappingProxyType",
            actual=f"{type(template).__module__}.{type(template).__qualname__}",
            remedy="pass dict(...) of it",
        )
    items: dict[Any, Finish] = {}
    for key, value in template.items():
        inner = f"{name}.{key}" if name else str(key)
        if isinstance(value, torch.Tensor) and context.fill_in_place(value, inner):
            continue  # the read fills it, as it does for most tensors
        items[key] = match(context, value, inner)

    def finish() -> Any:
        values = {key: item() for key, item in items.items()}
        changed = {key: value for key, value in values.items() if value is not template[key]}
        if isinstance(template, types.MappingProxyType):
            return types.MappingProxyType({**template, **changed}) if changed else template
        for key, value in changed.items():
            template[key] = value
        return template

    return finish


def match_sequence(context: MatchContext, template: Any, name: str, match: Match) -> Finish:
    """Match each item of a list, tuple or deque that holds tensors."""
    items = [match(context, value, below(name, index)) for index, value in enumerate(template)]

    def finish() -> Any:
        values = [item() for item in items]
        if isinstance(template, list):
            template[:] = values
            return template
        if isinstance(template, deque):
            template.clear()
            template.extend(values)
            return template
        return template._make(values) if hasattr(template, "_fields") else tuple(values)

    return finish


def match_record(context: MatchContext, template: Any, name: str, match: Match) -> Finish:
    """Match each field of a dataclass or a similar object.

    A frozen object is replaced by a copy, which `copy.copy` makes. No other code of its class is
    called.
    """
    fields = match_mapping(context, dict(record_of(template) or {}), name, match)

    def finish() -> Any:
        target, values = template, fields()
        changed = {k: v for k, v in values.items() if v is not getattr(template, k, values)}
        try:
            for key, value in changed.items():
                setattr(target, key, value)
        except AttributeError:  # frozen
            target = copy.copy(template)
            for key, value in changed.items():
                object.__setattr__(target, key, value)
        return target

    return finish


def match_value(context: MatchContext, template: Any, name: str) -> Finish:
    """Replace a value by the saved one. An empty dict or list receives all entries below its
    name.
    """
    value = context.build(name)
    if value is NOTHING:
        return lambda: template
    named = getattr(template, "_fields", None) if isinstance(template, tuple) else None
    if named is not None and isinstance(value, tuple) and len(value) != len(named):
        context.mismatches.wrong_shape.append((name, list(named), f"{len(value)} items"))
        return lambda: template

    def finish() -> Any:
        # Only a plain dict, as Counter.update would add the counts.
        if isinstance(template, dict) and type(value) is dict:
            template.update(value)
            return template
        if isinstance(template, list) and isinstance(value, list):
            template[:] = value
            return template
        if named is not None and isinstance(value, tuple):
            return template._make(value)
        return value

    return finish


def match_stateful(context: MatchContext, template: Any, name: str) -> Finish:
    """Pass the saved value to an object's load_state_dict.

    Tensors of its state_dict are filled in place if shape and dtype match.
    """
    with reading_state(template, at=name):
        own = template.state_dict()
    context.parameter_names.add(modules_in(own, at=name))
    value = context.build(name, like=own)
    if value is NOTHING:
        return lambda: template

    def finish() -> Any:
        with setting_state(template, at=name):
            template.load_state_dict(value)
        return template

    return finish


def match_from_rank0(
    context: MatchContext, template: FromRank0, name: str, *, has_tensors: bool, match: Match
) -> Finish:
    """Match the value in a FromRank0 marker. A value without tensors is replaced by that of
    rank 0.
    """
    if has_tensors:
        inner = match(context, template.value, name)
        return lambda: FromRank0(inner())
    value = context.build(name)
    return lambda: template if value is NOTHING else FromRank0(value)


def match_union(context: MatchContext, template: Union, name: str, match: Match) -> Finish:
    """Match the dict in a Union marker."""
    inner = match(context, template.value, name)
    return lambda: Union(inner())


def is_per_rank(node: Any) -> TypeGuard[TensorRef]:
    """Whether a saved node refers to the values of a PerRank marker."""
    return isinstance(node, TensorRef) and node.ref_type == "per_rank"


def match_per_rank(context: MatchContext, template: PerRank, name: str, match: Match) -> Finish:
    """Match this rank's own value. If the number of ranks differs, on_resize decides."""
    node = context.saved.nodes.get(name)
    if not is_per_rank(node):
        inner = match(context, template.value, name)
        return lambda: PerRank(inner(), template.on_resize)
    if not context.saved.selected(name):
        return lambda: template
    context.used.add(name)
    rank = context.saved_rank(template, name)
    if rank is None and callable(policy := template.on_resize):
        every = Builder(context.saved, context.reads).build(node, name)
        return lambda: PerRank(policy(every), policy)
    if rank is None:
        return lambda: template
    outer = context.saved
    context.saved = outer.with_node(outer.per_rank(node, rank=rank), name)
    try:
        inner = match(context, template.value, name)
    finally:
        context.saved = outer
    return lambda: PerRank(inner(), template.on_resize)
