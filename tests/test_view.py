"""The page of a plan, without a browser: its data, its bytes, and the command that writes it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from problems import activation, bucket, problem, problems
from viewed import HOSTILE, plan_of, small, stretched, trace_json, trace_of, unfit

from lohan_fx.cli.view import main
from lohan_fx.errors import InfeasiblePlan, LohanError, PlanMismatch
from lohan_fx.plan import Plan
from lohan_fx.planner import Problem
from lohan_fx.tracing import Trace
from lohan_fx.view import render, trace_bytes
from lohan_fx.view.data import labels
from lohan_fx.view.differences import differences
from lohan_fx.view.measured import disagreements
from lohan_fx.view.stages import stage_graph


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small()


def embedded(page: str) -> dict[str, Any]:
    """The data in a page."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert match is not None
    data: dict[str, Any] = json.loads(match[1])
    return data


def test_the_same_plan_is_the_same_page(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert render([("a", plan)]) == render([("a", again)])


def test_a_page_names_nothing_outside_of_itself(plan: Plan) -> None:
    page = render([("a", plan)])
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert "url(http" not in page and "@import" not in page
    assert "default-src 'none'" in page and "unsafe" not in page


def test_every_tensor_points_to_the_item_it_moves_with(plan: Plan) -> None:
    shown = embedded(render([("a", plan)]))["plans"][0]
    columns, tables = shown["tensors"]["columns"], shown["tensors"]["tables"]
    assert len(columns["bytes"]) == len(plan.tensors)
    for row, tensor in enumerate(plan.tensors):
        assert tables["name"][columns["name"][row]] == tensor.name
        assert tables["placement"][columns["placement"][row]] == tensor.placement
        kind, index, _ = shown["items"][columns["item"][row]]
        assert index == (tensor.bucket if kind == "bucket" else tensor.activation)


def test_names_cannot_end_the_element_they_are_in() -> None:
    plan = small(num_layers=1, model=HOSTILE, hardware=HOSTILE, rename={"bucket0": HOSTILE})
    page = render([(HOSTILE, plan)])
    assert "<script>window" not in page and "<img" not in page
    assert embedded(page)["plans"][0]["model"] == HOSTILE


def test_stages_hold_all_bytes_of_their_tensors(plan: Plan) -> None:
    graph = stage_graph(plan)
    assert graph["names"] == [f"layer{k}" for k in range(4)]
    held = sum(sum(map(sum, rows)) for rows in graph["held"].values())
    assert held == sum(t.bytes for t in plan.tensors if t.cls != "gradient")
    assert all(forward > 0 and backward > 0 for forward, _, backward in graph["seconds"])


def test_values_and_weights_that_skip_stages_are_links() -> None:
    skipping = activation(0, 0, read_in=2)
    plan = plan_of(problem(3, (bucket(0, 0, 2), bucket(1, 1)), (skipping, activation(1, 1))))
    assert stage_graph(plan)["links"] == [
        [0, 2, "value", skipping.bytes],
        [0, 2, "weights", bucket(0, 0, 2).numel],
    ]


def test_a_plan_of_before_tensors_named_their_items_is_shown(plan: Plan) -> None:
    raw = plan.to_dict()
    for tensor in raw["tensors"]:
        for key in ("bucket", "activation", "recompute_s"):
            tensor.pop(key, None)
    for key in ("stages", "bucket_stages", "activation_stages"):
        del raw["graph"][key]
    shown = embedded(render([("old", Plan.from_json(json.dumps(raw)))]))["plans"][0]
    assert set(shown["tensors"]["columns"]["item"]) == {-1}
    assert shown["stages"]["names"] == [f"layer{k}" for k in range(4)]


def test_a_plan_that_fits_nothing_has_a_page() -> None:
    shown = embedded(render([("a", unfit())]))["plans"][0]
    assert shown["timeline"] is None and shown["predicted"] is None
    assert shown["reasons"] == ["GPU: 1 GB short"]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=problems())
