"""What a plan says, and what its run did beside that, as tables: for the command and for a model.

One story for both: what was planned and how fast it is, peaks against the budget, a bar for each lane
(the share of the step in which it is busy), and bytes by class of tensor and place. Where there is a run,
what it measured stands beside what was predicted.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .plan import Plan
from .tracing import Trace, summary
from .units import format_bytes

if TYPE_CHECKING:
    from .runtime import RuntimeStats

_TIERS = ("gpu", "dram", "ssd")
_PLACES = (*_TIERS, "recompute")
_CLASSES = {
    "weight16": "weights",
    "master32": "fp32 masters",
    "moments32": "moments",
    "gradient": "gradients",
    "activation": "activations",
    "workspace": "workspace",
}
_BAR_CELLS = 10


class Bar(str):
    """A share from 0 to 1 as text; drawn as a bar where there is room for one."""

    share: float

    def __new__(cls, share: float) -> Bar:
        bar = super().__new__(cls, f"{share:.0%}")
        bar.share = min(max(share, 0.0), 1.0)
        return bar

    @property
    def filled(self) -> int:
        """Cells of ten that are full; the least share that is not nothing is one."""
        return max(round(self.share * _BAR_CELLS), 1) if self.share > 0 else 0


Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, column names, rows


@dataclass(frozen=True, slots=True)
class Run:
    """What a run has measured of itself so far.

    `rates` says where the hardware's rates come from, `setup_s` what was spent before steps could run.
    """

    stats: RuntimeStats | None = None
    trace: Trace | None = None
    setup_s: Mapping[str, float] | None = None
    rates: str = ""

    def traced(self, plan: Plan) -> dict[str, Any] | None:
        """A summary of the trace, if it is of this plan."""
        trace = self.trace
        if trace is None or not trace.steps or trace.fingerprint != plan.fingerprint:
            return None
        return summary(trace, plan)


def tables_of(plan: Plan, notes: Sequence[str] = (), run: Run | None = None) -> list[Table]:
    """The tables of a plan and, with `run`, of what it measured; `notes` say how the plan was made."""
    run = run or Run()
    found = [_facts(plan, notes, run)]
    if plan.predicted is None:
        return found
    found += [_memory(plan, run), _lanes(plan, run)]
    if plan.tensors:
        found.append(_placements(plan))
    if run.stats is not None:
        found.append(_counted(run.stats, run))
    return found


class Report(str):
    """Tables as plain text, which `print` (and rich) draw where the output is a terminal."""

    tables: Sequence[Table]

    def __new__(cls, tables: Sequence[Table]) -> Report:
        report = super().__new__(cls, plain_text(tables))
        report.tables = tables
        return report

    def __str__(self) -> str:
        if not sys.stdout.isatty():
            return super().__str__()
        from rich.console import Console

        console = Console()
        with console.capture() as captured:
            console.print(self.__rich__())
        return captured.get().rstrip("\n")

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(*(_drawn_table(table) for table in self.tables))


def report_of(plan: Plan, run: Run) -> Report:
    """What there is to say of a plan and its run."""
    return Report(tables_of(plan, run=run))


def in_words(count: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return str(count)


# The tables


def _facts(plan: Plan, notes: Sequence[str], run: Run) -> Table:
    rows = [
        ("model", plan.model),
        ("hardware", plan.hardware),
        ("budget", plan.budget.text),
        ("parameters", in_words(plan.num_params)),
        ("policy", plan.policy),
        ("optimizer", plan.overlap),
        ("fits", "yes" if plan.fits else "no"),
    ]
    if run.rates:
        rows.append(
            (f"rates of {plan.hardware}", f"{run.rates}; seconds of ops: {plan.seconds_from}")
        )
    if plan.predicted is not None:
        predicted = plan.predicted
        rows.append(("step", f"{predicted.step_s:.4g} s"))
        if run.stats is not None and run.stats.step_s is not None:
            share = run.stats.step_s / predicted.step_s if predicted.step_s else 1.0
            words = f"{share - 1:+.1%}" if share < 3 else f"{share:.3g} times that"
            rows.append(("step measured", f"{run.stats.step_s:.4g} s ({words})"))
        traced = run.traced(plan)
        if traced is not None:
            idle = f"{traced['gpu_idle_share']:.1%} of {traced['step_s']:.4g} s"
            rows.append(("GPU idle in the trace", idle))
        rows += [
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
    return "plan", ("", "value"), [tuple(row) for row in rows]


def _memory(plan: Plan, run: Run) -> Table:
    assert plan.predicted is not None
    have = {"gpu": plan.budget.gpu, "dram": plan.budget.dram, "ssd": plan.budget.ssd}
    rows: list[tuple[str, ...]] = []
    for tier in _TIERS:
        peak, allowed = plan.predicted.peak_bytes[tier], have[tier]
        row = [
            tier,
            format_bytes(peak),
            format_bytes(allowed),
            Bar(peak / allowed if allowed else 0.0),
        ]
        if run.stats is not None:
            row.append(format_bytes(run.stats.peak_bytes.get(tier, 0)))
        rows.append(tuple(row))
    columns = ["tier", "planned peak", "budget", "of the budget"]
    return "memory", (*columns, *(["runtime's peak"] if run.stats is not None else [])), rows


def _lanes(plan: Plan, run: Run) -> Table:
    assert plan.predicted is not None
    step = plan.predicted.step_s or 1.0
    traced = run.traced(plan)
    columns = ["lane", "busy", "of the step"]
    if traced is not None:
        columns += ["measured", "of its step"]
    rows: list[tuple[str, ...]] = []
    for lane, seconds in plan.predicted.lane_busy_s.items():
        row = [lane, f"{seconds:.4g} s", Bar(seconds / step)]
        if traced is not None:
            known = traced["busy_s"].get(lane)  # nobody measures DRAM
            row.append("-" if known is None else f"{known:.4g} s")
            row.append("-" if known is None else Bar(known / (traced["step_s"] or 1.0)))
        rows.append(tuple(row))
    return "lanes", tuple(columns), rows


def _placements(plan: Plan) -> Table:
    """Bytes by class and place."""
    held: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_PLACES, 0))
    for tensor in plan.tensors:
        held[tensor.cls][tensor.placement] += tensor.bytes
    rows: list[tuple[str, ...]] = [
        (
            _CLASSES.get(cls, cls),
            *(format_bytes(row[place]) if row[place] else "-" for place in _PLACES),
        )
        for cls, row in held.items()
    ]
    return "tensors", ("class", *_PLACES), rows


def _counted(stats: RuntimeStats, run: Run) -> Table:
    moved = {lane: format_bytes(size) for lane, size in stats.moved_bytes.items()}
    rows = [
        ("steps made", str(stats.steps)),
        ("moved so far", _pairs(moved)),
        ("host waited, s", _pairs({k: f"{v:.3g}" for k, v in stats.stall_s.items()})),
    ]
    if stats.skipped_steps:
        words = f"{stats.steps} made, {stats.skipped_steps} skipped for a NaN or Inf gradient"
        rows[0] = ("steps", words)
    if run.setup_s:
        rows.append(("set-up, s", _pairs({k: f"{v:.2f}" for k, v in run.setup_s.items()})))
    return "run", ("", "value"), [tuple(row) for row in rows]


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "nothing"


# Drawing


def show(tables: Sequence[Table]) -> None:
    """Print tables: drawn on a terminal, plain text where the output is piped."""
    if not sys.stdout.isatty():
        sys.stdout.write(plain_text(tables) + "\n")
        return
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(_drawn_table(table))


def _drawn_table(table: Table) -> Any:
    from rich.table import Table as RichTable
    from rich.text import Text

    title, columns, rows = table
    drawn = RichTable(title=title, title_justify="left")
    for number, column in enumerate(columns):
        words = number == 0 or column == "value"
        drawn.add_column(column, justify="left" if words else "right")
    for row in rows:
        # Text, not markup: a model's name may hold brackets.
        drawn.add_row(*(_drawn(cell) if isinstance(cell, Bar) else Text(cell) for cell in row))
    return drawn


def _drawn(bar: Bar) -> Any:
    from rich.text import Text

    full, rest = "\u2588" * bar.filled, "\u2591" * (_BAR_CELLS - bar.filled)
    colour = "cyan" if bar.share < 0.9 else "yellow"
    return Text.assemble((full, colour), (rest, "dim"), f" {bar:>4}")


def plain_text(tables: Sequence[Table]) -> str:
    """The tables as aligned text without any drawing."""
    blocks = []
    for title, columns, rows in tables:
        lines: list[Sequence[str]] = [columns, *([_plain(cell) for cell in row] for row in rows)]
        widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        blocks.append("\n".join([title, *(f"  {line}" for line in text)]))
    return "\n\n".join(blocks)


def _plain(cell: str) -> str:
    if not isinstance(cell, Bar):
        return cell
    return f"{'#' * cell.filled}{'.' * (_BAR_CELLS - cell.filled)} {cell:>4}"


__all__ = [
    "Bar",
    "Report",
    "Run",
    "Table",
    "in_words",
    "plain_text",
    "report_of",
    "show",
    "tables_of",
]
