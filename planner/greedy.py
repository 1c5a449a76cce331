"""The greedy solver: start with as little as possible on the GPU, then buy speed with bytes.

The score of a move is the step time it saves per byte of the tier it spends. Where a step is
limited by one lane, relieving any other saves nothing yet; a small share of all lanes' busy time is
part of the score so that ties go to the move that moves less.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lohan_fx.planner.choice import (
    SECONDS_PER_DAY,
    Excess,
    Scarce,
    all_on_gpu,
    excess_of,
    finish,
    rank,
    replayed,
)
from lohan_fx.planner.least import check_forced, starts
from lohan_fx.planner.ledger import Ledger, Room, rooms
from lohan_fx.planner.moves import NO_GAIN, Search
from lohan_fx.planner.problem import NothingFits, Problem
from lohan_fx.planner.solution import Forced, Solution
from lohan_fx.planner.traffic import Floats, Ints
from lohan_fx.planner.words import nothing_fits, with_reasons

# Rounds of giving up GPU bytes and spending them again; it ends with the first that gains nothing.
_MOST_EXCHANGES = 4

# Searches for a plan that writes less, where a bound on SSD writes is kept by the estimate alone.
_MOST_TIGHTENINGS = 4

_ORDERS: tuple[tuple[Scarce, ...], ...] = (
    (Scarce.GPU, Scarce.DRAM, Scarce.SSD, Scarce.GPU, Scarce.DRAM),
    (Scarce.DRAM, Scarce.GPU, Scarce.DRAM, Scarce.SSD, Scarce.GPU),
)


def greedy(problem: Problem, forced: Forced | None = None, cutoff_s: float = math.inf) -> Solution:
    """A plan that fits, fast by greedy choice.

    Raises NothingFits, with the least each tier must hold, where none is found, InfeasiblePlan
    for a forced placement that no plan can have, and NotFaster where the plan's step cannot be below
    `cutoff_s` seconds.
    """
    forced = forced or Forced()
    check_forced(problem, forced)
    best = _search(problem, forced)
    if best is None:
        raise nothing_fits(problem, forced, _without_bound(problem, forced))
    bound = problem.max_ssd_bytes_per_day
    # What is too fast for the bound is replaced by another plan below.
    best = replayed(problem, best, cutoff_s if bound is None else math.inf)
    if bound is not None and any(excess_of(problem, best.predicted)):
        best = _within(bound, problem, forced, best)
    return with_reasons(problem, dataclasses.replace(best, policy="greedy"), forced)


def _search(problem: Problem, forced: Forced) -> Solution | None:
    """The best plan by the estimate; None if nothing fits."""
    best = all_on_gpu(problem, forced)
    if best is None:
        begin = starts(problem, forced)
        for room in rooms(problem):
            best = _best(problem, forced, room, begin)
            if best is not None:
                break
    return best


def _within(bound: int, problem: Problem, forced: Forced, over: Solution) -> Solution:
    """A plan that keeps the bound on SSD writes where `over`, replayed, turned out too fast for it.

    The estimate took the step of `over` for longer than it is; the search is told of less to write.
    """
    told = bound
    for _ in range(_MOST_TIGHTENINGS):
        written = over.predicted.ssd_bytes_written_per_step
        a_day = written * SECONDS_PER_DAY / over.predicted.step_s
        told = min(int(told * bound / a_day), told - 1)
        found = _search(dataclasses.replace(problem, max_ssd_bytes_per_day=told), forced)
        if found is None:
            break
        over = replayed(problem, found)
        if not any(excess_of(problem, over.predicted)):
            return over
    raise nothing_fits(problem, forced, _without_bound(problem, forced))


def _without_bound(problem: Problem, forced: Forced) -> Solution | None:
    """The plan there would be if SSD writes were not bounded; None if they are not, or none."""
    if problem.max_ssd_bytes_per_day is None:
        return None
    try:
        return greedy(dataclasses.replace(problem, max_ssd_bytes_per_day=None), forced)
    except NothingFits:
        return None


def _best(problem: Problem, forced: Forced, room: Room, begin: Sequence[Ledger]) -> Solution | None:
    """The best plan over starting points and orders of spending, improved; None if nothing fits."""
    search = Search(problem, forced, room)
    found: list[tuple[Solution, Ledger]] = []
    for order in _ORDERS:
        for ledger in map(Ledger.copy, begin):
            if _repair(search, ledger):
                for spend in order:
                    _buy(search, ledger, spend)
                _polish(search, ledger)
                solution = finish(problem, ledger, room)
                if solution is not None:
                    found.append((solution, ledger))
    if not found:
        return None
    best, ledger = min(found, key=lambda pair: rank(pair[0]))
    for _ in range(_MOST_EXCHANGES):
        _exchange(search, ledger)
        solution = finish(problem, ledger, room)
        if solution is None or rank(solution) >= rank(best):
            break
        best = solution
    return best


def improve(search: Search, ledger: Ledger) -> bool:
    """Mend a placement made elsewhere, then spend what room there is; False if it cannot fit."""
    if not _repair(search, ledger):
        return False
    for spend in _ORDERS[0]:
        _buy(search, ledger, spend)
    _polish(search, ledger)
    return True


def _repair(search: Search, ledger: Ledger) -> bool:
    """Move items away from what there is too little of, SSD first; False if some excess stays."""
    for tier in (Scarce.SSD, Scarce.DRAM, Scarce.GPU, Scarce.WRITES):
        before = search.excess(ledger)
        if not before[tier]:
            continue
        sheds = np.flatnonzero(search.sizes[:, tier] < 0)
        shed = -search.sizes[sheds, tier]
        state = {"excess": before}

        def accept(after: Excess, state: dict[str, Excess] = state) -> bool:
            now = state["excess"]
            better = sum(after) < sum(now)
            no_worse = all(a <= n for a, n in zip(after, now, strict=True))
            if better and no_worse:
                state["excess"] = after
            return better and no_worse

        def done(state: dict[str, Excess] = state, tier: int = tier) -> bool:
            return not state["excess"][tier]

        def score(gain: Floats, shed: Ints = shed) -> Floats:
            return gain / shed

        search.run(ledger, sheds, score, accept, done, limit=4 * _num_items(search))
    return not any(search.excess(ledger))


def _buy(search: Search, ledger: Ledger, spend: Scarce) -> None:
    """Scarce the free bytes of one tier, most seconds per byte first, no other tier's."""
    sizes = search.sizes
    others = [tier for tier in (Scarce.GPU, Scarce.DRAM, Scarce.SSD) if tier < spend]
    rows = np.flatnonzero((sizes[:, spend] > 0) & (sizes[:, others] <= 0).all(axis=1))
    if spend is Scarce.GPU:
        rows = np.flatnonzero((sizes[:, 0] > 0) & (sizes[:, 1] <= 0) & (sizes[:, 2] <= 0))
    cost = sizes[rows, spend]
    # The GPU is used as far as it goes, so that a budget that is large enough moves nothing at all.
    least = -NO_GAIN if spend is Scarce.GPU else NO_GAIN

    def score(gain: Floats) -> Floats:
        return np.where(gain >= least, gain / cost, -np.inf)

    search.run(ledger, rows, score, _fits, _never, limit=8 * _num_items(search))


