"""The planner: hand-solved problems, random ones, and a checker that is checked itself."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import MIB, activation, bucket, deep, lanes, problem, problems, stage

from lohan_fx.errors import InfeasiblePlan, LohanError
from lohan_fx.planner import (
    BucketPlace,
    Forced,
    Ledger,
    NothingFits,
    Optimality,
    Overlap,
    Place,
    Prediction,
    Problem,
    Room,
    Solution,
    Windows,
    estimate,
    predict,
    solve,
    validate,
)

G, D, S, R = Place.GPU, Place.DRAM, Place.SSD, Place.RECOMPUTE


def solved(question: Problem, forced: Forced | None = None) -> Solution:
    """The greedy answer, found sound by the checker."""
    answer = solve(question, "greedy", forced)
    assert validate(question, answer) == []
    return answer


def estimated(question: Problem, answer: Solution) -> Prediction:
    """What the cost model says of an answer, as the solver saw it."""
    return estimate(question, answer.buckets, answer.activations, answer.windows)


def places(answer: Solution) -> list[tuple[Place, Place]]:
    return [(p.weight, p.state) for p in answer.buckets]


# ---- hand-solved ----


def test_with_room_for_everything_nothing_moves() -> None:
    answer = solved(problem(2, (bucket(0, 0), bucket(1, 1)), (activation(0, 0), activation(1, 1))))
    assert places(answer) == [(G, G), (G, G)]
    assert answer.activations == (G, G)
    assert answer.predicted.step_s == pytest.approx(6.0)
    assert answer.predicted.peak_bytes["dram"] == answer.predicted.peak_bytes["ssd"] == 0
    assert answer.windows == Windows()


def test_the_gpu_peak_is_the_sum_of_what_is_live_when_most_is() -> None:
    # Weights 2 and state 12 of both; the gradient of one; both activations; workspace 5.
    stages = (stage(0, workspace_mib=5), stage(1, workspace_mib=5))
    answer = solved(
        problem(stages, (bucket(0, 0), bucket(1, 1)), (activation(0, 0), activation(1, 1)))
    )
    assert answer.predicted.peak_bytes["gpu"] == (2 * (2 + 12) + 2 + 2 * 2 + 5) * MIB


def test_where_gradients_wait_for_step_they_all_stay_until_then() -> None:
    question = problem(2, (bucket(0, 0), bucket(1, 1)), overlap=Overlap.NEXT_FORWARD)
    answer = solved(question)
    assert answer.predicted.peak_bytes["gpu"] == 2 * (2 + 12 + 2) * MIB


def test_without_room_on_the_gpu_weights_stream_from_dram() -> None:
    # The running bucket 2, the next 2, gradients 2: residency of one bucket's weights costs 2 more.
    stages = tuple(stage(i, 0.5) for i in range(3))
    question = problem(stages, tuple(bucket(i, i) for i in range(3)), gpu=6, ssd=0)
    answer = solved(question)
    assert places(answer) == [(D, D)] * 3
    # Forward 1.5 s of compute beside 6 MiB in; backward 3 s beside 6 in, 6 out and 3 Mi parameters.
    expected = estimated(question, answer)
    assert expected.forward_s == pytest.approx(6.0)
    assert expected.backward_s == pytest.approx(6.0)
    assert expected.bottleneck == "h2d"
    # Weights and states, a ring of four gradients.
    assert answer.predicted.peak_bytes["dram"] == (3 * (2 + 12) + 4 * 2) * MIB


def test_spare_gpu_memory_is_spent_on_the_first_bucket() -> None:
    # The CPU's Adam is what takes longest, so a state on the GPU is what pays.
    rates = lanes(cpu_adam_params_per_s=MIB / 10)
    answer = solved(problem(3, tuple(bucket(i, i) for i in range(3)), gpu=22, ssd=0, rates=rates))
    assert places(answer)[0] == (G, G)
    assert all(state is D for _, state in places(answer)[1:])
    assert answer.predicted.lane_busy_s["cpu_adam"] == pytest.approx(20.0)


def test_without_dram_for_states_they_stay_on_ssd() -> None:
    # Weights in DRAM save three SSD transfers a byte, states two, so weights go first.
    question = problem(3, tuple(bucket(i, i) for i in range(3)), gpu=6, dram=45)
    answer = solved(question)
    # Two gradient buffers of 2, two state buffers of 12 and three weights of 2 are 34 of the 45;
    # a state would be 12 more, but a third gradient buffer has room.
    assert places(answer) == [(D, S)] * 3
    assert answer.predicted.peak_bytes["dram"] == 36 * MIB
    assert answer.predicted.ssd_bytes_written_per_step == 3 * 12 * MIB
    assert answer.predicted.bottleneck in ("ssd_read", "ssd_write")


def test_with_no_dram_to_spare_weights_and_states_are_on_ssd() -> None:
    # Two gradient buffers, two state buffers and an arena of two weights are 32; a weight is 2 more.
    question = problem(3, tuple(bucket(i, i) for i in range(3)), gpu=6, dram=33)
    answer = solved(question)
    assert set(places(answer)) == {(S, S)}
    # Forward: 6 MiB of reads. Backward: 6 more, and 36 + 6 out after 36 in.
    assert estimated(question, answer).forward_s == pytest.approx(6.0)
    assert estimated(question, answer).backward_s == pytest.approx(6 + 36 + 36 + 6)


def test_dram_is_used_before_ssd() -> None:
    answer = solved(problem(3, tuple(bucket(i, i) for i in range(3)), gpu=6))
    assert set(places(answer)) == {(D, D)}
    assert answer.predicted.peak_bytes["ssd"] == 0


def test_fp32_weights_on_the_gpu_have_their_state_there() -> None:
    buckets = tuple(bucket(i, i, weight_mib=4, master=False) for i in range(4))
    answer = solved(problem(4, buckets, gpu=30, ssd=0))
    assert set(places(answer)) <= {(G, G), (D, D)}
    assert (G, G) in places(answer)


def test_frozen_buckets_have_no_state_and_cost_no_update() -> None:
    buckets = tuple(bucket(i, i, trainable=False) for i in range(3))
    answer = solved(problem(3, buckets, gpu=4, ssd=0))
    assert set(places(answer)) == {(D, D)}
    assert answer.predicted.peak_bytes["dram"] == 6 * MIB
    assert answer.predicted.lane_busy_s["cpu_adam"] == 0


@pytest.mark.parametrize(
    ("recompute_s", "wanted"), [(0.01, R), (100.0, D)], ids=["cheap", "expensive"]
)
def test_an_activation_is_recomputed_or_swapped_by_what_it_costs(
    recompute_s: float, wanted: Place
) -> None:
    rates = lanes(h2d_bytes_per_s=MIB / 2, d2h_bytes_per_s=MIB / 2)
    acts = tuple(activation(i, i, mib=8, recompute_s=recompute_s) for i in range(3))
    # Room for one activation and the next one's arrival.
    answer = solved(problem(3, (), acts, gpu=16, ssd=0, rates=rates))
    assert answer.activations[0] is wanted
    assert R not in answer.activations if wanted is D else D not in answer.activations


def test_a_layers_input_is_not_recomputed_in_the_layer_above() -> None:
    # act2 is made in stage 0 from act0 and read in stage 1: making it again there would need act0
    # in stage 1 too.
    acts = (
        activation(0, 0, mib=4, recompute_s=0.0),
        activation(1, 1, mib=4, recompute_s=0.0),
        activation(2, 0, mib=4, recompute_s=0.0, needs=(0,), read_in=1),
    )
    answer = solved(problem(3, (), acts, gpu=9, ssd=0))
    assert answer.activations[2] is not R


def test_a_forced_chain_of_recomputation_holds_what_it_needs() -> None:
    acts = (
        activation(0, 0, mib=4),
        activation(1, 0, mib=4, needs=(0,), read_in=2),
    )
    forced = Forced(activations={1: R})
    answer = solved(problem(3, (), acts), forced)
    assert answer.activations == (G, R)
    # In the backward of stage 2 both are there: act0 is needed to make act1.
    ledger = Ledger(problem(3, (), acts), answer.buckets, (S, R))
    assert ledger.intervals[0] == (2, 0)


def test_a_tied_bucket_stays_from_its_first_reader_to_its_last() -> None:
    buckets = (bucket(0, 0, 3, weight_mib=6), bucket(1, 1), bucket(2, 2))
    streamed = [BucketPlace(D, D)] * 3
    used = Ledger(problem(4, buckets), streamed, ()).gpu_bytes(Windows())
    assert [int(x) // MIB for x in used] == [6, 8, 8, 6, 6, 8, 8, 6, 0]


def test_serial_updates_have_a_turn_of_their_own() -> None:
    rates = lanes(h2d_bytes_per_s=1e12, d2h_bytes_per_s=1e12)
    question = problem(3, tuple(bucket(i, i) for i in range(3)), gpu=6, ssd=0, rates=rates)
    serial = dataclasses.replace(question, overlap=Overlap.SERIAL)
    apart, hidden = estimated(serial, solved(serial)), estimated(question, solved(question))
    assert apart.update_s == pytest.approx(3.0)
    assert hidden.update_s == 0
    assert apart.step_s == pytest.approx(hidden.step_s + 3.0)


def test_naive_updates_do_not_overlap_reading_adam_and_writing() -> None:
    question = problem(3, tuple(bucket(i, i) for i in range(3)), gpu=6, dram=33)
    naive = dataclasses.replace(question, overlap=Overlap.NAIVE)
    apart = estimated(naive, solved(naive)).backward_s
    # Reads of 36 and writes of 42 MiB, 3 Mi parameters of Adam in between; weights come besides.
    assert apart == pytest.approx(max(36 + 3 + 42, 6 + 36 + 42))
    slow = dataclasses.replace(question.lanes, cpu_adam_params_per_s=MIB / 10)
    slow_naive = dataclasses.replace(naive, lanes=slow)
    assert estimated(slow_naive, solved(slow_naive)).backward_s == pytest.approx(36 + 30 + 42)


def test_two_ways_on_one_link_slow_each_other_down() -> None:
    question = problem(3, tuple(bucket(i, i) for i in range(3)), gpu=6, ssd=0)
    half = dataclasses.replace(question.lanes, duplex_factor=0.5)
    halved = dataclasses.replace(question, lanes=half)
    # 6 MiB each way at half speed while both go.
    assert estimated(halved, solved(halved)).backward_s == pytest.approx(12.0)


def test_a_bound_is_the_busiest_lane_alone() -> None:
    answer = solved(problem(3, tuple(bucket(i, i) for i in range(3)), gpu=6, ssd=0))
    assert answer.predicted.bound_s == pytest.approx(12.0)


# ---- what does not fit ----


def test_a_gpu_that_is_too_small_is_named_with_the_least_that_works() -> None:
    stages = (stage(0, workspace_mib=30), stage(1, workspace_mib=10))
    with pytest.raises(NothingFits, match=r"GPU: .* at least") as caught:
        solve(problem(stages, (bucket(0, 0),), gpu=20))
    assert caught.value.least_bytes["gpu"] == (30 + 2 + 2) * MIB
    assert "backward of 'layer0', whose temporaries" in str(caught.value)


def test_the_least_gpu_that_is_named_works() -> None:
    stages = (stage(0, workspace_mib=30), stage(1, workspace_mib=10))
    with pytest.raises(NothingFits) as caught:
        solve(problem(stages, (bucket(0, 0),), gpu=20))
    least = caught.value.least_bytes["gpu"] / MIB
    solved(problem(stages, (bucket(0, 0),), gpu=least))
    with pytest.raises(InfeasiblePlan):
        solve(problem(stages, (bucket(0, 0),), gpu=least - 0.01))


def test_dram_and_ssd_that_are_too_small_are_named() -> None:
    buckets = tuple(bucket(i, i) for i in range(4))
    with pytest.raises(NothingFits, match=r"SSD: .* at least") as caught:
        solve(problem(4, buckets, gpu=6, dram=40, ssd=10))
    assert "DRAM" in str(caught.value)


def test_what_overflows_dram_goes_to_the_gpu_where_there_is_no_ssd() -> None:
    buckets = tuple(bucket(i, i) for i in range(4))
    answer = solved(problem(4, buckets, gpu=40, dram=40, ssd=0))
    assert (G, G) in places(answer)
    assert answer.predicted.peak_bytes["dram"] <= 40 * MIB


def test_a_bucket_too_large_for_buffers_to_ssd_stays_off_it() -> None:
    # On SSD, its state would need two buffers of 120 and its weights an arena of 40: 320 with
    # gradients. In DRAM it takes 140, with gradients 180, and leaves room to stream the others.
    buckets = (bucket(0, 0, weight_mib=20), bucket(1, 1), bucket(2, 2))
    answer = solved(problem(3, buckets, gpu=50, dram=212))
    assert places(answer)[0][1] is D


def test_a_larger_gpu_makes_the_step_no_longer() -> None:
    question = deep(4)
    steps, replays = [], []
    for gpu in range(60, 400, 20):
        capacities = dataclasses.replace(question.capacities, gpu_bytes=gpu * MIB)
        answer = solved(dataclasses.replace(question, capacities=capacities))
        steps.append(estimated(question, answer).step_s)
        replays.append(answer.predicted.step_s)
    assert steps[0] > 2 * steps[-1] and replays[0] > 2 * replays[-1]
    assert all(later <= sooner * 1.01 for sooner, later in itertools.pairwise(steps))


# ---- a bound on SSD writes ----


def writes_a_day(answer: Solution) -> float:
    return answer.predicted.ssd_bytes_written_per_step / answer.predicted.step_s * 86400


def test_a_bound_on_ssd_writes_is_kept() -> None:
    question = problem(3, tuple(bucket(i, i) for i in range(3)), gpu=6, dram=45)
    free = solved(question)
    assert free.predicted.ssd_bytes_written_per_step == 3 * 12 * MIB
    bound = int(writes_a_day(free) / 2)
    bounded = solved(dataclasses.replace(question, max_ssd_bytes_per_day=bound))
    assert writes_a_day(bounded) <= bound


def test_a_bound_that_no_plan_keeps_is_named_with_what_would_be_written() -> None:
    buckets = tuple(bucket(i, i) for i in range(3))
    question = problem(3, buckets, gpu=6, dram=43, max_ssd_bytes_per_day=10 * MIB)
    with pytest.raises(NothingFits, match=r"at most 10\.49 MB to SSD a day.* 37\.75 MB a step"):
        solve(question)


def test_the_checker_knows_the_bound_on_ssd_writes() -> None:
    question = problem(3, tuple(bucket(i, i) for i in range(3)), gpu=6, dram=43)
    answer = solved(question)
    bounded = dataclasses.replace(question, max_ssd_bytes_per_day=int(writes_a_day(answer) / 2))
    assert any("the bound is" in line for line in validate(bounded, answer))


# ---- forced ----


def test_a_forced_place_is_kept_and_the_rest_is_planned_around_it() -> None:
    buckets = tuple(bucket(i, i) for i in range(3))
    forced = Forced(buckets={1: BucketPlace(S, S)})
    answer = solved(problem(3, buckets), forced)
    assert places(answer) == [(G, G), (S, S), (G, G)]
    assert answer.bucket_reasons[1] == "forced"


@pytest.mark.parametrize(
    ("forced", "words"),
    [
        (Forced(buckets={0: BucketPlace(D, G)}), "'bucket0' cannot have weights dram, state gpu"),
        (Forced(activations={0: S}), "'act0' cannot be placed ssd"),
        (Forced(buckets={7: BucketPlace(G, G)}), "bucket 7; there are 1"),
    ],
    ids=["state without weight", "no swap", "unknown"],
)
def test_a_forced_place_that_cannot_be_is_refused_by_name(forced: Forced, words: str) -> None:
    question = problem(1, (bucket(0, 0),), (activation(0, 0, can_swap=False),))
    with pytest.raises(InfeasiblePlan, match=words):
        solve(question, forced=forced)


def test_a_forced_place_that_does_not_fit_is_named() -> None:
    forced = Forced(buckets={0: BucketPlace(G, G)})
    with pytest.raises(InfeasiblePlan, match="Forced placements: bucket0"):
        solve(problem(2, (bucket(0, 0, weight_mib=20), bucket(1, 1)), gpu=30), forced=forced)


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(LohanError, match="greedy"):
        solve(problem(1), policy="magic")


# ---- any problem ----


@settings(max_examples=150, deadline=None)
@given(problems())
def test_any_answer_is_sound(question: Problem) -> None:
    try:
        answer = solve(question)
    except InfeasiblePlan:
        return
    assert validate(question, answer) == []
    assert len(answer.bucket_reasons) == len(question.buckets)
    assert all(answer.bucket_reasons) and all(answer.activation_reasons)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_any_problem_with_a_large_gpu_is_kept_there_whole(question: Problem) -> None:
    large = dataclasses.replace(
        question, capacities=dataclasses.replace(question.capacities, gpu_bytes=10**12)
    )
    answer = solve(large)
    assert all(p == BucketPlace(G, G) for p in answer.buckets)
    assert all(p is G for p in answer.activations)


@settings(max_examples=60, deadline=None)
@given(problems(), st.data())
def test_moving_items_one_by_one_ends_at_the_sums_of_the_placement(
    question: Problem, data: st.DataObject
) -> None:
    start = [BucketPlace(S, S)] * len(question.buckets)
    redone = [R] * len(question.activations)
    ledger = Ledger(question, start, redone)
    for index, item in enumerate(question.buckets):
        both = [BucketPlace(p, p) for p in (G, D, S)]
        ledger.move_bucket(item.index, data.draw(st.sampled_from(both), label=f"bucket {index}"))
    fresh = Ledger(question, ledger.buckets, redone)
    windows = Windows(fetch_window_bytes=MIB, grad_window_bytes=MIB, grad_buffers=3)
    assert ledger.peaks(windows) == fresh.peaks(windows)
    assert ledger.traffic == pytest.approx(fresh.traffic)


def test_where_an_activation_moves_inside_its_stage_is_no_part_of_the_graph() -> None:
    plain = problem(1, (), (activation(0, 0),))
    early = dataclasses.replace(plain.activations[0], leaves_at=0.5, returns_at=0.25)
    question = dataclasses.replace(plain, activations=(early,))
    assert Problem.from_json(question.to_json()) == question
    assert question.fingerprint() == plain.fingerprint()
    # What was written without says that it moves at the ends of its stages.
    raw = json.loads(plain.to_json())
    del raw["activations"][0]["leaves_at"], raw["activations"][0]["returns_at"]
    assert Problem.from_json(json.dumps(raw)) == plain
    late = dataclasses.replace(early, returns_at=1.5)
    with pytest.raises(LohanError, match=r"'act0' moves at 1\.5, which is no share of a stage"):
        dataclasses.replace(plain, activations=(late,))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_problems_and_solutions_survive_json(question: Problem) -> None:
    again = Problem.from_json(question.to_json())
    assert again == question
    assert again.fingerprint() == question.fingerprint()
    try:
        answer = solve(question)
    except InfeasiblePlan:
        return
    assert Solution.from_json(answer.to_json()) == answer
    proved = dataclasses.replace(answer, optimality=Optimality(1.5, 0.25, "feasible"))
    assert Solution.from_json(proved.to_json()) == proved


# ---- the checker ----


def _other_windows(**changes: Any) -> Callable[[Solution], Solution]:
    return lambda s: dataclasses.replace(s, windows=dataclasses.replace(s.windows, **changes))


def _other_prediction(**changes: Any) -> Callable[[Solution], Solution]:
    return lambda s: dataclasses.replace(s, predicted=dataclasses.replace(s.predicted, **changes))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: dataclasses.replace(s, buckets=s.buckets[:-1]), "places for 3 buckets"),
        (
            lambda s: dataclasses.replace(s, buckets=(BucketPlace(D, G), *s.buckets[1:])),
            "state on the GPU without its weights",
        ),
        (
            lambda s: dataclasses.replace(s, buckets=(BucketPlace(G, G),) * 3),
            "on a GPU of",
        ),
        (lambda s: dataclasses.replace(s, activations=(S,)), "is swapped and cannot be"),
        (_other_windows(grad_window_bytes=0), "does not fit the grad window"),
        (_other_windows(grad_buffers=1), "grad buffers"),
        (_other_windows(fetch_window_bytes=40 * MIB), "on a GPU of"),
        (_other_windows(inbound_bytes=MIB), "the dram peak is"),
        (_other_prediction(step_s=0.1), "is shorter than lane"),
        (_other_prediction(peak_bytes={"gpu": 1, "dram": 1, "ssd": 0}), "predicted 1"),
        (_other_prediction(ssd_bytes_written_per_step=5), "written to SSD"),
    ],
)
def test_the_checker_finds_what_was_spoiled(
    spoil: Callable[[Solution], Solution], words: str
) -> None:
    acts = (activation(0, 0, can_swap=False, mib=1),)
    question = problem(3, tuple(bucket(i, i) for i in range(3)), acts, gpu=7, ssd=0)
    found = validate(question, spoil(solved(question)))
    assert any(words in line for line in found), found


def test_the_checker_finds_a_plan_on_a_tier_that_is_not_there() -> None:
    question = problem(1, (bucket(0, 0),), gpu=20, ssd=0)
    buckets = (BucketPlace(S, S),)
    windows = Windows(4 * MIB, 0, 0, 2 * MIB, 2, 2, 4 * MIB, 0)
    answer = Solution("hand", buckets, (), windows, predict(question, buckets, (), windows))
    assert any("in a ssd of 0" in line for line in validate(question, answer))


# ---- problems that make no sense ----


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: problem(0), "no stages"),
        (lambda: problem(1, (bucket(0, 3),)), "outside stages"),
        (lambda: problem(1, (bucket(1, 0),)), "index 1 at place 0"),
        (
            lambda: problem(1, (), (activation(0, 0, needs=(1,)), activation(1, 0, needs=(0,)))),
            "circle",
        ),
        (lambda: problem(1, (), (activation(0, 0, needs=(4,)),)), "needs 4"),
        (lambda: Problem.from_json('{"schema": 99}'), "schema 99"),
        (lambda: Problem.from_json("[]"), "not a problem"),
        (lambda: Solution.from_json('{"schema": 0}'), "schema 0"),
        (lambda: Solution.from_json('{"schema": 1, "evil": 1}'), "not a solution"),
    ],
)
def test_a_problem_that_makes_no_sense_says_so(build: Callable[[], object], words: str) -> None:
    with pytest.raises(LohanError, match=words):
        build()


def test_a_copied_ledger_moves_on_its_own() -> None:
    question = problem(2, (bucket(0, 0), bucket(1, 1)), (activation(0, 0),))
    ledger = Ledger(question, [BucketPlace(S, S)] * 2, [S])
    before = ledger.dram_by_class(Windows()), ledger.ssd_by_class(), ledger.windows(Room.STAGE)
    other = ledger.copy()
    other.move_bucket(0, BucketPlace(D, D))
    other.move_bucket(1, BucketPlace(D, D))
    other.move_activation(0, D)
    assert other.ssd_bytes == 0
    assert before == (
        ledger.dram_by_class(Windows()),
        ledger.ssd_by_class(),
        ledger.windows(Room.STAGE),
    )


# ---- size and dependencies ----


def test_a_deep_model_is_planned() -> None:
    question = deep(128)
    answer = solve(question, "greedy")
    assert validate(question, answer) == []
    assert len(set(places(answer))) > 1


def test_planning_imports_no_torch() -> None:
    code = "import sys, lohan_fx.planner, lohan_fx.plan, lohan_fx.hardware; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
