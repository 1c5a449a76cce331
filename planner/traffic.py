"""Traffic of items by their places, and the seconds that lanes are busy with it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lohan_fx.planner.problem import (
    PAGE,
    Activation,
    Bucket,
    BucketPlace,
    Lanes,
    Overlap,
    Place,
    Problem,
    adam_params,
    align_up,
    speculates,
)
from lohan_fx.planner.solution import Windows

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LANES = ("gpu", "h2d", "d2h", "ssd_read", "ssd_write", "cpu_adam", "dram")
_GPU, _H2D, _D2H, _READ, _WRITE, _ADAM, _DRAM = range(len(LANES))
FORWARD, BACKWARD, UPDATE = range(3)
NUM_PHASES = 3
# What an update by the CPU is busy with. Where updates spill, it begins under the backward, and what is left
# over runs under the next forward: these lanes limit the two phases together.
SPILLING_LANES = (_ADAM, _DRAM)

# States that the GPU updates pass through it in pieces of so many elements at most, of master and both
# moments, and a ring holds so many pieces.
STREAM_PIECE = 4 << 20
STREAM_SLOTS = 3
STREAM_BYTES = 3 * 4 * STREAM_SLOTS  # of a ring, for each element of a piece

# A traffic vector: amounts per phase and lane, then the optimizer's share of SSD reads, SSD writes
# and Adam for buckets whose state is on SSD. GPU amounts are seconds, Adam amounts parameters at its
# pace in place, all others bytes.
_CHAIN = NUM_PHASES * len(LANES)
TRAFFIC_WIDTH = _CHAIN + 3


def optimizer_phase(overlap: Overlap) -> int:
    """The phase under which the optimizer runs, but for buckets that speculate."""
    if overlap is Overlap.SERIAL:
        return UPDATE
    return FORWARD if overlap.waits_for_step else BACKWARD


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


def stream_piece(bucket: Bucket) -> int:
    """Elements of the pieces in which a streamed bucket's state passes through the GPU."""
    return min(bucket.numel, STREAM_PIECE)


def spare_bytes(problem: Problem, bucket: Bucket, place: BucketPlace) -> int:
    """Bytes of DRAM for the second copy of a bucket's weights and state; 0 unless it speculates.

    Weights that rest on the GPU have one too: the new ones wait there for step() and their upload.
    """
    if not speculates(problem, bucket, place):
        return 0
    return state_section_bytes(bucket) + weight_section_bytes(bucket)


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
    update = decided = amount[optimizer_phase(problem.overlap)]
    if speculates(problem, bucket, place):
        update = amount[BACKWARD]
    touched = update_bytes(problem, bucket)
    if place.by_gpu:
        if problem.lanes.gpu_bytes_per_s:
            update[_GPU] += touched / problem.lanes.gpu_bytes_per_s
        if place.streamed:
            back = bucket.state_bytes + (weight if place.weight is Place.DRAM else 0)
            update[_H2D] += bucket.state_bytes
            update[_D2H] += back
            update[_DRAM] += bucket.state_bytes + back
        return total
    amount[BACKWARD, _D2H] += bucket.grad_bytes
    amount[BACKWARD, _DRAM] += bucket.grad_bytes
    update[_ADAM] += adam_params(problem, bucket, place)
    update[_DRAM] += touched
    read = written = 0
    if place.weight is Place.GPU:
        decided[_H2D] += weight
        decided[_DRAM] += weight
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


def lane_limits(problem: Problem, windows: Windows, traffic: Floats, busy: Floats) -> Floats:
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


def updates_spill(problem: Problem, *, spills: bool) -> bool:
    """Whether the closed form lets updates that begin under the backward run into the next forward.

    They do with speculation. Where updates are made under the backward only, it is asked either way: with
    `spills` it is never above a replay, without it puts more on the GPU, which a replay may find faster.
    """
    return problem.overlap is Overlap.SPECULATIVE or (
        spills and problem.overlap is Overlap.BACKWARD
    )


def phase_seconds(
    problem: Problem, windows: Windows, ahead: bool, traffic: Floats, *, spills: bool = False
) -> Floats:
    """Seconds [N, phases] of N traffic vectors: the slowest lane of each phase.

    Where updates spill (see `updates_spill`), the lanes of SPILLING_LANES limit backward and forward
    together instead.
    Where nothing moves ahead of its use (`ahead` False), movement is added to compute instead.
    """
    busy = lane_seconds(problem.lanes, traffic)
    limit = lane_limits(problem, windows, traffic, busy)
    if ahead:
        spilled = updates_spill(problem, spills=spills)
        if spilled:
            limit[:, BACKWARD, SPILLING_LANES] = 0.0
        longest: Floats = limit.max(axis=2)
        if spilled:
            together = busy[:, FORWARD] + busy[:, BACKWARD]
            left = together[:, SPILLING_LANES].max(axis=1) - longest[:, :UPDATE].sum(axis=1)
            with np.errstate(invalid="ignore"):  # of a lane that is not there
                longest[:, FORWARD] += np.fmax(left, 0.0)
        return longest
    exposed: Floats = limit[:, :, _GPU] + limit[:, :, _GPU + 1 :].max(axis=2)
    return exposed
