"""What a placement costs: busy seconds on every lane, and bytes in every tier over time.

This is the only model of time and memory that solvers use. The bytes of predictions come from it, and
their bound; their seconds come from `simulate`.

[Note: loads add up]
Every item's share of lane traffic, and the positions at which it occupies the GPU, depend on its
own place alone (once the backward intervals of activations are known). So a plan's cost is a sum,
and one move changes it by a difference. What does not add up are windows and buffers: those follow
from the largest item of a sort, and the Ledger keeps the sizes for them.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lohan_fx.errors import LohanError
from lohan_fx.planner.problem import (
    GPU_ALIGN,
    PAGE,
    Activation,
    Bucket,
    BucketPlace,
    Lanes,
    Overlap,
    Place,
    Problem,
    align_up,
)
from lohan_fx.planner.solution import Prediction, Windows

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Span = tuple[int, int, int]  # positions [start, end) and bytes

LANES = ("gpu", "h2d", "d2h", "ssd_read", "ssd_write", "cpu_adam", "dram")
_GPU, _H2D, _D2H, _READ, _WRITE, _ADAM, _DRAM = range(len(LANES))
FORWARD, BACKWARD, UPDATE = range(3)
NUM_PHASES = 3

# A traffic vector: amounts per phase and lane, then the optimizer's share of SSD reads, SSD writes
# and Adam for buckets whose state is on SSD. GPU amounts are seconds, Adam amounts parameters, all
# others bytes.
_CHAIN = NUM_PHASES * len(LANES)
TRAFFIC_WIDTH = _CHAIN + 3

G, D, S = Place.GPU, Place.DRAM, Place.SSD
_MASTERED = (
    BucketPlace(G, G),
    BucketPlace(G, D),
    BucketPlace(G, S),
    BucketPlace(D, D),
    BucketPlace(D, S),
    BucketPlace(S, D),
    BucketPlace(S, S),
)
# Without a separate master the weight is what Adam updates, so it stays with whoever does that.
_UNMASTERED = tuple(p for p in _MASTERED if (p.weight is G) == (p.state is G))
_FROZEN = tuple(p for p in _MASTERED if p.weight is p.state)


class Room(enum.IntEnum):
    """How generous windows are.

    NONE: each move waits where it starts. ITEM: one item moves while another is used.
    STAGE: up to a stage's worth moves ahead, within a fixed share of the GPU.
    """

    NONE = 0
    ITEM = 1
    STAGE = 2


# At Room.STAGE: GPU capacity over these is the most a window takes, unless one item is larger.
FETCH_SHARE = 16
WINDOW_SHARE = 32
# Gradients of so many buckets at most may wait for the CPU in DRAM that nothing else needs.
_MOST_GRAD_BUFFERS = 48


def bucket_places(bucket: Bucket) -> tuple[BucketPlace, ...]:
    """The places a bucket may have, fastest first."""
    if not bucket.trainable:
        return _FROZEN
    return _MASTERED if bucket.has_master else _UNMASTERED


def activation_places(activation: Activation) -> tuple[Place, ...]:
    """The places an activation may have, fastest first."""
    swap = (Place.DRAM, Place.SSD) if activation.can_swap else ()
    redo = (Place.RECOMPUTE,) if activation.can_recompute else ()
    return (Place.GPU, *swap, *redo)


def backward_intervals(problem: Problem, places: Sequence[Place]) -> list[tuple[int, int]]:
    """(first, last) backward stage at which each activation is on the GPU, first >= last.

    A value needed to recompute another is there when that other is first used, and so on back.
    """
    first = [a.first_backward_stage for a in problem.activations]
    last = [a.last_backward_stage for a in problem.activations]
    for index in readers_first(problem.activations):
        if places[index] is Place.RECOMPUTE:
            for need in problem.activations[index].needs:
                first[need] = max(first[need], first[index])
                last[need] = min(last[need], first[index])
    return list(zip(first, last, strict=True))


def readers_first(activations: Sequence[Activation]) -> list[int]:
    """Indices such that every activation comes before all it needs."""
    waiting = [0] * len(activations)
    for a in activations:
        for need in a.needs:
            waiting[need] += 1
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order: list[int] = []
    while ready:
        index = ready.pop()
        order.append(index)
        for need in activations[index].needs:
            waiting[need] -= 1
            if waiting[need] == 0:
                ready.append(need)
    return order


# ---- traffic ----


def optimizer_phase(overlap: Overlap) -> int:
    """The phase under which the optimizer runs."""
    if overlap is Overlap.SERIAL:
        return UPDATE
    return FORWARD if overlap is Overlap.NEXT_FORWARD else BACKWARD


def state_section_bytes(bucket: Bucket) -> int:
    """Bytes of a bucket's state in any tier: master and both moments, each in whole pages."""
    num_sections = 3 if bucket.has_master else 2
    return num_sections * align_up(-(-bucket.state_bytes // num_sections), PAGE)


def state_buffer_bytes(bucket: Bucket, place: BucketPlace) -> int:
    """Bytes of fp32 arrays that pass through a state buffer when the bucket is updated."""
    if bucket.grad_stage is None:
        return 0
    size = state_section_bytes(bucket) if place.state is Place.SSD else 0
    if place.weight is Place.SSD and not bucket.has_master:
        size += weight_section_bytes(bucket)
    return size


def accumulator_bytes(bucket: Bucket) -> int:
    """Bytes of a bucket's fp32 sum of gradients, in any tier; 0 where it is frozen."""
    return align_up(4 * bucket.numel, PAGE) if bucket.trainable else 0


def weight_section_bytes(bucket: Bucket) -> int:
    return align_up(bucket.weight_bytes, PAGE)


def update_bytes(problem: Problem, bucket: Bucket) -> int:
    """Bytes of memory that one update goes over, where the state is (DRAM, or the GPU's own).

    Adam reads gradient and state (and a weight that is the master), writes state and weight. With
    `accumulates` it reads an fp32 sum, which the last backward's gradient was added to: 12 bytes more.
    """
    weights = bucket.weight_bytes * (1 if bucket.has_master else 2)
    sums = 3 * 4 * bucket.numel if problem.accumulates else 0  # read, written, and read by Adam
    return bucket.grad_bytes + 2 * bucket.state_bytes + weights + sums


def bucket_traffic(problem: Problem, bucket: Bucket, place: BucketPlace) -> Floats:
    """The traffic vector of one bucket at one place."""
    total = np.zeros(TRAFFIC_WIDTH)
    amount = total[:_CHAIN].reshape(NUM_PHASES, len(LANES))
    weight, section = bucket.weight_bytes, weight_section_bytes(bucket)
    if place.weight is not Place.GPU:
        for phase, stages in (
            (FORWARD, bucket.forward_stages),
            (BACKWARD, bucket.backward_stages),
        ):
            if stages:
                amount[phase, _H2D] += weight
                amount[phase, _DRAM] += weight
                if place.weight is Place.SSD:
                    amount[phase, _READ] += section
                    amount[phase, _DRAM] += section
    if not bucket.trainable:
        return total
    update = amount[optimizer_phase(problem.overlap)]
    touched = update_bytes(problem, bucket)
    if place.state is Place.GPU:
        if problem.lanes.gpu_bytes_per_s:
            update[_GPU] += touched / problem.lanes.gpu_bytes_per_s
        return total
    amount[BACKWARD, _D2H] += bucket.grad_bytes
    amount[BACKWARD, _DRAM] += bucket.grad_bytes
    update[_ADAM] += bucket.numel
    update[_DRAM] += touched
    read = written = 0
    if place.weight is Place.GPU:
        update[_H2D] += weight
        update[_DRAM] += weight
    if place.weight is Place.SSD:
        written += section
        read += 0 if bucket.has_master else section
    if place.state is Place.SSD:
        read += state_section_bytes(bucket)
        written += state_section_bytes(bucket)
    if state_buffer_bytes(bucket, place):
        total[_CHAIN:] += (read, written, bucket.numel)
    update[_READ] += read
    update[_WRITE] += written
    update[_DRAM] += read + written
    return total


def activation_traffic(activation: Activation, place: Place) -> Floats:
    """The traffic vector of one activation at one place."""
    total = np.zeros(TRAFFIC_WIDTH)
    amount = total[:_CHAIN].reshape(NUM_PHASES, len(LANES))
    if place is Place.RECOMPUTE:
        amount[BACKWARD, _GPU] += activation.recompute_s
    elif place is not Place.GPU:
        amount[FORWARD, _D2H] += activation.bytes
        amount[BACKWARD, _H2D] += activation.bytes
        amount[(FORWARD, BACKWARD), _DRAM] += activation.bytes
        if place is Place.SSD:
            section = align_up(activation.bytes, PAGE)
            amount[FORWARD, _WRITE] += section
            amount[BACKWARD, _READ] += section
            amount[(FORWARD, BACKWARD), _DRAM] += section
    return total


def stage_traffic(problem: Problem) -> Floats:
    """The traffic vector of the stages themselves: seconds of GPU compute."""
    total = np.zeros(TRAFFIC_WIDTH)
    amount = total[:_CHAIN].reshape(NUM_PHASES, len(LANES))
    amount[FORWARD, _GPU] = sum(s.forward_s for s in problem.stages)
    amount[BACKWARD, _GPU] = sum(s.backward_s for s in problem.stages)
    return total


def written_bytes(traffic: Floats) -> float:
    """Bytes that one traffic vector writes to SSD in a step."""
    by_lane = traffic[:_CHAIN].reshape(NUM_PHASES, len(LANES))
    return float(by_lane[:, _WRITE].sum())


# ---- time ----


def _seconds(amount: Floats, rate: float) -> Floats:
    if rate > 0:
        return amount / rate
    return np.where(amount > 0, np.inf, 0.0)


def lane_seconds(lanes: Lanes, traffic: Floats) -> Floats:
    """Busy seconds [N, phases, lanes] of N traffic vectors [N, TRAFFIC_WIDTH], each lane alone."""
    rates = (
        1.0,
        lanes.h2d_bytes_per_s,
        lanes.d2h_bytes_per_s,
        lanes.ssd_read_bytes_per_s,
        lanes.ssd_write_bytes_per_s,
        lanes.cpu_adam_params_per_s,
        lanes.dram_bytes_per_s,
    )
    amounts = traffic[:, :_CHAIN].reshape(-1, NUM_PHASES, len(LANES))
    return np.stack([_seconds(amounts[:, :, k], r) for k, r in enumerate(rates)], axis=2)


def _limits(problem: Problem, windows: Windows, traffic: Floats, busy: Floats) -> Floats:
    """Seconds [N, phases, lanes] below which a phase cannot end, for each lane with its rivals.

    H2D and D2H slow one another where the link is not fully duplex; a simplex SSD adds reads and
    writes; the optimizer's pipeline adds what its buffers do not let overlap.
    """
    lanes = problem.lanes
    limit = busy.copy()
    h2d, d2h = busy[:, :, _H2D], busy[:, :, _D2H]
    shared = np.minimum(h2d, d2h) * (1.0 / lanes.duplex_factor - 1.0)
    limit[:, :, _H2D] += shared
    limit[:, :, _D2H] += shared
    if lanes.ssd_simplex:
        ssd = busy[:, :, _READ] + busy[:, :, _WRITE]
        limit[:, :, _READ] = np.where(busy[:, :, _READ] >= busy[:, :, _WRITE], ssd, 0.0)
        limit[:, :, _WRITE] = np.where(busy[:, :, _READ] < busy[:, :, _WRITE], ssd, 0.0)
    read = _seconds(traffic[:, _CHAIN], lanes.ssd_read_bytes_per_s)
    write = _seconds(traffic[:, _CHAIN + 1], lanes.ssd_write_bytes_per_s)
    adam = _seconds(traffic[:, _CHAIN + 2], lanes.cpu_adam_params_per_s)
    phase = optimizer_phase(problem.overlap)
    if problem.overlap is Overlap.NAIVE:
        chain = read + adam + write
    elif windows.state_buffers <= 2:
        # The read of one bucket shares a buffer with the write of the one before.
        chain = read + np.maximum(adam, write)
    else:
        chain = adam
    limit[:, phase, _ADAM] = np.maximum(limit[:, phase, _ADAM], chain)
    return limit


def _is_ahead(windows: Windows, needed: Windows) -> bool:
    """True if every sort of movement in use has a window of at least one item."""
    return (
        windows.fetch_window_bytes >= needed.fetch_window_bytes
        and windows.offload_window_bytes >= needed.offload_window_bytes
        and windows.reload_window_bytes >= needed.reload_window_bytes
    )


def phase_seconds(problem: Problem, windows: Windows, ahead: bool, traffic: Floats) -> Floats:
    """Seconds [N, phases] of N traffic vectors: the slowest lane of each phase.

    Where nothing moves ahead of its use (`ahead` False), movement is added to compute instead.
    """
    limit = _limits(problem, windows, traffic, lane_seconds(problem.lanes, traffic))
    if ahead:
        longest: Floats = limit.max(axis=2)
        return longest
    exposed: Floats = limit[:, :, _GPU] + limit[:, :, _GPU + 1 :].max(axis=2)
    return exposed


def step_seconds(
    problem: Problem,
    buckets: Sequence[BucketPlace],
    activations: Sequence[Place],
    windows: Windows,
) -> float:
    """Seconds of a step by `phase_seconds`: the estimate that solvers search and bound."""
    ledger = Ledger(problem, buckets, activations)
    ahead = ledger.is_ahead(windows)
    return float(phase_seconds(problem, windows, ahead, ledger.traffic[None, :]).sum())


# ---- memory ----


def bucket_spans(problem: Problem, bucket: Bucket, place: BucketPlace) -> list[Span]:
    """Where a bucket's weights, state and resident gradients occupy the GPU."""
    num_stages = problem.num_stages
    end = 2 * num_stages + 1
    weight = align_up(bucket.weight_bytes, GPU_ALIGN)
    spans: list[Span] = []
    if place.weight is Place.GPU:
        spans.append((0, end, weight))
    else:
        if bucket.forward_stages:
            spans.append((bucket.forward_stages[0], bucket.forward_stages[-1] + 1, weight))
        if bucket.backward_stages:
            first, last = bucket.backward_stages[-1], bucket.backward_stages[0]
            spans.append((2 * num_stages - 1 - first, 2 * num_stages - last, weight))
    if bucket.grad_stage is not None and place.state is Place.GPU:
        spans.append((0, end, state_section_bytes(bucket)))
        if problem.accumulates:
            spans.append((0, end, accumulator_bytes(bucket)))
        first, last = gradient_interval(bucket)
        done = end if problem.overlap.waits_for_step else 2 * num_stages - last
        spans.append((2 * num_stages - 1 - first, done, align_up(bucket.grad_bytes, GPU_ALIGN)))
    return spans


def gradient_interval(bucket: Bucket) -> tuple[int, int]:
    """(first, last) backward stage between which a bucket gathers gradients, first >= last.

    The first cannot come before the backward of the last reader. An update waits for the last one,
    and for the last read of the weights that it overwrites.
    """
    assert bucket.grad_stage is not None
    first = max([bucket.grad_stage, *bucket.forward_stages, *bucket.backward_stages])
    return first, min([bucket.grad_stage, *bucket.backward_stages])


def activation_spans(
    problem: Problem, activation: Activation, place: Place, interval: tuple[int, int]
) -> list[Span]:
    """Where an activation occupies the GPU; `interval` is from backward_intervals."""
    num_stages = problem.num_stages
    size = align_up(activation.bytes, GPU_ALIGN)
    start, end = 2 * num_stages - 1 - interval[0], 2 * num_stages - interval[1]
    if place is Place.GPU:
        return [(activation.forward_stage, end, size)]
    return [(activation.forward_stage, activation.last_forward_stage + 1, size), (start, end, size)]


class Ledger:
    """Running totals of one placement; items can be moved one at a time.

    `intervals` are those of the placement given at construction. A move that takes an activation
    out of recompute leaves them too wide, so the totals stay upper bounds; one that puts an
    activation into recompute that was not there at construction is an error.
    """

    def __init__(
        self, problem: Problem, buckets: Sequence[BucketPlace], activations: Sequence[Place]
    ) -> None:
        num_stages = problem.num_stages
        self.problem = problem
        self.buckets = list(buckets)
        self.activations = list(activations)
        self._recomputable = {i for i, p in enumerate(activations) if p is Place.RECOMPUTE}
        self.intervals = backward_intervals(problem, activations)
        self.traffic = stage_traffic(problem)
        # What is kept in a tier, by class; activations in DRAM share one allocation.
        self._in_dram: Counter[str] = Counter()
        self._on_ssd: Counter[str] = Counter()
        self._num_gpu_states = 0
        self._known_traffic: dict[tuple[object, ...], Floats] = {}
        self._cpu_grad_bytes = 0
        self._gpu: Ints = np.zeros(2 * num_stages + 1, dtype=np.int64)
        self._gpu += problem.fixed_gpu_bytes
        for stage in problem.stages:
            self._gpu[stage.index] += stage.forward_workspace_bytes
            self._gpu[2 * num_stages - 1 - stage.index] += stage.backward_workspace_bytes
        # Bytes that move for each position's sake: [sort, position].
        self._fetch: Ints = np.zeros(2 * num_stages, dtype=np.int64)
        self._out: Ints = np.zeros(num_stages, dtype=np.int64)
        self._in: Ints = np.zeros(num_stages, dtype=np.int64)
        self._grad: Ints = np.zeros(num_stages, dtype=np.int64)
        # CPU-updated buckets that gather gradients, by stage.
        self._open: Ints = np.zeros(num_stages, dtype=np.int64)
        self._sizes: dict[str, Counter[int]] = {
            sort: Counter() for sort in ("fetch", "swap", "grad", "state", "inbound", "outbound")
        }
        self._top: dict[str, int] = {}  # the largest of each sort, where it is known
        for index, place in enumerate(self.buckets):
            self._count_bucket(index, place, 1)
        for index, kept in enumerate(self.activations):
            self._count_activation(index, kept, 1)

    def copy(self) -> Ledger:
        """A ledger of the same placement, to be moved on its own."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray | list | Counter):
                setattr(other, name, value.copy())
        other._sizes = {sort: counts.copy() for sort, counts in self._sizes.items()}
        other._top = self._top.copy()
        return other

    def move_bucket(self, index: int, place: BucketPlace) -> None:
        self._count_bucket(index, self.buckets[index], -1)
        self.buckets[index] = place
        self._count_bucket(index, place, 1)

    def move_activation(self, index: int, place: Place) -> None:
        if place is Place.RECOMPUTE and index not in self._recomputable:
            raise LohanError(f"activation {index} was not recomputed when this ledger was opened")
        self._count_activation(index, self.activations[index], -1)
        self.activations[index] = place
        self._count_activation(index, place, 1)

    def _traffic_of(self, bucket: Bucket, place: BucketPlace) -> Floats:
        """bucket_traffic, once for all buckets that it is the same for."""
        key = (
            bucket.numel,
            bucket.weight_bytes,
            bucket.grad_bytes,
            bucket.state_bytes,
            bucket.has_master,
            bucket.trainable,
            bool(bucket.forward_stages),
            bool(bucket.backward_stages),
            place,
        )
        if key not in self._known_traffic:
            self._known_traffic[key] = bucket_traffic(self.problem, bucket, place)
        return self._known_traffic[key]

    def _size(self, sort: str, num_bytes: int, sign: int) -> None:
        sizes = self._sizes[sort]
        sizes[num_bytes] += sign
        if not sizes[num_bytes]:
            del sizes[num_bytes]
            if self._top.get(sort) == num_bytes:
                del self._top[sort]
        elif sort in self._top:
            self._top[sort] = max(self._top[sort], num_bytes)

    def _largest(self, sort: str) -> int:
        if sort not in self._top:
            self._top[sort] = max(self._sizes[sort], default=0)
        return self._top[sort]

    def _occupy(self, spans: list[Span], sign: int) -> None:
        for start, end, size in spans:
            self._gpu[start:end] += sign * size

    def _count_bucket(self, index: int, place: BucketPlace, sign: int) -> None:
        problem, bucket = self.problem, self.problem.buckets[index]
        num_stages = problem.num_stages
        self.traffic += sign * self._traffic_of(bucket, place)
        self._occupy(bucket_spans(problem, bucket, place), sign)
        if place.weight is not Place.GPU and (bucket.forward_stages or bucket.backward_stages):
            size = align_up(bucket.weight_bytes, GPU_ALIGN)
            self._size("fetch", size, sign)
            if bucket.forward_stages:
                self._fetch[bucket.forward_stages[0]] += sign * size
            if bucket.backward_stages:
                self._fetch[2 * num_stages - 1 - bucket.backward_stages[-1]] += sign * size
        section = weight_section_bytes(bucket)
        if place.weight is Place.DRAM:
            self._in_dram["weights"] += sign * section
        elif place.weight is Place.SSD:
            self._on_ssd["weights"] += sign * section
            self._size("inbound", section, sign)
        if bucket.grad_stage is None:
            return
        if place.state is Place.GPU:
            self._num_gpu_states += sign
            return
        if problem.accumulates:
            self._in_dram["gradients"] += sign * accumulator_bytes(bucket)
        self._size("grad", align_up(bucket.grad_bytes, PAGE), sign)
        self._cpu_grad_bytes += sign * align_up(bucket.grad_bytes, PAGE)
        self._grad[bucket.grad_stage] += sign * align_up(bucket.grad_bytes, GPU_ALIGN)
        first, last = gradient_interval(bucket)
        self._open[last : first + 1] += sign
        if place.state is Place.DRAM:
            self._in_dram["optimizer"] += sign * state_section_bytes(bucket)
        else:
            self._on_ssd["optimizer"] += sign * state_section_bytes(bucket)
        if size := state_buffer_bytes(bucket, place):
            self._size("state", size, sign)

    def _count_activation(self, index: int, place: Place, sign: int) -> None:
        problem, activation = self.problem, self.problem.activations[index]
        interval = self.intervals[index]
        key = activation.bytes, activation.recompute_s, place
        if key not in self._known_traffic:
            self._known_traffic[key] = activation_traffic(activation, place)
        self.traffic += sign * self._known_traffic[key]
        self._occupy(activation_spans(problem, activation, place, interval), sign)
        if place not in (Place.DRAM, Place.SSD):
            return
        size = align_up(activation.bytes, GPU_ALIGN)
        self._size("swap", size, sign)
        self._out[activation.last_forward_stage] += sign * size
        self._in[problem.num_stages - 1 - interval[0]] += sign * size
        if place is Place.DRAM:
            self._in_dram["activations"] += sign * size
        else:
            section = align_up(activation.bytes, PAGE)
            self._on_ssd["activations"] += sign * section
            self._size("inbound", section, sign)
            self._size("outbound", section, sign)

    def windows(self, room: Room) -> Windows:
        """Windows and buffers for what is placed now."""
        gpu_bytes = self.problem.capacities.gpu_bytes

        def window(moved: Ints, sort: str, share: int) -> int:
            item = self._largest(sort)
            if room is Room.STAGE:
                return max(item, min(int(moved.max()), gpu_bytes // share))
            return item

        roomy, still = room is Room.STAGE, room is Room.NONE
        most_open = max(2, int(self._open.max()))
        return Windows(
            fetch_window_bytes=0 if still else window(self._fetch, "fetch", FETCH_SHARE),
            offload_window_bytes=0 if still else window(self._out, "swap", WINDOW_SHARE),
            reload_window_bytes=0 if still else window(self._in, "swap", WINDOW_SHARE),
            grad_window_bytes=window(self._grad, "grad", WINDOW_SHARE),
            grad_buffers=most_open + (2 if roomy else 0) if self._sizes["grad"] else 0,
            state_buffers=(3 if roomy else 2) if self._sizes["state"] else 0,
            inbound_bytes=(4 if roomy else 2) * self._largest("inbound"),
            outbound_bytes=(4 if roomy else 2) * self._largest("outbound"),
        )

    def widened(self, windows: Windows) -> Windows:
        """The same windows, wider by what this placement leaves free.

        Activations on their way out wait on the GPU in forward only, which is seldom where it is
        fullest; a window that holds one item alone would let a small one hold up a large one.
        Gradients that wait in DRAM let backward go on while the CPU is behind with its updates.
        """
        have, num_stages = self.problem.capacities, self.problem.num_stages
        room = have.gpu_bytes - self.problem.gpu_margin_bytes
        offload, buffers = windows.offload_window_bytes, windows.grad_buffers
        if offload:
            free = room - int(self.gpu_bytes(windows)[:num_stages].max())
            offload += max(0, min(free, 2 * int(self._out.max()) - offload))
        if buffers and not self.problem.overlap.waits_for_step:
            free = (have.dram_bytes - self.dram_bytes(windows)) // self._largest("grad")
            most = min(sum(self._sizes["grad"].values()), _MOST_GRAD_BUFFERS)
            buffers += max(0, min(free, most - buffers))
        return dataclasses.replace(windows, offload_window_bytes=offload, grad_buffers=buffers)

    @property
    def ssd_bytes(self) -> int:
        return sum(self._on_ssd.values())

    def ssd_by_class(self) -> dict[str, int]:
        """Bytes on SSD: weights, optimizer, activations."""
        return dict(self._on_ssd)

    def dram_bytes(self, windows: Windows) -> int:
        """Peak DRAM: it is all allocated before the first step, so it does not vary."""
        return sum(self.dram_by_class(windows).values())

    def dram_by_class(self, windows: Windows) -> dict[str, int]:
        """Bytes in DRAM: weights, gradients, optimizer, activations, buffers."""
        if self.problem.overlap.waits_for_step:
            gradients = self._cpu_grad_bytes
        else:
            gradients = windows.grad_buffers * self._largest("grad")
        return {
            "weights": self._in_dram["weights"],
            "gradients": gradients + self._in_dram["gradients"],
            "optimizer": self._in_dram["optimizer"],
            "activations": align_up(self._in_dram["activations"], PAGE),
            "buffers": windows.state_buffers * self._largest("state")
            + windows.inbound_bytes
            + windows.outbound_bytes
            + (self.problem.ssd_bounce_bytes if self.ssd_bytes else 0),
        }

    def gpu_bytes(self, windows: Windows) -> Ints:
        """Bytes on the GPU at every position, 2S + 1 of them; the last is the optimizer's turn.

        The problem's `gpu_margin_bytes` are not in it: they must fit besides.
        """
        num_stages = self.problem.num_stages
        used = self._gpu.copy()
        forward, backward = slice(0, num_stages), slice(num_stages, 2 * num_stages)
        for half in (forward, backward):
            moved = self._fetch[half]
            ahead = moved.sum() - np.cumsum(moved)
            used[half] += np.minimum(ahead, windows.fetch_window_bytes)
        behind = np.cumsum(self._out) - self._out
        used[forward] += np.minimum(behind, windows.offload_window_bytes)
        ahead = self._in.sum() - np.cumsum(self._in)
        used[backward] += np.minimum(ahead, windows.reload_window_bytes)
        used[backward] += windows.grad_window_bytes
        if self._num_gpu_states:
            turn = slice(2 * num_stages, None) if self.problem.overlap.waits_for_step else backward
            used[turn] += self.problem.gpu_adam_workspace_bytes
        return used

    def peaks(self, windows: Windows) -> tuple[int, int, int]:
        """Peak bytes of (GPU, DRAM, SSD)."""
        return int(self.gpu_bytes(windows).max()), self.dram_bytes(windows), self.ssd_bytes

    def is_ahead(self, windows: Windows) -> bool:
        """True if the windows let at least one item of every sort in use move under compute."""
        return _is_ahead(windows, self.windows(Room.ITEM))


def estimate(
    problem: Problem,
    buckets: Sequence[BucketPlace],
    activations: Sequence[Place],
    windows: Windows,
) -> Prediction:
    """What one steady step of this placement takes: the slowest lane of each phase, and bytes.

    This is what solvers search with; `simulate.predict` replays the step instead.
    """
    ledger = Ledger(problem, buckets, activations)
    traffic = ledger.traffic[None, :]
    ahead = ledger.is_ahead(windows)
    forward_s, backward_s, update_s = (
        float(x) for x in phase_seconds(problem, windows, ahead, traffic)[0]
    )
    busy = lane_seconds(problem.lanes, traffic)
    limit = _limits(problem, windows, traffic, busy)[0]
    total = busy[0].sum(axis=0)
    lane_busy_s = {name: float(total[k]) for k, name in enumerate(LANES)}
    alone = dict(lane_busy_s)
    if problem.lanes.ssd_simplex:
        alone["ssd_read"] = alone["ssd_write"] = alone["ssd_read"] + alone["ssd_write"]
    # The lane that ends the phases it limits latest, summed over phases.
    blame = np.zeros(len(LANES))
    for phase in range(NUM_PHASES):
        blame[int(limit[phase].argmax())] += limit[phase].max()
    gpu, dram, ssd = ledger.peaks(windows)
    return Prediction(
        step_s=forward_s + backward_s + update_s,
        forward_s=forward_s,
        backward_s=backward_s,
        update_s=update_s,
        bottleneck=LANES[int(blame.argmax())],
        bound_s=max(alone.values()),
        lane_busy_s=lane_busy_s,
        peak_bytes={"gpu": gpu, "dram": dram, "ssd": ssd},
        ssd_bytes_written_per_step=round(written_bytes(ledger.traffic)),
    )
