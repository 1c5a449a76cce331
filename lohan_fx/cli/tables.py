"""Plans as tables: drawn on a terminal, aligned plain text where the output is piped."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lohan_fx.plan import Plan
from lohan_fx.units import format_bytes

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, column names, rows


def show(tables: Sequence[Table]) -> None:
    """Print tables: drawn on a terminal, plain text where the output is piped."""
    if not sys.stdout.isatty():
        print(plain_text(tables))
        return
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    for title, columns, rows in tables:
        table = RichTable(title=title, title_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            # Text, not markup: a model's name may hold brackets.
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)


def summary(plan: Plan, notes: Sequence[str] = ()) -> list[Table]:
    """What a plan says, as tables of text, with `notes` on how it was made."""
    rows = [
        ("model", plan.model),
        ("hardware", plan.hardware),
        ("parameters", in_words(plan.num_params)),
        ("policy", plan.policy),
        ("optimizer", plan.overlap),
        ("fits", "yes" if plan.fits else "no"),
    ]
    tables: list[Table] = []
    if plan.predicted is not None:
        predicted = plan.predicted
        rows += [
            ("step", f"{predicted.step_s:.4g} s"),
            ("forward", f"{predicted.forward_s:.4g} s"),
            ("backward", f"{predicted.backward_s:.4g} s"),
        ]
        if predicted.update_s:
            rows.append(("update", f"{predicted.update_s:.4g} s"))
        if plan.throughput.tokens_per_s is not None:
            rows.append(("tokens/s", f"{plan.throughput.tokens_per_s:.5g}"))
        if plan.throughput.model_tflops is not None:
            rows.append(("model TFLOP/s (6P)", f"{plan.throughput.model_tflops:.4g}"))
        rows += [
            ("limited by", predicted.bottleneck),
            ("bound", f"{predicted.bound_s:.4g} s"),
            ("SSD writes a step", format_bytes(predicted.ssd_bytes_written_per_step)),
        ]
    rows += [("note", reason) for reason in (*plan.reasons, *notes)]
    tables.append(("plan", ("", "value"), [tuple(row) for row in rows]))
    if plan.predicted is None:
        return tables
    have = {"gpu": plan.budget.gpu, "dram": plan.budget.dram, "ssd": plan.budget.ssd}
    tables.append(
        (
            "memory",
            ("tier", "peak", "budget"),
            [
                (tier, format_bytes(plan.predicted.peak_bytes[tier]), format_bytes(have[tier]))
                for tier in have
            ],
        )
    )
    step = plan.predicted.step_s or 1.0
    tables.append(
        (
            "lanes",
            ("lane", "busy", "of the step"),
            [
                (lane, f"{seconds:.4g} s", f"{seconds / step:.0%}")
                for lane, seconds in plan.predicted.lane_busy_s.items()
            ],
        )
    )
    if plan.tensors:
        tables.append(_placements(plan))
    return tables


def in_words(count: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return str(count)


def _placements(plan: Plan) -> Table:
    """Bytes by class and place."""
    places = ("gpu", "dram", "ssd", "recompute")
    held: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(places, 0))
    for tensor in plan.tensors:
        held[tensor.cls][tensor.placement] += tensor.bytes
    rows: list[tuple[str, ...]] = [
        (cls, *(format_bytes(row[place]) if row[place] else "-" for place in places))
        for cls, row in held.items()
    ]
    return "tensors", ("class", *places), rows


def plain_text(tables: Sequence[Table]) -> str:
    """The tables as aligned text without any drawing."""
    blocks = []
    for title, columns, rows in tables:
        lines: list[Sequence[Any]] = [columns, *rows]
        widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        blocks.append("\n".join([title, *(f"  {line}" for line in text)]))
    return "\n\n".join(blocks)
