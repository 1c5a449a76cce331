"""Updates that assume what step() will decide, as planned: their bytes, their seconds, and the choice."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import MIB, activation, bucket, deep, lanes, problem, problems

from lohan_fx.errors import InfeasiblePlan, LohanError
from lohan_fx.planner import (
    SOLVERS,
    BucketPlace,
    Ledger,
    Overlap,
    Place,
    Problem,
    Room,
    Simulation,
    Solution,
    Windows,
    dram_occupants,
    estimate,
    predict,
    simulate,
    solve,
    validate,
    with_speculation,
)
from lohan_fx.planner.moves import group_items
from lohan_fx.planner.solution import Forced
from lohan_fx.planner.speculation import evenly_spread

G, D, S = Place.GPU, Place.DRAM, Place.SSD
NEXT, SPECULATIVE = Overlap.NEXT_FORWARD, Overlap.SPECULATIVE
# Weights of 2 MiB in 16 bit: a master and two moments of 4 MiB each.
WEIGHT, STATE = 2 * MIB, 12 * MIB
SPARE = WEIGHT + STATE
WIDE = Windows(100 * MIB, 100 * MIB, 100 * MIB, 100 * MIB, 10, 10, 100 * MIB, 100 * MIB)
QUICK_LINK = lanes(h2d_bytes_per_s=1e15, d2h_bytes_per_s=1e15)


def layers(count: int, overlap: Overlap, **rest: object) -> Problem:
    """Layers of one bucket each, of 1 s and 2 s; an update takes the CPU 1 s."""
    buckets = tuple(bucket(i, i) for i in range(count))
    return problem(count, buckets, overlap=overlap, **{"rates": QUICK_LINK, **rest})  # type: ignore[arg-type]


def with_overlap(question: Problem, overlap: Overlap) -> Problem:
    return dataclasses.replace(question, overlap=overlap)


def spans(found: Simulation, what: str, lane: str = "") -> list[tuple[int, object, object]]:
    """(bucket, start, end) of one sort of work, in order of time."""
    return [
        (s.index, pytest.approx(s.start_s, abs=1e-6), pytest.approx(s.end_s, abs=1e-6))
        for s in sorted(found.spans, key=lambda s: s.start_s)
        if s.what == what and lane in s.lane
    ]


def dram_bytes(question: Problem, place: BucketPlace) -> int:
    places = [place] * len(question.buckets)
    ledger = Ledger(question, places, [])
    windows = ledger.windows(Room.ITEM)
    answer = Solution("hand", tuple(places), (), windows, predict(question, places, [], windows))
    assert validate(question, answer) == []
    occupants = dram_occupants(ledger, windows)
    assert sum(o.bytes for o in occupants) == answer.predicted.peak_bytes["dram"]
    memory = simulate(question, places, [], windows).memory["dram"]
    assert memory.peak_bytes == answer.predicted.peak_bytes["dram"]
    return answer.predicted.peak_bytes["dram"]


# ---- by hand ----


@pytest.mark.parametrize(
    ("weight", "state", "spare"),
    [(D, D, SPARE), (G, D, SPARE), (G, G, 0), (D, S, 0), (S, D, 0), (S, S, 0)],
    ids=str,
)
def test_what_speculates_is_in_dram_twice(weight: Place, state: Place, spare: int) -> None:
    place = BucketPlace(weight, state)
    more = dram_bytes(layers(3, SPECULATIVE), place) - dram_bytes(layers(3, NEXT), place)
    assert more == 3 * spare


def test_fp32_weights_have_a_second_copy_and_so_have_their_moments() -> None:
    both = [
        problem(1, (bucket(0, 0, master=False),), overlap=mode, rates=QUICK_LINK)
        for mode in (NEXT, SPECULATIVE)
    ]
    waiting, speculating = (dram_bytes(question, BucketPlace(D, D)) for question in both)
    assert speculating - waiting == 3 * WEIGHT


def test_frozen_weights_have_no_second_copy() -> None:
    question = problem(1, (bucket(0, 0, trainable=False),), overlap=SPECULATIVE)
    assert dram_bytes(question, BucketPlace(D, D)) == WEIGHT


@pytest.mark.parametrize("weight", [D, G], ids=str)
def test_updates_run_under_the_backward(weight: Place) -> None:
    places = [BucketPlace(weight, D)] * 3
    found = simulate(layers(3, SPECULATIVE), places, [], WIDE)
    waiting = simulate(layers(3, NEXT), places, [], WIDE)
    # The forward waits for the update that is left over; then the backward is from 4 s to 10 s.
    assert spans(found, "adam") == [(0, 0, 1), (2, 6, 7), (1, 8, 9)]
    assert spans(waiting, "adam") == [(0, 0, 1), (1, 1, 2), (2, 2, 3)]
    assert found.step_s == waiting.step_s == pytest.approx(10.0)
    slow = dataclasses.replace(QUICK_LINK, cpu_adam_params_per_s=MIB / 3)
    steps = [
        simulate(layers(3, mode, rates=slow), places, [], WIDE).step_s
        for mode in (SPECULATIVE, NEXT)
    ]
    # Three updates of 3 s, from the first gradient at 5 s on, end at 14 s, and the last one is that of
    # the first layer. Without speculation they begin at 9 s, and the last layer's forward follows them.
    assert steps == pytest.approx([14, 6 + 9 + 1])


def test_updates_made_ahead_take_as_long_as_second_copies_do() -> None:
    half = lanes(
        h2d_bytes_per_s=1e15,
        d2h_bytes_per_s=1e15,
        cpu_adam_ahead_params_per_s=lanes().cpu_adam_params_per_s / 2,
    )
    question = layers(2, SPECULATIVE, rates=half)
    places = [BucketPlace(D, D)] * 2
    found = simulate(question, places, [], WIDE)
    lasted = [s.end_s - s.start_s for s in found.spans if s.what == "adam"]
    assert lasted == pytest.approx([2.0, 2.0])
    waiting = with_overlap(question, NEXT)
    for answer in (predict, estimate):
        ahead, behind = (answer(q, places, [], WIDE).lane_busy_s for q in (question, waiting))
        assert ahead["cpu_adam"] == pytest.approx(2 * behind["cpu_adam"])
        assert ahead["dram"] == pytest.approx(behind["dram"])


def test_new_weights_are_uploaded_once_step_has_decided() -> None:
    # A weight takes 2 s in. Those of layers 1 and 2 were made under the backward and go first, in the
    # forward's order; those of layer 0 are made from the last gradient, and all wait for them.
    rates = lanes(d2h_bytes_per_s=1e15, cpu_adam_params_per_s=1e15)
    question = layers(3, SPECULATIVE, rates=rates)
    found = simulate(question, [BucketPlace(G, D)] * 3, [], WIDE)
    assert spans(found, "upload") == [(1, 0, 2), (2, 2, 4), (0, 4, 6)]
    assert (found.forward_s, found.backward_s) == pytest.approx((6 + 3, 6))
    # As soon as they are made where nothing waits for step().
    early = simulate(with_overlap(question, Overlap.BACKWARD), [BucketPlace(G, D)] * 3, [], WIDE)
    assert [index for index, _, _ in spans(early, "upload")] == [0, 2, 1]


def test_what_is_on_ssd_waits_for_step() -> None:
    # Reading and writing a state take next to nothing, Adam 1 s on the CPU and less on the GPU.
    rates = dataclasses.replace(QUICK_LINK, ssd_read_bytes_per_s=1e15, ssd_write_bytes_per_s=1e15)
    places = [BucketPlace(S, D), BucketPlace(D, S), BucketPlace(D, D), BucketPlace(G, G)]
    found = simulate(layers(4, SPECULATIVE, rates=rates), places, [], WIDE)
    # The backward begins at 5 s; the gradient of bucket 2 is there 4 s later.
    assert (found.forward_s, found.backward_s) == pytest.approx((5, 8))
    assert spans(found, "adam", "cpu_adam")[:3] == [(0, 0, 1), (1, 1, 2), (2, 9, 10)]


def test_the_estimate_lets_updates_run_into_the_forward_with_its_uploads() -> None:
    question = layers(3, SPECULATIVE, rates=lanes(cpu_adam_params_per_s=MIB / 10))
    windows = Ledger(question, [BucketPlace(G, D)] * 3, []).windows(Room.ITEM)
    found = estimate(question, [BucketPlace(G, D)] * 3, [], windows)
    # Uploads take 6 s, as compute does in the backward. Adam of 30 s has both phases.
    assert (found.forward_s, found.backward_s) == pytest.approx((30 - 6, 6))
    quick = layers(3, SPECULATIVE, rates=lanes())
    found = estimate(quick, [BucketPlace(G, D)] * 3, [], windows)
    assert (found.forward_s, found.backward_s) == pytest.approx((6, 6))


def test_sums_of_gradients_are_refused_with_what_to_use() -> None:
    with pytest.raises(LohanError, match=r"sums gradients.*use 'next-forward'"):
        dataclasses.replace(layers(1, SPECULATIVE), accumulates=True)


def test_the_checker_misses_second_copies_that_are_not_counted() -> None:
    waiting = layers(3, NEXT, gpu=8)
    answer = solve(waiting, "greedy")
    assert validate(waiting, answer) == []
    found = validate(with_overlap(waiting, SPECULATIVE), answer)
    assert any("the dram peak is" in line for line in found), found


# ---- some buckets only ----


def test_only_buckets_that_may_speculate_have_second_copies_and_early_updates() -> None:
    question = dataclasses.replace(layers(3, SPECULATIVE), speculating=frozenset({2}))
    waiting = layers(3, NEXT)
    more = dram_bytes(question, BucketPlace(D, D)) - dram_bytes(waiting, BucketPlace(D, D))
    assert more == SPARE
    found = simulate(question, [BucketPlace(D, D)] * 3, [], WIDE)
    # The forward waits for layer 0's update, and that of layer 1 is made meanwhile. The backward begins
    # at 4 s, and the gradient of layer 2 is there 2 s later.
    assert spans(found, "adam") == [(0, 0, 1), (1, 1, 2), (2, 6, 7)]
    in_vain = dataclasses.replace(waiting, speculating=frozenset({2}))
    assert simulate(in_vain, [BucketPlace(D, D)] * 3, [], WIDE) == simulate(
        waiting, [BucketPlace(D, D)] * 3, [], WIDE
    )


def test_the_estimate_has_updates_that_wait_in_the_forward_alone() -> None:
    rates = dataclasses.replace(QUICK_LINK, cpu_adam_params_per_s=MIB / 10)
    question = dataclasses.replace(layers(3, SPECULATIVE, rates=rates), speculating=frozenset({1}))
    windows = Ledger(question, [BucketPlace(D, D)] * 3, []).windows(Room.ITEM)
    found = estimate(question, [BucketPlace(D, D)] * 3, [], windows)
    # Of 30 s of Adam, 20 cannot start before the forward; of the others, 6 are under the backward.
    assert (found.forward_s, found.backward_s) == pytest.approx((24, 6))
    all_of_them = dataclasses.replace(rates, cpu_adam_params_per_s=MIB / 2)
    question = dataclasses.replace(question, lanes=all_of_them)
    found = estimate(question, [BucketPlace(D, D)] * 3, [], windows)
    assert (found.forward_s, found.backward_s) == pytest.approx((4, 6))


def test_buckets_that_may_speculate_are_not_alike_with_those_that_may_not() -> None:
    question = dataclasses.replace(layers(4, SPECULATIVE), speculating=frozenset({1, 3}))
    assert sorted(group.members for group in group_items(question, Forced())) == [(0, 2), (1, 3)]
    waiting = with_overlap(question, NEXT)
    assert [group.members for group in group_items(waiting, Forced())] == [(0, 1, 2, 3)]


def test_the_checker_counts_the_second_copies_of_those_that_may_speculate() -> None:
    some = dataclasses.replace(layers(3, SPECULATIVE, gpu=8), speculating=frozenset({0, 1}))
    answer = solve(some, "greedy")
    assert validate(some, answer) == []
    found = validate(dataclasses.replace(some, speculating=None), answer)
    assert any("the dram peak is" in line for line in found), found


def test_which_buckets_may_speculate_is_written_down_with_the_problem() -> None:
    question = dataclasses.replace(layers(3, SPECULATIVE), speculating=frozenset({2, 0}))
    raw = json.loads(question.to_json())
    assert raw["speculating"] == [0, 2]
    assert Problem.from_json(question.to_json()) == question
    del raw["speculating"]  # as written before there was a choice
    assert Problem.from_json(json.dumps(raw)) == layers(3, SPECULATIVE)
    with pytest.raises(LohanError, match="bucket 3 may speculate, of 3 in all"):
        dataclasses.replace(question, speculating=frozenset({3}))


def test_a_share_of_the_parameters_is_spread_over_the_model() -> None:
    question = layers(8, SPECULATIVE)
    assert evenly_spread(question, 0.5) == {0, 2, 4, 6}
    assert evenly_spread(question, 0.25) == {1, 5}
    assert evenly_spread(question, 1.0) == set(range(8))
    frozen = dataclasses.replace(bucket(3, 3), grad_stage=None, grad_bytes=0, state_bytes=0)
    some = dataclasses.replace(
        question, buckets=(*question.buckets[:3], frozen, *question.buckets[4:])
    )
    assert evenly_spread(some, 1.0) == set(range(8)) - {3}


# ---- the choice ----


def slow_adam(**rest: object) -> Problem:
    """Layers that do not fit the GPU, with updates as long as a stage's backward."""
    rates = dataclasses.replace(QUICK_LINK, cpu_adam_params_per_s=MIB / 2)
    return layers(6, NEXT, gpu=12, rates=rates, **rest)


