"""Two or more plans side by side: numbers in rows, and what is placed elsewhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lohan_fx.plan import Plan

_LANES = ("gpu", "h2d", "d2h", "ssd_read", "ssd_write", "cpu_adam")
_TIERS = ("gpu", "dram", "ssd")
# Tensors are told apart by these.
_Key = tuple[str, str, str]


def differences(plans: Sequence[Plan]) -> dict[str, Any]:
    """`rows` are [name, unit, a value or None per plan]; `moved` compares each plan with the first.

    `moved` rows are [class, place in the first plan, place in this one, tensors, bytes], most bytes
    first; `only` are how many tensors the first and this plan have alone.
    """
    return {
        "rows": [[name, unit, *map(value, plans)] for name, unit, value in _rows()],
        "others": [_against(plans[0], plan) for plan in plans[1:]],
    }


def _rows() -> list[tuple[str, str, Any]]:
    def predicted(key: str) -> Any:
        return lambda plan: None if plan.predicted is None else getattr(plan.predicted, key)

    def of(key: str, name: str) -> Any:
        return lambda plan: (
            None if plan.predicted is None else getattr(plan.predicted, key).get(name, 0)
        )

    return [
        ("model", "text", lambda plan: plan.model),
        ("hardware", "text", lambda plan: plan.hardware),
        ("policy", "text", lambda plan: plan.policy),
        ("optimizer runs", "text", lambda plan: plan.overlap),
        ("fits", "text", lambda plan: "yes" if plan.fits else "no"),
        ("step", "s", predicted("step_s")),
        ("forward", "s", predicted("forward_s")),
        ("backward", "s", predicted("backward_s")),
        ("update", "s", predicted("update_s")),
        ("tokens/s", "rate", lambda plan: plan.throughput.tokens_per_s),
        ("model TFLOP/s (6P)", "rate", lambda plan: plan.throughput.model_tflops),
        ("limited by", "lane", predicted("bottleneck")),
        ("busiest lane alone", "s", predicted("bound_s")),
        *((f"{lane} busy", "s", of("lane_busy_s", lane)) for lane in _LANES),
        *((f"GPU waits for {lane}", "s", of("stall_s", lane)) for lane in (*_LANES, "dram")),
        *((f"{tier} peak", "bytes", of("peak_bytes", tier)) for tier in _TIERS),
        *((f"{tier} budget", "bytes", _budget(tier)) for tier in _TIERS),
        ("SSD writes a step", "bytes", predicted("ssd_bytes_written_per_step")),
    ]


def _budget(tier: str) -> Any:
    return lambda plan: getattr(plan.budget, tier)


def _placed(plan: Plan) -> dict[_Key, tuple[str, int]]:
    return {(t.name, t.cls, str(t.layer)): (t.placement, t.bytes) for t in plan.tensors}


def _against(first: Plan, other: Plan) -> dict[str, Any]:
    here, there = _placed(first), _placed(other)
    moved: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for key, (place, _) in here.items():
        if key in there and there[key][0] != place:
            row = moved[key[1], place, there[key][0]]
            row[0] += 1
            row[1] += there[key][1]
    return {
        "moved": [
            [*key, *row] for key, row in sorted(moved.items(), key=lambda kv: (-kv[1][1], kv[0]))
        ],
        "only": [len(here.keys() - there.keys()), len(there.keys() - here.keys())],
        "same": sum(key in there and there[key][0] == here[key][0] for key in here),
    }
