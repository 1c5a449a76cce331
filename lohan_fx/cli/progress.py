"""A progress bar on stderr, where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[str], None]]:
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
