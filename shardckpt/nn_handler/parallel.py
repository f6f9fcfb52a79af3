"""The ranks of a training: process group, device, DDP and FSDP2, means over the ranks."""

from __future__ import annotations

import datetime
import inspect
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

import msgspec
import torch
import torch.distributed as dist
from torch import nn

from shardckpt.config import current
from shardckpt.coordination.exchange import exchange
from shardckpt.coordination.mpi.launch import several_ranks
from shardckpt.coordination.process_group import init_from_mpi
from shardckpt.coordination.resolve import operation
from shardckpt.coordination.shutdown import destroy_groups_at_exit
from shardckpt.errors import StateError
from shardckpt.io.devices import accelerator, group_backends
from shardckpt.torch_compat import unsynchronized_buffers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Buffers",
    "Layout",
    "Parallel",
    "are_finite",
    "average_gradients",
    "checked_device",
    "clip_gradients",
    "free_full_parameters",
    "gathered",
    "join_ranks",
    "largest",
    "mean_over_ranks",
    "synchronize_buffers",
    "synchronize_gradients",
    "wrap",
]

Parallel = Literal["auto", "none", "ddp", "fsdp"]
Buffers = Literal["rank0", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a job is divided among ranks.

    `mode` is the resolved one. With tensor parallelism, several ranks use the same data.
    """

    mode: Parallel
    device: torch.device
    mesh: DeviceMesh | None = None
    tp_plan: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    buffers: Buffers = "rank0"

    @property
    def rank(self) -> int:
        """This process's rank."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def data(self) -> tuple[int, int]:
        """This rank's place in the division of the data, and the number of places."""
        if self.mode == "none" or not dist.is_initialized():
            return 0, 1
        if self.mesh is None:
            return dist.get_rank(), dist.get_world_size()
        if "dp" not in (self.mesh.mesh_dim_names or ()):
            return 0, 1
        return self.mesh["dp"].get_local_rank(), self.mesh["dp"].size()


def join_ranks(
    parallel: Parallel,
    device: str | torch.device | None,
    mesh: DeviceMesh | None = None,
    tp_plan: Mapping[str, Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    buffers: Buffers = "rank0",
) -> Layout:
    """Join the process group of the launcher, if there is one. See NNHandler.

    "auto" is "fsdp" with a device mesh. Otherwise it is "ddp" if torchrun, mpirun, srun or another
    launcher that sets WORLD_SIZE started several processes, and "none" if not.
    """
    if str(parallel) not in get_args(Parallel):
        raise StateError(
            "Unknown value for parallel",
            expected='"auto", "none", "ddp" or "fsdp"',
            actual=repr(parallel),
        )
    if buffers not in get_args(Buffers):
        raise StateError(
            "Unknown value for buffers", expected='"rank0" or "mean"', actual=repr(buffers)
        )
    device = checked_device(device)
    if parallel != "none" and not dist.is_initialized():
        _join(group_backends(device.type))
    if accelerator.owns(device) and device.index is None:
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))  # type: ignore[unreachable]
        torch.accelerator.set_device_index(device)
    names = () if mesh is None else mesh.mesh_dim_names or ()
    odd = not names or not set(names) <= {"dp", "tp"} or parallel in ("ddp", "none")
    if (mesh is not None and odd) or (tp_plan is not None and "tp" not in names):
        raise StateError(
            "This device mesh does not fit",
            expected='the dimensions "dp", "tp" or both, and parallel="fsdp"; "tp" for a tp_plan',
            actual=f"dimensions {names}, parallel={parallel!r}",
        )
    mode: Parallel = parallel if parallel != "auto" else ("ddp" if mesh is None else "fsdp")
    if options and mode != "none":
        _check_options(mode, options)
    if not dist.is_initialized():
        mode = "none"
    return Layout(
        mode=mode,
        device=device,
        mesh=mesh if mode != "none" else None,
        tp_plan=tp_plan,
        options=dict(options or {}),
        buffers=buffers,
    )


