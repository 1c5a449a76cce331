"""CPU Adam against torch's fused CPU AdamW: billions of parameters per second by thread count.

    python benchmarks/adam.py                     # 200M parameters
    python benchmarks/adam.py --params 20M --threads 1,2

Both update fp32 weights and moments in memory. Ours is also shown with bf16 gradients and bf16 new
weights written over them, as training in bf16 does it; torch's fused CPU AdamW has no such mode. "apart"
writes new weights and moments to arrays of their own, past the caches, and leaves the old ones.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from lohan_fx import native
from lohan_fx.probe.host import ADAM_BYTES, ADAM_GROUP

SUFFIXES = {"K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True, slots=True)
class Row:
    """Rates in 1e9 parameters per second; the best and the median of the repeats."""

    what: str
    grads: str
    threads: int
    best: float
    median: float

    @property
    def gb_per_s(self) -> float:
        return self.best * ADAM_BYTES[self.grads]


def parse_count(text: str) -> int:
    scale = SUFFIXES.get(text[-1:].upper(), 1)
    return int(float(text[:-1] if scale > 1 else text) * scale)


def default_threads(cpus: int) -> list[int]:
    """1, 2, 4, ... and all of them."""
    counts = [2**i for i in range(cpus.bit_length()) if 2**i < cpus]
    return [*counts, cpus]


def measure(
    what: str, grads: str, threads: int, numel: int, repeats: int, run: Callable[[int], None]
) -> Row:
    """`run` is given the step, counted from 1; the first two are for warming up."""
    rates = []
    for step in range(1, repeats + 3):
        start = time.perf_counter()
        run(step)
        rates.append(numel / (time.perf_counter() - start) / 1e9)
    kept = rates[2:]
    return Row(what, grads, threads, max(kept), statistics.median(kept))


def ours(
    numel: int,
    threads: int,
    repeats: int,
    grad: torch.Tensor,
    state: list[torch.Tensor],
    new: list[torch.Tensor] | None = None,
) -> Row:
    """With `new`, for master, both moments and the 16-bit weights, nothing is updated in place."""
    grads = str(grad.dtype).removeprefix("torch.")
    half = grad.dtype == torch.bfloat16
    original = grad.clone() if half else grad
    out = grad if new is None else new[3]
    names = ("new_master_ptr", "new_exp_avg_ptr", "new_exp_avg_sq_ptr")
    places = {} if new is None else dict(zip(names, (x.data_ptr() for x in new), strict=False))

    def run(step: int) -> None:
        native.adam_update(
            *(tensor.data_ptr() for tensor in state),
            grad.data_ptr(),
            grads,
            out.data_ptr() if half else 0,
            grads if half else None,
            numel,
            **asdict(ADAM_GROUP),
            step=step,
            num_threads=threads,
            **places,
        )

    what = "lohan_fx" if new is None else "apart"
    row = measure(f"{what} {native.isa()}", grads, threads, numel, repeats, run)
    grad.copy_(original)
    return row


def torch_fused(numel: int, threads: int, repeats: int, grad: torch.Tensor) -> Row:
    param = torch.nn.Parameter(torch.ones(numel))
    param.grad = grad
    optimizer = torch.optim.AdamW(
        [param], lr=ADAM_GROUP.lr, weight_decay=ADAM_GROUP.weight_decay, fused=True
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return measure(
            "torch fused", "float32", threads, numel, repeats, lambda step: optimizer.step()
        )
    finally:
        torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=parse_count, default="200M", help="such as 200M")
    parser.add_argument("--threads", help="such as 1,2,16; default: powers of two up to all CPUs")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    cpus = native.usable_cpus()
    counts = [int(n) for n in args.threads.split(",")] if args.threads else default_threads(cpus)
    numel = args.params

    print(f"{numel / 1e6:.0f}M parameters, {cpus} CPUs, torch {torch.__version__}")
    print(f"{'':18} {'gradients':10} {'threads':>7} {'G params/s':>11} {'median':>7} {'GB/s':>6}")
    rows: list[Row] = []

    def show(row: Row) -> None:
        rows.append(row)
        print(
            f"{row.what:18} {row.grads:10} {row.threads:7} {row.best:11.3f} {row.median:7.3f} "
            f"{row.gb_per_s:6.1f}",
            flush=True,
        )

    gradient = torch.randn(numel)
    for threads in counts:
        show(torch_fused(numel, threads, args.repeats, gradient))
    state = [torch.ones(numel), torch.zeros(numel), torch.zeros(numel)]
    new = [*(tensor.clone() for tensor in state), gradient.bfloat16()]
    for grad in (gradient, gradient.bfloat16()):
        for threads in counts:
            show(ours(numel, threads, args.repeats, grad, state))
            show(ours(numel, threads, args.repeats, grad, state, new))

    record = {
        "benchmark": "adam",
        "params": numel,
        "cpus": cpus,
        "isa": native.isa(),
        "torch": torch.__version__,
        "rows": [
            {
                "what": row.what.split()[0],
                "grads": row.grads,
                "threads": row.threads,
                "g_params_per_s": round(row.best, 4),
                "median_g_params_per_s": round(row.median, 4),
                "gb_per_s": round(row.gb_per_s, 1),
            }
            for row in rows
        ],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
