"""Training with states that rest in DRAM and pass through the GPU for their updates."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from late_device import LateDevice
from loops import TINY, Tiny, assert_same, compiled, step, steps, tokens
from memory_meter import metered_skeletons
from recipes import InOneTier, Recipe, assert_same_bits, plain, through_lohan
from torch import nn
from training import CASES, loss_of

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

BF16 = torch.bfloat16
STEPS = tuple(((seed, 1.0),) for seed in range(5))
MODES = ["backward", "next-forward", "speculative", "serial"]


@dataclass(frozen=True)
class Pattern:
    """Gives each bucket the next of these places, in turn, or the first of those that it may have:
    weights on the GPU or in DRAM, and "streamed" states, or others in DRAM.
    """

    places: tuple[str, ...]

    def __call__(self, problem: Problem, forced: Forced) -> Solution:
        buckets = []
        for bucket, wanted in zip(problem.buckets, itertools.cycle(self.places)):
            on_gpu, in_dram = streamed_places(problem, bucket) or [None, None]
            choices = {
                "gpu": on_gpu,
                "dram": in_dram,
                "cpu": BucketPlace(Place.DRAM, Place.DRAM),
                "resident": BucketPlace(Place.GPU, Place.GPU),
            }
            buckets.append(choices[wanted] or choices["cpu"])
        activations = [activation_places(a)[0] for a in problem.activations]
        windows = Ledger(problem, buckets, activations).windows(Room.ITEM)
        return Solution(
            policy=" ".join(self.places),
            buckets=tuple(buckets),
            activations=tuple(activations),
            windows=windows,
            predicted=predict(problem, buckets, activations, windows),
        )


MIXED = Pattern(("gpu", "cpu", "dram", "resident", "dram"))
ALL = Pattern(("gpu", "dram"))


def streamed_only(model: Any, optimizer: Any) -> None:
    updates = model._lohan.stats().updates
    assert updates["streamed"] > 0 and updates["params"] == 0


@pytest.mark.parametrize(
    ("name", "overlap"),
    [
        ("gpt2", "next-forward"),
        ("llama", "backward"),
        ("mlp", "serial"),
        *(("tiny", mode) for mode in MODES),
    ],
)
def test_streamed_states_train_as_plain_pytorch_and_as_states_in_dram(
    name: str, overlap: str, tmp_path: Path
) -> None:
    recipe = Recipe({"tiny": TINY, **CASES}[name], BF16)
    ours = through_lohan(recipe, tmp_path, "streamed", overlap, check=streamed_only)
    ours.assert_close(plain(recipe), BF16)
    theirs = through_lohan(recipe, tmp_path, "dram", overlap)
    assert_same_bits({"streamed": ours, "dram": theirs})


@pytest.mark.parametrize(
    ("overlap", "limit"), [("next-forward", 0.05), ("speculative", 1.5), ("serial", 0.05)]
)
def test_clipped_steps_are_those_of_states_in_dram(
    overlap: str, limit: float, tmp_path: Path
) -> None:
    recipe = Recipe(TINY, BF16, STEPS, max_grad_norm=limit)
    ours = through_lohan(recipe, tmp_path, overlap=overlap, policy=MIXED)
    theirs = through_lohan(recipe, tmp_path, "dram", overlap)
    assert_same_bits({"streamed": ours, "dram": theirs})
    assert any(norm is not None and norm > limit for norm in ours.run.norms)


def test_a_schedule_is_followed(tmp_path: Path) -> None:
    losses = []
    for policy in (ALL, InOneTier("dram")):
        model = compiled(Tiny(2), tmp_path, dtype=BF16, policy=policy)
        optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        losses.append([])
        for seed in range(4):
            losses[-1].append(step(model, optimizer, tokens(seed)))
            schedule.step()
        model.close()
    assert losses[0] == losses[1]


def test_frozen_parameters_stay_as_they_are(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = Tiny()
        model.embed.requires_grad_(False)
        model.blocks[1].requires_grad_(False)
        return model

    models = [compiled(build(), tmp_path, dtype=BF16, policy=p) for p in (ALL, InOneTier("dram"))]
    losses = []
    for model in models:
        optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-2)
        losses.append(steps(model, optimizer, map(tokens, range(3))))
    assert losses[0] == losses[1]
    assert models[0]._lohan.stats().updates["streamed"] > 0
    assert_same(*models, exact=True)
    for model in models:
        model.close()


class Branches(nn.Module):
    """Leaves one of two layers out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(2))
        self.head = nn.Linear(40, 3)

    def forward(self, x: torch.Tensor, only: int | None = None) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            if only is None or only == index:
                x = layer(x).tanh()
        return self.head(x).square().mean()


def test_parameters_that_a_step_leaves_out_keep_their_values(tmp_path: Path) -> None:
    found = []
    for policy in (ALL, InOneTier("dram")):
        model = compiled(Branches(), tmp_path, dtype=BF16, policy=policy)
        optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for only in (None, 0, 1, None, 0):
            x = torch.ones(2, 40, dtype=BF16)
            losses.append(step(model, optimizer, {"x": x, "only": only}))
        found.append((losses, {n: v.clone() for n, v in model.state_dict().items()}))
        model.close()
    assert found[0][0] == found[1][0]
    assert all(torch.equal(v, found[1][1][n]) for n, v in found[0][1].items())


# Plans.


