"""The replay of a step: cases solved by hand, one rule each, and what holds for any problem."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from problems import MIB, activation, bucket, deep, lanes, problem, problems, stage

from lohan_fx.errors import LohanError
from lohan_fx.planner import (
    BucketPlace,
    Capacities,
    Ledger,
    Overlap,
    Place,
    Problem,
    Room,
    Simulation,
    Windows,
    activation_places,
    bucket_places,
    estimate,
    predict,
    simulate,
    solve,
    streamed_places,
    validate,
)
from lohan_fx.planner.ledger import tight_positions

G, D, S, R = Place.GPU, Place.DRAM, Place.SSD, Place.RECOMPUTE
DRAM, SSD, ON_GPU = BucketPlace(D, D), BucketPlace(S, S), BucketPlace(G, G)


def frozen(count: int) -> tuple:  # type: ignore[type-arg]
    return tuple(bucket(i, i, trainable=False) for i in range(count))


def spans(found: Simulation, lane: str, what: str = "") -> list[tuple[int, float, float]]:
    """(item, start, end) of a lane's work, in order of time."""
    return [
        (s.index, pytest.approx(s.start_s), pytest.approx(s.end_s))
        for s in found.spans
        if s.lane == lane and s.what.startswith(what)
    ]


def wide(**changes: int) -> Windows:
    """Windows in which nothing has to wait, in MiB and counts."""
    given = {
        "fetch_window_bytes": 100,
        "offload_window_bytes": 100,
        "reload_window_bytes": 100,
        "grad_window_bytes": 100,
        "inbound_bytes": 100,
        "outbound_bytes": 100,
        "grad_buffers": 10,
        "state_buffers": 10,
    } | changes
    return Windows(**{k: v * MIB if k.endswith("bytes") else v for k, v in given.items()})


# ---- by hand: weights. A weight of 2 MiB takes 2 s at 1 MiB/s; stages take 1 s and 2 s. ----


def test_with_everything_on_the_gpu_a_step_is_its_compute() -> None:
    question = problem(2, (bucket(0, 0), bucket(1, 1)), (activation(0, 0),))
    found = simulate(question, [ON_GPU] * 2, [G], Windows())
    assert (found.forward_s, found.backward_s, found.update_s) == pytest.approx((2.0, 4.0, 0.0))
    assert found.bottleneck == "gpu" and not found.stalls
    assert {span.lane for span in found.spans} == {"gpu"}


def test_the_first_fetch_is_exposed_and_the_others_are_under_compute() -> None:
    stages = tuple(stage(i, 3.0) for i in range(3))
    found = simulate(problem(stages, frozen(3)), [DRAM] * 3, [], wide())
    # In at 2, 4 and 6; needed at 2, 5 and 8. The backward begins as the forward ends.
    assert spans(found, "h2d")[:3] == [(0, 0, 2), (1, 2, 4), (2, 4, 6)]
    assert found.forward_s == pytest.approx(2 + 9)
    assert found.backward_s == pytest.approx(2 + 18)
    assert found.stall_s == {"h2d": pytest.approx(4.0)}
    assert [(s.name, s.start_s) for s in found.stalls] == [
        ("bucket0", 0.0),
        ("bucket2", pytest.approx(11.0)),
    ]


def test_without_a_window_every_fetch_is_exposed() -> None:
    found = simulate(
        problem(3, frozen(3)), [DRAM] * 3, [], dataclasses.replace(wide(), fetch_window_bytes=0)
    )
    assert found.forward_s == pytest.approx(3 * (2 + 1))
    assert found.backward_s == pytest.approx(3 * (2 + 2))


def test_weights_of_one_stage_are_awaited_where_they_are_used() -> None:
    # One stage of 4 s with two equal buckets: the second is needed after 2 s of it.
    buckets = (bucket(0, 0, trainable=False), bucket(1, 0, trainable=False))
    found = simulate(problem((stage(0, 4.0),), buckets), [DRAM] * 2, [], wide())
    assert found.forward_s == pytest.approx(2 + 4)


