"""A training that is stopped and resumed gives the same bits as one without a stop."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import lr_scheduler

from shardckpt import NNHandler
from shardckpt.nn_handler import Callback, auto_saver
from tests.nn_handler.models import Net, Noisy, accuracy, data, same, weights
from tests.ranks import run_ranks, start_ranks


class StopAt(Callback):
    """Sends this process a signal after a step, once."""

    def __init__(self, step: int, number: int = 15) -> None:
        self.step, self.number = step, number

    def on_step_end(self, handler, loss):
        if handler.step == self.step:
            os.kill(os.getpid(), self.number)


STEPS_PER_EPOCH = 3  # 48 samples, batches of 8, two to a step


def everything(folder, *, stop_at: int = 0, number: int = 15, **saving) -> NNHandler:
    """Dropout, noise, accumulation, EMA, clipping, bfloat16, a gradient scaler, a scheduler."""
    torch.manual_seed(0)
    handler = NNHandler(Net, dropout=0.3)
    handler.set_optimizer(torch.optim.AdamW, lr=0.01, groups={"head": {"lr": 0.02}})
    handler.set_scheduler(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=20)
    handler.set_grad_scaler(init_scale=64.0, growth_interval=2)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.add_metric("accuracy", accuracy)
    handler.set_train_loader(Noisy(), batch_size=8, shuffle=True)
    handler.set_val_loader(data(15), batch_size=4)
    handler.add_callback(StopAt(stop_at, number))
    if folder is not None:
        handler.auto_save(save_path=folder, resume="auto", **{"interval": -1, **saving})
    return handler


def go(handler: NNHandler) -> NNHandler:
    handler.train(
        3,
        gradient_accumulation_steps=2,
        use_amp=True,
        gradient_clipping_norm=1.0,
        ema_decay=0.9,
        seed=3,
        progress_bar=False,
    )
    return handler


@pytest.fixture(scope="module")
def never_stopped():
    return go(everything(None))


def assert_equal(resumed: NNHandler, never: NNHandler) -> None:
    assert same(weights(resumed), weights(never))
    assert same(resumed.ema.weights, never.ema.weights)
    assert resumed.history == never.history
    assert resumed.scaler.state_dict() == never.scaler.state_dict()
    assert resumed.scaler.get_scale() > 64.0
    assert resumed.optimizer.param_groups[1]["lr"] == never.optimizer.param_groups[1]["lr"]


@pytest.mark.parametrize("step", range(1, 3 * STEPS_PER_EPOCH + 1))
def test_stopped_by_sigterm_at_any_step(tmp_path, never_stopped, step):
    with pytest.raises(SystemExit) as caught:
        go(everything(tmp_path, stop_at=step))
    assert caught.value.code == 128 + signal.SIGTERM
    assert os.listdir(tmp_path)
    resumed = everything(tmp_path, stop_at=0)
    go(resumed)
    assert_equal(resumed, never_stopped)
    if step == 2:  # the script once more: nothing is left to do
        again = go(everything(tmp_path, stop_at=0))
        assert again.epoch == 3
        assert_equal(again, never_stopped)


@pytest.mark.parametrize("suffix", ["", ".pth", ".safetensors"])
def test_stopped_by_ctrl_c(tmp_path, never_stopped, suffix, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    saving = {"name": f"e{{epoch}}{suffix}"}
    with pytest.raises(KeyboardInterrupt):
        go(everything(tmp_path, stop_at=4, number=int(signal.SIGINT), **saving))
    assert os.listdir(tmp_path) == [f"step4{suffix}"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_equal(go(everything(tmp_path, stop_at=0, **saving)), never_stopped)


def test_saves_within_epochs_and_in_the_background(tmp_path, never_stopped):
    saving = {"every_steps": 2, "keep_last": 2, "asynchronous": True}
    handler = go(everything(tmp_path, **saving))
    assert sorted(os.listdir(tmp_path)) == ["epoch3", "step8"]
    assert_equal(handler, never_stopped)
    (tmp_path / "epoch3").rename(tmp_path / ".gone")
    assert_equal(go(everything(tmp_path, **saving)), never_stopped)


class TakesAMinute(Callback):
    now_s = 0.0

    def on_step_end(self, handler, loss):
        TakesAMinute.now_s += 60.0


def by_minutes(folder) -> NNHandler:
    handler = everything(folder, every_minutes=1.5, interval=None)
    handler.add_callback(TakesAMinute())
    return handler


def test_saves_every_so_many_minutes(tmp_path, monkeypatch, never_stopped):
    clock = SimpleNamespace(monotonic=lambda: TakesAMinute.now_s)
    monkeypatch.setattr(auto_saver, "time", clock)
    go(by_minutes(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["step2", "step4", "step6", "step8"]
    assert_equal(go(by_minutes(tmp_path)), never_stopped)


def test_no_sample_is_repeated_or_skipped(tmp_path):
    with pytest.raises(SystemExit):
        go(first := everything(tmp_path, stop_at=2))
    resumed = everything(tmp_path)
    go(resumed)
    epoch = first.train_data.loader.dataset.seen[:32]
    rest = resumed.train_data.loader.dataset.seen[:16]
    assert sorted(epoch + rest) == list(range(48))


class Weighted(torch.utils.data.WeightedRandomSampler):
    """A sampler that draws from the global generator."""


def with_own_loader(folder, *, stop_at: int = 0) -> NNHandler:
    handler = everything(folder, stop_at=stop_at)
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=8, sampler=Weighted([1.0] * 48, 48))
    handler.set_train_loader(loader)
    return handler


def test_a_loader_with_a_sampler_of_its_own(tmp_path):
    never = go(with_own_loader(None))
    with pytest.raises(SystemExit):
        go(with_own_loader(tmp_path, stop_at=4))
    assert_equal(go(with_own_loader(tmp_path)), never)


def in_process(folder: str, stop_at: int) -> dict[str, list]:
    dist.destroy_process_group()
    found = weights(go(everything(folder, stop_at=stop_at)))
    return {name: tensor.tolist() for name, tensor in found.items()}


@pytest.mark.ranks
def test_in_a_new_process(tmp_path, never_stopped):
    folder = str(tmp_path / "c")
    ((ended_well, text),) = start_ranks(1, in_process, folder, 5).wait(100.0)
    assert not ended_well
    assert f"SystemExit: {128 + signal.SIGTERM}" in text
    (found,) = run_ranks(1, in_process, folder, 0)
    assert found == {name: tensor.tolist() for name, tensor in weights(never_stopped).items()}


def test_a_call_after_the_resumed_one_is_new(tmp_path):
    go(everything(tmp_path))
    handler = go(everything(tmp_path))
    assert handler.epoch == 3
    handler.optimizations["main"].scheduler = None
    handler.train(1, progress_bar=False)
    assert handler.epoch == 4
