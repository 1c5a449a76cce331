"""no_sync(): the step of a plain loop whose master gradients are fp32 sums of the micro-batches'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import TIGHT, Tiny, assert_same, compiled, plain_adamw, step, tokens
from recipes import (
    OVERLAPS,
    TIERS,
    InOneTier,
    Recipe,
    assert_same_bits,
    plain,
    through_lohan,
)
from torch import nn
from training import CASES, DEVICE, Batch, Case, RandomPolicy

import lohan_fx
from lohan_fx.errors import InfeasiblePlan, TrainingLoopError


def uneven(seed: int) -> Batch:
    """Micro-batches of three sizes, by seed."""
    return tokens(seed, batch=(4, 1, 3)[seed % 3])


MLP = CASES["mlp"]
TINY = Case("tiny", lambda: Tiny(layers=1), uneven)
# Weighted by tokens, as a loop over unequal micro-batches does; a step of one, of three, of two.
MICRO = (
    ((0, 4 / 8), (1, 1 / 8), (2, 3 / 8)),
    ((3, 1.0),),
    ((5, 3 / 7), (6, 4 / 7)),
)


# In bf16 both modes have the same bits, see below.
@pytest.mark.parametrize(
    ("dtype", "overlap"),
    [
        pytest.param(torch.float32, "backward", id="fp32, backward"),
        pytest.param(torch.bfloat16, "next-forward", id="bf16, next-forward"),
    ],
)
def test_unequal_micro_batches_agree_with_plain_pytorch_in_every_tier(
    dtype: torch.dtype, overlap: str, tmp_path: Path
) -> None:
    recipe = Recipe(TINY, dtype, MICRO)
    expected = plain(recipe)
    found = {tier: through_lohan(recipe, tmp_path, tier, overlap) for tier in TIERS}
    for result in found.values():
        result.assert_close(expected, dtype)
    assert_same_bits(found)


@pytest.mark.parametrize("scale", [None, 2.0**10], ids=["unscaled", "scaled"])
def test_the_sum_is_clipped_and_unscaled(scale: float | None, tmp_path: Path) -> None:
    dtype = torch.float32 if scale is None else torch.float16
    micro = tuple(tuple((3 * s + i, 0.25) for i in range(3)) for s in range(4))
    for norm_type in (2.0, float("inf")):
        recipe = Recipe(
            MLP,
            dtype,
            micro,
            max_grad_norm=0.05,
            norm_type=norm_type,
            scale=scale,
            growth_interval=2,
        )
        expected = plain(recipe)
        found = {tier: through_lohan(recipe, tmp_path, tier) for tier in TIERS}
        for result in found.values():
            result.assert_close(expected, dtype)
        assert_same_bits(found)


def test_an_infinity_in_any_micro_batch_skips_the_step(tmp_path: Path) -> None:
    def spoil(step: int, index: int, loss: torch.Tensor) -> torch.Tensor:
        return loss * float("inf") if (step, index) in ((1, 0), (2, 1)) else loss

    micro = tuple(tuple((2 * s + i, 0.5) for i in range(2)) for s in range(4))
    recipe = Recipe(MLP, torch.float16, micro, scale=256.0, spoil=spoil)
    expected = plain(recipe)
    assert expected.scales == [256.0, 128.0, 64.0, 64.0]
    found = {tier: through_lohan(recipe, tmp_path, tier) for tier in TIERS}
    for result in found.values():
        assert result.scales == expected.scales
        for name, value in result.run.weights.items():
            torch.testing.assert_close(value, expected.run.weights[name], rtol=1e-2, atol=1e-3)
    assert found["gpu"].scales == found["ssd"].scales


def test_every_mode_and_placement_gives_the_same_bits(tmp_path: Path) -> None:
    recipe = Recipe(TINY, torch.bfloat16, MICRO)
    reference = through_lohan(recipe, tmp_path, "dram")
    for seed, overlap in enumerate((*OVERLAPS, "serial", "naive")):
        mixed = through_lohan(recipe, tmp_path, overlap=overlap, policy=RandomPolicy(seed))
        mixed.assert_equal(reference)


# ---- Loops as people write them ----


def accumulate(model: nn.Module, batches: list[Batch]) -> None:
    """Backwards of all but the last inside no_sync(), in a plain model too."""
    for batch in batches:
        if isinstance(model, lohan_fx.CompiledModel) and batch is not batches[-1]:
            with model.no_sync():
                model(**batch).backward()
        else:
            model(**batch).backward()


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_it_is_the_forward_that_counts(overlap: str, tmp_path: Path) -> None:
    """As in DDP: a forward inside accumulates, though its backward is outside; and the reverse."""
    ours, theirs = compiled(MLP.build(), tmp_path, overlap=overlap), MLP.build()
    optimizer, reference = lohan_fx.AdamW(ours.parameters()), plain_adamw(theirs)
    with ours.no_sync():
        loss = ours(**MLP.batch(0))
    loss.backward()
    last = ours(**MLP.batch(1))
    with ours.no_sync():
        last.backward()
    optimizer.step()
    accumulate(theirs, [MLP.batch(0), MLP.batch(1)])
    reference.step()
    assert_same(ours, theirs)
    ours.close()


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("tier", TIERS)
def test_a_step_may_come_after_accumulating_backwards_alone(
    tier: str, overlap: str, tmp_path: Path
) -> None:
    """The last batches of an epoch, fewer than the loop accumulates."""
    ours = compiled(MLP.build(), tmp_path, overlap=overlap, policy=InOneTier(tier))
    theirs = MLP.build()
    optimizer, reference = lohan_fx.AdamW(ours.parameters()), plain_adamw(theirs)
    for seeds in ((0, 1), (2,), (3, 4)):
        with ours.no_sync():
            for seed in seeds:
                ours(**MLP.batch(seed)).backward()
        for seed in seeds:
            theirs(**MLP.batch(seed)).backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    assert_same(ours, theirs)
    assert int(optimizer.state_dict()["state"][0]["step"]) == 3
    ours.close()


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_zero_grad_drops_what_was_accumulated(clear: str, overlap: str, tmp_path: Path) -> None:
    ours, theirs = compiled(MLP.build(), tmp_path, overlap=overlap), MLP.build()
    optimizer, reference = lohan_fx.AdamW(ours.parameters()), plain_adamw(theirs)
    with ours.no_sync():
        ours(**MLP.batch(0)).backward()
        (optimizer if clear == "optimizer" else ours).zero_grad()
        optimizer.step()  # nothing to do
        ours(**MLP.batch(1)).backward()
    ours(**MLP.batch(2)).backward()
    optimizer.step()
    accumulate(theirs, [MLP.batch(1), MLP.batch(2)])
    reference.step()
    assert_same(ours, theirs)
    assert int(optimizer.state_dict()["state"][0]["step"]) == 1
    ours.close()


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_second_backward_without_it_stays_an_error(overlap: str, tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path, overlap=overlap)
    optimizer = lohan_fx.AdamW(model.parameters())
    accumulate(model, [MLP.batch(0), MLP.batch(1)])
    refusal = pytest.raises(TrainingLoopError, match=r"call opt\.step|step\(\) was not called")
    with refusal, model.no_sync():
        model(**MLP.batch(2)).backward()
    optimizer.step()
    model.close()


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_evaluation_between_micro_batches_changes_nothing(overlap: str, tmp_path: Path) -> None:
    ours, theirs = compiled(TINY.build(), tmp_path, overlap=overlap), TINY.build()
    optimizer, reference = lohan_fx.AdamW(ours.parameters()), plain_adamw(theirs)
    with ours.no_sync():
        ours(**tokens(0)).backward()
    with torch.no_grad():
        ours.eval()
        seen = ours(**tokens(7))
        ours.train()
    ours(**tokens(1)).backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(seen, theirs(**tokens(7)))
    accumulate(theirs, [tokens(0), tokens(1)])
    reference.step()
    assert_same(ours, theirs)
    ours.close()


def test_accumulators_appear_where_training_began_without_and_move_along(tmp_path: Path) -> None:
    """A plan that did not count them is made anew; sums move with their buckets, mid-step."""
    ours, theirs = compiled(Tiny(), tmp_path, policy=RandomPolicy(1)), Tiny()
    optimizer, reference = lohan_fx.AdamW(ours.parameters()), plain_adamw(theirs)
    step(ours, optimizer, tokens(0))
    step(theirs, reference, tokens(0))
    session = ours._lohan
    assert not session.captured[-1].options.accumulates
    with ours.no_sync():
        ours(**tokens(1)).backward()
    assert session.captured[-1].options.accumulates
    # A shape of its own, whose plan puts everything elsewhere.
    session.settings = replace(session.settings, policy=InOneTier("dram"))
    batches = [tokens(1), tokens(2, batch=2)]
    ours(**batches[1]).backward()
    assert {str(p.state) for p in session.captured[-1].placements} == {"dram"}
    optimizer.step()
    accumulate(theirs, batches)
    reference.step()
    assert_same(ours, theirs)
    ours.close()


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_the_last_backward_updates_as_it_would_alone(overlap: str, tmp_path: Path) -> None:
    """Accumulating backwards update nothing; the last one does, in the mode that overlaps with it."""
    model = compiled(Tiny(), tmp_path, overlap=overlap)
    optimizer = lohan_fx.AdamW(model.parameters())
    first = {name: value.clone() for name, value in model.state_dict().items()}
    with model.no_sync():
        model(**tokens(0)).backward()
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    model(**tokens(1)).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step()
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert len(changed) == (0 if overlap == "backward" else len(before))
    model.close()


# ---- What goes wrong ----


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a budget of a CUDA device leaves a margin")
def test_a_budget_without_room_for_the_accumulators_says_how_large_they_are(tmp_path: Path) -> None:
    model = compiled(Tiny(), tmp_path, budget=TIGHT)
    optimizer = lohan_fx.AdamW(model.parameters())
    step(model, optimizer, tokens(0))
    numel = sum(p.numel() for p in model.parameters())
    with (
        pytest.raises(InfeasiblePlan, match=r"no_sync\(\) adds \S+ \S+ of fp32 gradient") as caught,
        model.no_sync(),
    ):
        model(**tokens(1))
    said = float(str(caught.value).split("no_sync() adds ")[1].split()[0])
    assert 4 * numel / 1e3 <= said <= 4 * numel / 1e3 + 4.1 * len(model._lohan.buckets)
    # Without it, training goes on.
    model._lohan._accumulates = False
    step(model, optimizer, tokens(1))
    model.close()


def test_the_plan_counts_the_accumulators(tmp_path: Path) -> None:
    peaks = []
    for uses in (False, True):
        model: Any = compiled(Tiny(), tmp_path, policy=InOneTier("dram"))
        optimizer = lohan_fx.AdamW(model.parameters())
        if uses:
            with model.no_sync():
                model(**tokens(0)).backward()
        step(model, optimizer, tokens(1))
        predicted = model.plan.predicted.peak_bytes["dram"]
        assert model._lohan.stats().peak_bytes["dram"] <= predicted
        peaks.append(predicted)
        model.close()
    numel = sum(p.numel() for p in Tiny().parameters())
    assert peaks[1] - peaks[0] >= 4 * numel
