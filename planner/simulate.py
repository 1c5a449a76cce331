"""What one steady step of a placement does, moment by moment; predictions come from here.

Steps are replayed one after another until two take the same time, do the same work and leave the same
behind: from then on they repeat.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lohan_fx.planner import streams
from lohan_fx.planner.cost import estimate
from lohan_fx.planner.fluid import LANE_NAMES, Item, Job, Lane
from lohan_fx.planner.ledger import Ledger
from lohan_fx.planner.problem import (
    GPU_ALIGN,
    BucketPlace,
    Overlap,
    Place,
    Problem,
    align_up,
)
from lohan_fx.planner.replay import Replay
from lohan_fx.planner.solution import Prediction, Windows
from lohan_fx.planner.streams import Mark
from lohan_fx.planner.traffic import accumulator_bytes
from lohan_fx.planner.traffic import state_section_bytes as state_bytes

MEMORY_CLASSES = ("weights", "gradients", "optimizer", "activations", "workspace", "buffers")
# Steps are the same when they differ by less than this share; after so many, the last one counts.
_SAME = 1e-6
_MOST_STEPS = 16


@dataclass(frozen=True, slots=True)
class TimeSpan:
    """A lane at work, in seconds from the start of the step.

    `kind` and `index` name a stage, a bucket or an activation of the problem; `in_pass` is the
    phase it works for: forward, backward or update. What the step before left over begins at 0.
    """

    lane: str
    what: str
    kind: str
    index: int
    name: str
    in_pass: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Stall:
    """The GPU idle, and the lane ("dram" where that slows it) and item that it waits for."""

    start_s: float
    end_s: float
    cause: str
    kind: str
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class TierMemory:
    """Bytes in use by class from each of `times_s` to the next; classes of MEMORY_CLASSES."""

    times_s: tuple[float, ...]
    bytes_by_class: Mapping[str, tuple[int, ...]]

    @property
    def total(self) -> tuple[int, ...]:
        """Bytes in use from each of `times_s` to the next."""
        return tuple(sum(now) for now in zip(*self.bytes_by_class.values(), strict=True))

    @property
    def peak_bytes(self) -> int:
        return max(self.total, default=0)


@dataclass(frozen=True, slots=True)
class Simulation:
    """One steady step.

    `step_s` is the time from the end of one step to the end of the next; forward, backward and, in
    serial mode, the update add up to it. An update that outlives its backward shows in the forward
    that waits for it. `stall_s` are seconds of idle GPU by cause; `bottleneck` is the cause with
    the most of them, or the GPU where it is busy for longer. `steady` is False where steps did not
    come to repeat; this is the last one replayed then.
    """

    step_s: float
    forward_s: float
    backward_s: float
    update_s: float
    bottleneck: str
    spans: tuple[TimeSpan, ...]
    stalls: tuple[Stall, ...]
    stall_s: Mapping[str, float]
    memory: Mapping[str, TierMemory]
    steady: bool


def simulate(
    problem: Problem,
    buckets: Sequence[BucketPlace],
    activations: Sequence[Place],
    windows: Windows,
) -> Simulation:
    """Replay a placement until its steps repeat.

    Raises LohanError where the windows are too small for anything to go on, or a lane is needed
    that does not exist.
    """
    run = Replay(problem, buckets, activations, windows)
    ends: list[tuple[float, ...]] = []
    while True:
        run.settle()
        step = len(ends)
        if Mark(step, "step") not in run.marks:
            run.advance()
            continue
        begin_s, end_s = _end(run, step - 1), _end(run, step)
        ends.append((end_s - begin_s, *run.backlog(), *_busy_s(run, begin_s, end_s)))
        steady = step > 0 and _is_same(*ends[-2:])
        if steady or step >= _MOST_STEPS - 1:
            break
    forward_end = run.marks[Mark(step, "forward")]
    backward_end = run.marks[Mark(step, "backward")]
    if problem.overlap is not Overlap.SERIAL:
        backward_end = end_s
    names = _Names(problem)
    spans = _spans(run, names, begin_s, end_s)
    stalls = _stalls(run, names, begin_s, end_s)
    stall_s: dict[str, float] = {}
    for stall in stalls:
        stall_s[stall.cause] = stall_s.get(stall.cause, 0.0) + stall.end_s - stall.start_s
    gpu_s = sum(span.end_s - span.start_s for span in spans if span.lane == "gpu")
    blame = {"gpu": gpu_s, **{cause: s for cause, s in stall_s.items() if cause != "gpu"}}
    return Simulation(
        step_s=end_s - begin_s,
        forward_s=forward_end - begin_s,
        backward_s=backward_end - forward_end,
        update_s=end_s - backward_end,
        bottleneck=max(blame, key=lambda lane: blame[lane]),
        spans=spans,
        stalls=stalls,
        stall_s=stall_s,
        memory=_memory(run, problem, buckets, activations, windows, begin_s, end_s),
        steady=steady,
    )


def predict(
    problem: Problem,
    buckets: Sequence[BucketPlace],
    activations: Sequence[Place],
    windows: Windows,
) -> Prediction:
    """What one steady step of this placement takes: bytes by the cost model, seconds by replay.

    Raises LohanError where the windows are too small for anything to go on.
    """
    estimated = estimate(problem, buckets, activations, windows)
    if math.isinf(estimated.step_s):
        return estimated
    return simulated(estimated, simulate(problem, buckets, activations, windows))


def simulated(estimated: Prediction, simulation: Simulation) -> Prediction:
    """The prediction with the seconds of a simulation.

    Work that is still piling up after the last step replayed (writes of weights that no forward
    reads) ends with every step as long as its busiest lane, so no prediction is below that.
    """
    longer = 1.0
    if 0 < simulation.step_s < estimated.bound_s:
        longer = estimated.bound_s / simulation.step_s
    return dataclasses.replace(
        estimated,
        step_s=simulation.step_s * longer,
        forward_s=simulation.forward_s * longer,
        backward_s=simulation.backward_s * longer,
        update_s=simulation.update_s * longer,
        bottleneck=simulation.bottleneck,
        stall_s={cause: s * longer for cause, s in simulation.stall_s.items()},
    )


def _end(run: Replay, step: int) -> float:
    return run.marks[Mark(step, "step")] if step >= 0 else 0.0


def _is_same(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) <= _SAME * max(a, b) for a, b in zip(one, other, strict=True))


def _busy_s(run: Replay, begin_s: float, end_s: float) -> list[float]:
    """Seconds between two times in which each lane had a job."""
    busy = [0.0] * len(LANE_NAMES)
    for job in (*run.fluid.finished, *(job for job in run.fluid.active if job is not None)):
        busy[job.lane] += max(0.0, min(_job_end(job, end_s), end_s) - max(job.start_s, begin_s))
    return busy


class _Names:
    def __init__(self, problem: Problem) -> None:
        self._rows = {
            "stage": [s.name for s in problem.stages],
            "bucket": [b.name for b in problem.buckets],
            "activation": [a.name for a in problem.activations],
        }

    def of(self, item: Item) -> str:
        return self._rows[item.kind][item.number]


def _spans(run: Replay, names: _Names, begin_s: float, end_s: float) -> tuple[TimeSpan, ...]:
    spans = []
    active = [job for job in run.fluid.active if job is not None]
    for job in [*run.fluid.finished, *active]:
        start, end = max(job.start_s, begin_s), min(_job_end(job, end_s), end_s)
        if end > start:
            spans.append(
                TimeSpan(
                    LANE_NAMES[job.lane],
                    job.what,
                    job.item.kind,
                    job.item.number,
                    names.of(job.item),
                    job.in_pass,
                    start - begin_s,
                    end - begin_s,
                )
            )
    spans.sort(key=lambda span: (span.lane, span.start_s))
    return tuple(spans)


def _job_end(job: Job, now_s: float) -> float:
    return job.end_s if job.done else now_s


def _stalls(run: Replay, names: _Names, begin_s: float, end_s: float) -> tuple[Stall, ...]:
    return tuple(
        Stall(
            max(start, begin_s) - begin_s,
            min(end, end_s) - begin_s,
            cause,
            item.kind,
            item.number,
            names.of(item),
        )
        for start, end, cause, item in run.stalls
        if min(end, end_s) > max(start, begin_s)
    )


def _memory(
    run: Replay,
    problem: Problem,
    buckets: Sequence[BucketPlace],
    activations: Sequence[Place],
    windows: Windows,
    begin_s: float,
    end_s: float,
) -> dict[str, TierMemory]:
    """GPU memory as the compute stream passes; DRAM and SSD are allocated before the first step."""
    used = [0] * len(MEMORY_CLASSES)
    for bucket, place in zip(problem.buckets, buckets, strict=True):
        if place.weight is Place.GPU:
            used[streams.WEIGHTS] += align_up(bucket.weight_bytes, GPU_ALIGN)
        if bucket.trainable and place.state is Place.GPU:
            used[streams.OPTIMIZER] += state_bytes(bucket)
            if problem.accumulates:
                used[streams.GRADIENTS] += accumulator_bytes(bucket)
    used[streams.WORKSPACE] += problem.fixed_gpu_bytes
    if any(place.streamed for place in buckets):
        used[streams.WORKSPACE] += problem.gpu_adam_workspace_bytes
    used[MEMORY_CLASSES.index("buffers")] += windows.stream_bytes
    times, rows = [0.0], [tuple(used)]
    for now_s, changes in itertools.groupby(run.memory, key=lambda change: change[0]):
        if now_s > end_s:
            break
        fullest = rows[-1]
        for _, cls, delta in changes:
            used[cls] += delta
            if sum(used) > sum(fullest):
                fullest = tuple(used)
        if now_s < begin_s:
            rows = [tuple(used)]
            continue
        # What is full for a moment only counts, too.
        for row in dict.fromkeys((fullest, tuple(used))):
            if row != rows[-1]:
                times.append(now_s - begin_s)
                rows.append(row)
    ledger = Ledger(problem, buckets, activations)
    memory = {"gpu": _tier(times, rows)}
    for tier, by_class in (
        ("dram", ledger.dram_by_class(windows)),
        ("ssd", ledger.ssd_by_class()),
    ):
        memory[tier] = _tier([0.0], [tuple(by_class.get(cls, 0) for cls in MEMORY_CLASSES)])
    return memory


def _tier(times: Sequence[float], rows: Sequence[Sequence[int]]) -> TierMemory:
    return TierMemory(
        tuple(times), dict(zip(MEMORY_CLASSES, map(tuple, zip(*rows, strict=True)), strict=True))
    )


__all__ = [
    "LANE_NAMES",
    "MEMORY_CLASSES",
    "Lane",
    "Simulation",
    "Stall",
    "TierMemory",
    "TimeSpan",
    "predict",
    "simulate",
    "simulated",
]
