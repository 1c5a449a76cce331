"""Dropout and torch.manual_seed: one seed at the start fixes a run, whatever the plan.

test_pitfalls compares one step's masks with plain PyTorch's where they are kept, swapped or recomputed;
here whole loops run, with attention's dropout and micro-batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import assert_losses, assert_same, compiled, plain_adamw
from recipes import OVERLAPS, TIERS, InOneTier
from torch import nn
from torch.nn import functional
from training import Batch, RandomPolicy

import lohan_fx

WIDTH, HEADS = 16, 2


class Attention(nn.Module):
    """Layers of attention and an MLP with dropout in both; the loss is computed inside."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        # No bias: the gradient of the keys' is nothing but rounding, and Adam goes by its sign.
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = (
                part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv(x).chunk(3, dim=-1)
            )
            p = 0.3 if self.training else 0.0
            mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
            x = x + self.drop(functional.gelu(out(mixed.transpose(1, 2).flatten(2))))
        return functional.mse_loss(x, y)


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(3, 6, WIDTH, generator=generator) for name in ("x", "y")}


def loop(model: nn.Module, optimizer: Any, seed: int = 5, steps: int = 4) -> list[float]:
    """One seed, then micro-batches in twos; data is drawn from the same generator in between."""
    torch.manual_seed(seed)
    losses = []
    for index in range(steps):
        for last in (False, True):
            noise = torch.randn(()) * 0.01
            inputs = batch(2 * index + last)
            inputs["x"] = inputs["x"] + noise
            if not last and isinstance(model, lohan_fx.CompiledModel):
                with model.no_sync():
                    loss = model(**inputs)
                    loss.backward()
            else:
                loss = model(**inputs)
                loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_one_seed_fixes_the_run_in_every_tier(overlap: str, tmp_path: Path) -> None:
    theirs = Attention()
    expected = loop(theirs, plain_adamw(theirs))
    runs = []
    for policy in (*(InOneTier(tier) for tier in TIERS), RandomPolicy(2), RandomPolicy(2)):
        model = compiled(Attention(), tmp_path, overlap=overlap, policy=policy)
        losses = loop(model, lohan_fx.AdamW(model.parameters()))
        assert_losses(losses, expected)
        assert_same(model, theirs)
        runs.append((losses, model.state_dict()))
        model.close()
    for losses, weights in runs[1:]:
        assert losses == runs[0][0]
        assert all(torch.equal(value, runs[0][1][name]) for name, value in weights.items())


def test_another_seed_gives_other_masks(tmp_path: Path) -> None:
    found = []
    for seed in (5, 6):
        model = compiled(Attention(), tmp_path)
        found.append(loop(model, lohan_fx.AdamW(model.parameters()), seed, steps=1))
        model.close()
    assert found[0] != found[1]


@pytest.mark.slow
def test_a_run_over_inductor_repeats_itself(tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        model = compiled(Attention(1), tmp_path, lowering="inductor", policy=RandomPolicy(4))
        losses = loop(model, lohan_fx.AdamW(model.parameters()), steps=2)
        runs.append((losses, model.state_dict()))
        model.close()
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
