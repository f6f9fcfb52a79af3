"""Wrapper tensors: subclasses that consist of inner tensors (`__tensor_flatten__`).

Examples are quantized weights, 8-bit optimizer state, float8 and jagged tensors. A wrapper tensor
is saved as a dict: its inner tensors by the names of their attributes, and plain facts under
WRAPPER. A load fills the inner tensors of the caller's wrapper tensor if its facts are equal. No
class that a checkpoint names is looked up or called.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from shardckpt.errors import UnsupportedLeafError
from shardckpt.state.local_chunks import PLAIN, LocalChunk, Shards, local_layout
from shardckpt.state.sharded_tensors import describes_itself, shards_of
from shardckpt.torch_compat import dtensor_local, is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["WRAPPER", "Wrapped", "facts_of", "saveable_form"]

WRAPPER = "@wrapper"
"""The key of the facts, beside the inner tensors."""

_ROWS = {
    "torchao.optim.subclass_8bit.OptimState8bit": ("codes", "scale"),
    "torchao.optim.subclass_4bit.OptimState4bit": ("codes", "scale"),
    "torchao.optim.subclass_fp8.OptimStateFp8": ("codes", "scale"),
    "torchao.float8.fsdp_utils.WeightWithDynamicFloat8CastTensor": ("_tensor",),
}
"""The inner tensors that a DTensor shards with the outer one along dimension 0. All other inner
tensors are equal on all ranks. Another class lists such tensors in an attribute `checkpoint_rows`.
"""


@dataclass(eq=False, slots=True)
class Wrapped:
    """A wrapper tensor, split into its inner tensors by attribute, and plain facts."""

    inner: dict[str, Any]
    facts: dict[str, Any]
    source: torch.Tensor

    @property
    def entries(self) -> dict[str, Any]:
        """The entries to save."""
        return {**self.inner, WRAPPER: self.facts}


def saveable_form(tensor: Any, *, name: str) -> Any:
    """Convert a tensor to the form in which it can be saved and filled. Not collective.

    Returns:
        Shards for a tensor that describes its shards, Wrapped for a wrapper tensor, and otherwise
        the tensor itself. `check_dense` raises an error for tensors that can't be saved.

    Raises:
        StateError: The tensor describes its shards inconsistently.
        UnsupportedLeafError: The wrapper tensor can't be split.
    """
    if type(tensor) in PLAIN:
        return shards_of(tensor, name=name) if hasattr(tensor, "global_shape") else tensor
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if describes_itself(tensor):
        return shards_of(tensor, name=name)
    if is_dtensor(tensor):
        local = dtensor_local(tensor)
        if type(local) in PLAIN or hasattr(local, "wait") or not _wraps(local):
            return tensor
        return _of_dtensor(tensor, local, name)
    if not _wraps(tensor):
        return tensor
    inner, context = _flattened(tensor, name)
    return Wrapped(inner, _facts(tensor, tensor, context), tensor)


def _wraps(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__") and hasattr(type(tensor), "__tensor_unflatten__")


def _flattened(tensor: Any, name: str) -> tuple[dict[str, torch.Tensor], Any]:
    try:
        names, context = tensor.__tensor_flatten__()
        return {str(inner): getattr(tensor, inner) for inner in names}, context
    except Exception as error:  # raised by the code of the subclass
        raise _refused(tensor, name, f"{type(error).__name__}: {error}") from error


def _facts(outer: torch.Tensor, local: torch.Tensor, context: Any) -> dict[str, Any]:
    """Return the facts that must be equal in two wrapper tensors with interchangeable inner
    tensors.
    """
    return {
        "class": f"{type(local).__module__}.{type(local).__qualname__}",
        "dtype": outer.dtype,
        # None for a jagged dimension
        "shape": [size if type(size) is int else None for size in outer.shape],
        "context": _plain(context, local),
    }


def _plain(value: Any, local: torch.Tensor) -> Any:
    """Convert a context to plain data, without its device and the sizes of the local tensor."""
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
    """Split the local part of a DTensor into inner tensors, each a shard of a global inner
    tensor.
    """
    from torch.distributed.tensor import Replicate, Shard

    class_name = f"{type(local).__module__}.{type(local).__qualname__}"
    rows = getattr(type(local), "checkpoint_rows", _ROWS.get(class_name))
    if rows is None:
        raise _refused(local, name, "it is unknown how its inner tensors are sharded", of=tensor)
    for placement in tensor.placements:
        if not (placement == Replicate() or placement == Shard(0)):
            actual, remedy = f"placements {tensor.placements}", "redistribute() it to Shard(0)"
            raise _refused(local, name, actual, of=tensor, remedy=remedy)
    boxes = local_layout(tensor)
    inner_tensors, context = _flattened(local, name)
    shards: dict[str, Any] = {}
    for inner, part in inner_tensors.items():
        if type(part) not in PLAIN:
            raise _refused(local, name, f"its {inner} is a {type(part).__qualname__}", of=tensor)
        shape, sizes = tuple(part.shape), tuple(part.shape)
        offsets = (0,) * len(shape)
        if inner in rows and boxes:
            ((begin, *_), (length, *_)) = boxes[0]
            global_rows, first_row = shape[0] * tensor.shape[0], shape[0] * begin
            if not length:
                raise _refused(local, name, _NO_ROWS, of=tensor, remedy=_FEWER_RANKS)
            if global_rows % length or first_row % length:
                actual = f"{shape[0]} rows of {inner} for {length} of {tensor.shape[0]} rows"
                raise _refused(local, name, actual, of=tensor)
            shape = (global_rows // length, *shape[1:])
            offsets = (first_row // length, *offsets[1:])
        chunks = [LocalChunk(offsets, sizes, part.detach())] if boxes else []
        shards[inner] = Shards(shape, part.dtype, chunks, part)
    return Wrapped(shards, _facts(tensor, local, context), tensor)


_NO_ROWS = "this rank holds no rows, which would show the rows of the inner tensors"
_FEWER_RANKS = "divide the tensor among ranks that all get rows, or replicate it"


def facts_of(node: Any) -> dict[str, Any] | None:
    """Return the facts in the saved node of a wrapper tensor. None for any other node."""
    facts = node.get(WRAPPER) if isinstance(node, dict) else None
    return facts if isinstance(facts, dict) else None


def _refused(
    tensor: Any,
    name: str,
    actual: str,
    *,
    of: torch.Tensor | None = None,
    remedy: str = "",
) -> UnsupportedLeafError:
    if not remedy and of is not None:
        rows = f"{type(tensor).__qualname__}.checkpoint_rows"
        remedy = f"set {rows} to the names of the inner tensors that are split with the outer one"
    class_name = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    return UnsupportedLeafError(
        "A wrapper tensor can't be saved or loaded",
        tensor=name,
        expected="inner tensors that are sharded along dimension 0 with the outer one, or the same "
        "on all ranks"
        if of is not None
        else "inner tensors that __tensor_flatten__ lists",
        actual=f"{'a DTensor of ' if of is not None else ''}{class_name}: {actual}",
        remedy=remedy or "save the tensors that it wraps, or a plain tensor made of it",
    )
