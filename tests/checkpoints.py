"""What tests of checkpoints share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from loops import TIGHT, Tiny, compiled, tokens
from torch import nn
from training import loss_of

import lohan_fx

BATCHES = [tokens(index) for index in range(6)]
# Here it does not matter how good a plan is, but that it is there soon.
QUICK: dict[str, Any] = {"dtype": torch.bfloat16, "policy": "greedy"}


def adamw(model: nn.Module, lr: float = 1e-2, **options: Any) -> lohan_fx.AdamW:
    return lohan_fx.AdamW(model.parameters(), lr=lr, **options)


def train(model: Any, optimizer: Any, batches: Any, scheduler: Any = None) -> list[float]:
    losses = []
    for batch in batches:
        loss = loss_of(model(**batch))
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def state_of(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Weights, masters, moments and steps, by name."""
    found = {f"weight.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        found.update({f"{index}.{key}": value for key, value in state.items()})
    return found


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@contextmanager
def two_steps(folder: Path) -> Iterator[tuple[Any, Any]]:
    """A bf16 model and its optimizer that have made two steps, under a budget that needs every tier."""
    model = compiled(Tiny(), folder, TIGHT, **QUICK)
    optimizer = adamw(model)
    train(model, optimizer, BATCHES[:2])
    yield model, optimizer
    model.close()


class Odd(nn.Module):
    """Buffers of both kinds, tied parameters, a transposed weight, a frozen one, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(3, 5)
        self.again = self.first
        self.across = nn.Parameter(torch.randn(5, 7).t())
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("count", torch.tensor(9))
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.again(x) @ self.across.t()).sum() * self.scalar


def odd(folder: Path, **options: Any) -> Any:
    return compiled(Odd(), folder, **options)


def sizes(path: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in path.iterdir()}