def test_a_step_moves_the_bytes_that_the_plan_says(tmp_path: Path) -> None:
    model = compiled(Tiny(), tmp_path, dtype=BF16, policy=Pattern(("gpu",)))
    optimizer = lohan_fx.AdamW(model.parameters())
    step(model, optimizer, tokens(0))
    model._lohan.runtime.drain()
    before = model._lohan.stats().moved_bytes
    step(model, optimizer, tokens(1))
    model._lohan.runtime.drain()
    after = model._lohan.stats().moved_bytes
    states = sum(bucket.state_bytes for bucket in model._lohan.captured[0].problem.buckets)
    assert {lane: after[lane] - before[lane] for lane in ("h2d", "d2h")} == {
        "h2d": states,
        "d2h": states,
    }
    model.close()


@pytest.mark.parametrize("overlap", MODES)
@pytest.mark.parametrize("policy", [ALL, MIXED], ids=["all", "mixed"])
def test_what_waits_for_the_link_is_in_the_planned_peak(
    policy: Pattern, overlap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def open_device(device: torch.device) -> LateDevice:
        opened.append(LateDevice(patience=300))
        return opened[-1]

    monkeypatch.setattr("lohan_fx.runtime.runtime.open_device", open_device)
    options: dict[str, Any] = {"dtype": BF16, "policy": policy, "overlap": overlap}
    model = compiled(Tiny(), tmp_path, poison=False, **options)
    optimizer = lohan_fx.AdamW(model.parameters())
    step(model, optimizer, tokens(0))
    runtime = model._lohan.runtime
    runtime.drain()
    resident = runtime.stats().current_bytes["gpu"]
    with metered_skeletons() as meter:
        for seed in (1, 2):
            loss_of(model(**tokens(seed))).backward()
            with meter:
                optimizer.step()
    peak = resident + sum(value.nbytes for value in tokens(0).values()) + meter.peak_bytes
    predicted = model.plan.predicted.peak_bytes["gpu"]
    assert 0.5 * predicted <= peak <= predicted
    model.close()


def test_a_plan_with_streamed_states_is_replayed(tmp_path: Path) -> None:
    first = compiled(Tiny(2), tmp_path, dtype=BF16, policy=MIXED)
    losses = steps(first, lohan_fx.AdamW(first.parameters()), map(tokens, range(3)))
    (tmp_path / "plan.json").write_text(first.plan.to_json())
    first._lohan.runtime.drain()
    counts = first._lohan.stats().updates
    first.close()
    again = compiled(Tiny(2), tmp_path, dtype=BF16, plan=str(tmp_path / "plan.json"))
    assert steps(again, lohan_fx.AdamW(again.parameters()), map(tokens, range(3))) == losses
    again._lohan.runtime.drain()
    found = again._lohan.stats().updates
    for what in ("streamed", "params"):
        assert found[what] == counts[what] > 0
    again.close()


# Values that move.


def in_turn(*policies: Callable[[Problem, Forced], Solution]) -> Any:
    """Each of them for one plan, the last one for all others."""
    left = list(policies)

    def policy(problem: Problem, forced: Forced) -> Solution:
        return (left.pop(0) if len(left) > 1 else left[0])(problem, forced)

    return policy


@pytest.mark.parametrize("overlap", ["backward", "speculative"])
def test_states_begin_to_pass_through_the_gpu_and_cease_to_with_the_shapes(
    overlap: str, tmp_path: Path
) -> None:
    policies = (InOneTier("dram"), ALL, MIXED)
    ours = compiled(Tiny(2), tmp_path, dtype=BF16, overlap=overlap, policy=in_turn(*policies))
    theirs = compiled(Tiny(2), tmp_path, dtype=BF16, overlap=overlap, policy=InOneTier("dram"))
    batches = [tokens(i, length=length) for i, length in enumerate((12, 7, 9, 12, 7))]
    losses = []
    for model in (ours, theirs):
        optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-2)
        losses.append(steps(model, optimizer, batches))
    assert losses[0] == losses[1]
    assert_same(ours, theirs, exact=True)
    streamed = [any(p.streamed for p in c.placements) for c in ours._lohan.captured]
    assert set(streamed) == {False, True}
    ours.close()
    theirs.close()


def test_sums_of_several_backwards_end_it(tmp_path: Path) -> None:
    losses = []
    for policy in (ALL, InOneTier("dram")):
        model = compiled(Tiny(2), tmp_path, dtype=BF16, policy=policy)
        optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-2)
        found = steps(model, optimizer, map(tokens, range(2)))
        with model.no_sync():
            loss_of(model(**tokens(2))).backward()
        found += steps(model, optimizer, map(tokens, range(3, 5)))
        losses.append(found)
        model.close()
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("overlap", "asynchronous"), [("backward", True), ("next-forward", False)])
def test_a_checkpoint_is_that_of_the_last_step(
    overlap: str, asynchronous: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"dtype": BF16, "overlap": overlap}
    model = compiled(Tiny(2), tmp_path, policy=ALL, **options)
    optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-2)
    steps(model, optimizer, map(tokens, range(2)))
    saving = lohan_fx.save(model, optimizer, tmp_path / "ckpt", asynchronous=asynchronous)
    expected = steps(model, optimizer, map(tokens, range(2, 5)))
    if asynchronous:
        assert saving is not None
        saving.wait()
    model.close()
    for policy in (ALL, InOneTier("dram"), InOneTier("gpu")):
        again = compiled(Tiny(2), tmp_path, policy=policy, **options)
        optimizer = lohan_fx.AdamW(again.parameters(), lr=1e-2)
        lohan_fx.load(again, optimizer, tmp_path / "ckpt")
        assert steps(again, optimizer, map(tokens, range(2, 5))) == expected
        # Also into a model that has trained already.
        lohan_fx.load(again, optimizer, tmp_path / "ckpt")
        assert steps(again, optimizer, map(tokens, range(2, 5))) == expected
        again.close()
