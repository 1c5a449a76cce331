"""Kinds of models, and what the model object is and refuses after compile."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import (
    ROOMY,
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
from torch.nn import functional
from training import CASES, RandomPolicy, gpt2, llama, loss_of

import lohan_fx
from lohan_fx.errors import CaptureError, LohanError, TrainingLoopError

MLP, LLAMA, GPT2 = CASES["mlp"], CASES["llama"], CASES["gpt2"]


# ---- Models ----


def test_a_loss_computed_outside_of_the_model(tmp_path: Path) -> None:
    ours, theirs = compiled(Tiny(), tmp_path, TIGHT), Tiny()
    optimizer = lohan_fx.AdamW(ours.parameters())
    reference = plain_adamw(theirs)
    for index in range(3):
        ids = tokens(index, batch=3)["ids"]
        losses = []
        for model, opt in ((ours, optimizer), (theirs, reference)):
            logits = model(ids)
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss = loss + 1e-3 * logits.pow(2).mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same(ours, theirs)
    ours.close()


def test_two_instances_of_one_class_do_not_mix(tmp_path: Path) -> None:
    ours = [compiled(Tiny(), tmp_path, budget) for budget in (ROOMY, TIGHT)]
    optimizers = [
        lohan_fx.AdamW(m.parameters(), lr=lr) for m, lr in zip(ours, (1e-3, 1e-2), strict=True)
    ]
    losses: list[list[float]] = [[], []]
    for index in range(3):
        for which in (0, 1):
            losses[which].append(step(ours[which], optimizers[which], tokens(index + which)))
    for which in (0, 1):
        theirs = Tiny()
        reference = torch.optim.AdamW(theirs.parameters(), lr=(1e-3, 1e-2)[which], foreach=False)
        batches = [tokens(index + which) for index in range(3)]
        assert_losses(losses[which], steps(theirs, reference, batches))
        assert_same(ours[which], theirs)
        ours[which].close()


class LowRank(nn.Module):
    """Frozen matrices with trainable low-rank updates beside them."""

    def __init__(self, width: int = 24, rank: int = 3, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.base.requires_grad_(False)
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(rank, width, bias=False) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for base, down, up in zip(self.base, self.down, self.up, strict=True):
            x = x + torch.tanh(base(x) + up(down(x)))
        return x.square().mean()


@pytest.mark.parametrize("budget", [ROOMY, "gpu=18kB, dram=52kB"], ids=["roomy", "tight"])
def test_frozen_parameters_have_no_state_and_stay_as_they_are(budget: str, tmp_path: Path) -> None:
    ours, theirs = compiled(LowRank(), tmp_path, budget, bucket_numel=700), LowRank()
    optimizer = lohan_fx.AdamW(ours.parameters())
    reference = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad])
    batches = [
        {"x": torch.randn(4, 24, generator=torch.Generator().manual_seed(i))} for i in range(3)
    ]
    assert_losses(steps(ours, optimizer, batches), steps(theirs, reference, batches))
    assert_same(ours, theirs)
    frozen = [not p.requires_grad for p in ours.parameters()]
    states = optimizer.state_dict()["state"]
    assert [not states[i] for i in range(len(frozen))] == frozen
    assert all(t.placement != "ssd" or budget != ROOMY for t in ours.plan.tensors)
    classes = {t.name: t.cls for t in ours.plan.tensors if t.cls == "moments32"}
    assert not any(name.startswith("base.") for name in classes)
    ours.close()


def test_only_the_trainable_parameters_may_be_given_to_the_optimizer(tmp_path: Path) -> None:
    model = compiled(LowRank(), tmp_path)
    optimizer = lohan_fx.AdamW(p for p in model.parameters() if p.requires_grad)
    assert step(model, optimizer, {"x": torch.ones(4, 24)}) > 0
    model.close()


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    ours, theirs = compiled(GPT2.build(), tmp_path, "gpu=600kB, dram=800kB"), GPT2.build()
    optimizer = lohan_fx.AdamW(ours.parameters())
    reference = plain_adamw(theirs)
    batches = [GPT2.batch(index) for index in range(3)]
    assert_losses(steps(ours, optimizer, batches), steps(theirs, reference, batches))
    assert ours.lm_head.weight is ours.transformer.wte.weight
    state = ours.state_dict()
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
    assert len(optimizer.param_groups[0]["params"]) == len(list(theirs.parameters()))
    assert [t.name for t in ours.plan.tensors].count("lm_head.weight") == 0
    ours.close()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(6 * 64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)).square().mean()


def test_batch_norm_buffers_are_updated_as_in_plain(tmp_path: Path) -> None:
    ours, theirs = compiled(Normed(), tmp_path, "gpu=70kB, dram=1MB"), Normed()
    optimizer = lohan_fx.AdamW(ours.parameters())
    reference = plain_adamw(theirs)
    batches = [
        {"x": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i))} for i in range(3)
    ]
    assert_losses(steps(ours, optimizer, batches), steps(theirs, reference, batches))
    assert int(ours.body[1].num_batches_tracked) == 3
    assert_same(ours, theirs)
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(**batches[0]), theirs(**batches[0]))
    assert_same(ours, theirs)
    ours.close()


def test_autocast_in_the_loop_agrees_with_plain(tmp_path: Path) -> None:
    ours, theirs = compiled(Tiny(), tmp_path, TIGHT), Tiny()
    optimizer = lohan_fx.AdamW(ours.parameters())
    reference = plain_adamw(theirs)
    for index in range(3):
        losses = []
        for model, opt in ((ours, optimizer), (theirs, reference)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model(**tokens(index)))
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    ours.close()


class OddParameters(nn.Module):
    """A scalar, an empty one, a transposed one, int8 that is frozen, and weight normalisation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.turned = nn.Parameter(torch.randn(6, 4).t())
        self.table = nn.Parameter(torch.randint(-8, 8, (6, 6)).to(torch.int8), requires_grad=False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.turned @ (self.table.float() / 8)
        return (self.normed(y) * self.scalar).square().mean() + self.empty.sum()


@pytest.mark.parametrize("seed", range(3))
def test_parameters_of_odd_shapes_strides_and_dtypes(seed: int, tmp_path: Path) -> None:
    ours, theirs = compiled(OddParameters(), tmp_path, policy=RandomPolicy(seed)), OddParameters()
    optimizer = lohan_fx.AdamW(ours.parameters())
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    reference = torch.optim.AdamW(trainable, foreach=False)
    batches = [
        {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(i))} for i in range(3)
    ]
    assert_losses(steps(ours, optimizer, batches), steps(theirs, reference, batches))
    assert_same(ours, theirs)
    ours.close()


