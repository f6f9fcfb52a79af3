"""Device maps: the device of each saved tensor when a state is built without a template."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from shardckpt.errors import StateError
from shardckpt.state.saved_tree import under

__all__ = ["DeviceMap", "assign_devices", "resolve_device_map"]

DeviceMap = str | int | torch.device | Mapping[str, Any] | None
""""cpu" or None; a device; "meta"; "disk"; "auto"; "balanced"; or a dict from prefixes of names to
these."""

_RESERVE = 0.1  # the share of the free memory of a device that is kept for activations


def resolve_device_map(
    device_map: DeviceMap, sizes_bytes: Mapping[str, int], free_bytes: Mapping[str, int]
) -> Callable[[str], torch.device | str]:
    """Return the function that maps a name to its device: a torch.device or "disk".

    Args:
        device_map: The device map.
        sizes_bytes: The size of each tensor by name.
        free_bytes: The free memory of each device, in the order in which "auto" fills them.

    Raises:
        StateError: A device is unknown, or a dict has no prefix for a name.
    """
    if isinstance(device_map, str) and device_map in ("auto", "balanced"):
        devices = assign_devices(sizes_bytes, free_bytes, balanced=device_map == "balanced")
        return devices.__getitem__
    if not isinstance(device_map, Mapping):
        device = _device("cpu" if device_map is None else device_map)
        return lambda name: device
    prefixes = {
        prefix.rstrip("."): _device(device)
        for prefix, device in sorted(device_map.items(), key=lambda item: -len(item[0]))
    }

    def find(name: str) -> torch.device | str:
        for prefix, device in prefixes.items():
            if under(name, prefix):
                return device
        raise StateError(
            "The device map has no device for a tensor",
            tensor=name,
            expected="a prefix of its name",
            actual=f"prefixes {sorted(prefixes)}",
            remedy='add the prefix, or "" for all other names',
        )

    return find


def _device(device: Any) -> torch.device | str:
    if device == "disk":
        return "disk"
    try:
        known = torch.device(device)
        if known.type not in ("cpu", "meta"):
            torch.empty(0, device=known)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise StateError(
            "A device of the device map is not available",
            expected='"cpu", "meta", "disk", or a device of this machine',
            actual=f"{device!r}: {error}".splitlines()[0],
            remedy="correct the device map",
        ) from error
    return known


def assign_devices(
    sizes_bytes: Mapping[str, int], free_bytes: Mapping[str, int], *, balanced: bool
) -> dict[str, torch.device | str]:
    """Assign each tensor to a device. Pure.

    The tensors of a numbered layer (`layers.3.`) form a block; any other tensor is a block of its
    own. Blocks go to the devices in order, as many as fit in 90% of the free bytes, and to "disk"
    after the last device. `balanced` fills the accelerators evenly, not one after another.
    """
    blocks: dict[str, list[str]] = {}
    for name in sizes_bytes:
        numbered = re.match(r"(.*?\.\d+)(\.|$)", name)
        blocks.setdefault(numbered[1] if numbered else name, []).append(name)
    room = {device: int(free * (1 - _RESERVE)) for device, free in free_bytes.items()}
    accelerators = [device for device in room if device != "cpu"]
    if balanced and accelerators:
        largest = max((sum(sizes_bytes[n] for n in names) for names in blocks.values()), default=0)
        share = sum(sizes_bytes.values()) // len(accelerators) + largest
        room.update({device: min(room[device], share) for device in accelerators})
    order = list(room)
    placed: dict[str, torch.device | str] = {}
    current = 0
    for names in blocks.values():
        need = sum(sizes_bytes[name] for name in names)
        while current < len(order) and room[order[current]] < need:
            current += 1
        device: torch.device | str = "disk"
        if current < len(order):
            room[order[current]] -= need
            device = torch.device(order[current])
        placed.update(dict.fromkeys(names, device))
    return placed
