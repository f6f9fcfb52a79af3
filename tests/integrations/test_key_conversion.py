"""Rules between the names of a model and of the hub become plans, by rules of a small stand-in.

The stand-in has the functions of transformers that the module calls. tests/integrations/
test_transformers.py compares the plans of real models with transformers itself.
"""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from shardckpt.errors import StateError
from shardckpt.integrations.key_conversion import Conversion, hub_names, model_names, unchanged


class Rule:
    def __init__(self, source, target):
        self.source_patterns, self.target_patterns = [source], [target]
        self.used = False

    def rename(self, name):
        new = re.sub(self.source_patterns[0], self.target_patterns[0], name)
        self.used |= new != name
        return new

    def reverse_transform(self):
        return type(self)(self.target_patterns[0], self.source_patterns[0])

    def was_used(self):
        return self.used


class WeightRenaming(Rule):
    """Renames one tensor."""


class PrefixChange(WeightRenaming):
    """A rule of the base model, which folders of the hub do not have."""


class WeightConverter(Rule):
    """Joins the tensors of a pattern along a new dimension. The reverse takes them apart."""

    def __init__(self, source, target, apart=False):
        super().__init__(source, target)
        self.apart, self.tensors = apart, []

    def reverse_transform(self):
        return WeightConverter(self.target_patterns[0], self.source_patterns[0], apart=True)

    def add_tensor(self, renamed, name, pattern, tensor):
        assert pattern == self.source_patterns[0]
        self.tensors.append(tensor)

    def convert(self, renamed, *, model, config):
        assert config is model.config
        if not self.apart:
            return {renamed: [torch.stack(self.tensors)]}  # as a list of one, as transformers may
        (joined,) = self.tensors
        return {f"{renamed}.{index}": part for index, part in enumerate(joined)}


def rename_all(name, renamings):
    for rule in renamings:
        name = rule.rename(name)
    return name


def converted(name, converters):
    for rule in converters:
        if (new := rule.rename(name)) != name:
            return new, rule.source_patterns[0]
    return name, None


def rename_source_key(name, renamings, converters, base, own):
    return converted(rename_all(name, renamings), converters)


@pytest.fixture
def rules(monkeypatch):
    """The rules between a folder of the hub and a model, which a test changes."""
    given = [WeightRenaming("old", "new"), WeightConverter(r"experts\.\d+$", "experts")]
    mapping, loading = (ModuleType(f"transformers.{n}") for n in ("mapping", "loading"))
    mapping.get_model_conversion_mapping = lambda model, **options: given
    vars(loading).update(
        PrefixChange=PrefixChange,
        WeightConverter=WeightConverter,
        WeightRenaming=WeightRenaming,
        apply_converters=converted,
        apply_renamings=rename_all,
        dot_natural_key=lambda name: [int(p) if p.isdigit() else p for p in name.split(".")],
        rename_source_key=rename_source_key,
    )
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", mapping)
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", loading)
    return given


def model():
    return SimpleNamespace(base_model_prefix="model", config=object())


def meta(*shape):
    return torch.empty(shape, device="meta")


def forms(plan):
    return [(step.sources, {n: tuple(t.shape) for n, t in step.targets.items()}) for step in plan]


def test_the_plan_without_rules_keeps_all_names():
    tensors = {"a": meta(2), "b": meta(3, 1)}
    plan = unchanged(tensors)
    assert plan == [
        Conversion(("a",), {"a": tensors["a"]}),
        Conversion(("b",), {"b": tensors["b"]}),
    ]
    assert [step.run for step in plan] == [None, None]


def test_tensors_of_the_hub_are_renamed_and_joined_in_natural_order(rules):
    own = {"new.w": meta(2), "experts": meta(11, 3), "same": meta(1)}
    hub = {"same": meta(1), **{f"experts.{n}": meta(3) for n in range(11)}, "old.w": meta(2)}
    plan = model_names(model(), own, hub)
    experts = tuple(f"experts.{n}" for n in range(11))
    assert forms(plan) == [
        (experts, {"experts": (11, 3)}),
        (("old.w",), {"new.w": (2,)}),
        (("same",), {"same": (1,)}),
    ]
    run = plan[0].run
    assert run is not None
    parts = {name: torch.full((3,), float(n)) for n, name in enumerate(experts)}
    for _ in range(2):  # each run has tensors of its own
        assert run(parts)["experts"][:, 0].tolist() == list(range(11))


def test_a_name_that_the_model_has_already_is_kept(rules):
    plan = model_names(model(), {"old.w": meta(2)}, {"old.w": meta(2)})
    assert forms(plan) == [(("old.w",), {"old.w": (2,)})]


def test_tensors_that_the_model_lacks_are_in_the_plan(rules):
    plan = model_names(model(), {}, {"extra": meta(2)})
    assert forms(plan) == [(("extra",), {"extra": (2,)})]


def test_of_two_tensors_with_one_name_the_last_is_taken(rules):
    plan = model_names(model(), {"new.w": meta(2)}, {"new.w": meta(2), "old.w": meta(2)})
    assert forms(plan) == [(("old.w",), {"new.w": (2,)})]


def test_the_rules_that_a_load_used_are_those_of_the_next_save(rules):
    trained = model()
    model_names(trained, {"new.w": meta(2)}, {"old.w": meta(2)})
    assert trained._weight_conversions == [rules[0]]
    rules.clear()  # a save must not ask for them again
    assert forms(hub_names(trained, {"new.w": meta(2)})) == [(("new.w",), {"old.w": (2,)})]


def test_a_model_that_was_not_loaded_is_saved_by_the_rules_without_prefixes(rules):
    rules[:] = [PrefixChange("^", "model."), WeightRenaming("gamma", "weight")]
    plan = hub_names(model(), {"model.weight": meta(2)})
    assert forms(plan) == [(("model.weight",), {"model.gamma": (2,)})]


def test_joined_tensors_are_taken_apart_for_the_hub(rules):
    rules[:] = [WeightConverter("parts", "experts")]
    (step,) = hub_names(model(), {"experts": meta(2, 3)})
    assert forms([step]) == [(("experts",), {"parts.0": (3,), "parts.1": (3,)})]
    made = step.run({"experts": torch.tensor([[1.0], [2.0]])})
    assert {name: tensor.tolist() for name, tensor in made.items()} == {
        "parts.0": [1.0],
        "parts.1": [2.0],
    }


def test_two_tensors_with_one_name_on_the_hub_are_refused(rules):
    rules[:] = [WeightRenaming("q", "k")]
    with pytest.raises(StateError, match="same name on the hub") as raised:
        hub_names(model(), {"k": meta(2), "q": meta(2)})
    assert raised.value.tensor == "k"
    assert raised.value.actual == "1 tensors would be lost: k"
    assert "shardckpt.save" in raised.value.remedy
