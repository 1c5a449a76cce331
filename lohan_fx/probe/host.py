"""The host: DRAM bandwidth, CPU Adam, and Adam while the link is busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch

from lohan_fx import native
from lohan_fx.runtime import AdamGroup
from lohan_fx.runtime.device import open_device
from lohan_fx.runtime.timing import seconds_per_call

from .device import pinned

_CPU = torch.device("cpu")
# Bytes of DRAM traffic that one parameter's update is: fp32 master and moments read and written,
# the gradient read and, in 16 bit, the new weight written over it.
ADAM_BYTES = {"float32": 3 * 8 + 4, "bfloat16": 3 * 8 + 2 + 2}
ADAM_GROUP = AdamGroup(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled=True)


def dram_copy_bytes_per_s(nbytes: int, *, warm_s: float, measure_s: float) -> float:
    """Bytes read plus bytes written per second by a copy of `nbytes` with all usable CPUs."""
    source, to = native.HostBuffer(nbytes), native.HostBuffer(nbytes)
    seconds = seconds_per_call(
        lambda: native.copy(to.ptr, source.ptr, nbytes), _CPU, warm_s=warm_s, measure_s=measure_s
    )
    return 2 * nbytes / seconds


def dram_triad_bytes_per_s(nbytes: int, *, warm_s: float, measure_s: float) -> float:
    """Bytes read plus bytes written per second by c = a + 3 b on fp32 arrays of `nbytes` each."""
    arrays = [_floats(max(1, nbytes // 4)) for _ in range(3)]
    a, b, c = arrays
    with _all_threads():
        seconds = seconds_per_call(
            lambda: torch.add(a, b, alpha=3, out=c), _CPU, warm_s=warm_s, measure_s=measure_s
        )
    return 3 * 4 * a.numel() / seconds


def adam_params_per_s(numel: int, dtype: str, *, warm_s: float, measure_s: float) -> float:
    """Parameters per second that the native Adam updates with all usable CPUs.

    `dtype` is that of gradients, "float32" or "bfloat16"; in 16 bit new weights are written over
    them, as in training.
    """
    return numel / seconds_per_call(_adam(numel, dtype), _CPU, warm_s=warm_s, measure_s=measure_s)


def adam_ahead_params_per_s(numel: int, *, warm_s: float, measure_s: float) -> float:
    """The same with bf16 gradients where all that is new goes to arrays of its own."""
    update = _adam(numel, "bfloat16", ahead=True)
    return numel / seconds_per_call(update, _CPU, warm_s=warm_s, measure_s=measure_s)


def adam_while_copying(
    device: torch.device, numel: int, nbytes: int, *, warm_s: float, measure_s: float
) -> tuple[float, float]:
    """(parameters per second of Adam in bf16, bytes per second of copies in both directions), at the
    same time; copies are of `nbytes` each way."""
    seam = open_device(device)
    update = _adam(numel, "bfloat16")
    stop = threading.Event()
    done: list[float] = []  # when each pair of copies was complete

    def keep_copying() -> None:
        with pinned(seam, nbytes) as up, pinned(seam, nbytes) as down:
            to, source = seam.empty(up.numel()), seam.empty(down.numel())
            while not stop.is_set():
                for arrival in (seam.copy_in(to, up), seam.copy_out(down, source)):
                    seam.wait(arrival)
                seam.synchronize()
                done.append(time.perf_counter())

    copies = threading.Thread(target=keep_copying)
    copies.start()
    try:
        start = time.perf_counter()
        while not done and copies.is_alive() and time.perf_counter() < start + 60:
            time.sleep(0.001)
        start = time.perf_counter()
        seconds = seconds_per_call(update, _CPU, warm_s=warm_s, measure_s=measure_s)
        end = time.perf_counter()
    finally:
        stop.set()
        copies.join()
    moved = 2 * nbytes * sum(start <= at <= end for at in done)
    return numel / seconds, moved / (end - start)


def _adam(numel: int, dtype: str, *, ahead: bool = False) -> Callable[[], None]:
    """One update of `numel` parameters."""
    master, exp_avg, exp_avg_sq = (_floats(numel) for _ in range(3))
    half = dtype != "float32"
    grad = out = _floats(-(-numel // 2) if half else numel)
    new: list[torch.Tensor] = []
    if ahead:
        new = [_floats(numel) for _ in range(3)]
        out = _floats(-(-numel // 2))

    def run() -> None:
        to_master, to_exp_avg, to_exp_avg_sq = [array.data_ptr() for array in new] or [0, 0, 0]
        native.adam_update(
            master.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            grad.data_ptr(),
            dtype,
            out.data_ptr() if half else 0,
            dtype if half else None,
            numel,
            **asdict(ADAM_GROUP),
            step=1,
            new_master_ptr=to_master,
            new_exp_avg_ptr=to_exp_avg,
            new_exp_avg_sq_ptr=to_exp_avg_sq,
        )

    return run


def _floats(numel: int) -> torch.Tensor:
    """Zeros in pre-faulted huge pages, as the runtime has them."""
    return torch.frombuffer(native.HostBuffer(4 * numel), dtype=torch.float32)[:numel]


@contextmanager
def _all_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(native.usable_cpus())
    try:
        yield
    finally:
        torch.set_num_threads(before)
