"""NNHandler: train, save, load, resume; on one process and on several."""

from __future__ import annotations

import os
import random
import re
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import shardckpt
from shardckpt import NNHandler, api, errors
from tests.nn_handler.models import (
    DS,
    Net,
    X,
    a_handler,
    accuracy,
    data,
    make,
    same,
    train,
    weights,
    with_data,
)
from tests.ranks import FSDP2_ON_CPU, on_world_sizes, run_ranks


@pytest.mark.parametrize("name", ["c", "c.pth", "deep/er/c.pt", "c.safetensors"])
def test_resumed_training_equals_training_never_stopped(tmp_path, name):
    never_stopped = a_handler()
    never_stopped.train(epochs=5)
    handler = a_handler()
    handler.train(epochs=3)
    handler.save(tmp_path / name)
    torch.manual_seed(1234)
    resumed = with_data(NNHandler.load(tmp_path / name))
    assert (resumed.epoch, resumed.step) == (3, 18)
    assert same(weights(resumed), weights(handler))
    resumed.train(epochs=2)
    assert same(weights(resumed), weights(never_stopped))
    assert resumed.history == never_stopped.history
    assert resumed.loss_fn.label_smoothing == 0.1
    assert set(resumed.history) == {"loss", "accuracy", "lr", "val_loss", "val_accuracy"}


def test_random_number_generators_go_on(tmp_path):
    handler = a_handler()
    handler.save(tmp_path / "c")
    expected = (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random())
    NNHandler.load(tmp_path / "c")
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()) == expected


def test_saving_before_training(tmp_path):
    handler = NNHandler(Net)
    handler.save(tmp_path / "c")
    assert same(weights(NNHandler.load(tmp_path / "c")), weights(handler))


def test_torch_files_need_no_pickle(tmp_path):
    handler = a_handler()
    handler.train(epochs=1)
    handler.save(tmp_path / "c.pth")
    content = torch.load(tmp_path / "c.pth", weights_only=True)
    assert content["progress"]["epoch"] == 1
    assert torch.equal(content["model"]["head.weight"], handler.module.head.weight)
    assert os.listdir(tmp_path) == ["c.pth"]


def test_parameter_groups_survive(tmp_path):
    handler = NNHandler(Net)
    handler.set_optimizer(torch.optim.SGD, groups={"head": {"lr": 0.5}}, lr=0.1, momentum=0.9)
    handler.save(tmp_path / "c")
    groups = NNHandler.load(tmp_path / "c").optimizer.param_groups
    assert [(group["lr"], len(group["params"])) for group in groups] == [(0.1, 4), (0.5, 2)]
    with pytest.raises(errors.StateError, match="no parameter"):
        handler.set_optimizer(torch.optim.SGD, groups={"nothing": {}}, lr=0.1)


def test_auto_save_names_and_overwrite(tmp_path):
    handler = a_handler()
    name = "m{epoch}_valloss{val_loss:.4f}"
    handler.auto_save(interval=2, save_path=tmp_path / "all", name=name)
    handler.train(epochs=5)
    found = sorted(os.listdir(tmp_path / "all"))
    assert [re.sub(r"[\d.]+$", "#", entry) for entry in found] == [
        "m2_valloss#",
        "m4_valloss#",
        "m5_valloss#",  # the last epoch
    ]
    handler.auto_save(interval=1, save_path=tmp_path / "one", name="e{epoch}", overwrite=True)
    handler.train(epochs=3)
    assert os.listdir(tmp_path / "one") == ["e8"]
    resumed = with_data(NNHandler.load(tmp_path / "one" / "e8"))
    with pytest.warns(UserWarning, match="until you confirm"):
        resumed.train(epochs=1)
    assert os.listdir(tmp_path / "one") == ["e8"]
    resumed.save(tmp_path / "again")  # unconfirmed parts stay in the checkpoint
    resumed = with_data(NNHandler.load(tmp_path / "again"))
    assert "'save_path': " in resumed.unconfirmed[0]
    resumed.confirm()
    assert resumed.unconfirmed == []
    resumed.train(epochs=1)
    assert os.listdir(tmp_path / "one") == ["e10"]
    handler.auto_save(interval=-1, save_path=tmp_path / "last", name="e{epoch}")
    handler.train(epochs=2)
    assert os.listdir(tmp_path / "last") == ["e10"]
    handler.auto_save(interval=None, save_path=tmp_path / "never")
    handler.train(epochs=1)
    assert not (tmp_path / "never").exists()


