"""Tensors that describe the shards of a global tensor that they hold.

There are three forms. torch's CheckpointableTensor protocol uses attributes of a local tensor
(torch 2.15). DCP uses the methods `__create_chunk_list__`, `__create_write_items__` and
`__get_tensor_shard__`, which Megatron-Core and torchrec define on a tensor or on the local part of
a DTensor. The third form is ShardedTensor.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from shardckpt.errors import StateError
from shardckpt.state.local_chunks import (
    PLAIN,
    LocalChunk,
    Shards,
    box_slices,
    is_distributed,
    is_sharded_tensor,
)
from shardckpt.torch_compat import dtensor_class, dtensor_local, is_dtensor

__all__ = ["carry_layout", "describes_itself", "materialized", "shards_of"]

_ATTRIBUTES = ("global_shape", "global_offsets", "local_offsets", "local_sizes")
_METHODS = ("__create_chunk_list__", "__create_write_items__")


def describes_itself(tensor: torch.Tensor) -> bool:
    """Whether `shards_of` can find the shards of a tensor."""
    if type(tensor) is dtensor_class():
        local = dtensor_local(tensor)
        return type(local) is not torch.Tensor and _has_methods(local)
    if hasattr(tensor, "global_shape"):
        return True
    if type(tensor) in PLAIN or is_dtensor(tensor):
        return False
    return is_sharded_tensor(tensor) or _has_methods(tensor)


def _has_methods(tensor: torch.Tensor) -> bool:
    return any(hasattr(tensor, method) for method in _METHODS)


def shards_of(tensor: Any, *, name: str) -> Shards:
    """Return the shards that a tensor holds on this rank, as it describes them. Not collective.

    Raises:
        StateError: The description is inconsistent. The error names the tensor.
    """
    try:
        if is_sharded_tensor(tensor):
            shards = _of_sharded_tensor(tensor)
        elif hasattr(tensor, "global_shape"):
            shards = _of_attributes(tensor, name)
        else:
            shards = _of_methods(tensor, name)
    except StateError:
        raise
    except Exception as error:  # other libraries define the methods and attributes
        raise _unclear(name, "a consistent description", f"{type(error).__name__}: {error}") from (
            error
        )
    for chunk in shards.chunks:
        _check(chunk, shards.shape, name)
    shards.chunks = [chunk for chunk in shards.chunks if 0 not in chunk.sizes or 0 in shards.shape]
    return shards


def _of_sharded_tensor(tensor: Any) -> Shards:
    facts = tensor.metadata()
    chunks = [
        LocalChunk(
            tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes), shard.tensor
        )
        for shard in tensor.local_shards()
    ]
    return Shards(tuple(facts.size), facts.tensor_properties.dtype, chunks, tensor)


def _of_attributes(tensor: torch.Tensor, name: str) -> Shards:
    missing = [attribute for attribute in _ATTRIBUTES if not hasattr(tensor, attribute)]
    if missing:
        raise _unclear(name, f"all of {', '.join(_ATTRIBUTES)}", f"no {', '.join(missing)}")
    shape, *lists = (getattr(tensor, attribute) for attribute in _ATTRIBUTES)
    counts = {len(numbers) for numbers in lists}
    if len(counts) > 1:
        raise _unclear(name, "equally many offsets and sizes", f"{sorted(counts)} of them")
    data, chunks = tensor.detach(), []
    for offsets, at, sizes in zip(*map(_numbers, lists), strict=True):
        at = at or (0,) * len(sizes)
        fits = len(at) == len(sizes) == data.dim() and all(
            begin >= 0 and begin + size <= length
            for begin, size, length in zip(at, sizes, data.shape, strict=True)
        )
        if not fits:
            actual = f"local offsets {list(at)}, sizes {list(sizes)}"
            raise _unclear(name, f"shards within the local shape {list(data.shape)}", actual)
        chunks.append(LocalChunk(offsets, sizes, data[box_slices((0,) * len(at), at, sizes)]))
    (global_shape,) = _numbers([shape])
    return Shards(global_shape, tensor.dtype, chunks, tensor)


def _of_methods(tensor: Any, name: str) -> Shards:
    # Imported late: DCP takes a third of a second, and such tensors have imported it already.
    from torch.distributed.checkpoint.metadata import MetadataIndex

    shape, dtype = tuple(tensor.shape), tensor.dtype
    boxes: list[tuple[Any, Any]] = []
    if hasattr(tensor, "__create_write_items__"):
        items = tensor.__create_write_items__(name, tensor)
        boxes = [(item.tensor_data.chunk.offsets, item.tensor_data.chunk.sizes) for item in items]
        shapes = {tuple(item.tensor_data.size) for item in items}
        if len(shapes) > 1:
            raise _unclear(name, "one global shape", sorted(shapes))
        shape = next(iter(shapes), shape)
    if not boxes and hasattr(tensor, "__create_chunk_list__"):
        boxes = [(chunk.offsets, chunk.sizes) for chunk in tensor.__create_chunk_list__()]
    chunks = []
    for number, (offsets, sizes) in enumerate(boxes):
        if 0 in sizes:
            continue
        data = tensor.__get_tensor_shard__(MetadataIndex(name, torch.Size(offsets), number))
        if is_dtensor(data):
            data = data.to_local()
        data = data.detach()
        if data.numel() == torch.Size(sizes).numel() and data.is_contiguous():
            data = data.view(tuple(sizes))  # the data may lack leading axes of size 1
        chunks.append(LocalChunk(tuple(offsets), tuple(sizes), data))
        dtype = data.dtype  # a wrapper may have another dtype than its shards
    return Shards(shape, dtype, chunks, tensor)


def _numbers(lists: Iterable[Sequence[Any]]) -> list[tuple[int, ...]]:
    return [tuple(map(operator.index, numbers)) for numbers in lists]


def _check(chunk: LocalChunk, shape: tuple[int, ...], name: str) -> None:
    fits = len(chunk.offsets) == len(chunk.sizes) == len(shape) and all(
        offset >= 0 and offset + size <= length
        for offset, size, length in zip(chunk.offsets, chunk.sizes, shape, strict=True)
    )
    if not fits or tuple(chunk.data.shape) != chunk.sizes:
        raise _unclear(
            name,
            f"shards within the global shape {list(shape)}, with the shapes of their data",
            f"offsets {list(chunk.offsets)}, sizes {list(chunk.sizes)}, "
            f"data of shape {list(chunk.data.shape)}",
        )


def _unclear(name: str, expected: str, actual: object) -> StateError:
    return StateError(
        "A tensor describes its shards inconsistently",
        tensor=name,
        expected=expected,
        actual=actual,
        remedy="set its offsets and sizes as torch.distributed.checkpoint describes them",
    )


def carry_layout(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the target, a copy or an alias of `source`, with the attributes that describe its
    shards.
    """
    if hasattr(source, "global_shape"):
        for attribute in _ATTRIBUTES:
            if hasattr(source, attribute):
                setattr(target, attribute, getattr(source, attribute))
    return target


def materialized(tensor: Any, name: str) -> Any:
    """Return a tensor with memory like one on the meta device, on its mesh's device or the
    default.
    """
    if isinstance(tensor, Shards) or (describes_itself(tensor) and type(tensor) not in PLAIN):
        raise StateError(
            "A tensor on the meta device that describes its own shards can't be given memory",
            tensor=name,
            expected="shards with memory",
            actual="device meta",
            remedy="materialize it first, with to_empty() or with its library",
        )
    device: Any = torch.get_default_device()
    if is_distributed(tensor):
        device = tensor.device_mesh.device_type
    elif device.type == "meta":  # inside `with torch.device("meta")`
        device = "cpu"
    return carry_layout(tensor, torch.empty_like(tensor, device=device))
