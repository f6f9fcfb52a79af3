"""Devices: streams, events and page-locked memory of the accelerator, and the free memory of all.

This is the only module that calls torch for a device. The accelerator is the one that
torch.accelerator knows: CUDA, ROCm, XPU, MPS, or a backend that registered itself (PrivateUse1).

Copies run on a CopyStream, beside the work of the program. They begin after the work that
`submitted_work` has marked. Until a copy has ended, its source and its target must not be changed,
reused or freed: `wait_for` waits for its mark.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from shardckpt.config import current
from shardckpt.errors import StalledError
from shardckpt.logs import logger
from shardckpt.torch_compat import current_accelerator, foreach_copy

__all__ = [
    "Accelerator",
    "CopyStream",
    "Mark",
    "accelerator",
    "free_memory",
    "group_backends",
    "page_lock",
    "submitted_work",
    "wait_for",
    "wait_on_device",
]

Mark = Any
"""An event of torch. It passes when the work before it is done. None has passed already."""

_POLL_S = 20e-6


class Accelerator:
    """The calls to torch that depend on the accelerator. Tests replace them by a stand-in."""

    def kind(self) -> str | None:
        """Return the type of the devices, such as "cuda". None if this machine has none."""
        found = current_accelerator()
        return found.type if found is not None and torch.accelerator.is_available() else None

    def owns(self, device: torch.device) -> bool:
        """Whether a device is one of the accelerator."""
        found = current_accelerator()
        return found is not None and found.type == device.type

    def in_use(self) -> list[torch.device]:
        """Return the devices on which torch has allocated memory in this process.

        Other devices are not touched: a context would take hundreds of megabytes of their memory.
        """
        found = current_accelerator()
        if found is None:
            return []
        module = torch.get_device_module(found)
        if not getattr(module, "is_initialized", lambda: True)():
            return []
        devices = [torch.device(found.type, index) for index in range(module.device_count())]
        try:
            return [device for device in devices if module.memory_allocated(device)]
        except (AttributeError, RuntimeError, NotImplementedError):  # not counted, as on MPS
            return []

    def free_bytes(self) -> dict[str, int]:
        """Return the free memory of each visible device that reports it."""
        kind = self.kind()
        if kind is None:
            return {}
        module = torch.get_device_module(kind)
        if not hasattr(module, "mem_get_info"):
            return {}
        devices = [f"{kind}:{index}" for index in range(module.device_count())]
        return {device: module.mem_get_info(device)[0] for device in devices}

    def random_state(self) -> dict[str, torch.Tensor]:
        """Return the state of the generator of the current device, by the type of the device."""
        kind = self.kind()
        return {kind: torch.get_device_module(kind).get_rng_state()} if kind else {}

    def set_random_state(self, state: Mapping[str, Any]) -> None:
        """Restore what random_state returned. The state of another type is left out."""
        kind = self.kind()
        if kind and kind in state:
            torch.get_device_module(kind).set_rng_state(state[kind])

    def current_stream(self, device: torch.device) -> Any:
        """Return the stream to which this thread submits work."""
        return torch.accelerator.current_stream(device)

    def new_stream(self, device: torch.device) -> Any:
        """Return a stream of its own. None if the accelerator has only one stream."""
        try:
            return torch.Stream(device)
        except (RuntimeError, NotImplementedError) as error:
            logger.debug("%s has no other stream, so copies block: %s", device, error)
            return None

    def synchronize(self, device: torch.device) -> None:
        """Wait for all work on a device."""
        torch.accelerator.synchronize(device)

    def empty(self, size_bytes: int, device: torch.device) -> torch.Tensor:
        """Allocate memory on a device."""
        return torch.empty(size_bytes, dtype=torch.uint8, device=device)

    def page_lock(self, address: int, size_bytes: int) -> bool:
        """Page-lock memory of ours, for CUDA and ROCm. Returns whether the driver did it."""
        if self.kind() != "cuda":
            return False
        for_all_devices = 1
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        failed = int(runtime.cudaHostRegister(address, size_bytes, for_all_devices))
        if failed:
            logger.debug("the driver refused to page-lock %d bytes: error %d", size_bytes, failed)
            with contextlib.suppress(RuntimeError):  # otherwise the next kernel raises the error
                torch.ones(1, device="cuda")
        return not failed

    def release(self, address: int) -> None:
        """Undo page_lock."""
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]

    def page_locked_tensor(self, size_bytes: int) -> torch.Tensor | None:
        """Return page-locked memory of torch, for accelerators that can't lock memory of ours.

        Torch may round its size up to a power of two.
        """
        if self.kind() in (None, "cuda"):
            return None
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except (RuntimeError, NotImplementedError) as error:
            logger.debug("torch did not page-lock %d bytes: %s", size_bytes, error)
            return None


accelerator = Accelerator()


def submitted_work() -> dict[torch.device, Mark]:
    """Mark the work that this thread has submitted to the devices in use.

    Returns:
        The mark of the current stream of each device.
    """
    return {
        device: accelerator.current_stream(device).record_event() for device in accelerator.in_use()
    }


def wait_for(mark: Mark) -> None:
    """Wait until a mark passes.

    Raises:
        StalledError: It did not pass within the option `stall_deadline_s`.
    """
    if mark is None or mark.query():
        return
    give_up_at = time.monotonic() + current().stall_deadline_s
    while not mark.query():
        if time.monotonic() > give_up_at:
            raise StalledError(
                "A copy from or to a device makes no progress",
                expected=f"its end within {current().stall_deadline_s:g} s",
                actual="no end",
                remedy="check the device; the option stall_deadline_s sets the deadline",
            )
        time.sleep(_POLL_S)


def wait_on_device(device: torch.device, mark: Mark) -> None:
    """Make the work that this thread submits to a device from now on wait for a mark.

    The CPU waits only while the stream records a graph, which can't wait for other work.
    """
    stream = accelerator.current_stream(device)
    if mark is None or getattr(stream, "is_capturing", bool)():
        wait_for(mark)
    else:
        stream.wait_event(mark)


class CopyStream:
    """Copies between one device and the host, or within the device, on a stream of their own.

    Args:
        device: The device.
        submitted: The result of submitted_work. The copies begin after that work.
    """

    def __init__(self, device: torch.device, submitted: Mapping[torch.device, Mark]) -> None:
        self._device = device
        self._stream = accelerator.new_stream(device)
        if self._stream is None:  # copies are submitted in the order of the other work
            return
        if device in submitted:
            self._stream.wait_event(submitted[device])
        else:  # memory that torch has not allocated
            accelerator.synchronize(device)

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        """Copy tensors. The copies have ended when a later mark passes."""
        if not targets:
            return
        with self.current():
            # A copy to the host would conjugate its target before the bytes arrive.
            plain = [source.resolve_conj().resolve_neg() for source in sources]
            foreach_copy(targets, plain, non_blocking=self._stream is not None)

    def current(self) -> Any:
        """Make this the current stream of the thread, for a with block."""
        return self._stream or contextlib.nullcontext()

    def empty(self, size_bytes: int) -> torch.Tensor:
        """Allocate memory for this stream alone, on the device."""
        with self.current():
            return accelerator.empty(size_bytes, self._device)

    def mark(self) -> Mark:
        """Mark the copies so far."""
        return self._stream and self._stream.record_event()


def page_lock(memory: memoryview, address: int, *, owner: object) -> bool:
    """Page-lock memory at an address while its owner exists, if the driver supports it."""
    if not accelerator.page_lock(address, len(memory)):
        return False
    # The memory is an argument, so that it still exists when the driver releases it.
    finalizer = weakref.finalize(owner, _release, address, os.getpid(), memory)
    finalizer.atexit = False  # the driver may have ended before
    return True


def _release(address: int, process: int, memory: memoryview) -> None:
    if process == os.getpid():  # a forked child inherits neither the memory nor the driver
        accelerator.release(address)


def group_backends(kind: str | None) -> str:
    """Return the backends of a process group for CPU tensors and for those of a device type."""
    if kind in (None, "cpu", "meta"):
        return "gloo"
    import torch.distributed as dist  # not needed by saves and loads of one process

    return f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"


def free_memory() -> dict[str, int]:
    """Return the free bytes of each visible device and of the CPU, in the order of "auto"."""
    pages = _meminfo().get("MemAvailable")
    return {**accelerator.free_bytes(), "cpu": pages if pages is not None else 1 << 62}


def _meminfo() -> dict[str, int]:
    try:
        with open("/proc/meminfo") as lines:
            return {a: int(b.split()[0]) * 1024 for a, b in (line.split(":") for line in lines)}
    except OSError:  # the memory of the CPU is known on Linux only
        return {}
