"""Checkpoints are copied between storages with their id, and each block is verified."""

from __future__ import annotations

import itertools

import pytest
import torch

import shardckpt
from shardckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptionError,
    StateError,
)
from shardckpt.storage.base import Storage
from shardckpt.storage.copying import (
    copy_checkpoint,
    copy_part,
    created_in,
    has_checkpoint,
    id_in,
)
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryStorage

STATE = {"w": torch.arange(600_000.0), "step": 3}  # three blocks
URL = "memory://copies/c"


@pytest.fixture
def source(tmp_path):
    shardckpt.save(STATE, tmp_path / "one")
    shardckpt.reshard(tmp_path / "one", tmp_path / "c", shards=2)
    files = LocalStorage().open(str(tmp_path / "c"))
    yield files
    files.close()


def shards(path) -> list:
    return sorted(path.glob("*.safetensors"))


def corrupt(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_copy_has_the_id_and_the_bytes_of_its_source(source, tmp_path):
    storage, copied = MemoryStorage(), []
    copy_checkpoint(source, storage, URL, overwrite=False, progress=copied.append)
    files = storage.open(URL)
    assert files.manifest() == source.manifest()
    for shard in shards(tmp_path / "c"):
        assert bytes(files.map(shard.name)) == shard.read_bytes()
    assert sum(copied) == sum(shard.stat().st_size for shard in shards(tmp_path / "c"))
    assert has_checkpoint(storage, URL, id_in(source.manifest()))


def test_a_corrupted_block_is_not_copied(source, tmp_path):
    corrupt(shards(tmp_path / "c")[1])
    storage = MemoryStorage()
    with pytest.raises(CorruptionError, match="was not copied") as raised:
        copy_checkpoint(source, storage, URL, overwrite=False)
    assert raised.value.path == str(shards(tmp_path / "c")[1])
    assert "block 1" in raised.value.expected
    assert not storage.exists(URL)


def test_a_checkpoint_at_the_path_is_replaced_only_with_overwrite(source):
    storage = MemoryStorage()
    shardckpt.save({"step": 1}, URL, storage=storage)
    with pytest.raises(CheckpointExistsError):
        copy_checkpoint(source, storage, URL, overwrite=False)
    assert shardckpt.load_state(URL, storage=storage) == {"step": 1}
    copy_checkpoint(source, storage, URL, overwrite=True)
    assert shardckpt.load_state(URL, storage=storage)["step"] == 3


def test_a_copy_that_failed_goes_on_where_it_ended(source, tmp_path):
    bad = shards(tmp_path / "c")[1]
    data = bad.read_bytes()
    corrupt(bad)
    path = str(tmp_path / "copy")
    with pytest.raises(CorruptionError):
        copy_part(source, LocalStorage(), path)
    assert not has_checkpoint(LocalStorage(), path, id_in(source.manifest()))
    bad.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        read = type(source).readinto
        asked = []
        patch.setattr(
            type(source),
            "readinto",
            lambda self, name, buffers, **options: (
                asked.append(name) or read(self, name, buffers, **options)
            ),
        )
        assert copy_part(source, LocalStorage(), path)
        assert copy_part(source, LocalStorage(), path)
    assert asked == [bad.name]
    shardckpt.verify(path)


def test_the_parts_of_two_machines_become_one_checkpoint(source, tmp_path):
    """Each machine has one of the two shards. The copy of the last one commits."""
    first, second = shards(tmp_path / "c")
    for machine, shard in (("m0", second), ("m1", first)):
        (tmp_path / machine).mkdir()
        for file in (shard, tmp_path / "c" / "manifest.json"):
            (tmp_path / machine / file.name).write_bytes(file.read_bytes())
    path, storage = str(tmp_path / "copy"), LocalStorage()
    for machine, complete in (("m0", False), ("m1", True)):
        part = storage.open(str(tmp_path / machine))
        assert copy_part(part, storage, path, may_lack=True) is complete
        part.close()
    assert torch.equal(shardckpt.load_state(path)["w"], STATE["w"])


def test_a_shard_that_may_not_be_missing_is_corruption(source, tmp_path):
    shards(tmp_path / "c")[0].unlink()
    with pytest.raises(CorruptionError, match="missing"):
        copy_part(source, LocalStorage(), str(tmp_path / "copy"))


@pytest.mark.parametrize("shards_copied", [0, 2])
def test_a_source_that_is_removed_meanwhile_is_not_committed(source, tmp_path, shards_copied):
    closed = itertools.count(1)

    class Removing(LocalStorage):
        def assemble(self, path, **options):
            transaction = super().assemble(path, **options)
            create = transaction.create

            def created(name, **options):
                file = create(name, **options)
                close = file.close

                def close_and_remove(**options):
                    close(**options)
                    if next(closed) == shards_copied:
                        self.remove(str(tmp_path / "c"))

                file.close = close_and_remove
                return file

            transaction.create = created
            if not shards_copied:
                self.remove(str(tmp_path / "c"))
            return transaction

    with pytest.raises(CheckpointNotFoundError):
        copy_part(source, Removing(), str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


def test_a_storage_that_does_not_assemble_takes_no_parts(source, tmp_path):
    class NoParts(LocalStorage):
        assemble = Storage.assemble

    with pytest.raises(StateError, match="can't assemble") as raised:
        copy_part(source, NoParts(), str(tmp_path / "copy"), may_lack=True)
    assert raised.value.remedy == "use a fast tier that all ranks share"
    assert not (tmp_path / "copy").exists()


def test_id_and_time_are_found_in_the_bytes_of_a_manifest(source, tmp_path):
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        manifest = checkpoint.manifest
    assert id_in(source.manifest()) == manifest.checkpoint_id
    assert created_in(source.manifest()) == manifest.created
    assert not has_checkpoint(LocalStorage(), str(tmp_path / "c"), "0" * 32)
    assert not has_checkpoint(LocalStorage(), str(tmp_path / "nothing"), manifest.checkpoint_id)
