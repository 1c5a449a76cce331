"""Orders of calls: which are errors, and that the runtime goes on soundly after each."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from late_device import LateDevice
from loops import new_garbage_only
from toy import (
    D,
    Driver,
    G,
    Hyper,
    Reference,
    S,
    evaluation,
    make_buckets,
    make_program,
    make_runtime,
    make_slots,
    place,
)

from lohan_fx.errors import LohanError, TrainingLoopError
from lohan_fx.program import Move, Program, Tier
from lohan_fx.runtime import Runtime

BUCKETS = make_buckets(3)
PROGRAM = make_program(BUCKETS, make_slots([S, D, S]))
PLACEMENTS = [place(G, G), place(D, S), place(S, S)]


def start(tmp_path: Path, mode: str = "next-forward") -> tuple[Runtime, Driver, Reference]:
    runtime = make_runtime(
        tmp_path,
        BUCKETS,
        PLACEMENTS,
        [PROGRAM, evaluation(PROGRAM, 1)],
        hyper=Hyper(),
        overlap=mode,
    )
    return runtime, Driver(runtime, BUCKETS), Reference(BUCKETS)


def test_training_needs_an_optimizer(tmp_path: Path) -> None:
    runtime = make_runtime(tmp_path, BUCKETS, PLACEMENTS, [PROGRAM, evaluation(PROGRAM, 1)])
    with pytest.raises(TrainingLoopError, match=r"create lohan_fx\.AdamW"):
        Driver(runtime, BUCKETS).forward(PROGRAM)
    Driver(runtime, BUCKETS).forward(evaluation(PROGRAM, 1))
    runtime.close()


def test_a_second_optimizer_is_refused(tmp_path: Path) -> None:
    runtime, _, _ = start(tmp_path)
    with pytest.raises(TrainingLoopError, match="has an optimizer already"):
        runtime.attach(Hyper())
    runtime.close()


@pytest.mark.parametrize("mode", ["backward", "naive", "serial"])
def test_clipping_is_refused_where_updates_do_not_wait_for_all_gradients(
    tmp_path: Path, mode: str
) -> None:
    runtime = make_runtime(tmp_path, BUCKETS, PLACEMENTS, [PROGRAM], overlap=mode)
    if mode == "serial":
        runtime.attach(Hyper(max_grad_norm=1.0))
    else:
        with pytest.raises(LohanError, match="next-forward"):
            runtime.attach(Hyper(max_grad_norm=1.0))
    runtime.close()


def test_a_second_forward_while_activations_are_live_is_refused(tmp_path: Path) -> None:
    runtime, driver, reference = start(tmp_path)
    handle = driver.forward(PROGRAM)
    with pytest.raises(TrainingLoopError, match="wait for their backward"):
        runtime.passes.begin(0)
    driver.handle = handle
    driver.backward(PROGRAM)
    runtime.step()
    reference.step()
    reference.check(runtime)
    runtime.close()


def test_a_dropped_handle_frees_the_activations(tmp_path: Path) -> None:
    runtime, driver, reference = start(tmp_path)
    with new_garbage_only():
        for _ in range(3):
            driver.forward(PROGRAM)
            driver.handle = None
            driver.saved.clear()
            gc.collect()
    driver.train(PROGRAM)
    reference.step()
    reference.check(runtime)
    runtime.close()


def test_a_second_backward_through_one_forward_is_refused(tmp_path: Path) -> None:
    runtime, driver, _ = start(tmp_path)
    handle = driver.forward(PROGRAM)
    driver.backward(PROGRAM)
    runtime.step()
    with pytest.raises(TrainingLoopError, match="retain_graph"):
        runtime.passes.begin_backward(handle)
    runtime.close()


def test_a_second_backward_before_step_is_refused(tmp_path: Path) -> None:
    runtime, driver, reference = start(tmp_path)
    driver.forward(PROGRAM)
    driver.backward(PROGRAM)
    handle = driver.forward(PROGRAM)
    with pytest.raises(TrainingLoopError, match="no_sync"):
        runtime.passes.begin_backward(handle)
    runtime.step()
    reference.step()
    reference.check(runtime)
    runtime.close()


def test_a_step_between_forward_and_backward_is_refused(tmp_path: Path) -> None:
    runtime, driver, _ = start(tmp_path)
    driver.forward(PROGRAM)
    driver.backward(PROGRAM)
    handle = driver.forward(PROGRAM)
    runtime.step()
    with pytest.raises(TrainingLoopError, match="between this forward and its backward"):
        runtime.passes.begin_backward(handle)
    runtime.close()


@pytest.mark.parametrize("mode", ["backward", "naive"])
def test_a_missing_step_is_an_error_that_names_the_other_mode(tmp_path: Path, mode: str) -> None:
    runtime, driver, reference = start(tmp_path, mode)
    driver.forward(PROGRAM)
    driver.backward(PROGRAM)
    with pytest.raises(TrainingLoopError, match='overlap="next-forward"'):
        runtime.passes.begin(0)
    runtime.step()
    reference.step()
    driver.train(PROGRAM)
    reference.step()
    reference.check(runtime)
    runtime.close()


def test_a_step_without_a_backward_does_nothing(tmp_path: Path) -> None:
    runtime, _, reference = start(tmp_path)
    runtime.step()
    assert runtime.values.step_count == 0
    reference.check(runtime)
    runtime.close()


def test_waiting_gradients_may_be_discarded(tmp_path: Path) -> None:
    runtime, driver, reference = start(tmp_path)
    driver.forward(PROGRAM)
    driver.backward(PROGRAM)
    runtime.discard_gradients()
    runtime.step()
    assert runtime.values.step_count == 0
    driver.train(PROGRAM)
    reference.step()
    reference.check(runtime)
    runtime.close()


@pytest.mark.parametrize("tiers", [(G, G), (D, D), (S, D)])
def test_a_bucket_keeps_its_weights_until_the_backward_releases_it(
    tmp_path: Path, tiers: tuple[Tier, Tier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lohan_fx.runtime.runtime.open_device", lambda device: LateDevice())
    (bucket,) = buckets = make_buckets(1)
    pids = [spec.pid for spec in bucket.params]
    order = [Move("begin_backward", 0), Move("fetch", 0), *(Move("grad", pid) for pid in pids)]
    order += [Move("wait", 0), Move("release", 0), Move("end", 0)]
    program = Program(0, True, (), make_program(buckets).forward, tuple(order))
    runtime = make_runtime(tmp_path, buckets, [place(*tiers)], [program], hyper=Hyper())
    driver, reference = Driver(runtime, buckets), Reference(buckets)
    driver.forward(program)
    driver.backward(program)
    assert all(torch.equal(driver.seen[pid], reference.weight[pid]) for pid in pids)
    runtime.step()
    reference.step()
    reference.check(runtime)
    runtime.close()


def stop_at(program: Program, op: str, arg: int) -> list[Move]:
    moves = list(program.backward)
    return moves[: moves.index(Move(op, arg))]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_pass_left_in_the_middle_leaves_nothing_behind(tmp_path: Path, where: str) -> None:
    runtime, driver, reference = start(tmp_path)
    before = runtime.stats().current_bytes["gpu"]
    for _ in range(2):
        if where == "forward":
            for move in PROGRAM.forward[:-4]:
                driver.move(PROGRAM, move)
        else:
            driver.forward(PROGRAM)
            for move in stop_at(PROGRAM, "release", 1):
                driver.move(PROGRAM, move)
        driver.live.clear()
        runtime.passes.abort()
        assert runtime.stats().current_bytes["gpu"] == before
    runtime.step()
    driver.train(PROGRAM)
    reference.step()
    reference.check(runtime)
    runtime.close()


def test_a_backward_that_stops_halfway_through_its_updates_says_so(tmp_path: Path) -> None:
    runtime, driver, _ = start(tmp_path, "backward")
    driver.forward(PROGRAM)
    for move in stop_at(PROGRAM, "release", 1):
        driver.move(PROGRAM, move)
    runtime.passes.abort()
    for call in (lambda: runtime.passes.begin(0), lambda: runtime.passes.begin(1), runtime.step):
        with pytest.raises(TrainingLoopError, match="between two steps"):
            call()
    for bucket in BUCKETS:
        for spec in bucket.params:
            runtime.values.set_master(spec.pid, torch.zeros(spec.shape))
    runtime.values.step_count = 0
    driver.live.clear()
    driver.train(PROGRAM)
    runtime.close()


def test_a_gradient_that_does_not_come_is_named(tmp_path: Path) -> None:
    runtime, driver, _ = start(tmp_path)
    driver.forward(PROGRAM)
    with pytest.raises(LohanError, match=r"without the gradient of b1\.p1"):
        for move in PROGRAM.backward:
            if move != Move("grad", 4):
                driver.move(PROGRAM, move)
    runtime.close()


def test_a_gradient_that_comes_twice_is_named(tmp_path: Path) -> None:
    runtime, driver, _ = start(tmp_path)
    driver.forward(PROGRAM)
    for move in stop_at(PROGRAM, "release", 2):
        driver.move(PROGRAM, move)
    with pytest.raises(LohanError, match=r"b2\.p0 arrives twice"):
        driver.move(PROGRAM, Move("grad", 6))
    runtime.close()


def test_more_open_buckets_than_gradient_buffers_is_an_error(tmp_path: Path) -> None:
    early = [Move("begin_backward", 0)]
    late = []
    for bucket in (2, 1, 0):
        early += [Move("fetch", bucket), Move("wait", bucket), Move("release", bucket)]
        early.append(Move("grad", 3 * bucket))
        late += [Move("grad", 3 * bucket + 1), Move("grad", 3 * bucket + 2)]
    backward = (*early, *late, Move("end", 0))
    program = Program(0, True, (), make_program(BUCKETS).forward, tuple(backward))
    runtime = make_runtime(tmp_path, BUCKETS, [place(D, D)] * 3, [program], hyper=Hyper())
    driver = Driver(runtime, BUCKETS)
    driver.forward(program)
    with pytest.raises(LohanError, match="raise grad_buffers"):
        driver.backward(program)
    runtime.close()


def test_values_can_be_set_between_forward_and_backward_of_a_step(tmp_path: Path) -> None:
    runtime, driver, reference = start(tmp_path)
    driver.train(PROGRAM)
    for bucket in BUCKETS:
        for spec in bucket.params:
            runtime.values.set_master(spec.pid, reference.master[spec.pid])
            runtime.values.set_moments(spec.pid, torch.zeros(spec.shape), torch.zeros(spec.shape))
    runtime.values.step_count = 0
    reference.check(runtime)
    driver.train(PROGRAM)
    reference.step()
    reference.check(runtime)
    runtime.close()
