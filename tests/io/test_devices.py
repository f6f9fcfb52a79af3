"""The free memory of the devices."""

from __future__ import annotations

import builtins

import pytest
import torch

from shardckpt.io import devices
from shardckpt.io.devices import free_memory, group_backends


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
