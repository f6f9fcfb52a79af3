"""Parameters are chosen for optimizers and groups by name, pattern, tensor or function."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardckpt import NNHandler, errors
from shardckpt.nn_handler.groups import group_names, grouped
from tests.nn_handler.models import Body, Net, Scaled, a_handler, resumed_alike, train


def test_muon_beside_adamw(tmp_path):
    handler = a_handler()
    handler.optimizations.clear()
    handler.set_optimizer(
        torch.optim.Muon, params=lambda name, p: p.ndim == 2 and "head" not in name, lr=0.02
    )
    handler.set_optimizer(
        torch.optim.AdamW, name="rest", groups={"*.bias": {"weight_decay": 0.0}}, lr=0.01
    )
    assert [len(g["params"]) for g in handler.optimizers["rest"].param_groups] == [1, 3]
    with pytest.raises(errors.StateError, match="Two optimizers would hold"):
        handler.set_optimizer(torch.optim.SGD, name="third", params="head", lr=0.1)
    with pytest.raises(errors.StateError, match="would have no parameter"):
        handler.set_optimizer(torch.optim.SGD, name="third", lr=0.1)
    train(handler)
    loaded = resumed_alike(handler, tmp_path / "c")
    assert set(loaded.optimizers) == {"main", "rest"}
    assert set(loaded.history) >= {"lr", "lr_rest", "lr_rest_1"}
    loaded.set_optimizer(torch.optim.AdamW, name="rest", lr=0.5)
    with pytest.warns(UserWarning, match=r"rest\.optimizer lr"):
        loaded.restore(tmp_path / "c")


def test_parameter_groups_of_any_kind(tmp_path):
    handler = NNHandler(Net)
    groups = [
        {"params": [handler.module.head.bias], "lr": 0.5},
        {"params": ["layers.0", "head"], "lr": 0.25, "weight_decay": 0.0},
    ]
    handler.set_optimizer(torch.optim.AdamW, groups=groups, lr=0.1)
    handler.save(tmp_path / "c.pth")
    loaded = NNHandler.load(tmp_path / "c.pth").optimizer.param_groups
    assert [(g["lr"], len(g["params"])) for g in loaded] == [(0.1, 2), (0.5, 1), (0.25, 3)]
    assert loaded[2]["weight_decay"] == 0.0


def names(module: nn.Module, groups=None, **options) -> list[list[str]]:
    """The names of the parameters in each group."""
    chosen, named = grouped(module, groups, **options)
    assert [len(group["params"]) for group in chosen] == [len(group["params"]) for group in named]
    parameters = dict(module.named_parameters())
    for own, by_name in zip(chosen, named, strict=True):
        for parameter, name in zip(own["params"], by_name["params"], strict=True):
            assert parameter is parameters.get(name, parameter)
    return [group["params"] for group in named]


BODY, HEAD = ["body.0.weight", "body.0.bias"], ["head.weight", "head.bias"]


def test_parameters_in_no_group_are_the_first_group():
    assert names(Body()) == [BODY + HEAD]
    assert names(Body(), {"head": {"lr": 1.0}}) == [BODY, HEAD]
    assert names(Body(), {"head": {"lr": 1.0}}, exact=True) == [HEAD]


def test_parameters_are_chosen_in_many_ways():
    model = Body()
    choices = {
        "a name": "head.bias",
        "a parameter": model.head.bias,
        "a function": lambda name, p: name.startswith("head") and p.ndim == 1,
        "a pattern": "h*.b?as",
        "a list": ["head.bias", model.head.bias],
    }
    for how, choice in choices.items():
        assert names(model, params=choice) == [["head.bias"]], how
    assert names(model, params=["head.", "body.0.bias"]) == [[*HEAD, "body.0.bias"]]


def test_a_prefix_ends_with_a_name():
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "ab": nn.Linear(1, 1)})
    assert names(model, params="a") == [["a.weight", "a.bias"]]


def test_the_first_group_takes_a_parameter():
    assert names(Body(), [{"params": "*.bias"}, {"params": "head"}]) == [
        ["body.0.weight"],
        ["body.0.bias", "head.bias"],
        ["head.weight"],
    ]


def test_frozen_parameters_are_taken_by_their_full_name_alone():
    model = Body()
    model.head.weight.requires_grad_(False)
    assert names(model) == [[*BODY, "head.bias"]]
    assert names(model, params="head") == [["head.bias"]]
    assert names(model, params=["head.weight", "head.bias"], exact=True, groups={"head": {}}) == [
        ["head.bias"]
    ]
    assert names(model, {"head.weight": {}}) == [[*BODY, "head.bias"], ["head.weight"]]


def test_the_parameters_of_a_loss_have_a_prefix():
    loss = Scaled()
    assert names(Body(), loss=loss) == [[*BODY, *HEAD, "loss_fn.factor"]]
    assert names(Body(), loss=loss, params="loss_fn") == [["loss_fn.factor"]]


def test_what_another_optimizer_holds_is_left_to_it():
    held = dict.fromkeys(HEAD, "other")
    assert names(Body(), held=held) == [BODY]
    with pytest.raises(errors.StateError, match="Two optimizers would hold") as caught:
        names(Body(), params=["body", "head"], held=held)
    assert caught.value.actual == "head.weight, head.bias: held by the optimizer 'other'"


@pytest.mark.parametrize(
    "groups", ["head", 3, {"head": 0.1}, ["head"], [{"params": "head"}, 3], {"head": None}]
)
def test_groups_are_dicts_with_options(groups):
    with pytest.raises(errors.StateError, match="Invalid groups") as caught:
        names(Body(), groups)
    assert caught.value.actual == repr(groups)


@pytest.mark.parametrize("wanted", ["neck", "hea", "*.scale", 3, [], None, nn.Linear(1, 1).bias])
def test_a_choice_that_finds_no_parameter_is_refused(wanted):
    with pytest.raises(errors.StateError, match="holds no parameter") as caught:
        names(Body(), [{"params": wanted}])
    assert caught.value.remedy == "choose among body, head"


def test_an_optimizer_without_parameters_is_refused():
    model = Body().requires_grad_(False)
    with pytest.raises(errors.StateError, match="would have no parameter") as caught:
        names(model)
    assert caught.value.actual == "4 free parameters, all frozen"


def test_the_groups_of_an_optimizer_have_names_again():
    model, loss = Body(), Scaled()
    chosen, named = grouped(model, {"head": {"lr": 1.0}}, loss)
    optimizer = torch.optim.SGD(chosen, lr=0.1)
    assert group_names(optimizer, model, loss) == [group["params"] for group in named]
    with pytest.raises(errors.StateError, match="does not have") as caught:
        group_names(optimizer, model, None)
    assert caught.value.actual == "1 of them, such as one of shape ()"
