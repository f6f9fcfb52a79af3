"""The libraries that are compared, each behind the same few methods."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from benchmarks.files import sync_tree
from benchmarks.ranks import Place
from benchmarks.states import flat_tensors, local_state


@dataclass(frozen=True, slots=True)
class Pending:
    """A save in the background: wait until the state may change, and until it is durable."""

    wait_staged: Callable[[], object]
    result: Callable[[], object]


class Peer:
    """A library, made ready for one state; what making ready costs is not measured.

    `save` leaves a durable checkpoint, `load` fills the state in place, both on all ranks;
    `load_whole` builds a saved state in one process. A peer without a method can't do it.
    """

    name: str
    package: str | None = None  # the distribution that must be there
    version: str | None = None

    def __init__(
        self,
        place: Place,
        state: dict[str, Any],
        *,
        replicated: bool = False,
        in_background: bool = False,
    ) -> None:
        self.place = place
        self.state = state
        self.replicated = replicated
        self.in_background = in_background

    save: Callable[[str], object]
    load: Callable[[str], object]
    async_save: Callable[[str], Pending]
    reshards = True
    steps_wait = False  # whether an optimizer's step waits by itself until staging is over

    def close(self) -> None:
        """End what runs in the background."""

    def sync(self, path: str) -> None:
        """Sync the files. Libraries without fsync are charged for it."""
        self.place.barrier()
        sync_tree(path, rank=self.place.rank, world_size=self.place.world_size)

    @classmethod
    def missing(cls) -> str:
        """Why it can't take part; empty if it can."""
        if cls.package is None:
            return ""
        try:
            found = importlib.metadata.version(cls.package)
            __import__(cls.package.replace("-", "_"))
        except Exception as error:  # an import may fail in any way beside this torch
            return f"{cls.package} can't be used here: {type(error).__name__}: {error}"
        if cls.version and found != cls.version:
            return f"{cls.package} {cls.version} is compared, {found} is installed"
        return ""


class Shardckpt(Peer):
    """This library."""

    name = "shardckpt"
    steps_wait = True

    def save(self, path: str) -> None:
        """See Peer."""
        import shardckpt

        shardckpt.save(self.state, path)

    def load(self, path: str) -> None:
        """See Peer."""
        import shardckpt

        shardckpt.load(self.state, path)

    def async_save(self, path: str) -> Pending:
        """See Peer."""
        import shardckpt

        handle = shardckpt.async_save(self.state, path)
        return Pending(handle.wait_staged, handle.result)


class Dcp(Peer):
    """torch.distributed.checkpoint as it comes; it syncs its files by itself."""

    name = "DCP"
    threads = 1

    def __init__(self, place: Place, state: dict[str, Any], **options: bool) -> None:
        super().__init__(place, state, **options)
        self.group = dist.new_group(backend="gloo") if place.world_size > 1 else None

    def writer(self, path: str) -> Any:
        """Its writer of files."""
        import torch.distributed.checkpoint as dcp

        return dcp.FileSystemWriter(path, thread_count=self.threads)

    def save(self, path: str) -> None:
        """See Peer."""
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state, storage_writer=self.writer(path))

    def load(self, path: str) -> None:
        """See Peer."""
        import torch.distributed.checkpoint as dcp

        dcp.load(self.state, checkpoint_id=path)

    def async_save(self, path: str) -> Pending:
        """See Peer; staging is over when the call returns."""
        import torch.distributed.checkpoint as dcp

        future = dcp.async_save(
            self.state, storage_writer=self.writer(path), process_group=self.group
        )
        return Pending(lambda: None, future.result)


class DcpThreads(Dcp):
    """DCP with two threads that write, each a file of its own; it keeps its staging buffers."""

    name = "DCP, 2 threads"
    threads = 2

    def __init__(self, place: Place, state: dict[str, Any], **options: bool) -> None:
        super().__init__(place, state, **options)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=False,
                use_async_staging=True,
                use_non_blocking_copy=False,
            )
        )

    def async_save(self, path: str) -> Pending:
        """See Peer."""
        import torch.distributed.checkpoint as dcp

        response = dcp.async_save(
            self.state,
            storage_writer=self.writer(path),
            process_group=self.group,
            async_stager=self.stager,
        )
        return Pending(response.staging_completion.result, response.upload_completion.result)

    def close(self) -> None:
        """See Peer."""
        self.stager.close()


