"""Everything on its way to the GPU: weights of buckets and swapped activations, from DRAM or SSD.

[Note: read-ahead in program order]
What lives on SSD is read into the inbound staging arena strictly in the order in which the program
asks for it, as early as the arena has room and the bytes on SSD are valid. Because the order is the
program's, everything that holds arena space when the host blocks for an item was asked for before
it, so the space always comes back and blocking cannot deadlock.
"""

from __future__ import annotations

import contextlib
import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from lohan_fx.errors import TransferError

from .device import Arrival, Device
from .memory import Arena, DeviceBytes, Pools, Span
from .waits import Waits


class IncomingState(enum.Enum):
    """Where the bytes of one item are, besides at rest.

    PLANNED: nowhere else.
    READING: being read from SSD into the arena.
    LANDED: in the arena.
    ARRIVING: being copied into a device buffer; the source must stay until the arrival.
    RECEIVED: in the device buffer, and the compute stream waits for it.
    """

    PLANNED = enum.auto()
    READING = enum.auto()
    LANDED = enum.auto()
    ARRIVING = enum.auto()
    RECEIVED = enum.auto()


class Source(Protocol):
    """What an item is read from."""

    name: str
    nbytes: int

    def is_valid(self) -> bool:
        """May the bytes at rest be read now?"""
        ...

    def make_valid(self) -> None:
        """Block until they may."""
        ...

    def host(self) -> torch.Tensor | None:
        """The bytes in DRAM; None where they are on SSD."""
        ...

    def on_ssd(self) -> tuple[int, int]:
        """Extent and byte offset."""
        ...

    def after(self) -> Sequence[Arrival]:
        """Copies out that the copy in must follow."""
        ...


# The op that asks for an item, and the index of its bucket or slot.
Key = tuple[str, int]


@dataclass(slots=True)
class Incoming:
    key: Key
    source: Source
    state: IncomingState = IncomingState.PLANNED
    span: Span | None = None
    ticket: int = 0
    device: DeviceBytes | None = None
    mark: Arrival | None = None  # of the compute stream, when `device` was taken
    arrival: Arrival | None = None


@dataclass(slots=True)
class _Queue:
    """What one pass (or a forward and its backward) asks for."""

    token: int
    reads: list[Incoming]  # those on SSD, in program order
    by_key: dict[Key, deque[Incoming]]
    next_read: int = 0
    wanted: list[Incoming] = field(default_factory=list)  # requested, not yet being copied


