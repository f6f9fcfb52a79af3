"""Match the caller's state against a saved one.

`match_state` walks the caller's state, and notes the reads that fill its tensors and every
mismatch. After the reads, `MatchedState.place` puts all other values back into the state. `_match`
chooses the module that matches a value: there is one for tensors, containers, modules and
optimizers each.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from shardckpt.errors import StateError
from shardckpt.format.entries import TensorEntry
from shardckpt.format.typed_json import record_of
from shardckpt.state.container_matching import (
    is_per_rank,
    match_from_rank0,
    match_mapping,
    match_per_rank,
    match_record,
    match_sequence,
    match_stateful,
    match_union,
    match_value,
)
from shardckpt.state.derived import expanded
from shardckpt.state.flatten import too_deep
from shardckpt.state.local_chunks import LocalChunk
from shardckpt.state.markers import FromRank0, PerRank, Union
from shardckpt.state.match_context import Finish, MatchContext
from shardckpt.state.mismatches import Mismatches
from shardckpt.state.module_matching import match_module
from shardckpt.state.module_state import has_state
from shardckpt.state.optimizer_matching import match_optimizer
from shardckpt.state.saved_tree import SavedState
from shardckpt.state.sharded_array import ShardedArray, fits_tensor
from shardckpt.state.tensor_matching import (
    match_array,
    match_generator,
    match_sharded_array,
    match_tensor,
)

__all__ = ["DtypePolicy", "MatchedState", "casts", "match_state"]

DtypePolicy = Literal["strict", "cast"]
"""The policy of a load for a saved dtype that differs from the dtype in the state."""


def casts(dtype: DtypePolicy) -> bool:
    """Whether a dtype policy converts.

    Raises:
        StateError: The policy is unknown.
    """
    if dtype not in ("strict", "cast"):
        raise StateError(
            "Unknown value for dtype",
            expected='"strict" or "cast"',
            actual=repr(dtype),
            remedy='pass dtype="cast" to convert saved tensors to the dtypes of the state',
        )
    return dtype == "cast"


@dataclass(frozen=True, slots=True)
class MatchedState:
    """A caller's state that was matched against a saved one.

    Attributes:
        reads: The reads that fill its tensors: saved tensor, and the box to fill.
        mismatches: The mismatched entries.
        strict_mismatches: The mismatches that fail a strict load.
        cast: (name, saved dtype, dtype in the state) of the tensors that are converted.
        kept: Names of PerRank entries that keep their value.
    """

    reads: list[tuple[TensorEntry, LocalChunk]]
    mismatches: Mismatches
    strict_mismatches: Mismatches
    cast: list[tuple[str, str, str]]
    kept: list[str]
    _constants: list[Callable[[], object]]
    _context: MatchContext
    _finish: Finish

    def place(self) -> Any:
        """Put values, modules and optimizers back into the state, after all reads.

        Returns:
            The state. It is the object that was matched, unless that is an immutable value.
        """
        with torch.inference_mode(False), torch.no_grad():
            for write in self._constants:
                write()
        self._context.mark_changed()
        return self._finish()


def match_state(
    state: Any, saved: SavedState, *, rank: int, world_size: int, cast: bool
) -> MatchedState:
    """Match a caller's state against a saved one, for one rank. Changes nothing. Not collective.

    Args:
        state: The caller's state.
        saved: The saved state.
        rank: This rank.
        world_size: The number of ranks that load.
        cast: Saved dtypes may be converted.

    Returns:
        The reads, the mismatches, and the values to place after the reads.
    """
    context = MatchContext(state, saved, rank=rank, world_size=world_size, cast=cast)
    # New tensors outlive an inference_mode() of the caller. to_local() is free without gradients.
    with torch.inference_mode(False), torch.no_grad():
        try:
            finish = _match(context, state, "")
        except RecursionError as error:
            raise too_deep(f"{context.current[:80]}...") from error
        reads, constants = expanded(context.reads)
    context.note_missing_and_unused()
    return MatchedState(
        reads=reads,
        mismatches=context.mismatches,
        strict_mismatches=context.strict_mismatches(),
        cast=context.cast,
        kept=context.kept,
        _constants=constants,
        _context=context,
        _finish=finish,
    )


def _match(context: MatchContext, template: Any, name: str) -> Finish:
    """Match one value of the caller's state."""
    context.current = name
    per_rank = is_per_rank(context.saved.nodes.get(name))
    if isinstance(template, torch.Tensor) and not per_rank:
        tensor = match_tensor(context, template, name)
        return lambda: tensor
    if per_rank and not isinstance(template, PerRank):
        marked = match_per_rank(context, PerRank(template), name, _match)
        return lambda: marked().value
    if isinstance(template, nn.Module):
        return match_module(context, template, name, _match)
    if isinstance(template, Optimizer):
        return match_optimizer(context, template, name)
    if isinstance(template, PerRank):
        return match_per_rank(context, template, name, _match)
    if isinstance(template, FromRank0):
        has_tensors = _takes_tensors(template.value)
        return match_from_rank0(context, template, name, has_tensors=has_tensors, match=_match)
    if isinstance(template, Union):
        return match_union(context, template, name, _match)
    if isinstance(template, np.ndarray):
        match_any_array = match_array if _fills_in_place(template) else match_value
        return match_any_array(context, template, name)
    if isinstance(template, ShardedArray):
        return match_sharded_array(context, template, name)
    if isinstance(template, Mapping) and template and not isinstance(template, Counter):
        return match_mapping(context, template, name, _match)
    if isinstance(template, (list, tuple)) and any(map(_takes_tensors, template)):
        return match_sequence(context, template, name, _match)
    if isinstance(template, deque) and any(map(_takes_state, template)):
        return match_sequence(context, template, name, _match)
    if has_state(template):
        return match_stateful(context, template, name)
    if isinstance(template, torch.Generator):
        return match_generator(context, template, name)
    if record_of(template):
        return match_record(context, template, name, _match)
    return match_value(context, template, name)


def _fills_in_place(array: np.ndarray[Any, Any]) -> bool:
    """Whether an array is writeable and has a dtype that tensors support."""
    return array.flags.writeable and fits_tensor(array.dtype)


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value


_VALUES = {type(None), bool, int, float, str, bytes}


def _takes_tensors(value: Any) -> bool:
    if isinstance(value, (Mapping, list, tuple, deque)):
        return any(map(_takes_tensors, _items(value)))
    if isinstance(value, (torch.Tensor, np.ndarray, ShardedArray)):
        return True
    return _takes_state(value)


def _takes_state(value: Any) -> bool:
    """Whether a value must stay the object that it is: a module, an optimizer or the like, a
    marker, or a container of these."""
    if isinstance(value, (Mapping, list, tuple, deque)):
        return any(map(_takes_state, _items(value)))
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return False
    if isinstance(value, torch.Generator):
        return True
    if isinstance(value, (PerRank, FromRank0, Union)):
        return True
    return type(value) not in _VALUES and (has_state(value) or bool(record_of(value)))
