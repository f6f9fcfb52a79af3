"""Simulate heat in a plate with numpy and MPI, and resume on another number of ranks.

    mpirun -n 4 python heat.py OUT --steps 120     # saves every 40 steps
    mpirun -n 6 python heat.py OUT --steps 200     # resumes from the newest checkpoint
    python heat.py OUT --steps 240                 # one process

The plate is divided among the ranks in two dimensions. Each rank holds its part with a border of
one cell, which its neighbours fill. A checkpoint holds the complete plate without borders.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from mpi4py import MPI

import shardckpt


class Plate:
    """A plate of size x size cells, cold at its edges; `u` [rows + 2, columns + 2] of this rank."""

    def __init__(self, size: int, comm: MPI.Intracomm) -> None:
        dims = MPI.Compute_dims(comm.size, 2)
        self.size = size
        self.grid = comm.Create_cart(dims)
        places = zip(self.grid.coords, dims, strict=True)
        spans = [(size * at // parts, size * (at + 1) // parts) for at, parts in places]
        self.offsets = tuple(begin for begin, _ in spans)
        rows, columns = np.ix_(*(np.arange(begin, end) for begin, end in spans))
        self.u = np.zeros((rows.size + 2, columns.size + 2))
        self.inner[:] = 100.0 * ((rows - size / 3) ** 2 + (columns - size / 2) ** 2 < size**2 / 25)

    @property
    def inner(self) -> np.ndarray:
        """The cells of this rank, without the border."""
        return self.u[1:-1, 1:-1]

    def state(self, step: int) -> dict[str, object]:
        """Return the state of a checkpoint."""
        whole = (self.size, self.size)
        return {"u": shardckpt.ShardedArray(self.inner, whole, self.offsets), "step": step}

    def exchange(self) -> None:
        """Fill the border from the neighbours; at the plate's edges it stays 0."""
        u = self.u
        for axis, low, high, below, above in (
            (0, u[1], u[-2], u[0], u[-1]),
            (1, u[:, 1], u[:, -2], u[:, 0], u[:, -1]),
        ):
            back, ahead = self.grid.Shift(axis, 1)
            for out, to, into, source in ((high, ahead, below, back), (low, back, above, ahead)):
                received = into.copy()
                self.grid.Sendrecv(out.copy(), to, recvbuf=received, source=source)
                into[:] = received

    def advance(self) -> None:
        """One explicit step of du/dt = laplace(u)."""
        self.exchange()
        u = self.u
        around = u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:]
        self.inner[:] = self.inner + 0.2 * (around - 4.0 * self.inner)


def resume(plate: Plate, out: Path) -> int:
    """Load the newest checkpoint that is whole; the step it was made at, 0 without one."""
    for path in sorted(out.glob("step-*"), reverse=True):
        state = plate.state(0)
        try:
            shardckpt.load(state, path, comm=plate.grid)
        except shardckpt.ShardckptError as error:  # the same on every rank
            if plate.grid.rank == 0:
                print(f"  {path.name} is passed over: {error}")
            continue
        return int(state["step"])
    return 0


def main(arguments: list[str] | None = None, comm: MPI.Comm = MPI.COMM_WORLD) -> None:
    """Run to a step, saving on the way."""
    parser = argparse.ArgumentParser(description="Heat in a plate")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=40)
    parser.add_argument("--size", type=int, default=101)
    options = parser.parse_args(arguments)
    plate = Plate(options.size, comm)
    begun = resume(plate, options.out)
    for step in range(begun + 1, options.steps + 1):
        plate.advance()
        if step % options.save_every == 0 or step == options.steps:
            path = options.out / f"step-{step:06d}"
            shardckpt.save(plate.state(step), path, comm=plate.grid, overwrite=True)
    warmth = plate.grid.allreduce(float(plate.inner.sum())) / options.size**2
    if plate.grid.rank == 0:
        print(f"  {plate.grid.size} ranks, steps {begun} to {options.steps}: mean {warmth:.4f}")


if __name__ == "__main__":
    main()
