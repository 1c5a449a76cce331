"""`python -m lohan_fx.view`: look at plans, and at runs beside them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from lohan_fx import view
from lohan_fx.errors import LohanError
from lohan_fx.plan import Plan
from lohan_fx.tracing import Trace

_T = TypeVar("_T")


class _Parser(argparse.ArgumentParser):
    """argparse exits with 2 for bad usage; everything wrong here is 1."""

    def error(self, message: str) -> NoReturn:
        raise LohanError(f"{message} (see --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 1 with one line on stderr."""
    try:
        args = _parser().parse_args(argv)
        _run(args)
    except LohanError as exc:
        print(f"lohan-fx view: {' '.join(str(exc).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lohan_fx.view",
        description="Show plans in one HTML page that needs no network, or write one as a Perfetto trace.",
    )
    parser.add_argument("plans", nargs="+", type=Path, metavar="plan.json")
    parser.add_argument(
        "--measured", type=Path, metavar="trace.json", help="a run's trace, shown over its plan"
    )
    parser.add_argument(
        "--any-plan", action="store_true", help="show a trace of another graph than the plan's too"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page")
    parser.add_argument(
        "--perfetto",
        type=Path,
        metavar="FILE",
        help="write a trace of the plan, and of all steps of --measured, for ui.perfetto.dev",
    )
    return parser


def _run(args: argparse.Namespace) -> None:
    if args.html is None and args.perfetto is None:
        raise LohanError("name what to write: --html FILE or --perfetto FILE")
    if args.perfetto is not None and len(args.plans) > 1:
        raise LohanError("--perfetto is for one plan; give each one a file of its own")
    plans = [(path.stem, _read(path, Plan.from_json)) for path in args.plans]
    measured = None
    if args.measured is not None:
        measured = _read(args.measured, Trace.from_json)
    if args.html is not None:
        text = view.render(plans, measured, any_plan=args.any_plan)
        view.write(args.html, text)
        print(f"{args.html}: {len(text.encode()) / 1e6:.1f} MB")
    if args.perfetto is not None:
        _write_trace(args.perfetto, plans[0][1], measured, any_plan=args.any_plan)


def _write_trace(path: Path, plan: Plan, measured: Trace | None, *, any_plan: bool) -> None:
    if measured is not None and not any_plan:
        measured.check_matches(plan)
    steps, device = ((), "") if measured is None else (measured.steps, measured.device)
    data = view.trace_bytes(plan, steps, device)
    try:
        path.write_bytes(data)
    except OSError as exc:
        raise LohanError(f"{path} cannot be written ({exc.strerror})") from exc
    print(f"{path}: {len(data) / 1e6:.1f} MB")


def _read(path: Path, parse: Callable[[str], _T]) -> _T:
    """What a file holds; errors name the file."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise LohanError(f"{path} cannot be read ({exc.strerror})") from exc
    except RecursionError as exc:
        raise LohanError(f"{path} is no plan or trace: it is nested too deeply") from exc
    except UnicodeDecodeError as exc:
        raise LohanError(f"{path} is not text in UTF-8") from exc
    except LohanError as exc:
        raise LohanError(f"{path}: {exc}") from exc
