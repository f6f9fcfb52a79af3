"""Saves in the background: staged while training goes on, in order, under a budget, to the end."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import errors
from shardckpt.saving import async_save as background
from shardckpt.storage.local import LocalStorage


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    if background._background is not None:
        background._background.finish()


@pytest.fixture
def slow_staging(monkeypatch):
    """Staging that copies nothing for a while: a change before it shows in the copy."""
    begun = threading.Event()
    stage = background.stage

    def late(*arguments):
        begun.set()
        time.sleep(0.3)
        return stage(*arguments)

    monkeypatch.setattr(background, "stage", late)
    return begun


class Gate(LocalStorage):
    """Storage whose saves begin once it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open_it = threading.Event()
        self.order: list[str] = []

    def begin(self, path, **options):
        self.open_it.wait(30)
        self.order.append(os.path.basename(path))
        return super().begin(path, **options)


def a_job(optimizer_class=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 3))
    model.register_buffer("big", torch.zeros(300, 300))  # above COPY_AT_ONCE_BYTES
    return model, optimizer_class(model.parameters(), lr=0.1, **options)


def train(model, optimizer):
    loss = model(torch.randn(8, 40)).square().sum()
    model.big.add_(1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def train_while_saving(folder, model, optimizer, state) -> bool:
    """Whether three saves, with a step of training after each, hold the states of their calls."""
    train(model, optimizer)
    kept, handles = [], []
    for number in range(3):
        shardckpt.save(state, folder / f"kept{number}")
        kept.append(shardckpt.load_state(folder / f"kept{number}"))
        handles.append(shardckpt.async_save(state, folder / f"c{number}"))
        train(model, optimizer)
    for handle in handles:
        handle.result(60)
    return all(
        same(kept[number], shardckpt.load_state(folder / f"c{number}")) for number in range(3)
    )


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.SGD, {"momentum": 0.9, "foreach": False}),
        (torch.optim.AdamW, {"amsgrad": True, "lr": torch.tensor(0.1)}),
    ],
    ids=["foreach", "fused", "loop", "tensor lr"],
)
def test_a_step_waits_for_staging(tmp_path, slow_staging, optimizer_class, options):
    options = {"lr": 0.1, **options}
    model, _ = a_job()
    optimizer = optimizer_class(model.parameters(), **options)
    state = {"model": model, "optimizer": optimizer}
    assert train_while_saving(tmp_path, model, optimizer, state)


def test_a_step_of_an_optimizer_outside_the_state_waits_too(tmp_path, slow_staging):
    model, optimizer = a_job()
    assert train_while_saving(tmp_path, model, optimizer, {"model": model})


def test_a_plain_state_dict_is_safe_from_steps(tmp_path, slow_staging):
    model, optimizer = a_job()
    model.register_buffer("big", torch.zeros(3))  # a large one would look like a parameter
    assert train_while_saving(tmp_path, model, optimizer, {"model": model.state_dict()})


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # of torch up to 2.10
def test_a_compiled_step_waits_for_staging(tmp_path, slow_staging):
    model, optimizer = a_job()
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    assert train_while_saving(tmp_path, model, optimizer, {"model": model, "optim": optimizer})


def test_steps_that_do_not_wait_would_be_seen(tmp_path, slow_staging, monkeypatch):
    monkeypatch.setattr(background._Job, "before_step", lambda job: None)
    model, optimizer = a_job()
    with pytest.raises(errors.StateError, match="changed before it was staged"):
        train_while_saving(tmp_path, model, optimizer, {"model": model, "optimizer": optimizer})


def test_steps_that_neither_wait_nor_are_noticed_would_be_seen(tmp_path, slow_staging, monkeypatch):
    monkeypatch.setattr(background._Job, "before_step", lambda job: None)
    monkeypatch.setattr(background.Snapshot, "changed", lambda snapshot, flat: None)
    model, optimizer = a_job()
    state = {"model": model, "optimizer": optimizer}
    assert not train_while_saving(tmp_path, model, optimizer, state)


