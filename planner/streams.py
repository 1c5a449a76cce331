"""The GPU's compute stream, its copies in and out, and the SSD's queues, as a replay fills them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import NamedTuple

from lohan_fx.planner.fluid import Fluid, Item, Job, Lane
from lohan_fx.planner.problem import Lanes

# Classes of GPU memory that vary, in the order of `Streams.memory`.
WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, WORKSPACE = range(5)


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


class _Queued(NamedTuple):
    """A copy, or a kernel beside the compute stream, in its own stream: not before the compute stream
    has passed `point`, nor before `after`."""

    job: Job
    point: int
    after: tuple[Job, ...]


class Streams:
    """Queues of what has been issued; each starts its head when the lane is free and it may.

    States on their way through the GPU have copies and kernels of their own. Other copies go before
    such copies, and such kernels before what the compute stream does: each pauses the other.

    `issued` counts the entries of the compute stream so far, which is a point in it. `marks` are the
    times of the ends of phases: (step, "forward" | "backward" | "step"). `memory` lists (time, class,
    bytes more) of the GPU.
    """

    def __init__(self, lanes: Lanes) -> None:
        self.fluid = Fluid(lanes)
        self.marks: dict[Mark, float] = {}
        self.memory: list[tuple[float, int, int]] = []
        self.issued = 0
        self.disk: dict[Lane, deque[Job]] = {Lane.SSD_READ: deque(), Lane.SSD_WRITE: deque()}
        self._compute: deque[Job | _Await | MemoryChange | Mark] = deque()
        self._passed = 0
        self._copies: dict[Lane, deque[_Queued]] = {Lane.H2D: deque(), Lane.D2H: deque()}
        self._states: dict[Lane, deque[_Queued]] = {Lane.H2D: deque(), Lane.D2H: deque()}
        self._kernels: deque[_Queued] = deque()
        self._beside: dict[Lane, Job] = {}  # of those three, what each lane began last

    @property
    def num_queued(self) -> int:
        """Entries that the compute stream has not passed."""
        return len(self._compute)

    def backlog(self) -> list[float]:
        """Work that is asked for and not done, by lane."""
        left = [0.0 if job is None else job.left for job in self.fluid.active]
        for queue in (*self._copies.values(), *self._states.values(), self._kernels):
            for queued in queue:
                left[queued.job.lane] += queued.job.left
        for lane, jobs in self.disk.items():
            left[lane] += sum(job.left for job in jobs)
        return left

    def settle(self) -> bool:
        """Start all that can start now; True if something did."""
        moved = self._settle_kernels()
        moved |= self._settle_compute()
        for lane in self._copies:
            moved |= self._settle_copies(lane)
        for lane, queue in self.disk.items():
            while queue and self.fluid.active[lane] is None:
                self.fluid.begin(queue.popleft())
                moved = True
        return moved

    def awaited(self) -> Job | None:
        """The copy for which the compute stream stands still; None where it has nothing to do."""
        if not self._compute:
            return None
        entry = self._compute[0]
        assert isinstance(entry, _Await)
        return entry.job

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
        queue, states, moved = self._copies[lane], self._states[lane], False
        while queue and self._is_free(lane) and self._may_begin(queue[0]):
            paused = self.fluid.interrupt(lane)
            if paused is not None:
                states.appendleft(_Queued(paused, 0, ()))
            self.fluid.begin(queue.popleft().job)
            moved = True
        while states and self.fluid.active[lane] is None and self._may_begin(states[0]):
            self._beside[lane] = states[0].job
            self.fluid.begin(states.popleft().job)
            moved = True
        return moved

    def _settle_kernels(self) -> bool:
        kernels, moved = self._kernels, False
        while kernels and self._may_begin(kernels[0]):
            before = self._beside.get(Lane.GPU)
            if before is not None and not before.done:
                break
            self.fluid.interrupt(Lane.GPU)  # the compute stream goes on with it afterwards
            self._beside[Lane.GPU] = kernels[0].job
            self.fluid.begin(kernels.popleft().job)
            moved = True
        return moved

    def _may_begin(self, queued: _Queued) -> bool:
        return self._passed >= queued.point and all(job.done for job in queued.after)

    def _is_free(self, lane: Lane) -> bool:
        """True if the lane does nothing but copy a state."""
        active = self.fluid.active[lane]
        return active is None or active is self._beside.get(lane)

    def enqueue(self, entry: Job | _Await | MemoryChange | Mark) -> None:
        """Add to the compute stream."""
        self._compute.append(entry)
        self.issued += 1

    def wait_for(self, job: Job | None) -> None:
        """Let the compute stream wait for a copy."""
        if job is not None and not job.done:
            self.enqueue(_Await(job))

    def hold(self, cls: int, delta: int) -> None:
        """Let bytes of a class come, or go, when the compute stream passes."""
        if delta:
            self.enqueue(MemoryChange(cls, delta))

    def copy(
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
        """A copy that starts once the compute stream has passed `point` (now), and after `after`."""
        job = Job(lane, what, item, in_pass, nbytes)
        at = self.issued if point is None else point
        self._copies[lane].append(_Queued(job, at, after))
        return job

    def copy_state(
        self, lane: Lane, what: str, item: Item, nbytes: float, *, after: tuple[Job, ...]
    ) -> Job:
        """A copy of a state that the GPU updates, whatever the compute stream does."""
        job = Job(lane, what, item, "update", nbytes)
        self._states[lane].append(_Queued(job, 0, after))
        return job

    def run_beside(
        self, what: str, item: Item, seconds: float, *, point: int, after: tuple[Job, ...]
    ) -> Job:
        """A kernel in a stream of its own, once the compute stream has passed `point`."""
        job = Job(Lane.GPU, what, item, "update", seconds, dram_bytes_per_unit=0.0)
        self._kernels.append(_Queued(job, point, after))
        return job

    def until(self, job: Job) -> Wanted:
        """Block the host until a job is done."""
        return Wanted(lambda: job.done, lambda: self.cause_of(job), job.item)

    def cause_of(self, job: Job) -> Lane:
        """The lane that a job which is not done waits for."""
        lane = job.lane
        if job is not self.fluid.active[lane] and self._is_free(lane):
            for queue in (self._copies.get(lane), self._states.get(lane), self._kernels):
                if queue and any(queued.job is job for queued in queue):
                    for earlier in queue[0].after:
                        if not earlier.done:
                            return self.cause_of(earlier)
        return lane
