"""Blocking, with a deadline and an account of the time it took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lohan_fx.errors import TransferError

from .recorder import About, Recorder

_POLL_S = 50e-6


class Waits:
    """Every place where the host blocks goes through here.

    `deadline_s` bounds one wait; `stall_s` adds up what was waited for, by kind. `recorder`, if any,
    is told of each wait.
    """

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.stall_s: defaultdict[str, float] = defaultdict(float)
        self.recorder: Recorder | None = None

    @contextmanager
    def counted(self, kind: str, about: About | None = None) -> Iterator[None]:
        """Count the time inside as a stall of `kind`, for the item of the move `about`."""
        recorder = self.recorder
        if recorder is not None:
            recorder.wait(kind, about)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stall_s[kind] += time.perf_counter() - start
            if recorder is not None:
                recorder.waited()

    def until(
        self, kind: str, what: str, is_done: Callable[[], bool], about: About | None = None
    ) -> None:
        """Return when `is_done()`.

        Raises:
            TransferError: it is not done after the deadline; names `what`.
        """
        if is_done():
            return
        with self.counted(kind, about):
            end = time.perf_counter() + self.deadline_s
            while not is_done():
                if time.perf_counter() > end:
                    raise TransferError(
                        f"{what} has not finished after {self.deadline_s:g} s; the device or its "
                        "driver hangs, or the deadline is too short for this machine"
                    )
                time.sleep(_POLL_S)
