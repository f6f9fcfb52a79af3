"""The faults that facades of this kind have: a test for each that fails on a handler that has it.

Faults 3 (part), 9 and up to 22; those of resume are in test_resume, of names in
test_save_schedule, of several ranks in test_ranks, of the manager in tests/manager.
"""

from __future__ import annotations

import math
import os
import sys
from fractions import Fraction

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.nn_handler import (
    Callback,
    CSVLogger,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    TensorBoardLogger,
)
from tests.nn_handler.models import (
    Net,
    NormNet,
    a_handler,
    accuracy,
    data,
    same,
    weights,
    with_data,
)


def quiet(handler: NNHandler, epochs: int = 1, **options) -> NNHandler:
    handler.train(epochs, progress_bar=False, **options)
    return handler


# 1: see test_handler.test_a_failed_save_keeps_the_last_good_one


@pytest.mark.parametrize("name", ["c", "c.pth", "c.safetensors"])
def test_03_no_names_of_wrappers_and_no_random_weights(tmp_path, name):
    handler = a_handler()
    if name == "c":
        handler.compile_model(backend="eager")
    quiet(handler)
    handler.save(tmp_path / name)
    loaded = NNHandler.load(tmp_path / name)
    assert same(weights(loaded), weights(handler))
    if name == "c":
        with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
            assert "model.head.weight" in checkpoint
            assert not [n for n in checkpoint if "_orig_mod" in n or ".module." in n]
    torch.save(
        {f"module._orig_mod.{k}": v for k, v in handler.module.state_dict().items()},
        tmp_path / "wrapped.pth",
    )
    within = {k.replace("head.", "head._orig_mod."): v for k, v in weights(handler).items()}
    torch.save(within, tmp_path / "within.pth")
    for wrapped in ("wrapped.pth", "within.pth"):
        clean = NNHandler.initialize_from_checkpoint(tmp_path / wrapped, Net, width=6)
        assert same(weights(clean), weights(handler))
    torch.save({"unrelated": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(errors.LoadMismatchError):
        NNHandler.initialize_from_checkpoint(tmp_path / "other.pth", Net)


@pytest.mark.parametrize("name", ["c", "c.pth"])
def test_04_the_average_goes_on_and_the_model_is_not_its_copy(tmp_path, name):
    handler = quiet(a_handler(), ema_decay=0.9)
    handler.auto_save(interval=1, save_path=tmp_path / "auto", name=name)
    quiet(handler, ema_decay=0.9)
    own, average = weights(handler), dict(handler.ema.weights)
    assert not same(own, average)
    resumed = NNHandler.load(tmp_path / "auto" / name)
    assert same(weights(resumed), own)
    assert same(resumed.ema.weights, average)
    before = resumed.ema
    with_data(resumed).auto_save(interval=None)
    quiet(resumed)  # goes on without being told ema_decay again
    quiet(handler)
    assert resumed.ema is before
    assert same(resumed.ema.weights, handler.ema.weights)
    with handler.ema_weights():
        assert same(weights(handler), handler.ema.weights)
    assert NNHandler.load(tmp_path / "auto" / name, skip_ema=True).ema is None


# 5, 7, 19 and 21: see test_resume


def test_06_each_callback_has_its_own_state_and_arguments(tmp_path):
    handler = a_handler()
    handler.add_callback(EarlyStopping("val_loss", patience=7))
    handler.add_callback(EarlyStopping("accuracy", "max", patience=9, min_delta=0.5))
    handler.add_callback(LearningRateMonitor())
    handler.add_callback(ModelCheckpoint(str(tmp_path / "best"), keep_best=2))
    handler.add_callback(CSVLogger(str(tmp_path / "log.csv")))
    quiet(handler, 3)
    handler.save(tmp_path / "c")
    resumed = with_data(NNHandler.load(tmp_path / "c", confirm=True))
    one, two, rates, best, log = resumed.callbacks
    assert (one.monitor, one.patience, two.monitor, two.patience) == ("val_loss", 7, "accuracy", 9)
    assert [c.state_dict() for c in resumed.callbacks] == [
        c.state_dict() for c in handler.callbacks
    ]
    assert one.best == min(handler.history["val_loss"])
    assert two.waited == 2
    assert len(rates.rates) == 18
    quiet(resumed, 2)
    assert len(os.listdir(tmp_path / "best")) == 2  # the list of the best goes on
    assert len(log.rows) == 5
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "1", "2", "3", "4", "5"]
    saved = NNHandler.load(tmp_path / "best" / os.listdir(tmp_path / "best")[0])
    assert saved.callbacks[3].best == best.best or saved.epoch < 5
    assert NNHandler.load(tmp_path / "c", skip_callbacks=True).callbacks == []


def test_08_retention_after_a_resume(tmp_path):
    handler = a_handler()
    handler.auto_save(interval=1, save_path=tmp_path, keep_last=2)
    quiet(handler, 3)
    resumed = with_data(NNHandler.load(tmp_path / "epoch3", confirm=True))
    quiet(resumed, 2)
    assert sorted(os.listdir(tmp_path)) == ["epoch4", "epoch5"]
    other = a_handler()  # another run does not touch what this one saved
    other.auto_save(interval=1, save_path=tmp_path, overwrite=True, name="other{epoch}")
    quiet(other, 2)
    assert sorted(os.listdir(tmp_path)) == ["epoch4", "epoch5", "other2"]


def test_best_and_last(tmp_path):
    handler = a_handler()
    handler.auto_save(
        interval=1, save_path=tmp_path, keep_best=1, monitor="lr", mode="max", save_last=True
    )
    quiet(handler, 4)  # the highest rate is that of epochs 1 and 2
    assert sorted(os.listdir(tmp_path)) == ["epoch2", "epoch4", "last"]
    assert NNHandler.load(tmp_path / "last").epoch == 4


def test_09_an_early_stop_is_the_last_epoch(tmp_path):
    handler = a_handler()
    handler.auto_save(interval=-1, save_path=tmp_path)
    handler.add_callback(EarlyStopping("accuracy", "max", patience=1, min_delta=10.0))
    quiet(handler, 30)
    assert handler.epoch == 2
    assert os.listdir(tmp_path) == ["epoch2"]
    resumed = a_handler()
    resumed.auto_save(interval=-1, save_path=tmp_path, resume="auto")
    resumed.add_callback(EarlyStopping("accuracy", "max", patience=1, min_delta=10.0))
    quiet(resumed, 30)
    assert resumed.epoch == 2  # the run that stopped early is not gone on with


# 10: see test_handler.test_handlers_share_nothing
# 11: see test_handler.test_saving_before_training


@pytest.mark.parametrize("file_format", ["torch", "safetensors"])
def test_12_split_files_load_completely(tmp_path, file_format):
    suffix = {"torch": ".pth", "safetensors": ".safetensors"}[file_format]
    handler = quiet(a_handler(), ema_decay=0.5)
    handler.save_multi_files(tmp_path / "many", file_format)
    handler.save_single_file(tmp_path / f"one{suffix}")
    NNHandler.save_multi_from_single(tmp_path / f"one{suffix}", tmp_path / "split", file_format)
    NNHandler.save_single_from_multi(tmp_path / "many", tmp_path / f"joined{suffix}")
    assert f"model{suffix}" in os.listdir(tmp_path / "many")
    quiet(handler)
    for name in ("many", f"one{suffix}", "split", f"joined{suffix}"):
        loaded = with_data(NNHandler.load(tmp_path / name))
        quiet(loaded)
        assert same(weights(loaded), weights(handler)), name
        assert same(loaded.ema.weights, handler.ema.weights), name
        assert loaded.history == handler.history
        weights_alone = NNHandler.initialize_from_checkpoint(tmp_path / name, Net, width=6)
        assert weights_alone.epoch == 0
    handler.save_multi_files(tmp_path / "many", file_format)  # replaces
    assert NNHandler.load(tmp_path / "many").epoch == 2
    hurt = tmp_path / "many" / f"model{suffix}"
    hurt.write_bytes(hurt.read_bytes()[:-1] + b"?")
    with pytest.raises(errors.CorruptionError):
        NNHandler.load(tmp_path / "many")
    hurt.unlink()
    with pytest.raises(errors.NotACheckpointError):
        NNHandler.load(tmp_path / "many")


# 13: see test_handler.test_what_has_no_importable_name_is_reported_and_asked_for_again


def test_13_a_value_that_can_not_be_saved_is_warned_of_and_asked_for(tmp_path):
    handler = NNHandler(Net)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    with_data(handler)
    handler.model_kwargs = {"width": object()}
    quiet(handler)
    with pytest.warns(UserWarning, match=r"model\.kwargs\.width"):
        handler.save(tmp_path / "c.pth")
    with pytest.raises(errors.CheckpointError, match=r"objects=\{'model\.kwargs\.width'"):
        NNHandler.load(tmp_path / "c.pth")
    assert os.listdir(tmp_path) == ["c.pth"]


class Halves(Callback):
    """Its state is a value that torch.load refuses."""

    def state_dict(self):
        return {"half": Fraction(1, 2)}


def test_13_what_torch_load_refuses_is_not_written(tmp_path):
    handler = NNHandler(Net)
    handler.add_callback(Halves())
    with pytest.raises(errors.UnsupportedLeafError, match=r"torch\.load") as caught:
        handler.save(tmp_path / "c.pth")
    assert caught.value.tensor == "callbacks.0.state.half"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["c", "c.pth", "c.safetensors"])
