"""Timelines of recorded steps, in the terms of a plan's: the same lanes, items and classes of memory.

A step's window goes from the beginning of its first forward to that of the next step's, on the compute
stream; the last one's to the end of the recording. Work that crosses a border is cut there.

Where the measured differs from the simulated by nature: recomputation is part of "backward", since it
is fused with it; gradients leave one by one, not by bucket; sums of several backwards are "sum". On the
GPU a span is one region (or several without a gap), so that gaps between launches inside of one count as
busy. A stall is compute at rest while something was waited for; the rest of what the lane is not busy is
the host's own time, small kernels between regions (norms of gradients), and the user's code between
passes.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from lohan_fx.plan.timeline import Timeline
from lohan_fx.planner import Stall, TierMemory, TimeSpan
from lohan_fx.planner.simulate import MEMORY_CLASSES
from lohan_fx.program import Names

from .recorder import Begin, Point, Recorder

# Spans of one item with less than this in between are one; waits shorter than it are none.
_LEAST_S = 5e-6

_KINDS = {"forward": "stage", "backward": "stage", "reload": "activation", "offload": "activation"}
# What the file engine is told of an optimizer job's arrays: the bucket and one of these.
_STATE_SUFFIXES = (" master weights", " exp_avg", " exp_avg_sq", " 16-bit weights")

Item = tuple[str, int, str]


def timelines(recorder: Recorder, names: Mapping[int, Names]) -> list[Timeline]:
    """One timeline for each training step that began while recording.

    Waits for the device. `names` are those of the programs that ran, by their index.
    """
    return _Assembly(recorder, names, recorder.seconds()).timelines()


class _Assembly:
    def __init__(
        self, recorder: Recorder, names: Mapping[int, Names], seconds: Callable[[Point], float]
    ) -> None:
        self._recorder = recorder
        self._names = names
        self._seconds = seconds
        self._begins = recorder.begins
        self._begin_s = [begin.host_s for begin in self._begins]
        self._engine_items = {program: _engine_items(row) for program, row in names.items()}
        self._buckets = {
            name: index for row in names.values() for index, name in enumerate(row.buckets)
        }

    def timelines(self) -> list[Timeline]:
        opening = [begin for begin in self._begins if begin.opens_step]
        borders = [self._seconds(begin.point) for begin in opening]
        if not borders:
            return []
        assert self._recorder.closed is not None
        borders.append(max(self._seconds(self._recorder.closed), borders[-1]))
        worked = _joined(_one_by_one(self._worked()))
        spans = [*worked, *self._optimizer(), *_joined(self._files())]
        stalls = self._stalls(spans)
        held = [(self._seconds(note.point), note.by_class) for note in self._recorder.held]
        span_rows: list[list[TimeSpan]] = [[] for _ in opening]
        for span in spans:
            for step, start, end in _windows(borders, span.start_s, span.end_s):
                span_rows[step].append(replace(span, start_s=start, end_s=end))
        stall_rows: list[list[Stall]] = [[] for _ in opening]
        for stall in stalls:
            for step, start, end in _windows(borders, stall.start_s, stall.end_s):
                stall_rows[step].append(replace(stall, start_s=start, end_s=end))
        return [
            Timeline(
                step_s=round(borders[step + 1] - borders[step], 9),
                spans=tuple(sorted(span_rows[step], key=lambda s: (s.lane, s.start_s))),
                stalls=tuple(sorted(stall_rows[step], key=lambda s: s.start_s)),
                memory=self._memory(begin, held, borders[step], borders[step + 1]),
            )
            for step, begin in enumerate(opening)
        ]

    # What was worked on

    def _item(self, program: int, what: str, index: int) -> Item:
        names = self._names.get(program, Names())
        kind = _KINDS.get(what, "bucket")
        rows = {"stage": names.stages, "bucket": names.buckets, "activation": names.activations}
        if kind == "activation" and index < len(names.slots):
            index = names.slots[index]
        row = rows[kind]
        return kind, index, row[index] if index < len(row) else str(index)

    def _worked(self) -> Iterator[TimeSpan]:
        """The GPU and the copies."""
        for work in self._recorder.works:
            item = self._item(work.program, work.what, work.number)
            start, end = self._seconds(work.start), self._seconds(work.end)
            yield TimeSpan(work.lane, work.what, *item, work.in_pass, start, end)

    def _optimizer(self) -> Iterator[TimeSpan]:
        jobs = {bucket: iter(row) for bucket, row in self._recorder.jobs.items()}
        for name, lane, start, end in self._recorder.native:
            if lane != "cpu_adam" or name not in self._buckets:
                continue
            what = next(jobs.get(name, iter(())), "adam")
            in_pass = "backward" if what == "sum" else "update"
            yield TimeSpan(lane, what, "bucket", self._buckets[name], name, in_pass, start, end)

    def _files(self) -> list[TimeSpan]:
        """Reads and writes of the SSD. Several are under way at once; each is drawn from where the one
        that ended before it did, so that together they are the time in which there was any."""
        free_s: dict[str, float] = {}
        reads: Counter[tuple[int, Item]] = Counter()
        found = []
        for name, lane, start, end in sorted(self._recorder.native, key=lambda event: event[3]):
            pass_number = bisect.bisect_right(self._begin_s, start) - 1
            if lane == "cpu_adam" or pass_number < 0:
                continue
            begin = self._begins[pass_number]
            known = self._engine_items.get(begin.program, {}).get(name)
            if known is None:
                continue  # a job of the optimizer as a whole, whose arrays are listed too
            item, of_state = known
            verb = "read" if lane == "ssd_read" else "write"
            in_pass = "update"
            if not of_state and lane == "ssd_write":
                in_pass = "forward"
            elif not of_state:
                # Both passes read ahead in the order of the program, from its begin on.
                reads[pass_number, item] += 1
                again = item[0] == "activation" or reads[pass_number, item] > 1
                in_pass = "backward" if again else "forward"
            what = f"{verb} state" if of_state else verb
            start = max(start, free_s.get(lane, start))
            free_s[lane] = end
            found.append(TimeSpan(lane, what, *item, in_pass, start, end))
        return sorted(found, key=lambda span: (span.lane, span.start_s))

    # What was waited for

    def _stalls(self, spans: Sequence[TimeSpan]) -> list[Stall]:
        of_bucket: dict[int, list[TimeSpan]] = {}
        for span in spans:
            if span.kind == "bucket" and span.in_pass != "forward" and span.lane in _JOB_LANES:
                of_bucket.setdefault(span.index, []).append(span)
        found = []
        for pause in self._recorder.pauses:
            start, end = self._seconds(pause.start), self._seconds(pause.end)
            if end - start < _LEAST_S:
                continue
            item = self._item(pause.program, "forward", 0)
            if pause.about is not None:
                item = self._item(pause.program, *pause.about)
            lane = pause.lane
            if lane == "cpu_adam":
                lane = _busiest(of_bucket.get(item[1], ()), start, end) or lane
            found.append(Stall(start, end, lane, *item))
        return found

    # Memory

    def _memory(
        self,
        begin: Begin,
        held: Sequence[tuple[float, tuple[int, ...]]],
        start_s: float,
        end_s: float,
    ) -> dict[str, TierMemory]:
        first = bisect.bisect_right(held, start_s, key=lambda note: note[0])
        last = bisect.bisect_left(held, end_s, key=lambda note: note[0])
        times: list[float] = []
        rows: list[tuple[int, ...]] = []
        for now_s, row in held[max(first - 1, 0) : last]:
            if not rows or row != rows[-1]:
                times.append(round(max(now_s - start_s, 0.0), 9))
                rows.append(row)
        if not rows:
            times, rows = [0.0], [(0,) * len(MEMORY_CLASSES)]
        times[0] = 0.0
        memory = {"gpu": _tier(times, rows)}
        memory |= {tier: _tier([0.0], [row]) for tier, row in begin.resting}
        return memory


_JOB_LANES = ("ssd_read", "ssd_write", "cpu_adam")


def _engine_items(names: Names) -> dict[str, tuple[Item, bool]]:
    """What the file engine's requests are about, by their names; True for optimizer state."""
    found: dict[str, tuple[Item, bool]] = {}
    for index, name in enumerate(names.buckets):
        item = ("bucket", index, name)
        found[f"the weights of {name}"] = item, False
        found |= {f"{name}{suffix}": (item, True) for suffix in _STATE_SUFFIXES}
    for slot, index in enumerate(names.slots):
        item = ("activation", index, names.activations[index])
        found[f"activation {names.slot_names[slot]}"] = item, False
    return found


