"""The CPU's work on one bucket, as the native pipeline takes it: update it, or add its gradients up.

Jobs are ranked by their bucket's index: buckets are in the order in which the forward reads them first.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lohan_fx import native
from lohan_fx.planner import Overlap
from lohan_fx.program import Bucket, ParamSpec, Tier

from .adam_gpu import Scale, adam_step
from .buckets import BucketHome, Place, Spare
from .device import Arrival
from .gradients import GradBuffer
from .memory import HostBytes, Pools, pages
from .norms import Magnitude
from .options import AdamGroup, RuntimeOptions
from .resting import InDram, OnSsd


@dataclass(slots=True, eq=False)
class Job:
    """One job under way. Its memory and its events live here until it is done."""

    bucket: int
    ticket: int
    whole_on_ssd: bool  # new weights are to be read from SSD, so they must have been written
    updated: tuple[ParamSpec, ...]  # empty where it adds gradients only
    events: tuple[Arrival, ...]
    mark: Arrival  # the upload of new weights follows it
    buffer: GradBuffer | None
    weights: HostBytes | None = None  # where it puts new weights that are to be uploaded
    measured: tuple[ParamSpec, ...] = ()
    magnitudes: torch.Tensor | None = None  # [measured, 2] double: sum of squares, largest
    ahead: bool = False  # whether it counts is not known yet: see speculation.py

    def results(self) -> dict[int, Magnitude]:
        """L2 norm and largest magnitude of each sum measured, by pid; when done."""
        if self.magnitudes is None:
            return {}
        return {
            spec.pid: (math.sqrt(squares), largest)
            for spec, (squares, largest) in zip(
                self.measured, self.magnitudes.tolist(), strict=True
            )
        }


@dataclass(frozen=True, slots=True)
class Updated:
    """One parameter in an update: its group's scalars, which of its updates this is, from 1."""

    spec: ParamSpec
    group: AdamGroup
    step: int


def update_job(
    home: BucketHome,
    updated: Sequence[Updated],
    buffer: GradBuffer,
    scale: Scale,
    events: Sequence[Arrival],
    adds: Sequence[str] | None = None,
    *,
    into: Spare | None = None,
) -> native.AdamJob:
    """Adam over `updated`, from the gradients in `buffer`; new 16-bit weights go to their place in
    DRAM or on SSD, else to the buffer.

    Args:
        into: all new values go there, and what there is stays.
        adds: the update is made from the bucket's sums, after each gradient has gone into them so;
            None: it is made from the gradients.
    """
    steps = list(dict.fromkeys((each.group, each.step) for each in updated))
    number = {key: index for index, key in enumerate(steps)}
    out, out_extent = 0, None
    new = {} if into is None else home.addresses_in(into)
    if home.bucket.has_master:
        out = buffer.memory.address
        if into is not None:
            out = into.weight.memory.address
        elif isinstance(home.weight, InDram):
            out = home.weight.memory.address
        elif isinstance(home.weight, OnSsd):
            out_extent = (home.weight.extent, 0)
    return native.AdamJob(
        name=home.bucket.name,
        numel=home.bucket.numel,
        grad=buffer.memory.address,
        grad_dtype=home.bucket.dtype,
        segments=[(e.spec.offset, e.spec.numel, number[e.group, e.step]) for e in updated],
        groups=[adam_step(group, step, scale) for group, step in steps],
        master=_native_place(home.place("master")),
        exp_avg=_native_place(home.place("exp_avg")),
        exp_avg_sq=_native_place(home.place("exp_avg_sq")),
        out=out,
        out_extent=out_extent,
        out_dtype=home.bucket.dtype if home.bucket.has_master else None,
        ready_events=[event.handle for event in events],
        accum=0 if adds is None else home.sums().data_ptr(),
        adds=adds or (),
        rank=home.bucket.index,
        new_master=new.get("master", 0),
        new_exp_avg=new.get("exp_avg", 0),
        new_exp_avg_sq=new.get("exp_avg_sq", 0),
    )


def sum_job(
    home: BucketHome,
    specs: Sequence[ParamSpec],
    adds: Sequence[str],
    buffer: GradBuffer | None,
    events: Sequence[Arrival],
    magnitudes: torch.Tensor | None,
) -> native.AdamJob:
    """Put gradients in `buffer` into the bucket's sums, and measure those."""
    return native.AdamJob(
        name=home.bucket.name,
        numel=home.bucket.numel,
        grad=0 if buffer is None else buffer.memory.address,
        grad_dtype=home.bucket.dtype,
        segments=[(spec.offset, spec.numel, 0) for spec in specs],
        groups=[],
        master=0,
        exp_avg=0,
        exp_avg_sq=0,
        ready_events=[event.handle for event in events],
        accum=home.sums().data_ptr(),
        adds=adds,
        magnitudes=0 if magnitudes is None else magnitudes.data_ptr(),
        rank=home.bucket.index,
    )