def test_a_failed_save_keeps_the_last_good_one(tmp_path, monkeypatch):
    handler = a_handler()
    handler.auto_save(interval=1, save_path=tmp_path, name="e{epoch}", overwrite=True)
    handler.train(epochs=1)

    def full(*arguments, **options):
        raise errors.NoSpaceError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(api, "save", full)
        with warnings.catch_warnings(record=True) as caught, pytest.raises(errors.NoSpaceError):
            warnings.simplefilter("always")
            handler.train(epochs=9)
    assert [w for w in caught if "e4 was not saved, failure 3 in a row" in str(w.message)]
    assert handler.epoch == 5
    assert os.listdir(tmp_path) == ["e1"]
    assert NNHandler.load(tmp_path / "e1").epoch == 1
    handler.train(epochs=1)
    assert os.listdir(tmp_path) == ["e6"]


@pytest.mark.parametrize("name", ["c", "c.pth", "c.safetensors"])
def test_what_has_no_importable_name_is_reported_and_asked_for_again(tmp_path, name):
    handler = a_handler()
    handler.add_metric("mine", lambda outputs, targets: 0.5)
    with pytest.warns(UserWarning, match="metrics.mine"):
        handler.save(tmp_path / name)
    handler.save(tmp_path / name)  # warned of once
    awaiting = with_data(NNHandler.load(tmp_path / name))
    assert same({"": awaiting.predict(torch.ones(1, 4))}, {"": handler.predict(torch.ones(1, 4))})
    with pytest.raises(errors.StateError, match=r"add_metric\('mine', ...\)"):
        awaiting.train(epochs=1)
    awaiting.add_metric("mine", lambda outputs, targets: 0.125)
    assert awaiting.train(epochs=1)["mine"] == [0.125]
    given = {"mine": lambda outputs, targets: 0.25}
    loaded = with_data(NNHandler.load(tmp_path / name, metrics=given))
    assert loaded.train(epochs=1)["mine"] == [0.25]


@pytest.mark.parametrize("name", ["c", "c.pth"])
@pytest.mark.parametrize(
    "device_map",
    ["cpu", "auto", "disk", {"": "cpu", "layers.0": "disk"}, {"head": "cpu", "layers": "disk"}],
)
def test_a_handler_loads_with_a_device_map(tmp_path, name, device_map):
    handler = a_handler(dropout=0.5)
    handler.train(epochs=1, ema_decay=0.9)
    handler.save(tmp_path / name)
    placed = NNHandler.load(tmp_path / name, device_map=device_map)
    inputs = data().tensors[0]
    for ema in (False, True, False):
        assert torch.equal(placed.predict(inputs, ema=ema), handler.predict(inputs, ema=ema))
    assert not placed.model.training  # prediction leaves the mode as it was
    assert placed.optimizer is None
    assert placed.epoch == 1
    assert NNHandler.load(tmp_path / name, device_map=device_map, skip_ema=True).ema is None


def test_a_meta_device_map(tmp_path):
    a_handler().save(tmp_path / "c")
    placed = NNHandler.load(tmp_path / "c", device_map="meta")
    assert all(parameter.is_meta for parameter in placed.model.parameters())


def test_a_model_that_changed(tmp_path):
    a_handler().save(tmp_path / "c")
    with pytest.raises(errors.LoadMismatchError):
        NNHandler.load(tmp_path / "c", model_class=nn.Identity)


