"""Optimizers and schedulers continue after a load exactly like without the load."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

import shardckpt
from shardckpt import errors

INPUT = torch.linspace(-1, 1, 12).reshape(3, 4)

OPTIMIZERS = {
    name: lambda p, kind=kind: kind(p, lr=0.01)
    for name, kind in vars(optim).items()
    if isinstance(kind, type) and name not in ("Optimizer", "SparseAdam", "Muon")
}
OPTIMIZERS |= {
    "momentum": lambda p: optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "fused": lambda p: optim.Adam(p, lr=0.01, fused=True, amsgrad=True),
    "lr as a tensor": lambda p: optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "centered": lambda p: optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "wolfe": lambda p: optim.LBFGS(p, line_search_fn="strong_wolfe", history_size=3, max_iter=4),
    "maximize": lambda p: optim.Adadelta(p, lr=0.01, maximize=True),
}
if hasattr(optim, "Muon"):  # since torch 2.9
    OPTIMIZERS["Muon"] = lambda p: optim.Muon([q for q in p if q.dim() == 2], lr=0.01)


def a_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def a_step(model: nn.Module, optimizer: optim.Optimizer, scheduler=None) -> None:
    def closure():
        optimizer.zero_grad()
        loss = model(INPUT).square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(loss.item())
    elif scheduler is not None:
        scheduler.step()


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        if hasattr(a, "__tensor_flatten__"):
            names = a.__tensor_flatten__()[0]
            return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n)) for n in names)
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b) and type(a) is type(b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on(tmp_path, name):
    model = a_model(0)
    optimizer = OPTIMIZERS[name](model.parameters())
    shardckpt.save({"m": model, "o": optimizer}, tmp_path / "fresh")
    for _ in range(3):
        a_step(model, optimizer)
    shardckpt.save({"m": model, "o": optimizer}, tmp_path / "used")
    for steps in (0, 1):  # into a fresh optimizer, and into one with state of its own
        other = a_model(1)
        target = OPTIMIZERS[name](other.parameters())
        initial = target.state_dict()["state"]
        for _ in range(steps):
            a_step(other, target)
        shardckpt.load({"m": other, "o": target}, tmp_path / "fresh")
        assert same(target.state_dict()["state"].keys(), initial.keys()) or not initial
        shardckpt.load({"m": other, "o": target}, tmp_path / "used")
        assert same(target.state_dict(), optimizer.state_dict())
    reference = a_model(2)
    theirs = OPTIMIZERS[name](reference.parameters())
    shardckpt.load({"m": reference, "o": theirs}, tmp_path / "used")
    for _ in range(2):
        a_step(other, target)
        a_step(model, optimizer)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_the_state_of_sparse_adam_is_restored(tmp_path):
    def job(seed):
        torch.manual_seed(seed)
        table = nn.Embedding(10, 3, sparse=True)
        return table, optim.SparseAdam(table.parameters())

    def step(table, optimizer):
        optimizer.zero_grad()
        table(torch.tensor([1, 2])).sum().backward()
        optimizer.step()

    table, optimizer = job(0)
    step(table, optimizer)
    shardckpt.save({"m": table, "o": optimizer}, tmp_path / "c")
    other, target = job(1)
    shardckpt.load({"m": other, "o": target}, tmp_path / "c")
    step(table, optimizer)
    step(other, target)
    assert torch.equal(table.weight, other.weight)


class Decay:
    """A schedule with state, as LambdaLR saves it."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, epoch):
        return self.rate**epoch


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "object": lambda o: lr_scheduler.LambdaLR(o, Decay(0.8)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    "constant": lambda o: lr_scheduler.ConstantLR(o),
    "linear": lambda o: lr_scheduler.LinearLR(o),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "averaged": lambda o: optim.swa_utils.SWALR(o, 0.05),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "chain": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on(tmp_path, name, tensor_lr):
    def job(seed):
        model = a_model(seed)
        rate = torch.tensor(0.1) if tensor_lr else 0.1
        optimizer = optim.SGD(model.parameters(), lr=rate, momentum=0.9, foreach=False)
        return model, optimizer, SCHEDULERS[name](optimizer)

    mine, theirs = job(0), job(1)
    for _ in range(3):
        a_step(*mine)
    if any(map(callable, mine[2].state_dict().values())):
        pytest.skip("in this torch, the state of the scheduler has a function")
    if tensor_lr and not isinstance(mine[1].param_groups[0]["lr"], torch.Tensor):
        pytest.skip("in this torch, the scheduler replaces the tensor by a float")
    shardckpt.save(dict(zip("mos", mine, strict=True)), tmp_path / "c")
    shardckpt.load(dict(zip("mos", theirs, strict=True)), tmp_path / "c")
    assert str(theirs[2].state_dict()) == str(mine[2].state_dict())
    for _ in range(3):
        a_step(*mine)
        a_step(*theirs)
    assert str(theirs[2].get_last_lr()) == str(mine[2].get_last_lr())
    assert same(dict(theirs[0].state_dict()), dict(mine[0].state_dict()))


def test_milestones_stay_a_counter(tmp_path):
    model = a_model(0)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.MultiStepLR(optimizer, [2, 2, 4])
    shardckpt.save({"s": scheduler}, tmp_path / "c")
    shardckpt.load({"s": scheduler}, tmp_path / "c")
    assert scheduler.milestones == collections.Counter([2, 2, 4])
    assert isinstance(scheduler.milestones, collections.Counter)


@pytest.mark.parametrize("enabled", [True, False])
def test_gradient_scalers_are_restored(tmp_path, enabled):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=enabled)
    scaler.scale(torch.ones(1))
    shardckpt.save({"s": scaler}, tmp_path / "c")
    other = torch.amp.GradScaler("cpu", enabled=enabled)
    shardckpt.load({"s": other}, tmp_path / "c")
    assert other.state_dict() == scaler.state_dict()


