"""One job of two ranks tests NNHandler on several ranks, apart from saves and stops."""

from __future__ import annotations

import os
import time
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

from shardckpt import NNHandler
from shardckpt.errors import CheckpointError, RankFailedError, StateError
from shardckpt.nn_handler import Callback, agreement
from shardckpt.nn_handler import parallel as of_ranks
from tests.nn_handler.models import (
    Net,
    NormNet,
    OwnObject,
    a_gan,
    a_handler,
    data,
    f1,
    gan_step,
    same,
    weights,
    with_data,
)
from tests.ranks import run_ranks


def quiet(handler: NNHandler, epochs: int | None = 1, **options) -> NNHandler:
    handler.train(epochs, progress_bar=False, **options)
    return handler


def same_on_all(value: object) -> bool:
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return all(one == every[0] for one in every)


def numbers(handler: NNHandler) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in weights(handler).items()}


def a_norm_net(parallel: str, buffers: str) -> NNHandler:
    torch.manual_seed(0)
    handler = NNHandler(NormNet, parallel=parallel, buffers=buffers)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    return with_data(handler)


class Fails(Callback):
    """Fails on rank 1: in a step, or when its state is saved."""

    def __init__(self, step: int = 0, state_from_step: int = 1 << 30) -> None:
        self.step, self.state_from_step, self.now = step, state_from_step, 0

    def on_step_end(self, handler, loss):
        self.now = handler.step
        if (handler.step, handler.rank) == (self.step, 1):
            raise ValueError("planted")

    def state_dict(self):
        if self.now >= self.state_from_step and dist.get_rank() == 1:
            raise ValueError("planted")
        return {}


def checkpoints_in(folder: str) -> list[str]:
    """The names in a folder, without the lock, which another rank may still hold."""
    return [name for name in os.listdir(folder) if not name.startswith(".")]


def running_means(folder: str) -> None:
    """Item 1: buffers that differ by rank are made equal, also those of the averages."""
    found = {}
    for parallel in ("ddp", "fsdp"):
        for buffers in ("rank0", "mean"):
            path = f"{folder}/{parallel}-{buffers}"
            handler = quiet(a_norm_net(parallel, buffers), ema_decay=0.9)
            assert same_on_all(numbers(handler))
            handler.save(path)
            handler.save(f"{path}.pth")
            for name in (path, f"{path}.pth"):
                loaded = NNHandler.load(name, parallel=parallel)
                assert same(weights(loaded), weights(handler))
                for key, average in handler.ema.weights.items():
                    assert torch.equal(_whole(loaded.ema.weights[key]), _whole(average)), key
            found[parallel, buffers] = numbers(handler)["body.1.running_mean"]
        failing = a_norm_net(parallel, "rank0")
        failing.auto_save(save_path=f"{folder}/{parallel}-emergency")
        failing.add_callback(Fails(step=2))
        with pytest.raises(ValueError if dist.get_rank() == 1 else RankFailedError):
            quiet(failing, ema_decay=0.9, agree_every=1)
        assert checkpoints_in(f"{folder}/{parallel}-emergency") == ["step2"]
    assert found["ddp", "rank0"] != found["ddp", "mean"]


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def failures_of_one_rank(folder: str) -> None:
    """Item 8: the others hear at once which rank has failed, and why they end."""
    for name in ("c", "c.pth", None):  # None: a save while training, which is not tried again
        handler = a_handler("ddp")
        if name is None:
            handler.auto_save(save_path=f"{folder}/auto", every_steps=2)
        handler.add_callback(Fails(state_from_step=2 if name is None else 0))
        began = time.monotonic()
        with pytest.raises((RankFailedError, ValueError)) as caught:
            if name is None:
                quiet(handler)
            else:
                handler.save(f"{folder}/{name}")
        took_s = time.monotonic() - began
        if dist.get_rank() == 0:
            assert isinstance(caught.value, RankFailedError)
            assert caught.value.rank in (1, (1,))
        assert took_s < 20, took_s  # the deadline of training is 60 s, that of gloo minutes
    assert not os.path.exists(f"{folder}/c")
    assert not os.path.exists(f"{folder}/c.pth")


