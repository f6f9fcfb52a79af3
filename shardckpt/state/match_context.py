"""The notes of a match of a caller's state against a saved one.

The modules that match tensors, containers, modules and optimizers all note their reads and
mismatches in one MatchContext.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd.graph import increment_version

from shardckpt.errors import StateError
from shardckpt.format.dtypes import DTYPES, OPAQUE
from shardckpt.format.entries import TensorEntry
from shardckpt.format.typed_json import TensorRef
from shardckpt.io.tensor_memory import owns_memory, shares_elements
from shardckpt.state.flatten import Ties
from shardckpt.state.local_chunks import PLAIN, AnyTensor, LocalChunk, lies_as_saved, local_chunks
from shardckpt.state.materialize import NOTHING, Allocate, Builder, allocate
from shardckpt.state.mismatches import Mismatches
from shardckpt.state.module_state import modules_in
from shardckpt.state.optimizer_state import ParameterNames
from shardckpt.state.saved_tree import SavedState, below, under

__all__ = ["Finish", "Match", "MatchContext"]

Finish = Callable[[], Any]
"""Puts a matched value in its place, after the reads, and returns it."""


class MatchContext:
    """The reads and mismatches of one rank's match, and the saved state that it reads from.

    Attributes:
        saved: The saved state.
        rank: This rank.
        world_size: The number of ranks that load.
        may_cast: Saved dtypes may be converted.
        reads: The reads that fill the state's tensors.
        mismatches: The entries that disagree.
        cast: (name, saved dtype, dtype in the state) of the tensors that are converted.
        kept: Names of PerRank entries that stay as they are.
        used: Names of the saved entries that something in the state took.
        filled: Tensors whose memory is that of other tensors.
        owners: Names of modules and optimizers, which take all entries below them.
        parameter_names: The names of the state's parameters.
    """

    def __init__(
        self, state: Any, saved: SavedState, *, rank: int, world_size: int, cast: bool
    ) -> None:
        self.saved = saved
        self.rank = rank
        self.world_size = world_size
        self.may_cast = cast
        self.reads: list[tuple[TensorEntry, LocalChunk]] = []
        self.mismatches = Mismatches()
        self.cast: list[tuple[str, str, str]] = []
        self.kept: list[str] = []
        self.used: set[str] = set()
        self.filled: list[torch.Tensor] = []
        self.owners: list[str] = []
        self.parameter_names = ParameterNames(modules_in(state))
        self._memory = Ties()  # memory -> the saved tensor that fills it

    def mark_changed(self) -> None:
        """Tell autograd, after the reads, what was written to, as after any change in place."""
        tensors = [*self.filled, *(chunk.data for _, chunk in self.reads)]
        with torch._C.DisableTorchFunctionSubclass():  # private in torch 2.13
            increment_version([tensor for tensor in tensors if not tensor.is_inference()])

    def note_unused(self) -> None:
        """Note the saved entries that nothing took, once all is matched."""
        self.mismatches.unexpected += [n for n in self.saved.leaves if n not in self.used]

    def strict_mismatches(self) -> Mismatches:
        """Return the mismatches that a strict load refuses: of the unexpected entries only those
        below a module or optimizer."""
        every = self.mismatches
        unexpected = [
            name for name in every.unexpected if any(under(name, owner) for owner in self.owners)
        ]
        return Mismatches(every.missing, unexpected, every.wrong_shape, every.wrong_dtype)

    def find(self, name: str) -> tuple[str, TensorEntry] | None:
        """Find the saved tensor for a name and note it as used.

        Returns its name in the manifest and its entry; None, noted as a mismatch, if there is none.
        """
        node = self.saved.nodes.get(name, NOTHING)
        if node is NOTHING:
            self.mismatches.missing.append(name)
            return None
        self.used.add(name)
        if isinstance(node, TensorRef):
            return node.name, self.saved.manifest.tensors[node.name]
        self.mismatches.wrong_dtype.append((name, "a tensor", type(node).__name__))
        return None

    def fill_plain(self, template: torch.Tensor, name: str) -> bool:
        """Fill a plain tensor whose CPU memory has the layout of the saved one; most tensors do.

        False for any other tensor, and nothing is noted then.
        """
        ref = self.saved.nodes.get(name)
        if type(template) not in PLAIN or type(ref) is not TensorRef or ref.kind == "per_rank":
            return False
        entry = self.saved.manifest.tensors[ref.name]
        if (
            not lies_as_saved(template, entry.dtype)
            or (shape := template.shape) != entry.shape
            or hasattr(template, "global_shape")  # of a part
            or not owns_memory(template)
            or not (address := template.data_ptr())
            or self._memory.first_at(address, template, ref.name) != ref.name
        ):
            return False
        self.used.add(name)
        self.reads.append((entry, LocalChunk((0,) * len(shape), shape, template, address)))
        return True

    def agrees(self, entry: TensorEntry, template: AnyTensor, name: str) -> bool:
        """Whether a saved tensor can fill the template. Notes the mismatch, or the cast."""
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
        """Whether dtype="cast" converts a saved dtype to a wanted one."""
        opaque = saved in OPAQUE or wanted in OPAQUE
        return self.may_cast and not opaque and (wanted.is_complex or not saved.is_complex)

    def fits(self, entry: TensorEntry, template: AnyTensor) -> bool:
        """Whether a saved tensor can fill the template. Notes nothing."""
        saved, wanted = DTYPES[entry.dtype], template.dtype
        return template.shape == entry.shape and (
            wanted == saved or self.may_convert(saved, wanted)
        )

    def fill(self, saved: tuple[str, TensorEntry], tensor: AnyTensor, name: str) -> None:
        """Note the reads that fill a tensor, once for tied ones."""
        source, entry = saved
        first = self._memory.first(tensor, source)
        if first != source:
            raise StateError(
                "Two saved tensors would be loaded into the same memory",
                tensor=name,
                expected=f"tied entries in the checkpoint, as in the state: {first}",
                actual=f"{source}, saved apart",
                remedy="leave one of them out with keys=, or untie the tensors first",
            )
        for chunk in local_chunks(tensor, name=name):
            if shares_elements(chunk.data):
                raise StateError(
                    "A tensor whose elements share memory can't be filled",
                    tensor=name,
                    expected="memory of its own for each element",
                    actual=f"shape {list(chunk.sizes)}, strides {chunk.data.stride()}",
                    remedy="clone() it first: expand(), unfold() or as_strided() made it",
                )
            self.reads.append((entry, chunk))

    def build(self, name: str, like: Any = None, new: Allocate = allocate) -> Any:
        """Build what was saved at a name.

        Args:
            name: The name.
            like: A nested value whose tensors are filled where shape and dtype agree.
            new: Makes the other tensors.

        Returns:
            The value, its tensors still to be read; NOTHING, noted as missing, if nothing was
            saved.
        """
        if name not in self.saved.nodes:
            if self.saved.selected(name):
                self.mismatches.missing.append(name)
            return NOTHING
        tensors = dict(_tensors(like, name))
        builder = Builder(self.saved, self.reads, like=tensors, filled=self._memory, new=new)
        value = builder.build(self.saved.nodes[name], name)
        self.used.update(builder.built)
        return value


Match = Callable[[MatchContext, Any, str], Finish]
"""Matches one value of the caller's state, of any type, against the saved entry of that name."""


def _tensors(value: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) of the tensors in a nested value."""
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    return [pair for key, item in items for pair in _tensors(item, below(name, key))]