def test_any_plan_has_a_page_of_all_its_spans_and_tensors(asked: Problem) -> None:
    try:
        plan = plan_of(asked)
    except InfeasiblePlan:
        assume(False)
    shown = embedded(render([("a", plan)]))["plans"][0]
    assert plan.timeline is not None
    assert len(shown["timeline"]["spans"]["lane"]) == len(plan.timeline.spans)
    assert len(shown["timeline"]["stalls"]["lane"]) == len(plan.timeline.stalls)
    assert max(shown["timeline"]["spans"]["item"], default=0) < max(len(shown["items"]), 1)
    assert len(shown["tensors"]["columns"]["item"]) == len(plan.tensors)
    assert len(shown["stages"]["held"]["weights"]) == asked.num_stages


def test_plans_are_labelled_by_what_differs(plan: Plan) -> None:
    other = dataclasses.replace(plan, policy="lohan")
    assert labels([("a", plan), ("b", other)]) == ["greedy", "lohan"]
    assert labels([("a", plan), ("b", plan)]) == ["a", "b"]
    assert labels([("a", plan)]) == ["a"]


def test_differences_count_what_is_placed_elsewhere(plan: Plan) -> None:
    first = plan.tensors[0]
    elsewhere = "ssd" if first.placement != "ssd" else "gpu"
    changed = (dataclasses.replace(first, placement=elsewhere), *plan.tensors[1:-1])
    found = differences([plan, dataclasses.replace(plan, tensors=changed)])["others"][0]
    assert found["moved"] == [[first.cls, first.placement, elsewhere, 1, first.bytes]]
    assert found["only"] == [1, 0]
    assert found["same"] == len(plan.tensors) - 2
    step = next(row for row in differences([plan, unfit()])["rows"] if row[0] == "step")
    assert plan.predicted is not None
    assert step == ["step", "s", plan.predicted.step_s, None]


def test_disagreements_are_named_by_size(plan: Plan) -> None:
    timeline = plan.timeline
    assert timeline is not None
    slow = next(s for s in timeline.spans if s.lane == "h2d")
    spans = tuple(
        dataclasses.replace(s, start_s=s.start_s + 100, end_s=s.end_s + 200) if s is slow else s
        for s in timeline.spans
    )
    found = disagreements(timeline, dataclasses.replace(timeline, spans=spans, step_s=300.0))
    assert found["step"] == [timeline.step_s, 300.0]
    lane, before, now = found["lanes"][0]
    assert lane == "h2d" and now - before == pytest.approx(100, rel=1e-4)
    assert found["work"][0][:2] == ["h2d", slow.what]
    assert found["items"][0][:5] == ["h2d", slow.what, slow.kind, slow.index, slow.name]
    assert found["items"][1][-1] == found["items"][1][-2]


def test_the_last_measured_step_is_laid_over_the_plan_it_followed(plan: Plan) -> None:
    assert plan.timeline is not None
    steps = [stretched(plan.timeline, slower=by) for by in (3.0, 1.1)]
    other = plan_of(problem(1, (bucket(0, 0),)), model="other")
    data = embedded(render([("b", other), ("a", plan)], trace_of(plan, *steps)))["measured"]
    assert data["plan"] == 1 and data["same_graph"]
    assert data["timeline"]["step_s"] == steps[-1].step_s
    assert data["steps_s"] == [step.step_s for step in steps]


def test_a_trace_of_another_graph_is_refused_unless_asked_for(plan: Plan) -> None:
    other = trace_of(plan, fingerprint="0" * 64, model="other")
    with pytest.raises(PlanMismatch, match="run of other over another graph"):
        render([("a", plan)], other)
    data = embedded(render([("a", plan)], other, any_plan=True))
    assert not data["measured"]["same_graph"]
    with pytest.raises(LohanError, match="no timeline"):
        render([("a", unfit())], other, any_plan=True)


