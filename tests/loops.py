"""A small model that needs every tier, and training loops over compiled and plain models alike."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from training import Batch, Case, loss_of

import lohan_fx

VOCAB, WIDTH = 61, 32
ROOMY = "gpu=1GB, dram=1GB"
TIGHT = "gpu=160kB, dram=260kB"  # Tiny's weights, state and activations each need several tiers


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.body = nn.Sequential(
            nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Dropout(dropout), nn.Linear(3 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(self.norm(x)) + x.cumsum(1) / 8


class Tiny(nn.Module):
    """Embedding, blocks, head: the loss with `labels`, else the logits."""

    def __init__(self, layers: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        if labels is None:
            return logits
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def tokens(seed: int, batch: int = 4, length: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (batch, length), generator=generator)
    return {"ids": ids, "labels": ids.roll(1, 1)}


TINY = Case("tiny", lambda: Tiny(layers=2), tokens)


def compiled(model: nn.Module, folder: Path, budget: str = ROOMY, **options: Any) -> Any:
    """Compiled for the CPU over plain ATen, with small buckets, memory poisoned after use."""
    options = {"lowering": "aten", "device": "cpu", "bucket_numel": 3000, "poison": True} | options
    return lohan_fx.compile(model.train(), f"{budget}, ssd={folder}:1GB", **options)


def plain_adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), foreach=False, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    loss = loss_of(model(**batch))
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def steps(model: nn.Module, optimizer: Any, batches: Iterable[Batch]) -> list[float]:
    return [step(model, optimizer, batch) for batch in batches]


def assert_same(ours: nn.Module, theirs: nn.Module, *, exact: bool = False) -> None:
    """Weights and buffers agree: bit for bit, or to 1e-5 with plain PyTorch."""
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if exact:
            assert torch.equal(value, expected[name]), name
        else:
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def assert_losses(ours: Sequence[float], theirs: Sequence[float]) -> None:
    assert ours == pytest.approx(theirs, rel=1e-5)


@contextmanager
def new_garbage_only() -> Iterator[None]:
    """Within, collections leave out what there was before: millions of objects."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def leaves_nothing(folder: Path) -> Iterator[None]:
    """Neither files in `folder` nor open files more than before."""
    with new_garbage_only():
        before = open_files()
        yield
        gc.collect()
        assert list(folder.iterdir()) == []
        assert open_files() == before
