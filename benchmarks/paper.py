"""Predict the published figures of LoHan and its peers, and print them side by side.

    python benchmarks/paper.py                 # everything, a few minutes on two cores
    python benchmarks/paper.py --only throughput,ssds
    python benchmarks/paper.py --json paper.json

The figures are from LoHan (ICDE 2025, arXiv 2403.06504): one RTX 4090 in a server with 768 GB of DRAM
and 1 to 12 SSDs, GPT models without a language-model head, sequences of 1,024 tokens. Every row uses
the one preset `lohan-rtx4090`; only what the row itself varies (batch, SSDs, DRAM, system) differs.
Its "TFLOPS" are 8 FLOPs a nominal parameter and token, whatever is recomputed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from lohan_fx.api import trace_step
from lohan_fx.errors import InfeasiblePlan
from lohan_fx.hardware import Hardware
from lohan_fx.planner import Capacities, Overlap, Problem, Solution, solve
from lohan_fx.repetition import repeated_step
from lohan_fx.step import TracedStep

SEQ = 1024
VOCAB = 50257
GB = 10**9
# What the CUDA context and the display leave of 24 GB.
GPU_USABLE_BYTES = int(23.0 * GB)

# Nominal billions -> (layers, heads, hidden).
MODELS = {
    6: (28, 32, 4096),
    13: (40, 40, 5120),
    30: (48, 56, 7168),
    70: (80, 64, 8192),
    135: (88, 88, 11264),
    175: (96, 96, 12288),
    276: (112, 112, 14336),
    412: (128, 128, 16384),
}

# System -> (policy, overlap).
SYSTEMS = {
    "ZeRO-Infinity": ("zero-infinity", Overlap.SERIAL),
    "ZeRO-Offload": ("zero-offload", Overlap.SERIAL),
    "LoHan serial": ("lohan", Overlap.SERIAL),
    "LoHan naive": ("lohan", Overlap.NAIVE),
    "LoHan": ("lohan", Overlap.BACKWARD),
}

OOM = None
# 13B, tokens/s at batch 8, 16, 32, 64, 128; None is out of memory, NaN not published.
BATCHES = (8, 16, 32, 64, 128)
THROUGHPUT: dict[str, tuple[float | None, ...]] = {
    "ZeRO-Infinity": (202, 336, 433, OOM, OOM),
    "ZeRO-Offload": (485, 637, OOM, OOM, OOM),
    "LoHan serial": (340, 606, 869, 1126, math.nan),
    "LoHan naive": (373, 646, 990, 1228, math.nan),
    "LoHan": (411, 811, 1376, 1498, 1479),
}
# 13B, "TFLOPS" with 1, 2, 3, 6 and 12 SSDs, by batch.
SSDS = (1, 2, 3, 6, 12)
BY_SSDS = {32: (37.5, 64.3, 81.1, 121.7, 142.0), 64: (70.3, 111.7, 136.3, 151.5, 148.2)}
# Largest trainable model, billions, at batch 1 by GB of DRAM.
DRAM_GB = (128, 256, 384, 512, 640, 768)
LARGEST = {
    "ZeRO-Infinity": (6, 30, 30, 70, 70, 135),
    "LoHan": (70, 276, 276, 276, 276, 276),
}
# 13B: batch -> (bytes swapped, step seconds) as the paper's own model predicts them.
SWAPPED = {24: (9.2e9, 28.1), 36: (42e9, 27.7)}


class Block(torch.nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = torch.nn.LayerNorm(hidden)
        self.qkv = torch.nn.Linear(hidden, 3 * hidden)
        self.out = torch.nn.Linear(hidden, hidden)
        self.norm2 = torch.nn.LayerNorm(hidden)
        self.up = torch.nn.Linear(hidden, 4 * hidden)
        self.down = torch.nn.Linear(4 * hidden, hidden)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        batch, seq, hidden = x_BSD.shape
        qkv = self.qkv(self.norm1(x_BSD)).view(batch, seq, 3, self.heads, hidden // self.heads)
        q_BHSK, k_BHSK, v_BHSK = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, is_causal=True)
        x_BSD = x_BSD + self.out(mixed.transpose(1, 2).reshape(batch, seq, hidden))
        return x_BSD + self.down(F.gelu(self.up(self.norm2(x_BSD)), approximate="tanh"))


class Gpt(torch.nn.Module):
    """The paper's GPT: embeddings and blocks; its mean square stands for a loss, as no head is there."""

    def __init__(self, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCAB, hidden)
        self.positions = torch.nn.Embedding(SEQ, hidden)
        self.blocks = torch.nn.ModuleList(Block(hidden, heads) for _ in range(layers))

    def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
        x_BSD = self.tokens(ids_BS) + self.positions.weight
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return x_BSD.square().mean()


