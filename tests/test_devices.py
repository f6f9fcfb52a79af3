"""Tensors of devices: the order of copies, events and buffers, on a stand-in for an accelerator.

The stand-in delays work as long as it may, or runs it as early as it may. PLANTED lists changes to
the package, each of which must give wrong bytes on one of the two.
"""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.errors import StateError
from shardckpt.io import devices, downloads
from shardckpt.loading import shard_reader
from shardckpt.saving import async_save as background
from shardckpt.saving import shard_writer, staging
from shardckpt.saving.staged_part import Divider
from tests.device_states import (
    MIB,
    filled,
    forget,
    image,
    in_use,
    produced,
    samples,
    staged,
    values,
    written,
)
from tests.stand_in_device import DEVICES, StandIn, raw, stand_in

ALONE: Any = SimpleNamespace(rank=0, world_size=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices") / "c"
    shardckpt.save(samples(), folder)
    return folder


def stepped(machine: StandIn, module: Any = background) -> bool:
    """Whether the work of a step comes after the copies, although the CPU does not wait."""
    state = {"w": values(1, MIB)}
    there = produced(machine, state)
    job = module._Job(there, ALONE, None, None, check_replicas=False)
    issued, go_on = threading.Event(), threading.Event()

    def hold(mark: Any) -> None:
        issued.set()
        assert go_on.wait(60)
        devices.wait_for(mark)

    module.wait_for = hold
    thread = threading.Thread(target=job.stage, args=(staging.StagingPool(), Divider()))
    thread.start()
    try:
        assert issued.wait(60)
        job.before_step()  # returns while the copies are held
        weight = raw(there["w"])
        machine.default[DEVICES[0]].submit(lambda: weight.add_(1))
        machine.default[DEVICES[0]].run()
        torch.autograd.graph.increment_version(there["w"])
    finally:
        go_on.set()
        thread.join()
        module.wait_for = devices.wait_for
    return job.error is None and torch.equal(job.plan.data[0], state["w"])


def test_a_step_on_the_device_waits_for_the_copies_and_the_cpu_does_not(late):
    assert stepped(late)


def test_a_change_before_the_step_is_an_error(machine):
    there = produced(machine, {"w": values(1, MIB)})
    job = background._Job(there, ALONE, None, None, check_replicas=False)
    there["w"].add_(1)
    job.stage(staging.StagingPool(), Divider())
    assert isinstance(job.error, StateError)
    assert job.error.tensor == "w"


# ---- from the call to the file and back


def test_save_and_load_take_tensors_of_devices(machine, tmp_path):
    state = samples()
    shardckpt.save(produced(machine, state), tmp_path / "c")
    found = shardckpt.load_state(tmp_path / "c")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    targets = in_use(machine, state)
    shardckpt.load(targets, tmp_path / "c")
    machine.synchronize(DEVICES[0])
    assert all(torch.equal(raw(targets[name]), tensor) for name, tensor in state.items())


def test_async_saves_keep_the_values_of_their_calls(machine, tmp_path):
    state = {"w": values(1, 3 * MIB), "x": values(2, 300)}
    there = produced(machine, state)
    first = shardckpt.async_save(there, tmp_path / "1")
    first.wait_staged()
    for tensor in there.values():
        tensor.add_(1)
    shardckpt.async_save(there, tmp_path / "2").result(60)
    first.result(60)
    for number in (1, 2):
        found = shardckpt.load_state(tmp_path / str(number))
        assert all(torch.equal(found[name], t + (number - 1)) for name, t in state.items())


def test_an_incremental_save_links_unchanged_tensors_of_devices(machine, tmp_path):
    state = samples()
    shardckpt.save(produced(machine, state), tmp_path / "1")
    report = shardckpt.save(produced(machine, state), tmp_path / "2", base=tmp_path / "1")
    assert sum(report.linked_by_rank) > 0
    found = shardckpt.load_state(tmp_path / "2")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_cpu_state_asks_nothing_of_devices(monkeypatch, tmp_path):
    class Forbidden(devices.Accelerator):
        def current_stream(self, device):
            raise AssertionError

        new_stream = page_lock = page_locked_tensor = synchronize = current_stream

    monkeypatch.setattr(devices.accelerator, "__class__", Forbidden)
    state = {"w": torch.ones(MIB), "t": torch.ones(30, 20).t(), "x": torch.ones(3)}
    shardckpt.save(state, tmp_path / "c")
    shardckpt.async_save(state, tmp_path / "d").result(60)
    shardckpt.load(state, tmp_path / "c")


def test_a_limit_of_locked_memory_gives_ordinary_memory():
    with stand_in(lockable=5) as machine:
        assert staged(machine)
        assert written(produced(machine, samples()).values(), image(samples().values()))
        assert not machine.locked
        forget()


def test_copies_block_where_there_is_one_stream(late, monkeypatch, saved):
    monkeypatch.setattr(StandIn, "new_stream", lambda self, device: None)
    assert written(produced(late, samples()).values(), image(samples().values()))
    assert filled(saved, samples(), in_use(late, samples()))
    assert staged(late)


# ---- planted faults


def planted(module: str, line: str, change: str, monkeypatch: Any) -> ModuleType:
    """Return a module with one change to its source."""
    real = importlib.import_module(module)
    source = Path(real.__file__).read_text()
    assert source.count(line) == 1, line
    changed = ModuleType(module)
    changed.__file__ = real.__file__
    monkeypatch.setitem(sys.modules, module, changed)
    exec(compile(source.replace(line, change), real.__file__, "exec"), vars(changed))
    if hasattr(real, "accelerator"):
        changed.accelerator = devices.accelerator  # the stand-in
    return changed


def saves_right(machine, module, saved, monkeypatch):
    monkeypatch.setattr(shard_writer, "host_pieces", module.host_pieces)
    return written(produced(machine, samples()).values(), image(samples().values()))


def waits_for_producers(machine, module, saved, monkeypatch):
    for user in (downloads, staging):
        monkeypatch.setattr(user, "CopyStream", module.CopyStream)
    return saves_right(machine, downloads, saved, monkeypatch) and staged(machine)


def loads_right(machine, module, saved, monkeypatch):
    return filled(saved, samples(), in_use(machine, samples()), module.read_all, threads=1)


def loads_after_producers(machine, module, saved, monkeypatch):
    from shardckpt.loading import uploads

    monkeypatch.setattr(uploads, "CopyStream", module.CopyStream)
    return loads_right(machine, shard_reader, saved, monkeypatch)


def steps_after_copies(machine, module, saved, monkeypatch):
    return stepped(machine, module)


def writes_what_was_staged(machine, module, saved, monkeypatch):
    state = {"w": values(1, MIB)}
    job = module._Job(produced(machine, state), ALONE, None, None, check_replicas=False)
    job.stage(staging.StagingPool(), Divider())
    return torch.equal(job.plan.data[0], state["w"])


PLANTED = [
    ("io.downloads", "        wait_for(mark)\n    return data", "        pass\n    return data",
     saves_right, "late"),
    ("io.downloads", "_BUFFERS = 2", "_BUFFERS = 1", saves_right, "early"),
    ("io.devices", "self._stream.wait_event(submitted[device])", "pass",
     waits_for_producers, "late"),
    ("io.devices", "self._stream.wait_event(submitted[device])", "pass",
     loads_after_producers, "late"),
    ("loading.shard_reader", "uploads.wait(buffer)\n                read_bytes",
     "read_bytes", loads_right, "late"),
    ("loading.shard_reader", "            for buffer in own:\n                uploads.wait(buffer)",
     "            pass", loads_right, "late"),
    ("saving.async_save", "wait_on_device(device, mark)", "pass", steps_after_copies, "late"),
    ("saving.async_save", "for mark in marks.values():\n                wait_for(mark)", "pass",
     writes_what_was_staged, "late"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "line", "change", "right", "wrong_when"),
    PLANTED,
    ids=[f"{module}-{change.split()[0]}-{n}" for n, (module, _, change, *_) in enumerate(PLANTED)],
)
def test_a_planted_fault_gives_wrong_bytes(
    module, line, change, right, wrong_when, saved, monkeypatch
):
    changed = planted(f"shardckpt.{module}", line, change, monkeypatch)
    with stand_in(eager=wrong_when == "early") as machine:
        assert not right(machine, changed, saved, monkeypatch)
        monkeypatch.undo()
        forget()


@pytest.mark.parametrize("right", sorted({case[3].__name__ for case in PLANTED}))
def test_nothing_is_wrong_without_a_fault(machine, right, saved, monkeypatch):
    modules = {"saves_right": downloads, "loads_right": shard_reader}
    usual = devices if "producers" in right else background
    assert globals()[right](machine, modules.get(right, usual), saved, monkeypatch)
