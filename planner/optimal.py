"""The default solver: a mixed-integer program, and the best of everything else that fits.

Its own placements come from `milp` at each width of windows; greedy's, lohan's and those of the
static policies compete with them by the step that a replay of each takes. So no policy has a plan
that is faster, and the program's relaxation says how much faster any plan could be at most.

A budget that holds everything keeps everything on the GPU, and nothing else is tried: what could be
gained by moving the optimizer off an otherwise idle GPU is not worth a step that depends on links.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from lohan_fx.errors import InfeasiblePlan
from lohan_fx.planner.choice import NotFaster, all_on_gpu, excess_of, finish, rank, replayed
from lohan_fx.planner.cost import step_seconds
from lohan_fx.planner.greedy import greedy, improve
from lohan_fx.planner.least import check_forced, is_redone_in_place
from lohan_fx.planner.ledger import Ledger, Room, rooms
from lohan_fx.planner.lots import Lot
from lohan_fx.planner.moves import AnyPlace, Search, group_items
from lohan_fx.planner.problem import BucketPlace, NothingFits, Overlap, Place, Problem
from lohan_fx.planner.simulate import predict
from lohan_fx.planner.solution import Forced, Optimality, Solution
from lohan_fx.planner.words import with_reasons

# The last argument is the seconds of a step that is known: see choice.NotFaster.
Rival = Callable[[Problem, Forced | None, float], Solution]


def best_of(problem: Problem, forced: Forced | None, rivals: Mapping[str, Rival]) -> Solution:
    """The best plan found, with a bound on how good any could be.

    `rivals` are policies besides greedy whose plans compete; one that fits nothing is left out, and
    so is one that is proved to be slower than the best so far.

    Raises NothingFits, with the least each tier must hold, where nothing is found, and
    InfeasiblePlan for a forced placement that no plan can have.
    """
    forced = forced or Forced()
    check_forced(problem, forced)
    best = all_on_gpu(problem, forced)
    failure: NothingFits | None = None
    if best is None:
        best = own = _own(problem, forced)
        for solver in (greedy, *rivals.values()):
            try:
                rival = solver(problem, forced, best.predicted.step_s if best else math.inf)
            except NothingFits as exc:
                failure = failure or exc
            except InfeasiblePlan:
                continue
            else:
                best = min(best, rival, key=rank) if best else rival
        if best is None:
            assert failure is not None
            raise failure
        if best is not own:
            best = _or_mixed(problem, forced, best)
        if _waits_for_cpu(best):
            best = _streamed(problem, forced, best)
    else:
        best = replayed(problem, best)
    best = dataclasses.replace(best, policy="optimal", optimality=None)
    proof = _proof(problem, forced, best)
    return with_reasons(problem, dataclasses.replace(best, optimality=proof), forced)


def _own(problem: Problem, forced: Forced) -> Solution | None:
    """The program's best placement by its replay, of all readings; None without one that fits."""
    best: Solution | None = None
    for reading in _readings(problem):
        estimated = placements(reading.problem, forced, spills=reading.spills)
        found = _best_replayed(problem, estimated, best.predicted.step_s if best else math.inf)
        if found is not None:
            found = _or_mixed(problem, forced, found)
            best = min(best, found, key=rank) if best else found
    return best


def _waits_for_cpu(solution: Solution) -> bool:
    """True if the GPU stands still for the CPU's updates, or for DRAM, for a part of the step that counts."""
    stalled = solution.predicted.stall_s
    waited_s = stalled.get("cpu_adam", 0.0) + stalled.get("dram", 0.0)
    return waited_s > _WAITS * solution.predicted.step_s


