"""A small model's step, traced once for all tests that plan it."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from lohan_fx import api
from lohan_fx.hardware import Hardware
from lohan_fx.step import TracedStep

BUDGET = "gpu=1300KB,dram=1MB,ssd=1GB"


class Blocks(nn.Module):
    """An embedding and three residual blocks; the loss is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
            for _ in range(3)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return x.float().logsumexp(-1).mean()


def build(batch: int, seq: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Blocks(), {"tokens": torch.zeros(batch, seq, dtype=torch.long)}


@cache
def small_step(batch: int = 8, seq: int = 64) -> TracedStep:
    model, inputs = build(batch, seq)
    return api.trace_step(
        model,
        BUDGET,
        inputs,
        hardware=Hardware.preset("lohan-rtx4090"),
        dtype=torch.bfloat16,
    )
