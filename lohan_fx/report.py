"""What a compiled model says of itself, as text: the plan, and what the runtime has counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from lohan_fx.plan import Plan
from lohan_fx.runtime import RuntimeStats

_TIERS = ("gpu", "dram", "ssd")
_CLASSES = (
    ("weight16", "weights"),
    ("master32", "fp32 masters"),
    ("moments32", "moments"),
    ("gradient", "gradients"),
    ("activation", "activations"),
)


def report_text(
    plan: Plan,
    stats: RuntimeStats | None,
    setup_s: Mapping[str, float] | None = None,
    rates: str = "",
) -> str:
    """Bytes by tensor class and place, peaks against the budget, predicted times, measured bytes.

    `rates` says where the hardware's rates come from.
    """
    where = (*_TIERS, "recompute")
    bytes_of: Counter[tuple[str, str]] = Counter()
    for tensor in plan.tensors:
        bytes_of[tensor.cls, tensor.placement] += tensor.bytes
    lines = [f"{plan.model} on {plan.hardware}, budget {plan.budget.text}, policy {plan.policy}"]
    rows = [["MB", *where]]
    for cls, words in _CLASSES:
        cells = [_mb(bytes_of[cls, place]) for place in where]
        if any(cell != "-" for cell in cells):
            rows.append([words, *cells])
    if plan.predicted is not None:
        peaks = plan.predicted.peak_bytes
        rows.append(["planned peak", *(_mb(peaks[tier]) for tier in _TIERS), ""])
    if stats is not None:
        rows.append(["runtime's peak", *(_mb(stats.peak_bytes.get(t, 0)) for t in _TIERS), ""])
    allowed = {"gpu": plan.budget.gpu, "dram": plan.budget.dram, "ssd": plan.budget.ssd}
    rows.append(["budget", *(_mb(allowed[tier]) for tier in _TIERS), ""])
    lines += _table(rows)
    if plan.predicted is not None:
        predicted = plan.predicted
        lanes = ", ".join(f"{k} {v:.3g}" for k, v in predicted.lane_busy_s.items() if v > 0)
        lines.append(
            f"predicted step {predicted.step_s:.3g} s (forward {predicted.forward_s:.3g}, backward "
            f"{predicted.backward_s:.3g}), limited by {predicted.bottleneck}; lanes busy, s: {lanes}"
        )
    if rates:
        lines.append(f"rates of {plan.hardware}: {rates}; seconds of ops: {plan.seconds_from}")
    if stats is not None:
        lines.append(
            "moved so far: "
            + _pairs({k: f"{v / 1e6:.1f} MB" for k, v in stats.moved_bytes.items()})
        )
        lines.append("host waited, s: " + _pairs({k: f"{v:.3g}" for k, v in stats.stall_s.items()}))
    if stats is not None and stats.skipped_steps:
        lines.append(
            f"steps: {stats.steps} made, {stats.skipped_steps} skipped for a NaN or Inf gradient"
        )
    if setup_s:
        lines.append("set-up, s: " + _pairs({k: f"{v:.2f}" for k, v in setup_s.items()}))
    return "\n".join(lines)


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "nothing"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.2f}" if num_bytes else "-"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
