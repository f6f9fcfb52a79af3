"""The free memory of the devices."""

from __future__ import annotations

import builtins
import logging
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.errors import StalledError
from shardckpt.io import devices
from shardckpt.io.buffers import page_locked
from shardckpt.io.devices import free_memory, group_backends
from tests.device_states import (
    MIB,
)
from tests.stand_in_device import DEVICES


def test_the_free_memory_of_the_cpu_is_what_the_system_reports_as_available():
    with open("/proc/meminfo") as lines:
        total = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal"))
    assert 1 << 20 < free_memory()["cpu"] <= total


def test_each_accelerator_has_its_own_entry_before_the_cpu(monkeypatch):
    monkeypatch.setattr(devices.Accelerator, "kind", lambda self: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 + int(device[5:]), 999))
    found = free_memory()
    assert list(found) == ["cuda:0", "cuda:1", "cpu"]
    assert (found["cuda:0"], found["cuda:1"]) == (100, 101)


def test_a_system_without_meminfo_counts_as_unlimited(monkeypatch):
    def refuse(path, *arguments):
        raise FileNotFoundError(path)

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(devices.Accelerator, "kind", lambda self: None)
    found = free_memory()
    monkeypatch.undo()
    assert found == {"cpu": 1 << 62}


@pytest.mark.parametrize("text", ["MemAvailable: 3 kB\n", "Other: 9 kB\nMemAvailable:    3 kB\n"])
def test_meminfo_is_in_kibibytes(tmp_path, monkeypatch, text):
    (tmp_path / "meminfo").write_text(text)
    real = open
    monkeypatch.setattr(builtins, "open", lambda path: real(tmp_path / "meminfo"))
    monkeypatch.setattr(devices.Accelerator, "kind", lambda self: None)
    found = free_memory()
    monkeypatch.undo()
    assert found == {"cpu": 3072}


def test_a_group_has_a_backend_for_the_cpu_and_one_for_the_device():
    assert group_backends(None) == group_backends("cpu") == "gloo"
    assert group_backends("cuda") == "cpu:gloo,cuda:nccl"
    assert group_backends("xpu") == "cpu:gloo,xpu:xccl"


def test_a_stream_that_records_a_graph_waits_on_the_cpu(late):
    stream = late.current_stream(DEVICES[0])
    stream.is_capturing = lambda: True
    other = late.new_stream(DEVICES[0])
    ran = []
    other.submit(lambda: ran.append(1))
    devices.wait_on_device(DEVICES[0], other.record_event())
    assert ran
    assert not stream.work


class Runtime:
    """The functions of the CUDA runtime that torch gives access to."""

    def __init__(self, error: int) -> None:
        self.error = error
        self.calls: list[tuple[Any, ...]] = []

    def cudaHostRegister(self, *arguments: int) -> int:
        self.calls.append(arguments)
        return self.error

    def cudaHostUnregister(self, *arguments: int) -> int:
        self.calls.append(arguments)
        return 0


@pytest.mark.parametrize("error", [0, 2])
def test_cuda_registers_memory_of_ours(monkeypatch, caplog, error):
    runtime = Runtime(error)
    monkeypatch.setattr(devices.Accelerator, "kind", lambda self: "cuda")
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "ones", lambda *arguments, device: torch.zeros(1))
    with caplog.at_level(logging.DEBUG, "shardckpt"):
        memory = page_locked(MIB)
        address = memory.address
        memory.view[0] = 1
        del memory
    register = (address, MIB, 1)
    assert runtime.calls == ([register] if error else [register, (address,)])
    assert sum("page-lock" in record.message for record in caplog.records) == bool(error)


def of_2_6():
    raise RuntimeError("Cannot access accelerator device when none is available.")


@pytest.mark.parametrize("torch_answers", [lambda: None, of_2_6], ids=["None", "an error"])
def test_a_machine_without_an_accelerator(monkeypatch, torch_answers):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", torch_answers)
    real = devices.Accelerator()
    assert (real.kind(), real.in_use(), real.free_bytes()) == (None, [], {})
    assert not real.owns(torch.device("cuda"))
    assert not real.page_lock(0, 1)
    assert real.page_locked_tensor(8) is None
    assert devices.submitted_work() == {}


class Module:
    """The module of a device type in torch."""

    def __init__(self, initialized: bool = True) -> None:
        self.is_initialized = lambda: initialized

    def device_count(self):
        return 2

    def memory_allocated(self, device):
        return device.index

    def mem_get_info(self, device):
        return (100, 200)


@pytest.mark.parametrize(("initialized", "used"), [(True, ["xpu:1"]), (False, [])])
def test_only_devices_that_hold_memory_are_touched(monkeypatch, initialized, used):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module(initialized))
    assert [str(device) for device in devices.Accelerator().in_use()] == used


def test_devices_that_count_no_memory_are_not_marked(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.delattr(Module, "memory_allocated")
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module())
    assert devices.Accelerator().in_use() == []


def test_torch_refuses_a_stream_of_a_device_without_streams():
    assert devices.Accelerator().new_stream(torch.device("ipu")) is None


def test_a_copy_that_does_not_end_is_an_error():
    class Never:
        def query(self):
            return False

    with shardckpt.options(stall_deadline_s=0.1), pytest.raises(StalledError, match="copy"):
        devices.wait_for(Never())
