"""The jobs of the tests under mpirun. Each returns the values that its test compares."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI

import shardckpt
from shardckpt import ShardedArray, errors
from shardckpt.saving import agreement, commit, rank_writer
from tests.mpi.launch import WHOLE

comm = MPI.COMM_WORLD


def rows(rank: int, size: int) -> tuple[int, int]:
    return 7 * rank // size, 7 * (rank + 1) // size


def caught(call: Any) -> Any:
    """(type, rank, tensor) of the shardckpt error that a call raises."""
    try:
        call()
    except shardckpt.ShardckptError as error:
        return [type(error).__name__, error.rank, error.tensor]
    return None


def plain(folder: str) -> dict[str, Any]:
    """Save, load, async_save and states with ShardedArrays; other launchers' checkpoints."""
    begin, end = rows(comm.rank, comm.size)
    local = WHOLE[begin:end].copy()
    state = {
        "u": ShardedArray(local, WHOLE.shape, (begin, 0)),
        "t": ShardedArray(torch.from_numpy(WHOLE[:, begin:end].copy()).T, (7, 7), (begin, 0)),
        "w": torch.arange(10.0),
        "rank": shardckpt.PerRank(comm.rank),
        "step": 7,
    }
    report = shardckpt.save(state, f"{folder}/mpi")
    repeated = shardckpt.save(state, f"{folder}/mpi", overwrite=True)
    busy: Any = shardckpt.async_save(state, f"{folder}/async-0")
    busy = [busy, shardckpt.async_save(state, f"{folder}/async-1")]
    saving = True
    while saving:  # the program's own messages meanwhile: from anyone, with any tag
        comm.send("own", (comm.rank + 1) % comm.size)
        assert comm.recv() == "own"
        saving = comm.allreduce(not all(handle.done() for handle in busy), MPI.MAX)
    passing = comm.Dup()
    freed: Any = shardckpt.async_save(state, f"{folder}/async-2", comm=passing)
    passing.Free()
    busy.append(freed)
    freed.result()
    local[:] = 0
    w = torch.zeros(10)
    back = {"u": state["u"], "w": w, "rank": shardckpt.PerRank(-1), "step": 0}
    loaded = shardckpt.load(back, f"{folder}/async-1")
    torch_w = {
        "w": torch.zeros(10),
        "u": ShardedArray(np.zeros((end - begin, 9)), (7, 9), [begin, 0]),
    }
    shardckpt.load(torch_w, f"{folder}/torch")
    return {
        "ranks": [report.world_size, repeated.world_size, len(report.bytes_by_rank)],
        "async": [handle.result().world_size for handle in busy],
        "loaded": [np.array_equal(local, WHOLE[begin:end]), w.tolist(), back["rank"].value],
        "step": [back["step"], loaded.saved_world_size],
        "torch": [
            torch_w["w"].tolist() == list(range(10)),
            np.array_equal(torch_w["u"].local, WHOLE[begin:end]),
        ],
    }