def _one_by_one(spans: Iterable[TimeSpan]) -> Iterator[TimeSpan]:
    """Two copies of one direction may be under way at once; each is drawn from where the one that
    ended before it did, so that they do not overlap."""
    copies: dict[str, list[TimeSpan]] = {"h2d": [], "d2h": []}
    for span in spans:
        if span.lane in copies:
            copies[span.lane].append(span)
        else:
            yield span
    for row in copies.values():
        free_s = 0.0
        for span in sorted(row, key=lambda span: span.end_s):
            start = max(span.start_s, free_s)
            free_s = max(span.end_s, free_s)
            yield replace(span, start_s=start, end_s=free_s)


def _joined(spans: Iterable[TimeSpan]) -> Iterator[TimeSpan]:
    """Spans of one item that follow each other in a lane without a gap, as one."""
    open_: dict[str, TimeSpan] = {}
    for span in spans:
        last = open_.get(span.lane)
        if last is None:
            open_[span.lane] = span
            continue
        same = replace(span, start_s=0.0, end_s=0.0) == replace(last, start_s=0.0, end_s=0.0)
        if same and span.start_s - last.end_s < _LEAST_S:
            open_[span.lane] = replace(last, end_s=max(last.end_s, span.end_s))
        else:
            yield last
            open_[span.lane] = span
    yield from open_.values()


def _busiest(spans: Iterable[TimeSpan], start_s: float, end_s: float) -> str | None:
    """The lane with most of its work on an item between two times."""
    shared: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        overlap = min(span.end_s, end_s) - max(span.start_s, start_s)
        if overlap > 0:
            shared[span.lane] += overlap
    return max(shared, key=lambda lane: shared[lane], default=None)


def _windows(
    borders: Sequence[float], start_s: float, end_s: float
) -> Iterator[tuple[int, float, float]]:
    """The steps that a span lies in, with its part in each, in seconds from the step's start."""
    step = max(bisect.bisect_right(borders, start_s) - 1, 0)
    while step < len(borders) - 1 and borders[step] < end_s:
        origin = borders[step]
        start = round(max(start_s, origin) - origin, 9)
        end = round(min(end_s, borders[step + 1]) - origin, 9)
        if end > start:
            yield step, start, end
        step += 1


def _tier(times: Sequence[float], rows: Sequence[Sequence[int]]) -> TierMemory:
    return TierMemory(
        tuple(times), dict(zip(MEMORY_CLASSES, map(tuple, zip(*rows, strict=True)), strict=True))
    )
