"""System calls, what is in the page cache, and the typed errors of the file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.storage.posix import System


class Older(System):
    """A kernel without cachestat."""

    def _cachestat(self, fd, offset, size_bytes):
        return None


def test_both_ways_to_ask_for_the_page_cache_say_the_same(tmp_path):
    path, pages = tmp_path / "a", 512
    path.write_bytes(bytes(pages * 4096))
    with open(path, "rb") as file:
        fd = file.fileno()
        assert System()._cachestat(fd, 0, pages * 4096) in (pages, None)
        assert System()._mincore(fd, 0, pages * 4096) == pages
        os.fsync(fd)
        for dropped in (0, pages // 16, pages // 4, pages):
            os.posix_fadvise(fd, 0, dropped * 4096, os.POSIX_FADV_DONTNEED)
            held = System()._mincore(fd, 0, pages * 4096)  # the kernel drops what it likes
            assert System()._cachestat(fd, 0, pages * 4096) in (held, None)
            for system in (System(), Older()):
                found = system.cached(fd, offset=0, size_bytes=pages * 4096)
                assert found == (held >= pages * 7 / 8)
        assert not held or _is_memory(path)


@pytest.mark.parametrize("system", [System, Older])
def test_what_is_in_the_cache_is_read_from_there(tmp_path, system):
    shardckpt.save({"a": torch.arange(1_000_003)}, tmp_path / "c")
    (shard,) = (tmp_path / "c").glob("*.safetensors")
    size = len(shard.read_bytes())
    with open(shard, "rb") as file:
        assert system().cached(file.fileno(), offset=0, size_bytes=size)
        assert system().cached(file.fileno(), offset=4096, size_bytes=size)  # beyond its end
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        in_memory = _is_memory(shard)
        assert system().cached(file.fileno(), offset=0, size_bytes=size) == in_memory


def _is_memory(path):
    mounts = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    kinds = {line.split()[1]: line.split()[2] for line in mounts}
    parents = [str(parent) for parent in path.resolve().parents if str(parent) in kinds]
    return kinds[max(parents, key=len)] == "tmpfs"
