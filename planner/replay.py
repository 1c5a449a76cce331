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
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple

from lohan_fx.errors import LohanError
from lohan_fx.planner.fluid import LANE_NAMES, Fluid, Item, Job, Lane
from lohan_fx.planner.pipeline import Pipeline, Stage, Task
from lohan_fx.planner.problem import (
    GPU_ALIGN,
    PAGE,
    Bucket,
    BucketPlace,
    Overlap,
    Place,
    Problem,
    align_up,
)
from lohan_fx.planner.solution import Windows
from lohan_fx.planner.steps import PassProgram, step_program
from lohan_fx.planner.traffic import (
    state_buffer_bytes,
    state_section_bytes,
    update_bytes,
    weight_section_bytes,
)

# Classes of GPU memory that vary, in the order of `Replay.memory`.
WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, WORKSPACE = range(5)
# How far the host may be ahead of the GPU: CUDA queues about a thousand launches.
_MOST_QUEUED = 512
_MOST_STEPS_AHEAD = 2


class Wanted(NamedTuple):
    """Why the host is blocked: `ready` ends that, `cause` names the lane it waits for."""

    ready: Callable[[], bool]
    cause: Callable[[], Lane]
    item: Item


Host = Generator[Wanted, None, None]


class MemoryChange(NamedTuple):
    """Bytes of a class that come (or go) when the compute stream passes."""

    cls: int
    delta: int


class Mark(NamedTuple):
    """A point of the compute stream whose time is noted: the end of a phase of a step."""

    step: int
    phase: str


class _Await(NamedTuple):
    """The compute stream waits for a copy."""

    job: Job


class _Copy(NamedTuple):
    """A copy in its stream: not before the compute stream has passed `point`, nor before `after`."""

    job: Job
    point: int
    after: tuple[Job, ...]


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


class _GradBuffer:
    __slots__ = ("busy",)

    def __init__(self) -> None:
        self.busy: Job | None = None  # an upload that still reads it


class _Record:
    """A trainable bucket's way through a step; see runtime/updates.py."""

    __slots__ = (
        "arrived",
        "bucket",
        "buffer",
        "by_cpu",
        "fetched",
        "last_copy",
        "place",
        "released",
        "task",
        "upload",
        "waiting",
    )

    def __init__(self, bucket: Bucket, place: BucketPlace) -> None:
        self.bucket = bucket
        self.place = place
        self.by_cpu = place.state is not Place.GPU
        self.arrived = False
        self.released = True
        self.waiting = False  # gradients are held and the update has not begun
        self.buffer: _GradBuffer | None = None
        self.last_copy: Job | None = None
        self.fetched: Job | None = None
        self.task: Task | None = None
        self.upload: Job | None = None


