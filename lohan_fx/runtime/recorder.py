"""What a run did, noted as it happens: the work of each lane, what was waited for, bytes held.

A point in time is seconds of the host on the CPU, and an event with timing on CUDA, recorded in the
stream that it is about. Events are read when recording is over, so noting never waits for the device.
`timelines.py` makes timelines of the notes.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

# A move (or "adam", "upload", "gradient", "state in", "state out") and the bucket or slot that it moves.
About = tuple[str, int]
Point = Any  # float or torch.cuda.Event

# What the host waits for, as `Waits` calls it, and the lane that makes it wait.
_LANE_OF_WAIT = {
    "ssd_read": "ssd_read",
    "ssd_write": "ssd_write",
    "staging": "h2d",
    "h2d": "h2d",
    "d2h": "d2h",
    "adam": "cpu_adam",
    "gradient buffer": "cpu_adam",
    "gradient norm": "gpu",
}
_PASS_OF = {
    "gradient": "backward",
    "offload": "forward",
    "upload": "update",
    "adam": "update",
    "state in": "update",
    "state out": "update",
}


class Clock(Protocol):
    """One time for the host and the device: seconds of time.perf_counter()."""

    def now(self, stream: Any = None) -> Point:
        """The point that `stream` (None: where compute goes) reaches after what it holds now."""
        ...

    def seconds(self) -> Callable[[Point], float]:
        """How to read points, all of which have been reached then; waits for the device."""
        ...


class HostClock:
    def now(self, stream: Any = None) -> Point:
        return time.perf_counter()

    def seconds(self) -> Callable[[Point], float]:
        return float


class CudaClock:
    """Events, placed on the host's clock by one event at each end of the recording."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first, self._first_s = self._anchor()

    def now(self, stream: Any = None) -> Point:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream if stream is not None else torch.cuda.current_stream(self._device))
        return event

    def _anchor(self) -> tuple[Point, float]:
        torch.cuda.synchronize(self._device)
        before = time.perf_counter()
        event = self.now()
        event.synchronize()
        return event, (before + time.perf_counter()) / 2

    def seconds(self) -> Callable[[Point], float]:
        first, first_s = self._first, self._first_s
        last, last_s = self._anchor()
        # The two clocks do not run at quite the same pace.
        pace = (last_s - first_s) / max(first.elapsed_time(last), 1e-3)
        return lambda point: first_s + pace * float(first.elapsed_time(point))


class Work(NamedTuple):
    """A lane at work on an item: `number` is that of a stage, bucket or slot, which follows from `what`."""

    lane: str
    what: str
    number: int
    program: int
    in_pass: str
    start: Point
    end: Point


class Pause(NamedTuple):
    """The compute stream, or the host that feeds it, waits for a lane; `about` is what for."""

    lane: str
    about: About | None
    program: int
    start: Point
    end: Point


class Begin(NamedTuple):
    """A forward begins; `opens_step` where it is the first one of a training step."""

    program: int
    opens_step: bool
    host_s: float
    point: Point
    resting: tuple[tuple[str, tuple[int, ...]], ...]  # tier and bytes by class: DRAM, SSD


class Held(NamedTuple):
    """GPU bytes by class when the compute stream passes."""

    point: Point
    by_class: tuple[int, ...]


class Recorder:
    """Takes notes; one thread at a time, as steps run.

    Args:
        device: where the model computes. On CUDA, making a recorder waits for the device once.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock: Clock = CudaClock(device) if device.type == "cuda" else HostClock()
        self.now = self._clock.now
        self.works: list[Work] = []
        self.pauses: list[Pause] = []
        self.begins: list[Begin] = []
        self.held: list[Held] = []
        self.native: list[tuple[str, str, float, float]] = []  # see Observer.take_trace
        self.jobs: defaultdict[str, deque[str]] = defaultdict(deque)  # by bucket: adam or sum
        self.closed: Point | None = None
        self._program = 0
        self._in_pass = "forward"
        self._stepped = True
        self._entered: tuple[str, int, str, Point] | None = None
        self._waits: list[tuple[str, About | None, Point]] = []

    # Passes

    def begin(
        self,
        program: int,
        training: bool,
        resting: tuple[tuple[str, tuple[int, ...]], ...],
    ) -> None:
        """A forward begins. The first training one after a step opens the next step."""
        opens = training and self._stepped
        if opens:
            self._stepped = False
        self.begins.append(Begin(program, opens, time.perf_counter(), self.now(), resting))
        self._program, self._in_pass = program, "forward"

    def begin_backward(self) -> None:
        self._in_pass = "backward"

    def stepped(self) -> None:
        """The optimizer's step has been called."""
        self._stepped = True

    def close(self) -> None:
        """The last step ends here; what is under way may still be noted."""
        self.closed = self.now()

    def seconds(self) -> Callable[[Point], float]:
        """How to read points; waits for the device."""
        return self._clock.seconds()

    # The GPU

    def enter(self, what: str, index: int) -> None:
        """The compute stream begins to work on an item: `what` is "stage" or "adam"."""
        in_pass = _PASS_OF.get(what, self._in_pass)
        self._entered = (in_pass if what == "stage" else what, index, in_pass, self.now())

    def hold(self, by_class: tuple[int, ...]) -> None:
        """GPU bytes held when the item was begun that was entered last."""
        assert self._entered is not None
        self.held.append(Held(self._entered[3], by_class))

    def leave(self) -> None:
        """It is done with the item."""
        entered, self._entered = self._entered, None
        if entered is not None:
            what, index, in_pass, start = entered
            self.works.append(Work("gpu", what, index, self._program, in_pass, start, self.now()))

    # Copies and waits

    def copied(self, lane: str, about: About, start: Point, end: Point) -> None:
        what, index = about
        in_pass = _PASS_OF.get(what, self._in_pass)
        self.works.append(Work(lane, what, index, self._program, in_pass, start, end))

    def paused(self, lane: str, about: About | None, start: Point, end: Point) -> None:
        """Nothing was computed between two points, for want of this."""
        if not self._waits:
            self.pauses.append(Pause(lane, about, self._program, start, end))

    def wait(self, kind: str, about: About | None) -> None:
        """The host begins to wait, until `waited`. A wait inside of another is part of it."""
        self._waits.append((kind, about, None if self._waits else self.now()))

    def waited(self) -> None:
        kind, about, start = self._waits.pop()
        lane = _LANE_OF_WAIT.get(kind)
        if not self._waits and lane is not None:
            self.paused(lane, about, start, self.now())

    # The optimizer

    def submitted(self, bucket: str, what: str) -> None:
        """The CPU was given work on a bucket; its works on one bucket are done in this order."""
        self.jobs[bucket].append(what)

    def withdrawn(self, bucket: str) -> None:
        """The work given last on a bucket will not be done."""
        if self.jobs[bucket]:  # else it was given before recording began
            self.jobs[bucket].pop()