def metrics_of_all_ranks() -> None:
    handler = a_handler("ddp")
    handler.add_metric("f1", f1, whole_epoch=True)
    handler.add_metric("seen", OwnObject())
    quiet(handler)
    assert same_on_all(handler.history)
    inputs, targets = data(15).tensors
    expected = float(f1(handler.predict(inputs), targets))
    assert handler.history["val_f1"] == [pytest.approx(expected)]
    assert handler.history["seen"] == [24.0]  # the mean of both ranks


def two_networks(folder: str) -> None:
    for parallel in ("ddp", "fsdp"):
        handler = quiet(a_gan(parallel), gradient_clipping_norm=1.0, ema_decay=0.9)
        assert same_on_all(numbers(handler))
        handler.save(f"{folder}/gan-{parallel}")
        other = "fsdp" if parallel == "ddp" else "ddp"
        for kind in (parallel, other):
            loaded = with_data(NNHandler.load(f"{folder}/gan-{parallel}", parallel=kind))
            assert same(weights(loaded), weights(handler))
            loaded.set_training_step(gan_step)
        quiet(loaded)
        assert loaded.step == 6


def second_order() -> None:
    handler = a_handler("ddp")
    handler.optimizations.clear()
    handler.set_optimizer(torch.optim.LBFGS, max_iter=3)
    quiet(handler, gradient_accumulation_steps=2)
    assert same_on_all(numbers(handler))
    handler = a_handler("fsdp")
    handler.optimizations.clear()
    handler.set_optimizer(torch.optim.LBFGS)
    with pytest.raises(StateError, match="fsdp"):
        quiet(handler)