def test_a_change_before_staging_is_an_error_that_names_the_tensor(tmp_path, slow_staging):
    model, _ = a_job()
    handle = shardckpt.async_save({"m": model}, tmp_path / "c")
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(errors.StateError, match=r"m\.0\.weight") as error:
        handle.result(30)
    assert "wait_staged()" in error.value.remedy
    assert not (tmp_path / "c").exists()


def test_values_arrays_and_small_tensors_are_those_of_the_call(tmp_path, slow_staging):
    small, array, numbers = torch.zeros(4), np.zeros(100_000), {"loss": [1.0], "set": {1}}
    state = {"small": small, "array": array, "numbers": numbers, "own": shardckpt.PerRank(small)}
    handle = shardckpt.async_save(state, tmp_path / "c")
    small.add_(1)
    array += 1
    numbers["loss"].append(2.0)
    numbers["set"].add(2)
    handle.result(30)
    found = shardckpt.load_state(tmp_path / "c")
    assert found["small"].tolist() == found["own"][0].tolist() == [0.0] * 4
    assert not found["array"].any()
    assert found["numbers"] == {"loss": [1.0], "set": {1}}


def test_tensors_that_are_let_go_are_saved(tmp_path, slow_staging):
    model, optimizer = a_job()
    train(model, optimizer)
    state = {"model": model, "optimizer": optimizer}
    shardckpt.save(state, tmp_path / "kept")
    handle = shardckpt.async_save(state, tmp_path / "c")
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # new tensors
    for parameter in model.parameters():
        parameter.data = torch.zeros(1)
    del model, optimizer, state
    handle.result(30)
    kept, found = (shardckpt.load_state(tmp_path / name) for name in ("kept", "c"))
    assert same(kept["optimizer"], found["optimizer"])


def test_load_waits_for_staging(tmp_path, slow_staging):
    state = {"t": torch.zeros(200, 200)}
    shardckpt.save({"t": torch.ones(200, 200)}, tmp_path / "ones")
    handle = shardckpt.async_save(state, tmp_path / "zeros")
    shardckpt.load(state, tmp_path / "ones")
    handle.result(30)
    assert not shardckpt.load_state(tmp_path / "zeros")["t"].any()
    assert state["t"].all()


def test_the_same_files_as_save_writes(tmp_path):
    """Names, ties, kinds and order do not depend on how a state is saved."""
    model, optimizer = a_job()
    train(model, optimizer)
    base = nn.Linear(1100, 1000)  # frozen: enough for a file of its own
    base.requires_grad_(False)
    tied = model[3].weight
    rest = {"tied": tied, "alias": tied.detach(), "big": model.big, "again": base.bias.detach()}
    state = {"big first": model.big, "m": model, "base": base, "o": optimizer, **rest}
    shardckpt.save(state, tmp_path / "a")
    shardckpt.async_save(state, tmp_path / "b").result(30)
    names = [sorted(os.listdir(tmp_path / folder)) for folder in "ab"]
    assert names[0] == names[1]
    assert len(names[0]) == 3
    for name in names[0][1:]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saves_are_written_in_the_order_of_the_calls(tmp_path):
    gate = Gate()
    state = {"t": torch.arange(100_000)}
    handles = [shardckpt.async_save(state, tmp_path / str(n), storage=gate) for n in range(4)]
    handles[1].wait_staged(30)  # the budget has room for two
    with pytest.raises(TimeoutError):
        handles[2].wait_staged(0.2)
    with pytest.raises(TimeoutError):
        handles[0].result(0.01)
    gate.open_it.set()
    for handle in reversed(handles):
        handle.result(60)
    assert gate.order == ["0", "1", "2", "3"]


