"""Rows: kinds of tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._shard.sharded_tensor import Shard as ShardedTensorShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardMetadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

from shardckpt.format.dtypes import DTYPES
from tests.state_kinds.registry import row


def _numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 100 * seed


def _of_dtype(dtype: torch.dtype) -> Any:
    def make(seed: int) -> torch.Tensor:
        raw = (torch.arange(12 * dtype.itemsize) + seed).to(torch.uint8)
        if dtype == torch.bool:
            raw = raw % 2
        return raw.view(dtype).reshape(3, 4)

    return make


for _name, _dtype in DTYPES.items():
    row(f"dtype {_name}")(_of_dtype(_dtype))
row("strided")(lambda seed: _numbers(seed, 4, 6).t()[1:5:2])
row("without dimensions")(lambda seed: torch.tensor(float(seed)))
row("without elements")(lambda seed: torch.empty(0, 3))
row("parameter")(lambda seed: torch.nn.Parameter(_numbers(seed, 2, 3)))


@row("inference tensor")
@torch.inference_mode()
def _(seed: int) -> torch.Tensor:
    return _numbers(seed, 3)


@row("conjugate")
def _(seed: int) -> torch.Tensor:
    return torch.complex(_numbers(seed, 3), _numbers(seed, 3)).conj()


@row("negated view")
def _(seed: int) -> torch.Tensor:
    return torch.complex(_numbers(seed, 3), _numbers(seed, 3)).conj().imag


row("sparse", refused=True)(lambda seed: torch.eye(2).to_sparse())
row("compressed sparse", refused=True)(lambda seed: torch.eye(2).to_sparse_csr())
row("mkldnn", refused=True)(lambda seed: torch.eye(2).to_mkldnn())
row("nested, strided", refused=True)(
    lambda seed: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
)
row("quantized", refused=True)(
    lambda seed: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
)
row("masked", refused=True)(lambda seed: masked_tensor(torch.ones(2), torch.tensor([True, False])))
row("functional", refused=True)(lambda seed: torch._to_functional_tensor(torch.ones(3)))
row("zero tensor", refused=True)(lambda seed: torch._efficientzerotensor((3,)))
row("lazy", refused=True)(lambda seed: torch.nn.LazyLinear(3).weight)


@row("fake", refused=True)
def _(seed: int) -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


@row("freed storage", refused=True)
def _(seed: int) -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


@row("a view of a freed storage", refused=True)
def _(seed: int) -> torch.Tensor:
    tensor = torch.ones(4)
    view = tensor[1:]
    tensor.untyped_storage().resize_(0)
    return view


@row("a storage that is too small", refused=True)
def _(seed: int) -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(8)
    return tensor


# Tensors that say how they are sharded: on two ranks, and all of it on one.


def _whole(seed: int) -> torch.Tensor:
    return _numbers(seed, 5, 4)


def _boxes() -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Offsets and sizes of this rank's parts of a tensor of shape [5, 4]."""
    boxes = [((0, 0), (3, 1)), ((0, 1), (3, 3)), ((3, 0), (2, 4))]
    if dist.get_world_size() == 1:
        return boxes
    return [boxes[:2], boxes[2:]][dist.get_rank()]


def _cut(seed: int) -> list[torch.Tensor]:
    return [_whole(seed)[r : r + h, c : c + w].clone() for (r, c), (h, w) in _boxes()]


@row("attributes of CheckpointableTensor", whole=_whole, ranks=2)
def _(seed: int) -> torch.Tensor:
    local = torch.full((8, 6), -1.0)  # with padding
    corners = [(0, 0), (0, 2), (4, 1)][: len(_boxes())]
    for (top, left), part in zip(corners, _cut(seed), strict=True):
        local[top : top + part.shape[0], left : left + part.shape[1]] = part
    local.global_shape = (5, 4)  # type: ignore[attr-defined]
    local.global_offsets = tuple(offsets for offsets, _ in _boxes())  # type: ignore[attr-defined]
    local.local_offsets = tuple(corners)  # type: ignore[attr-defined]
    local.local_sizes = tuple(sizes for _, sizes in _boxes())  # type: ignore[attr-defined]
    return local


