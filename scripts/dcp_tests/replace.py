"""Replace DCP's storage classes by shardckpt's. Each copied test file imports this module first.

The tests run on CPU with gloo: decorators that ask for GPUs are replaced too, and a rank is a fork.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _fsspec_filesystem, filesystem
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.testing._internal import common_distributed, common_fsdp
from torch.testing._internal.common_distributed import MultiProcessTestCase
from torch.testing._internal.distributed._shard import sharded_tensor
from torch.testing._internal.distributed._tensor import common_dtensor

import shardckpt

SHARDCKPT = os.environ.get("DCP_TESTS_CLASSES") == "shardckpt"


class _Writer(shardckpt.ShardWriter):
    """A ShardWriter with the arguments of FileSystemWriter that have a meaning."""

    def __init__(
        self,
        path: Any,
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 0,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Any = None,
    ) -> None:
        if _extensions:
            raise NotImplementedError("shardckpt has no stream transforms")
        super().__init__(path, overwrite=overwrite)


class _Reader(shardckpt.ShardReader):
    """A ShardReader with the arguments of FileSystemReader."""

    def __init__(self, path: Any, _extension_registry: Any = None) -> None:
        super().__init__(path)


class Writer(_Writer):
    """Stands for FileSystemWriter."""


class Reader(_Reader):
    """Stands for FileSystemReader."""


class FsspecWriter(_Writer):
    """Stands for FsspecWriter. A test disables the other class."""


class FsspecReader(_Reader):
    """Stands for FsspecReader. A test disables the other class."""


def no_condition(*_: Any, **__: Any) -> Any:
    """Stand in for a decorator with arguments that skips tests."""
    return lambda test: test


def with_comms(func: Any = None, init_rpc: bool = True, backend: str = "gloo") -> Any:
    """Stand in for with_comms of the tests of ShardedTensor: gloo, without RPC."""
    if func is None:
        return functools.partial(with_comms, backend=backend)

    @functools.wraps(func)
    def wrapper(self: Any, *args: Any, **options: Any) -> None:
        self.init_comms(init_rpc=False, backend="gloo")
        func(self, *args, **options)
        self.destroy_comms(destroy_rpc=False)

    return wrapper


def fork(self: MultiProcessTestCase) -> None:
    """Start the ranks of a test as forks, which need not import torch."""
    self._start_processes(torch.multiprocessing.get_context("fork").Process)


def on_cpu(init: Any) -> Any:
    """Change the constructor of FSDP, which takes no CPU unless asked to."""

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **{"device_id": torch.device("cpu"), **options})

    return wrapper


def replace() -> None:
    """Replace what the tests and DCP import."""
    for module in (common_distributed, common_dtensor, common_fsdp):
        for name in ("skip_if_lt_x_gpu", "requires_nccl", "requires_accelerator_dist_backend"):
            if hasattr(module, name):
                setattr(module, name, no_condition)
    sharded_tensor.with_comms = with_comms
    torch.accelerator.device_count = lambda: 8  # FSDPTest skips tests if there are too few
    MultiProcessTestCase._spawn_processes = fork
    FullyShardedDataParallel.__init__ = on_cpu(FullyShardedDataParallel.__init__)
    if not SHARDCKPT:
        return
    for name in ("_storage_utils", "format_utils"):
        user: Any = importlib.import_module(f"torch.distributed.checkpoint.{name}")
        user.FileSystemWriter, user.FileSystemReader = Writer, Reader
    for place in (dcp, filesystem):
        place.FileSystemWriter, place.FileSystemReader = Writer, Reader
    _fsspec_filesystem.FsspecWriter = FsspecWriter
    _fsspec_filesystem.FsspecReader = FsspecReader


replace()
