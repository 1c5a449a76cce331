"""Reports: the same tables for a plan and for its run, plain in a file, drawn on a terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from loops import TIGHT, Tiny, compiled, steps, tokens
from problems import MIB, bucket, problem

import lohan_fx
from lohan_fx.plan import Plan, TensorRow, build_plan, build_unfit_plan
from lohan_fx.plan.timeline import Timeline
from lohan_fx.planner import Forced, Problem, Solution, TierMemory, TimeSpan, solve
from lohan_fx.report import Bar, Run, plain_text, report_of, tables_of
from lohan_fx.runtime import RuntimeStats
from lohan_fx.tracing import Trace

ROWS = (TensorRow("w[bold]", "weight16", 0, (1024, 1024), "bfloat16", 2 * MIB, bucket=0),)


def question() -> Problem:
    return problem(2, (bucket(0, 0), bucket(1, 1)), gpu=8, ssd=0)


@pytest.fixture(scope="module")
def plan() -> Plan:
    asked = question()
    return build_plan(
        asked,
        solve(asked, "greedy"),
        model="m",
        hardware="h",
        budget="gpu=8MiB",
        policy="greedy",
        tensors=ROWS,
    )


def traced(plan: Plan, step_s: float, gpu_s: float, **changes: str) -> Trace:
    """A trace in which the GPU is all that works."""
    span = TimeSpan("gpu", "forward", "stage", 0, "s", "forward", 0.0, gpu_s)
    step = Timeline(step_s, (span,), (), {"gpu": TierMemory((0.0,), {"weights": (1,)})})
    return Trace("m", "cpu", changes.get("fingerprint", plan.fingerprint), (step,))


def table(plan: Plan, title: str, run: Run | None = None) -> dict[str, tuple[str, ...]]:
    """The rows of one table, by their first cell."""
    (found,) = [rows for name, _, rows in tables_of(plan, run=run) if name == title]
    return {row[0]: row[1:] for row in found}


def test_bars_are_ten_cells_and_their_share() -> None:
    shares = (0.0, 0.004, 0.5, 0.96, 1.7)
    text = plain_text([("", ("a",), [(Bar(share),) for share in shares])])
    assert text.splitlines()[2:] == [
        "  ..........   0%",
        "  #.........   0%",
        "  #####.....  50%",
        "  ##########  96%",
        "  ########## 170%",
    ]


def test_a_plan_shows_each_lanes_share_of_its_step(plan: Plan) -> None:
    assert plan.predicted is not None
    rows = table(plan, "lanes")
    for lane, seconds in plan.predicted.lane_busy_s.items():
        assert rows[lane] == (f"{seconds:.4g} s", f"{seconds / plan.predicted.step_s:.0%}")
    peak = plan.predicted.peak_bytes["gpu"]
    assert table(plan, "memory")["gpu"][2] == f"{peak / plan.budget.gpu:.0%}"
    assert table(plan, "tensors")["weights"].count("-") == 3


def test_what_was_measured_stands_beside_what_was_predicted(plan: Plan) -> None:
    assert plan.predicted is not None
    step_s = plan.predicted.step_s
    stats = RuntimeStats(peak_bytes={"gpu": 3 * MIB}, step_s=1.25 * step_s, steps=7)
    run = Run(stats, traced(plan, 2 * step_s, step_s))
    rows = table(plan, "plan", run)
    assert rows["step"] == (f"{step_s:.4g} s",)
    assert rows["step measured"] == (f"{1.25 * step_s:.4g} s (+25.0%)",)
    assert rows["GPU idle in the trace"] == (f"50.0% of {2 * step_s:.4g} s",)
    lanes = table(plan, "lanes", run)
    assert lanes["gpu"][2:] == (f"{step_s:.4g} s", "50%")
    assert lanes["dram"][2:] == ("-", "-")
    assert table(plan, "memory", run)["gpu"][3] == "3.1 MB"
    assert table(plan, "run", run)["steps made"] == ("7",)


def test_a_trace_of_another_plan_is_not_compared(plan: Plan) -> None:
    run = Run(trace=traced(plan, 2.0, 1.0, fingerprint="other"))
    assert "GPU idle in the trace" not in table(plan, "plan", run)
    assert len(table(plan, "lanes", run)["gpu"]) == 2


def test_a_plan_that_fits_nothing_says_why() -> None:
    unfit = build_unfit_plan(
        question(), "far too large", model="m", hardware="h", budget="", policy="greedy"
    )
    assert "far too large" in plain_text(tables_of(unfit))
    assert len(tables_of(unfit)) == 1


def test_a_report_is_plain_in_a_file_and_drawn_on_a_terminal(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = report_of(plan, Run())
    assert str(report) == report == plain_text(tables_of(plan))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    drawn = str(report)
    assert "\u2588" in drawn and "limited by" in drawn and "\u2588" not in report


def test_a_model_reports_its_steps_and_the_trace_of_them(tmp_path: Path) -> None:
    model: Any = compiled(Tiny(), tmp_path, TIGHT)
    optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-3)
    steps(model, optimizer, [tokens(0)])
    assert model._lohan.stats().step_s is None
    steps(model, optimizer, map(tokens, range(1, 4)))
    assert 0 < model._lohan.stats().step_s < 60
    report = model.report()
    assert "step measured" in report and "GPU idle" not in report and "host waited" in report
    with model.trace():
        steps(model, optimizer, map(tokens, range(4, 7)))
    found = dict(zip(("busy", "share", "measured", "of its step"), lane(model, "gpu"), strict=True))
    assert found["measured"] != "-" and 0 < found["of its step"].share < 1
    assert lane(model, "ssd_write")[2] != "0 s"
    stats = model._lohan.stats()
    assert min(stats.busy_s[of] for of in ("ssd_read", "ssd_write", "cpu_adam")) > 0
    model.close()


def lane(model: Any, name: str) -> tuple[Any, ...]:
    (found,) = [rows for title, _, rows in model.report().tables if title == "lanes"]
    return next(row[1:] for row in found if row[0] == name)


def test_a_policy_of_the_callers_own_is_named_by_its_function(tmp_path: Path) -> None:
    def frugal(asked: Problem, forced: Forced) -> Solution:
        return solve(asked, "greedy", forced=forced)

    model = compiled(Tiny(), tmp_path, TIGHT, policy=frugal)
    optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-2)
    steps(model, optimizer, [tokens(0)])
    assert model.plan.policy == "frugal"
    assert "frugal" in model.report()
    model.close()
