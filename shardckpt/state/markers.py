"""Markers for entries of a state that differ by rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from shardckpt.errors import StateError

__all__ = ["FromRank0", "PerRank", "Union"]


@dataclass(frozen=True, slots=True)
class PerRank:
    """Marks an entry whose value differs by rank, such as random-number state or a loader position.

    The value of every rank is saved. A load with as many ranks gives each rank its own value.

    Args:
        value: The value of this rank.
        on_resize: The rule for a load with another number of ranks. "keep" leaves the value of the
            state, and the LoadReport lists it. "wrap" loads the value of rank % saved world size.
            "error" raises StateError. A function takes the list of all saved values, in rank
            order, and returns the value of this rank.

    Raises:
        StateError: `on_resize` is unknown.

    Example:
        >>> import torch, shardckpt
        >>> state = {"random": shardckpt.PerRank(torch.get_rng_state())}
        >>> report = shardckpt.save(state, "run/step-1")
        >>> len(shardckpt.load_state("run/step-1")["random"])
        1
    """

    value: Any
    on_resize: Literal["keep", "wrap", "error"] | Callable[[list[Any]], Any] = "keep"

    def __post_init__(self) -> None:
        """Check the rule."""
        if not (callable(self.on_resize) or self.on_resize in ("keep", "wrap", "error")):
            raise StateError(
                "Unknown value for on_resize",
                expected='"keep", "wrap", "error" or a function',
                actual=repr(self.on_resize),
            )


@dataclass(frozen=True, slots=True)
class Union:
    """Marks a dict whose keys differ by rank, such as the state of a loader by data-parallel rank.

    The checkpoint holds the keys of all ranks, in this dict and in the dicts in it. If several
    ranks have a key, its value must be equal on them; otherwise save raises ReplicaMismatchError.
    A load gives each rank the keys that its own dict has, or all keys if its dict is empty.

    Tensors that only some ranks hold need no mark if every rank holds tensors that another one
    lacks, as pipeline stages do.

    Args:
        value: A dict, or an object whose state_dict() returns one.

    Example:
        >>> import shardckpt
        >>> state = {"loader": shardckpt.Union({"dp_rank_0": 17})}
        >>> report = shardckpt.save(state, "run/step-1")
        >>> shardckpt.load_state("run/step-1")
        {'loader': {'dp_rank_0': 17}}
    """

    value: Any


@dataclass(frozen=True, slots=True)
class FromRank0:
    """Marks an entry of which only the value of rank 0 is saved, such as the state of callbacks.

    The values of other ranks are neither read nor compared. A load gives every rank the value of
    rank 0. Every rank must pass the mark under the same name.

    Args:
        value: The value. Only that of rank 0 is used.

    Example:
        >>> import shardckpt
        >>> state = {"callbacks": shardckpt.FromRank0({"best": 0.5})}
        >>> report = shardckpt.save(state, "run/step-1")
        >>> shardckpt.load_state("run/step-1")
        {'callbacks': {'best': 0.5}}
    """

    value: Any