def wrong(folder: str) -> dict[str, Any]:
    """Everything that a user may do wrong; each an error on every rank, and then all is well."""
    last = comm.rank == comm.size - 1
    begin, end = rows(comm.rank, comm.size)

    def part(low: int, high: int, offset: int, shape: Any = (7, 9)) -> Any:
        return ShardedArray(WHOLE[low:high], shape, (offset, 0))

    def save(state: Any, name: str = "never", **options: Any) -> Any:
        return caught(lambda: shardckpt.save(state, f"{folder}/{name}", **options))

    freed = comm.Dup()
    save({"step": 1}, "freed-later", comm=freed)
    freed.Free()
    half = comm.Split(comm.rank % 2)
    found = {
        "path": save({"step": 1}, str(comm.rank // 2)),
        "keys": save({"a": 1, **({"b": torch.ones(1)} if last else {})}),
        "values": save({"a": comm.rank}),
        "overlap": save({"u": part(max(begin - 1, 0), end, max(begin - 1, 0))}),
        "hole": save({"u": part(begin + 1, end, begin + 1)}),
        "beyond": save({"u": part(begin, end, begin + (3 if last else 0))}),
        "dims": save({"u": part(begin, end, begin, (7, 9, 1))}),
        "fraction": save({"u": part(begin, end, begin, (7.5, 9))}),
        "shapes": save({"u": part(begin, end, begin, (7 + last, 9))}),
        "kind": save({"u": ShardedArray([1, 2], (2,), (0,))}),
        "per rank": save({"u": shardckpt.PerRank(part(begin, end, begin))}),
        "freed": save({"step": 1}, comm=freed),
        "no communicator": save({"step": 1}, comm="MPI.COMM_WORLD"),
        "null": save({"step": 1}, comm=MPI.COMM_NULL),
        "both": save({"step": 1}, comm=comm, process_group="group"),
        "planner": save({"step": 1}, planner=shardckpt.ShardSavePlanner(), comm=comm),
        "half": save({"step": 1}, f"half-{comm.rank % 2}", comm=half),
        "self": save({"step": 1}, f"self-{comm.rank}", comm=MPI.COMM_SELF),
        "fine": save({"u": part(begin, end, begin)}, "fine"),
        "nothing there": caught(lambda: shardckpt.load({"step": 0}, f"{folder}/nothing")),
    }
    readonly = WHOLE[begin:end].copy()
    readonly.flags.writeable = False
    template = {"u": ShardedArray(readonly, (7, 9), (begin, 0))}
    found["read-only"] = caught(lambda: shardckpt.load(template, f"{folder}/fine"))
    backwards = np.zeros((9, end - begin), dtype=">f8").T[::-1]
    shardckpt.load({"u": ShardedArray(backwards, (7, 9), (begin, 0))}, f"{folder}/fine")
    found["strides"] = bool((backwards == WHOLE[begin:end]).all())
    return found


def failing(folder: str) -> list[Any]:
    """A rank raises in each phase; one comes late, to a fresh communicator and to a used one."""
    os.environ["SHARDCKPT_DEADLINE_S"] = str(20.0)
    os.environ["SHARDCKPT_ARRIVAL_DEADLINE_S"] = str(60.0)
    state, exchange, found = {"w": torch.arange(10.0)}, agreement.exchange, []
    for phase in ("plan", "divide", "write"):

        def faulty(coordinator: Any, name: str, local: Any, decide: Any, phase: str = phase) -> Any:
            def part() -> bytes:
                if name == phase and coordinator.rank == 1:
                    raise ValueError("planted")
                return local()

            return exchange(coordinator, name, part, decide)

        agreement.exchange = commit.exchange = faulty
        try:
            shardckpt.save({**state, phase: 1}, f"{folder}/raised")
        except ValueError:
            found.append("own")
        except errors.RankFailedError as error:
            found.append([error.rank, error.facts["phase"]])
    agreement.exchange = commit.exchange = exchange
    fresh = comm.Dup()
    for used in (False, True):
        for number in range(2):
            os.environ["SHARDCKPT_ARRIVAL_DEADLINE_S"] = str(60.0 if number else 2.0)
            name = f"late-{used}-{number}"
            if comm.rank == 1 and number == 0:
                while len(list(Path(folder).glob(f"{name}-gone-*"))) < 2:
                    time.sleep(0.01)
            try:
                shardckpt.save(state, f"{folder}/{name}", comm=fresh)
                found.append("saved")
            except errors.RankFailedError as error:
                found.append([error.rank, error.facts["phase"]])
                Path(folder, f"{name}-gone-{comm.rank}").touch()
            meet()
    return found


def meet() -> None:
    """A barrier that leaves the processor to others."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.01)


def stopped(folder: str, fault: str) -> Any:
    """Rank 1 stops, or is killed, while it writes; what the others raise. There is a group of
    torch.distributed as well, which must not keep them from ending."""
    shardckpt.init_from_mpi()
    os.environ["SHARDCKPT_DEADLINE_S"] = str(4.0)
    shardckpt.save({"w": torch.arange(10.0)}, f"{folder}/before", comm=comm)
    if comm.rank == 1:
        number = signal.SIGSTOP if fault == "stop" else signal.SIGKILL
        rank_writer.write_rank = lambda *_, **__: os.kill(os.getpid(), number)
    begun = time.monotonic()
    try:
        shardckpt.save({"w": torch.zeros(10)}, f"{folder}/faulty", comm=comm)
    except errors.RankFailedError as error:
        return [error.rank, error.facts["phase"], time.monotonic() - begun]
    return "saved"


def torch_group(folder: str) -> dict[str, Any]:
    """FSDP2, DCP's classes and NNHandler over a group that MPI started."""
    import torch.distributed.checkpoint as dcp  # these take seconds, which other jobs save

    from shardckpt import NNHandler
    from tests.distributed.jobs import build, everything, step

    before = dist.is_initialized()
    first = {"rows": torch.arange(6.0)}  # the first thing that needs a group: it gets one
    dcp.save(first, storage_writer=shardckpt.ShardWriter(f"{folder}/dcp-first"))
    shardckpt.init_from_mpi()  # no harm
    model, optimizer = build("fsdp", seed=1)
    shardckpt.load({"model": model, "optimizer": optimizer}, f"{folder}/trained")
    digest = {
        name: tensor.double().sum().item() for name, tensor in everything(model, optimizer).items()
    }
    step(model, optimizer)
    shardckpt.save({"model": model, "optimizer": optimizer}, f"{folder}/trained-on")
    state = {"w": torch.arange(5.0), "model": model.state_dict()}
    dcp.save(
        state,
        storage_writer=shardckpt.ShardWriter(f"{folder}/dcp"),
        planner=shardckpt.ShardSavePlanner(),
    )
    state["w"] = torch.zeros(5)
    dcp.load(state, storage_reader=shardckpt.ShardReader(f"{folder}/dcp"))
    shardckpt.save({"w": state["w"]}, f"{folder}/planner", planner=shardckpt.ShardSavePlanner())
    handler = NNHandler(torch.nn.Linear, in_features=3, out_features=2)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.save(f"{folder}/handler")
    handler.save(f"{folder}/handler.pth")
    again = NNHandler.load(f"{folder}/handler", parallel="fsdp")
    return {
        "before": before,
        "world": [dist.get_world_size(), os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]],
        "digest": digest,
        "dcp": state["w"].tolist(),
        "handler": [handler.layout.mode, again.layout.mode],
    }


def tools(folder: str) -> list[int]:
    """The commands, by all ranks together."""
    from shardckpt.cli.main import main

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return [
            main(["verify", f"{folder}/mpi"]),
            main(["reshard", f"{folder}/mpi", f"{folder}/resharded", "--shards", "5"]),
            main(["verify", f"{folder}/damaged"]),
            main(["verify", f"{folder}/nothing"]),
            main(["reshard", f"{folder}/damaged", f"{folder}/never", "--shards", "2"]),
            main(["convert", f"{folder}/mpi", f"{folder}/as-dcp", "--format", "dcp"]),
            main(["convert", f"{folder}/as-dcp", f"{folder}/converted"]),
            main(["convert", f"{folder}/mpi", f"{folder}/x.safetensors"]),
        ]


def all_of_it(folder: str) -> dict[str, Any]:
    """All jobs as one, since starting one costs seconds."""
    return {
        "plain": plain(folder),
        "wrong": wrong(folder),
        "failing": failing(folder),
        "tools": tools(folder),
        "torch_group": torch_group(folder),
    }


def over_two_hosts(folder: str, private: str) -> list[Any]:
    """One rank on each of two hosts, a folder that they share, and one that they do not; then the
    cable between them is pulled while rank 1 writes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group("gloo")
    save = lambda: shardckpt.save({"w": torch.arange(10.0)}, f"{private}/c")  # noqa: E731
    report = shardckpt.save({"w": torch.arange(10.0)}, f"{folder}/shared", overwrite=True)
    found = {
        "host": os.uname().nodename,
        "ranks": report.world_size,
        "private": [caught(save), caught(save)],  # with a new plan, and with a known one
        "left": os.listdir(private),
        "missing": caught(lambda: shardckpt.load({"w": torch.zeros(10)}, f"{private}/c")),
    }
    over = None if dist.is_initialized() else comm
    shardckpt.init_from_mpi()
    total = torch.ones(3)
    dist.all_reduce(total)
    found["reduced"] = total.tolist()
    return [found, cut_off(folder, over)]


def cut_off(folder: str, over: Any) -> Any:
    """Return the error of this rank if the other one is cut off while it writes."""
    os.environ["SHARDCKPT_DEADLINE_S"] = str(4.0)
    write = rank_writer.write_rank

    def slow(*arguments: Any, **options: Any) -> Any:
        open(f"{folder}/writing", "w").close()
        time.sleep(3.0)
        return write(*arguments, **options)

    rank_writer.write_rank = slow
    begun = time.monotonic()
    try:
        shardckpt.save({"w": torch.arange(10.0)}, f"{folder}/cut", comm=over)
    except errors.RankFailedError as error:
        return [error.rank, error.facts["phase"], time.monotonic() - begun]
    return "saved"


def heat(folder: str) -> None:
    """The example on 4 ranks, then from there on 2 and on 3; its communicators are parts of one
    job's, since starting a job costs seconds."""
    program = runpy.run_path(str(Path(__file__).parents[2] / "docs/examples/heat.py"))
    for ranks, out, steps in ((4, "two", 60), (2, "two", 90), (3, "three", 90)):
        if ranks == 2 and comm.rank == 0:
            shutil.copytree(f"{folder}/two", f"{folder}/three")
            # Its newest one is damaged: it resumes from step 40.
            shard = sorted(Path(folder, "three/step-000060").glob("*.safetensors"))[0]
            shard.write_bytes(shard.read_bytes()[:-1])
        meet()
        part = comm.Split(0 if comm.rank < ranks else MPI.UNDEFINED)
        if part != MPI.COMM_NULL:
            program["main"]([f"{folder}/{out}", "--steps", str(steps), "--size", "45"], part)
        meet()


def elastic(folder: str) -> Any:
    """A job that saves at every step and, started again, resumes from the newest whole one."""
    dist.init_process_group("gloo")
    os.environ["SHARDCKPT_DEADLINE_S"] = str(5.0)
    rank, size = dist.get_rank(), dist.get_world_size()
    begin, end = 12 * rank // size, 12 * (rank + 1) // size
    u = np.zeros(end - begin)
    state: dict[str, Any] = {"u": ShardedArray(u, (12,), (begin,)), "step": 0}
    for path in sorted(Path(folder).glob("step-*"), reverse=True):
        try:
            shardckpt.load(state, path)
            break
        except errors.CorruptionError:
            continue
    if size == 1 and not state["step"]:
        time.sleep(3600)  # until the other node comes, and torchrun starts both again
    if rank == 0:
        with open(f"{folder}/starts", "a") as file:
            file.write(f"{size} {state['step']}\n")
    for step in range(state["step"] + 1, 9):
        u += np.arange(begin, end) * step
        if step == 5 and "LOST" in os.environ:  # dies while it writes
            rank_writer.write_rank = lambda *_, **__: time.sleep(3600)
        state["step"] = step
        shardckpt.save(state, f"{folder}/step-{step}", overwrite=True)
    return [size, state["step"]]