def test_14_weights_of_a_full_checkpoint(tmp_path, name):
    handler = quiet(a_handler(), ema_decay=0.9)
    handler.save(tmp_path / name)
    fresh = NNHandler.initialize_from_checkpoint(tmp_path / name, Net, width=6)
    assert same(weights(fresh), weights(handler))
    assert (fresh.epoch, fresh.optimizer, fresh.history) == (0, None, {})
    averaged = NNHandler.initialize_from_checkpoint(tmp_path / name, Net, width=6, ema=True)
    assert same(weights(averaged), handler.ema.weights)
    with pytest.raises(errors.LoadMismatchError):
        NNHandler.initialize_from_checkpoint(tmp_path / name, Net, width=7)


def test_14_weights_of_a_sharded_checkpoint_of_ones_own(tmp_path):
    model = Net(width=5)
    shardckpt.save({"net": {"inner": model}, "step": 3}, tmp_path / "c")
    fresh = NNHandler.initialize_from_checkpoint(tmp_path / "c", Net, width=5)
    assert torch.equal(fresh.module.head.bias, model.head.bias)


def test_15_parameter_groups_of_any_kind(tmp_path):
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


class Fails(Callback):
    def __init__(self, epoch: int) -> None:
        self.fails_at = epoch

    def on_epoch_end(self, handler, metrics):
        if handler.epoch == self.fails_at:
            raise RuntimeError("planted")


