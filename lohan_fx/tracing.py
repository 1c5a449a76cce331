"""What a run measured, step by step, in the form of a plan's timeline, so that both can be compared.

`model.trace("trace.json")` records one; `Trace.load` reads the file back, and `summary` is for whoever
wants a few numbers of it. The file is JSON:

    {"schema": 1, "model": ..., "fingerprint": that of the plan, "device": "cpu" or the GPU's name,
     "steps": [what plan.timeline.Timeline.to_dict gives, one for each training step]}

Items (kind, index, name), lanes, passes and classes of memory are those of the plan's timeline. See
runtime/timelines.py for what differs by nature.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import LohanError, PlanMismatch
from .plan import Plan, validate_timeline
from .plan.timeline import LANES, Timeline

TRACE_SCHEMA = 1


@dataclass(slots=True)
class Trace:
    """A recorded run. `steps` and `fingerprint` are there once recording is over.

    `fingerprint` is that of the plan of the last step; `device` is "cpu" or the GPU's name.
    """

    model: str
    device: str
    fingerprint: str = ""
    steps: tuple[Timeline, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The JSON as plain dicts and lists."""
        return {
            "schema": TRACE_SCHEMA,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "device": self.device,
            "steps": [step.to_dict() for step in self.steps],
        }

    @classmethod
    def from_json(cls, text: str) -> Trace:
        """The trace that a run wrote.

        Raises:
            LohanError: another schema, no step, or something that is no trace; says where it goes wrong.
        """
        try:
            raw = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as exc:
            raise LohanError(f"this trace is not JSON: {exc}") from exc
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if type(schema) is not int or schema != TRACE_SCHEMA:
            raise LohanError(
                f"this trace has schema {schema!r}, this version reads {TRACE_SCHEMA}; record it "
                "again with model.trace(path)"
            )
        for key, kind in (("model", str), ("fingerprint", str), ("device", str), ("steps", list)):
            if not isinstance(raw.get(key), kind):
                raise LohanError(f"this is not a trace of a run: it has no {key}")
        if not raw["steps"]:
            raise LohanError("this trace has no step; record at least one")
        steps = []
        for number, step in enumerate(raw["steps"]):
            try:
                validate_timeline(step)
                steps.append(Timeline.from_dict(step))
            except (LohanError, IndexError) as exc:
                raise LohanError(f"this is not a trace of a run: step {number}: {exc}") from exc
        return cls(raw["model"], raw["device"], raw["fingerprint"], tuple(steps))

    def check_matches(self, plan: Plan) -> None:
        """Raise PlanMismatch unless the run followed a plan of the same graph."""
        if self.fingerprint != plan.fingerprint:
            raise PlanMismatch(
                f"the trace is of a run of {self.model} over another graph than the plan's "
                f"({plan.model}); give the plan that the run followed, or show it anyway with "
                "--any-plan"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file."""
        text = json.dumps(self.to_dict(), sort_keys=True, allow_nan=False)
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """The trace in a file.

        Raises:
            LohanError: it cannot be read, or is no trace of this version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LohanError(f"the trace {os.fspath(path)!r} cannot be read: {error}") from error
        return cls.from_json(text)

    @property
    def typical(self) -> Timeline:
        """The step of median length.

        Raises:
            LohanError: no training step was recorded.
        """
        if not self.steps:
            raise LohanError(
                "this trace has no training step; run at least a forward, a backward and opt.step() "
                "inside of model.trace()"
            )
        return sorted(self.steps, key=lambda step: step.step_s)[(len(self.steps) - 1) // 2]


def busy_s(step: Timeline) -> dict[str, float]:
    """Seconds of a step in which each lane worked: the length of the union of its spans."""
    spans: dict[str, list[tuple[float, float]]] = {lane: [] for lane in LANES if lane != "dram"}
    for span in step.spans:
        spans.setdefault(span.lane, []).append((span.start_s, span.end_s))
    return {lane: union_s(row) for lane, row in spans.items()}


def union_s(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds covered by any of (start, end)."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def summary(trace: Trace, plan: Plan | None = None) -> dict[str, Any]:
    """A few numbers of a trace, all of steady steps: the medians over its steps but the first, which may
    still have been warming up (of all, where there is only one).

    Keys:
        steps: how many are counted.
        step_s: seconds.
        busy_s: seconds by lane: gpu, h2d, d2h, ssd_read, ssd_write, cpu_adam.
        gpu_idle_share: 1 - busy_s["gpu"] / step_s.
        stall_s: seconds in which the GPU computed nothing while the lane that is the key was waited for.
        host_s: seconds in which it computed nothing and nothing was waited for: the host was late, or
            the user's own code ran (the loss outside of the model, the next batch).
        bound_s, bound_ratio: the plan's lower bound on a step (its busiest lane, alone) and step_s over
            it; with `plan` only.

    Raises:
        LohanError: no training step was recorded.
    """
    steps: Sequence[Timeline] = trace.steps[1:] or (trace.typical,)
    step_s = statistics.median(step.step_s for step in steps)
    busy = [busy_s(step) for step in steps]
    lanes = {lane: statistics.median(row[lane] for row in busy) for lane in busy[0]}
    stalls = [_stall_s(step) for step in steps]
    causes = sorted({cause for row in stalls for cause in row})
    waited = [sum(row.values()) for row in stalls]
    host = [
        max(0.0, step.step_s - row["gpu"] - rest)
        for step, row, rest in zip(steps, busy, waited, strict=True)
    ]
    found: dict[str, Any] = {
        "steps": len(steps),
        "step_s": step_s,
        "busy_s": lanes,
        "gpu_idle_share": statistics.median(
            1.0 - row["gpu"] / step.step_s if step.step_s > 0 else 0.0
            for step, row in zip(steps, busy, strict=True)
        ),
        "stall_s": {c: statistics.median(row.get(c, 0.0) for row in stalls) for c in causes},
        "host_s": statistics.median(host),
    }
    if plan is not None and plan.predicted is not None and plan.predicted.bound_s > 0:
        found["bound_s"] = plan.predicted.bound_s
        found["bound_ratio"] = step_s / plan.predicted.bound_s
    return found


def _stall_s(step: Timeline) -> dict[str, float]:
    found: dict[str, float] = {}
    for stall in step.stalls:
        found[stall.cause] = found.get(stall.cause, 0.0) + stall.end_s - stall.start_s
    return found


__all__ = ["TRACE_SCHEMA", "Trace", "busy_s", "summary", "union_s"]
