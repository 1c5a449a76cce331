"""Steps of several micro-batches, clipped and loss-scaled: as plain PyTorch makes them, and through
lohan_fx with everything in one tier.

The reference is eager: weights in the compute dtype, fp32 masters; `master.grad` is the sum, in fp32 and
in the order of the backwards, of each backward's `param.grad.float()`; then GradScaler.unscale_,
clip_grad_norm_ and torch.optim.AdamW over the masters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from training import (
    DEVICE,
    Batch,
    Case,
    Run,
    loss_of,
    masters_of,
    on_cpu,
    plain_model,
    small_buckets,
    take_masters,
    to_device,
)

import lohan_fx
from lohan_fx.planner import (
    BucketPlace,
    Forced,
    Ledger,
    Place,
    Problem,
    Room,
    Solution,
    activation_places,
    predict,
    streamed_places,
)

TIERS = ("gpu", "dram", "ssd", "streamed")
OVERLAPS = ("backward", "next-forward")
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
# Relative for losses and norms, absolute for weights; see test_exactness.
CLOSE = {
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-2, 2.5e-3),
    torch.float16: (2e-3, 1e-3),
}


@dataclass(frozen=True)
class InOneTier:
    """Puts every weight, state and activation into one tier, as far as they may go there.

    "streamed" is DRAM, with states that pass through the GPU for their updates, where they may.
    """

    tier: str

    def __call__(self, problem: Problem, forced: Forced) -> Solution:
        tier = Place.DRAM if self.tier == "streamed" else Place(self.tier)
        buckets = [BucketPlace(tier, tier)] * len(problem.buckets)
        if self.tier == "streamed":
            buckets = [
                (*streamed_places(problem, b)[-1:], place)[0]
                for b, place in zip(problem.buckets, buckets, strict=True)
            ]
        activations = [
            tier if tier in activation_places(a) else activation_places(a)[0]
            for a in problem.activations
        ]
        windows = Ledger(problem, buckets, activations).windows(Room.ITEM)
        return Solution(
            policy=f"all in {tier}",
            buckets=tuple(buckets),
            activations=tuple(activations),
            windows=windows,
            predicted=predict(problem, buckets, activations, windows),
        )


@dataclass(frozen=True)
class Recipe:
    """What a training loop does.

    `micro` has the seeds and weights of each step's micro-batches. `spoil` may change the loss of
    (step, micro-batch). `scale` is the initial loss scale.
    """

    case: Case
    dtype: torch.dtype = torch.float32
    micro: Sequence[Sequence[tuple[int, float]]] = (((0, 1.0),), ((1, 1.0),), ((2, 1.0),))
    max_grad_norm: float | None = None
    norm_type: float = 2.0
    scale: float | None = None
    growth_interval: int = 2000
    options: dict[str, Any] = field(default_factory=dict)
    spoil: Callable[[int, int, torch.Tensor], torch.Tensor] | None = None

    def loss(self, step: int, index: int, output: Any) -> torch.Tensor:
        loss = loss_of(output) * self.micro[step][index][1]
        return loss if self.spoil is None else self.spoil(step, index, loss)

    def batch(self, step: int, index: int) -> Batch:
        return to_device(self.case.batch(self.micro[step][index][0]), self.dtype)

    @property
    def scaler_options(self) -> dict[str, Any]:
        return {
            "device": DEVICE.type,
            "init_scale": self.scale or 1.0,
            "growth_interval": self.growth_interval,
            "enabled": self.scale is not None,
        }


@dataclass(frozen=True)
class Result:
    run: Run
    scales: list[float]

    def assert_equal(self, other: Result) -> None:
        self.run.assert_equal(other.run)
        assert str(self.run.norms) == str(other.run.norms)  # a NaN is the same as another
        assert self.scales == other.scales

    def assert_close(self, other: Result, dtype: torch.dtype) -> None:
        loss, weight = CLOSE[dtype]
        self.run.assert_close(other.run, loss, weight)
        for ours, theirs in zip(self.run.norms, other.run.norms, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                assert ours == pytest.approx(theirs, rel=loss, nan_ok=True)
        assert self.scales == other.scales


def plain(recipe: Recipe) -> Result:
    """The recipe in eager PyTorch."""
    model, params, masters = plain_model(recipe.case, recipe.dtype)
    optimizer = torch.optim.AdamW(masters.values(), **_adamw(recipe), foreach=False)
    scaler = torch.amp.GradScaler(**recipe.scaler_options)
    losses, norms, scales = [], [], []
    for step, micro in enumerate(recipe.micro):
        total = 0.0
        for index in range(len(micro)):
            torch.manual_seed(100 * step + index)
            loss = recipe.loss(step, index, model(**recipe.batch(step, index)))
            scaler.scale(loss).backward()
            total += loss.item()
            for name, param in params.items():
                if param.grad is None:
                    continue
                grad, param.grad = param.grad.float(), None
                master = masters[name]
                master.grad = grad if master.grad is None else master.grad + grad
        scaler.unscale_(optimizer)
        norms.append(None)
        if recipe.max_grad_norm is not None:
            norms[-1] = torch.nn.utils.clip_grad_norm_(
                list(masters.values()), recipe.max_grad_norm, norm_type=recipe.norm_type
            ).item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        take_masters(params, masters)
        losses.append(total)
        scales.append(scaler.get_scale())
    return Result(Run(losses, on_cpu(masters), norms), scales)


def through_lohan(
    recipe: Recipe,
    folder: Path,
    tier: str = "gpu",
    overlap: str = "auto",
    check: Callable[[Any, Any], None] | None = None,
    **options: Any,
) -> Result:
    """The recipe with everything in one tier, over plain ATen."""
    options = {"policy": InOneTier(tier), "overlap": overlap} | options
    model = small_buckets(recipe.case, recipe.dtype, folder, **options)
    try:
        optimizer = lohan_fx.AdamW(
            model.parameters(),
            **_adamw(recipe),
            max_grad_norm=recipe.max_grad_norm,
            norm_type=recipe.norm_type,
        )
        scaler = lohan_fx.GradScaler(**recipe.scaler_options)
        losses, norms, scales = [], [], []
        for step, micro in enumerate(recipe.micro):
            total = 0.0
            for index in range(len(micro)):
                torch.manual_seed(100 * step + index)
                batch = recipe.batch(step, index)
                if index == len(micro) - 1:
                    loss = recipe.loss(step, index, model(**batch))
                    scaler.scale(loss).backward()
                else:
                    with model.no_sync():
                        loss = recipe.loss(step, index, model(**batch))
                        scaler.scale(loss).backward()
                total += loss.item()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(total)
            norms.append(optimizer.last_grad_norm)
            scales.append(scaler.get_scale())
        weights = masters_of(model, optimizer)
        if check is not None:
            check(model, optimizer)
        return Result(Run(losses, weights, norms), scales)
    finally:
        model.close()


def _adamw(recipe: Recipe) -> dict[str, Any]:
    return {"lr": 1e-3, "weight_decay": 0.01} | recipe.options


def assert_same_bits(results: dict[str, Result]) -> None:
    """Tiers agree bit for bit, where Adam rounds alike: not between a GPU's and a CPU's."""
    names = [n for n in results if DEVICE.type == "cpu" or n not in ("gpu", "streamed")]
    for name in names[1:]:
        results[name].assert_equal(results[names[0]])
