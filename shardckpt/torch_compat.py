"""Everything in torch that is private, semi-public, or different between its versions.

Other modules use the public API of torch alone; tests/test_torch_compat.py looks for exceptions.
A comment says which versions have a name, if not all versions from 2.6 on have it. scripts/versions
runs the tests with the versions in TRIED, and writes the results to docs/versions.md.
"""

from __future__ import annotations

import copy
import inspect
import sys
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "TRIED",
    "caches_plans",
    "carry_versions",
    "change_count",
    "child_names",
    "clone_store",
    "current_accelerator",
    "current_device",
    "dcp_save",
    "dcp_version",
    "distribute_locally",
    "division_order",
    "dtensor",
    "dtensor_class",
    "dtensor_local",
    "find_dtype",
    "foreach_copy",
    "group_store",
    "inner_schedulers",
    "is_dtensor",
    "is_parameter",
    "load_functions",
    "map_instances",
    "owner_rank",
    "plain_functions",
    "spec_of",
    "storage_id",
    "storage_info",
    "store_host",
    "unsynchronized_buffers",
    "wrapper_tensor",
]

TRIED = ("2.6.0", "2.8.0", "2.10.0", "2.12.1", "2.13.0", "2.14.1")
"""The versions of torch that scripts/versions tests."""

foreach_copy = torch._foreach_copy_
"""Copies a list of tensors to another. This single call releases the GIL."""

map_instances = tree_map_only
"""Applies a function to all values of a type in nested containers."""


# ---- tensors


def find_dtype(name: str) -> torch.dtype | None:
    """Return a dtype of torch, or None if this version does not have it.

    float8_e8m0fnu came with torch 2.7, float4_e2m1fn_x2 with 2.8.
    """
    found = vars(torch).get(name)  # getattr would import modules on demand
    return found if isinstance(found, torch.dtype) else None


def change_count(tensor: torch.Tensor) -> int:
    """Return a number that grows with each change of a tensor in place."""
    return tensor._version


def storage_id(tensor: torch.Tensor) -> int:
    """Return a number that is equal for tensors of one storage, while it exists.

    Unlike the address, it distinguishes empty storages.
    """
    return int(tensor.untyped_storage()._cdata)


def plain_functions() -> AbstractContextManager[Any]:
    """Ignore the `__torch_function__` of subclasses of Tensor inside a with block."""
    return torch._C.DisableTorchFunctionSubclass()