@pytest.mark.parametrize("policy", ["optimal", "greedy"])
def test_with_dram_to_spare_the_step_is_shorter_with_speculation(policy: str) -> None:
    waiting = solve(slow_adam(), policy)
    question, answer = with_speculation(slow_adam(), lambda asked: solve(asked, policy))
    assert question == with_overlap(slow_adam(), SPECULATIVE)
    assert validate(question, answer) == []
    # 12 s of backward and a forward of 6 s that waits for one update of 2 s, not for six.
    assert answer.predicted.step_s == pytest.approx(20, rel=1e-6)
    assert waiting.predicted.step_s == pytest.approx(25, rel=1e-6)


def test_a_deep_model_takes_no_longer_with_speculation() -> None:
    question = dataclasses.replace(deep(8), overlap=NEXT)
    roomy = dataclasses.replace(
        question, capacities=dataclasses.replace(question.capacities, dram_bytes=10**12)
    )
    steps = {
        mode: solve(with_overlap(roomy, mode)).predicted.step_s for mode in (SPECULATIVE, NEXT)
    }
    assert steps[SPECULATIVE] <= steps[NEXT] * (1 + 1e-6)


def test_an_ssd_is_not_used_for_the_second_copies_it_saves() -> None:
    # Without one the step takes 28 s. By the closed form weights on SSD would be faster still, as they are
    # read ahead; in the replay they make it 33 s.
    rates = lanes(h2d_bytes_per_s=8 * MIB, d2h_bytes_per_s=8 * MIB, cpu_adam_params_per_s=MIB / 3)
    buckets = tuple(bucket(i, i) for i in range(8))
    acts = tuple(activation(i, i // 2, recompute_s=0.3) for i in range(16))
    steps = [
        solve(
            problem(8, buckets, acts, overlap=SPECULATIVE, gpu=40, dram=190, ssd=ssd, rates=rates)
        ).predicted.step_s
        for ssd in (1000, 0)
    ]
    assert steps[0] <= steps[1] * (1 + 1e-6) < 29


def test_with_too_little_dram_updates_wait_for_step() -> None:
    # Gradients, weights and states of those streamed are 16 MiB each, and 14 more with second copies.
    tight = slow_adam(ssd=0, dram=6 * 16)
    question, answer = with_speculation(tight, solve)
    assert question is tight and answer == solve(tight)
    with pytest.raises(InfeasiblePlan):
        solve(with_overlap(tight, SPECULATIVE))


@pytest.mark.parametrize(
    ("dram", "speculating", "step_s"),
    # Six layers take 96 MiB at most without second copies and 180 with all, of which one may be on the GPU.
    [(120, {1, 5}, 22), (140, {0, 2, 4}, 21), (160, {0, 1, 3, 4, 5}, 20), (200, None, 20)],
)
def test_as_many_speculate_as_dram_has_room_for(
    dram: int, speculating: set[int] | None, step_s: int
) -> None:
    asked: list[Problem] = []

    def counted(each: Problem) -> Solution:
        asked.append(each)
        return solve(each)

    question, answer = with_speculation(slow_adam(ssd=0, dram=dram), counted)
    assert question.overlap is SPECULATIVE
    assert question.speculating == speculating
    assert validate(question, answer) == []
    assert answer.predicted.step_s == pytest.approx(step_s, rel=1e-6)
    assert answer.predicted.peak_bytes["dram"] <= dram * MIB
    assert len(asked) <= 4
    # Where speculation is asked for, it is the same for the same buckets.
    insisted = with_speculation(with_overlap(slow_adam(ssd=0, dram=dram), SPECULATIVE), solve)
    assert insisted == (question, answer)


def test_speculation_that_is_asked_for_and_fits_nothing_says_so() -> None:
    with pytest.raises(InfeasiblePlan):
        with_speculation(with_overlap(slow_adam(ssd=0, dram=90), SPECULATIVE), solve)


def test_what_nobody_waits_for_is_not_made_twice() -> None:
    # Updates take next to nothing: a step with speculation is no shorter, and takes more DRAM.
    question = layers(3, NEXT, gpu=8, rates=lanes(cpu_adam_params_per_s=1e15))
    asked: list[Overlap] = []

    def counted(each: Problem) -> Solution:
        asked.append(each.overlap)
        return solve(each)

    assert with_speculation(question, counted)[0] is question
    assert asked == [NEXT, SPECULATIVE]
    del asked[:]
    for each in (
        dataclasses.replace(question, accumulates=True),
        with_overlap(question, Overlap.BACKWARD),
        layers(3, NEXT),  # all of it on the GPU
    ):
        assert with_speculation(each, counted)[0] is each
    assert asked == [NEXT, Overlap.BACKWARD, NEXT]


def test_a_problem_that_fits_nothing_says_so() -> None:
    with pytest.raises(InfeasiblePlan):
        with_speculation(layers(3, NEXT, gpu=1), solve)


# ---- any problem ----


@settings(max_examples=50, deadline=None)
@given(problems(), st.data())
def test_any_answer_is_sound_and_the_choice_no_slower(
    question: Problem, data: st.DataObject
) -> None:
    waiting, speculating = (with_overlap(question, mode) for mode in (NEXT, SPECULATIVE))
    if question.buckets and data.draw(st.booleans()):
        some = data.draw(st.frozensets(st.integers(0, len(question.buckets) - 1)))
        speculating = dataclasses.replace(speculating, speculating=some)
    for policy in SOLVERS:
        try:
            answer = solve(speculating, policy)
        except InfeasiblePlan:
            continue
        assert validate(speculating, answer) == [], policy
    try:
        alone = solve(waiting)
    except InfeasiblePlan:
        return
    chosen, answer = with_speculation(waiting, solve)
    assert validate(chosen, answer) == []
    assert answer.predicted.step_s <= alone.predicted.step_s * (1 + 1e-6)
