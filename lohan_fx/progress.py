"""Progress of long work on standard error; nothing where that is no terminal.

All that is under way at a time shares one display, a line each, which goes away with the last of them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SMALLEST_BYTES = 64 << 20  # less is over before a bar would be seen


class _Display:
    """One rich Progress while anything is shown. Lines may come from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bars: Any = None
        self._num_lines = 0

    @contextmanager
    def line(self, what: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
        """Yields the display's `update` of a new line; `unit` is "bytes", "pieces", "time" or "text"."""
        from rich.text import Text

        with self._lock:
            if self._bars is None:
                self._bars = _bars()
                self._bars.start()
            bars = self._bars
            self._num_lines += 1
            task = bars.add_task(Text(what).markup, total=total, unit=unit)

        def update(advance: int = 0, words: str | None = None) -> None:
            changes: dict[str, Any] = {} if words is None else {"description": Text(words).markup}
            bars.update(task, advance=advance, **changes)

        try:
            yield update
        finally:
            with self._lock:
                bars.remove_task(task)
                self._num_lines -= 1
                if not self._num_lines:
                    bars.stop()
                    self._bars = None


_display = _Display()


def _bars() -> Any:
    """Columns that look at the unit of each line."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class OfUnit(ProgressColumn):
        """A column for lines of some units, empty for others."""

        max_refresh = None

        def __init__(self, column: ProgressColumn, *units: str) -> None:
            super().__init__()
            self._column, self._units = column, units

        def render(self, task: Task) -> Any:
            return self._column.render(task) if task.fields["unit"] in self._units else Text("")

    return Progress(
        TextColumn("{task.description}"),
        OfUnit(BarColumn(), "bytes", "pieces"),
        OfUnit(DownloadColumn(), "bytes"),
        OfUnit(TransferSpeedColumn(), "bytes"),
        OfUnit(TimeRemainingColumn(), "bytes"),
        OfUnit(MofNCompleteColumn(), "pieces"),
        OfUnit(TimeElapsedColumn(), "time", "pieces"),
        console=Console(stderr=True),
        transient=True,
    )


def is_shown() -> bool:
    """True where somebody may be looking."""
    return sys.stderr.isatty()


@contextmanager
def progress_of_bytes(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Within, call what this gives with the bytes done since the last call."""
    if total_bytes < _SMALLEST_BYTES or not is_shown():
        yield lambda nbytes: None
        return
    with _display.line(what, total_bytes, "bytes") as update:
        yield lambda nbytes: update(nbytes)


@contextmanager
def progress_of_pieces(what: str, total: int | None) -> Iterator[Callable[[str], None]]:
    """Yields a function to call after each of `total` pieces of work (None: not known how many).

    It takes what is being done next, for the bar's label.
    """
    if not is_shown():
        yield lambda _: None
        return
    with _display.line(what, total, "pieces") as update:
        yield lambda label: update(1, f"{what}: {label}")


@contextmanager
def progress_of_phase(what: str) -> Iterator[Callable[[str], None]]:
    """Shows what is being done, and for how long; call what this gives with other words for it."""
    if not is_shown():
        yield lambda _: None
        return
    with _display.line(what, None, "time") as update:
        yield lambda words: update(words=words)


@contextmanager
def live_text() -> Iterator[Callable[[str], None]]:
    """A line of text, as often changed as wanted, below which others may come and go."""
    if not is_shown():
        yield lambda _: None
        return
    with _display.line("", None, "text") as update:
        yield lambda words: update(words=words)