class JobQueue:
    """The native pipeline and the jobs it has, in order of submission, until they are forgotten."""

    def __init__(
        self, pools: Pools, homes: Sequence[BucketHome], options: RuntimeOptions, cuda_device: int
    ) -> None:
        self._pools = pools
        self._deadline_s = options.deadline_s
        self._jobs: deque[Job] = deque()
        self._owned: list[HostBytes] = []
        self._progress = 0
        self._pipeline = native.AdamPipeline(
            options.num_adam_threads,
            "naive" if options.overlap == Overlap.NAIVE else "optimized",
            pools.engine,
            timeout_s=options.deadline_s,
            cuda_device=cuda_device,
        )
        largest = max((_state_buffer_bytes(home) for home in homes), default=0)
        if largest:
            self._pipeline.set_state_buffers(
                [self._state_buffer(n, largest) for n in range(options.state_buffers)]
            )

    def _state_buffer(self, number: int, nbytes: int) -> tuple[int, int]:
        memory = self._pools.host_bytes(nbytes, f"state buffer {number}", pinned=False)
        self._owned.append(memory)
        return memory.address, memory.nbytes

    def __iter__(self) -> Iterator[Job]:
        """Over those that there are now, oldest first."""
        return iter(tuple(self._jobs))

    def any_progress(self) -> bool:
        """True where a job's weights may have become ready since this was asked last."""
        before, self._progress = self._progress, self._pipeline.progress
        return before != self._progress

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def submit(
        self,
        home: BucketHome,
        work: native.AdamJob,
        *,
        events: tuple[Arrival, ...],
        mark: Arrival,
        buffer: GradBuffer | None,
        updated: tuple[ParamSpec, ...] = (),
        weights: HostBytes | None = None,
        measured: tuple[ParamSpec, ...] = (),
        magnitudes: torch.Tensor | None = None,
    ) -> Job:
        ticket = self._pipeline.submit(work)
        recorder = self._pools.device.recorder
        if recorder is not None:
            recorder.submitted(home.bucket.name, "adam" if updated else "sum")
        on_ssd = home.weight_tier is Tier.SSD
        job = Job(
            home.bucket.index,
            ticket,
            on_ssd,
            updated,
            events,
            mark,
            buffer,
            weights,
            measured,
            magnitudes,
        )
        self._jobs.append(job)
        return job

    def is_done(self, job: Job) -> bool:
        """True also after a failure, which `wait` raises."""
        return self._pipeline.done(job.ticket)

    def has_weights(self, job: Job) -> bool:
        """May the weights at rest be read? True also after a failure."""
        if self._pipeline.done(job.ticket):
            return True
        return not job.whole_on_ssd and self._pipeline.weights_ready(job.ticket)

    def wait_for_weights(self, job: Job) -> None:
        """Raises TransferError: the job failed or took too long; names it."""
        wait = self._pipeline.wait if job.whole_on_ssd else self._pipeline.wait_weights
        wait(job.ticket, self._deadline_s)

    def wait_for_any(self, jobs: Sequence[Job]) -> None:
        """Until one of them is done, or the host can read its weights; a failed one counts.

        Raises TransferError: it took too long; names the first.
        """
        self._pipeline.wait_any_weights([job.ticket for job in jobs], self._deadline_s)

    def wait(self, job: Job) -> None:
        """Raises TransferError: the job failed or took too long; names it."""
        self._pipeline.wait(job.ticket, self._deadline_s)

    def cancel(self, home: BucketHome, job: Job) -> None:
        """Have it done soon: its update is not made, unless that has begun."""
        recorder = self._pools.device.recorder
        if self._pipeline.cancel(job.ticket) and recorder is not None:
            recorder.withdrawn(home.bucket.name)

    def forget(self, job: Job) -> None:
        self._jobs.remove(job)

    def join(self) -> None:
        """End the threads; what they had not begun is dropped."""
        self._pipeline.close()

    def close(self) -> None:
        """Join, and give the state buffers back."""
        self._pipeline.close()
        self._jobs.clear()
        for memory in self._owned:
            self._pools.free_host(memory)
        self._owned.clear()

    def stats(self) -> dict[str, float]:
        return dict(self._pipeline.stats())

    def take_trace(self) -> list[tuple[str, str, float, float]]:
        """(bucket, lane, start, end) of finished work, seconds of CLOCK_MONOTONIC."""
        return list(self._pipeline.take_trace())


def runs(bucket: Bucket, updated: Sequence[ParamSpec]) -> Iterable[tuple[int, int]]:
    """Half-open element ranges that cover `updated` and, besides them, only padding."""
    wanted = {spec.pid for spec in updated}
    found: list[list[int]] = []
    open_run = False
    for spec in bucket.params:
        if spec.pid not in wanted:
            open_run = False
            continue
        if open_run:
            found[-1][1] = spec.offset + spec.numel
        else:
            found.append([spec.offset, spec.offset + spec.numel])
            open_run = True
    return [(start, stop) for start, stop in found]


def _native_place(place: Place) -> int | tuple[int, int]:
    """A host address, or an extent and a byte offset in it."""
    if isinstance(place.home, InDram):
        return place.home.memory.address + place.offset
    assert isinstance(place.home, OnSsd)
    return place.home.extent, place.offset


def _state_buffer_bytes(home: BucketHome) -> int:
    """State buffer that one update of the bucket takes: its fp32 arrays on SSD, on whole pages."""
    nbytes = pages(home.bucket.numel * 4)
    names = ("master", "exp_avg", "exp_avg_sq")
    return sum(nbytes for name in names if home.place(name).home.tier is Tier.SSD)
