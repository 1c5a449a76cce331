"""The question: one training step as stages, buckets and activations, in whole bytes.

Bytes and counts are integers, seconds are floats, rates are bytes (or parameters) per second. There
is no graph and no tensor in here, so a problem can be written down, mailed and solved anywhere.

Glossary
  stage       a slice of the forward and the slice of the backward that undoes it
  position    a moment of the step: forward stages 0..S-1 are positions 0..S-1, backward stages
              S-1..0 are positions S..2S-1; position 2S is the optimizer's turn, where it has one
  bucket      parameters that move together, with their gradients and optimizer state
  activation  a value that forward makes and backward reads
  lane        something that can be busy: GPU, H2D, D2H, SSD, CPU Adam, DRAM

        stage            0    1    2 | 2    1    0
        position         0    1    2 | 3    4    5
        kept             [========== | =========)       an activation of stage 1 on the GPU
        swapped, redone       [==)   |      [===)       the same one swapped or recomputed
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lohan_fx.budget import Capacities
from lohan_fx.errors import InfeasiblePlan, LohanError

PROBLEM_SCHEMA = 1

# Host buffers are whole pages, and direct I/O moves them: every array of a state starts on one.
PAGE = 4096
# The CUDA caching allocator hands out multiples of this; activation slots are packed in it too.
GPU_ALIGN = 512


def align_up(num_bytes: int, to: int) -> int:
    """The smallest multiple of `to` that holds `num_bytes`."""
    return -(-num_bytes // to) * to


class Place(enum.StrEnum):
    """Where a value is between its uses. RECOMPUTE is for activations only."""

    GPU = "gpu"
    DRAM = "dram"
    SSD = "ssd"
    RECOMPUTE = "recompute"


class Overlap(enum.StrEnum):
    """When the optimizer runs.

    BACKWARD: each bucket as soon as its gradients are complete, under the rest of the backward.
    NEXT_FORWARD: after step() has decided, in forward order, under the next forward.
    SERIAL: all of it inside step(), nothing else meanwhile.
    NAIVE: as BACKWARD, but read, Adam and write of a bucket back to back.
    SPECULATIVE: as NEXT_FORWARD, but a bucket that `speculates` is updated under the backward, into
    a second copy of its weights and state, as if step() were to change no gradient; step() swaps
    the copies if so, else the update is made from the old values as in NEXT_FORWARD.
    """

    BACKWARD = "backward"
    NEXT_FORWARD = "next-forward"
    SERIAL = "serial"
    NAIVE = "naive"
    SPECULATIVE = "speculative"

    @property
    def waits_for_step(self) -> bool:
        """True where nothing that training has may change before step()."""
        return self in (Overlap.NEXT_FORWARD, Overlap.SERIAL, Overlap.SPECULATIVE)


@dataclass(frozen=True, slots=True)
class BucketPlace:
    """Tiers of one bucket's weights and of its optimizer state.

    `streamed`: the state rests in DRAM, but is copied to the GPU and back for each update, which the
    GPU makes.
    """

    weight: Place
    state: Place
    streamed: bool = False

    @property
    def by_gpu(self) -> bool:
        """True if the GPU makes the bucket's updates, False if the CPU does."""
        return self.state is Place.GPU or self.streamed

    def __str__(self) -> str:
        text = f"weights {self.weight}, state {self.state}"
        return f"{text} (updated on the GPU)" if self.streamed else text


