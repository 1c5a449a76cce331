"""What a training loop may do, and what it is told when it may not.

Runs over plain ATen regions, where everything that does not change the mathematics is bit for bit;
against plain PyTorch in fp32, losses and weights agree to 1e-5.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import (
    TIGHT,
    Tiny,
    assert_losses,
    assert_same,
    compiled,
    plain_adamw,
    step,
    steps,
    tokens,
)
from torch import nn
from training import CASES, Case, RandomPolicy, loss_of, train_lohan, train_plain

import lohan_fx
from lohan_fx.errors import LohanError, TrainingLoopError

MLP = CASES["mlp"]
TINY = Case("tiny", Tiny, tokens)
CPU = torch.device("cpu")


# ---- One backward, one step ----


def test_a_missing_step_is_told_which_mode_would_allow_it(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path, overlap="backward")
    optimizer = lohan_fx.AdamW(model.parameters())
    model(**MLP.batch(0)).backward()
    with pytest.raises(TrainingLoopError, match=r'step\(\) was not called.*overlap="next-forward"'):
        model(**MLP.batch(1))
    optimizer.step()
    assert step(model, optimizer, MLP.batch(1)) > 0
    model.close()


def test_a_second_backward_without_a_step_is_refused(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path, overlap="next-forward")
    optimizer = lohan_fx.AdamW(model.parameters())
    model(**MLP.batch(0)).backward()
    loss = model(**MLP.batch(1))
    with pytest.raises(TrainingLoopError, match=r"second backward before opt\.step"):
        loss.backward()
    optimizer.step()
    model.close()


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_a_skipped_step_is_as_harmless_as_in_plain_pytorch(clear: str, tmp_path: Path) -> None:
    ours, theirs = compiled(MLP.build(), tmp_path, overlap="next-forward"), MLP.build()
    optimizer = lohan_fx.AdamW(ours.parameters())
    reference = plain_adamw(theirs)
    for index in range(4):
        for model, opt in ((ours, optimizer), (theirs, reference)):
            model(**MLP.batch(index)).backward()
            if index != 1:
                opt.step()
            (opt if clear == "optimizer" else model).zero_grad()
    assert_same(ours, theirs)
    assert int(optimizer.state_dict()["state"][0]["step"]) == 3
    ours.close()


def test_a_second_backward_of_one_loss_is_refused(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    loss = model(**MLP.batch(0))
    loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert step(model, optimizer, MLP.batch(1)) > 0
    model.close()


def test_retain_graph_is_refused(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    loss = model(**MLP.batch(0))
    with pytest.raises((LohanError, RuntimeError), match="retain_graph"):
        loss.backward(retain_graph=True)
        optimizer.step()
        loss.backward()
    del loss
    model.close()


def test_a_dropped_loss_frees_its_activations(tmp_path: Path) -> None:
    """A forward without a backward changes nothing in what follows."""
    model, other = (compiled(Tiny(), tmp_path, policy=RandomPolicy(seed)) for seed in (1, 2))
    optimizer, reference = (lohan_fx.AdamW(m.parameters()) for m in (model, other))
    first = step(model, optimizer, tokens(0))
    tiers = {str(slot.tier) for slot in model._lohan.captured[0].woven.program.slots}
    assert tiers == {"dram", "ssd"}
    loss = loss_of(model(**tokens(1)))
    del loss
    second = step(model, optimizer, tokens(2))
    assert [first, second] == steps(other, reference, [tokens(0), tokens(2)])
    assert_same(model, other, exact=True)
    model.close()
    other.close()


def test_a_second_training_forward_before_the_backward_is_refused(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    loss = model(**MLP.batch(0))
    with pytest.raises(TrainingLoopError, match=r"another one's activations.*no_grad"):
        model(**MLP.batch(1))
    loss.backward()
    optimizer.step()
    model.close()


def test_a_step_between_forward_and_backward_is_refused(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path, overlap="next-forward")
    optimizer = lohan_fx.AdamW(model.parameters())
    model(**MLP.batch(0)).backward()
    loss = model(**MLP.batch(1))
    optimizer.step()
    with pytest.raises(TrainingLoopError, match="changed the weights between"):
        loss.backward()
    model.close()


def test_after_a_failed_backward_training_goes_on(tmp_path: Path) -> None:
    model, theirs = compiled(MLP.build(), tmp_path, overlap="next-forward"), MLP.build()
    optimizer = lohan_fx.AdamW(model.parameters())
    reference = plain_adamw(theirs)
    with pytest.raises(TrainingLoopError, match="outside of the compiled forward"):
        (model(**MLP.batch(0)) + model.head.weight.norm()).backward()
    gc.collect()
    batches = [MLP.batch(1), MLP.batch(2)]
    assert_losses(steps(model, optimizer, batches), steps(theirs, reference, batches))
    model.close()


# ---- Optimizers and schedules ----


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Biases and norms without decay, the head with other betas and eps, as many scripts have it."""
    named = dict(model.named_parameters())
    vectors = [p for p in named.values() if p.dim() < 2]
    head = [p for name, p in named.items() if p.dim() >= 2 and "head" in name]
    rest = [p for name, p in named.items() if p.dim() >= 2 and "head" not in name]
    return [
        {"params": rest},
        {"params": vectors, "weight_decay": 0.0, "lr": 3e-3},
        {"params": head, "betas": (0.8, 0.95), "eps": 1e-6},
    ]


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=4),
    "warm-up": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min(1.0, (s + 1) / 3)),
    "one-cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(
        opt, max_lr=1e-2, total_steps=6, cycle_momentum=False
    ),
}


