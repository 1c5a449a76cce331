"""The plan file: a contract that is read strictly and never executed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from problems import MIB, activation, bucket, deep, problem

from lohan_fx.errors import LohanError, PlanMismatch
from lohan_fx.plan import (
    PLAN_SCHEMA,
    Plan,
    PlanMove,
    TensorRow,
    build_plan,
    build_unfit_plan,
    json_schema,
    validate_json,
)
from lohan_fx.planner import BucketPlace, Place, Problem, simulate, solve

ROWS = (
    TensorRow("w", "weight16", 0, (1024, 1024), "bfloat16", 2 * MIB, bucket=0),
    TensorRow("w", "master32", 0, (1024, 1024), "float32", 4 * MIB, bucket=0),
    TensorRow("w", "moments32", 0, (2, 1024, 1024), "float32", 8 * MIB, bucket=0),
    TensorRow("w", "gradient", 0, (1024, 1024), "bfloat16", 2 * MIB, bucket=0),
    TensorRow("x", "activation", "layer0", (1024,), "bfloat16", 2 * MIB, activation=0),
    TensorRow("t", "workspace", None, (), "float32", 4),
)
MOVES = ({"pass": "forward", "op": "fetch", "arg": 0}, PlanMove("backward", "grad", "w"))


def question(gpu: float = 8, width_mib: int = 2) -> Problem:
    buckets = (bucket(0, 0, weight_mib=width_mib), bucket(1, 1))
    return problem(2, buckets, (activation(0, 0),), gpu=gpu, ssd=0)


def made(gpu: float = 8) -> Plan:
    asked = question(gpu)
    return build_plan(
        asked,
        solve(asked),
        model="toy",
        hardware="h200",
        budget="gpu=8MiB",
        policy="greedy",
        tensors=ROWS,
        schedule=MOVES,
        tokens_per_step=1000,
    )


def test_a_plan_reads_back_as_it_was_written() -> None:
    plan = made()
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json(indent=2)).to_json() == plan.to_json()


def test_a_plan_says_which_buckets_may_speculate() -> None:
    plan = dataclasses.replace(made(), overlap="speculative", speculating=frozenset({1, 0}))
    raw = json.loads(plan.to_json())
    assert raw["speculating"] == [0, 1]
    assert Plan.from_json(plan.to_json()) == plan
    del raw["speculating"]  # all may, as by plans from before there was a choice
    assert Plan.from_json(json.dumps(raw)) == dataclasses.replace(plan, speculating=None)
    for wrong in ([-1], "all", None):
        with pytest.raises(LohanError, match="speculating"):
            Plan.from_json(json.dumps(raw | {"speculating": wrong}))


def test_a_streamed_state_is_in_the_json_only_where_there_is_one() -> None:
    plan = made()
    assert plan.solution is not None
    streamed = BucketPlace(Place.DRAM, Place.DRAM, streamed=True)
    solution = dataclasses.replace(plan.solution, buckets=(streamed, *plan.solution.buckets[1:]))
    plan = dataclasses.replace(plan, solution=solution)
    raw = json.loads(plan.to_json())
    assert raw["solution"]["buckets"][0] == ["dram", "dram", "streamed"]
    assert all(len(place) == 2 for place in raw["solution"]["buckets"][1:])
    assert Plan.from_json(json.dumps(raw)) == plan
    raw["solution"]["buckets"][0][2] = "kept"
    with pytest.raises(LohanError):
        Plan.from_json(json.dumps(raw))
    del raw["solution"]["windows"]["stream_bytes"]  # as before there were such states
    raw["solution"]["buckets"][0] = ["dram", "dram"]
    again = Plan.from_json(json.dumps(raw)).solution
    assert again is not None
    assert again.buckets[0] == BucketPlace(Place.DRAM, Place.DRAM)


def test_a_plan_has_every_key_of_the_contract() -> None:
    raw = json.loads(made().to_json())
    assert {"schema", "model", "hardware", "budget", "policy", "fits", "reasons"} <= set(raw)
    assert raw["seconds_from"] == "roofline"
    assert raw["optimality"].keys() == {"bound_s", "gap", "status"}
    assert set(raw["predicted"]) >= {
        "step_s",
        "forward_s",
        "backward_s",
        "tokens_per_s",
        "model_tflops",
        "bottleneck",
        "peak_bytes",
        "lane_busy_s",
        "bound_s",
        "ssd_bytes_written_per_step",
        "stall_s",
    }
    assert set(raw["predicted"]["peak_bytes"]) == {"gpu", "dram", "ssd"}
    assert raw["predicted"]["bottleneck"] in raw["predicted"]["lane_busy_s"]
    assert set(raw["tensors"][0]) == {
        "name",
        "class",
        "layer",
        "shape",
        "dtype",
        "bytes",
        "placement",
        "reason",
        "bucket",
    }
    assert raw["schedule"][0] == {"pass": "forward", "op": "fetch", "arg": 0}


def test_tensors_name_the_item_they_move_with_and_the_graph_says_who_reads_it() -> None:
    raw = json.loads(made().to_json())
    weight, value, temporary = (raw["tensors"][row] for row in (0, 4, 5))
    assert weight["bucket"] == 0 and "recompute_s" not in weight
    assert (
        value["activation"] == 0 and value["recompute_s"] == question().activations[0].recompute_s
    )
    assert "bucket" not in temporary and "activation" not in temporary
    assert raw["graph"]["stages"] == ["layer0", "layer1"]
    assert raw["graph"]["bucket_stages"] == [[0], [1]]
    assert raw["graph"]["activation_stages"] == [[0, 0, 0, 0]]


def test_plans_of_before_tensors_named_their_items_are_read() -> None:
    raw = json.loads(made().to_json())
    for tensor in raw["tensors"]:
        for key in ("bucket", "activation", "recompute_s"):
            tensor.pop(key, None)
    for key in ("stages", "bucket_stages", "activation_stages"):
        del raw["graph"][key]
    assert Plan.from_json(json.dumps(raw)).to_dict() == raw


def test_the_published_schema_is_a_schema_and_accepts_a_plan() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    validate_json(made().to_dict())


def test_each_array_of_a_bucket_is_where_its_tier_says() -> None:
    # Room for the weights and not for the states.
    placed = {t.cls: t.placement for t in made(gpu=8).tensors}
    assert placed["weight16"] == "gpu"
    assert placed["master32"] == placed["moments32"] == placed["gradient"] == "dram"
    assert placed["workspace"] == "gpu"
    assert all(t.reason for t in made().tensors)


def test_parameters_and_rates_count_each_weight_once() -> None:
    plan = made()
    assert plan.num_params == 1024 * 1024
    assert plan.predicted is not None and plan.throughput.tokens_per_s is not None
    assert plan.throughput.tokens_per_s == pytest.approx(1000 / plan.predicted.step_s)
    assert plan.throughput.model_tflops == pytest.approx(
        6 * 1024 * 1024 * plan.throughput.tokens_per_s / 1e12
    )
    assert plan.with_tokens(2000).throughput.tokens_per_s == pytest.approx(
        2 * plan.throughput.tokens_per_s
    )


def test_measured_numbers_travel_with_the_plan() -> None:
    plan = made().with_measured({"step_s": 1.5})
    assert json.loads(plan.to_json())["measured"] == {"step_s": 1.5}
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_for_this_graph_gives_its_solution_on_any_machine() -> None:
    plan = made()
    assert plan.solution_for(question(gpu=100)) == plan.solution


def test_a_plan_for_another_graph_is_refused_with_the_differences() -> None:
    with pytest.raises(PlanMismatch, match=r"'bucket0' has 2097152 elements instead of 1048576"):
        made().solution_for(question(width_mib=4))
    with pytest.raises(PlanMismatch, match="3 stages instead of 2"):
        made().check_matches(problem(3, (bucket(0, 0), bucket(1, 1)), (activation(0, 0),)))
    with pytest.raises(PlanMismatch, match="in other stages"):
        made().check_matches(problem(2, (bucket(0, 1), bucket(1, 1)), (activation(0, 0),)))


@pytest.mark.parametrize("schema", [1, PLAN_SCHEMA + 1])
def test_a_plan_of_another_schema_is_refused_with_both_numbers(schema: int) -> None:
    raw = json.loads(made().to_json()) | {"schema": schema}
    with pytest.raises(LohanError, match=f"schema {schema}.*reads {PLAN_SCHEMA}"):
        Plan.from_json(json.dumps(raw))


def test_the_timeline_is_the_replay_of_the_plan() -> None:
    asked, plan = question(), made()
    answer = solve(asked)
    found = simulate(asked, answer.buckets, answer.activations, answer.windows)
    assert plan.timeline is not None and plan.predicted is not None
    assert plan.timeline.step_s == pytest.approx(plan.predicted.step_s)
    assert [(s.lane, s.what, s.name) for s in plan.timeline.spans] == [
        (s.lane, s.what, s.name) for s in found.spans
    ]
    assert plan.timeline.memory["gpu"].peak_bytes == found.memory["gpu"].peak_bytes
    stalled = sum(s.end_s - s.start_s for s in plan.timeline.stalls)
    assert stalled == pytest.approx(sum(plan.predicted.stall_s.values()))


def test_the_timelines_rows_point_into_its_tables() -> None:
    raw = json.loads(made().to_json())["timeline"]
    lane, what, item, in_pass, start_s, end_s = raw["spans"][0]
    assert raw["lanes"][lane] == "cpu_adam" and raw["whats"][what] == "adam"
    assert raw["items"][item][0] == "bucket" and raw["passes"][in_pass] == "update"
    assert 0 <= start_s < end_s <= raw["step_s"]
    assert len(raw["memory"]["gpu"]["times_s"]) == len(raw["memory"]["gpu"]["bytes"]["weights"])


def test_a_deep_plan_with_its_timeline_is_small() -> None:
    asked = deep(64)
    plan = build_plan(
        asked, solve(asked), model="m", hardware="h", budget="", policy="greedy", tensors=()
    )
    text = plan.to_json()
    assert len(text) < 2_000_000
    assert Plan.from_json(text) == plan


def test_what_was_proved_is_in_the_plan() -> None:
    asked = question()
    answer = solve(asked, "optimal")
    plan = build_plan(
        asked, answer, model="m", hardware="h", budget="", policy="optimal", tensors=()
    )
    assert answer.optimality is not None
    assert json.loads(plan.to_json())["optimality"]["bound_s"] == answer.optimality.bound_s


def test_a_timeline_that_points_nowhere_is_refused() -> None:
    raw = json.loads(made().to_json())
    raw["timeline"]["spans"][0][2] = 10**6
    with pytest.raises(LohanError, match="this is not a plan: at timeline"):
        Plan.from_json(json.dumps(raw))


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        at: Any = raw
        for key in parents:
            at = at[int(key)] if key.isdigit() else at[key]
        at[int(last) if last.isdigit() else last] = value

    return change


@pytest.mark.parametrize(
    "path_and_value",
    [
        ("tensors/0/placement", "moon"),
        ("tensors/0/class", "weight8"),
        ("tensors/0/bytes", -1),
        ("tensors/0/bytes", 1.5),
        ("predicted", None),
        ("predicted/peak_bytes/gpu", "1"),
        ("schedule/0/pass", "sideways"),
        ("seconds_from", "hearsay"),
        ("timeline/spans/0", [0, 0, 0, 0, 1.0]),
        ("timeline/memory/gpu/bytes", {}),
        ("optimality", 1),
        ("solution/buckets/0", ["gpu"]),
        ("solution/windows/grad_buffers", None),
        ("fingerprint", "abc"),
        ("surprise", 1),
        ("model", {"__reduce__": "os.system"}),
    ],
    ids=lambda pair: pair[0],
)
def test_a_plan_that_breaks_the_schema_is_refused_where_it_does(
    path_and_value: tuple[str, Any],
) -> None:
    path, value = path_and_value
    raw = json.loads(made().to_json())
    _set(path, value)(raw)
    with pytest.raises(LohanError, match="this is not a plan: at"):
        Plan.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(LohanError, match=r"this plan|not a plan"):
        Plan.from_json(text)


def test_a_plan_that_does_not_fit_says_why_and_cannot_be_run() -> None:
    plan = build_unfit_plan(
        question(), "GPU too small", model="m", hardware="h", budget="1", policy="greedy"
    )
    again = Plan.from_json(plan.to_json())
    assert again == plan and not again.fits and again.reasons == ("GPU too small",)
    with pytest.raises(LohanError, match="GPU too small"):
        again.solution_for(question())


def test_an_unknown_class_of_tensor_is_refused_by_name() -> None:
    asked = question()
    row = TensorRow("w", "weight8", 0, (1,), "int8", 1, bucket=0)
    with pytest.raises(LohanError, match="'weight8'"):
        build_plan(
            asked,
            solve(asked),
            model="m",
            hardware="h",
            budget="",
            policy="greedy",
            tensors=[row],
        )
