"""Evaluation between steps, and input shapes that change: same numbers as plain, same budget."""

from __future__ import annotations

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
from training import CASES, Batch, loss_of

import lohan_fx
from lohan_fx.compiler import dynamo
from lohan_fx.planner import Forced, Problem, Solution, solve, validate
from lohan_fx.runtime import Runtime, RuntimeOptions

MLP = CASES["mlp"]


# ---- Evaluation ----


@pytest.mark.parametrize("budget", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_evaluation_before_between_and_after_steps_agrees_with_plain(
    budget: str, tmp_path: Path
) -> None:
    ours, theirs = compiled(Tiny(), tmp_path, budget), Tiny()
    optimizer = lohan_fx.AdamW(ours.parameters())
    reference = plain_adamw(theirs)

    def evaluate() -> None:
        outputs = []
        for model in (ours, theirs):
            model.eval()
            with torch.no_grad():
                outputs.append(model(tokens(9)["ids"]))
            assert not outputs[-1].requires_grad
            model.train()
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)

    evaluate()
    for index in range(3):
        step(ours, optimizer, tokens(index))
        step(theirs, reference, tokens(index))
        evaluate()
    assert_same(ours, theirs)
    # Captured for evaluation first, for training, and once more under training's placements.
    assert [c.training for c in ours._lohan.captured] in ([False, True], [False, True, False])
    ours.close()


def test_evaluation_between_forward_and_backward_does_not_disturb(tmp_path: Path) -> None:
    model, other = (compiled(Tiny(), tmp_path, TIGHT) for _ in range(2))
    optimizer, reference = (lohan_fx.AdamW(m.parameters()) for m in (model, other))
    for index in range(2):
        loss = loss_of(model(**tokens(index)))
        with torch.no_grad():
            model(**tokens(9))
        loss.backward()
        optimizer.step()
        step(other, reference, tokens(index))
    assert_same(model, other, exact=True)
    model.close()
    other.close()


def test_inference_mode_works(tmp_path: Path) -> None:
    model, plain = compiled(MLP.build(), tmp_path), MLP.build()
    optimizer = lohan_fx.AdamW(model.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(model(**MLP.batch(0)), plain(**MLP.batch(0)))
    assert step(model, optimizer, MLP.batch(0)) > 0
    model.close()


def test_dropout_is_off_in_evaluation(tmp_path: Path) -> None:
    case = CASES["mlp-dropout"]
    model, plain = compiled(case.build(), tmp_path), case.build().eval()
    optimizer = lohan_fx.AdamW(model.parameters())
    step(model, optimizer, case.batch(0))
    plain.load_state_dict(model.state_dict())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**case.batch(1)), plain(**case.batch(1)))
    model.close()


