"""The rows of the table of kinds of state; see tests/test_state_table.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["ROWS", "Row", "row"]


@dataclass
class Row:
    """A kind of state. `make` gives the value of a seed; `whole` what load_state gives for it, by
    default the same. `refused` says that it can't be saved or loaded into; `replaced`, that a load
    replaces it. `ranks` many save it."""

    name: str
    make: Callable[[int], Any]
    whole: Callable[[int], Any] = None  # type: ignore[assignment]
    refused: bool = False
    ranks: int = 1
    replaced: bool = False

    def __post_init__(self) -> None:
        self.whole = self.whole or self.make

    @property
    def file_name(self) -> str:
        """The name as part of a path."""
        return re.sub(r"\W+", "-", self.name)

    def names(self, error: str) -> bool:
        """Whether an error names the entry."""
        return "leaf" in error


ROWS: dict[str, Row] = {}


def row(
    name: str,
    *,
    whole: Callable[[int], Any] | None = None,
    refused: bool = False,
    ranks: int = 1,
    replaced: bool = False,
) -> Callable[[Callable[[int], Any]], Callable[[int], Any]]:
    """Register a function of a seed as a row."""

    def register(make: Callable[[int], Any]) -> Callable[[int], Any]:
        assert name not in ROWS, name
        ROWS[name] = Row(name, make, whole, refused, ranks, replaced)  # type: ignore[arg-type]
        return make

    return register
