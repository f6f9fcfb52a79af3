"""Tensors of devices: the order of copies, events and buffers, on a stand-in for an accelerator.

The stand-in delays work as long as it may, or runs it as early as it may. PLANTED lists changes to
the package, each of which must give wrong bytes on one of the two.
"""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import os
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.errors import StalledError, StateError, UnsupportedLeafError
from shardckpt.format.digests import BLOCK_BYTES, block_digest
from shardckpt.io import buffers, devices, downloads
from shardckpt.io.buffers import BUFFER_BYTES, lease, page_locked
from shardckpt.loading import shard_reader
from shardckpt.plan.local_plan import local_plan
from shardckpt.plan.read_plan import plan_reads
from shardckpt.saving import async_save as background
from shardckpt.saving import shard_writer, staging
from shardckpt.saving.staged_part import Divider
from shardckpt.state.flatten import flatten
from shardckpt.state.local_chunks import LocalChunk
from tests.stand_in_device import DEVICES, StandIn, raw, stand_in, to_device

MIB = 1 << 20
ALONE: Any = SimpleNamespace(rank=0, world_size=1)


@pytest.fixture(params=[False, True], ids=["late", "early"])
def machine(request):
    with stand_in(eager=request.param) as machine:
        yield machine
        forget()


@pytest.fixture
def late():
    with stand_in() as machine:
        yield machine
        forget()


def forget():
    """Drop the memory that is locked, while the stand-in can still release it."""
    if background._background is not None:
        background._background.finish()
        background._background.pool = staging.StagingPool()
    buffers._free_locked.clear()
    gc.collect()


