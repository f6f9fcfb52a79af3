"""The memory of tensors: whether a tensor owns it, and contiguous copies of its elements."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from shardckpt.errors import UnsupportedLeafError
from shardckpt.io.buffers import BUFFER_BYTES
from shardckpt.io.devices import accelerator

__all__ = [
    "address_of",
    "check_memory",
    "contiguous_pieces",
    "owns_memory",
    "parts",
    "plain_address",
    "shares_elements",
]


def owns_memory(tensor: torch.Tensor) -> bool:
    """Whether all elements of a strided tensor are in its own, allocated storage.

    False for subclasses that wrap other tensors, for fake and functional tensors, for tensors
    inside torch.func transforms, and for tensors whose storage was freed or is too small. Their
    addresses are invalid, and access to them would crash the process.
    """
    if tensor.layout is not torch.strided or tensor.is_nested:
        return False
    if not (tensor.is_cpu or accelerator.owns(tensor.device)):
        return True  # on other devices no code uses the address
    extent = tensor.numel()
    if not extent:
        return True
    try:
        storage = tensor.untyped_storage()
        size_bytes: int = storage.nbytes()
        offset = tensor.storage_offset()
        # If the offset is 0, tensor and storage have the same address.
        if not tensor.data_ptr() or (offset and not storage.data_ptr()):
            return False
        if not tensor.is_contiguous():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            extent = 1 + sum((size - 1) * stride for size, stride in steps)
        return bool((offset + extent) * tensor.itemsize <= size_bytes)
    except (RuntimeError, NotImplementedError, TypeError):  # no accessible storage
        return False


def plain_address(tensor: torch.Tensor) -> int:
    """Return the address of a contiguous CPU tensor that owns its memory, as most tensors do.

    Faster than owns_memory. Returns 0 for all other tensors, and for those without elements.
    """
    try:
        if not tensor.is_cpu or tensor.is_nested or not tensor.is_contiguous():
            return 0
        storage, address = tensor.untyped_storage(), tensor.data_ptr()
        base = storage.data_ptr()
        if not base or address - base + tensor.nbytes > storage.nbytes():
            return 0
        return address
    except (RuntimeError, NotImplementedError, TypeError):  # no accessible storage
        return 0


def shares_elements(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie at one address, as after expand() or unfold()."""
    if tensor.is_contiguous() or not tensor.numel():
        return False
    reach = 0  # of the dimensions with smaller strides
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += step * (size - 1)
    return False


def check_memory(tensor: torch.Tensor, *, name: str = "") -> None:
    """Raise UnsupportedLeafError, which names the tensor, if it does not own its memory."""
    if owns_memory(tensor):
        return
    cls = type(tensor)
    raise UnsupportedLeafError(
        "A tensor does not own memory for its elements",
        tensor=name or None,
        expected="a dense tensor whose storage holds all its elements",
        actual=f"{cls.__module__}.{cls.__qualname__} of shape {tuple(tensor.shape)}, "
        f"{tensor.layout}, whose storage is missing, freed or too small",
        remedy="save the tensors that it wraps, or a copy made while its storage is allocated",
    )


def address_of(tensor: torch.Tensor) -> int:
    """Return the address of the first element.

    Raises:
        UnsupportedLeafError: The tensor does not own memory.
    """
    check_memory(tensor)
    return tensor.data_ptr()


def contiguous_pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the elements of a tensor in row-major order, as contiguous CPU tensors.

    A contiguous CPU tensor is yielded unchanged. Other tensors are copied in parts of at most
    BUFFER_BYTES, so that a view takes the memory of a buffer, not of its storage.

    Raises:
        UnsupportedLeafError: The tensor does not own memory.
    """
    check_memory(tensor)
    if tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_neg() or tensor.is_conj()):
        yield tensor
        return
    for part in parts(tensor.detach()):
        copied = part.resolve_conj().resolve_neg().to("cpu").contiguous()
        check_memory(copied)
        yield copied


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Divide a tensor into views of at most BUFFER_BYTES, in row-major order."""
    size_bytes = tensor.nbytes
    if size_bytes <= BUFFER_BYTES or tensor.dim() == 0:
        yield tensor
        return
    rows = max(1, BUFFER_BYTES * tensor.shape[0] // size_bytes)
    for part in torch.split(tensor, rows):
        yield from parts(part[0] if part.shape[0] == 1 else part)
