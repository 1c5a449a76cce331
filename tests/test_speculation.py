"""overlap="speculative": updates made before step() has decided have the bits of those that waited."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Tiny, assert_same, compiled, step, steps, tokens
from toy import (
    GROUP,
    PLACES,
    D,
    Driver,
    Hyper,
    Reference,
    S,
    all_places,
    gradient,
    make_buckets,
    make_program,
    make_runtime,
    place,
)

import lohan_fx
from lohan_fx.errors import LohanError, TransferError
from lohan_fx.hardware import Hardware
from lohan_fx.runtime import AdamGroup, Runtime


def start(
    tmp_path: Path, hyper: Hyper, dtype: str = "bfloat16", **options: object
) -> tuple[Runtime, Driver, Reference]:
    """One bucket at each pair of tiers, in the order of PLACES, one program, an optimizer."""
    placements = all_places(dtype)
    buckets = make_buckets(len(placements), dtype)
    runtime = make_runtime(
        tmp_path,
        buckets,
        placements,
        [make_program(buckets)],
        hyper=hyper,
        **{"overlap": "speculative", **options},  # type: ignore[arg-type]
    )
    return runtime, Driver(runtime, buckets), Reference(buckets, hyper)


def num_ahead(dtype: str) -> int:
    """Buckets whose update may be made ahead: nothing of them is on SSD, nor their state on the GPU."""
    return sum(state is D and weight is not S for weight, state in PLACES[dtype])


def factor(reference: Reference, limit: float) -> tuple[float, float]:
    """(norm, factor) of the next step's gradients, as clip_grad_norm_ has them."""
    norms = [
        torch.linalg.vector_norm(gradient(pid, w).contiguous(), dtype=torch.float32)
        for pid, w in reference.weight.items()
    ]
    total = torch.linalg.vector_norm(torch.stack(norms))
    return total.item(), torch.clamp(limit / (total + 1e-6), max=1.0).item()


def train(runtime: Runtime, driver: Driver) -> None:
    driver.train(runtime.passes._programs[0])


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("dtype", PLACES)
def test_steps_that_clip_and_steps_that_do_not_have_the_bits_of_plain_adam(
    tmp_path: Path, dtype: str
) -> None:
    hyper = Hyper(max_grad_norm=1.0)
    runtime, driver, reference = start(tmp_path, hyper, dtype, poison=True)
    clipped = []
    for loose in (True, True, False, False, True, True, True):
        norm, _ = factor(reference, 1.0)
        hyper.max_grad_norm = norm * (2.0 if loose else 0.5)
        _, scale = factor(reference, hyper.max_grad_norm)
        clipped.append(scale < 1.0)
        train(runtime, driver)
        reference.step(scale)
        assert runtime.last_grad_norm == pytest.approx(norm, rel=1e-6)
    assert clipped == [False, False, True, True, False, False, False]
    reference.check(runtime)
    counts = runtime.stats().updates
    # The first step that clips has been guessed wrong; it, the second and the one after are not.
    assert counts["made_ahead"] == 4 * num_ahead(dtype)
    assert counts["made_in_vain"] == num_ahead(dtype)
    runtime.close()


@pytest.mark.usefixtures("copies")
def test_a_step_left_out_changes_nothing_and_its_gradients_are_forgotten(tmp_path: Path) -> None:
    hyper = Hyper(skip_nonfinite=True, checks_finite=True)
    runtime, driver, reference = start(tmp_path, hyper)
    with pytest.warns(RuntimeWarning, match="this step changes nothing"):
        for good in (True, False, False, True):
            driver.factor = 1.0 if good else math.nan
            train(runtime, driver)
            if good:
                reference.step()
            reference.check(runtime)
    assert (runtime.values.step_count, runtime.stats().skipped_steps) == (2, 2)
    runtime.close()


