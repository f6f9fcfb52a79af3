"""Saved on one mesh, loaded on another, bit for bit: shapes, meshes and placements from hypothesis,
all ranks of a mesh in this one process."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

import shardckpt
from shardckpt.format import typed_json as values
from shardckpt.format.dtypes import dtype_name
from shardckpt.plan.local_plan import ChunkTable, LocalPlan, TensorSpec, pad_boxes
from shardckpt.plan.plan_cache import KnownPlan
from shardckpt.plan.save_plan import RankWrites, global_plan
from shardckpt.saving.commit import commit_manifest, file_table
from shardckpt.saving.rank_writer import RankShards, write_rank
from shardckpt.storage.local import LocalStorage

Box = tuple[tuple[int, ...], tuple[int, ...]]
Mesh = tuple[int, ...]
Placements = tuple[int | None, ...]
"""For each dimension of a mesh the dimension of the tensor that it shards; None: replicated."""

Case = tuple[dict[str, torch.Tensor], Mesh, dict[str, Placements], Mesh, Placements]

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float64]


def boxes(shape: tuple[int, ...], mesh: Mesh, placements: Placements) -> Iterator[Box]:
    """Each rank's box, as torch.chunk divides: uneven, and empty for the last ranks."""
    for place in itertools.product(*map(range, mesh)):
        offsets, sizes = [0] * len(shape), list(shape)
        for index, count, dim in zip(place, mesh, placements, strict=True):
            if dim is not None and dim < len(shape):
                step = -(-sizes[dim] // count)
                low = min(index * step, sizes[dim])
                offsets[dim] += low
                sizes[dim] = min(step, sizes[dim] - low)
        yield tuple(offsets), tuple(sizes)


def part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """A view, often not contiguous."""
    return tensor[tuple(slice(a, a + size) for a, size in zip(*box, strict=True))]


def save(
    tensors: dict[str, torch.Tensor], mesh: Mesh, placements: dict[str, Placements], path: str
) -> None:
    """Do the work of `shardckpt.save` on every rank of the mesh, rank after rank."""
    world_size = math.prod(mesh)
    names = list(tensors)
    specs = tuple(
        TensorSpec(name, dtype_name(tensor.dtype, tensor=name), tuple(tensor.shape))
        for name, tensor in tensors.items()
    )
    tree = {name: values.TensorRef(name, "tensor") for name in names}
    divided = {n: list(boxes(tuple(t.shape), mesh, placements[n])) for n, t in tensors.items()}
    plans = []
    for rank in range(world_size):
        held = [(i, divided[n][rank]) for i, n in enumerate(names) if 0 not in divided[n][rank][1]]
        plans.append(
            LocalPlan(
                common=specs,
                rank_only=(),
                file_group=np.zeros(len(specs), np.int64),
                chunks=ChunkTable(
                    tensor=np.array([index for index, _ in held], np.int64),
                    boxes=pad_boxes([box for _, box in held]),
                ),
                shared=np.ones(len(held), np.bool_),
                tree=msgspec.json.encode(values.encode(tree, at="")),
                per_rank_trees=b"[]",
                data=tuple(part(tensors[names[index]], box) for index, box in held),
            )
        )
    plan = global_plan(plans)
    storage = LocalStorage()
    transaction = storage.begin(path, checkpoint_id="0" * 32, overwrite=False)
    results = []
    for rank, local in enumerate(plans):
        writes = RankWrites.of(local, plan.shares[rank])
        result = write_rank(
            storage.join(path, token=transaction.token),
            RankShards.of(local, writes, rank=rank, world_size=world_size),
        )
        result.per_rank_trees = b"[]"
        results.append(result)
    commit_manifest(
        transaction,
        checkpoint_id="0" * 32,
        tensors=KnownPlan(plan).encoded_tensors(file_table(results)),
        results=results,
        tree=plans[0].tree,
    )


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_loads(tensors: dict[str, torch.Tensor], mesh: Mesh, data: Placements, path: str) -> None:
    """Every rank of another mesh gets its part, and one process the whole."""
    with shardckpt.open_checkpoint(path) as opened:
        for name, tensor in tensors.items():
            for box in boxes(tuple(tensor.shape), mesh, data):
                assert bits(opened.read_box(name, *box)) == bits(part(tensor, box)), (name, box)
        opened.verify()
    whole = shardckpt.load_state(path)
    for name, tensor in tensors.items():
        assert whole[name].shape == tensor.shape
        assert bits(whole[name]) == bits(tensor)


MESHES = st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    mesh, other = draw(MESHES), draw(MESHES)
    dims = st.one_of(st.none(), st.integers(0, 2))

    def placed(mesh: Mesh) -> Placements:
        return tuple(draw(dims) for _ in mesh)

    tensors, placements = {}, {}
    for number in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(st.integers(0, 7), max_size=3).map(tuple))
        dtype = draw(st.sampled_from(DTYPES))
        raw = torch.randint(0, 2 if dtype is torch.bool else 120, (*shape, dtype.itemsize))
        tensor = raw.to(torch.uint8).view(dtype).reshape(shape)
        tensors[f"t{number}"], placements[f"t{number}"] = tensor, placed(mesh)
    return tensors, mesh, placements, other, placed(other)


def check(case: Case) -> None:
    tensors, mesh, placements, other, placed = case
    with tempfile.TemporaryDirectory() as folder:
        save(tensors, mesh, placements, f"{folder}/c")
        assert_loads(tensors, other, placed, f"{folder}/c")


def trial(number: int) -> int:
    """A hundred cases for the long run."""
    run = given(cases())(check)
    seed(number)(settings(max_examples=100, database=None, deadline=None)(run))()
    return 100


@settings(max_examples=25)
@given(cases())
def test_any_mesh_to_any_mesh(case):
    check(case)


def test_a_rank_that_writes_another_part_would_be_seen(tmp_path):
    """A planted fault: two ranks that write each other's rows."""
    tensor = torch.arange(8.0).reshape(4, 2)
    save({"t": tensor.flip(0)}, (2,), {"t": (0,)}, str(tmp_path / "c"))
    with pytest.raises(AssertionError):
        assert_loads({"t": tensor}, (4,), (0,), str(tmp_path / "c"))
