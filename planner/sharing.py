"""Windows under which several steps can run in turns, each within its budget.

The steps have the same buckets at the same places; activations and fitting windows differ, as with
another batch size. Staging that suits all of them need not be opened anew whenever they alternate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lohan_fx.errors import LohanError
from lohan_fx.planner.choice import excess_of
from lohan_fx.planner.cost import estimate
from lohan_fx.planner.problem import Problem
from lohan_fx.planner.simulate import predict
from lohan_fx.planner.solution import Solution, Windows
from lohan_fx.planner.validate import validate

# Of a Windows, what the runtime allocates once for all steps; the others are part of a program.
STAGING = (
    "grad_window_bytes",
    "grad_buffers",
    "state_buffers",
    "inbound_bytes",
    "outbound_bytes",
    "stream_bytes",
)


def in_turns(steps: Sequence[tuple[Problem, Solution]]) -> tuple[Solution, ...] | None:
    """The solutions with the same staging, predicted anew; None where no staging tried suits all.

    Tried are, in this order: the most of each size over all steps, the staging of each step from the
    last on, and the least of each size. What a solver proved (`optimality`) goes with its windows.
    """
    solutions = [solution for _, solution in steps]
    if len({_staging(solution.windows) for solution in solutions}) == 1:
        return tuple(solutions)
    for staging in _candidates([_staging(solution.windows) for solution in solutions]):
        found = tuple(_shared(steps, staging))
        if len(found) == len(steps):
            return found
    return None


def _staging(windows: Windows) -> tuple[int, ...]:
    return tuple(getattr(windows, name) for name in STAGING)


def _candidates(given: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    def each(choose: Callable[[Iterable[int]], int]) -> tuple[int, ...]:
        return tuple(choose(sizes) for sizes in zip(*given, strict=True))

    return list(dict.fromkeys((each(max), *reversed(given), each(min))))


def _shared(
    steps: Sequence[tuple[Problem, Solution]], staging: tuple[int, ...]
) -> Iterator[Solution]:
    """The steps with this staging, up to the first that it does not suit."""
    for problem, solution in steps:
        if _staging(solution.windows) == staging:
            yield solution
            continue
        changed_sizes: dict[str, Any] = dict(zip(STAGING, staging, strict=True))
        windows = dataclasses.replace(solution.windows, **changed_sizes)
        where = solution.buckets, solution.activations, windows
        if any(excess_of(problem, estimate(problem, *where))[:3]):  # bytes; faster than a replay
            return
        try:
            predicted = predict(problem, *where)
        except LohanError:  # it cannot run at all, say because an item is larger than its arena
            return
        changed = dataclasses.replace(
            solution, windows=windows, predicted=predicted, optimality=None
        )
        if validate(problem, changed):
            return
        yield changed
