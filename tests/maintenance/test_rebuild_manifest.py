"""A manifest from the headers of shards. test_rescue has complete rescues."""

from __future__ import annotations

import pytest
import torch

import shardckpt
from shardckpt.format.digests import block_digest
from shardckpt.maintenance.rebuild_manifest import rebuild_manifest
from tests.faults.damage import Shelf

STATE = {
    "net": {"w": torch.arange(400_000.0).reshape(400, 1000), "b": torch.ones(3)},
    "c": torch.ones(2, dtype=torch.complex128),
    "step": 3,
}
SHARDS = [f"shard-0000{rank}-of-00002.safetensors" for rank in range(2)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The files of two shards, without a manifest; w lies in both."""
    folder = tmp_path_factory.mktemp("rebuild")
    shardckpt.save(STATE, folder / "one")
    shardckpt.reshard(folder / "one", folder / "two", shards=2)
    return {path.name: path.read_bytes() for path in (folder / "two").glob("*.safetensors")}


def rebuilt(files):
    class Listed(Shelf):
        def names(self):
            return list(files)

    return rebuild_manifest(Listed(files))


def test_tensors_shapes_dtypes_and_digests_come_back(saved):
    manifest, lost = rebuilt(saved)
    assert lost == {}
    found = {name: (entry.dtype, entry.shape) for name, entry in manifest.tensors.items()}
    assert found == {"net.w": ("F32", (400, 1000)), "net.b": ("F32", (3,)), "c": ("C128", (2,))}
    assert [shard.name for shard in manifest.shards] == SHARDS
    for shard in manifest.shards:
        assert shard.size_bytes == len(saved[shard.name])
        assert int(shard.digests[0]) == block_digest(saved[shard.name][: 1 << 20])
    assert manifest.state["net"] == {"w": {"$tensor": "net.w"}, "b": {"$tensor": "net.b"}}
    assert "step" not in manifest.state


def test_a_tensor_in_pieces_is_lost_with_a_shard_and_others_are_kept(saved):
    manifest, lost = rebuilt({SHARDS[0]: saved[SHARDS[0]]})
    assert lost["net.w"] == "it is in pieces, and a shard is missing"
    assert "net.w" not in manifest.tensors


def test_a_truncated_shard_loses_the_tensors_behind_its_end(saved):
    manifest, lost = rebuilt({**saved, SHARDS[0]: saved[SHARDS[0]][:-1]})
    assert lost
    assert all("truncated" in reason or "missing" in reason for reason in lost.values())
    assert not set(lost) & set(manifest.tensors)


def test_a_shard_without_a_header_is_listed_with_the_reason(saved):
    manifest, lost = rebuilt({**saved, SHARDS[1]: b"\xff" * 100})
    assert SHARDS[1] in lost
    assert [shard.name for shard in manifest.shards] == [SHARDS[0]]
