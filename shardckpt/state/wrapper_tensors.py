"""Tensors of subclasses that wrap other tensors (`__tensor_flatten__`): quantized weights, 8-bit
optimizer state, float8, jagged tensors.

Such a tensor is saved as a dict: its inner tensors by the names of their attributes, and under
WRAPPER plain facts that tell whether another one is alike. It is loaded by filling the inner
tensors of one that the caller has: no class that a checkpoint names is looked up or called.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardckpt.errors import UnsupportedLeafError
from shardckpt.state.local_chunks import PLAIN, LocalChunk, Shards, local_layout
from shardckpt.state.sharded_tensors import describes_itself, shards_of

__all__ = ["WRAPPER", "Wrapped", "facts_of", "read_out"]

WRAPPER = "@wrapper"
"""The key of the facts beside the inner tensors."""

_ROWS = {
    "torchao.optim.subclass_8bit.OptimState8bit": ("codes", "scale"),
    "torchao.optim.subclass_4bit.OptimState4bit": ("codes", "scale"),
    "torchao.optim.subclass_fp8.OptimStateFp8": ("codes", "scale"),
    "torchao.float8.fsdp_utils.WeightWithDynamicFloat8CastTensor": ("_tensor",),
}
"""The inner tensors that a DTensor cuts with the outer one along dimension 0. All others are the
same on all ranks. A class of one's own says it with an attribute `checkpoint_rows`."""


@dataclass(eq=False, slots=True)
class Wrapped:
    """A wrapper tensor taken apart: its inner tensors by attribute, and plain facts."""

    parts: dict[str, Any]
    facts: dict[str, Any]
    source: torch.Tensor

    @property
    def entries(self) -> dict[str, Any]:
        """What is saved."""
        return {**self.parts, WRAPPER: self.facts}


def read_out(tensor: Any, *, name: str) -> Any:
    """A tensor as it can be saved and filled: itself if its memory is its own (or if check_dense
    tells why not), Shards if it says how it is sharded, Wrapped if it wraps others.

    Not collective. Raises StateError or UnsupportedLeafError, naming the tensor.
    """
    kind = type(tensor)
    if kind in PLAIN:
        return shards_of(tensor, name=name) if hasattr(tensor, "global_shape") else tensor
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if describes_itself(tensor):
        return shards_of(tensor, name=name)
    if isinstance(tensor, DTensor):
        local: Any = tensor._local_tensor  # private in torch 2.13
        if type(local) in PLAIN or hasattr(local, "wait") or not _wraps(local):
            return tensor
        return _of_dtensor(tensor, local, name)
    if not _wraps(tensor):
        return tensor
    parts, context = _flattened(tensor, name)
    return Wrapped(parts, _facts(tensor, tensor, context), tensor)


def _wraps(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__") and hasattr(type(tensor), "__tensor_unflatten__")


def _flattened(tensor: Any, name: str) -> tuple[dict[str, torch.Tensor], Any]:
    try:
        names, context = tensor.__tensor_flatten__()
        return {str(inner): getattr(tensor, inner) for inner in names}, context
    except Exception as error:  # of the subclass
        raise _refused(tensor, name, f"{type(error).__name__}: {error}") from error


def _facts(outer: torch.Tensor, local: torch.Tensor, context: Any) -> dict[str, Any]:
    """What has to be equal for one tensor's inner tensors to mean the same in another."""
    return {
        "class": f"{type(local).__module__}.{type(local).__qualname__}",
        "dtype": outer.dtype,
        "shape": [size if type(size) is int else None for size in outer.shape],  # None: jagged
        "context": _plain(context, local),
    }


def _plain(value: Any, local: torch.Tensor) -> Any:
    """A context as plain data, without what depends on where the tensor lies and how it is cut."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, torch.device):
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {
            str(key): _plain(item, local)
            for key, item in value.items()
            if key not in ("requires_grad", "device")
        }
    if isinstance(value, (list, tuple)):
        if len(value) == local.dim() and len(value):
            for text, numbers in (("shape", local.shape), ("strides", local.stride())):
                if tuple(value) == tuple(numbers):
                    return f"({text})"
        return [_plain(item, local) for item in value]
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _of_dtensor(tensor: DTensor, local: Any, name: str) -> Wrapped:
    """The inner tensors of a DTensor's local part, each a part of a global one of its own."""
    kind = f"{type(local).__module__}.{type(local).__qualname__}"
    rows = getattr(type(local), "checkpoint_rows", _ROWS.get(kind))
    if rows is None:
        raise _refused(local, name, "nothing says how its inner tensors are sharded", of=tensor)
    for placement in tensor.placements:
        if not (placement == Replicate() or placement == Shard(0)):
            raise _refused(local, name, f"placements {tensor.placements}", of=tensor)
    boxes = local_layout(tensor)
    parts, context = _flattened(local, name)
    found: dict[str, Any] = {}
    for inner, part in parts.items():
        if type(part) not in PLAIN:
            raise _refused(local, name, f"its {inner} is a {type(part).__qualname__}", of=tensor)
        shape, sizes = tuple(part.shape), tuple(part.shape)
        offsets = (0,) * len(shape)
        if inner in rows and boxes:
            ((begin, *_), (length, *_)) = boxes[0]
            whole, at = shape[0] * tensor.shape[0], shape[0] * begin
            if not length or whole % length or at % length:
                actual = f"{shape[0]} rows of {inner} for {length} of {tensor.shape[0]} rows"
                raise _refused(local, name, actual, of=tensor)
            shape, offsets = (whole // length, *shape[1:]), (at // length, *offsets[1:])
        chunks = [LocalChunk(offsets, sizes, part.detach())] if boxes else []
        found[inner] = Shards(shape, part.dtype, chunks, part)
    return Wrapped(found, _facts(tensor, local, context), tensor)


def facts_of(node: Any) -> dict[str, Any] | None:
    """The facts in a saved node that is a wrapper tensor's; None for any other."""
    facts = node.get(WRAPPER) if isinstance(node, dict) else None
    return facts if isinstance(facts, dict) else None


def _refused(
    tensor: Any, name: str, actual: str, *, of: torch.Tensor | None = None
) -> UnsupportedLeafError:
    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    return UnsupportedLeafError(
        "A tensor that wraps others can't be saved or loaded",
        tensor=name,
        expected="inner tensors that are sharded along dimension 0 with the outer one, or the same "
        "on all ranks"
        if of is not None
        else "inner tensors that __tensor_flatten__ lists",
        actual=f"{'a DTensor of ' if of is not None else ''}{kind}: {actual}",
        remedy=f"set {type(tensor).__qualname__}.checkpoint_rows to the names of the inner tensors "
        "that are split with the outer one"
        if of is not None
        else "save the tensors that it wraps, or a plain tensor made of it",
    )
