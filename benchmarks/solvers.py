"""How long planning takes, and how near its plans are to the proved bound.

    python benchmarks/solvers.py                        # the toy and the irregular problem
    python benchmarks/solvers.py gpt-13b.json ...       # these too, as Problem.to_json wrote them
    python benchmarks/solvers.py --models gpt-13b,gpt-175b,gpt-412b    # a minute or so of tracing each

Seconds are CPU seconds of one process; the step is the replayed one, the gap the proved one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lohan_fx.errors import InfeasiblePlan
from lohan_fx.planner import Problem, solve

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from problems import deep, irregular

POLICIES = ("greedy", "lohan", "optimal")
# 3,000 items of which no two are alike.
IRREGULAR = {"num_buckets": 400, "num_activations": 2600, "num_stages": 100}


def traced(name: str, budget: str, batch: int, seq: int) -> Problem:
    """The planner's problem of one preset model on the server of arXiv 2403.06504."""
    import torch

    from lohan_fx.api import trace_step
    from lohan_fx.cli.models import resolve_model

    given = resolve_model(name, batch=batch, seq=seq)
    return trace_step(
        given.model,
        budget,
        given.example_inputs,
        hardware="lohan-rtx4090",
        dtype=torch.float16,
    ).problem


def report(name: str, problem: Problem) -> None:
    for policy in POLICIES:
        begun = time.process_time()
        try:
            answer = solve(problem, policy)
        except InfeasiblePlan as exc:
            print(f"{name:24} {policy:8} {exc}")
            continue
        cpu_s = time.process_time() - begun
        gap = f"{answer.optimality.gap:8.3%}" if answer.optimality else "       -"
        print(
            f"{name:24} {policy:8} {cpu_s:7.2f} s  step {answer.predicted.step_s:10.4f} s  gap {gap}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", nargs="*", type=Path)
    parser.add_argument("--models", default="", help="presets, with commas between")
    parser.add_argument("--budget", default="gpu=24GB,dram=768GB,ssd=40TB")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=1024)
    args = parser.parse_args()
    named = {"toy": deep(2), "64 layers": deep(64), "irregular": irregular(**IRREGULAR)}
    for path in args.problems:
        named[path.stem] = Problem.from_json(path.read_text())
    for model in filter(None, args.models.split(",")):
        named[model] = traced(model, args.budget, args.batch, args.seq)
    for name, problem in named.items():
        report(name, problem)


if __name__ == "__main__":
    main()
