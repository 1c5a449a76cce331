"""Dynamic loss scaling and skip_nonfinite: the same steps as torch.amp.GradScaler makes and skips."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import TINY, assert_same, compiled, new_garbage_only, step, tokens
from recipes import TIERS, Recipe, assert_same_bits, plain, through_lohan
from training import CASES

import lohan_fx
from lohan_fx.errors import TrainingLoopError
from lohan_fx.optim import loss_scalers

MLP = CASES["mlp"]
STEPS = tuple(((seed, 1.0),) for seed in range(7))


@pytest.fixture(autouse=True)
def no_scaler_is_left() -> Iterator[None]:
    """A scaler that lives makes every model wait for step()."""
    if list(loss_scalers):  # of other tests
        gc.collect()
    with new_garbage_only():
        yield
        gc.collect()
        assert not list(loss_scalers)


@pytest.mark.parametrize("limit", [None, 0.05], ids=["plain", "clipped"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        pytest.param(torch.float16, 2.0**18, id="fp16-overflows-at-first"),
        pytest.param(torch.float16, 1000.0, id="fp16-no-power-of-two"),
        pytest.param(torch.bfloat16, 2.0**16, id="bf16"),
    ],
)
def test_steps_skips_and_scales_agree_with_torch_in_every_tier(
    dtype: torch.dtype, scale: float, limit: float | None, tmp_path: Path
) -> None:
    recipe = Recipe(MLP, dtype, STEPS, max_grad_norm=limit, scale=scale, growth_interval=3)
    expected = plain(recipe)
    skipped = []
    found = {
        tier: through_lohan(
            recipe, tmp_path, tier, check=lambda _, opt: skipped.append(opt.skipped_steps)
        )
        for tier in TIERS
    }
    for result in found.values():
        result.assert_close(expected, dtype)
    assert_same_bits(found)
    backoffs = sum(b < a for a, b in zip([scale, *expected.scales], expected.scales, strict=False))
    assert skipped == [backoffs] * len(TIERS)
    assert len(set(expected.scales)) > 1  # grown, or backed off
    if scale == 2.0**18:
        assert backoffs


def test_a_skipped_step_changes_nothing(tmp_path: Path) -> None:
    def state(model: Any, optimizer: Any) -> list[torch.Tensor]:
        found = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
        return found + list(model.state_dict().values())

    model = compiled(TINY.build(), tmp_path, budget="gpu=160kB, dram=400kB")
    optimizer = lohan_fx.AdamW(model.parameters())
    scaler = lohan_fx.GradScaler("cpu", init_scale=4.0)
    for seed in range(2):
        scaler.scale(model(**tokens(seed))).backward()
        scaler.step(optimizer)
        scaler.update()
    before = state(model, optimizer)
    scaler.scale(model(**tokens(2)) * torch.tensor(float("nan"))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, state(model, optimizer), strict=True))
    assert (scaler.get_scale(), optimizer.skipped_steps) == (2.0, 1)
    # Training goes on without a zero_grad(): the gradients went with the step.
    scaler.scale(model(**tokens(3))).backward()
    scaler.step(optimizer)
    assert int(optimizer.state_dict()["state"][0]["step"]) == 3
    assert "3 made, 1 skipped for a NaN or Inf gradient" in model.report()
    model.close()


def test_unscale_then_step_is_one_unscaling(tmp_path: Path) -> None:
    models = [compiled(MLP.build(), tmp_path) for _ in range(2)]
    optimizers = [lohan_fx.AdamW(m.parameters(), max_grad_norm=0.1) for m in models]
    for explicit, model, optimizer in zip((True, False), models, optimizers, strict=True):
        scaler = lohan_fx.GradScaler("cpu", init_scale=64.0)
        for seed in range(3):
            scaler.scale(model(**MLP.batch(seed))).backward()
            if explicit:
                scaler.unscale_(optimizer)
                with pytest.raises(RuntimeError, match="already been called"):
                    scaler.unscale_(optimizer)
            scaler.step(optimizer)
            with pytest.raises(RuntimeError, match="already been called since the last update"):
                scaler.step(optimizer)
            scaler.update()
    assert_same(models[0], models[1], exact=True)
    for model in models:
        model.close()


def test_a_disabled_scaler_and_other_optimizers_are_left_alone(tmp_path: Path) -> None:
    ours, theirs = compiled(MLP.build(), tmp_path, overlap="backward"), MLP.build()
    optimizer = lohan_fx.AdamW(ours.parameters())
    scaler = lohan_fx.GradScaler("cpu", enabled=False)
    scaler.scale(ours(**MLP.batch(0))).backward()
    scaler.step(optimizer)
    scaler.update()
    enabled = lohan_fx.GradScaler("cpu", init_scale=8.0)
    reference = torch.optim.AdamW(theirs.parameters(), foreach=False)
    enabled.scale(theirs(**MLP.batch(0))).backward()
    enabled.step(reference)
    enabled.update()
    assert_same(ours, theirs)
    ours.close()


def test_the_state_of_a_scaler_is_torchs(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    ours = lohan_fx.GradScaler("cpu", init_scale=16.0, growth_interval=2)
    for seed in range(3):
        ours.scale(model(**MLP.batch(seed))).backward()
        ours.step(optimizer)
        ours.update()
        optimizer.zero_grad()
    theirs = torch.amp.GradScaler("cpu", init_scale=1.0)
    theirs.load_state_dict(ours.state_dict())
    assert theirs.state_dict() == ours.state_dict()
    assert ours.get_scale() == 32.0
    model.close()


# ---- What cannot work is refused before anything is changed ----


def _refused(
    tmp_path: Path, overlap: str, use: Callable[[Any, Any, torch.Tensor], None], message: str
) -> None:
    model = compiled(MLP.build(), tmp_path, overlap=overlap)
    optimizer = lohan_fx.AdamW(model.parameters())
    loss = model(**MLP.batch(0))
    with pytest.raises(TrainingLoopError, match=message):
        use(model, optimizer, loss)
    del loss
    assert_same(model, MLP.build(), exact=True)
    model.close()


def test_torchs_scaler_is_refused_naming_ours(tmp_path: Path) -> None:
    def use(model: Any, optimizer: Any, loss: torch.Tensor) -> None:
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss).backward()
        scaler.step(optimizer)

    _refused(tmp_path, "next-forward", use, "use lohan_fx.GradScaler")


def test_torchs_unscale_is_refused_naming_ours(tmp_path: Path) -> None:
    def use(model: Any, optimizer: Any, loss: torch.Tensor) -> None:
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)

    _refused(tmp_path, "next-forward", use, "use lohan_fx.GradScaler")


def test_scaling_is_refused_where_the_backward_updates(tmp_path: Path) -> None:
    def use(model: Any, optimizer: Any, loss: torch.Tensor) -> None:
        lohan_fx.GradScaler("cpu").scale(loss).backward()

    _refused(tmp_path, "backward", use, "loss scaling needs every gradient.*next-forward")


def test_unscaling_without_gradients_is_refused(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    scaler = lohan_fx.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(TrainingLoopError, match="no gradients to unscale"):
        scaler.step(optimizer)  # there is not even a plan
    step(model, optimizer, MLP.batch(0))
    with pytest.raises(TrainingLoopError, match="no gradients to unscale"):
        scaler.unscale_(optimizer)
    model.close()


def test_a_scaler_made_late_plans_the_model_anew(tmp_path: Path) -> None:
    ours, other = (compiled(MLP.build(), tmp_path) for _ in range(2))
    optimizer, reference = (lohan_fx.AdamW(m.parameters()) for m in (ours, other))
    step(ours, optimizer, MLP.batch(0))
    step(other, reference, MLP.batch(0))
    step(other, reference, MLP.batch(1))
    scaler = lohan_fx.GradScaler("cpu", init_scale=2.0)
    scaler.scale(ours(**MLP.batch(1))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert [c.options.overlap for c in ours._lohan.captured] == ["backward", "next-forward"]
    assert_same(ours, other, exact=True)
    for model in (ours, other):
        model.close()


# ---- skip_nonfinite ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("tier", TIERS)
def test_a_nonfinite_step_is_skipped_counted_and_reported_once(
    tier: str, bad: float, tmp_path: Path
) -> None:
    """As a plain loop that leaves step() out where a gradient is not finite."""
    from recipes import InOneTier

    ours, theirs = compiled(MLP.build(), tmp_path, policy=InOneTier(tier)), MLP.build()
    optimizer = lohan_fx.AdamW(ours.parameters(), skip_nonfinite=True, max_grad_norm=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), foreach=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for index in range(5):
            factor = bad if index in (1, 3) else 1.0
            for model in (ours, theirs):
                (model(**MLP.batch(index)) * factor).backward()
            optimizer.step()
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
            if norm.isfinite():
                reference.step()
            reference.zero_grad()
            found = optimizer.last_grad_norm
            assert found == pytest.approx(norm.item(), rel=1e-5, nan_ok=True)
            assert optimizer.skipped_steps == (index + 1) // 2
    assert_same(ours, theirs)
    assert int(optimizer.state_dict()["state"][0]["step"]) == 3
    assert [str(w.message) for w in seen if "skip_nonfinite" in str(w.message)] != []
    assert len([w for w in seen if "skip_nonfinite" in str(w.message)]) == 1
    assert "3 made, 2 skipped for a NaN or Inf gradient" in ours.report()
    ours.close()


def test_without_it_a_nan_goes_where_it_does_in_plain_pytorch(tmp_path: Path) -> None:
    recipe = replace(
        Recipe(MLP, micro=STEPS[:2]),
        spoil=lambda step, index, loss: loss * float("nan") if step == 1 else loss,
    )
    found = through_lohan(recipe, tmp_path, "dram").run
    assert all(value.isnan().all() for value in found.weights.values())
