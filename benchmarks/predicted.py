"""Plan, run and compare: predicted step time and peaks beside measured ones, one row a point.

    python benchmarks/predicted.py                      # every point, some 15 minutes on an H100
    python benchmarks/predicted.py --points 3b:8:gpu=24GB,dram=100GB 1b:16:gpu=76GB

A point is size:batch:budget, with the sizes of benchmarks/train.py; `SSD` in a budget is replaced by
the directory of --ssd. Each point runs in a process of its own. GPU peaks are
torch.cuda.max_memory_allocated of the timed steps; DRAM and SSD peaks are the runtime's accounts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).with_name("train.py")

# From everything on the GPU down to a step that the SSD limits.
POINTS = (
    "wide:16:gpu=76GB,dram=100GB",
    "wide:16:gpu=20GB,dram=100GB",
    "wide:16:gpu=10GB,dram=100GB",
    "wide:4:gpu=10GB,dram=100GB",
    "3b:8:gpu=24GB,dram=100GB",
    "3b:32:gpu=24GB,dram=100GB",
    "3b:32:gpu=12GB,dram=100GB",
    "wide:16:gpu=10GB,dram=20GB,ssd=SSD:40GB",
    "125m:16:gpu=2GB,dram=1GB,ssd=SSD:20GB",
)


def run(point: str, ssd: str, steps: int, extra: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """The JSON line of one run of train.py; {"error": ...} where it failed."""
    size, batch, budget = point.split(":", 2)
    command = [
        *(sys.executable, str(TRAIN), "--size", size, "--batch", batch, "--steps", str(steps)),
        *("--budget", budget.replace("SSD", ssd), *extra),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"still running after {timeout_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        words = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"error": words[:300]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def row(point: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"| {point} | {found['error']} |"
    predicted, peaks = found["predicted"], found["peak_gb"]
    step, planned = found["step_s"], predicted["peak_gb"]
    cells = [
        point,
        predicted["bottleneck"],
        f"{predicted['step_s']:.3f}",
        f"{step:.3f}",
        f"{predicted['step_s'] / step - 1:+.1%}",
        f"{predicted['bound_s']:.3f}",
    ]
    for tier in ("gpu", "dram", "ssd"):
        if peaks.get(tier):
            error = planned[tier] / peaks[tier] - 1
            cells.append(f"{planned[tier]:.2f} / {peaks[tier]:.2f} ({error:+.1%})")
        else:
            cells.append("-")
    cells.append(f"{found['first_step_s']:.0f}")
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", nargs="+", default=POINTS, help="size:batch:budget")
    parser.add_argument("--ssd", help="a directory on the disk to use")
    parser.add_argument("--steps", type=int, default=4, help="timed steps, after two others")
    parser.add_argument("--json", type=Path, help="append one line a point here")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a point may take")
    args, extra = parser.parse_known_args(argv)
    ssd = args.ssd or tempfile.gettempdir()
    print(
        "| point | limited by | predicted step, s | measured | error | bound | GPU GB, planned / "
        "measured | DRAM GB | SSD GB | first step, s |\n|---|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    errors = []
    for point in args.points:
        found = run(point, ssd, args.steps, extra, args.timeout)
        print(row(point, found), flush=True)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"point": point, **found}) + "\n")
        if "error" not in found:
            errors.append(abs(found["predicted"]["step_s"] / found["step_s"] - 1))
    if errors:
        print(f"\nstep time: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    main()