@pytest.mark.usefixtures("copies")
def test_gradients_thrown_away_leave_the_values_alone(tmp_path: Path) -> None:
    runtime, driver, reference = start(tmp_path, Hyper(max_grad_norm=1e9))
    program = runtime.passes._programs[0]
    train(runtime, driver)
    reference.step()
    driver.forward(program)
    driver.backward(program)
    runtime.discard_gradients()
    runtime.step()  # nothing to do
    reference.check(runtime)
    train(runtime, driver)
    reference.step()
    reference.check(runtime)
    runtime.close()


def test_hyperparameters_changed_after_the_backward_are_those_of_the_step(tmp_path: Path) -> None:
    hyper = Hyper(max_grad_norm=1e9, each=[GROUP])
    runtime, driver, reference = start(tmp_path, hyper)
    program = runtime.passes._programs[0]
    for rate in (0.1, 0.01):
        driver.forward(program)
        driver.backward(program)
        hyper.each[0] = AdamGroup(rate, 0.9, 0.99, 1e-8, 0.01, True)
        runtime.step()
        reference.step()
    reference.check(runtime)
    assert runtime.stats().updates["made_in_vain"] == num_ahead("bfloat16")
    runtime.close()


def test_a_loss_scale_is_expected_to_stay_what_it_was(tmp_path: Path) -> None:
    runtime, driver, reference = start(tmp_path, Hyper(checks_finite=True))
    program = runtime.passes._programs[0]
    expected = []
    for inverse in (0.5, 0.5, 0.25, 0.25):
        driver.factor = 1.0 / inverse  # a power of two: nothing is rounded
        driver.forward(program)
        driver.backward(program)
        assert not runtime.unscale_gradients(inverse)
        runtime.step()
        reference.step()
        expected.append(runtime.stats().updates["made_ahead"] / num_ahead("bfloat16"))
    assert expected == [0, 1, 1, 2]
    reference.check(runtime)
    runtime.close()


def test_a_backward_that_fails_leaves_the_values_of_the_last_step(tmp_path: Path) -> None:
    runtime, driver, reference = start(tmp_path, Hyper(max_grad_norm=1e9))
    program = runtime.passes._programs[0]
    train(runtime, driver)
    reference.step()
    driver.forward(program)
    for move in program.backward[:-4]:
        driver.move(program, move)
    driver.live.clear()
    driver.saved.clear()
    runtime.passes.abort()
    reference.check(runtime)
    train(runtime, driver)
    reference.step()
    reference.check(runtime)
    runtime.close()


def test_second_copies_go_along_when_buckets_migrate(tmp_path: Path) -> None:
    hyper = Hyper(max_grad_norm=1e9)
    runtime, driver, reference = start(tmp_path, hyper)
    placements = all_places("bfloat16")
    for _ in range(4):
        train(runtime, driver)
        reference.step()
        placements = placements[2:] + placements[:2]
        assert runtime.stats().updates["made_ahead"] == num_ahead("bfloat16")
        runtime.place(placements, runtime._resources.options)
        reference.check(runtime)
    runtime.close()


def test_a_bucket_of_which_something_keeps_its_values_waits_for_step(tmp_path: Path) -> None:
    hyper = Hyper(max_grad_norm=1e9, left_out=frozenset({0, 4, 8, 9, 13, 17, 18}))
    runtime, driver, reference = start(tmp_path, hyper)
    for _ in range(3):
        train(runtime, driver)
        reference.step()
    reference.check(runtime)
    assert runtime.stats().updates["made_ahead"] == 0
    runtime.close()


