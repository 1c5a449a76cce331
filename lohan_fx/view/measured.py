"""Where a measured step and the plan that it followed disagree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from lohan_fx.plan import Timeline
from lohan_fx.tracing import busy_s

_MOST_ITEMS = 20


def disagreements(predicted: Timeline, measured: Timeline) -> dict[str, Any]:
    """Seconds predicted and measured: of the step, by lane, by kind of work, and by item.

    Work is [lane, what, predicted, measured], items are [lane, what, kind, index, name, predicted,
    measured]; both by the size of the difference, largest first, the items at most 20.
    """
    here, there = busy_s(predicted), busy_s(measured)
    lanes = [[lane, here[lane], there[lane]] for lane in here if here[lane] or there[lane]]
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
