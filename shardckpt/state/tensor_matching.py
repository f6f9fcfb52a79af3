"""Match tensors and arrays of a caller's state. Reads fill them in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from shardckpt.format.typed_json import TensorRef
from shardckpt.state.local_chunks import check_dense
from shardckpt.state.match_context import Finish, MatchContext
from shardckpt.state.refusals import setting_state
from shardckpt.state.saved_tree import below, under
from shardckpt.state.sharded_array import ShardedArray, from_numpy
from shardckpt.state.sharded_tensors import materialized
from shardckpt.state.wrapper_tensors import WRAPPER, Wrapped, facts_of, saveable_form
from shardckpt.torch_compat import dtensor_class

__all__ = ["match_array", "match_generator", "match_sharded_array", "match_tensor"]


def match_tensor(context: MatchContext, template: Any, name: str) -> Any:
    """Note the reads that fill a tensor in place, and return it.

    For a tensor on the meta device, a new tensor of the same form is filled and returned.
    """
    if context.fill_in_place(template, name):
        return template
    target = saveable_form(template, name=name)
    if isinstance(target, Wrapped):
        return _match_wrapped(context, target, name)
    if not context.saved.selected(name):
        return template
    check_dense(target, name=name)
    saved = context.find(name, target)
    if saved is None or not context.agrees(saved[1], target, name):
        return template
    if target.is_meta:
        template = materialized(template, name)
        target = saveable_form(template, name=name)
    context.fill(saved, target, name)
    if type(template) is dtensor_class():
        context.filled.append(template)
    return template


def _match_wrapped(context: MatchContext, target: Wrapped, name: str) -> torch.Tensor:
    """Match the inner tensors of a wrapper tensor, if the saved wrapper tensor had the same
    facts.
    """
    node: Any = context.saved.nodes.get(name)
    tensor = target.source
    if name not in context.saved.nodes:
        if context.saved.selected(name):
            context.mismatches.missing.append(name)
        return tensor
    saved = facts_of(node)
    if saved is None:
        context.used.add(name)
        actual = "a tensor" if isinstance(node, TensorRef) else type(node).__name__
        context.mismatches.wrong_dtype.append((name, f"a {target.facts['class']}", actual))
        return tensor
    context.build(below(name, WRAPPER))  # marks the facts as used
    wanted = {**target.facts, "inner": sorted(target.inner)}
    actual_facts = {**saved, "inner": sorted(key for key in node if key != WRAPPER)}
    if wanted != actual_facts:
        context.used.update(leaf for leaf in context.saved.leaves if under(leaf, name))
        differing = [key for key in wanted if wanted[key] != actual_facts.get(key)]
        if differing == ["shape"]:
            shapes = wanted["shape"], actual_facts["shape"]
            context.mismatches.wrong_shape.append((name, *shapes))
        else:
            both: Any = [{key: of.get(key) for key in differing} for of in (wanted, actual_facts)]
            context.mismatches.wrong_dtype.append((name, *both))
        return tensor
    inner = {
        key: match_tensor(context, value, below(name, key)) for key, value in target.inner.items()
    }
    context.filled.append(tensor)
    if all(inner[key] is value for key, value in target.inner.items()):
        return tensor
    rebuilt: torch.Tensor = _rebuilt(tensor, inner)
    return rebuilt


def _rebuilt(tensor: Any, inner: dict[str, torch.Tensor]) -> Any:
    """Build a wrapper tensor like the caller's around other inner tensors."""
    _, facts = tensor.__tensor_flatten__()
    return type(tensor).__tensor_unflatten__(inner, facts, tensor.shape, tensor.stride())


def match_array(context: MatchContext, template: np.ndarray[Any, Any], name: str) -> Finish:
    """Fill a writeable array in place, with any byte order and strides."""
    tensor = from_numpy(template, name=name)
    match_tensor(context, tensor, name)

    def finish() -> Any:
        read = tensor.numpy()
        if not np.may_share_memory(template, read):
            template[...] = read
        return template

    return finish


def match_sharded_array(context: MatchContext, template: ShardedArray, name: str) -> Finish:
    """Fill this rank's part of an array in place."""
    saved = context.find(name, template) if context.saved.selected(name) else None
    if saved is None or not context.agrees(saved[1], template.check(name), name):
        return lambda: template
    template.check_writeable(name)
    context.fill(saved, template, name)

    def finish() -> Any:
        template.loaded()
        return template

    return finish


def match_generator(context: MatchContext, template: torch.Generator, name: str) -> Finish:
    """Set a random-number generator to its saved state."""
    state, before = template.get_state(), len(context.reads)
    match_tensor(context, state, name)
    if len(context.reads) == before:
        return lambda: template

    def finish() -> Any:
        with setting_state(template, at=name):
            template.set_state(state)
        return template

    return finish
