"""`python -m lohan_fx.plan`: plan a training step without running it."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lohan_fx.budget import Budget, Machine
from lohan_fx.cli.models import PRESETS as MODEL_PRESETS
from lohan_fx.cli.models import ModelInput, failed_forward, resolve_model, with_dtype
from lohan_fx.errors import CaptureError, InfeasiblePlan, LohanError
from lohan_fx.hardware import PRESETS as HARDWARE_PRESETS
from lohan_fx.hardware import Hardware, detect, nearest
from lohan_fx.hardware import load as load_hardware
from lohan_fx.plan import Plan, build_unfit_plan
from lohan_fx.planner import NothingFits, Overlap, check_policy
from lohan_fx.units import format_bytes

if TYPE_CHECKING:
    import torch

FITS, USER_ERROR, DOES_NOT_FIT = 0, 1, 2

_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
}
# Left of a GPU that no budget was given for: the driver's context and what others hold.
_GPU_MARGIN_SHARE = 20

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, column names, rows


class _Parser(argparse.ArgumentParser):
    """argparse exits with 2 for bad usage; here that means "does not fit"."""

    def error(self, message: str) -> NoReturn:
        raise LohanError(f"{message} (see --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 if the plan fits, 1 for a user error, 2 if nothing fits."""
    try:
        args = _parser().parse_args(argv)
        with _quiet():
            return _run(args)
    except LohanError as exc:
        print(f"lohan-fx plan: {' '.join(str(exc).split())}", file=sys.stderr)
        return DOES_NOT_FIT if isinstance(exc, InfeasiblePlan) else USER_ERROR


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings and logs of libraries off stderr, unless they were asked for."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        if "TORCH_LOGS" not in os.environ:
            logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lohan_fx.plan",
        description="Plan where every tensor of a training step lives, without running it.",
        epilog="Exit codes: 0 the plan fits, 1 wrong usage, 2 nothing fits the budget.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help=(
            "a preset, a Hugging Face config.json or its directory, or pkg.module:factory "
            f"(presets: {', '.join(MODEL_PRESETS)})"
        ),
    )
    parser.add_argument(
        "--hardware",
        help=(
            "a preset or a machine's JSON file; without it, this machine "
            f"(presets: {', '.join(HARDWARE_PRESETS)})"
        ),
    )
    parser.add_argument(
        "--budget",
        help="such as gpu=24GB,dram=128GB,ssd=2TB; what is left out is all the hardware has",
    )
    parser.add_argument("--batch", type=_count, default=1, help="sequences a step (default 1)")
    parser.add_argument("--seq", type=_count, default=1024, help="tokens each (default 1024)")
    parser.add_argument(
        "--dtype",
        choices=sorted(_DTYPES),
        default="bf16",
        help=(
            "compute dtype, which inputs of real numbers get too; 16 bits have fp32 master weights "
            "(default bf16)"
        ),
    )
    parser.add_argument(
        "--policy", type=_policy, default="greedy", help="who decides (default greedy)"
    )
    parser.add_argument(
        "--overlap",
        choices=["auto", *map(str, Overlap)],
        default="auto",
        help="when the optimizer runs (default auto)",
    )
    parser.add_argument(
        "--ssds", type=_count, help="number of SSDs of the paper's server, 1 to 12 (default 12)"
    )
    parser.add_argument("--dump", type=Path, metavar="FILE", help="write the plan as JSON")
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _policy(text: str) -> str:
    try:
        check_policy(text)
    except LohanError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
    return text


def _run(args: argparse.Namespace) -> int:
    hardware, budget = _hardware_and_budget(args)
    if args.dump is not None and not args.dump.parent.is_dir():
        raise LohanError(f"--dump {args.dump}: there is no directory {args.dump.parent}")
    if args.dump is not None and args.dump.is_dir():
        raise LohanError(f"--dump {args.dump} is a directory; name a file")
    given = resolve_model(args.model, batch=args.batch, seq=args.seq)
    try:
        plan = _plan(args, given, hardware, budget)
    except NothingFits as exc:
        if args.dump is not None:
            unfit = build_unfit_plan(
                exc.problem,
                str(exc),
                model=given.name,
                hardware=hardware.name,
                budget=str(budget),
                policy=args.policy,
            )
            _write(args.dump, unfit)
        raise
    if args.dump is not None:
        _write(args.dump, plan)
    show(plan)
    if not plan.fits:
        raise InfeasiblePlan(" ".join(plan.reasons))
    return FITS


def _hardware_and_budget(args: argparse.Namespace) -> tuple[Hardware, Budget]:
    """The machine to plan for, and a complete budget on it."""
    if args.hardware is None:
        if args.ssds is not None:
            raise LohanError("--ssds is for the presets lohan-*; name one with --hardware")
        hardware, machine = _this_machine()
    else:
        hardware = load_hardware(args.hardware, args.ssds)
        machine = hardware.machine()
    if args.budget is None:
        memory = hardware.gpu_memory_bytes
        budget = Budget(gpu=memory - memory // _GPU_MARGIN_SHARE)
    else:
        budget = Budget.parse(args.budget)
    return hardware, budget.resolve(machine)


def _this_machine() -> tuple[Hardware, Machine]:
    import torch

    if not torch.cuda.is_available():
        hardware = detect()
        return hardware, Machine.here(hardware.gpu_memory_bytes)
    memory = torch.cuda.mem_get_info()[1]
    hardware = nearest(torch.cuda.get_device_name())
    return dataclasses.replace(hardware, gpu_memory_bytes=memory), Machine.here(memory)


def _plan(args: argparse.Namespace, given: ModelInput, hardware: Hardware, budget: Budget) -> Plan:
    from torch._dynamo.exc import TorchRuntimeError

    from lohan_fx import api

    dtype = _torch_dtype(args.dtype)
    try:
        plan = api.make_plan(
            given.model,
            budget,
            with_dtype(given.example_inputs, dtype),
            hardware=hardware,
            dtype=dtype,
            policy=args.policy,
            overlap=args.overlap,
        )
    except CaptureError as exc:
        raise CaptureError(f"{given.name}: {exc}") from exc
    except TorchRuntimeError as exc:
        raise LohanError(f"{given.name}: {failed_forward(exc)}") from exc
    plan = plan.named(given.name)
    return plan if given.tokens is None else plan.with_tokens(given.tokens)


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, _DTYPES[name])
    return dtype


def _write(path: Path, plan: Plan) -> None:
    try:
        path.write_text(plan.to_json(indent=1) + "\n", encoding="utf-8")
    except OSError as exc:
        raise LohanError(f"the plan cannot be written to {path} ({exc.strerror})") from exc


# ---- what is shown ----


def show(plan: Plan) -> None:
    """Print a summary: tables on a terminal, plain text where the output is piped."""
    tables = summary(plan)
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


def summary(plan: Plan) -> list[Table]:
    """What a plan says, as tables of text."""
    rows = [
        ("model", plan.model),
        ("hardware", plan.hardware),
        ("parameters", _number(plan.num_params)),
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
    rows += [("note", reason) for reason in plan.reasons]
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


def _number(count: int) -> str:
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
