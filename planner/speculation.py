"""Whether updating before step() decides is worth its second copies, and for which buckets.

Speculation (Overlap.SPECULATIVE) hides updates under the backward at the price of DRAM: every bucket that
speculates has its weights and state there twice. Where that DRAM is better spent on what would otherwise be
on SSD or recomputed, or is not there, updates wait for step() as in NEXT_FORWARD.

[Note: a share speculates] Forward and backward are both long enough to hide some updates, so that not all
need second copies. Those that have one are spread evenly over the model. Were they the buckets whose
gradients come first, the next forward would begin with layers that all wait for their updates, and with
nothing to do for the CPU at its end; were they those that the forward reads first, the backward would begin
with nothing for the CPU to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from lohan_fx.errors import InfeasiblePlan
from lohan_fx.planner.choice import rank
from lohan_fx.planner.problem import Overlap, Problem
from lohan_fx.planner.solution import Solution
from lohan_fx.planner.traffic import spare_bytes

# Of the parameters that may speculate, these shares are tried.
_SHARES = (1.0, 0.75, 0.5, 0.25)
# A plan that takes less than this share of DRAM has all of it that is of use.
_PRESSED = 0.95


def with_speculation(
    problem: Problem, solve: Callable[[Problem], Solution]
) -> tuple[Problem, Solution]:
    """A problem as it is or the same one with speculation, whichever takes the shorter step, with its
    solution.

    Of a NEXT_FORWARD problem with updates on the CPU, the answer may be a SPECULATIVE one; of steps that
    take the same, the one without speculation is preferred, as it takes less DRAM. Of a SPECULATIVE
    problem, fewer buckets may speculate in the answer. A problem in another mode, or one that
    accumulates, is solved as it is.

    Raises what `solve` raises for a problem without speculation, and for a SPECULATIVE one also what it
    raises where speculation fits nothing.
    """
    wanted = problem.overlap is Overlap.SPECULATIVE
    waiting = dataclasses.replace(problem, overlap=Overlap.NEXT_FORWARD) if wanted else problem
    known = solve(waiting)
    if waiting.overlap is not Overlap.NEXT_FORWARD or waiting.accumulates:
        return problem, known
    if not _params_of_cpu(waiting, known):
        return problem, solve(problem) if wanted else known
    asked = dataclasses.replace(problem, overlap=Overlap.SPECULATIVE)
    try:
        found = _speculative(asked, solve, known)
    except InfeasiblePlan:
        if wanted:
            raise
        return problem, known
    if not wanted and rank(known) <= rank(found[1]):
        return problem, known
    return found


def _speculative(
    problem: Problem, solve: Callable[[Problem], Solution], waiting: Solution
) -> tuple[Problem, Solution]:
    """A SPECULATIVE problem for the buckets whose speculation makes the shortest step.

    Shares are tried from the least that takes all DRAM that `waiting` leaves, in descending order, for as
    long as they help. Raises what `solve` raises for the last of them where none fits.
    """
    have = problem.capacities.dram_bytes
    copies = sum(map(partial(spare_bytes, problem), problem.buckets, waiting.buckets))
    room = have - waiting.predicted.peak_bytes["dram"]
    first = max((k for k, share in enumerate(_SHARES) if share * copies >= room), default=0)
    best: tuple[Problem, Solution] | None = None
    refusal: InfeasiblePlan | None = None
    for share in _SHARES[first:]:
        if best is not None and not _may_be_faster(problem, best[1], share):
            break
        asked = problem
        if share < 1.0:
            asked = dataclasses.replace(problem, speculating=evenly_spread(problem, share))
        try:
            found = solve(asked)
        except InfeasiblePlan as error:
            refusal = error
            continue
        if best is not None and rank(best[1]) <= rank(found):
            break
        best = asked, found
        if found.predicted.peak_bytes["dram"] < _PRESSED * have:
            break
    if best is None:
        assert refusal is not None
        raise refusal
    return best


def _may_be_faster(problem: Problem, known: Solution, share: float) -> bool:
    """False if what waits for step() takes the CPU too long, of the parameters that it updates now."""
    rate = problem.lanes.cpu_adam_params_per_s
    forward_s = (1.0 - share) * _params_of_cpu(problem, known) / rate
    backward_s = sum(stage.backward_s for stage in problem.stages)
    return forward_s + backward_s < known.predicted.step_s


def evenly_spread(problem: Problem, share: float) -> frozenset[int]:
    """Of the buckets that may speculate, those with about a share of the parameters, from everywhere in
    the model."""
    chosen: set[int] = set()
    covered = passed = 0
    for bucket in problem.buckets:
        if not bucket.trainable or not problem.may_speculate(bucket.index):
            continue
        passed += bucket.numel
        if covered + bucket.numel / 2 <= share * passed:
            chosen.add(bucket.index)
            covered += bucket.numel
    return frozenset(chosen)


def _params_of_cpu(problem: Problem, solution: Solution) -> int:
    """How many parameters the CPU updates."""
    return sum(
        bucket.numel
        for bucket, place in zip(problem.buckets, solution.buckets, strict=True)
        if bucket.trainable and not place.by_gpu
    )
