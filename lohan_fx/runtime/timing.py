"""How long a call takes on a device, once that is as warm as it gets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# One batch of calls is about this long: far above what a clock or a launch costs.
_BATCH_S = 0.01
_MOST_CALLS = 1000
_LEAST_BATCHES = 3


def seconds_per_call(
    run: Callable[[], object],
    device: torch.device,
    *,
    warm_s: float = 0.05,
    measure_s: float = 0.1,
) -> float:
    """Median seconds of one call of `run`, back to back with others, by batches.

    On CUDA, device time between events on the current stream; elsewhere host time. Runs for about
    `warm_s` plus `measure_s` in all, and at least five calls.
    """
    run()  # the first call may compile or allocate
    one = _batch(run, device, 1)
    calls = max(1, min(_MOST_CALLS, int(_BATCH_S / max(one, 1e-7))))
    end = time.perf_counter() + warm_s
    while time.perf_counter() < end:
        _batch(run, device, calls)
    seconds: list[float] = []
    end = time.perf_counter() + measure_s
    while len(seconds) < _LEAST_BATCHES or time.perf_counter() < end:
        seconds.append(_batch(run, device, calls))
    return statistics.median(seconds)


def _batch(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Mean seconds of `calls` calls."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        for _ in range(calls):
            run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / calls
