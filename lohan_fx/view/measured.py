"""A measured run over the plan it followed: the last step's timeline, and where the two disagree."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lohan_fx.errors import LohanError, PlanMismatch
from lohan_fx.plan import Plan, Timeline, validate_timeline
from lohan_fx.plan.timeline import LANES

from .timeline import busy_seconds

TRACE_SCHEMA = 1
_MOST_ITEMS = 20


@dataclass(frozen=True, slots=True)
class MeasuredTrace:
    """What a run recorded: one timeline per training step, in order, of the plan `fingerprint`."""

    model: str
    fingerprint: str
    device: str
    steps: tuple[Timeline, ...]

    @classmethod
    def from_json(cls, text: str) -> MeasuredTrace:
        """The trace that a run wrote. Raises LohanError for anything else."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as exc:
            raise LohanError(f"this trace is not JSON: {exc}") from exc
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if type(schema) is not int or schema != TRACE_SCHEMA:
            raise LohanError(
                f"this trace has schema {schema!r}, this version reads {TRACE_SCHEMA}; record it again"
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
        return cls(raw["model"], raw["fingerprint"], raw["device"], tuple(steps))

    def check_matches(self, plan: Plan) -> None:
        """Raise PlanMismatch unless the run followed a plan of the same graph."""
        if self.fingerprint != plan.fingerprint:
            raise PlanMismatch(
                f"the trace is of a run of {self.model} over another graph than the plan's "
                f"({plan.model}); give the plan that the run followed, or show it anyway with "
                "--any-plan"
            )


def disagreements(predicted: Timeline, measured: Timeline) -> dict[str, Any]:
    """Seconds predicted and measured: of the step, by lane, by kind of work, and by item.

    Work is [lane, what, predicted, measured], items are [lane, what, kind, index, name, predicted,
    measured]; both by the size of the difference, largest first, the items at most 20.
    """
    here, there = busy_seconds(predicted), busy_seconds(measured)
    lanes = [[lane, here[lane], there[lane]] for lane in LANES if here[lane] or there[lane]]
    # A trace that does not say what the GPU waits for is not one without waiting.
    waits = _paired(_waits(predicted), _waits(measured)) if measured.stalls else []
    work = _paired(_work(predicted), _work(measured))
    items = _paired(_items(predicted), _items(measured))
    return {
        "step": [predicted.step_s, measured.step_s],
        "lanes": _largest_first(lanes),
        "waits": _largest_first(waits),
        "work": _largest_first(work),
        "items": _largest_first(items)[:_MOST_ITEMS],
    }


def _waits(timeline: Timeline) -> Iterator[tuple[tuple[Any, ...], float]]:
    for stall in timeline.stalls:
        yield (stall.cause,), stall.end_s - stall.start_s


def _work(timeline: Timeline) -> Iterator[tuple[tuple[Any, ...], float]]:
    for span in timeline.spans:
        yield (span.lane, span.what), span.end_s - span.start_s


def _items(timeline: Timeline) -> Iterator[tuple[tuple[Any, ...], float]]:
    for span in timeline.spans:
        key = (span.lane, span.what, span.kind, span.index, span.name)
        yield key, span.end_s - span.start_s


def _paired(
    predicted: Iterator[tuple[tuple[Any, ...], float]],
    measured: Iterator[tuple[tuple[Any, ...], float]],
) -> list[list[Any]]:
    sums: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for side, rows in enumerate((predicted, measured)):
        for key, seconds in rows:
            sums[key][side] += seconds
    return [[*key, *seconds] for key, seconds in sums.items()]


def _largest_first(rows: list[list[Any]]) -> list[list[Any]]:
    """Rows that end in (predicted, measured), seconds rounded as they are written."""
    ordered = sorted(rows, key=lambda row: (-abs(row[-1] - row[-2]), str(row[:-2])))
    return [[*row[:-2], *(float(f"{s:.6g}") for s in row[-2:])] for row in ordered]
