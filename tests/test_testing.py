"""StorageTests: the storage on the page docs/how-to/storage.md passes them, a wrong one fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shardckpt
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


def test_the_suite_sees_a_storage_that_publishes_early(tmp_path):
    """A planted fault: the suite for storages must fail on it."""

    class Early(LocalStorage):
        def begin(self, path, *, checkpoint_id, overwrite):
            write_checkpoint(LocalStorage(), path, b"early", overwrite=True)
            return super().begin(path, checkpoint_id=checkpoint_id, overwrite=True)

    with pytest.raises(AssertionError):
        StorageTests().test_nothing_is_visible_before_commit(Early(), str(tmp_path / "c"))
