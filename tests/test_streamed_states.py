"""States that rest in DRAM and pass through the GPU for their update: in the runtime, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from late_device import LateDevice
from toy import (
    GROUP,
    SIZES,
    STREAMED,
    D,
    Driver,
    G,
    Hyper,
    Reference,
    S,
    evaluation,
    gradient,
    make_buckets,
    make_program,
    make_runtime,
    place,
)

from lohan_fx.errors import LohanError, PlanMismatch, TrainingLoopError, TransferError
from lohan_fx.planner import MEMORY_CLASSES
from lohan_fx.program import Bucket, BucketPlacement, Move, Program
from lohan_fx.runtime import AdamGroup, Runtime
from lohan_fx.runtime.holdings import Holdings
from lohan_fx.runtime.recorder import Recorder
from lohan_fx.runtime.records import Record
from lohan_fx.runtime.resting import InDram

ON_GPU, IN_DRAM = STREAMED["bfloat16"]
MODES = ["backward", "next-forward", "speculative", "serial", "naive"]
WAITING = ["next-forward", "speculative", "serial"]
OTHER = AdamGroup(lr=0.02, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.2, decoupled=False)


def start(
    tmp_path: Path,
    placements: list[BucketPlacement] | None = None,
    hyper: Hyper | None = None,
    **options: object,
) -> tuple[Runtime, Driver, Reference, Program]:
    """Half of four buckets have their weights on the GPU, unless others are given."""
    placements = placements or [ON_GPU, IN_DRAM] * 2
    buckets = make_buckets(len(placements), "bfloat16")
    program = make_program(buckets)
    hyper = hyper or Hyper()
    runtime = make_runtime(tmp_path, buckets, placements, [program], hyper=hyper, **options)  # type: ignore[arg-type]
    return runtime, Driver(runtime, buckets), Reference(buckets, hyper), program


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[LateDevice]:
    """Copies and kernels beside happen when somebody waits for them, not soon because somebody asks."""
    opened: list[LateDevice] = []

    def open_device(device: torch.device) -> LateDevice:
        opened.append(LateDevice(patience=300))
        return opened[-1]

    monkeypatch.setattr("lohan_fx.runtime.runtime.open_device", open_device)
    return opened


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are given back are overwritten at once, as by the next owner of the memory."""
    drop = Record.drop_grads

    def drop_and_spoil(self: Record, *args: object) -> None:
        held = list(self.grads.values())
        drop(self, *args)  # type: ignore[arg-type]
        for grad in held:
            grad.fill_(math.nan)

    monkeypatch.setattr(Record, "drop_grads", drop_and_spoil)


# The same numbers.


@pytest.mark.usefixtures("copies", "spoilt")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slot", [128, 1 << 20], ids=["many pieces", "one piece"])
def test_a_state_that_passes_through_the_gpu_has_the_bits_of_plain_adam(
    tmp_path: Path, mode: str, slot: int
) -> None:
    runtime, driver, reference, program = start(tmp_path, overlap=mode, stream_bytes=36 * slot)
    for _ in range(4):
        driver.train(program)
        reference.step()
    reference.check(runtime)
    assert runtime.stats().updates["streamed"] == 4 * 4
    assert runtime.stats().updates["params"] == 0  # the CPU has updated nothing
    runtime.close()


@pytest.mark.usefixtures("spoilt")
@pytest.mark.parametrize("mode", MODES)
def test_nothing_has_to_happen_before_somebody_waits_for_it(
    tmp_path: Path, mode: str, late: list[LateDevice]
) -> None:
    placements = [ON_GPU, IN_DRAM, place(G, D), place(D, D), place(S, S), IN_DRAM, ON_GPU]
    runtime, driver, reference, program = start(tmp_path, placements, overlap=mode)
    for _ in range(3):
        driver.train(program)
        reference.step()
    reference.check(runtime)
    runtime.close()
    assert len(late) == 1