def evaluation_leaves_no_trace() -> None:
    """FSDP2 keeps whole weights after a forward pass alone; the next step must not use them."""
    inputs = data(8).tensors[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that no optimizer holds the whole weights
        handlers = [quiet(a_handler("fsdp"), ema_decay=0.5) for _ in range(2)]
        handler = handlers[0]
        own = handler.evaluate()
        assert handler.evaluate(ema=True) != own
        assert handler.evaluate() == own
        outputs = handler.predict(inputs)
        with handler.ema_weights(), torch.no_grad():
            assert not torch.equal(handler.model(inputs), outputs)
        assert torch.equal(handler.predict(inputs), outputs)
        assert numbers(quiet(handler)) == numbers(quiet(handlers[1]))


def message(act) -> str:
    with pytest.raises((StateError, CheckpointError, RankFailedError)) as caught:
        act()
    return str(caught.value)


class OnRankOne(Callback):
    """On rank 1 it ends training after step 3, and does not take its state back."""

    def on_step_end(self, handler, loss):
        handler.stop_training |= dist.get_rank() == 1 and handler.step == 3

    def load_state_dict(self, state):
        if dist.get_rank() == 1:
            raise ValueError("planted")


def handlers_that_differ(folder: str) -> None:
    """A call that one rank alone makes is an error before the first collective that would hang."""
    alone = {
        "auto_save": lambda handler: handler.auto_save(save_path=folder),
        "add_callback": lambda handler: handler.add_callback(Callback()),
        "set_val_loader": lambda handler: setattr(handler, "val_data", None),
    }
    for what, call in alone.items():
        handler = a_handler("ddp")
        if dist.get_rank() == 0:
            call(handler)
        assert what in message(lambda handler=handler: quiet(handler))
    handler = a_handler("ddp")
    assert "epochs" in message(lambda: quiet(handler, 1 + dist.get_rank()))


def one_rank_decides(folder: str) -> None:
    handler = a_handler("ddp")
    handler.add_callback(OnRankOne())
    assert quiet(handler, 2, agree_every=1).step == 3
    handler.save(f"{folder}/decided")
    assert "planted" in message(lambda: NNHandler.load(f"{folder}/decided"))


class Branches(nn.Module):
    """Ranks above 0 alone use `other`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.layer(inputs) + (self.other(inputs) if dist.get_rank() else 0)


def parameters_that_one_rank_uses() -> None:
    handler = NNHandler(Branches, parallel="ddp")
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    assert quiet(with_data(handler), 2).step == 6
    assert same_on_all(numbers(handler))


def step_past_ddp(handler, batch):
    """A method of the model other than forward is not known to DDP."""
    return nn.functional.cross_entropy(handler.module(batch[0]), batch[1])


def step_through_ddp(handler, batch):
    return nn.functional.cross_entropy(handler.model(batch[0]), batch[1])


def steps_of_ones_own() -> None:
    for batches in (1, 3):
        found = []
        for step in (step_past_ddp, step_through_ddp):
            handler = a_handler("ddp")
            handler.set_training_step(step)
            quiet(handler, 2, gradient_accumulation_steps=batches)
            assert same_on_all(numbers(handler))
            found.append(handler.history["loss"])
        assert found[0] == pytest.approx(found[1])


def a_model_that_is_changed() -> None:
    for parallel in ("ddp", "fsdp"):
        handler = a_handler(parallel)
        torch.manual_seed(dist.get_rank())
        handler.module.head = nn.Linear(6, 3)
        assert "call set_optimizer" in message(lambda handler=handler: quiet(handler))
        handler.set_optimizer(torch.optim.SGD, lr=0.1)
        if parallel == "ddp":
            assert same_on_all(numbers(quiet(handler)))
        else:
            assert "NNHandler(build)" in message(lambda handler=handler: quiet(handler))


def static_graph() -> None:
    found = []
    for options in ({}, {"static_graph": True}):
        handler = a_handler("ddp", parallel_options=options)
        found.append(quiet(handler, 1, gradient_accumulation_steps=3).history["loss"])
    assert found[0] == pytest.approx(found[1])


def a_group_without_gloo() -> None:
    """The ranks agree through a group of their own, as tensors on a GPU would make them wait."""
    of_ranks._cpu_groups.clear()
    with mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"):
        assert of_ranks.largest([dist.get_rank(), -1]) == [1, -1]
    assert of_ranks._cpu_groups.pop(dist.group.WORLD) is not None


class Noted(Callback):
    """Notes the steps at which the ranks agree; on rank 1 it can end training at step 4."""

    def __init__(self, stops: bool = False) -> None:
        self.stops, self.steps = stops, []

    def on_step_end(self, handler, loss):
        handler.stop_training |= self.stops and dist.get_rank() == 1 and handler.step == 4


class BecomesSlow(Callback):
    """One step takes long, by the clock of each rank."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, handler, loss):
        agreement._LATE_S = -1.0 if handler.step == self.step else 1e6


class Holes(TensorDataset):
    """On rank 1 the fifth batch of four samples fails."""

    def __init__(self) -> None:
        super().__init__(*data(160).tensors)

    def __getitem__(self, index):
        if index >= 32 and dist.get_rank() == 1:
            raise ValueError("planted")
        return super().__getitem__(index)


def agreements(folder: str) -> None:
    """The ranks agree every few steps; until then a rank without data keeps the others going."""
    agreed: list[int] = []
    handler = a_handler("ddp")

    def noted(numbers: list[int]) -> list[int]:
        agreed.append(handler.step)
        return of_ranks.largest(numbers)

    def begin(parallel: str, dataset=None) -> NNHandler:
        nonlocal handler
        handler = a_handler(parallel)
        handler.set_train_loader(dataset or data(160), batch_size=4)
        handler.val_data = None
        agreed.clear()
        return handler

    with (
        mock.patch.object(agreement, "largest", noted),
        mock.patch.object(agreement, "_PERIOD_S", 1e6),  # however slow the steps are
        mock.patch.object(agreement, "_LATE_S", 1e6),
    ):
        quiet(begin("ddp"))
        assert sorted(set(agreed)) == [0, 1, 3, 7, 15, 20]
        begin("ddp").auto_save(save_path=f"{folder}/agreed", every_steps=5)
        quiet(handler)
        assert sorted(set(agreed)) == [0, 1, 3, 5, 10, 15, 20]
        begin("ddp").add_callback(Noted(stops=True))
        assert quiet(handler).step == 7
        begin("ddp").add_callback(BecomesSlow(step=8))
        quiet(handler)
        assert sorted(set(agreed)) == [0, 1, 3, 7, 9, 17, 20]
        assert same_on_all(numbers(handler))
        for parallel in ("ddp", "fsdp"):
            begin(parallel, Holes()).auto_save(save_path=f"{folder}/holes-{parallel}")
            with (
                warnings.catch_warnings(record=True) as caught,
                pytest.raises((RankFailedError, ValueError)) as raised,
            ):
                quiet(handler)
            assert checkpoints_in(f"{folder}/holes-{parallel}") == ["step7"]
            if dist.get_rank() == 0:
                assert raised.value.rank == 1
            else:
                assert str(raised.value) == "planted"
                assert any("failed 3 steps ago" in str(one.message) for one in caught)


class Chain(nn.Module):
    """A container of networks that are not sequences, without a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.rest = nn.ModuleDict({"second": nn.Linear(4, 4), "third": nn.ModuleList()})
        self.rest["third"].append(nn.Linear(4, 3))


def chain_step(handler, batch):
    parts = handler.module
    outputs = parts.rest["third"][0](parts.rest["second"](parts.first(batch[0])))
    return nn.functional.cross_entropy(outputs, batch[1])


def containers_without_forward() -> None:
    torch.manual_seed(0)
    handler = NNHandler(Chain, parallel="fsdp")
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_training_step(chain_step)
    before = handler.module.first.weight.full_tensor()
    quiet(with_data(handler))
    assert not torch.equal(before, handler.module.first.weight.full_tensor())


class Penalized(nn.Module):
    """A loss with a parameter of its own beside the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs * self.scale, targets)


