"""Optimizer state has parameter names, whatever other entries the state has or had."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

import shardckpt
from shardckpt import errors
from tests.state.test_optimizer_matching import a_step, same


def linear(rows=2, dtype=torch.float32, kind=optim.AdamW, **options):
    module = nn.Linear(4, rows, dtype=dtype)
    return module, kind(module.parameters(), **options)


def train(module, optimizer):
    optimizer.zero_grad()
    module(torch.ones(1, 4, dtype=module.weight.dtype)).float().square().sum().backward()
    optimizer.step()


def trained(**options):
    module, optimizer = linear(**options)
    train(module, optimizer)
    return module, optimizer


def test_names_do_not_depend_on_other_modules(tmp_path):
    module, optimizer = trained()
    states = {
        "alone": {"m": module, "o": optimizer},
        "ema": {"m": module, "o": optimizer, "ema": nn.Linear(4, 2)},
        "first": {"ema": nn.Linear(4, 2), "m": module, "o": optimizer},
    }
    for name, state in states.items():
        shardckpt.save(state, tmp_path / name)
        saved = shardckpt.load_state(tmp_path / name)
        assert list(saved["o"]["state"]) == ["weight", "bias"]
        for others in ({}, {"ema": nn.Linear(4, 2)}):
            other, target = linear()
            load = {"m": other, "o": target, **others}
            shardckpt.load(load, tmp_path / name, keys=["m", "o"])
            assert same(target.state_dict(), optimizer.state_dict())


def test_a_part_and_the_complete_tensor_in_one_state(tmp_path):
    """Either may come first, and the part may be alone when it is loaded."""

    def job():
        whole = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))
        return whole, optim.AdamW(whole[0].parameters())

    whole, optimizer = job()
    train_part = lambda m, o: (m[0](torch.ones(1, 4)).sum().backward(), o.step())  # noqa: E731
    train_part(whole, optimizer)
    shardckpt.save({"part": whole[0], "whole": whole, "o": optimizer}, tmp_path / "a")
    shardckpt.save({"whole": whole, "part": whole[0], "o": optimizer}, tmp_path / "b")
    for path in ("a", "b"):
        other, target = job()
        shardckpt.load({"whole": other, "o": target}, tmp_path / path)
        assert same(target.state_dict(), optimizer.state_dict())
        other, target = job()
        shardckpt.load({"part": other[0], "o": target}, tmp_path / path)
        assert same(target.state_dict(), optimizer.state_dict())


def test_names_of_version_0_1_0_load(tmp_path):
    """They begin with the module's path where the state has several modules."""
    module, optimizer = trained()
    packed = optimizer.state_dict()
    names = ["m.weight", "m.bias"]
    old = {
        "state": {names[number]: own for number, own in packed["state"].items()},
        "param_groups": [{**packed["param_groups"][0], "params": names}],
    }
    shardckpt.save({"m": module, "ema": nn.Linear(4, 2), "o": old}, tmp_path / "c")
    for others in ({}, {"ema": nn.Linear(4, 2)}):
        other, target = linear()
        shardckpt.load({"m": other, "o": target, **others}, tmp_path / "c")
        assert same(target.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("kind", [optim.AdamW, optim.NAdam, optim.Adafactor])
@pytest.mark.parametrize("narrow", [True, False], ids=["narrower", "wider"])
def test_cast_into_a_fresh_optimizer(tmp_path, kind, narrow):
    dtypes = [torch.float32, torch.bfloat16][:: 1 if narrow else -1]
    module, optimizer = trained(dtype=dtypes[0], kind=kind)
    shardckpt.save({"m": module, "o": optimizer}, tmp_path / "c")
    other, target = linear(dtype=dtypes[1], kind=kind)
    report = shardckpt.load({"m": other, "o": target}, tmp_path / "c", dtype="cast")
    reference = optimizer.state[module.weight]
    for key, value in target.state[other.weight].items():
        assert torch.equal(value, reference[key].to(value.dtype)), key
    assert any(name.startswith("o.state.weight.") for name, *_ in report.cast)
    train(other, target)


def test_cast_keeps_moments_wider_than_the_saved_parameter(tmp_path):
    module, optimizer = trained(dtype=torch.bfloat16)
    for own in optimizer.state.values():
        own.update(exp_avg=own["exp_avg"].float(), exp_avg_sq=own["exp_avg_sq"].float())
    shardckpt.save({"m": module, "o": optimizer}, tmp_path / "c")
    other, target = linear(dtype=torch.float16)
    shardckpt.load({"m": other, "o": target}, tmp_path / "c", dtype="cast")
    assert target.state[other.weight]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("steps", [0, 1], ids=["fresh", "with state"])
@pytest.mark.parametrize("kind", [optim.AdamW, optim.Adafactor])
def test_state_of_a_parameter_of_another_shape_is_skipped(tmp_path, kind, steps):
    module, optimizer = trained(kind=kind)
    shardckpt.save({"m": module, "o": optimizer}, tmp_path / "c")
    other, target = linear(rows=3, kind=kind)
    for _ in range(steps):
        train(other, target)
    before = {key: value.clone() for key, value in target.state[other.weight].items()}
    report = shardckpt.load({"m": other, "o": target}, tmp_path / "c", strict=False)
    assert same(dict(target.state[other.weight]), before)
    told = {name for name, *_ in report.wrong_shape} | set(report.unexpected)
    assert {f"o.state.weight.{key}" for key in optimizer.state[module.weight]} <= told
    train(other, target)
    with pytest.raises(errors.LoadMismatchError, match=r"o\.state\.weight\."):
        shardckpt.load({"m": other, "o": target}, tmp_path / "c")


def test_state_of_a_parameter_of_another_dtype_is_skipped(tmp_path):
    module, optimizer = trained()
    shardckpt.save({"m": module, "o": optimizer}, tmp_path / "c")
    other, target = linear(dtype=torch.float64)
    report = shardckpt.load({"m": other, "o": target}, tmp_path / "c", strict=False)
    assert "o.state.weight.exp_avg" in {name for name, *_ in report.wrong_dtype}
    train(other, target)


class Beside(optim.SGD):
    """Adds entries of its own beside torch's, and to the state."""

    counter = 0

    def state_dict(self):
        return {**super().state_dict(), "counter": self.counter, "more": {"t": torch.ones(2)}}

    def load_state_dict(self, state):
        self.counter = state["counter"]
        self.more = state["more"]
        super().load_state_dict({key: state[key] for key in ("state", "param_groups")})


def test_entries_beside_state_and_groups(tmp_path):
    module, optimizer = trained(kind=Beside, momentum=0.9)
    optimizer.counter = 7
    optimizer.state["all"] = {"seen": torch.tensor([3])}
    shardckpt.save({"m": module, "o": optimizer}, tmp_path / "c")
    other, target = linear(kind=Beside, momentum=0.9)
    shardckpt.load({"m": other, "o": target}, tmp_path / "c")
    assert target.counter == 7
    assert same(target.more, {"t": torch.ones(2)})
    assert same(target.state_dict(), optimizer.state_dict())
    plain = optim.SGD(module.parameters(), momentum=0.9)
    shardckpt.save({"m": module, "o": plain}, tmp_path / "plain")
    with pytest.raises(errors.LoadMismatchError, match=r"o\.counter"):
        shardckpt.load({"m": other, "o": target}, tmp_path / "plain")


class Lookahead(optim.Optimizer):
    """Wraps an optimizer; its state_dict has a form of its own."""

    def __init__(self, parameters):
        self.base = optim.AdamW(parameters)
        super().__init__(self.base.param_groups, {})
        self.slow = {}

    def step(self, closure=None):
        self.base.step()
        for i, parameter in enumerate(self.base.param_groups[0]["params"]):
            self.slow.setdefault((0, i), parameter.detach().clone()).lerp_(parameter.detach(), 0.5)

    def state_dict(self):
        return {"base": self.base.state_dict(), "slow": self.slow, "k": 5}

    def load_state_dict(self, state):
        self.base.load_state_dict(state["base"])
        self.slow = dict(state["slow"])


class Two(optim.Optimizer):
    """Two optimizers that look like one."""

    def __init__(self, parameters):
        weight, bias = parameters
        self.parts = [optim.SGD([weight], momentum=0.9), optim.AdamW([bias])]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


@pytest.mark.parametrize("kind", [Lookahead, Two])
def test_a_state_dict_of_a_form_of_its_own(tmp_path, kind):
    module, optimizer = trained(kind=kind)
    shardckpt.save({"m": module, "o": optimizer}, tmp_path / "c")
    shardckpt.async_save({"m": module, "o": optimizer}, tmp_path / "async").result()
    for path in ("c", "async"):
        other, target = linear(kind=kind)
        shardckpt.load({"m": other, "o": target}, tmp_path / path)
        assert same(target.state_dict(), optimizer.state_dict())
    train(module, optimizer)
    train(other, target)
    assert same(dict(other.state_dict()), dict(module.state_dict()))


def test_an_optimizer_that_refuses_to_give_its_state(tmp_path):
    class Refuses(optim.SGD):
        def state_dict(self):
            raise RuntimeError("call gather_state() first")

    module, optimizer = trained(kind=Refuses)
    with pytest.raises(errors.StateError, match=r"gather_state"):
        shardckpt.save({"m": module, "o": optimizer}, tmp_path / "c")


def groups(module, rate, kind=optim.AdamW):
    shared = torch.tensor(0.1) if rate == "shared" else None
    made = [shared if shared is not None else torch.tensor(0.1) for _ in range(2)]
    return kind([{"params": [p], "lr": r} for p, r in zip(module.parameters(), made, strict=True)])


@pytest.mark.parametrize("saved", ["one group", "shared", "apart"])
@pytest.mark.parametrize("target", ["shared", "apart"])
def test_tensor_rates_are_shared_as_both_sides_say(tmp_path, saved, target):
    module = nn.Linear(4, 2)
    one = optim.AdamW(module.parameters(), lr=torch.tensor(0.1))
    optimizer = one if saved == "one group" else groups(module, saved)
    shardckpt.save({"m": module, "o": optimizer}, tmp_path / "c")
    other = nn.Linear(4, 2)
    loaded = groups(other, target)
    shardckpt.load({"m": other, "o": loaded}, tmp_path / "c")
    first, second = (group["lr"] for group in loaded.param_groups)
    first.fill_(9.0)
    tied = target == "shared" and saved != "apart"
    assert second.item() == pytest.approx(9.0 if tied else 0.1)


def test_a_rate_stays_the_kind_that_the_program_made(tmp_path):
    module, optimizer = trained(lr=torch.tensor(0.25), foreach=False)
    shardckpt.save({"m": module, "o": optimizer}, tmp_path / "tensor")
    module, optimizer = trained(lr=0.25)
    shardckpt.save({"m": module, "o": optimizer}, tmp_path / "float")
    other, target = linear(lr=0.5, foreach=True)
    shardckpt.load({"m": other, "o": target}, tmp_path / "tensor")
    assert target.param_groups[0]["lr"] == 0.25
    train(other, target)
    other, target = linear(lr=torch.tensor(0.5), foreach=False)
    shardckpt.load({"m": other, "o": target}, tmp_path / "float")
    assert torch.equal(target.param_groups[0]["lr"], torch.tensor(0.25))


def test_options_of_the_device_stay_as_the_program_set_them(tmp_path):
    module, optimizer = trained(fused=True, amsgrad=True)
    optimizer.param_groups[0]["capturable"] = True  # as on a GPU
    shardckpt.save({"m": module, "o": optimizer}, tmp_path / "c")
    other, target = linear(foreach=True)
    shardckpt.load({"m": other, "o": target}, tmp_path / "c")
    group = target.param_groups[0]
    assert (group["fused"], group["foreach"], group["capturable"]) == (None, True, False)
    assert group["amsgrad"]
    train(other, target)


@pytest.mark.parametrize("template_named", [True, False])
def test_parameters_and_their_names_in_another_order(tmp_path, template_named):
    module = nn.Linear(4, 2)
    optimizer = optim.AdamW(list(module.named_parameters()))
    train(module, optimizer)
    shardckpt.save({"m": module, "o": optimizer}, tmp_path / "c")
    other = nn.Linear(4, 2)
    turned = list(other.named_parameters())[::-1]
    target = optim.AdamW(turned if template_named else [p for _, p in turned])
    shardckpt.load({"m": other, "o": target}, tmp_path / "c")
    assert target.param_groups[0]["param_names"] == ["bias", "weight"]
    for name in ("weight", "bias"):
        own = optimizer.state[getattr(module, name)]
        assert same(target.state[getattr(other, name)], own)


def test_state_that_is_no_tensor_keeps_its_form(tmp_path):
    """torch's own load_state_dict makes a str the text of a generator."""
    module, optimizer = trained(kind=optim.SGD, momentum=0.9)
    optimizer.state[module.weight].update(kind="slow", history=[torch.ones(2, 4), (1, "b")])
    shardckpt.save({"m": module, "o": optimizer}, tmp_path / "c")
    other, target = linear(kind=optim.SGD, momentum=0.9)
    shardckpt.load({"m": other, "o": target}, tmp_path / "c")
    assert same(target.state_dict(), optimizer.state_dict())


def test_lbfgs_in_another_order_is_refused(tmp_path):
    """Its history is one vector over all parameters in their order."""
    module = nn.Linear(4, 2)
    optimizer = optim.LBFGS(module.parameters())
    a_step(nn.Sequential(module, nn.Identity()), optimizer)
    shardckpt.save({"m": module, "o": optimizer}, tmp_path / "c")
    other = nn.Linear(4, 2)
    target = optim.LBFGS(list(other.parameters())[::-1])
    with pytest.raises(errors.StateError, match="order"):
        shardckpt.load({"m": other, "o": target}, tmp_path / "c")