class ManyResults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, flag: bool = False, scale: float = 1.0) -> dict[str, Any]:
        y = self.first(x)
        z = self.second(y) * (2 if flag else 1)
        return {"a": y.mean(), "b": (z.square().mean() * scale, z), "none": None, "text": "t"}


def test_results_in_a_tree_and_arguments_that_are_no_tensors(tmp_path: Path) -> None:
    ours, theirs = compiled(ManyResults(), tmp_path), ManyResults()
    optimizer, reference = lohan_fx.AdamW(ours.parameters()), plain_adamw(theirs)
    for index in range(4):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(index))
        losses = []
        for model, opt in ((ours, optimizer), (theirs, reference)):
            found = model(x, flag=index == 1, scale=1.0 + index // 2)
            assert (found["none"], found["text"]) == (None, "t")
            loss = found["a"] + found["b"][0] + found["b"][1].sum()
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same(ours, theirs)
    ours.close()


def test_an_input_gets_its_gradient(tmp_path: Path) -> None:
    ours, theirs = compiled(MLP.build(), tmp_path), MLP.build()
    optimizer = lohan_fx.AdamW(ours.parameters())
    grads = []
    for model in (ours, theirs):
        batch = MLP.batch(0)
        batch["x"].requires_grad_()
        model(**batch).backward()
        grads.append(batch["x"].grad)
    torch.testing.assert_close(*grads)
    optimizer.step()
    ours.close()


def test_a_model_that_is_all_frozen_only_streams(tmp_path: Path) -> None:
    ours = compiled(Tiny().requires_grad_(False), tmp_path, "gpu=160kB, dram=110kB")
    torch.testing.assert_close(ours(**tokens(0)), Tiny()(**tokens(0)), check_stride=False)
    assert {t.cls for t in ours.plan.tensors} == {"master32"}
    ours.close()


# ---- The model object ----


def test_the_model_is_still_of_its_class_with_its_attributes(tmp_path: Path) -> None:
    plain = llama()
    names = [name for name, _ in plain.named_parameters()]
    model = compiled(llama(), tmp_path)
    assert isinstance(model, type(plain))
    assert isinstance(model, nn.Module)
    assert isinstance(model, lohan_fx.CompiledModel)
    assert model.config.hidden_size == 32
    assert [name for name, _ in model.named_parameters()] == names
    assert model.num_parameters() == plain.num_parameters()
    assert model.training
    assert not model.eval().training
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert [p.shape for p in model.parameters()] == [p.shape for p in plain.parameters()]
    model.close()


def test_a_hugging_face_model_generates_the_same_text(tmp_path: Path) -> None:
    ours, theirs = compiled(llama(), tmp_path), llama()
    ids = LLAMA.batch(0)["input_ids"][:1, :5]
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "use_cache": False}
    options["pad_token_id"] = 0
    expected = theirs.eval().generate(ids, **options)  # type: ignore[operator]
    assert torch.equal(ours.eval().generate(ids, **options), expected)
    ours.close()


