"""Schedulers, groups and optimizer hooks do what they do over torch.optim, in every tier."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import assert_same, compiled, plain_adamw, step
from recipes import OVERLAPS, TIERS, InOneTier
from torch import nn
from torch.optim import lr_scheduler as schedules
from training import CASES

import lohan_fx

MLP = CASES["mlp"]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    vectors = [p for p in named.values() if p.dim() < 2]
    head = [p for name, p in named.items() if p.dim() >= 2 and "head" in name]
    rest = [p for name, p in named.items() if p.dim() >= 2 and "head" not in name]
    return [
        {"params": rest},
        {"params": vectors, "weight_decay": 0.0, "lr": 3e-3},
        {"params": head, "betas": (0.8, 0.95), "eps": 1e-6},
    ]


def _sequential(opt: Any) -> Any:
    warm_up = schedules.LambdaLR(opt, lambda s: min(1.0, (s + 1) / 2))
    rest = schedules.CosineAnnealingLR(opt, T_max=4)
    return schedules.SequentialLR(opt, [warm_up, rest], milestones=[2])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    # Its momentum is Adam's beta1: betas change at every step.
    "one-cycle": lambda opt: schedules.OneCycleLR(opt, max_lr=1e-2, total_steps=7),
    "sequential": _sequential,
    "plateau": lambda opt: schedules.ReduceLROnPlateau(opt, patience=0, threshold=1.0, factor=0.3),
}


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_agree_with_plain_pytorch_in_every_tier(
    name: str, overlap: str, tmp_path: Path
) -> None:
    theirs = MLP.build()
    reference = torch.optim.AdamW(groups(theirs), lr=2e-3, weight_decay=0.1, foreach=False)
    settings, losses = _train(theirs, reference, SCHEDULERS[name](reference))
    assert len({str(each) for each in settings}) > 2
    for tier in TIERS:
        ours = compiled(MLP.build(), tmp_path, overlap=overlap, policy=InOneTier(tier))
        optimizer = lohan_fx.AdamW(groups(ours), lr=2e-3, weight_decay=0.1)
        found = _train(ours, optimizer, SCHEDULERS[name](optimizer))
        assert found[0] == settings
        assert found[1] == pytest.approx(losses, rel=1e-5)
        assert_same(ours, theirs)
        ours.close()


def _train(
    model: nn.Module, optimizer: Any, scheduler: Any
) -> tuple[list[list[Sequence[float]]], list[float]]:
    settings, losses = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" and the like
        for index in range(6):
            settings.append([(g["lr"], *g["betas"]) for g in optimizer.param_groups])
            losses.append(step(model, optimizer, MLP.batch(index)))
            if isinstance(scheduler, schedules.ReduceLROnPlateau):
                scheduler.step(losses[-1])
            elif isinstance(scheduler, schedules.SequentialLR):
                with warnings.catch_warnings():
                    # It calls schedulers with an epoch, which they deprecate.
                    warnings.simplefilter("ignore")
                    scheduler.step()
            else:
                scheduler.step()
    return settings, losses


def test_a_schedule_goes_on_after_a_skipped_step_as_in_plain_pytorch(tmp_path: Path) -> None:
    ours, theirs = compiled(MLP.build(), tmp_path), MLP.build()
    optimizer = lohan_fx.AdamW(ours.parameters(), skip_nonfinite=True)
    reference = plain_adamw(theirs)
    pair = [schedules.ExponentialLR(opt, 0.5) for opt in (optimizer, reference)]
    with pytest.warns(RuntimeWarning, match="a gradient was NaN or Inf"):
        for index in range(4):
            factor = float("nan") if index == 2 else 1.0
            for model in (ours, theirs):
                (model(**MLP.batch(index)) * factor).backward()
            optimizer.step()
            if index != 2:
                reference.step()
            reference.zero_grad()
            for scheduler in pair:
                scheduler.step()
    assert_same(ours, theirs)
    ours.close()


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_every_scalar_of_a_group_may_change_between_steps(overlap: str, tmp_path: Path) -> None:
    ours, theirs = compiled(MLP.build(), tmp_path, overlap=overlap), MLP.build()
    optimizer = lohan_fx.AdamW(groups(ours))
    reference = torch.optim.AdamW(groups(theirs), foreach=False)
    for index in range(4):
        for model, opt in ((ours, optimizer), (theirs, reference)):
            for number, group in enumerate(opt.param_groups):
                lr = torch.tensor(1e-3 * (index + 1))  # as torch's optimizers take it, too
                group["lr"] = lr if opt is optimizer else lr.item()
                group["weight_decay"] = 0.1 * index
                group["betas"] = (0.9 - 0.1 * number, 0.99 - 0.01 * index)
                group["eps"] = 10.0 ** -(6 + number)
            step(model, opt, MLP.batch(index))
    assert_same(ours, theirs)
    ours.close()


def test_optimizer_hooks_run_around_every_step(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    handle = optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    step(model, optimizer, MLP.batch(0))
    handle.remove()
    step(model, optimizer, MLP.batch(1))
    assert seen == ["before", "after", "before"]
    model.close()


def test_groups_may_be_added_as_torch_allows(tmp_path: Path) -> None:
    frozen = MLP.build()
    frozen.scale.requires_grad_(False)
    model = compiled(frozen, tmp_path)
    rest = [p for p in model.parameters() if p.requires_grad]
    optimizer = lohan_fx.AdamW(rest)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [rest[0]]})
    with pytest.raises(lohan_fx.LohanError, match="is not managed by lohan_fx"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ValueError, match="lr is -1"):
        optimizer.add_param_group({"params": [frozen.scale], "lr": -1.0})
    model.close()
    second = compiled(MLP.build(), tmp_path)
    first = [p for name, p in second.named_parameters() if "head" not in name]
    with pytest.raises(lohan_fx.TrainingLoopError, match="not given to the optimizer: head"):
        lohan_fx.AdamW(first)
    second.close()
