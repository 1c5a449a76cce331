"""A simulated step in a plan: what runs when, what the GPU waits for, memory over time.

In JSON everything is in rows of numbers that point into tables of names, so that the timeline of a
hundred layers is a few hundred kilobytes. Seconds count from the start of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lohan_fx.planner import Simulation, Stall, TierMemory, TimeSpan

LANES = ("gpu", "h2d", "d2h", "ssd_read", "ssd_write", "cpu_adam", "dram")
PASSES = ("forward", "backward", "update")
# Seconds keep so many significant digits: a nanosecond of a step of a few seconds.
_DIGITS = 9


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.{_DIGITS}g}")


@dataclass(frozen=True, slots=True)
class Timeline:
    """One steady step, as in planner.Simulation, with seconds rounded as they are written."""

    step_s: float
    spans: tuple[TimeSpan, ...]
    stalls: tuple[Stall, ...]
    memory: Mapping[str, TierMemory]

    @classmethod
    def of(cls, simulation: Simulation) -> Timeline:
        return cls(
            _rounded(simulation.step_s),
            tuple(
                TimeSpan(
                    s.lane,
                    s.what,
                    s.kind,
                    s.index,
                    s.name,
                    s.in_pass,
                    _rounded(s.start_s),
                    _rounded(s.end_s),
                )
                for s in simulation.spans
            ),
            tuple(
                Stall(_rounded(s.start_s), _rounded(s.end_s), s.cause, s.kind, s.index, s.name)
                for s in simulation.stalls
            ),
            {
                tier: TierMemory(tuple(map(_rounded, curve.times_s)), curve.bytes_by_class)
                for tier, curve in simulation.memory.items()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON as plain dicts and lists."""
        items: dict[tuple[str, int, str], int] = {}
        whats: dict[str, int] = {}

        def item(row: TimeSpan | Stall) -> int:
            return items.setdefault((row.kind, row.index, row.name), len(items))

        spans = [
            [
                LANES.index(s.lane),
                whats.setdefault(s.what, len(whats)),
                item(s),
                PASSES.index(s.in_pass),
                s.start_s,
                s.end_s,
            ]
            for s in self.spans
        ]
        stalls = [[LANES.index(s.cause), item(s), s.start_s, s.end_s] for s in self.stalls]
        return {
            "step_s": self.step_s,
            "lanes": list(LANES),
            "passes": list(PASSES),
            "whats": list(whats),
            "items": [list(row) for row in items],
            "spans": spans,
            "stalls": stalls,
            "memory": {
                tier: {
                    "times_s": list(curve.times_s),
                    "bytes": {cls: list(row) for cls, row in curve.bytes_by_class.items()},
                }
                for tier, curve in self.memory.items()
            },
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Timeline:
        """The timeline that `to_dict` wrote. Raises IndexError where a row points past its table."""
        lanes, passes, whats, items = raw["lanes"], raw["passes"], raw["whats"], raw["items"]
        spans = tuple(
            TimeSpan(lanes[lane], whats[what], kind, index, name, passes[in_pass], start_s, end_s)
            for lane, what, item, in_pass, start_s, end_s in raw["spans"]
            for kind, index, name in (items[item],)
        )
        stalls = tuple(
            Stall(start_s, end_s, lanes[lane], *items[item])
            for lane, item, start_s, end_s in raw["stalls"]
        )
        memory = {
            tier: TierMemory(
                tuple(curve["times_s"]), {cls: tuple(row) for cls, row in curve["bytes"].items()}
            )
            for tier, curve in raw["memory"].items()
        }
        return cls(raw["step_s"], spans, stalls, memory)