class Replay:
    """Runs steps of one placement until told to stop.

    `marks` are the times of the ends of phases: (step, "forward" | "backward" | "step"). `memory`
    lists (time, class, bytes more) of the GPU, `stalls` (start, end, cause, item) of it.

    Raises LohanError where the windows let nothing go on.
    """

    def __init__(
        self,
        problem: Problem,
        buckets: Sequence[BucketPlace],
        activations: Sequence[Place],
        windows: Windows,
    ) -> None:
        self.fluid = Fluid(problem.lanes)
        self.marks: dict[Mark, float] = {}
        self.memory: list[tuple[float, int, int]] = []
        self.stalls: list[tuple[float, float, str, Item]] = []
        self._problem = problem
        self._windows = windows
        self._overlap = problem.overlap
        self._places = buckets
        self._program = step_program(problem, buckets, activations, windows)
        self._passes = (("forward", self._program.forward), ("backward", self._program.backward))
        self._released = {m.arg for m in self._program.backward.in_order() if m.op == "release"}
        self._opens, self._closes = self._stage_memory(activations)
        # Streams.
        self._compute: deque[Job | _Await | MemoryChange | Mark] = deque()
        self._issued = self._passed = 0
        self._copies: dict[Lane, deque[_Copy]] = {Lane.H2D: deque(), Lane.D2H: deque()}
        self._disk: dict[Lane, deque[Job]] = {Lane.SSD_READ: deque(), Lane.SSD_WRITE: deque()}
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
        # Updates.
        self._records = {
            b.index: _Record(b, buckets[b.index]) for b in problem.buckets if b.trainable
        }
        by_cpu = [r for r in self._records.values() if r.by_cpu]
        waits = self._overlap.waits_for_step
        self._own = {r.bucket.index: _GradBuffer() for r in by_cpu} if waits else {}
        self._ring = deque(_GradBuffer() for _ in range(0 if waits else windows.grad_buffers))
        self._window: deque[tuple[Job, int]] = deque()
        self._window_bytes = 0
        self._jobs: deque[Task] = deque()
        self._progressed = 0  # of the pipeline's progress, what has been seen
        self._pipeline = Pipeline(
            self.fluid, self._disk, windows.state_buffers, naive=self._overlap is Overlap.NAIVE
        )
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
        left = [0.0 if job is None else job.left for job in self.fluid.active]
        for lane, copies in self._copies.items():
            left[lane] += sum(copy.job.left for copy in copies)
        for lane, queue in self._disk.items():
            left[lane] += sum(job.left for job in queue)
        return (*left, float(self._inbound_left), *self._pipeline.backlog())

    # Streams

    def settle(self) -> None:
        """Let everything happen that can happen now."""
        moved = True
        while moved:
            moved = self._settle_host()
            moved |= self._settle_compute()
            for lane in self._copies:
                moved |= self._settle_copies(lane)
            for lane, queue in self._disk.items():
                while queue and self.fluid.active[lane] is None:
                    self.fluid.begin(queue.popleft())
                    moved = True
            moved |= self._pipeline.settle()

    def _settle_host(self) -> bool:
        if self._blocked is not None and not self._blocked.ready():
            return False
        self._blocked = next(self._host)
        return True

    def _settle_compute(self) -> bool:
        stream, moved = self._compute, False
        while stream and self.fluid.active[Lane.GPU] is None:
            entry = stream[0]
            if isinstance(entry, MemoryChange):
                self.memory.append((self.fluid.now_s, entry.cls, entry.delta))
            elif isinstance(entry, Job):
                if not entry.done:
                    self.fluid.begin(entry)
                    moved = True
                    if not entry.done:
                        break
            elif isinstance(entry, _Await):
                if not entry.job.done:
                    break
            else:
                self.marks[entry] = self.fluid.now_s
            stream.popleft()
            self._passed += 1
            moved = True
        return moved

    def _settle_copies(self, lane: Lane) -> bool:
        queue, moved = self._copies[lane], False
        while queue and self.fluid.active[lane] is None:
            copy = queue[0]
            if self._passed < copy.point or not all(job.done for job in copy.after):
                break
            queue.popleft()
            self.fluid.begin(copy.job)
            moved = True
        return moved

    def _enqueue(self, entry: Job | _Await | MemoryChange | Mark) -> None:
        self._compute.append(entry)
        self._issued += 1

    def _await(self, job: Job | None) -> None:
        if job is not None and not job.done:
            self._enqueue(_Await(job))

    def _hold(self, cls: int, delta: int) -> None:
        if delta:
            self._enqueue(MemoryChange(cls, delta))

    def _copy(
        self,
        lane: Lane,
        what: str,
        item: Item,
        in_pass: str,
        nbytes: int,
        *,
        point: int | None = None,
        after: tuple[Job, ...] = (),
    ) -> Job:
        job = Job(lane, what, item, in_pass, nbytes)
        at = self._issued if point is None else point
        self._copies[lane].append(_Copy(job, at, after))
        return job

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
        self._enqueue(Mark(step, "forward"))

    def _backward(self, step: int) -> Host:
        for record in self._records.values():
            record.arrived = False
            record.released = record.bucket.index not in self._released
            record.last_copy = record.fetched = None
        self._pump()
        yield from self._pass(self._program.backward, "backward")
        while self._window:
            self._drop_gradient()
        self._pump()
        self._enqueue(Mark(step, "backward"))

    def _step(self, step: int) -> Host:
        self._pump()
        if self._overlap.waits_for_step:
            # What step() decides depends on the norms of all gradients.
            made = Mark(step, "backward")
            last = Item("stage", 0)
            yield Wanted(lambda: made in self.marks, lambda: Lane.GPU, last)
            records = [self._records[index] for index in self._program.update_order]
            for record in sorted(records, key=lambda r: r.by_cpu):  # those on the GPU first
                if record.waiting:
                    self._start_update(record)
            if self._overlap is Overlap.SERIAL:
                yield from self._drain()
        self._enqueue(Mark(step, "step"))

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
                        yield from self._settle_on_device(arg)
                    else:
                        yield from self._receive(item)
                elif op == "release":
                    item = self._fetched.pop(arg)
                    if item is not None:
                        self._hold(WEIGHTS, -align_up(item.nbytes, GPU_ALIGN))
                    if not forward:
                        self._release(arg, item)
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
                    yield from self._arrive(self._records[arg])
                    self._pump()
            if position < len(program.pieces):
                piece = program.pieces[position]
                if piece.opens:
                    self._change(self._opens[forward][piece.stage])
                about = Item("stage", piece.stage)
                job = Job(
                    Lane.GPU, piece.what, about, in_pass, piece.seconds, dram_bytes_per_unit=0.0
                )
                self._enqueue(job)
                if piece.closes:
                    self._change(self._closes[forward][piece.stage])
                if len(self._compute) > _MOST_QUEUED:
                    yield Wanted(
                        lambda: len(self._compute) <= _MOST_QUEUED, lambda: Lane.GPU, about
                    )

    def _pump(self) -> None:
        """What the runtime does whenever the host passes by."""
        if self._jobs and self._progressed != self._pipeline.progress:
            self._progressed = self._pipeline.progress
            for task in filter(self._weights_ready, list(self._jobs)):
                self._progress(task)
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
        self._hold(cls, align_up(incoming.nbytes, GPU_ALIGN))
        incoming.point = self._issued
        self._wanted.append(incoming)
        self._pump_inbound()
        return incoming

    def _receive(self, item: _Incoming) -> Host:
        self._pump_inbound()
        while item.arrival is None:
            yield from self._unblock(item)
            self._pump_inbound()
        self._await(item.arrival)

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
            self._disk[Lane.SSD_READ].append(incoming.read)
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
        what, after = "fetch", None
        if incoming.item.kind == "activation":
            what, after = "reload", self._slots[incoming.item.number].leaving
        incoming.arrival = self._copy(
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
        record = self._records.get(incoming.item.number)
        if record is None or record.task is None:
            return True
        if not self._weights_ready(record.task):
            return False
        self._progress(record.task)
        return True

    def _make_valid(self, incoming: _Incoming) -> Host:
        if incoming.item.kind == "bucket":
            yield from self._settle_bucket(self._records[incoming.item.number])
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
            yield self._until(item.read)
            return
        head = self._reads[0]
        if not self._is_valid(head):
            yield from self._make_valid(head)
            return
        oldest = self._occupants[0]
        awaited = oldest.arrival if oldest.arrival is not None else oldest.read
        assert awaited is not None
        yield self._until(awaited)

    # Slots: runtime/activations.py

    def _offload(self, slot: _Slot) -> Host:
        if slot.on_ssd:
            while slot.section > self._outbound_left:
                yield from self._advance_slots()
            self._outbound_left -= slot.section
        slot.leaving = self._copy(Lane.D2H, "offload", slot.item, "forward", slot.nbytes)
        if slot.on_ssd:
            self._leaving.append(slot)
            self._pump_slots()

    def _offload_wait(self, slot: _Slot) -> None:
        self._await(slot.leaving)
        self._hold(ACTIVATIONS, -align_up(slot.nbytes, GPU_ALIGN))
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
        self._disk[Lane.SSD_WRITE].append(slot.write)
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
            yield self._until(job)
            self._written()
            return
        job = self._leaving[0].leaving
        assert job is not None
        yield self._until(job)
        self._write(self._leaving.popleft())

    # Updates: runtime/updates.py

    def _weights_ready(self, task: Task) -> bool:
        if self._places[task.bucket].weight is Place.SSD:
            return task.stage is Stage.DONE
        return task.stage >= Stage.WRITING

    def _settle_bucket(self, record: _Record) -> Host:
        if record.task is not None:
            yield self._until_weights(record.task)
            self._progress(record.task)

    def _settle_on_device(self, bucket: int) -> Host:
        record = self._records.get(bucket)
        if record is None:
            return
        yield from self._settle_bucket(record)
        if record.upload is not None:
            self._await(record.upload)
            record.upload = None

    def _progress(self, task: Task | None) -> None:
        assert task is not None
        if task.stage is Stage.DONE and task in self._jobs:
            self._jobs.remove(task)
        record = self._records[task.bucket]
        if record.task is not task:
            return
        record.task = None
        buffer, record.buffer = record.buffer, None
        assert buffer is not None
        if record.place.weight is Place.GPU:
            record.upload = self._copy(
                Lane.H2D,
                "upload",
                Item("bucket", task.bucket),
                "update",
                record.bucket.weight_bytes,
                point=task.point,
            )
            buffer.busy = record.upload
        if not self._overlap.waits_for_step:
            self._ring.append(buffer)

    def _arrive(self, record: _Record) -> Host:
        bucket = record.bucket
        if record.task is not None or record.upload is not None:
            yield from self._settle_on_device(bucket.index)
        size = align_up(bucket.grad_bytes, GPU_ALIGN)
        if record.by_cpu:
            yield from self._acquire(record)
            assert record.buffer is not None
            busy = record.buffer.busy
            record.last_copy = self._copy(
                Lane.D2H,
                "gradient",
                Item("bucket", bucket.index),
                "backward",
                bucket.grad_bytes,
                after=() if busy is None else (busy,),
            )
            self._window.append((record.last_copy, size))
            self._window_bytes += size
            while len(self._window) > 1 and self._window_bytes > self._windows.grad_window_bytes:
                self._drop_gradient()
            self._hold(GRADIENTS, size)
            if self._window_bytes > self._windows.grad_window_bytes:
                self._drop_gradient()
        else:
            self._hold(GRADIENTS, size)
        record.arrived = record.waiting = True
        self._maybe_start(record)

    def _drop_gradient(self) -> None:
        copy, size = self._window.popleft()
        self._window_bytes -= size
        self._await(copy)
        self._hold(GRADIENTS, -size)

    def _acquire(self, record: _Record) -> Host:
        if self._overlap.waits_for_step:
            record.buffer = self._own[record.bucket.index]
            return
        self._pump()
        while not self._ring:
            holders = [t for t in self._jobs if self._records[t.bucket].task is t]
            if not holders:
                raise LohanError(
                    f"no gradient buffer for {record.bucket.name!r}: all "
                    f"{self._windows.grad_buffers} are being filled"
                )
            yield self._until_any_weights(holders)
            self._pump()
        record.buffer = self._ring.popleft()

    def _release(self, bucket: int, item: _Incoming | None) -> None:
        record = self._records.get(bucket)
        if record is not None and not record.released:
            record.released = True
            record.fetched = None if item is None else item.arrival
            self._maybe_start(record)

    def _maybe_start(self, record: _Record) -> None:
        ready = record.arrived and record.released and record.waiting
        if ready and not self._overlap.waits_for_step:
            self._start_update(record)

    def _start_update(self, record: _Record) -> None:
        record.waiting = False
        bucket, lanes = record.bucket, self._problem.lanes
        touched = update_bytes(self._problem, bucket)
        if not record.by_cpu:
            rate = lanes.gpu_bytes_per_s
            workspace = self._problem.gpu_adam_workspace_bytes
            self._hold(WORKSPACE, workspace)
            self._enqueue(
                Job(
                    Lane.GPU,
                    "adam",
                    Item("bucket", bucket.index),
                    "update",
                    touched / rate if rate > 0 else 0.0,
                    dram_bytes_per_unit=0.0,
                )
            )
            self._hold(WORKSPACE, -workspace)
            self._hold(GRADIENTS, -align_up(bucket.grad_bytes, GPU_ALIGN))
            return
        read = written = 0
        if record.place.state is Place.SSD:
            read = written = state_section_bytes(bucket)
        if record.place.weight is Place.SSD:
            written += weight_section_bytes(bucket)
            read += 0 if bucket.has_master else weight_section_bytes(bucket)
        task = Task(
            bucket=bucket.index,
            params=bucket.numel,
            dram_bytes_per_param=touched / bucket.numel if bucket.numel else 0.0,
            read_bytes=read,
            write_bytes=written,
            needs_buffer=state_buffer_bytes(bucket, record.place) > 0,
            events=tuple(e for e in (record.last_copy, record.fetched) if e is not None),
            point=self._issued,
        )
        record.task = task
        self._jobs.append(task)
        self._pipeline.submit(task)

    def _drain(self) -> Host:
        while self._jobs:
            task = self._jobs[0]
            yield self._until_done(task)
            self._progress(task)
        for index, record in self._records.items():
            if record.upload is not None:
                yield self._until(record.upload)
                yield from self._settle_on_device(index)

    # Waiting, and what for

    def _until(self, job: Job) -> Wanted:
        return Wanted(lambda: job.done, lambda: self._cause_of(job), job.item)

    def _until_weights(self, task: Task) -> Wanted:
        return Wanted(
            lambda: self._weights_ready(task),
            lambda: self._cause_of_task(task),
            Item("bucket", task.bucket),
        )

    def _until_any_weights(self, tasks: Sequence[Task]) -> Wanted:
        oldest = tasks[0]
        return Wanted(
            lambda: any(map(self._weights_ready, tasks)),
            lambda: self._cause_of_task(oldest),
            Item("bucket", oldest.bucket),
        )

    def _until_done(self, task: Task) -> Wanted:
        return Wanted(
            lambda: task.stage is Stage.DONE,
            lambda: self._cause_of_task(task),
            Item("bucket", task.bucket),
        )

    def _stall(self) -> tuple[Lane, Item]:
        """The lane that an idle GPU waits for, and the item."""
        if self._compute:
            entry = self._compute[0]
            assert isinstance(entry, _Await)
            return self._cause_of(entry.job), entry.job.item
        assert self._blocked is not None
        return self._blocked.cause(), self._blocked.item

    def _cause_of(self, job: Job) -> Lane:
        queue = self._copies.get(job.lane)
        if self.fluid.active[job.lane] is None and queue:
            for earlier in queue[0].after:
                if not earlier.done:
                    return self._cause_of(earlier)
        return job.lane

    def _cause_of_task(self, task: Task) -> Lane:
        if task.stage is Stage.READY:
            for event in task.events:
                if not event.done:
                    return self._cause_of(event)
        return self._pipeline.holder_of(task)

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
            self._hold(cls, delta)

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
