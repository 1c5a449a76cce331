"""The graph of stages: what each holds and where, and what one hands to another.

Stages are a line by construction, each a slice of forward and of the backward that undoes it, so a
stage's number is its column. What bends are links: values that skip stages, weights that several read.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

from lohan_fx.plan import Plan

PLACES = ("gpu", "dram", "ssd", "recompute")
# Rows of a stage, and the classes of tensors that each holds.
_GROUPS = {
    "weights": ("weight16",),
    "states": ("master32", "moments32"),
    "activations": ("activation",),
}
_COMPUTE = ("forward", "recompute", "backward")


def stage_graph(plan: Plan) -> dict[str, Any]:
    """Per stage: bytes by group and place, and seconds of forward, recompute and backward.

    `links` are (stage, later stage, "value" or "weights", bytes): activations that a stage which is
    not the next one reads in forward, and buckets that several stages read.
    """
    names = _names(plan)
    column = {name: index for index, name in enumerate(names)}
    held = {group: [[0] * len(PLACES) for _ in names] for group in _GROUPS}
    group_of = {cls: group for group, classes in _GROUPS.items() for cls in classes}
    for tensor in plan.tensors:
        group, stage = group_of.get(tensor.cls), column.get(str(tensor.layer))
        if group is not None and stage is not None:
            held[group][stage][PLACES.index(tensor.placement)] += tensor.bytes
    return {
        "names": names,
        "places": list(PLACES),
        "held": held,
        "seconds": _seconds(plan, len(names)),
        "links": _links(plan, len(names)),
    }


def _names(plan: Plan) -> list[str]:
    """Stage names in order; from the timeline and layers where the graph does not have them."""
    if plan.graph.stages:
        return list(plan.graph.stages)
    names = [f"stage {index}" for index in range(plan.graph.num_stages)]
    for span in plan.timeline.spans if plan.timeline is not None else ():
        if span.kind == "stage" and span.index < len(names):
            names[span.index] = span.name
    return names


def _seconds(plan: Plan, num_stages: int) -> list[list[float]]:
    found = [[0.0] * len(_COMPUTE) for _ in range(num_stages)]
    for span in plan.timeline.spans if plan.timeline is not None else ():
        if span.kind == "stage" and span.what in _COMPUTE and span.index < num_stages:
            found[span.index][_COMPUTE.index(span.what)] += span.end_s - span.start_s
    return [[float(f"{seconds:.6g}") for seconds in row] for row in found]


def _links(plan: Plan, num_stages: int) -> list[list[Any]]:
    graph = plan.graph
    values: dict[tuple[int, int], int] = defaultdict(int)
    for (_, size), stages in zip(graph.activations, graph.activation_stages, strict=False):
        made, last_read = stages[0], max(stages[1], stages[2])
        if made + 1 < last_read < num_stages:
            values[made, last_read] += size
    shared: dict[tuple[int, int], int] = defaultdict(int)
    for (_, numel), readers in zip(graph.buckets, graph.bucket_stages, strict=False):
        for first, then in itertools.pairwise(readers):
            if then < num_stages:
                shared[first, then] += numel
    return [
        *([*ends, "value", size] for ends, size in sorted(values.items())),
        *([*ends, "weights", size] for ends, size in sorted(shared.items())),
    ]