def test_17_an_exception_in_a_callback_stops_training_after_a_save(tmp_path):
    handler = a_handler()
    handler.auto_save(interval=-1, save_path=tmp_path)
    handler.add_callback(Fails(2))
    with pytest.raises(RuntimeError, match="planted"):
        quiet(handler, 5)
    assert os.listdir(tmp_path) == ["step12"]
    loaded = with_data(NNHandler.load(tmp_path / "step12", skip_callbacks=True, confirm=True))
    assert loaded.epoch == 2
    never = quiet(a_handler(), 3)
    assert same(weights(quiet(loaded)), weights(never))


def test_21_a_save_on_an_exception_in_the_data(tmp_path):
    class Breaks(torch.utils.data.Dataset):
        def __len__(self):
            return 48

        def __getitem__(self, index):
            if index == 40:
                raise OSError("planted")
            return data()[index]

    handler = a_handler()
    handler.set_train_loader(Breaks(), batch_size=8)
    handler.auto_save(interval=1, save_path=tmp_path)
    with pytest.raises(OSError, match="planted"):
        quiet(handler)
    assert os.listdir(tmp_path) == ["step5"]
    never = a_handler()
    never.set_train_loader(data(), batch_size=8)
    quiet(never)
    loaded = with_data(NNHandler.load(tmp_path / "step5", confirm=True))
    loaded.set_train_loader(data(), batch_size=8)
    assert same(weights(quiet(loaded)), weights(never))
    assert loaded.history == never.history


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_22_auto_resume_falls_back(tmp_path, how):
    handler = a_handler()
    handler.auto_save(interval=1, save_path=tmp_path)
    quiet(handler, 2)
    (shard,) = [p for p in (tmp_path / "epoch2").iterdir() if p.name.startswith("shard")][:1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] if how == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    resumed = a_handler()
    resumed.auto_save(interval=1, save_path=tmp_path, resume="auto")
    with pytest.warns(UserWarning, match="epoch2 is corrupted"):
        quiet(resumed, 2)
    assert same(weights(resumed), weights(handler))
    assert resumed.history == handler.history


# Bad input


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "{nothing}"}, "unknown field"),
        ({"name": "{val_nothing}"}, "unknown field"),
        ({"keep_best": 1, "monitor": "nothing"}, "never appears"),
    ],
)
def test_unknown_metrics_are_errors_before_the_first_epoch(tmp_path, options, text):
    handler = a_handler()
    handler.auto_save(save_path=tmp_path, **options)
    with pytest.raises(errors.StateError, match=text):
        quiet(handler)
    assert handler.step == 0


def test_a_monitor_that_never_appears():
    handler = a_handler()
    handler.add_callback(EarlyStopping("nothing"))
    with pytest.raises(errors.StateError, match="never appears"):
        quiet(handler)
    assert handler.step == 0


