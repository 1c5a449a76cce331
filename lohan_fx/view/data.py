"""A plan as the page reads it: columns of numbers that point into tables of strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lohan_fx.plan import Plan, PlanTensor

from .stages import stage_graph
from .timeline import ItemRows, timeline_data


def plan_data(plan: Plan, label: str) -> dict[str, Any]:
    """Everything about one plan; see `assets/script/model.js`, which reads it."""
    names: list[list[Any]] = []
    items = _items(plan, names)
    predicted = None
    if plan.predicted is not None:
        predicted = dataclasses.asdict(plan.predicted) | dataclasses.asdict(plan.throughput)
    timeline = None
    if plan.timeline is not None:
        timeline = timeline_data(plan.timeline, items, names)
    return {
        "label": label,
        "model": plan.model,
        "hardware": plan.hardware,
        "budget": dataclasses.asdict(plan.budget),
        "policy": plan.policy,
        "overlap": plan.overlap,
        "traced_on": plan.traced_on,
        "seconds_from": plan.seconds_from,
        "num_params": plan.num_params,
        "fits": plan.fits,
        "reasons": list(plan.reasons),
        "predicted": predicted,
        "measured": None if plan.measured is None else dict(plan.measured),
        "optimality": None if plan.optimality is None else dataclasses.asdict(plan.optimality),
        "fingerprint": plan.fingerprint,
        "tensors": _tensors(plan.tensors, items),
        "items": names,
        "item_notes": _notes(plan, names),
        "timeline": timeline,
        "stages": stage_graph(plan),
    }


def _items(plan: Plan, names: list[list[Any]]) -> ItemRows:
    """Rows of the buckets, activations and stages that the plan's graph names."""
    items: ItemRows = {}
    graph = plan.graph
    for kind, rows in (
        ("bucket", [name for name, _ in graph.buckets]),
        ("activation", [name for name, _ in graph.activations]),
        ("stage", list(graph.stages)),
    ):
        for index, name in enumerate(rows):
            items[kind, index] = len(names)
            names.append([kind, index, name])
    return items


def _notes(plan: Plan, names: Sequence[Sequence[Any]]) -> list[str]:
    """Why each item is where it is, in words; empty for stages."""
    if plan.solution is None:
        return ["" for _ in names]
    solution = plan.solution
    reasons = {"bucket": solution.bucket_reasons, "activation": solution.activation_reasons}
    notes = []
    for kind, index, _ in names:
        words = reasons.get(kind, ())
        notes.append(words[index] if index < len(words) else "")
    return notes


def _tensors(tensors: Iterable[PlanTensor], items: ItemRows) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {key: [] for key in ("bytes", "recompute_s", "item", *_WORDS)}
    tables: dict[str, dict[str, int]] = {key: {} for key in _WORDS}
    for tensor in tensors:
        for key, words in _WORDS.items():
            columns[key].append(tables[key].setdefault(words(tensor), len(tables[key])))
        columns["bytes"].append(tensor.bytes)
        columns["recompute_s"].append(tensor.recompute_s)
        kind, index = ("bucket", tensor.bucket)
        if index is None:
            kind, index = "activation", tensor.activation
        columns["item"].append(-1 if index is None else items.get((kind, index), -1))
    return {"columns": columns, "tables": {key: list(table) for key, table in tables.items()}}


def _shape(tensor: PlanTensor) -> str:
    return " x ".join(map(str, tensor.shape)) if tensor.shape else "scalar"


# Columns of words: the word of a tensor. Each is kept once, in a table.
_WORDS: dict[str, Callable[[PlanTensor], str]] = {
    "name": lambda t: t.name,
    "layer": lambda t: "" if t.layer is None else str(t.layer),
    "class": lambda t: t.cls,
    "shape": _shape,
    "dtype": lambda t: t.dtype,
    "placement": lambda t: t.placement,
    "reason": lambda t: t.reason,
}


def labels(plans: Sequence[tuple[str, Plan]]) -> list[str]:
    """A short name for each of (file name, plan): what of the plans differs, else the file's name."""
    rows = [
        (plan.model, plan.hardware, plan.policy, plan.overlap, plan.budget.text)
        for _, plan in plans
    ]
    differing = [k for k in range(len(rows[0])) if len({row[k] for row in rows}) > 1]
    found = [", ".join(row[k] for k in differing) for row in rows]
    if len(plans) == 1 or len(set(found)) < len(found):
        return [name for name, _ in plans]
    return found