@pytest.mark.usefixtures("copies", "spoilt")
@pytest.mark.parametrize("mode", WAITING)
def test_clipped_steps_have_the_bits_of_plain_adam(tmp_path: Path, mode: str) -> None:
    hyper = Hyper(max_grad_norm=0.5)
    runtime, driver, reference, program = start(tmp_path, hyper=hyper, overlap=mode)
    for limit in (0.5, 1e9, 0.1):
        hyper.max_grad_norm = limit
        driver.train(program)
        norm = torch.tensor(runtime.last_grad_norm, dtype=torch.float32)
        reference.step(float(torch.clamp(limit / (norm + 1e-6), max=1.0)))
    reference.check(runtime)
    runtime.close()


@pytest.mark.usefixtures("copies", "spoilt")
@pytest.mark.parametrize("mode", ["next-forward", "speculative"])
def test_gradients_are_unscaled_and_steps_left_out(tmp_path: Path, mode: str) -> None:
    runtime, driver, reference, program = start(
        tmp_path, hyper=Hyper(checks_finite=True), overlap=mode
    )
    for scale, found in ((64.0, False), (math.inf, True), (16.0, False)):
        driver.factor = scale
        driver.forward(program)
        driver.backward(program)
        assert runtime.unscale_gradients(1 / scale) is found
        if found:
            runtime.skip_step()
        else:
            runtime.step()
            reference.step()
        reference.check(runtime)
    runtime.close()


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("mode", ["backward", "next-forward"])
def test_each_parameter_has_its_own_group_and_step(tmp_path: Path, mode: str) -> None:
    hyper = Hyper(each=[GROUP, OTHER])
    buckets = make_buckets(2, "bfloat16")
    absent = (1, 3)
    programs = [make_program(buckets), make_program(buckets, index=1, skip=absent)]
    runtime = make_runtime(
        tmp_path, buckets, [ON_GPU, IN_DRAM], programs, hyper=hyper, overlap=mode
    )
    driver, reference = Driver(runtime, buckets), Reference(buckets, hyper)
    counts = dict.fromkeys(range(6), 0)
    for turn, rate in enumerate((0.1, 0.05, 0.2)):
        hyper.each[0] = AdamGroup(rate, 0.9, 0.99, 1e-8, 0.01, True)
        driver.train(programs[turn % 2])
        for pid in counts:
            if turn % 2 and pid in absent:
                continue
            counts[pid] += 1
            grad = gradient(pid, reference.weight[pid]).contiguous()
            reference.update(pid, hyper.each[pid % 2], grad, counts[pid], 1.0)
    reference.check(runtime)
    runtime.close()


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("mode", ["backward", "next-forward"])
def test_a_bucket_of_which_nothing_is_updated_stays_where_it_is(tmp_path: Path, mode: str) -> None:
    hyper = Hyper(left_out=frozenset(range(6)))  # all of buckets 0 and 1
    runtime, driver, reference, program = start(tmp_path, hyper=hyper, overlap=mode)
    held = runtime.stats().current_bytes["gpu"]
    for _ in range(2):
        driver.train(program)
        reference.step()
    reference.check(runtime)
    assert runtime.stats().updates["streamed"] == 2 * 2
    assert runtime.stats().current_bytes["gpu"] == held
    runtime.close()


@pytest.mark.parametrize("mode", ["backward", "next-forward"])
@pytest.mark.parametrize("placement", [ON_GPU, IN_DRAM], ids=str)
def test_an_update_follows_the_one_before(
    tmp_path: Path, mode: str, placement: BucketPlacement, late: list[LateDevice]
) -> None:
    runtime, driver, reference, program = start(
        tmp_path, [placement], overlap=mode, stream_bytes=1 << 20
    )
    for _ in range(4):  # each in another slot than the one before
        driver.train(program)
        reference.step()
    reference.check(runtime)
    runtime.close()


