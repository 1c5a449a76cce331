"""The plan's peaks are promises: what a step really holds stays below, in every tier.

The GPU tier of the CPU device is measured by watching every tensor that an operation makes, over
plain ATen regions; DRAM and SSD by the runtime's own accounts, which are what it allocates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Tiny, compiled, step, tokens
from memory_meter import gpu_peak_of_step, metered_skeletons
from training import CASES, RandomPolicy, loss_of

import lohan_fx
from lohan_fx.units import parse_bytes

LLAMA = CASES["llama"]
FP32, BF16 = torch.float32, torch.bfloat16
BUDGETS = [
    ("2MB", "2MB", FP32),  # everything stays on the GPU
    ("700kB", "1MB", FP32),  # weights and state in DRAM
    ("400kB", "800kB", FP32),  # activations leave or are computed again
    ("360kB", "720kB", FP32),  # some state on SSD
    ("330kB", "720kB", FP32),
    ("500kB", "1MB", BF16),
    ("240kB", "720kB", BF16),
]


def assert_within(model: Any, gpu: int, gpu_budget: str, dram_budget: str) -> None:
    predicted = model.plan.predicted.peak_bytes
    assert gpu <= predicted["gpu"] <= parse_bytes(gpu_budget)
    assert gpu >= 0.6 * predicted["gpu"]  # and the plan does not waste the budget
    assert predicted["dram"] <= parse_bytes(dram_budget)
    peaks = model._lohan.stats().peak_bytes
    assert peaks["dram"] <= parse_bytes(dram_budget)
    assert peaks["ssd"] <= predicted["ssd"]


@pytest.mark.parametrize(("gpu", "dram", "dtype"), BUDGETS)
def test_a_step_stays_below_its_planned_peaks(
    gpu: str, dram: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = compiled(LLAMA.build(), tmp_path, f"gpu={gpu}, dram={dram}", dtype=dtype, poison=False)
    optimizer = lohan_fx.AdamW(model.parameters())
    step(model, optimizer, LLAMA.batch(0))
    assert_within(model, gpu_peak_of_step(model, optimizer, LLAMA.batch(1)), gpu, dram)
    model.close()


@pytest.mark.parametrize("overlap", ["backward", "next-forward", "speculative", "serial", "naive"])
def test_the_peaks_hold_in_every_overlap_mode(overlap: str, tmp_path: Path) -> None:
    gpu, dram = "170kB", "420kB"
    budget = f"gpu={gpu}, dram={dram}"
    model = compiled(Tiny(dropout=0.1), tmp_path, budget, overlap=overlap, poison=False)
    optimizer = lohan_fx.AdamW(model.parameters())
    step(model, optimizer, tokens(0))
    assert_within(model, gpu_peak_of_step(model, optimizer, tokens(1)), gpu, dram)
    model.close()


@pytest.mark.parametrize("seed", range(4))
def test_the_peaks_hold_for_random_plans(seed: int, tmp_path: Path) -> None:
    model = compiled(
        Tiny(), tmp_path, policy=RandomPolicy(seed), dtype=torch.bfloat16, poison=False
    )
    optimizer = lohan_fx.AdamW(model.parameters())
    step(model, optimizer, tokens(0))
    assert_within(model, gpu_peak_of_step(model, optimizer, tokens(1)), "1GB", "1GB")
    model.close()


def test_between_forward_and_backward_only_what_is_kept_is_there(tmp_path: Path) -> None:
    """No fetched weight and no swapped activation outlives the forward."""
    model = compiled(Tiny(), tmp_path, policy=RandomPolicy(1), poison=False)
    optimizer = lohan_fx.AdamW(model.parameters())
    step(model, optimizer, tokens(0))
    runtime = model._lohan.runtime
    runtime.drain()
    resident = runtime.stats().current_bytes["gpu"]
    with metered_skeletons() as meter:
        loss = loss_of(model(**tokens(1)))
        woven = model._lohan.captured[0].woven
        kept = woven.forward.graph.output_node().args[0][1:-1]  # the loss, ..., the handle
        saved = sum({n.name: n.meta["val"].untyped_storage().nbytes() for n in kept}.values())
        # The backward's first weights may be on their way already; nothing else.
        ahead = runtime.stats().current_bytes["gpu"] - resident
        assert meter.current_bytes <= saved + ahead + loss.nbytes
    swapped = {slot.name for slot in woven.program.slots}
    assert swapped and not swapped & {node.name for node in kept}
    loss.backward()
    optimizer.step()
    model.close()
