"""Steps replayed as the runtime runs them: a host that issues moves, streams that carry them out.

The host goes through the program and is taken to need no time itself. It blocks where the runtime
blocks, and only there, so it runs ahead of the GPU; what the runtime does whenever the host passes
by (start reads and writes, upload new weights) happens here at the same places of the program. The
classes mirror those of lohan_fx.runtime: Inbound, Slots, Updates, and the optimizer's pipeline of
kernels/pipeline.h. What differs: an arena is bytes without fragmentation, the gradients of a bucket
arrive together, and reads and writes of the SSD each go first come first served beside one another.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Mapping, Sequence

from lohan_fx.errors import LohanError
from lohan_fx.planner.fluid import LANE_NAMES, Item, Job, Lane
from lohan_fx.planner.problem import (
    GPU_ALIGN,
    PAGE,
    BucketPlace,
    Place,
    Problem,
    align_up,
)
from lohan_fx.planner.solution import Windows
from lohan_fx.planner.steps import PassProgram, step_program
from lohan_fx.planner.streams import ACTIVATIONS, WEIGHTS, WORKSPACE, Host, Mark, Streams, Wanted
from lohan_fx.planner.traffic import weight_section_bytes
from lohan_fx.planner.updates import Updates

# How far the host may be ahead of the GPU: CUDA queues about a thousand launches.
_MOST_QUEUED = 512
_MOST_STEPS_AHEAD = 2


class _Incoming:
    """Weights or an activation on the way to the GPU; see runtime/inbound.py."""

    __slots__ = ("arrival", "in_pass", "item", "nbytes", "on_ssd", "point", "read", "section")

    def __init__(
        self, item: Item, in_pass: str, nbytes: int, section: int, *, on_ssd: bool
    ) -> None:
        self.item = item
        self.in_pass = in_pass
        self.nbytes = nbytes
        self.section = section
        self.on_ssd = on_ssd
        self.point = 0  # of the compute stream, when it was asked for
        self.read: Job | None = None
        self.arrival: Job | None = None


class _Slot:
    """A swapped activation; see runtime/activations.py."""

    __slots__ = ("item", "leaving", "nbytes", "on_ssd", "section", "stored", "write")

    def __init__(self, item: Item, nbytes: int, *, on_ssd: bool) -> None:
        self.item = item
        self.nbytes = nbytes
        self.section = align_up(nbytes, PAGE)
        self.on_ssd = on_ssd
        self.stored = False
        self.leaving: Job | None = None
        self.write: Job | None = None


class Replay:
    """Runs steps of one placement until told to stop.

    `stalls` lists (start, end, cause, item) of the GPU; `marks` and `memory` are those of its Streams.

    Raises LohanError where the windows let nothing go on.
    """

    def __init__(
        self,
        problem: Problem,
        buckets: Sequence[BucketPlace],
        activations: Sequence[Place],
        windows: Windows,
    ) -> None:
        self._streams = streams = Streams(problem.lanes)
        self.fluid, self.marks, self.memory = streams.fluid, streams.marks, streams.memory
        self.stalls: list[tuple[float, float, str, Item]] = []
        self._problem = problem
        self._windows = windows
        self._overlap = problem.overlap
        self._places = buckets
        self._program = step_program(problem, buckets, activations, windows)
        self._passes = (("forward", self._program.forward), ("backward", self._program.backward))
        self._opens, self._closes = self._stage_memory(activations)
        # Inbound.
        self._reads: deque[_Incoming] = deque()
        self._by_item: dict[Item, deque[_Incoming]] = {}
        self._wanted: list[_Incoming] = []
        self._occupants: deque[_Incoming] = deque()
        self._inbound_left = windows.inbound_bytes
        self._fetched: dict[int, _Incoming | None] = {}
        self._reloads: dict[int, _Incoming] = {}
        # Slots.
        self._slots = {
            a.index: _Slot(Item("activation", a.index), a.bytes, on_ssd=place is Place.SSD)
            for a, place in zip(problem.activations, activations, strict=True)
            if place in (Place.DRAM, Place.SSD)
        }
        self._leaving: deque[_Slot] = deque()
        self._writing: deque[_Slot] = deque()
        self._outbound_left = windows.outbound_bytes
        released_late = {m.arg for m in self._program.backward.in_order() if m.op == "release"}
        self._updates = Updates(problem, buckets, windows, streams, released_late, self._pump)
        self._check_arenas()
        self._host = self._loop()
        self._blocked: Wanted | None = None

    def advance(self) -> None:
        """Go on to the next end of a job, or raise LohanError where nothing is under way."""
        fluid = self.fluid
        begun = fluid.now_s
        if fluid.active[Lane.GPU] is not None:
            fluid.advance()
            return
        lane, item = self._stall()
        held_back = fluid.active[lane]
        if not fluid.advance():
            raise LohanError(
                f"this plan comes to a stop: nothing moves while {self._name(item)} is waited for; "
                "its windows are too small"
            )
        by_dram = fluid.dram_limited and held_back is not None and held_back.dram_bytes_per_unit
        cause = "dram" if by_dram else LANE_NAMES[lane]
        last = self.stalls[-1] if self.stalls else None
        if last is not None and last[1] == begun and last[2:] == (cause, item):
            self.stalls[-1] = (last[0], fluid.now_s, cause, item)
        elif fluid.now_s > begun:
            self.stalls.append((begun, fluid.now_s, cause, item))

    def backlog(self) -> tuple[float, ...]:
        """What is asked for and not done, by lane, and what has been read ahead: equal where two
        steps end alike."""
        waiting = self._updates.pipeline.backlog()
        return (*self._streams.backlog(), float(self._inbound_left), *waiting)

    def settle(self) -> None:
        """Let everything happen that can happen now."""
        moved = True
        while moved:
            moved = self._settle_host()
            moved |= self._streams.settle()
            moved |= self._updates.pipeline.settle()

    def _settle_host(self) -> bool:
        if self._blocked is not None and not self._blocked.ready():
            return False
        self._blocked = next(self._host)
        return True

    # The host's program

    def _loop(self) -> Host:
        for step in itertools.count():
            if step >= _MOST_STEPS_AHEAD:
                before = Mark(step - _MOST_STEPS_AHEAD, "step")
                if before not in self.marks:
                    yield Wanted(lambda: before in self.marks, lambda: Lane.GPU, Item("stage", 0))  # noqa: B023
            yield from self._forward(step)
            yield from self._backward(step)
            yield from self._step(step)

    def _forward(self, step: int) -> Host:
        self._pump()
        for slot in self._slots.values():
            slot.stored, slot.leaving, slot.write = False, None, None
        self._start_inbound()
        yield from self._pass(self._program.forward, "forward")
        self._pump()
        self._streams.enqueue(Mark(step, "forward"))

    def _backward(self, step: int) -> Host:
        self._updates.begin_backward()
        self._pump()
        yield from self._pass(self._program.backward, "backward")
        self._updates.end_backward()
        self._pump()
        self._streams.enqueue(Mark(step, "backward"))

    def _step(self, step: int) -> Host:
        self._pump()
        if self._overlap.waits_for_step:
            # What step() decides depends on the norms of all gradients.
            made = Mark(step, "backward")
            last = Item("stage", 0)
            yield Wanted(lambda: made in self.marks, lambda: Lane.GPU, last)
            yield from self._updates.step(self._program.update_order)
        self._streams.enqueue(Mark(step, "step"))

    def _pass(self, program: PassProgram, in_pass: str) -> Host:
        forward = in_pass == "forward"
        for position, here in enumerate(program.moves):
            for move in here:
                op, arg = move.op, move.arg
                if op == "fetch":
                    self._pump()
                    resident = self._places[arg].weight is Place.GPU
                    self._fetched[arg] = None if resident else self._request(Item("bucket", arg))
                elif op == "wait":
                    self._pump()
                    item = self._fetched[arg]
                    if item is None:
                        yield from self._updates.settle_on_device(arg)
                    else:
                        yield from self._receive(item)
                        self._updates.received(arg)
                elif op == "release":
                    item = self._fetched.pop(arg)
                    if item is not None:
                        self._streams.hold(WEIGHTS, -align_up(item.nbytes, GPU_ALIGN))
                    if not forward:
                        self._updates.release(arg, None if item is None else item.arrival)
                    self._pump()
                elif op == "offload":
                    self._pump()
                    yield from self._offload(self._slots[arg])
                elif op == "offload_wait":
                    self._offload_wait(self._slots[arg])
                    self._pump()
                elif op == "reload":
                    self._pump()
                    self._reloads[arg] = self._request(Item("activation", arg))
                elif op == "reload_wait":
                    self._pump()
                    yield from self._receive(self._reloads.pop(arg))
                else:
                    assert op == "grad"
                    yield from self._updates.arrive(arg)
                    self._pump()
            if position < len(program.pieces):
                piece = program.pieces[position]
                if piece.opens:
                    self._change(self._opens[forward][piece.stage])
                about = Item("stage", piece.stage)
                job = Job(
                    Lane.GPU, piece.what, about, in_pass, piece.seconds, dram_bytes_per_unit=0.0
                )
                self._streams.enqueue(job)
                if piece.closes:
                    self._change(self._closes[forward][piece.stage])
                if self._streams.num_queued > _MOST_QUEUED:
                    yield Wanted(
                        lambda: self._streams.num_queued <= _MOST_QUEUED, lambda: Lane.GPU, about
                    )

    def _pump(self) -> None:
        """What the runtime does whenever the host passes by."""
        self._updates.pump()
        self._pump_slots()
        self._pump_inbound()

    # Inbound: runtime/inbound.py

    def _start_inbound(self) -> None:
        self._reads.clear()
        self._by_item.clear()
        problem = self._problem
        for in_pass, program in self._passes:
            for move in program.in_order():
                if move.op == "fetch" and self._places[move.arg].weight is not Place.GPU:
                    bucket = problem.buckets[move.arg]
                    incoming = _Incoming(
                        Item("bucket", move.arg),
                        in_pass,
                        bucket.weight_bytes,
                        weight_section_bytes(bucket),
                        on_ssd=self._places[move.arg].weight is Place.SSD,
                    )
                elif move.op == "reload":
                    slot = self._slots[move.arg]
                    incoming = _Incoming(
                        slot.item, in_pass, slot.nbytes, slot.section, on_ssd=slot.on_ssd
                    )
                else:
                    continue
                self._by_item.setdefault(incoming.item, deque()).append(incoming)
                if incoming.on_ssd:
                    self._reads.append(incoming)
        self._pump_inbound()

    def _request(self, item: Item) -> _Incoming:
        incoming = self._by_item[item].popleft()
        cls = ACTIVATIONS if item.kind == "activation" else WEIGHTS
        self._streams.hold(cls, align_up(incoming.nbytes, GPU_ALIGN))
        incoming.point = self._streams.issued
        self._wanted.append(incoming)
        self._pump_inbound()
        return incoming

    def _receive(self, item: _Incoming) -> Host:
        self._pump_inbound()
        while item.arrival is None:
            yield from self._unblock(item)
            self._pump_inbound()
        self._streams.wait_for(item.arrival)

    def _pump_inbound(self) -> None:
        occupants = self._occupants
        while occupants and occupants[0].arrival is not None and occupants[0].arrival.done:
            self._inbound_left += occupants.popleft().section
        reads = self._reads
        while reads and reads[0].section <= self._inbound_left and self._is_valid(reads[0]):
            incoming = reads.popleft()
            self._inbound_left -= incoming.section
            incoming.read = Job(
                Lane.SSD_READ, "read", incoming.item, incoming.in_pass, incoming.section
            )
            self._streams.disk[Lane.SSD_READ].append(incoming.read)
            occupants.append(incoming)
        if self._wanted:
            self._wanted = [incoming for incoming in self._wanted if not self._issue(incoming)]

    def _issue(self, incoming: _Incoming) -> bool:
        """Start the copy in if the bytes are in host memory."""
        if incoming.on_ssd:
            if incoming.read is None or not incoming.read.done:
                return False
        elif not self._is_valid(incoming):
            return False
        number = incoming.item.number
        if incoming.item.kind == "activation":
            what, after = "reload", self._slots[number].leaving
        else:
            what, after = "fetch", self._updates.stored(number)
        incoming.arrival = self._streams.copy(
            Lane.H2D,
            what,
            incoming.item,
            incoming.in_pass,
            incoming.nbytes,
            point=incoming.point,
            after=() if after is None else (after,),
        )
        return True

    def _is_valid(self, incoming: _Incoming) -> bool:
        if incoming.item.kind == "activation":
            return self._slots[incoming.item.number].stored
        return self._updates.has_weights(incoming.item.number)

    def _make_valid(self, incoming: _Incoming) -> Host:
        if incoming.item.kind == "bucket":
            yield from self._updates.settle(incoming.item.number)
            return
        slot = self._slots[incoming.item.number]
        if not slot.on_ssd:
            slot.stored = True
        while not slot.stored:
            yield from self._advance_slots()

    def _unblock(self, item: _Incoming) -> Host:
        if not item.on_ssd:
            yield from self._make_valid(item)
            return
        if item.read is not None:
            yield self._streams.until(item.read)
            return
        head = self._reads[0]
        if not self._is_valid(head):
            yield from self._make_valid(head)
            return
        oldest = self._occupants[0]
        awaited = oldest.arrival if oldest.arrival is not None else oldest.read
        assert awaited is not None
        yield self._streams.until(awaited)

    # Slots: runtime/activations.py

    def _offload(self, slot: _Slot) -> Host:
        if slot.on_ssd:
            while slot.section > self._outbound_left:
                yield from self._advance_slots()
            self._outbound_left -= slot.section
        slot.leaving = self._streams.copy(Lane.D2H, "offload", slot.item, "forward", slot.nbytes)
        if slot.on_ssd:
            self._leaving.append(slot)
            self._pump_slots()

    def _offload_wait(self, slot: _Slot) -> None:
        self._streams.wait_for(slot.leaving)
        self._streams.hold(ACTIVATIONS, -align_up(slot.nbytes, GPU_ALIGN))
        if not slot.on_ssd:
            slot.stored = True
        self._pump_slots()

    def _pump_slots(self) -> None:
        while self._leaving and self._leaving[0].leaving is not None:
            if not self._leaving[0].leaving.done:
                break
            self._write(self._leaving.popleft())
        while self._writing and self._writing[0].write is not None:
            if not self._writing[0].write.done:
                break
            self._written()

    def _write(self, slot: _Slot) -> None:
        slot.write = Job(Lane.SSD_WRITE, "write", slot.item, "forward", slot.section)
        self._streams.disk[Lane.SSD_WRITE].append(slot.write)
        self._writing.append(slot)

    def _written(self) -> None:
        slot = self._writing.popleft()
        self._outbound_left += slot.section
        slot.stored = True

    def _advance_slots(self) -> Host:
        """Block for the oldest write, or else the oldest copy out."""
        if self._writing:
            job = self._writing[0].write
            assert job is not None
            yield self._streams.until(job)
            self._written()
            return
        job = self._leaving[0].leaving
        assert job is not None
        yield self._streams.until(job)
        self._write(self._leaving.popleft())

    # Waiting, and what for

    def _stall(self) -> tuple[Lane, Item]:
        """The lane that an idle GPU waits for, and the item."""
        job = self._streams.awaited()
        if job is not None:
            return self._streams.cause_of(job), job.item
        assert self._blocked is not None
        return self._blocked.cause(), self._blocked.item

    def _name(self, item: Item) -> str:
        rows = {
            "stage": [s.name for s in self._problem.stages],
            "bucket": [b.name for b in self._problem.buckets],
            "activation": [a.name for a in self._problem.activations],
        }
        return repr(rows[item.kind][item.number])

    # Memory

    def _change(self, deltas: Mapping[int, int]) -> None:
        for cls, delta in deltas.items():
            self._streams.hold(cls, delta)

    def _stage_memory(
        self, activations: Sequence[Place]
    ) -> tuple[dict[bool, list[Counter[int]]], dict[bool, list[Counter[int]]]]:
        """Bytes by class that come when a stage opens and when it closes: [forward][stage]."""
        problem = self._problem
        opens = {half: [Counter[int]() for _ in problem.stages] for half in (True, False)}
        closes = {half: [Counter[int]() for _ in problem.stages] for half in (True, False)}
        for stage in problem.stages:
            for half, size in (
                (True, stage.forward_workspace_bytes),
                (False, stage.backward_workspace_bytes),
            ):
                opens[half][stage.index][WORKSPACE] += size
                closes[half][stage.index][WORKSPACE] -= size
        for a, place in zip(problem.activations, activations, strict=True):
            size = align_up(a.bytes, GPU_ALIGN)
            first, last = self._program.intervals[a.index]
            opens[True][a.forward_stage][ACTIVATIONS] += size
            closes[False][last][ACTIVATIONS] -= size
            if place is Place.RECOMPUTE:
                closes[True][a.last_forward_stage][ACTIVATIONS] -= size
                opens[False][first][ACTIVATIONS] += size
        return opens, closes

    def _check_arenas(self) -> None:
        windows = self._windows
        for slot in self._slots.values():
            if slot.on_ssd:
                self._check_fit(slot.item, slot.section, "outbound", windows.outbound_bytes)
                self._check_fit(slot.item, slot.section, "inbound", windows.inbound_bytes)
        for bucket, place in zip(self._problem.buckets, self._places, strict=True):
            if place.weight is Place.SSD:
                section = weight_section_bytes(bucket)
                item = Item("bucket", bucket.index)
                self._check_fit(item, section, "inbound", windows.inbound_bytes)

    def _check_fit(self, item: Item, nbytes: int, arena: str, have: int) -> None:
        if nbytes > have:
            raise LohanError(
                f"{self._name(item)} needs {nbytes} bytes of the {arena} arena, which has {have}"
            )