@pytest.mark.usefixtures("spoilt")
@pytest.mark.parametrize("mode", ["backward", "next-forward"])
@pytest.mark.parametrize("turn", [1, -1], ids=["in the same order", "in the other order"])
def test_an_evaluation_after_a_step_sees_the_new_weights(
    tmp_path: Path, mode: str, turn: int, late: list[LateDevice]
) -> None:
    runtime, driver, reference, program = start(tmp_path, overlap=mode)
    check = evaluation(make_program(driver.buckets[::turn]), 1)
    runtime.passes.add_program(check)
    for _ in range(2):
        driver.train(program)
        reference.step()
        with torch.inference_mode():
            driver.forward(check)
        assert all(torch.equal(driver.seen[pid], w) for pid, w in reference.weight.items())
    reference.check(runtime)
    runtime.close()


# What moves, and what is held.


@pytest.mark.parametrize("mode", ["backward", "next-forward"])
@pytest.mark.parametrize("placement", [ON_GPU, IN_DRAM], ids=str)
def test_the_state_moves_both_ways_and_no_gradient_moves(
    tmp_path: Path, mode: str, placement: BucketPlacement
) -> None:
    runtime, driver, _, program = start(tmp_path, [placement] * 3, overlap=mode)
    before = runtime.stats().moved_bytes
    driver.train(program)
    runtime.drain()
    moved = {lane: n - before[lane] for lane, n in runtime.stats().moved_bytes.items()}
    states = sum(bucket.state_bytes for bucket in driver.buckets)
    weights = sum(bucket.weight_bytes for bucket in driver.buckets) * (placement == IN_DRAM)
    assert moved == {
        "h2d": states + 2 * weights,
        "d2h": states + weights,
        "ssd_read": 0,
        "ssd_write": 0,
    }
    runtime.close()


def grads_of(bucket: Bucket) -> int:
    return sum(spec.numel * 2 for spec in bucket.params)


@pytest.mark.parametrize("placement", [ON_GPU, IN_DRAM], ids=str)
def test_gradients_are_held_until_the_next_forward_uses_the_weights(
    tmp_path: Path, placement: BucketPlacement, late: list[LateDevice]
) -> None:
    runtime, driver, reference, program = start(tmp_path, [placement] * 3, overlap="next-forward")
    resting = runtime.stats().current_bytes["gpu"]
    driver.train(program)
    held = [grads_of(bucket) for bucket in driver.buckets]
    assert runtime.stats().current_bytes["gpu"] == resting + sum(held)
    fetched = 0
    for move in program.forward:
        driver.move(program, move)
        if move.op == "wait":
            held[move.arg] = 0
        if placement == IN_DRAM and move.op in ("fetch", "release"):
            sign = 1 if move.op == "fetch" else -1
            fetched += sign * driver.buckets[move.arg].weight_bytes
        assert runtime.stats().current_bytes["gpu"] == resting + fetched + sum(held), move
    assert not any(held)
    driver.backward(program)
    runtime.step()
    reference.step()
    reference.step()
    reference.check(runtime)
    assert runtime.stats().current_bytes["gpu"] == resting
    runtime.close()


def test_gradients_go_back_as_soon_as_the_host_knows_that_the_kernels_are_done(
    tmp_path: Path,
) -> None:
    runtime, driver, _, program = start(tmp_path, [ON_GPU, IN_DRAM] * 4)
    resting = runtime.stats().current_bytes["gpu"]
    driver.train(program)
    largest = max(grads_of(bucket) for bucket in driver.buckets)
    weights = 3 * max(bucket.weight_bytes for bucket in driver.buckets)
    assert runtime.stats().peak_bytes["gpu"] <= resting + largest + weights
    runtime.close()


def test_step_issues_one_update_and_leaves_the_others_to_the_next_forward(
    tmp_path: Path, late: list[LateDevice]
) -> None:
    runtime, driver, reference, program = start(
        tmp_path, [ON_GPU] * 4, overlap="next-forward", stream_bytes=1 << 20
    )
    driver.train(program)
    copies = late[0].queues["h2d beside"]
    assert len(copies) == 1
    driver.move(program, Move("begin", 0))
    assert len(copies) == 2
    runtime.passes.abort()
    reference.step()
    reference.check(runtime)
    runtime.close()


