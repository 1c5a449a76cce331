"""`python -m lohan_fx.plan`: plan a training step without running it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from lohan_fx import view
from lohan_fx.budget import Budget, Machine
from lohan_fx.cli import many
from lohan_fx.cli.models import (
    ModelInput,
    failed_forward,
    family_of,
    preset_names,
    resolve_model,
    with_dtype,
)
from lohan_fx.errors import CaptureError, InfeasiblePlan, LohanError
from lohan_fx.hardware import PRESETS as HARDWARE_PRESETS
from lohan_fx.hardware import Hardware, detect, nearest
from lohan_fx.hardware import load as load_hardware
from lohan_fx.pins import check_pins, parse_pin
from lohan_fx.plan import Plan, build_unfit_plan
from lohan_fx.planner import DEFAULT_POLICY, SOLVERS, NothingFits, Overlap, check_policy
from lohan_fx.progress import progress_of_phase
from lohan_fx.repetition import repeated_step
from lohan_fx.report import in_words, show, tables_of
from lohan_fx.step import TracedStep
from lohan_fx.units import parse_bytes

if TYPE_CHECKING:
    import torch

FITS, USER_ERROR, DOES_NOT_FIT = 0, 1, 2
_Answer = TypeVar("_Answer")

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
            f"(presets: {', '.join(preset_names())})"
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
        "--policy",
        type=_policy,
        default=DEFAULT_POLICY,
        help=f"who decides: {', '.join(SOLVERS)} (default {DEFAULT_POLICY})",
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
    parser.add_argument(
        "--max-writes-per-day",
        type=_size,
        metavar="BYTES",
        help="bound on what steps at the predicted pace write to SSD in a day, such as 2TB",
    )
    parser.add_argument(
        "--pin",
        type=parse_pin,
        action="append",
        default=[],
        metavar="NAME_PATTERN=PLACE",
        help=(
            "insist on a place: gpu, dram, ssd, or recompute for activations; patterns as in "
            "'model.layers.0.*', 'state:*', 'weights:lm_head.*', 'activation:model.layers.3'; repeatable"
        ),
    )
    ask = parser.add_mutually_exclusive_group()
    ask.add_argument("--compare", action="store_true", help="one table of all policies")
    ask.add_argument(
        "--sweep",
        type=many.parse_sweep,
        action="append",
        default=[],
        metavar="NAME=VALUE,VALUE",
        help=(
            f"one table over values of {', '.join(many.DIMENSIONS)}; repeat it for all combinations"
        ),
    )
    ask.add_argument(
        "--max-model",
        action="store_true",
        help="the largest preset of the model's family that fits; --model may be the family",
    )
    ask.add_argument(
        "--explain",
        action="store_true",
        help="what limits the step and what more would save; or why it does not fit, and what would",
    )
    parser.add_argument(
        "--full-trace",
        action="store_true",
        help=(
            "trace every layer, rather than a few where all are alike (--dump, --html, and --json of one "
            "plan, always do)"
        ),
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="write the plan as JSON")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write the plan as a page, as lohan_fx.view does"
    )
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except LohanError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _policy(text: str) -> str:
    try:
        check_policy(text)
    except LohanError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
    return text


def _run(args: argparse.Namespace) -> int:
    hardware, budget = _hardware_and_budget(args)
    pins = _pins(args.pin)
    for option in ("dump", "html"):
        _check_output(args, option)
    question = _Question(args, hardware, budget, pins)
    if args.sweep:
        many.check_sweeps(args.sweep, hardware)
        rows = many.sweep(
            args.sweep,
            question.trace,
            batch=args.batch,
            seq=args.seq,
            policy=args.policy,
            pins=pins,
        )
        return question.show_rows(f"{args.model} on {hardware.name}", rows)
    if args.compare:
        step = question.trace(args.batch, args.seq)
        title = f"{step.model} on {hardware.name}, {step.budget_text()}"
        return question.show_rows(title, many.compare(step, args.overlap, pins))
    if args.max_model:
        return _max_model(question)
    if args.explain:
        return _explain(question)
    return _one_plan(question)


def _one_plan(question: _Question) -> int:
    args = question.args
    if args.dump is None and args.html is None and not args.json:
        step = question.trace(args.batch, args.seq)
        with progress_of_phase(f"Planning {step.model}"):
            plan = step.plan(args.policy, question.pins)
        show(tables_of(plan, question.notes))
        return FITS
    # What others may read or replay has a schedule, for which the graphs have to be rewritten.
    given = resolve_model(args.model, batch=args.batch, seq=args.seq)
    try:
        plan = question.plan(given)
    except NothingFits as exc:
        unfit = build_unfit_plan(
            exc.problem,
            str(exc),
            model=given.name,
            hardware=question.hardware.name,
            budget=str(question.budget),
            policy=args.policy,
        )
        _write(args, unfit)
        if args.json:
            print(unfit.to_json(indent=1))
        raise
    _write(args, plan)
    if args.json:
        print(plan.to_json(indent=1))
    else:
        show(tables_of(plan))
    if not plan.fits:
        raise InfeasiblePlan(" ".join(plan.reasons))
    return FITS


def _explain(question: _Question) -> int:
    from lohan_fx.explanation import explain_step

    args = question.args
    step = question.trace(args.batch, args.seq)
    found = explain_step(
        step,
        policy=args.policy,
        batch=args.batch,
        retrace=lambda batch: question.trace(batch, args.seq),
    )
    print(json.dumps(found.to_dict(), indent=1) if args.json else found)
    if not args.json:
        for note in question.notes:
            print(note)
    return FITS if found.fits else DOES_NOT_FIT


def _max_model(question: _Question) -> int:
    """The largest preset of a family that fits."""
    args = question.args
    names = family_of(args.model)
    if not names:
        families = dict.fromkeys(name.split("-")[0] for name in preset_names())
        raise LohanError(
            f"--max-model is for families of presets ({', '.join(families)}), and {args.model!r} is "
            "of none"
        )

    def attempt(name: str) -> many.Row:
        step = question.trace(args.batch, args.seq, name)
        labels = {"model": name, "parameters": in_words(step.num_params)}
        return many.planned_row(step, labels, args.policy, question.pins)

    rows, best, beyond = many.largest_fitting(names, attempt)
    words = f"none of {', '.join(names)} fits" if best is None else f"the largest that fits: {best}"
    after = beyond.reason if beyond is not None else ""
    if beyond is not None and best is not None:
        words += f"; the next one, {beyond.labels['model']}, does not"
    title = f"{names[0].split('-')[0]} on {question.hardware.name}, {question.budget}"
    extra = {"largest": best, "next": None if beyond is None else beyond.labels["model"]}
    return question.show_rows(title, rows, extra, words=[words, *([after] if after else [])])


@dataclasses.dataclass(frozen=True, slots=True)
class _Question:
    """What the user asked, with the machine and budget it is about.

    `notes` are words for the user about the steps traced so far.
    """

    args: argparse.Namespace
    hardware: Hardware
    budget: Budget
    pins: Mapping[str, str]
    notes: list[str] = dataclasses.field(default_factory=list)

    def plan(self, given: ModelInput) -> Plan:
        from lohan_fx import api

        plan = self._asked(api.make_plan, given, pin=self.pins).named(given.name)
        return plan if given.tokens is None else plan.with_tokens(given.tokens)

    def trace(self, batch: int, seq: int, model: str | None = None) -> TracedStep:
        """The model's step at a size, to be planned many times."""
        given = resolve_model(model or self.args.model, batch=batch, seq=seq)
        step = None if self.args.full_trace else self._repeated(given)
        if step is None:
            return self._traced(given)
        note = f"layers repeated from a trace of {step.layers_traced}"
        if note not in self.notes:
            self.notes.append(note)
        return step

    def _repeated(self, given: ModelInput) -> TracedStep | None:
        make = given.with_layers
        if make is None or given.layers is None:
            return None
        return repeated_step(
            given.model, given.layers, lambda layers, numel: self._traced(make(layers), numel)
        )

    def _traced(self, given: ModelInput, bucket_numel: int | None = None) -> TracedStep:
        from lohan_fx import api

        step = self._asked(api.trace_step, given, bucket_numel=bucket_numel)
        return step.named(given.name, given.tokens)

    def _asked(self, answer: Callable[..., _Answer], given: ModelInput, **rest: Any) -> _Answer:
        """What api.make_plan or api.trace_step says of the model, with the settings of the question."""
        dtype = _torch_dtype(self.args.dtype)
        with _named_errors(given), progress_of_phase(f"Tracing {given.name}"):
            return answer(
                given.model,
                self.budget,
                with_dtype(given.example_inputs, dtype),
                hardware=self.hardware,
                dtype=dtype,
                policy=self.args.policy,
                overlap=self.args.overlap,
                max_writes_per_day=self.args.max_writes_per_day,
                **rest,
            )

    def show_rows(
        self,
        title: str,
        rows: Sequence[many.Row],
        extra: Mapping[str, Any] | None = None,
        words: Sequence[str] = (),
    ) -> int:
        """Print rows; 0 if any fits, else 2."""
        if self.args.json:
            raw = {
                "model": self.args.model,
                "hardware": self.hardware.name,
                "budget": str(self.budget),
                **(extra or {}),
                "rows": [row.to_dict() for row in rows],
            }
            print(json.dumps(raw, indent=1))
        else:
            show([many.table(title, rows)])
            for line in (*words, *self.notes):
                print(line)
        return FITS if any(row.fits for row in rows) else DOES_NOT_FIT