def wrapper_tensor(cls: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Create a tensor of a subclass, without memory."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)


def is_parameter(value: Any) -> bool:
    """Return isinstance(value, nn.Parameter), which is slow for DTensors.

    It checks the attribute that nn.Parameter itself checks.
    """
    return type(value) is nn.Parameter or getattr(value, "_is_param", False)


# ---- DTensor


_dtensor_class: Any = None


def dtensor_class() -> Any:
    """Return DTensor, or None if no module has imported it: no value is a DTensor then.

    The import takes half as long as that of torch.
    """
    global _dtensor_class
    if _dtensor_class is None:
        _dtensor_class = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return _dtensor_class


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether a value is a DTensor. Does not import DTensor."""
    cls = dtensor_class()
    return cls is not None and isinstance(value, cls)


def dtensor_local(tensor: Any) -> Any:
    """Return the local tensor of a DTensor. to_local() is slow, and waits for collectives."""
    return tensor._local_tensor


def spec_of(tensor: Any) -> Any:
    """Return the spec of a DTensor: its mesh, placements and shape."""
    return tensor._spec


def division_order(spec: Any) -> tuple[int, ...]:
    """Return the mesh dimensions of a DTensor's spec in the order in which they divide the tensor.

    From torch 2.10 on, a spec can have another order than that of the mesh.
    """
    entries = getattr(spec, "shard_order", None) or ()
    first = [dim for entry in entries for dim in entry.mesh_dims]
    return (*first, *(dim for dim in range(len(spec.placements)) if dim not in first))


def dtensor(local: torch.Tensor, spec: Any) -> DTensor:
    """Create a DTensor of a local tensor and a spec. Public functions compute placements anew."""
    from torch.distributed.tensor import DTensor

    return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def distribute_locally(tensor: torch.Tensor, mesh: Any, placements: Sequence[Any]) -> DTensor:
    """Create a DTensor from a tensor that is equal on all ranks. Without communication.

    Before torch 2.7, distribute_tensor always communicates. Up to torch 2.9, it does not divide
    uneven strided shards as FSDP2 does.

    A strided shard of FSDP2 over tensor parallel is a shard of the parts that the mesh dimensions
    to its right make. Any other strided shard, such as that of a view of a DTensor, has a chunk of
    each of `split_factor` chunks.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    strides = any(hasattr(placement, "split_factor") for placement in placements)
    if not strides and "src_data_rank" in inspect.signature(distribute_tensor).parameters:
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    steps = list(zip(placements, mesh.shape, mesh.get_coordinate(), strict=True))
    over_others = _shards_the_parts_of_others(placements, mesh.shape)
    if over_others:
        strided = [step for step in steps if hasattr(step[0], "split_factor")]
        others = [step for step in steps if not hasattr(step[0], "split_factor")]
        steps = [*others, *reversed(strided)]
    local = tensor
    for placement, parts, part in steps:
        if hasattr(placement, "dim"):  # a Shard or a strided shard
            factor = 1 if over_others else getattr(placement, "split_factor", 1)
            pieces = [_chunk(local, placement.dim, factor, piece) for piece in range(factor)]
            chunks = [_chunk(piece, placement.dim, parts, part) for piece in pieces]
            local = chunks[0] if factor == 1 else torch.cat(chunks, placement.dim)
    local = local.clone(memory_format=torch.contiguous_format)  # without the memory of the rest
    return DTensor.from_local(local, mesh, placements, shape=tensor.shape, stride=tensor.stride())


def _shards_the_parts_of_others(placements: Sequence[Any], sizes: Sequence[int]) -> bool:
    """Whether each strided shard is one of the parts that the mesh dimensions to its right make."""
    for at, placement in enumerate(placements):
        if hasattr(placement, "split_factor"):
            parts = 1
            for other, size in zip(placements[at + 1 :], sizes[at + 1 :], strict=True):
                parts *= size if getattr(other, "dim", None) == placement.dim else 1
            if parts != placement.split_factor:
                return False
    return True


def _chunk(tensor: torch.Tensor, dim: int, parts: int, part: int) -> torch.Tensor:
    """Return one of the parts into which torch.chunk divides a tensor, or an empty one."""
    size = tensor.shape[dim]
    length = -(-size // parts)
    begin = min(part * length, size)
    return tensor.narrow(dim, begin, min(length, size - begin))


# ---- modules and optimizers


def child_names(module: nn.Module) -> list[str]:
    """Return the names of the children of a module, also those of shared and absent children."""
    return list(module._modules)


def load_functions(module: nn.Module) -> list[Any]:
    """Return the functions that load_state_dict calls for a module, without its children."""
    return [
        module._load_from_state_dict,
        *module._load_state_dict_pre_hooks.values(),
        *module._load_state_dict_post_hooks.values(),
    ]


def carry_versions(source: Any, target: Any) -> None:
    """Copy the versions of modules, an attribute of a state dict, to another state dict."""
    if hasattr(source, "_metadata"):
        versions = source._metadata.items()
        target._metadata = OrderedDict((name, copy.copy(facts)) for name, facts in versions)


def inner_schedulers(scheduler: Any) -> Sequence[Any]:
    """Return the parts of a SequentialLR or ChainedScheduler. Empty for all others."""
    return getattr(scheduler, "_schedulers", ())


def owner_rank(optimizer: Optimizer, parameter: torch.Tensor) -> int:
    """Return the rank on which a ZeroRedundancyOptimizer keeps the state of a parameter."""
    return optimizer._param_to_rank[parameter]  # type: ignore[attr-defined, no-any-return]


def unsynchronized_buffers() -> dict[str, bool]:
    """Return the option of DistributedDataParallel that leaves buffers as they are in forward().

    It is `broadcast_buffers` before torch 2.13.
    """
    options = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    new = "forward_sync_buffers" in options
    return {"forward_sync_buffers" if new else "broadcast_buffers": False}


# ---- process groups


def group_store(group: Any) -> Any:
    """Return the store of a process group. Public since torch 2.9."""
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    from torch.distributed.distributed_c10d import _get_process_group_store

    return _get_process_group_store(group)


def store_host(store: Any) -> str | None:
    """Return the host of a store's server. None if the store has none."""
    stores: Any = torch.distributed
    while isinstance(store, stores.PrefixStore):
        store = store.underlying_store
    return str(store.host) if isinstance(store, stores.TCPStore) else None


def clone_store(store: Any) -> Any:
    """Return a new connection to a store, which can be used while a call to the store waits.

    All clones of the stores of a group share their keys. Before torch 2.8, a store can't be cloned
    and does not show its prefix, so the clones agree on a prefix of their own.
    """
    if hasattr(store, "clone"):
        return store.clone()
    stores: Any = torch.distributed  # the types of torch lack attributes of stores
    root = store
    while isinstance(root, stores.PrefixStore):
        root = root.underlying_store
    if not isinstance(root, stores.TCPStore):  # others have no connection
        return store
    prefix = store.compare_set("shardckpt/clones", "", uuid.uuid4().hex).decode()
    clone = stores.TCPStore(root.host, root.port, wait_for_workers=False, timeout=root.timeout)
    return stores.PrefixStore(prefix, clone)


# ---- torch.distributed.checkpoint


def storage_info(relative_path: str, *, offset: int, length: int) -> Any:
    """Create the position of an item as the FileSystemWriter of DCP describes it."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(relative_path, offset, length)


def dcp_version() -> str | None:
    """Return the version that DCP gives to its metadata. Since torch 2.9."""
    from torch.distributed.checkpoint import filesystem

    return getattr(filesystem, "CURRENT_DCP_VERSION", None)


def caches_plans(planner: Any) -> bool:
    """Whether a planner of DCP reuses plans: its argument enable_plan_caching, since torch 2.7."""
    return bool(getattr(planner, "_enable_plan_caching", False))


def current_accelerator() -> torch.device | None:
    """Return the accelerator that torch has chosen, or None. 2.6 raises an error for None."""
    try:
        return torch.accelerator.current_accelerator()
    except RuntimeError:
        return None


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a device is the current one of the accelerator."""
    if hasattr(torch.accelerator, "device_index"):  # 2.8
        return torch.accelerator.device_index(device.index)
    module: Any = torch.get_device_module(device)
    return module.device(device.index)  # type: ignore[no-any-return]


def dcp_save(state: Any, writer: Any, *, planner: Any, process_group: Any, alone: bool) -> None:
    """Call torch.distributed.checkpoint.save. Collective, unless `alone`.

    `alone` is its argument no_dist, since torch 2.7.
    """
    from torch.distributed.checkpoint import state_dict_saver

    if "no_dist" in inspect.signature(state_dict_saver.save).parameters:
        options = {"process_group": process_group, "no_dist": alone}
        state_dict_saver.save(state, storage_writer=writer, planner=planner, **options)
    elif alone:
        state_dict_saver._save_state_dict(state, writer, no_dist=True, planner=planner)
    else:
        state_dict_saver.save(
            state, storage_writer=writer, planner=planner, process_group=process_group
        )
