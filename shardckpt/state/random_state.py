"""The random-number generators of a process."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from shardckpt.io.devices import accelerator

__all__ = ["random_state", "seed_generators", "set_random_state"]


def random_state() -> dict[str, Any]:
    """Return the state of the generators of torch, numpy, Python and the current device."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": _python.state(),
        "numpy": _numpy.state(),
    }
    return state | accelerator.random_state()


class _NumpyState:
    """The state of numpy's global generator.

    numpy needs 40 microseconds to return it. So the last one is used again if the memory of the
    generator has not changed.
    """

    _SIZE_BYTES = 624 * 4 + 4  # of MT19937: the keys and the position

    def __init__(self) -> None:
        self._generator: Any = None
        self._address = 0
        self._memory = b""
        self._state: list[Any] = []

    def state(self) -> list[Any]:
        """Return the name of the generator, its keys as a tensor, and the rest."""
        generator = np.random.mtrand.get_bit_generator()
        if generator is not self._generator:
            known = type(generator) is np.random.MT19937
            self._address = generator.ctypes.state_address if known else 0
            self._generator = generator
        memory = ctypes.string_at(self._address, self._SIZE_BYTES) if self._address else b""
        # a normal number that waits for its use is not in that memory
        if not memory or memory != self._memory or self._state[3]:
            name, keys, *rest = np.random.get_state()
            plain = torch.from_numpy(np.asarray(keys).astype(np.int64))
            self._memory, self._state = memory, [name, plain, *rest]
        return list(self._state)


_numpy = _NumpyState()


class _PythonState:
    """The state of Python's global generator.

    Python needs 15 microseconds to return it. So the last one is used again if the memory of the
    generator has not changed.
    """

    def __init__(self) -> None:
        # what the C part of the generator adds to an object: 624 words and an index
        self._generator: Any = random.getstate.__self__  # type: ignore[attr-defined]
        base = random.Random.__base__
        assert base is not None
        self._address = id(self._generator) + object.__basicsize__
        self._size_bytes = base.__basicsize__ - object.__basicsize__
        self._memory = b""
        self._state: tuple[Any, ...] = ()

    def state(self) -> tuple[Any, ...]:
        """Return the result of random.getstate."""
        memory = ctypes.string_at(self._address, self._size_bytes)
        # a normal number that waits for its use is not in that memory
        if memory != self._memory or self._state[2] != self._generator.gauss_next:
            self._memory, self._state = memory, random.getstate()
        return self._state


_python = _PythonState()


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the state that random_state returned."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    accelerator.set_random_state(state)


def seed_generators(seed: int) -> None:
    """Seed the generators of torch (every device), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
