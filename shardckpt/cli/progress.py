"""Progress bars on the error stream, and sizes as text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

__all__ = ["Progress", "count_text", "progress_bar", "size_text"]

_SHOW_AFTER_S = 0.5
_EVERY_S = 0.2


def size_text(size_bytes: int) -> str:
    """Return a number of bytes as text, such as 1.5 MiB."""
    unit, suffix = pick_unit_and_suffix(size_bytes, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"], 1024)
    return f"{size_bytes} B" if unit == 1 else f"{size_bytes / unit:.1f} {suffix}"


def count_text(number: int, noun: str) -> str:
    """Return a number of things as text, such as 1 tensor or 2,000 tensors."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Progress:
    """Counts the bytes that are done, from any thread."""

    def __init__(self, show: Callable[[int], None]) -> None:
        self._show = show
        self._lock = threading.Lock()
        self._done = 0
        self._shown = time.monotonic() + _SHOW_AFTER_S - _EVERY_S

    def advance(self, amount_bytes: int) -> None:
        """Add bytes to those that are done."""
        self.reach(self._done + amount_bytes, add=amount_bytes)

    def reach(self, done_bytes: int, *, add: int | None = None) -> None:
        """Set the number of bytes that are done."""
        with self._lock:
            self._done = done_bytes if add is None else self._done + add
            if time.monotonic() - self._shown >= _EVERY_S:
                self._shown = time.monotonic()
                self._show(self._done)


@contextmanager
def progress_bar(title: str, *, total_bytes: int, shown: bool = True) -> Iterator[Progress]:
    """Show a bar during a with block. Nothing is shown for work of half a second."""
    if not shown:
        yield Progress(lambda done: None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield Progress(lambda done: bar.update(task, completed=done))