class Inbound:
    """Reads ahead, copies in, and hands over device buffers."""

    def __init__(self, pools: Pools, device: Device, waits: Waits, arena: Arena | None) -> None:
        self._pools = pools
        self._device = device
        self._waits = waits
        self._arena = arena
        self._queue = _Queue(0, [], {})
        self._occupants: deque[Incoming] = deque()  # hold arena space, in program order
        self._held: dict[int, Incoming] = {}  # hold device memory, by id

    @property
    def token(self) -> int:
        """What the present queue was started for."""
        return self._queue.token

    def held_bytes(self, op: str) -> int:
        """Device memory of the items that this op has asked for."""
        return sum(item.source.nbytes for item in self._held.values() if item.key[0] == op)

    def start(self, token: int, items: Sequence[tuple[Key, Source]]) -> None:
        """Forget the present queue and begin to read ahead for `items`, which are in program order."""
        self.cancel()
        reads: list[Incoming] = []
        by_key: dict[Key, deque[Incoming]] = {}
        for key, source in items:
            item = Incoming(key, source)
            by_key.setdefault(key, deque()).append(item)
            if source.host() is None:
                reads.append(item)
        self._queue = _Queue(token, reads, by_key)
        self.pump()

    def request(self, key: Key) -> Incoming:
        """Start bringing the next planned item under `key`; never blocks."""
        item = self._queue.by_key[key].popleft()
        # Taken here, where the plan counts it from. The mark is the last compute that may still use
        # the memory: a copy that starts late need not wait for what was queued since.
        item.device = self._pools.device_bytes(item.source.nbytes, item.source.name)
        item.mark = self._device.mark()
        self._held[id(item)] = item
        self._queue.wanted.append(item)
        self.pump()
        return item

    def receive(self, item: Incoming) -> DeviceBytes:
        """Block until the copy is under way and let the compute stream wait for it.

        Raises:
            TransferError: reading failed or took too long; names the item.
        """
        assert item.state is not IncomingState.RECEIVED, f"{item.source.name} received twice"
        self.pump()
        while item.arrival is None:
            self._unblock(item)
            self.pump()
        assert item.device is not None
        self._device.wait(item.arrival)
        item.state = IncomingState.RECEIVED
        return item.device

    def release(self, item: Incoming) -> None:
        """Give the device buffer of a received item back, in stream order."""
        assert item.state is IncomingState.RECEIVED and item.device is not None
        del self._held[id(item)]
        self._pools.free_device(item.device)
        item.device = None

    def pump(self) -> None:
        """Do all that is possible without blocking."""
        self._free_passed()
        self._read_ahead()
        wanted = self._queue.wanted
        if wanted:
            self._queue.wanted = [item for item in wanted if not self._issue(item)]

    def cancel(self) -> None:
        """Forget the queue and what it holds on the device; blocks for reads in flight only.

        What is being copied from the arena keeps its space until the copy has passed.
        """
        engine = self._pools.engine
        if self._held:
            self._device.join()
            for item in self._held.values():
                assert item.device is not None
                self._pools.free_device(item.device)
            self._held.clear()
        self._queue = _Queue(0, [], {})
        for item in [item for item in self._occupants if item.arrival is None]:
            if item.state is IncomingState.READING and engine is not None:
                wait = self._waits.counted("ssd_read", item.key)
                with wait, contextlib.suppress(TransferError):
                    engine.wait(item.ticket, self._waits.deadline_s)
                if not engine.done(item.ticket):
                    raise TransferError(f"reading {item.source.name} does not end; close the model")
            assert self._arena is not None and item.span is not None
            self._arena.give(item.span)
            self._occupants.remove(item)

    def _free_passed(self) -> None:
        occupants = self._occupants
        while occupants and occupants[0].arrival is not None and occupants[0].arrival.is_complete():
            item = occupants.popleft()
            assert self._arena is not None and item.span is not None
            self._arena.give(item.span)
            item.span = None

    def _read_ahead(self) -> None:
        queue = self._queue
        while queue.next_read < len(queue.reads):
            item = queue.reads[queue.next_read]
            if not item.source.is_valid():
                return
            assert self._arena is not None and self._pools.engine is not None
            span = self._arena.take(item.source.nbytes)
            if span is None:
                return
            extent, offset = item.source.on_ssd()
            item.span = span
            try:
                item.ticket = self._pools.engine.read(
                    extent, offset, self._arena.address(span), item.source.nbytes, item.source.name
                )
            except BaseException:
                self._arena.give(span)
                raise
            item.state = IncomingState.READING
            self._occupants.append(item)
            queue.next_read += 1

    def _issue(self, item: Incoming) -> bool:
        """Start the copy to the device if the bytes are in host memory."""
        source = item.source.host()
        if source is not None:
            if not item.source.is_valid():
                return False
        else:
            if item.state is IncomingState.READING:
                self._land(item)
            if item.state is not IncomingState.LANDED:
                return False
            assert self._arena is not None and item.span is not None
            source = self._arena.view(item.span, item.source.nbytes)
        assert item.device is not None and item.mark is not None
        after = (item.mark, *item.source.after())
        item.arrival = self._device.copy_in(item.device.bytes, source, after, item.key)
        item.state = IncomingState.ARRIVING
        return True

    def _land(self, item: Incoming) -> None:
        engine = self._pools.engine
        assert engine is not None
        if engine.done(item.ticket):
            engine.wait(item.ticket, self._waits.deadline_s)  # raises what went wrong
            item.state = IncomingState.LANDED

    def _unblock(self, item: Incoming) -> None:
        """Block for whatever keeps `item` from being copied. See [Note: read-ahead in program order]"""
        if item.source.host() is not None:
            item.source.make_valid()
            return
        engine = self._pools.engine
        assert engine is not None
        if item.state is IncomingState.READING:
            with self._waits.counted("ssd_read", item.key):
                engine.wait(item.ticket, self._waits.deadline_s)
            return
        head = self._queue.reads[self._queue.next_read]
        if not head.source.is_valid():
            head.source.make_valid()
            return
        if not self._occupants:
            return  # an update has finished since `item` was last tried
        oldest = self._occupants[0]
        if oldest.state is IncomingState.READING:
            with self._waits.counted("ssd_read", oldest.key):
                engine.wait(oldest.ticket, self._waits.deadline_s)
            return
        assert oldest.arrival is not None, (
            f"{oldest.source.name} holds staging and was not asked for"
        )
        name = f"the copy of {oldest.source.name}"
        self._waits.until("staging", name, oldest.arrival.is_complete, oldest.key)
