"""Training steps through the runtime, by hand, over every combination of tiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy import (
    GROUP,
    PLACES,
    D,
    Driver,
    G,
    Hyper,
    Reference,
    S,
    all_places,
    evaluation,
    make_buckets,
    make_program,
    make_runtime,
    make_slots,
    place,
)

from lohan_fx.runtime import AdamGroup

MODES = ["backward", "next-forward", "speculative", "serial", "naive"]


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", PLACES)
def test_steps_over_all_tiers_have_the_bits_of_plain_adam(
    tmp_path: Path, dtype: str, mode: str
) -> None:
    placements = all_places(dtype) * 2
    buckets = make_buckets(len(placements) + 2, dtype, frozen=[len(placements)])
    placements += [place(S, S), place(D, S)]
    slots = make_slots([D, S, S, D, S], dtype)
    program = make_program(buckets, slots)
    runtime = make_runtime(
        tmp_path, buckets, placements, [program], hyper=Hyper(), overlap=mode, poison=True
    )
    driver, reference = Driver(runtime, buckets), Reference(buckets)
    for _ in range(3):
        driver.train(program)
        reference.step()
    reference.check(runtime)
    assert runtime.values.step_count == 3
    runtime.close()


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("dtype", PLACES)
@pytest.mark.parametrize("mode", ["backward", "next-forward", "speculative"])
def test_parameters_without_a_gradient_or_a_group_keep_their_values(
    tmp_path: Path, dtype: str, mode: str
) -> None:
    placements = all_places(dtype)
    buckets = make_buckets(len(placements), dtype)
    skip = [3 * i + i % 3 for i in range(len(buckets))]
    hyper = Hyper(left_out=frozenset(3 * i + (i + 1) % 3 for i in range(len(buckets))))
    program = make_program(buckets, skip=skip)
    runtime = make_runtime(tmp_path, buckets, placements, [program], hyper=hyper, overlap=mode)
    driver, reference = Driver(runtime, buckets), Reference(buckets, hyper, skip)
    for _ in range(3):
        driver.train(program)
        reference.step()
    reference.check(runtime)
    runtime.close()


def test_each_group_has_its_own_scalars(tmp_path: Path) -> None:
    other = AdamGroup(lr=0.02, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.2, decoupled=False)
    hyper = Hyper(each=[GROUP, other])
    buckets = make_buckets(3, "bfloat16")
    program = make_program(buckets)
    placements = [place(G, G), place(D, D), place(S, S)]
    runtime = make_runtime(tmp_path, buckets, placements, [program], hyper=hyper)
    driver, reference = Driver(runtime, buckets), Reference(buckets, hyper)
    for rate in (0.1, 0.05):
        hyper.each[0] = AdamGroup(rate, 0.9, 0.99, 1e-8, 0.01, True)
        driver.train(program)
        reference.step()
    reference.check(runtime)
    runtime.close()


@pytest.mark.usefixtures("copies")
def test_an_evaluation_between_steps_sees_the_newest_weights(tmp_path: Path) -> None:
    placements = all_places("bfloat16")
    buckets = make_buckets(len(placements), "bfloat16")
    program = make_program(buckets)
    runtime = make_runtime(
        tmp_path,
        buckets,
        placements,
        [program, evaluation(program, 1)],
        hyper=Hyper(),
        overlap="next-forward",
    )
    driver, reference = Driver(runtime, buckets), Reference(buckets)
    for _ in range(2):
        driver.train(program)
        reference.step()
        driver.forward(evaluation(program, 1))
        assert all(torch.equal(driver.seen[pid], w) for pid, w in reference.weight.items())
    runtime.close()


@pytest.mark.usefixtures("copies")
def test_an_evaluation_between_forward_and_backward_disturbs_neither(tmp_path: Path) -> None:
    buckets = make_buckets(4)
    program = make_program(buckets, make_slots([S, D, S]))
    check = evaluation(program, 1)
    runtime = make_runtime(tmp_path, buckets, [place(S, S)] * 4, [program, check], hyper=Hyper())
    driver, reference = Driver(runtime, buckets), Reference(buckets)
    for _ in range(2):
        handle = driver.forward(program)
        driver.salt -= 1
        driver.forward(check)
        driver.handle = handle
        driver.backward(program)
        runtime.step()
        reference.step()
        driver.salt += 1
    reference.check(runtime)
    runtime.close()


@pytest.mark.usefixtures("copies")
def test_programs_of_other_shapes_take_turns(tmp_path: Path) -> None:
    buckets = make_buckets(3)
    small = make_program(buckets, make_slots([D, S, D]), index=0)
    large = make_program(buckets, make_slots([S, S, S], "float64"), index=1)
    runtime = make_runtime(
        tmp_path, buckets, [place(D, D)] * 3, [small, large], hyper=Hyper(), poison=True
    )
    driver, reference = Driver(runtime, buckets), Reference(buckets)
    for program in (small, large, large, small):
        driver.train(program)
        reference.step()
    reference.check(runtime)
    runtime.close()


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("mode", ["backward", "next-forward", "speculative"])
def test_buckets_may_migrate_between_steps(tmp_path: Path, mode: str) -> None:
    placements = all_places("bfloat16")
    buckets = make_buckets(len(placements), "bfloat16")
    programs = [make_program(buckets, index=i) for i in range(3)]
    runtime = make_runtime(tmp_path, buckets, placements, programs, hyper=Hyper(), overlap=mode)
    driver, reference = Driver(runtime, buckets), Reference(buckets)
    for turn in range(3):
        driver.train(programs[turn])
        reference.step()
        placements = placements[2:] + placements[:2]
        runtime.place(placements, runtime._resources.options)
    reference.check(runtime)
    assert runtime.values.step_count == 3
    runtime.close()
