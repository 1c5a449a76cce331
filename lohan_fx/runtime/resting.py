"""One allocation of a bucket in one tier, and blocking access to its bytes."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from lohan_fx.errors import TransferError
from lohan_fx.program import Tier

from .memory import PAGE, DeviceBytes, HostBytes, Pools, pages, slices


class Resting(Protocol):
    """One allocation of a bucket in one tier; offsets and sizes are bytes."""

    tier: Tier

    def read(self, offset: int, out: torch.Tensor) -> None:
        """Fill `out`, a 1-D uint8 CPU tensor, from `offset` on."""
        ...

    def write(self, offset: int, data: torch.Tensor) -> None:
        """Store `data`, a 1-D uint8 tensor, from `offset` on."""
        ...

    def zero(self, offset: int, nbytes: int) -> None: ...
    def free(self) -> None: ...


class _InMemory:
    """Bytes that a tensor is over."""

    memory: DeviceBytes | HostBytes

    def read(self, offset: int, out: torch.Tensor) -> None:
        out.copy_(self.memory.bytes[offset : offset + out.numel()])

    def write(self, offset: int, data: torch.Tensor) -> None:
        self.memory.bytes[offset : offset + data.numel()].copy_(data)

    def zero(self, offset: int, nbytes: int) -> None:
        self.memory.bytes[offset : offset + nbytes].zero_()


class OnGpu(_InMemory):
    """Bytes in device memory."""

    tier = Tier.GPU
    memory: DeviceBytes

    def __init__(self, pools: Pools, nbytes: int, what: str) -> None:
        self._pools = pools
        # A tensor made in inference mode could never be updated outside of it.
        with torch.inference_mode(False):
            self.memory = pools.device_bytes(nbytes, what)

    def free(self) -> None:
        self._pools.free_device(self.memory)


class InDram(_InMemory):
    """Bytes in host memory; pinned where a device copy touches them."""

    tier = Tier.DRAM
    memory: HostBytes

    def __init__(self, pools: Pools, nbytes: int, what: str, *, pinned: bool) -> None:
        self._pools = pools
        self.memory = pools.host_bytes(nbytes, what, pinned=pinned)

    def free(self) -> None:
        self._pools.free_host(self.memory)


class OnSsd:
    """Bytes in one extent, with several transfers in flight through the pools' bounce.

    Unaligned pieces are read, changed and written back by whole pages.
    """

    tier = Tier.SSD

    def __init__(self, pools: Pools, nbytes: int, what: str) -> None:
        self._pools = pools
        self._what = what
        self._nbytes = pages(nbytes)
        self.extent = pools.extent(nbytes, what)

    def read(self, offset: int, out: torch.Tensor, through: HostBytes | None = None) -> None:
        """See Resting; `through` is memory of whole pages to use in place of the pools' bounce,
        which belongs to the thread that runs steps."""

        def take(run: _Run, bounce: HostBytes) -> None:
            found = bounce.bytes[run.start : run.start + run.wanted]
            out[run.done : run.done + run.wanted].copy_(found)

        self._stream(False, offset, out.numel(), after=take, through=through)

    def write(self, offset: int, data: torch.Tensor) -> None:
        def put(run: _Run, bounce: HostBytes) -> None:
            edges = set()
            if run.start:
                edges.add(0)
            if run.start + run.wanted < run.nbytes:
                edges.add(run.nbytes - PAGE)
            for page in edges:
                self._wait(self._begin(False, run.base + page, bounce.address + page, PAGE))
            source = data[run.done : run.done + run.wanted]
            bounce.bytes[run.start : run.start + run.wanted].copy_(source)

        self._stream(True, offset, data.numel(), before=put)

    def zero(self, offset: int, nbytes: int) -> None:
        clean: set[int] = set()

        def put(run: _Run, bounce: HostBytes) -> None:
            if bounce.address not in clean:
                bounce.bytes.zero_()
                clean.add(bounce.address)

        assert offset % PAGE == 0
        self._stream(True, offset, min(pages(nbytes), self._nbytes - offset), before=put)

    def free(self) -> None:
        self._pools.free_extent(self.extent)

    def _begin(self, write: bool, offset: int, address: int, nbytes: int) -> int:
        engine = self._pools.engine
        assert engine is not None
        move = engine.write if write else engine.read
        return move(self.extent, offset, address, nbytes, self._what)

    def _wait(self, ticket: int) -> None:
        engine, waits = self._pools.engine, self._pools.waits
        assert engine is not None
        engine.wait(ticket, waits.deadline_s)

    def _stream(
        self,
        write: bool,
        offset: int,
        nbytes: int,
        before: Callable[[_Run, HostBytes], None] | None = None,
        after: Callable[[_Run, HostBytes], None] | None = None,
        through: HostBytes | None = None,
    ) -> None:
        """Transfer a byte range run by run, calling `before` and `after` each transfer."""
        parts = slices(through, 4) if through is not None else self._pools.bounce(nbytes)
        flight: deque[tuple[int, _Run, HostBytes]] = deque()

        def land() -> None:
            ticket, run, bounce = flight[0]
            self._wait(ticket)
            flight.popleft()
            if after is not None:
                after(run, bounce)

        try:
            with self._pools.waits.counted("placing"):
                for index, run in enumerate(_runs(offset, nbytes, parts[0].nbytes)):
                    if len(flight) == len(parts):
                        land()
                    bounce = parts[index % len(parts)]
                    if before is not None:
                        before(run, bounce)
                    ticket = self._begin(write, run.base, bounce.address, run.nbytes)
                    flight.append((ticket, run, bounce))
                while flight:
                    land()
        except BaseException:
            self._let_land(flight, through is None)
            raise

    def _let_land(self, flight: Iterable[tuple[int, _Run, HostBytes]], shared: bool) -> None:
        """After a failure: what is still in flight must not touch memory that is used again."""
        engine = self._pools.engine
        assert engine is not None
        for ticket, _, _ in flight:
            if not engine.done(ticket):
                with contextlib.suppress(TransferError):
                    self._wait(ticket)
            if not engine.done(ticket) and shared:
                self._pools.forget_bounce()


@dataclass(frozen=True, slots=True)
class _Run:
    """Pages that one transfer moves: `wanted` bytes from `start` on are those asked for, of which
    `done` came in earlier runs."""

    base: int
    nbytes: int
    start: int
    wanted: int
    done: int


def _runs(offset: int, nbytes: int, room: int) -> Iterable[_Run]:
    """Cut a byte range into runs of at most `room` bytes."""
    at, end = offset, offset + nbytes
    while at < end:
        base = at // PAGE * PAGE
        stop = min(end, base + room)
        yield _Run(base, pages(stop - base), at - base, stop - at, at - offset)
        at = stop
