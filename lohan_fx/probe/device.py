"""The device and its link: matrix products, memory, copies in both directions, pinned memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lohan_fx.native import HostBuffer
from lohan_fx.runtime.device import Device, open_device
from lohan_fx.runtime.timing import seconds_per_call

_LEAST_MATMUL = 256


def matmul_flops_per_s(
    device: torch.device, dtype: torch.dtype, size: int, *, warm_s: float, measure_s: float
) -> float:
    """FLOP/s of a product of two [n, n] matrices of random numbers, n at most `size`.

    n is a power of two from 256 on, less than `size` where one such product takes over `measure_s`.
    `warm_s` should be seconds on a GPU: the clock that its power limit allows settles only then.
    (Zeros would draw less power, and be faster than any real product.)
    """
    n = min(size, _LEAST_MATMUL)
    while True:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)
        product = functools.partial(torch.mm, a, b, out=out)
        seconds = seconds_per_call(product, device, warm_s=0.0, measure_s=0.0)
        if 2 * n > size or 4 * seconds > measure_s:
            break
        n *= 2
    if seconds < measure_s:
        seconds = seconds_per_call(product, device, warm_s=warm_s, measure_s=measure_s)
    return 2 * n**3 / seconds


def memory_bytes_per_s(
    device: torch.device, nbytes: int, *, warm_s: float, measure_s: float
) -> float:
    """Bytes per second read and written by c = a + b, each of `nbytes` in fp32."""
    a, b, c = (
        torch.ones(max(1, nbytes // 4), dtype=torch.float32, device=device) for _ in range(3)
    )
    seconds = seconds_per_call(
        lambda: torch.add(a, b, out=c), device, warm_s=warm_s, measure_s=measure_s
    )
    return 3 * 4 * a.numel() / seconds


@dataclass(frozen=True, slots=True)
class LinkRates:
    """Bytes per second of each direction alone, and of each while both are busy."""

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    both_each_bytes_per_s: float


@contextmanager
def pinned(device: Device, nbytes: int) -> Iterator[torch.Tensor]:
    """A uint8 tensor over host memory that the runtime's way made: pre-faulted, then registered."""
    buffer = HostBuffer(nbytes)
    device.pin(buffer.ptr, buffer.nbytes)
    try:
        yield torch.frombuffer(buffer, dtype=torch.uint8)
    finally:
        device.synchronize()
        device.unpin(buffer.ptr)


def link_rates(device: torch.device, nbytes: int, *, warm_s: float, measure_s: float) -> LinkRates:
    """Copies of `nbytes` between pinned host memory and the device, as the runtime makes them."""
    seam = open_device(device)
    with pinned(seam, nbytes) as up, pinned(seam, nbytes) as down:
        to, source = seam.empty(up.numel()), seam.empty(down.numel())
        source.zero_()

        def h2d() -> None:
            seam.wait(seam.copy_in(to, up))

        def d2h() -> None:
            seam.wait(seam.copy_out(down, source))

        def both() -> None:
            arrivals = (seam.copy_in(to, up), seam.copy_out(down, source))
            for arrival in arrivals:
                seam.wait(arrival)

        rates = [
            up.numel() / seconds_per_call(run, device, warm_s=warm_s, measure_s=measure_s)
            for run in (h2d, d2h, both)
        ]
    return LinkRates(*rates)


def pinned_alloc_bytes_per_s(device: torch.device, nbytes: int) -> float:
    """How fast the runtime gets `nbytes`: huge pages, touched with all cores first, registered then."""
    seam = open_device(device)
    seam.synchronize()
    start = time.perf_counter()
    with pinned(seam, nbytes):
        return nbytes / (time.perf_counter() - start)


def plain_pinned_alloc_bytes_per_s(nbytes: int) -> float:
    """How fast torch gets pinned memory in its plain way; it keeps the memory. Needs CUDA."""
    start = time.perf_counter()
    plain = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    rate = nbytes / (time.perf_counter() - start)
    del plain
    return rate
