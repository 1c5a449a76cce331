"""From a placement to a Solution that fits, and which of two is better."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from lohan_fx.errors import InfeasiblePlan
from lohan_fx.planner.cost import estimate
from lohan_fx.planner.ledger import Ledger, Room, rooms
from lohan_fx.planner.problem import BucketPlace, NothingFits, Place, Problem
from lohan_fx.planner.simulate import simulate, simulated
from lohan_fx.planner.solution import Forced, Prediction, Solution
from lohan_fx.units import format_bytes

SECONDS_PER_DAY = 86400
# Steps that differ by no more than this share are the same.
SAME_STEP = 1e-6


class Scarce(enum.IntEnum):
    """What a placement may have too much of: bytes of a tier, or bytes written to SSD a step."""

    GPU = 0
    DRAM = 1
    SSD = 2
    WRITES = 3


Excess: TypeAlias = tuple[int, int, int, int]  # bytes over what there is, by Scarce


def excess_bytes(
    problem: Problem, peaks: tuple[int, int, int], written: int, step_s: Callable[[], float]
) -> Excess:
    """By how much peaks of (GPU, DRAM, SSD) and SSD writes a step are over what the problem allows.

    `step_s` is asked for only where writes are bounded.
    """
    have = problem.capacities
    gpu, dram, ssd = peaks
    writes = 0
    if problem.max_ssd_bytes_per_day is not None:
        writes = max(0, written - int(problem.max_ssd_bytes_per_day * step_s() / SECONDS_PER_DAY))
    return (
        max(0, gpu + problem.gpu_margin_bytes - have.gpu_bytes),
        max(0, dram - have.dram_bytes),
        max(0, ssd - have.ssd_bytes),
        writes,
    )


def excess_of(problem: Problem, predicted: Prediction) -> Excess:
    """By how much a prediction is over what the problem allows."""
    peak = predicted.peak_bytes
    return excess_bytes(
        problem,
        (peak["gpu"], peak["dram"], peak["ssd"]),
        predicted.ssd_bytes_written_per_step,
        lambda: predicted.step_s,
    )


def rank(solution: Solution) -> tuple[float, int, int]:
    """A key that is less for the better solution.

    Steps within a part in a million are the same; then fewer SSD writes, then less DRAM.
    """
    predicted = solution.predicted
    step = float(f"{predicted.step_s:.6e}")
    return step, predicted.ssd_bytes_written_per_step, predicted.peak_bytes["dram"]


def finish(
    problem: Problem, ledger: Ledger, room: Room, policy: str = "", *, spills: bool = False
) -> Solution | None:
    """The solution of a placement at one width of windows; None if it does not fit.

    Its seconds are the estimate, with `spills` as there; see `replayed`.
    """
    windows = ledger.windows(room)
    if room is not Room.NONE:
        windows = ledger.widened(windows)
    predicted = estimate(problem, ledger.buckets, ledger.activations, windows, spills=spills)
    if any(excess_of(problem, predicted)):
        return None
    return Solution(
        policy=policy,
        buckets=tuple(ledger.buckets),
        activations=tuple(ledger.activations),
        windows=windows,
        predicted=predicted,
    )


class NotFaster(InfeasiblePlan):
    """A plan fits, but its busiest lane alone takes longer than another plan's whole step."""


def replayed(problem: Problem, solution: Solution, cutoff_s: float = math.inf) -> Solution:
    """The solution with the seconds of a simulation in place of the estimate it has.

    Raises NotFaster, without a replay, where no replay of it is below `cutoff_s` seconds.
    """
    estimated = solution.predicted
    if estimated.bound_s > cutoff_s * (1 + SAME_STEP):
        raise NotFaster(
            f"this plan takes {estimated.bound_s:.3g} s or more; {cutoff_s:.3g} s is known"
        )
    if math.isinf(estimated.step_s):
        return solution
    simulation = simulate(problem, solution.buckets, solution.activations, solution.windows)
    return dataclasses.replace(solution, predicted=simulated(estimated, simulation))


def all_on_gpu(problem: Problem, forced: Forced, policy: str = "") -> Solution | None:
    """The plan with everything on the GPU, if it fits."""
    on_gpu = BucketPlace(Place.GPU, Place.GPU)
    ledger = Ledger(
        problem,
        [forced.buckets.get(b.index, on_gpu) for b in problem.buckets],
        [forced.activations.get(a.index, Place.GPU) for a in problem.activations],
    )
    return finish(problem, ledger, Room.STAGE, policy)


def fits_at_all(problem: Problem, ledger: Ledger, widths: Sequence[Room] = tuple(Room)) -> bool:
    """True if the bytes of a placement fit at any of these widths of windows."""
    have = problem.capacities
    return any(
        gpu + problem.gpu_margin_bytes <= have.gpu_bytes
        and dram <= have.dram_bytes
        and ssd <= have.ssd_bytes
        for gpu, dram, ssd in (ledger.peaks(ledger.windows(room)) for room in widths)
    )


def fitting(problem: Problem, ledger: Ledger, policy: str, cutoff_s: float = math.inf) -> Solution:
    """The solution of a placement at the widest windows that fit.

    Raises NothingFits where none do, naming what there is too little of, and NotFaster where no
    windows make it take less than `cutoff_s`.
    """
    for room in rooms(problem):
        if fits_at_all(problem, ledger, (room,)):
            solution = finish(problem, ledger, room, policy)
            if solution is None:
                continue
            solution = replayed(problem, solution, cutoff_s)
            if not any(excess_of(problem, solution.predicted)):
                return solution
    have = problem.capacities
    gpu, dram, ssd = ledger.peaks(ledger.windows(Room.NONE))
    need = {"gpu": gpu + problem.gpu_margin_bytes, "dram": dram, "ssd": ssd}
    budget = {"gpu": have.gpu_bytes, "dram": have.dram_bytes, "ssd": have.ssd_bytes}
    words = [
        f"{tier.upper()}: {format_bytes(need[tier])} at least, the budget has {format_bytes(budget[tier])}"
        for tier in need
        if need[tier] > budget[tier]
    ]
    if not words:
        words = [f"it writes more to SSD than {problem.max_ssd_bytes_per_day} bytes a day"]
    raise NothingFits(f"{policy} does not fit the budget. {'; '.join(words)}.", problem, need)