def test_reads_from_ssd_go_ahead_as_far_as_the_arena_has_room() -> None:
    stages = tuple(stage(i, 4.0) for i in range(3))
    question = problem(stages, frozen(3), rates=lanes(h2d_bytes_per_s=2 * MIB))
    two, one = (simulate(question, [SSD] * 3, [], wide(inbound_bytes=room)) for room in (4, 2))

    def forward_reads(found: Simulation) -> list[tuple[str, float]]:
        reads = [s for s in found.spans if s.lane == "ssd_read" and s.in_pass == "forward"]
        return [(s.name, pytest.approx(s.start_s)) for s in reads]

    # A read takes 2 s, a copy 1 s. Bucket 0 is copied from 0 s to 1 s; with room for one, bucket 1 is
    # read from then on and copied from 3 s to 4 s. The next read starts where a copy has made room.
    assert forward_reads(two)[0] == ("bucket2", 1.0)
    assert forward_reads(one)[:2] == [("bucket1", 1.0), ("bucket2", 4.0)]


def test_a_copy_that_the_host_had_to_wait_for_follows_the_compute_before_its_request_only() -> None:
    # Weights land after the host came to their wait, with the piece before queued by then. They were
    # asked for at the start of the pass, so the copy need not follow that piece.
    stages = tuple(stage(i, 4.0) for i in range(3))
    question = problem(stages, frozen(3), rates=lanes(h2d_bytes_per_s=2 * MIB))
    found = simulate(question, [SSD] * 3, [], wide(inbound_bytes=4))
    assert spans(found, "h2d")[:3] == [(0, 0, 1), (1, 1, 2), (2, 3, 4)]
    assert found.step_s == pytest.approx(36 + 2)  # the first copy of each pass is waited for


# ---- by hand: sharing ----


def test_two_ways_on_one_link_slow_each_other_by_the_duplex_factor() -> None:
    # Gradients of 2 MiB go out while the next weights of 2 MiB come in.
    stages = (stage(0, 0.0), stage(1, 0.0))
    buckets = tuple(bucket(i, i) for i in range(2))
    fast = {"cpu_adam_params_per_s": 1e18}
    alone = simulate(problem(stages, buckets, rates=lanes(**fast)), [DRAM] * 2, [], wide())
    half = simulate(
        problem(stages, buckets, rates=lanes(duplex_factor=0.5, **fast)), [DRAM] * 2, [], wide()
    )
    # Forward: in 0-2, 2-4. Backward: bucket 1 in 4-6; then bucket 0 in beside gradient 1 out.
    assert alone.step_s == pytest.approx(4 + 2 + 2 + 2)
    assert half.step_s == pytest.approx(4 + 2 + 4 + 2)


def test_a_simplex_ssd_gives_reads_and_writes_half_each() -> None:
    # The state of the one bucket is 12 MiB: read, updated, written, while nothing else is there.
    question = problem(1, (bucket(0, 0),), rates=lanes(cpu_adam_params_per_s=1e18))
    duplex = dataclasses.replace(
        question, lanes=dataclasses.replace(question.lanes, ssd_simplex=False)
    )
    two = problem(2, (bucket(0, 0), bucket(1, 1)), rates=question.lanes)
    place = BucketPlace(D, S)
    one_by_one = simulate(question, [place], [], wide())
    # Its next read cannot start before its write has ended, so the lanes are never shared.
    assert one_by_one.step_s == pytest.approx(simulate(duplex, [place], [], wide()).step_s)
    shared = simulate(two, [place] * 2, [], wide(state_buffers=3))
    free = dataclasses.replace(two, lanes=duplex.lanes)
    assert simulate(free, [place] * 2, [], wide(state_buffers=3)).step_s < shared.step_s
    assert shared.step_s >= 48.0


def test_dram_slows_all_that_use_it_and_is_named() -> None:
    question = problem(3, frozen(3), rates=lanes(dram_bytes_per_s=MIB / 2))
    found = simulate(question, [DRAM] * 3, [], wide())
    # Copies at half a MiB a second: 4 s each, 12 s for a pass.
    assert found.forward_s == pytest.approx(12 + 1)
    assert found.bottleneck == "dram" and set(found.stall_s) == {"dram"}


# ---- by hand: the optimizer ----


def updated(overlap: Overlap, *, adam_s: float, count: int = 4, buffers: int = 2) -> Simulation:
    """`count` buckets with states of 12 MiB on SSD (12 s either way), and next to no compute."""
    stages = tuple(stage(i, 1e-6) for i in range(count))
    rates = lanes(
        cpu_adam_params_per_s=MIB / adam_s,
        h2d_bytes_per_s=1e15,
        d2h_bytes_per_s=1e15,
        ssd_simplex=False,
    )
    question = problem(
        stages, tuple(bucket(i, i) for i in range(count)), rates=rates, overlap=overlap
    )
    return simulate(question, [BucketPlace(D, S)] * count, [], wide(state_buffers=buffers))


