"""transformers' rules between the names of a model and those of the hub, as plans.

A plan is a list of conversions. Most only rename a tensor. The others join, split or permute the
tensors of one layer, such as the experts of a mixture-of-experts model. Nothing is read here.

The rules are transformers' own (core_model_loading, which has no public interface). This module
repeats the loops of convert_and_load_state_dict_in_model and revert_weight_conversion of
transformers 5.24, with names and shapes in place of tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shardckpt.errors import StateError

__all__ = ["Conversion", "hub_names", "model_names", "unchanged"]

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Conversion:
    """A step of a plan.

    Attributes:
        sources: The names that it takes.
        targets: The names that it makes, with tensors on the meta device of their form.
        run: Converts the full tensors of `sources`. None if it only renames one.
    """

    sources: tuple[str, ...]
    targets: Tensors
    run: Callable[[Tensors], Tensors] | None = None


def unchanged(tensors: Tensors) -> list[Conversion]:
    """Return the plan that keeps all names."""
    return [Conversion((name,), {name: tensor}) for name, tensor in tensors.items()]


def hub_names(model: Any, tensors: Tensors) -> list[Conversion]:
    """Plan the conversion of a model's tensors, given on the meta device, to those of the hub.

    Raises:
        StateError: Two tensors would get the same name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, apply_converters, apply_renamings

    rules = getattr(model, "_weight_conversions", None)  # of from_pretrained
    if rules is None:
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        rules = [rule for rule in mapping if not isinstance(rule, PrefixChange)]
    renamings, converters = _divided(rule.reverse_transform() for rule in reversed(rules))

    def rename(name: str) -> tuple[str, str | None]:
        renamed, pattern = apply_converters(name, converters)
        return (renamed, pattern) if pattern else (apply_renamings(name, renamings), None)

    plan = _plan(
        model, tensors, rename, converters, last=lambda name: str(apply_renamings(name, renamings))
    )
    left_out = set(tensors) - {source for step in plan for source in step.sources}
    if left_out:
        raise StateError(
            "Two tensors of the model have the same name on the hub",
            tensor=min(left_out),
            expected="a hub name of its own for each tensor",
            actual=f"{len(left_out)} tensors would be lost: {', '.join(sorted(left_out)[:5])}",
            remedy="save the model's state_dict with shardckpt.save, which keeps its own names",
        )
    return plan


def model_names(model: Any, own: Tensors, tensors: Tensors) -> list[Conversion]:
    """Plan the conversion of tensors of the hub, given on the meta device, to those of a model.

    `own` has the model's tensors by name. Tensors that the model lacks are in the plan too.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings, converters = _divided(rules)
    base = model.base_model_prefix

    def rename(name: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(name, renamings, converters, base, own)
        if renamed not in own and name in own:
            renamed, pattern = rename_source_key(name, [], [], base, own)
        return renamed, pattern

    plan = _plan(model, tensors, rename, converters)
    model._weight_conversions = [rule for rule in rules if rule.was_used()]  # for hub_names
    return plan


def _divided(rules: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Return the rules that only rename, and the others."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules = list(rules)
    return (
        [rule for rule in rules if isinstance(rule, WeightRenaming)],
        [rule for rule in rules if isinstance(rule, WeightConverter)],
    )


def _plan(
    model: Any,
    tensors: Tensors,
    rename: Callable[[str], tuple[str, str | None]],
    converters: list[Any],
    last: Callable[[str], str] = lambda name: name,
) -> list[Conversion]:
    """Group the tensors by the name that `rename` gives them. `last` completes converted names."""
    from transformers.core_model_loading import dot_natural_key

    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    members: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        renamed, pattern = rename(name)
        members.setdefault(renamed, []).append((name, pattern))
    plan = []
    for renamed, group in members.items():
        sources = tuple(name for name, _ in group)
        pattern = group[0][1]
        if pattern is None:  # as transformers, take the last one
            plan.append(Conversion(sources[-1:], {renamed: tensors[sources[-1]]}))
            continue
        run = _runner(model, by_pattern[pattern], renamed, group, last)
        plan.append(Conversion(sources, run({name: tensors[name] for name in sources}), run))
    return plan


def _runner(
    model: Any,
    rule: Any,
    renamed: str,
    group: list[tuple[str, str | None]],
    last: Callable[[str], str],
) -> Callable[[Tensors], Tensors]:
    def run(tensors: Tensors) -> Tensors:
        fresh = copy.deepcopy(rule)
        for name, pattern in group:
            fresh.add_tensor(renamed, name, pattern, tensors[name])
        made = fresh.convert(renamed, model=model, config=model.config)
        return {last(n): t[0] if isinstance(t, list) else t for n, t in made.items()}

    return run