@pytest.mark.parametrize(
    "options",
    [
        {"every_steps": 0},
        {"every_minutes": -1},
        {"keep_last": 0},
        {"keep_best": 1},
        {"keep_best": "2", "monitor": "loss"},
        {"mode": "least"},
        {"resume": "yes"},
        {"overwrite": True, "keep_last": 2},
        {"name": "c.pth", "asynchronous": True},
        {"interval": True},
    ],
)
def test_bad_ways_to_save(options):
    with pytest.raises(errors.StateError):
        a_handler().auto_save(**options)


@pytest.mark.parametrize(
    "act",
    [
        lambda h: h.train(1, ema_decay=1.0),
        lambda h: h.train(1, gradient_clipping_norm=-1),
        lambda h: h.train(1.5),
        lambda h: h.add_metric("val_loss", accuracy),
        lambda h: h.add_callback(EarlyStopping),
        lambda h: h.add_callback(3),
        lambda h: h.freeze_module("nothing"),
        lambda h: h.set_model(Net),
        lambda h: h.set_scheduler(torch.optim.lr_scheduler.StepLR, step_size=1, interval="day"),
        lambda h: h.save_single_file("c.bin"),
        lambda h: h.save_multi_files("c", "pickle"),
        lambda h: EarlyStopping(mode="best"),
    ],
)
def test_bad_calls_are_refused(act):
    with pytest.raises(errors.StateError):
        act(a_handler())


def test_a_model_class_that_can_not_be_imported(tmp_path):
    class Local(Net):
        pass

    handler = NNHandler(Local, width=4)
    with pytest.warns(UserWarning, match=r"model\.class"):
        handler.save(tmp_path / "c")
    with pytest.raises(errors.CheckpointError) as caught:
        NNHandler.load(tmp_path / "c")
    assert caught.value.tensor == "model.class"
    assert same(weights(NNHandler.load(tmp_path / "c", model_class=Local)), weights(handler))


# Parts


def test_frozen_modules_stay_as_they_are(tmp_path):
    torch.manual_seed(0)
    handler = NNHandler(NormNet)
    handler.freeze_module("body")
    handler.set_optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    with_data(handler)
    before = weights(handler)
    quiet(handler)
    after = weights(handler)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}  # running statistics neither
    handler.save(tmp_path / "c")
    loaded = with_data(NNHandler.load(tmp_path / "c"))
    quiet(loaded)
    quiet(handler)
    assert same(weights(loaded), weights(handler))
    handler.freeze_module("body", freeze=False)
    assert all(p.requires_grad for p in handler.module.parameters())


def test_parts_that_are_skipped_are_not_loaded(tmp_path):
    quiet(a_handler(), 2).save(tmp_path / "c")
    assert NNHandler.load(tmp_path / "c", skip_optimizer=True).optimizer is None
    alone = NNHandler.load(tmp_path / "c", skip_scheduler=True, skip_history=True)
    assert (alone.scheduler, alone.history) == (None, {})
    assert alone.optimizer.state


def note(handler, metrics):
    handler.noted = [*getattr(handler, "noted", []), metrics["loss"]]


def test_a_plain_function_as_a_callback(tmp_path):
    handler = a_handler()
    handler.add_callback(note)
    quiet(handler, 2)
    assert handler.noted == handler.history["loss"]
    handler.save(tmp_path / "c")
    assert quiet(with_data(NNHandler.load(tmp_path / "c"))).noted


def test_amp_on_the_cpu_is_bfloat16():
    kinds = []
    handler = a_handler()
    handler.add_metric("kind", lambda outputs, targets: kinds.append(outputs.dtype) or 0.0)
    quiet(handler, use_amp=True)
    assert set(kinds) == {torch.bfloat16}
    assert handler.scaler is None
    assert math.isfinite(handler.history["loss"][0])


def test_metrics_are_written_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    handler = a_handler()
    handler.add_callback(TensorBoardLogger(tmp_path / "log"))
    quiet(handler, 2)
    handler.save(tmp_path / "c")
    quiet(handler, 1)  # is trained again, by a resume
    resumed = with_data(NNHandler.load(tmp_path / "c", confirm=True))
    quiet(resumed, 2)
    log = EventAccumulator(str(tmp_path / "log"))
    log.Reload()
    assert set(log.Tags()["scalars"]) == set(resumed.history)
    for name, values in resumed.history.items():
        found = [(event.step, event.value) for event in log.Scalars(name)]
        assert found == [(epoch, pytest.approx(v)) for epoch, v in enumerate(values, 1)]


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    handler = a_handler()
    handler.add_callback(TensorBoardLogger(tmp_path))
    with pytest.raises(errors.DependencyError, match="extra"):
        quiet(handler)