def test_naive_updates_take_reading_adam_and_writing_one_after_another() -> None:
    assert updated(Overlap.NAIVE, adam_s=5.0).step_s == pytest.approx(4 * (12 + 5 + 12), rel=1e-4)


@pytest.mark.parametrize("adam_s", [5.0, 20.0])
def test_two_state_buffers_give_a_period_of_reading_and_the_longer_of_adam_and_writing(
    adam_s: float,
) -> None:
    many, more = (updated(Overlap.SERIAL, adam_s=adam_s, count=count).step_s for count in (8, 16))
    # A buffer is held for read, Adam and write; two of them serve two buckets in that time, unless
    # Adam itself is busier.
    period = max((12 + adam_s + 12) / 2, adam_s, 12.0)
    assert (more - many) / 8 == pytest.approx(period, rel=1e-3)
    assert period <= 12 + max(adam_s, 12)


def test_serial_updates_begin_when_the_backward_has_ended() -> None:
    found = updated(Overlap.SERIAL, adam_s=5.0)
    assert found.update_s == pytest.approx(found.step_s, rel=1e-4)
    adam = [s for s in found.spans if s.lane == "cpu_adam"]
    assert min(s.start_s for s in adam) >= found.forward_s + found.backward_s


def test_updates_run_under_the_backward_and_delay_the_next_forward_only_where_it_waits() -> None:
    # Adam of a bucket takes 1 s, a backward stage 2 s: all but the last are hidden.
    fast = lanes(h2d_bytes_per_s=1e15, d2h_bytes_per_s=1e15)
    question = problem(3, tuple(bucket(i, i) for i in range(3)), rates=fast)
    found = simulate(question, [DRAM] * 3, [], wide())
    assert found.step_s == pytest.approx(9 + 1)
    assert found.stall_s["cpu_adam"] == pytest.approx(1.0)
    assert found.stalls[0].name == "bucket0"


def test_in_next_forward_mode_each_layer_waits_for_its_own_update() -> None:
    # Updates of 1 s in forward order; the forward of each layer is 1 s: only the first is exposed.
    fast = lanes(h2d_bytes_per_s=1e15, d2h_bytes_per_s=1e15)
    question = problem(
        3, tuple(bucket(i, i) for i in range(3)), rates=fast, overlap=Overlap.NEXT_FORWARD
    )
    found = simulate(question, [DRAM] * 3, [], wide())
    assert spans(found, "cpu_adam") == [(0, 0, 1), (1, 1, 2), (2, 2, 3)]
    assert (found.forward_s, found.backward_s) == pytest.approx((4.0, 6.0))
    slow = dataclasses.replace(
        question, lanes=dataclasses.replace(fast, cpu_adam_params_per_s=MIB / 3)
    )
    # Updates of 3 s: the forward follows them.
    assert simulate(slow, [DRAM] * 3, [], wide()).forward_s == pytest.approx(9 + 1)


def test_a_backward_waits_for_a_gradient_buffer() -> None:
    # Adam takes 10 s a bucket, so the ring fills; the third gradient waits for the first update.
    rates = lanes(h2d_bytes_per_s=1e15, d2h_bytes_per_s=1e15, cpu_adam_params_per_s=MIB / 10)
    question = problem(4, tuple(bucket(i, i) for i in range(4)), rates=rates)
    short, long = (simulate(question, [DRAM] * 4, [], wide(grad_buffers=n)) for n in (2, 10))
    # With buffers to spare the backward is its compute. Update 3 ends at 12 s; update 0 comes next, since
    # the forward begins with it, and the forward follows 1 and 2, from 22 to 42 s.
    assert long.backward_s == pytest.approx(8.0)
    assert long.step_s == pytest.approx(42 + 2)
    # Gradient 1 (the third) is made at 6 s, and waits for update 3, from 2 s to 12 s; gradient 0
    # for update 2, to 22 s, when update 1 begins; 0 is the last.
    assert short.backward_s == pytest.approx(2 + 10 + 10)
    assert short.step_s == pytest.approx(42 + 4)


