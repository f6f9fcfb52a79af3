"""A stand-in for an accelerator: tensors that claim to be on a device, whose work is delayed.

The memory is that of the CPU. Work on a stream runs at the last moment: when someone waits for a
later event of the stream, or for the stream. With `eager`, it runs at the first moment: when it is
submitted. So a copy whose source changes too early, or whose target is used too early, gives wrong
bytes with one of the two.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from shardckpt.io import devices
from shardckpt.state import snapshot

KIND = "privateuseone"
DEVICES = [torch.device(KIND, 0), torch.device(KIND, 1)]
VIEWS = {
    "view", "as_strided", "__getitem__", "detach", "split", "narrow", "__get__", "t", "expand",
    "untyped_storage", "storage_offset", "data_ptr", "is_contiguous", "stride", "numel", "dim",
    "is_conj", "is_neg", "element_size", "size", "resolve_neg", "is_floating_point", "is_inference",
    "as_subclass", "is_complex", "requires_grad_", "split_with_sizes", "conj", "__len__",
    "resolve_conj", "contiguous",
}  # fmt: skip


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.passed = False

    def query(self) -> bool:
        """Let the stream run up to here."""
        self.stream.machine.log.append(("reached", self.stream.name))
        self.stream.run(until=self)
        return True


class Stream:
    def __init__(self, machine: StandIn, device: torch.device, name: str) -> None:
        self.machine, self.device, self.name = machine, device, name
        self.work: deque[Callable[[], object] | Event] = deque()
        self.before: list[Stream] = []

    def submit(self, work: Callable[[], object]) -> None:
        with self.machine.lock:
            self.work.append(work)
            if self.machine.eager:
                self.run()

    def run(self, until: Event | None = None) -> None:
        with self.machine.lock:
            while self.work and not (until and until.passed):
                work = self.work.popleft()
                if isinstance(work, Event):
                    work.passed = True
                else:
                    work()

    def record_event(self) -> Event:
        event = Event(self)
        with self.machine.lock:
            self.work.append(event)
            if self.machine.eager:
                self.run()
        return event

    def wait_event(self, event: Event) -> None:
        self.submit(lambda: event.stream.run(until=event))

    def __enter__(self) -> Stream:
        self.before.append(self.machine.current_stream(self.device))
        self.machine.set_current(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.machine.set_current(self.before.pop())


class StandIn(devices.Accelerator):
    """See Accelerator. `lockable` is the number of bytes that can be page-locked."""

    def __init__(self, *, eager: bool = False, lockable: float = float("inf")) -> None:
        self.eager, self.lockable = eager, lockable
        self.lock = threading.RLock()
        self.log: list[tuple[Any, ...]] = []
        self.locked: dict[int, int] = {}
        self.default = {device: Stream(self, device, f"default {device}") for device in DEVICES}
        self.streams: list[Stream] = []
        self._current = threading.local()

    def kind(self) -> str:
        return KIND

    def owns(self, device: torch.device) -> bool:
        return device.type == KIND

    def in_use(self) -> list[torch.device]:
        return DEVICES

    def free_bytes(self) -> dict[str, int]:
        return {str(device): 1 << 30 for device in DEVICES}

    def current_stream(self, device: torch.device) -> Any:
        return getattr(self._current, str(device), self.default[device])

    def set_current(self, stream: Stream) -> None:
        setattr(self._current, str(stream.device), stream)

    def new_stream(self, device: torch.device) -> Any:
        self.streams.append(Stream(self, device, f"stream {len(self.streams)} {device}"))
        return self.streams[-1]

    def synchronize(self, device: torch.device) -> None:
        for stream in (*self.default.values(), *self.streams):
            stream.run()

    def empty(self, size_bytes: int, device: torch.device) -> torch.Tensor:
        return to_device(torch.zeros(size_bytes, dtype=torch.uint8), device)

    def page_lock(self, address: int, size_bytes: int) -> bool:
        if sum(self.locked.values()) + size_bytes > self.lockable:
            return False
        self.locked[address] = size_bytes
        return True

    def release(self, address: int) -> None:
        del self.locked[address]

    def page_locked_tensor(self, size_bytes: int) -> torch.Tensor | None:
        return None


machine = StandIn()


@contextmanager
def stand_in(**options: Any) -> Iterator[StandIn]:
    """Replace the accelerator by a stand-in for a with block."""
    global machine
    real, before = devices.accelerator, dict(vars(devices.accelerator))
    machine = StandIn(**options)
    kind = type(real)
    classes = (*snapshot.PLAIN, OnDevice, OnSecond)
    try:
        real.__class__ = StandIn  # other modules hold the object
        vars(real).update(vars(machine))
        with mock.patch.object(snapshot, "PLAIN", classes):
            yield machine
    finally:
        vars(real).clear()
        vars(real).update(before)
        real.__class__ = kind


class OnDevice(torch.Tensor):
    """A tensor of the stand-in. Copies and clones are work of the current stream; views are not.
    Everything else waits for the stream."""

    where = DEVICES[0]
    is_cpu = False  # type: ignore[assignment]
    device = property(lambda self: self.where)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__
        if name == "_foreach_copy_":
            for target, source in zip(*args[:2], strict=True):
                copy(target, source, **kwargs)
            return args[0]
        if name == "copy_":
            copy(*args, **kwargs)
            return args[0]
        stream = machine.current_stream(cls.where)
        if name in ("clone", "contiguous", "resolve_conj") and not (
            (name == "contiguous" and args[0].is_contiguous())
            or (name == "resolve_conj" and not args[0].is_conj())
        ):
            source = raw(args[0])
            made = torch.empty(source.shape, dtype=source.dtype)
            stream.submit(lambda: made.copy_(source))
            return made.as_subclass(cls)
        if name not in VIEWS:
            machine.log.append(("blocks", name))
            stream.run()
        return super().__torch_function__(func, types, args, kwargs)


class OnSecond(OnDevice):
    where = DEVICES[1]


def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> None:
    """Submit a copy; without `non_blocking`, wait for it."""
    where = target.device if isinstance(target, OnDevice) else source.device
    stream = machine.current_stream(where)
    plain, of = raw(target), raw(source)

    def work() -> None:
        with torch.inference_mode():
            plain.copy_(of)
        machine.log.append(("copied", stream.name, of.nbytes))

    stream.submit(work)
    if not non_blocking:
        stream.run()


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor as it is now."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


def to_device(tensor: torch.Tensor, device: torch.device = DEVICES[0]) -> torch.Tensor:
    """Return the same memory as a tensor of the stand-in."""
    return tensor.as_subclass(OnDevice if device == DEVICES[0] else OnSecond)
