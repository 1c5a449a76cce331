"""max_grad_norm is clip_grad_norm_: over plain ATen, in every tier, before the very first update."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import TINY, Tiny, assert_same, compiled, plain_adamw, step, tokens
from recipes import DTYPES, TIERS, Recipe, assert_same_bits, plain, through_lohan
from torch import nn
from training import CASES

import lohan_fx
from lohan_fx.errors import LohanError

MLP = CASES["mlp"]
STEPS = tuple(((seed, 1.0),) for seed in range(4))


@pytest.mark.parametrize("norm_type", [2.0, math.inf], ids=["l2", "inf"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping_agrees_with_clip_grad_norm_in_every_tier(
    dtype: torch.dtype, norm_type: float, tmp_path: Path
) -> None:
    recipe = Recipe(MLP, dtype, STEPS, norm_type=norm_type)
    both = norm_type == 2.0 and dtype is torch.float32
    for limit in (0.05, 100.0) if both else (0.05,):  # every step is clipped, none is
        clipped = replace(recipe, max_grad_norm=limit)
        expected = plain(clipped)
        found = {tier: through_lohan(clipped, tmp_path, tier) for tier in TIERS}
        for result in found.values():
            result.assert_close(expected, dtype)
            assert all(norm is not None for norm in result.run.norms)
        assert_same_bits(found)
        assert (found["dram"].run.norms[0] or 0.0) > 0.05


@pytest.mark.parametrize("overlap", ["next-forward", "speculative", "serial"])
def test_the_modes_that_wait_for_step_clip_alike(overlap: str, tmp_path: Path) -> None:
    recipe = Recipe(TINY, torch.bfloat16, STEPS[:3], max_grad_norm=0.3)
    auto = through_lohan(recipe, tmp_path, "dram")
    through_lohan(recipe, tmp_path, "ssd", overlap).assert_equal(auto)


def test_the_factor_is_that_of_torch_to_the_last_bit() -> None:
    from lohan_fx.runtime.norms import StepNorms, Wanted

    generator = torch.Generator().manual_seed(0)
    for limit in (0.1, 1.0, 3.7, 1e9):
        for _ in range(50):
            grads = [torch.randn(31, generator=generator) for _ in range(5)]
            params = [torch.nn.Parameter(torch.zeros(31)) for _ in grads]
            for kind in (2.0, math.inf):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad.clone()
                rows = [
                    torch.linalg.vector_norm(g, order) for order in (2, math.inf) for g in grads
                ]
                norms = StepNorms(torch.stack(rows).view(2, -1))
                total, factor = norms.clipping(Wanted(limit, kind), 1.0)
                expected = torch.nn.utils.clip_grad_norm_(params, limit, kind, foreach=False)
                assert total == expected.item()
                for param, grad in zip(params, grads, strict=True):
                    assert torch.equal(param.grad, grad * factor)


def test_the_norm_is_over_all_groups_without_frozen_parameters(tmp_path: Path) -> None:
    def frozen_embedding() -> nn.Module:
        model = Tiny()
        model.embed.requires_grad_(False)
        return model

    ours, theirs = compiled(frozen_embedding(), tmp_path), frozen_embedding()
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        vectors = [p for p in model.parameters() if p.dim() < 2 and p.requires_grad]
        rest = [p for p in model.parameters() if p.dim() >= 2]
        return [{"params": rest}, {"params": vectors, "weight_decay": 0.0, "lr": 1e-3}]

    optimizer = lohan_fx.AdamW(groups(ours), **options, max_grad_norm=0.2)
    reference = torch.optim.AdamW(groups(theirs), **options, foreach=False)
    for seed in range(3):
        step(ours, optimizer, tokens(seed))
        theirs(**tokens(seed)).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.2)
        assert optimizer.last_grad_norm == pytest.approx(norm.item(), rel=1e-5)
        reference.step()
        reference.zero_grad()
    assert_same(ours, theirs)
    ours.close()


def test_the_limit_may_change_between_steps_and_be_given_late(tmp_path: Path) -> None:
    ours, theirs = compiled(MLP.build(), tmp_path), MLP.build()
    optimizer = lohan_fx.AdamW(ours.parameters())
    reference = plain_adamw(theirs)
    for seed, limit in enumerate((None, 0.1, 0.02, None, 0.1)):
        optimizer.max_grad_norm = limit
        step(ours, optimizer, MLP.batch(seed))
        theirs(**MLP.batch(seed)).backward()
        if limit is not None:
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
            assert optimizer.last_grad_norm == pytest.approx(norm.item(), rel=1e-5)
        reference.step()
        reference.zero_grad()
    assert_same(ours, theirs)
    # Two plans: one that updates in the backward, one that waits; not one for each change.
    assert [c.options.overlap for c in ours._lohan.captured] == ["backward", "next-forward"]
    ours.close()


@pytest.mark.parametrize(
    ("options", "group", "message"),
    [
        ({"norm_type": 1.0}, {}, "norm_type is 1.0"),
        ({"max_grad_norm": -1.0}, {}, "max_grad_norm is -1.0"),
        ({}, {"max_grad_norm": None}, "max_grad_norm is given to a parameter group"),
        ({}, {"norm_type": 2.0}, "norm_type is given to a parameter group"),
        ({}, {"amsgrad": True}, "amsgrad=True is not supported"),
    ],
)
def test_what_would_be_ignored_is_refused(
    options: dict[str, Any], group: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = compiled(MLP.build(), tmp_path)
    with pytest.raises(ValueError, match=message):
        lohan_fx.AdamW([{"params": list(model.parameters()), **group}], **options)
    model.close()


@pytest.mark.parametrize("overlap", ["backward", "naive"])
@pytest.mark.parametrize("option", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}])
def test_a_mode_that_does_not_wait_is_refused(
    option: dict[str, Any], overlap: str, tmp_path: Path
) -> None:
    model = compiled(MLP.build(), tmp_path, overlap=overlap)
    with pytest.raises(
        LohanError, match=f"{next(iter(option))}.*overlap='{overlap}'.*next-forward"
    ):
        lohan_fx.AdamW(model.parameters(), **option)
    model.close()
