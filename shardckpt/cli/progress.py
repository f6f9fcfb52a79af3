"""Progress of long work on the error stream: rich's bar, or plain lines without rich."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress", "progress_bar", "size_text"]

_SHOW_AFTER_S = 0.5
_EVERY_S = 0.2


def size_text(size_bytes: int) -> str:
    """A number of bytes for people: 1.5 MiB."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    power = min(int(math.log2(size_bytes)) // 10, 5)
    return f"{size_bytes / 1024**power:.1f} {'KMGTP'[power - 1]}iB"


class Progress:
    """Bytes done; `advance` and `reach` may be called from any thread."""

    def __init__(self, show: Callable[[int], None]) -> None:
        self._show = show
        self._lock = threading.Lock()
        self._done = 0
        self._shown = time.monotonic() + _SHOW_AFTER_S - _EVERY_S

    def advance(self, amount_bytes: int) -> None:
        """So many bytes more."""
        self.reach(self._done + amount_bytes, add=amount_bytes)

    def reach(self, done_bytes: int, *, add: int | None = None) -> None:
        """So many bytes in all."""
        with self._lock:
            self._done = done_bytes if add is None else self._done + add
            if time.monotonic() - self._shown >= _EVERY_S:
                self._shown = time.monotonic()
                self._show(self._done)


@contextmanager
def progress_bar(title: str, *, total_bytes: int, shown: bool = True) -> Iterator[Progress]:
    """A bar for the length of a with block; nothing is shown for work of half a second."""
    if not shown:
        yield Progress(lambda done: None)
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
    except ImportError:
        yield Progress(lambda done: _print(f"{title}: {100 * done // max(total_bytes, 1)}%"))
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield Progress(lambda done: bar.update(task, completed=done))


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
