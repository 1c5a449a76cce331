"""A plan, and a run beside it, as a trace for https://ui.perfetto.dev and trace_processor.

Predicted and measured are two processes, each with a track for each lane, one for what the GPU waits for,
and counters of the bytes in each tier, in all and by class. The format is Perfetto's own (TrackEvent in
protobuf). Predicted is one step, measured are all that were recorded, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lohan_fx.errors import LohanError
from lohan_fx.plan import Plan
from lohan_fx.plan.timeline import LANES, Timeline
from lohan_fx.planner import Stall, TierMemory, TimeSpan
from lohan_fx.planner.simulate import MEMORY_CLASSES

_SEQUENCE = 1  # every packet is of one writer
_TIERS = ("gpu", "dram", "ssd")


class Slice(NamedTuple):
    """One bar: half-open [start, end) in nanoseconds from the start of the trace."""

    start_ns: int
    end_ns: int
    name: str
    category: str
    about: Mapping[str, str | int | float]


def trace_bytes(plan: Plan, measured: Sequence[Timeline] = (), device: str = "") -> bytes:
    """The trace as a file's contents.

    Args:
        measured: timelines of the steps of a run that followed the plan, in order.
        device: where it ran, for the track's title.

    Raises:
        LohanError: the plan holds no timeline and nothing was measured, or the perfetto package is
            missing.
    """
    if plan.timeline is None and not measured:
        raise LohanError("this plan fits nothing, so it has no timeline to write")
    writer = _Writer(_Items(plan))
    if plan.timeline is not None:
        writer.process(f"predicted: {plan.model} on {plan.hardware}", (plan.timeline,))
    if measured:
        writer.process(f"measured: {plan.model} on {device or plan.hardware}", measured)
    return writer.serialized()


class _Items:
    """Bytes of items, and in words why they are where they are."""

    def __init__(self, plan: Plan) -> None:
        self._bytes: dict[tuple[str, int], dict[str, int]] = {}
        self._reasons: dict[tuple[str, int], str] = {}
        self._tensors: dict[tuple[str, int], list[str]] = {}
        for tensor in plan.tensors:
            for kind, index in (("bucket", tensor.bucket), ("activation", tensor.activation)):
                if index is None:
                    continue
                key = kind, index
                sizes = self._bytes.setdefault(key, {})
                sizes[tensor.cls] = sizes.get(tensor.cls, 0) + tensor.bytes
                self._reasons.setdefault(key, tensor.reason)
                names = self._tensors.setdefault(key, [])
                if tensor.name not in names:
                    names.append(tensor.name)

    def about(self, row: TimeSpan | Stall) -> dict[str, str | int | float]:
        key = row.kind, row.index
        found: dict[str, str | int | float] = {"kind": row.kind, "index": row.index}
        found |= {f"{cls} bytes": size for cls, size in self._bytes.get(key, {}).items()}
        if key in self._reasons:
            names = self._tensors[key]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found["tensors"] = ", ".join(names[:3]) + more
            found["reason"] = self._reasons[key]
        return found


class _Writer:
    def __init__(self, items: _Items) -> None:
        try:
            from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos
        except ImportError as error:
            raise LohanError(
                f"writing Perfetto traces needs a package that is missing ({error}); "
                "pip install perfetto"
            ) from error
        self._items = items
        self._event = protos.TrackEvent
        self._descriptor = protos.TrackDescriptor
        self._counter = protos.CounterDescriptor
        self._trace = protos.Trace()
        # Some readers skip events of a writer that has not said where it begins.
        self._packet().sequence_flags = protos.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        self._num_tracks = 0
        self._num_processes = 0

    def serialized(self) -> bytes:
        data: bytes = self._trace.SerializeToString(deterministic=True)
        return data

    def process(self, title: str, steps: Sequence[Timeline]) -> None:
        """One process, with the steps one after the other on its tracks."""
        self._num_processes += 1
        process = self._track()
        process.process.pid = self._num_processes
        process.process.process_name = title
        process.child_ordering = self._descriptor.ChildTracksOrdering.EXPLICIT
        starts = [0.0]
        for step in steps:
            starts.append(starts[-1] + step.step_s)
        rows = list(zip(starts, steps, strict=False))
        self._slices(self._child(process, "steps", 0), self._steps(rows))
        for rank, lane in enumerate(LANES, start=1):
            found = list(self._spans(rows, lane))
            if found:
                self._slices(self._child(process, lane, rank), found)
        waits = list(self._stalls(rows))
        if waits:
            self._slices(self._child(process, "GPU waits", len(LANES) + 1), waits)
        for number, tier in enumerate(_TIERS):
            self._memory(process, tier, rows, 100 * (number + 1))  # below the lanes

    def _track(self) -> Any:
        self._num_tracks += 1
        packet = self._packet()
        packet.track_descriptor.uuid = self._num_tracks
        return packet.track_descriptor

    def _child(self, parent: Any, name: str, rank: int) -> Any:
        track = self._track()
        track.parent_uuid = parent.uuid
        track.name = name
        track.sibling_order_rank = rank
        return track

    def _packet(self) -> Any:
        packet = self._trace.packet.add()
        packet.trusted_packet_sequence_id = _SEQUENCE
        return packet

    # Bars

    @staticmethod
    def _steps(rows: Sequence[tuple[float, Timeline]]) -> Iterator[Slice]:
        for number, (origin, step) in enumerate(rows):
            start, end = _ns(origin), _ns(origin + step.step_s)
            yield Slice(start, end, f"step {number}", "step", {"seconds": step.step_s})

    def _spans(self, rows: Sequence[tuple[float, Timeline]], lane: str) -> Iterator[Slice]:
        for origin, step in rows:
            for span in step.spans:
                if span.lane == lane:
                    start, end = _ns(origin + span.start_s), _ns(origin + span.end_s)
                    about = {"pass": span.in_pass, **self._items.about(span)}
                    yield Slice(start, end, f"{span.what} {span.name}", span.in_pass, about)

    def _stalls(self, rows: Sequence[tuple[float, Timeline]]) -> Iterator[Slice]:
        for origin, step in rows:
            for stall in step.stalls:
                start, end = _ns(origin + stall.start_s), _ns(origin + stall.end_s)
                about = {"waits for": stall.cause, **self._items.about(stall)}
                yield Slice(start, end, f"{stall.cause}: {stall.name}", "stall", about)

    def _slices(self, track: Any, slices: Iterable[Slice]) -> None:
        """Bars that follow each other; what rounding makes overlap is cut."""
        free_ns = 0
        for row in sorted(slices, key=lambda row: row.start_ns):
            start, end = max(row.start_ns, free_ns), row.end_ns
            if end <= start:
                continue
            free_ns = end
            event = self._at(start, track, self._event.TYPE_SLICE_BEGIN)
            event.name = row.name
            event.categories.append(row.category)
            for key, value in row.about.items():
                note = event.debug_annotations.add()
                note.name = key
                if isinstance(value, str):
                    note.string_value = value
                elif isinstance(value, int):
                    note.int_value = value
                else:
                    note.double_value = value
            self._at(end, track, self._event.TYPE_SLICE_END)

    def _at(self, ns: int, track: Any, kind: Any) -> Any:
        packet = self._packet()
        packet.timestamp = ns
        packet.track_event.type = kind
        packet.track_event.track_uuid = track.uuid
        return packet.track_event

    # Memory

    def _memory(
        self, process: Any, tier: str, rows: Sequence[tuple[float, Timeline]], rank: int
    ) -> None:
        curves = [(o, step.memory[tier]) for o, step in rows if tier in step.memory]
        if not any(curve.peak_bytes for _, curve in curves):
            return
        total = self._count_track(process, f"{tier} memory", rank)
        self._counts(total, [(origin, c.times_s, c.total) for origin, c in curves])
        for number, cls in enumerate(_classes([curve for _, curve in curves]), start=1):
            track = self._count_track(process, f"{tier} {cls}", rank + number)
            self._counts(
                track,
                [
                    (origin, c.times_s, c.bytes_by_class.get(cls, (0,) * len(c.times_s)))
                    for origin, c in curves
                ],
            )

    def _count_track(self, parent: Any, name: str, rank: int) -> Any:
        track = self._child(parent, name, rank)
        track.counter.unit = self._counter.UNIT_SIZE_BYTES
        return track

    def _counts(
        self, track: Any, rows: Iterable[tuple[float, Sequence[float], Sequence[int]]]
    ) -> None:
        last = None
        for origin, times, values in rows:
            for at, value in zip(times, values, strict=True):
                if value != last:
                    last = value
                    event = self._at(_ns(origin + at), track, self._event.TYPE_COUNTER)
                    event.counter_value = value


def _classes(curves: Sequence[TierMemory]) -> list[str]:
    """Classes of memory that are ever in use."""
    return [
        cls for cls in MEMORY_CLASSES if any(any(c.bytes_by_class.get(cls, ())) for c in curves)
    ]


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
