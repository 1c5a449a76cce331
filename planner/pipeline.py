"""The optimizer's pipeline in the replay: read, Adam, write, as kernels/pipeline.h orders them."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass

from lohan_fx.planner.fluid import Fluid, Item, Job, Lane


class Stage(enum.IntEnum):
    """Where a task is; see kernels/pipeline_task.h."""

    QUEUED = 0  # on SSD; waits for a state buffer
    READING = 1
    READY = 2  # all in host memory; waits for its events and its turn
    UPDATING = 3
    WRITING = 4  # new weights in host memory; state and weights on their way to SSD
    DONE = 5


@dataclass(slots=True, eq=False)
class Task:
    """One bucket's update. `events` are copies that must be complete before Adam starts.

    `params` are those that Adam updates in place in as long. `point` is where the compute stream was when
    the update became possible.
    """

    bucket: int
    params: float
    dram_bytes_per_param: float
    read_bytes: int
    write_bytes: int
    needs_buffer: bool
    events: tuple[Job, ...]
    point: int
    stage: Stage = Stage.READY

    def has_events(self) -> bool:
        """True once everything that Adam must follow has happened."""
        return all(event.done for event in self.events)


class Pipeline:
    """Tasks in the order of submission; `settle` does what can be done now."""

    def __init__(
        self, fluid: Fluid, disk: dict[Lane, deque[Job]], state_buffers: int, *, naive: bool
    ) -> None:
        self._fluid = fluid
        self._disk = disk
        self._buffers = state_buffers
        self._naive = naive
        self._tasks: deque[Task] = deque()  # not done
        self._of_bucket: dict[int, deque[Task]] = {}  # not done
        self._queued: deque[Task] = deque()
        # Not yet updated, apart by whether they pass through a state buffer.
        self._buffered: deque[Task] = deque()
        self._plain: deque[Task] = deque()
        self.progress = 0  # updates made and tasks done
        self._writing: deque[Task] = deque()
        self._write: Job | None = None

    def submit(self, task: Task) -> None:
        self._tasks.append(task)
        self._of_bucket.setdefault(task.bucket, deque()).append(task)
        if task.needs_buffer:
            task.stage = Stage.QUEUED
            self._queued.append(task)
            self._buffered.append(task)
        else:
            self._plain.append(task)
        self._start_reads()

    def settle(self) -> bool:
        """Start an update and a write if they can start; True if something did."""
        moved = False
        while self._fluid.active[Lane.CPU_ADAM] is None:
            task = self._next()
            if task is None:
                break
            task.stage = Stage.UPDATING
            (self._buffered if task.needs_buffer else self._plain).remove(task)
            self._fluid.begin(
                Job(
                    Lane.CPU_ADAM,
                    "adam",
                    Item("bucket", task.bucket),
                    "update",
                    task.params,
                    dram_bytes_per_unit=task.dram_bytes_per_param,
                    then=lambda task=task: self._updated(task),  # type: ignore[misc]
                )
            )
            moved = True
        return moved

    def backlog(self) -> tuple[float, float]:
        """Parameters not yet updated, and bytes not yet written, of what has been submitted."""
        waiting = sum(task.params for task in self._tasks if task.stage < Stage.UPDATING)
        return waiting, sum(task.write_bytes for task in self._tasks)

    def holder_of(self, task: Task) -> Lane:
        """The lane that holds back a task whose events are complete."""
        if task.stage is Stage.WRITING or (task.stage is Stage.QUEUED and self._write is not None):
            return Lane.SSD_WRITE
        if task.stage <= Stage.READING and self._fluid.active[Lane.SSD_READ] is not None:
            return Lane.SSD_READ
        return Lane.CPU_ADAM

    def _next(self) -> Task | None:
        """See [Note: whose turn it is] in kernels/pipeline.h."""
        if self._naive:
            front = self._tasks[0] if self._tasks else None
            if front is None or front.stage >= Stage.UPDATING or not front.has_events():
                return None
            if front.stage is Stage.QUEUED:
                self._start_reads()
            return front if front.stage is Stage.READY else None
        if self._buffered and self._may_update(self._buffered[0]):
            return self._buffered[0]
        ready = []
        for task in self._plain:
            if not task.has_events():
                break
            ready.append(task)
        ready.sort(key=lambda task: task.bucket)
        return next(filter(self._may_update, ready), None)

    def _may_update(self, task: Task) -> bool:
        first = self._of_bucket[task.bucket][0] is task
        return task.stage is Stage.READY and first and task.has_events()

    def _start_reads(self) -> None:
        while self._queued:
            task = self._queued[0]
            if self._naive and (task is not self._tasks[0] or not task.has_events()):
                return
            if not self._buffers or self._of_bucket[task.bucket][0] is not task:
                return
            self._queued.popleft()
            self._buffers -= 1
            task.stage = Stage.READING
            self._disk[Lane.SSD_READ].append(
                Job(
                    Lane.SSD_READ,
                    "read state",
                    Item("bucket", task.bucket),
                    "update",
                    task.read_bytes,
                    then=lambda task=task: self._read(task),  # type: ignore[misc]
                )
            )

    def _read(self, task: Task) -> None:
        task.stage = Stage.READY

    def _updated(self, task: Task) -> None:
        self.progress += 1
        if not task.write_bytes:
            self._finish(task)
            return
        task.stage = Stage.WRITING
        self._writing.append(task)
        self._next_write()

    def _next_write(self) -> None:
        """One job at a time is written."""
        if self._write is None and self._writing:
            task = self._writing.popleft()
            self._write = Job(
                Lane.SSD_WRITE,
                "write state",
                Item("bucket", task.bucket),
                "update",
                task.write_bytes,
                then=lambda: self._written(task),
            )
            self._disk[Lane.SSD_WRITE].append(self._write)

    def _written(self, task: Task) -> None:
        self._write = None
        self._finish(task)
        self._next_write()

    def _finish(self, task: Task) -> None:
        task.stage = Stage.DONE
        if task.needs_buffer:
            self._buffers += 1
        self.progress += 1
        self._tasks.remove(task)
        self._of_bucket[task.bucket].remove(task)
        self._start_reads()
