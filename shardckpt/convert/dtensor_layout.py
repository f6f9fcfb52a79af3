"""The boxes that each rank holds of a DTensor, from its mesh and placements as plain numbers. Pure.

Nothing of torch.distributed is made: the numbers come from files of other processes.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["LocalBox", "Placement", "Sharding"]

_MOST_RUNS = 1 << 16


class Placement(NamedTuple):
    """How one dimension of a mesh divides a tensor: along `dim`, or not at all if it is None.

    `split_factor` is that of a strided shard, 0 for a plain one. `reduction` is that of a partial
    placement, such as "sum".
    """

    dim: int | None = None
    split_factor: int = 0
    reduction: str = ""


class LocalBox(NamedTuple):
    """A part of a global tensor, and its place in the local tensor of a rank."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local_offsets: tuple[int, ...]


class Sharding(NamedTuple):
    """How the ranks of a mesh divide a tensor.

    Attributes:
        shape: The global shape.
        mesh: The sizes of the mesh.
        ranks: The ranks of the mesh, in row-major order.
        placements: One for each dimension of the mesh.
        order: The dimensions of the mesh, in the order in which they divide the tensor.
    """

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    ranks: tuple[int, ...]
    placements: tuple[Placement, ...]
    order: tuple[int, ...]

    def check(self) -> Sharding:
        """Return the sharding. Raises ValueError if its numbers don't fit together."""
        dims = {placement.dim for placement in self.placements} - {None}
        good = (
            len(self.ranks) == math.prod(self.mesh)
            and len(set(self.ranks)) == len(self.ranks)
            and min(self.ranks, default=0) >= 0
            and len(self.placements) == len(self.mesh)
            and sorted(self.order) == list(range(len(self.mesh)))
            and all(0 <= dim < len(self.shape) for dim in dims if dim is not None)
            and all(0 <= p.split_factor <= _MOST_RUNS for p in self.placements)
            and all(0 <= size < 1 << 62 for size in self.shape)
        )
        if not good:
            raise ValueError(f"a mesh of {list(self.mesh)[:8]} for the shape {self.shape[:8]}")
        return self

    @property
    def reduction(self) -> str:
        """The reduction of the first partial placement, or "" for a tensor without one."""
        return next((p.reduction for p in self.placements if p.reduction), "")

    @property
    def strided(self) -> bool:
        """Whether a placement is a strided shard."""
        return any(placement.split_factor for placement in self.placements)

    def local(
        self, rank: int, *, right_to_left: bool = False
    ) -> tuple[tuple[int, ...], list[LocalBox]]:
        """Return the local shape on a rank of the mesh, and the boxes that the rank holds.

        Strided shards are made from left to right, as DTensor describes them; or `right_to_left`,
        after all others, as FSDP2 makes them over tensor parallelism. The results differ only for
        some sizes that the mesh does not divide.
        """
        at = self.ranks.index(rank)
        coordinate = []
        for size in reversed(self.mesh):
            coordinate.append(at % size)
            at //= size
        coordinate.reverse()
        order = list(self.order)
        if right_to_left:
            later = [dim for dim in order if self.placements[dim].split_factor]
            order = [dim for dim in order if dim not in later] + later[::-1]
        runs = []
        for dim, size in enumerate(self.shape):
            steps = [
                (
                    self.mesh[d],
                    coordinate[d],
                    0 if right_to_left else self.placements[d].split_factor,
                )
                for d in order
                if self.placements[d].dim == dim
            ]
            runs.append(_with_begins(_runs(size, steps)))
        if math.prod(map(len, runs)) > _MOST_RUNS:
            raise ValueError(f"a tensor of which a rank holds more than {_MOST_RUNS} boxes")
        shape = tuple(sum(length for _, length, _ in found) for found in runs)
        return shape, [
            LocalBox(
                tuple(start for start, _, _ in box),
                tuple(length for _, length, _ in box),
                tuple(begin for _, _, begin in box),
            )
            for box in itertools.product(*runs)
        ]


Runs = list[tuple[int, int]]
"""(start, length) of runs of indices of a dimension."""


def _runs(size: int, steps: Iterable[tuple[int, int, int]]) -> Runs:
    """Return the runs of the indices that a rank holds of a dimension.

    `steps` are (parts, part, split factor) of each division. A plain shard is one of `parts` chunks
    by the rule of torch.chunk. For a strided shard, each of `split factor` chunks is divided so.
    """
    runs = [(0, size)] if size else []
    for parts, part, split_factor in steps:
        begins = list(itertools.accumulate((length for _, length in runs), initial=0))
        whole = begins[-1]
        step = -(-whole // max(split_factor, 1))
        cut: Runs = []
        for begin in range(0, whole, step) if step else ():
            inner = min(step, whole - begin)
            width = -(-inner // parts)
            low, high = min(part * width, inner), min((part + 1) * width, inner)
            cut += _slice(runs, begins, begin + low, begin + high)
        runs = _joined(cut)
        if len(runs) > _MOST_RUNS:
            raise ValueError(f"a dimension in more than {_MOST_RUNS} runs")
    return runs


def _slice(runs: Runs, begins: list[int], begin: int, end: int) -> Runs:
    """Return the runs of the indices `begin` to `end` of those in `runs`, which begin at `begins`
    among these."""
    found = []
    at = bisect_right(begins, begin) - 1
    while at < len(runs) and begins[at] < end:
        start, length = runs[at]
        low, high = max(begin - begins[at], 0), min(end - begins[at], length)
        if low < high:
            found.append((start + low, high - low))
        at += 1
    return found


def _joined(runs: Runs) -> Runs:
    """Join runs that follow each other."""
    joined: Runs = []
    for start, length in runs:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return joined


def _with_begins(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Add to each run where it begins in the local tensor."""
    begins = itertools.accumulate((length for _, length in runs), initial=0)
    return [(start, length, begin) for (start, length), begin in zip(runs, begins, strict=False)]
