"""The record of a match of a caller's state against a saved one.

The modules that match tensors, containers, modules and optimizers add their reads and mismatches to
one MatchContext.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd.graph import increment_version

from shardckpt.errors import StateError
from shardckpt.format.dtype_names import COMPLEX, NOT_COPYABLE
from shardckpt.format.dtypes import DTYPES, OPAQUE
from shardckpt.format.entries import TensorEntry
from shardckpt.format.typed_json import TensorRef
from shardckpt.io.tensor_memory import shares_elements
from shardckpt.state.flatten import Ties
from shardckpt.state.local_chunks import AnyTensor, LocalChunk, addressed_chunk, local_chunks
from shardckpt.state.markers import PerRank
from shardckpt.state.materialize import NOTHING, Allocate, Builder, allocate
from shardckpt.state.mismatches import Mismatches
from shardckpt.state.module_state import modules_in
from shardckpt.state.optimizer_state import ParameterNames
from shardckpt.state.saved_tree import SavedState, below, under
from shardckpt.torch_compat import plain_functions

__all__ = ["Finish", "Match", "MatchContext"]

Finish = Callable[[], Any]
"""A function that puts a matched value back into the state after the reads, and returns it."""


class MatchContext:
    """The reads and mismatches of one rank's match, and the saved state that it reads from.

    Attributes:
        saved: The saved state.
        rank: This rank.
        world_size: The number of ranks that load.
        may_cast: Whether saved dtypes may be converted.
        reads: The reads that fill the state's tensors.
        mismatches: The mismatched entries.
        cast: (name, saved dtype, dtype in the state) of the tensors that are converted.
        kept: Names of PerRank entries that keep their value.
        used: Names of the saved entries that the state uses.
        filled: Tensors that consist of other tensors, which the reads fill.
        owners: Names of modules and optimizers, to which all entries below their names belong.
        parameter_names: The names of the state's parameters.
        current: The name of the value that is being matched.
    """

    def __init__(
        self, state: Any, saved: SavedState, *, rank: int, world_size: int, cast: bool
    ) -> None:
        self.saved = saved
        self.rank = rank
        self.world_size = world_size
        self.may_cast = cast
        self.current = ""
        self.reads: list[tuple[TensorEntry, LocalChunk]] = []
        self.mismatches = Mismatches()
        self.cast: list[tuple[str, str, str]] = []
        self.kept: list[str] = []
        self.used: set[str] = set()
        self.filled: list[torch.Tensor] = []
        self.owners: list[str] = []
        self.parameter_names = ParameterNames(modules_in(state))
        self._memory = Ties()  # finds the saved tensor that fills a memory
        self._absent: list[tuple[str, AnyTensor]] = []  # tensors whose names were not saved

    def mark_changed(self) -> None:
        """Increment the autograd versions of the filled tensors, as a change in place does."""
        tensors = self.filled + [chunk.data for _, chunk in self.reads]
        with plain_functions():
            try:
                increment_version(tensors)
            except RuntimeError:  # inference tensors have no version
                increment_version([tensor for tensor in tensors if not tensor.is_inference()])

    def note_missing_and_unused(self) -> None:
        """Add the tensors that nothing fills, and the saved entries that the state has not used, to
        the mismatches, after the match.

        A tensor that is tied to a filled one is filled too: other formats save one of the names.
        """
        self.mismatches.missing += [n for n, t in self._absent if not self._memory.first(t, "")]
        if not self.used >= self.saved.leaves.keys():
            self.mismatches.unexpected += [n for n in self.saved.leaves if n not in self.used]

    def strict_mismatches(self) -> Mismatches:
        """Return the mismatches that fail a strict load.

        An unexpected entry fails it only below the name of a module or an optimizer.
        """
        every = self.mismatches
        unexpected = [
            name for name in every.unexpected if any(under(name, owner) for owner in self.owners)
        ]
        return Mismatches(every.missing, unexpected, every.wrong_shape, every.wrong_dtype)

    def find(self, name: str, tensor: AnyTensor) -> tuple[str, TensorEntry] | None:
        """Find the saved tensor for a tensor of the state, and mark it as used.

        Returns:
            Its name in the manifest and its entry. None if the checkpoint lacks the tensor, which
            is noted as a mismatch.
        """
        node = self.saved.nodes.get(name, NOTHING)
        if node is NOTHING:
            self._absent.append((name, tensor))
            return None
        self.used.add(name)
        if isinstance(node, TensorRef):
            return node.name, self.saved.manifest.tensors[node.name]
        self.mismatches.wrong_dtype.append((name, "a tensor", type(node).__name__))
        return None

    def fill_in_place(self, template: torch.Tensor, name: str) -> bool:
        """Fill a selected tensor whose elements on this rank have the layout of the saved ones, in
        one run of CPU memory, as most tensors have.

        Returns:
            Whether the tensor is filled. If not, nothing is noted.
        """
        ref = self.saved.leaves.get(name)  # which `keys` selects
        if type(ref) is not TensorRef or ref.ref_type == "per_rank":
            return False
        entry = self.saved.manifest.tensors[ref.name]
        if (
            not (chunk := addressed_chunk(template, entry.shape))
            or template.dtype != DTYPES[entry.dtype]
            or entry.dtype in NOT_COPYABLE
            or chunk.data.is_neg()
            or (entry.dtype in COMPLEX and chunk.data.is_conj())
            or self._memory.first_at(chunk.address, template, ref.name) != ref.name
        ):
            return False
        self.used.add(name)
        self.reads.append((entry, chunk))
        if chunk.data is not template:
            self.filled.append(template)
        return True

    def agrees(self, entry: TensorEntry, template: AnyTensor, name: str) -> bool:
        """Return whether a saved tensor can fill the template. Notes a mismatch or a cast."""
        if template.shape != entry.shape:
            self.mismatches.wrong_shape.append((name, list(template.shape), list(entry.shape)))
            return False
        saved = DTYPES[entry.dtype]
        if template.dtype != saved:
            if not self.may_convert(saved, template.dtype):
                self.mismatches.wrong_dtype.append((name, str(template.dtype), str(saved)))
                return False
            self.cast.append((name, str(saved), str(template.dtype)))
        return True

    def may_convert(self, saved: torch.dtype, wanted: torch.dtype) -> bool:
        """Return whether dtype="cast" converts a saved dtype to a wanted one."""
        opaque = saved in OPAQUE or wanted in OPAQUE
        return self.may_cast and not opaque and (wanted.is_complex or not saved.is_complex)

    def fits(self, entry: TensorEntry, template: AnyTensor) -> bool:
        """Return whether a saved tensor can fill the template. Notes nothing."""
        saved, wanted = DTYPES[entry.dtype], template.dtype
        return template.shape == entry.shape and (
            wanted == saved or self.may_convert(saved, wanted)
        )

    def fill(self, saved: tuple[str, TensorEntry], tensor: AnyTensor, name: str) -> None:
        """Note the reads that fill a tensor. Tied tensors are read once."""
        source, entry = saved
        first = self._memory.first(tensor, source)
        chunks = local_chunks(tensor, name=name)
        if first != source and any(chunk.data.numel() for chunk in chunks):
            raise StateError(
                "Two saved tensors would be loaded into the same memory",
                tensor=name,
                expected=f"tied entries in the checkpoint, as in the state: {first}",
                actual=f"{source}, saved as a separate tensor",
                remedy="exclude one of them with keys=, or untie the tensors first",
            )
        for chunk in chunks:
            if shares_elements(chunk.data):
                raise StateError(
                    "A tensor whose elements share memory can't be filled",
                    tensor=name,
                    expected="separate memory for each element",
                    actual=f"shape {list(chunk.sizes)}, strides {chunk.data.stride()}",
                    remedy="clone() it first: it was made by expand(), unfold() or as_strided()",
                )
            self.reads.append((entry, chunk))

    def saved_rank(self, marker: PerRank, name: str) -> int | None:
        """Return the saved rank whose PerRank value this rank loads.

        Returns:
            None if another number of ranks saved it, and the marker keeps its own value, which is
            noted, or has a function that chooses a value.
        """
        saved_world = self.saved.manifest.world_size
        if saved_world == self.world_size:
            return self.rank
        if marker.on_resize == "wrap":
            return self.rank % saved_world
        if marker.on_resize == "error":
            raise StateError(
                "A PerRank entry does not fit another number of ranks",
                tensor=name,
                expected=f"{saved_world} ranks, as saved",
                actual=f"{self.world_size} ranks",
                remedy='load with as many ranks, or pass on_resize="keep" or "wrap"',
            )
        if marker.on_resize == "keep":
            self.kept.append(name)
        return None

    def build(self, name: str, like: Any = None, new: Allocate = allocate) -> Any:
        """Build the saved value of a name.

        Args:
            name: The name.
            like: A nested value. Its tensors are filled if shape and dtype match. The markers in
                it decide about PerRank values that another number of ranks saved.
            new: Creates the other tensors.

        Returns:
            The value. Its tensors are filled by later reads. NOTHING if the name was not saved,
            which is noted as missing.
        """
        if name not in self.saved.nodes:
            if self.saved.selected(name):
                self.mismatches.missing.append(name)
            return NOTHING
        tensors = dict(_items_of_type(like, name, torch.Tensor))
        markers = dict(_items_of_type(like, name, PerRank))

        def per_rank(ref: TensorRef, at: str) -> Any:
            marker = markers.get(at, PerRank(None, "error"))  # the state holds no value
            rank = self.saved_rank(marker, at)
            if rank is not None:
                return builder.build(self.saved.per_rank(ref, rank=rank), at)
            if callable(marker.on_resize):
                return marker.on_resize(builder.of_all_ranks(ref, at))
            return marker.value

        builder = Builder(
            self.saved, self.reads, like=tensors, filled=self._memory, new=new, per_rank=per_rank
        )
        value = builder.build(self.saved.nodes[name], name)
        builder.per_rank = None  # it refers back to the builder, and so to the tensors
        self.used.update(builder.built)
        return value


Match = Callable[[MatchContext, Any, str], Finish]
"""A function that matches one value of the caller's state, of any type, against the saved entry of
that name.
"""


def _items_of_type(value: Any, name: str, cls: type) -> list[tuple[str, Any]]:
    """List (name, item) of the items of a type in a nested value."""
    if isinstance(value, cls):
        return [(name, value)]
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    return [pair for key, item in items for pair in _items_of_type(item, below(name, key), cls)]
