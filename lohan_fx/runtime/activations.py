"""Swapped activations: out to DRAM or, through the outbound staging arena, to SSD; storage of slots."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lohan_fx.errors import LohanError
from lohan_fx.program import Program, Slot, Tier

from .device import Arrival, Device
from .layout import same_layout
from .memory import PAGE, Arena, HostBytes, Pools, Span, pages
from .recorder import About
from .waits import Waits

_SLOT_ALIGN = 512


class SlotState(enum.Enum):
    """Where the bytes of one swapped activation are.

    EMPTY: nowhere; the slot may be written.
    LEAVING: being copied from the GPU into the slot's DRAM, or into staging; the source must stay.
    WRITING: in staging, being written to SSD.
    STORED: in the slot. (A slot in DRAM goes LEAVING -> STORED at its offload_wait: from there on
        everything that touches it is ordered behind the copy by the compute stream.)
    """

    EMPTY = enum.auto()
    LEAVING = enum.auto()
    WRITING = enum.auto()
    STORED = enum.auto()


@dataclass(slots=True)
class _Cell:
    """One slot of the active program. `home` is where it is kept: a DRAM view, or extent and offset."""

    slot: Slot
    name: str
    dram: torch.Tensor | None
    ssd: tuple[int, int] | None
    state: SlotState = SlotState.EMPTY
    source: torch.Tensor | None = None  # flat bytes on the GPU, until offload_wait
    kept: torch.Tensor | None = None  # what was offloaded, for the poison
    arrival: Arrival | None = None
    span: Span | None = None
    ticket: int = 0

    @property
    def move(self) -> About:
        """What takes it out."""
        return ("offload", self.slot.index)


class SlotSource:
    """A slot as seen by the read-ahead. Implements inbound.Source."""

    def __init__(self, slots: Slots, cell: _Cell) -> None:
        self._slots = slots
        self._cell = cell
        self.name = cell.name
        self.nbytes = cell.slot.nbytes

    def is_valid(self) -> bool:
        return self._cell.state is SlotState.STORED

    def make_valid(self) -> None:
        self._slots.store(self._cell)

    def host(self) -> torch.Tensor | None:
        return self._cell.dram

    def on_ssd(self) -> tuple[int, int]:
        assert self._cell.ssd is not None
        return self._cell.ssd

    def after(self) -> Sequence[Arrival]:
        return () if self._cell.arrival is None else (self._cell.arrival,)


class Slots:
    """The slots of one program at a time, and activations on their way out."""

    def __init__(
        self, pools: Pools, device: Device, waits: Waits, arena: Arena | None, *, poison: bool
    ) -> None:
        self._pools = pools
        self._device = device
        self._waits = waits
        self._arena = arena
        self._poison = poison
        self._program: int | None = None
        self._host: HostBytes | None = None
        self._extent: int | None = None
        self._cells: dict[int, _Cell] = {}
        self._leaving: deque[_Cell] = deque()  # to SSD, in order of their copies
        self._writing: deque[_Cell] = deque()

    def activate(self, program: Program) -> None:
        """Give `program` its slot storage; another program's is released first.

        Raises:
            LohanError: no room for it in DRAM or on SSD.
        """
        if self._program == program.index:
            return
        self.close()
        name = f"the activation slots of program {program.index}"
        offsets: dict[int, int] = {}
        dram_bytes = ssd_bytes = 0
        for slot in program.slots:
            if slot.tier is Tier.DRAM:
                offsets[slot.index] = dram_bytes
                dram_bytes += -(-slot.nbytes // _SLOT_ALIGN) * _SLOT_ALIGN
            else:
                offsets[slot.index] = ssd_bytes
                ssd_bytes += max(pages(slot.nbytes), PAGE)
        if dram_bytes:
            self._host = self._pools.host_bytes(dram_bytes, name, pinned=True)
        if ssd_bytes:
            self._extent = self._pools.extent(ssd_bytes, name)
        for slot in program.slots:
            at = offsets[slot.index]
            where = f"activation {slot.name}"
            if slot.tier is Tier.DRAM:
                assert self._host is not None
                dram = self._host.bytes[at : at + slot.nbytes]
                self._cells[slot.index] = _Cell(slot, where, dram, None)
            else:
                assert self._extent is not None
                self._cells[slot.index] = _Cell(slot, where, None, (self._extent, at))
        self._program = program.index

    @property
    def dram_bytes(self) -> int:
        """Host memory of the active program's slots."""
        return 0 if self._host is None else self._host.nbytes

    def source(self, index: int) -> SlotSource:
        return SlotSource(self, self._cells[index])

    def slot(self, index: int) -> Slot:
        return self._cells[index].slot

    def offload(self, index: int, x: torch.Tensor) -> None:
        """Start moving `x` out; blocks only for room in the staging arena."""
        cell = self._cells[index]
        if cell.state is not SlotState.EMPTY:
            raise LohanError(f"{cell.name} is offloaded twice in one forward")
        slot = cell.slot
        if not same_layout(slot.shape, slot.stride, x.shape, x.stride()):
            moved = torch.empty_strided(slot.shape, slot.stride, dtype=x.dtype, device=x.device)
            x = moved.copy_(x)
        cell.kept = x
        span_items = slot.nbytes // x.element_size()
        cell.source = (
            x.detach().as_strided((span_items,), (1,), x.storage_offset()).view(torch.uint8)
        )
        if cell.dram is not None:
            to = cell.dram
        else:
            assert self._arena is not None
            cell.span = self._stage(slot.nbytes, cell.name)
            to = self._arena.view(cell.span, slot.nbytes)
        cell.arrival = self._device.copy_out(to, cell.source, about=cell.move)
        cell.state = SlotState.LEAVING
        if cell.dram is None:
            self._leaving.append(cell)
            self.pump()

    def offload_wait(self, index: int) -> None:
        """From here on in the compute stream, the source may be freed."""
        cell = self._cells[index]
        if cell.arrival is None or cell.kept is None:
            raise LohanError(f"{cell.name} is waited for before it was offloaded")
        self._device.wait(cell.arrival)
        if self._poison and cell.source is not None:
            cell.source.fill_(0xFF)
        cell.source = cell.kept = None
        if cell.dram is not None:
            cell.state = SlotState.STORED
        self.pump()

    def pump(self) -> None:
        """Start writing what has been copied out, and free the staging of what has been written."""
        while self._leaving:
            arrival = self._leaving[0].arrival
            assert arrival is not None
            if not arrival.is_complete():
                break
            self._write(self._leaving.popleft())
        engine = self._pools.engine
        while self._writing and engine is not None and engine.done(self._writing[0].ticket):
            self._written(self._writing[0])

    def store(self, cell: _Cell) -> None:
        """Block until the bytes of `cell` are in its slot."""
        if cell.state is SlotState.EMPTY:
            raise LohanError(f"{cell.name} is reloaded but was not offloaded in this forward")
        if cell.dram is not None:
            cell.state = SlotState.STORED  # the copy in waits for the copy out on the device
            return
        while cell.state is not SlotState.STORED:
            self._advance()

    def consumed(self) -> None:
        """The backward is over: every slot may be written again."""
        self.forget()

    def forget(self) -> None:
        """Drop what the slots hold; blocks for copies into staging and writes in flight."""
        for cell in self._cells.values():
            if cell.source is not None and cell.arrival is not None:
                self._device.wait(cell.arrival)
            cell.source = cell.kept = None
        failure: LohanError | None = None
        while self._leaving or self._writing:
            left = len(self._leaving) + len(self._writing)
            try:
                self._advance(discard=True)
            except LohanError as error:
                failure = error
                if len(self._leaving) + len(self._writing) == left:
                    break  # a deadline: it is still in flight
        for cell in self._cells.values():
            cell.state = SlotState.EMPTY
            cell.arrival = None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Release the slot storage."""
        self.forget()
        if self._host is not None:
            # A copy from or to the slots may still be under way on the device.
            self._device.synchronize()
            self._cells.clear()
            self._pools.free_host(self._host)
            self._host = None
        self._cells.clear()
        if self._extent is not None:
            self._pools.free_extent(self._extent)
            self._extent = None
        self._program = None

    def _stage(self, nbytes: int, name: str) -> Span:
        assert self._arena is not None
        while True:
            span = self._arena.take(nbytes)
            if span is not None:
                return span
            if not (self._leaving or self._writing):
                raise LohanError(
                    f"{name} needs {nbytes:,} bytes of outbound staging, which has {self._arena.nbytes:,}"
                )
            self._advance()

    def _advance(self, *, discard: bool = False) -> None:
        """Block for the oldest write, or else the oldest copy out."""
        if self._writing:
            self._written(self._writing[0])
            return
        cell = self._leaving[0]
        assert cell.arrival is not None
        name = f"the copy of {cell.name}"
        self._waits.until("d2h", name, cell.arrival.is_complete, cell.move)
        self._leaving.popleft()
        if discard:
            self._give_span(cell)
        else:
            self._write(cell)

    def _write(self, cell: _Cell) -> None:
        engine = self._pools.engine
        assert engine is not None and self._arena is not None
        assert cell.ssd is not None and cell.span is not None
        extent, offset = cell.ssd
        try:
            cell.ticket = engine.write(
                extent, offset, self._arena.address(cell.span), cell.slot.nbytes, cell.name
            )
        except BaseException:
            self._give_span(cell)
            raise
        cell.state = SlotState.WRITING
        self._writing.append(cell)

    def _written(self, cell: _Cell) -> None:
        """Block until the oldest write is done."""
        engine = self._pools.engine
        assert engine is not None and cell is self._writing[0]
        with self._waits.counted("ssd_write", cell.move):
            try:
                engine.wait(cell.ticket, self._waits.deadline_s)
            finally:
                # Timed out or failed: the engine owns the span until the ticket is done.
                if engine.done(cell.ticket):
                    self._writing.popleft()
                    self._give_span(cell)
        cell.state = SlotState.STORED

    def _give_span(self, cell: _Cell) -> None:
        assert self._arena is not None
        if cell.span is not None:
            self._arena.give(cell.span)
            cell.span = None