def test_reading_a_parameter_gives_its_present_value(tmp_path: Path) -> None:
    ours, theirs = compiled(MLP.build(), tmp_path), MLP.build()
    optimizer = lohan_fx.AdamW(ours.parameters())
    reference = plain_adamw(theirs)
    for index in range(2):
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), msg=name)
            assert p.sum().item() == pytest.approx(q.sum().item(), rel=1e-4, abs=1e-5)
            assert p.norm().item() == pytest.approx(q.norm().item(), rel=1e-4)
        assert f"{theirs.scale.item():.4f}" in repr(ours.scale)  # type: ignore[operator]
        step(ours, optimizer, MLP.batch(index))
        step(theirs, reference, MLP.batch(index))
    with torch.no_grad():
        average = torch.zeros_like(ours.head.weight)
        average.copy_(ours.head.weight).lerp_(ours.head.weight, 0.5)
    torch.testing.assert_close(average, theirs.head.weight.detach())  # type: ignore[union-attr]
    ours.close()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda p: p.mul_(2),
    "+=": lambda p: p.__iadd__(1),
    "p[0] =": lambda p: p.__setitem__(0, 1.0),
    "copy_": lambda p: p.copy_(torch.zeros(3, 13)),
    "data": lambda p: p.data,
    "data =": lambda p: setattr(p, "data", torch.zeros(3, 13)),
    "init": lambda p: nn.init.normal_(p),
    "foreach": lambda p: torch._foreach_mul_([p], 2.0),
    "out=": lambda p: torch.add(torch.zeros(3, 13), 1, out=p),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changing_a_parameter_says_what_to_call_instead(change: str, tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    with torch.no_grad(), pytest.raises(LohanError, match=r"use model\.load_state_dict"):
        CHANGES[change](model.head.weight)
    assert_same(model, MLP.build(), exact=True)
    model.close()


def test_a_copied_or_pickled_model_says_what_to_do_instead(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    with pytest.raises(LohanError, match=r"copy the model before lohan_fx\.compile"):
        copy.deepcopy(model)
    with pytest.raises(LohanError, match=r"save model\.state_dict"):
        pickle.dumps(model.head.weight)
    with pytest.raises(LohanError, match="stay where the plan puts them"):
        model.half()
    with pytest.raises(LohanError, match="stay where the plan puts them"):
        model.to("cpu")
    model.close()


def test_a_gradient_hook_is_refused_before_and_after_compile(tmp_path: Path) -> None:
    plain = MLP.build()
    handle = plain.head.weight.register_hook(lambda g: g)  # type: ignore[union-attr]
    with pytest.raises(LohanError, match=r"'head\.weight' has gradient hooks"):
        compiled(plain, tmp_path)
    handle.remove()
    model = compiled(plain, tmp_path)
    for name in ("register_hook", "register_post_accumulate_grad_hook"):
        with pytest.raises(LohanError, match="a hook would not run"):
            getattr(model.head.weight, name)(lambda g: g)
    model.close()


def test_torchs_own_clipping_is_refused_where_it_would_do_nothing(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    model(**MLP.batch(0)).backward()
    with pytest.raises(TrainingLoopError, match="give max_grad_norm="):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    model.close()


def test_a_penalty_on_parameters_outside_of_the_model_is_refused(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    penalty = sum(p.square().sum() for p in model.parameters())
    with pytest.raises(TrainingLoopError, match="would lose that part of its gradient"):
        (model(**MLP.batch(0)) + 0.1 * penalty).backward()
    assert optimizer.last_grad_norm is None
    model.close()


def test_a_replaced_parameter_is_refused(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    step(model, optimizer, MLP.batch(0))
    old = model.head.weight
    model.head.weight = nn.Parameter(torch.zeros(3, 13))
    with pytest.raises(CaptureError, match="replaced"):
        model(**MLP.batch(1))
    model.head.weight = old
    assert step(model, optimizer, MLP.batch(1)) > 0
    model.close()


def test_a_parameter_replaced_before_the_first_step_is_refused(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    model.head.weight = nn.Parameter(torch.zeros(3, 13))
    with pytest.raises(CaptureError, match=r"head.*weight.*\(3, 13\).*replaced or added after"):
        model(**MLP.batch(0))
    optimizer.zero_grad()
    model.close()


def test_freezing_after_compile_is_refused(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    step(model, optimizer, MLP.batch(0))
    model.head.weight.requires_grad_(False)
    with pytest.raises(TrainingLoopError, match=r"requires_grad of 'head\.weight' changed"):
        model(**MLP.batch(1))
    model.head.weight.requires_grad_(True)
    assert step(model, optimizer, MLP.batch(1)) > 0
    model.close()


def test_the_report_and_the_graphs_read_well(tmp_path: Path) -> None:
    model = compiled(gpt2(), tmp_path, "gpu=600kB, dram=800kB")
    for ask in (model.report, model.graphs, lambda: model.plan):
        with pytest.raises(LohanError, match="call the model once"):
            ask()
    optimizer = lohan_fx.AdamW(model.parameters())
    step(model, optimizer, GPT2.batch(0))
    text = model.report()
    for word in (
        "GPT2LMHeadModel",
        "fp32 masters",
        "moments",
        "activations",
        "planned peak",
        "budget",
        "rates generic",
    ):
        assert word in text
    graphs = model.graphs()
    assert "torch.ops.lohan.fetch" in graphs["forward"]
    assert "torch.ops.lohan.grad" in graphs["backward"]
    assert "def skeleton" in graphs["forward_skeleton"]
    model.close()
