"""Several plans side by side: policies, sweeps over sizes and budgets, the largest model that fits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lohan_fx.errors import InfeasiblePlan, LohanError
from lohan_fx.hardware import Hardware
from lohan_fx.pins import Pins
from lohan_fx.planner import (
    SOLVERS,
    NothingFits,
    Overlap,
    Prediction,
    check_policy,
    default_overlap,
)
from lohan_fx.progress import progress_of_pieces
from lohan_fx.report import Table
from lohan_fx.step import TracedStep
from lohan_fx.units import format_bytes, parse_bytes

_TIERS = ("gpu", "dram", "ssd")
_RETRACED = ("batch", "seq")
DIMENSIONS = (*_RETRACED, *_TIERS, "ssds", "policy", "overlap")
# More rows than a person reads or waits for.
_MOST_ROWS = 1000

# A step at (batch, seq), traced; the caller caches nothing.
Tracer = Callable[[int, int], TracedStep]


@dataclass(frozen=True, slots=True)
class Row:
    """One plan of several. `labels` says which; `predicted` is None where nothing fits."""

    labels: Mapping[str, str]
    overlap: str
    predicted: Prediction | None
    tokens_per_s: float | None = None
    lacks: Mapping[str, int] | None = None  # bytes by tier that would have to be added at least
    reason: str = ""

    @property
    def fits(self) -> bool:
        return self.predicted is not None

    def to_dict(self) -> dict[str, Any]:
        raw: dict[str, Any] = {
            **self.labels,
            "overlap": self.overlap,
            "fits": self.fits,
            "tokens_per_s": self.tokens_per_s,
        }
        if self.predicted is None:
            return raw | {"lacks_bytes": dict(self.lacks or {}), "reason": self.reason}
        found = self.predicted
        return raw | {
            "step_s": found.step_s,
            "forward_s": found.forward_s,
            "backward_s": found.backward_s,
            "peak_bytes": dict(found.peak_bytes),
            "ssd_bytes_written_per_step": found.ssd_bytes_written_per_step,
            "bottleneck": found.bottleneck,
        }

    def cells(self) -> tuple[str, ...]:
        if self.predicted is None:
            lacks = [f"{tier} +{format_bytes(size)}" for tier, size in (self.lacks or {}).items()]
            return (*self.labels.values(), "no", *["-"] * 6, ", ".join(lacks) or "together")
        found = self.predicted
        rate = "-" if self.tokens_per_s is None else f"{self.tokens_per_s:.5g}"
        return (
            *self.labels.values(),
            "yes",
            f"{found.step_s:.4g} s",
            rate,
            *(format_bytes(found.peak_bytes[tier]) for tier in _TIERS),
            format_bytes(found.ssd_bytes_written_per_step),
            found.bottleneck,
        )


def table(title: str, rows: Sequence[Row]) -> Table:
    """Rows as one table. In a row that does not fit, the last cell is what the budget lacks at least."""
    labels = tuple(rows[0].labels) if rows else ()
    columns = (
        *labels,
        "fits",
        "step",
        "tokens/s",
        "GPU peak",
        "DRAM peak",
        "SSD peak",
        "SSD writes",
        "limited by",
    )
    return title, columns, [row.cells() for row in rows]


def planned_row(
    step: TracedStep, labels: Mapping[str, str], policy: str, pins: Pins | None = None
) -> Row:
    """How one policy does on one step."""
    overlap = str(step.problem.overlap)
    try:
        solution = step.solve(policy, pins)
    except InfeasiblePlan as exc:
        return Row(labels, overlap, None, lacks=lacking(exc), reason=str(exc))
    return Row(labels, overlap, solution.predicted, step.tokens_per_s(solution))


def lacking(exc: InfeasiblePlan) -> dict[str, int]:
    """Bytes by tier that are missing at least; {} where that is not known, or no tier alone is short."""
    if not isinstance(exc, NothingFits):
        return {}
    have = exc.problem.capacities
    short = {tier: exc.least_bytes[tier] - getattr(have, f"{tier}_bytes") for tier in _TIERS}
    return {tier: size for tier, size in short.items() if size > 0}


# ---- policies ----


def compare(step: TracedStep, overlap: str, pins: Pins | None) -> list[Row]:
    """Every policy on one step. With overlap "auto", each runs the optimizer as its system does."""
    rows = []
    with progress_of_pieces("planning", len(SOLVERS)) as advance:
        for policy in SOLVERS:
            mode = Overlap(overlap) if overlap != "auto" else default_overlap(policy)
            asked = step if mode is None else step.with_overlap(mode)
            labels = {"policy": policy, "optimizer": str(asked.problem.overlap)}
            rows.append(planned_row(asked, labels, policy, pins))
            advance(policy)
    return rows


# ---- sweeps ----

Sweep = tuple[str, tuple[str, ...]]  # a dimension and its values, as the user wrote them


def parse_sweep(text: str) -> Sweep:
    """A dimension and values from "batch=8,16". Raises LohanError, naming what is wrong."""
    name, equals, listed = (part.strip() for part in text.partition("="))
    if not equals or not listed:
        raise LohanError(f"--sweep {text!r} is not NAME=VALUE,VALUE; write it like batch=8,16,32")
    if name not in DIMENSIONS:
        raise LohanError(f"--sweep {name!r} is not possible; choose one of {', '.join(DIMENSIONS)}")
    values = tuple(value.strip() for value in listed.split(","))
    for value in values:
        _check_value(name, value)
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise LohanError(f"--sweep {name} has {twice[0]} twice")
    return name, values


def _check_value(name: str, value: str) -> None:
    if not value:
        raise LohanError(f"--sweep {name} has an empty value")
    if name in (*_RETRACED, "ssds"):
        if not value.isascii() or not value.isdigit() or int(value) == 0:
            raise LohanError(f"--sweep {name}: {value!r} is not a positive whole number")
    elif name in _TIERS:
        try:
            _tier_bytes(name, value)
        except LohanError as exc:
            raise LohanError(f"--sweep {name}: {exc}") from None
    elif name == "policy":
        check_policy(value)
    elif value not in [str(mode) for mode in Overlap]:
        raise LohanError(f"--sweep overlap: {value!r} is not one of {', '.join(Overlap)}")


def _tier_bytes(tier: str, value: str) -> int:
    return 0 if tier == "ssd" and value.lower() == "none" else parse_bytes(value)


def check_sweeps(sweeps: Sequence[Sweep], hardware: Hardware) -> None:
    """Raise LohanError for a dimension that is swept twice, for too many rows or too many SSDs."""
    names = [name for name, _ in sweeps]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise LohanError(f"--sweep {twice[0]} is there twice; list all its values in one")
    count = 1
    for name, values in sweeps:
        count *= len(values)
        if name == "ssds":
            for value in values:
                Hardware.preset(hardware.name, int(value))
    if count > _MOST_ROWS:
        raise LohanError(f"these sweeps make {count} plans; at most {_MOST_ROWS} go into one table")


def sweep(
    sweeps: Sequence[Sweep],
    trace: Tracer,
    *,
    batch: int,
    seq: int,
    policy: str,
    pins: Pins | None,
) -> list[Row]:
    """One row for each combination of values, the last dimension varying fastest."""
    rows = []
    traced: dict[tuple[int, int], TracedStep] = {}
    points = list(_points(sweeps))
    with progress_of_pieces("planning", len(points)) as advance:
        for point in points:
            sizes = int(point.get("batch", batch)), int(point.get("seq", seq))
            if sizes not in traced:
                traced[sizes] = trace(*sizes)
            step = _at(traced[sizes], point)
            rows.append(planned_row(step, point, point.get("policy", policy), pins))
            advance(" ".join(f"{key}={value}" for key, value in point.items()))
    return rows


def _points(sweeps: Sequence[Sweep]) -> Iterable[dict[str, str]]:
    names = [name for name, _ in sweeps]
    for values in itertools.product(*(values for _, values in sweeps)):
        yield dict(zip(names, values, strict=True))


def _at(step: TracedStep, point: Mapping[str, str]) -> TracedStep:
    """The step under what a point says of budget, SSDs and the optimizer's time."""
    if "ssds" in point:
        hardware = Hardware.preset(step.hardware.name, int(point["ssds"]))
        had = step.hardware.ssd_bytes
        share = step.problem.capacities.ssd_bytes / had if had else 0.0
        step = step.with_lanes(hardware.lanes()).with_capacity(
            ssd=int(min(share, 1.0) * hardware.ssd_bytes)
        )
    sizes = {tier: _tier_bytes(tier, point[tier]) for tier in _TIERS if tier in point}
    step = step.with_capacity(**sizes)
    return step.with_overlap(Overlap(point["overlap"])) if "overlap" in point else step


# ---- families ----


def largest_fitting(
    names: Sequence[str], attempt: Callable[[str], Row]
) -> tuple[list[Row], str | None, Row | None]:
    """By bisection of models in ascending order of size: what was planned, the largest that fits, and
    the row of the next one, which does not.

    Both neighbours of the answer are planned, never assumed.
    """
    low, high = -1, len(names)  # names[low] fits, names[high] does not; ends are outside
    rows: dict[int, Row] = {}
    with progress_of_pieces("planning", None) as advance:
        while high - low > 1:
            middle = (low + high) // 2
            rows[middle] = attempt(names[middle])
            advance(names[middle])
            if rows[middle].fits:
                low = middle
            else:
                high = middle
    tried = [rows[index] for index in sorted(rows)]
    return tried, names[low] if low >= 0 else None, rows.get(high)
