"""What lies on the GPU, or in DRAM, at one moment of a placement: for explanations."""

from __future__ import annotations

from dataclasses import dataclass

from lohan_fx.planner.ledger import Ledger, activation_spans, bucket_spans
from lohan_fx.planner.problem import Place
from lohan_fx.planner.solution import Windows
from lohan_fx.planner.traffic import spare_bytes


@dataclass(frozen=True, slots=True)
class Occupant:
    """Something that takes bytes. `cls`: parameters, activation, workspace, window or fixed."""

    name: str
    cls: str
    bytes: int


def gpu_occupants(ledger: Ledger, windows: Windows, position: int) -> tuple[Occupant, ...]:
    """All that is on the GPU at a position, largest first; together what `Ledger.gpu_bytes` says."""
    problem = ledger.problem
    num_stages = problem.num_stages
    found: list[Occupant] = []
    for bucket, place in zip(problem.buckets, ledger.buckets, strict=True):
        spans = bucket_spans(problem, bucket, place)
        found.append(Occupant(bucket.name, "parameters", _at(spans, position)))
    for activation, kept in zip(problem.activations, ledger.activations, strict=True):
        interval = ledger.intervals[activation.index]
        spans = activation_spans(problem, activation, kept, interval)
        found.append(Occupant(activation.name, "activation", _at(spans, position)))
    if position < 2 * num_stages:
        forward = position < num_stages
        stage = problem.stages[position if forward else 2 * num_stages - 1 - position]
        size = stage.forward_workspace_bytes if forward else stage.backward_workspace_bytes
        word = "forward" if forward else "backward"
        found.append(Occupant(f"temporaries of the {word} of {stage.name}", "workspace", size))
    found.append(Occupant("inputs, buffers and results", "fixed", problem.fixed_gpu_bytes))
    found.append(Occupant("optimizer states on their way through", "window", windows.stream_bytes))
    found.append(Occupant("allocator's margin", "fixed", problem.gpu_margin_bytes))
    total = int(ledger.gpu_bytes(windows)[position])
    rest = total - sum(o.bytes for o in found)
    found.append(Occupant("copies and gradients on their way", "window", rest))
    return _largest_first(found)


def dram_occupants(ledger: Ledger, windows: Windows) -> tuple[Occupant, ...]:
    """All that is in DRAM, which is allocated before the first step; largest first."""
    weights = states = spares = 0
    for bucket, place in zip(ledger.problem.buckets, ledger.buckets, strict=True):
        spares += spare_bytes(ledger.problem, bucket, place)
        weights += bucket.weight_bytes if place.weight is Place.DRAM else 0
        states += bucket.state_bytes if place.state is Place.DRAM else 0
    activations = sum(
        a.bytes
        for a, place in zip(ledger.problem.activations, ledger.activations, strict=True)
        if place is Place.DRAM
    )
    found = [
        Occupant("weights", "parameters", weights),
        Occupant("optimizer states", "parameters", states),
        Occupant("second copies, for updates that step() may drop", "parameters", spares),
        Occupant("swapped activations", "activation", activations),
        Occupant("buffers between SSD and GPU", "window", windows.inbound_bytes),
        Occupant("buffers between GPU and SSD", "window", windows.outbound_bytes),
    ]
    rest = ledger.dram_bytes(windows) - sum(o.bytes for o in found)
    found.append(Occupant("buffers of gradients and of states being updated", "window", rest))
    return _largest_first(found)


def _at(spans: list[tuple[int, int, int]], position: int) -> int:
    return sum(size for start, end, size in spans if start <= position < end)


def _largest_first(found: list[Occupant]) -> tuple[Occupant, ...]:
    return tuple(sorted((o for o in found if o.bytes > 0), key=lambda o: -o.bytes))
