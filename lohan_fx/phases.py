"""Seconds that are spent before steps can run, by what on; a terminal shows what goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from .progress import progress_of_phase

# What a terminal shows; the rest has bars of its own, or is short.
_SHOWN = {
    "measure the machine": "Measuring this machine",
    "plan": "Planning",
    "split": "Splitting the graph",
    "lower forward": "Compiling the forward",
    "lower backward": "Compiling the backward",
    "await kernels": "Compiling kernels",
    "place again": "Placing anew",
}


class Phases:
    """`seconds` by phase, of all captures so far. Phases may be nested: each second counts once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]  # seconds of what is timed within each open `timed` block
        self._call_began = 0.0, 0.0  # when, and what had been timed by then

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count what the block takes, less what is timed within it."""
        start = time.perf_counter()
        words = _SHOWN.get(phase)
        self._inner.append(0.0)
        try:
            with nullcontext() if words is None else progress_of_phase(words):
                yield
        finally:
            took = time.perf_counter() - start
            self._add(phase, took - self._inner.pop())
            self._inner[-1] += took

    def call_begins(self) -> None:
        """A call of the model, in which something may be captured."""
        self._call_began = time.perf_counter(), self._inner[0]

    def capture_ends(self) -> None:
        """What this call captured can run: the seconds in which nothing was timed were torch's."""
        began, timed = self._call_began
        elapsed = time.perf_counter() - began
        self._add("Dynamo and AOTAutograd", elapsed - (self._inner[0] - timed))

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
