"""Random nested states load as they were saved, built anew and in place."""

from __future__ import annotations

import shutil

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardckpt
from shardckpt import PerRank
from shardckpt.format.dtypes import DTYPES, OPAQUE
from tests.format.test_typed_json import SCALARS

MOVABLE = [dtype for dtype in DTYPES.values() if dtype not in OPAQUE]
SHAPES = st.lists(st.integers(0, 4), max_size=4)
KEYS = st.text("ab/ é\n\0[]0:$", min_size=1, max_size=3) | st.integers(-2, 2)


@st.composite
def tensor(draw):
    """Of any dtype, contiguous or not, a view, expanded, conjugate, or without elements."""
    shape, dtype = (
        draw(SHAPES),
        draw(st.sampled_from(MOVABLE)),
    )
    count = torch.Size(shape).numel()
    raw = torch.arange(count * dtype.itemsize, dtype=torch.uint8)
    made = (raw % 2).bool() if dtype is torch.bool else raw.view(dtype)
    made = made.reshape(shape)
    how = draw(st.sampled_from(["plain", "transposed", "view", "expanded", "conjugate", "leaf"]))
    if how == "transposed":
        made = made.permute(tuple(reversed(range(made.dim()))))
    elif how == "view" and made.dim():
        made = made[..., : made.shape[-1] // 2]
    elif how == "expanded":
        made = made.unsqueeze(0).expand(2, *made.shape)
    elif how == "conjugate" and dtype.is_complex:
        made = made.conj()
    elif how == "leaf" and (dtype.is_floating_point and dtype.itemsize > 1):
        made = torch.nn.Parameter(made)
    return made


ARRAYS = st.sampled_from(
    [np.arange(6).reshape(2, 3)[:, ::-1], np.array(2.5), np.zeros((0, 2), np.float16)]
)
LEAVES = tensor() | tensor() | ARRAYS | SCALARS
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(KEYS, inner, max_size=3)
        ),
        max_leaves=8,
    )
    | LEAVES.map(PerRank),
    max_size=4,
)


def names(value, name="") -> list[str]:
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        items = enumerate(value)
    return [name, *(n for k, v in items for n in names(v, f"{name}.{k}" if name else str(k)))]


def same(a, b) -> bool:
    if isinstance(a, PerRank):
        return same(a.value, b.value if isinstance(b, PerRank) else b[0])
    if isinstance(a, torch.Tensor):
        equal = a.dtype == b.dtype and a.shape == b.shape
        return equal and raw(a) == raw(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if type(a) is not type(b):
        return False
    if type(a) is dict:
        return list(a) == list(b) and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


def raw(tensor) -> bytes:
    plain = tensor.detach().resolve_conj().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def blank(value):
    """The same state with other values: tensors of their own, values replaced."""
    if isinstance(value, PerRank):
        return PerRank(blank(value.value))
    if isinstance(value, torch.Tensor):
        return torch.zeros(value.shape, dtype=value.dtype)
    if isinstance(value, np.ndarray):
        return np.zeros_like(value)
    if type(value) is dict:
        return {key: blank(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(blank, value))
    return None


@settings(max_examples=100)
@given(STATES)
def test_any_state_loads_as_it_was_saved(tmp_path_factory, state):
    found = names(state)
    if len(set(found)) < len(found):  # such a state is refused; see tests/planning
        return
    path = tmp_path_factory.getbasetemp() / "any"
    shardckpt.save(state, path)
    try:
        with shardckpt.open_checkpoint(path) as opened:
            opened.verify()
        assert same(state, shardckpt.load_state(path))
        target = blank(state)
        shardckpt.load(target, path)
        assert same(state, target)
    finally:
        shutil.rmtree(path)