def test_a_checkpoint_of_something_else(tmp_path):
    shardckpt.save({"w": torch.ones(2)}, tmp_path / "c")
    torch.save({"w": torch.ones(2)}, tmp_path / "c.pth")
    (tmp_path / "broken.pth").write_bytes(b"no zip")
    for name, kind in {
        "c": errors.NotACheckpointError,
        "c.pth": errors.NotACheckpointError,
        "broken.pth": errors.NotACheckpointError,
        "absent.pth": errors.CheckpointNotFoundError,
        "absent": errors.CheckpointNotFoundError,
    }.items():
        with pytest.raises(kind) as caught:
            NNHandler.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def train_on_ranks(size: int, folder: str, parallel: str) -> None:
    rank = dist.get_rank()
    if size == 4:
        handler = a_handler(parallel)
        handler.auto_save(interval=1, save_path=f"{folder}/auto", name="e{epoch}", overwrite=True)
        handler.train(epochs=2, progress_bar=False)
        handler.save(f"{folder}/c")
        handler.save(f"{folder}/c.pth")
        found = weights(handler)
        if rank == 0:
            torch.save([found, handler.history], f"{folder}/expected.pt")
        return
    expected, history = torch.load(f"{folder}/expected.pt", weights_only=True)
    other = {"ddp": "fsdp", "fsdp": "ddp"}[parallel]
    for name, kind in (("c", "ddp"), ("c", "fsdp"), ("c.pth", other), ("auto/e2", parallel)):
        resumed = with_data(NNHandler.load(f"{folder}/{name}", parallel=kind))
        assert same(weights(resumed), expected), (name, kind)
        assert resumed.history == history
        if name == "c" and size > 1:
            resumed.auto_save(interval=None)  # the other world sizes want to find what is there
            resumed.train(epochs=1, progress_bar=False)
            assert resumed.epoch == 3


@pytest.mark.ranks
@pytest.mark.skipif(not FSDP2_ON_CPU, reason="in this torch, FSDP2 needs GPUs")
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_any_number_of_ranks_resumes(tmp_path, parallel):
    sizes = (4, 2, 3, 1)
    run_ranks(
        4,
        on_world_sizes,
        sizes,
        train_on_ranks,
        str(tmp_path),
        parallel,
        timeout_s=110,
    )
    assert os.listdir(tmp_path / "auto") == ["e2"]
    expected, _ = torch.load(tmp_path / "expected.pt", weights_only=True)
    assert same(weights(NNHandler.load(tmp_path / "c")), expected)


def ddp_twice(folder: str) -> list[float]:
    handler = a_handler("ddp")
    handler.train(epochs=1)
    handler.save(f"{folder}/c")
    handler.train(epochs=1)
    resumed = with_data(NNHandler.load(f"{folder}/c"))
    resumed.train(epochs=1)
    assert same(weights(resumed), weights(handler))
    return resumed.history["val_loss"]


@pytest.mark.ranks
def test_resuming_on_as_many_ranks_is_exact(tmp_path):
    first, second = run_ranks(2, ddp_twice, str(tmp_path))
    assert first == second


@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_a_single_file_that_is_damaged_is_not_loaded(tmp_path, name):
    handler = a_handler()
    handler.save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    values = whole.index(handler.module.head.weight.detach().numpy().tobytes())
    for at in (values, values + 5, *range(7, len(whole), len(whole) // 10)):
        hurt = bytearray(whole)
        hurt[at] ^= 4
        (tmp_path / name).write_bytes(hurt)
        try:
            loaded = NNHandler.load(tmp_path / name)
        except errors.CheckpointError:
            continue
        assert at not in (values, values + 5)  # a zip archive has bytes that mean nothing
        assert same(weights(loaded), weights(handler))


def test_torch_files_of_others(tmp_path):
    model = Net(width=5)
    old = tmp_path / "old.pth"
    torch.save(model.state_dict(), old, _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.state_dict(), tmp_path / "no_checksums.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("old.pth", "no_checksums.pth"):
        fresh = NNHandler.initialize_from_checkpoint(tmp_path / name, Net, width=5)
        assert torch.equal(fresh.module.head.bias, model.head.bias)


def test_evaluate_and_predict():
    handler = make()
    handler.add_metric("accuracy", accuracy)
    train(handler, ema_decay=0.9)
    found = handler.evaluate()
    assert found["loss"] == pytest.approx(handler.history["val_loss"][-1])
    assert handler.evaluate(DS, batch_size=7)["accuracy"] == pytest.approx(found["accuracy"])
    outputs = handler.predict(DS, batch_size=7)
    assert torch.allclose(outputs, handler.predict(X))
    averaged = handler.predict(DataLoader(DS, 5), ema=True)
    assert not torch.allclose(outputs, averaged)
    assert averaged.shape == outputs.shape
    assert handler.model.training