def test_items_that_only_a_trace_has_are_shown(plan: Plan) -> None:
    assert plan.timeline is not None
    strange = dataclasses.replace(plan.timeline.spans[0], kind="bucket", index=999, name="strange")
    step = dataclasses.replace(plan.timeline, spans=(*plan.timeline.spans, strange))
    shown = embedded(render([("a", plan)], trace_of(plan, step)))["plans"][0]
    assert shown["items"][-1] == ["bucket", 999, "strange"]
    assert len(shown["item_notes"]) == len(shown["items"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 2}, "schema 2, this version reads 1"),
        ({"schema": True}, "schema True"),
        ({"steps": []}, "no step"),
        ({"steps": [{}]}, "step 0"),
        ({"device": None}, "no device"),
        ({"fingerprint": 7}, "no fingerprint"),
    ],
)
def test_what_is_no_trace_is_refused(plan: Plan, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LohanError, match=words):
        trace_of(plan, **changes)


def test_a_trace_that_points_nowhere_is_refused(plan: Plan) -> None:
    raw = json.loads(trace_json(plan))
    raw["steps"][0]["spans"][0][2] = 10**6
    with pytest.raises(LohanError, match="step 0"):
        Trace.from_json(json.dumps(raw))


def test_a_number_that_is_not_finite_is_refused(plan: Plan) -> None:
    text = re.sub(r'"step_s": [\d.]+', '"step_s": NaN', plan.to_json())
    with pytest.raises(LohanError, match="not finite"):
        render([("a", Plan.from_json(text))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> Path:
    """Files to give to the command."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "plan.json").write_text(plan.to_json())
    (folder / "trace.json").write_text(trace_json(plan))
    (folder / "other-trace.json").write_text(trace_json(plan, fingerprint="0" * 64))
    (folder / "old.json").write_text(json.dumps(plan.to_dict() | {"schema": 1}))
    (folder / "list.json").write_text("[1, 2]")
    (folder / "text.json").write_text("hello")
    (folder / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (folder / "deep.json").write_text("[" * 100_000)
    return folder


def test_the_command_writes_a_page(folder: Path, plan: Plan) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lohan_fx.view", "plan.json", "--html", "out.html"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "out.html").read_text() == render([("plan", plan)])


def test_a_trace_of_another_plan_can_be_shown(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    given = [str(folder / "plan.json"), "--html", str(out)]
    assert main([*given, "--measured", str(folder / "trace.json")]) == 0
    assert main([*given, "--measured", str(folder / "other-trace.json")]) == 1
    assert main([*given, "--measured", str(folder / "other-trace.json"), "--any-plan"]) == 0


def test_the_command_writes_a_perfetto_trace(folder: Path, plan: Plan, tmp_path: Path) -> None:
    plain, both = tmp_path / "plan.pftrace", tmp_path / "both.pftrace"
    given = [str(folder / "plan.json"), "--perfetto"]
    assert main([*given, str(plain)]) == 0
    assert plain.read_bytes() == trace_bytes(plan)
    assert main([*given, str(both), "--measured", str(folder / "trace.json")]) == 0
    assert both.read_bytes().startswith(plain.read_bytes()) and b"measured: " in both.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "plan.json"),
        (["plan.json"], "--html FILE or --perfetto FILE"),
        (["plan.json", "plan.json", "--perfetto", "x.html"], "for one plan"),
        (["plan.json", "--perfetto", "no/where/x.html"], "cannot be written"),
        (["plan.json", "--measured", "other-trace.json", "--perfetto", "x.html"], "another graph"),
        (["missing.json", "--html", "x.html"], "missing.json cannot be read (No such file"),
        ([".", "--html", "x.html"], "cannot be read (Is a directory)"),
        (["old.json", "--html", "x.html"], "old.json: this plan has schema 1"),
        (["list.json", "--html", "x.html"], "list.json: this is not a plan"),
        (["text.json", "--html", "x.html"], "text.json: this plan is not JSON"),
        (["bytes.json", "--html", "x.html"], "not text in UTF-8"),
        (["deep.json", "--html", "x.html"], "nested too deeply"),
        (["plan.json", "--html", "no/where/x.html"], "cannot be written to"),
        (["plan.json", "--html", "."], "cannot be written to . (Is a directory)"),
        (["plan.json", "--measured", "plan.json", "--html", "x.html"], "plan.json: this trace"),
        (["plan.json", "--measured", "none.json", "--html", "x.html"], "none.json cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_1(
    arguments: list[str],
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (folder / "x.html").exists()