def checked_device(device: Any) -> torch.device:
    """Return the device, by default the accelerator. Raises StateError if it does not exist."""
    if device is None:
        device = accelerator.kind() or "cpu"
    try:
        if not isinstance(device, (str, torch.device)):
            raise TypeError(f"{type(device).__name__} is not a device")
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise StateError(
            "Invalid device",
            expected='"cpu", "cuda", "cuda:0" or a torch.device',
            actual=f"{device!r}: {error}".partition("\n")[0],
            remedy="give a device; pass arguments of the model by name, as in "
            "NNHandler(Net, width=32)",
        ) from error
    if found.type in ("cpu", "meta"):
        return found
    module = getattr(torch, found.type, None)
    count = module.device_count() if module is not None and module.is_available() else 0
    if (found.index or 0) >= count:
        raise StateError(
            "The device does not exist on this machine",
            expected=f"one of {count} {found.type} devices" if count else 'device="cpu"',
            actual=str(found),
            remedy='give device="cpu", or leave device out',
        )
    return found


def _check_options(mode: Parallel, options: Mapping[str, Any]) -> None:
    from torch.distributed.fsdp import fully_shard

    made: Any = nn.parallel.DistributedDataParallel if mode == "ddp" else fully_shard
    known = {*inspect.signature(made).parameters} - {"module", "mesh", "kwargs"}
    known |= {"wrap"} if mode == "fsdp" else set()
    unknown = options.keys() - known
    if unknown:
        raise StateError(
            f"Unknown parallel_options for {mode}",
            expected=", ".join(sorted(known)),
            actual=", ".join(sorted(unknown)),
        )


def _join(backend: str) -> None:
    """Join the group of the ranks of torchrun, mpirun or srun."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        timeout = datetime.timedelta(seconds=current().arrival_deadline_s)
        dist.init_process_group(backend, timeout=timeout)
        destroy_groups_at_exit()
    elif several_ranks():
        init_from_mpi(backend, timeout_s=current().arrival_deadline_s)


def wrap(model: nn.Module, layout: Layout, *, find_unused: bool = False) -> nn.Module:
    """Put the model on its device, with the weights of rank 0, under DDP, FSDP2 or TP.

    `find_unused` is the default of the option find_unused_parameters of DDP.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return model
    model = model.to(layout.device)
    if layout.mode == "ddp":
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            for parameter in model.parameters():
                dist.broadcast(parameter.data, 0)
            return model
        options = {
            "find_unused_parameters": find_unused,
            # synchronize_buffers makes them equal after each step instead
            **({} if "broadcast_buffers" in layout.options else unsynchronized_buffers()),
            **layout.options,
        }
        return nn.parallel.DistributedDataParallel(model, **options)
    if layout.mode == "fsdp":
        # fully_shard takes the values of each rank, so they must be equal
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, 0)
        _shard(model, layout)
    return model


def _shard(model: nn.Module, layout: Layout) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    names = () if layout.mesh is None else layout.mesh.mesh_dim_names or ()
    if layout.mesh is not None and "tp" in names:
        parallelize_module(model, layout.mesh["tp"], dict(layout.tp_plan or {}))
    if layout.mesh is not None and "dp" not in names:
        return
    options = dict(layout.options)
    wrapped = options.pop("wrap", None)
    options |= {} if layout.mesh is None else {"mesh": layout.mesh["dp"]}
    blocks = _blocks(model, wrapped)
    if not _has_forward(model):
        blocks += [part for part in _called_parts(model) if part not in blocks]
    for block in blocks:
        if any(p.requires_grad for p in block.parameters()):
            fully_shard(block, **options)
    fully_shard(model, **options)


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _called_parts(module: nn.Module) -> list[nn.Module]:
    """Return the children of a container, and those of containers in it."""
    found = [[m] if _has_forward(m) else _called_parts(m) for m in module.children()]
    return [part for parts in found for part in parts]


def _blocks(model: nn.Module, wrapped: Any) -> list[nn.Module]:
    """Return the modules to shard by themselves, inner ones first.

    They are those of the classes `wrapped`, or by default the items of every ModuleList and
    Sequential.
    """
    if wrapped is not None:
        found = [m for m in model.modules() if isinstance(m, wrapped) and m is not model]
        return found[::-1]
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    return [block for listed in lists for block in listed]


