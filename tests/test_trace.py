"""A run's own trace: in the plan's terms, plausible, and without a trace in the numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import ROOMY, TIGHT, Tiny, compiled, step, steps, tokens
from training import loss_of

import lohan_fx
from lohan_fx import LohanError, Plan, Trace, ops
from lohan_fx.plan.timeline import Timeline
from lohan_fx.planner import Stall, TierMemory, TimeSpan
from lohan_fx.program import Names
from lohan_fx.runtime.recorder import Begin, Held, Pause, Recorder, Work
from lohan_fx.runtime.timelines import timelines
from lohan_fx.tracing import busy_s, summary

BUDGETS = {"gpu": ROOMY, "dram": "gpu=160kB, dram=1GB", "ssd": TIGHT}
WARM, TRACED = 2, 3


@dataclass(frozen=True)
class Traced:
    losses: list[float]
    trace: Trace
    plan: Plan
    wall_s: float
    path: Path


def run(folder: Path, budget: str, overlap: str) -> Traced:
    """Steps before, in and after a trace."""
    model = compiled(Tiny(), folder, budget, overlap=overlap)
    try:
        optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-3)
        losses = steps(model, optimizer, map(tokens, range(WARM)))
        start = time.perf_counter()
        with model.trace(folder / "trace.json") as trace:
            losses += steps(model, optimizer, map(tokens, range(WARM, WARM + TRACED)))
        wall_s = time.perf_counter() - start
        losses.append(step(model, optimizer, tokens(WARM + TRACED)))
        return Traced(losses, trace, model.plan, wall_s, folder / "trace.json")
    finally:
        model.close()


@pytest.fixture(scope="module")
def untraced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[float]]]:
    """A model that never was traced, and its losses: those of every plan, over ATen kernels."""
    model = compiled(Tiny(), tmp_path_factory.mktemp("plain"))
    optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-3)
    yield model, steps(model, optimizer, map(tokens, range(WARM + TRACED + 1)))
    model.close()


@pytest.fixture(
    scope="module",
    params=[(tier, overlap) for tier in BUDGETS for overlap in ("backward", "speculative")],
    ids=lambda param: "-".join(param),
)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    tier, overlap = request.param
    return run(tmp_path_factory.mktemp(tier), BUDGETS[tier], overlap)


def test_losses_have_the_bits_of_those_without(
    traced: Traced, untraced: tuple[Any, list[float]]
) -> None:
    assert traced.losses == untraced[1]


def test_every_span_is_one_that_the_plan_has(traced: Traced) -> None:
    assert traced.plan.timeline is not None
    planned = {(s.lane, s.kind, s.index, s.name, s.in_pass) for s in traced.plan.timeline.spans}
    found = {
        (s.lane, s.kind, s.index, s.name, s.in_pass)
        for timeline in traced.trace.steps
        for s in timeline.spans
    }
    assert found <= planned
    # All is there but what backward turns out not to read. (Of one step, some updates' ends are in the
    # next one.)
    assert {row for row in planned - found if row[4] != "backward"} == set()
    assert {row[0] for row in planned} == {row[0] for row in found}
    whats = {s.what for timeline in traced.trace.steps for s in timeline.spans}
    assert whats <= {s.what for s in traced.plan.timeline.spans}


def test_lanes_do_one_thing_at_a_time_within_the_step(traced: Traced) -> None:
    for timeline in traced.trace.steps:
        by_lane: dict[str, list[TimeSpan]] = {}
        for span in timeline.spans:
            assert 0.0 <= span.start_s < span.end_s <= timeline.step_s
            by_lane.setdefault(span.lane, []).append(span)
        for row in by_lane.values():
            assert all(one.end_s <= other.start_s + 1e-9 for one, other in pairwise(row))
        busy = busy_s(timeline)
        for lane, row in by_lane.items():
            assert busy[lane] == pytest.approx(sum(s.end_s - s.start_s for s in row))
        for stall in timeline.stalls:
            assert 0.0 <= stall.start_s < stall.end_s <= timeline.step_s
            assert not any(
                s.start_s < stall.end_s - 1e-9 and stall.start_s < s.end_s - 1e-9
                for s in by_lane["gpu"]
            )


def test_there_is_one_timeline_for_each_step(traced: Traced) -> None:
    assert len(traced.trace.steps) == TRACED
    assert 0 < sum(timeline.step_s for timeline in traced.trace.steps) <= traced.wall_s
    assert traced.trace.fingerprint == traced.plan.fingerprint
    assert (traced.trace.model, traced.trace.device) == (traced.plan.model, "cpu")


def test_memory_is_that_of_the_plan(traced: Traced) -> None:
    assert traced.plan.timeline is not None
    planned = traced.plan.timeline.memory
    for timeline in traced.trace.steps:
        for tier in ("dram", "ssd"):
            for cls, row in planned[tier].bytes_by_class.items():
                measured = timeline.memory[tier].bytes_by_class[cls]
                # The plan gives every result of an op pages of its own.
                assert measured <= row if cls == "activations" else measured == row
        gpu = timeline.memory["gpu"]
        assert gpu.times_s[0] == 0.0 and list(gpu.times_s) == sorted(gpu.times_s)
        assert min(min(row) for row in gpu.bytes_by_class.values()) >= 0
        assert 0 < gpu.peak_bytes <= planned["gpu"].peak_bytes
        assert max(gpu.bytes_by_class["optimizer"]) == max(
            planned["gpu"].bytes_by_class["optimizer"]
        )


def test_the_file_is_read_back_as_it_was(traced: Traced) -> None:
    assert Trace.load(traced.path) == traced.trace
    raw = json.loads(traced.path.read_text())
    assert raw["schema"] == 1 and raw["fingerprint"] == traced.plan.fingerprint
    assert raw["steps"][0] == traced.trace.steps[0].to_dict()
    traced.trace.check_matches(traced.plan)


def test_a_summary_counts_lanes_and_the_bound(traced: Traced) -> None:
    found = summary(traced.trace, traced.plan)
    assert found["steps"] == TRACED - 1
    assert set(found["busy_s"]) == {"gpu", "h2d", "d2h", "ssd_read", "ssd_write", "cpu_adam"}
    assert 0.0 < found["gpu_idle_share"] < 1.0
    assert traced.plan.predicted is not None
    assert found["bound_ratio"] == found["step_s"] / traced.plan.predicted.bound_s


def test_nothing_is_told_of_steps_that_nobody_watches(untraced: tuple[Any, list[float]]) -> None:
    session = untraced[0]._lohan
    assert not ops.watched
    assert (
        session.runtime._resources.device.recorder is None
        and session.runtime._resources.waits.recorder is None
    )
    for captured in session.captured:
        for skeleton in captured.skeletons.values():
            assert "watched" not in vars(skeleton) and "told" not in skeleton.source


def test_a_trace_may_begin_before_the_first_step_and_ends_with_its_block(tmp_path: Path) -> None:
    model = compiled(Tiny(), tmp_path, "gpu=160kB, dram=400kB")
    optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(ZeroDivisionError), model.trace(tmp_path / "none.json") as failed:
        step(model, optimizer, tokens(0))
        raise ZeroDivisionError
    assert failed.steps == () and not (tmp_path / "none.json").exists()
    with model.trace() as trace:
        with pytest.raises(LohanError, match="being recorded already"), model.trace():
            pass
        step(model, optimizer, tokens(1))
        with torch.no_grad():
            model(**tokens(2))
        # Three forwards, one step; the trace ends between a forward and its backward.
        with model.no_sync():
            loss_of(model(**tokens(3))).backward()
        loss_of(model(**tokens(4))).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss_of(model(**tokens(5)))
    assert not ops.watched
    assert len(trace.steps) == 3
    sums = [s for s in trace.steps[1].spans if s.what == "sum"]
    assert sums and {s.lane for s in sums} == {"cpu_adam"}
    forwards = [s for s in trace.steps[1].spans if s.what == "forward" and s.name == "embed"]
    assert len(forwards) == 2
    assert "backward" not in {s.what for s in trace.steps[2].spans}
    loss.backward()
    optimizer.step()
    model.close()


def test_closing_the_model_ends_its_trace(tmp_path: Path) -> None:
    model = compiled(Tiny(1), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-3)
    with model.trace() as trace:
        step(model, optimizer, tokens(0))
        model.close()
    assert len(trace.steps) == 1 and trace.steps[0].spans


def test_the_profiler_shows_stages_and_moves_by_name(tmp_path: Path) -> None:
    model = compiled(Tiny(), tmp_path, TIGHT)
    optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-3)
    losses = [step(model, optimizer, tokens(0))]
    with torch.profiler.profile() as profiler:
        losses.append(step(model, optimizer, tokens(1)))
    losses.append(step(model, optimizer, tokens(2)))
    names = {event.key for event in profiler.key_averages()}
    assert model.plan.timeline is not None
    spans = model.plan.timeline.spans
    stages = {(s.what, s.name) for s in spans if s.lane == "gpu" and s.kind == "stage"}
    assert {f"{what} {name}" for what, name in stages if what != "recompute"} <= names
    assert {
        f"fetch {s.name}" for s in spans if s.what == "fetch" and s.in_pass == "forward"
    } <= names
    assert {f"reload_wait {s.name}" for s in spans if s.what == "reload"} <= names
    assert "grad blocks.1.body.0.weight" in names
    reference = compiled(Tiny(), tmp_path, TIGHT)
    optimizer = lohan_fx.AdamW(reference.parameters(), lr=1e-3)
    assert steps(reference, optimizer, map(tokens, range(3))) == losses
    model.close()
    reference.close()


NAMES = Names(
    stages=("embed", "head"),
    buckets=("embed:w", "head:w"),
    activations=("mul", "add"),
    slots=(1,),
    slot_names=("add",),
)


def noted(**rows: Any) -> Recorder:
    """A recorder with these notes, of two steps that begin at 10 and 20 and end at 25."""
    recorder = Recorder(torch.device("cpu"))
    resting = (("dram", (0, 1, 2, 3, 0, 4)), ("ssd", (5, 0, 6, 7, 0, 0)))
    recorder.begins = [Begin(0, True, at, at, resting) for at in (10.0, 20.0)]
    recorder.closed = 25.0
    for name, row in rows.items():
        setattr(recorder, name, row)
    return recorder


def test_what_crosses_the_border_of_two_steps_is_in_both() -> None:
    works = [
        Work("gpu", "forward", 0, 0, "forward", 9.0, 11.0),
        Work("gpu", "backward", 1, 0, "backward", 18.0, 21.0),
        Work("d2h", "offload", 0, 0, "forward", 24.0, 27.0),
    ]
    pauses = [Pause("h2d", ("reload", 0), 0, 19.5, 20.5), Pause("h2d", ("fetch", 0), 0, 12, 12)]
    first, second = timelines(noted(works=works, pauses=pauses), {0: NAMES})
    assert (first.step_s, second.step_s) == (10.0, 5.0)
    assert first.spans == (
        TimeSpan("gpu", "forward", "stage", 0, "embed", "forward", 0.0, 1.0),
        TimeSpan("gpu", "backward", "stage", 1, "head", "backward", 8.0, 10.0),
    )
    assert second.spans == (
        TimeSpan("d2h", "offload", "activation", 1, "add", "forward", 4.0, 5.0),
        TimeSpan("gpu", "backward", "stage", 1, "head", "backward", 0.0, 1.0),
    )
    assert first.stalls == (Stall(9.5, 10.0, "h2d", "activation", 1, "add"),)
    assert second.stalls == (Stall(0.0, 0.5, "h2d", "activation", 1, "add"),)


def test_requests_under_way_together_are_told_apart_by_their_ends() -> None:
    native = [
        ("the weights of head:w", "ssd_read", 11.0, 13.0),
        ("the weights of embed:w", "ssd_read", 11.0, 12.0),
        ("the weights of head:w", "ssd_read", 14.0, 15.0),
        ("activation add", "ssd_read", 14.0, 16.0),
        ("head:w exp_avg", "ssd_write", 14.0, 17.0),
        ("head:w", "ssd_write", 14.0, 18.0),  # the job of which that was a part
        ("head:w master weights", "ssd_write", 16.0, 18.0),
        ("something else", "ssd_write", 18.0, 19.0),
    ]
    first, _ = timelines(noted(native=native), {0: NAMES})
    assert [(s.what, s.name, s.in_pass, s.start_s, s.end_s) for s in first.spans] == [
        ("read", "embed:w", "forward", 1.0, 2.0),
        ("read", "head:w", "forward", 2.0, 3.0),
        ("read", "head:w", "backward", 4.0, 5.0),
        ("read", "add", "backward", 5.0, 6.0),
        ("write state", "head:w", "update", 4.0, 8.0),
    ]


def test_copies_of_two_streams_share_a_lane() -> None:
    works = [
        Work("h2d", "state in", 1, 0, "update", 11.0, 12.0),
        Work("h2d", "state in", 1, 0, "update", 12.0, 14.0),
        Work("h2d", "fetch", 0, 0, "forward", 12.5, 13.0),
        Work("d2h", "state out", 1, 0, "update", 12.0, 15.0),
    ]
    first, _ = timelines(noted(works=works), {0: NAMES})
    assert [(s.lane, s.what, s.start_s, s.end_s) for s in first.spans] == [
        ("d2h", "state out", 2.0, 5.0),
        ("h2d", "state in", 1.0, 2.0),
        ("h2d", "fetch", 2.5, 3.0),
        ("h2d", "state in", 3.0, 4.0),
    ]


def test_a_wait_for_an_update_is_for_the_lane_that_it_was_in() -> None:
    native = [
        ("head:w master weights", "ssd_read", 11.0, 14.0),
        ("head:w", "cpu_adam", 14.0, 15.0),
    ]
    pauses = [
        Pause("cpu_adam", ("adam", 1), 0, 11.5, 14.2),
        Pause("cpu_adam", ("adam", 1), 0, 14.5, 15.0),
        Pause("cpu_adam", ("adam", 1), 0, 16.0, 17.0),
        Pause("gpu", None, 0, 17.0, 18.0),
    ]
    recorder = noted(native=native, pauses=pauses)
    recorder.jobs["head:w"].append("adam")
    first, _ = timelines(recorder, {0: NAMES})
    assert [(s.cause, s.name) for s in first.stalls] == [
        ("ssd_read", "head:w"),
        ("cpu_adam", "head:w"),
        ("cpu_adam", "head:w"),
        ("gpu", "embed"),
    ]


def test_memory_of_a_step_begins_with_what_was_held_before() -> None:
    held = [Held(9.0, (1, 0, 0, 0, 0, 0)), Held(14.0, (2, 0, 0, 0, 0, 0))]
    held += [Held(15.0, (2, 0, 0, 0, 0, 0)), Held(21.0, (3, 0, 0, 1, 0, 0))]
    first, second = timelines(noted(held=held), {0: NAMES})
    assert first.memory["gpu"].times_s == (0.0, 4.0)
    assert first.memory["gpu"].bytes_by_class["weights"] == (1, 2)
    assert second.memory["gpu"].times_s == (0.0, 1.0)
    assert second.memory["gpu"].total == (2, 4)
    assert first.memory["dram"].bytes_by_class["gradients"] == (1,)
    assert first.memory["ssd"].peak_bytes == 18


def steady(step_s: float, gpu_s: float, stall_s: float) -> Timeline:
    return Timeline(
        step_s,
        (TimeSpan("gpu", "forward", "stage", 0, "embed", "forward", 0.0, gpu_s),),
        (Stall(gpu_s, gpu_s + stall_s, "h2d", "bucket", 0, "embed:w"),),
        {"gpu": TierMemory((0.0,), {"weights": (1,)})},
    )


def test_a_summary_leaves_the_first_step_out() -> None:
    trace = Trace("Tiny", "cpu", "", (steady(9.0, 1.0, 1.0), steady(4.0, 3.0, 0.5)))
    assert summary(trace) == {
        "steps": 1,
        "step_s": 4.0,
        "busy_s": {
            "gpu": 3.0,
            "h2d": 0.0,
            "d2h": 0.0,
            "ssd_read": 0.0,
            "ssd_write": 0.0,
            "cpu_adam": 0.0,
        },
        "gpu_idle_share": 0.25,
        "stall_s": {"h2d": 0.5},
        "host_s": 0.5,
    }
    with pytest.raises(LohanError, match="no training step"):
        summary(Trace("Tiny", "cpu"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "schema None"),
        ('{"schema": 2}', "schema 2"),
        ('{"schema": 1, "model": "m"}', "no fingerprint"),
        (
            '{"schema": 1, "model": "m", "device": "cpu", "fingerprint": "", "steps": [3]}',
            "not a trace",
        ),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(LohanError, match=says):
        Trace.load(path)
    with pytest.raises(LohanError, match="cannot be read"):
        Trace.load(tmp_path / "missing.json")
