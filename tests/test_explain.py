"""lohan_fx.explain: what is missing, what would do, and what more would buy; every claim is planned."""

from __future__ import annotations

import json

import pytest
import torch
from small_step import BUDGET, Blocks, small_step

import lohan_fx
from lohan_fx.cli.plan import main
from lohan_fx.explanation import explain_step
from lohan_fx.planner import (
    Forced,
    Room,
    dram_occupants,
    gpu_occupants,
    least_bytes,
    start_with_least_dram,
    validate,
)
from lohan_fx.step import TracedStep

ARGUMENTS = ["--model", "small_step:build", "--hardware", "lohan-rtx4090", "--seq", "64"]


def applied(step: TracedStep, values: dict[str, int]) -> TracedStep:
    """The step with a suggested change made."""
    values = dict(values)
    batch = values.pop("batch", None)
    if batch is not None:
        have = step.problem.capacities
        step = small_step(batch, 64).with_capacity(
            gpu=have.gpu_bytes, dram=have.dram_bytes, ssd=have.ssd_bytes
        )
    return step.with_capacity(**values)


@pytest.mark.parametrize(
    ("capacity", "short"),
    [
        ({"gpu": 300_000}, {"gpu"}),
        ({"gpu": 800_000, "dram": 200_000}, {"dram"}),
        ({"gpu": 800_000, "dram": 420_000, "ssd": 0}, {"ssd"}),
        ({"gpu": 800_000, "dram": 400_000, "ssd": 20_000}, {"ssd"}),
        ({"gpu": 500_000, "dram": 300_000}, {"gpu", "dram"}),
        ({"gpu": 1, "dram": 1, "ssd": 1}, {"gpu", "dram", "ssd"}),
        ({"gpu": 0, "dram": 0, "ssd": 0}, {"gpu", "dram", "ssd"}),
    ],
)
def test_every_change_that_is_suggested_really_fits(
    capacity: dict[str, int], short: set[str]
) -> None:
    step = small_step(8, 64).with_capacity(**capacity)
    found = explain_step(step, batch=8, retrace=lambda n: _at_batch(step, n))
    assert not found.fits and {s.tier for s in found.shortages} == short
    assert found.changes and len(found.changes) <= 3
    for change in found.changes:
        changed = applied(step, dict(change.values))
        solution = changed.solve("greedy")
        assert not validate(changed.problem, solution)
        assert solution.predicted.step_s == change.step_s
        for tier, size in change.values.items():
            if tier != "batch":
                assert size >= getattr(step.problem.capacities, f"{tier}_bytes")


def _at_batch(step: TracedStep, batch: int) -> TracedStep:
    have = step.problem.capacities
    return small_step(batch, 64).with_capacity(
        gpu=have.gpu_bytes, dram=have.dram_bytes, ssd=have.ssd_bytes
    )


def test_a_suggested_size_is_near_the_least() -> None:
    step = small_step(8, 64).with_capacity(gpu=300_000)
    (gpu,) = (c.values["gpu"] for c in explain_step(step).changes if set(c.values) == {"gpu"})
    least = least_bytes(step.problem)["gpu"]
    assert least <= gpu <= 1.05 * least


def test_the_suggested_batch_is_the_largest_that_fits() -> None:
    step = small_step(8, 64).with_capacity(gpu=500_000)
    found = explain_step(step, batch=8, retrace=lambda n: _at_batch(step, n))
    (batch,) = (c.values["batch"] for c in found.changes if "batch" in c.values)
    _at_batch(step, batch).solve()
    with pytest.raises(lohan_fx.InfeasiblePlan):
        _at_batch(step, batch + 1).solve()


def test_a_shortage_says_when_and_of_what() -> None:
    step = small_step(8, 64).with_capacity(gpu=300_000)
    (short,) = explain_step(step).shortages
    assert short.short_bytes == least_bytes(step.problem)["gpu"] - 300_000
    assert short.where.startswith("the backward of blocks.")
    sizes = [o.bytes for o in short.occupants]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == short.needs_bytes
    text = str(explain_step(step))
    assert "GPU memory is short of" in text and short.where in text and "It fits with:" in text


@pytest.mark.parametrize("room", list(Room))
def test_occupants_add_up_to_what_the_cost_model_counts(room: Room) -> None:
    ledger = start_with_least_dram(small_step().problem, Forced())
    windows = ledger.windows(room)
    for position, total in enumerate(ledger.gpu_bytes(windows)):
        assert sum(o.bytes for o in gpu_occupants(ledger, windows, position)) == total
    assert sum(o.bytes for o in dram_occupants(ledger, windows)) == ledger.dram_bytes(windows)


def test_what_more_would_buy_is_what_planning_with_more_gives() -> None:
    step = small_step(8, 64).with_capacity(gpu=800_000, dram=410_000)
    found = explain_step(step)
    assert found.fits and found.predicted is not None and not found.changes
    gains = {gain.what: gain.saves_s for gain in found.gains}
    more = step.with_capacity(gpu=800_000 + 10**9).solve().predicted.step_s
    assert gains["1 GB more GPU memory"] == pytest.approx(found.predicted.step_s - more)
    assert gains["1 GB more GPU memory"] > 0
    assert all(saved >= 0 for saved in gains.values())
    assert list(gains.values()) == sorted(gains.values(), reverse=True)
    assert "one more SSD (12 to 13)" in gains
    assert "limited by" in str(found)


def test_explaining_leaves_the_model_as_it_was() -> None:
    model = Blocks()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.zeros(8, 64, dtype=torch.long)
    found = lohan_fx.explain(
        model, "gpu=300KB,dram=1MB,ssd=1GB", {"tokens": tokens}, hardware="lohan-rtx4090"
    )
    assert not found.fits and any("batch" in change.values for change in found.changes)
    assert type(model) is Blocks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model(tokens).backward()


def test_the_command_explains_either_way(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*ARGUMENTS, "--batch", "8", "--explain"]
    assert main([*arguments, "--budget", BUDGET]) == 0
    assert "small_step:build fits" in capsys.readouterr().out
    assert main([*arguments, "--budget", "gpu=300KB,dram=1MB,ssd=1GB", "--json"]) == 2
    raw = json.loads(capsys.readouterr().out)
    assert not raw["fits"] and raw["shortages"][0]["tier"] == "gpu" and raw["changes"]
