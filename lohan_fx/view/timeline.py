"""A timeline as the page reads it: columns of numbers, sorted by lane and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lohan_fx.plan import Timeline
from lohan_fx.plan.timeline import LANES, PASSES

# Item of a plan -> its row in the page's table of items.
ItemRows = dict[tuple[str, int], int]


def timeline_data(timeline: Timeline, items: ItemRows, names: list[list[Any]]) -> dict[str, Any]:
    """Columns of spans and stalls. Items that are not in `items` are added, and to `names`."""

    def item(kind: str, index: int, name: str) -> int:
        row = items.setdefault((kind, index), len(items))
        if row == len(names):
            names.append([kind, index, name])
        return row

    whats: dict[str, int] = {}
    spans = sorted(timeline.spans, key=lambda s: (LANES.index(s.lane), s.start_s, s.end_s))
    return {
        "step_s": timeline.step_s,
        "spans": {
            "lane": [LANES.index(s.lane) for s in spans],
            "what": [whats.setdefault(s.what, len(whats)) for s in spans],
            "item": [item(s.kind, s.index, s.name) for s in spans],
            "pass": [PASSES.index(s.in_pass) for s in spans],
            "start_s": [s.start_s for s in spans],
            "end_s": [s.end_s for s in spans],
        },
        "stalls": {
            "lane": [LANES.index(s.cause) for s in timeline.stalls],
            "item": [item(s.kind, s.index, s.name) for s in timeline.stalls],
            "start_s": [s.start_s for s in timeline.stalls],
            "end_s": [s.end_s for s in timeline.stalls],
        },
        "whats": list(whats),
        "memory": {tier: _curve(curve) for tier, curve in timeline.memory.items()},
    }


def _curve(curve: Any) -> dict[str, Any]:
    """One tier's curve, without classes that hold nothing."""
    held: Mapping[str, Any] = curve.bytes_by_class
    return {
        "times_s": list(curve.times_s),
        "bytes": {cls: list(row) for cls, row in held.items() if any(row)},
    }