def test_gradients_on_the_gpu_are_limited_by_their_window() -> None:
    stages = tuple(stage(i, 0.5) for i in range(3))
    buckets = tuple(bucket(i, i) for i in range(3))
    fast = lanes(h2d_bytes_per_s=1e15, cpu_adam_params_per_s=1e18)
    question = problem(stages, buckets, rates=fast)
    narrow = simulate(question, [DRAM] * 3, [], wide(grad_window_bytes=2))
    # A gradient is made every second and takes two to leave; the second waits for the first.
    assert max(narrow.memory["gpu"].bytes_by_class["gradients"]) == 2 * MIB
    assert narrow.backward_s == pytest.approx(1 + 2 + 2 + 2)
    free = simulate(question, [DRAM] * 3, [], wide())
    assert max(free.memory["gpu"].bytes_by_class["gradients"]) == 4 * MIB


def test_new_weights_of_the_gpu_are_uploaded_before_the_forward_reads_them() -> None:
    question = problem(1, (bucket(0, 0),))
    found = simulate(question, [BucketPlace(G, D)], [], wide())
    # Backward 2 s, gradient out 2 s, Adam 1 s, upload 2 s, forward 1 s.
    assert spans(found, "h2d", "upload") == [(0, 1, 3)]
    assert found.step_s == pytest.approx(2 + 2 + 1 + 2 + 1)


def test_states_on_the_gpu_are_updated_there() -> None:
    # Adam touches 2 MiB of gradient, 2 of weights and twice 12 of state, at 28 MiB a second.
    rates = lanes(gpu_bytes_per_s=28 * MIB)
    for overlap in Overlap:
        found = simulate(
            problem(1, (bucket(0, 0),), rates=rates, overlap=overlap), [ON_GPU], [], Windows()
        )
        assert found.step_s == pytest.approx(1 + 2 + 1), overlap
        assert found.update_s == pytest.approx(1.0 if overlap is Overlap.SERIAL else 0.0)


# ---- by hand: activations ----


def test_recomputation_precedes_the_backward_of_its_stage() -> None:
    acts = (activation(0, 0, recompute_s=0.5),)
    found = simulate(problem(1, (), acts), [], [R], Windows())
    assert [(s.what, s.start_s) for s in found.spans] == [
        ("forward", 0.0),
        ("recompute", pytest.approx(1.0)),
        ("backward", pytest.approx(1.5)),
    ]


def test_an_activation_leaves_under_the_next_stage_and_comes_back_under_the_one_before() -> None:
    acts = tuple(activation(i, i, mib=1) for i in range(3))
    found = simulate(problem(3, (), acts), [], [D] * 3, wide())
    assert spans(found, "d2h", "offload") == [(0, 1, 2), (1, 2, 3), (2, 3, 4)]
    # The last one's way out and the first one's way back are exposed.
    assert found.forward_s == pytest.approx(3 + 1)
    assert found.backward_s == pytest.approx(1 + 6)


def test_an_activation_on_ssd_is_read_after_it_was_written() -> None:
    acts = (activation(0, 0, mib=1),)
    found = simulate(problem(1, (), acts), [], [S], wide())
    # Forward 1, out 1, write 1, read 1, in 1, backward 2.
    assert found.step_s == pytest.approx(7.0)
    assert spans(found, "ssd_write") == [(0, 2, 3)]
    assert spans(found, "ssd_read") == [(0, 3, 4)]


def test_the_outbound_arena_holds_back_the_host() -> None:
    # Stages of 0.1 s make 1 MiB each, which takes 1 s to leave and 1 s to be written.
    stages = tuple(stage(i, 0.1) for i in range(6))
    acts = tuple(activation(i, i, mib=1) for i in range(6))
    question = problem(stages, (), acts, rates=lanes(ssd_simplex=False))
    narrow, ample = (simulate(question, [], [S] * 6, wide(outbound_bytes=n)) for n in (2, 100))
    assert narrow.step_s >= ample.step_s * (1 - 1e-9)
    assert ample.forward_s == pytest.approx(0.1 + 6)
    assert max(narrow.memory["gpu"].total) <= max(ample.memory["gpu"].total)


# ---- what cannot be ----


def test_windows_in_which_nothing_moves_are_refused_by_name() -> None:
    with pytest.raises(LohanError, match=r"'bucket0' needs .* of the inbound arena"):
        predict(problem(1, frozen(1)), [SSD], [], Windows())
    with pytest.raises(LohanError, match="no gradient buffer for 'bucket0'"):
        predict(problem(1, (bucket(0, 0),)), [DRAM], [], Windows())
    with pytest.raises(LohanError, match="'bucket0' is waited for; its windows are too small"):
        predict(problem(1, (bucket(0, 0),)), [BucketPlace(D, S)], [], wide(state_buffers=0))


