"""What every solver owes: answers that hold, and from `optimal` none that is worse, with a bound."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from problems import MIB, bucket, deep, irregular, lanes, problem, problems, stage

from lohan_fx.errors import InfeasiblePlan
from lohan_fx.planner import (
    SOLVERS,
    BucketPlace,
    Ledger,
    Overlap,
    Place,
    Problem,
    Room,
    Solution,
    activation_places,
    bucket_places,
    estimate,
    predict,
    solve,
    streamed_places,
    validate,
)
from lohan_fx.planner.cost import step_seconds

G, D, S, R = Place.GPU, Place.DRAM, Place.SSD, Place.RECOMPUTE


def attempt(question: Problem, policy: str) -> Solution | None:
    try:
        return solve(question, policy)
    except InfeasiblePlan:
        return None


def is_resident(answer: Solution) -> bool:
    return all(p == BucketPlace(G, G) for p in answer.buckets) and set(answer.activations) <= {G}


def every_placement(question: Problem) -> list[tuple[float, Solution]]:
    """All sound plans at the windows of each Room, with their seconds by the cost model."""
    found = []
    homes = [(*bucket_places(b), *streamed_places(question, b)) for b in question.buckets]
    for buckets in itertools.product(*homes):
        for acts in itertools.product(*map(activation_places, question.activations)):
            ledger = Ledger(question, buckets, acts)
            for room in Room:
                windows = ledger.windows(room)
                predicted = estimate(question, buckets, acts, windows)
                answer = Solution("all", buckets, acts, windows, predicted)
                if not validate(question, answer):
                    seconds = step_seconds(question, buckets, acts, windows, spills=True)
                    found.append((seconds, answer))
    return found


@settings(max_examples=60, deadline=None)
@given(problems())
def test_answers_are_sound_and_as_replayed_and_none_is_faster_than_optimal(
    question: Problem,
) -> None:
    answers = {policy: attempt(question, policy) for policy in SOLVERS}
    best = answers["optimal"]
    for policy, answer in answers.items():
        if answer is None:
            continue
        assert validate(question, answer) == [], policy
        replay = predict(question, answer.buckets, answer.activations, answer.windows)
        assert answer.predicted == replay, policy
        assert best is not None, policy
        if not is_resident(best):
            assert best.predicted.step_s <= answer.predicted.step_s * (1 + 2e-6), policy


@settings(max_examples=40, deadline=None)
@given(problems(most_buckets=2, most_activations=3, most_gpu=30))
def test_no_placement_at_all_is_below_the_bound(question: Problem) -> None:
    if question.max_ssd_bytes_per_day:
        # What a plan may write depends on its pace, which is a replay's and not the cost model's.
        question = dataclasses.replace(question, max_ssd_bytes_per_day=None)
    answer = attempt(question, "optimal")
    sound = every_placement(question)
    if answer is None:
        assert not sound
        return
    assert answer.optimality is not None
    least = min(seconds for seconds, _ in sound)
    assert answer.optimality.bound_s <= least * (1 + 1e-6)
    own = step_seconds(question, answer.buckets, answer.activations, answer.windows, spills=True)
    assert answer.optimality.bound_s <= own * (1 + 1e-6)
    if question.overlap is Overlap.BACKWARD:
        assert answer.optimality.bound_s <= answer.predicted.step_s * (1 + 1e-6)


def test_seconds_next_to_nothing_do_not_keep_a_problem_from_having_a_bound() -> None:
    question = problem(
        tuple(stage(index, 0.1) for index in range(4)),
        (bucket(0, 0, weight_mib=1, in_backward=False),),
        gpu=2,
        dram=10,
        ssd=0,
        rates=lanes(duplex_factor=0.5, ssd_simplex=False),
        overlap=Overlap.NEXT_FORWARD,
    )
    assert solve(question, "optimal").optimality is not None


@settings(max_examples=25, deadline=None)
@given(problems())
def test_the_same_problem_has_the_same_plan(question: Problem) -> None:
    answer = attempt(question, "optimal")
    if answer is not None:
        again = solve(Problem.from_json(question.to_json()), "optimal")
        assert answer == again


def test_a_deep_model_is_solved_within_three_hundredths_of_the_bound() -> None:
    # The gap is the cost model's; of placements so near each other the faster one in the replay is taken.
    question = deep(64)
    answer = solve(question, "optimal")
    assert validate(question, answer) == []
    assert answer.optimality is not None
    assert 0 <= answer.optimality.gap < 0.03


@pytest.mark.parametrize(
    ("params_per_s", "dram_bytes_per_s"),
    [
        pytest.param(40 * MIB / 6, 200 * MIB, id="updates run into the next forward"),
        pytest.param(12 * MIB / 6, 1e18, id="a backlog of updates is in the way"),
    ],
)
def test_a_model_whose_updates_nearly_keep_up_takes_as_long_as_its_stages(
    params_per_s: float, dram_bytes_per_s: float
) -> None:
    # Either closed form alone has a plan of 49.5 s or more for one of these.
    question = problem(
        16,
        tuple(bucket(index, index // 6) for index in range(96)),
        gpu=60 + 96 * 14 * 0.1,
        dram=4000,
        ssd=0,
        rates=lanes(
            h2d_bytes_per_s=40 * MIB,
            d2h_bytes_per_s=40 * MIB,
            cpu_adam_params_per_s=params_per_s,
            dram_bytes_per_s=dram_bytes_per_s,
        ),
    )
    assert solve(question, "optimal").predicted.step_s < 48.1


def test_items_of_which_no_two_are_alike_are_solved_too() -> None:
    question = irregular(num_buckets=60, num_activations=240, num_stages=20)
    best, quick = solve(question, "optimal"), solve(question, "greedy")
    for answer in (best, quick):
        assert validate(question, answer) == []
    assert best.predicted.step_s <= quick.predicted.step_s * (1 + 2e-6)
    assert best.optimality is not None
    assert 0 <= best.optimality.gap < 0.1
