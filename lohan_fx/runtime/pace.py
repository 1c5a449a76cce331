"""How long steps take by the host's clock, without looking at the device."""

from __future__ import annotations

import statistics
import time
from collections import deque
from itertools import pairwise

_LATEST = 32


class Pace:
    """A step lasts from its first forward to that of the next one."""

    def __init__(self) -> None:
        self._begins: deque[float] = deque(maxlen=_LATEST + 1)
        self._stepped = True

    def forward(self) -> None:
        """A training forward begins; the first one after a step opens the next step."""
        if self._stepped:
            self._stepped = False
            self._begins.append(time.perf_counter())

    def step(self) -> None:
        """The optimizer's step has been called."""
        self._stepped = True

    @property
    def step_s(self) -> float | None:
        """Median seconds of the latest steps but the first of all, which compiles; None before two."""
        spent = [after - before for before, after in pairwise(self._begins)]
        return statistics.median(spent) if spent else None
