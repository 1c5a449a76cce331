"""Where moves stand in a pass, from the rules alone."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lohan_fx.planner.schedule import (
    Placed,
    Use,
    WeightUse,
    in_program_order,
    offload_moves,
    reload_moves,
    weight_moves,
)


def words(moves: list[Placed]) -> list[str]:
    """Moves in program order, with their positions."""
    return [f"{m.position} {m.op} {m.arg}" for m in in_program_order(moves)]


FOUR = [Use(position, position, 10) for position in range(4)]


def issued(uses: list[Use], window: int) -> list[tuple[int, int]]:
    """(position, waits before it) of each value's copy in, by value."""
    found: dict[int, tuple[int, int]] = {}
    waits = 0
    for move in in_program_order(reload_moves(uses, window)):
        if move.op == "reload":
            found[move.arg] = (move.position, waits)
        waits += move.op == "reload_wait"
    return [found[arg] for arg in sorted(found)]


@pytest.mark.parametrize(
    ("window", "points"),
    [
        (0, [(0, 0), (1, 1), (2, 2), (3, 3)]),  # each is waited for where it is issued
        (10, [(0, 0), (0, 1), (1, 2), (2, 3)]),  # one moves while the one before is used
        (20, [(0, 0), (0, 0), (0, 1), (1, 2)]),
        (39, [(0, 0), (0, 0), (0, 0), (0, 1)]),
        (40, [(0, 0), (0, 0), (0, 0), (0, 0)]),
    ],
)
def test_a_copy_is_issued_as_early_as_the_window_allows(
    window: int, points: list[tuple[int, int]]
) -> None:
    assert issued(FOUR, window) == points


def test_a_value_larger_than_the_window_moves_alone() -> None:
    uses = [Use(0, 0, 5), Use(3, 1, 50), Use(5, 2, 5)]
    assert issued(uses, 10) == [(0, 0), (3, 1), (3, 2)]


def test_weights_are_fetched_awaited_and_released_around_their_readers() -> None:
    uses = [WeightUse(0, 0, 1, 2, 10), WeightUse(1, 2, 2, 3, 10)]
    assert words(weight_moves(uses, 20, backward=False)) == [
        "0 fetch 0",
        "0 fetch 1",
        "0 wait 0",
        "2 release 0",
        "2 wait 1",
        "3 release 1",
    ]


def test_resident_weights_are_awaited_at_once_unless_the_forward_must_see_an_update() -> None:
    uses = [
        WeightUse(0, 3, 3, 5, 10, resident=True),
        WeightUse(1, 3, 3, 5, 10, resident=True, refreshed=True),
    ]
    assert "0 wait 0" in words(weight_moves(uses, 0, backward=False))
    assert "3 wait 1" in words(weight_moves(uses, 0, backward=False))
    backward = words(weight_moves(uses, 0, backward=True))
    assert {"0 wait 0", "0 wait 1", "5 release 0", "5 release 1"} <= set(backward)


def test_what_leaves_is_waited_for_when_the_next_would_exceed_the_window() -> None:
    leaving = [Use(1, 0, 10), Use(2, 1, 10), Use(3, 2, 10)]
    assert words(offload_moves(leaving, 4, 20)) == [
        "1 offload 0",
        "2 offload 1",
        "3 offload_wait 0",
        "3 offload 2",
        "4 offload_wait 1",
        "4 offload_wait 2",
    ]


def test_what_is_larger_than_the_window_leaves_before_anything_else_runs() -> None:
    assert words(offload_moves([Use(1, 0, 10), Use(2, 1, 30), Use(3, 2, 10)], 4, 20)) == [
        "1 offload 0",
        "2 offload_wait 0",
        "2 offload 1",
        "2 offload_wait 1",
        "3 offload 2",
        "4 offload_wait 2",
    ]


def test_what_comes_back_is_awaited_at_its_position() -> None:
    assert words(reload_moves([Use(4, 0, 10), Use(0, 1, 10)], 20)) == [
        "0 reload 1",
        "0 reload 0",
        "0 reload_wait 1",
        "4 reload_wait 0",
    ]


def test_nothing_is_issued_before_the_end_of_a_closed_stage_that_comes_before_its_use() -> None:
    assert words(reload_moves(FOUR, 100, [2])) == [
        "0 reload 0",
        "0 reload 1",
        "0 reload_wait 0",
        "1 reload_wait 1",
        "2 reload 2",
        "2 reload 3",
        "2 reload_wait 2",
        "3 reload_wait 3",
    ]
    uses = [WeightUse(i, i, i, i + 1, 10) for i in range(3)]
    assert [
        w for w in words(weight_moves(uses, 10, backward=True, closed_ends=[1])) if "f" in w
    ] == [
        "0 fetch 0",
        "1 fetch 1",
        "1 fetch 2",
    ]


SIZES = st.lists(st.integers(0, 20), min_size=1, max_size=12)


@given(SIZES, st.integers(0, 60))
def test_no_more_than_a_window_or_one_value_is_issued_and_not_waited_for(
    sizes: list[int], window: int
) -> None:
    uses = [Use(2 * index, index, size) for index, size in enumerate(sizes)]
    moves = in_program_order(reload_moves(uses, window))
    on_its_way: set[int] = set()
    for move in moves:
        if move.op == "reload":
            on_its_way.add(move.arg)
            here = [sizes[arg] for arg in on_its_way if sizes[arg]]
            assert sum(here) <= window or len(here) == 1
        else:
            on_its_way.remove(move.arg)  # KeyError: waited for before it was issued
    assert not on_its_way


@given(SIZES, st.integers(0, 60), st.integers(0, 60))
def test_a_wider_window_issues_nothing_later(sizes: list[int], one: int, other: int) -> None:
    uses = [Use(2 * index, index, size) for index, size in enumerate(sizes)]
    narrow, wide = (issued(uses, window) for window in sorted((one, other)))
    assert all(w <= n for w, n in zip(wide, narrow, strict=True))
    assert all(a <= b for a, b in itertools.pairwise(wide))


@given(SIZES, st.integers(0, 60), st.lists(st.integers(1, 24), max_size=4).map(sorted))
def test_closed_ends_delay_copies_up_to_them_and_no_further(
    sizes: list[int], window: int, ends: list[int]
) -> None:
    uses = [Use(2 * index, index, size) for index, size in enumerate(sizes)]
    issue = {m.arg: m for m in reload_moves(uses, window, ends) if m.op == "reload"}
    for free in reload_moves(uses, window):
        if free.op != "reload":
            continue
        use = uses[free.arg]
        not_before = max((end for end in ends if end <= use.position), default=0)
        assert issue[free.arg].position == max(free.position, not_before)
    moves = in_program_order(reload_moves(uses, window, ends))
    order = [m.arg for m in moves if m.op == "reload"]
    assert order == sorted(order)  # copies of one stream are in the order of their uses
    for arg in order:
        assert moves.index(issue[arg]) < next(
            at for at, m in enumerate(moves) if m.op == "reload_wait" and m.arg == arg
        )
