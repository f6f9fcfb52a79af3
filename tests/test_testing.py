"""StorageTests: the storage on the page docs/how-to/storage.md passes them, a wrong one fails."""

from __future__ import annotations

import contextlib
import mmap
import shutil
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.errors import CorruptionError, ShardckptError
from shardckpt.storage.local import LocalStorage
from shardckpt.testing import StorageTests, write_checkpoint
from tests.docs_code import blocks

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "storage.md"
(CODE,) = [block.code for block in blocks(PAGE.read_text()) if block.title == "dict_storage.py"]
NAMES: dict[str, type] = {}
exec(CODE, NAMES)
DictStorage = NAMES["DictStorage"]


class TestDictStorage(StorageTests):
    @pytest.fixture
    def storage(self):
        return DictStorage()

    @pytest.fixture
    def path(self, tmp_path):
        return str(tmp_path / "checkpoint")


def test_it_stores_all_that_the_library_writes():
    storage = DictStorage()
    state = {"w": torch.arange(300_000.0), "v": torch.ones(3, dtype=torch.int8), "step": 1}
    shardckpt.save(state, "a", storage=storage)
    shardckpt.save(state, "a", storage=storage, overwrite=True, base="a")
    shardckpt.async_save({**state, "step": 2}, "b", storage=storage).result(60)
    for device in ("cpu", "disk"):
        loaded = shardckpt.load_state("b", storage=storage, device_map=device)
        assert torch.equal(loaded["w"], state["w"])
        assert loaded["step"] == 2
    with shardckpt.open_checkpoint("b", storage=storage) as checkpoint:
        checkpoint.verify()
        assert checkpoint["w"][7:9].tolist() == [7, 8]


class Early(LocalStorage):
    """A checkpoint is visible when it begins."""

    def begin(self, path, *, checkpoint_id, overwrite):
        write_checkpoint(LocalStorage(), path, b"early", overwrite=True)
        return super().begin(path, checkpoint_id=checkpoint_id, overwrite=True)


class Visible(Early):
    """A checkpoint is visible until it is abandoned."""

    def begin(self, path, **options):
        transaction = super().begin(path, **options)
        abandon = transaction.abandon
        transaction.abandon = lambda: (abandon(), shutil.rmtree(path, ignore_errors=True))
        return transaction


class Replacing(LocalStorage):
    """A checkpoint is always replaced."""

    def begin(self, path, *, checkpoint_id, overwrite):
        return super().begin(path, checkpoint_id=checkpoint_id, overwrite=True)


class Unchanged(LocalStorage):
    """The version of a checkpoint never changes."""

    def version(self, path):
        return path


class Keeping(LocalStorage):
    """Nothing is removed."""

    def remove(self, path):
        pass


class Apart(LocalStorage):
    """The files of the other ranks go nowhere."""

    def join(self, path, *, token):
        return LocalStorage().begin(f"{path}-apart", checkpoint_id="f" * 32, overwrite=True)


class Lenient(LocalStorage):
    """The bytes behind the end of a file are zeros."""

    def open(self, path):
        files = super().open(path)
        read = files.readinto

        def readinto(name, buffers, **options):
            with contextlib.suppress(CorruptionError):
                read(name, buffers, **options)

        files.readinto = readinto
        return files


class SharedMaps(LocalStorage):
    """A change of a map changes the file."""

    def open(self, path):
        files = super().open(path)

        def mapped(name):
            with open(f"{path}/{name}", "r+b") as file:
                return memoryview(mmap.mmap(file.fileno(), 0))

        files.map = mapped
        return files


@pytest.mark.parametrize(
    ("faulty", "test"),
    [
        (Early, "test_nothing_is_visible_before_commit"),
        (Visible, "test_nothing_is_visible_before_commit"),
        (Replacing, "test_a_taken_path"),
        (Unchanged, "test_the_checkpoints_of_a_folder"),
        (Keeping, "test_the_checkpoints_of_a_folder"),
        (Apart, "test_a_checkpoint_comes_back"),
        (Lenient, "test_reading_missing_files"),
        (SharedMaps, "test_a_map_outlives_its_checkpoint"),
    ],
)
def test_the_suite_sees_a_fault_of_a_storage(tmp_path, faulty, test):
    getattr(StorageTests(), test)(LocalStorage(), str(tmp_path / "sound"))
    with pytest.raises((AssertionError, ShardckptError, pytest.fail.Exception)):
        getattr(StorageTests(), test)(faulty(), str(tmp_path / "faulty"))