def test_moments_wider_than_their_parameters(tmp_path):
    def job(seed):
        model = a_model(seed).bfloat16()
        optimizer = optim.AdamW(model.parameters())
        for parameter in model.parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(3.0),
                "exp_avg": torch.randn(parameter.shape),
                "exp_avg_sq": torch.rand(parameter.shape),
            }
        return model, optimizer

    model, optimizer = job(0)
    shardckpt.save({"m": model, "o": optimizer}, tmp_path / "c")
    other = a_model(1).bfloat16()
    fresh = optim.AdamW(other.parameters())
    shardckpt.load({"m": other, "o": fresh}, tmp_path / "c")
    assert same(fresh.state_dict(), optimizer.state_dict())


def test_several_modules_and_optimizers(tmp_path):
    def job(seed):
        a, b = a_model(seed), a_model(seed + 10)
        both = optim.Adam([*a.parameters(), *b.parameters()])
        one = optim.SGD(a.parameters(), lr=0.1, momentum=0.9)
        (a(INPUT).sum() + b(INPUT).sum()).backward()
        both.step()
        one.step()
        return {"nets": {"a": a, "b": b}, "optimizers": [both, one]}

    state, target = job(0), job(1)
    shardckpt.save(state, tmp_path / "c")
    shardckpt.load(target, tmp_path / "c")
    for mine, theirs in zip(state["optimizers"], target["optimizers"], strict=True):
        assert same(theirs.state_dict(), mine.state_dict())


def test_groups_that_differ_from_the_saved_ones(tmp_path):
    model = a_model(0)
    apart = optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    shardckpt.save({"m": model, "o": apart}, tmp_path / "c")
    together = optim.SGD([*model[0].parameters(), *model[2].parameters()])
    with pytest.raises(errors.StateError, match="different groups"):
        shardckpt.load({"m": model, "o": together}, tmp_path / "c")
    fewer = optim.SGD(model[0].parameters())
    with pytest.raises(errors.LoadMismatchError, match=r"o\.param_groups\.2\.weight"):
        shardckpt.load({"m": model, "o": fewer}, tmp_path / "c")


@pytest.mark.parametrize("keys", ["o.state", "*.exp_avg"])
def test_keys_without_the_parameter_groups_are_refused(tmp_path, keys):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    shardckpt.save({"m": model, "o": optimizer}, tmp_path / "c")
    with pytest.raises(errors.StateError, match=r"add 'o.param_groups' to keys=") as caught:
        shardckpt.load({"m": model, "o": optimizer}, tmp_path / "c", keys=keys)
    assert caught.value.tensor == "o.param_groups"
    shardckpt.load({"m": model, "o": optimizer}, tmp_path / "c", keys=["o.state", "o.param_groups"])
    shardckpt.load({"m": model, "o": optimizer}, tmp_path / "c", keys=["m"])


def test_parameters_tied_across_modules_have_their_state_in_any_order_of_the_modules(tmp_path):
    def tied(seed):
        torch.manual_seed(seed)
        a, b = nn.Linear(3, 3), nn.Linear(3, 3)
        b.weight = a.weight
        return a, b

    a, b = tied(0)
    optimizer = optim.AdamW([*a.parameters(), b.bias])
    (a(torch.ones(3)) + b(torch.ones(3))).sum().backward()
    optimizer.step()
    shardckpt.save({"a": a, "b": b, "o": optimizer}, tmp_path / "c")
    a2, b2 = tied(1)
    loaded = optim.AdamW([b2.bias, b2.weight, a2.bias])
    shardckpt.load({"b": b2, "a": a2, "o": loaded}, tmp_path / "c")
    for one, other in ((a.weight, a2.weight), (a.bias, a2.bias), (b.bias, b2.bias)):
        assert same(optimizer.state[one], loaded.state[other])


class Trainable:
    """An object that returns its module and optimizer as they are."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.optimizer = optim.AdamW(self.model.parameters(), lr=0.1 + seed)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(2, 3)).square().sum().backward()
        self.optimizer.step()

    def state_dict(self):
        return {"model": self.model, "optimizer": self.optimizer}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


@pytest.mark.parametrize("save", ["save", "async_save"])
def test_an_object_whose_state_dict_returns_a_module_and_its_optimizer(tmp_path, save):
    one, other = Trainable(0), Trainable(1)
    one.step()
    handle = getattr(shardckpt, save)({"all": one, "step": 1}, tmp_path / "c")
    if save == "async_save":
        handle.result()
    shardckpt.load({"all": other, "step": 0}, tmp_path / "c")
    for each in (one, other):
        each.step()
    assert other.optimizer.param_groups[0]["lr"] == 0.1
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
