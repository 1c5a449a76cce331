"""Fine-tuning as people do it: LoRA through peft, tied weights, unused parameters, batch norm.

Each case runs against plain PyTorch under three budgets (all on the GPU, some in DRAM, all tiers) and
an overlap mode each; fp32 over plain ATen, where losses and weights agree to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import (
    ROOMY,
    TIGHT,
    Block,
    Tiny,
    assert_losses,
    assert_same,
    compiled,
    plain_adamw,
    step,
    steps,
    tokens,
)
from peft import LoraConfig, PeftModel, get_peft_model
from recipes import OVERLAPS
from torch import nn
from torch.nn import functional
from training import CASES, RandomPolicy, gpt2, llama

import lohan_fx
from lohan_fx.errors import CaptureError, TrainingLoopError
from lohan_fx.planner import BucketPlace, Forced, Place, Problem, Solution, solve

LLAMA = CASES["llama"]


def lora(dropout: float = 0.0) -> nn.Module:
    """The small Llama with adapters on attention and the MLP; B starts away from zero."""
    base = llama(1)
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


class Pooled(nn.Module):
    """A head, a layer and a lone parameter that the loss never reaches, as in many encoders."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 24))
        self.pooler = nn.Linear(24, 24)
        self.mask_token = nn.Parameter(torch.randn(24))
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x)
        self.pooler(hidden)
        return self.head(hidden).square().mean()


