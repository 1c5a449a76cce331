"""What a solver says about its plan: why each item is where it is, or why nothing fits."""

from __future__ import annotations

import dataclasses

import numpy as np

from lohan_fx.planner.choice import SECONDS_PER_DAY
from lohan_fx.planner.least import least_bytes, start
from lohan_fx.planner.ledger import Ledger, Room
from lohan_fx.planner.moves import AnyPlace, Search
from lohan_fx.planner.problem import BucketPlace, NothingFits, Place, Problem
from lohan_fx.planner.solution import Forced, Solution


def nothing_fits(
    problem: Problem, forced: Forced, without_bound: Solution | None = None
) -> NothingFits:
    """The error of a solver that found nothing: what each tier would have to hold at least.

    `without_bound` is the plan there would be without the bound on SSD writes.
    """
    least = least_bytes(problem, forced)
    if without_bound is None:
        return NothingFits(_why_not(problem, forced), problem, least)
    predicted, bound = without_bound.predicted, problem.max_ssd_bytes_per_day
    assert bound is not None
    a_day = predicted.ssd_bytes_written_per_step / predicted.step_s * SECONDS_PER_DAY
    return NothingFits(
        f"no plan was found that writes at most {_gb(bound)} to SSD a day. Without that bound there "
        f"is one: it writes {_gb(predicted.ssd_bytes_written_per_step)} a step, {_gb(int(a_day))} a "
        "day of such steps. Raise the bound, or give more DRAM",
        problem,
        least,
    )


def _why_not(problem: Problem, forced: Forced) -> str:
    """Per tier, the least that could work and what there is."""
    least = least_bytes(problem, forced)
    have = problem.capacities
    budget = {"gpu": have.gpu_bytes, "dram": have.dram_bytes, "ssd": have.ssd_bytes}
    names = {"gpu": "GPU", "dram": "DRAM", "ssd": "SSD"}
    lines = []
    for tier, name in names.items():
        verdict = "enough" if budget[tier] >= least[tier] else f"{_gb(least[tier])} at least"
        lines.append(f"{name}: {verdict}, the budget has {_gb(budget[tier])}")
    text = "no plan fits the budget. " + "; ".join(lines)
    if all(budget[tier] >= least[tier] for tier in names):
        text += ". Each tier alone would do, together they do not; any one of them larger may help"
    without_ssd = start(problem, forced, Place.DRAM)
    dram = without_ssd.peaks(without_ssd.windows(Room.NONE))[1]
    text += f". Without any SSD, DRAM would have to hold {_gb(dram)}"
    pinned = [
        *(problem.buckets[i].name for i in forced.buckets),
        *(problem.activations[i].name for i in forced.activations),
    ]
    if pinned:
        text += f". Forced placements: {', '.join(pinned[:8])}"
        text += " and more" if len(pinned) > 8 else ""
    if budget["gpu"] < least["gpu"]:
        text += f". {_gpu_peak_words(problem, forced)}"
    return text + "."


def _gpu_peak_words(problem: Problem, forced: Forced) -> str:
    """Where the GPU is fullest in the plan with the least on it."""
    ledger = start(problem, forced, Place.SSD)
    used = ledger.gpu_bytes(ledger.windows(Room.NONE))
    position, num_stages = int(used.argmax()), problem.num_stages
    if position >= 2 * num_stages:
        return "The GPU is fullest during the optimizer's turn"
    forward = position < num_stages
    stage = problem.stages[position if forward else 2 * num_stages - 1 - position]
    temporary = stage.forward_workspace_bytes if forward else stage.backward_workspace_bytes
    text = f"The GPU is fullest in the {'forward' if forward else 'backward'} of {stage.name!r}"
    if temporary:
        text += f", whose temporaries alone take {_gb(temporary)}"
    return f"{text}; a smaller batch or shorter sequences make it emptier"


def _gb(num_bytes: int) -> str:
    for scale, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} bytes"


def with_reasons(problem: Problem, solution: Solution, forced: Forced) -> Solution:
    """The solution with one line per bucket and per activation: why it is where it is."""
    streams = any(place.streamed for place in solution.buckets)
    search = Search(problem, forced, Room.STAGE, streams=streams, spills=streams)
    words = _move_words(search, problem, solution)
    group_of = {
        (group.is_bucket, member): number
        for number, group in enumerate(search.groups)
        for member in group.members
    }
    resident = _is_resident(solution)

    def reason(is_bucket: bool, index: int, place: AnyPlace) -> str:
        number = group_of.get((is_bucket, index))
        if number is None:
            return "forced"
        if resident:
            return "everything fits on the GPU"
        why = words.get((number, place), "there is no other place for it")
        streamed = isinstance(place, BucketPlace) and place.streamed
        return f"{_STREAMED}; {why}" if streamed else why

    return dataclasses.replace(
        solution,
        bucket_reasons=tuple(reason(True, i, p) for i, p in enumerate(solution.buckets)),
        activation_reasons=tuple(reason(False, i, p) for i, p in enumerate(solution.activations)),
    )


_STREAMED = "updated on the GPU, its state copied there and back"


def _is_resident(solution: Solution) -> bool:
    """True if nothing moves in a step."""
    return all(p.state is Place.GPU for p in solution.buckets) and all(
        p is Place.GPU for p in solution.activations
    )


def _move_words(
    search: Search, problem: Problem, solution: Solution
) -> dict[tuple[int, AnyPlace], str]:
    """For each group and place in it, what moving one of its items away would gain or cost."""
    if not search.moves:
        return {}
    ledger = Ledger(problem, solution.buckets, solution.activations)
    steps = search.steps(ledger, np.arange(len(search.moves)))
    least = solution.predicted.step_s * 1e-6
    best: dict[tuple[int, AnyPlace], tuple[float, AnyPlace]] = {}
    for move, saved in zip(search.moves, steps, strict=True):
        key = (move.group, move.source)
        if key not in best or saved > best[key][0]:
            best[key] = (float(saved), move.target)
    words = {}
    for key, (saved, target) in best.items():
        if saved > least:
            words[key] = f"{target!s} would save {saved * 1e3:.3g} ms a step, but has no room"
        elif saved < -least:
            words[key] = f"any other place costs at least {-saved * 1e3:.3g} ms a step more"
        else:
            words[key] = "no other place would make the step shorter"
    return words