def _exchange(search: Search, ledger: Ledger) -> None:
    """Give up what the GPU holds and the step does not need, then spend the room again.

    What was bought early may have been made worthless by what came later: once nothing waits for
    weights, those on the GPU could be recomputed activations instead.
    """
    sizes = search.sizes
    rows = np.flatnonzero((sizes[:, 0] < 0) & (sizes[:, 2] <= 0))
    freed = -sizes[rows, 0]

    def for_nothing(saved: Floats) -> Floats:
        return np.where(saved >= -NO_GAIN, freed * 1.0, -np.inf)

    limit = 4 * _num_items(search)
    search.run(ledger, rows, for_nothing, _fits, _never, limit, measure=search.steps)
    rows = np.flatnonzero((sizes[:, 0] > 0) & (sizes[:, 2] <= 0))
    cost = sizes[rows, 0]

    def for_time(saved: Floats) -> Floats:
        return np.where(saved > NO_GAIN, saved / cost, -np.inf)

    search.run(ledger, rows, for_time, _fits, _never, limit, measure=search.steps)
    for spend in _ORDERS[0]:
        _buy(search, ledger, spend)
    _polish(search, ledger)


def _never() -> bool:
    return False


def _polish(search: Search, ledger: Ledger) -> None:
    """Make any move that still shortens the step."""
    rows = np.arange(len(search.moves))

    def score(gain: Floats) -> Floats:
        return np.where(gain > 1e-9, gain, -np.inf)

    search.run(ledger, rows, score, _fits, _never, limit=2 * _num_items(search))


def _fits(excess: Excess) -> bool:
    return not any(excess)


def _num_items(search: Search) -> int:
    return sum(len(group.members) for group in search.groups) + 1