def test_clipping_may_be_asked_for_after_an_evaluation(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    with torch.no_grad():
        model(**MLP.batch(0))
    optimizer = lohan_fx.AdamW(model.parameters(), max_grad_norm=0.1)
    step(model, optimizer, MLP.batch(0))
    assert optimizer.last_grad_norm is not None and optimizer.last_grad_norm > 0.1
    with torch.no_grad():
        model(**MLP.batch(0))
    step(model, optimizer, MLP.batch(1))
    model.close()


# ---- Shapes ----


def test_a_smaller_last_batch_and_other_lengths_agree_with_plain(tmp_path: Path) -> None:
    full, short, narrow = tokens(0), tokens(1, batch=1), tokens(2, length=7)
    batches = [full, short, narrow, full, short]
    theirs = Tiny()
    reference = plain_adamw(theirs)
    expected = steps(theirs, reference, batches)
    runs = []
    for budget in (ROOMY, TIGHT):
        ours = compiled(Tiny(), tmp_path, budget)
        optimizer = lohan_fx.AdamW(ours.parameters())
        losses = steps(ours, optimizer, batches)
        assert len(ours._lohan.captured) == 3
        assert_losses(losses, expected)
        assert_same(ours, theirs)
        runs.append((losses, ours.state_dict()))
        ours.close()
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


@pytest.fixture
def placings(monkeypatch: pytest.MonkeyPatch) -> list[RuntimeOptions]:
    """The options of every placing of any runtime: values and staging set up, or changed."""
    found: list[RuntimeOptions] = []
    place = Runtime.place

    def counted(self: Runtime, placements: Any, options: RuntimeOptions) -> None:
        found.append(options)
        place(self, placements, options)

    monkeypatch.setattr(Runtime, "place", counted)
    return found


def in_turns(
    first: Batch, second: Batch, budget: str, folder: Path, *, turns: int = 3, **options: Any
) -> Any:
    """Steps of two batches in turns, as plain PyTorch has them; the model, within its budget."""
    batches = [first, second] * turns
    theirs, ours = Tiny(), compiled(Tiny(), folder, budget, **options)
    optimizer = lohan_fx.AdamW(ours.parameters())
    assert_losses(steps(ours, optimizer, batches), steps(theirs, plain_adamw(theirs), batches))
    assert_same(ours, theirs)
    peaks, limits = ours._lohan.stats().peak_bytes, ours._lohan.settings.capacities
    assert peaks["gpu"] <= limits.gpu_bytes
    assert peaks["dram"] <= limits.dram_bytes
    return ours


def test_shapes_in_turns_share_their_staging(
    placings: list[RuntimeOptions], tmp_path: Path
) -> None:
    """Either alone would have other numbers of buffers here, as the next test shows."""
    full, short = tokens(0), tokens(1, batch=1)
    model = in_turns(full, short, "gpu=200kB, dram=420kB", tmp_path)
    one, other = model._lohan.captured
    assert one.placements == other.placements
    assert one.options == other.options == placings[-1]
    assert len(placings) <= 2
    for captured in (one, other):
        assert validate(captured.problem, captured.solution) == []
        assert captured.plan.predicted == captured.solution.predicted
    model.close()


def test_staging_of_their_own_is_opened_anew_and_is_as_exact(
    placings: list[RuntimeOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where none suits both shapes: here, because none is looked for."""
    monkeypatch.setattr("lohan_fx.captured.in_turns", lambda steps: None)
    in_turns(tokens(0), tokens(1, batch=1), "gpu=200kB, dram=420kB", tmp_path).close()
    assert len(placings) == 6


def test_a_larger_batch_than_the_first_moves_values_once(
    placings: list[RuntimeOptions], tmp_path: Path
) -> None:
    """The smaller one is then planned anew, under the placements of the larger."""
    small, large = tokens(0, batch=1, length=6), tokens(1, batch=8)
    model = in_turns(small, large, "gpu=520kB, dram=1MB", tmp_path)
    first, *later = model._lohan.captured
    assert all(first.placements != captured.placements for captured in later)
    assert len({captured.placements for captured in later}) == 1
    # Besides, staging is opened anew for what the smaller one needs under these placements.
    assert len(placings) <= 3
    model.close()


def test_shapes_that_no_placement_suits_move_values_in_turns(
    placings: list[RuntimeOptions], tmp_path: Path
) -> None:
    """Each is planned anew once, not at every turn."""

    def apart(problem: Problem, forced: Forced) -> Solution:
        large = sum(activation.bytes for activation in problem.activations) > 100_000
        found = solve(problem, policy="keep-all" if large else "zero-offload")
        if any(found.buckets[index] != place for index, place in forced.buckets.items()):
            raise lohan_fx.InfeasiblePlan("this policy has one placement for each shape")
        return found

    small, large = tokens(0, batch=1, length=6), tokens(1, batch=8)
    model = in_turns(small, large, ROOMY, tmp_path, turns=5, policy=apart)
    assert len({captured.placements for captured in model._lohan.captured}) == 2
    assert len(model._lohan.captured) <= 6
    assert len(placings) == 10
    model.close()


def test_many_lengths_are_one_program_each(tmp_path: Path) -> None:
    """More than Dynamo's default limit of recompilations."""
    model, plain = compiled(MLP.build(), tmp_path), MLP.build()
    optimizer, reference = lohan_fx.AdamW(model.parameters()), plain_adamw(plain)
    batch = {name: value.repeat(3, 1) for name, value in MLP.batch(0).items()}
    batches = [{name: value[:size] for name, value in batch.items()} for size in range(2, 13)]
    assert_losses(steps(model, optimizer, batches), steps(plain, reference, batches))
    assert len(model._lohan.captured) == len(batches)
    model.close()


def test_more_shapes_than_there_may_be_are_refused_and_the_known_ones_train(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dynamo, "MAX_PROGRAMS", 3)
    model, plain = compiled(MLP.build(), tmp_path), MLP.build()
    optimizer, reference = lohan_fx.AdamW(model.parameters()), plain_adamw(plain)
    batches = [{name: value[:size] for name, value in MLP.batch(0).items()} for size in range(2, 6)]
    losses = steps(model, optimizer, batches[:3])
    words = "more than 3 sets of input shapes .* pad inputs to a few lengths"
    with (
        torch._dynamo.config.patch(recompile_limit=3),
        pytest.raises(lohan_fx.CaptureError, match=words),
    ):
        model(**batches[3])
    assert len(model._lohan.captured) == 3
    losses += steps(model, optimizer, batches[:3])
    assert_losses(losses, steps(plain, reference, batches[:3] * 2))
    assert_same(model, plain)
    model.close()


def test_a_shape_that_fits_nothing_is_refused_and_training_goes_on(tmp_path: Path) -> None:
    model = compiled(Tiny(), tmp_path, TIGHT)
    optimizer = lohan_fx.AdamW(model.parameters())
    losses = [step(model, optimizer, tokens(0))]
    plan = model.plan
    huge = {k: v.repeat(16, 1) for k, v in tokens(1).items()}
    with pytest.raises(lohan_fx.InfeasiblePlan):
        model(**huge)
    assert model.plan is plan
    losses.append(step(model, optimizer, tokens(1)))
    other = compiled(Tiny(), tmp_path)
    expected = steps(other, lohan_fx.AdamW(other.parameters()), map(tokens, range(2)))
    assert losses == expected
    model.close()
    other.close()
