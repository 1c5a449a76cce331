"""Updates of trainable buckets in the replay: their gradients, the CPU's tasks, new weights uploaded.

[Note: two parts] A streamed state passes through the GPU in pieces, each copied in, updated and copied out,
while the next comes in. The replay has two parts of it: the first piece, and all the others. The first may
be there before the gradient is; while the others come in, as much goes out, and the last piece follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from lohan_fx.errors import LohanError
from lohan_fx.planner.fluid import Item, Job, Lane
from lohan_fx.planner.pipeline import Pipeline, Stage, Task
from lohan_fx.planner.problem import (
    GPU_ALIGN,
    Bucket,
    BucketPlace,
    Overlap,
    Place,
    Problem,
    adam_params,
    align_up,
    speculates,
)
from lohan_fx.planner.solution import Windows
from lohan_fx.planner.streams import GRADIENTS, WORKSPACE, Host, Streams, Wanted
from lohan_fx.planner.traffic import (
    STREAM_BYTES,
    STREAM_SLOTS,
    state_buffer_bytes,
    state_section_bytes,
    update_bytes,
    weight_section_bytes,
)


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
        "kept_bytes",
        "last_copy",
        "place",
        "released",
        "speculates",
        "stored",
        "task",
        "upload",
        "waiting",
    )

    def __init__(self, problem: Problem, bucket: Bucket, place: BucketPlace) -> None:
        self.bucket = bucket
        self.place = place
        self.by_cpu = not place.by_gpu
        self.speculates = speculates(problem, bucket, place)
        self.arrived = False
        self.released = True
        self.waiting = False  # gradients are held and the update has not begun
        self.buffer: _GradBuffer | None = None
        self.last_copy: Job | None = None
        self.fetched: Job | None = None
        self.task: Task | None = None
        self.upload: Job | None = None
        # Of a streamed state: gradients on the GPU until the weights are waited for, and the last copy out.
        self.kept_bytes = 0
        self.stored: Job | None = None


class Updates:
    """Trainable buckets on their way through steps; see runtime/updates.py.

    `released_late` are the buckets whose weights backward releases. `host_passes` is all that the
    runtime does whenever the host passes by; `pump` is the part of updates in that.
    """

    def __init__(
        self,
        problem: Problem,
        places: Sequence[BucketPlace],
        windows: Windows,
        streams: Streams,
        released_late: set[int],
        host_passes: Callable[[], None],
    ) -> None:
        self._problem = problem
        self._places = places
        self._windows = windows
        self._streams = streams
        self._overlap = problem.overlap
        self._released_late = released_late
        self._host_passes = host_passes
        self._records = {
            b.index: _Record(problem, b, places[b.index]) for b in problem.buckets if b.trainable
        }
        by_cpu = [r for r in self._records.values() if r.by_cpu]
        waits = self._overlap.waits_for_step
        self._own = {r.bucket.index: _GradBuffer() for r in by_cpu} if waits else {}
        self._ring = deque(_GradBuffer() for _ in range(0 if waits else windows.grad_buffers))
        self._piece_elements = windows.stream_bytes // STREAM_BYTES
        # What last left each slot of the ring for streamed states.
        self._slots: deque[Job | None] = deque([None] * STREAM_SLOTS)
        self._any_streamed = any(r.place.streamed for r in self._records.values())
        if self._any_streamed and not self._piece_elements:
            raise LohanError("this plan has no room for states on their way through the GPU")
        self._window: deque[tuple[Job, int]] = deque()
        self._window_bytes = 0
        self._jobs: deque[Task] = deque()
        self._undecided: set[Task] = set()  # step() has yet to say whether they count
        self._progressed = 0  # of the pipeline's progress, what has been seen
        self.pipeline = Pipeline(
            streams.fluid,
            streams.disk,
            windows.state_buffers,
            naive=self._overlap is Overlap.NAIVE,
        )

    def begin_backward(self) -> None:
        """No gradient of this step has been made yet."""
        for record in self._records.values():
            record.arrived = False
            record.released = record.bucket.index not in self._released_late
            record.last_copy = record.fetched = None

    def end_backward(self) -> None:
        """Gradients leave the GPU as their copies out end."""
        while self._window:
            self._drop_gradient()

    def step(self, order: Iterable[int]) -> Host:
        """What step() does in the modes that wait for it: start the updates in this order.

        Those made already count from now on: the replay is of steps that change no gradient.
        """
        records = [self._records[index] for index in order]
        self._undecided.clear()
        for record in records:  # uploads come in the order in which the forward reads
            if record.task is not None and self._weights_ready(record.task):
                self._progress(record.task)
        for record in sorted(records, key=lambda r: r.by_cpu):  # those on the GPU first
            if record.waiting:
                self._start_update(record)
        if self._overlap is Overlap.SERIAL:
            yield from self._drain()

    def pump(self) -> None:
        """Take notice of what the CPU has done since."""
        if self._jobs and self._progressed != self.pipeline.progress:
            self._progressed = self.pipeline.progress
            for task in filter(self._weights_ready, list(self._jobs)):
                self._progress(task)

    def has_weights(self, bucket: int) -> bool:
        """True if no update of the bucket is under way that would change its weights."""
        record = self._records.get(bucket)
        if record is None or record.task is None:
            return True
        if not self._weights_ready(record.task):
            return False
        self._progress(record.task)
        return True

    def _weights_ready(self, task: Task) -> bool:
        if task in self._undecided:
            return False
        if self._places[task.bucket].weight is Place.SSD:
            return task.stage is Stage.DONE
        return task.stage >= Stage.WRITING

    def _settle_bucket(self, record: _Record) -> Host:
        if record.task is not None:
            yield self._until_weights(record.task)
            self._progress(record.task)

    def settle(self, bucket: int) -> Host:
        """Block until a bucket's weights in host memory, or on the SSD, are new."""
        yield from self._settle_bucket(self._records[bucket])

    def settle_on_device(self, bucket: int) -> Host:
        """The same for weights on the GPU; the compute stream waits for their upload."""
        record = self._records.get(bucket)
        if record is None:
            return
        yield from self._settle_bucket(record)
        if record.upload is not None:
            self._streams.wait_for(record.upload)
            record.upload = None
        self.received(bucket)

    def stored(self, bucket: int) -> Job | None:
        """The copy out that new weights in host memory come with, if a streamed update makes them."""
        record = self._records.get(bucket)
        return None if record is None else record.stored

    def received(self, bucket: int) -> None:
        """The compute stream has waited for a bucket's weights: its last update is complete."""
        record = self._records.get(bucket)
        if record is not None and record.kept_bytes and not record.waiting:
            self._streams.hold(GRADIENTS, -record.kept_bytes)
            record.kept_bytes = 0

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
            record.upload = self._streams.copy(
                Lane.H2D,
                "upload",
                Item("bucket", task.bucket),
                "update",
                record.bucket.weight_bytes,
                point=task.point,
            )
            if not record.speculates:  # else it reads the second copy
                buffer.busy = record.upload
        if not self._overlap.waits_for_step:
            self._ring.append(buffer)

    def arrive(self, index: int) -> Host:
        """All gradients of a bucket are made."""
        record = self._records[index]
        bucket = record.bucket
        if record.task is not None or record.upload is not None:
            yield from self.settle_on_device(bucket.index)
        if record.kept_bytes:  # nobody has read the weights since
            self._streams.wait_for(record.stored)
            self.received(bucket.index)
        size = align_up(bucket.grad_bytes, GPU_ALIGN)
        if record.by_cpu:
            yield from self._acquire(record)
            assert record.buffer is not None
            busy = record.buffer.busy
            record.last_copy = self._streams.copy(
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
            self._streams.hold(GRADIENTS, size)
            if self._window_bytes > self._windows.grad_window_bytes:
                self._drop_gradient()
        else:
            self._streams.hold(GRADIENTS, size)
            record.kept_bytes = size if record.place.streamed else 0
        record.arrived = record.waiting = True
        self._maybe_start(record)

    def _drop_gradient(self) -> None:
        copy, size = self._window.popleft()
        self._window_bytes -= size
        self._streams.wait_for(copy)
        self._streams.hold(GRADIENTS, -size)

    def _acquire(self, record: _Record) -> Host:
        if self._overlap.waits_for_step:
            record.buffer = self._own[record.bucket.index]
            return
        self._host_passes()
        while not self._ring:
            holders = [t for t in self._jobs if self._records[t.bucket].task is t]
            if not holders:
                raise LohanError(
                    f"no gradient buffer for {record.bucket.name!r}: all "
                    f"{self._windows.grad_buffers} are being filled"
                )
            yield self._until_any_weights(holders)
            self._host_passes()
        record.buffer = self._ring.popleft()

    def release(self, bucket: int, fetched: Job | None) -> None:
        """Backward has read a bucket's weights for the last time; `fetched` is their copy in, if any."""
        record = self._records.get(bucket)
        if record is not None and not record.released:
            record.released = True
            record.fetched = fetched
            self._maybe_start(record)

    def _maybe_start(self, record: _Record) -> None:
        ready = record.arrived and record.released and record.waiting
        if ready and (record.speculates or not self._overlap.waits_for_step):
            self._start_update(record)

    def _start_update(self, record: _Record) -> None:
        record.waiting = False
        bucket, rate = record.bucket, self._problem.lanes.gpu_bytes_per_s
        touched = update_bytes(self._problem, bucket)
        seconds = touched / rate if rate > 0 else 0.0
        if record.place.streamed:
            self._stream(record, seconds)
            return
        if not record.by_cpu:
            # Where states are streamed, it is there throughout.
            workspace = 0 if self._any_streamed else self._problem.gpu_adam_workspace_bytes
            self._streams.hold(WORKSPACE, workspace)
            self._streams.enqueue(
                Job(
                    Lane.GPU,
                    "adam",
                    Item("bucket", bucket.index),
                    "update",
                    seconds,
                    dram_bytes_per_unit=0.0,
                )
            )
            self._streams.hold(WORKSPACE, -workspace)
            self._streams.hold(GRADIENTS, -align_up(bucket.grad_bytes, GPU_ALIGN))
            return
        read = written = 0
        if record.place.state is Place.SSD:
            read = written = state_section_bytes(bucket)
        if record.place.weight is Place.SSD:
            written += weight_section_bytes(bucket)
            read += 0 if bucket.has_master else weight_section_bytes(bucket)
        params = adam_params(self._problem, bucket, record.place)
        task = Task(
            bucket=bucket.index,
            params=params,
            dram_bytes_per_param=touched / params if params else 0.0,
            read_bytes=read,
            write_bytes=written,
            needs_buffer=state_buffer_bytes(bucket, record.place) > 0,
            events=tuple(e for e in (record.last_copy, record.fetched) if e is not None),
            point=self._streams.issued,
        )
        record.task = task
        if record.speculates:
            self._undecided.add(task)
        self._jobs.append(task)
        self.pipeline.submit(task)

    def _stream(self, record: _Record, seconds: float) -> None:
        """Pass a state through the GPU, with `seconds` of kernels; see [Note: two parts]."""
        bucket, streams = record.bucket, self._streams
        item, point = Item("bucket", bucket.index), streams.issued
        written = bucket.weight_bytes if record.place.weight is Place.DRAM else 0
        piece = min(1.0, self._piece_elements / bucket.numel) if bucket.numel else 1.0
        parts = (1.0,) if piece == 1.0 else (piece, 1.0 - piece)
        kernels: list[Job] = []
        for part in parts:
            # The rest takes the slots that are left, and follows the first kernel.
            slots = [self._slots[0]] if not kernels else list(self._slots)[1:]
            after = [job for job in (*slots, *kernels, record.stored) if job is not None]
            read = streams.copy_state(
                Lane.H2D, "state in", item, part * bucket.state_bytes, after=tuple(after)
            )
            kernels.append(
                streams.run_beside("adam", item, part * seconds, point=point, after=(read,))
            )
        outs = [
            streams.copy_state(
                Lane.D2H,
                "state out",
                item,
                part * (bucket.state_bytes + written),
                after=(kernel,),
            )
            for part, kernel in zip(reversed(parts), kernels, strict=True)
        ]
        if len(parts) == 1:
            self._slots.append(outs[0])
            self._slots.popleft()
        else:
            self._slots = deque([outs[0]] * (STREAM_SLOTS - 1) + [outs[1]])
        record.stored = outs[-1]
        if record.place.weight is Place.GPU:
            record.upload = kernels[-1]

    def _drain(self) -> Host:
        while self._jobs:
            task = self._jobs[0]
            yield self._until_done(task)
            self._progress(task)
        for index, record in self._records.items():
            if record.stored is not None and not record.stored.done:
                yield self._streams.until(record.stored)
            if record.upload is not None:
                yield self._streams.until(record.upload)
                yield from self.settle_on_device(index)

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

    def _cause_of_task(self, task: Task) -> Lane:
        if task.stage is Stage.READY:
            for event in task.events:
                if not event.done:
                    return self._streams.cause_of(event)
        return self.pipeline.holder_of(task)
