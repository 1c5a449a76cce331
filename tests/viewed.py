"""Plans to look at: every bucket and activation of a problem has tensors with names."""

from __future__ import annotations

import dataclasses
import json
from random import Random
from typing import Any

from problems import MIB, deep

from lohan_fx.plan import Plan, TensorRow, Timeline, build_plan, build_unfit_plan
from lohan_fx.planner import Problem, solve
from lohan_fx.tracing import Trace

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=2>"


def rows_of(problem: Problem, rename: dict[str, str] | None = None) -> list[TensorRow]:
    """Tensors of a problem: four of each bucket, one of each activation."""
    names, found = rename or {}, []
    for b in problem.buckets:
        name, layer = names.get(b.name, f"{b.name}.weight"), f"layer{b.forward_stages[0]}"
        shape = (b.numel // 1024, 1024)
        for cls, dtype, of, size in (
            ("weight16", "bfloat16", shape, 2),
            ("master32", "float32", shape, 4),
            ("moments32", "float32", (2, *shape), 8),
            ("gradient", "bfloat16", shape, 2),
        ):
            found.append(TensorRow(name, cls, layer, of, dtype, size * b.numel, bucket=b.index))
    for a in problem.activations:
        name, layer = names.get(a.name, a.name), f"layer{a.forward_stage}"
        found.append(
            TensorRow(
                name, "activation", layer, (a.bytes // 2,), "bfloat16", a.bytes, None, a.index
            )
        )
    return found


def plan_of(
    problem: Problem,
    policy: str = "greedy",
    *,
    model: str = "toy",
    hardware: str = "bench",
    rename: dict[str, str] | None = None,
) -> Plan:
    """The plan of a problem, with tensors."""
    if rename:
        problem = dataclasses.replace(
            problem,
            buckets=tuple(
                dataclasses.replace(b, name=rename.get(b.name, b.name)) for b in problem.buckets
            ),
        )
        rename |= {new: new for new in rename.values()}
    have = problem.capacities
    return build_plan(
        problem,
        solve(problem, policy),
        model=model,
        hardware=hardware,
        budget=f"gpu={have.gpu_bytes // MIB}MiB, dram={have.dram_bytes // MIB}MiB",
        policy=policy,
        tensors=rows_of(problem, rename),
        tokens_per_step=4096,
    )


def small(policy: str = "greedy", num_layers: int = 4, **names: Any) -> Plan:
    """Layers that need every tier."""
    return plan_of(deep(num_layers), policy, **names)


def unfit() -> Plan:
    """A plan of which nothing fits."""
    return build_unfit_plan(
        deep(2), "GPU: 1 GB short", model="toy", hardware="bench", budget="gpu=1MB", policy="greedy"
    )


def stretched(timeline: Timeline, seed: int = 0, slower: float = 1.2) -> Timeline:
    """A step as it might be measured: every span some percent longer than predicted or shorter.

    What follows on a lane moves along, so spans of one lane still do not overlap.
    """
    random = Random(seed)
    spans, clock = [], dict[str, float]()
    for span in sorted(timeline.spans, key=lambda s: s.start_s):
        length = (span.end_s - span.start_s) * slower * random.uniform(0.9, 1.1)
        start_s = max(span.start_s, clock.get(span.lane, 0.0))
        clock[span.lane] = start_s + length
        spans.append(dataclasses.replace(span, start_s=start_s, end_s=start_s + length))
    step_s = max([timeline.step_s, *clock.values()])
    return dataclasses.replace(timeline, step_s=step_s, spans=tuple(spans), stalls=())


def trace_json(plan: Plan, *steps: Timeline, **changes: Any) -> str:
    """A measured trace of a plan; of the plan's own timeline, stretched, without `steps`."""
    assert plan.timeline is not None
    raw = {
        "schema": 1,
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "device": "test bench",
        "steps": [step.to_dict() for step in steps or (stretched(plan.timeline),)],
    }
    return json.dumps(raw | changes)


def trace_of(plan: Plan, *steps: Timeline, **changes: Any) -> Trace:
    return Trace.from_json(trace_json(plan, *steps, **changes))
