"""The entries in which a caller's state and a saved one disagree, and the error that lists them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shardckpt.errors import LoadMismatchError

__all__ = ["Mismatches", "check_untaken"]


@dataclass(slots=True)
class Mismatches:
    """The entries in which the caller's state and the saved one disagree.

    Attributes:
        missing: Names that were asked for and not saved.
        unexpected: Names that were saved and that nothing in the state takes.
        wrong_shape: (name, shape in the state, saved shape).
        wrong_dtype: (name, dtype in the state, saved dtype).
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[tuple[str, Any, Any]] = field(default_factory=list)
    wrong_dtype: list[tuple[str, Any, Any]] = field(default_factory=list)

    @property
    def only_unexpected(self) -> bool:
        """Whether `unexpected` holds the only entries."""
        return not (self.missing or self.wrong_shape or self.wrong_dtype)

    def error(self, path: str) -> LoadMismatchError | None:
        """Return one error that lists every entry, or None if the two states agree."""
        lines = [f"missing in the checkpoint: {name}" for name in self.missing]
        lines += [f"saved, but nothing takes it: {name}" for name in self.unexpected]
        for fact, entries in (("shape", self.wrong_shape), ("dtype", self.wrong_dtype)):
            lines += [f"{fact} of {name}: expected {a}, found {b}" for name, a, b in entries]
        if not lines:
            return None
        return LoadMismatchError(
            "\n    ".join(["The checkpoint does not hold what was asked for", *lines]),
            path=path,
            tensor=lines[0].split(": ")[1] if len(lines) == 1 else None,
            missing=tuple(self.missing) or None,
            unexpected=tuple(self.unexpected) or None,
            wrong_shape=tuple(self.wrong_shape) or None,
            wrong_dtype=tuple(self.wrong_dtype) or None,
            remedy="strict=False loads what agrees; dtype='cast' converts; rename= and keys= map "
            "and choose names",
        )


def _untaken(names: list[str], path: str) -> LoadMismatchError:
    error = Mismatches(unexpected=names).error(path)
    assert error is not None
    return error


def check_untaken(untaken: Sequence[Sequence[str]], path: str) -> None:
    """Check that modules and optimizers took all that was saved under their names. Pure.

    Ranks of different pipeline stages take different entries. An entry that no rank takes is an
    error, and so is a rank that takes a strict subset of what another rank takes.

    Args:
        untaken: For each rank the names that its modules and optimizers did not take.
        path: The checkpoint, for the error.

    Raises:
        LoadMismatchError: It lists the names.
    """
    names = [frozenset(of_rank) for of_rank in untaken]
    by_no_rank = frozenset.intersection(*names)
    if by_no_rank:
        raise _untaken([name for name in untaken[0] if name in by_no_rank], path)
    sets = {of_rank: rank for rank, of_rank in reversed(list(enumerate(names)))}
    for (mine, a), (theirs, b) in itertools.permutations(sets.items(), 2):
        if mine > theirs:
            error = _untaken(sorted(mine - theirs), path)
            error.rank, error.facts["taken_by_rank"] = a, b
            raise error
