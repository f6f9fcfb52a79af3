"""Marks on parts of a state that are not the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["FromRank0", "PerRank", "Union"]


@dataclass(frozen=True, slots=True)
class PerRank:
    """Marks a part of the state that differs by rank: random-number state, loader position.

    Every rank's own value is saved. On load by as many ranks as saved, each gets its own
    back. On another number of ranks `on_resize` says what happens: "keep" leaves what the
    state holds (and the report names it), "wrap" takes the value of rank % saved world
    size, "error" raises, and a function is called with the list of all saved values, in
    rank order, and returns this rank's.

    Example:
        state = {"model": model, "random": PerRank(torch.get_rng_state())}
    """

    value: Any
    on_resize: Literal["keep", "wrap", "error"] | Callable[[list[Any]], Any] = "keep"


@dataclass(frozen=True, slots=True)
class Union:
    """Marks a dict whose keys differ by rank, as the state of a data loader by data-parallel rank.

    The checkpoint holds the keys of all ranks, in this dict and in the dicts in it. Where several
    ranks have a key, its value must be the same on all of them: if it is not, save raises
    ReplicaMismatchError, which names the key. On load each rank gets the keys that its own dict
    has, or all of them if that is empty.

    `value` is a dict, or an object whose state_dict() returns one. Tensors that only some ranks
    hold need no mark where every rank has some that another one lacks, as pipeline stages do.

    Example:
        state = {"model": model, "loader": Union({f"dp_rank_{rank}": position})}
    """

    value: Any


@dataclass(frozen=True, slots=True)
class FromRank0:
    """Marks a part of the state of which rank 0's value is saved, as the state of callbacks.

    What other ranks hold is ignored: it is neither read nor compared. On load every rank gets
    what rank 0 saved. Every rank hands over the mark, under the same name.

    Example:
        state = {"model": model, "callbacks": FromRank0(callback_states)}
    """

    value: Any