def _streamed(problem: Problem, forced: Forced, best: Solution) -> Solution:
    """The best plan where states may pass through the GPU, if it is faster than `best`.

    Updates by the CPU and by the GPU are mixed evenly, so that both the CPU and the link have something
    to do all along.
    """
    for reading in _readings(problem):
        if not reading.spills:
            continue  # far too many states would pass
        most_s = (1 - _WAITS) * best.predicted.step_s
        estimated = placements(reading.problem, forced, spills=True, streams=True, cutoff_s=most_s)
        for solution in estimated:
            with suppress(NotFaster):
                found = _mixed(problem, forced, solution, [(0, 1), (2,)])
                found = found or replayed(problem, solution, best.predicted.step_s)
                if not any(excess_of(problem, found.predicted)):
                    best = min(best, found, key=rank)
    return best


@dataclasses.dataclass(frozen=True, slots=True)
class _Reading:
    """What the program is asked: a problem, and by which closed form (see `updates_spill`)."""

    problem: Problem
    spills: bool


def _readings(problem: Problem) -> list[_Reading]:
    """All that the program is asked; replays, always of the problem itself, tell the answers apart.

    With speculation it is also asked without an SSD. A bucket on SSD has no second copy, so the closed
    form, in which reads ahead of a forward are free, would use the SSD wherever DRAM is short. In the
    replay that is seldom worth it.
    """
    if problem.overlap is Overlap.BACKWARD:
        return [_Reading(problem, spills=False), _Reading(problem, spills=True)]
    have = problem.capacities
    if problem.overlap is not Overlap.SPECULATIVE or not have.ssd_bytes:
        return [_Reading(problem, spills=True)]
    without = dataclasses.replace(problem, capacities=dataclasses.replace(have, ssd_bytes=0))
    return [_Reading(problem, spills=True), _Reading(without, spills=True)]


def _best_replayed(
    problem: Problem, estimated: Iterable[Solution], cutoff_s: float
) -> Solution | None:
    """The best, when replayed, of solutions with estimates; None if none keeps all bounds.

    One that is proved to take `cutoff_s` or more is left out.

    They come with the widest windows first, and narrower ones are replayed only where the estimate,
    which does not know what wide ones hide, says that they are faster.
    """
    best: Solution | None = None
    best_estimate_s = math.inf
    for solution in estimated:
        estimate_s = solution.predicted.step_s
        if estimate_s > best_estimate_s:
            continue
        try:
            now = replayed(problem, solution, best.predicted.step_s if best else cutoff_s)
        except NotFaster:
            continue
        if not any(excess_of(problem, now.predicted)):
            best_estimate_s = min(best_estimate_s, estimate_s)
            best = min(best, now, key=rank) if best else now
    return best


def _proof(problem: Problem, forced: Forced, solution: Solution) -> Optimality | None:
    """What the relaxation proves about a solution; None where the program could not be solved."""
    from lohan_fx.planner.milp import bound_seconds

    bound = bound_seconds(problem, forced)
    if bound is None:
        return None
    step = step_seconds(
        problem, solution.buckets, solution.activations, solution.windows, spills=True
    )
    bound = min(bound, step)
    gap = (step - bound) / step if step else 0.0
    return Optimality(
        bound_s=bound,
        gap=gap,
        status="optimal" if gap <= _PROVED else "feasible",
    )


# Of a step: what makes states that pass through the GPU worth trying.
_WAITS = 0.03
# A gap at which the bound and the step are the same number for every practical purpose.
_PROVED = 1e-4


def placements(
    problem: Problem,
    forced: Forced,
    *,
    spills: bool = False,
    streams: bool = False,
    cutoff_s: float = math.inf,
) -> Iterator[Solution]:
    """The program's placements, at each width of windows, that fit once they are mended.

    Those of which it says that they take `cutoff_s` or more are left out. `spills`: see
    `updates_spill`; with `streams`, states may pass through the GPU for their updates.
    """
    # Loading a solver takes a while: only where there is something to decide.
    from lohan_fx.planner.milp import place_counts

    best_s = math.inf
    for room in rooms(problem):
        # Without windows nothing is hidden: that pays only where there is no room for them.
        most_s = min(cutoff_s, best_s) if room is Room.NONE else cutoff_s
        answer = place_counts(problem, forced, room, most_s, streams=streams, spills=spills)
        if answer is None:
            continue
        search = Search(problem, forced, room, streams=streams, spills=spills)
        ledger = _opened(problem, *_spelled_out(problem, answer.lots, answer.counts))
        if improve(search, ledger):
            solution = finish(problem, ledger, room, "optimal", spills=spills)
            if solution is not None:
                best_s = min(best_s, search.step_s(ledger))
                yield solution


