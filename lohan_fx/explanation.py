"""Why a step fits a budget or does not, and what would change that; every number by planning again.

Where it does not fit: which tier is short, when, of what, and the cheapest changes that make it fit.
Where it does: what limits the step, and how many seconds more of each tier or a faster lane would save.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from . import hardware as machines
from .api import trace_step
from .budget import Budget
from .errors import InfeasiblePlan
from .planner import (
    Capacities,
    Forced,
    Occupant,
    Prediction,
    Problem,
    dram_occupants,
    gpu_occupants,
    least_bytes,
    solve,
    start_with_least_dram,
)
from .planner.ledger import Room
from .step import TracedStep
from .units import format_bytes

TIERS = ("gpu", "dram", "ssd")
_NAMES = {"gpu": "GPU memory", "dram": "DRAM", "ssd": "SSD"}
# What a byte costs beside one of SSD, about; it orders suggestions and nothing else.
_PRICE = {"ssd": 1, "dram": 40, "gpu": 500}
_MOST_CHANGES = 3
_MOST_TRACES = 5
_FASTER = 1.25
_GB = 10**9


@dataclass(frozen=True, slots=True)
class Shortage:
    """One tier that cannot hold the least that any plan puts there.

    `where` is a stage and pass; "" for a tier that is filled before the first step. `occupants` are
    what meets there in the plan with the least, largest first.
    """

    tier: str
    needs_bytes: int
    has_bytes: int
    where: str
    occupants: tuple[Occupant, ...]

    @property
    def short_bytes(self) -> int:
        return self.needs_bytes - self.has_bytes


@dataclass(frozen=True, slots=True)
class Change:
    """A change that makes the step fit, and the step it then takes. Planned, not estimated.

    `values` are what to set: batch, or bytes of gpu, dram and ssd.
    """

    values: Mapping[str, int]
    step_s: float

    def __str__(self) -> str:
        parts = [
            f"{name}={value if name == 'batch' else format_bytes(value)}"
            for name, value in self.values.items()
        ]
        return f"{', '.join(parts)}: a step takes {self.step_s:.4g} s"


@dataclass(frozen=True, slots=True)
class Gain:
    """Seconds of a step that something more would save; 0 where planning again found nothing."""

    what: str
    saves_s: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `explain` found. `predicted` and `gains` where it fits, the others where it does not."""

    model: str
    budget: str
    fits: bool
    predicted: Prediction | None = None
    gains: tuple[Gain, ...] = ()
    shortages: tuple[Shortage, ...] = ()
    changes: tuple[Change, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON."""
        raw = dataclasses.asdict(self)
        raw["changes"] = [{**c.values, "step_s": c.step_s} for c in self.changes]
        return raw

    def __str__(self) -> str:
        return "\n".join(self._fitting() if self.predicted is not None else self._unfit())

    def _fitting(self) -> list[str]:
        found = self.predicted
        assert found is not None
        lines = [f"{self.model} fits {self.budget}: {found.step_s:.4g} s a step."]
        busy = found.lane_busy_s.get(found.bottleneck, 0.0) / (found.step_s or 1.0)
        lines.append(f"The step is limited by {found.bottleneck}, busy for {busy:.0%} of it.")
        helps = [gain for gain in self.gains if gain.saves_s > 0]
        lines.append(
            "What more would save, in seconds a step:" if helps else "Nothing asked helps:"
        )
        lines += [f"  {gain.what:<32} {gain.saves_s:.4g} s" for gain in self.gains]
        return lines

    def _unfit(self) -> list[str]:
        lines = [f"{self.model} does not fit {self.budget}."]
        for short in self.shortages:
            when = f" in {short.where}" if short.where else ""
            lines.append(
                f"{_NAMES[short.tier]} is short of {format_bytes(short.short_bytes)}{when}: it takes "
                f"{format_bytes(short.needs_bytes)} at least, the budget has "
                f"{format_bytes(short.has_bytes)}. There meet:"
            )
            lines += [f"  {format_bytes(o.bytes):>10}  {o.name}" for o in short.occupants[:8]]
        if not self.shortages:
            lines.append("Each tier alone would do, but not all of them together.")
        lines.append(
            "It fits with:" if self.changes else "No larger tier and no smaller batch helps."
        )
        lines += [f"  {change}" for change in self.changes]
        return lines


def explain(
    model: torch.nn.Module,
    budget: str | int | Budget,
    batch: Mapping[str, Any] | Sequence[Any],
    *,
    hardware: machines.Hardware | str | None = None,
    dtype: torch.dtype | None = None,
    policy: str = "greedy",
    overlap: str = "auto",
    lowering: str = "inductor",
) -> Explanation:
    """Whether training `model` on `batch` fits a budget, and why; `model` stays as it is.

    Args:
        batch: keyword or positional arguments of the model, as for `make_plan`. A smaller batch is
            tried by cutting the first dimension of all tensors that have the most common size there.

    Raises:
        CaptureError: the step cannot be captured as one graph.
        LohanError: an argument is out of range, or the inputs are not what forward() takes.
    """

    def trace(inputs: Any) -> TracedStep:
        return trace_step(
            _on_meta(model),
            budget,
            inputs,
            hardware=hardware,
            dtype=dtype,
            overlap=overlap,
            lowering=lowering,
        )

    size = _batch_size(batch)
    retrace = None if size is None else lambda count: trace(_cut(batch, size, count))
    return explain_step(trace(batch), policy=policy, batch=size, retrace=retrace)


def explain_step(
    step: TracedStep,
    *,
    policy: str = "greedy",
    batch: int | None = None,
    retrace: Callable[[int], TracedStep] | None = None,
) -> Explanation:
    """As `explain`, for a traced step. `retrace` gives the step at a smaller batch."""
    try:
        solution = step.solve(policy)
    except InfeasiblePlan:
        changes = capacity_changes(step.problem, policy)
        if batch is not None and batch > 1 and retrace is not None:
            smaller = _smaller_batch(step, policy, batch, retrace)
            changes = [*([smaller] if smaller is not None else []), *changes]
        return Explanation(
            step.model,
            step.budget_text(),
            fits=False,
            shortages=shortages(step.problem),
            changes=tuple(changes[:_MOST_CHANGES]),
        )
    gains = _gains(step, policy, solution.predicted.step_s)
    return Explanation(step.model, step.budget_text(), True, solution.predicted, gains)


# ---- where it does not fit ----


def shortages(problem: Problem) -> tuple[Shortage, ...]:
    """The tiers that are smaller than the least they must hold, with what meets there."""
    least = least_bytes(problem)
    ledger = start_with_least_dram(problem, Forced())
    windows = ledger.windows(Room.NONE)
    found = []
    for tier in TIERS:
        has = getattr(problem.capacities, f"{tier}_bytes")
        if least[tier] <= has:
            continue
        where, occupants = "", dram_occupants(ledger, windows)
        if tier == "gpu":
            position = int(ledger.gpu_bytes(windows).argmax())
            where = _position_words(problem, position)
            occupants = gpu_occupants(ledger, windows, position)
        elif tier == "ssd":
            sizes = sum(b.state_bytes + b.weight_bytes for b in problem.buckets)
            occupants = (Occupant("weights and optimizer states", "parameters", sizes),)
        found.append(Shortage(tier, least[tier], has, where, occupants))
    return tuple(found)


def _position_words(problem: Problem, position: int) -> str:
    num_stages = problem.num_stages
    if position >= 2 * num_stages:
        return "the optimizer's turn"
    if position < num_stages:
        return f"the forward of {problem.stages[position].name}"
    return f"the backward of {problem.stages[2 * num_stages - 1 - position].name}"


def capacity_changes(problem: Problem, policy: str) -> list[Change]:
    """Sizes of single tiers that make a plan fit, cheapest first; of all short ones together where no
    single one does. Each was planned with."""
    found: list[tuple[float, Change]] = []
    for tier in TIERS:
        change = _enlarged(problem, policy, (tier,))
        if change is not None:
            more = change.values[tier] - getattr(problem.capacities, f"{tier}_bytes")
            found.append((more * _PRICE[tier], change))
    if found:
        return [change for _, change in sorted(found, key=lambda pair: pair[0])]
    least = least_bytes(problem)
    short = tuple(t for t in TIERS if least[t] > getattr(problem.capacities, f"{t}_bytes"))
    together = _enlarged(problem, policy, short or TIERS)
    return [] if together is None else [together]


def _enlarged(problem: Problem, policy: str, tiers: Sequence[str]) -> Change | None:
    """The least found for `tiers`, to about 2 %, such that a plan fits; None where nothing does."""
    least = least_bytes(problem)
    have = {tier: getattr(problem.capacities, f"{tier}_bytes") for tier in tiers}
    others = [t for t in TIERS if t not in tiers]
    short = [t for t in others if least[t] > getattr(problem.capacities, f"{t}_bytes")]
    # With more DRAM less must go to SSD; nothing else makes up for another tier.
    if short and (short != ["ssd"] or "dram" not in tiers):
        return None
    base = {tier: max(have[tier], least[tier], 1) for tier in tiers}

    def attempt(scale: float) -> Change | None:
        sizes = {tier: _round_up(int(size * scale)) for tier, size in base.items()}
        changed = {f"{tier}_bytes": size for tier, size in sizes.items()}
        capacities = dataclasses.replace(problem.capacities, **changed)
        try:
            solution = solve(dataclasses.replace(problem, capacities=capacities), policy)
        except InfeasiblePlan:
            return None
        return Change(sizes, solution.predicted.step_s)

    low, best = 1.0, attempt(1.0)
    high = 1.0
    while best is None and high < 64:
        low, high = high, high * (1.15 if high < 1.5 else 2.0)
        best = attempt(high)
    if best is None or high == 1.0:
        return best
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        change = attempt(middle)
        low, high, best = (middle, high, best) if change is None else (low, middle, change)
    return best


def _round_up(num_bytes: int) -> int:
    """The next number of three digits and zeros."""
    unit: int = 10 ** max(0, len(str(num_bytes)) - 3)
    return -(-num_bytes // unit) * unit


def _smaller_batch(
    step: TracedStep, policy: str, batch: int, retrace: Callable[[int], TracedStep]
) -> Change | None:
    """The largest batch found that fits, traced and planned; None if even one does not."""
    best: Change | None = None
    low, high = 0, batch
    excess = {batch: _excess(step.problem)}
    count = 1
    for _ in range(_MOST_TRACES):
        smaller = retrace(count)
        excess[count] = _excess(smaller.problem)
        try:
            solution = smaller.solve(policy)
        except InfeasiblePlan:
            if count == 1:
                return None
            high = count
        else:
            low, best = count, Change({"batch": count}, solution.predicted.step_s)
        if high - low <= 1:
            break
        # Needs grow about linearly with the batch.
        rise = excess[high] - excess[low]
        share = -excess[low] / rise if rise > 0 and excess[low] < 0 < excess[high] else 0.5
        count = min(max(low + int(share * (high - low)), low + 1), high - 1)
    return best


def _excess(problem: Problem) -> float:
    """How far the fullest tier is over what it has, as a share; negative where all is well."""
    least = least_bytes(problem)
    have = problem.capacities
    return max((least[t] / _at_least_one(have, t) - 1 for t in TIERS if least[t]), default=-1.0)


def _at_least_one(have: Capacities, tier: str) -> int:
    return max(int(getattr(have, f"{tier}_bytes")), 1)


# ---- where it fits ----


def _gains(step: TracedStep, policy: str, step_s: float) -> tuple[Gain, ...]:
    """Seconds saved by more of each tier and by faster lanes, most first."""
    have = step.problem.capacities
    lanes = step.problem.lanes
    asked: list[tuple[str, TracedStep]] = []
    for tier in TIERS:
        size = getattr(have, f"{tier}_bytes") + _GB
        asked.append((f"1 GB more {_NAMES[tier]}", step.with_capacity(**{tier: size})))

    def faster(*names: str, by: float = _FASTER) -> TracedStep:
        rates = {name: getattr(lanes, name) * by for name in names}
        return step.with_lanes(dataclasses.replace(lanes, **rates))

    if have.ssd_bytes:
        drives = _num_ssds(step.hardware)
        more = (drives + 1) / drives
        ssd = faster("ssd_read_bytes_per_s", "ssd_write_bytes_per_s", by=more)
        words = f"one more SSD ({drives} to {drives + 1})"
        asked.append((words, ssd.with_capacity(ssd=int(have.ssd_bytes * more))))
    percent = f"{_FASTER - 1:.0%} faster"
    asked.append((f"a GPU link {percent}", faster("h2d_bytes_per_s", "d2h_bytes_per_s")))
    adam = faster("cpu_adam_params_per_s", "cpu_adam_ahead_params_per_s")
    asked.append((f"CPU Adam {percent}", adam))
    asked.append((f"DRAM {percent}", faster("dram_bytes_per_s")))
    asked.append((f"a GPU {percent}", _with_faster_gpu(step)))
    gains = []
    for what, changed in asked:
        # The plan there is still fits, whatever a solver makes of the larger space.
        gains.append(Gain(what, max(0.0, step_s - changed.solve(policy).predicted.step_s)))
    return tuple(sorted(gains, key=lambda gain: -gain.saves_s))


def _with_faster_gpu(step: TracedStep) -> TracedStep:
    problem = step.problem
    stages = tuple(
        dataclasses.replace(s, forward_s=s.forward_s / _FASTER, backward_s=s.backward_s / _FASTER)
        for s in problem.stages
    )
    activations = tuple(
        dataclasses.replace(a, recompute_s=a.recompute_s / _FASTER) for a in problem.activations
    )
    changed = dataclasses.replace(problem, stages=stages, activations=activations)
    return dataclasses.replace(step, problem=changed)


_SSD_BYTES = 3_840 * _GB  # of one drive in the presets that have several


def _num_ssds(hardware: machines.Hardware) -> int:
    return max(1, round(hardware.ssd_bytes / _SSD_BYTES))


# ---- inputs ----


def _on_meta(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model without its parameters' values; buffers are shared."""
    known: dict[int, Any] = {}
    for parameter in model.parameters():
        known[id(parameter)] = torch.nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
    for buffer in model.buffers():
        known[id(buffer)] = buffer
    return copy.deepcopy(model, known)


def _tensors(inputs: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.dim()]


def _batch_size(inputs: Any) -> int | None:
    """The most common first dimension of the inputs; None where there is no tensor."""
    sizes = Counter(tensor.shape[0] for tensor in _tensors(inputs))
    return sizes.most_common(1)[0][0] if sizes else None


def _cut(inputs: Any, size: int, count: int) -> Any:
    def cut(value: Any) -> Any:
        is_batch = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == size
        return value[:count] if is_batch else value

    return pytree.tree_map(cut, inputs)


__all__ = [
    "Change",
    "Explanation",
    "Gain",
    "Shortage",
    "capacity_changes",
    "explain",
    "explain_step",
]
