"""Sums of several backwards in the runtime, bit for bit: a reference in a few lines of plain arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from toy import (
    PLACES,
    Driver,
    G,
    Hyper,
    Reference,
    S,
    gradient,
    make_buckets,
    make_program,
    make_runtime,
    place,
)

from lohan_fx import native
from lohan_fx.errors import TrainingLoopError
from lohan_fx.program import Program

# Each step's backwards: (factor of its gradients, whether some parameters have none in it).
STEPS = (
    ((1.0, False), (0.37, False), (-2.0, False)),
    ((0.11, True), (1.0, False)),
    ((1.3, False), (0.7, True)),
    ((1.0, True),),
    ((3.0, False),),
)
ABSENT = (1, 3, 4, 5)  # one parameter of a bucket, all of the next one


@dataclass
class SumReference(Reference):
    """fp32 sums in the order of the backwards, and a step count for each parameter."""

    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    updates: dict[int, int] = field(default_factory=dict)

    def add(self, factor: float, absent: tuple[int, ...] = ()) -> None:
        for pid, weight in self.weight.items():
            if pid not in absent:
                grad = (gradient(pid, weight) * factor).float()
                self.sums[pid] = self.sums[pid] + grad if pid in self.sums else grad

    def norm(self) -> float:
        return math.sqrt(sum(float(g.double().square().sum()) for g in self.sums.values()))

    def apply(self, scale: float = 1.0) -> None:
        for pid, total in self.sums.items():
            self.updates[pid] = self.updates.get(pid, 0) + 1
            (group,) = self.hyper.groups()
            self.update(pid, group, total.contiguous(), self.updates[pid], scale)
        self.sums.clear()


def both_programs(buckets: list) -> tuple[Program, Program]:
    return make_program(buckets, index=0), make_program(buckets, index=1, skip=ABSENT)


@pytest.mark.parametrize("clip", [None, 0.5], ids=["", "clipped"])
@pytest.mark.parametrize("overlap", ["backward", "next-forward", "serial", "naive"])
@pytest.mark.parametrize("dtype", PLACES)
def test_sums_have_the_bits_of_plain_fp32_sums(
    dtype: str, overlap: str, clip: float | None, tmp_path: Path
) -> None:
    if clip is not None and overlap in ("backward", "naive"):
        pytest.skip("clipping waits for step()")
    hyper = Hyper(max_grad_norm=clip)
    tiers = PLACES[dtype]
    buckets = make_buckets(len(tiers), dtype)
    programs = both_programs(buckets)
    runtime = make_runtime(
        tmp_path,
        buckets,
        [place(*tier) for tier in tiers],
        programs,
        hyper=hyper,
        overlap=overlap,
        accumulates=True,
    )
    driver, reference = Driver(runtime, buckets), SumReference(buckets)
    for micro in STEPS:
        for factor, some in micro:
            runtime.passes.no_sync = (factor, some) is not micro[-1]
            driver.factor = factor
            driver.forward(programs[some])
            driver.backward(programs[some])
            reference.add(factor, ABSENT if some else ())
        runtime.step()
        scale = 1.0
        if clip is not None:
            norm = runtime.last_grad_norm
            assert norm == pytest.approx(reference.norm(), rel=1e-6)
            scale = float(torch.clamp(clip / (torch.tensor(norm) + 1e-6), max=1.0))
        reference.apply(scale)
    reference.check(runtime)
    for pid, updates in reference.updates.items():
        assert runtime.values.steps(pid) == updates
    assert {reference.updates[pid] for pid in (0, 1)} == {5, 4}
    runtime.close()


def test_sums_keep_their_bits_when_they_move(tmp_path: Path) -> None:
    """Between two micro-batches every bucket goes to another tier, its sum with it."""
    tiers = PLACES["bfloat16"]
    buckets = make_buckets(len(tiers), "bfloat16")
    programs = both_programs(buckets)
    placements = [place(*tier) for tier in tiers]
    hyper = Hyper()
    runtime = make_runtime(tmp_path, buckets, placements, programs, hyper=hyper, accumulates=True)
    driver, reference = Driver(runtime, buckets), SumReference(buckets)
    for turn in range(4):
        for last in (False, True):
            runtime.passes.no_sync = not last
            driver.factor = 0.3 + turn
            driver.forward(programs[0])
            driver.backward(programs[0])
            reference.add(driver.factor)
            if not last:
                placements = [*placements[1:], placements[0]]
                runtime.place(placements, runtime._resources.options)
        runtime.step()
        reference.apply()
    reference.check(runtime)
    runtime.close()


@pytest.mark.parametrize("tier", [(G, G), (S, S)], ids=["gpu", "ssd"])
def test_a_backward_that_stops_loses_the_sums_until_zero_grad(tier: tuple, tmp_path: Path) -> None:
    buckets = make_buckets(3)
    programs = both_programs(buckets)
    runtime = make_runtime(
        tmp_path,
        buckets,
        [place(*tier)] * 3,
        programs,
        hyper=Hyper(),
        accumulates=True,
    )
    hyper = runtime._resources.hyper
    driver, reference = Driver(runtime, buckets), SumReference(buckets)

    def micro_batch(factor: float, *, last: bool, moves: int | None = None) -> None:
        runtime.passes.no_sync = not last
        driver.factor = factor
        driver.forward(programs[0])
        for move in programs[0].backward[:moves]:
            driver.move(programs[0], move)
        driver.pairs.clear()

    micro_batch(1.0, last=False)
    micro_batch(1.0, last=False, moves=-4)
    with pytest.raises(TrainingLoopError, match=r"no sum of whole micro-batches.*opt\.zero_grad"):
        runtime.step()
    with pytest.raises(TrainingLoopError, match="no sum of whole micro-batches"):
        micro_batch(1.0, last=True)
    runtime.discard_gradients()
    # A backward that stops before its first gradient costs only itself.
    micro_batch(0.5, last=False)
    reference.add(0.5)
    micro_batch(9.0, last=False, moves=2)
    micro_batch(2.0, last=True)
    reference.add(2.0)
    runtime.step()
    reference.apply()
    reference.check(runtime)
    assert hyper is not None
    runtime.close()


def test_magnitudes_are_those_of_every_instruction_set_and_see_every_nan() -> None:
    generator = torch.Generator().manual_seed(0)
    for numel in (0, 1, 15, 16, 17, 65536, 65537, 200_001):
        values = torch.randn(numel, generator=generator)
        squares, largest = native.measure(values.data_ptr(), numel)
        assert squares == pytest.approx(float(values.double().square().sum()), rel=1e-12)
        assert largest == (float(values.abs().max()) if numel else 0.0)
    for bad in (float("nan"), float("inf"), float("-inf")):
        for at in (0, 70_000, 199_999):
            values = torch.randn(200_001, generator=generator)
            values[at] = bad
            _, largest = native.measure(values.data_ptr(), values.numel())
            assert not math.isfinite(largest)
    huge = torch.full((1000,), 3e38)  # its squares would be infinite in fp32
    assert native.measure(huge.data_ptr(), 1000)[0] == pytest.approx(1000 * 9e76, rel=1e-6)
