"""The free memory of the devices of this machine."""

from __future__ import annotations

import torch

__all__ = ["free_memory"]


def free_memory() -> dict[str, int]:
    """Return the free bytes of each visible accelerator and of the CPU, in the order of "auto"."""
    free: dict[str, int] = {}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free[f"cuda:{index}"] = torch.cuda.mem_get_info(index)[0]
    pages = _meminfo().get("MemAvailable")
    free["cpu"] = pages if pages is not None else 1 << 62
    return free


def _meminfo() -> dict[str, int]:
    try:
        with open("/proc/meminfo") as lines:
            return {a: int(b.split()[0]) * 1024 for a, b in (line.split(":") for line in lines)}
    except OSError:  # the memory of the CPU is known on Linux only
        return {}
