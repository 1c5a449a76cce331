"""Staging for steps that run in turns: the most that suits all of them, or none."""

from __future__ import annotations

import dataclasses
from typing import Any

from problems import deep

from lohan_fx.planner import Place, Problem, Solution, in_turns, predict, solve, validate


def with_windows(problem: Problem, solution: Solution, **sizes: int) -> Solution:
    windows = dataclasses.replace(solution.windows, **sizes)
    predicted = predict(problem, solution.buckets, solution.activations, windows)
    return dataclasses.replace(solution, windows=windows, predicted=predicted, optimality=None)


def offloaded() -> tuple[Problem, Solution]:
    """Four layers, states on SSD; the gradients of six buckets gather at the same time."""
    problem = deep(4)
    return problem, solve(problem, "zero-infinity")


def with_dram(problem: Problem, dram_bytes: int) -> Problem:
    capacities = dataclasses.replace(problem.capacities, dram_bytes=dram_bytes)
    return dataclasses.replace(problem, capacities=capacities)


def sizes(solution: Solution) -> tuple[Any, ...]:
    windows = solution.windows
    return windows.grad_buffers, windows.state_buffers


def test_the_most_of_each_size_is_taken_where_it_fits() -> None:
    problem, base = offloaded()
    many = with_windows(problem, base, grad_buffers=7, state_buffers=2)
    wide = with_windows(problem, base, grad_buffers=5, state_buffers=4)
    found = in_turns([(problem, many), (problem, wide)])
    assert found is not None
    assert [sizes(solution) for solution in found] == [(7, 4), (7, 4)]
    for solution in found:
        assert validate(problem, solution) == []


def test_what_a_program_has_of_its_own_stays() -> None:
    problem, base = offloaded()
    one = with_windows(problem, base, grad_buffers=7, fetch_window_bytes=0)
    found = in_turns([(problem, one), (problem, base)])
    assert found is not None
    assert found[0].windows.fetch_window_bytes == 0
    assert found[1].windows.fetch_window_bytes == base.windows.fetch_window_bytes


def test_less_than_the_most_is_taken_where_one_budget_is_smaller() -> None:
    problem, base = offloaded()
    few, many = (with_windows(problem, base, grad_buffers=n) for n in (6, 9))
    small = with_dram(problem, few.predicted.peak_bytes["dram"])
    found = in_turns([(problem, many), (small, few)])
    assert found is not None
    assert [sizes(solution) for solution in found] == [sizes(few)] * 2
    assert validate(small, found[1]) == []


def test_none_is_found_where_one_needs_what_the_other_has_no_room_for() -> None:
    problem, base = offloaded()
    largest = max(activation.bytes for activation in problem.activations)
    on_ssd = dataclasses.replace(base, activations=(Place.SSD,) * len(base.activations))
    swapping = with_windows(
        problem,
        on_ssd,
        inbound_bytes=base.windows.inbound_bytes + 2 * largest,
        outbound_bytes=2 * largest,
    )
    assert validate(problem, swapping) == []
    full = with_dram(problem, base.predicted.peak_bytes["dram"])
    assert in_turns([(problem, swapping), (full, base)]) is None
    assert in_turns([(problem, swapping), (problem, base)]) is not None


def test_the_same_staging_is_left_as_it_is() -> None:
    problem, base = offloaded()
    assert in_turns([(problem, base), (problem, base)]) == (base, base)