@pytest.mark.parametrize("overlap", ["backward", "next-forward"])
@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam"])
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_groups_and_schedules_agree_with_plain_pytorch(
    schedule: str, decoupled: bool, overlap: str, tmp_path: Path
) -> None:
    ours, theirs = compiled(MLP.build(), tmp_path, overlap=overlap), MLP.build()
    options: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.1}
    kinds = (lohan_fx.AdamW, torch.optim.AdamW) if decoupled else (lohan_fx.Adam, torch.optim.Adam)
    optimizer = kinds[0](groups(ours), **options)
    reference = kinds[1](groups(theirs), **options, foreach=False)
    schedulers = [SCHEDULERS[schedule](opt) for opt in (optimizer, reference)]
    for index in range(5):
        pair = [
            step(ours, optimizer, MLP.batch(index)),
            step(theirs, reference, MLP.batch(index)),
        ]
        for scheduler in schedulers:
            scheduler.step()
        assert pair[0] == pytest.approx(pair[1], rel=1e-5)
        assert [g["lr"] for g in optimizer.param_groups] == [
            g["lr"] for g in reference.param_groups
        ]
    assert_same(ours, theirs)
    ours.close()


def test_a_learning_rate_set_between_steps_counts_from_the_next_step(tmp_path: Path) -> None:
    ours, theirs = compiled(MLP.build(), tmp_path), MLP.build()
    optimizer = lohan_fx.AdamW(ours.parameters())
    reference = plain_adamw(theirs)
    for index, lr in enumerate((1e-3, 1e-2, 0.0)):
        for model, opt in ((ours, optimizer), (theirs, reference)):
            opt.param_groups[0]["lr"] = lr
            step(model, opt, MLP.batch(index))
    assert_same(ours, theirs)
    ours.close()


@pytest.mark.parametrize("overlap", ["backward", "next-forward", "speculative"])
def test_a_learning_rate_set_between_backward_and_step_counts_or_is_refused(
    overlap: str, tmp_path: Path
) -> None:
    ours, theirs = compiled(MLP.build(), tmp_path, overlap=overlap), MLP.build()
    optimizer = lohan_fx.AdamW(ours.parameters())
    reference = plain_adamw(theirs)
    for model, opt in ((ours, optimizer), (theirs, reference)):
        model(**MLP.batch(0)).backward()
        opt.param_groups[0]["lr"] = 0.05
    reference.step()
    if overlap == "backward":
        with pytest.raises(TrainingLoopError, match=r"between backward and step.*next-forward"):
            optimizer.step()
    else:
        optimizer.step()
        assert_same(ours, theirs)
    ours.close()


def test_step_takes_a_closure(tmp_path: Path) -> None:
    ours, theirs = compiled(MLP.build(), tmp_path), MLP.build()
    losses = []
    for model, opt in (
        (ours, lohan_fx.AdamW(ours.parameters())),
        (theirs, plain_adamw(theirs)),
    ):

        def closure(model: nn.Module = model, opt: Any = opt) -> torch.Tensor:
            opt.zero_grad()
            loss: torch.Tensor = model(**MLP.batch(0))
            loss.backward()
            return loss

        losses.append(opt.step(closure).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same(ours, theirs)
    ours.close()


def test_step_without_a_backward_does_nothing(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    optimizer.step()
    assert_same(model, MLP.build(), exact=True)
    step(model, optimizer, MLP.batch(0))
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert int(optimizer.state_dict()["state"][0]["step"]) == 1
    model.close()


@pytest.mark.parametrize(
    ("dtype", "norm"),
    [
        pytest.param(torch.float32, 100.0, id="fp32, none clipped"),
        pytest.param(torch.bfloat16, 0.05, id="bf16, all clipped"),
    ],
)
def test_clipping_is_clip_grad_norm(dtype: torch.dtype, norm: float, tmp_path: Path) -> None:
    plain = train_plain(TINY, dtype, max_grad_norm=norm, device=CPU)
    tight = {"budget": TIGHT, "policy": "greedy"}
    ours = train_lohan(TINY, dtype, tmp_path, max_grad_norm=norm, device=CPU, **tight)
    roomy = train_lohan(TINY, dtype, tmp_path, max_grad_norm=norm, device=CPU)
    ours.assert_equal(roomy)
    close = 1e-5 if dtype is torch.float32 else 1e-2
    assert ours.norms == pytest.approx(plain.norms, rel=close)
    ours.assert_close(plain, close, 1e-5 if dtype is torch.float32 else 2.5e-3)


def test_every_overlap_mode_gives_the_same_bits(tmp_path: Path) -> None:
    runs = [
        train_lohan(
            TINY,
            torch.bfloat16,
            tmp_path,
            budget=TIGHT,
            policy="greedy",
            overlap=overlap,
            device=CPU,
        )
        for overlap in ("backward", "next-forward", "speculative", "serial", "naive")
    ]
    for run in runs[1:]:
        run.assert_equal(runs[0])


def test_a_new_optimizer_after_the_old_one_starts_from_zero_moments(tmp_path: Path) -> None:
    ours, theirs = compiled(MLP.build(), tmp_path), MLP.build()
    for _ in range(2):
        optimizer = lohan_fx.AdamW(ours.parameters())
        reference = plain_adamw(theirs)
        for index in range(2):
            step(ours, optimizer, MLP.batch(index))
            step(theirs, reference, MLP.batch(index))
        del optimizer
        gc.collect()
    assert_same(ours, theirs)
    ours.close()