def test_a_lane_that_is_not_there_takes_for_ever() -> None:
    question = problem(1, frozen(1), rates=lanes(h2d_bytes_per_s=0.0))
    assert math.isinf(predict(question, [DRAM], [], wide()).step_s)


# ---- any problem ----


@st.composite
def placed(draw: st.DrawFn) -> tuple[Problem, list[BucketPlace], list[Place]]:
    """Any small problem in any placement; every tier has room."""
    question = draw(problems())
    question = dataclasses.replace(
        question,
        capacities=Capacities(draw(st.sampled_from([8, 60])) * MIB, 10**12, 10**12),
        max_ssd_bytes_per_day=None,
        accumulates=question.overlap is not Overlap.SPECULATIVE and draw(st.booleans()),
    )
    buckets = [
        draw(st.sampled_from((*bucket_places(b), *streamed_places(question, b))))
        for b in question.buckets
    ]
    acts = [draw(st.sampled_from(activation_places(a))) for a in question.activations]
    return question, buckets, acts


def windows_of(case: Placed, room: Room, pieces: int) -> Windows:
    """Windows of a placement, with the largest streamed state in so many pieces."""
    windows = Ledger(*case).windows(room)
    return dataclasses.replace(windows, stream_bytes=windows.stream_bytes // pieces)


_ANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
Placed = tuple[Problem, Sequence[BucketPlace], Sequence[Place]]


@_ANY
@given(placed(), st.sampled_from(Room), st.sampled_from([1, 3]))
def test_a_step_is_no_shorter_than_its_busiest_lane(case: Placed, room: Room, pieces: int) -> None:
    question, buckets, acts = case
    windows = windows_of(case, room, pieces)
    predicted = predict(question, buckets, acts, windows)
    assert predicted.step_s >= predicted.bound_s * (1 - 1e-9)
    replayed = simulate(question, buckets, acts, windows)
    if all(b.forward_stages and b.backward_stages for b in question.buckets):
        assert predicted.step_s == replayed.step_s or replayed.step_s == pytest.approx(
            predicted.bound_s, rel=1e-6
        )
    parts = predicted.forward_s + predicted.backward_s + predicted.update_s
    assert parts == pytest.approx(predicted.step_s)


def test_windows_count_what_the_gpu_hands_out() -> None:
    # The last two fill the window that the first needs, but each takes the rest of 512 bytes more.
    sizes = ((1, 3 * MIB + 7), (0, 2 * MIB + 7), (0, MIB + 7))
    kept = [
        dataclasses.replace(activation(index, at), bytes=nbytes)
        for index, (at, nbytes) in enumerate(sizes)
    ]
    question, acts = problem(2, activations=tuple(kept)), [D] * 3
    windows = Ledger(question, [], acts).windows(Room.ITEM)
    peaks = estimate(question, [], acts, windows).peak_bytes
    assert simulate(question, [], acts, windows).memory["gpu"].peak_bytes <= peaks["gpu"]


@_ANY
@given(placed(), st.sampled_from(Room), st.sampled_from([1, 3]), st.sets(st.integers(0, 7)))
def test_memory_over_time_stays_below_the_peaks_of_the_cost_model(
    case: Placed, room: Room, pieces: int, closed: set[int]
) -> None:
    question, buckets, acts = case
    windows = windows_of(case, room, pieces)
    inside = tuple(sorted(at for at in closed if at < 2 * question.num_stages))
    windows = dataclasses.replace(windows, closed=inside)
    peaks = estimate(question, buckets, acts, windows).peak_bytes
    memory = simulate(question, buckets, acts, windows).memory
    assert memory["gpu"].peak_bytes <= peaks["gpu"]
    assert memory["dram"].peak_bytes == peaks["dram"]
    assert memory["ssd"].peak_bytes == peaks["ssd"]
    for tier in memory.values():
        assert min(min(row, default=0) for row in tier.bytes_by_class.values()) >= 0


@_ANY
@given(placed(), st.sampled_from(Room), st.sampled_from([1, 3]))
def test_every_lane_does_a_steps_work_and_the_gpu_works_or_stalls(
    case: Placed, room: Room, pieces: int
) -> None:
    question, buckets, acts = case
    # Rates that nothing shares, so that a lane's busy time is its work.
    alone = dataclasses.replace(
        question.lanes, duplex_factor=1.0, ssd_simplex=False, dram_bytes_per_s=1e18
    )
    question = dataclasses.replace(question, lanes=alone)
    windows = windows_of((question, buckets, acts), room, pieces)
    found = simulate(question, buckets, acts, windows)
    assume(found.steady)
    wanted = estimate(question, buckets, acts, windows).lane_busy_s
    for lane in ("gpu", "h2d", "d2h", "ssd_read", "ssd_write", "cpu_adam"):
        busy = sum(s.end_s - s.start_s for s in found.spans if s.lane == lane)
        assert busy == pytest.approx(wanted[lane], rel=1e-5, abs=1e-9), lane
    stalled = sum(s.end_s - s.start_s for s in found.stalls)
    assert wanted["gpu"] + stalled == pytest.approx(found.step_s, rel=1e-5, abs=1e-9)
    assert sum(found.stall_s.values()) == pytest.approx(stalled, abs=1e-9)


def test_wider_windows_make_a_deep_model_no_slower() -> None:
    question = deep(6)
    answer = solve(question)
    ledger = Ledger(question, answer.buckets, answer.activations)
    steps = [
        simulate(question, answer.buckets, answer.activations, ledger.windows(room)).step_s
        for room in sorted(Room)
    ]
    assert steps[0] > steps[1] >= steps[2]


def with_a_large_head(layers: int, **sizes: float) -> Problem:
    """Layers that stream weights and swap activations, then a head that needs far more memory."""
    question = problem(
        layers + 1,
        tuple(bucket(i, i) for i in range(layers + 1)),
        tuple(activation(i, i, can_recompute=False) for i in range(layers)),
        rates=lanes(h2d_bytes_per_s=4 * MIB, d2h_bytes_per_s=4 * MIB, cpu_adam_params_per_s=1e12),
        **sizes,
    )
    head = dataclasses.replace(question.stages[-1], backward_workspace_bytes=10 * MIB)
    return dataclasses.replace(question, stages=(*question.stages[:-1], head))


def test_windows_close_beside_a_stage_that_fills_the_gpu_so_that_others_do_not_stall() -> None:
    question = with_a_large_head(12, gpu=15, ssd=0)
    assert tight_positions(question) == (13,)
    best = solve(question)
    assert best.windows.closed == (13,)
    assert validate(question, best) == []
    # The placement is the same without it, and nothing can move under compute.
    ledger = Ledger(question, best.buckets, best.activations)
    fit = [
        room
        for room in Room
        if max(ledger.gpu_bytes(ledger.windows(room))) <= question.capacities.gpu_bytes
    ]
    assert fit == [Room.NONE, Room.AROUND]
    still = predict(question, best.buckets, best.activations, ledger.windows(Room.NONE))
    stalled = sum(still.stall_s.values())
    assert stalled > 0.2 * still.step_s
    assert sum(best.predicted.stall_s.values()) < 0.25 * stalled


def test_no_stage_is_tight_where_all_are_alike_or_too_many_are() -> None:
    assert tight_positions(deep(6)) == ()
    assert tight_positions(with_a_large_head(2, gpu=15, ssd=0)) == ()  # 2 of 9 seconds


def test_a_deep_model_is_replayed_with_a_peak_close_to_the_cost_models() -> None:
    question = deep(32)
    answer = solve(question)
    found = simulate(question, answer.buckets, answer.activations, answer.windows)
    assert found.steady
    assert found.memory["gpu"].peak_bytes > 0.9 * answer.predicted.peak_bytes["gpu"]
    assert estimate(
        question, answer.buckets, answer.activations, answer.windows
    ).step_s == pytest.approx(found.step_s, rel=0.3)


@pytest.mark.parametrize("place", [DRAM, ON_GPU], ids=["cpu", "gpu"])
def test_an_update_from_sums_goes_over_them_three_times(place: BucketPlace) -> None:
    """2 MiB of 16-bit weights: gradient 2, state read and written 24, weight 2, sums 3 x 4 MiB."""
    rates = lanes(gpu_bytes_per_s=MIB, dram_bytes_per_s=MIB)
    for accumulates, expected_s in ((False, 28.0), (True, 40.0)):
        question = dataclasses.replace(
            problem(1, (bucket(0, 0),), rates=rates, overlap=Overlap.SERIAL),
            accumulates=accumulates,
        )
        windows = Ledger(question, [place], []).windows(Room.STAGE)
        for predicted in (
            estimate(question, [place], [], windows),
            predict(question, [place], [], windows),
        ):
            assert predicted.update_s == pytest.approx(expected_s)
