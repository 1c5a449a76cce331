"""Accounted memory in three tiers, and the staging arenas in between.

Everything of size that the runtime holds is taken from here, so that a plan's peak per tier is also
an upper bound in a run. Sizes are bytes; host and SSD sizes are whole 4096-byte pages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Set
from dataclasses import dataclass

import torch

from lohan_fx import native
from lohan_fx.errors import LohanError
from lohan_fx.program import Tier

from .device import Device
from .waits import Waits

PAGE = 4096

# Blocking copies between SSD and elsewhere (placing, checkpoints, state_dict) pass through this much:
# a few requests in flight for large ones, little memory for single parameters.
_BOUNCE_BYTES = 4 << 20
_LARGE_BOUNCE_BYTES = 64 << 20
_BOUNCE_SLICES = 8


def pages(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


class Account:
    """Bytes in use in one tier, never above `budget_bytes` (None: no limit)."""

    def __init__(self, tier: Tier, budget_bytes: int | None) -> None:
        self.tier = tier
        self.budget_bytes = budget_bytes
        self.current_bytes = 0
        self.peak_bytes = 0

    def take(self, nbytes: int, what: str) -> None:
        """Count `nbytes` for `what`.

        Raises:
            LohanError: the budget would be exceeded; nothing is counted then.
        """
        wanted = self.current_bytes + nbytes
        if self.budget_bytes is not None and wanted > self.budget_bytes:
            raise LohanError(
                f"{what} needs {nbytes:,} bytes of {self.tier} memory, but "
                f"{self.current_bytes:,} bytes of the budget of "
                f"{self.budget_bytes:,} bytes are in use; raise the {self.tier} budget"
            )
        self.current_bytes = wanted
        self.peak_bytes = max(self.peak_bytes, wanted)

    @property
    def room_bytes(self) -> int | None:
        """What the budget has left; None without a limit."""
        return None if self.budget_bytes is None else self.budget_bytes - self.current_bytes

    def hold(self, nbytes: int) -> None:
        """Count bytes that somebody else has allocated and the runtime keeps alive."""
        self.current_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def give(self, nbytes: int) -> None:
        assert 0 <= nbytes <= self.current_bytes, (nbytes, self.current_bytes)
        self.current_bytes -= nbytes


@dataclass(slots=True)
class HostBytes:
    """A host allocation of whole pages; `bytes` is a uint8 tensor over all of it."""

    buffer: native.HostBuffer | None
    bytes: torch.Tensor
    pinned: bool
    address: int

    @property
    def nbytes(self) -> int:
        return self.bytes.numel()


@dataclass(slots=True)
class DeviceBytes:
    """A device allocation; `bytes` is a uint8 tensor of exactly its size."""

    bytes: torch.Tensor
    nbytes: int


def slices(memory: HostBytes, most: int) -> list[HostBytes]:
    """At most `most` equal parts of whole pages; they do not own their memory."""
    num = min(most, memory.nbytes // PAGE)
    size = memory.nbytes // num // PAGE * PAGE
    return [
        HostBytes(
            None, memory.bytes[i * size : (i + 1) * size], memory.pinned, memory.address + i * size
        )
        for i in range(num)
    ]


class Pools:
    """The three tiers. Owns every host buffer and every extent until close()."""

    def __init__(
        self,
        device: Device,
        engine: native.FileEngine | None,
        waits: Waits,
        *,
        gpu_bytes: int | None,
        dram_bytes: int | None,
        ssd_bytes: int | None,
    ) -> None:
        self.device = device
        self.engine = engine
        self.waits = waits
        self.gpu = Account(Tier.GPU, gpu_bytes)
        self.dram = Account(Tier.DRAM, dram_bytes)
        self.ssd = Account(Tier.SSD, ssd_bytes)
        self._hosts: dict[int, HostBytes] = {}
        self._extents: dict[int, int] = {}
        self._bounce: HostBytes | None = None
        self._bounce_is_most = False  # there was no room for a larger one

    # GPU

    def device_bytes(self, nbytes: int, what: str) -> DeviceBytes:
        self.gpu.take(nbytes, what)
        try:
            return DeviceBytes(self.device.empty(nbytes), nbytes)
        except BaseException:
            self.gpu.give(nbytes)
            raise

    def free_device(self, memory: DeviceBytes) -> None:
        """Drop the runtime's reference; the bytes go back when the last view is gone."""
        memory.bytes = torch.empty(0, dtype=torch.uint8)
        self.gpu.give(memory.nbytes)
        memory.nbytes = 0

    # DRAM

    def host_bytes(self, nbytes: int, what: str, *, pinned: bool) -> HostBytes:
        """Zeroed pages, at least `nbytes`.

        Raises:
            LohanError: over the budget, or the driver refuses to pin.
            MemoryError: the host does not have them.
        """
        size = max(pages(nbytes), PAGE)
        room = self.dram.room_bytes
        if room is not None and room < size:
            self.drop_bounce()
        self.dram.take(size, what)
        try:
            return self._map(size, pinned=pinned)
        except BaseException:
            self.dram.give(size)
            raise

    def _map(self, size: int, *, pinned: bool) -> HostBytes:
        buffer = native.HostBuffer(size)
        memory = HostBytes(buffer, torch.frombuffer(buffer, dtype=torch.uint8), pinned, buffer.ptr)
        if pinned:
            self.device.pin(memory.address, size)
        self._hosts[memory.address] = memory
        return memory

    def pin(self, memory: HostBytes, on: bool) -> None:
        """Pin an allocation where it is, or no longer.

        Raises LohanError where the driver refuses; it is as it was then.
        """
        if on and not memory.pinned:
            self.device.pin(memory.address, memory.nbytes)
        elif memory.pinned and not on:
            self.device.unpin(memory.address)
        memory.pinned = on

    def free_host(self, memory: HostBytes) -> None:
        """Give the pages back; nothing may be in flight to or from them."""
        del self._hosts[memory.address]
        self.dram.give(memory.nbytes)
        self._unmap(memory)

    def _unmap(self, memory: HostBytes) -> None:
        try:
            if memory.pinned:
                self.device.unpin(memory.address)
        finally:
            memory.bytes = torch.empty(0, dtype=torch.uint8)
            memory.buffer = None

    def free_hosts_but(self, kept: Set[int]) -> None:
        """Free every host allocation whose address is not in `kept`; see `host_addresses`."""
        for address in self._hosts.keys() - kept:
            self.free_host(self._hosts[address])

    def host_addresses(self) -> Set[int]:
        return set(self._hosts)

    # SSD

    def extent(self, nbytes: int, what: str) -> int:
        """A preallocated span on SSD, at least `nbytes`; its contents are undefined.

        Raises:
            LohanError: no directory was given, or the budget or the disk is full.
        """
        if self.engine is None:
            raise LohanError(f"{what} is placed on SSD, but no SSD directory was given")
        size = max(pages(nbytes), PAGE)
        self.ssd.take(size, what)
        try:
            extent = self.engine.allocate(size)
        except BaseException:
            self.ssd.give(size)
            raise
        self._extents[extent] = size
        return extent

    def free_extent(self, extent: int) -> None:
        assert self.engine is not None
        self.ssd.give(self._extents.pop(extent))
        self.engine.release(extent)

    def bounce(self, nbytes: int = PAGE) -> list[HostBytes]:
        """Buffers of equal size for blocking SSD copies, to be used round robin.

        Larger ones where `nbytes` are to be copied at once; never more than the budget has room for,
        but at least one page. Plans ignore them, so they make way for whatever else wants memory.
        """
        most = _BOUNCE_BYTES if nbytes <= _BOUNCE_BYTES else _LARGE_BOUNCE_BYTES
        if self._bounce is not None and self._bounce.nbytes < most and not self._bounce_is_most:
            self.drop_bounce()
        if self._bounce is None:
            room = self.dram.room_bytes
            size = most if room is None else min(most, room // PAGE * PAGE)
            self._bounce_is_most = size < most
            size = max(size, PAGE)
            self.dram.hold(size)
            self._bounce = self._map(size, pinned=False)
        return slices(self._bounce, _BOUNCE_SLICES)

    def lasting_bounce(self) -> HostBytes:
        """A small one beyond the budget, for one reader in another thread; gone when it is dropped."""
        buffer = native.HostBuffer(_BOUNCE_BYTES)
        return HostBytes(buffer, torch.frombuffer(buffer, dtype=torch.uint8), False, buffer.ptr)

    def forget_bounce(self) -> None:
        """Keep it until close(), for nothing: a transfer that does not end may still touch it."""
        self._bounce = None

    def drop_bounce(self) -> None:
        if self._bounce is not None:
            self.free_host(self._bounce)
            self._bounce = None

    def close(self) -> None:
        """Give all host memory back, in use or not; nothing may be in flight.

        Extents are the engine's: they go with it, which is closed before.
        """
        self._bounce = None
        while self._hosts:
            _, memory = self._hosts.popitem()
            self.dram.give(memory.nbytes)
            with contextlib.suppress(LohanError, RuntimeError):  # a device that failed cannot unpin
                self._unmap(memory)
        self.ssd.give(sum(self._extents.values()))
        self._extents.clear()
        self.gpu.give(self.gpu.current_bytes)


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open [offset, offset + nbytes) of an arena."""

    offset: int
    nbytes: int


class Arena:
    """First-fit spans of one pinned host buffer, each of whole pages."""

    def __init__(self, memory: HostBytes) -> None:
        self.memory = memory
        self._free: list[Span] = [Span(0, memory.nbytes)]  # by offset, never adjacent

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def take(self, nbytes: int) -> Span | None:
        """A free span of at least `nbytes`; None where there is none now."""
        size = max(pages(nbytes), PAGE)
        for index, hole in enumerate(self._free):
            if hole.nbytes >= size:
                rest = Span(hole.offset + size, hole.nbytes - size)
                self._free[index : index + 1] = [rest] if rest.nbytes else []
                return Span(hole.offset, size)
        return None

    def give(self, span: Span) -> None:
        joined: list[Span] = []
        for hole in sorted([*self._free, span], key=lambda s: s.offset):
            if joined and joined[-1].offset + joined[-1].nbytes == hole.offset:
                joined[-1] = Span(joined[-1].offset, joined[-1].nbytes + hole.nbytes)
            else:
                joined.append(hole)
        self._free = joined

    def view(self, span: Span, nbytes: int) -> torch.Tensor:
        return self.memory.bytes[span.offset : span.offset + nbytes]

    def address(self, span: Span) -> int:
        return self.memory.address + span.offset


def require_fit(nbytes: int, arena: Arena | None, what: str, option: str) -> None:
    """Raise LohanError unless `nbytes` fit the (empty) arena."""
    have = arena.nbytes if arena is not None else 0
    if pages(nbytes) > have:
        raise LohanError(
            f"{what} needs {pages(nbytes):,} bytes of staging at once, but {option} is {have:,}; raise it"
        )
