"""numpy arrays, and shards of an array that a program divides itself."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from shardckpt.errors import StateError, UnsupportedLeafError
from shardckpt.format.dtypes import DTYPES
from shardckpt.io.tensor_memory import owns_memory

__all__ = ["ShardedArray", "fits_tensor", "from_numpy"]


class ShardedArray:
    """This rank's part of a global array, for programs that divide their arrays themselves.

    It has the same name on every rank. `save` writes each part once, and refuses parts that overlap
    or leave a gap. `load` fills `local` in place, whatever the saved parts were. `load_state`
    returns the full array. `save` and `load` report invalid arguments, on all ranks at once.

    Args:
        local: The part of this rank, a numpy array or a plain tensor with any strides. A rank
            without a part passes an array with a size of 0.
        global_shape: The shape of the global array.
        offsets: Where the part begins in the global array, in elements of each dimension.

    Example:
        >>> import numpy as np, shardckpt
        >>> grid = np.zeros((4, 6))  # with a border of one row on each side
        >>> part = shardckpt.ShardedArray(grid[1:-1], global_shape=(2, 6), offsets=(0, 0))
        >>> report = shardckpt.save({"grid": part}, "run/step-1")
        >>> shardckpt.load_state("run/step-1")["grid"].shape
        (2, 6)
    """

    def __init__(
        self,
        local: np.ndarray[Any, Any] | torch.Tensor,
        global_shape: Sequence[int],
        offsets: Sequence[int],
    ) -> None:
        self.local = local
        self.shape = tuple(global_shape)
        self.offsets = tuple(offsets)
        self._tensor: torch.Tensor | None = None

    def __repr__(self) -> str:
        sizes = list(getattr(self.local, "shape", ()))
        return f"ShardedArray({sizes} at {list(self.offsets)} of {list(self.shape)})"

    @property
    def array_type(self) -> Literal["tensor", "numpy"]:
        """The type of the full array that `load_state` builds."""
        return "numpy" if isinstance(self.local, np.ndarray) else "tensor"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the elements."""
        return self.tensor.dtype

    @property
    def is_meta(self) -> bool:
        """Whether the part is on the meta device."""
        return self.tensor.is_meta

    @property
    def tensor(self) -> torch.Tensor:
        """`local` as a tensor. Call `check` before."""
        assert self._tensor is not None
        return self._tensor

    def copy(self) -> ShardedArray:
        """Copy the part, with its data.

        Returns:
            The copy.
        """
        if isinstance(self.local, torch.Tensor):
            if not owns_memory(self.local):
                return self  # check() raises an error that names it
            return ShardedArray(self.local.clone(), self.shape, self.offsets)
        return ShardedArray(self.local.copy(), self.shape, self.offsets)

    def check(self, name: str) -> ShardedArray:
        """Check the part.

        Args:
            name: The name of the entry, for errors.

        Returns:
            This object.

        Raises:
            StateError: Shape and offsets do not match.
            UnsupportedLeafError: The type or dtype can't be saved.
        """
        if isinstance(self.local, np.ndarray):
            if self._tensor is None or not np.may_share_memory(self.local, self._tensor.numpy()):
                self._tensor = from_numpy(self.local, name=name)
        elif type(self.local) in (torch.Tensor, torch.nn.Parameter):
            self._tensor = self.local.detach()
        else:
            raise UnsupportedLeafError(
                "The local part of a ShardedArray is of a type that can't be saved",
                tensor=name,
                expected="a numpy array or a plain tensor",
                actual=f"{type(self.local).__module__}.{type(self.local).__qualname__}",
                remedy="put a DTensor into the state without a ShardedArray",
            )
        sizes = tuple(self.local.shape)
        try:
            self.shape = tuple(map(operator.index, self.shape))
            self.offsets = tuple(map(operator.index, self.offsets))
            fits = len(sizes) == len(self.shape) == len(self.offsets) and all(
                offset >= 0 and offset + size <= length
                for offset, size, length in zip(self.offsets, sizes, self.shape, strict=True)
            )
        except TypeError:
            fits = False
        if not fits:
            raise StateError(
                "A ShardedArray does not lie inside its global array",
                tensor=name,
                expected=f"integer offsets and sizes within {list(self.shape)}",
                actual=f"offsets {list(self.offsets)}, sizes {list(sizes)}",
                remedy="pass the position of the first element of `local` as offsets",
            )
        return self

    def check_writeable(self, name: str) -> None:
        """Check that `local` can be loaded into.

        Args:
            name: The name of the entry, for errors.

        Raises:
            StateError: The array is read-only.
        """
        if isinstance(self.local, np.ndarray) and not self.local.flags.writeable:
            raise StateError(
                "The local part of a ShardedArray can't be written to",
                tensor=name,
                expected="an array with flags.writeable",
                actual="a read-only array",
                remedy="load into a copy of it",
            )

    def loaded(self) -> None:
        """Copy the loaded data into `local`, if torch could not read into it directly."""
        if isinstance(self.local, np.ndarray):
            read = self.tensor.numpy()
            if not np.may_share_memory(self.local, read):
                self.local[...] = read


@functools.lru_cache(maxsize=64)
def fits_tensor(dtype: np.dtype[Any]) -> bool:
    """Whether tensors support a dtype of numpy. Arrays of text and times are values, not
    tensors.
    """
    try:
        return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype in DTYPES.values()
    except TypeError:
        return False


def from_numpy(array: np.ndarray[Any, Any], *, name: str) -> torch.Tensor:
    """Return a tensor that shares the array's memory. If torch can't share it, return a copy."""
    if isinstance(array, np.ma.MaskedArray):
        raise UnsupportedLeafError(
            "A masked array can't be saved: its mask would be lost",
            tensor=name,
            expected="a plain numpy array",
            actual="numpy.ma.MaskedArray",
            remedy="save its data and its mask as two arrays",
        )
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 for stride in native.strides) or not native.flags.writeable:
        native = native.copy()
    if any(stride % max(native.itemsize, 1) for stride in native.strides):
        native = native.copy()  # the array is a field of a structured array
    try:
        return torch.from_numpy(native)
    except TypeError as error:
        raise UnsupportedLeafError(
            "A numpy array of this dtype can't be saved",
            tensor=name,
            expected="a numeric or bool dtype of up to 64 bits (complex64 for complex numbers)",
            actual=str(array.dtype),
            remedy="convert it with astype(), or save it as a list",
        ) from error