class TorchCheckpointing(Peer):
    """torch_checkpointing with its resharder; it does not sync, so it pays for that."""

    name = "torch_checkpointing"
    package = "torch_checkpointing"
    version = "0.1.1"

    def __init__(self, place: Place, state: dict[str, Any], **options: bool) -> None:
        super().__init__(place, state, **options)
        from torch_checkpointing import CheckpointManager, ItemSpec
        from torch_checkpointing.checkpoint_process import CheckpointProcessConfig
        from torch_checkpointing.config import AsyncCheckpointSaverConfig, SyncCheckpointSaverConfig
        from torch_checkpointing.default_resharder import DefaultResharder
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        saver: Any = SyncCheckpointSaverConfig()
        if self.in_background:
            process = CheckpointProcessConfig(subprocess_init_timeout_secs=120)
            saver = AsyncCheckpointSaverConfig(process_config=process)
        self.manager = CheckpointManager.Config(
            save=saver,
            # O_DIRECT is its default, and fails on ext4: it writes unaligned buffers.
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
            items={key: ItemSpec(resharder=DefaultResharder()) for key in self.state},
            subprocess_init_fn=logging.disable,
            subprocess_init_args=(logging.WARNING,),
        ).build()
        # Its own gather of metadata goes through CUDA tensors; ranks without one need another.
        self.manager._metadata_manager._all_gather_pickled_data = lambda data, process_group: dict(
            enumerate(self.place.gather(data))
        )
        if self.in_background:
            self.manager._saver._checkpoint_process._creation_future.result()

    def save(self, path: str) -> None:
        """See Peer."""
        self.manager.save(path, self.state)
        self.sync(path)

    def load(self, path: str) -> None:
        """See Peer."""
        self.manager.load(path, into=self.state, strict=True)

    def async_save(self, path: str) -> Pending:
        """See Peer."""
        written = self.manager.save(path, self.state)
        staged = self.manager._staging_future

        def result() -> None:
            written.result()
            self.sync(path)

        return Pending(staged.result, result)

    def close(self) -> None:
        """See Peer."""
        self.manager.close()


class TorchSnapshot(Peer):
    """torchsnapshot; it knows no DTensor, so it gets ShardedTensors over the same memory."""

    name = "torchsnapshot"
    package = "torchsnapshot"

    def __init__(self, place: Place, state: dict[str, Any], **options: bool) -> None:
        super().__init__(place, state, **options)
        from torchsnapshot import StateDict

        flat = flat_tensors(tree_map(_as_sharded_tensor, state))
        self.app_state = {"state": StateDict(**flat)}  # it reshards only what is not nested

    def save(self, path: str) -> None:
        """See Peer."""
        from torchsnapshot import Snapshot

        Snapshot.take(path, self.app_state, replicated=["**"] if self.replicated else [])
        self.sync(path)

    def load(self, path: str) -> None:
        """See Peer."""
        from torchsnapshot import Snapshot

        Snapshot(path).restore(self.app_state)

    def async_save(self, path: str) -> Pending:
        """See Peer; staging is over when the call returns."""
        from torchsnapshot import Snapshot

        pending = Snapshot.async_take(path, self.app_state)

        def result() -> None:
            pending.wait()
            self.sync(path)

        return Pending(lambda: None, result)


def _as_sharded_tensor(leaf: Any) -> Any:
    if not isinstance(leaf, DTensor):
        return leaf
    from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(
        leaf.shape, leaf.device_mesh, leaf.placements
    )
    shard = Shard.from_tensor_and_offsets(leaf.to_local(), list(offsets), dist.get_rank())
    return init_from_local_shards([shard], *leaf.shape)


class _RankFiles(Peer):
    """One file a rank, or rank 0's alone for a replicated state; no resharding."""

    reshards = False
    suffix: str
    write: Callable[[dict[str, Any], str], object]
    read: Callable[[str], dict[str, Any]]

    def __init__(self, place: Place, state: dict[str, Any], **options: bool) -> None:
        super().__init__(place, state, **options)
        self.flat = flat_tensors(local_state(state))

    def file(self, path: str) -> str:
        """This rank's file."""
        return os.path.join(path, f"{0 if self.replicated else self.place.rank}{self.suffix}")

    def save(self, path: str) -> None:
        """See Peer."""
        if self.place.rank == 0 or not self.replicated:
            os.makedirs(path, exist_ok=True)
            self.write(self.flat, self.file(path))
        self.sync(path)

    def load(self, path: str) -> None:
        """See Peer."""
        for name, tensor in self.read(self.file(path)).items():
            self.flat[name].copy_(tensor)


class TorchSave(_RankFiles):
    """torch.save and torch.load, mapped and safe."""

    name = "torch.save"
    suffix = ".pt"

    def write(self, flat: dict[str, Any], file: str) -> None:
        """Write a file."""
        torch.save(flat, file)

    def read(self, file: str) -> dict[str, Any]:
        """Read a file."""
        return torch.load(file, mmap=True, weights_only=True)


class Safetensors(_RankFiles):
    """safetensors by itself."""

    name = "safetensors"
    suffix = ".safetensors"

    def write(self, flat: dict[str, Any], file: str) -> None:
        """Write a file."""
        from safetensors.torch import save_file

        save_file(flat, file)

    def read(self, file: str) -> dict[str, Any]:
        """Read a file."""
        from safetensors.torch import load_file

        return load_file(file)


PEERS: list[type[Peer]] = [
    Shardckpt,
    Dcp,
    DcpThreads,
    TorchCheckpointing,
    TorchSnapshot,
    Safetensors,
    TorchSave,
]
"""Those that save and load; shardckpt first."""


def present() -> tuple[list[type[Peer]], dict[str, str]]:
    """The peers that are installed, and why each of the others is not compared.

    BENCH_PEERS in the environment narrows them down, for rank processes too.
    """
    asked = os.environ.get("BENCH_PEERS", "").split(";")
    reasons = {
        peer.name: peer.missing() if asked == [""] or peer.name in asked else "not asked for"
        for peer in PEERS
    }
    return [peer for peer in PEERS if not reasons[peer.name]], {
        name: reason for name, reason in reasons.items() if reason
    }