@dataclass(frozen=True, slots=True)
class Lanes:
    """How fast each lane is. A rate of 0 means that the lane does not exist.

    `duplex_factor` is the rate of one direction while both are busy, over its rate alone.
    `dram_bytes_per_s` counts every byte read or written by copies, the SSD and Adam together.
    `cpu_adam_ahead_params_per_s` is Adam's rate into a second copy; 0 is as in place.
    """

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    duplex_factor: float
    gpu_bytes_per_s: float
    ssd_read_bytes_per_s: float
    ssd_write_bytes_per_s: float
    ssd_simplex: bool
    cpu_adam_params_per_s: float
    dram_bytes_per_s: float
    cpu_adam_ahead_params_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Stage:
    """One slice of forward and backward. Stages of one `kind` are the same computation.

    The workspaces are the temporaries that are live at once inside the stage, without weights,
    activations of the problem and final gradients, which are counted on their own.
    """

    index: int
    name: str
    kind: str
    forward_s: float
    backward_s: float
    forward_workspace_bytes: int
    backward_workspace_bytes: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters that move together.

    `grad_bytes` and `state_bytes` are 0 where the bucket is frozen. `forward_stages` and
    `backward_stages` read the weights, ascending; one fetch serves a pass from the first reader to
    the last. `grad_stage` is where the last gradient becomes final; None where frozen.
    """

    index: int
    name: str
    numel: int
    weight_bytes: int
    grad_bytes: int
    state_bytes: int
    has_master: bool
    forward_stages: tuple[int, ...]
    backward_stages: tuple[int, ...]
    grad_stage: int | None

    @property
    def trainable(self) -> bool:
        return self.grad_stage is not None


@dataclass(frozen=True, slots=True)
class Activation:
    """A value that forward makes and backward reads.

    `first_backward_stage` is the first to read it in time, so the largest number;
    `last_backward_stage` the smallest. `recompute_s` is the time to make it again when every
    activation in `needs` is on the GPU. `cls`, `shape` and `dtype` are for reports only.

    Swapped, it may leave once the share `leaves_at` of the forward of `last_forward_stage` is over (1:
    at its end), and must be back when the share `returns_at` of the backward of
    `first_backward_stage` is (0: at its start); both are shares of the stage's seconds, for a step
    that recomputes nothing. See [Note: where activations move] of schedule.py.
    """

    index: int
    name: str
    bytes: int
    forward_stage: int
    last_forward_stage: int
    first_backward_stage: int
    last_backward_stage: int
    recompute_s: float
    needs: tuple[int, ...]
    can_recompute: bool
    can_swap: bool
    cls: str = "activation"
    shape: tuple[int, ...] = ()
    dtype: str = ""
    leaves_at: float = 1.0
    returns_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Problem:
    """One step to be planned.

    `fixed_gpu_bytes` are inputs, buffers and outputs, on the GPU throughout. `gpu_margin_bytes` is
    what the allocator may lose to rounding and splitting. `gpu_adam_workspace_bytes` are the
    temporaries of an update on the GPU; they count only where one is made there.
    `ssd_bounce_bytes` of DRAM serve blocking copies; they count only where something is on SSD.
    With `max_ssd_bytes_per_day`, no plan writes more to SSD in a day of steps at its predicted pace.
    `accumulates`: every trainable bucket has an fp32 sum of gradients, on the GPU if its state is
    there, else in DRAM.
    `speculating`: indices of the buckets that may speculate, in the mode that does; None is all.
    """

    capacities: Capacities
    lanes: Lanes
    stages: tuple[Stage, ...]
    buckets: tuple[Bucket, ...]
    activations: tuple[Activation, ...]
    fixed_gpu_bytes: int = 0
    gpu_margin_bytes: int = 0
    gpu_adam_workspace_bytes: int = 0
    ssd_bounce_bytes: int = 0
    overlap: Overlap = Overlap.BACKWARD
    max_ssd_bytes_per_day: int | None = None
    accumulates: bool = False
    speculating: frozenset[int] | None = None

    def __post_init__(self) -> None:
        faults = _faults(self)
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise LohanError(f"this problem makes no sense: {faults[0]}{more}")

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def may_speculate(self, bucket: int) -> bool:
        """True if an update may be made before step() decides, should the bucket's place allow it."""
        return self.overlap is Overlap.SPECULATIVE and (
            self.speculating is None or bucket in self.speculating
        )

    def to_json(self) -> str:
        raw: dict[str, Any] = {"schema": PROBLEM_SCHEMA, **dataclasses.asdict(self)}
        if self.speculating is not None:
            raw["speculating"] = sorted(self.speculating)
        return json.dumps(raw, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Problem:
        """The problem `to_json` wrote. Raises LohanError on another schema or malformed data."""
        try:
            raw = json.loads(text)
            schema = raw.pop("schema")
            if schema != PROBLEM_SCHEMA:
                raise LohanError(
                    f"this problem has schema {schema!r}, this version reads {PROBLEM_SCHEMA}"
                )
            raw["capacities"] = Capacities(**raw["capacities"])
            raw["lanes"] = Lanes(**raw["lanes"])
            raw["stages"] = tuple(Stage(**row) for row in raw["stages"])
            raw["buckets"] = tuple(Bucket(**_tuples(row)) for row in raw["buckets"])
            raw["activations"] = tuple(Activation(**_tuples(row)) for row in raw["activations"])
            raw["overlap"] = Overlap(raw["overlap"])
            if raw.get("speculating") is not None:
                raw["speculating"] = frozenset(raw["speculating"])
            return cls(**raw)
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise LohanError(f"this is not a problem as written by Problem.to_json: {exc}") from exc

    def fingerprint(self) -> str:
        """SHA-256 of what the graph fixes: no seconds, no rates, no capacities.

        The same model at the same shapes has the same fingerprint on every machine.
        """
        stages = [[s.index, s.name, s.kind] for s in self.stages]
        buckets = [list(dataclasses.astuple(b)) for b in self.buckets]
        activations = [
            [
                a.index,
                a.name,
                a.bytes,
                a.forward_stage,
                a.last_forward_stage,
                a.first_backward_stage,
                a.last_backward_stage,
                list(a.needs),
                a.can_recompute,
                a.can_swap,
            ]
            for a in self.activations
        ]
        text = json.dumps([stages, buckets, activations], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def speculates(problem: Problem, bucket: Bucket, place: BucketPlace) -> bool:
    """True if a bucket's update is made before step() decides, into a second copy in DRAM.

    Only what the CPU updates and nothing on SSD: a second copy there would double its writes.
    """
    return (
        problem.may_speculate(bucket.index)
        and bucket.trainable
        and place.state is Place.DRAM
        and not place.streamed
        and place.weight is not Place.SSD
    )


def adam_params(problem: Problem, bucket: Bucket, place: BucketPlace) -> float:
    """What an update by the CPU is in parameters that Adam updates in place in the same time."""
    lanes = problem.lanes
    if lanes.cpu_adam_ahead_params_per_s > 0 and speculates(problem, bucket, place):
        return bucket.numel * lanes.cpu_adam_params_per_s / lanes.cpu_adam_ahead_params_per_s
    return bucket.numel


class NothingFits(InfeasiblePlan):
    """No solution of `problem` was found; `least_bytes` is the least each tier must hold."""

    def __init__(self, message: str, problem: Problem, least_bytes: Mapping[str, int]) -> None:
        super().__init__(message)
        self.problem = problem
        self.least_bytes = dict(least_bytes)


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


def _faults(problem: Problem) -> list[str]:
    """Everything about a problem that no plan could mend, in words."""
    num_stages = len(problem.stages)
    inside = range(num_stages)
    found: list[str] = []
    if not num_stages:
        found.append("it has no stages")
    if problem.accumulates and problem.overlap is Overlap.SPECULATIVE:
        found.append(
            "it sums gradients, and updates before step() would read sums that are not complete; "
            f"use {str(Overlap.NEXT_FORWARD)!r} in place of {str(Overlap.SPECULATIVE)!r}"
        )
    if problem.max_ssd_bytes_per_day is not None and problem.max_ssd_bytes_per_day < 0:
        found.append(f"its bound on SSD writes is negative: {problem.max_ssd_bytes_per_day}")
    for index in problem.speculating or ():
        if not 0 <= index < len(problem.buckets):
            found.append(f"bucket {index} may speculate, of {len(problem.buckets)} in all")
    found += _misplaced("stage", problem.stages)
    found += _misplaced("bucket", problem.buckets)
    found += _misplaced("activation", problem.activations)
    for b in problem.buckets:
        readers = {*b.forward_stages, *b.backward_stages}
        if b.grad_stage is not None:
            readers.add(b.grad_stage)
        if not all(stage in inside for stage in readers):
            found.append(f"bucket {b.name!r} is read outside stages 0..{num_stages - 1}")
        if tuple(sorted(b.forward_stages)) != b.forward_stages:
            found.append(f"bucket {b.name!r}: forward_stages are not ascending")
        if tuple(sorted(b.backward_stages)) != b.backward_stages:
            found.append(f"bucket {b.name!r}: backward_stages are not ascending")
        if min(b.numel, b.weight_bytes, b.grad_bytes, b.state_bytes) < 0:
            found.append(f"bucket {b.name!r} has a negative size")
        if not b.trainable and (b.grad_bytes or b.state_bytes):
            found.append(f"frozen bucket {b.name!r} has gradients or optimizer state")
    num_activations = len(problem.activations)
    for a in problem.activations:
        if not 0 <= a.forward_stage <= a.last_forward_stage < num_stages:
            found.append(f"activation {a.name!r}: forward stages are out of order")
        if not 0 <= a.last_backward_stage <= a.first_backward_stage < num_stages:
            found.append(f"activation {a.name!r}: backward stages are out of order")
        if a.bytes < 0:
            found.append(f"activation {a.name!r} has a negative size")
        for share in (a.leaves_at, a.returns_at):
            if not 0 <= share <= 1:
                found.append(
                    f"activation {a.name!r} moves at {share}, which is no share of a stage"
                )
        for need in a.needs:
            if not 0 <= need < num_activations or need == a.index:
                found.append(f"activation {a.name!r} needs {need}, which is no other activation")
    if not found and _has_cycle(problem.activations):
        found.append("activations need one another in a circle")
    return found


def _misplaced(kind: str, rows: Sequence[Stage | Bucket | Activation]) -> list[str]:
    return [
        f"{kind} {row.name!r} has index {row.index} at place {place}"
        for place, row in enumerate(rows)
        if row.index != place
    ]


def _has_cycle(activations: tuple[Activation, ...]) -> bool:
    missing = [len(set(a.needs)) for a in activations]
    readers: list[list[int]] = [[] for _ in activations]
    for a in activations:
        for need in set(a.needs):
            readers[need].append(a.index)
    ready = [index for index, count in enumerate(missing) if count == 0]
    seen = 0
    while ready:
        seen += 1
        for reader in readers[ready.pop()]:
            missing[reader] -= 1
            if missing[reader] == 0:
                ready.append(reader)
    return seen < len(activations)
