"""Files of the cache directory."""

from __future__ import annotations

import pytest

from shardckpt.storage.cache import cache_folder, cached


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "shardckpt"


def fill(view):
    view[:] = b"abcdef"


def refuse(view):
    raise AssertionError("it was downloaded again")


def test_a_file_is_downloaded_once(folder):
    assert cache_folder() == str(folder)
    pages = cached("d1", "weight", size_bytes=6, download=fill)
    assert pages == b"abcdef"
    pages[0] = 0
    again = cached("d1", "weight", size_bytes=6, download=refuse)
    assert again == b"abcdef", "changes stay in memory"
    (folder / "d1/weight").unlink()
    assert again == b"abcdef", "a map stays valid"


def test_a_file_of_another_size_or_checkpoint_is_downloaded_again(folder):
    cached("d1", "weight", size_bytes=6, download=fill)
    (folder / "d1/weight").write_bytes(b"abc")
    assert cached("d1", "weight", size_bytes=6, download=fill) == b"abcdef"
    with pytest.raises(AssertionError):
        cached("d2", "weight", size_bytes=6, download=refuse)


def test_an_error_leaves_no_file(folder):
    with pytest.raises(AssertionError):
        cached("d1", "weight", size_bytes=6, download=refuse)
    assert list((folder / "d1").iterdir()) == []