@functools.lru_cache(maxsize=2)
def problem_of(billions: int, batch: int) -> Problem:
    """The training step of one model at one batch, from traces of a few of its equal layers."""
    layers, heads, hidden = MODELS[billions]

    def build(count: int) -> Gpt:
        with torch.device("meta"):
            return Gpt(count, heads, hidden)

    def trace(count: int, bucket_numel: int | None = None) -> TracedStep:
        return trace_step(
            build(count),
            "gpu=100TB,dram=100TB",
            (torch.zeros(batch, SEQ, dtype=torch.long),),
            hardware=Hardware.preset("lohan-rtx4090"),
            dtype=torch.float16,
            bucket_numel=bucket_numel,
        )

    step = repeated_step(build(layers), layers, trace) or trace(layers)
    return step.problem


def server(problem: Problem, overlap: Overlap, *, ssds: int = 12, dram_gb: int = 768) -> Problem:
    """The same step on the paper's server with so many SSDs and so much DRAM."""
    hardware = Hardware.preset("lohan-rtx4090", ssds)
    return dataclasses.replace(
        problem,
        capacities=Capacities(GPU_USABLE_BYTES, dram_gb * GB, hardware.ssd_bytes),
        lanes=hardware.lanes(),
        overlap=overlap,
    )


def solved(problem: Problem, policy: str) -> Solution | None:
    """The policy's plan; None where it does not fit."""
    try:
        return solve(problem, policy)
    except InfeasiblePlan:
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One published figure and ours; None means out of memory on either side."""

    section: str
    system: str
    setting: str
    unit: str
    published: float | None
    predicted: float | None
    better: float | None = None  # the same with policy "optimal"

    @property
    def error(self) -> float | None:
        if self.published is None or self.predicted is None:
            return None
        return self.predicted / self.published - 1


def throughput(solution: Solution | None, batch: int) -> float | None:
    return None if solution is None else batch * SEQ / solution.predicted.step_s


def paper_tflops(tokens_per_s: float | None, billions: int) -> float | None:
    return None if tokens_per_s is None else 8 * billions * 1e9 * tokens_per_s / 1e12


def throughput_rows() -> list[Row]:
    rows = []
    for column, batch in enumerate(BATCHES):
        problem = problem_of(13, batch)
        best = throughput(solved(server(problem, Overlap.BACKWARD), "optimal"), batch)
        for system, published in THROUGHPUT.items():
            policy, overlap = SYSTEMS[system]
            found = throughput(solved(server(problem, overlap), policy), batch)
            better = best if system == "LoHan" else None
            rows.append(
                Row("throughput", system, f"b{batch}", "tok/s", published[column], found, better)
            )
    return rows


def ssd_rows() -> list[Row]:
    rows = []
    for batch, published in BY_SSDS.items():
        problem = problem_of(13, batch)
        for ssds, figure in zip(SSDS, published, strict=True):
            at = server(problem, Overlap.BACKWARD, ssds=ssds)
            found, better = (
                paper_tflops(throughput(solved(at, policy), batch), 13)
                for policy in ("lohan", "optimal")
            )
            setting = f"b{batch}, {ssds} SSD{'s' if ssds > 1 else ''}"
            rows.append(Row("ssds", "LoHan", setting, "TFLOPS", figure, found, better))
    return rows


def largest_rows() -> list[Row]:
    rows = []
    fits: dict[tuple[str, int], set[int]] = {}
    for billions in MODELS:
        problem = problem_of(billions, 1)
        for system in LARGEST:
            policy, overlap = SYSTEMS[system]
            for dram_gb in DRAM_GB:
                if solved(server(problem, overlap, dram_gb=dram_gb), policy) is not None:
                    fits.setdefault((system, dram_gb), set()).add(billions)
    for system, published in LARGEST.items():
        for dram_gb, figure in zip(DRAM_GB, published, strict=True):
            found = max(fits.get((system, dram_gb), ()), default=None)
            rows.append(Row("largest", system, f"{dram_gb} GB DRAM", "B params", figure, found))
    return rows


def swap_rows() -> list[Row]:
    rows = []
    for batch, (published, _) in SWAPPED.items():
        problem = server(problem_of(13, batch), Overlap.BACKWARD)
        solution = solved(problem, "lohan")
        found = None
        if solution is not None:
            swapped = zip(problem.activations, solution.activations, strict=True)
            found = sum(a.bytes for a, place in swapped if place in ("dram", "ssd")) / GB
        rows.append(Row("swap", "LoHan", f"b{batch}", "GB swapped", published / GB, found))
    return rows


SECTIONS: dict[str, Callable[[], list[Row]]] = {
    "throughput": throughput_rows,
    "ssds": ssd_rows,
    "swap": swap_rows,
    "largest": largest_rows,
}


def cell(value: float | None) -> str:
    if value is None:
        return "OOM"
    return "-" if math.isnan(value) else f"{value:.4g}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: published beside predicted, and what policy `optimal` would do there."""
    lines = [
        "| | system | setting | unit | published | predicted | error | optimal | over lohan |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.published is None or row.predicted is None:
            same = row.published is None and row.predicted is None
            error = "agrees" if same else "differs"
        else:
            error = "-" if math.isnan(row.published) else f"{row.error:+.1%}"
        gain = "-"
        if row.better is not None and row.predicted is not None:
            gain = f"{row.better / row.predicted:.2f}x"
        optimal = "-" if row.better is None else cell(row.better)
        fields = (row.section, row.system, row.setting, row.unit, cell(row.published))
        lines.append("| " + " | ".join((*fields, cell(row.predicted), error, optimal, gain)) + " |")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    speeds = [r for r in rows if r.section in ("throughput", "ssds")]
    errors = [abs(r.error) for r in speeds if r.error is not None and not math.isnan(r.error)]
    ours = [
        abs(r.error)
        for r in speeds
        if r.system == "LoHan" and r.error is not None and not math.isnan(r.error)
    ]
    oom = [r for r in speeds if r.published is None]
    right = sum(r.predicted is None for r in oom)
    lines = []
    if errors:
        lines.append(f"median error {statistics.median(errors):.1%} over {len(errors)} speeds")
    if ours:
        lines.append(f"worst LoHan row {max(ours):.1%} of {len(ours)}")
    if oom:
        lines.append(f"out of memory as published: {right} of {len(oom)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"some of {', '.join(SECTIONS)}, with commas")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.only else list(SECTIONS)
    unknown = set(names) - SECTIONS.keys()
    if unknown:
        parser.error(f"--only {unknown.pop()}: there are {', '.join(SECTIONS)}")
    begun = time.perf_counter()
    print(f"hardware: {Hardware.preset('lohan-rtx4090').source}\n")
    rows = [row for name in names for row in SECTIONS[name]()]
    print(table(rows))
    print()
    print(summary(rows))
    print(f"{time.perf_counter() - begun:.0f} s")
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