def test_the_ring_is_a_buffer_and_what_waits_for_it_are_gradients(
    tmp_path: Path, late: list[LateDevice]
) -> None:
    runtime, driver, _, program = start(tmp_path, [ON_GPU] * 2)
    driver.train(program)
    resources, windows = runtime._resources, runtime._resources.opened()
    parts = windows.inbound, windows.slots, windows.updates
    row = Holdings(resources.pools, resources.store, *parts).gpu(0)
    assert dict(zip(MEMORY_CLASSES, row, strict=True)) == {
        "weights": sum(bucket.weight_bytes for bucket in driver.buckets),
        "gradients": sum(grads_of(bucket) for bucket in driver.buckets),
        "optimizer": 0,
        "activations": 0,
        "workspace": 0,
        "buffers": SIZES["stream_bytes"],
    }
    runtime.close()


def test_a_recording_shows_states_on_their_way_in_and_out(tmp_path: Path) -> None:
    runtime, driver, _, program = start(tmp_path, [ON_GPU, IN_DRAM])
    recorder = Recorder(runtime.device)
    runtime.observer.record(recorder)
    driver.train(program)
    (timeline,) = runtime.observer.recorded(recorder)
    seen = {(s.lane, s.what, s.index) for s in timeline.spans if s.in_pass == "update"}
    assert seen == {
        (lane, what, index)
        for lane, what in (("h2d", "state in"), ("d2h", "state out"))
        for index in (0, 1)
    }
    runtime.close()


def test_a_state_is_pinned_while_it_passes_through_the_gpu(tmp_path: Path) -> None:
    runtime, driver, reference, program = start(tmp_path, [IN_DRAM, place(D, D), place(S, D)])
    homes = runtime._resources.store.homes

    def pinned() -> list[bool]:
        states = [home.state for home in homes.values()]
        assert all(isinstance(state, InDram) for state in states)
        return [state.memory.pinned for state in states if isinstance(state, InDram)]

    assert pinned() == [True, False, False]
    for index, placements in enumerate(
        (
            [place(D, D), IN_DRAM, ON_GPU],
            [IN_DRAM, ON_GPU, place(S, D)],
            [place(S, D), *[ON_GPU] * 2],
        )
    ):
        driver.train(program)
        reference.step()
        runtime.place(placements, runtime._resources.options)
        assert pinned() == [p.streamed for p in placements]
        reference.check(runtime)
        assert runtime.values.step_count == index + 1
    driver.train(program)
    reference.step()
    reference.check(runtime)
    runtime.close()


def test_the_ring_is_within_the_budget_and_goes_back(tmp_path: Path) -> None:
    buckets = make_buckets(2, "bfloat16")
    largest = max(bucket.weight_bytes for bucket in buckets)
    ring = SIZES["stream_bytes"]
    need = ring + 3 * sum(bucket.weight_bytes for bucket in buckets)
    runtime, driver, _, program = start(tmp_path, [IN_DRAM] * 2, gpu_bytes=need)
    assert runtime.stats().current_bytes["gpu"] == ring
    driver.train(program)
    runtime.place([place(D, D)] * 2, replace(runtime._resources.options, stream_bytes=0))
    assert runtime.stats().current_bytes["gpu"] == 0
    runtime.close()
    with pytest.raises(LohanError, match="ring of streamed states"):
        start(tmp_path, [IN_DRAM] * 2, gpu_bytes=largest)


def test_a_ring_that_other_windows_do_not_fit_beside_goes_back(tmp_path: Path) -> None:
    runtime, *_ = start(tmp_path, [IN_DRAM, place(D, D)])
    options = replace(runtime._resources.options, inbound_bytes=4096)
    with pytest.raises(LohanError, match="raise it"):
        runtime.place([IN_DRAM, place(S, D)], options)
    assert runtime.stats().current_bytes["gpu"] == 0
    runtime.close()


# What is refused.


