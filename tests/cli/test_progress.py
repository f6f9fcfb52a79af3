"""Progress is counted from any thread, and sizes are text."""

from __future__ import annotations

import pytest

from shardckpt.cli.progress import Progress, count_text, size_text


def test_progress_counts_and_is_quiet_at_first():
    shown: list[int] = []
    quick = Progress(shown.append)
    quick.advance(5)
    assert shown == []
    slow = Progress(shown.append)
    slow._shown = 0.0
    slow.advance(5)
    slow._shown = 0.0
    slow.advance(7)
    assert shown == [5, 12]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 40, "5.0 TiB"),
        (1 << 70, "1048576.0 PiB"),
    ],
)
def test_sizes_are_text_with_units(size, text):
    assert size_text(size) == text


def test_numbers_of_things_as_text():
    assert [count_text(n, "shard") for n in (0, 1, 2000)] == ["0 shards", "1 shard", "2,000 shards"]
