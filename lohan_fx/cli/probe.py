"""`python -m lohan_fx.probe`: measure this machine, for plans that know its real rates."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lohan_fx.budget import Machine
from lohan_fx.errors import LohanError
from lohan_fx.hardware import Hardware, default_file
from lohan_fx.progress import progress_of_phase

OK, USER_ERROR = 0, 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LohanError(f"{message} (see --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 1 for wrong usage or a machine that cannot be measured."""
    logging.basicConfig(format="lohan-fx probe: %(message)s")
    try:
        return _run(_parser().parse_args(argv))
    except (LohanError, MemoryError) as exc:
        print(f"lohan-fx probe: {' '.join(str(exc).split())}", file=sys.stderr)
        return USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lohan_fx.probe",
        description=(
            "Measure this machine: GPU, links, DRAM, Adam on the CPU, disks. Takes one to three "
            "minutes, a full machine's attention, and 8 GB on each set of disks, given back after."
        ),
        epilog=(
            "Without --out the file goes where lohan_fx.compile and lohan_fx.plan look for it on "
            "this machine. Exit codes: 0 done, 1 wrong usage or a disk that is too full."
        ),
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the JSON")
    parser.add_argument(
        "--ssd",
        type=Path,
        action="append",
        metavar="DIR",
        help="a directory on a disk to measure, several times for several; default: a temporary one",
    )
    parser.add_argument("--no-ssd", action="store_true", help="leave disks alone")
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds: rough")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], help="default: cuda where there is one, else cpu"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    import torch

    from lohan_fx.probe import FULL, QUICK, measure_machine

    out = args.out or default_file()
    _check_out(out, make=args.out is None)
    if args.no_ssd and args.ssd:
        raise LohanError("--ssd and --no-ssd exclude each other")
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise LohanError("--device cuda, but torch sees no CUDA device here")
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    with progress_of_phase("measuring") as say:
        found = measure_machine(
            device,
            () if args.no_ssd else (args.ssd or _default_dirs()),
            QUICK if args.quick else FULL,
            lambda words: say(f"measuring {words}"),
        )
    _write(out, found)
    print(as_text(found))
    print(f"\nwritten to {out}")
    return OK


def _default_dirs() -> list[Path]:
    where = Machine.here().default_ssd_dir
    return [] if where is None else [where]


def _check_out(path: Path, *, make: bool) -> None:
    """Fail before minutes of measuring, not after."""
    if make:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise LohanError(f"--out {path} is a directory; name a file")
    if not os.access(path.parent, os.W_OK):
        raise LohanError(f"{path} cannot be written: {path.parent} is not a writable directory")
    if path.suffix != ".json":
        raise LohanError(
            f"--out {path}: the name must end in .json, by which --hardware knows files"
        )


def _write(path: Path, found: Hardware) -> None:
    """All or nothing: a plan may be reading the old file."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(found.to_json(indent=1) + "\n")
        os.replace(file.name, path)
    except OSError as exc:
        raise LohanError(f"{path} cannot be written ({exc.strerror})") from exc


# (words, field or key of details, unit); rates are shown in units of 1e9.
_ROWS = (
    ("GPU memory", "gpu_mem_bytes_per_s", "GB/s"),
    ("host to device", "h2d_bytes_per_s", "GB/s"),
    ("device to host", "d2h_bytes_per_s", "GB/s"),
    ("each, both ways at once", "link_both_each_bytes_per_s", "GB/s"),
    ("pinned memory, pre-faulted", "pinned_alloc_bytes_per_s", "GB/s"),
    ("pinned memory, plain", "pinned_alloc_plain_bytes_per_s", "GB/s"),
    ("DRAM, read plus written", "dram_bytes_per_s", "GB/s"),
    ("DRAM, copy", "dram_copy_bytes_per_s", "GB/s"),
    ("DRAM, triad", "dram_triad_bytes_per_s", "GB/s"),
    ("SSD read", "ssd_read_bytes_per_s", "GB/s"),
    ("SSD write", "ssd_write_bytes_per_s", "GB/s"),
    ("SSD read plus written at once", "ssd_mixed_bytes_per_s", "GB/s"),
    ("CPU Adam, fp32", "cpu_adam_float32_params_per_s", "G params/s"),
    ("CPU Adam, bf16", "cpu_adam_bfloat16_params_per_s", "G params/s"),
    ("CPU Adam, bf16, into second copies", "cpu_adam_ahead_params_per_s", "G params/s"),
    ("CPU Adam, bf16, beside copies", "cpu_adam_while_copying_params_per_s", "G params/s"),
    ("copies both ways beside it", "copies_while_adam_bytes_per_s", "GB/s"),
)


def as_text(found: Hardware) -> str:
    """The rates as aligned text; 0 stands for not measured and is left out."""
    rows = [
        (f"matmul {dtype}", f"{rate / 1e12:.4g}", "TFLOP/s")
        for dtype, rate in found.flops_per_s.items()
    ]
    for words, key, unit in _ROWS:
        value = getattr(found, key, None) or found.details.get(key, 0.0)
        if value:
            rows.append((words, f"{value / 1e9:.4g}", unit))
    wide = max(len(row[0]) for row in rows)
    lines = [f"  {words.ljust(wide)}  {value:>8} {unit}" for words, value, unit in rows]
    return "\n".join([f"{found.gpu_name}; {found.cpu_name}", *lines])
