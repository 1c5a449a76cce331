"""Perfetto traces, read back as protobuf: tracks, bars that nest, counters, what is said of an item."""

from __future__ import annotations

import builtins
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace as Protobuf
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent
from problems import MIB, activation, bucket, problem

from lohan_fx.errors import LohanError
from lohan_fx.plan import Plan, TensorRow, build_plan, build_unfit_plan
from lohan_fx.plan.timeline import Timeline
from lohan_fx.planner import Stall, TierMemory, TimeSpan, solve
from lohan_fx.view.perfetto import trace_bytes

NAME = "</script>\u00e4 1"
ROWS = (
    TensorRow(NAME, "weight16", 0, (1024, 1024), "bfloat16", 2 * MIB, bucket=0),
    TensorRow(NAME, "master32", 0, (1024, 1024), "float32", 4 * MIB, bucket=0),
    TensorRow("x", "activation", "layer0", (1024,), "bfloat16", 2 * MIB, activation=0),
)


def plan() -> Plan:
    asked = problem(2, (bucket(0, 0), bucket(1, 1)), (activation(0, 0),), gpu=8, ssd=0)
    return build_plan(
        asked,
        solve(asked, "greedy"),
        model="m",
        hardware="h",
        budget="",
        policy="greedy",
        tensors=ROWS,
    )


@dataclass
class Read:
    """What a reader of the format finds: (name, start, end, notes) by track, counts by track."""

    parents: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    bars: dict[tuple[str, str], list[tuple[str, int, int, dict[str, Any]]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    counts: dict[tuple[str, str], list[tuple[int, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    @classmethod
    def of(cls, data: bytes) -> Read:
        found, tracks, process_of, open_ = cls(), {}, {}, {}
        for packet in Protobuf.FromString(data).packet:
            assert packet.trusted_packet_sequence_id == 1
            if packet.HasField("track_descriptor"):
                track = packet.track_descriptor
                assert track.uuid not in tracks
                tracks[track.uuid] = track
                process = tracks[track.parent_uuid] if track.parent_uuid else track
                process_of[track.uuid] = process.process.process_name
                if track.parent_uuid:
                    found.parents[process.process.process_name].add(track.name)
                continue
            if not packet.HasField("track_event"):
                assert packet.sequence_flags == 1 and not tracks  # the writer begins
                continue
            event = packet.track_event
            uuid = event.track_uuid
            key = process_of[uuid], tracks[uuid].name
            if event.type == TrackEvent.TYPE_SLICE_BEGIN:
                assert uuid not in open_, "a bar begins inside of another"
                open_[uuid] = event, packet.timestamp
            elif event.type == TrackEvent.TYPE_SLICE_END:
                begun, start = open_.pop(uuid)
                assert packet.timestamp > start
                notes = {n.name: getattr(n, n.WhichOneof("value")) for n in begun.debug_annotations}
                found.bars[key].append((begun.name, start, packet.timestamp, notes))
            else:
                assert event.type == TrackEvent.TYPE_COUNTER
                assert tracks[uuid].HasField("counter")
                found.counts[key].append((packet.timestamp, event.counter_value))
        assert not open_
        return found


def test_a_plan_is_one_process_with_a_track_for_each_lane() -> None:
    made = plan()
    assert made.timeline is not None
    read = Read.of(trace_bytes(made))
    (process,) = read.parents
    assert process == "predicted: m on h"
    lanes = {span.lane for span in made.timeline.spans}
    assert lanes <= read.parents[process] and "gpu memory" in read.parents[process]
    for lane in lanes:
        spans = [span for span in made.timeline.spans if span.lane == lane]
        bars = read.bars[process, lane]
        assert [bar[0] for bar in bars] == [f"{s.what} {s.name}" for s in spans]
        assert [bar[1] for bar in bars] == [round(s.start_s * 1e9) for s in spans]
        assert sum(bar[2] - bar[1] for bar in bars) == pytest.approx(
            sum(s.end_s - s.start_s for s in spans) * 1e9, abs=len(spans)
        )
    memory = made.timeline.memory["gpu"]
    counts = read.counts[process, "gpu memory"]
    assert max(value for _, value in counts) == memory.peak_bytes
    assert counts[0] == (0, memory.total[0])
    by_class = {cls: max(row) for cls, row in memory.bytes_by_class.items() if any(row)}
    for cls, most in by_class.items():
        assert max(value for _, value in read.counts[process, f"gpu {cls}"]) == most


def span(lane: str, start: float, end: float, kind: str = "bucket") -> TimeSpan:
    what = {"bucket": "fetch", "activation": "reload"}[kind]
    return TimeSpan(lane, what, kind, 0, NAME, "forward", start, end)


def test_a_run_is_a_second_process_with_its_steps_one_after_the_other() -> None:
    memory = {"gpu": TierMemory((0.0, 1.0), {"weights": (5, 7)})}
    stall = Stall(0.5, 1.0, "h2d", "activation", 0, "x")
    # The second begins within the first by less than rounding.
    spans = (span("h2d", 0.0, 1.0 + 4e-10), span("h2d", 1.0, 2.0, "activation"))
    step = Timeline(2.5, spans, (stall,), memory)
    read = Read.of(trace_bytes(plan(), (step, replace(step, step_s=2.0)), "an H100"))
    assert list(read.parents) == ["predicted: m on h", "measured: m on an H100"]
    measured = "measured: m on an H100"
    assert [(name, start, end) for name, start, end, _ in read.bars[measured, "steps"]] == [
        ("step 0", 0, 2_500_000_000),
        ("step 1", 2_500_000_000, 4_500_000_000),
    ]
    bars = read.bars[measured, "h2d"]
    assert [bar[1] for bar in bars] == [0, 1_000_000_000, 2_500_000_000, 3_500_000_000]
    name, _, _, notes = bars[0]
    assert name == f"fetch {NAME}"
    assert notes["tensors"] == NAME and notes["weight16 bytes"] == 2 * MIB
    assert notes["master32 bytes"] == 4 * MIB and notes["pass"] == "forward"
    assert notes["reason"] == plan().tensors[0].reason
    assert bars[1][3]["activation bytes"] == 2 * MIB
    ((first, start, end, waits), _) = read.bars[measured, "GPU waits"]
    assert (first, start, end) == ("h2d: x", 500_000_000, 1_000_000_000)
    assert waits["waits for"] == "h2d"
    # A counter holds until it changes.
    assert read.counts[measured, "gpu memory"] == [
        (0, 5),
        (1_000_000_000, 7),
        (2_500_000_000, 5),
        (3_500_000_000, 7),
    ]


def test_the_same_plan_is_the_same_bytes() -> None:
    assert trace_bytes(plan()) == trace_bytes(plan())


def test_what_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem(1, (bucket(0, 0),), gpu=8, ssd=0)
    unfit = build_unfit_plan(asked, "", model="m", hardware="h", budget="", policy="greedy")
    with pytest.raises(LohanError, match="no timeline"):
        trace_bytes(unfit)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("perfetto"):
            raise ImportError("No module named 'perfetto'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LohanError, match="pip install perfetto"):
        trace_bytes(plan())
