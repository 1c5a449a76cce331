"""Whether updating before step() decides is worth its second copies, for a step that waits for it.

Speculation (Overlap.SPECULATIVE) hides updates under the backward at the price of DRAM: every bucket that
speculates has its weights and state there twice. Where that DRAM is better spent on what would otherwise be
on SSD or recomputed, or is not there, updates wait for step() as in NEXT_FORWARD.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from lohan_fx.errors import InfeasiblePlan
from lohan_fx.planner.choice import rank
from lohan_fx.planner.problem import Overlap, Place, Problem
from lohan_fx.planner.solution import Solution


def with_speculation(
    problem: Problem, solve: Callable[[Problem], Solution]
) -> tuple[Problem, Solution]:
    """A NEXT_FORWARD problem or the same one with speculation, whichever takes the shorter step, with
    its solution.

    Of steps that take the same, the one without speculation is preferred, as it takes less DRAM. A
    problem in another mode, or one that accumulates, is solved as it is.

    Raises what `solve` raises for `problem`; that speculation fits nothing is no error.
    """
    waiting = solve(problem)
    by_cpu = any(
        bucket.trainable and place.state is not Place.GPU
        for bucket, place in zip(problem.buckets, waiting.buckets, strict=True)
    )
    if problem.overlap is not Overlap.NEXT_FORWARD or problem.accumulates or not by_cpu:
        return problem, waiting
    asked = dataclasses.replace(problem, overlap=Overlap.SPECULATIVE)
    try:
        speculating = solve(asked)
    except InfeasiblePlan:
        return problem, waiting
    if rank(waiting) <= rank(speculating):
        return problem, waiting
    return asked, speculating