@torch.no_grad()
def synchronize_buffers(model: nn.Module, layout: Layout) -> None:
    """Make the buffers of the model equal on all ranks, as layout.buffers says. Collective."""
    if layout.mode == "none":
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for buffer in dict.fromkeys(model.buffers()):
        if not hasattr(buffer, "to_local") and buffer.numel():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for dtype, buffers in by_dtype.items():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        if layout.buffers == "mean" and dtype.is_floating_point:
            flat /= dist.get_world_size()
            dist.all_reduce(flat)
        else:
            dist.broadcast(flat, 0)
        parts = torch.split(flat, [buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> list[bool]:
    """Average the gradients of a model that is not wrapped over the ranks. Collective.

    Returns whether all ranks have a gradient, for each parameter.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained or not dist.is_initialized():
        return [parameter.grad is not None for parameter in trained]
    here = trained[0].device
    used = torch.tensor([int(p.grad is not None) for p in trained], device=here)
    dist.all_reduce(used)
    counts: list[int] = used.tolist()
    for parameter, count in zip(trained, counts, strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad /= dist.get_world_size()
            dist.all_reduce(parameter.grad)
    return [count == dist.get_world_size() for count in counts]


def synchronize_gradients(model: nn.Module, *, now: bool) -> None:
    """Let the next backward pass average gradients over the ranks, or leave it to a later one."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, nn.parallel.DistributedDataParallel):
        # with static_graph, torch 2.13 fails if the first backward pass does not synchronize
        model.require_backward_grad_sync = now or model.static_graph
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def free_full_parameters(model: nn.Module) -> None:
    """Give the modules of FSDP2 their sharded parameters back. Not collective.

    After a forward pass without a backward pass, FSDP2 keeps the full parameters of its root. They
    are other tensors, and the next forward pass uses them again.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float) -> None:
    """Scale all gradients so that the norm of all of them, over all ranks, is at most `norm`."""
    by_mesh = _by_mesh(parameters)
    if by_mesh:
        total = _total_norm(by_mesh)
        for group in by_mesh:
            torch.nn.utils.clip_grads_with_norm_(group, norm, total)


def are_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether all gradients are finite. Collective for sharded parameters."""
    by_mesh = _by_mesh(parameters)
    return not by_mesh or bool(torch.isfinite(_total_norm(by_mesh)))


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the parameters with a gradient, by the device mesh of the gradient."""
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            found.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    return list(found.values())


def _total_norm(by_mesh: list[list[nn.Parameter]]) -> torch.Tensor:
    norms: list[Any] = [
        torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        for group in by_mesh
    ]
    whole: list[torch.Tensor] = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
    return whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))


def mean_over_ranks(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return the means over all ranks of sums and counts by name. Collective.

    A rank may lack names that others have.
    """

    def add(payloads: list[bytes]) -> bytes:
        every = [msgspec.msgpack.decode(p, type=dict[str, tuple[float, float]]) for p in payloads]
        names = dict.fromkeys(name for one in every for name in one)
        totals = {
            name: [sum(one.get(name, (0.0, 0.0))[at] for one in every) for at in (0, 1)]
            for name in names
        }
        means = {name: value / n if n else math.nan for name, (value, n) in totals.items()}
        return msgspec.msgpack.encode(means)

    own = msgspec.msgpack.encode(sums)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        found = add([own])
    else:
        with operation("NNHandler: the means of an epoch") as coordinator:
            found = exchange(coordinator, "means", lambda: own, add)
    return msgspec.msgpack.decode(found, type=dict[str, float])


def gathered(value: Any, layout: Layout) -> list[Any]:
    """Return the values of all ranks that use different data, in order. Collective."""
    _, places = layout.data
    if places == 1:
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (layout.data[0], value))
    by_place = dict(reversed(every))  # the first of the ranks that use the same data
    return [by_place[place] for place in range(places)]


def largest(flags: list[int]) -> list[int]:
    """Return the largest value of all ranks, for each of the numbers. Collective.

    It does not wait for a GPU: the numbers stay on the CPU.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flags
    tensor = torch.tensor(flags, dtype=torch.int64, device="cpu")
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_cpu_group())
    found: list[int] = tensor.tolist()
    return found


_cpu_groups: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _cpu_group() -> Any:
    """Return a group for tensors on the CPU: None for the default one, or another one beside NCCL.

    The first call is collective.
    """
    world = dist.group.WORLD
    if world not in _cpu_groups:
        has_gloo = "gloo" in str(dist.get_backend_config())
        _cpu_groups[world] = None if has_gloo else dist.new_group(backend="gloo")
    return _cpu_groups[world]