def test_a_budget_below_one_state_lets_one_in(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDCKPT_STAGING_BYTES", str(1))
    for number in range(3):
        shardckpt.async_save({"t": torch.full((9_999,), number)}, tmp_path / str(number))
    background._background.finish()
    for number in range(3):
        assert shardckpt.load_state(tmp_path / str(number))["t"].unique().tolist() == [number]


def test_an_error_that_nobody_asked_for_is_raised_by_the_next_call(tmp_path):
    (tmp_path / "file").write_text("")
    failed = shardckpt.async_save({"t": torch.ones(2)}, tmp_path / "file" / "c")
    while not failed.done():
        time.sleep(0.01)
    with pytest.raises(errors.StorageError):
        shardckpt.async_save({"t": torch.ones(2)}, tmp_path / "next")
    shardckpt.async_save({"t": torch.ones(2)}, tmp_path / "after").result(30)  # told once
    assert shardckpt.load_state(tmp_path / "next")["t"].tolist() == [1.0, 1.0]  # it went on


def test_an_error_that_was_asked_for_is_not_raised_again(tmp_path):
    with pytest.raises(errors.UnsupportedLeafError):
        shardckpt.async_save({"m": object()}, tmp_path / "c").result(30)
    shardckpt.async_save({"t": torch.ones(2)}, tmp_path / "c").result(30)


def test_several_threads_may_call(tmp_path):
    def save(number):
        state = {"t": torch.full((999,), number)}
        return shardckpt.async_save(state, tmp_path / str(number)).result(60)

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(save, range(8)))) == 8
    for number in range(8):
        assert shardckpt.load_state(tmp_path / str(number))["t"].unique().tolist() == [number]


def test_a_forked_child_saves_by_itself(tmp_path):
    gate = Gate()
    handle = shardckpt.async_save({"t": torch.ones(3)}, tmp_path / "parent", storage=gate)
    child = os.fork()
    if not child:
        try:
            background.wait_until_staged()
            shardckpt.async_save({"t": torch.zeros(3)}, tmp_path / "child").result(30)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    gate.open_it.set()
    handle.result(30)
    assert os.waitstatus_to_exitcode(status) == 0
    assert shardckpt.load_state(tmp_path / "child")["t"].tolist() == [0.0] * 3


def test_loads_and_steps_need_no_lock_of_an_ended_save(tmp_path):
    """A KeyboardInterrupt may leave the lock of a future locked, as its methods are in Python."""
    state = {"t": torch.ones(3)}
    handle = shardckpt.async_save(state, tmp_path / "c")
    handle.result(30)
    optimizer = torch.optim.SGD([torch.ones(3, requires_grad=True)])
    with ThreadPoolExecutor(2) as threads, handle._staging._condition:
        load = threads.submit(shardckpt.load, state, tmp_path / "c")
        step = threads.submit(optimizer.step)
        assert not wait([load, step], 10).not_done


EXIT = """
import os, sys, threading, time, torch, shardckpt
from shardckpt.storage.local import LocalStorage

class Slow(LocalStorage):
    def begin(self, path, **options):
        print("begun", flush=True)
        time.sleep({delay})
        return super().begin(path, **options)

state = {{"t": torch.arange(3_000_000.0), "u": torch.ones(3)}}
first = shardckpt.async_save(state, sys.argv[1] + "/c", storage=Slow())
second = shardckpt.async_save(state, sys.argv[1] + "/d")
{ending}
"""


def start(folder, ending: str, delay: float):
    code = EXIT.format(ending=ending, delay=delay)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


starts_no_threads_at_exit = pytest.mark.skipif(
    (3, 12, 0) <= sys.version_info < (3, 12, 2), reason="this Python starts no threads at exit"
)


@starts_no_threads_at_exit
def test_sys_exit_waits_for_saves(tmp_path):
    process = start(tmp_path, "sys.exit(3)", delay=0.5)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 3, stderr
    for name in ("c", "d"):
        assert shardckpt.load_state(tmp_path / name)["t"][-1] == 2_999_999


@starts_no_threads_at_exit
def test_an_exception_waits_for_saves_and_a_failure_is_logged(tmp_path):
    (tmp_path / "d").write_text("")
    process = start(tmp_path, "raise ValueError('mine')", delay=0.5)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "ValueError: mine" in stderr
    assert "a save in the background failed" in stderr
    assert "shardckpt.errors" in stderr
    assert shardckpt.load_state(tmp_path / "c")["t"][-1] == 2_999_999


def test_a_killed_process_leaves_no_half_checkpoint(tmp_path):
    shardckpt.save({"t": torch.zeros(3)}, tmp_path / "before")
    process = start(tmp_path, "time.sleep(60)", delay=60)
    assert process.stdout.readline() == "begun\n"
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert not (tmp_path / "c").exists()
    shardckpt.save({"t": torch.ones(3)}, tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["before", "c"]