@contextmanager
def _named_errors(given: ModelInput) -> Iterator[None]:
    """What goes wrong in tracing a model, under the name that the user gave it."""
    from torch._dynamo.exc import TorchRuntimeError

    try:
        yield
    except CaptureError as exc:
        raise CaptureError(f"{given.name}: {exc}") from exc
    except TorchRuntimeError as exc:
        raise LohanError(f"{given.name}: {failed_forward(exc)}") from exc


def _pins(given: Sequence[tuple[str, str]]) -> dict[str, str]:
    pins: dict[str, str] = {}
    for pattern, place in given:
        if pins.setdefault(pattern, place) != place:
            raise LohanError(f"--pin {pattern!r} asks for {pins[pattern]} and for {place}")
    check_pins(pins)
    return pins


def _check_output(args: argparse.Namespace, option: str) -> None:
    path: Path | None = getattr(args, option)
    if path is None:
        return
    if args.compare or args.sweep or args.max_model or args.explain:
        raise LohanError(f"--{option} writes one plan; print several as JSON with --json")
    if not path.parent.is_dir():
        raise LohanError(f"--{option} {path}: there is no directory {path.parent}")
    if path.is_dir():
        raise LohanError(f"--{option} {path} is a directory; name a file")


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


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, _DTYPES[name])
    return dtype


def _write(args: argparse.Namespace, plan: Plan) -> None:
    """Write the files that were asked for."""
    if args.dump is not None:
        try:
            args.dump.write_text(plan.to_json(indent=1) + "\n", encoding="utf-8")
        except OSError as exc:
            raise LohanError(f"the plan cannot be written to {args.dump} ({exc.strerror})") from exc
    if args.html is not None:
        view.write(args.html, view.render([(plan.model, plan)]))