class Normed(nn.Module):
    """Batch norm between convolutions: its buffers change in every forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(6 * 64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)).square().mean()


def without_embedding() -> nn.Module:
    model = Tiny()
    model.embed.requires_grad_(False)
    return model


def normal(*shape: int) -> Callable[[int], dict[str, torch.Tensor]]:
    return lambda i: {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(i))}


@dataclass(frozen=True)
class Row:
    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, torch.Tensor]]


ROWS = {
    "lora": Row(lora, LLAMA.batch),
    "lora-dropout": Row(lambda: lora(0.2), LLAMA.batch),
    "tied": Row(gpt2, CASES["gpt2"].batch),
    "unused": Row(Pooled, normal(6, 12)),
    "batchnorm": Row(Normed, normal(4, 3, 8, 8)),
    "frozen-embedding": Row(without_embedding, tokens),
}


def place_all(weight: str, activation: str) -> Callable[[Any, Any], Any]:
    """A policy: every weight and its state in one tier, activations where they may go there."""

    def policy(problem: Problem, forced: Forced) -> Solution:
        place = Place(weight)
        return solve(
            problem,
            "greedy",
            forced=Forced(
                buckets={
                    b.index: BucketPlace(place, place) for b in problem.buckets if b.trainable
                },
                activations={a.index: Place(activation) for a in problem.activations if a.can_swap},
            ),
        )

    return policy


PLACES: dict[str, Any] = {
    "gpu": "greedy",
    "dram": place_all("dram", "dram"),
    "ssd": place_all("ssd", "ssd"),
    "mixed": RandomPolicy(3),
}


# Each row in every place and in both modes, each place in both modes.
CASE_PLACE_OVERLAP = [
    (row, place, OVERLAPS[(i + j) % 2])
    for i, row in enumerate(ROWS)
    for j, place in enumerate(PLACES)
]


@pytest.mark.parametrize(("row", "place", "overlap"), CASE_PLACE_OVERLAP)
def test_training_agrees_with_plain_pytorch(
    row: str, place: str, overlap: str, tmp_path: Path
) -> None:
    case = ROWS[row]
    ours = compiled(case.build(), tmp_path, policy=PLACES[place], overlap=overlap)
    theirs = case.build().train()
    optimizer = lohan_fx.AdamW(ours.parameters(), lr=3e-3, weight_decay=0.1)
    reference = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], 3e-3, weight_decay=0.1, foreach=False
    )
    losses: tuple[list[float], list[float]] = ([], [])
    for index in range(3):
        for model, opt, found in ((ours, optimizer, losses[0]), (theirs, reference, losses[1])):
            torch.manual_seed(index)
            found.append(step(model, opt, case.batch(index)))
    assert_losses(*losses)
    assert_same(ours, theirs)
    ours.close()


# ---- LoRA ----


def test_lora_reads_its_base_in_16_bit_and_updates_the_adapters_alone(tmp_path: Path) -> None:
    model = compiled(lora(), tmp_path, policy=RandomPolicy(5), dtype=torch.bfloat16)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-2)
    losses = steps(model, optimizer, map(LLAMA.batch, range(3)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]) == ("lora_" not in name), name
    classes = {(t.cls, "lora_" in t.name) for t in model.plan.tensors if not t.name[:1].isdigit()}
    assert ("weight16", False) in classes  # 16-bit only: no master, no moments
    assert not {("master32", False), ("moments32", False)} & classes
    plain = lora().to(torch.bfloat16).train()
    assert losses[0] == pytest.approx(plain(**LLAMA.batch(0)).loss.item(), rel=1e-2)
    model.close()


def test_adapters_are_saved_by_peft_and_load_into_a_plain_model(tmp_path: Path) -> None:
    model = compiled(lora(), tmp_path)
    steps(model, lohan_fx.AdamW(model.parameters(), lr=1e-2), map(LLAMA.batch, range(2)))
    model.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(llama(1), tmp_path / "adapter")
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            plain.eval()(**LLAMA.batch(3)).logits, model(**LLAMA.batch(3)).logits
        )
    model.close()


def test_adapters_can_be_loaded_and_switched_off_in_evaluation(tmp_path: Path) -> None:
    model, plain = compiled(lora(), tmp_path), lora()
    lohan_fx.AdamW(model.parameters())
    batch = LLAMA.batch(0)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(**batch).logits, llama(1)(**batch).logits)
    adapters = {n: v + 0.1 for n, v in plain.state_dict().items() if "lora_" in n}
    with torch.no_grad():
        before = model(**batch).logits
        model.load_state_dict(adapters, strict=False)
        assert not torch.allclose(model(**batch).logits, before)
        plain.load_state_dict(adapters, strict=False)
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    model.close()


def test_switching_adapters_off_in_training_is_refused(tmp_path: Path) -> None:
    model = compiled(lora(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    with (
        pytest.raises(TrainingLoopError, match=r"requires_grad of .*lora_A"),
        model.disable_adapter(),
    ):
        model(**LLAMA.batch(0))
    assert step(model, optimizer, LLAMA.batch(0)) > 0
    model.close()


# ---- Unused parameters ----


def test_an_unused_parameter_has_no_state_and_does_not_decay(tmp_path: Path) -> None:
    model, plain = compiled(Pooled(), tmp_path), Pooled()
    optimizer = lohan_fx.AdamW(model.parameters(), weight_decay=0.5)
    steps(model, optimizer, map(ROWS["unused"].batch, range(2)))
    reference = torch.optim.AdamW(plain.parameters(), weight_decay=0.5, foreach=False)
    steps(plain, reference, map(ROWS["unused"].batch, range(2)))
    ours, theirs = optimizer.state_dict()["state"], reference.state_dict()["state"]
    assert {index for index, state in ours.items() if state} == theirs.keys()
    assert torch.equal(model.state_dict()["mask_token"], Pooled().mask_token)
    moments = {t.name for t in model.plan.tensors if t.cls == "moments32"}
    assert not any("pooler" in name or "mask_token" in name for name in moments)
    model.close()


class Branching(Tiny):
    """Tiny with one more block, which only some forwards use, as with dropped layers."""

    def __init__(self) -> None:
        super().__init__(2)
        self.extra = Block(0.0)

    def forward(
        self, ids: torch.Tensor, labels: torch.Tensor | None = None, deep: bool = True
    ) -> torch.Tensor:
        assert labels is not None
        x = self.embed(ids)
        for block in (self.extra, *self.blocks) if deep else self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("clip", [None, 0.5], ids=["during-backward", "clipped"])
@pytest.mark.parametrize(
    "budget", [ROOMY, "gpu=200kB, dram=1MB", TIGHT], ids=["gpu", "dram", "ssd"]
)
def test_parameters_that_some_steps_leave_out_are_updated_in_the_others(
    budget: str, clip: float | None, tmp_path: Path
) -> None:
    """Their moments, their decay and their step counts wait for the next gradient."""
    batches = [{**tokens(i, batch=2), "deep": i in (0, 1, 4)} for i in range(5)]
    ours, theirs = compiled(Branching(), tmp_path, budget), Branching()
    optimizer = lohan_fx.AdamW(ours.parameters(), weight_decay=0.3, max_grad_norm=clip)
    reference = plain_adamw(theirs, weight_decay=0.3)
    for batch in batches:
        loss = step(ours, optimizer, batch)
        expected = theirs(**batch)
        expected.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        reference.step()
        reference.zero_grad()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same(ours, theirs)
    counts = [
        {index: int(state["step"]) for index, state in opt.state_dict()["state"].items()}
        for opt in (optimizer, reference)
    ]
    assert counts[0] == counts[1]
    assert set(counts[0].values()) == {3, 5}
    ours.close()


def test_a_parameter_that_the_first_step_leaves_out_may_not_come_back(tmp_path: Path) -> None:
    class Late(Pooled):
        def forward(self, x: torch.Tensor, pool: bool = False) -> torch.Tensor:
            hidden = self.body(x) + self.mask_token
            return self.head(self.pooler(hidden) if pool else hidden).square().mean()

    model = compiled(Late(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    batch = ROWS["unused"].batch(0)
    step(model, optimizer, batch)
    with pytest.raises(CaptureError, match=r"'pooler\.weight' has a gradient .* none in the first"):
        model(**batch, pool=True)
    assert step(model, optimizer, batch) > 0
    model.close()


def test_a_model_none_of_whose_parameters_is_reached_is_refused(tmp_path: Path) -> None:
    class Aside(Pooled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.body(x).detach() * x.sum()).sum()

    model = compiled(Aside(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    with pytest.raises(CaptureError, match="the loss does not depend on them"):
        model(ROWS["unused"].batch(0)["x"].requires_grad_())
    optimizer.zero_grad()
    model.close()
