"""Thousands of steps of a small model over all three tiers, and what the process holds meanwhile.

    python benchmarks/soak.py --steps 3000 --json soak.json

Every step trains; every 50th also evaluates, every 100th has a smaller batch, every 500th saves a
checkpoint. Resident memory, open files, disk space and the engine's extents are sampled 30 times. Ends
with an error where one of them grew after the first third.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

import lohan_fx
from lohan_fx.planner import BucketPlace, Forced, Place, Problem, Solution, solve

TIERS = (Place.GPU, Place.DRAM, Place.SSD)
RSS_SLACK_BYTES = 8 << 20  # fragments, and the 4 MiB that a save leaves for the next one


@dataclass(frozen=True)
class Sample:
    """What the process holds after `step` steps; bytes, and numbers of open files and threads."""

    step: int
    seconds: float
    loss: float
    rss: int
    open_files: int
    threads: int
    disk: int
    gpu: int
    dram: int
    ssd: int
    ssd_read: int
    ssd_write: int


def spread(problem: Problem, forced: Forced) -> Solution:
    """A third of the buckets and of the swappable activations in each tier."""
    trainable = [b.index for b in problem.buckets if b.trainable]
    swappable = [a.index for a in problem.activations if a.can_swap]
    places = {i: BucketPlace(TIERS[n % 3], TIERS[n % 3]) for n, i in enumerate(trainable)}
    activations = {i: TIERS[n % 3] for n, i in enumerate(swappable)}
    return solve(problem, forced=Forced(buckets=forced.buckets or places, activations=activations))


class Model(nn.Module):
    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU())
            for _ in range(layers)
        )
        self.back = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer, back in zip(self.layers, self.back, strict=True):
            y = y + back(layer(y))
        return (y - x.flip(0)).square().mean()


def soak(
    steps: int, folder: Path, samples: int = 30, overlap: str = "next-forward"
) -> list[Sample]:
    """Train and sample; closes everything it opened."""
    torch.manual_seed(0)
    disk = folder / "disk"
    disk.mkdir()
    model: Any = lohan_fx.compile(
        Model(),
        f"gpu=1GB, dram=1GB, ssd={disk}:1GB",
        device="cpu",
        lowering="aten",
        policy=spread,
        overlap=overlap,
        bucket_numel=20_000,
        verify_io=True,
    )
    optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-3)
    process, start = psutil.Process(), time.perf_counter()
    found = []
    every = max(1, steps // samples)
    for step in range(1, steps + 1):
        rows = 5 if step % 100 == 0 else 16
        loss = model(torch.randn(rows, 64))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            with torch.no_grad():
                model(torch.randn(16, 64))
        if step % 500 == 0:
            lohan_fx.save(model, optimizer, folder / "checkpoint")
        if step % every == 0:
            settle(model)
            stats = model._lohan.stats()
            found.append(
                Sample(
                    step=step,
                    seconds=round(time.perf_counter() - start, 2),
                    loss=float(loss.detach()),
                    rss=process.memory_info().rss,
                    open_files=len(os.listdir("/proc/self/fd")),
                    threads=process.num_threads(),
                    disk=shutil.disk_usage(folder).used,
                    gpu=stats.current_bytes["gpu"],
                    dram=stats.current_bytes["dram"],
                    ssd=stats.current_bytes["ssd"],
                    ssd_read=stats.moved_bytes["ssd_read"],
                    ssd_write=stats.moved_bytes["ssd_write"],
                )
            )
    model.close()
    return found


def settle(model: Any) -> None:
    """Give back what nobody uses: cycles, pages the allocator keeps, the record of past transfers."""
    gc.collect()
    model._lohan.runtime._resources.engine.take_trace()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)


def growth(samples: list[Sample]) -> dict[str, int]:
    """By how much each held amount's last value is above its highest of the first third.

    The disk is left out: others write to it too. Resident memory may move by RSS_SLACK_BYTES.
    """
    early = samples[: max(1, len(samples) // 3)]
    slack = {"rss": RSS_SLACK_BYTES}
    found = {}
    for name in ("rss", "open_files", "threads", "gpu", "dram", "ssd"):
        grown = getattr(samples[-1], name) - max(getattr(sample, name) for sample in early)
        found[name] = max(0, grown - slack.get(name, 0))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--overlap", default="next-forward")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = soak(args.steps, Path(folder), overlap=args.overlap)
    print(
        "  step      s     loss   RSS MB  files  threads   GPU kB  DRAM kB   SSD kB   read MB  written MB"
    )
    for s in samples:
        print(
            f"{s.step:6d} {s.seconds:6.1f} {s.loss:8.4f} {s.rss / 1e6:8.1f} {s.open_files:6d} "
            f"{s.threads:8d} {s.gpu / 1e3:8.1f} {s.dram / 1e3:8.1f} {s.ssd / 1e3:8.1f} "
            f"{s.ssd_read / 1e6:9.1f} {s.ssd_write / 1e6:11.1f}"
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(s) for s in samples], indent=1) + "\n")
    grown = growth(samples)
    print("grown after the first third:", grown)
    return 1 if any(grown.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
