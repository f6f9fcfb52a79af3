"""The mismatches of a caller's state and a saved one, and the error that lists them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from shardckpt.errors import LoadMismatchError

__all__ = ["Mismatches", "check_unused", "mismatch_remedy"]


@dataclass(slots=True)
class Mismatches:
    """The entries in which the caller's state and the saved one differ.

    Attributes:
        missing: Names in the state that were not saved.
        unexpected: Names that were saved and are not used by the state.
        wrong_shape: (name, shape in the state, saved shape).
        wrong_dtype: (name, dtype in the state, saved dtype).
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[tuple[str, Any, Any]] = field(default_factory=list)
    wrong_dtype: list[tuple[str, Any, Any]] = field(default_factory=list)

    @property
    def only_unexpected(self) -> bool:
        """Whether all mismatches are unexpected entries."""
        return not (self.missing or self.wrong_shape or self.wrong_dtype)

    def error(self, path: str) -> LoadMismatchError | None:
        """Return one error that lists every mismatch, or None without any mismatch."""
        lines = [f"missing in the checkpoint: {name}" for name in self.missing]
        lines += [f"saved, but not used by the state: {name}" for name in self.unexpected]
        for fact, entries in (("shape", self.wrong_shape), ("dtype", self.wrong_dtype)):
            lines += [f"{fact} of {name}: expected {a}, found {b}" for name, a, b in entries]
        if not lines:
            return None
        names = [*self.missing, *self.unexpected]
        names += [name for name, _, _ in (*self.wrong_shape, *self.wrong_dtype)]
        return LoadMismatchError(
            "\n    ".join(["The checkpoint does not match the state", *lines]),
            path=path,
            tensor=names[0] if len(names) == 1 else None,
            missing=tuple(self.missing) or None,
            unexpected=tuple(self.unexpected) or None,
            wrong_shape=tuple(self.wrong_shape) or None,
            wrong_dtype=tuple(self.wrong_dtype) or None,
            remedy=self._remedy(),
        )

    def _remedy(self) -> str:
        """Name the arguments of load that solve these mismatches."""
        remedies = ["strict=False loads the matching entries"]
        if self.wrong_dtype:
            remedies.append("dtype='cast' converts dtypes")
        if self.missing or self.unexpected:
            remedies.append("rename= and keys= map and select names")
        if self.missing:
            remedies.append("`shardckpt inspect` lists the saved names")
        return "; ".join(remedies)


@contextmanager
def mismatch_remedy(remedy: str) -> Iterator[None]:
    """Give the error of a load that lists mismatches another remedy: for callers whose users can't
    pass the arguments of `shardckpt.load`."""
    try:
        yield
    except LoadMismatchError as error:
        if "missing" in error.facts:
            error.remedy = remedy
        raise


def _unused(names: list[str], path: str) -> LoadMismatchError:
    error = Mismatches(unexpected=names).error(path)
    assert error is not None
    return error


def check_unused(unused: Sequence[Sequence[str]], path: str) -> None:
    """Check that modules and optimizers use all entries that were saved under their names. Pure.

    Ranks of different pipeline stages use different entries. An entry that no rank uses is an
    error. If a rank uses only a part of the entries that another rank uses, that is an error too.

    Args:
        unused: The unused names of each rank's modules and optimizers.
        path: The checkpoint, for the error.

    Raises:
        LoadMismatchError: The error lists the names.
    """
    names = [frozenset(of_rank) for of_rank in unused]
    by_no_rank = frozenset.intersection(*names)
    if by_no_rank:
        raise _unused([name for name in unused[0] if name in by_no_rank], path)
    sets = {of_rank: rank for rank, of_rank in reversed(list(enumerate(names)))}
    for (names_a, a), (names_b, b) in itertools.permutations(sets.items(), 2):
        if names_a > names_b:
            error = _unused(sorted(names_a - names_b), path)
            error.rank, error.facts["used_by_rank"] = a, b
            raise error