class _Checkpointable(torch.Tensor):
    """As Megatron-Core's: a wrapper whose methods tell DCP of its shards."""

    @staticmethod
    def __new__(cls, shards: list[torch.Tensor]) -> _Checkpointable:
        return torch.Tensor._make_wrapper_subclass(cls, (5, 4))  # type: ignore[attr-defined, no-any-return]

    def __init__(self, shards: list[torch.Tensor]) -> None:
        self.shards = shards

    def local_shards(self) -> list[torch.Tensor]:
        return self.shards

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in _boxes()]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(), torch.Size((5, 4))),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return next(
            shard
            for shard, (offsets, _) in zip(self.shards, _boxes(), strict=True)
            if torch.Size(offsets) == index.offset
        )

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


row("methods of DCP", whole=_whole, ranks=2)(lambda seed: _Checkpointable(_cut(seed)))
row("methods of DCP, bfloat16", whole=lambda seed: _whole(seed).bfloat16(), ranks=2)(
    lambda seed: _Checkpointable([part.bfloat16() for part in _cut(seed)])
)


def _mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


@row("DTensor of LocalShardsWrapper", whole=_whole, ranks=2)
def _(seed: int) -> torch.Tensor:
    local = LocalShardsWrapper(_cut(seed), [offsets for offsets, _ in _boxes()])
    return DTensor.from_local(
        local, _mesh(), [Shard(0)], run_check=False, shape=torch.Size((5, 4)), stride=(4, 1)
    )


@row("ShardedTensor of several shards", whole=_whole, ranks=2)
def _(seed: int) -> Any:
    shards = [
        ShardedTensorShard(part, ShardMetadata(list(o), list(s), f"rank:{dist.get_rank()}/cpu"))
        for part, (o, s) in zip(_cut(seed), _boxes(), strict=True)
    ]
    return ShardedTensor._init_from_local_shards(shards, 5, 4)


for _name, _placements in {"rows": Shard(0), "columns": Shard(1), "replicas": Replicate()}.items():
    row(f"DTensor, {_name}", whole=_whole, ranks=2)(
        lambda seed, placement=_placements: distribute_tensor(_whole(seed), _mesh(), [placement])
    )


# Tensors that wrap others.

row("TwoTensor")(lambda seed: TwoTensor(_numbers(seed, 2, 2), _numbers(seed + 1, 2, 2)))
row("TwoTensor of TwoTensors")(
    lambda seed: TwoTensor(*(TwoTensor(_numbers(n, 2), _numbers(n + 1, 2)) for n in (seed, seed)))
)
row("parameter of TwoTensor")(
    lambda seed: torch.nn.Parameter(TwoTensor(_numbers(seed, 2), _numbers(seed + 1, 2)))
)
row("nested, jagged")(
    lambda seed: torch.nested.nested_tensor(
        [_numbers(seed, 2, 3), _numbers(seed, 1, 3)], layout=torch.jagged
    )
)


@row("DTensor of a wrapper that does not say how it is sharded", refused=True, ranks=2)
def _(seed: int) -> torch.Tensor:
    return DTensor.from_local(TwoTensor(_numbers(seed, 2), _numbers(seed, 2)), _mesh(), [Shard(0)])


def _blocks(seed: int) -> dict[str, torch.Tensor]:
    return {"codes": _whole(seed), "table": _numbers(seed, 3, 4)}


@row("DTensor of a wrapper", whole=_blocks, ranks=2)
def _(seed: int) -> torch.Tensor:
    codes = distribute_tensor(_whole(seed), _mesh(), [Shard(0)]).to_local()
    local = _Rows(codes, _numbers(seed, 3, 4))
    return DTensor.from_local(
        local, _mesh(), [Shard(0)], run_check=False, shape=torch.Size((5, 4)), stride=(4, 1)
    )


class _Rows(torch.Tensor):
    """As 8-bit optimizer state: codes of the outer shape, and a table that all rows share."""

    checkpoint_rows = ("codes",)

    @staticmethod
    def __new__(cls, codes: torch.Tensor, table: torch.Tensor) -> _Rows:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, codes: torch.Tensor, table: torch.Tensor) -> None:
        self.codes, self.table = codes, table

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "table"], {"bits": 8, "device": self.device, "shape": self.shape}

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> _Rows:
        return cls(inner["codes"], inner["table"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(*(func(inner) for inner in (args[0].codes, args[0].table)))
        if func is torch.ops.aten.view.default:
            return cls(func(args[0].codes, args[1]), args[0].table)
        raise NotImplementedError(f"{func}")
