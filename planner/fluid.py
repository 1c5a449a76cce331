"""Lanes that work at rates which depend on what the others do, and the clock that drives them.

[Note: sharing] At any moment each lane does one job. A copy in and a copy out slow each other to
`duplex_factor` of their rates; reads and writes of a simplex SSD get half the device each. If what
the copies, the SSD and Adam then ask of DRAM is more than it has, all of them slow down in
proportion.
"""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Callable
from typing import NamedTuple

from lohan_fx.errors import LohanError
from lohan_fx.planner.problem import Lanes


class Lane(enum.IntEnum):
    """What can be busy; `words[lane]` is its name in plans."""

    GPU = 0
    H2D = 1
    D2H = 2
    SSD_READ = 3
    SSD_WRITE = 4
    CPU_ADAM = 5


LANE_NAMES = ("gpu", "h2d", "d2h", "ssd_read", "ssd_write", "cpu_adam")


class Item(NamedTuple):
    """What a job is about: the stage, bucket or activation (`kind`) with this number."""

    kind: str
    number: int


class Job:
    """Work of one lane: seconds on the GPU, parameters of Adam, bytes elsewhere.

    `dram_bytes_per_unit` of work pass through DRAM. `then` is called when it is done.
    """

    __slots__ = (
        "done",
        "dram_bytes_per_unit",
        "end_s",
        "in_pass",
        "item",
        "lane",
        "left",
        "start_s",
        "then",
        "what",
        "work",
    )

    def __init__(
        self,
        lane: Lane,
        what: str,
        item: Item,
        in_pass: str,
        work: float,
        *,
        dram_bytes_per_unit: float = 1.0,
        then: Callable[[], None] | None = None,
    ) -> None:
        self.lane = lane
        self.what = what
        self.item = item
        self.in_pass = in_pass
        self.work = self.left = float(work)
        self.dram_bytes_per_unit = dram_bytes_per_unit
        self.then = then
        self.done = False
        self.start_s = self.end_s = math.nan


class Fluid:
    """At most one job per lane, under way together."""

    def __init__(self, lanes: Lanes) -> None:
        self.now_s = 0.0
        self.active: list[Job | None] = [None] * len(Lane)
        self.finished: list[Job] = []
        self.dram_limited = False  # since the last step of the clock
        self._alone = (
            1.0,
            lanes.h2d_bytes_per_s,
            lanes.d2h_bytes_per_s,
            lanes.ssd_read_bytes_per_s,
            lanes.ssd_write_bytes_per_s,
            lanes.cpu_adam_params_per_s,
        )
        self._duplex = lanes.duplex_factor
        self._simplex = lanes.ssd_simplex
        self._dram = lanes.dram_bytes_per_s if lanes.dram_bytes_per_s > 0 else math.inf

    def begin(self, job: Job) -> None:
        """Start a job on its lane, which is free. One without work is done at once.

        Raises LohanError where the lane does not exist.
        """
        job.start_s = self.now_s
        if job.left <= 0.0:
            self._finish(job)
        elif self._alone[job.lane] <= 0:
            raise LohanError(f"this plan needs lane {LANE_NAMES[job.lane]}, which does not exist")
        else:
            self.active[job.lane] = job

    def interrupt(self, lane: Lane) -> Job | None:
        """Take its job from a lane, which has begun it; None if the lane is free.

        What is done of it counts as a job that has ended; the rest can begin again.
        """
        job = self.active[lane]
        self.active[lane] = None
        if job is not None and self.now_s > job.start_s:
            done = copy.copy(job)
            done.work, done.then = job.work - job.left, None
            self._finish(done)
        return job

    def advance(self) -> bool:
        """Move the clock to the next end of a job and finish what ends there; False if all is idle."""
        active = self.active
        busy = [job for job in active if job is not None]
        if not busy:
            return False
        rates = list(self._alone)
        if active[Lane.H2D] is not None and active[Lane.D2H] is not None:
            rates[Lane.H2D] *= self._duplex
            rates[Lane.D2H] *= self._duplex
        if (
            self._simplex
            and active[Lane.SSD_READ] is not None
            and active[Lane.SSD_WRITE] is not None
        ):
            rates[Lane.SSD_READ] *= 0.5
            rates[Lane.SSD_WRITE] *= 0.5
        demand = 0.0
        for job in busy:
            demand += rates[job.lane] * job.dram_bytes_per_unit
        self.dram_limited = demand > self._dram * (1 + 1e-12)
        if self.dram_limited:
            share = self._dram / demand
            for job in busy:
                if job.dram_bytes_per_unit:
                    rates[job.lane] *= share
        step_s = min(job.left / rates[job.lane] for job in busy)
        self.now_s += step_s
        for job in busy:
            job.left -= step_s * rates[job.lane]
            # Rounding must not leave a sliver of a job that was meant to end here.
            if job.left <= 1e-9 * job.work:
                active[job.lane] = None
                self._finish(job)
        return True

    def _finish(self, job: Job) -> None:
        job.left = 0.0
        job.done = True
        job.end_s = self.now_s
        self.finished.append(job)
        if job.then is not None:
            job.then()