def _opened(
    problem: Problem, buckets: Sequence[BucketPlace], activations: Sequence[Place]
) -> Ledger:
    """A ledger in which everything that may be recomputed can still become so."""
    widest = [
        Place.RECOMPUTE if is_redone_in_place(problem, a) else place
        for a, place in zip(problem.activations, activations, strict=True)
    ]
    ledger = Ledger(problem, buckets, widest)
    for index, place in enumerate(activations):
        if place is not widest[index]:
            ledger.move_activation(index, place)
    return ledger


def _spelled_out(
    problem: Problem,
    lots: tuple[Lot, ...],
    counts: tuple[tuple[float, ...], ...],
) -> tuple[list[BucketPlace], list[Place]]:
    """A place for each item from counts: most on the GPU first, in the order of the group."""
    buckets = [BucketPlace(Place.GPU, Place.GPU)] * len(problem.buckets)
    activations = [Place.GPU] * len(problem.activations)
    for lot, row in zip(lots, counts, strict=True):
        by_residence = sorted(zip(lot.places, row, strict=True), key=lambda p: -_residence(p[0]))
        order = [place for place, count in by_residence for _ in range(round(count))]
        for index, place in zip(lot.group.members, order, strict=True):
            if isinstance(place, BucketPlace):
                buckets[index] = place
            else:
                activations[index] = place
    return buckets, activations


def _residence(place: AnyPlace) -> int:
    """2, 1 or 0: how much of an item stays on the GPU."""
    if isinstance(place, BucketPlace):
        return (place.weight is Place.GPU) + (place.state is Place.GPU)
    return 2 if place is Place.GPU else 0


def _or_mixed(problem: Problem, forced: Forced, solution: Solution) -> Solution:
    """The solution, or the same with its places mixed along the model if that is faster."""
    mixed = _mixed(problem, forced, solution, [(0,), (1,), (2,)])
    return min(solution, mixed, key=rank) if mixed else solution


def _mixed(
    problem: Problem, forced: Forced, solution: Solution, residences: Sequence[tuple[int, ...]]
) -> Solution | None:
    """The same counts, with places of the same `residences` mixed evenly along the model.

    Lanes are then loaded alike from layer to layer, which a step by the simulator may gain from.
    """
    buckets, activations = list(solution.buckets), list(solution.activations)
    for group in group_items(problem, forced):
        placed: list[AnyPlace] = [*buckets] if group.is_bucket else [*activations]
        for alike in residences:
            members = [i for i in group.members if _residence(placed[i]) in alike]
            counts = Counter(placed[i] for i in members)
            # The k-th of n at one place stands at (k + 1/2) / n of the way.
            spots = sorted(
                ((k + 0.5) / count, number, place)
                for number, (place, count) in enumerate(sorted(counts.items(), key=str))
                for k in range(count)
            )
            for index, (_, _, place) in zip(members, spots, strict=True):
                if isinstance(place, BucketPlace):
                    buckets[index] = place
                else:
                    activations[index] = place
    if tuple(buckets) == solution.buckets and tuple(activations) == solution.activations:
        return None
    predicted = predict(problem, buckets, activations, solution.windows)
    mixed = dataclasses.replace(
        solution, buckets=tuple(buckets), activations=tuple(activations), predicted=predicted
    )
    return None if any(excess_of(problem, predicted)) else mixed
