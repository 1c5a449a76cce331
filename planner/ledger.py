"""Traffic and bytes of one placement, in every tier over time, and the windows that it needs.

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

from lohan_fx.errors import LohanError
from lohan_fx.planner.places import backward_intervals
from lohan_fx.planner.problem import (
    GPU_ALIGN,
    PAGE,
    Activation,
    Bucket,
    BucketPlace,
    Place,
    Problem,
    align_up,
)
from lohan_fx.planner.solution import Windows
from lohan_fx.planner.traffic import (
    STREAM_BYTES,
    Floats,
    Ints,
    accumulator_bytes,
    activation_traffic,
    bucket_traffic,
    spare_bytes,
    stage_traffic,
    state_buffer_bytes,
    state_section_bytes,
    stream_piece,
    weight_section_bytes,
)

Span = tuple[int, int, int]  # positions [start, end) and bytes


class Room(enum.IntEnum):
    """How generous windows are.

    NONE: each move waits where it starts. ITEM: one item moves while another is used.
    STAGE: up to a stage's worth moves ahead, within a fixed share of the GPU. AROUND: as STAGE, but
    not past the stages that need far more of the GPU than the others (`tight_positions`).
    """

    NONE = 0
    ITEM = 1
    AROUND = 2
    STAGE = 3

    @property
    def is_wide(self) -> bool:
        return self >= Room.AROUND


# In wide rooms: GPU capacity over these is the most a window takes, unless one item is larger.
FETCH_SHARE = 16
WINDOW_SHARE = 32
# Stages are closed if they need so much more than others (GPU capacity over this), and together take
# no more than this share of the step: what follows one waits for its first bytes.
_TIGHT_SHARE = 32
_MOST_CLOSED = 0.125
# Gradients of so many buckets at most may wait for the CPU in DRAM that nothing else needs.
_MOST_GRAD_BUFFERS = 48


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
    return spans + gradient_spans(problem, bucket, place)


def gradient_spans(problem: Problem, bucket: Bucket, place: BucketPlace) -> list[Span]:
    """Where the gradients of a bucket that the GPU updates occupy it.

    Those of a streamed bucket are there until the weights are read again, since when their update is
    made depends on the link.
    """
    if bucket.grad_stage is None or not place.by_gpu:
        return []
    num_stages = problem.num_stages
    end = 2 * num_stages + 1
    size = align_up(bucket.grad_bytes, GPU_ALIGN)
    first, last = gradient_interval(bucket)
    begin = 2 * num_stages - 1 - first
    if place.streamed:
        readers = [*bucket.forward_stages[:1]]
        readers += [2 * num_stages - 1 - stage for stage in bucket.backward_stages[-1:]]
        return [(0, min([begin, *(at + 1 for at in readers)]), size), (begin, end, size)]
    done = end if problem.overlap.waits_for_step else 2 * num_stages - last
    return [(begin, done, size)]


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


def tight_positions(problem: Problem) -> tuple[int, ...]:
    """Positions that need far more of the GPU than others do, with as little on it as can be.

    Empty where no few stages stand out: see _TIGHT_SHARE and _MOST_CLOSED.
    """
    num_stages = problem.num_stages
    least: Ints = np.zeros(2 * num_stages + 1, dtype=np.int64)
    seconds: Floats = np.zeros(2 * num_stages)
    for stage in problem.stages:
        for at, size, taken_s in (
            (stage.index, stage.forward_workspace_bytes, stage.forward_s),
            (2 * num_stages - 1 - stage.index, stage.backward_workspace_bytes, stage.backward_s),
        ):
            least[at] += size
            seconds[at] = taken_s
    from_dram = BucketPlace(Place.DRAM, Place.DRAM)
    intervals = backward_intervals(problem, [Place.GPU] * len(problem.activations))
    spans = [span for b in problem.buckets for span in bucket_spans(problem, b, from_dram)]
    for a in problem.activations:
        place = Place.DRAM if a.can_swap or a.can_recompute else Place.GPU
        spans += activation_spans(problem, a, place, intervals[a.index])
    for start, end, size in spans:
        least[start:end] += size
    fullest = np.argsort(-least[:-1], kind="stable")
    taken = np.cumsum(seconds[fullest])
    if not taken.size or not taken[-1] > 0:
        return ()
    usual = int(least[fullest[int(np.searchsorted(taken, taken[-1] / 2))]])
    above = least[fullest] > usual + problem.capacities.gpu_bytes // _TIGHT_SHARE
    return tuple(sorted(map(int, fullest[above & (taken <= _MOST_CLOSED * taken[-1])])))


def rooms(problem: Problem) -> list[Room]:
    """The widths of windows that differ for a problem, the widest first."""
    tight = tight_positions(problem)
    return [room for room in sorted(Room, reverse=True) if tight or room is not Room.AROUND]


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
        self._num_gpu_states = self._num_streamed = 0
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
            sort: Counter()
            for sort in ("fetch", "swap", "grad", "state", "inbound", "outbound", "stream")
        }
        self._tight: tuple[int, ...] | None = None  # tight_positions, once they are asked for
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
            self.problem.may_speculate(bucket.index),
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
        if place.streamed:
            self._num_streamed += sign
            self._in_dram["optimizer"] += sign * state_section_bytes(bucket)
            self._size("stream", stream_piece(bucket), sign)
            return
        if problem.accumulates:
            self._in_dram["gradients"] += sign * accumulator_bytes(bucket)
        self._size("grad", align_up(bucket.grad_bytes, PAGE), sign)
        self._cpu_grad_bytes += sign * align_up(bucket.grad_bytes, PAGE)
        self._grad[bucket.grad_stage] += sign * align_up(bucket.grad_bytes, GPU_ALIGN)
        first, last = gradient_interval(bucket)
        self._open[last : first + 1] += sign
        if place.state is Place.DRAM:
            spare = spare_bytes(problem, bucket, place)
            self._in_dram["optimizer"] += sign * (state_section_bytes(bucket) + spare)
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
            if room.is_wide:
                return max(item, min(int(moved.max()), gpu_bytes // share))
            return item

        roomy, still = room.is_wide, room is Room.NONE
        if self._tight is None and room is Room.AROUND:
            self._tight = tight_positions(self.problem)
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
            closed=self._tight or () if room is Room.AROUND else (),
            stream_bytes=STREAM_BYTES * self._largest("stream"),
        )

    def widened(self, windows: Windows) -> Windows:
        """The same windows, wider by what this placement leaves free.

        Activations on their way out wait on the GPU in forward only, which is seldom where it is
        fullest; a window that holds one item alone would let a small one hold up a large one. What is
        free beside the fullest stage that is not closed lets a stage's activations come back early.
        Gradients that wait in DRAM let backward go on while the CPU is behind with its updates.
        """
        have, num_stages = self.problem.capacities, self.problem.num_stages
        room = have.gpu_bytes - self.problem.gpu_margin_bytes
        offload, buffers = windows.offload_window_bytes, windows.grad_buffers
        reload = windows.reload_window_bytes
        if reload:
            used = self.gpu_bytes(windows)[num_stages : 2 * num_stages]
            used[[at - num_stages for at in windows.closed if at >= num_stages]] = 0
            reload += max(0, min(room - int(used.max()), int(self._in.max()) - reload))
        if offload:
            free = room - int(self.gpu_bytes(windows)[:num_stages].max())
            offload += max(0, min(free, 2 * int(self._out.max()) - offload))
        if buffers and not self.problem.overlap.waits_for_step:
            free = (have.dram_bytes - self.dram_bytes(windows)) // self._largest("grad")
            most = min(sum(self._sizes["grad"].values()), _MOST_GRAD_BUFFERS)
            buffers += max(0, min(free, most - buffers))
        return dataclasses.replace(
            windows,
            offload_window_bytes=offload,
            reload_window_bytes=reload,
            grad_buffers=buffers,
        )

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
            ahead = np.minimum(ahead, windows.fetch_window_bytes)
            ahead[[at - half.start for at in windows.closed if half.start <= at < half.stop]] = 0
            used[half] += ahead
        behind = np.cumsum(self._out) - self._out
        used[forward] += np.minimum(behind, windows.offload_window_bytes)
        ahead = np.minimum(self._in.sum() - np.cumsum(self._in), windows.reload_window_bytes)
        ahead[[at - num_stages for at in windows.closed if at >= num_stages]] = 0
        used[backward] += ahead
        used[backward] += windows.grad_window_bytes
        used += windows.stream_bytes
        if self._num_streamed:
            used += self.problem.gpu_adam_workspace_bytes
        elif self._num_gpu_states:
            turn = slice(2 * num_stages, None) if self.problem.overlap.waits_for_step else backward
            used[turn] += self.problem.gpu_adam_workspace_bytes
        return used

    def peaks(self, windows: Windows) -> tuple[int, int, int]:
        """Peak bytes of (GPU, DRAM, SSD)."""
        return int(self.gpu_bytes(windows).max()), self.dram_bytes(windows), self.ssd_bytes

    def is_ahead(self, windows: Windows) -> bool:
        """True if the windows let at least one item of every sort in use move under compute."""
        return _is_ahead(windows, self.windows(Room.ITEM))


def _is_ahead(windows: Windows, needed: Windows) -> bool:
    """True if every sort of movement in use has a window of at least one item."""
    return (
        windows.fetch_window_bytes >= needed.fetch_window_bytes
        and windows.offload_window_bytes >= needed.offload_window_bytes
        and windows.reload_window_bytes >= needed.reload_window_bytes
    )
