"""Write the folder torchsnapshot-0.1.0 beside this file, with torchsnapshot itself on two ranks:

pip install torchsnapshot==0.1.0
torchrun --standalone --nproc-per-node 2 tests/convert/made_by/write_torchsnapshot.py
"""

import os
import shutil
from collections import OrderedDict
from pathlib import Path

os.environ["TORCHSNAPSHOT_MAX_CHUNK_SIZE_BYTES_OVERRIDE"] = "64"

import torch
import torch.distributed as dist
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torchsnapshot import Snapshot, StateDict

FOLDER = Path(__file__).parent / "torchsnapshot-0.1.0"


class Settings:
    """A class that no reader has."""


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])
    sharded = sharded_tensor.zeros(spec, 6, 4)
    for shard in sharded.local_shards():
        begin = shard.metadata.shard_offsets[0] * 4
        values = torch.arange(begin, begin + shard.tensor.numel(), dtype=torch.float32)
        shard.tensor.copy_(values.reshape(shard.tensor.shape))
    model = StateDict(
        sharded=sharded,
        weight=torch.arange(12.0).reshape(3, 4),
        half=torch.arange(3.0).half(),
        chunked=torch.arange(40.0).reshape(10, 4),  # 160 bytes, in chunks of 64
        scalar=torch.tensor(2.5),
        complex=torch.tensor([1 + 2j]),
    )
    progress = StateDict(
        step=7,
        loss=0.25,
        done=False,
        name="a/b%é",
        raw=b"\0\1",
        history=[1, {"x": 2.0}],
        order=OrderedDict([("z", 1), (3, 2)]),
        settings=Settings(),
        pair=(1, 2),
        rank=rank,
    )
    own = {"extra": StateDict(t=torch.ones(2))} if rank == 1 else {}
    if rank == 0:
        shutil.rmtree(FOLDER, ignore_errors=True)
    dist.barrier()
    app_state = {"model": model, "progress": progress, **own}
    Snapshot.take(str(FOLDER), app_state, replicated=["model/weight"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