def test_second_copies_count_against_the_budget_for_dram(tmp_path: Path) -> None:
    buckets = make_buckets(1, "bfloat16")
    needs = {}
    for overlap in ("next-forward", "speculative"):
        runtime = make_runtime(
            tmp_path, buckets, [place(D, D)], overlap=overlap, inbound_bytes=0, outbound_bytes=0
        )
        needs[overlap] = runtime.stats().peak_bytes["dram"]
        runtime.close()
    page = 4096
    copy = sum(-(-size * buckets[0].numel // page) * page for size in (2, 4, 4, 4))
    assert needs["speculative"] == needs["next-forward"] + copy
    with pytest.raises(LohanError, match="bucket 0"):
        make_runtime(
            tmp_path,
            buckets,
            [place(D, D)],
            overlap="speculative",
            inbound_bytes=0,
            outbound_bytes=0,
            dram_bytes=needs["speculative"] - 1,
        )


def test_only_the_buckets_that_are_named_have_second_copies(tmp_path: Path) -> None:
    hyper = Hyper(max_grad_norm=1e9)
    buckets, placements = make_buckets(4, "bfloat16"), [place(D, D)] * 4
    copies, held = {}, {}
    for only in (frozenset({1, 2}), frozenset({2, 3}), frozenset[int](), None):
        runtime = make_runtime(
            tmp_path,
            buckets,
            placements,
            [make_program(buckets)],
            hyper=hyper,
            overlap="speculative",
            speculating=only,
        )
        driver, reference = Driver(runtime, buckets), Reference(buckets, hyper)
        for _ in range(2):
            train(runtime, driver)
            reference.step()
        copies[only] = runtime.stats().updates["made_ahead"]
        held[only] = runtime.stats().current_bytes["dram"]
        reference.check(runtime)
        # Others come and go as the windows change.
        runtime.place(placements, replace(runtime._resources.options, speculating=frozenset({0})))
        train(runtime, driver)
        reference.step()
        reference.check(runtime)
        assert runtime.stats().updates["made_ahead"] == 1
        runtime.close()
    assert list(copies.values()) == [4, 4, 0, 8]
    none, everything = held[frozenset()], held[None]
    assert none < held[frozenset({1, 2})] < held[frozenset({2, 3})] < everything


def test_an_update_that_fails_on_ssd_is_told_apart_from_those_made_ahead(tmp_path: Path) -> None:
    """What waits for step() fails after it; values made ahead count then, so the weights are torn."""
    buckets = make_buckets(2, "bfloat16")
    program = make_program(buckets)
    runtime = make_runtime(
        tmp_path,
        buckets,
        [place(D, D), place(D, S)],
        [program],
        hyper=Hyper(max_grad_norm=1e9),
        overlap="speculative",
        faults={"errno": errno.EIO, "on": "write", "after": 40, "times": 1000},
    )
    driver = Driver(runtime, buckets)
    with pytest.raises(TransferError, match="bucket 1"):
        for _ in range(20):
            driver.train(program)
    with pytest.raises(LohanError, match="between two steps"):
        driver.train(program)
    runtime.close()


# Through lohan_fx.compile

SLOW_ADAM = replace(Hardware.preset("lohan-rtx4090"), cpu_adam_params_per_s=1e8)
# The optimizer states are the CPU's, with room for second copies or without.
WIDE, NARROW = "gpu=180kB, dram=2MB", "gpu=180kB, dram=360kB"
# There is room for the second copies of some.
BETWEEN = "gpu=180kB, dram=900kB"


def train_clipped(model: Any, seeds: Iterable[int], **options: Any) -> tuple[list[float], Any]:
    optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-2, **{"max_grad_norm": 1e6, **options})
    return steps(model, optimizer, map(tokens, seeds)), optimizer


def modes_of(model: Any) -> list[str]:
    return [captured.options.overlap for captured in model._lohan.captured]


def test_auto_speculates_where_that_is_predicted_to_be_faster(tmp_path: Path) -> None:
    found = {}
    for name, budget, overlap in (
        ("auto", WIDE, "auto"),
        ("no room", NARROW, "auto"),
        ("waits", WIDE, "next-forward"),
    ):
        model = compiled(Tiny(), tmp_path, budget, overlap=overlap, hardware=SLOW_ADAM)
        found[name] = train_clipped(model, range(4))[0], modes_of(model), model.plan
        updates = model._lohan.stats().updates
        assert (updates["made_ahead"] > 0) == (name == "auto")
        assert updates["made_in_vain"] == 0
        model.close()
    assert [modes for _, modes, _ in found.values()] == [
        ["speculative"],
        ["next-forward"],
        ["next-forward"],
    ]
    assert found["auto"][0] == found["waits"][0] == found["no room"][0]
    auto, waits = (found[name][2].predicted for name in ("auto", "waits"))
    assert auto.step_s < waits.step_s
    assert auto.peak_bytes["dram"] > waits.peak_bytes["dram"]


def test_shapes_in_turns_and_sums_of_gradients_go_on_from_speculation(tmp_path: Path) -> None:
    ours = compiled(Tiny(), tmp_path, WIDE, hardware=SLOW_ADAM)
    theirs = compiled(Tiny(), tmp_path, overlap="next-forward")
    optimizers = [
        lohan_fx.AdamW(m.parameters(), lr=1e-2, max_grad_norm=0.5) for m in (ours, theirs)
    ]
    for seed, length in enumerate((12, 7, 12, 7)):
        losses = [
            step(m, o, tokens(seed, length=length))
            for m, o in zip((ours, theirs), optimizers, strict=True)
        ]
        assert losses[0] == losses[1]
    assert modes_of(ours) == ["speculative", "speculative"]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        with model.no_sync():
            model(**tokens(8)).backward()
        step(model, optimizer, tokens(9))
    assert modes_of(ours)[2:] == ["next-forward"] * (len(modes_of(ours)) - 2)
    assert step(ours, optimizers[0], tokens(10)) == step(theirs, optimizers[1], tokens(10))
    assert_same(ours, theirs, exact=True)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("budget", [WIDE, BETWEEN], ids=["all buckets", "some"])
def test_a_plan_that_speculates_is_replayed(budget: str, tmp_path: Path) -> None:
    first = compiled(Tiny(), tmp_path, budget, hardware=SLOW_ADAM)
    losses, _ = train_clipped(first, range(3))
    (tmp_path / "plan.json").write_text(first.plan.to_json())
    some, ahead = first.plan.speculating, first._lohan.stats().updates["made_ahead"]
    first.close()
    assert (some is None) == (budget == WIDE) and (some is None or some)
    again = compiled(Tiny(), tmp_path, budget, plan=str(tmp_path / "plan.json"), hardware=SLOW_ADAM)
    assert train_clipped(again, range(3))[0] == losses
    assert modes_of(again) == ["speculative"]
    assert again._lohan.captured[0].options.speculating == again.plan.speculating == some
    assert again._lohan.stats().updates["made_ahead"] == ahead > 0
    again.close()


def test_with_room_for_some_second_copies_some_buckets_speculate(tmp_path: Path) -> None:
    ours = compiled(Tiny(), tmp_path, BETWEEN, hardware=SLOW_ADAM)
    losses, optimizer = train_clipped(ours, range(3))
    captured = ours._lohan.captured[0]
    some = captured.options.speculating
    assert captured.options.overlap == "speculative"
    assert some is not None and 0 < len(some) < len(captured.problem.buckets)
    spares = {
        h.bucket.index for h in ours._lohan.runtime._resources.store.homes.values() if h.spare
    }
    assert spares and spares <= some
    stats = ours._lohan.stats()
    assert stats.updates["made_ahead"] == 3 * len(spares)
    assert stats.peak_bytes["dram"] <= 900_000
    theirs = compiled(Tiny(), tmp_path, BETWEEN, overlap="next-forward", hardware=SLOW_ADAM)
    assert train_clipped(theirs, range(3))[0] == losses
    assert_same(ours, theirs, exact=True)
    assert ours.plan.predicted.step_s < theirs.plan.predicted.step_s
    theirs.close()
    # Another shape goes on with the same buckets.
    for length in (7, 12, 7):
        step(ours, optimizer, tokens(1, length=length))
    assert [c.options.speculating for c in ours._lohan.captured] == [some, some]
    assert modes_of(ours) == ["speculative", "speculative"]
    ours.close()


def test_speculation_that_is_asked_for_is_planned_for_as_many_as_there_is_room_for(
    tmp_path: Path,
) -> None:
    ours = compiled(Tiny(), tmp_path, BETWEEN, overlap="speculative", hardware=SLOW_ADAM)
    train_clipped(ours, range(1))
    assert modes_of(ours) == ["speculative"]
    assert ours.plan.speculating
    ours.close()