@pytest.mark.parametrize(
    ("dtype", "weight", "state", "frozen"),
    [
        ("bfloat16", S, D, False),
        ("bfloat16", D, S, False),
        ("bfloat16", G, G, False),
        ("float32", D, D, False),
        ("bfloat16", D, D, True),
    ],
    ids=["weight on SSD", "state on SSD", "state on the GPU", "no master", "frozen"],
)
def test_what_cannot_pass_through_the_gpu_is_refused(
    tmp_path: Path, dtype: str, weight: object, state: object, frozen: bool
) -> None:
    buckets = make_buckets(1, dtype, frozen=[0] if frozen else [])
    wrong = BucketPlacement(weight, state, streamed=True)  # type: ignore[arg-type]
    with pytest.raises(PlanMismatch, match="bucket 0: only a state in DRAM"):
        make_runtime(tmp_path, buckets, [wrong])


@pytest.mark.parametrize("nbytes", [0, 3 * 512])
def test_a_ring_that_holds_no_piece_is_refused(tmp_path: Path, nbytes: int) -> None:
    with pytest.raises(LohanError, match="raise stream_bytes"):
        start(tmp_path, [IN_DRAM], stream_bytes=nbytes)


def test_sums_of_several_backwards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LohanError, match="no sum of several backwards"):
        start(tmp_path, [IN_DRAM], accumulates=True)


# Ends in the middle.


@pytest.mark.usefixtures("copies")
def test_waiting_gradients_may_be_discarded(tmp_path: Path) -> None:
    runtime, driver, reference, program = start(tmp_path, overlap="next-forward")
    held = runtime.stats().current_bytes["gpu"]
    driver.train(program)
    reference.step()
    driver.forward(program)
    driver.backward(program)
    runtime.discard_gradients()
    runtime.step()
    assert runtime.stats().current_bytes["gpu"] == held
    driver.train(program)
    reference.step()
    reference.check(runtime)
    runtime.close()


@pytest.mark.usefixtures("spoilt")
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_pass_left_in_the_middle_loses_no_update(
    tmp_path: Path, where: str, late: list[LateDevice]
) -> None:
    runtime, driver, reference, program = start(tmp_path, overlap="next-forward")
    held = runtime.stats().current_bytes["gpu"]
    for _ in range(2):
        driver.train(program)
        reference.step()
        if where == "forward":
            for move in program.forward[:4]:
                driver.move(program, move)
        else:
            driver.forward(program)
            for move in program.backward[:8]:
                driver.move(program, move)
        driver.live.clear()
        runtime.passes.abort()
    reference.check(runtime)
    assert runtime.stats().current_bytes["gpu"] == held
    runtime.close()


@pytest.mark.usefixtures("copies")
def test_a_backward_that_stops_halfway_through_its_updates_says_so(tmp_path: Path) -> None:
    runtime, driver, _, program = start(tmp_path, overlap="backward")
    driver.forward(program)
    for move in program.backward[: program.backward.index(Move("release", 1))]:
        driver.move(program, move)
    runtime.passes.abort()
    with pytest.raises(TrainingLoopError, match="between two steps"):
        runtime.step()
    runtime.close()


@pytest.mark.parametrize("mode", ["backward", "next-forward"])
def test_a_close_while_states_are_on_their_way(
    tmp_path: Path, mode: str, late: list[LateDevice]
) -> None:
    runtime, driver, _, program = start(tmp_path, overlap=mode)
    driver.train(program)
    for move in program.forward[:3]:
        driver.move(program, move)
    runtime.close()
    assert not any(late[0].queues.values())
    assert runtime.stats().current_bytes == {"gpu": 0, "dram": 0, "ssd": 0}


def test_a_copy_that_does_not_end_is_named(tmp_path: Path, late: list[LateDevice]) -> None:
    runtime, driver, _, program = start(tmp_path, [ON_GPU], deadline_s=0.05)
    late[0].patience = 10**9
    driver.train(program)
    with pytest.raises(TransferError, match="updated state of bucket 0 has not finished"):
        runtime.drain()
    runtime.close()
