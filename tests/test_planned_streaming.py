"""States in DRAM that are copied to the GPU and back for their updates, as planned."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
from problems import MIB, bucket, lanes, problem

from lohan_fx.errors import InfeasiblePlan, LohanError
from lohan_fx.pins import forced_placements
from lohan_fx.plan import Plan, TensorRow, build_plan
from lohan_fx.planner import (
    SOLVERS,
    BucketPlace,
    Forced,
    Lanes,
    Ledger,
    Overlap,
    Place,
    Problem,
    Room,
    Simulation,
    Solution,
    Windows,
    estimate,
    gpu_occupants,
    optimal,
    predict,
    simulate,
    solve,
    speculates,
    streamed_places,
    validate,
)
from lohan_fx.planner.lots import stock
from lohan_fx.planner.traffic import STREAM_BYTES

G, D, S = Place.GPU, Place.DRAM, Place.SSD
ON_GPU, IN_DRAM = BucketPlace(G, D, streamed=True), BucketPlace(D, D, streamed=True)
# Weights of 2 MiB in 16 bit have 1 Mi elements, so a state of 12 MiB and an update of 28 MiB.
WEIGHT, STATE, UPDATE, RING = 2 * MIB, 12 * MIB, 28 * MIB, 36 * MIB
WIDE = Windows(
    fetch_window_bytes=100 * MIB,
    grad_window_bytes=100 * MIB,
    grad_buffers=10,
    stream_bytes=RING,
)


def rates(**changes: float) -> Lanes:
    """A state takes a second to the GPU, and one back."""
    return lanes(**{"h2d_bytes_per_s": 12 * MIB, "d2h_bytes_per_s": 12 * MIB, **changes})


def layers(count: int, **rest: Any) -> Problem:
    """Layers of one bucket each, of 1 s and 2 s."""
    buckets = tuple(bucket(i, i) for i in range(count))
    return problem(count, buckets, **{"rates": rates(), **rest})


def spans(found: Simulation, what: str, lane: str = "") -> list[tuple[int, float, float]]:
    """(item, start, end) of one sort of work, in order of time."""
    return [
        (s.index, pytest.approx(s.start_s, abs=1e-6), pytest.approx(s.end_s, abs=1e-6))
        for s in sorted(found.spans, key=lambda s: s.start_s)
        if s.what == what and lane in s.lane
    ]


def answered(question: Problem, *places: BucketPlace, **windows: int) -> Solution:
    """A plan made by hand, with windows of one item."""
    opened = dataclasses.replace(Ledger(question, places, []).windows(Room.ITEM), **windows)
    return Solution("hand", places, (), opened, predict(question, places, [], opened))


# ---- one step, by hand ----


def test_a_state_comes_before_its_gradient_and_goes_after_it() -> None:
    found = simulate(layers(3), [ON_GPU] * 3, [], WIDE)
    # Gradients are made at 5, 7 and 9 s. The last copy out runs under the next forward.
    assert found.step_s == pytest.approx(9.0)
    assert spans(found, "state out", "d2h") == [(0, 0.0, 1.0), (2, 5.0, 6.0), (1, 7.0, 8.0)]
    assert len(spans(found, "state in", "h2d")) == 3
    assert not spans(found, "gradient") and not spans(found, "upload")
    assert not spans(found, "adam", "cpu")


def test_the_ring_limits_how_far_ahead_states_come() -> None:
    found = simulate(layers(6), [ON_GPU] * 6, [], WIDE)
    # Three wait for gradients from the start; the fourth for the first of these to have left again.
    first = next(s for s in spans(found, "state out") if s[0] == 5)
    fourth = next(s for s in spans(found, "state in") if s[0] == 2)
    assert fourth[1] == first[2].expected  # type: ignore[attr-defined]


def test_new_weights_in_dram_are_fetched_after_they_came_from_the_gpu() -> None:
    question = layers(3)
    found = simulate(question, [IN_DRAM] * 3, [], WIDE)
    # The forward starts with the copy out of the last state and its weights, and their fetch; the backward
    # with a fetch.
    assert found.step_s == pytest.approx(9 + 14 / 12 + 2 * 2 / 12)
    assert spans(found, "fetch")[0] == (0, pytest.approx(14 / 12), pytest.approx(16 / 12))
    assert found.stalls[0].cause == "d2h"
    resident = simulate(question, [ON_GPU] * 3, [], WIDE)
    assert resident.step_s == pytest.approx(9.0)


def test_kernels_take_the_gpu_from_the_compute_for_their_time() -> None:
    question = layers(3, rates=rates(gpu_bytes_per_s=2 * UPDATE))
    found = simulate(question, [ON_GPU] * 3, [], WIDE)
    assert found.step_s == pytest.approx(9 + 3 * 0.5)
    assert [end - start for start, end in _times(found, "adam")] == [pytest.approx(0.5)] * 3
    assert found.stall_s == {}


def _times(found: Simulation, what: str) -> list[tuple[float, float]]:
    return [(s.start_s, s.end_s) for s in found.spans if s.what == what]


def test_a_state_in_pieces_goes_out_while_the_rest_comes_in() -> None:
    quarter = dataclasses.replace(WIDE, stream_bytes=RING // 4)
    question = layers(1)
    found = simulate(question, [ON_GPU], [], quarter)
    # The first quarter is there when the gradient is; the forward waits for the other three.
    assert found.step_s == pytest.approx(3 + 0.75)
    assert found.forward_s == pytest.approx(1 + 0.75)
    assert _times(found, "state out") == [
        (pytest.approx(0.0, abs=1e-6), pytest.approx(0.75)),
        (pytest.approx(0.75), pytest.approx(1.0)),
    ]


def test_other_copies_pause_those_of_states() -> None:
    question = problem(
        2, (bucket(0, 0), bucket(1, 1, trainable=False)), rates=rates(h2d_bytes_per_s=2 * MIB)
    )
    # The state, of 6 s, comes whenever the frozen weights, of 1 s twice a step, do not.
    found = simulate(question, [ON_GPU, BucketPlace(D, D)], [], WIDE)
    alone = simulate(question, [ON_GPU, BucketPlace(G, G)], [], WIDE)
    assert sum(end - start for start, end in _times(found, "state in")) == pytest.approx(6.0)
    assert len(_times(found, "state in")) > 1
    assert found.step_s == pytest.approx(alone.step_s + 2.0)


def test_after_step_updates_come_in_the_order_of_the_forward() -> None:
    question = layers(3, overlap=Overlap.NEXT_FORWARD)
    found = simulate(question, [ON_GPU] * 3, [], WIDE)
    # The first state comes as soon as the last gradient is known, the others under the forward.
    assert found.step_s == pytest.approx(10.0)
    assert [row[:2] for row in spans(found, "state in")] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert found.stall_s == {"h2d": pytest.approx(1.0)}


def test_in_serial_mode_step_lasts_until_states_are_back() -> None:
    found = simulate(layers(3, overlap=Overlap.SERIAL), [ON_GPU] * 3, [], WIDE)
    assert found.update_s == pytest.approx(4.0)


@pytest.mark.parametrize("place", [ON_GPU, IN_DRAM])
def test_nothing_streamed_speculates(place: BucketPlace) -> None:
    question = layers(3, overlap=Overlap.SPECULATIVE)
    assert not any(speculates(question, b, place) for b in question.buckets)
    found = simulate(question, [place] * 3, [], WIDE)
    waiting = dataclasses.replace(question, overlap=Overlap.NEXT_FORWARD)
    assert found == simulate(waiting, [place] * 3, [], WIDE)


# ---- bytes ----


@pytest.mark.parametrize(("place", "back"), [(ON_GPU, STATE), (IN_DRAM, STATE + WEIGHT)])
def test_a_state_crosses_the_link_twice_and_nothing_is_left_to_the_cpu(
    place: BucketPlace, back: int
) -> None:
    question = layers(1, rates=rates(gpu_bytes_per_s=UPDATE, dram_bytes_per_s=MIB))
    fetched = 2 * WEIGHT if place.weight is D else 0
    busy = estimate(question, [place], [], WIDE).lane_busy_s
    assert busy["h2d"] * 12 * MIB == pytest.approx(STATE + fetched)
    assert busy["d2h"] * 12 * MIB == pytest.approx(back)
    assert busy["cpu_adam"] == 0
    assert busy["gpu"] == pytest.approx(3 + 1)
    assert busy["dram"] * MIB == pytest.approx(STATE + back + fetched)


@pytest.mark.parametrize("overlap", [Overlap.BACKWARD, Overlap.NEXT_FORWARD])
def test_gradients_stay_on_the_gpu_until_the_weights_are_read_again(overlap: Overlap) -> None:
    question = layers(3, overlap=overlap)
    answer = answered(question, *[ON_GPU] * 3)
    assert validate(question, answer) == []
    ledger = Ledger(question, answer.buckets, [])
    held = ledger.gpu_bytes(answer.windows) - 3 * WEIGHT - RING
    # Forward 0, 1, 2, backward 2, 1, 0, and the optimizer's turn.
    assert (held // WEIGHT).tolist() == [3, 2, 1, 1, 2, 3, 3]
    assert simulate(question, answer.buckets, [], answer.windows).memory["gpu"].peak_bytes == (
        6 * WEIGHT + RING
    )
    assert answer.predicted.peak_bytes["dram"] == 3 * STATE
    parts = gpu_occupants(ledger, answer.windows, 0)
    assert sum(part.bytes for part in parts) == 6 * WEIGHT + RING


def test_the_checker_counts_the_ring_and_the_gradients() -> None:
    question = layers(3)
    answer = answered(question, *[ON_GPU] * 3)
    peaks = answer.predicted.peak_bytes
    less = dataclasses.replace(
        answer.predicted, peak_bytes={**peaks, "gpu": peaks["gpu"] - 1, "dram": peaks["dram"] - 1}
    )
    faults = validate(question, dataclasses.replace(answer, predicted=less))
    assert [fault.split(" peak")[0] for fault in faults] == ["the GPU", "the dram"]


@pytest.mark.parametrize("place", [ON_GPU, IN_DRAM])
def test_the_program_counts_what_the_ledger_does(place: BucketPlace) -> None:
    question = layers(1)
    (lot,) = stock(question, Forced({0: place}), relaxed=False, streams=True).lots
    ledger = Ledger(question, [place], [])
    windows = ledger.windows(Room.ITEM)
    assert lot.places == (place,)
    assert lot.dram == (ledger.dram_bytes(windows),)
    assert STREAM_BYTES * lot.buffered["stream"][0] == windows.stream_bytes == RING


def test_pieces_are_no_larger_than_four_mi_elements() -> None:
    question = layers(1, gpu=10**6)
    large = dataclasses.replace(question, buckets=(bucket(0, 0, weight_mib=64),))
    assert Ledger(question, [ON_GPU], []).windows(Room.ITEM).stream_bytes == RING
    assert Ledger(large, [ON_GPU], []).windows(Room.ITEM).stream_bytes == 4 * RING
    assert Ledger(large, [BucketPlace(G, D)], []).windows(Room.ITEM).stream_bytes == 0


# ---- what may be streamed ----


def _refused(question: Problem, place: BucketPlace, words: str) -> None:
    assert place not in streamed_places(question, question.buckets[0])
    answer = answered(question, BucketPlace(D, D))
    faults = validate(question, dataclasses.replace(answer, buckets=(place,)))
    assert any(words in fault for fault in faults), faults
    with pytest.raises(InfeasiblePlan, match="cannot have"):
        solve(question, "greedy", Forced({0: place}))


@pytest.mark.parametrize(
    "change",
    [
        {"buckets": (bucket(0, 0, master=False),)},
        {"buckets": (bucket(0, 0, trainable=False),)},
        {"accumulates": True},
        {"overlap": Overlap.NAIVE},
    ],
)
def test_not_every_state_can_be_streamed(change: dict[str, Any]) -> None:
    _refused(dataclasses.replace(layers(1), **change), IN_DRAM, "cannot be updated on the GPU")


@pytest.mark.parametrize("tiers", [(S, D), (D, S), (G, G)])
def test_only_what_is_in_dram_is_streamed(tiers: tuple[Place, Place]) -> None:
    _refused(layers(1), BucketPlace(*tiers, streamed=True), "cannot be updated on the GPU")


def test_a_ring_that_is_too_small_is_found() -> None:
    question = layers(1)
    answer = answered(question, ON_GPU, stream_bytes=RING - 1)
    assert any("on their way through the GPU" in fault for fault in validate(question, answer))
    with pytest.raises(LohanError, match="no room for states"):
        predict(question, [ON_GPU], [], dataclasses.replace(WIDE, stream_bytes=0))


@pytest.mark.parametrize("place", [ON_GPU, IN_DRAM])
def test_a_forced_place_is_kept(place: BucketPlace) -> None:
    question = layers(3, gpu=60)
    for policy in ("greedy", "optimal"):
        answer = solve(question, policy, Forced({1: place}))
        assert answer.buckets[1] == place
        assert validate(question, answer) == []


# ---- the choice ----


def slow_adam(**rest: Any) -> Problem:
    """Layers that do not fit the GPU, on a CPU that takes an update longer than a layer."""
    given = {"gpu": 80, "ssd": 0, "rates": rates(cpu_adam_params_per_s=MIB / 8), **rest}
    return layers(8, **given)


@pytest.mark.parametrize("overlap", [Overlap.BACKWARD, Overlap.NEXT_FORWARD])
def test_where_the_cpu_is_slow_some_states_pass_through_the_gpu(
    overlap: Overlap, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = slow_adam(overlap=overlap)
    answer = optimal(question)
    assert validate(question, answer) == []
    assert any(place.streamed for place in answer.buckets)
    module = sys.modules["lohan_fx.planner.optimal"]  # the package has a function of that name
    monkeypatch.setattr(module, "_waits_for_cpu", lambda _: False)
    assert answer.predicted.step_s < 0.9 * optimal(question).predicted.step_s


def test_a_plan_says_what_passes_through_the_gpu() -> None:
    question = slow_adam()
    answer = optimal(question)
    streamed = [i for i, place in enumerate(answer.buckets) if place.streamed]
    for index, reason in enumerate(answer.bucket_reasons):
        assert reason.startswith("updated on the GPU, its state copied") == (index in streamed)
        assert "there is no other place" not in reason
    rows = [
        TensorRow(f"w{b.index}", cls, b.index, (b.numel,), "float32", 4 * b.numel, bucket=b.index)
        for b in question.buckets
        for cls in ("master32", "gradient")
    ]
    plan = build_plan(
        question, answer, model="m", hardware="h", budget="", policy="optimal", tensors=rows
    )
    assert any(
        "of states in DRAM are copied to the GPU and back" in words for words in plan.reasons
    )
    placed = {(row.bucket, row.cls): row.placement for row in plan.tensors}
    for index in streamed:
        assert placed[index, "master32"] == "dram"
        assert placed[index, "gradient"] == "gpu"
    assert Plan.from_json(plan.to_json()) == plan


def test_a_state_that_is_pinned_to_dram_may_pass_through_the_gpu() -> None:
    question = slow_adam()
    rows = [TensorRow("w", "weight16", 0, (1,), "bfloat16", 2, bucket=0)]
    choices = forced_placements({"state:w": "dram"}, rows, question)
    assert [each.buckets[0] for each in choices] == [
        BucketPlace(G, D),
        BucketPlace(D, D),
        BucketPlace(S, D),
        ON_GPU,
        IN_DRAM,
    ]
    summing = dataclasses.replace(question, accumulates=True)
    assert len(forced_placements({"state:w": "dram"}, rows, summing)) == 3


def test_where_the_link_is_slow_the_cpu_makes_the_updates() -> None:
    answer = optimal(slow_adam(rates=rates(cpu_adam_params_per_s=MIB)))
    assert not any(place.streamed for place in answer.buckets)
    slow_link = lanes(h2d_bytes_per_s=MIB, d2h_bytes_per_s=MIB, cpu_adam_params_per_s=MIB / 8)
    assert not any(place.streamed for place in optimal(slow_adam(rates=slow_link)).buckets)


def test_what_other_systems_do_has_no_such_states() -> None:
    question = dataclasses.replace(
        slow_adam(), capacities=dataclasses.replace(slow_adam().capacities, ssd_bytes=10**12)
    )
    for policy in SOLVERS.keys() - {"optimal"}:
        try:
            answer = solve(question, policy)
        except InfeasiblePlan:
            continue
        assert not any(place.streamed for place in answer.buckets), policy
