"""Progress bars for long work; none where standard error is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_of_bytes(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Within, call what this gives with the bytes done since the last call."""
    if total_bytes < 64 << 20 or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda nbytes: bar.advance(task, nbytes)


@contextmanager
def progress_of_pieces(what: str, total: int | None) -> Iterator[Callable[[str], None]]:
    """Yields a function to call after each of `total` pieces of work (None: not known how many).

    It takes what is being done next, for the bar's label.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(Text(what).markup, total=total)

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=Text(f"{what}: {label}").markup)

        yield advance
