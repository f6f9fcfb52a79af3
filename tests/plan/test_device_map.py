"""The devices that device maps choose. No accelerator is needed."""

from __future__ import annotations

import pytest
import torch

from shardckpt import errors
from shardckpt.plan.device_map import assign_devices, resolve_device_map

GIB = 1 << 30
CPU = torch.device("cpu")
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


def layers(count: int, size: int = GIB) -> dict[str, int]:
    return {f"layers.{n}.{part}": size // 2 for n in range(count) for part in ("a", "b")}


def test_auto_fills_devices_in_order_and_divides_no_layer():
    free = {"cuda:0": 4 * GIB, "cuda:1": 4 * GIB, "cpu": 2 * GIB}
    placed = assign_devices({"embed": GIB, **layers(9)}, free, balanced=False)
    assert placed["embed"] == FIRST
    for number in range(9):
        assert placed[f"layers.{number}.a"] == placed[f"layers.{number}.b"]
    order = [placed[f"layers.{number}.a"] for number in range(9)]
    # 90% of each: three blocks on each accelerator, one on the CPU, the rest on the disk
    assert order == [FIRST] * 2 + [SECOND] * 3 + [CPU] + ["disk"] * 3


def test_balanced_gives_even_shares():
    free = {"cuda:0": 80 * GIB, "cuda:1": 80 * GIB, "cpu": 80 * GIB}
    placed = assign_devices(layers(8), free, balanced=True)
    on_first = sum(device == FIRST for device in placed.values())
    assert 8 <= on_first <= 10
    assert set(placed.values()) == {FIRST, SECOND}
    assert set(assign_devices(layers(8), free, balanced=False).values()) == {FIRST}
    assert set(assign_devices(layers(2), {"cpu": 80 * GIB}, balanced=True).values()) == {CPU}


def test_the_longest_prefix_wins():
    where = resolve_device_map({"": "cpu", "a": "meta", "a.b": "disk"}, {}, {})
    assert where("x") == CPU
    assert where("a") == where("a.c") == torch.device("meta")
    assert where("a.b") == where("a.b.w") == "disk"
    assert where("a.bc") == torch.device("meta")
    assert where("ab") == CPU


@pytest.mark.parametrize(
    "device_map", ["nowhere", "cuda:99", 99, {"": "nowhere"}, object(), {"": None}]
)
def test_devices_that_are_not_there(device_map):
    with pytest.raises(errors.StateError) as caught:
        resolve_device_map(device_map, {}, {})
    assert caught.value.remedy


def test_a_name_without_a_device():
    with pytest.raises(errors.StateError) as caught:
        resolve_device_map({"a": "cpu"}, {}, {})("b.c")
    assert caught.value.tensor == "b.c"