@functools.cache
def values(number: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    bits = torch.randint(0, 255, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(shape).nan_to_num(1.0) if shape else torch.tensor(3.0)


def samples() -> dict[str, torch.Tensor]:
    """Tensors that take every way to a file: small, large, of several buffers, views, scalars."""
    return {
        "large": values(1, 2500, 1001),
        "small": values(2, 30),
        "scalar": values(3),
        "bytes": values(4, 7, dtype=torch.uint8),
        "half": values(5, 300, 1001, dtype=torch.float16),
        "tiny": values(6, 3),
        "wide": values(7, 2, 5 * MIB // 4),
        "empty": torch.empty(0, 4),
    }


def produced(machine: StandIn, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of both devices, whose values are work that was only submitted.

    The work is that of a device, which does not count as a change by the program.
    """
    made = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        device = DEVICES[number % 2]
        memory = torch.zeros_like(tensor)
        made[name] = to_device(memory, device)
        machine.current_stream(device).submit(
            lambda memory=memory.data, tensor=tensor: memory.copy_(tensor)
        )
    return made


def image(tensors: Any) -> bytes:
    return b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)


class File:
    """A file in memory."""

    direct = True

    def __init__(self, size_bytes: int) -> None:
        self.data = bytearray(size_bytes + 4096)

    def write(self, view: memoryview, *, offset: int) -> None:
        self.data[offset : offset + len(view)] = view


# ---- saves


def written(tensors: Any, expected: bytes, module: Any = shard_writer) -> bool:
    """Whether the bytes and digests of a shard are right."""
    file = File(len(expected))
    submitted = devices.submitted_work()
    size, digests = module.write_shard(file, header=b"", tensors=tensors, submitted=submitted)
    blocks = [expected[at : at + BLOCK_BYTES] for at in range(0, len(expected), BLOCK_BYTES)]
    return file.data[:size] == expected and digests.tolist() == [block_digest(b) for b in blocks]


def test_a_shard_has_the_bytes_that_were_submitted_before_the_save(machine):
    state = samples()
    assert written(produced(machine, state).values(), image(state.values()))


def test_tensors_of_cpu_and_devices_share_a_shard_in_order(machine):
    state = samples()
    mixed = {**state, **produced(machine, {n: state[n] for n in ("large", "tiny", "wide")})}
    assert written(mixed.values(), image(state.values()))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[::3],
        lambda t: t[1:2, 1:],
        lambda t: torch.view_as_complex(t[:, :1000].reshape(-1, 2)).conj(),
    ],
    ids=["turned", "strided", "cut", "conjugate"],
)
def test_views_of_devices_are_written_as_their_elements(machine, view):
    plain = values(8, 3000, 1001)
    there = produced(machine, {"t": plain})["t"]
    assert written([view(there)], image([view(plain).resolve_conj()]))


def test_work_of_another_stream_of_the_caller_comes_first(machine):
    with machine.new_stream(DEVICES[0]):
        state = samples()
        assert written(produced(machine, {"w": state["wide"]}).values(), image([state["wide"]]))


def test_one_buffer_is_copied_ahead_of_the_one_in_use(late):
    parts = {str(n): values(n, 2 * MIB) for n in range(4)}
    there = [to_device(tensor) for tensor in parts.values()]
    pieces = downloads.host_pieces(there, devices.submitted_work())
    next(pieces)
    assert len(late.locked) == 2
    (stream,) = late.streams
    assert len(stream.work) == 2  # the second buffer: its copy, and its event
    pieces.close()
    assert not stream.work


def test_small_tensors_share_a_buffer(late):
    there = [to_device(values(n, 100)) for n in range(50)]
    (piece,) = downloads.host_pieces(there, devices.submitted_work())
    assert piece.nbytes == 50 * 400
    assert sum(entry[0] == "reached" for entry in late.log) == 2  # the piece, and the end


def test_a_failed_write_leaves_no_copy_in_a_buffer(late):
    class Full(File):
        def write(self, view, *, offset):
            raise OSError("full")

    there = [to_device(values(n, 3 * MIB)) for n in range(5)]
    with pytest.raises(OSError, match="full"):
        shard_writer.write_shard(Full(1), header=b"", tensors=there)
    assert not any(stream.work for stream in late.streams)


def test_memory_that_is_gone_is_refused(late):
    tensor = torch.ones(9)
    there = to_device(tensor)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedLeafError):
        list(downloads.host_pieces([there], {}))


# ---- loads


def filled(
    folder: Path,
    expected: dict[str, torch.Tensor],
    targets: Any,
    read_all: Any = shard_reader.read_all,
    threads: int = 2,
) -> bool:
    """Whether a load fills tensors of devices, although their memory is still in use."""
    with shardckpt.open_checkpoint(folder) as checkpoint, shardckpt.options(read_threads=threads):
        manifest = checkpoint.manifest
        wanted = [
            (manifest.tensors[name], LocalChunk((0,) * t.dim(), tuple(t.shape), t))
            for name, t in targets.items()
        ]
        read_all(checkpoint.files, manifest, plan_reads(wanted))
    at_the_end = {name: raw(tensor).clone() for name, tensor in targets.items()}
    devices.accelerator.synchronize(DEVICES[0])  # nothing may come after the load
    return all(
        torch.equal(found, expected[name])
        for last in (at_the_end, {name: raw(tensor) for name, tensor in targets.items()})
        for name, found in last.items()
    )


def in_use(machine: StandIn, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of both devices that earlier work still overwrites."""
    return produced(machine, {name: torch.full_like(t, 7) for name, t in tensors.items()})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices") / "c"
    shardckpt.save(samples(), folder)
    return folder


def test_a_load_fills_tensors_of_devices(machine, saved):
    assert filled(saved, samples(), in_use(machine, samples()))


def test_one_window_fills_tensors_of_devices(machine, tmp_path):
    few = {name: samples()[name] for name in ("small", "tiny", "scalar", "bytes")}
    shardckpt.save(few, tmp_path / "c")
    assert filled(tmp_path / "c", few, in_use(machine, few))


@pytest.mark.parametrize(
    "target",
    [
        lambda t: torch.zeros(t.shape, dtype=torch.float64),
        lambda t: torch.zeros(t.shape[::-1]).t(),
        lambda t: torch.zeros(2 * len(t), *t.shape[1:])[::2],
    ],
    ids=["cast", "turned", "strided"],
)
def test_the_device_casts_and_places_elements(machine, saved, target):
    expected = {name: samples()[name] for name in ("large", "small")}
    targets = {name: to_device(target(t)) for name, t in expected.items()}
    cast = {name: t.to(targets[name].dtype) for name, t in expected.items()}
    assert filled(saved, cast, targets)


def test_many_small_tensors_are_one_copy_to_the_device(late, tmp_path):
    state = {f"w{n:03}": values(n, 50) for n in range(300)}
    shardckpt.save(state, tmp_path / "c")
    assert filled(tmp_path / "c", state, in_use(late, state))
    sizes = [entry[2] for entry in late.log if entry[0] == "copied"]
    assert sum(size > 200 for size in sizes) == 2  # to each of the two devices
    assert sum(size == 200 for size in sizes) == 300


def test_large_tensors_go_to_the_device_once(late, tmp_path):
    state = {"w": values(1, 2500, 5001)}
    shardckpt.save(state, tmp_path / "c")
    assert filled(tmp_path / "c", state, in_use(late, state))
    total = sum(entry[2] for entry in late.log if entry[0] == "copied")
    assert total == state["w"].nbytes


def test_elements_that_are_not_aligned_are_moved_first(machine, tmp_path):
    state = {"bytes": values(1, 3, dtype=torch.uint8), "w": values(2, 9), "x": values(3, 5)}
    shardckpt.save(state, tmp_path / "c")
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        entries = checkpoint.manifest.tensors
        assert filled(tmp_path / "c", state, in_use(machine, state))
    reads = plan_reads([(entries["w"], LocalChunk((0,), (9,), to_device(torch.zeros(9))))]).copies
    from shardckpt.loading.uploads import _part

    (read,) = reads
    moved = torch.zeros(64, dtype=torch.uint8)
    shift = type(read)(0, 5, 41, read.dtype, read.sizes, read.strides, read.into)
    moved[5:41] = state["w"].view(torch.uint8)
    assert torch.equal(_part(moved, 0, shift), state["w"])


# ---- staging


def staged(machine: StandIn, module: Any = staging) -> bool:
    """Whether a staged plan holds the values of the call."""
    state = samples()
    mixed = {**produced(machine, state), "cpu": values(9, MIB)}
    plan = local_plan(flatten(mixed, rank=0), world_size=1)
    buffer = staging.StagingBuffer(staging.staged_bytes(plan), locked=True)
    found, marks = module.stage(plan, buffer, devices.submitted_work())
    for mark in marks.values():
        devices.wait_for(mark)
    names = [found.common[row].name for row in found.chunks.tensor.tolist()]
    expected = {**state, "cpu": mixed["cpu"]}
    return all(torch.equal(d, expected[n]) for n, d in zip(names, found.data, strict=True))


def test_a_state_on_two_devices_and_the_cpu_is_staged(machine):
    assert staged(machine)


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


def test_a_stream_that_records_a_graph_waits_on_the_cpu(late):
    stream = late.current_stream(DEVICES[0])
    stream.is_capturing = lambda: True
    other = late.new_stream(DEVICES[0])
    ran = []
    other.submit(lambda: ran.append(1))
    devices.wait_on_device(DEVICES[0], other.record_event())
    assert ran
    assert not stream.work


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


# ---- page-locked memory


def test_memory_is_released_before_it_is_unmapped(late):
    memory = page_locked(3 * MIB)
    assert late.locked == {memory.address: 3 * MIB}  # not rounded up
    view = memory.view
    del memory
    assert not late.locked
    view[0] = 1  # still mapped: the view holds it


def test_a_limit_of_locked_memory_gives_ordinary_memory():
    with stand_in(lockable=5) as machine:
        assert staged(machine)
        assert written(produced(machine, samples()).values(), image(samples().values()))
        assert not machine.locked
        forget()


def test_accelerators_that_lock_only_memory_of_torch_use_that(late, monkeypatch):
    given = torch.zeros(64, dtype=torch.uint8)
    monkeypatch.setattr(StandIn, "page_locked_tensor", lambda self, size: given[:size])
    memory = page_locked(64)
    memory.view[5] = 9
    assert given[5] == 9
    assert memory.address == given.data_ptr()
    assert not late.locked


def test_locked_and_ordinary_buffers_are_kept_apart(late):
    with lease(1) as (plain,), lease(1, locked=True) as (locked,):
        assert plain.address not in late.locked
        assert late.locked[locked.address] == BUFFER_BYTES
    with lease(1, locked=True) as (again,):
        assert again is locked


def test_a_forked_child_releases_nothing(late):
    memory = page_locked(MIB)
    child = os.fork()
    if not child:
        del memory
        os._exit(0 if late.locked else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_buffers_of_a_copy_that_hangs_are_not_lent_again(late):
    with pytest.raises(StalledError), lease(1, locked=True) as (buffer,):
        raise StalledError("A copy hangs")
    with lease(1, locked=True) as (other,):
        assert other is not buffer
    buffers._abandoned.clear()


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


# ---- the accelerator of this machine


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


def test_a_device_without_a_mark_is_waited_for(late):
    there = produced(late, {"w": values(1, 9)})
    (piece,) = downloads.host_pieces(there.values(), {})
    assert piece.numpy().tobytes() == image([values(1, 9)])


def test_copies_block_where_there_is_one_stream(late, monkeypatch, saved):
    monkeypatch.setattr(StandIn, "new_stream", lambda self, device: None)
    assert written(produced(late, samples()).values(), image(samples().values()))
    assert filled(saved, samples(), in_use(late, samples()))
    assert staged(late)


def test_torch_refuses_a_stream_of_a_device_without_streams():
    assert devices.Accelerator().new_stream(torch.device("ipu")) is None


def test_a_copy_that_does_not_end_is_an_error():
    class Never:
        def query(self):
            return False

    with shardckpt.options(stall_deadline_s=0.1), pytest.raises(StalledError, match="copy"):
        devices.wait_for(Never())


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