class Holds(Callback):
    def __init__(self, *parts) -> None:
        self.parts = parts


def parts_of_the_handler(folder: str) -> None:
    for parallel, other in (("ddp", "fsdp"), ("fsdp", "ddp")):
        handler = a_handler(parallel)
        handler.set_loss_fn(Penalized(handler.module))
        handler.add_callback(Holds(handler.model, handler.module.head))
        before = numbers(handler)
        quiet(handler, ema_decay=0.5, fast_dev_run=True)
        assert (numbers(handler), handler.step) == (before, 0)
        quiet(handler, gradient_clipping_norm=0.1)
        alone = a_handler(parallel)
        alone.set_loss_fn(Penalized(nn.Identity()))
        assert numbers(quiet(alone, gradient_clipping_norm=0.1)) == numbers(handler)
        handler.save(f"{folder}/parts-{parallel}")
        options = {"gradient_as_bucket_view": True} if other == "ddp" else {"wrap": (nn.Linear,)}
        path, more = f"{folder}/parts-{parallel}", {"parallel": other, "parallel_options": options}
        loaded = with_data(NNHandler.load(path, buffers="mean", **more))
        fresh = NNHandler.initialize_from_checkpoint(path, Net, buffers="mean", width=6, **more)
        for one in (loaded, fresh):
            assert (one.layout.options, one.layout.buffers) == (options, "mean")
        model = loaded.model if parallel == "ddp" else loaded.module
        assert loaded.callbacks[0].parts == (model, loaded.module.head)
        assert loaded.loss_fn.model is loaded.module
        assert loaded.loss_fn.scale.item() == handler.loss_fn.scale.item() != 1.0
        quiet(loaded)


def everything(folder: str) -> None:
    running_means(folder)
    failures_of_one_rank(folder)
    metrics_of_all_ranks()
    two_networks(folder)
    second_order()
    evaluation_leaves_no_trace()
    handlers_that_differ(folder)
    one_rank_decides(folder)
    parameters_that_one_rank_uses()
    steps_of_ones_own()
    a_model_that_is_changed()
    static_graph()
    a_group_without_gloo()
    agreements(folder)
    containers_without_forward()
    parts_of_the_handler(folder)


@pytest.mark.ranks
def test_buffers_failures_metrics_and_several_optimizers_on_two_ranks(tmp_path):
    run_ranks(2, everything, str(tmp_path), timeout_s=200)
    for path in ("ddp-mean", "fsdp-rank0", "ddp-emergency/step2", "gan-fsdp"):
        assert NNHandler.load(tmp_path / path, parallel="none").world_size == 1
    assert Net
